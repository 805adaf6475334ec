"""The command line: what it prints, what it refuses, and how."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from attnlab import __version__, attention, presets
from attnlab.cli import COMMANDS, demo, options
from attnlab.cli import main as cli
from attnlab.errors import UserError
from attnlab.files import read_json, write_json
from attnlab.results import BenchRecord, RunResult
from attnlab.runs import folder as run_folder
from attnlab.runs.heartbeat import FOLDER as HEARTBEATS
from attnlab.runs.heartbeat import Heartbeat
from attnlab.spec import consecutive

Run = Callable[..., tuple[int, str, str]]

TINY = {
    "--model.n-layers": "1",
    "--model.d-model": "16",
    "--model.n-heads": "2",
    "--model.context": "16",
    "--train.steps": "4",
    "--train.batch-size": "2",
    "--train.eval-every": "2",
    "--train.eval-batches": "1",
    "--train.save-every": "2",
    "--train.precision": "fp32",
}
SMALL = [word for pair in TINY.items() for word in pair]


@pytest.fixture
def run(audited_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["attnlab", *words])
        capsys.readouterr()
        code = cli.main()
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder, to be read or copied."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "quick", "--mechanism", "mla", *SMALL, "--out", str(out)]) == 0
    return out


def refused(said: tuple[int, str, str], *words: str) -> str:
    """The sentence of a refusal: one line on stderr, nothing on stdout, exit code 2."""
    code, out, err = said
    assert (code, out) == (2, ""), err
    assert err.startswith("attnlab: ") and err.count("\n") == 1 and "Traceback" not in err, err
    for word in words:
        assert word in err
    return err


def test_help_shows_every_command_and_fits(run: Run) -> None:
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = run(*words)
        assert code == 0
        assert all(f"  {verb} " in out for verb in COMMANDS)
    assert run("--version")[:2] == (0, f"attnlab {__version__}\n")


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_explains_itself(verb: str, run: Run) -> None:
    code, out, _ = run(verb, "--help")
    assert code == 0
    first = (COMMANDS[verb].__doc__ or "").splitlines()[0]
    assert " ".join(first.split()) in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], ["'trian'", "did you mean 'train'?"]),
        (["--jobs", "2", "train"], ["--jobs", "before any command"]),
        (["train"], ["needs a preset", "shakespeare-cpu"]),
        (["train", "quik"], ["'quik'", "did you mean 'quick'?"]),
        (["compare", "quik"], ["'quik'", "did you mean 'quick'?"]),
        (["bench", "decode", "--preset", "quik"], ["'quik'", "did you mean 'quick'?"]),
        (["compare", "--seeds", "2", "shakespeare-cpu"], ["shakespeare-cpu", "right after"]),
        (["train", "quick", "--mechanism", "mlaa"], ["'mlaa'", "did you mean 'mla'?"]),
        (["train", "quick", "--mechanism", "sliding,mal"], ["'mal'"]),
        (["compare", "quick", "--mechanisms", "mha,mal"], ["'mal'"]),
        (["compare", "quick", "--mechanisms", ","], ["at least one"]),
        (["compare", "quick", "--seeds", "0"], ["seeds"]),
        (["compare", "quick", "--tasks", "mqar,neddle"], ["'neddle'", "did you mean 'needle'?"]),
        (["compare", "quick", "--engine", "slrm"], ["'slrm'", "did you mean 'slurm'?"]),
        (["compare", "quick", "--slurm.partition", "gpu"], ["options of slurm", "add --engine slurm"]),
        (["compare", "quick", "--engine", "slurm", "--ray-address", "auto"], ["options of ray", "add --engine ray"]),
        (["compare", "quick", "--engine", "slurm", "--slurm.time", "soon"], ["'soon'", "4:00:00"]),
        (["compare", "quick", "--sizes", "2x64,large"], ["'large'", "LAYERSxWIDTH"]),
        (["compare", "quick", "--sizes", "2x40"], ["2x40", "multiple of 16"]),
        (["compare", "quick", "--jobs", "0"], ["jobs is 0"]),
        (["compare", "quick", "--gpus", "1"], ["--gpus", "ray and slurm"]),
        (["train", "quick", "--data", "task:mqa"], ["'mqa'", "did you mean 'mqar'?"]),
        (["bench", "decode", "--mechanisms", "mal"], ["'mal'"]),
        (["bench", "decode", "--options", '{"mla": {"kv_rnk": 3}}'], ["did you mean 'kv_rank'?"]),
        (["compare", "--options", '{"mla": {"kv_rnk": 3}}'], ["did you mean 'kv_rank'?"]),
        (["bench", "decode", "--context", "12,many"], ["--context", "'many'"]),
        (["audit", "mal"], ["'mal'", "file.py:Class"]),
        (["audit", "mha", "--laws", "causalty"], ["'causalty'", "did you mean 'causality'?"]),
        (["audit", "mla", "--config", '{"kv_rnk": 3}'], ["'kv_rnk'", "did you mean 'kv_rank'?"]),
        (["audit", "mla", "--kwargs", "{"], ["--kwargs", "JSON"]),
        (["audit", "nowhere.py:Class"], ["nowhere.py"]),
        (["train", "quick", "--train.steps", "0"], ["train.steps is 0", "at least 1"]),
        (["train", "quick", "--model.n-heads", "3"], ["128", "3"]),
        (["train", "quick", "--mechanism", "gqa", "--model.options", '{"gqa": {"n_kv_heads": 3}}'], ["n_kv_heads 3"]),
        (["train", "quick", "--mechanism", "mla", "--model.options", '{"mla": {"kv_rnk": 3}}'], ["did you mean"]),
        (["train", "quick", "--model.options", '{"mla": {}}'], ["mla", "no layer uses"]),
        (["train", "quick", "--model.options", '{"mla": 3}'], ["whose options"]),
        (["train", "quick", "--mechanism", "msla", "--model.options", '{"msla": {"top_k": 4096}}'], ["4096", "64"]),
        (["train", "quick", "--model.impl", "cuda"], ["impl", "'cuda'"]),
        (["train", "quick", "--train.device", "tpu"], ["'tpu'", "cpu"]),
        (["train", "quick", "--data", "text:nowhere.txt"], ["nowhere.txt", "does not exist"]),
        (["train", "quick", "--data", "shakespear"], ["shakespear", "text:PATH"]),
        (["train", "quick", "--data", "text:empty.txt"], ["empty"]),
        (["train", "quick", "--data", "text:latin.txt"], ["latin.txt", "UTF-8"]),
        (["train", "quick", "--data", "text:short.txt"], ["short.txt", "64"]),
        (["train", "quick", "--data", "0.5*shakespeare+0.5*text:short.txt"], ["short.txt", "different tokenizers"]),
        (["train", "quick", "--data", "prepared:nowhere"], ["nowhere", "not a prepared corpus"]),
        (["sample", "nowhere"], ["nowhere", "not a run folder"]),
        (["report", "nowhere"], ["nowhere"]),
        (["report", "."], ["holds no results"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_refused_in_one_sentence(words: list[str], said: list[str], run: Run, tmp_path: Path) -> None:
    texts = {"empty.txt": b"", "latin.txt": "café ".encode("latin-1") * 100, "short.txt": b"too short for a window"}
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
    refused(run(*words), *said)
    assert {file.name for file in tmp_path.iterdir()} == set(texts), "nothing half-written"


def test_a_misspelt_option_is_refused_with_a_suggestion(run: Run, tmp_path: Path) -> None:
    code, out, err = run("train", "quick", "--train.step", "3")
    assert (code, out) == (2, "")
    assert "--train.step" in err and "--train.steps" in err and "Traceback" not in err
    code, _, err = run("train", "quick", "--train.steps", "many")
    assert code == 2 and "--train.steps" in err and "Traceback" not in err
    assert not [*tmp_path.iterdir()]


def test_train_then_sample_then_resume(run: Run) -> None:
    train = ["train", "quick", "--mechanism", "sliding,mla", *SMALL, "--seed", "3", "--out", "runs/one"]
    code, out, err = run(*train)
    assert code == 0, err
    assert "val loss" in out and "runs/one" in out
    about = json.loads(Path("runs/one/run.json").read_text())
    assert about["config"]["model"]["mechanisms"] == ["sliding", "mla"]
    assert about["config"]["seed"] == 3
    refused(run(*train), "already holds this run", "--resume")
    assert run(*train, "--resume")[0] == 0
    refused(run(*train, "--resume", "--seed", "4"), "another run", "seed")


def test_short_options_and_the_fields_they_stand_for() -> None:
    config = presets.get("nanogpt-mla-124m")
    chosen = options.with_choices(config, "sliding,sliding,mla", "text:x")
    assert chosen.model.mechanisms == ("sliding", "sliding", "mla")
    assert chosen.model.options == config.model.options
    assert chosen.data.source == "text:x"
    assert options.with_choices(config, "mha", None).model.options == {}, (
        "options of a mechanism that is gone go with it"
    )
    assert options.with_choices(config, None, None) == config
    packed = options.with_choices(config, None, "text:x", "documents").data
    assert (packed.source, packed.pack) == ("text:x", "documents")


def test_sample_streams_what_it_reports(run: Run, trained: Path) -> None:
    words = ["sample", str(trained), "--prompt", "ROMEO:", "--tokens", "13", "--seed", "5", "--temperature", "0.7"]
    code, text, err = run(*words)
    assert code == 0
    assert "tokens/s" in err and "bytes" in err and "mla" in err
    code, found, _ = run(*words, "--json")
    whole = json.loads(found)
    assert text == f"ROMEO:{whole['texts'][0]}\n"
    assert len(whole["texts"][0]) == whole["tokens"] == 13
    code, both, _ = run(*words, "--prompt", "ACT", "--top-k", "5", "--top-p", "0.9")
    assert code == 0 and both.startswith("ROMEO:") and "\nACT" in both
    assert run(*words, "--top-k", "1")[1] == run(*words, "--temperature", "0")[1]
    refused(run(*words, "--prompt", "日"), "日")
    refused(run("sample", str(trained), "--tokens", "3", "--top-p", "2"), "--top-p is 2")
    refused(run("sample", str(trained), "--checkpoint", "3"), "no checkpoint of step 3", "4")


def test_a_damaged_run_is_refused(run: Run, trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    about = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(about | {"format": 99}))
    refused(run("sample", str(other)), "format 99")
    (other / "run.json").write_text('{"format": ')
    refused(run("sample", str(other)), "run.json")
    shutil.rmtree(other)
    shutil.copytree(trained, other)
    for weights in other.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-50])
    refused(run("sample", str(other)), "model.safetensors", "damaged")


def test_a_full_disk_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(run("train", "quick", *SMALL, "--out", "full"), "full", "free space")
    left = [file for file in (tmp_path / "full").rglob("*") if file.is_file()]
    assert not left, "nothing half-written"


def test_ctrl_c_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnlab.training import train

    def interrupted(*args: object, **kwargs: object) -> None:
        raise train.Stopped("stopped after step 7; the run is saved in here")

    monkeypatch.setattr(train, "train", interrupted)
    code, out, err = run("train", "quick", "--out", "here")
    assert (code, out) == (0, "")
    assert "stopped after step 7" in err and "--resume" in err and "Traceback" not in err


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="quik"):
        cli.main(["train", "quik", "--debug"])
    monkeypatch.setenv("ATTNLAB_DEBUG", "1")
    with pytest.raises(UserError, match="quik"):
        cli.main(["train", "quik"])
    monkeypatch.setenv("ATTNLAB_DEBUG", "0")
    assert cli.main(["train", "quik"]) == 2


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "attnlab", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_list_shows_every_mechanism_and_fits(run: Run) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    code, found, _ = run("list", "--json")
    records = {r["name"]: r for r in json.loads(found)}
    assert code == 0 and [*records] == attention.names()
    for name, record in records.items():
        config = attention.config(name, d_model=768, n_heads=12, head_dim=64)
        assert name in out
        assert record["floats_at_context"] == sum(each.cache_spec.floats(1024) for each in consecutive(config, 2)) / 2
        assert record["impls"] == [*config.impls] and record["breaks"] == [*config.breaks]
        assert all(record[key] for key in ("summary", "formula", "source", "caches"))
    assert records["mha"]["parameters"] == 4 * 768 * 768
    assert records["mha"]["floats_per_token"] == 2 * 12 * 64
    assert records["mla"]["options"]["kv_rank"] == 256


def test_a_mechanism_that_cannot_be_imported_is_listed_with_its_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torn.py").write_text("import a_package_that_is_not_there")
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])
    attention._own.cache_clear()
    try:
        code, out, _ = run("list")
        assert code == 0
        assert "torn" in out and "a_package_that_is_not_there" in " ".join(out.split())
    finally:
        attention._own.cache_clear()


def test_audit_exit_codes(run: Run) -> None:
    code, out, _ = run("audit", "mqa", "--laws", "causality,mixing")
    assert code == 0 and "obeys all 2 laws" in out
    code, found, _ = run("audit", "latent_lookup", "--laws", "causality,mixing", "--json")
    assert code == 1 and "latent_lookup breaks 1 of 2 laws: mixing" in found
    assert [law["status"] for law in json.loads(found)["laws"]] == ["holds", "broken"]


def test_options_of_mechanisms_reach_them(run: Run) -> None:
    about = ["train", "quick", *SMALL, "--mechanism=gqa", "--model.options", '{"gqa": {"n_kv_heads": 2}}', "--out", "x"]
    assert run(*about)[0] == 0
    assert json.loads(Path("x/run.json").read_text())["config"]["model"]["options"] == {"gqa": {"n_kv_heads": 2}}
    shape = ["--model.n-layers", "1", "--context", "9", "--repeats", "1", "--mechanisms", "mla", "--json"]
    small, large = (
        json.loads(
            run("bench", "decode", *shape, "--options", f'{{"mla": {{"kv_rank": {rank}, "mode": "absorbed"}}}}')[1]
        )
        for rank in (8, 24)
    )
    assert [r["cache_bytes"] for r in large] > [r["cache_bytes"] for r in small]


def test_bench_records(run: Run) -> None:
    shape = ["--model.n-layers", "1", "--model.d-model", "16", "--model.n-heads", "2"]
    words = ["bench", "decode", "--mechanisms", "mha,mla", "--context", "9,12", "--repeats", "1", *shape]
    code, found, _ = run(*words, "--json")
    records = [BenchRecord.from_dict(r) for r in json.loads(found)]
    assert code == 0
    assert {r.mechanism for r in records} == {"mha", "mla"} and {r.context for r in records} == {9, 12}
    assert not any(r.error for r in records)
    code, out, _ = run(*words)
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_tasks_are_columns_of_the_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnlab.comparison import extras
    from attnlab.evaluation import exam

    for name in ("mqar", "needle"):
        whole = presets.get(name)
        model = replace(whole.model, n_layers=1, d_model=16, context=32)
        train = replace(whole.train, steps=2, batch_size=2, eval_every=2, eval_batches=1)
        monkeypatch.setitem(presets._PRESETS, name, functools.partial(replace, whole, model=model, train=train))
    monkeypatch.setattr(exam, "SEQUENCES", 16)
    monkeypatch.setattr(extras, "check_mechanism", functools.partial(extras.check_mechanism, laws=["mixing"]))
    words = ["compare", "quick", *SMALL, "--mechanisms", "mha,mqa", "--seeds", "1", "--jobs", "1"]
    code, out, err = run(*words, "--tasks", "mqar,needle", "--out", "c")
    assert code == 0, err
    header = next(line for line in out.splitlines() if line.startswith("accuracy, %"))
    assert header.split()[2:] == ["mqar", "needle"] and max(map(len, out.splitlines())) <= 80
    code, out, _ = run(*words, "--tasks", "needle", "--out", "c", "--json")
    assert code == 0
    (task,) = json.loads(out)["tasks"]
    assert [cell["mechanism"] for cell in task["cells"]] == ["mha", "mqa"] and task["task"] == "needle"


def test_a_dry_run_of_a_sweep_trains_nothing(run: Run) -> None:
    words = ["compare", "quick", *SMALL, "--mechanisms", "mha,mqa", "--seeds", "2", "--sizes", "1x16,2x32"]
    slurm = ["--engine", "slurm", "--slurm.partition", "gpu", "--slurm.sbatch", "mem=32G", "exclusive"]
    code, out, err = run(*words, "--dry-run", "--out", "c", *slurm)
    assert code == 0, err
    assert "8 of 8 runs" in out and {"#SBATCH --partition=gpu", "#SBATCH --mem=32G", "#SBATCH --exclusive"} <= set(
        out.splitlines()
    )
    assert "mqa s1 2x32: " in out and not Path("c").exists()


def test_demo_ends_with_a_report_and_repeats_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    from attnlab.comparison import extras

    quick = presets.get("quick")
    small = replace(
        quick,
        model=replace(quick.model, n_layers=1, d_model=16, n_heads=2, context=16),
        train=replace(quick.train, steps=4, batch_size=2, eval_every=2, eval_batches=1, precision="fp32"),
    )
    monkeypatch.setattr(presets, "get", lambda name: small)
    monkeypatch.setattr(demo, "COMPARED", ("mha", "latent_lookup"))
    monkeypatch.setattr(demo, "DEMO_BENCH", {"decode": (8,)})
    monkeypatch.setattr(demo, "DEMO_STEPS", 4)
    monkeypatch.setattr(extras, "check_mechanism", functools.partial(extras.check_mechanism, laws=["mixing"]))

    code, out, err = run("demo", "--out", "shown", "--jobs", "1")
    assert code == 0, err
    assert any(word in out for word in ("undecided", "equal within 0.01", "better", "worse"))
    assert out.rstrip().endswith("report: shown/report.html")
    page, times = Path("shown/report.html"), {f: f.stat().st_mtime_ns for f in Path("shown").rglob("*.json")}
    assert page.stat().st_size > 1000
    assert {"compare.json", "laws.json", "bench.json", "samples.json"} <= {f.name for f in times}
    code, _, err = run("demo", "--out", "shown", "--jobs", "1")
    assert code == 0 and "finished before" in err
    changed = {f.name for f, time in times.items() if f.stat().st_mtime_ns != time}
    assert changed <= {"compare.json"}, "what is finished is kept"


def test_the_checkpoint_of_a_run_opens_without_the_command_line(trained: Path) -> None:
    model, config = run_folder.load_model(trained)
    assert config.mechanism == "mla"
    assert not model.training


def state(folder: Path, **fields: object) -> None:
    """Change what result.json says."""
    write_json(folder / "result.json", read_json(folder / "result.json") | fields)


def heard(folder: Path, rank: int, ranks: int, step: int, ago: float = 0.0) -> None:
    Heartbeat(folder, rank, ranks).beat(step)
    path = folder / HEARTBEATS / f"rank-{rank:05d}.json"
    write_json(path, read_json(path) | {"time": time.time() - ago})


@pytest.fixture
def going(trained: Path, tmp_path: Path) -> Path:
    """A run that has not ended, by three processes: one is heard, one fell silent, and one was never heard."""
    folder = shutil.copytree(trained, tmp_path / "going")
    (folder / "result.json").unlink()
    heard(folder, 0, 3, step=3)
    heard(folder, 2, 3, step=2, ago=90)
    return folder


def test_the_status_of_a_finished_run(run: Run, trained: Path) -> None:
    code, out, err = run("status", str(trained))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "quick, mla: done" and lines[1] == "step 4 of 4, newest checkpoint 4"
    found = RunResult.from_dict(read_json(trained / "result.json"))
    assert lines[2] == f"loss {found.train_loss:.4f}, val loss {found.val_loss:.4f}"
    assert lines[-1].split()[0] == "0" and str(os.getpid()) in lines[-1]
    code, out, _ = run("status", str(trained), "--after", "1e-9")
    assert code == 0 and out.rstrip().endswith("s ago"), "its processes have ended, and are not missed"


def test_the_status_of_a_run_names_the_ranks_that_are_silent(run: Run, going: Path) -> None:
    code, out, _ = run("status", str(going), "--json")
    found = json.loads(out)
    assert code == 1 and found["status"] == "running" and (found["step"], found["steps"]) == (3, 4)
    assert [(rank["rank"], rank["step"], rank["silent"]) for rank in found["ranks"]] == [
        (0, 3, False),
        (1, None, True),
        (2, 2, True),
    ]
    assert found["ranks"][0]["pid"] == os.getpid() and found["ranks"][0]["host"] and found["ranks"][1]["pid"] is None
    assert 0 <= found["ranks"][0]["seconds"] < 60 and 90 <= found["ranks"][2]["seconds"] < 150
    code, out, _ = run("status", str(going))
    silent, never, last = out.splitlines()[-3:]
    assert code == 1 and "s ago" in silent and never.split() == ["1", "never"] and last.endswith("no sign of life")
    heard(going, 1, 3, step=3)
    assert run("status", str(going))[0] == 1
    assert run("status", str(going), "--after", "200")[0] == 0


def test_a_run_whose_ranks_are_all_silent_shows_no_sign_of_life(run: Run, going: Path) -> None:
    heard(going, 0, 3, step=3, ago=90)
    code, out, _ = run("status", str(going))
    assert code == 1 and out.startswith("quick, mla: no sign of life\n")
    shutil.rmtree(going / HEARTBEATS)
    code, out, _ = run("status", str(going), "--json")
    found = json.loads(out)
    assert code == 1 and found["status"] == "no sign of life" and [rank["rank"] for rank in found["ranks"]] == [0]
    assert found["step"] == 4 == found["checkpoint"], "without heartbeats, what was written counts"


def test_the_status_of_a_run_that_ended_too_early(run: Run, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "early")
    state(folder, status="failed", error="the loss is nan", steps=2)
    heard(folder, 0, 1, step=2)
    code, out, _ = run("status", str(folder))
    assert code == 0 and out.startswith("quick, mla: failed (the loss is nan)\nstep 2 of 4")
    heard(folder, 0, 1, step=2, ago=90)
    assert run("status", str(folder))[0] == 1
    state(folder, status="interrupted", error="")
    assert run("status", str(folder))[1].startswith("quick, mla: interrupted\n")
    later = (folder / "result.json").stat().st_mtime + 1
    os.utime(folder / "metrics.jsonl", (later, later))  # it was resumed
    heard(folder, 0, 1, step=3)
    assert run("status", str(folder))[:2][0] == 0 and "quick, mla: running" in run("status", str(folder))[1]


def test_the_status_of_no_run_is_refused(run: Run, tmp_path: Path) -> None:
    refused(run("status", "nowhere"), "nowhere does not exist, so it is not a run folder")
    refused(run("status", str(tmp_path)), "has no run.json")
    refused(run("status", str(tmp_path), "--after", "0"), "--after is 0.0")
    refused(run("status", str(tmp_path), "--after", "nan"), "--after is nan")
