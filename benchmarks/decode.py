"""Decoding a GPT-2 of 124M parameters on a CPU, batch 1: ours against transformers' generate, with the same weights,
and against what reading the weights once per token must take. Written into docs/performance.md.

    python benchmarks/decode.py                    about 5 minutes on 2 cores, on a machine that does nothing else
    python benchmarks/decode.py --repeats 1 --tokens 16 --document -      only printed
    python benchmarks/decode.py --small --document -      a minute, to see that it runs; its numbers mean nothing

Weights are random, so nothing is downloaded. Contenders take turns in one process (A B C A B C ...), prompt included;
times are medians. Before anything is timed, greedy tokens are compared. The limit is the speed at which memory is read
(the fastest sum over a large buffer, measured between the turns) over the bytes of the weights. Peak memory is of a
process of its own for each contender: how much it grew beyond what it held after it had used a tiny model once, which
brings in the program itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from speed import DOCUMENT, markdown, provenance, say, write_section

from attnlab import pretrained
from attnlab.inference import generate as decoding
from attnlab.inference.text import weight_bytes
from attnlab.measure.counters import interleaved, read_speed
from attnlab.model import Decoder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("transformers", "attnlab", "attnlab, compiled")
Generate = Callable[[int], list[int]]  # how many tokens -> the tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default 128)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt (default 16)")
    parser.add_argument("--repeats", type=int, default=7, help="of each measurement (default 7)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", default=";".join(WAYS), help="separated by semicolons")
    parser.add_argument("--model", type=Path, help="a Hugging Face GPT-2 instead of the random one")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="- to write none")
    parser.add_argument("--small", action="store_true", help="a tiny model, 4 tokens, once")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script calls itself
    parser.add_argument("--tiny", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = [way for way in options.ways.split(";") if way not in WAYS]
    if unknown:
        parser.error(f"--ways names {unknown[0]!r}: give some of {'; '.join(WAYS)}, separated by semicolons")
    missing = [way for way in WAYS[:2] if way not in options.ways.split(";")]
    if missing:
        parser.error(f"--ways lacks {missing[0]!r}, with which the others are compared: add it")
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if options.memory_of:
        print(json.dumps(memory(options.memory_of, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.tiny = random_gpt2(Path(folder) / "tiny", n_layer=1, n_embd=64, n_head=1)
        if options.small:
            options.model, options.tokens, options.repeats = options.tiny, 4, 1
        options.model = options.model or random_gpt2(Path(folder) / "gpt2")
        text = measure(options)
    print(text)
    if str(options.document) != "-":
        write_section(options.document, "decode-gpt2", f"{provenance()}\n\n{text}")


def random_gpt2(folder: Path, **shape: Any) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(folder)
    return folder


def contenders(options: argparse.Namespace) -> list[tuple[str, str]]:
    return [(way, name) for name in PRECISIONS for way in options.ways.split(";")]


def open_model(way: str, name: str, folder: Path) -> Any:
    if way != "transformers":
        return pretrained.load(folder, dtype=PRECISIONS[name]).model
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return GPT2LMHeadModel.from_pretrained(folder, dtype=PRECISIONS[name]).eval()


def generator(way: str, model: Any, options: argparse.Namespace) -> Generate:
    prompt = torch.randint(1000, 40_000, (options.prompt,), generator=torch.Generator().manual_seed(1)).tolist()
    if isinstance(model, Decoder):
        compiled = way.endswith("compiled")
        return lambda n: decoding.generate(model, [prompt], n, temperature=0, compile=compiled)[0]
    ids = torch.tensor([prompt])

    def generate(n: int) -> list[int]:
        how = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **how)[0, len(prompt) :].tolist()

    return generate


def measure(options: argparse.Namespace) -> str:
    models: dict[tuple[str, str], Any] = {}
    for way, name in contenders(options):
        key = (way.removesuffix(", compiled"), name)  # the same weights, compiled or not
        models[key] = models.get(key) or open_model(way, name, options.model)
    calls = {
        (way, name): generator(way, models[way.removesuffix(", compiled"), name], options)
        for way, name in contenders(options)
    }
    found = {}
    for key, call in calls.items():
        say(f"first tokens of {', '.join(key)}")
        found[key] = call(options.tokens)
    same = {key: agreement(found["transformers", key[1]], tokens) for key, tokens in found.items()}
    for (way, name), count in same.items():
        assert name != "fp32" or count == options.tokens, f"{way} chooses another token after {count}: nothing is timed"
    say(f"timing {len(calls)} contenders, {options.repeats} times each")
    speeds: list[float] = []
    timed = {key: clocked(call, options.tokens, speeds) for key, call in calls.items()}
    seconds = interleaved(timed, options.repeats, warm_up=1)
    speed = max(speeds)
    rows = []
    for (way, name), times in seconds.items():
        say(f"memory of {way}, {name}")
        ours = models["attnlab", name]
        assert isinstance(ours, Decoder)
        weights = weight_bytes(ours)
        rates = [options.tokens / t for t in times]
        rate, theirs = statistics.median(rates), options.tokens / statistics.median(seconds["transformers", name])
        ratios = [a / b for a, b in zip(seconds["transformers", name], times, strict=True)]
        grown, needed = memory_of(way, name, options)
        rows.append(
            [
                f"{way}, {name}",
                f"{rate:.1f}",
                f"{min(rates):.1f} to {max(rates):.1f}",
                f"{rate / theirs:.2f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
                f"{rate * weights / speed:.0%}",
                f"{grown / 2**20:,.0f} MiB",
                f"{grown / needed:.2f}",
                f"{same[way, name]} of {options.tokens}",
            ]
        )
    limits = ", ".join(f"{speed / weight_bytes(models['attnlab', name]):.0f} in {name}" for name in PRECISIONS)
    size = sum(p.numel() for p in models["attnlab", "fp32"].parameters())
    head = [
        "", "tokens/s", "slowest to fastest", "x transformers", "in each turn", "of the limit", "peak memory",
        "x weights and cache", "same tokens",
    ]  # fmt: skip
    return (
        f"GPT-2 with {size / 1e6:.0f}M random parameters, batch 1, {options.prompt} tokens read and "
        f"{options.tokens} written: median of {options.repeats}. Memory is read at {speed / 1e9:.1f} GB/s, which "
        f"allows {limits} tokens/s.\n\n" + markdown(head, rows)
    )


def agreement(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def clocked(call: Generate, tokens: int, speeds: list[float]) -> Callable[[], float]:
    def timed() -> float:
        speeds.append(read_speed())
        began = time.perf_counter()
        call(tokens)
        return time.perf_counter() - began

    return timed


def memory_of(way: str, name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Bytes that a process of its own grew by, and bytes of weights and cache."""
    words = [sys.executable, __file__, "--memory-of", f"{way};{name}", "--model", str(options.model)]
    words += [
        f"--tiny={options.tiny}",
        f"--tokens={options.tokens}",
        f"--prompt={options.prompt}",
        f"--threads={options.threads}",
    ]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(said.stdout.splitlines()[-1])


def memory(which: str, options: argparse.Namespace) -> tuple[int, int]:
    way, name = which.split(";")
    generator(way, open_model(way, name, options.tiny), options)(4)
    before = status("VmRSS")
    model = open_model(way, name, options.model)
    generator(way, model, options)(options.tokens)
    grown = status("VmHWM") - before
    shape = json.loads((options.model / "config.json").read_text())
    cache = 2 * shape["n_layer"] * shape["n_embd"] * PRECISIONS[name].itemsize * (options.prompt + options.tokens)
    return grown, cache + sum(p.numel() * p.element_size() for p in model.parameters())


def status(field: str) -> int:
    """Bytes, as Linux counts them."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
