"""The cases of refusals.py: calls of Python, results that were changed, plugins and audited code that break,
environments, launchers, signals, two processes at once, files that are none, models, options that contradict."""

from __future__ import annotations

import functools
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from refusals import NOBODY, SMALL, Case, Expected, limit

CASES: list[Case] = []
TRAIN = ["train", "quick", *SMALL]
OUT = ["--out", "new"]
LONG = "n" * 300
WRITERS: dict[str, tuple[list[str], tuple[str, ...]]] = {  # a command that writes `new`, and what it needs
    "train": ([*TRAIN, *OUT], ()),
    "heal": (["heal", "converted", "--steps", "2", "--batch-size", "2", "--device", "cpu", *OUT], ("converted",)),
    "prepare": (["prepare", "text:text.txt", "--tokenizer", "byte", "--documents", "blank", *OUT], ("text.txt",)),
    "convert": (["convert", "run", "--to", "mla", "--calibrate", "1", *OUT], ("run",)),
    "export": (["export", "run", *OUT], ("run",)),
    "patch": (["patch", "llama", "--mechanism", "mla", *OUT], ("llama",)),
    "compare": (["compare", "quick", "--mechanisms", "mha", "--seeds", "1", "--jobs", "1", *SMALL, *OUT], ()),
    "tokenizer": (["tokenizer", "train", "text:text.txt", "--vocab-size", "300", *OUT], ("text.txt",)),
    "eval": (["eval", "run", "--device", "cpu", *OUT], ("run",)),
    "heads": (["heads", "run", "--sequences", "2", "--no-ablation", "--device", "cpu", *OUT], ("run",)),
}
FILES = ("tokenizer", "eval", "heads")  # those that write a file; the others write a folder


def case(kind: str, name: str, words: Any, *needs: str, **more: Any) -> None:
    CASES.append(Case(kind, name, words, needs, **more))


def write(path: str, content: str | bytes) -> Callable[[], None]:
    def change() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return change


def edit(path: str, **fields: Any) -> Callable[[], None]:
    def change() -> None:
        held = json.loads(Path(path).read_text())
        Path(path).write_text(json.dumps({**held, **fields}))

    return change


def each(call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a call, so that several may stand in an expression."""
    return call(*arguments)


def both(*changes: Callable[[], Any]) -> Callable[[], None]:
    def change() -> None:
        for each in changes:
            each()

    return change


# Python


MODULES = (
    *("attention", "cache", "config", "data", "laws", "ops", "presets", "stats", "costs.bench", "costs.plan"),
    *("evaluation.perplexity", "inference.generate", "inference.text"),
)
FUNCTIONS = (
    *(("audit.target", "audit_target"), ("comparison.compare", "compare"), ("comparison.grid", "Comparison")),
    *(("convert", "convert"), ("heads.scores", "head_scores"), ("training.train", "train")),
)


def python(call: str) -> None:
    """A call of Python that an argument spoils; the names below are there for it."""

    def run() -> None:
        import numpy
        import torch

        import attnlab

        model = attnlab.Decoder(attnlab.ModelConfig(vocab_size=9, context=8, n_layers=1, d_model=8, n_heads=2))
        names = {"attnlab": attnlab, "torch": torch, "np": numpy, "model": model, "nan": float("nan")}
        names |= {module.rpartition(".")[2]: importlib.import_module(f"attnlab.{module}") for module in MODULES}
        for place, name in FUNCTIONS:
            names[name] = getattr(importlib.import_module(f"attnlab.{place}"), name)
        names["ids"] = torch.zeros(1, 3, dtype=torch.int64)
        names["small"] = attnlab.RunConfig(model=model.config, train=attnlab.TrainConfig(steps=1, device="cpu"))
        exec("result = " + call, names)
        found = names["result"]
        if hasattr(found, "__next__"):
            next(found)

    case("python", call, run)


for call in (
    *("attnlab.ModelConfig(n_layers=np.float64(2))", "attnlab.ModelConfig(d_model=torch.tensor(64))"),
    *(
        "attnlab.ModelConfig(n_heads=10**30)",
        "attnlab.Decoder(attnlab.ModelConfig(head_dim=3))",
        "attnlab.ModelConfig(context=True)",
    ),
    *("attnlab.ModelConfig(mechanisms=())", "attnlab.ModelConfig(mechanisms=('mha', 5))"),
    *("attnlab.ModelConfig(mechanisms='mha+')", "attnlab.ModelConfig(options={'mha': 3})"),
    *("attnlab.ModelConfig(options={5: {}})", "attnlab.ModelConfig(options={'mla': {'kv_rank': nan}})"),
    *("attnlab.ModelConfig(ff='')", "attnlab.ModelConfig(norm=None)", "attnlab.ModelConfig(positions=b'rope')"),
    *("attnlab.ModelConfig(experts=3)", "attnlab.ModelConfig(dropout='0.1')", "attnlab.ModelConfig(impl='')"),
    *("attnlab.TrainConfig(lr=None)", "attnlab.TrainConfig(steps='5')", "attnlab.TrainConfig(betas=(0.9,))"),
    *("attnlab.TrainConfig(betas='ab')", "attnlab.TrainConfig(clip=-0.0001)", "attnlab.TrainConfig(device=5)"),
    *("attnlab.TrainConfig(device='')", "attnlab.TrainConfig(precision=16)", "attnlab.TrainConfig(compile='no')"),
    *("attnlab.TrainConfig(warmup=nan)", "attnlab.TrainConfig(keep=-1)", "attnlab.TrainConfig(spike=np.inf)"),
    *("attnlab.DataConfig(source='')", "attnlab.DataConfig(source=None)", "attnlab.DataConfig(val_fraction=1)"),
    *("attnlab.DataConfig(tokenizer='')", "attnlab.DataConfig(pack='row')", "attnlab.RunConfig(seed=2**64)"),
    *("attnlab.RunConfig(seed=1.0)", "attnlab.RunConfig(train={})", "attnlab.RunConfig(name=5)"),
    *("attnlab.Decoder(None)", "attnlab.Decoder({})", "attnlab.Decoder(attnlab.RunConfig())"),
    *("model(ids.float())", "model(ids[0])", "model(ids + 99)", "model(ids, cache=[])", "model(ids, cache=[None])"),
    *("model(ids, positions=ids.float())", "model(ids, documents=ids[:, :2])", "model(ids, documents='')"),
    *("model.loss(ids, ids[:, :1])", "model.loss(ids, None)", "model.empty_cache(0, 4)", "model.empty_cache(1, -1)"),
    *("model.empty_cache(1, 4, dtype='float')", "model.empty_cache(1, 4, device='abacus')"),
    *("attention.build('mha', d_model=-1)", "attention.build('nope')", "attention.build(None)"),
    *(
        "attention.build('mla', nope=1)",
        "attention.build('mha', rope_theta=0)",
        "attention.config('gqa', n_kv_heads=3)",
    ),
    *("attention.build('sliding', window=0)", "attention.build('mha', dropout=1)", "attention.build('')"),
    *("cache.Cache.empty(attnlab.CacheSpec({'k': (2,)}), 1, 4, dtype=3)", "attnlab.CacheSpec({'k': (-1,)})"),
    *("attnlab.CacheSpec({'k': 3})", "attnlab.CacheSpec(None)", "attnlab.CacheSpec({'k': (2,)}, every=0)"),
    *("cache.save_cache(3, 'x')", "cache.save_cache(model.empty_cache(1, 2), 'no/where.st')", "cache.load_cache('')"),
    *("attnlab.Mask(window=-1)", "attnlab.Mask(window=True)", "attnlab.Mask(plain=1)"),
    *("ops.rope(torch.zeros(1, 3, 2, 4), ids, 0)", "ops.rope(torch.zeros(1, 3, 2, 4), ids, 1e4, (1,))"),
    *("ops.rope(torch.zeros(1, 3, 2, 4), ids[:, :2], 1e4)", "ops.newest(torch.zeros(3), 0)"),
    *("ops.ema(torch.zeros(1, 3, 4), torch.zeros(3), ids)", "ops.chunk_sums(torch.zeros(1, 3, 4), ids, 0)"),
    *("ops.index_scores(torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 5), torch.zeros(1, 3, 2))",),
    *(
        "ops.attend(*[torch.zeros(1, 3, 2, 4)] * 3, ids, ids, impl='nope')",
        "ops.attend(*[torch.zeros(1, 3, 2, 4)] * 3, ids, ids, dropout=1)",
    ),
    *("ops.attend(*[torch.zeros(1, 3, 2, 4)] * 3, ids, ids, keep=torch.ones(1, 1, 2, 2, dtype=torch.bool))",),
    *(
        "generate.generate(model, [], -1)",
        "generate.generate(model, [[1]], 2, top_k=0)",
        "generate.generate(model, [[]], 2)",
    ),
    *(
        "generate.generate(model, [[9]], 2)",
        "generate.generate(model, 'ab', 2)",
        "generate.generate(model, [[1]], 2, seed=-1)",
    ),
    *(
        "generate.generate(model, [[1]], 2, stop='a')",
        "generate.generate(None, [[1]], 2)",
        "generate.Sampling(top_p=0)",
    ),
    *("generate.step(model, ids, None)", "generate.generate(model, [[1]], 2, on_token=3)"),
    *("text.sample_run('nowhere', ['a'])", "text.sample_run('', 'a')", "text.continue_texts(model, ['a'])"),
    *("attnlab.load_model(None)", "attnlab.load_model('')", "attnlab.load_model('nowhere', step=1.5)"),
    *("train(small, '')", "train(small, None)", "train(None, 'x')", "train(small, 'x', patience=nan)"),
    *("train(small, 'x', progress=3)", "train(small, 'x', how='ddp')", "presets.get('')", "presets.get(3)"),
    *(
        "presets.variant(small, '')",
        "presets.with_options(small, {'mla': 3})",
        "config.from_dict(attnlab.DataConfig, [1])",
    ),
    *(
        "data.from_text('')",
        "data.from_text(None)",
        "data.from_texts([])",
        "data.from_text('ab' * 50, val_fraction=1.5)",
    ),
    *("data.tokenizer('')", "data.tokenizer(3)", "data.from_json({})", "data.from_json({'kind': 'char', 'chars': 5})"),
    *("data.CharTokenizer('ba')", "data.CharTokenizer('ab').encode('c')"),
    *("data.Tokens.of([0.5])", "data.Tokens.of('ab')"),
    *("data.from_text('abcd' * 99).batch(0, -1, 1, 4)", "data.from_text('abcd' * 99).batch(0, 0, 0, 4)"),
    *("data.from_text('abcd' * 99).windows(0, 4)", "data.from_text('abcd' * 99).windows(1, 10**6)"),
    *("data.from_text('abcd' * 99).split('x')", "data.load(attnlab.DataConfig(source='text:'))"),
    *(
        "stats.t_quantile(1, 3)",
        "stats.t_quantile(0.9, 0)",
        "stats.paired([1.0], [1.0, 2.0])",
        "stats.welch('ab', [1.0])",
    ),
    *("stats.holm([2], 0.05)", "stats.holm([0.1], 0)", "stats.paired([nan], [1.0])", "stats.beyond(nan, [[1.0, 2.0]])"),
    *("laws.check_mechanism('nope')", "laws.check_mechanism('mha', laws=['nope'])", "laws.check_attention(3)"),
    *("laws.check_attention(torch.nn.Linear(4, 4), d_model=0)", "audit_target('')", "audit_target('mha', nope=1)"),
    *("perplexity.evaluate(model, [])", "perplexity.evaluate(model, 3)", "perplexity.Rolling(stride=0)"),
    *(
        "perplexity.evaluate(model, [torch.zeros(5)])",
        "perplexity.evaluate_source('')",
        "head_scores(model, sequences=0)",
    ),
    *(
        "head_scores(model, segments=[99])",
        "head_scores(None)",
        "convert(model, 'nope')",
        "convert(model, 'mla', rank=0.0)",
    ),
    *("convert(model, 'mla', rank='x')", "convert(model, 'mla', calibration=[3])", "convert(model, 'mla', seed=-1)"),
    *("bench.bench('nope', small, ['mha'])", "bench.bench('decode', small, [])", "bench.Timing(repeats=0)"),
    *("plan.plan(small, None)", "plan.Machine('a100')", "compare(None, 'x')", "compare(Comparison(small, [], 1), 'x')"),
    *("compare(Comparison(small, ['mha'], 0), 'x')", "Comparison(small, 'mha', 1)", "attnlab.patch(3, 'mla')"),
    *("attnlab.check_attention(lambda: 1)", "attnlab.extend(None, ids, k=3)", "attnlab.record_attention(3)"),
):
    python(call)

# results that are read

BAD: dict[str, str | bytes] = {
    "empty": "",
    "null": "null",
    "a number": "7",
    "a list of lists": "[[[]]]",
    "deep": "[" * 50_000,
    "digits": '{"runs": ' + "8" * 5000 + "}",
    "halves": '{"\\ud800": 1}',
    "binary": bytes(range(256)),
    "utf-16": '{"a": 1}'.encode("utf-16"),
}
for name, content in BAD.items():
    case(
        "results",
        f"report: compare.json {name}",
        ["report", "compared"],
        "compared",
        before=write("compared/compare.json", content),
        expected="sound",
    )
    case(
        "results",
        f"report: extra bench.json {name}",
        ["report", "compared"],
        "compared",
        before=write("compared/bench.json", content),
        expected="sound",
    )
    case(
        "results",
        f"compare goes on: run.json {name}",
        ["compare", "quick", "--mechanisms", "mha,mla", "--seeds", "2", "--jobs", "1", *SMALL, "--out", "compared"],
        "compared",
        before=both(
            *(
                functools.partial(
                    lambda c: [write(str(p), c)() for p in sorted(Path("compared").rglob("run.json"))[:1]], content
                ),
            )
        ),
        expected="not green",
    )
    case(
        "results",
        f"sample: tokenizer.json {name}",
        ["sample", "run", "--tokens", "2"],
        "run",
        before=write("run/tokenizer.json", content),
    )
    case(
        "results",
        f"heal: certificate.json {name}",
        ["heal", "converted", "--steps", "1", *OUT],
        "converted",
        before=write("converted/certificate.json", content),
        expected="sound",
    )
    case(
        "results",
        f"corpus: manifest.json {name}",
        [*TRAIN, "--data", "prepared:corpus", *OUT],
        "corpus",
        before=write("corpus/manifest.json", content),
    )
    case(
        "results",
        f"plan: gpu {name}",
        ["plan", "quick", "--mechanisms", "mha", "--gpu", content if isinstance(content, str) else "{"],
    )
for field, value in (
    ("curve", [[1, "x"]]),
    ("runs", {"a": 1}),
    ("verdicts", "none"),
    ("cells", [None]),
    ("cells", []),
    ("preset", 5),
    ("sizes", [[]]),
):
    case(
        "results",
        f"report: {field} is {value}",
        ["report", "compared"],
        "compared",
        before=edit("compared/compare.json", **{field: value}),
        expected="sound",
    )
case(
    "results",
    "resume: metrics.jsonl of another encoding",
    [*TRAIN, "--out", "run", "--resume"],
    "run",
    before=write("run/metrics.jsonl", '{"step": 1}\n'.encode("utf-16")),
    expected="sound",
)
case(
    "results",
    "report of a run without anything",
    ["report", "run"],
    "run",
    before=lambda: Path("run/result.json").unlink(),
)

# plugins

PLUGINS = {
    "exits": "import sys\nsys.exit(0)",
    "exits with words": "raise SystemExit('bye')",
    "ends the process": "import os\nos._exit(0)",
    "is interrupted": "raise KeyboardInterrupt",
    "raises a BaseException": "class Own(BaseException): pass\nraise Own('x\\ny')",
    "kills itself": "import os\nos.kill(os.getpid(), 9)",
    "is no Python": "def",
    "has a null byte": "x = '\0'",
    "prints": "print('{\"a\": 1}' * 99)\nraise ValueError(1)",
    "closes stdout": "import os\nos.close(1)\nraise ValueError",
    "has nothing in it": "",
    "has other names": "Config = 3\nAttention = 4",
    "recurses": "def f(): f()\nf()",
    "needs a package": "import nowhere_at_all",
    "has an error that cannot be printed": "class E(Exception):\n  def __str__(self): raise RuntimeError\nraise E",
}
BUILT = """
from dataclasses import dataclass
import sys, os
from torch import nn
from attnlab import AttentionConfig, CacheSpec
@dataclass(frozen=True, kw_only=True)
class Config(AttentionConfig):
    @property
    def cache_spec(self): {spec}
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.w = nn.Linear(config.d_model, config.d_model)
        {init}
    def forward(self, x, positions=None, cache=None, mask=None):
        {forward}
"""
SPEC = "return CacheSpec({'k': (self.d_model,)})"
PARTS: dict[str, dict[str, str]] = {
    "exits as it is built": {"init": "sys.exit(3)"},
    "exits with 0 as it is built": {"init": "sys.exit(0)"},
    "raises as it is built": {"init": "raise RuntimeError('a\\nb')"},
    "is interrupted as it is built": {"init": "raise KeyboardInterrupt"},
    "exits in its forward": {"forward": "sys.exit(0)"},
    "raises in its forward": {"forward": "raise KeyError('x')"},
    "returns nothing": {"forward": "return None"},
    "returns another shape": {"forward": "return x[:, :1], cache"},
    "returns NaN": {"forward": "return self.w(x) * float('nan'), cache"},
    "declares no cache": {"spec": "return None"},
    "exits in its cache": {"spec": "sys.exit(0)"},
}


def installed(module: str) -> Callable[[], None]:
    """What puts a package with the mechanism `broken` into the folder site."""
    facts = "Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n"
    points = "[attnlab.attention]\nbroken = broken\n"
    return both(
        write("site/broken.py", module),
        write("site/broken-1.0.dist-info/METADATA", facts),
        write("site/broken-1.0.dist-info/entry_points.txt", points),
    )


def plugin(name: str, module: str, used: Expected) -> None:
    for words, expected in (
        (["list"], "done"),
        ([*TRAIN, *OUT], "done"),
        ([*TRAIN, "--mechanism", "broken", *OUT], used),
        (["audit", "broken", "--laws", "causality"], "not green"),
    ):
        said = " ".join(words[:1] + ["broken"] * ("broken" in words))
        case(
            "plugins",
            f"{name}: {said}",
            words,
            before=installed(module),
            expected=expected,
            environment={"PYTHONPATH": "site"},
        )


for name, module in PLUGINS.items():
    plugin(name, module, "refused")
for name, parts in PARTS.items():
    late = "returns" in name or "forward" in name
    plugin(
        name,
        BUILT.format(**{"spec": SPEC, "init": "pass", "forward": "return self.w(x), cache", **parts}),
        "not green" if late else "refused",
    )

# audited code

CODE = """
import os, sys, time, torch
from torch import nn
class A(nn.Module):
    def __init__(self, d_model=16):
        super().__init__()
        self.w = nn.Linear(d_model, d_model)
        {init}
    def forward(self, x):
        {forward}
"""
for name, parts in {
    "exits": {"forward": "os._exit(0)"},
    "raises SystemExit": {"forward": "sys.exit(0)"},
    "is interrupted": {"forward": "raise KeyboardInterrupt"},
    "kills itself": {"forward": "os.kill(os.getpid(), 11)"},
    "never ends": {"forward": "time.sleep(999)"},
    "spins": {"forward": "while True: pass"},
    "exits as it is built": {"init": "sys.exit(0)"},
    "takes all memory": {"forward": "torch.zeros(10**15); return x"},
    "returns text": {"forward": "return 'x'"},
    "returns infinity": {"forward": "return x / 0"},
    "looks ahead": {"forward": "return self.w(x).mean(1, keepdim=True).expand_as(x)"},
    "recurses": {"forward": "return self(x)"},
    "breaks torch": {"init": "torch.nn.Linear = None", "forward": "return x.flip(1)"},
    "prints an audit": {"forward": "print('{}'); return x.flip(1)"},
    "closes its streams": {"init": "os.close(1); os.close(2)", "forward": "return x.flip(1)"},
    "stays behind": {"init": "__import__('subprocess').Popen(['sleep', '30'])", "forward": "return x.flip(1)"},
}.items():
    module = CODE.format(**{"init": "pass", "forward": "return self.w(x)", **parts})
    case(
        "audited code", name, ["audit", "a.py:A", "--timeout", "15"], before=write("a.py", module), expected="not green"
    )
for expression in (
    "x",
    "None",
    "module",
    "1",
    "torch.zeros(3)",
    "module(x) and x",
    "[module(y) for y in x]",
    "module(x, x, x)",
    "(lambda: x)()",
    "__import__('os')._exit(0)",
    "exit()",
    "module(x)[0]",
    "0*module(x)",
    "yield",
    "a:=1",
):
    case(
        "audited code",
        f"--call {expression}",
        ["audit", "a.py:A", "--call", expression, "--laws", "causality", "--timeout", "30"],
        before=write("a.py", CODE.format(init="pass", forward="return self.w(x)")),
        expected="sound" if expression in ("0*module(x)", "None") else "not green",  # None: left out
    )

# environments


def as_nobody() -> None:
    for module in ("encodings.utf_32_le", "importlib.readers"):  # Python itself may lie where nobody can read it
        importlib.import_module(module)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def closed(*streams: int) -> Callable[[], None]:
    def change() -> None:
        for each in streams:
            setattr(sys, {1: "stdout", 2: "stderr"}[each], None)  # as Python starts then
            os.close(each)

    return change


def onto(path: str, *streams: int) -> Callable[[], None]:
    def change() -> None:
        handle = os.open(path, os.O_WRONLY)
        for each in streams:
            os.dup2(handle, each)

    return change


for name, (words, needs) in WRITERS.items():
    case(
        "environment",
        f"{name} as nobody, into a folder of root",
        words,
        *needs,
        before=lambda: os.chmod(".", 0o755),
        inside=as_nobody,
    )
    case(
        "environment",
        f"{name} with files of 2 kB at most",
        words,
        *needs,
        inside=limit(resource.RLIMIT_FSIZE, 2048),
        expected="not green" if name not in FILES else "sound",
    )
    case(
        "environment",
        f"{name} with 12 open files at most",
        words,
        *needs,
        inside=limit(resource.RLIMIT_NOFILE, 12),
        expected="sound",
    )
    case("environment", f"{name} with stdout and stderr closed", words, *needs, inside=closed(1, 2), expected="sound")
    case("environment", f"{name} onto a full disk", words, *needs, inside=onto("/dev/full", 1, 2), expected="mute")
SAMPLE = ["sample", "run", "--tokens", "3", "--device", "cpu"]
STRANGE: dict[str, dict[str, str | None]] = {
    "no HOME": {"HOME": None},
    "HOME is a file": {"HOME": "/etc/passwd"},
    "HOME is nowhere": {"HOME": "/nowhere"},
    "TMPDIR is nowhere": {"TMPDIR": "/nowhere"},
    "TMPDIR cannot be written": {"TMPDIR": "/proc"},
    "C locale": {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
    "Latin 1, strict": {"PYTHONIOENCODING": "latin-1:strict"},
    "0 columns": {"COLUMNS": "0"},
    "-3 columns": {"COLUMNS": "-3"},
    "columns of text": {"COLUMNS": "wide", "LINES": "x"},
    "dumb terminal": {"TERM": "dumb"},
    "unknown terminal": {"TERM": "\x1b[31m", "NO_COLOR": "1", "FORCE_COLOR": "1"},
    "threads of text": {"OMP_NUM_THREADS": "many"},
    "no threads": {"OMP_NUM_THREADS": "0"},
    "debug of text": {"ATTNLAB_DEBUG": "0"},
}
for name, environment in STRANGE.items():
    for words, needs in ((["list"], ()), (SAMPLE, ("run",)), ([*TRAIN, *OUT], ())):
        case(
            "environment",
            f"{words[0]}: {name}",
            words,
            *needs,
            environment={"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **environment},
            fresh=True,
            expected="done",
        )
case(
    "environment",
    "the folder is gone",
    [*TRAIN, *OUT],
    inside=lambda: (each(os.mkdir, "x"), each(os.chdir, "x"), each(os.rmdir, "../x")),
    expected="sound",
)
for garbage in (
    {"RANK": "x", "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "x"},
    {"RANK": "0", "WORLD_SIZE": "0"},
    {"RANK": "5", "WORLD_SIZE": "2"},
    {"RANK": "-1", "WORLD_SIZE": "1"},
    {"RANK": "0"},
    {"WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "x", "MASTER_ADDR": "localhost"},
    {"RANK": "", "WORLD_SIZE": ""},
    {"LOCAL_RANK": "x", "RANK": "0", "WORLD_SIZE": "1"},
    {"RANK": "9" * 5000, "WORLD_SIZE": "2"},
    {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999999", "MASTER_ADDR": "localhost"},
):
    for words in ([*TRAIN, *OUT], ["list"]):
        case(
            "launcher", f"{words[0]}: {str(garbage)[:60]}", words, environment=garbage, expected="sound", patience=40.0
        )

# signals, and two at once


def whole(name: str) -> Callable[[], str]:
    """What is wrong with `new` once a command has been stopped or doubled."""

    def look() -> str:
        hidden = [path.name for path in Path().glob(".*") if path.name != ".lock"]
        if hidden and name not in ("train", "heal", "compare", "prepare"):
            return f"left {hidden[0]}"
        if Path("new").is_dir():
            missing = {"export": "config.json", "convert": "certificate.json", "patch": "config.json"}.get(name)
            return f"lacks {missing}" if missing and not Path("new", missing).exists() else ""
        return ""

    return look


for name, (words, needs) in WRITERS.items():
    for seconds in (0.05, 0.4, 1.0):
        for number in (signal.SIGINT, signal.SIGTERM):
            hidden = whole(name) if number == signal.SIGINT else None  # SIGTERM is for the next command to clean up
            case(
                "signals",
                f"{signal.Signals(number).name} to {name} after {seconds} s",
                words,
                *needs,
                signal=(number, seconds),
                after=hidden,
                expected="sound",
                patience=60.0,
            )
    case("two at once", name, words, *needs, twice=True, after=whole(name), expected="done")
for name, words, needs in (
    ("report", ["report", "compared"], ("compared",)),
    ("resume", [*TRAIN, "--out", "run", "--resume", "--train.steps", "8"], ("run",)),
    ("png", ["heads", "run", "--sequences", "2", "--no-ablation", "--png", "new"], ("run",)),
):
    case("two at once", name, words, *needs, twice=True, expected="done")

# files that are none, and names


def bound() -> None:
    socket.socket(socket.AF_UNIX).bind("thing")


THINGS: dict[str, Callable[[], Any]] = {
    "a pipe": lambda: each(os.mkfifo, "thing"),
    "a socket": bound,
    "a folder": lambda: each(os.mkdir, "thing"),
    "a loop": lambda: each(os.symlink, "thing", "thing"),
    "a link to nothing": lambda: each(os.symlink, "nowhere", "thing"),
    "a link to a pipe": lambda: (each(os.mkfifo, "pipe"), each(os.symlink, "pipe", "thing")),
}
for name, make in THINGS.items():
    for words, needs in (
        ([*TRAIN, "--data", "text:thing", *OUT], ()),
        ([*TRAIN, "--data", "prepared:thing", *OUT], ()),
        ([*TRAIN, "--init", "thing", *OUT], ()),
        ([*TRAIN, "--strategy", "deepspeed:thing", *OUT], ()),
        (["prepare", "text:thing", "--tokenizer", "byte", *OUT], ()),
        (["prepare", "jsonl:thing", "--tokenizer", "byte", *OUT], ()),
        (["tokenizer", "show", "thing"], ()),
        (["infer", "thing"], ()),
        (["report", "thing"], ()),
        (["export", "run", "--results", "thing", *OUT], ("run",)),
        (["eval", "run", "--data", "text:thing"], ("run",)),
        (["audit", "thing:A"], ()),
    ):
        case(
            "things",
            f"{name} as {' '.join(words[:1] + words[-3:-1])[:40]} {len(CASES)}",
            words,
            *needs,
            before=make,
            patience=30.0,
        )
    for writer in WRITERS:
        words, needs = WRITERS[writer]
        taken = name == "a folder" and writer not in FILES
        case(
            "things",
            f"{writer} into {name}",
            [*words[:-1], "thing"],
            *needs,
            before=make,
            expected="done" if taken else "refused",
        )
for odd in (
    "ü/ö 日本",
    "a\nb",
    "\udcff",
    "x/../new",
    LONG,
    "new/" * 40 + "new",
    "-new",
    " ",
    "new.",
    "~",
    "%s{0}",
    "'\"$(x)`",
):
    for writer in ("train", "export", "prepare", "convert", "tokenizer", "eval"):
        words, needs = WRITERS[writer]
        case("names", f"{writer} into {odd[:20]!r}", [*words[:-2], f"--out={odd}"], *needs, expected="sound")


def hard() -> None:
    Path("mine").write_text("mine")
    os.link("mine", "new")


for writer in FILES:
    words, needs = WRITERS[writer]
    case(
        "names",
        f"{writer} replaces one name of two",
        words,
        *needs,
        before=hard,
        expected="done",
        after=lambda: "" if Path("mine").read_text() == "mine" else "the other name was written to",
    )

# models of others


def tensors(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[], None]:
    def run() -> None:
        from safetensors.torch import load_file, save_file

        path = "llama/model.safetensors"
        save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)

    return run


def index(text: Any) -> Callable[[], None]:
    return both(
        write("llama/model.safetensors.index.json", json.dumps(text)),
        lambda: os.rename("llama/model.safetensors", "llama/a.safetensors"),
    )


MODELS: dict[str, Callable[[], Any]] = {
    "weights are a folder": lambda: (
        each(os.unlink, "llama/model.safetensors"),
        each(os.mkdir, "llama/model.safetensors"),
    ),
    "weights are a pipe": lambda: (
        each(os.unlink, "llama/model.safetensors"),
        each(os.mkfifo, "llama/model.safetensors"),
    ),
    "weights are gone": lambda: each(os.unlink, "llama/model.safetensors"),
    "a tensor transposed": tensors(lambda held: {n: t.T if "down_proj" in n else t for n, t in held.items()}),
    "a tensor without dimensions": tensors(lambda held: {n: t.sum() if "norm" in n else t for n, t in held.items()}),
    "a tensor of complex numbers": tensors(
        lambda held: {
            n: t.to(int("1") and __import__("torch").complex64) if "norm" in n else t for n, t in held.items()
        }
    ),
    "a tensor of bytes": tensors(lambda held: {n: t.byte() if "embed" in n else t for n, t in held.items()}),
    "one NaN": tensors(lambda held: {n: t * float("nan") if "q_proj" in n else t for n, t in held.items()}),
    "a tensor too many": tensors(
        lambda held: {**held, "model.layers.7.self_attn.q_proj.weight": next(iter(held.values())).clone()}
    ),
    "no tensors": tensors(lambda held: {"x": next(iter(held.values()))}),
    "an index of nothing": index({"weight_map": {}}),
    "an index of text": index({"weight_map": "a.safetensors"}),
    "an index upwards": index({"weight_map": {"model.embed_tokens.weight": "../a.safetensors"}}),
    "generation_config is a list": write("llama/generation_config.json", "[]"),
    "special tokens are numbers": write("llama/special_tokens_map.json", '{"eos_token": 5}'),
    "the template is binary": write("llama/chat_template.jinja", b"\xff\xff"),
    "the template is a folder": lambda: each(os.mkdir, "llama/chat_template.jinja"),
    "more heads than width": edit("llama/config.json", num_attention_heads=7, head_dim=None),
    "vocabulary too small": edit("llama/config.json", vocab_size=3),
    "vocabulary too large": edit("llama/config.json", vocab_size=10**9),
    "layers without weights": edit("llama/config.json", num_hidden_layers=3),
    "another family": edit("llama/config.json", model_type="mistral", sliding_window=0),
    "rope of text": edit("llama/config.json", rope_parameters={"rope_theta": "1e4", "rope_type": "default"}),
    "a tokenizer of another": lambda: shutil.copy("bpe.json", "llama/tokenizer.json"),
}
for name, change in MODELS.items():
    for words in (
        ["infer", "llama", "--tokens", "2", "--prompt", "a"],
        ["export", "llama", *OUT],
        ["convert", "llama", "--to", "mla", "--calibrate", "1", *OUT],
        ["patch", "llama", "--mechanism", "mla", *OUT],
        ["heads", "llama", "--sequences", "2", "--no-ablation"],
    ):
        case("models", f"{words[0]}: {name}", words, "llama", "bpe.json", before=change, expected="sound")

# options twice, and options that contradict

for words in (
    [*TRAIN, "--train.steps", "5", "--train.steps", "x"],
    [*TRAIN, "--mechanism", "mha", "--model.mechanisms", "nope"],
    [*TRAIN, "--data", "prepared:nowhere", "--data.source", "shakespeare"],
    [*TRAIN, "--pack", "stream", "--data.pack", "stream"],
    [*TRAIN, "--model.options", '{"mla": {}}'],
    [*TRAIN, "--model.head-dim", "5"],
    [*TRAIN, "--train.train", "new"],
    [*TRAIN, "--teacher", "exported"],
    [*TRAIN, "--train.distill", "0.5"],
    [*TRAIN, "--model.impl", "flex"],
    [*TRAIN, "--resume=yes"],
    [*TRAIN, "--strategy", "fsdp", "--track", "nope"],
    [*TRAIN, "--seed", "1", "--seed", "-1"],
    ["heads", "quick", "--untrained", "--emergence"],
    ["heads", "run", "--checkpoint", "1", "--emergence", "--untrained"],
    ["infer", "run", "--system", "x"],
    ["infer", "run", "--chat", "--prompt", "x"],
    ["sample", "run", "--checkpoint", "3"],
    ["patch", "llama", "--mechanism", "mla"],
    ["patch", "llama", "--mechanism", "mla", "--preset", "published-msla"],
    ["patch", "llama", "--mechanism", "mla", "--layers", "0,9", *OUT],
    ["convert", "run", "--to", "mla", "--rank", "4", "--options", '{"kv_rank": 8}', *OUT],
    ["convert", "run", "--to", "mla", "--grid", "0.5", "--rank", "2.0", *OUT],
    ["convert", "run", "--to", "sliding", "--method", "svd", *OUT],
    ["compare", "quick", "--ray-address", "x", *OUT],
    ["compare", "quick", "--mechanisms", "mla", "--match", "params", "--sizes", "1x7", *OUT],
    ["compare", "quick", "--mechanisms", "mha,,mha", "--seeds", "0", *SMALL, *OUT],
    ["prepare", "text:text.txt", "--val", "text:text.txt", "--val-fraction", "0.5", *OUT],
    ["prepare", "text:text.txt", "--format", "nanogpt", "--tokenizer", "bpe.json", "--documents", "nope", *OUT],
    ["tokenizer", "show", "byte", *OUT, "--vocab-size", "0"],
    ["tokenizer", "train", "text:text.txt"],
    ["eval", "run", "--context", "16", "--stride", "17"],
    ["plan", "quick", "--mechanisms", "mha", "--gpus", "8", "--strategy", "single"],
    ["bench", "decode", "--mechanisms", "mha", "--context", "4", "--batch", "0"],
    ["audit", "mha", "--laws", "causality", "--allow", "nope"],
    ["audit", "mha", "--call", "module(x)"],
    ["audit", "mha", "--layout", "bhld"],
    ["audit", "mha", "--timeout", "-1"],
    ["heal", "exported", "--teacher", "run", *OUT],
    ["heal", "exported", "--distill", "0.5", "--steps", "1", *OUT],
    ["export", "run", "--family", "llama", *OUT],
    ["list", "--markdown", "--json", "x"],
):
    case("options", " ".join(words[:1] + words[-4:]), words, "run", "exported", "llama", "text.txt", "bpe.json")
