"""The command line: it reads the words, and calls a command. Bad input is one sentence and exit code 2."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import NoReturn, get_type_hints

from .. import __version__, presets
from ..errors import UserError, choose, is_panic, quoted
from ..formatting import escaped
from ..runs.launcher import check_launcher, launched, rank
from ..runs.signals import Program, interruptible
from . import COMMANDS, LASTING
from .faults import explained
from .options import Fields, with_choices
from .reading import read
from .streams import Patient, streams

TWICE = {"--mechanism": "--model.mechanisms", "--data": "--data.source", "--pack": "--data.pack"}  # short for a field


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0; 1 for a bad result, or a fault that is not the user's; 2 for bad input; 130 for Ctrl-C; 141 where nobody reads
    what it prints.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("ATTNLAB_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    if given and given[0].startswith("--local_rank="):
        del given[0]  # the deepspeed launcher puts it first, and says the same by LOCAL_RANK
    with streams(lasting=bool(given) and given[0] in LASTING) as out:
        try:
            code = run_command(given)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # the reader has ended (`| head`): there is nothing more to print, also at exit
            out.drop()
            return 141
        except KeyboardInterrupt as stop:
            if debug:
                raise
            return stopped(str(stop))
        except (Exception, SystemExit) as error:
            if Program.asked and not debug:  # what an interrupted import or library made of it
                return stopped()
            if debug:
                raise
            return tell(error, out)
        except BaseException as error:
            if debug or not is_panic(error):
                raise
            return tell(error, out)


def tell(error: BaseException, out: Patient) -> int:
    """Print an error in one sentence. Return the exit code."""
    sentence, code = explained(error)
    if launched() == 1:
        print(f"attnlab: {escaped(sentence)}", file=sys.stderr)
    elif rank() == 0 or not getattr(error, "shared", False):
        print(f"attnlab, process {rank()} of {launched()}: {escaped(sentence)}", file=sys.stderr)
    try:
        out.stream.flush()
    except (OSError, ValueError):  # this may be the very error
        out.drop()
    return code


def stopped(words: str = "") -> int:
    """Say that Ctrl-C ended the program, in `words`. Return the exit code."""
    Program.told = True
    print(f"\nattnlab: {escaped(words) or 'stopped'}", file=sys.stderr)
    return 130


def run() -> NoReturn:
    """Run `main` as a program, and exit.

    One process of several exits at once, when all is written. Native libraries that still hold threads of the process
    group, as DeepSpeed's do, sometimes abort while they are torn down.
    """
    interruptible()
    code = main()
    Program.code = code
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what libraries do at the exit has no use for an exception
    if launched() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run_command(given: Sequence[str]) -> int:
    """Run the command that the first word names, and return its exit code."""
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if given[0] == "--version":
        print(f"attnlab {__version__}")
        return 0
    if given[0].startswith("-"):
        raise UserError(f"{given[0]} comes before any command: give one of {', '.join(COMMANDS)} first")
    check_launcher()
    name = choose("command", given[0], COMMANDS)
    rest = given[1:]
    if {"-h", "--help"} & set(rest):
        rest = ["--help"]  # what came before it would be left out of the help
    return parsed(name, rest)()


def parsed(name: str, rest: Sequence[str]) -> Callable[[], int]:
    """Return the command with its parameters filled in. Raises `UserError` for a value that a config refuses."""
    preset = preset_of(name, rest)
    for option, field in TWICE.items() if preset is not None else ():
        if value_of(option, rest) is not None and value_of(field, rest) is not None:
            raise UserError(f"{option} and {field} set the same field: give one of them")
    defaults = {}
    if preset is not None:  # --mechanism first, so that --model.options may speak of what it names
        defaults["config"] = with_choices(presets.get(preset), value_of("--mechanism", rest), None)
    ready = read(COMMANDS[name], name, rest, defaults)
    given = getattr(ready, "keywords", {}).get("preset", preset)
    if preset and given != preset:
        raise UserError(f"the preset {quoted(given)} comes too late: put it right after attnlab {name}")
    return ready


def preset_of(name: str, rest: Sequence[str]) -> str | None:
    """Return the preset whose fields are the defaults of the options; None for a command without `config: Fields`.

    The command's parameter `preset` says where it is given: as an option where it is keyword-only, else as the first
    argument, which may be left out where there is a default. Raises `UserError` where it is needed and missing.
    """
    command = COMMANDS[name]
    if get_type_hints(command, include_extras=True).get("config") != Fields:
        return None
    parameter = inspect.signature(command).parameters["preset"]
    if parameter.kind is parameter.KEYWORD_ONLY:
        return value_of("--preset", rest) or presets.names()[0]
    if rest and not rest[0].startswith("-"):
        return rest[0]
    if parameter.default is parameter.empty and rest != ["--help"]:
        raise UserError(f"attnlab {name} needs a preset as its first argument: one of {', '.join(presets.names())}")
    return presets.names()[0]


def value_of(option: str, rest: Sequence[str]) -> str | None:
    """Return the value of the last `option VALUE` or `option=VALUE` in words that are not parsed yet; None: none."""
    found = None
    for word, following in zip(rest, [*rest[1:], None], strict=True):
        if word == option:
            found = following
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def overview() -> str:
    """Return the text of `attnlab --help`."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {(call.__doc__ or '').strip().splitlines()[0]}" for name, call in COMMANDS.items())
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
