"""Draws docs/figures/zeros.png: non-zeros against the validation score, for the ways to make zeros with L1.

Two problems: a linear model of which the true weights are known, and a small network on scikit-learn's digits. Each way
trains at a grid of strengths, from the same start, with the same number of steps. torchao's PAT takes part where it is
installed (`pip install torchao`).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import regfused

try:
    from torchao.prototype.pat.optim import PruneOptimizer
except ImportError:
    PruneOptimizer = None

Score = Callable[[nn.Module], float]
Loss = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Problem:
    title: str
    score_name: str
    model: nn.Module
    penalized: list[str]  # names of parameters
    loss: Loss
    score: Score
    strengths: Tensor
    steps: int
    lr: dict[str, float]  # by rule
    true_nonzeros: int | None = None


@dataclass(frozen=True)
class Way:
    """How zeros are made: an optimizer of the penalized and of the other parameters."""

    label: str
    style: dict[str, Any]
    rule: str
    make: Callable[[list[Tensor], list[Tensor], float, float], Any]  # of both, learning rate and strength
    in_loss: bool = False  # the penalty is added to the loss
    wide: bool = False  # strengths mean something else than in the loss, and may have to be larger


def linear_model() -> Problem:
    """60 features in correlated pairs, 8 of which count; noise of a third of the signal."""
    generator = torch.Generator().manual_seed(0)
    features, true = 60, 8
    x = torch.randn(300, features, generator=generator, dtype=torch.float64)
    x[:, 1::2] += 0.5 * x[:, ::2]
    weights = torch.zeros(features, dtype=torch.float64)
    weights[torch.randperm(features, generator=generator)[:true]] = torch.linspace(0.5, 1.5, true, dtype=torch.float64)
    y = x @ weights
    y = y + y.std() / 3 * torch.randn(300, generator=generator, dtype=torch.float64)
    model = nn.Linear(features, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.zero_()

    def error(model: nn.Module, rows: slice) -> Tensor:
        return (model(x[rows])[:, 0] - y[rows]).square().mean()

    return Problem(
        title=f"Linear model, {true} of {features} weights are true",
        score_name="share of the variance explained, validation",
        model=model,
        penalized=["weight"],
        loss=lambda model: error(model, slice(0, 150)) / 2,
        score=lambda model: 1 - float(error(model, slice(150, 300)) / y[150:].var()),
        strengths=torch.logspace(0, -2.5, 11),
        steps=2500,
        lr={"SGD": 0.02, "Adam": 0.01},
        true_nonzeros=true,
    )


def digits() -> Problem:
    generator = torch.Generator().manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(inputs), generator=generator)
    x, y = torch.tensor(inputs, dtype=torch.float32)[order] / 16, torch.tensor(targets)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return Problem(
        title="Digits, a network of 64-64-10 units",
        score_name="accuracy, validation",
        model=model,
        penalized=["0.weight", "2.weight"],
        loss=lambda model: nn.functional.cross_entropy(model(x[:900]), y[:900]),
        score=lambda model: float((model(x[900:]).argmax(1) == y[900:]).float().mean()),
        strengths=torch.logspace(-1.7, -4.2, 9),
        steps=900,
        lr={"SGD": 0.05, "Adam": 0.003},
    )


def by_regfused(rule: str, **options: Any) -> Callable[..., Any]:
    def make(penalized: list[Tensor], others: list[Tensor], lr: float, strength: float) -> Any:
        groups = [{"params": penalized, "l1": strength, **options}, {"params": others}]
        if "concavity" in options:
            # Weights above a limit, relative to the strength, are free.
            groups[0]["concavity"] = strength * options["concavity"]
        more = {"momentum": 0.9} if rule == "SGD" else {}
        return getattr(regfused, rule)([group for group in groups if group["params"]], lr=lr, **more)

    return make


def by_pat(base: Callable[..., Any]) -> Callable[..., Any]:
    def make(penalized: list[Tensor], others: list[Tensor], lr: float, strength: float) -> Any:
        pat = {"prox_type": "ProxLasso", "group_type": "ElemGrouper", "reg_lambda": strength}
        groups = [{"params": penalized, **pat}, {"params": others}]
        return PruneOptimizer(base([group for group in groups if group["params"]], lr=lr))

    return make


def in_loss(penalized: list[Tensor], others: list[Tensor], lr: float, strength: float) -> Any:
    return torch.optim.Adam([*penalized, *others], lr=lr)


WAYS = [
    Way("penalty in the loss, torch Adam", {"color": "0.6", "marker": "x"}, "Adam", in_loss, in_loss=True),
    Way(
        "threshold lr*l1 after Adam's step",
        {"color": "tab:orange", "marker": "^"},
        "Adam",
        by_regfused("Adam", proximal=True, decoupled_proximal=True),
        wide=True,
    ),
    Way("torchao PAT, Adam", {"color": "tab:red", "marker": "v"}, "Adam", by_pat(torch.optim.Adam), wide=True),
    Way(
        "torchao PAT, SGD with momentum",
        {"color": "tab:pink", "marker": "v"},
        "SGD",
        by_pat(lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9)),
        wide=True,
    ),
    Way("regfused.SGD with momentum", {"color": "tab:green", "marker": "s"}, "SGD", by_regfused("SGD", proximal=True)),
    Way("regfused.Adam", {"color": "tab:blue", "marker": "o"}, "Adam", by_regfused("Adam", proximal=True)),
    Way(
        "regfused.Adam, concave beyond 0.3",
        {"color": "tab:purple", "marker": "D"},
        "Adam",
        by_regfused("Adam", proximal=True, concavity=1 / 0.3),
    ),
]


def strengths_of(way: Way, problem: Problem) -> list[float]:
    larger = 10 * problem.strengths
    return [*(larger[larger > problem.strengths.max()].tolist() if way.wide else ()), *problem.strengths.tolist()]


def train(problem: Problem, way: Way, strength: float) -> tuple[int, float]:
    """Non-zeros of the penalized weights, and the score."""
    model = copy.deepcopy(problem.model)
    named = dict(model.named_parameters())
    penalized = [named[name] for name in problem.penalized]
    others = [p for name, p in named.items() if name not in problem.penalized]
    optimizer = way.make(penalized, others, problem.lr[way.rule], strength)
    # The last third at falling rates, so that all come to rest.
    begin = problem.steps * 2 // 3
    for step in range(problem.steps):
        if step >= begin and (step - begin) % 20 == 0:
            for group in optimizer.param_groups:
                group["lr"] = problem.lr[way.rule] * 0.01 ** ((step - begin) / (problem.steps - begin))
        optimizer.zero_grad()
        loss = problem.loss(model)
        if way.in_loss:
            loss = loss + strength * sum(p.abs().sum() for p in penalized)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return sum(int((p != 0).sum()) for p in penalized), problem.score(model)


def main() -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    torch.set_num_threads(1)  # the models are too small to gain from more
    console = Console(width=120)
    ways = [way for way in WAYS if PruneOptimizer is not None or "PAT" not in way.label]
    if len(ways) < len(WAYS):
        console.print("torchao is not installed: PAT takes no part (pip install torchao)")
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    begin = time.perf_counter()
    for problem, axis in zip((linear_model(), digits()), axes, strict=True):
        table = Table(title=problem.title)
        for heading in ("way", "fewest non-zeros within 0.03 of the best score", "its score", "l1"):
            table.add_column(heading, justify="left" if heading == "way" else "right")
        seen = {way.label: [] for way in ways}
        jobs = [(way, strength) for way in ways for strength in strengths_of(way, problem)]
        for way, strength in track(jobs, description=problem.title, console=console):
            seen[way.label].append((*train(problem, way, strength), strength))
        best = max(score for points in seen.values() for _, score, _ in points)
        for way in ways:
            points = seen[way.label]
            nonzeros, scores, _ = zip(*points, strict=True)
            axis.plot(
                [max(n, 0.8) for n in nonzeros], scores, label=way.label, linewidth=1.2, markersize=5, **way.style
            )
            good = [point for point in points if point[1] >= best - 0.03]
            fewest, score, strength = min(good, default=(None, 0.0, 0.0), key=lambda point: (point[0], -point[1]))
            cells = ("none", "", "") if fewest is None else (f"{fewest:,}", f"{score:.3f}", f"{strength:.2g}")
            table.add_row(way.label, *cells)
        console.print(table)
        if problem.true_nonzeros:
            axis.axvline(problem.true_nonzeros, color="0.8", linewidth=1, zorder=0)
        axis.set(xscale="log", title=problem.title, xlabel="weights that are not zero", ylabel=problem.score_name)
        bottom = best - 0.2
        visible = [n for points in seen.values() for n, score, _ in points if score >= bottom]
        axis.set_ylim(bottom=bottom, top=best + 0.02)
        axis.set_xlim(left=min(visible) * 0.7)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    console.print(f"{time.perf_counter() - begin:.0f} s, torch {torch.__version__}")


if __name__ == "__main__":
    main()
