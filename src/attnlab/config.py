"""The configuration of a run, as a value: model, data, training, seed. Frozen dataclasses that are JSON and back."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar

from .errors import UserError, choose
from .spec import UNSCALED, RopeScaling

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The options of DeepSeek's experts beyond plain ones (arXiv 2401.06066, 2405.04434, 2412.19437)."""

    kind: Literal["gelu", "swiglu"] = "gelu"
    width: int | None = None  # of one expert; None: ff_dim
    shared: int = 0  # experts that every token passes, as one that is so many times as wide
    dense_layers: int = 0  # the first layers have one feed-forward of ff_dim in their place
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # the weights of a token's experts sum to `scale`; else they are the scores times it
    scale: float = 1.0
    groups: int = 1  # a token's experts come from the best `groups_kept` of so many equal groups
    groups_kept: int = 1
    group_best: int = 1  # a group is as good as the sum of its so many best scores

    def __post_init__(self) -> None:
        choose("model.experts.kind", self.kind, ("gelu", "swiglu"))
        choose("model.experts.score", self.score, ("softmax", "sigmoid"))
        if min(self.shared, self.dense_layers) < 0 or (self.width is not None and self.width < 1):
            raise UserError(
                f"model.experts has width {self.width}, shared {self.shared} and dense_layers {self.dense_layers}: "
                "give a width of at least 1, and 0 or more of the others"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. GPT-2 and Llama are values of this, not classes."""

    vocab_size: int = 65
    context: int = 256  # longest training sequence; a hard limit for learned positions only
    n_layers: int = 4
    d_model: int = 128
    n_heads: int = 4
    head_dim: int | None = None  # None: d_model / n_heads
    mechanisms: tuple[str, ...] = ("mha",)  # one per layer, repeated: ("sliding", "sliding", "sliding", "mla")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # mechanism -> fields of its Config
    # "mla@3": fields of layer 3 (from 0) alone, on top of those of "mla"
    positions: Literal["learned", "rope"] = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling = UNSCALED
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float | None = None  # None: 1e-5 of a LayerNorm, 1e-6 of an RMSNorm
    ff: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "moe"] = "gelu"
    ff_dim: int | None = None  # None: 4 d_model; swiglu: 8/3 d_model up to a multiple of 8
    n_experts: int = 8
    experts_per_token: int = 2
    experts: ExpertsConfig = ExpertsConfig()
    balance: Literal["loss", "bias"] = "loss"  # how the experts' load is evened out
    bias: bool = False
    tied: bool = True  # the output head is the token embedding
    dropout: float = 0.0
    impl: str = "sdpa"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "n_layers", "d_model", "n_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        cls: Any = type(self)
        for name in ("positions", "norm", "ff", "balance"):
            choose(f"model.{name}", getattr(self, name), _allowed(cls, name))
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(
                f"model.d_model {self.d_model} does not divide into model.n_heads {self.n_heads}: "
                "change one of them, or give model.head_dim"
            )
        if not self.mechanisms:
            raise UserError("model.mechanisms is empty: name at least one; 'attnlab list' shows them")
        if self.ff == "moe" and not 1 <= self.experts_per_token <= self.n_experts:
            raise UserError(
                f"model.experts_per_token is {self.experts_per_token}: it must be from 1 to n_experts, {self.n_experts}"
            )
        if self.ff == "moe" and not self._grouped:
            raise UserError(
                f"model.experts has {self.experts.groups_kept} of {self.experts.groups} groups of {self.n_experts} "
                f"experts, {self.experts.group_best} of them counted: groups must be equal, and leave enough to choose"
            )
        layers = {f"{name}@{i}" for i, name in enumerate(self.layers)}
        if unused := set(self.options) - set(self.mechanisms) - layers:
            raise UserError(f"model.options names {', '.join(sorted(unused))}, which no layer uses; remove it")

    @property
    def layers(self) -> list[str]:
        """Return the mechanism of each layer."""
        return [self.mechanisms[i % len(self.mechanisms)] for i in range(self.n_layers)]

    @property
    def _grouped(self) -> bool:
        """Whether the groups of experts are equal, and those kept hold enough experts for a token."""
        e = self.experts
        size = self.n_experts // max(e.groups, 1)  # experts in a group
        equal = e.groups >= 1 and size * e.groups == self.n_experts and 1 <= e.group_best <= size
        return equal and 1 <= e.groups_kept <= e.groups and self.experts_per_token <= e.groups_kept * size

    @property
    def resolved_norm_eps(self) -> float:
        """Return the epsilon of the norms."""
        return {"layer": 1e-5, "rms": 1e-6}[self.norm] if self.norm_eps is None else self.norm_eps

    @property
    def ff_kind(self) -> str:
        """Return the activation of one expert, or of the feed-forward where there are no experts."""
        return self.experts.kind if self.ff == "moe" else self.ff

    @property
    def resolved_ff_dim(self) -> int:
        """Return the hidden size of a feed-forward that has no experts."""
        if self.ff_dim is not None:
            return self.ff_dim
        if self.ff_kind == "swiglu":
            return -(-8 * self.d_model // 24) * 8  # 8/3 d_model, up to a multiple of 8
        return 4 * self.d_model

    def has_experts(self, layer: int) -> bool:
        """Return whether layer number `layer`, from 0, has experts."""
        return self.ff == "moe" and layer >= self.experts.dense_layers

    @property
    def resolved_expert_dim(self) -> int:
        """Return the hidden size of one expert."""
        return self.resolved_ff_dim if self.experts.width is None else self.experts.width


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    source: str = "shakespeare"  # or text:PATH, prepared:DIR, a mixture 0.7*prepared:A+0.3*prepared:B, task:NAME
    tokenizer: str = "auto"  # of a text: char, byte, gpt2 or a path; auto: char, or what a folder was prepared with
    pack: Literal["stream", "documents"] = "stream"  # documents: whole ones, and attention stays inside each
    val_fraction: float = 0.1  # the last part of a text, never trained on

    def __post_init__(self) -> None:
        choose("data.pack", self.pack, ("stream", "documents"))
        if not 0 < self.val_fraction < 1:
            raise UserError(f"data.val_fraction is {self.val_fraction}: it must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int = 2000
    batch_size: int = 12  # sequences per step and accumulation part
    accumulate: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 100  # steps
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay: float = 0.2  # wsd: the share of steps, at the end, in which the rate falls
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1
    clip: float = 1.0  # gradient norm; 0: none
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    deterministic: bool = False  # only kernels that give the same bits every time, on a GPU too; an error where none is
    guard: Literal["stop", "skip", "rewind"] = (
        "stop"  # what a loss or gradient that is not finite, or a spike, leads to
    )
    spike: float = 0.0  # nats above the median of the last 50 losses that make a spike; 0: none does
    train: Literal["all", "attention", "new"] = "all"  # which parameters; new: those that multi-head attention lacks
    distill: float = 0.0  # the teacher's share of the objective, from 0 to 1
    eval_every: int = 250
    eval_batches: int = 20
    save_every: int = 250
    keep: int = 2  # the newest checkpoints that stay; 0: all
    log_every: int = 10
    device: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "eval_batches", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}: it must be at least 1")
        if self.keep < 0:
            raise UserError(f"train.keep is {self.keep}: give how many checkpoints stay, or 0 to keep all")
        if self.lr <= 0:
            raise UserError(f"train.lr is {self.lr}: it must be above 0")
        if not 0 < self.decay <= 1:
            raise UserError(f"train.decay is {self.decay}: it is a share of the steps, above 0 and at most 1")
        if not 0 <= self.distill <= 1:
            raise UserError(f"train.distill is {self.distill}: it is a share of the objective, from 0 to 1")
        if self.spike < 0:
            raise UserError(f"train.spike is {self.spike}: give nats above the usual loss, or 0 for none")
        cls: Any = type(self)
        for name in ("optimizer", "schedule", "precision", "guard", "train"):
            choose(f"train.{name}", getattr(self, name), _allowed(cls, name))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    init: str = ""  # the trained model whose weights it starts with: a folder or a hub name; none: random ones
    teacher: str = ""  # the trained model whose predictions it learns from, where train.distill is above 0

    def __post_init__(self) -> None:
        if bool(self.teacher) != bool(self.train.distill):
            raise UserError(
                f"the teacher is {self.teacher!r} and train.distill {self.train.distill}: give both, or neither"
            )

    @property
    def mechanism(self) -> str:
        """Return the label: "mla", or "sliding+mla" for a hybrid."""
        return "+".join(dict.fromkeys(self.model.mechanisms))

    @property
    def key(self) -> str:
        """Return twelve hexadecimal digits that change with every field but the name."""
        data = to_dict(self)
        del data["name"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The way a run is executed. Its results do not depend on it, beyond rounding: a run may continue under another."""

    strategy: str = "auto"  # single, ddp, fsdp, deepspeed[:FILE.json]; auto: ddp where several processes were started
    recompute: bool = False  # keep only the inputs of layers, and compute the rest again: less memory, more work
    track: tuple[str, ...] = ()  # tensorboard, wandb, trackio
    peak: float | None = None  # FLOPs per second of one device, of which use is a share; None: known or measured


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values: tuples become lists."""
    return json.loads(json.dumps(asdict(config)))


@cache
def _allowed(cls: type, name: str) -> tuple[str, ...]:
    """The values of a `Literal` field; kept, because every command makes every preset."""
    return typing.get_args(typing.get_type_hints(cls)[name])


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Return the `cls` of which `to_dict` made `data`. `UserError` for an unknown field names the nearest known one.

    `where` is the place of `data` in the whole, with a dot at its end, for that sentence.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for name, value in data.items():
        choose(f"field in {where.removesuffix('.') or cls.__name__}", name, sorted(known))
        values[name] = _restore(hints[name], value, f"{where}{name}.")
    return cls(**values)


def _restore(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is types.UnionType:
        hint = next((h for h in typing.get_args(hint) if typing.get_origin(h) is tuple), hint)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value
