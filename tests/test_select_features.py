"""The example that selects features of a table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regfused

for module in ("sklearn", "rich", "typer", "matplotlib"):
    pytest.importorskip(module)

pytestmark = pytest.mark.long

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "select_features.py"


def run(*arguments):
    paths = [str(Path(regfused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "120"}
    command = [sys.executable, str(EXAMPLE), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)


def test_it_finds_the_columns_that_the_target_depends_on(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    y = 3 * x[:, 1] - 2 * x[:, 4] + 0.1 * torch.randn(200)
    lines = ["a,b,c,d,e,f,target", *(",".join(f"{v:.5f}" for v in [*row, t]) for row, t in zip(x, y, strict=True))]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    figure = tmp_path / "new" / "path.png"
    done = run("--data", tmp_path / "table.csv", "--out", figure, "--count", 8, "--steps", 200)
    assert done.returncode == 0, done.stderr
    assert "table.csv: target from 12 features, 150 rows to train, 50 to choose by" in done.stdout
    lines = done.stdout.splitlines()
    ranked = [line.split()[0] for line in lines[next(i for i, line in enumerate(lines) if "feature " in line) + 2 :]]
    assert set(ranked[:2]) == {"b", "e"}, done.stdout
    (linear,) = (line.split() for line in lines if line.startswith("linear, l1"))
    # RMSE, features, decoys: noise of 0.1 is what nothing can predict.
    assert float(linear[2]) < 0.12 and linear[-1] == "0", linear
    assert figure.stat().st_size > 10_000


def test_without_decoys_and_a_malformed_table(tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n1,2\n3,x\n" + "4,5\n" * 20)
    done = run("--data", tmp_path / "table.csv")
    assert done.returncode == 2
    assert "line 3, column 2 ('b'): 'x' is not a number" in done.stderr
    done = run("--no-decoys", "--count", 2, "--steps", 5, "--out", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    assert "progression from 10 features" in done.stdout and "decoy)" not in done.stdout
