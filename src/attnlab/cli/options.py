"""The options that several commands have: their types, and how their values are read and refused."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from ..config import Execution, RunConfig
from ..errors import UserError, choose, quoted
from ..files import parse_json
from ..ranges import Long, check_value
from ..results import RunResult
from ..runs.launcher import launched, rank

if TYPE_CHECKING:
    from ..comparison.progress import Show

Flag = FlagCreatePairsOff[bool]
Json = Annotated[bool, arg(name="json"), FlagCreatePairsOff]  # the type of a parameter json_
Pack = Literal["stream", "documents"]
Fields = Annotated[RunConfig, arg(name="")]  # the preset's config: fields become --train.steps, --model.n-layers, ...


def options_of_mechanisms(option: str, text: str | None) -> dict[str, dict[str, Any]]:
    """Return Config fields by mechanism, from JSON. Raises `UserError` for anything else."""
    value = json_object(option, text) or {}
    if not all(isinstance(fields, dict) for fields in value.values()):
        raise UserError(
            f'{option} {quoted(text)} does not say whose options they are: give {{"mla": {{"bias": true}}}}'
        )
    return value


def with_choices(config: RunConfig, mechanism: str | None, data: str | None, pack: Pack | None = None) -> RunConfig:
    """Return the config with --mechanism, --data and --pack in place; None leaves a field as it is.

    Options of a mechanism that no layer uses any more are dropped. Raises `UserError` for an unknown mechanism.
    """
    from .. import attention

    if mechanism is not None:
        layers = tuple(split_commas(mechanism))
        options = {name: fields for name, fields in config.model.options.items() if name in layers}
        config = replace(config, model=replace(config.model, mechanisms=layers, options=options))
    for name in config.model.mechanisms:
        choose("mechanism", name, attention.names())
    given: dict[str, Any] = {name: value for name, value in (("source", data), ("pack", pack)) if value is not None}
    return replace(config, data=replace(config.data, **given)) if given else config


def train_and_tell(config: RunConfig, out: Path, name: str, resume: bool, how: Execution) -> RunResult | None:
    """Train with a bar on the screen. Return the result; None where it was asked to stop, after saying how to go on."""
    from ..costs.fits import check_step
    from ..terminal.progress import Progress
    from ..training.schedule import cautions
    from ..training.train import Stopped, train

    if launched() == 1:
        check_step(config, how.recompute)
    again = "the same command goes on from there" if resume else "the same command with --resume goes on from there"
    try:
        with Progress() as bars:

            @functools.cache
            def begin() -> Callable[[Mapping[str, Any]], None]:
                # with the first event: bad input ends before it, and shows no bar
                for caution in cautions(config.train):
                    bars.say(f"{name}: {caution}")
                return bars.begin(name, config.train.steps)

            return train(config, out, resume=resume, progress=lambda event: begin()(event), how=how)
    except Stopped as stop:
        if rank() == 0:
            print(f"attnlab: {stop}; {again}", file=sys.stderr)
        return None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; what was saved is in {out}; {again}") from None


def progress(quiet: bool = False) -> Show:
    """Return what makes the bars of a comparison; with `quiet`, they are not shown."""
    from rich.console import Console

    from ..terminal.progress import Progress

    return functools.partial(Progress, console=Console(quiet=True) if quiet else None)


def this_command() -> str:
    """Return the command line of this process."""
    return shlex.join(["attnlab", *sys.argv[1:]])


def split_commas(text: str) -> list[str]:
    """Return the words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def listed(option: str, text: str | None) -> list[str]:
    """Return the words between commas; none where the option was not given. `UserError` where it holds none."""
    found = split_commas(text or "")
    if text is not None and not found:
        raise UserError(f"{option} is {quoted(text)}: give words, with commas between them, or leave it out")
    return found


def whole_numbers(option: str, text: str | None, kind: Any) -> list[int] | None:
    """Return whole numbers between commas, each in the range of the annotation `kind`; None: it was not given.

    Raises `UserError`, which names the option, for anything else, and where there is none.
    """
    if text is None:
        return None
    found = []
    for word in split_commas(text):
        try:
            found.append(check_value(option, int(word), kind))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{option} has {quoted(word)}: give whole numbers, with commas between them") from None
    if not found:
        raise UserError(f"{option} is {quoted(text)}: give whole numbers, with commas between them, or leave it out")
    return found


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """Return the JSON object that an option gives; None: it was not given. Raises `UserError` for anything else."""
    if text is None:
        return None
    remedy = 'give an object such as {"width": 64}'
    value: dict[str, Any] = parse_json(f"{option} {quoted(text)}", text, dict, remedy)
    return value


UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


def tokens_of(option: str, text: str) -> int:
    """Return a number of tokens: 1500000, 100M, 1.5B. `UserError` for anything else."""
    number, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    try:
        return check_value(option, round(float(number) * UNITS[unit]), Long)
    except UserError as error:
        raise UserError(f"{error}, such as 1500000, 100M or 1.5B") from None
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{option} has {quoted(text)}: give a number such as 1500000, 100M or 1.5B") from None
