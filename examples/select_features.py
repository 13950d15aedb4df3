"""Selects features of a table: a lasso path for a linear model, a group lasso path over the inputs of a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from csv_table import MalformedTable, Table, read_csv
from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor, nn

import regfused


@dataclass(frozen=True)
class Data:
    """Three quarters to train, one quarter to choose the strength by; standardized by the first."""

    names: list[str]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    unit: float  # the standard deviation of the target


def diabetes() -> Table:
    from sklearn.datasets import load_diabetes  # a CSV needs no scikit-learn

    data = load_diabetes(scaled=False)
    features, target = (torch.tensor(values, dtype=torch.float32) for values in (data.data, data.target))
    return Table([*data.feature_names, "progression"], features, target)


def prepare(table: Table, decoys: bool, seed: int) -> Data:
    """With decoys each feature is there once more, its rows shuffled: nothing can be learnt from those."""
    shuffle = torch.Generator().manual_seed(seed)
    names, x = table.names[:-1], table.features.double()
    if decoys:
        copies = [column[torch.randperm(len(column), generator=shuffle)] for column in x.T]
        names, x = [*names, *(f"{name} (decoy)" for name in names)], torch.cat([x, torch.stack(copies, 1)], 1)
    order = torch.randperm(len(x), generator=shuffle)
    train, validation = order[len(x) // 4 :], order[: len(x) // 4]

    def standardize(values: Tensor) -> tuple[Tensor, Tensor]:
        std, mean = torch.std_mean(values[train], dim=0, correction=0)
        std[std == 0] = 1  # a constant column
        return ((values - mean) / std).float(), std

    (x, _), (y, unit) = standardize(x), standardize(table.target.double()[:, None])
    return Data(names, (x[train], y[train]), (x[validation], y[validation]), unit.item())


def squares(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(data[0]), data[1])


def network(features: int, hidden: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def select(data: Data, model: nn.Module, steps: int, **options: object) -> regfused.RegularizationPath:
    """The model ends with the sparsest point within one standard error of the best one."""
    x, y = data.validation
    result = regfused.path(
        model,
        squares,
        data.train,
        steps=steps,
        validation=lambda model: (model(x) - y).square(),
        greater_is_better=False,
        **options,
    )
    result.load(result.one_standard_error)
    return result


def rmse(data: Data, result: regfused.RegularizationPath, index: int) -> float:
    assert result.scores is not None
    return data.unit * result.scores[index] ** 0.5


def summary(data: Data, paths: dict[str, regfused.RegularizationPath]) -> RichTable:
    table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    columns = ("", "RMSE,\nbest point", "\nfeatures", "RMSE, sparsest\nwithin 1 s.e.", "\nfeatures", "\ndecoys")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for name, path in paths.items():
        best, sparse = path.best, path.one_standard_error
        kept = {index: sizes(path)[index] > 0 for index in (best, sparse)}
        decoys = torch.tensor([name.endswith("(decoy)") for name in data.names])
        counts = {index: str(int(kept[index].sum())) for index in kept}
        of_decoys = str(int((kept[sparse] & decoys).sum())) if decoys.any() else ""
        scores = [f"{rmse(data, path, index):.4g}" for index in (best, sparse)]
        table.add_row(name, scores[0], counts[best], scores[1], counts[sparse], of_decoys)
    return table


def sizes(path: regfused.RegularizationPath) -> Tensor:
    """For each point and feature the norm of the first layer's weights: |weight| in a linear model."""
    return path.coefficients[path.names[0]].norm(dim=1)


def ranking(data: Data, paths: dict[str, regfused.RegularizationPath]) -> RichTable:
    """The features in the order in which the first model takes them up."""
    table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("feature")
    for name in paths:
        table.add_column(f"{name}:\nenters at", justify="right")
        table.add_column("size\nwithin 1 s.e.", justify="right")
    cells: list[list[str]] = [[] for _ in data.names]
    order: list[tuple[int, int]] = []
    for path in paths.values():
        found = sizes(path)
        enters = [int(column.nonzero()[0]) if column.any() else len(path) for column in found.T]
        order = order or sorted((index, feature) for feature, index in enumerate(enters))
        for feature, index in enumerate(enters):
            size = float(found[path.one_standard_error, feature])
            cells[feature] += [
                f"{path.strengths[index]:.3g}" if index < len(path) else "",
                f"{size:.3f}" if size else "0",
            ]
    for _, feature in order:
        table.add_row(data.names[feature], *cells[feature])
    return table


def main(
    data: Annotated[Path | None, typer.Option(help="CSV of numbers, target last. Default: diabetes.")] = None,
    out: Annotated[Path, typer.Option(help="The lasso path, a PNG.", dir_okay=False)] = Path("out/select_features.png"),
    decoys: Annotated[bool, typer.Option(help="Add each feature once more with shuffled rows.")] = True,
    count: Annotated[int, typer.Option(min=2, help="Points of a path.")] = 30,
    steps: Annotated[int, typer.Option(min=1, help="The most at one point.")] = 500,
    hidden: Annotated[int, typer.Option(min=1, help="Units of the network.")] = 16,
    seed: Annotated[int, typer.Option(help="Of decoys, split and initial weights.")] = 0,
) -> None:
    """Which columns of a table does its last column depend on?"""
    console = Console()
    try:
        table = read_csv(data) if data else diabetes()
    except MalformedTable as error:
        Console(stderr=True, soft_wrap=True).print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    torch.set_num_threads(1)  # the models are too small to gain from more
    prepared = prepare(table, decoys, seed)
    features = len(prepared.names)
    console.print(
        f"{data.name if data else 'diabetes (scikit-learn)'}: {table.names[-1]} from {features} features, "
        f"{len(prepared.train[0])} rows to train, {len(prepared.validation[0])} to choose by",
        highlight=False,
        markup=False,
    )
    paths = {
        "linear, l1": select(prepared, nn.Linear(features, 1), steps, count=count, ratio=1e-2),
        # A column of the first layer's weight is all that one feature reaches, one of the second what one unit does.
        "network, group_l1": select(
            prepared,
            network(features, hidden, seed),
            steps,
            count=count,
            ratio=1e-2,
            option="group_l1",
            group_dim=1,
        ),
    }
    console.print(summary(prepared, paths))
    console.print(ranking(prepared, paths))
    out.parent.mkdir(parents=True, exist_ok=True)
    paths["linear, l1"].plot(out)
    console.print(f"Figure: {out}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
