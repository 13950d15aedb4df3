"""The example on a real client: stable-baselines3's PPO."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("stable_baselines3", reason="pip install -r examples/requirements-ppo.txt")

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_both_sides_train_alike(monkeypatch, threads):
    threads(1)
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    ppo = importlib.import_module("ppo")
    assert (ppo.first_actions(ppo.TORCH, 3) == ppo.first_actions(ppo.REGFUSED, 3)).all()
    runs = {name: [ppo.train(side, 0, 4096)] for name, side in ppo.SIDES.items()}
    assert all(run.score > 30 for of_side in runs.values() for run in of_side)  # an untrained policy reaches some 10
    assert all(run.seconds["step"] > 0 for of_side in runs.values() for run in of_side)
    assert ppo.report(runs).row_count == 4
