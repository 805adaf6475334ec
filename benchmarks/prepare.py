"""Preparing and reading corpora, measured, and written into docs/performance.md. Anyone can run it:

    python benchmarks/prepare.py                    all but memory
    python benchmarks/prepare.py --text FILE        plain text of your own; otherwise Shakespeare's words in any order
    python benchmarks/prepare.py --only memory      a corpus of 2 GB, and the most memory that preparing it takes
    python benchmarks/prepare.py --small --document FILE    to see that it runs; its numbers mean nothing

preparing  attnlab prepare, from a file of text to shards on the disk with checksums, against tiktoken.encode_ordinary
           alone in as many processes, which are handed the same documents in memory and throw the ids away
reading    random windows from memory-mapped shards as int64, against the two lines of nanoGPT's train.py
memory     the peak resident size of `attnlab prepare` on --gigabytes of text
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import DOCUMENT, markdown, provenance, say, write_section

from attnlab.data import tokenizer
from attnlab.data.prepare import Recipe, prepare
from attnlab.data.sources import open_source
from attnlab.data.texts import shakespeare
from attnlab.data.tokens import Tokens
from attnlab.measure.counters import interleaved

SECTIONS = ("preparing", "reading", "memory")
CORES = os.cpu_count() or 1
DOCUMENTS: list[str] = []  # what the processes of the baseline encode; they inherit it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="preparing,reading", help="sections, separated by commas")
    parser.add_argument("--text", type=Path, help="plain text in UTF-8, documents between empty lines")
    parser.add_argument(
        "--megabytes", type=int, default=100, help="of preparing, where no --text is given (default 100)"
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of memory (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default 5)")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--small", action="store_true", help="a megabyte of each, measured once")
    options = parser.parse_args()
    if options.small:
        options.megabytes, options.gigabytes, options.repeats = 1, 0.001, 1
    chosen = options.only.split(",")
    if unknown := set(chosen) - set(SECTIONS):
        parser.error(f"--only {', '.join(unknown)}: give some of {', '.join(SECTIONS)}")
    measure = {"preparing": preparing, "reading": reading, "memory": memory}
    for section in chosen:
        with tempfile.TemporaryDirectory() as folder:
            text = measure[section](options, Path(folder))
        print(text)
        write_section(options.document, f"corpora-{section}", f"{provenance()}\n\n{text}")


def write_text(file: Path, size: int) -> None:
    """`size` bytes of Shakespeare's words as often as he uses them, in random order, about 3,000 to a document."""
    words = np.array([f"{word} " for word in shakespeare().split()])
    draw = np.random.default_rng(0)
    with open(file, "w", encoding="utf-8") as opened:
        while opened.tell() < size:
            for document in draw.choice(words, (200, 3000)):
                opened.write("".join(document) + "\n\n")
        opened.truncate(size)


def preparing(options: argparse.Namespace, folder: Path) -> str:
    file = options.text or folder / "text.txt"
    if options.text is None:
        say(f"preparing: writing {options.megabytes} MB of text")
        write_text(file, options.megabytes * 10**6)
    DOCUMENTS[:] = [block.text for block in open_source(f"text:{file}", "blank").splits["train"].read(0)]
    recipe = Recipe(source=f"text:{file}", val=f"text:{tiny(folder)}", documents="blank", tokenizer="gpt2")
    made = prepare(recipe, folder / "checked").split("train")
    end = tokenizer("gpt2").end
    expected = [i for document in DOCUMENTS[:50] for i in (*tiktoken().encode_ordinary(document), end)]
    assert made.read(0, len(expected)).tolist() == expected, "the ids differ: nothing is timed"
    tokens = len(made)

    def ours() -> float:
        out = folder / f"out-{time.monotonic_ns()}"
        began = time.perf_counter()
        prepare(recipe, out)
        return time.perf_counter() - began

    with multiprocessing.get_context("fork").Pool(CORES) as pool:

        def together(processes: int) -> float:
            began = time.perf_counter()
            pool.map(encode_share, [(i, processes) for i in range(processes)], chunksize=1)
            return time.perf_counter() - began

        say(f"preparing: {tokens:,} tokens, {options.repeats} times each")
        both = f"tiktoken alone, {CORES} processes"
        contenders = {"tiktoken alone, 1 process": lambda: together(1), both: lambda: together(CORES)}
        seconds = interleaved({**contenders, f"attnlab prepare, {CORES} workers": ours}, options.repeats)
    base = statistics.median(seconds[both])
    rows = [
        [
            name,
            f"{tokens / statistics.median(times):,.0f}",
            f"{tokens / max(times):,.0f} to {tokens / min(times):,.0f}",
            f"{base / statistics.median(times):.2f}",
        ]
        for name, times in seconds.items()
    ]
    return (
        f"{file.stat().st_size / 1e6:,.0f} MB of {'plain text' if options.text else 'random words'}, "
        f"{len(DOCUMENTS):,} documents, {tokens:,} tokens of GPT-2's; median of {options.repeats}. tiktoken is handed "
        "the documents in memory and throws the ids away; attnlab reads the file, and its time includes opening the "
        "tokenizer, both checksums and the disk.\n\n"
        + markdown(["", "tokens/s", "slowest to fastest", f"x {both}"], rows)
    )


def tiny(folder: Path) -> Path:
    (folder / "val.txt").write_text("held out\n")
    return folder / "val.txt"


@cache
def tiktoken() -> Any:
    """Opened before the processes begin, so that they have it and its opening is not counted."""
    return tokenizer("gpt2")._tiktoken  # type: ignore[attr-defined]


def encode_share(share: tuple[int, int]) -> int:
    """Every `of`-th document, by tiktoken alone."""
    part, of = share
    encode = tiktoken().encode_ordinary
    return sum(len(encode(document)) for document in DOCUMENTS[part::of])


def reading(options: argparse.Namespace, folder: Path) -> str:
    """Windows of a corpus in ten shards, through Tokens and as nanoGPT's get_batch does it from one file."""
    draw, total = np.random.default_rng(0), 10**6 if options.small else 10**8
    for shard in range(10):
        draw.integers(0, 50_257, total // 10).astype("<u2").tofile(folder / f"{shard}.bin")
    (folder / "one.bin").write_bytes(b"".join((folder / f"{shard}.bin").read_bytes() for shard in range(10)))
    tokens = Tokens([np.memmap(folder / f"{shard}.bin", "<u2", "r") for shard in range(10)])
    rows = []
    for context, batch in ((256, 64), (1024, 12)):
        starts = [
            draw.integers(0, len(tokens) - context - 1, batch) for _ in range(max(1, total // 10 // (context * batch)))
        ]
        read = {"Tokens.gather": tokens_gather, "nanoGPT's lines": nanogpt_lines}
        a, b = (call(tokens, folder, starts[0], context + 1) for call in read.values())
        assert torch.equal(a, b), "the windows differ: nothing is timed"
        timed = {name: partial(clocked, call, tokens, folder, starts, context + 1) for name, call in read.items()}
        count = len(starts) * batch * (context + 1)
        seconds = interleaved(timed, options.repeats)
        rows += [
            [f"{name}, {batch} windows of {context}", f"{count / statistics.median(times) / 1e6:,.0f}",
             f"{count / max(times) / 1e6:,.0f} to {count / min(times) / 1e6:,.0f}"]
            for name, times in seconds.items()
        ]  # fmt: skip
    return (
        f"{total // 10**6} million tokens of uint16, random windows as int64 tensors, one thread; median of "
        f"{options.repeats}.\n\n" + markdown(["", "million tokens/s", "slowest to fastest"], rows)
    )


def tokens_gather(tokens: Tokens, folder: Path, starts: np.ndarray, length: int) -> torch.Tensor:
    return tokens.gather(starts, length)


def nanogpt_lines(tokens: Tokens, folder: Path, starts: np.ndarray, length: int) -> torch.Tensor:
    """It maps the file anew for each batch, and stacks slices."""
    data = np.memmap(folder / "one.bin", dtype=np.uint16, mode="r")
    return torch.stack([torch.from_numpy(data[i : i + length].astype(np.int64)) for i in starts])


Read = Callable[[Tokens, Path, np.ndarray, int], torch.Tensor]


def clocked(call: Read, tokens: Tokens, folder: Path, starts: list[np.ndarray], length: int) -> float:
    began = time.perf_counter()
    for batch in starts:
        call(tokens, folder, batch, length)
    return time.perf_counter() - began


def memory(options: argparse.Namespace, folder: Path) -> str:
    rows = []
    for size in (options.gigabytes / 10, options.gigabytes):
        say(f"memory: writing and preparing {size:g} GB")
        write_text(folder / "text.txt", int(size * 10**9))
        words = ["prepare", f"text:{folder / 'text.txt'}", "--tokenizer", "gpt2", "--out", str(folder / f"{size:g}")]
        for rule in ("blank", "each"):
            command = [sys.executable, "-m", "attnlab", *words[:-1], f"{words[-1]}-{rule}", "--documents", rule]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            assert status == 0, "attnlab prepare failed"
            seconds = time.perf_counter() - began
            rows.append([f"{size:g} GB, documents {rule}", f"{used.ru_maxrss / 2**10:,.0f} MiB", f"{seconds:,.0f} s"])
    return "The whole process at its largest, Python and torch included.\n\n" + markdown(["", "resident", "time"], rows)


if __name__ == "__main__":
    main()
