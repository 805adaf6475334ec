"""A comparison folder with made-up, plausible numbers, for looking at the report and for testing it.

`python tests/report_fixture.py FOLDER` writes one.
"""

from __future__ import annotations

import math
import random
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from attnlab.contrasts import Judging, of_losses
from attnlab.files import write_json
from attnlab.results import FORMAT, BenchRecord, LawResult, RunResult

LAYERS, CONTEXT, STEPS = 4, 256, 2000
#             loss    params   floats  slots  tokens/s  FLOPs       ms at 0 tokens, ms per 1000 tokens
MECHANISMS = {
    "mha": (1.874, 802_944, 256, 256, 24_100, 1_770_000, 0.86, 0.62),
    "mqa": (1.903, 704_640, 64, 256, 25_900, 1_570_000, 0.82, 0.21),
    "gqa": (1.881, 737_408, 128, 256, 25_300, 1_640_000, 0.83, 0.34),
    "mla": (1.869, 812_032, 72, 256, 19_400, 1_930_000, 0.98, 0.24),
    "msla": (1.872, 828_544, 80, 256, 16_200, 2_110_000, 1.31, 0.17),
    "mka": (1.861, 811_524, 264, 256, 11_700, 2_480_000, 1.62, 0.70),
    "fast_mka": (1.868, 806_020, 256, 256, 20_900, 1_800_000, 0.95, 0.63),
    "sliding": (1.889, 737_408, 128, 64, 25_100, 1_640_000, 0.84, 0.06),
}
LAWS = {
    "causality": "No output depends on a later token.",
    "mixing": "Outputs depend on earlier tokens.",
    "dead parameters": "Every trainable parameter receives gradient.",
    "decode": "Prefill, one token at a time, any chunks, and rewind-and-go-on give the same outputs.",
    "left padding": "Padding on the left changes nothing.",
    "batch": "Neighbours in a batch, and their order, change nothing.",
    "cache size": "The live cache holds exactly the floats that cache_spec declares.",
    "own layers": "Each layer has parameters of its own.",
    "relative position": "Shifting all positions changes nothing.",
    "state dict": "Saving and loading gives the same module.",
    "bf16": "In bfloat16 the error stays inside the error budget against float64.",
    "flops": "Counted FLOPs equal the declared formula.",
}
PROMPT = "KING RICHARD:\n"
TEXT = """What, is the day that I have heard thee speak,
And like the summer's <crown> & silver breath
That fears the world, and would not have it so?

QUEEN MARGARET:
Then let him come; the people of my heart
Are made of "stone", and stone they shall remain.

BUCKINGHAM:
My lord, the morning stands upon the hill;
I would your grace had ta'en the better part.
"""


def run(mechanism: str, seed: int, rng: random.Random, *, luck: float) -> RunResult:
    """One finished run; `luck` is what all mechanisms share at this seed, which is why pairing helps."""
    loss, parameters, floats, slots, speed, flops, *_ = MECHANISMS[mechanism]
    final = loss + luck + rng.gauss(0, 0.004)
    pace = 260 * (1 + 0.15 * rng.random())

    def at(step: int, gap: float) -> float:
        decay = (4.17 - final) * (0.72 * math.exp(-step / pace) + 0.28 * math.exp(-step / (2.4 * pace)))
        return final - gap + decay + 0.003 * math.sin(step / 90 + seed)

    curve = [[step, round(at(step, at(STEPS, 0.0) - final), 4)] for step in range(0, STEPS, 100)] + [
        [STEPS, round(final, 4)]
    ]
    train = [[step, round(at(step, 0.05) + rng.gauss(0, 0.02), 4)] for step in range(10, STEPS + 1, 30)]
    cache = 4 * LAYERS * floats * slots
    rate = speed * (1 + 0.02 * rng.gauss(0, 1))
    return RunResult(
        name="quick",
        mechanism=mechanism,
        seed=seed,
        key=f"{rng.getrandbits(48):012x}",
        parameters=parameters,
        floats_per_token=float(LAYERS * floats if slots == CONTEXT else 0),
        cache_bytes=cache,
        flops_per_token=float(flops),
        steps=STEPS,
        tokens=STEPS * 12 * CONTEXT,
        context=CONTEXT,
        train_loss=train[-1][1],
        val_loss=curve[-1][1],
        best_val_loss=min(loss for _, loss in curve),
        tokens_per_s=rate,
        seconds=STEPS * 12 * CONTEXT / rate,
        peak_bytes=410_000_000,
        precision="fp32",
        impl="sdpa",
        threads=2,
        device="cpu",
        command=f"attnlab train quick --model.mechanisms {mechanism} --seed {seed}",
        curve=curve,
        train_curve=train,
    )


def summary(cells: list[RunResult], mechanisms: list[str], baseline: str) -> dict[str, Any]:
    """The rows of mechanisms and how they were judged, as a comparison writes them."""
    rows, statistics = of_losses(cells, mechanisms, baseline, Judging())
    return {"summary": rows, "statistics": statistics}


def laws(mechanisms: list[str]) -> list[LawResult]:
    found = []
    for mechanism in mechanisms:
        for law, statement in LAWS.items():
            status, detail = "holds", ""
            if mechanism in ("sliding", "mka", "fast_mka") and law == "decode":
                detail = (
                    "rewinding is not applicable: a ring or a running state cannot go back; the rest agrees to 3e-16"
                )
            if mechanism == "latent_lookup" and law == "mixing":
                status, detail = "broken", "no output moves by more than 0 when any earlier token changes"
            if mechanism == "latent_lookup" and law == "dead parameters":
                status, detail = "broken", "k_proj.weight (4,096 numbers) receives no gradient"
            if mechanism == "latent_lookup" and law in ("relative position", "cache size"):
                status, detail = "n/a", "it reads no position and remembers nothing"
            found.append(LawResult(law=law, mechanism=mechanism, status=status, detail=detail, statement=statement))
    return found


def bench(mechanisms: list[str], rng: random.Random) -> list[BenchRecord]:
    found = []
    for mechanism in mechanisms:
        _, parameters, floats, slots, speed, flops, floor, slope = MECHANISMS[mechanism]
        common: dict[str, Any] = {
            "mechanism": mechanism,
            "impl": "sdpa",
            "dtype": "float32",
            "device": "cpu",
            "threads": 2,
            "repeats": 7,
            "parameters": parameters,
        }
        tokens = 12 * CONTEXT
        for kind, ms in (("train", 1000 * tokens / speed), ("prefill", 300 * tokens / speed)):
            base = 1000 * tokens / MECHANISMS["mha"][4] * (1 if kind == "train" else 0.3)
            found.append(
                BenchRecord(
                    kind=kind,
                    context=CONTEXT,
                    batch=12,
                    ms=ms,
                    ms_spread=[ms * 0.97, ms * 1.06],
                    tokens_per_s=1000 * tokens / ms,
                    peak_bytes=410_000_000 if kind == "train" else 96_000_000,
                    cache_bytes=None if kind == "train" else 4 * LAYERS * floats * slots * 12,
                    flops=int(flops * tokens * (3 if kind == "train" else 1)),
                    relative=ms / base,
                    **common,
                )
            )
        for context in (64, 256, 1024, 4096):
            ways = {"expanded": (floor - 0.15, slope * 4.2), "absorbed": (floor, slope)} if mechanism == "mla" else {}
            for mode, (start, per_thousand) in (ways or {"": (floor, slope)}).items():
                ms = (start + per_thousand * min(context, slots if slots < CONTEXT else context) / 1000) * rng.uniform(
                    0.98, 1.02
                )
                base = MECHANISMS["mha"][6] + MECHANISMS["mha"][7] * context / 1000
                found.append(
                    BenchRecord(
                        kind="decode",
                        mode=mode,
                        context=context,
                        batch=1,
                        ms=ms,
                        ms_spread=[ms * rng.uniform(0.93, 0.98), ms * rng.uniform(1.02, 1.1)],
                        tokens_per_s=1000 / ms,
                        peak_bytes=70_000_000,
                        cache_bytes=4 * LAYERS * floats * min(context, slots if slots < CONTEXT else context),
                        flops=int(flops),
                        relative=ms / base,
                        **common,
                    )
                )
    return found


def attention(
    mechanisms: list[str], tokens: list[str], rng: random.Random, layers: int = LAYERS
) -> list[dict[str, Any]]:
    """Heads of the kinds that trained models grow: previous token, nearby, same character, word starts."""
    length = len(tokens)

    def score(kind: int, q: int, k: int) -> float:
        return (
            5.0 * (q - k == 1),
            (k - q) / 4,
            4.0 if k and tokens[k - 1] == tokens[q] else 0.5 * (k == 0),
            3.0 if tokens[k] in " \n" else (k - q) / 10,
        )[kind]

    def head(kind: int, mechanism: str) -> list[list[float]]:
        rows = []
        for q in range(length):
            seen = range(max(0, q - 15) if mechanism == "sliding" else 0, q + 1)
            weights = {k: math.exp(score(kind, q, k) + rng.gauss(0, 0.4)) for k in seen}
            if mechanism == "msla":
                best = sorted(weights, key=weights.__getitem__)[-12:]
                weights = {k: weights[k] for k in best}
            total = sum(weights.values())
            rows.append([round(weights.get(k, 0.0) / total, 4) for k in range(length)])
        return rows

    return [
        {
            "mechanism": mechanism,
            "seed": 0,
            "tokens": tokens,
            "layers": [[head((layer + n) % 4, mechanism) for n in range(4)] for layer in range(layers)],
            "values": [
                None if mechanism == "mka" else [[round(rng.uniform(0.2, 2), 3) for _ in tokens] for _ in range(4)]
                for _ in range(layers)
            ],
        }
        for mechanism in mechanisms
    ]


def make(
    folder: Path,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    mechanisms: tuple[str, ...] = tuple(MECHANISMS),
    failed: tuple[str, int] | None = ("msla", 2),
    match: str = "params",
    layers: int = LAYERS,
) -> Path:
    """Write the folder; `failed` names the one run that did not end well."""
    rng = random.Random(7)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(mechanisms)
    luck = {seed: rng.gauss(0, 0.012) for seed in seeds}
    cells = []
    for seed in seeds:
        for name in names:
            cell = run(name, seed, rng, luck=luck[seed])
            if (name, seed) == failed:
                cell = RunResult.from_dict(
                    cell.to_dict()
                    | {
                        "status": "failed",
                        "val_loss": None,
                        "best_val_loss": None,
                        "tokens_per_s": None,
                        "curve": cell.curve[:5],
                    }
                    | {"error": "the loss is NaN at step 431: the last good checkpoint is step 400; lower lr"}
                )
            cells.append(cell)
    matched = {
        "mla": {"field": "kv_rank", "from": 128, "to": 116, "parameters": 806_912, "off": 0.005, "equal": True},
        "mka": {"field": None, "from": None, "to": None, "parameters": 832_332, "off": 0.036, "equal": False},
    }
    write_json(
        folder / "compare.json",
        {
            "format": FORMAT,
            "preset": "quick",
            "command": f"attnlab compare quick --mechanisms {','.join(names)} --seeds {len(seeds)} --match {match}",
            "mechanisms": names,
            "seeds": list(seeds),
            "baseline": "mha",
            "match": match,
            "matched": {k: v for k, v in matched.items() if k in names} if match != "none" else {},
            "environment": {
                "python": "3.11.2",
                "platform": "Linux x86_64",
                "cpu": "Intel(R) Xeon(R) Processor @ 2.60GHz",
                "cores": 2,
                "packages": {"attnlab": "0.1.0", "torch": "2.13.0", "accelerate": "1.15.0", "safetensors": "0.8.0"},
                "revision": "0123456789ab",
            },
            "cells": [asdict(cell) for cell in cells],
        }
        | summary(cells, names, "mha"),
    )
    write_json(folder / "laws.json", [asdict(law) for law in laws([*names, "latent_lookup"])])
    write_json(folder / "bench.json", [asdict(record) for record in bench(names, rng)])
    write_json(
        folder / "samples.json",
        [{"mechanism": name, "seed": seeds[0], "prompt": PROMPT, "text": PROMPT + TEXT} for name in names],
    )
    write_json(
        folder / "attention.json", attention(names, list("First Citizen:\nWe are accounted poor citizens"), rng, layers)
    )
    return folder


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
