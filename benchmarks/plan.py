"""How near `attnlab plan` comes to what is counted and measured, for every mechanism, as a Markdown table.

    python benchmarks/plan.py                  two minutes on one core
    python benchmarks/plan.py --only mha,mla

Counted: the whole model takes a step on the meta device, where the plan counted one layer of each kind; the worst of
three shapes, and beside it what the mechanisms' own formulas, times three, are off. Measured: a training step here, on
the CPU in float32, with every tensor followed, against a plan of that path. Fused: with a context for which PyTorch's
fused kernel runs here as on a GPU, against a plan for a GPU, in float32 and in bfloat16 under autocast.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from speed import markdown, provenance, say

from attnlab import attention, data, presets
from attnlab.config import Execution, ModelConfig, RunConfig, TrainConfig
from attnlab.costs.memory import META, AsOnGpu, Recomputed, footprint, on_meta
from attnlab.costs.plan import Machine, Sizes, walk
from attnlab.measure.counters import Follow, flop_counter, peak_growth, tensor_bytes
from attnlab.measure.gpus import GPUS
from attnlab.model import Decoder, flops_per_token
from attnlab.presets import variant
from attnlab.training.train import Trainer, train_step

CPU = torch.device("cpu")
SHAPES = ("gpt2-124m", "llama-8b", "deepseek-v3-671b")
LAYERS = 4  # the first ones, of shapes that have experts: one layer has them
SMALL = RunConfig(  # for measuring
    model=ModelConfig(context=64, n_layers=4, d_model=128, n_heads=8),
    train=TrainConfig(batch_size=12, precision="fp32", device="cpu"),
)
LONG = replace(  # beyond what attention keeps its weights for on a CPU
    SMALL,
    model=replace(SMALL.model, context=2112, n_layers=2, d_model=64, n_heads=4, ff="swiglu", norm="rms"),
    train=replace(SMALL.train, batch_size=2),
)
EVEN: dict[str, dict[str, Any]] = {  # keys as wide as values: for others there is no fused kernel on a CPU
    name: {"rope_dim": 0}
    for name in attention.names()
    if "rope_dim" in attention.module(name).Config.__dataclass_fields__
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(attention.names()), help="mechanisms, separated by commas")
    options = parser.parse_args()
    columns = ["mechanism", "FLOPs", "memory", *(f"formula, {shape}" for shape in SHAPES)]
    columns += ["measured", "with experts", "fused", "fused, bf16"]
    rows = []
    for name in options.only.split(","):
        say(name)
        off, formulas = [], []
        for shape in SHAPES:
            config = variant(presets.get(shape), name)
            config = few_layers(config) if config.model.ff == "moe" else config
            off.append(counting(config, batch=2))
            formulas.append(3 * flops_per_token(config.model) / whole(config, 2)[0] - 1)
        found = [max(each, key=abs) for each in zip(*off, strict=True)] + formulas
        experts, long = replace(SMALL, model=replace(SMALL.model, ff="moe")), variant(LONG, name, EVEN)
        found += [measuring(variant(base, name), CPU) for base in (SMALL, experts)]
        rows.append([name, *(f"{each:+.2%}" for each in (*found, measuring(long, META), rounding(long)))])
    print(f"{provenance()}\n\n{markdown(columns, rows)}")


def few_layers(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, n_layers=min(LAYERS, config.model.n_layers)))


def counting(config: RunConfig, batch: int, recompute: bool = False) -> tuple[float, float]:
    """By how much planned FLOPs and memory are off what a step of the whole model on the meta device has."""
    machine = Machine(GPUS["h100"], batch=batch, recompute=recompute)
    sizes = Sizes(config)
    flops, memory = whole(config, batch, recompute)
    return sizes.training_flops(machine) / flops - 1, sizes.memory(machine).peak / memory - 1


def whole(config: RunConfig, batch: int, recompute: bool = False) -> tuple[float, int]:
    """FLOPs per token, and bytes at the worst moment: weights, AdamW's two states and what the step has in use."""
    model = on_meta(config)
    weights = sum(p.nbytes for p in model.parameters())
    accumulates = config.train.accumulate > 1
    for parameter in model.parameters() if accumulates else ():
        parameter.grad = torch.empty_like(parameter)
    surroundings = AsOnGpu(bf16=config.train.precision != "fp32", keep=not recompute)
    if recompute:
        model.layers = torch.nn.ModuleList(Recomputed(layer, surroundings) for layer in model.layers)
    with META:
        tokens, targets = (torch.zeros(batch, config.model.context, dtype=torch.int64) for _ in "xy")
    with flop_counter() as counter, Follow() as follow:
        with surroundings:
            loss = model.loss(tokens, targets)
        surroundings.forget()
        loss.backward()
    return counter.get_total_flops() / tokens.numel(), weights * (3 + accumulates) + follow.peak


def measuring(config: RunConfig, device: torch.device, recompute: bool = False) -> float:
    """By how much the memory planned, counted on `device`, is off that of a training step here."""
    planned = Sizes(config, device).memory(Machine(GPUS["h100"], recompute=recompute))
    return planned.peak / measured(config, recompute) - 1


def rounding(config: RunConfig) -> float:
    """By how much what a plan for bfloat16 has in use is off what a step here has under autocast."""
    model, layers = Decoder(config.model), [0] * config.model.n_layers
    tokens = torch.randint(config.model.vocab_size, (config.train.batch_size, config.model.context))
    with Follow() as follow:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, tokens)
        loss.backward()
    return walk(footprint(config, len(tokens)), layers, layers) / follow.peak - 1


def measured(config: RunConfig, recompute: bool = False) -> int:
    """Bytes at the worst moment of the third training step: what stays between steps, and what it adds."""
    trainer = Trainer.of(config, data.load(config.data), Execution(recompute=recompute))
    for step in range(2):
        train_step(trainer, step)
    states = [
        value for o in trainer.strategy.optimizers.values() for state in o.state.values() for value in state.values()
    ]
    kept = [*trainer.model.parameters(), *(s for s in states if isinstance(s, torch.Tensor))]
    return tensor_bytes(kept) + peak_growth(lambda: train_step(trainer, 2), CPU)


if __name__ == "__main__":
    main()
