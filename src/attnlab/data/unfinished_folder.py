"""The folder of a corpus that is not whole yet: whose it is, and what may be removed from it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import UserError
from ..files import LOCK, read_json
from ..unfinished import LEFT

OWN = re.compile(r"(state|manifest|tokenizer)\.json|(train|val|test)([-.]\S+)?\.bin|meta\.pkl")  # what is written


def check_own(folder: Path) -> None:
    """Raise UserError where an unfinished folder is there that no command made: it has neither state nor manifest."""
    held = os.listdir(folder) if folder.is_dir() else []
    foreign = [name for name in held if name != LOCK and not LEFT.fullmatch(name)]
    if (os.path.lexists(folder) and not folder.is_dir()) or folder.is_symlink():
        raise UserError(f"{folder} is in the way: move it elsewhere, or name another folder with --out")
    if foreign and not any(_is_own(folder / name) for name in ("state.json", "manifest.json")):
        raise UserError(
            f"{folder} holds {min(foreign)} and was not made by attnlab prepare: move it elsewhere, or name another "
            "folder with --out"
        )


def _is_own(path: Path) -> bool:
    """Return whether a state or a manifest is there, and says how the folder is made."""
    held = read_json(path) if path.exists() else None
    return isinstance(held, dict) and isinstance(held.get("plan"), dict)


def remove_prepared(folder: Path) -> None:
    """Remove what this module writes into a folder, and then the folder, unless anything else is in it."""
    for path in folder.iterdir():
        if OWN.fullmatch(path.name) or LEFT.fullmatch(path.name):
            path.unlink()
    if not any(path.name != LOCK for path in folder.iterdir()):
        shutil.rmtree(folder)
