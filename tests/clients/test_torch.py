"""torch's own helpers around an optimizer: schedulers, averages of weights, early ends of a schedule."""

import pytest
import torch
from client_runs import RECIPES, Recipe, assert_regularized, assert_same, loss_of, network, rows
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

pytestmark = pytest.mark.filterwarnings("ignore")

SCHEDULERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=20),
    "cosine": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "swa": lambda o: SWALR(o, 0.01, anneal_epochs=3),
}


def run(recipe: Recipe, who: str, scheduler: str, steps: int = 8):
    model = network()
    average = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = recipe.make(who)(model.parameters())
    schedule = SCHEDULERS[scheduler](optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, *rows(), recipe.l1 if who == "torch" else 0.0)
        loss.backward()
        if who == "torch" and recipe.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
        optimizer.step()
        schedule.step(1.0) if scheduler == "plateau" else schedule.step()
        average.update_parameters(model)
        moving.update_parameters(model)
    return (model, average.module, moving.module), optimizer


@RECIPES
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler(recipe, scheduler):
    (ours, optimizer), (theirs, twin) = (run(recipe, who, scheduler) for who in ("regfused", "torch"))
    for got, want in zip(ours, theirs, strict=True):
        assert_same(got, want, network())
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    assert_regularized(optimizer, recipe)
