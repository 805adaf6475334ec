"""A trained model with another attention in it, and a certificate of what that did to it.

The source's layers are of the dense family: mha, gqa, mqa, sliding. `targets/` has a file per mechanism that they can
become; the mathematics is in `linear`, `pooling` and `rotary`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig, to_dict
from ..errors import UserError, choose
from ..model import Decoder, attention_configs
from ..results import Tell
from ..spec import AttentionConfig
from . import low_rank, targets
from .calibration import Statistics, gather
from .certificate import Certificate, compare
from .dense import Dense
from .width import Wish

__all__ = ["Certificate", "convert"]


@torch.no_grad()
def convert(
    model: Decoder,
    mechanism: str,
    *,
    rank: int | float | None = None,
    method: str | None = None,
    per_layer: bool = False,
    calibration: Sequence[Tensor] = (),
    held_out: Sequence[Tensor] = (),
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    tell: Tell = lambda what, done, of: None,
) -> tuple[Decoder, Certificate]:
    """`model` with `mechanism` in every layer, in evaluation mode and its own dtype; `model` itself stays as it is.

    `rank`: a width of the mechanism (kv_rank, n_kv_heads, window), or as a float the share of the source's cache that
    the new one may have; None: the widest, at which least is lost. `per_layer` spreads the same total of ranks over the
    layers by singular-value energy. `method`: one of the target's METHODS; left out, one that uses the calibration text
    where there is some. `calibration`, `held_out`: batches of token ids (B T); without held-out text the two models are
    compared on random tokens, and no loss is given. `options`: further fields of the mechanism's Config. What has no
    counterpart in the source (gates, an indexer) depends on `seed`. Raises `UserError` for what cannot be converted.
    """
    target = targets.module(mechanism)
    method = _method(mechanism, target.METHODS, method, bool(calibration))
    source = copy.deepcopy(model).cpu().eval()
    layers = [Dense.of(block.attention) for block in source.blocks()]
    build = _builder(model.config, mechanism)
    specs = [config.cache_spec.floats(model.config.context) for config in attention_configs(model.config)]
    given = dict(options or {})
    wishes = [Wish(rank, given, build, model.config.context, floats) for floats in specs]
    fields = [{**given, **target.widths(layer, wish)} for layer, wish in zip(layers, wishes, strict=True)]

    seen: Sequence[Statistics | None] = [None] * len(layers)
    if target.METHODS[method]:
        seen = gather(source, calibration, tell)
    if per_layer:
        fields = _spread(target, layers, fields, build, method, seen)
    made = []
    for i, (layer, own) in enumerate(zip(layers, fields, strict=True)):
        tell(f"making {mechanism}", i, len(layers))
        made.append(target.weights(layer, build(own), method, seen[i]))
    fields = [{**own, **further} for own, (further, _) in zip(fields, made, strict=True)]
    new = _assemble(source, mechanism, fields, [tensors for _, tensors in made], seed)
    if hasattr(target, "finish"):
        target.finish(new, source, calibration, tell)

    context = model.config.context
    text = held_out or [_random_tokens(model.config, seed)]
    measured = compare(source.double(), new, text, tell)
    if not held_out:
        measured |= {"loss_before": None, "loss_after": None}
    width = model.embed.weight.element_size()
    certificate = Certificate(
        source="+".join(dict.fromkeys(model.config.mechanisms)),
        target=mechanism,
        method=method,
        rank=rank,
        per_layer=per_layer,
        cache_bytes_before=width * sum(specs),
        cache_bytes_after=width * sum(each.cache_spec.floats(context) for each in attention_configs(new.config)),
        context=context,
        calibration_tokens=sum(batch.numel() for batch in calibration),
        held_out=bool(held_out),
        options=to_dict(new.config)["options"],
        **measured,
    )
    return new.to(model.embed.weight), certificate


def _method(mechanism: str, methods: Mapping[str, bool], given: str | None, text: bool) -> str:
    if given is None:
        return next((name for name, reads in methods.items() if reads == text), next(iter(methods)))
    if methods[choose(f"method of a conversion to {mechanism}", given, methods)] and not text:
        raise UserError(f"method {given!r} weighs errors by what calibration text shows: give some")
    return given


def _builder(config: ModelConfig, mechanism: str) -> Callable[[Mapping[str, Any]], AttentionConfig]:
    """Fields of the mechanism -> its Config in this model."""

    def build(fields: Mapping[str, Any]) -> AttentionConfig:
        return attention_configs(replace(config, n_layers=1, mechanisms=(mechanism,), options={mechanism: fields}))[0]

    return build


def _spread(
    target: ModuleType,
    layers: Sequence[Dense],
    fields: Sequence[dict[str, Any]],
    build: Callable[[Mapping[str, Any]], AttentionConfig],
    method: str,
    seen: Sequence[Statistics | None],
) -> list[dict[str, Any]]:
    """The same total of ranks, where it does most good."""
    if not hasattr(target, "energies"):
        raise UserError("only a conversion to a mechanism with a latent can spread its ranks over the layers")
    energies = [target.energies(d, build(own), method, s) for d, own, s in zip(layers, fields, seen, strict=True)]
    name = build(fields[0]).cache_width or ""
    ranks = low_rank.share(energies, sum(own[name] for own in fields))
    return [{**own, name: rank} for own, rank in zip(fields, ranks, strict=True)]


def _assemble(
    source: Decoder, mechanism: str, fields: Sequence[dict[str, Any]], tensors: Sequence[dict[str, Tensor]], seed: int
) -> Decoder:
    """The new decoder in float64: these tensors in its attention layers, the source's everywhere else."""
    common = {name: value for name, value in fields[0].items() if all(own.get(name) == value for own in fields)}
    options = {mechanism: common}
    for i, own in enumerate(fields):
        if special := {name: value for name, value in own.items() if name not in common}:
            options[f"{mechanism}@{i}"] = special
    config = replace(source.config, mechanisms=(mechanism,), options=options)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        new = Decoder(config).double().eval()
    shared = {name: value for name, value in source.state_dict().items() if ".attention." not in name}
    new.load_state_dict(shared, strict=False)
    for block, found in zip(new.blocks(), tensors, strict=True):
        _fill(block.attention, found)
    return new


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = layer.state_dict()
    for name, value in tensors.items():
        if name not in state:
            assert name.endswith(".bias") and not value.any(), f"there is no place for {name}"
        elif state[name].shape != value.shape:
            raise UserError(
                f"with these options {name} has the shape {tuple(state[name].shape)}, and the conversion makes "
                f"{tuple(value.shape)}: leave out the options that change it"
            )
        else:
            state[name].copy_(value)


def _random_tokens(config: ModelConfig, seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, min(config.context, 128)), generator=numbers)
