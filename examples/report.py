"""What the demo shows: a table, and a figure of three panels."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib
import torch
from rich import box
from rich.table import Table
from training import Recipe, Result, Task

matplotlib.use("Agg")  # no display is needed; must precede pyplot
from matplotlib import pyplot as plt


def introduction(task: Task, recipe: Recipe) -> str:
    return (
        f"\n{task.description}.\n"
        "A small network is trained twice from the same start on the same batches: by the usual loop (penalty in\n"
        "the loss, clip_grad_norm_, torch.optim.SGD or Adam, torch.nn.Dropout) and by regfused.SGD or Adam\n"
        "alone (and regfused.Dropout), with the same options:\n"
        f"epochs={recipe.epochs} batch_size={recipe.batch_size} lr={recipe.lr:g} momentum={recipe.momentum:g} "
        f"(Adam: lr={recipe.adam_lr:g}) max_norm={recipe.max_norm:g} seed={recipe.seed}\n"
    )


def results_table(task: Task, results: list[Result], in_float64: list[Result]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for header in (
        f"\ntest\n{task.score_name}",
        "exact\nzeros,\n%",
        "training\nstep,\nus",
        "\nstep\nfaster",
        "penalty,\nclip,\nupdate, us",
        "largest\ndifference\nof a weight",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for result, precise in zip(results, in_float64, strict=True):
        table.add_row(
            result.setting.name,
            "loop\nregfused",
            "\n".join(f"{result.score[who]:.4g}" for who in ("loop", "regfused")),
            "\n".join(f"{result.zeros(who):.1f}" for who in ("loop", "regfused")),
            "\n".join(f"{result.median_us(who):.0f}" for who in ("loop", "regfused")),
            f"\n{result.median_us('loop') / result.median_us('regfused'):.2f} x",
            "\n".join(f"{result.replaced_us(who):.0f}" for who in ("loop", "regfused")),
            "other\nmasks"
            if result.setting.dropout
            else f"float32 {result.largest_difference:.0e}\nfloat64 {precise.largest_difference:.0e}",
        )
    return table


def explanation(recipe: Recipe, l1: float, steps: int) -> str:
    jump = 2 * recipe.lr * l1 / (1 - recipe.momentum)
    return (
        f"\nTimes: medians of {steps} steps in float32 on one thread of this machine, interleaved batch by batch.\n"
        "Penalty, clip, update: the step less forward and backward alone, which take a turn on each batch too,\n"
        "without dropout.\n"
        "\nDifferences are rounding: expect about 1e-6 in float32, 1e-15 in float64. With L1 in the loss, float32 can\n"
        "reach 1e-3 and more: the penalty's gradient jumps at zero, so rounding can decide on which side a weight is.\n"
        f"One such jump moves it by up to 2*lr*l1/(1 - momentum) = {jump:.0e}, and later batches carry it to others.\n"
        "\nProximal L1 is the same penalty as L1, by a map that reaches zero. The group lasso shrinks rows, and\n"
        "zeroes whole ones. Dropout: torch and regfused draw different masks from one seed.\n"
    )


# Okabe and Ito's colours, which stay apart for every kind of colour vision.
COLOURS = ["#000000", "#E69F00", "#0072B2", "#CC79A7", "#009E73", "#D55E00", "#56B4E9", "#F0E442", "#999999"]
LOOP, FUSED = "#999999", "#0072B2"


def draw_path(ax: plt.Axes, path: list[tuple[float, torch.Tensor]]) -> None:
    l1 = [strength for strength, _ in path]
    weights = torch.stack([w for _, w in path])
    # The 40 that get largest: of a random choice most would be pixels that are always blank.
    shown = weights.abs().amax(dim=0).topk(min(40, weights.shape[1])).indices
    ax.plot(l1, weights[:, shown], color=FUSED, linewidth=0.9, alpha=0.6)
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(
        xscale="log",
        xlabel="l1, strength of the penalty",
        ylabel=f"weight (the {len(shown)} largest of {weights.shape[1]})",
    )
    ax.yaxis.label.set_color(FUSED)
    ax.set_title("Proximal L1 on a linear model: weights reach exact zero")
    zeros = ax.twinx()
    zeros.plot(l1, 100 * (weights == 0).float().mean(dim=1), color="#D55E00", marker="o", markersize=4, linestyle="--")
    zeros.set_ylim(-5, 105)
    zeros.set_ylabel("exact zeros among all weights, %", color="#D55E00")


def draw_histograms(ax: plt.Axes, results: list[Result]) -> None:
    largest = max(result.weights["regfused"].abs().max().item() for result in results)
    # Thinner from line to line: where distributions coincide, those below still show.
    for result, colour, width in zip(results, COLOURS, (3.5, 3.0, 2.5, 2.0, 1.7, 1.5, 1.3, 1.1, 1.0), strict=True):
        weights = result.weights["regfused"].numpy()
        label = f"{result.setting.name}: {result.zeros('regfused'):.1f} % exact zeros"
        ax.hist(
            weights, bins=61, range=(-largest, largest), histtype="step", color=colour, linewidth=width, label=label
        )
    ax.set(yscale="log", xlabel="weight", ylabel="number of weights (log scale)")
    ax.set_ylim(0.7, 12 * len(results[0].weights["regfused"]))  # room for the legend above the peak at zero
    ax.set_title("Weights of the network after training with regfused")
    ax.legend(loc="upper left", ncols=2, fontsize=9)


def draw_times(ax: plt.Axes, results: list[Result]) -> None:
    for who, label, colour, shift in (("loop", "loop", LOOP, -0.2), ("regfused", "regfused", FUSED, 0.2)):
        us = [result.median_us(who) for result in results]
        bars = ax.bar([i + shift for i in range(len(us))], us, width=0.38, color=colour, label=label)
        ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    bare = median(result.median_us("bare") for result in results)
    ax.axhline(bare, color="black", linewidth=1, linestyle=":", label="forward and backward alone")
    ax.set_xticks(range(len(results)), [result.setting.name.replace(" ", "\n") for result in results])
    ax.set_ylabel("microseconds per training step (median)")
    ax.set_ylim(0, 1.3 * max(result.median_us("loop") for result in results))
    ax.set_title("A whole training step: forward, backward, update")
    ax.legend(loc="upper left", ncols=3, fontsize=9)


def draw(results: list[Result], path: list[tuple[float, torch.Tensor]], out: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(18, 6), layout="constrained")
    draw_path(axes[0], path)
    draw_histograms(axes[1], results)
    draw_times(axes[2], results)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
