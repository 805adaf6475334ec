"""The configuration of a run, as a value: model, data, training, seed. Frozen dataclasses that are JSON and back."""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

from .errors import UserError, choose, quoted
from .ranges import (
    Count,
    Fraction,
    Layers,
    NotNegative,
    Part,
    Positive,
    Probability,
    Range,
    Seed,
    Share,
    Size,
    Word,
    check_fields,
    checked,
)
from .spec import UNSCALED, RopeScaling

T = TypeVar("T")
QUOTES = "'\""
MOST_SEQUENCES = 1_000_000  # of one step


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The options of DeepSeek's experts beyond plain ones (arXiv 2401.06066, 2405.04434, 2412.19437)."""

    kind: Literal["gelu", "swiglu"] = "gelu"
    width: Count | None = None  # of one expert; None: ff_dim
    shared: Size = 0  # experts that every token passes, as one that is so many times as wide
    dense_layers: Size = 0  # the first layers have one feed-forward of ff_dim in their place
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True  # the weights of a token's experts sum to `scale`; else they are the scores times it
    scale: Annotated[float, Range()] = 1.0
    groups: Count = 1  # a token's experts come from the best `groups_kept` of so many equal groups
    groups_kept: Count = 1
    group_best: Count = 1  # a group is as good as the sum of its so many best scores

    def __post_init__(self) -> None:
        check_fields(self, "model.experts.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder. GPT-2 and Llama are values of this, not classes."""

    vocab_size: Count = 65
    context: Count = 256  # longest training sequence; a hard limit for learned positions only
    n_layers: Layers = 4
    d_model: Count = 128
    n_heads: Count = 4
    head_dim: Count | None = None  # None: d_model / n_heads
    mechanisms: tuple[str, ...] = ("mha",)  # one per layer, repeated: ("sliding", "sliding", "sliding", "mla")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # mechanism -> fields of its Config
    # "mla@3": fields of layer 3 (from 0) alone, on top of those of "mla"
    positions: Literal["learned", "rope"] = "rope"
    rope_theta: Positive = 10_000.0
    rope_scaling: RopeScaling = UNSCALED
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: NotNegative | None = None  # None: 1e-5 of a LayerNorm, 1e-6 of an RMSNorm
    ff: Literal["gelu", "gelu_tanh", "relu2", "swiglu", "moe"] = "gelu"
    ff_dim: Count | None = None  # None: 4 d_model; swiglu: 8/3 d_model up to a multiple of 8
    n_experts: Count = 8
    experts_per_token: Count = 2
    experts: ExpertsConfig = ExpertsConfig()
    balance: Literal["loss", "bias"] = "loss"  # how the experts' load is evened out
    bias: bool = False
    tied: bool = True  # the output head is the token embedding
    dropout: Probability = 0.0
    impl: Word = "sdpa"

    def __post_init__(self) -> None:
        check_fields(self, "model.")
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
        self._check_options()

    def _check_options(self) -> None:
        """Raise `UserError` where options do not say whose they are, or are of no layer."""
        for name, given in self.options.items():
            if not isinstance(given, Mapping):
                raise UserError(
                    f'model.options gives {name} {quoted(given)}: give it fields of its Config: {{"bias": true}}'
                )
            if name not in self.mechanisms and name not in self._numbered(name):
                raise UserError(f"model.options names {quoted(name).strip(QUOTES)}, which no layer uses; remove it")

    def _numbered(self, name: str) -> tuple[str, ...]:
        """Return "mla@3" where that is `name` and layer 3, from 0, is an mla; else nothing."""
        mechanism, _, number = name.partition("@")
        at = int(number) if number.isascii() and number.isdigit() and len(number) < 10 else self.n_layers
        fits = at < self.n_layers and self.mechanisms[at % len(self.mechanisms)] == mechanism
        return (f"{mechanism}@{at}",) if fits else ()

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
    source: Word = "shakespeare"  # text:PATH jsonl:PATH#FIELD parquet:PATH#FIELD prepared:DIR task:NAME 0.7*A+0.3*B
    tokenizer: Word = "auto"  # of a text: char, byte, gpt2 or a path; auto: char, or what a folder was prepared with
    pack: Literal["stream", "documents"] = "stream"  # documents: whole ones, and attention stays inside each
    val_fraction: Fraction = 0.1  # the last part of a text, never trained on

    def __post_init__(self) -> None:
        check_fields(self, "data.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: Count = 2000
    batch_size: Count = 12  # sequences per step and accumulation part
    accumulate: Count = 1
    context: Count | None = None  # tokens of a sequence, at most the model's context; None: as many
    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-3
    min_lr: NotNegative = 1e-4
    warmup: Size = 100  # steps
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    decay: Part = 0.2  # wsd: the share of steps, at the end, in which the rate falls
    betas: tuple[Probability, Probability] = (0.9, 0.99)
    weight_decay: NotNegative = 0.1
    clip: NotNegative = 1.0  # gradient norm; 0: none
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: bool = False
    deterministic: bool = False  # only kernels that give the same bits every time, on a GPU too; an error where none is
    guard: Literal["stop", "skip", "rewind"] = (
        "stop"  # what a loss or gradient that is not finite, or a spike, leads to
    )
    spike: NotNegative = 0.0  # nats above the median of the last 50 losses that make a spike; 0: none does
    train: Literal["all", "attention", "new"] = "all"  # which parameters; new: those that multi-head attention lacks
    distill: Share = 0.0  # the teacher's share of the objective, from 0 to 1
    eval_every: Count = 250
    eval_batches: Count = 20
    save_every: Count = 250
    keep: Size = 2  # the newest checkpoints that stay; 0: all
    log_every: Count = 10
    device: Word = "auto"

    def __post_init__(self) -> None:
        check_fields(self, "train.")
        if self.batch_size * self.accumulate > MOST_SEQUENCES:
            raise UserError(
                f"train.batch_size {self.batch_size} times train.accumulate {self.accumulate} is more than "
                f"{MOST_SEQUENCES:,} sequences a step: make one of them smaller"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str = "run"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: Seed = 0
    init: str = ""  # the trained model whose weights it starts with: a folder or a hub name; none: random ones
    teacher: str = ""  # the trained model whose predictions it learns from, where train.distill is above 0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.length > self.model.context:
            raise UserError(
                f"train.context is {self.length} and model.context {self.model.context}: give at most that, or leave "
                "train.context out"
            )
        if bool(self.teacher) != bool(self.train.distill):
            raise UserError(
                f"the teacher is {self.teacher!r} and train.distill {self.train.distill}: give both, or neither"
            )

    @property
    def mechanism(self) -> str:
        """Return the label: "mla", or "sliding+mla" for a hybrid."""
        return "+".join(dict.fromkeys(self.model.mechanisms))

    @property
    def length(self) -> int:
        """Return the tokens of a sequence in training."""
        return self.model.context if self.train.context is None else self.train.context

    @property
    def key(self) -> str:
        """Return twelve hexadecimal digits that change with every field but the name."""
        data = to_dict(self)
        del data["name"]
        if self.train.context is None:  # a field that earlier versions lack
            del data["train"]["context"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The way a run is executed. Its results do not depend on it, beyond rounding: a run may continue under another."""

    strategy: str = "auto"  # single, ddp, fsdp, deepspeed[:FILE.json]; auto: ddp where several processes were started
    recompute: bool = False  # keep only the inputs of layers, and compute the rest again: less memory, more work
    track: tuple[str, ...] = ()  # tensorboard, wandb, trackio
    peak: Positive | None = None  # FLOPs per second of one device, of which use is a share; None: known or measured

    def __post_init__(self) -> None:
        check_fields(self)


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as plain JSON values: tuples become lists."""
    if not is_dataclass(config) or isinstance(config, type):
        raise UserError(f"config is {quoted(config)}: give a dataclass, such as a RunConfig")
    return json.loads(json.dumps(asdict(config)))


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Return the `cls` of which `to_dict` made `data`. `UserError` for an unknown field names the nearest known one.

    `where` is the place of `data` in the whole, with a dot at its end, for that sentence.
    """
    if not isinstance(data, Mapping):
        raise UserError(
            f"{where.removesuffix('.') or cls.__name__} is {quoted(data)}: it must be an object with fields"
        )
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


@checked
def differing(held: RunConfig, given: RunConfig) -> str:
    """Return the fields in which two configs differ, as the user would name them."""
    pairs = zip(_named_fields(to_dict(held)), _named_fields(to_dict(given)), strict=False)
    found = [f"{name} {old!r} there, {new!r} given" for (name, old), (_, new) in pairs if old != new and name != "name"]
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")


def _named_fields(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and name != "options":
            yield from _named_fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
