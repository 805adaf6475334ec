"""Speed and memory, measured side by side, and written into docs/performance.md. Anyone can run it:

    python benchmarks/speed.py --nanogpt PATH    PATH is a checkout of nanoGPT (or its model.py)
    python benchmarks/speed.py --only decode     one section; the others stay in the document as they are
    python benchmarks/speed.py --small --document FILE    a minute, to see that it runs; its numbers mean nothing

train-vs-nanogpt  one optimizer step of nanoGPT's train.py and of ours, on nanoGPT's two Shakespeare recipes; then the
                  loss of both after the same steps on the same batches, from the same weights
mechanisms        one training step of every mechanism at context 256, relative to mha
contexts          one training step of every mechanism at context 256 and 2048, relative to mha
decode            one token of mla, both ways, and of mha, at growing contexts
recurrent         mechanisms with a state of constant size beside mha: a training step at 256 and 2048 tokens, and one
                  token after 256 to 16384

Contenders take turns in one process (A B C A B C ...), times are medians, and nothing is timed before it was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch

from attnlab import attention, presets
from attnlab.config import ModelConfig, RunConfig
from attnlab.costs import bench
from attnlab.costs.crossover import context_crossovers, query_crossover
from attnlab.data import Corpus
from attnlab.measure.counters import interleaved
from attnlab.model import Decoder
from attnlab.presets import variant
from attnlab.results import BenchRecord, environment
from attnlab.training.train import Trainer, learning_rate, resolve, train_step

Precision = Literal["auto", "fp32", "bf16"]
SECTIONS = ("train-vs-nanogpt", "mechanisms", "contexts", "decode", "recurrent")
EIGHT = ("mha", "mqa", "gqa", "mla", "msla", "mka", "fast_mka", "sliding")
RECURRENT = ("mha", "linear", "gated_delta", "kda", "mamba2")
TITLES = {
    "train-vs-nanogpt": "Training, against nanoGPT",
    "mechanisms": "Training, every mechanism",
    "contexts": "Training, every mechanism at two contexts",
    "decode": "Decoding",
    "recurrent": "Recurrent mechanisms",
    "decode-gpt2": "Decoding, against transformers",  # benchmarks/decode.py
    "corpora-preparing": "Preparing a corpus",  # benchmarks/prepare.py
    "corpora-reading": "Reading a corpus",
    "corpora-memory": "Memory while preparing",
    "text": "On text, at equal parameters",  # benchmarks/results.py
    "states": "Recall, against the size of the state",
    "copying": "Every token again",
    "needle": "Few things among many",
}
DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT; without it that section is left out")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--recipes", default="0.8M,10.6M", help="of train-vs-nanogpt: 0.8M, 10.6M")
    parser.add_argument("--repeats", type=int, default=9, help="of each measurement (default 9)")
    parser.add_argument("--loss-steps", type=int, default=300, help="steps before losses are compared; 0: not compared")
    parser.add_argument("--contexts", default="256,1024,4096", help="of decode")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--small", action="store_true", help="tiny models, each measured once")
    options = parser.parse_args()
    if options.small:
        options.recipes, options.repeats, options.loss_steps, options.contexts = "0.8M", 1, 2, "16,32"
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only {', '.join(unknown)}: give some of {', '.join(SECTIONS)}")
    if options.nanogpt is None and "train-vs-nanogpt" in chosen:
        chosen.remove("train-vs-nanogpt")
        say("train-vs-nanogpt is left out: give --nanogpt PATH")
    measure = {
        "train-vs-nanogpt": against_nanogpt,
        "mechanisms": mechanisms,
        "contexts": contexts,
        "decode": decode,
        "recurrent": recurrent,
    }
    for section in chosen:
        text = measure[section](options)
        print(text)
        write_section(options.document, section, f"{provenance()}\n\n{text}")


# nanoGPT


@dataclass(frozen=True)
class Recipe:
    """What nanoGPT's README and config/train_shakespeare_char.py say."""

    name: str
    config: RunConfig
    calls: int  # steps in a repeat
    loss_batch: int  # sequences per step while losses are compared


RECIPES = {
    "0.8M": Recipe("0.8M", presets.get("shakespeare-cpu"), 10, 12),
    "10.6M": Recipe("10.6M", presets.get("shakespeare-gpu"), 1, 4),  # 64 would take an hour without a GPU
}


class NanoGPT:
    """The model, optimizer and step of nanoGPT's train.py on a CPU: float32, no fused optimizer, gradients clipped."""

    def __init__(self, module: ModuleType, config: RunConfig, corpus: Corpus, *, compiled: bool) -> None:
        self.config, self.data = config, corpus.train.read(0, len(corpus.train)).numpy().astype(np.uint16)
        shape, train = config.model, config.train
        torch.manual_seed(1337)
        with contextlib.redirect_stdout(io.StringIO()):
            self.raw = module.GPT(
                module.GPTConfig(
                    block_size=shape.context,
                    vocab_size=shape.vocab_size,
                    n_layer=shape.n_layers,
                    n_head=shape.n_heads,
                    n_embd=shape.d_model,
                    dropout=shape.dropout,
                    bias=False,
                )
            )
            self.optimizer = self.raw.configure_optimizers(train.weight_decay, train.lr, train.betas, "cpu")
        self.model = torch.compile(self.raw) if compiled else self.raw
        self.steps = 0
        self.next = self.batch()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        block, size = self.config.model.context, self.config.train.batch_size
        ix = torch.randint(len(self.data) - block, (size,))
        x = torch.stack([torch.from_numpy(self.data[i : i + block].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(self.data[i + 1 : i + 1 + block].astype(np.int64)) for i in ix])
        return x, y

    def step(self, given: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """Seconds; on its own batches, or on the given one."""
        began = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config.train, self.steps)
        _, loss = self.model(*(given or self.next))
        if given is None:
            self.next = self.batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.config.train.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return time.perf_counter() - began


class Ours:
    def __init__(self, config: RunConfig, corpus: Corpus, *, precision: Precision, compiled: bool) -> None:
        train = replace(config.train, precision=precision, compile=compiled)
        self.trainer = Trainer.of(replace(config, train=train), corpus)
        self.trainer.model.train()
        self.steps = 0

    def step(self) -> float:
        began = time.perf_counter()
        train_step(self.trainer, self.steps)
        self.steps += 1
        return time.perf_counter() - began


def against_nanogpt(options: argparse.Namespace) -> str:
    module = load_nanogpt(options.nanogpt)
    parts = []
    for name in options.recipes.split(","):
        recipe = RECIPES[name]
        if options.small:
            recipe = Recipe("small", tiny(recipe.config), 1, recipe.loss_batch)
        config, corpus = resolve(recipe.config)
        say(f"nanoGPT, {name}: checking that both compute the same")
        same = same_function(module, config, corpus)
        fast: Precision = "bf16" if Trainer.of(config, corpus).precision == "bf16" else "fp32"
        contenders: dict[str, NanoGPT | Ours] = {
            "nanoGPT, eager": NanoGPT(module, config, corpus, compiled=False),
            "nanoGPT, compiled": NanoGPT(module, config, corpus, compiled=True),
            "attnlab, fp32, eager": Ours(config, corpus, precision="fp32", compiled=False),
            f"attnlab, {fast}, eager": Ours(config, corpus, precision=fast, compiled=False),
            f"attnlab, {fast}, compiled": Ours(config, corpus, precision=fast, compiled=True),
        }
        timed = {label: repeated(contender.step, recipe.calls) for label, contender in contenders.items()}
        say(f"nanoGPT, {name}: timing {len(contenders)} contenders, {options.repeats} times each")
        seconds = interleaved(timed, options.repeats, warm_up=2)
        tokens = config.train.batch_size * config.model.context
        eager, compiled = (statistics.median(seconds[key]) for key in ("nanoGPT, eager", "nanoGPT, compiled"))
        rows = [
            [
                label,
                f"{tokens / statistics.median(times):,.0f}",
                f"{1e3 * statistics.median(times):,.1f}",
                f"{1e3 * min(times):,.1f} to {1e3 * max(times):,.1f}",
                f"{eager / statistics.median(times):.2f}",
                f"{compiled / statistics.median(times):.2f}",
            ]
            for label, times in seconds.items()
        ]
        model = config.model
        parts.append(
            f"**{recipe.name} recipe**: {model.n_layers} layers, {model.n_heads} heads, {model.d_model} wide, context "
            f"{model.context}, batch {config.train.batch_size}, dropout {model.dropout}. One optimizer step, batch "
            f"included: median of {options.repeats} repeats of {recipe.calls}. With the same weights the two models' "
            f"losses differ by {same:.1e}.\n\n"
            + markdown(["", "tokens/s", "ms", "fastest to slowest", "x nanoGPT eager", "x nanoGPT compiled"], rows)
        )
        keep(options, parts)
        if options.loss_steps:
            parts.append(same_loss(module, recipe, options.loss_steps))
        keep(options, parts)
    return "\n\n".join(parts)


def keep(options: argparse.Namespace, parts: list[str]) -> None:
    """What has been measured is written at once: losses take long, and an interrupted run should lose none of it."""
    write_section(options.document, "train-vs-nanogpt", "\n\n".join([provenance(), *parts]))


def repeated(step: Callable[[], float], calls: int) -> Callable[[], float]:
    return lambda: sum(step() for _ in range(calls)) / calls


def load_nanogpt(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py" if path.is_dir() else path)
    assert spec is not None and spec.loader is not None, f"no model.py in {path}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def copy_weights(theirs: torch.nn.Module, ours: Decoder) -> None:
    """nanoGPT's weights are ours by other names."""
    names = {"embed": "transformer.wte", "place": "transformer.wpe", "norm": "transformer.ln_f", "head": "lm_head"}
    parts = {
        "attention_norm": "ln_1", "attention.qkv": "attn.c_attn", "attention.o": "attn.c_proj",
        "ff_norm": "ln_2", "ff.into": "mlp.c_fc", "ff.out": "mlp.c_proj",
    }  # fmt: skip
    for i in range(len(ours.layers)):
        names |= {f"layers.{i}.{mine}": f"transformer.h.{i}.{other}" for mine, other in parts.items()}
    state = theirs.state_dict()
    ours.load_state_dict({f"{mine}.weight": state[f"{other}.weight"] for mine, other in names.items()})


def same_function(module: ModuleType, config: RunConfig, corpus: Corpus) -> float:
    """How far apart the losses of the two models are with the same weights on the same batch, in nats."""
    theirs = NanoGPT(module, config, corpus, compiled=False).raw.eval()
    ours = Decoder(config.model).eval()
    copy_weights(theirs, ours)
    x, y, _ = corpus.batch(0, 0, 2, config.model.context)
    with torch.no_grad():
        difference = abs(theirs(x, y)[1].item() - ours.loss(x, y).item())
    assert difference < 1e-4, f"the models differ by {difference} nats: nothing is timed"
    return difference


def same_loss(module: ModuleType, recipe: Recipe, steps: int) -> str:
    config, corpus = resolve(recipe.config)
    config = replace(config, train=replace(config.train, batch_size=recipe.loss_batch))
    theirs = NanoGPT(module, config, corpus, compiled=False)
    ours = Ours(config, corpus, precision="auto", compiled=False)
    copy_weights(theirs.raw, ours.trainer.model)
    for step in range(steps):
        if step % 50 == 0:
            say(f"nanoGPT, {recipe.name}: losses after {step} of {steps} steps")
        batch = corpus.batch(config.seed, step, recipe.loss_batch, config.model.context)
        theirs.step((batch.x, batch.y))
        ours.step()
    x, y, _ = corpus.windows(40, config.model.context)
    losses = []
    with torch.no_grad():
        for loss in (lambda a, b: theirs.raw.eval()(a, b)[1], ours.trainer.model.eval().loss):
            parts = [loss(a, b).item() for a, b in zip(x.split(8), y.split(8), strict=True)]
            losses.append(statistics.fmean(parts))
    return (
        f"Validation loss after {steps} steps of {recipe.loss_batch} sequences, from the same weights on the same "
        f"batches: nanoGPT (fp32) {losses[0]:.4f}, attnlab ({ours.trainer.precision}) {losses[1]:.4f}, difference "
        f"{losses[1] - losses[0]:+.4f} nats."
    )


# mechanisms against each other


def mechanisms(options: argparse.Namespace) -> str:
    parts = []
    for name, batch in (("shakespeare-cpu", 12), ("shakespeare-gpu", 4)):
        preset = presets.get(name)
        preset = replace(preset, model=replace(preset.model, positions="rope", dropout=0.0))
        preset = tiny(preset) if options.small else preset
        records = bench.bench(
            "train",
            preset,
            EIGHT,
            [32 if options.small else 256],
            batch=batch,
            timing=bench.Timing(options.repeats),
            progress=progress_of(f"mechanisms {name}"),
        )
        rows = [
            [
                r.mechanism,
                number(r.relative, ".2f"),
                number(r.tokens_per_s, ",.0f"),
                number(r.ms, ",.1f"),
                spread(r),
                number(r.flops and r.flops / 1e9, ",.1f"),
                size(r.peak_bytes),
            ]
            for r in records
        ]
        parts.append(
            f"{shape(preset.model)}, batch {batch}, {records[0].dtype} products:\n\n"
            + markdown(["", "x mha's time", "tokens/s", "ms", "fastest to slowest", "GFLOPs", "peak memory"], rows)
        )
    return "\n\n".join(parts)


def contexts(options: argparse.Namespace) -> str:
    """Every mechanism of the package beside mha, with its own defaults, so parameters differ."""
    preset = presets.get("shakespeare-gpu")
    preset = replace(preset, model=replace(preset.model, positions="rope", dropout=0.0, n_layers=2))
    preset = tiny(preset) if options.small else preset
    names = ["mha", *(name for name in attention.names() if name != "mha")]
    found: dict[str, list[BenchRecord]] = {name: [] for name in names}
    sizes = ((32, 2), (64, 1)) if options.small else ((256, 4), (2048, 1))
    for context, batch in sizes:
        timing = bench.Timing(options.repeats)
        told = progress_of(f"contexts {context}")
        at = replace(preset, model=replace(preset.model, context=context))
        for record in bench.bench("train", at, names, [context], batch=batch, timing=timing, progress=told):
            found[record.mechanism].append(record)
    rows = [
        [name, *(cell for r in records for cell in (number(r.relative, ".2f"), number(r.ms, ",.0f"), spread(r)))]
        for name, records in found.items()
    ]
    head = [""]
    for context, batch in sizes:
        head += [f"x mha's time at {context} (batch {batch})", "ms", "fastest to slowest"]
    return f"{shape(preset.model)}, each with its own defaults:\n\n" + markdown(head, rows)


def decode(options: argparse.Namespace) -> str:
    model = ModelConfig(context=4096, n_layers=4, d_model=768, n_heads=12, positions="rope")
    preset = RunConfig(name="gpt2-width", model=model)
    preset = tiny(preset) if options.small else preset
    contexts = [int(context) for context in options.contexts.split(",")]
    tell = progress_of("decode")
    timing = bench.Timing(options.repeats)
    records = bench.bench("decode", preset, ["mha", "gqa", "mla"], contexts, timing=timing, progress=tell)
    rows = [
        [
            " ".join(filter(None, (r.mechanism, r.mode))),
            f"{r.context:,}",
            number(r.ms, ",.2f"),
            spread(r),
            number(r.relative, ".2f"),
            size(r.cache_bytes),
        ]
        for r in records
    ]
    queries = query_crossover(
        preset, "mla", contexts[-1] if options.small else 1024, repeats=options.repeats, progress=tell
    )
    crossovers = [*context_crossovers(records), queries]
    mla = variant(preset, "mla")
    return "\n\n".join(
        [
            f"{shape(mla.model)}, rotary positions, batch 1, {records[0].dtype}; one step with all but one token held.",
            markdown(["", "tokens", "ms", "fastest to slowest", "x mha's time", "live cache"], rows),
            "Measured crossovers: " + "; ".join(map(str, crossovers)) + ".",
        ]
    )


def recurrent(options: argparse.Namespace) -> str:
    preset = presets.get("shakespeare-cpu")
    preset = replace(preset, model=replace(preset.model, positions="rope", dropout=0.0))
    preset = tiny(preset) if options.small else preset
    timing = bench.Timing(options.repeats)
    tell = progress_of("recurrent")
    trained = []
    for context, batch in ((16, 2), (32, 1)) if options.small else ((256, 12), (2048, 2)):
        longer = replace(preset, model=replace(preset.model, context=context))
        trained += bench.bench("train", longer, RECURRENT, [context], batch=batch, timing=timing, progress=tell)
    contexts = [16, 32] if options.small else [256, 1024, 4096, 16384]
    longest = replace(preset, model=replace(preset.model, context=contexts[-1]))
    decoded = bench.bench("decode", longest, RECURRENT, contexts, timing=timing, progress=tell)
    steps = [
        [r.mechanism, f"{r.context:,} x {r.batch}", number(r.relative, ".2f"), number(r.ms, ",.1f"), spread(r)]
        for r in trained
    ]
    tokens = [
        [
            " ".join(filter(None, (r.mechanism, r.mode))),
            f"{r.context:,}",
            number(r.ms, ",.2f"),
            spread(r),
            number(r.relative, ".2f"),
            size(r.cache_bytes),
        ]
        for r in decoded
        if r.mode != "chunked"  # of one token
    ]
    return "\n\n".join(
        [
            f"{shape(preset.model)}. One training step, {trained[0].dtype} products; tokens x sequences:",
            markdown(["", "step", "x mha's time", "ms", "fastest to slowest"], steps),
            f"One token, batch 1, {decoded[0].dtype}, with all but one token held:",
            markdown(["", "tokens", "ms", "fastest to slowest", "x mha's time", "live cache"], tokens),
        ]
    )


def tiny(config: RunConfig) -> RunConfig:
    model = replace(config.model, context=32, n_layers=1, d_model=32, n_heads=2)
    return replace(config, model=model, train=replace(config.train, batch_size=2))


# words


def shape(model: ModelConfig) -> str:
    return f"{model.n_layers} layers, {model.n_heads} heads, {model.d_model} wide"


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def spread(record: BenchRecord) -> str:
    return record.error or " to ".join(f"{ms:,.1f}" for ms in record.ms_spread)


def size(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.1f} MiB"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance() -> str:
    """What made the numbers: command, machine, versions, day."""
    found = environment()
    words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
    for i, word in enumerate(words[:-1]):
        if word in ("--nanogpt", "--document", "--model", "--text", "--out"):
            words[i + 1] = "PATH"
    return (
        f"`{shlex.join(words)}`, {date.today():%d %B %Y}, on {found['cpu']}, {found['cores']} cores, "
        f"{torch.get_num_threads()} threads, torch {found['packages']['torch']}, Python {found['python']}."
    )


def write_section(document: Path, section: str, text: str) -> None:
    """Between its markers, which are added at the end where they are missing; the rest stays as it is."""
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    old = document.read_text("utf-8") if document.exists() else "# Performance\n"
    if begin not in old:
        old = f"{old.rstrip()}\n\n## {TITLES[section]}\n\n{begin}\n{end}\n"
    before, rest = old.split(begin, 1)
    _, after = rest.split(end, 1)
    document.parent.mkdir(exist_ok=True)
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


def progress_of(section: str) -> Callable[[str, int, int], None]:
    spoken = -math.inf

    def tell(what: str, done: int, of: int) -> None:
        nonlocal spoken
        if time.monotonic() - spoken > 10:
            spoken = time.monotonic()
            say(f"{section}: {what}, {done}/{of}")

    return tell


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
