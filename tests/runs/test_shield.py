"""A request to stop reaches the run and not what it has started, compilers above all."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnlab.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from attnlab.runs.shield import shielded
from attnlab.training import step, train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no sessions")
ROOT = Path(__file__).parents[2]
CHILD = [sys.executable, "-c", "import os; [os.kill(os.getpid(), n) for n in (2, 15)]; print(os.getsid(0))"]


def test_children_live_in_peace_and_parents_listen() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    try:
        with shielded(), shielded():
            child = subprocess.Popen(CHILD, stdout=subprocess.PIPE, text=True)
            os.kill(os.getpid(), signal.SIGINT)
            said, _ = child.communicate(timeout=60)
            assert said == f"{child.pid}\n" and child.returncode == 0 and heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
    assert subprocess.run(CHILD, capture_output=True).returncode != 0, "only meanwhile"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM}


def test_a_run_starts_nothing_that_hears_a_request_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = []

    def asks(module: object, name: str) -> None:
        honest = getattr(module, name)

        def asking(*args: object) -> object:
            codes.append(subprocess.run(CHILD, capture_output=True).returncode)
            return honest(*args)

        monkeypatch.setattr(module, name, asking)

    asks(step.Trainer, "batch")
    asks(step, "find_device")  # the first thing that is done for a model, compilers looked for with it
    (tmp_path / "text.txt").write_text("pack my box with five dozen liquor jugs\n" * 50)
    config = RunConfig(
        data=DataConfig(source=f"text:{tmp_path}/text.txt"),
        model=ModelConfig(context=8, n_layers=1, d_model=8, n_heads=1),
        train=TrainConfig(steps=2, batch_size=2, warmup=0, eval_batches=1, device="cpu"),
    )
    train.train(config, tmp_path / "run")
    assert codes == [0, 0, 0]


PROBE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import fault_worker
from torch._inductor.cpu_vec_isa import pick_vec_isa
from attnlab.runs.shield import shielded
signal.signal(signal.SIGINT, lambda *_: print("heard"))
fault_worker.as_on_avx2()
fault_worker.at_compilation(print, {"mark": sys.argv[2], "do": "SIGINT", "to": sys.argv[3]})
if sys.argv[4] == "shielded":
    with shielded():
        print(pick_vec_isa())
else:
    print(pick_vec_isa())
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the fault is a signal to g++")
@pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="no compiler is asked for AVX2 here")
def test_an_interrupt_does_not_change_what_the_processor_can_do(tmp_path: Path) -> None:
    def asked(to: str, how: str) -> str:
        words = [sys.executable, "-c", PROBE, str(ROOT / "benchmarks"), f"{tmp_path}/{to}-{how}", to, how]
        done = subprocess.run(words, capture_output=True, text=True, start_new_session=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert asked("self", "bare") == asked("group", "shielded") == "heard\navx2\n"
    assert asked("group", "bare") == "heard\nINVALID_VEC_ISA\n", "the fault is none any more: the shield can go"
