"""The SGD benchmark runs, reports every arm, and all its arms do the same job."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("numpy")

from benchmarks.sgd_jobs import JOBS

ROOT = Path(__file__).parents[1]

# Three steps are a few dozen float32 roundings, each 6e-8 of the largest parameter at most; a term that is missing or
# doubled moves a parameter by more than 1e-4 of it.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("bench")
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_sgd",
        "--models",
        "mlp_seed",
        "--seconds",
        "1",
        "--out",
        str(out),
    ]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True, timeout=300)
    assert (out / "sgd.md").read_text().startswith("### Environment")
    return json.loads((out / "sgd.json").read_text())


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_arm_is_timed_and_does_the_same_job(results, job):
    arms = results["models"]["mlp_seed"]["jobs"][job.name]["arms"]
    assert list(arms) == list(job.ways)
    for name, arm in arms.items():
        assert arm["p25_us"] <= arm["median_us"] <= arm["p75_us"], name
        assert arm["samples"] >= 5, name
        assert arm["error"] < TOLERANCE, name
