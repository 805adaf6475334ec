"""Shapes and types that the tensor code declares are checked while the tests run, and only then."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

import browser as chromium
import pytest
from shape_checks import checked

os.environ.setdefault("OMP_NUM_THREADS", "1")

CHECKED = (
    "attnlab.cache",
    "attnlab.ops",
    "attnlab.layers",
    "attnlab.recording",
    "attnlab.kernels",
    "attnlab.attention",
)


def check_all(module: ModuleType) -> None:
    for name, value in vars(module).copy().items():
        own = (
            isinstance(value, FunctionType)
            and value.__module__ == module.__name__
            and not hasattr(value, "__wrapped__")
        )
        if own and any("Tensor" in str(annotation) for annotation in value.__annotations__.values()):
            setattr(module, name, checked(value))


class Hook(MetaPathFinder):
    """Checks the functions of a module as soon as it has been imported, before anyone else takes them from it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not any(name == package or name.startswith(f"{package}.") for package in CHECKED):
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                check_all(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


assert not [name for name in sys.modules if name.startswith(CHECKED)], "imported before it could be checked"
sys.meta_path.insert(0, Hook())


@pytest.fixture
def audited_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`attnlab audit` judges in this process, where PyTorch is imported already; tests/audit/test_apart.py tries real
    ones. What it is told goes through JSON, as on the way to a process and back."""
    from attnlab.audit import apart
    from attnlab.audit.result import Audit
    from attnlab.audit.target import audit_target

    def here(target: str, *, seconds: float, tell: Any = None, **instructions: Any) -> Audit:
        order = json.loads(json.dumps(instructions))
        found = json.loads(json.dumps(audit_target(target, tell=tell, **order).to_dict()))
        return Audit.from_dict(found)

    monkeypatch.setattr(apart, "audit_apart", here)


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    """A browser for the tests of one file. Where there is none, CI fails; elsewhere the tests say that they were not
    run, because nobody has to install a browser to work on a mechanism."""
    program = chromium.find()
    if program is None:
        said = "no Chromium was found (apt-get install chromium), so the page was NOT tried in a browser"
        if os.environ.get("CI") == "true":
            pytest.fail(said)
        pytest.skip(said)
    with chromium.Browser(program) as opened:
        yield opened
