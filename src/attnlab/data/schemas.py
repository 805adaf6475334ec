"""The schemas of the JSON files of prepared folders, as far as they are read."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from ..ranges import LARGEST, Range

Number = Annotated[int, Range(0, LARGEST)]  # of tokens or documents


class Shard(TypedDict):
    """The words of the manifest on a file of token ids."""

    file: str
    tokens: Number
    sha256: str


class Index(TypedDict):
    """The words of the manifest on the file of the documents' beginnings."""

    file: str
    sha256: str


class PreparedSplit(TypedDict):
    """The words of the manifest on a split."""

    tokens: Number
    documents: Number
    shards: list[Shard]
    index: Index


class Made(TypedDict):
    """The words of the manifest on the tokenizer."""

    fingerprint: str


class Manifest(TypedDict):
    """The content of a manifest.json, as far as it is read."""

    dtype: Literal["<u2", "<u4"]
    tokenizer: Made
    splits: dict[str, PreparedSplit]


class PreparedState(TypedDict):
    """The content of the state.json of an unfinished folder."""

    plan: dict[str, Any]
    splits: dict[str, dict[str, Any]]
    command: str
    sources: NotRequired[dict[str, dict[str, Any]]]
