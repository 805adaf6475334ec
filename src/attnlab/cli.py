"""The command line. A verb is a function: its parameters are the options, its docstring is the help.

Bad input ends in one sentence on stderr and exit code 2. What takes long to import is imported where it is needed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, UseAppendAction, arg

from . import __version__, presets, screen
from .config import RunConfig
from .spec import UserError, choose

Flag = FlagCreatePairsOff[bool]
Fields = Annotated[RunConfig, arg(name="")]  # its fields become --train.steps, --model.n-layers, ...
EIGHT = ("mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding")  # what is compared if nothing is said
DEMO_SEEDS = 2
DEMO_BENCH: dict[Literal["train", "prefill", "decode"], tuple[int, ...]] = {
    "train": (64,),
    "prefill": (256,),
    "decode": (64, 256, 1024),
}  # and the tokens per sequence


def train(
    preset: Annotated[Positional[str], arg(metavar="PRESET")],
    *,
    config: Fields,
    mechanism: Annotated[str | None, arg(metavar="NAME[,NAME]")] = None,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    resume: Flag = False,
) -> int:
    """Train one model and keep it in a run folder.

    Args:
        preset: A complete run to start from; every field of it can be overridden below.
        mechanism: The attention of every layer, or one per layer, repeated: sliding,sliding,sliding,mla.
        data: "shakespeare", or text:PATH for a UTF-8 file or a folder of them.
        out: The run folder (runs/PRESET-MECHANISM-sSEED if left out).
        resume: Go on from the newest checkpoint in the run folder.
    """
    from .progress import Progress

    config = with_choices(config, mechanism, data)
    out = out or Path("runs") / f"{preset}-{config.mechanism}-s{config.seed}"
    from .train import train as run

    tell: Callable[[Mapping[str, Any]], None] | None = None
    try:
        with Progress() as progress:

            def listen(event: Mapping[str, Any]) -> None:  # bad input ends before the first event, and shows no bar
                nonlocal tell
                tell = tell or progress.begin(f"{config.mechanism} s{config.seed}", config.train.steps)
                tell(event)

            result = run(config, out, resume=resume, progress=listen)
    except KeyboardInterrupt as stop:
        again = "the same command goes on from there" if resume else "the same command with --resume goes on from there"
        raise KeyboardInterrupt(f"{stop or f'stopped; what was saved is in {out}'}; {again}") from None
    print(
        f"val loss {shown(result.val_loss)} after {result.steps} steps, {shown(result.tokens_per_s, 0)} tokens/s, {out}"
    )
    print(f"next: attnlab sample {out} --prompt 'ROMEO:'", file=sys.stderr)
    return 0


def sample(
    run: Annotated[Positional[Path], arg(metavar="RUN")],
    *,
    prompt: UseAppendAction[list[str]] = [],  # noqa: B006 (tyro reads the default, nobody changes it)
    tokens: int = 200,
    temperature: float = 0.8,
    top_k: Annotated[int | None, arg(metavar="INT")] = None,
    top_p: Annotated[float | None, arg(metavar="FLOAT")] = None,
    seed: int = 0,
    checkpoint: Annotated[int | None, arg(metavar="STEP")] = None,
    device: str = "auto",
    json_: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False,
) -> int:
    r"""Continue a prompt with a trained model, as it decodes.

    Args:
        run: A run folder: the --out of attnlab train.
        prompt: What to continue; give it several times for a batch. A line break if left out.
        tokens: How many tokens to add.
        temperature: 0 always takes the likeliest token; higher is wilder.
        top_k: Choose among this many likeliest tokens only.
        top_p: Choose among the likeliest tokens that together have this probability only.
        seed: The same seed gives the same text.
        checkpoint: A step that has a checkpoint; the newest if left out.
        device: "cpu", "cuda", "mps", or "auto" for the best one there.
        json_: Print one JSON object at the end instead of the text.
    """
    from .decode import sample_run

    prompts = prompt or ["\n"]
    begun = False

    def tell(number: int, text: str) -> None:
        nonlocal begun
        if number == 0 and not json_:  # one text is streamed; its neighbours follow whole
            print(text if begun else prompts[0] + text, end="", flush=True)
            begun = True

    found = sample_run(
        run, prompts, tokens, temperature, top_k, top_p, seed, checkpoint=checkpoint, device=device, on_text=tell
    )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
        return 0
    print()
    for text, rest in zip(found.prompts[1:], found.texts[1:], strict=True):
        print(f"\n{'-' * 20}\n{text}{rest}")
    print(
        f"{found.mechanism}, step {found.step}: {found.tokens} tokens at {found.tokens_per_s:,.0f} tokens/s, "
        f"live cache {found.cache_bytes:,} bytes",
        file=sys.stderr,
    )
    return 0


def compare(
    preset: Annotated[Positional[str], arg(metavar="PRESET")] = "quick",
    *,
    config: Fields,
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(EIGHT),
    seeds: int = 3,
    match: Literal["params", "cache", "none"] = "none",
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    data: Annotated[str | None, arg(metavar="SOURCE")] = None,
    out: Annotated[Path | None, arg(metavar="DIR")] = None,
    jobs: Annotated[int | None, arg(metavar="INT")] = None,
    json_: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False,
) -> int:
    """Train mechanisms with paired seeds, and say what can be told apart.

    Args:
        preset: The run that all share; every field of it can be overridden below.
        mechanisms: What to compare, the baseline mha among them; a hybrid is written sliding+sliding+mla.
        seeds: Runs per mechanism: seeds S, S+1, ... from --seed. Three or more give intervals that mean something.
        match: Solve the free width so that all have equal parameters, or equal caches, within 1 %.
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        data: "shakespeare", or text:PATH for a UTF-8 file or a folder of them.
        out: Where runs and results go (compare/PRESET if left out); finished runs in it are kept.
        jobs: Runs side by side.
        json_: Print compare.json instead of the table.
    """
    from . import compare as comparison

    found = comparison.compare(
        with_choices(config, None, data),
        listed(mechanisms),
        seeds,
        out or Path("compare") / preset,
        match,
        jobs=jobs,
        options=options_of_mechanisms("--options", options),
        command=this_command(),
        quiet=json_,
    )
    if json_:
        print(json.dumps(found, indent=1))
    else:
        screen.console().print(comparison.table(found))
        print(f"next: attnlab report {out or Path('compare') / preset}", file=sys.stderr)
    return int(any(cell["status"] != "done" for cell in found["cells"]))


def bench(
    kind: Annotated[Positional[Literal["train", "prefill", "decode"]], arg(metavar="train|prefill|decode")],
    *,
    config: Fields,
    preset: Annotated[str, arg(metavar="PRESET")] = "quick",
    mechanisms: Annotated[str, arg(metavar="A,B,...")] = ",".join(EIGHT),
    context: Annotated[str | None, arg(metavar="N,...")] = None,
    options: Annotated[str | None, arg(metavar="JSON")] = None,
    batch: Annotated[int | None, arg(metavar="INT")] = None,
    repeats: int = 7,
    json_: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False,
) -> int:
    """Measure speed, memory and FLOPs, side by side, after checking the outputs.

    Args:
        kind: One training step, reading a prompt, or one more token.
        preset: The shape to measure; every field of it can be overridden below.
        mechanisms: What to measure; times are also given relative to mha where it is among them.
        context: Tokens per sequence, or tokens held while decoding (the preset's context if left out).
        options: Fields of their Configs: '{"mla": {"kv_rank": 32}}'.
        batch: Sequences at once (the preset's for training, else 1).
        repeats: Each time is the median of this many, taken in turns.
        json_: Print the records as a JSON list.
    """
    from . import bench as bench_module
    from .match import parameters, variant

    given = options_of_mechanisms("--options", options)
    for name in listed(mechanisms):
        parameters(variant(config, name, given).model)  # refuses what does not fit together before anything is measured
    lengths = None if context is None else [whole("--context", word) for word in listed(context)]
    with screen.working() as tell:
        records = bench_module.bench(
            kind,
            config,
            listed(mechanisms),
            lengths,
            options=given,
            batch=batch,
            repeats=repeats,
            progress=tell,
        )
    if json_:
        print(json.dumps([r.to_dict() for r in records], indent=1))
    else:
        crossovers = bench_module.context_crossovers(records)
        screen.console().print(screen.bench(records), *map(str, crossovers), sep="\n")
    return 0


def audit(
    target: Annotated[Positional[str], arg(metavar="TARGET")],
    *,
    kwargs: Annotated[str | None, arg(metavar="JSON")] = None,
    config: Annotated[str | None, arg(metavar="JSON")] = None,
    call: Annotated[str | None, arg(metavar="EXPRESSION")] = None,
    mask: Literal["additive", "keep", "drop"] = "additive",
    mask_shape: Literal["auto", "2d", "4d"] = "auto",
    d_model: Annotated[int | None, arg(metavar="INT")] = None,
    laws: Annotated[str | None, arg(metavar="LAW,...")] = None,
    json_: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False,
) -> int:
    """Put the laws to a mechanism, or to anyone's attention class.

    Exit code: 0 all laws hold, 1 one is broken, 2 it could not run.

    Args:
        target: A mechanism's name, FILE.py:CLASS, or PACKAGE.MODULE:CLASS.
        kwargs: The arguments of the class: '{"embed_dim": 64, "num_heads": 4}'.
        config: The attributes of the one config object that the class takes; for a mechanism, fields of its Config.
        call: How to call it, for example 'module(x, attention_mask=mask)'; found out if left out.
        mask: What the mask in --call holds: 0 and -inf to add, True where a token may be seen, True where it may not.
        mask_shape: 2d is [T T], 4d is [B 1 T T].
        d_model: The width of its input, where its arguments do not tell.
        laws: Only these.
        json_: Print one JSON object.
    """
    from .audit import audit_target

    found = audit_target(
        target,
        kwargs=json_object("--kwargs", kwargs),
        config=json_object("--config", config),
        call=call,
        mask=mask,
        mask_shape=mask_shape,
        d_model=d_model,
        laws=None if laws is None else listed(laws),
    )
    if json_:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        screen.console().print(found)
    return found.exit_code


def report(folder: Annotated[Positional[Path], arg(metavar="DIR")]) -> int:
    """Write DIR/report.html, one file that opens offline.

    Args:
        folder: Where compare or demo left its results.
    """
    from .report import write_report

    print(write_report(folder))
    return 0


def demo(
    *,
    out: Annotated[Path, arg(metavar="DIR")] = Path("demo"),
    jobs: Annotated[int | None, arg(metavar="INT")] = None,
) -> int:
    """Compare eight mechanisms on Shakespeare, and report: 6 minutes on 2 cores.

    Args:
        out: Where runs, results and report.html go; what is finished there is kept.
        jobs: Runs side by side (as many as there are cores if left out).
    """
    from . import bench as bench_module
    from . import compare as comparison
    from .report import write_report
    from .results import write_json

    config = presets.get("quick")
    found = comparison.compare(config, EIGHT, DEMO_SEEDS, out, jobs=jobs, command=this_command())
    measured, made = out / "bench.json", out / "samples.json"
    if not measured.exists() or measured.stat().st_mtime < made.stat().st_mtime:  # runs are newer than measurements
        records = []
        print("measuring speed and memory", file=sys.stderr)
        with screen.working() as tell:
            for kind, contexts in DEMO_BENCH.items():
                records += bench_module.bench(kind, config, EIGHT, contexts, repeats=5, progress=tell)
        write_json(measured, [r.to_dict() for r in records])
    page = write_report(out)
    screen.console().print(comparison.table(found), "", f"report: {page}", sep="\n", soft_wrap=True)
    return int(any(cell["status"] != "done" for cell in found["cells"]))


def list_(
    *,
    json_: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False,
    markdown: Flag = False,
) -> int:
    """Show every mechanism: formula, floats per token, parameters, laws, kernels.

    Args:
        json_: Print a JSON list.
        markdown: Print the table of docs/mechanisms.md.
    """
    from . import listing

    records = listing.listing()
    if json_:
        print(json.dumps(records, indent=1))
    elif markdown:
        print(listing.markdown([r for r in records if r.get("package") == "attnlab"]), end="")
    else:
        screen.console().print(screen.listing(records))
    return 0


VERBS: dict[str, Callable[..., int]] = {
    "demo": demo,
    "list": list_,
    "train": train,
    "sample": sample,
    "compare": compare,
    "bench": bench,
    "audit": audit,
    "report": report,
}
NEEDED, FIRST, OPTION = "needed", "first", "option"
PRESET = {"train": NEEDED, "compare": FIRST, "bench": OPTION}  # where a verb's preset stands


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, or 1 where a law is broken, 2 for bad input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given or os.environ.get("ATTNLAB_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
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
        print(f"attnlab: {sentence(error)}", file=sys.stderr)
        return 2


def run_verb(given: Sequence[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(overview(), end="")
        return 0
    if given[0] == "--version":
        print(f"attnlab {__version__}")
        return 0
    if given[0].startswith("-"):
        raise UserError(f"{given[0]} comes before any command: give one of {', '.join(VERBS)} first")
    verb, rest = choose("command", given[0], VERBS), given[1:]
    if {"-h", "--help"} & set(rest):
        rest = ["--help"]  # what came before it would be left out of the help
    return parsed(verb, rest)()


def parsed(verb: str, rest: Sequence[str]) -> Callable[[], int]:
    """The verb with its parameters filled in. A value that a config refuses is said as plainly as any other error."""
    ready: functools.partial[int] = functools.partial(int)  # for --help

    @functools.wraps(VERBS[verb])
    def keep(*args: Any, **kwargs: Any) -> None:
        nonlocal ready
        ready = functools.partial(VERBS[verb], *args, **kwargs)

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


def options_of_mechanisms(option: str, text: str | None) -> dict[str, dict[str, Any]]:
    """Config fields by mechanism, from JSON."""
    value = json_object(option, text) or {}
    if not all(isinstance(fields, dict) for fields in value.values()):
        raise UserError(f'{option} {text!r} does not say whose options they are: give {{"mla": {{"kv_rank": 32}}}}')
    return value


def overview() -> str:
    """`attnlab --help`."""
    width = max(map(len, VERBS))
    lines = (f"  {name:<{width}}  {(verb.__doc__ or '').strip().splitlines()[0]}" for name, verb in VERBS.items())
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
            f"Presets: {', '.join(presets.names())}.",
            "",
        ]
    )


def sentence(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free space and run the same command again; nothing half-written was kept"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; --debug shows where"


def with_choices(config: RunConfig, mechanism: str | None, data: str | None) -> RunConfig:
    """The config with the short options in place. An option of a mechanism that no layer uses any more goes with it."""
    from . import attention

    if mechanism is not None:
        layers = tuple(listed(mechanism))
        options = {name: fields for name, fields in config.model.options.items() if name in layers}
        config = replace(config, model=replace(config.model, mechanisms=layers, options=options))
    for name in config.model.mechanisms:
        choose("mechanism", name, attention.names())
    return config if data is None else replace(config, data=replace(config.data, source=data))


def this_command() -> str:
    return shlex.join(["attnlab", *sys.argv[1:]])


def listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def whole(option: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{option} has {text!r}: give whole numbers, with commas between them") from None


def json_object(option: str, text: str | None) -> dict[str, Any] | None:
    """The value of an option that is a JSON object."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{option} {text!r} is not JSON ({error}): give an object such as {{"width": 64}}') from None
    if not isinstance(value, dict):
        raise UserError(f'{option} {text!r} is not a JSON object: give one such as {{"width": 64}}')
    return value


def shown(value: float | None, digits: int = 4) -> str:
    return "unknown" if value is None else f"{value:,.{digits}f}"
