"""The kernel that trains on a CPU, over more blocks of queries than one, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnlab import Mask, attend
from attnlab.kernels.cpu_blocks import BLOCK

L = 2 * BLOCK + 21


def answers(impl: str, mask: Mask, positions: torch.Tensor, **more: Any) -> list[torch.Tensor]:
    """The answer and the gradients of queries, keys, values and of what is per key."""
    numbers = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=numbers, dtype=torch.float64).requires_grad_()

    q, k, v, total = drawn(2, L, 4, 6), drawn(2, L, 2, 6), drawn(2, L, 2, 5), drawn(2, L, 4)
    if more.pop("forgets", False):
        more |= {"score": lambda z, of_key: z - of_key, "of_key": (total,)}
    y = attend(q, k, v, positions, positions, mask, impl=impl, **more)
    weight = torch.randn(y.shape, generator=numbers, dtype=torch.float64) * (positions >= 0)[..., None, None]
    (y * weight).sum().backward()
    return [y * (positions >= 0)[..., None, None], *(t.grad for t in (q, k, v, total) if t.grad is not None)]


@pytest.mark.parametrize("window", [None, 1, 5, BLOCK, BLOCK + 1, 2 * BLOCK + 3, L, 10 * L])
@pytest.mark.parametrize("kind", ["plain", "padded", "kept", "forgets"])
def test_a_window_hides_what_it_hides(window: int | None, kind: str) -> None:
    positions = torch.arange(L).repeat(2, 1)
    more: dict[str, Any] = {}
    if kind == "padded":
        positions[1, L - 30 :] = -1
    if kind == "kept":
        more["keep"] = torch.rand(2, 4, L, L, generator=torch.Generator().manual_seed(1)) < 0.3
    if kind == "forgets":
        more["forgets"] = True
    mask = Mask(window=window, plain=True)
    want = answers("reference", mask, positions, **more)
    got = answers("sdpa", mask, positions, **more)
    assert len(want) == len(got) >= 4
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
