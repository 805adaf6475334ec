"""Documents that share a row, each read as if it were alone.

Whatever works token by token runs on the packed tokens, padding left out. Around each attention the documents are taken
apart, each into a row of its own that begins at position 0, and put together again behind it. So no document can reach
another in any mechanism, whatever it remembers: sequences of a batch never meet, and a later pad changes no token.

The price: inside attention there are as many rows as documents, and all are as long as the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import Output
from .spec import Mask

PLAIN = Mask(plain=True)


@dataclass(frozen=True)
class Documents:
    """Where each real token of packed rows lies once every document has a row of its own."""

    size: torch.Size  # B L
    real: Tensor  # R: of each real token, row by row, its place among all B L
    slots: Tensor  # R: and among all N M
    positions: Tensor  # N M: N documents, M tokens in the longest; -1 after the end of a shorter one

    @classmethod
    @torch.compiler.disable  # its shapes follow from the data
    def of(cls, documents: Tensor) -> Documents:
        """From B L, int: neighbours in a row with the same number are one document; -1 is padding."""
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        real = (documents >= 0).flatten().nonzero()[:, 0]
        begins = begins.flatten()[real]
        number = torch.arange(len(real), device=documents.device)
        row = begins.cumsum(0) - 1
        position = number - number[begins][row]
        N, M = max(1, int(begins.sum())), 1 + int(position.max()) if len(position) else 1
        slots = row * M + position
        positions = torch.full((N * M,), -1, device=documents.device).index_copy(0, slots, position)
        return cls(documents.shape, real, slots, positions.view(N, M))

    @property
    def places(self) -> Tensor:
        """1 R: of each real token, its position in its document."""
        return self.positions.flatten()[self.slots][None]

    def packed(self, x: Tensor) -> Tensor:
        """Of B L ..., the real tokens: 1 R ..."""
        return x.flatten(0, 1).index_select(0, self.real)[None]

    def unpacked(self, x: Tensor) -> Tensor:
        """The inverse, B L ..., with zeros for padding."""
        return x.new_zeros(self.size.numel(), *x.shape[2:]).index_copy(0, self.real, x[0]).unflatten(0, self.size)

    def attend(self, attention: Callable[..., Output], x: Tensor) -> Tensor:
        """What `attention` makes of each document alone: 1 R D -> 1 R D."""
        N, M = self.positions.shape
        rows = x.new_zeros(N * M, x.shape[-1]).index_copy(0, self.slots, x[0]).view(N, M, -1)
        y, _ = attention(rows, self.positions, None, PLAIN)
        return y.flatten(0, 1).index_select(0, self.slots)[None]
