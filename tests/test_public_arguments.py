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
    report,
    spec,
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
    math.nan, math.inf, -math.inf, -1, 0, -0.5, 10**30, -(10**30), True, "", "seven", "\ud800", b"7", [], [3], ["x"], [[]], {},
    {"a": 1}, (), None, object(), np.float32("nan"), np.int64(-3), np.zeros(2), torch.tensor(math.nan), torch.tensor(-2), torch.zeros(0), int, len, Path("no/where"),
]  # fmt: skip

TINY = Decoder(ModelConfig(vocab_size=11, context=8, n_layers=1, d_model=8, n_heads=2))
CONFIG = TINY.config
RUN = RunConfig(model=CONFIG, train=TrainConfig(steps=1, batch_size=1, device="cpu"))
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
    ops.attend: lambda: dict(q=Q, k=Q, v=Q, q_pos=AT, k_pos=AT, mask=CAUSAL, scale=1.0, impl="sdpa", dropout=0.0, keep=None),
    ops.attention_weights: lambda: dict(q=Q, k=Q, q_pos=AT, k_pos=AT, mask=CAUSAL, scale=1.0, keep=None),
    ops.chunk_sums: lambda: dict(x=X, positions=AT, chunk=2, carried=None),
    ops.ema: lambda: dict(x=X, decay=torch.full((8,), 0.5), positions=AT, start=None),
    ops.frequencies: lambda: dict(pairs=2, theta=1e4, scaling=spec.RopeScaling(), dtype=torch.float64, device=None),
    ops.index_scores: lambda: dict(q=Q, k=torch.randn(1, 5, 4), weight=torch.randn(1, 3, 2)),
    ops.newest: lambda: dict(scores=torch.zeros(1, 3), count=2),
    ops.rope: lambda: dict(x=Q, positions=AT, theta=1e4, places=(), scaling=spec.RopeScaling()),
    ops.slowed: lambda: dict(frequency=torch.ones(2), theta=1e4, scaling=spec.RopeScaling()),
    cache.extend: lambda: dict(cache=None, positions=AT, tokens=None, k=X),
    cache.save_cache: lambda: dict(caches=caches(), path="c.safetensors"),
    cache.load_cache: lambda: dict(path="c.safetensors", device="cpu"),
    Cache.empty: lambda: dict(spec=SPEC, batch=1, max_len=4, ragged=True, dtype=None, device=None),
    attention.build: lambda: dict(name="mha"),
    attention.config: lambda: dict(name="mha"),
    attention.module: lambda: dict(name="mha"),
    presets.get: lambda: dict(name="quick"),
    presets.about: lambda: dict(name="quick"),
    presets.prepared: lambda: dict(name="x"),
    presets.variant: lambda: dict(preset=RUN, label="mla", options=None),
    presets.with_options: lambda: dict(config=RUN, options={"mha": {}}),
    presets.check_corpus: lambda: dict(config=RUN),
    spec.CacheSpec: lambda: dict(rows={"k": (2,)}, keep=None, state={}, every=1, beside={}, reads={}),
    CacheSpec(dict(k=(2,))).floats: lambda: dict(tokens=3),
    CacheSpec(dict(k=(2,))).read: lambda: dict(tokens=3),
    CacheSpec(dict(k=(2,))).slots: lambda: dict(tokens=3),
    spec.Mask: lambda: dict(window=None, plain=False),
    spec.AttentionConfig: dict,
    spec.AttentionConfig().check_context: lambda: dict(context=3),
    attention.config("mha").flops: lambda: dict(queries=3, keys=3),
    spec.RopeScaling: dict,
    config.ModelConfig: dict,
    config.ExpertsConfig: dict,
    config.DataConfig: dict,
    config.TrainConfig: dict,
    config.RunConfig: dict,
    config.Execution: dict,
    config.from_dict: lambda: dict(cls=DataConfig, data={}, where=""),
    config.to_dict: lambda: dict(config=RUN),
    config.differing: lambda: dict(held=RUN, given=RUN),
    Decoder: lambda: dict(config=CONFIG),
    TINY.forward: lambda: dict(tokens=IDS, positions=AT, cache=None, documents=None),
    TINY.hidden: lambda: dict(tokens=IDS, positions=AT, cache=None, documents=None),
    TINY.loss: lambda: dict(tokens=IDS, targets=IDS, documents=None),
    TINY.empty_cache: lambda: dict(batch=1, max_len=3, ragged=False, dtype=None, device=None),
    model.parameters: lambda: dict(model=CONFIG),
    model.cache_floats: lambda: dict(model=CONFIG, tokens=3),
    model.flops_per_token: lambda: dict(config=CONFIG, context=3, new=1),
    model.init_weights: lambda: dict(model=Decoder(CONFIG), layers=1, std=0.02),
    model.attention_configs: lambda: dict(config=CONFIG),
    layers.dropout: lambda: dict(x=X, p=0.0),
    layers.make_norm: lambda: dict(config=CONFIG),
    feed_forward.FeedForward: lambda: dict(config=CONFIG, width=8),
    feed_forward.activate: lambda: dict(kind="gelu", x=X),
    PackedRows.of: lambda: dict(documents=IDS),
    recording.note: lambda: dict(name="a", value=X),
    recording.with_loss: lambda: dict(y=X, name="a", loss=X.sum(), weight=1.0),
    recording.scale_losses: lambda: dict(factor=1.0),
    laws.check_mechanism: lambda: dict(name="mha", laws=["causality"], allow=(), tell=None),
    laws.check_attention: lambda: dict(module=attention.build("mha", d_model=8, n_heads=2), d_model=8, call=None, step=None, build=None, laws=["causality"], allow=()),
    generate.Sampling: dict,
    generate.generate: lambda: dict(model=TINY, prompts=[[1]], n=1, temperature=1.0, top_k=None, top_p=None, seed=0, on_token=None, stop=(), compile=False),
    generate.continuation: lambda: dict(model=TINY, prompts=[[1]], sampling=generate.Sampling(n=1), on_token=None, stop=(), compile=False),
    generate.prefill: lambda: dict(model=TINY, tokens=IDS, cache=caches(), positions=None),
    generate.step: lambda: dict(model=TINY, tokens=IDS[:, :1], cache=caches(), positions=None),
    generate.uniforms: lambda: dict(prompts=[[1]], n=2, seed=0),
    text.sample_run: lambda: dict(path="nowhere", prompts=["a"], sampling=generate.Sampling(n=1), checkpoint=None, device="cpu", on_text=None),
    load_model: lambda: dict(path="nowhere", step=None, device="cpu"),
    RunFolder.open: lambda: dict(path="nowhere"),
    pretrained.load: lambda: dict(source="nowhere", checkpoint=None, dtype=torch.float32, device="cpu", trust=False),
    learning_rate: lambda: dict(config=TrainConfig(), step=3),
    train: lambda: dict(config=RUN, out="/proc/nowhere", resume=False, progress=None, how=config.Execution(), patience=2.0),
    data.load: lambda: dict(config=DataConfig(source="text:nowhere")),
    data.tokenizer: lambda: dict(name="byte"),
    data.from_json: lambda: dict(data={"kind": "byte"}, ends=()),
    data.from_text: lambda: dict(text=WORDS, source="text", val_fraction=0.5),
    data.from_texts: lambda: dict(texts=[WORDS, WORDS], source="text", val_fraction=0.5, tokenizer=None, pack="stream"),
    data.read_text: lambda: dict(path=Path("nowhere")),
    data.CharTokenizer: lambda: dict(chars="ab"),
    data.CharTokenizer.of: lambda: dict(text="ab"),
    data.ByteTokenizer().encode: lambda: dict(text="a"),
    data.ByteTokenizer().decode: lambda: dict(ids=[65]),
    data.CharTokenizer("ab").encode: lambda: dict(text="a"),
    data.CharTokenizer("ab").decode: lambda: dict(ids=[1]),
    data.Tokens.of: lambda: dict(ids=[1, 2], documents=None, text_bytes=None),
    data.Prepared.open: lambda: dict(folder="nowhere"),
    CORPUS.batch: lambda: dict(seed=0, step=0, batch_size=1, context=4, rank=0, world=1),
    CORPUS.windows: lambda: dict(count=1, context=4, split="val"),
    CORPUS.check: lambda: dict(context=4),
    CORPUS.split: lambda: dict(name="val"),
    train_bpe: lambda: dict(texts=[WORDS], vocab_size=258, special=()),
    Recipe: lambda: dict(source="text:x"),
    prepare: lambda: dict(recipe=Recipe(source="text:nowhere"), out="/proc/nowhere", command="", workers=1),
    task: lambda: dict(name="mqar"),
    heads.repeated: lambda: dict(vocab_size=11, sequences=2, segment=3, seed=0, repeat=True),
    heads.pattern_scores: lambda: dict(pattern=torch.full((1, 1, 6, 6), 1 / 6), segment=3),
    heads.head_scores: lambda: dict(model=TINY, untrained=[], sequences=2, segments=[3], seed=0, batch_size=2),
    heads.ablate: lambda: dict(model=TINY, sequences=2, segment=3, seed=0, batch_size=2),
    heads.inside: lambda: dict(model=TINY, tokens=IDS),
    heads.scores_over_training: lambda: dict(run="nowhere", sequences=2, segments=[3], seed=0, batch_size=2),
    heads.whole: lambda: dict(model=TINY, run=None, sequences=2, segments=[3], seed=0, causal=False),
    plan.Machine: lambda: dict(gpu=next(iter(GPUS.values())), gpus=1, strategy="ddp", batch=None, recompute=False),
    memory.footprint: lambda: dict(config=RUN, batch=1, precision="bf16", recompute=False, accumulated=False),
    bench.Timing: dict,
    bench.bench: lambda: dict(kind="decode", preset=RUN, mechanisms=["mha"], contexts=[4], options=None, batch=1, timing=bench.Timing(repeats=1, steps=1)),
    bench.with_context: lambda: dict(config=RUN, context=4),
    Comparison: lambda: dict(preset=RUN, mechanisms=["mha"], seeds=1, match="none", sizes=(), tasks=(), options=None),
    compare: lambda: dict(comparison=Comparison(RUN, ["mha"], 1), out="/proc/nowhere", engine=engines.Local(), share=engines.Share(), command="", extras=()),
    sized: lambda: dict(preset=RUN, size="1x8"),
    engines.Share: dict,
    engines.Slurm: dict,
    engines.Ray: dict,
    report.render: lambda: dict(folder="nowhere"),
    report.write_report: lambda: dict(folder="nowhere"),
    audit_target: lambda: dict(target="nowhere:Nothing", tell=None),
    perplexity.Rolling: dict,
    perplexity.evaluate: lambda: dict(model=TINY, documents=[torch.zeros(9, dtype=torch.int64)], context=None, stride=None, batch_size=2, tokenizer=None, front=None),
    perplexity.evaluate_source: lambda: dict(source="nowhere", data_source=None, split="val", rolling=perplexity.Rolling(), checkpoint=None, device="cpu", trust=False),
    exam.examine: lambda: dict(folder="nowhere"),
    exam.score: lambda: dict(logits=lambda t: torch.zeros(*t.shape, task("mqar").vocab_size), task=task("mqar"), length=16, count=1, batch=1),
    convert: lambda: dict(model=TINY, mechanism="mla", calibration=[], held_out=[]),
    patch: lambda: dict(model=TINY, mechanism="mla", layers=None, options=None, keep_output=False, train="all", seed=0),
    stats.beyond: lambda: dict(value=1.0, groups=[[1.0, 2.0]]),
    stats.holm: lambda: dict(p=[0.1], alpha=0.05),
    stats.paired: lambda: dict(ours=[1.0, 2.0], theirs=[2.0, 2.5], confidence=0.95),
    stats.t_quantile: lambda: dict(confidence=0.95, degrees=3),
    stats.t_within: lambda: dict(t=1.0, degrees=3),
    stats.welch: lambda: dict(ours=[1.0, 2.0], theirs=[2.0, 3.0]),
}  # fmt: skip
for mechanism in attention.names():
    CALLS[attention.module(mechanism).Config] = dict


def plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without the check of shapes that the tests put around it."""
    return inspect.unwrap(
        function, stop=lambda each: getattr(each, "__code__", None) is None or each.__code__.co_name != "either"
    )


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """What each argument is annotated with."""
    inner = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isclass(inner):
        return typing.get_type_hints(inner, include_extras=True)
    own = typing.get_type_hints(inner.__init__, include_extras=True)
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
            if callable(value) and name in CALLABLE:
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


CALLABLE = ("tell", "progress", "on_token", "on_text", "show", "call", "step", "build", "module", "logits", "cls")


def wrong(function: Callable[..., Any], arguments: dict[str, Any], name: str, fine: bool) -> str:
    """What is wrong with what becomes of a call; "" where nothing is. `fine`: the annotation takes the value."""
    positional = [
        arguments.pop(each) for each, p in inspect.signature(function).parameters.items() if p.kind is p.POSITIONAL_ONLY
    ]
    try:
        found = function(*positional, **arguments)
        if isinstance(found, contextlib.AbstractContextManager):
            with found:
                pass
    except (UserError, TypeError, ValueError) as error:
        said = str(error)
        named = re.search(rf"\b{name}\b|\b{name.replace('_', ' ')}\b|\b{name.replace('_', '-')}\b", said)
        about = isinstance(error, UserError) and fine
        return "" if (named or about) and "\n" not in said else f"says {type(error).__name__}: {said[:150]}"
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
