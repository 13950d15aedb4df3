"""The example of sharded training, with two processes and then with one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import regfused

for module in ("sklearn", "rich", "typer"):
    pytest.importorskip(module)

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "fsdp2.py"


def run(processes: int, *arguments):
    paths = [str(Path(regfused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def accuracy(done) -> float:
    line = next(line for line in done.stdout.splitlines() if "accuracy on test images" in line)
    return float(line.split()[-1].rstrip("%"))


def test_it_trains_and_goes_on_with_another_number_of_processes(tmp_path):
    folder = tmp_path / "saved"
    done = run(2, "--epochs", 3, "--hidden", 64, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "2 ranks on cpu, 3 epochs" in done.stdout
    before = accuracy(done)
    done = run(1, "--epochs", 2, "--hidden", 64, "--out", folder, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Going on after epoch 3." in done.stdout and "1 ranks on cpu, 5 epochs" in done.stdout
    assert before > 50 and accuracy(done) > 80


def test_there_is_nothing_to_go_on_from(tmp_path):
    done = run(1, "--out", tmp_path / "nothing", "--resume")
    assert done.returncode != 0 and "--resume demands a checkpoint, but there is no folder" in done.stderr
