"""The command line. Bad input ends in one sentence on stderr and exit code 2."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import tyro

from .. import __version__, presets
from ..errors import UserError, choose
from ..files import DISK_FULL
from ..runs.launcher import launched, rank
from . import COMMANDS
from .options import options_of_mechanisms, with_choices

NEEDED, FIRST, OPTION = "needed", "first", "option"
PRESET = {"train": NEEDED, "plan": NEEDED, "compare": FIRST, "bench": OPTION}  # where a verb's preset stands


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 where a law is broken, 2 for bad input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("ATTNLAB_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    if given and given[0].startswith("--local_rank="):
        del given[0]  # the deepspeed launcher puts it first, and says the same by LOCAL_RANK
    try:
        code = run_verb(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader went away (`| head`): no more to say, and nothing to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        if debug:
            raise
        print(f"\nattnlab: {stop or 'stopped'}", file=sys.stderr)
        return 130
    except (UserError, OSError) as error:
        if debug:
            raise
        if launched() == 1:
            print(f"attnlab: {sentence(error)}", file=sys.stderr)
        elif rank() == 0 or not getattr(error, "shared", False):
            print(f"attnlab, process {rank()} of {launched()}: {sentence(error)}", file=sys.stderr)
        return 2


def run() -> NoReturn:
    """`main` as a program. One process of several ends at once: all is written, and native libraries that still hold
    threads of the process group (DeepSpeed's do) now and then abort while they are torn down."""
    code = main()
    if launched() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_verb(given: Sequence[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if given[0] == "--version":
        print(f"attnlab {__version__}")
        return 0
    if given[0].startswith("-"):
        raise UserError(f"{given[0]} comes before any command: give one of {', '.join(COMMANDS)} first")
    verb, rest = choose("command", given[0], COMMANDS), given[1:]
    if {"-h", "--help"} & set(rest):
        rest = ["--help"]  # what came before it would be left out of the help
    return parsed(verb, rest)()


def parsed(verb: str, rest: Sequence[str]) -> Callable[[], int]:
    """The verb with its parameters filled in. A value that a config refuses is said as plainly as any other error."""
    ready: functools.partial[int] = functools.partial(int)  # for --help

    @functools.wraps(COMMANDS[verb])
    def keep(*args: Any, **kwargs: Any) -> None:
        nonlocal ready
        ready = functools.partial(COMMANDS[verb], *args, **kwargs)

    preset = preset_of(verb, rest)
    defaults = {}
    if preset:  # --mechanism first, so that --model.options may speak of what it names
        defaults["config"] = with_choices(presets.get(preset), value_of("--mechanism", rest), None)
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), json_fields():
            tyro.cli(functools.partial(keep, **defaults), prog=f"attnlab {verb}", args=list(rest))
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None:
            if isinstance(error, UserError):
                raise error from None
            error = error.__context__
        print(message.getvalue(), end="", file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else 2
        return lambda: code
    if preset and ready.keywords and ready.keywords["preset"] != preset:
        raise UserError(f"the preset {ready.keywords['preset']!r} comes too late: put it right after attnlab {verb}")
    return ready


def preset_of(verb: str, rest: Sequence[str]) -> str | None:
    """The preset whose fields are the defaults of the options; None for a verb that has none."""
    if verb not in PRESET:
        return None
    if PRESET[verb] is OPTION:
        return value_of("--preset", rest) or presets.names()[0]
    if rest and not rest[0].startswith("-"):
        return rest[0]
    if PRESET[verb] is NEEDED and rest != ["--help"]:
        raise UserError(f"attnlab {verb} needs a preset as its first argument: one of {', '.join(presets.names())}")
    return presets.names()[0]


def value_of(option: str, rest: Sequence[str]) -> str | None:
    """What the last `option VALUE` or `option=VALUE` gives, before the whole line is parsed."""
    found = None
    for word, following in zip(rest, [*rest[1:], None], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def json_fields() -> Any:
    """Fields that are mappings are given as JSON: --model.options '{"mla": {"kv_rank": 32}}'."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def mapping(info: Any) -> Any:
        if getattr(info.type, "__origin__", None) is not Mapping:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=lambda words: options_of_mechanisms("model.options", words[0]),
            is_instance=lambda value: isinstance(value, Mapping),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def overview() -> str:
    """`attnlab --help`."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in COMMANDS.items())
    return "\n".join(
        [
            "usage: attnlab COMMAND ...",
            "",
            "A workbench for attention mechanisms in language models.",
            "",
            *lines,
            "",
            "attnlab COMMAND --help shows its options. --version shows the version.",
            "--debug, anywhere, shows the traceback of an error.",
            *textwrap.wrap(f"Presets: {', '.join(presets.names())}.", 80, break_on_hyphens=False),
            "",
        ]
    )


def sentence(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    if error.errno in DISK_FULL:
        return "the disk is full: free space and run the same command again; nothing half-written was kept"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; --debug shows where"
