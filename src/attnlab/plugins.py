"""Mechanisms of other packages: found by their entry points, tried in a process of their own, then imported.

Code of somebody else's may do anything while it is imported, ending the process included. So it is imported first where
that harms nobody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType

from .errors import UserError, quoted
from .spec import AttentionConfig

GROUP = "attnlab.attention"
PATIENCE = 120.0  # seconds that an import may take; those of a framework take some
TRIED = "ATTNLAB_TRIED_PLUGINS"  # in the environment: those that were tried, for the processes that this one starts
# the import prints only what it raises, as the last line
TRIAL = """
import sys
from importlib.metadata import EntryPoint
sys.path[:] = sys.argv[4:]
try:
    EntryPoint(*sys.argv[1:4]).load()
except BaseException as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0], file=sys.stderr)
    sys.exit(3)
print("imported")
"""


@cache
def plugins() -> dict[str, EntryPoint]:
    """Return the entry points of other packages, by the mechanism's name."""
    return {point.name: point for point in entry_points(group=GROUP)}


@cache
def plugin(name: str) -> ModuleType:
    """Return the module of another package's mechanism. Raises `UserError` where it cannot be used."""
    point = plugins()[name]
    mark = f"{name}={point.value}"
    if mark not in os.environ.get(TRIED, "").split(os.pathsep):
        why = trial(point)
        if why:
            raise UserError(
                f"mechanism {name!r} comes from {point.value}, which cannot be imported ({why}): mend it, or uninstall "
                "its package"
            )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
            module: ModuleType = point.load()
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if ctrl_c(error):
            raise
        raise UserError(
            f"mechanism {name!r} comes from {point.value}, which cannot be imported ({error}): mend it"
        ) from error
    config = getattr(module, "Config", None)
    if not (isinstance(config, type) and issubclass(config, AttentionConfig) and hasattr(module, "Attention")):
        raise UserError(
            f"mechanism {name!r} comes from {point.value}, which does not define Config, an AttentionConfig, and "
            "Attention: mend it"
        )
    os.environ[TRIED] = os.pathsep.join(filter(None, (os.environ.get(TRIED), mark)))
    return module


@contextlib.contextmanager
def blamed(name: str) -> Iterator[None]:
    """Raise a `UserError` that names another package's mechanism for whatever its code raises, an exit too."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if ctrl_c(error):
            raise
        raise UserError(
            f"mechanism {name!r} comes from {plugins()[name].value}, which cannot be built "
            f"({type(error).__name__}: {quoted(error)}): mend it, or uninstall its package"
        ) from error


def ctrl_c(error: BaseException) -> bool:
    """Return whether a signal's handler raised this, and not the code that it stopped.

    A handler in C leaves no trace, so with Python's own any KeyboardInterrupt is taken for Ctrl-C.
    """
    code = getattr(signal.getsignal(signal.SIGINT), "__code__", None)
    frames = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, KeyboardInterrupt) and (code is None or code in frames)


def trial(point: EntryPoint) -> str:
    """Return why an entry point cannot be imported, in a process of its own; nothing where it can."""
    command = [sys.executable, "-c", TRIAL, point.name, point.value, point.group, *sys.path]
    try:
        run = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"it does not end within {PATIENCE:.0f} seconds"
    except OSError:
        return ""  # no process can be started here: the import itself will show
    if run.returncode == 0 and run.stdout.decode(errors="replace").rstrip().endswith("imported"):
        return ""
    if run.returncode == 3:
        return run.stderr.decode(errors="replace").rstrip().rpartition("\n")[2]
    return f"it ends the process, with exit code {run.returncode}"
