"""Every public function, class and method, every argument of it, and values that make no sense for it.

A value that the annotation allows may be taken. Any other one ends in a UserError, TypeError or ValueError of one line
that names the argument. A public function that is not in the table is found by name.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnlab import (
    CAUSAL,
    Cache,
    CacheSpec,
    DataConfig,
    Decoder,
    ModelConfig,
    RunConfig,
    TrainConfig,
    UserError,
    attention,
    cache,
    config,
    contrasts,
    data,
    feed_forward,
    heads,
    laws,
    layers,
    model,
    ops,
    presets,
    pretrained,
    recording,
    recurrence,
    report,
    spec,
    spread,
    stats,
)
from attnlab.audit import audit_target
from attnlab.comparison import engines
from attnlab.comparison.compare import compare
from attnlab.comparison.grid import Comparison, sized
from attnlab.convert import convert
from attnlab.costs import bench, memory, plan
from attnlab.data.bpe import train_bpe
from attnlab.data.prepare import prepare
from attnlab.data.recipe import Recipe
from attnlab.data.tasks import task
from attnlab.documents import PackedRows
from attnlab.evaluation import exam, perplexity
from attnlab.hf.patch import patch
from attnlab.inference import generate, text
from attnlab.measure.gpus import GPUS
from attnlab.ranges import kind_in
from attnlab.runs.folder import RunFolder, load_model
from attnlab.training.schedule import learning_rate
from attnlab.training.train import train

NONSENSE: list[Any] = [
    *(math.nan, -math.inf, -1, 0, 10**30, True, "", "seven", "\ud800", [], ["x"], {"a": 1}, None, object()),
    *(np.float32("nan"), np.zeros(2), torch.tensor(-2), torch.zeros(0), len, Path("no/where/at/all")),
]

TINY = Decoder(ModelConfig(vocab_size=11, context=8, n_layers=1, d_model=8, n_heads=2))
CONFIG = TINY.config
RUN = RunConfig(model=CONFIG, train=TrainConfig(steps=1, batch_size=1, device="cpu"))
NOWHERE = RunConfig(model=CONFIG, data=DataConfig(source="text:no/where"), train=RUN.train)
Q = torch.randn(1, 3, 2, 4)
X = torch.randn(1, 3, 8)
AT = torch.arange(3)[None]
IDS = torch.zeros(1, 3, dtype=torch.int64)
SPEC = CacheSpec({"k": (2, 3)})
WORDS = "one two three four\n" * 8
CORPUS = data.from_text(WORDS * 8)


def caches() -> list[Cache]:
    return TINY.empty_cache(1, 8)


Table = dict[Callable[..., Any], Callable[[], dict[str, Any]]]
CALLS: Table = {
    ops.attend: lambda: {
        "q": Q,
        "k": Q,
        "v": Q,
        "q_pos": AT,
        "k_pos": AT,
        "mask": CAUSAL,
        "scale": 1.0,
        "dropout": 0.0,
        "keep": None,
    },
    ops.attention_weights: lambda: {
        "q": Q,
        "k": Q,
        "q_pos": AT,
        "k_pos": AT,
        "mask": CAUSAL,
        "scale": 1.0,
        "keep": None,
    },
    ops.chunk_sums: lambda: {"x": X, "positions": AT, "chunk": 2, "carried": None},
    ops.ema: lambda: {"x": X, "decay": torch.full((8,), 0.5), "positions": AT, "start": None},
    ops.frequencies: lambda: {
        "pairs": 2,
        "theta": 10000.0,
        "scaling": spec.RopeScaling(),
        "dtype": torch.float64,
        "device": None,
    },
    ops.index_scores: lambda: {"q": Q, "k": torch.randn(1, 5, 4), "weight": torch.randn(1, 3, 2)},
    ops.newest: lambda: {"scores": torch.zeros(1, 3), "count": 2},
    ops.rope: lambda: {"x": Q, "positions": AT, "theta": 10000.0, "places": (), "scaling": spec.RopeScaling()},
    recurrence.recur: lambda: {
        "q": Q,
        "k": Q,
        "v": Q,
        "decay": -torch.rand(1, 3, 2),
        "beta": torch.rand(1, 3, 2),
        "positions": AT,
        "start": None,
        "mode": "chunked",
        "chunk": 2,
    },
    recurrence.short_conv: lambda: {"x": X, "taps": torch.ones(4, 8), "positions": AT, "past": None},
    recurrence.recur_flops: lambda: {
        "tokens": 4,
        "heads": 2,
        "head_dim": 4,
        "v_dim": 4,
        "shared": None,
        "delta": True,
        "by_channel": False,
        "mode": "auto",
        "chunk": 2,
    },
    spec.consecutive: lambda: {"config": attention.config("cla"), "depth": 3},
    ops.slowed: lambda: {"frequency": torch.ones(2), "theta": 10000.0, "scaling": spec.RopeScaling()},
    cache.extend: lambda: {"cache": None, "positions": AT, "tokens": None, "k": X},
    cache.save_cache: lambda: {"caches": caches(), "path": "c.safetensors"},
    cache.load_cache: lambda: {"path": "c.safetensors", "device": "cpu"},
    Cache.empty: lambda: {"spec": SPEC, "batch": 1, "max_len": 4, "ragged": True, "dtype": None, "device": None},
    attention.build: lambda: {"name": "mha"},
    attention.config: lambda: {"name": "mha"},
    attention.module: lambda: {"name": "mha"},
    presets.get: lambda: {"name": "quick"},
    presets.about: lambda: {"name": "quick"},
    presets.prepared: lambda: {"name": "x"},
    presets.variant: lambda: {"preset": RUN, "label": "mla", "options": None},
    presets.with_options: lambda: {"config": RUN, "options": {"mha": {}}},
    presets.check_corpus: lambda: {"config": RUN},
    spec.CacheSpec: lambda: {"rows": {"k": (2,)}, "keep": None, "state": {}, "every": 1, "beside": {}, "reads": {}},
    CacheSpec({"k": (2,)}).floats: lambda: {"tokens": 3},
    CacheSpec({"k": (2,)}).read: lambda: {"tokens": 3},
    CacheSpec({"k": (2,)}).slots: lambda: {"tokens": 3},
    spec.Mask: lambda: {"window": None, "plain": False},
    spec.AttentionConfig: dict,
    spec.AttentionConfig().check_context: lambda: {"context": 3},
    spec.RopeScaling: dict,
    config.ModelConfig: dict,
    config.ExpertsConfig: dict,
    config.DataConfig: dict,
    config.TrainConfig: dict,
    config.RunConfig: dict,
    config.Execution: dict,
    config.to_dict: lambda: {"config": RUN},
    config.differing: lambda: {"held": RUN, "given": RUN},
    Decoder: lambda: {"config": CONFIG},
    TINY.forward: lambda: {"tokens": IDS, "positions": AT, "cache": None, "documents": None},
    TINY.hidden: lambda: {"tokens": IDS, "positions": AT, "cache": None, "documents": None},
    TINY.loss: lambda: {"tokens": IDS, "targets": IDS, "documents": None},
    TINY.empty_cache: lambda: {"batch": 1, "max_len": 3, "ragged": False, "dtype": None, "device": None},
    model.parameters: lambda: {"model": CONFIG},
    model.cache_floats: lambda: {"model": CONFIG, "tokens": 3},
    model.flops_per_token: lambda: {"config": CONFIG, "context": 3, "new": 1},
    model.init_weights: lambda: {"model": Decoder(CONFIG), "layers": 1, "untouched": lambda each: True, "std": 0.02},
    model.attention_configs: lambda: {"config": CONFIG},
    layers.dropout: lambda: {"x": X, "p": 0.0},
    layers.make_norm: lambda: {"config": CONFIG},
    feed_forward.FeedForward: lambda: {"config": CONFIG, "width": 8},
    feed_forward.activate: lambda: {"kind": "gelu", "x": X},
    PackedRows.of: lambda: {"documents": IDS},
    recording.note: lambda: {"name": "a", "value": X},
    recording.with_loss: lambda: {"y": X, "name": "a", "loss": X.sum(), "weight": 1.0},
    recording.scale_losses: lambda: {"factor": 1.0},
    laws.check_mechanism: lambda: {"name": "mha", "laws": ["nope"], "allow": ["nope"], "tell": None},
    laws.check_attention: lambda: {
        "module": attention.build("mha", d_model=8, n_heads=2),
        "d_model": 8,
        "call": None,
        "step": None,
        "build": None,
        "laws": ["nope"],
        "allow": ["nope"],
    },
    generate.Sampling: dict,
    generate.generate: lambda: {
        "model": TINY,
        "prompts": [[1]],
        "n": 1,
        "temperature": 1.0,
        "top_k": None,
        "top_p": None,
        "seed": 0,
        "on_token": None,
        "stop": (),
        "compile": False,
    },
    generate.prefill: lambda: {"model": TINY, "tokens": IDS, "cache": caches(), "positions": None},
    generate.step: lambda: {"model": TINY, "tokens": IDS[0, :1], "cache": caches(), "positions": None},
    generate.uniforms: lambda: {"prompts": [[1]], "n": 2, "seed": 0},
    text.sample_run: lambda: {
        "path": "nowhere",
        "prompts": ["a"],
        "sampling": generate.Sampling(n=1),
        "checkpoint": None,
        "device": "cpu",
        "on_text": None,
    },
    load_model: lambda: {"path": "nowhere", "step": None, "device": "cpu"},
    RunFolder.open: lambda: {"path": "nowhere"},
    pretrained.load: lambda: {
        "source": "nowhere",
        "checkpoint": None,
        "dtype": torch.float32,
        "device": "cpu",
        "trust": False,
    },
    learning_rate: lambda: {"config": TrainConfig(), "step": 3},
    train: lambda: {
        "config": NOWHERE,
        "out": "/proc/nowhere",
        "resume": False,
        "progress": None,
        "how": config.Execution(),
        "patience": 2.0,
    },
    data.load: lambda: {"config": DataConfig(source="text:nowhere")},
    data.tokenizer: lambda: {"name": "byte"},
    data.from_json: lambda: {"data": {"kind": "byte"}, "ends": ()},
    data.from_text: lambda: {"text": WORDS, "source": "text", "val_fraction": 0.5},
    data.from_texts: lambda: {
        "texts": [WORDS, WORDS],
        "source": "text",
        "val_fraction": 0.5,
        "tokenizer": None,
        "pack": "stream",
    },
    data.read_text: lambda: {"path": Path("nowhere")},
    data.CharTokenizer: lambda: {"chars": "ab"},
    data.CharTokenizer.of: lambda: {"text": "ab"},
    data.ByteTokenizer().encode: lambda: {"text": "a"},
    data.ByteTokenizer().decode: lambda: {"ids": [65]},
    data.CharTokenizer("ab").encode: lambda: {"text": "a"},
    data.CharTokenizer("ab").decode: lambda: {"ids": [1]},
    data.Tokens.of: lambda: {"ids": [1, 2], "text_bytes": None},
    data.Prepared.open: lambda: {"folder": "nowhere"},
    CORPUS.batch: lambda: {"seed": 0, "step": 0, "batch_size": 1, "context": 4, "rank": 0, "world": 1},
    CORPUS.windows: lambda: {"count": 1, "context": 4, "split": "val"},
    CORPUS.check: lambda: {"context": 4},
    CORPUS.split: lambda: {"name": "val"},
    train_bpe: lambda: {"texts": [WORDS], "vocab_size": 258, "special": ()},
    Recipe: lambda: {"source": "text:x"},
    prepare: lambda: {"recipe": Recipe(source="text:nowhere"), "out": "/proc/nowhere", "command": "", "workers": 1},
    task: lambda: {"name": "mqar"},
    heads.repeated: lambda: {"vocab_size": 11, "sequences": 2, "segment": 3, "seed": 0, "repeat": True},
    heads.pattern_scores: lambda: {"pattern": torch.full((1, 1, 6, 6), 1 / 6), "segment": 3},
    heads.head_scores: lambda: {
        "model": TINY,
        "untrained": None,
        "sequences": 2,
        "segments": [99],
        "seed": 0,
        "batch_size": 2,
    },
    heads.ablate: lambda: {"model": TINY, "sequences": 2, "segment": 99, "seed": 0, "batch_size": 2},
    heads.inside: lambda: {"model": TINY, "tokens": IDS},
    heads.scores_over_training: lambda: {
        "run": "nowhere",
        "sequences": 2,
        "segments": [99],
        "seed": 0,
        "batch_size": 2,
    },
    heads.whole: lambda: {"model": TINY, "run": None, "sequences": 2, "segments": [99], "seed": 0, "causal": False},
    plan.Machine: lambda: {
        "gpu": next(iter(GPUS.values())),
        "gpus": 1,
        "strategy": "ddp",
        "batch": None,
        "recompute": False,
    },
    memory.footprint: lambda: {
        "config": RUN,
        "batch": 1,
        "precision": "bf16",
        "recompute": False,
        "accumulated": False,
    },
    bench.Timing: dict,
    bench.bench: lambda: {
        "kind": "decode",
        "preset": RUN,
        "mechanisms": ["nope"],
        "contexts": [4],
        "options": None,
        "batch": 1,
        "timing": bench.Timing(repeats=1, steps=1),
    },
    bench.with_context: lambda: {"config": RUN, "context": 4},
    Comparison: lambda: {
        "preset": RUN,
        "mechanisms": ["mha"],
        "seeds": 1,
        "match": "none",
        "sizes": (),
        "tasks": (),
        "options": None,
    },
    compare: lambda: {
        "comparison": Comparison(RUN, ["nope"], 1),
        "out": "/proc/nowhere",
        "engine": engines.Local(),
        "share": engines.Share(),
        "command": "",
        "extras": (),
    },
    sized: lambda: {"preset": RUN, "size": "1x8"},
    engines.Share: dict,
    engines.Slurm: dict,
    engines.Ray: dict,
    report.render: lambda: {"folder": "nowhere"},
    report.write_report: lambda: {"folder": "nowhere"},
    audit_target: lambda: {"target": "nowhere:Nothing", "tell": None},
    perplexity.Rolling: dict,
    perplexity.evaluate: lambda: {
        "model": TINY,
        "documents": [torch.zeros(9, dtype=torch.int64)],
        "context": None,
        "stride": None,
        "batch_size": 2,
        "tokenizer": None,
        "front": None,
    },
    perplexity.evaluate_source: lambda: {
        "source": "/no/where",
        "data_source": None,
        "split": "val",
        "rolling": perplexity.Rolling(),
        "checkpoint": None,
        "device": "cpu",
        "trust": False,
    },
    exam.examine: lambda: {"folder": "nowhere"},
    exam.score: lambda: {
        "logits": lambda t: torch.zeros(*t.shape, task("mqar").vocab_size),
        "task": task("mqar"),
        "length": 16,
        "count": 1,
        "batch": 1,
    },
    convert: lambda: {"model": TINY, "mechanism": "mla", "calibration": [], "held_out": []},
    patch: lambda: {
        "model": TINY,
        "mechanism": "mla",
        "layers": None,
        "options": None,
        "keep_output": False,
        "train": "all",
        "seed": 0,
    },
    contrasts.Judging: lambda: {"intervals": "auto", "margin": 0.01},
    contrasts.seeds_needed: lambda: {"variance": 1e-4, "comparisons": 2, "margin": 0.01, "intervals": "auto"},
    spread.sidak_quantile: lambda: {"confidence": 0.95, "comparisons": 2, "degrees": 3},
    stats.beyond: lambda: {"value": 1.0, "groups": [[1.0, 2.0]]},
    stats.holm: lambda: {"p": [0.1], "alpha": 0.05},
    stats.paired: lambda: {"ours": [1.0, 2.0], "theirs": [2.0, 2.5], "confidence": 0.95},
    stats.t_quantile: lambda: {"confidence": 0.95, "degrees": 3},
    stats.t_within: lambda: {"t": 1.0, "degrees": 3},
    stats.welch: lambda: {"ours": [1.0, 2.0], "theirs": [2.0, 3.0]},
}
for mechanism in attention.names():
    CALLS[attention.module(mechanism).Config] = dict


def is_ours(function: Any) -> bool:
    """Whether a function is not the check of shapes that the tests put around one."""
    return getattr(function, "__code__", None) is None or function.__code__.co_name != "either"


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the check of shapes that the tests put around it."""
    return inspect.unwrap(function, stop=is_ours)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What each argument is annotated with."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isclass(inner):
        return typing.get_type_hints(inner, include_extras=True)
    own: dict[str, Any] = {}
    with contextlib.suppress(NameError):  # those of a mechanism's Config are in its bases
        own |= typing.get_type_hints(inner.__init__, include_extras=True)
    for base in reversed(inner.__mro__):
        with contextlib.suppress(NameError, TypeError):
            own |= typing.get_type_hints(base, include_extras=True)
    return own


def allowed(hint: Any, default: Any, value: Any) -> bool:
    """Whether an annotation takes a value."""
    if value is None and (default is None or type(None) in typing.get_args(hint)):
        return True
    try:
        kind_in(hint)("x", value)
    except (UserError, TypeError, ValueError):
        return False
    return True


def tried(function: Callable[..., Any], make: Callable[[], dict[str, Any]]) -> Iterator[tuple[str, Any, str]]:
    """Each argument, each value, and what is wrong with what became of the call; "" where nothing is."""
    function = plain(function)
    good = make()
    signature = inspect.signature(function)
    hints = hints_of(function)
    names = [
        n for n, p in signature.parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and n != "self"
    ]
    for name in names:
        for value in NONSENSE:
            if (callable(value) and name in CALLABLE) or name == "compile":  # True compiles, for a minute
                continue
            yield (
                name,
                value,
                wrong(
                    function,
                    {**good, name: value},
                    name,
                    allowed(hints.get(name, Any), signature.parameters[name].default, value),
                ),
            )


OTHER = {
    "name": "unknown",
    "model": "Decoder",
    "prompts": "prompt",
    "sampling": "Sampling",
    "ids": "token",
}  # its other words
CALLABLE = (
    "tell",
    "untouched",
    "score",
    "progress",
    "on_token",
    "on_text",
    "show",
    "call",
    "step",
    "build",
    "module",
    "logits",
    "cls",
)


def wrong(function: Callable[..., Any], arguments: dict[str, Any], name: str, fine: bool) -> str:
    """What is wrong with what becomes of a call; "" where nothing is. `fine`: the annotation takes the value."""
    positional = [
        arguments.pop(each) for each, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_ONLY
    ]
    try:
        found = function(*positional, **arguments)
        if isinstance(found, contextlib.AbstractContextManager) and not isinstance(found, Path):
            with found:
                pass
    except (UserError, TypeError, ValueError) as error:
        said = str(error)
        named = re.search(rf"\b{name}\b|\b{name.replace('_', ' ')}\b|\b{name.replace('_', '-')}\b", said)
        about = isinstance(error, UserError) and fine
        return (
            ""
            if (named or about or OTHER.get(name, name) in said) and "\n" not in said
            else f"says {type(error).__name__}: {said[:150]}"
        )
    except OSError as error:
        return "" if fine else f"OSError {error}"
    except Exception as error:
        return f"ends in {type(error).__name__}: {str(error)[:120]}"
    return "" if fine else "is taken"


@pytest.mark.parametrize(
    "function", CALLS, ids=lambda each: f"{each.__module__.removeprefix('attnlab.')}.{each.__qualname__}"
)
def test_an_argument_that_makes_no_sense_is_named(
    function: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = [f"{name}={value!r:.60} {what}" for name, value, what in tried(function, CALLS[function]) if what]
    assert not found, "\n".join(found)
