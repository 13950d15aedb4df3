"""Trains a small network in several ways, by the usual loop and with regfused, and shows that both agree."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from csv_table import MalformedTable
from report import draw, explanation, introduction, results_table
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from training import (
    Recipe,
    Result,
    Setting,
    Task,
    csv_task,
    digits_task,
    regularization_path,
    train_both,
)


def all_settings(l1: float, l2: float, dropout: float) -> list[Setting]:
    return [
        Setting("no penalty"),
        Setting("L1", l1=l1),
        Setting("L2", l2=l2),
        Setting("elastic net", l1=l1, l2=l2),
        Setting("proximal L1", l1=l1, proximal=True),
        # As much as L1 where a row has 64 elements of one size.
        Setting("group lasso", group_l1=8 * l1),
        Setting("dropout", dropout=dropout),
        Setting("Adam", adam=True),
        Setting("Adam, L1+L2", l1=l1, l2=l2, adam=True),
    ]


def train_all(
    task: Task, recipe: Recipe, settings: list[Setting], path_size: tuple[int, int], console: Console
) -> tuple[list[Result], list[Result], list[tuple[float, torch.Tensor]]]:
    """Behind a progress bar: the results in float32 and in float64, and the regularization path."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    strengths, path_steps = path_size
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=2 * len(settings) * recipe.epochs + strengths)
        results: dict[torch.dtype, list[Result]] = {torch.float32: [], torch.float64: []}
        for dtype, done in results.items():
            for setting in settings:
                progress.update(bar, description=f"{setting.name}, {str(dtype).removeprefix('torch.')}")
                done.append(train_both(task, setting, recipe, dtype, after_epoch=lambda: progress.advance(bar)))
        progress.update(bar, description="regularization path")
        path = []
        for point in regularization_path(task, strengths, path_steps, recipe):
            path.append(point)
            progress.advance(bar)
        progress.update(bar, description="done")
    return results[torch.float32], results[torch.float64], path


def main(
    data: Annotated[Path | None, typer.Option(help="CSV of numbers, last column the target. Default: digits.")] = None,
    out: Annotated[Path, typer.Option(help="The figure, a PNG.", dir_okay=False)] = Path("out/demo.png"),
    epochs: Annotated[int, typer.Option(min=1)] = Recipe.epochs,
    batch_size: Annotated[int, typer.Option(min=1)] = Recipe.batch_size,
    lr: Annotated[float, typer.Option(min=0)] = Recipe.lr,
    momentum: Annotated[float, typer.Option(min=0, max=0.999)] = Recipe.momentum,
    l1: Annotated[float, typer.Option(min=0, help="Strength of sum|p|.")] = 5e-4,
    l2: Annotated[float, typer.Option(min=0, help="Strength of sum(p^2).")] = 5e-4,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Probability of a hidden unit to be dropped.")] = 0.2,
    max_norm: Annotated[float, typer.Option(min=0, help="Clip the gradient's global norm to it.")] = Recipe.max_norm,
    seed: Annotated[int, typer.Option(help="Of the split, the initial weights and the batches.")] = Recipe.seed,
    quick: Annotated[bool, typer.Option("--quick", help="At most 3 epochs and a coarse path: a few seconds.")] = False,
) -> None:
    """Compare the usual training loop with regfused.SGD on handwritten digits or on a CSV of your own."""
    console = Console()
    try:
        task = csv_task(data, seed) if data else digits_task(seed)
    except MalformedTable as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    # The network is too small to gain from more threads; on a busy machine one would time how they wait for each other.
    torch.set_num_threads(1)
    recipe = Recipe(min(epochs, 3) if quick else epochs, batch_size, lr, momentum, max_norm=max_norm, seed=seed)
    console.print(introduction(task, recipe), highlight=False, markup=False, soft_wrap=True)
    results, in_float64, path = train_all(
        task, recipe, all_settings(l1, l2, dropout), (5, 100) if quick else (17, 500), console
    )
    if not all(weights.isfinite().all() for result in results for weights in result.weights.values()):
        console.print(f"Training diverged: weights are not finite. lr={lr:g} is too large for this data.", style="red")
        raise typer.Exit(1)

    console.print(results_table(task, results, in_float64))
    steps = len(results[0].step_us["loop"])
    console.print(explanation(recipe, l1, steps), highlight=False, markup=False, soft_wrap=True)
    draw(results, path, out)
    console.print(f"Figure: {out}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
