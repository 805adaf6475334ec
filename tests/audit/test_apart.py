"""The code that is judged runs in a process of its own: it can neither end the audit, nor hold it, nor print to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from attnlab.audit.apart import audit_apart
from attnlab.cli.main import main
from attnlab.errors import UserError

GPT = Path(__file__).parents[1] / "foreign" / "gpt_style.py"
MODULE = """
import os, sys, time, torch
print("imported")
class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.d_model = 8
        self.inner = torch.nn.Linear(8, 8)
    def forward(self, x):
        {does}
        return self.inner(x).cumsum(1)
"""


def written(folder: Path, does: str) -> str:
    file = folder / "layer.py"
    file.write_text(MODULE.format(does=does))
    return str(file)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("os._exit(0)", r"layer.py ended the process that judged it \(exit code 0\): a module must not do that"),
        ("os.kill(os.getpid(), 11)", r"ended the process that judged it \(signal 11\)"),
        ("sys.exit()", r"Attention cannot be called on x of shape \[2, T, 8\]: RuntimeError: SystemExit: None"),
    ],
)
def test_a_module_that_ends_the_process_gets_no_verdict(tmp_path, does, message):
    with pytest.raises(UserError, match=message) as caught:
        audit_apart(written(tmp_path, does), seconds=300, laws=["causality"])
    assert "\n" not in str(caught.value)


def test_a_module_that_never_ends_is_stopped(tmp_path):
    with pytest.raises(UserError, match=r"the audit of .*layer.py took longer than 8 s: give more --timeout, or fewer"):
        audit_apart(written(tmp_path, "time.sleep(1000)"), seconds=8)


def test_an_exit_in_one_mode_only_is_a_finding(tmp_path, capfd):
    target = written(tmp_path, "print(x.sum()); self.training and sys.exit(0)")
    assert main(["audit", target, "--laws", "modes,causality", "--json"]) == 1
    captured = capfd.readouterr()
    data = json.loads(captured.out)
    assert [law["status"] for law in data["laws"]] == ["broken", "holds"]
    assert "in training mode it stops with RuntimeError: SystemExit: 0 (" in data["laws"][0]["detail"]


def test_where_no_law_applies_the_exit_code_is_not_zero(capsys):
    words = ["audit", f"{GPT}:Plain", "--kwargs", '{"size": 8}', "--call", "module(x, mask)", "--laws", "chunks"]
    assert main(words) == 2
    assert "Plain: no law applies" in capsys.readouterr().out


def test_a_function_with_its_step_and_what_is_allowed(capsys):
    target = f"{GPT}:attends"
    assert main(["audit", target, "--laws", "chunks,causality", "--step", "function(q, k, v)", "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert data["notes"][0] == "called as function(q, k, v), q, k, v [B T H D] by projections of x"
    assert data["verdict"] == "attends breaks 1 of 2 laws: chunks (tried up to 1025 tokens)"
    step = "function(q, k, v, causal=start == 0)"
    assert main(["audit", target, "--laws", "chunks", "--step", step, "--allow", "chunks"]) == 0
    assert "allowed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--timeout", "0"], "--timeout is 0.0: it must be above 0"),
        (["--timeout", "nan"], "--timeout is nan: it must be a finite number, above 0"),
        (["--d-model", "0"], "--d-model is 0: it must be at least 1"),
        (["--allow", "prefx"], "unknown law 'prefx'"),
        (["--step", "module(x"], "--step 'module(x' is not a Python expression"),
    ],
)
def test_bad_input_is_one_sentence(capsys, words, message):
    assert main(["audit", f"{GPT}:CausalSelfAttention", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_process_that_does_not_start_is_not_the_modules_fault(tmp_path, monkeypatch):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('another torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(UserError, match=r"the process that should judge mqa did not start \(exit code 1\): see what"):
        audit_apart("mqa", seconds=300)
