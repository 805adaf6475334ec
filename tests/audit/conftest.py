"""Audits in this process try fewer long lengths here; those in a process of their own try them all."""

from __future__ import annotations

import pytest

from attnlab.laws import prepare


@pytest.fixture(autouse=True)
def fewer_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "TILES", (63, 64, 65, 129, 257))
