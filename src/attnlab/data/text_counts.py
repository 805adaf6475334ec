"""The text that became ids, where they do not say all of it: how long it was, and what is lost (`encoding.TEXT`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import checksum
from .encoding import TEXT
from .shards import SplitWriter

EXAMPLES = 10  # unknown characters that a manifest names

Counts = tuple[np.ndarray | None, np.ndarray | None]  # see `SplitWriter.add`; None: not known


@dataclass
class MovingText:
    """The counts of documents that move from the end of the training part into another one."""

    left: dict[str, Any]  # "text" of the documents that stay; of one document that is cut, nobody knows
    edges: np.ndarray | None  # TEXT before each document that moves, and after the last

    @classmethod
    def of(cls, folder: Path, train: Mapping[str, Any], kept: int) -> MovingText:
        """Return the counts where `kept` documents stay; `train` is what `SplitWriter.commit` said of all."""
        if "text" not in train:
            return cls({}, None)
        if train["text"] is None or kept == train["documents"]:
            return cls({"text": None}, None)
        rows = np.fromfile(folder / "train.text.bin", "<i8").reshape(-1, len(TEXT))
        return cls({"text": rows[kept].tolist()}, np.concatenate([rows[kept:], np.array([train["text"]])]))

    def of_next(self, documents: int) -> Counts:
        """Return what `SplitWriter.add` is to be told of the next `documents`, and pass over them."""
        if self.edges is None:
            return None, None
        edges = self.edges - self.edges[0]
        self.edges = self.edges[documents:]
        return edges[:documents], edges[documents]


def described_text(writer: SplitWriter, lost: Iterable[str]) -> dict[str, Any]:
    """Return what a manifest says of a split's text. lost: characters that no id says, the most frequent one first."""
    text = None if writer.text is None else dict(zip(TEXT, writer.text, strict=True))
    file = {"file": writer.texts.name, "sha256": checksum(writer.texts).hexdigest()}
    return {"text": text, "unknown": "".join(list(lost)[:EXAMPLES]), "texts": file}
