"""Replacement of the attention in a model of transformers, in place.

Weights that mean the same carry over, the rest of the model may be frozen, and two laws are checked on the result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .. import attention
from ..config import to_dict
from ..convert.windows import seen_window
from ..errors import UserError, choose
from ..laws.interface import separate
from ..laws.state import seeded, unchanged
from ..laws.subject import Broken, movement, moves_by, scale
from ..pretrained.rope_config import rotary
from ..ranges import Seed, checked
from ..spec import UNSCALED, AttentionConfig
from .hosts import MODELS, TRAIN, Adapter, Patch, freeze_host, install


class Counts(NamedTuple):
    """Numbers of parameters, each counted once."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,}/{self.total:,} ({100 * self.trainable / self.total:.2f} %)"


@checked
def patch(
    model: Any,
    mechanism: str,
    *,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    keep_output: bool = False,
    train: str = "all",
    drop_window: bool = False,
    seed: Seed = 0,
) -> Counts:
    """Replace the attention of a transformers model (GPT-2, Llama, Mistral, Qwen2, Qwen3) in place.

    Print and return how many parameters train, of how many.

    layers: numbers from 0; None: all. options: fields of the mechanism's Config; sizes, rotary base, windows and
    biases are the model's. keep_output: the model's own output projection follows the mechanism's. train: "all",
    "attention" (the new mechanisms) or "new" (of those, what did not carry over). drop_window: a mechanism that sees
    all tokens may replace layers that see a window. seed: of the new weights. On the meta device it only counts.
    Raises `UserError` for what does not fit together, and `laws.Broken` where the patched model breaks a law that its
    mechanism promises; the model is then unchanged.
    """
    choose("train", train, TRAIN)
    cls = kind_of(model)
    before = State.of(model, cls)
    at = chosen(before.slots, layers)
    parts = cls.read(before.slots[at[0]])
    fields = config_fields(mechanism, cls, model.config, parts) | dict(options or {})
    windows = {i: cls.windows(model.config)[i] for i in at}
    config = with_window(mechanism, fields, windows, drop_window, model.config.max_position_embeddings)
    config.check_context(model.config.max_position_embeddings)
    if config.gives or config.takes:
        raise UserError(
            f"{mechanism} shares rows between layers, which a model of transformers does not hand on: convert it "
            "instead, with attnlab convert"
        )
    with torch.device("meta"):
        kept = carried(parts, attention.layer(mechanism, config), keep_output)
    entry = Patch(
        mechanism=mechanism, layers=at, config=dataclasses.asdict(config), keep_output=keep_output, carried=tuple(kept)
    )
    try:
        adopt(model, cls, entry, train, seed)
        if model.device.type != "meta":
            check_laws(model)
    except BaseException:
        before.restore(model, cls)
        raise
    counts = count_parameters(model)
    print(counts)
    return counts


def count_parameters(model: nn.Module) -> Counts:
    """Return how many parameters of `model` train, of how many."""
    parameters = list(model.parameters())
    return Counts(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def kind_of(model: Any) -> type[Any]:
    """Return the class that `model` becomes or is. Raises `UserError` for a model that cannot be patched."""
    for cls in MODELS:
        if type(model) in (cls, cls.__bases__[-1]) and not model.config.to_dict().get("add_cross_attention"):
            return cls
    allowed = ", ".join(cls.__bases__[-1].__name__ for cls in MODELS)
    raise UserError(f"{type(model).__name__} cannot be patched: give one of {allowed}, without cross-attention")


def chosen(slots: Sequence[nn.Module], layers: Sequence[int] | None) -> tuple[int, ...]:
    """Return the layers to patch, in order. Raises `UserError` for those that do not exist or are patched already."""
    at = tuple(range(len(slots))) if layers is None else tuple(sorted(set(layers)))
    if not at or at[0] < 0 or at[-1] >= len(slots):
        raise UserError(f"layers {list(layers or ())} were given: give some of 0 to {len(slots) - 1}")
    for i in at:
        held = slots[i]
        if isinstance(held, Adapter):
            raise UserError(f"layer {i} holds {held.patch.mechanism} already: load the original model, or leave it out")
    return at


def config_fields(
    mechanism: str, cls: type[Any], config: PretrainedConfig, parts: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return the fields of the mechanism's Config that the model's own config and weights (`parts`) fix.

    `cls`: the class that the model becomes. The window is left out: see `with_window`.
    """
    theta, scaling = rotary(config.to_dict()) if cls.turns else (None, UNSCALED)
    head_dim = len(parts["q.weight"]) // config.num_attention_heads
    form = attention.module(mechanism).Config
    given = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "head_dim": head_dim,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bias": "q.bias" in parts,
        "o_bias": "o.bias" in parts,
        "qk_norm": config.rms_norm_eps if "q_norm.weight" in parts else 0.0,
        "dropout": getattr(config, cls.dropout),
        # a mechanism whose cache has no width has as many heads as its definition says
        **({} if form.cache_width is None else {"n_kv_heads": len(parts["k.weight"]) // head_dim}),
    }
    return {name: value for name, value in given.items() if name in form.__dataclass_fields__}


def with_window(
    mechanism: str, fields: Mapping[str, Any], windows: Mapping[int, int | None], drop: bool, context: int
) -> AttentionConfig:
    """Return the mechanism's Config with these fields, and the window of the layers that it replaces.

    `windows`: layer -> tokens that it sees, None: all. Raises `UserError` where they differ, and where the mechanism
    sees all of the `context`, unless that is asked for by `drop`.
    """
    plain = attention.config(mechanism, **fields)
    sizes = set(windows.values()) - {None}
    if drop or not sizes:
        return plain
    narrow, size = next((i, size) for i, size in windows.items() if size is not None)
    known = "window" in attention.module(mechanism).Config.__dataclass_fields__
    windowed = attention.config(mechanism, **{"window": size, **fields}) if known else plain
    if seen_window(windowed, context) is None:
        raise UserError(
            f"layer {narrow} of this model sees the last {size} tokens, and {mechanism} would see all: take a "
            "mechanism with a window, leave such layers out, or add drop_window (--drop-window)"
        )
    if "window" not in fields and None in windows.values():
        wide = next(i for i, each in windows.items() if each is None)
        raise UserError(
            f"layer {narrow} of this model sees the last {size} tokens and layer {wide} all: patch such layers one "
            "after the other (--layers), or give the option window"
        )
    return windowed


def carried(parts: Mapping[str, Tensor], module: nn.Module, keep_output: bool) -> dict[str, Tensor]:
    """Return the parameters of a mechanism (`module`) that the model has too: name -> value.

    `parts` are the model's q, k, v and o, such as "q.weight". A mechanism's parameter that is named after some of them,
    such as qkv.weight, holds these below one another. It carries over where the Config's `carries` has all of them. A
    bias that the model lacks is 0.
    """
    config: AttentionConfig = module.config  # type: ignore[assignment]
    shared = set(config.carries) - ({"o"} if keep_output else set())  # projections that mean the same
    found = {}
    for name, parameter in module.named_parameters():
        projections, _, kind = name.rpartition(".")
        if projections.endswith("_norm") and shared >= {"q", "k"}:  # of heads
            value = parts.get(name)
        elif projections and set(projections) <= shared:
            value = stack_projections(
                parts, projections, kind, kv_heads(config, projections, len(parameter)), config.head_dim
            )
        else:
            value = None
        if value is not None and value.shape == parameter.shape:
            found[name] = value
    return found


def kv_heads(config: AttentionConfig, projections: str, rows: int) -> int:
    """Return the number of key/value heads in a parameter of so many rows that holds `projections`, such as "qkv"."""
    heads = rows // config.head_dim
    if "q" in projections:
        heads -= config.n_heads
    return heads // 2 if {"k", "v"} <= set(projections) else heads


def stack_projections(parts: Mapping[str, Tensor], projections: str, kind: str, heads: int, head_dim: int) -> Tensor:
    """Return `projections` of the model, such as "qkv", below one another: their weights or biases, as `kind` says.

    Keys and values get so many `heads`.
    """
    found = []
    for projection in projections:
        weight = parts[f"{projection}.weight"]
        value = parts.get(f"{projection}.{kind}")
        if value is None:
            value = weight.new_zeros(len(weight))
        found.append(regrouped(value, heads, head_dim) if projection in "kv" else value)
    return torch.cat(found)


def regrouped(rows: Tensor, heads: int, head_dim: int) -> Tensor:
    """Return heads of keys or values (K H ...), repeated or averaged in groups (Ainslie et al. 2023) to be `heads`.

    They are returned as they are where neither is possible.
    """
    own = rows.unflatten(0, (-1, head_dim))
    if heads % len(own) == 0:
        own = own.repeat_interleave(heads // len(own), 0)
    elif len(own) % heads == 0:
        own = own.unflatten(0, (heads, -1)).mean(1)
    return own.flatten(0, 1)


def adopt(model: Any, cls: type[Any], entry: Patch, train: str, seed: int) -> None:
    """Make `model` one of `cls`, with the patch `entry` in it; `seed`: of the new weights."""
    config = copy.deepcopy(model.config)
    config.__class__ = cls.config_class
    config.attnlab = [*config.attnlab, to_dict(entry)]
    config.attnlab_train = train
    reconfigure(model, config)
    model.__class__ = cls
    hosts = {i: getattr(model.blocks()[i], cls.slot) for i in entry.layers}
    with seeded(seed):
        install(model, entry)
    with torch.no_grad():
        for i, host in hosts.items():
            mechanism = model.adapters()[i].mechanism
            for name, value in carried(cls.read(host), mechanism, entry.keep_output).items():
                mechanism.get_parameter(name).copy_(value)
    freeze_host(model)


def reconfigure(model: Any, config: PretrainedConfig) -> None:
    """Give `config` to every module of the model that has the model's; other models with the old one keep it."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


class State(NamedTuple):
    """State of a model that a patch changes, to restore it."""

    cls: type[Any]
    config: PretrainedConfig
    slots: list[nn.Module]  # the attention of each layer
    trains: dict[nn.Parameter, bool]  # whether each parameter gets gradients

    @classmethod
    def of(cls, model: Any, kind: type[Any]) -> State:
        """Return the state of `model`, which is or becomes one of `kind`."""
        slots = [getattr(block, kind.slot) for block in model.get_submodule(kind.stack)]
        return cls(type(model), model.config, slots, {p: p.requires_grad for p in model.parameters()})

    def restore(self, model: Any, kind: type[Any]) -> None:
        """Put `model` back into this state."""
        for block, held in zip(model.get_submodule(kind.stack), self.slots, strict=True):
            setattr(block, kind.slot, held)
        for parameter, trains in self.trains.items():
            parameter.requires_grad_(trains)
        reconfigure(model, self.config)
        model.__class__ = self.cls


def check_laws(model: Any) -> None:
    """Raise `Broken` where two layers share a part, or a logit depends on a later token, unless the Config says so."""
    adapters = list(model.adapters().values())
    longest = min(37, model.config.max_position_embeddings)
    tokens = torch.randint(model.config.vocab_size, (2, longest), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(model.device)

    def run(tokens: Tensor, keep: int = 0) -> Tensor:
        return model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits

    with torch.no_grad(), unchanged(model):
        model.eval()
        own = [a for a in adapters if "own layers" not in a.mechanism.config.breaks]
        separate(own, lambda tokens: run(tokens, 1), tokens[:1, :5])
        if not any("causality" in a.mechanism.config.breaks for a in adapters):
            check_causality(run, tokens)


def check_causality(run: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """Raise `Broken` where a whole model breaks the law `causality`: tokens B L, `run` gives logits B L V."""
    logits = run(tokens)
    tolerance = torch.finfo(logits.dtype).eps ** 0.5 * scale(logits)
    for later in (1, tokens.shape[1] // 2, tokens.shape[1] - 1):
        changed = tokens.clone()
        changed[:, later:] = tokens[:, later:].flip(0)
        moved = movement(run(changed), logits)[:later]
        if float(moved.max()) > tolerance:
            raise Broken(
                f"output {int(moved.argmax())} {moves_by(moved.max())} when token {later} and those after it change"
            )
