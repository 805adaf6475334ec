"""An audit: the laws, put to a mechanism or to anyone's attention class or function. A framework is imported late."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .result import Audit

if TYPE_CHECKING:
    from .target import audit_target

__all__ = ["Audit", "audit_target"]


def __getattr__(name: str) -> Any:
    if name == "audit_target":
        from .target import audit_target

        return audit_target
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
