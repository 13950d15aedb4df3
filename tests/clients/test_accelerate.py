"""Hugging Face's accelerate."""

import pytest
from client_runs import RECIPES, Recipe, assert_regularized, assert_same, loss_of, network, rows
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


def run(recipe: Recipe, who: str, epochs: int = 2, save=None, load=None, **options):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = network()
    loader = DataLoader(TensorDataset(*rows()), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, recipe.make(who)(model.parameters()), loader)
    if load is not None:
        accelerator.load_state(load)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, x, y, recipe.l1 if who == "torch" else 0.0))
                if who == "torch" and recipe.max_norm is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_norm)
                optimizer.step()
                optimizer.zero_grad()
    if save is not None:
        accelerator.save_state(save)
    return model, optimizer


@RECIPES
def test_training(recipe):
    (ours, optimizer), (theirs, _) = (run(recipe, who) for who in ("regfused", "torch"))
    assert_same(ours, theirs, network())
    assert_regularized(optimizer.optimizer, recipe)


@RECIPES
def test_mixed_precision(recipe):
    (ours, _), (theirs, _) = (run(recipe, who, mixed_precision="bf16") for who in ("regfused", "torch"))
    assert_same(ours, theirs, network(), atol=2e-3)


def test_accumulated_gradients():
    """A penalty counts once for a step, where in the loss it would count for each batch, divided by their number."""
    recipe = Recipe("AdamW", True)
    (ours, _), (theirs, _) = (run(recipe, who, gradient_accumulation_steps=2) for who in ("regfused", "torch"))
    assert_same(ours, theirs, network())


@RECIPES
def test_resume(recipe, tmp_path):
    run(recipe, "regfused", epochs=1, save=str(tmp_path))
    resumed, _ = run(recipe, "regfused", epochs=1, load=str(tmp_path))
    whole, _ = run(recipe, "regfused")
    assert_same(resumed, whole, network(), atol=0)
