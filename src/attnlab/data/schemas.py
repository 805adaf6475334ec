"""The schemas of the JSON files of prepared folders, as far as they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from ..ranges import LARGEST, Range

Number = Annotated[int, Range(0, LARGEST)]  # of tokens or documents


class Shard(TypedDict):
    """What the manifest says of a file of token ids."""

    file: str
    tokens: Number
    sha256: str


class Index(TypedDict):
    """What the manifest says of the file of the documents' beginnings."""

    file: str
    sha256: str


class Split(TypedDict):
    """What the manifest says of a split."""

    tokens: Number
    documents: Number
    shards: list[Shard]
    index: Index


class Made(TypedDict):
    """What the manifest says of the tokenizer."""

    fingerprint: str


class Manifest(TypedDict):
    """What a manifest.json holds, as far as it is read."""

    dtype: Literal["<u2", "<u4"]
    tokenizer: Made
    splits: dict[str, Split]


class State(TypedDict):
    """What the state.json of an unfinished folder holds."""

    plan: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    command: str
    sources: NotRequired[dict[str, dict[str, Any]]]
