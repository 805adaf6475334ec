"""Packed rows: documents that share a row, each read as if it were alone.

Layers that work token by token run on the packed tokens, without padding. Before each attention every document is moved
to a row of its own that begins at position 0, and after it moved back. So no document can reach another in any
mechanism: sequences of a batch never meet, and a later pad changes no token.

The cost: inside attention there are as many rows as documents, and all are as long as the longest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .arguments import check_tensor
from .cache import Output
from .spec import Mask

PLAIN = Mask(plain=True)


@dataclass(frozen=True)
class PackedRows:
    """The places of the R real tokens of packed rows, B L, and of N rows of one document each, M tokens long."""

    size: torch.Size  # B L
    real: Tensor  # R: the index of each real token among all B L, row by row
    slots: Tensor  # R: the index of each real token among all N M
    positions: Tensor  # N M: positions in the documents; -1 after the end of one that is shorter than the longest

    @classmethod
    @torch._disable_dynamo  # its shapes follow from the data; torch.compiler.disable would import the compiler here
    def of(cls, documents: Tensor) -> PackedRows:
        """Return the places for `documents` (B L, int): neighbours with one number are one document, -1 is padding."""
        check_tensor("documents", documents, "B L", whole=True)
        begins = torch.ones_like(documents, dtype=torch.bool)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        real = (documents >= 0).flatten().nonzero()[:, 0]
        begins = begins.flatten()[real]
        number = torch.arange(len(real), device=documents.device)
        row = begins.cumsum(0) - 1
        position = number - number[begins][row]
        N = max(1, int(begins.sum()))
        M = 1 + int(position.max()) if len(position) else 1
        slots = row * M + position
        positions = torch.full((N * M,), -1, device=documents.device).index_copy(0, slots, position)
        return cls(documents.shape, real, slots, positions.view(N, M))

    @property
    def places(self) -> Tensor:
        """Return the position of each real token in its document: 1 R."""
        return self.positions.flatten()[self.slots][None]

    def packed(self, x: Tensor) -> Tensor:
        """Return the real tokens of x (B L ...): 1 R ..."""
        return x.flatten(0, 1).index_select(0, self.real)[None]

    def unpacked(self, x: Tensor) -> Tensor:
        """Return packed tokens (1 R ...) in their rows: B L ..., zeros for padding."""
        return x.new_zeros(self.size.numel(), *x.shape[2:]).index_copy(0, self.real, x[0]).unflatten(0, self.size)

    def attend(self, attention: Callable[..., Output], x: Tensor, mask: Mask = PLAIN) -> Tensor:
        """Return the output of `attention` for each document alone: 1 R D -> 1 R D. `mask`: with what layers gave."""
        N, M = self.positions.shape
        rows = x.new_zeros(N * M, x.shape[-1]).index_copy(0, self.slots, x[0]).view(N, M, -1)
        y, _ = attention(rows, self.positions, None, replace(mask, plain=True))
        return y.flatten(0, 1).index_select(0, self.slots)[None]
