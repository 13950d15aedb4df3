"""Trains a small network with a group lasso until whole rows of its weights are zero, and leaves those rows out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from training import Task, digits_task

import regfused


@dataclass(frozen=True)
class Recipe:
    """The group lasso of a row is ``group_l1 * ||row||``; output units and biases bear none."""

    hidden: tuple[int, ...] = (256, 128)
    group_l1: float = 0.003
    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    seed: int = 0


def build(task: Task, recipe: Recipe) -> nn.Sequential:
    torch.manual_seed(recipe.seed)
    sizes = [task.train.tensors[0].shape[1], *recipe.hidden]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], task.outputs))


def train(model: nn.Sequential, task: Task, recipe: Recipe) -> Iterator[int]:
    """One item per epoch."""
    hidden = [layer.weight for layer in linear_layers(model)[:-1]]
    others = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    groups = [{"params": hidden, "group_l1": recipe.group_l1, "group_dim": 0}, {"params": others}]
    optimizer = regfused.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    inputs, targets = task.train.tensors
    shuffle = torch.Generator().manual_seed(recipe.seed)
    for epoch in range(recipe.epochs):
        for batch in torch.randperm(len(inputs), generator=shuffle).split(recipe.batch_size):
            optimizer.zero_grad()
            task.loss_fn(model(inputs[batch]), targets[batch]).backward()
            optimizer.step()
        yield epoch


def linear_layers(model: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in model if isinstance(layer, nn.Linear)]


def layers_table(task: Task, models: dict[str, nn.Sequential]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for column in ("", "layers", "parameters", f"test {task.score_name}"):
        table.add_column(column, justify="left" if not column or column == "layers" else "right", no_wrap=True)
    for name, model in models.items():
        sizes = [layer.in_features for layer in linear_layers(model)] + [task.outputs]
        parameters = sum(p.numel() for p in model.parameters())
        table.add_row(name, " - ".join(map(str, sizes)), f"{parameters:,}", f"{task.score(model):.1f}")
    return table


def main(
    group_l1: Annotated[float, typer.Option(min=0, help="Strength of the sum of the rows' norms.")] = Recipe.group_l1,
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and the batches.")] = Recipe.seed,
) -> None:
    """Train on handwritten digits with a group lasso, drop the rows that became zero, and compare."""
    console = Console()
    torch.set_num_threads(1)
    task = digits_task(seed)
    recipe = Recipe(group_l1=group_l1, epochs=epochs, seed=seed)
    console.print(f"\n{task.description}.\n", highlight=False, soft_wrap=True)
    models = {"at the start": build(task, recipe)}
    trained = copy.deepcopy(models["at the start"])
    for _ in track(train(trained, task, recipe), "training", recipe.epochs, console=console, transient=True):
        pass
    inputs = task.train.tensors[0]
    models |= {"trained": trained, "without zero rows": regfused.shrink(trained, inputs[:1]).model}
    console.print(str(regfused.sparsity(trained)), highlight=False, soft_wrap=True)
    console.print()
    console.print(layers_table(task, models))
    with torch.no_grad():
        difference = (models["trained"](inputs) - models["without zero rows"](inputs)).abs().max().item()
    console.print(f"\nLargest difference of an output after the zero rows are gone: {difference:.0e}", highlight=False)


if __name__ == "__main__":
    typer.run(main)
