"""Lightning's Trainer, and Fabric."""

import pytest
import torch
from client_runs import RECIPES, Recipe, assert_regularized, assert_same, loss_of, network, rows
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    def __init__(self, recipe: Recipe, who: str) -> None:
        super().__init__()
        self.network = network()
        self.recipe, self.who = recipe, who

    def training_step(self, batch, _):
        return loss_of(self.network, *batch, self.recipe.l1 if self.who == "torch" else 0.0)

    def configure_optimizers(self):
        optimizer = self.recipe.make(self.who)(self.network.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def trainer(recipe: Recipe, who: str, epochs: int = 2, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=recipe.max_norm if who == "torch" else None,
        **options,
    )


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*rows()), batch_size=16)


def fit(recipe: Recipe, who: str, **options) -> Module:
    module = Module(recipe, who)
    trainer(recipe, who, **options).fit(module, loader())
    return module


@RECIPES
@pytest.mark.parametrize("precision", ("32-true", "bf16-mixed"))
def test_trainer(recipe, precision):
    ours, theirs = (fit(recipe, who, precision=precision) for who in ("regfused", "torch"))
    # Under bfloat16 last digits of weights come back as other digits of gradients.
    assert_same(ours.network, theirs.network, network(), atol=1e-5 if precision == "32-true" else 2e-3)
    assert_regularized(ours.trainer.optimizers[0], recipe)


@RECIPES
def test_resume(recipe, tmp_path):
    first = Module(recipe, "regfused")
    runner = trainer(recipe, "regfused", epochs=1)
    runner.fit(first, loader())
    runner.save_checkpoint(tmp_path / "saved.ckpt")
    second = Module(recipe, "regfused")
    trainer(recipe, "regfused").fit(second, loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    assert_same(second.network, fit(recipe, "regfused").network, network(), atol=0)


@RECIPES
def test_fabric(recipe):
    def run(who: str):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model = network()
        model, optimizer = fabric.setup(model, recipe.make(who)(model.parameters()))
        for x, y in fabric.setup_dataloaders(loader()):
            optimizer.zero_grad()
            fabric.backward(loss_of(model, x, y, recipe.l1 if who == "torch" else 0.0))
            if who == "torch" and recipe.max_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=recipe.max_norm)
            optimizer.step()
        return model, optimizer

    (ours, optimizer), (theirs, _) = run("regfused"), run("torch")
    assert_same(ours, theirs, network())
    assert_regularized(optimizer, recipe)
