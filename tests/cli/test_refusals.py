"""Bad words and bad files, one after the other: one sentence on stderr, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from attnlab.cli import main as cli

TINY = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context 12 --train.steps 2 --train.batch-size 2 "
    "--train.eval-every 2 --train.eval-batches 1 --train.save-every 2 --train.precision fp32 --train.device cpu"
).split()
TRAIN = ["train", "quick", *TINY, "--out", "new"]
DEEP = '{"a": ' * 3000 + "1" + "}" * 3000
LONG = '{"mha": {"dropout": ' + "7" * 4999 + "}}"


class Case(NamedTuple):
    words: list[str]
    said: str  # a part of the sentence
    needs: tuple[str, ...] = ()  # folders that are copied to where it runs
    change: Callable[[], Any] | None = None  # what is done to them


def values(start: list[str], options: dict[str, list[Any]], *needs: str) -> list[Case]:
    """A case for each wrong value of each option; the sentence names the option or its field."""
    cases = []
    for option, wrong in options.items():
        name = option.rpartition(".")[2].removeprefix("--").replace("_", "-")
        for value in wrong:
            cases.append(Case([*start, f"{option}={value}"], name, needs))
    return cases


def edited(path: str, change: Callable[[Any], Any]) -> Callable[[], None]:
    """What changes the JSON in a file."""

    def edit() -> None:
        held = json.loads(Path(path).read_text())
        changed = change(held)
        Path(path).write_text(json.dumps(held if changed is None else changed))

    return edit


def written(path: str, content: str) -> Callable[[], None]:
    return lambda: Path(path).write_text(content, "utf-8", "surrogatepass") and None


def spoilt(path: str) -> Callable[[], None]:
    return lambda: Path(path).write_bytes(b"\xff\xfe\x00\n") and None


def unfinished(metrics: str) -> Callable[[], None]:
    """What makes a run that has ended one that has not, with these records."""

    def change() -> None:
        Path("run/result.json").unlink()
        Path("run/metrics.jsonl").write_text(metrics)

    return change


NUMBERS = values(
    TRAIN,
    {
        "--train.steps": [-7, "2.5", "1e3", 3 * 10**25],
        "--train.batch-size": [0, "two"],
        "--train.accumulate": [-2, 10**11],
        "--train.lr": [-0.001, "NaN", "infinity"],
        "--train.min-lr": [-1e-9, "nan"],
        "--train.warmup": [-3, 0.5],
        "--train.decay": [-0.1, 1.01],
        "--train.weight-decay": [-0.01, "inf"],
        "--train.clip": [-0.5, "nan"],
        "--train.spike": [-2, "inf"],
        "--train.distill": [1.5, "nan"],
        "--train.keep": [-5],
        "--train.log-every": [0],
        "--train.eval-batches": [0, 10**13],
        "--data.val-fraction": [0, 1.0, -0.2, "nan"],
        "--model.vocab-size": [0, 10**14],
        "--model.context": [-4],
        "--model.n-layers": [0, 123_456_789],
        "--model.head-dim": [0, -8],
        "--model.ff-dim": [0],
        "--model.rope-theta": [0, -10_000, "inf"],
        "--model.norm-eps": [-1e-6, "nan"],
        "--model.dropout": [-0.1, 1.0, "inf"],
        "--model.experts.scale": ["nan"],
        "--model.experts.groups": [0],
        "--model.rope-scaling.factor": [0, "nan"],
        "--model.rope-scaling.sharpness": [-1, "inf"],
        "--seed": [-12, 2**63 + 5, "1.5"],
        "--peak": [0, "-inf", "nan"],
    },
)
CHOICES = values(
    TRAIN,
    {
        "--train.guard": ["halt", ""],
        "--train.precision": ["fp8"],
        "--model.ff": ["swish"],
        "--pack": ["rows"],
        "--train.device": ["npu", "cuda:7"],
    },
)
SIZES = [
    Case([*TRAIN, "--model.d-model", str(2**24)], "parameters would take"),
    Case([*TRAIN, "--model.ff-dim", str(2**31 - 1), "--model.d-model", str(2**31 - 4)], "more than PyTorch can count"),
    Case([*TRAIN, "--model.impl", "flex"], "flex"),
    Case([*TRAIN, "--train.betas", "0.9", "1.0"], "betas"),
    Case([*TRAIN, "--train.betas", "0.5"], "betas"),
]
WORDS = [
    Case(["train", "quick", "--train.stepz", "4"], "did you mean --train.steps"),
    Case(["train", "quick", "surplus"], "'surplus'"),
    Case(["train", "quick", "--out"], "--out needs a value"),
    Case(["train", "quick", "--out="], "--out is ''"),
    Case(["report"], "attnlab report needs DIR"),
    Case(["convert", "run"], "needs --to"),
    Case(["tokenizer", "learn", "x"], "expected one of train, show"),
    Case(["list", "--jsn"], "did you mean --json"),
    Case(["bench", "decode", "--context", ","], "--context"),
    Case(["train", "quick", "--strategy", "ddpp"], "'ddpp'"),
    Case(["sample", "~nobodyhere/run"], "~nobodyhere"),
    Case(["infer", "~nobodyhere/model"], "~nobodyhere"),
    Case(["tokenizer", "show", "~nobodyhere/t.json"], "~nobodyhere"),
    Case(["train", "quick", "--data", "text:~nobodyhere/x"], "~nobodyhere"),
    Case(["prepare", "text:~nobodyhere/x", "--out", "new"], "~nobodyhere"),
]
JSONS = [
    *(Case([*TRAIN, f"--model.options={text}"], "model.options") for text in ("{", "[1]", "7", DEEP, LONG)),
    Case([*TRAIN, '--model.options={"mha": {"rope_theta": NaN}}'], "rope_theta is nan"),
    Case([*TRAIN, '--model.options={"mha": {"n_heads": "two"}}'], "n_heads is 'two'"),
    Case([*TRAIN, '--model.options={"mha@5": {"bias": true}}'], "mha@5"),
    Case([*TRAIN, '--model.options={"mha": {"bias": "\\ud812"}}'], "not readable JSON"),
    Case(
        ["plan", "quick", "--mechanisms=", "--gpu", '{"memory": -3, "flops": 1, "bandwidth": 1}'], "memory of the GPU"
    ),
    Case(["plan", "quick", "--gpu", DEEP], "too deeply"),
    Case(["patch", "gpt2", "--mechanism", "mla", "--dry-run", "--options", DEEP], "too deeply"),
]
OTHERS = [
    *values(["sample", "run"], {"--tokens": [0, -3, 10**11], "--temperature": [-1, "inf"], "--top-k": [0]}, "run"),
    *values(["infer", "run"], {"--top-p": [0, 1.2, "nan"], "--seed": [-4], "--checkpoint": [-2, 77]}, "run"),
    *values(["eval", "run"], {"--context": [0], "--stride": [-2, "far"], "--batch-size": [0]}, "run"),
    *values(["heads", "run"], {"--sequences": [0, -1], "--seed": [-9], "--segments": ["", "0", "4,x"]}, "run"),
    *values(["convert", "run", "--to", "mla", "--out", "new"], {"--calibrate": [0], "--seed": [-1, 2**70]}, "run"),
    *values(["convert", "run", "--to", "mla", "--out", "new"], {"--grid": ["", ","], "--rank": ["nan", "half"]}, "run"),
    *values(["heal", "run", "--out", "new"], {"--lr": [0, "nan"], "--warmup": [-4], "--eval-every": [0]}, "run"),
    *values(["compare", "quick", *TINY, "--out", "new"], {"--seeds": [0, 10**7], "--threads": [0, 10**9]}),
    *values(["bench", "decode"], {"--repeats": [0], "--batch": [-1], "--seed": [-2]}),
    *values(["plan", "quick", "--mechanisms="], {"--gpus": [0], "--mfu": [0, 1.5, "nan"], "--tokens": [-5, "inf"]}),
    *values(["prepare", "shakespeare-char", "--out", "new"], {"--tokens": ["0", "-2k", "nan", "5T"], "--workers": [0]}),
    *values(["prepare", "shakespeare-char", "--out", "new"], {"--val-fraction": [0, 1], "--shard-tokens": ["inf"]}),
    *values(["status", "run"], {"--after": [0, "nan"]}, "run"),
    Case(["eval", "run", "--out", "nowhere/e.json"], "nowhere", ("run",)),
    Case(["sample", "run", "--prompt="], "prompt 1 is empty", ("run",)),
    Case(["sample", "run", "--prompt=\udc80"], "--prompt", ("run",)),
]
RUN = "run/run.json"
MODEL = "exported/config.json"
FILES = [
    *(
        Case(["sample", "run"], said, ("run",), change)
        for said, change in (
            ("run.json", written(RUN, DEEP)),
            ("run.json", written(RUN, '{"format": ' + "3" * 4800 + "}")),
            ("n_layers is 2.5", edited(RUN, lambda about: about["config"]["model"].update(n_layers=2.5))),
            ("mechanisms", edited(RUN, lambda about: about["config"]["model"].update(mechanisms="mla"))),
            ("rope_scaling", edited(RUN, lambda about: about["config"]["model"].update(rope_scaling=[]))),
            ("config", edited(RUN, lambda about: about.update(config=None))),
            ("fingerprint", edited(RUN, lambda about: about.update(data={"vocab_size": 65}))),
            ("tokenizer.json", written("run/tokenizer.json", "[3]")),
            ("ascending", written("run/tokenizer.json", '{"kind": "char", "chars": "zya"}')),
            ("result.json", written("run/result.json", '{"name": "x", "seed": "one"}')),
        )
    ),
    *(
        Case([*TRAIN[:-1], "run", "--resume"], said, ("run",), change)
        for said, change in (
            ("lacks step", unfinished('{"loss": 2.5}\n')),
            ("metrics.jsonl", unfinished("\0" * 512 + "\n")),
            ("result.json", written("run/result.json", '"done"')),
            ("result.json", written("run/result.json", "null")),
        )
    ),
    *(
        Case(["infer", "exported", "--tokens", "2"], said, ("exported",), change)
        for said, change in (
            ("config.json", written(MODEL, "3")),
            ("experts", edited(MODEL, lambda held: held["attnlab"].update(experts=4))),
            ("vocab_size", edited(MODEL, lambda held: held.update(vocab_size=1.5))),
            ("eos_token_id", edited(MODEL, lambda held: held.update(eos_token_id="end"))),
            ("model", written("exported/tokenizer.json", '{"model": {"type": "BPE", "vocab": 9}}')),
            ("vocabulary", written("exported/tokenizer.json", '{"model": {"type": "BPE", "vocab": {}}}')),
            ("tokenizer_config.json", written("exported/tokenizer_config.json", "[]")),
        )
    ),
    Case(
        ["heal", "exported", "--out", "new"],
        "certificate.json",
        ("exported",),
        written("exported/certificate.json", "4"),
    ),
    Case(
        ["heal", "exported", "--out", "new"],
        "loss_before",
        ("exported",),
        written("exported/certificate.json", '{"loss_before": "low"}'),
    ),
    Case(["export", "run", "--out", "new", "--results", "r.json"], "r.json", ("run",), written("r.json", '["loss"]')),
    Case(["report", "."], "compare.json", (), written("compare.json", "\x01")),
]
DAMAGED = [  # kinds that a search for calls that cannot work has found
    Case([*TRAIN, "--track", ","], "--track is ','"),
    Case(["compare", "quick", *TINY, "--sizes", ",", "--out", "new"], "--sizes is ','"),
    Case(["train", "", "--out", "new"], "unknown preset ''"),
    Case([*TRAIN, "--data", "0.5*shakespeare"], "a mixture of one"),
    Case([*TRAIN, "--data.tokenizer="], "data.tokenizer"),
    Case(["convert", "run", "--to", "mla", "--rank", "1.5", "--out", "new"], "rank 1.5 is no share", ("run",)),
    Case(["heal", "exported", "--teacher", "run", "--out", "new"], "--teacher run teaches nothing", ("exported",)),
    Case(["tokenizer", "train", "shakespeare", "--out", "/proc/new"], "takes no new files"),
    Case(["export", "run", "--out", "/proc/new"], "/proc takes no new files", ("run",)),
    Case(["audit", "torch.nn:Linear", "--call", "x"], "calls nothing that could be judged"),
    Case(["audit", "mla", "--step", "module(x)"], "--step is for modules"),
    Case(["audit", "gqa", "--layout", "bhtd"], "--layout is for modules"),
    Case(["audit", "mla", "--call", "module(x)"], "--call is for modules"),
    Case([*TRAIN, "--mechanism", "mha", "--model.mechanisms", "mla"], "set the same field"),
    Case([*TRAIN, "--data=shakespeare-char", "--data.source=a"], "set the same field"),
    Case(
        ["convert", "run", "--to", "mla", "--grid", "0.5", "--rank", "4", "--out", "new"], "leave out --rank", ("run",)
    ),
    Case(["infer", "c.pt"], "c.pt", (), written("c.pt", "hello")),
    Case(["prepare", "shakespeare-char", "--tokenizer=", "--out", "new"], "--tokenizer is ''"),
    Case(["heads", "run", "--png", "run"], "run exists already", ("run",)),
    Case(["infer", "exported"], "chat_template.jinja", ("exported",), spoilt("exported/chat_template.jinja")),
    Case([*TRAIN[:-1], "run", "--resume"], "metrics.jsonl", ("run",), spoilt("run/metrics.jsonl")),
    Case([*TRAIN, "--train.batch-size", "900000", "--model.d-model", "512"], "would take"),
]
CASES = [*DAMAGED, *NUMBERS, *CHOICES, *SIZES, *WORDS, *JSONS, *OTHERS, *FILES]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run, and the model that was exported from it."""
    folder = tmp_path_factory.mktemp("base")
    run, exported = str(folder / "run"), str(folder / "exported")
    assert cli.main([*TRAIN[:-1], run]) == 0
    assert cli.main(["export", run, "--out", exported]) == 0
    return folder


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder, with its mode and its size."""
    found = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (state.st_mode, state.st_size if path_is_file(folder / name) else 0) for name, state in found.items()}


def path_is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def named(case: Case) -> str:
    words = [word for word in case.words if word not in TINY]
    return " ".join([*words, case.said])[:120].encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("case", CASES, ids=named)
def test_refused_in_one_sentence_and_nothing_left(
    case: Case, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in case.needs:
        shutil.copytree(base / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if case.change is not None:
        case.change()
    before = tree(tmp_path)
    capsys.readouterr()
    code = cli.main(case.words)
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said.err
    assert said.err.startswith("attnlab: ") and said.err.count("\n") == 1, said.err
    assert case.said in said.err or case.said.replace("-", "_") in said.err, said.err
    assert "--debug" not in said.err and "╭" not in said.err
    assert tree(tmp_path) == before, "nothing half-written"
    assert os.environ.get("COLUMNS") != "10000"


def test_there_are_enough() -> None:
    assert len(CASES) >= 150
