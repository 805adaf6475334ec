"""Another attention in a model of transformers, in place: weights that mean the same carry over, the rest of the model
may be frozen, and two laws are put to the result."""

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
from ..errors import UserError, choose
from ..laws.interface import separate
from ..laws.subject import Broken, movement, moves_by, scale, seeded, unchanged
from ..pretrained.rope_config import rotary
from ..spec import UNSCALED, AttentionConfig
from .hosts import MODELS, TRAIN, Adapter, Patch, freeze, install

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # the published patch for GPT-2 under the name "MSLA": in place of c_attn, before c_proj, which stays and is frozen
    "published-msla": {
        "mechanism": "latent_lookup",
        "options": {"n_latents": 256, "top_k": 16},
        "keep_output": True,
        "train": "attention",
    }
}


class Counts(NamedTuple):
    """Parameters, each counted once."""

    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,}/{self.total:,} ({100 * self.trainable / self.total:.2f} %)"


def patch(
    model: Any,
    mechanism: str,
    *,
    layers: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    keep_output: bool = False,
    train: str = "all",
    seed: int = 0,
) -> Counts:
    """Replace the attention of a transformers model (GPT-2, Llama, Mistral, Qwen2, Qwen3), in place; prints and returns
    how many parameters train, of how many.

    layers: which, from 0; None: all. options: fields of the mechanism's Config; sizes, rotary base and biases are the
    model's. keep_output: the model's own output projection follows the mechanism's. train: "all", "attention" (the
    mechanisms put in) or "new" (of those, what did not carry over). seed: of the new weights. On the meta device it
    only counts. Raises `UserError` for what does not fit together, and `laws.Broken` where the patched model breaks a
    law that its mechanism promises; the model is then as it was.
    """
    choose("train", train, TRAIN)
    cls = kind_of(model)
    before = State.of(model, cls)
    at = chosen(before.slots, layers)
    parts = cls.read(before.slots[at[0]])
    config = attention.config(mechanism, **{**fields(mechanism, model.config, parts), **(options or {})})
    config.check_context(model.config.max_position_embeddings)
    with torch.device("meta"):
        kept = carried(parts, attention.module(mechanism).Attention(config), keep_output)
    entry = Patch(
        mechanism=mechanism, layers=at, config=dataclasses.asdict(config), keep_output=keep_output, carried=tuple(kept)
    )
    try:
        adopt(model, cls, entry, train, seed)
        if model.device.type != "meta":
            obeys(model)
    except BaseException:
        before.restore(model, cls)
        raise
    counts = count(model)
    print(counts)
    return counts


def count(model: nn.Module) -> Counts:
    parameters = list(model.parameters())
    return Counts(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def kind_of(model: Any) -> type[Any]:
    """The class that `model` becomes, or is."""
    for cls in MODELS:
        if type(model) in (cls, cls.__bases__[-1]) and not model.config.to_dict().get("add_cross_attention"):
            return cls
    allowed = ", ".join(cls.__bases__[-1].__name__ for cls in MODELS)
    raise UserError(f"{type(model).__name__} cannot be patched: give one of {allowed}, without cross-attention")


def chosen(slots: Sequence[nn.Module], layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to patch, in order; a `UserError` for those that are not there or hold a mechanism already."""
    at = tuple(range(len(slots))) if layers is None else tuple(sorted(set(layers)))
    if not at or at[0] < 0 or at[-1] >= len(slots):
        raise UserError(f"layers {list(layers or ())} were given: give some of 0 to {len(slots) - 1}")
    for i in at:
        if isinstance(held := slots[i], Adapter):
            raise UserError(f"layer {i} holds {held.patch.mechanism} already: load the original model, or leave it out")
    return at


def fields(mechanism: str, config: PretrainedConfig, parts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the model says about its attention, as far as the mechanism's Config has a field for it."""
    held = config.to_dict()
    theta, scaling = rotary(held) if "rope_parameters" in held else (None, UNSCALED)
    said = {
        "d_model": config.hidden_size,
        "n_heads": config.num_attention_heads,
        "head_dim": len(parts["q.weight"]) // config.num_attention_heads,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "bias": "q.bias" in parts,
        "o_bias": "o.bias" in parts,
        "qk_norm": held["rms_norm_eps"] if "q_norm.weight" in parts else 0.0,
        "dropout": held.get("attention_dropout", held.get("attn_pdrop")),
        **({"window": held["sliding_window"]} if held.get("sliding_window") else {}),
    }
    known = attention.module(mechanism).Config.__dataclass_fields__
    return {name: value for name, value in said.items() if name in known}


def carried(parts: Mapping[str, Tensor], module: nn.Module, keep_output: bool) -> dict[str, Tensor]:
    """The parameters of a mechanism that mean what some of the model's do: name -> value.

    One rule for all: a parameter named after q, k, v and o, such as qkv.weight, is these below one another, where the
    mechanism's Config says that they mean what they do in multi-head attention. A bias that the model lacks is 0.
    """
    config: AttentionConfig = module.config  # type: ignore[assignment]
    means = set(config.carries) - ({"o"} if keep_output else set())
    found = {}
    for name, parameter in module.named_parameters():
        letters, _, kind = name.rpartition(".")
        value = None
        if letters.endswith("_norm") and means >= {"q", "k"}:  # of heads
            value = parts.get(name)
        elif letters and set(letters) <= means:
            heads = len(parameter) // config.head_dim - config.n_heads * ("q" in letters)
            heads //= max(len(set(letters) & {"k", "v"}), 1)
            blank = {letter: parts[f"{letter}.weight"].new_zeros(len(parts[f"{letter}.weight"])) for letter in letters}
            pieces = {letter: parts.get(f"{letter}.{kind}", blank[letter]) for letter in letters}
            value = torch.cat([regrouped(t, heads, config.head_dim) if l in "kv" else t for l, t in pieces.items()])
        if value is not None and value.shape == parameter.shape:
            found[name] = value
    return found


def regrouped(rows: Tensor, heads: int, head_dim: int) -> Tensor:
    """Heads of keys or values (K H ...), repeated or averaged in groups (Ainslie et al. 2023) until there are `heads`;
    left alone where neither can be."""
    own = rows.unflatten(0, (-1, head_dim))
    if heads % len(own) == 0:
        own = own.repeat_interleave(heads // len(own), 0)
    elif len(own) % heads == 0:
        own = own.unflatten(0, (heads, -1)).mean(1)
    return own.flatten(0, 1)


def adopt(model: Any, cls: type[Any], entry: Patch, train: str, seed: int) -> None:
    """Make `model` one of `cls`, with the patch in it."""
    config = copy.deepcopy(model.config)
    config.__class__ = cls.config_class
    config.attnlab, config.attnlab_train = [*config.attnlab, to_dict(entry)], train
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
    freeze(model)


def reconfigure(model: Any, config: PretrainedConfig) -> None:
    """Give every part that has the model's config this one; other models made from the old one keep it."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


class State(NamedTuple):
    """What a patch changes about a model, to put it back."""

    cls: type[Any]
    config: PretrainedConfig
    slots: list[nn.Module]  # the attention of each layer
    trains: dict[nn.Parameter, bool]

    @classmethod
    def of(cls, model: Any, kind: type[Any]) -> State:
        slots = [getattr(block, kind.slot) for block in model.get_submodule(kind.stack)]
        return cls(type(model), model.config, slots, {p: p.requires_grad for p in model.parameters()})

    def restore(self, model: Any, kind: type[Any]) -> None:
        for block, held in zip(model.get_submodule(kind.stack), self.slots, strict=True):
            setattr(block, kind.slot, held)
        for parameter, trains in self.trains.items():
            parameter.requires_grad_(trains)
        reconfigure(model, self.config)
        model.__class__ = self.cls


def obeys(model: Any) -> None:
    """Raise `Broken` unless each layer is its own and no logit depends on a later token, as the mechanisms promise."""
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
            causal(run, tokens)


def causal(run: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    """The law `causality` for a whole model: tokens B L, `run` gives logits B L V."""
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
