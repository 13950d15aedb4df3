"""The pruning example: smaller layers, the same outputs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regfused

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

for module in ("sklearn", "rich", "typer"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def prune():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("prune")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def trained(prune):
    task, recipe = prune.digits_task(seed=0), prune.Recipe(hidden=(64, 32), epochs=15, group_l1=0.01)
    model = prune.build(task, recipe)
    assert len(list(prune.train(model, task, recipe))) == recipe.epochs
    return task, model


def test_rows_become_zero_and_the_network_still_knows_digits(trained):
    task, model = trained
    report = regfused.sparsity(model)
    of_weights = {p.name: p for p in report.parameters if p.name.endswith("weight")}
    assert 0 < of_weights["0.weight"].zero_groups < 64
    assert of_weights["4.weight"].zero_groups == 0, "the output layer bears no group lasso"
    assert task.score(model) > 90


def test_smaller_layers_and_the_same_outputs(prune, trained):
    task, model = trained
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = task.train.tensors[0]
    smaller = regfused.shrink(model, inputs[:1]).model
    for layer, small in zip(prune.linear_layers(model)[:-1], prune.linear_layers(smaller)[:-1], strict=True):
        zero = int((layer.weight == 0).all(dim=1).sum())
        assert small.out_features == layer.out_features - zero == len(small.weight) == len(small.bias)
        assert (small.weight != 0).any(dim=1).all()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    # In float64 the two are the same function up to the order of a sum of some 100 terms.
    inputs = inputs.double()
    model, smaller = model.double(), regfused.shrink(model.double(), inputs[:1]).model
    torch.testing.assert_close(model(inputs), smaller(inputs), rtol=0, atol=1e-12)
    model.float()


def test_a_constant_unit_moves_into_the_bias_after_it():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight[1:3] = 0
        model[0].bias.copy_(torch.tensor([0.1, 2.0, -3.0, 0.2]))
    smaller = regfused.shrink(model, torch.zeros(1, 3, dtype=torch.float64)).model
    assert [tuple(p.shape) for p in smaller.parameters()] == [(2, 3), (2,), (2, 2), (2,)]
    x = torch.randn(50, 3, dtype=torch.float64)
    torch.testing.assert_close(smaller(x), model(x), rtol=0, atol=1e-14)


@pytest.mark.long
def test_runs():
    done = run("prune.py", "--epochs", "2", "--group-l1", "0.3")
    assert "Largest difference of an output" in done and "without zero rows" in done


def test_resnet_runs():
    pytest.importorskip("torchvision", reason="pip install torchvision", exc_type=Exception)
    done = run("prune_resnet.py", "--epochs", "1", "--examples", "64")
    assert "multiply-adds" in done and "Largest difference of an output" in done


def run(example, *arguments):
    paths = [str(Path(regfused.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "80"}
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
