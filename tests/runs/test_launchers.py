"""The command line under every launcher that starts several processes, and on two nodes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnlab import files
from attnlab.cli import main as cli
from attnlab.runs.folder import RunFolder

BIN = Path(sys.executable).parent
TRAIN = [
    *("train", "quick", "--train.steps", "12", "--train.eval-every", "12", "--train.eval-batches", "1"),
    *("--train.log-every", "4", "--train.precision", "fp32", "--model.n-layers", "1", "--train.device", "cpu"),
]
QUIET = {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> float:
    """What one process makes of it."""
    home = tmp_path_factory.mktemp("alone")
    assert cli.main([*TRAIN, "--out", str(home / "run")]) == 0
    return loss(home / "run")


def loss(run: Path) -> float:
    result = RunFolder.open(run).result()
    assert result is not None and result.status == "done" and result.val_loss is not None
    return result.val_loss


LAUNCHERS = {
    "torchrun": ([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], "-m", "fsdp"),
    "accelerate": (
        [
            *(str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
            *("--mixed_precision=no", "--dynamo_backend=no"),
        ],
        "-m",
        "auto",
    ),
    "deepspeed": ([str(BIN / "deepspeed"), "--num_gpus=2", "--module"], None, "deepspeed"),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_trains_the_same_model(launcher: str, alone: float, tmp_path: Path) -> None:
    words, flag, strategy = LAUNCHERS[launcher]
    port = {"MASTER_PORT": str(free_port())}
    words = [*words, f"--master_port={port['MASTER_PORT']}"] if launcher == "deepspeed" else words
    words = [*words, f"--main_process_port={port['MASTER_PORT']}"] if launcher == "accelerate" else words
    command = [*words, *([flag] if flag else []), "attnlab", *TRAIN, "--strategy", strategy, "--out", "run"]
    env = os.environ | QUIET | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("val loss") == 1, "one process speaks"
    assert loss(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    result = RunFolder.open(tmp_path / "run").result()
    assert result is not None and result.processes == 2
    assert result.strategy.startswith("ddp" if strategy == "auto" else strategy)


def test_one_process_says_what_is_wrong(tmp_path: Path) -> None:
    command = [*LAUNCHERS["torchrun"][0], "-m", "attnlab", *TRAIN, "--train.batch-size", "5", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | QUIET, capture_output=True, text=True, timeout=600)
    said = [line for line in done.stderr.splitlines() if line.startswith("attnlab,")]
    assert done.returncode and len(said) == 1
    assert "5 sequences a step" in said[0] and "among 2 processes" in said[0] and "process 0 of 2" in said[0]
    assert not (tmp_path / "run").exists()


def test_one_process_says_that_another_trains_in_the_folder(tmp_path: Path) -> None:
    command = [*LAUNCHERS["torchrun"][0], "-m", "attnlab", *TRAIN, "--out", "run"]
    with files.alone(tmp_path / "run", "trains in"):
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | QUIET, capture_output=True, text=True, timeout=600
        )
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    said = [line for line in done.stderr.splitlines() if line.startswith("attnlab,")]
    assert done.returncode and len(said) == 1 and "process 0 of 2: another process trains in run" in said[0]
    assert "exitcode  : 2" in done.stderr and "Traceback (most recent call last)" not in said[0]


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


NODES = {"attnlab-test-a": ("attnlab-va", "10.83.97.1"), "attnlab-test-b": ("attnlab-vb", "10.83.97.2")}


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two hosts of our own: network namespaces with an address each and a cable between them."""
    ip = shutil.which("ip")
    if ip is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2's ip, so two nodes were NOT tried")
    a, b = NODES

    def run(*words: str) -> bool:
        return subprocess.run([ip, *words], capture_output=True).returncode == 0

    try:
        if not (run("netns", "add", a) and run("netns", "add", b)):
            pytest.skip("this system allows no network namespaces, so two nodes were NOT tried")
        assert run("link", "add", NODES[a][0], "netns", a, "type", "veth", "peer", "name", NODES[b][0], "netns", b)
        for name, (device, address) in NODES.items():
            assert run("-n", name, "addr", "add", f"{address}/24", "dev", device)
            assert run("-n", name, "link", "set", device, "up") and run("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        run("netns", "delete", a)
        run("netns", "delete", b)


@pytest.mark.slow
def test_two_nodes(nodes: None, alone: float, tmp_path: Path) -> None:
    """Each with an address of its own, and a shared file system."""
    started = []
    for rank, (name, (device, _)) in enumerate(NODES.items()):
        words = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"),
            *(f"--node-rank={rank}", "--nproc-per-node=1", "--master-addr=10.83.97.1", "--master-port=29500"),
            *("-m", "attnlab", *TRAIN, "--strategy", "fsdp", "--out", "run"),
        ]
        env = os.environ | QUIET | {"GLOO_SOCKET_IFNAME": device}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, cwd=tmp_path, env=env, **pipes))
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said[0][1][-3000:]
    assert loss(tmp_path / "run") == pytest.approx(alone, abs=1e-4)
    assert "val loss" in said[0][0] and not said[1][0]
