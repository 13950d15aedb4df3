"""transformers' Trainer, and peft's adapters."""

import pytest
import torch
from client_runs import L1, MAX_NORM, RECIPES, Recipe, assert_regularized, assert_same, loss_of, network, rows
from torch import nn
from torch.utils.data import Dataset

import regfused

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset):
    def __init__(self) -> None:
        self.x, self.y = rows()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i):
        return {"x": self.x[i], "labels": self.y[i]}


class WithLoss(nn.Module):
    def __init__(self, l1: float) -> None:
        super().__init__()
        self.network, self.l1 = network(), l1

    def forward(self, x, labels):
        return {"loss": loss_of(self.network, x, labels, self.l1)}


def trainer(recipe: Recipe, who: str, folder, epochs: int = 2, **options):
    model = WithLoss(recipe.l1 if who == "torch" else 0.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        num_train_epochs=epochs,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
        # The Trainer's own clip, 1.0 by default, would come before the penalty.
        max_grad_norm=(recipe.max_norm or 0.0) if who == "torch" else 0.0,
        **{"save_strategy": "no", **options},
    )
    optimizer = recipe.make(who)(model.parameters())
    return transformers.Trainer(model, arguments, train_dataset=Rows(), optimizers=(optimizer, None))


@RECIPES
def test_trainer(recipe, tmp_path):
    ours, theirs = (trainer(recipe, who, tmp_path / who) for who in ("regfused", "torch"))
    ours.train()
    theirs.train()
    assert_same(ours.model.network, theirs.model.network, network())
    optimizer = ours.optimizer
    assert_regularized(getattr(optimizer, "optimizer", optimizer), recipe)


@RECIPES
def test_resume(recipe, tmp_path):
    whole = trainer(recipe, "regfused", tmp_path / "whole")
    whole.train()
    # Saved in the middle of the same schedule.
    first = trainer(recipe, "regfused", tmp_path / "first", save_strategy="epoch")
    first.train()
    checkpoint = sorted((tmp_path / "first").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    second = trainer(recipe, "regfused", tmp_path / "second")
    second.train(resume_from_checkpoint=str(checkpoint))
    assert_same(second.model.network, whole.model.network, network(), atol=1e-7)


def test_peft():
    peft = pytest.importorskip("peft")

    def run(who: str):
        torch.manual_seed(0)
        model = peft.get_peft_model(network(), peft.LoraConfig(target_modules=["0", "2"], r=2))
        trained = [p for p in model.parameters() if p.requires_grad]
        if who == "regfused":
            optimizer = regfused.AdamW(trained, lr=0.02, l1=L1, max_norm=MAX_NORM)
        else:
            optimizer = torch.optim.AdamW(trained, lr=0.02)
        for _ in range(8):
            optimizer.zero_grad()
            loss = loss_of(model, *rows(), L1 if who == "torch" else 0.0)
            loss.backward()
            if who == "torch":
                torch.nn.utils.clip_grad_norm_(trained, MAX_NORM)
            optimizer.step()
        return nn.ParameterList(trained)

    ours, theirs = run("regfused"), run("torch")
    assert len(ours) == 4
    torch.testing.assert_close(list(ours), list(theirs), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    (
        lambda: transformers.BertModel(
            transformers.BertConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
            )
        ),
        lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        ),
    ),
    ids=("BERT", "GPT-2"),
)
def test_convert(make):
    model = make()
    there = sum(type(module) is nn.Dropout for module in model.modules())
    tokens = torch.arange(8).view(1, 8)
    before = model.eval()(tokens).last_hidden_state
    done = regfused.convert(model)
    assert done.count == there > 0 and not any(type(module) is nn.Dropout for module in model.modules())
    assert torch.equal(model(tokens).last_hidden_state, before)
    model.train()(tokens).last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert regfused.convert(model, undo=True).count == there
