"""Conversion of a trained model to another attention, with a certificate of what that did to it.

The source's layers are of the dense family: mha, gqa, mqa, sliding. They become what has a file in `targets/`, and what
says `weights_from` in its own module (`own_weights`); the mathematics is in `low_rank`, `pooling` and `rotary`. Layers
of latents (mla, msla) become the same at a lower rank (`latents`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ModelConfig, to_dict
from ..errors import UserError, choose, quoted
from ..model import Decoder, attention_configs, cache_nbytes
from ..ranges import checked
from ..results import Tell
from ..runs.tensors import computing
from ..spec import AttentionConfig
from . import latents, low_rank, targets, windows
from .calibration import Statistics, gather
from .certificate import Certificate, compare_models
from .dense import Dense
from .request import Request
from .width import Budget, Build

__all__ = ["Certificate", "convert"]

Seen = Sequence[Statistics | None]  # of each layer; None: the method reads no text


@torch.no_grad()
@checked
def convert(
    model: Decoder,
    mechanism: str,
    *,
    calibration: Sequence[Tensor] = (),
    held_out: Sequence[Tensor] = (),
    tell: Tell = lambda what, done, of: None,
    **settings: Any,
) -> tuple[Decoder, Certificate]:
    """Return `model` with `mechanism` in every layer, and the certificate of what that did to it.

    The new model is in evaluation mode and has the dtype of `model`, which stays as it is.

    `rank`: a width of the mechanism (kv_rank, n_kv_heads, window), or as a float the share of the source's cache that
    the new one may have; None: the widest, at which least is lost. `per_layer` spreads the same total of ranks over the
    layers by singular-value energy. `method`: one of the target's METHODS; left out, one that uses the calibration text
    where there is some. `options`: further fields of the mechanism's Config. `drop_window`: layers that see a window
    may become ones that see all tokens. `seed`: of what has no counterpart in the source (gates, an indexer). These are
    the fields of `Request`.

    `calibration`, `held_out`: batches of token ids (B T). Without held-out text the two models are compared on random
    tokens, and no loss is given. Raises `UserError` for what cannot be converted.
    """
    request = Request(**settings)
    target, form = _target(model, mechanism)
    method = _method(mechanism, target.METHODS, request.method, bool(calibration))
    source = computing(copy.deepcopy(model).cpu().eval())
    layers = [form.of(block.attention) for block in source.blocks()]
    build = _builder(model.config, mechanism)
    fields = _widths(target, layers, request, build, model.config)
    if not request.drop_window:
        windows.check_windows(layers, [build(own) for own in fields], model.config.context, mechanism)

    seen: Seen = gather(source, calibration, tell) if target.METHODS[method] else [None] * len(layers)
    if request.per_layer:
        fields = _spread(target, layers, fields, build, method, seen)
    made = []
    for i, config in enumerate(attention_configs(_shape(model.config, mechanism, fields))):
        tell(f"making {mechanism}", i, len(layers))
        made.append(target.weights(layers[i], config, method, seen[i]))
        _refuse_overwritten(request.options or {}, made[i][0])
    fields = [{**own, **further} for own, (further, _) in zip(fields, made, strict=True)]
    new = _assemble(source, mechanism, fields, [tensors for _, tensors in made], request.seed)
    if hasattr(target, "finish"):
        target.finish(new, source, calibration, tell)
    measured = _measured(source.double(), new, held_out, request.seed, tell)
    certificate = Certificate(
        source="+".join(dict.fromkeys(model.config.mechanisms)),
        target=mechanism,
        method=method,
        rank=request.rank,
        per_layer=request.per_layer,
        context=model.config.context,
        calibration_tokens=sum(batch.numel() for batch in calibration),
        held_out=bool(held_out),
        options=to_dict(new.config)["options"],
        **_cache_bytes(model, new),
        **measured,
    )
    return new.to(model.embed.weight), certificate


def _target(model: Decoder, mechanism: str) -> tuple[Any, Any]:
    """Return the target, and the class of the values that it makes weights from. `UserError` for an unknown name."""
    target = targets.module(mechanism)
    layers = [block.attention for block in model.blocks()]
    smaller = latents.shrinks(layers, set(model.config.layers), mechanism)
    return (latents.Smaller, latents.Latent) if smaller else (target, Dense)


def _cache_bytes(model: Decoder, new: Decoder) -> dict[str, Any]:
    """Return the bytes of both caches at the model's context, in the dtype of its weights."""
    width = model.embed.weight.element_size()
    return {
        "cache_bytes_before": cache_nbytes(model.config, width),
        "cache_bytes_after": cache_nbytes(new.config, width),
    }


def _cache_floats(config: ModelConfig) -> list[int]:
    """Return the size in floats of each layer's cache at full context."""
    return [each.cache_spec.floats(config.context) for each in attention_configs(config)]


def _widths(
    target: Any, layers: Sequence[Dense], request: Request, build: Build, config: ModelConfig
) -> list[dict[str, Any]]:
    """Return the fields of the mechanism's Config that shape each layer, the user's options among them."""
    given = dict(request.options or {})
    fields = []
    for layer, floats in zip(layers, _cache_floats(config), strict=True):
        budget = Budget(request.rank, given, build, config.context, floats)
        own = target.widths(layer, budget)
        _refuse_overwritten(given, own)
        fields.append({**given, **own})
    return fields


def _refuse_overwritten(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `UserError` where an option is given that the conversion itself sets, to another value."""
    for name, value in given.items():
        made = own.get(name, value)
        if made != value and list(made if isinstance(made, list | tuple) else [made]) != value:
            raise UserError(
                f"the option {name} is {quoted(value)}, and this conversion makes it {quoted(made)}: leave it out"
            )


def _method(mechanism: str, methods: Mapping[str, bool], given: str | None, text: bool) -> str:
    """Return the method to use; `text`: whether there is calibration text."""
    if given is None:
        return next((name for name, reads in methods.items() if reads == text), next(iter(methods)))
    if methods[choose(f"method of a conversion to {mechanism}", given, methods)] and not text:
        raise UserError(f"method {given!r} weighs errors by what calibration text shows: give some")
    return given


def _builder(config: ModelConfig, mechanism: str) -> Build:
    """Return the function from fields of the mechanism to its Config in the first layer of the model."""

    def build(fields: Mapping[str, Any]) -> AttentionConfig:
        return attention_configs(replace(config, n_layers=1, mechanisms=(mechanism,), options={mechanism: fields}))[0]

    return build


def _spread(
    target: Any,
    layers: Sequence[Dense],
    fields: Sequence[dict[str, Any]],
    build: Build,
    method: str,
    seen: Seen,
) -> list[dict[str, Any]]:
    """Return the fields of each layer with the same total of ranks, spread by singular-value energy."""
    if not hasattr(target, "energies"):
        raise UserError("only a conversion to a mechanism with a latent can spread its ranks over the layers")
    energies = [target.energies(d, build(own), method, s) for d, own, s in zip(layers, fields, seen, strict=True)]
    name = build(fields[0]).cache_width or ""
    ranks = low_rank.share(energies, sum(own[name] for own in fields))
    return [{**own, name: rank} for own, rank in zip(fields, ranks, strict=True)]


def _shape(config: ModelConfig, mechanism: str, fields: Sequence[dict[str, Any]]) -> ModelConfig:
    """Return the config of the new model, whose layers have these fields."""
    common = {name: value for name, value in fields[0].items() if all(own.get(name) == value for own in fields)}
    options = {mechanism: common}
    for i, own in enumerate(fields):
        if special := {name: value for name, value in own.items() if name not in common}:
            options[f"{mechanism}@{i}"] = special
    return replace(config, mechanisms=(mechanism,), options=options)


def _assemble(
    source: Decoder, mechanism: str, fields: Sequence[dict[str, Any]], tensors: Sequence[dict[str, Tensor]], seed: int
) -> Decoder:
    """Return the new decoder in float64: these tensors in its attention layers, the source's everywhere else."""
    config = _shape(source.config, mechanism, fields)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        new = Decoder(config).double().eval()
    shared = {name: value for name, value in source.state_dict().items() if ".attention." not in name}
    new.load_state_dict(shared, strict=False)
    for block, found in zip(new.blocks(), tensors, strict=True):
        _fill(block.attention, found)
    return new


def _fill(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the parameters of `layer`. Raises `UserError` where a shape differs."""
    state = layer.state_dict()
    for name, value in tensors.items():
        if name not in state and name.endswith(".bias") and not value.any():
            continue
        if name not in state:
            raise UserError(f"the conversion makes {name}, and the layer has no such tensor: it has {', '.join(state)}")
        if state[name].shape != value.shape:
            raise UserError(
                f"with these options {name} has the shape {tuple(state[name].shape)}, and the conversion makes "
                f"{tuple(value.shape)}: leave out the options that change it"
            )
        state[name].copy_(value)


def _measured(source: Decoder, new: Decoder, held_out: Sequence[Tensor], seed: int, tell: Tell) -> dict[str, Any]:
    """Return the measured fields of the certificate, without losses where there is no held-out text."""
    if held_out:
        return compare_models(source, new, held_out, tell)
    measured = compare_models(source, new, [_random_tokens(source.config, seed)], tell)
    return measured | {"loss_before": None, "loss_after": None}


def _random_tokens(config: ModelConfig, seed: int) -> Tensor:
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, min(config.context, 128)), generator=numbers)
