"""The file metrics.jsonl of a run folder: one record per line, written during training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..errors import UserError
from ..files import disk_errors, parse_json, regular, unreadable, write_bytes
from .schemas import Metrics


def add_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line; a number that is not finite becomes null."""
    line = json.dumps({k: _finite(v) for k, v in record.items()}, allow_nan=False) + "\n"
    with disk_errors(regular(path)), open(path, "a", encoding="utf-8") as file:
        file.write(line)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return every whole record; a last line that a crash cut short is left out."""
    try:
        held = regular(path).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(unreadable(path, error)) from None
    lines = held.split(b"\n")[:-1]  # after the last newline is nothing, or a line that was cut short
    name = f"a line of {path}"
    return [parse_json(name, line, Metrics, "delete this line or the file, and run again") for line in lines]


def keep_records(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave out the records that `keep` refuses."""
    if kept := [json.dumps(record) + "\n" for record in read_records(path) if keep(record)]:
        write_bytes(path, "".join(kept).encode())
    else:
        path.unlink(missing_ok=True)


def is_regular(record: Mapping[str, Any], train: TrainConfig) -> bool:
    """Return whether a record would also be there if the run had more steps: some are of the last step only."""
    if record["step"] != train.steps:
        return True
    validated = "val_loss" not in record or train.steps % train.eval_every == 0
    return validated and ("loss" not in record or train.steps % train.log_every == 0)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
