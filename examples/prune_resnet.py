"""Trains torchvision's ResNet-18 on small images with a group lasso over filters, and cuts the zero filters out.

pip install torchvision
python examples/prune_resnet.py
"""

from __future__ import annotations

import time
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision.models import resnet18

import regfused


def images(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, 8 x 8, as 3 x 32 x 32."""
    x, y = (torch.tensor(values) for values in load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = nn.functional.interpolate(x[order].float().view(-1, 1, 8, 8) / 16, size=(32, 32), mode="bilinear")
    return x.expand(-1, 3, -1, -1).contiguous(), y[order]


def optimizer_of(model: nn.Module, group_l1: float, l1: float, lr: float) -> regfused.Adam:
    """A group lasso on filters. Scale and shift of a BatchNorm have to become zero as well: a filter that is zero with
    a shift that is not is a constant, and padding makes borders of it.
    """
    filters = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    penalized = {id(p) for p in (*filters, *norms)}
    groups = [
        {"params": filters, "group_l1": group_l1},
        {"params": norms, "l1": l1, "proximal": True},
        {"params": [p for p in model.parameters() if id(p) not in penalized]},
    ]
    return regfused.Adam(groups, lr=lr, max_norm=5.0)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model.eval()(x).argmax(1) == y).float().mean())


@torch.no_grad()
def milliseconds(model: nn.Module, x: Tensor) -> float:
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - begin)
    return 1e3 * median(times)


def main(
    group_l1: Annotated[float, typer.Option(min=0, help="Strength of the sum of the filters' norms.")] = 0.02,
    l1: Annotated[float, typer.Option(min=0, help="Of scales and shifts of BatchNorm.")] = 0.002,
    epochs: Annotated[int, typer.Option(min=1)] = 15,
    lr: Annotated[float, typer.Option(min=0)] = 1e-3,
    examples: Annotated[int, typer.Option(min=64, help="Images to train with, at most.")] = 1300,
    seed: int = 0,
) -> None:
    """Smaller layers, the same outputs."""
    console = Console()
    torch.manual_seed(seed)
    x, y = images(seed)
    train, test = (x[:examples], y[:examples]), (x[1300:], y[1300:])
    model = resnet18(num_classes=10)
    optimizer = optimizer_of(model, group_l1, l1, lr)
    for epoch in track(range(epochs), "training", console=console):
        # Towards the end the statistics of BatchNorm settle.
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - epoch / epochs)
        for batch in torch.randperm(len(train[0])).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(train[0][batch]), train[1][batch]).backward()
            optimizer.step()
    before = accuracy(model, *test)
    result = regfused.shrink(model, test[0][:2])
    console.print(str(result.report), highlight=False, markup=False, soft_wrap=True)
    with torch.no_grad():
        outputs, smaller = model(test[0]), result.model.eval()(test[0])
    console.print(
        f"Accuracy {before:.1f} %, without zero filters {accuracy(result.model, *test):.1f} %. Largest difference of "
        f"an output: {float((outputs - smaller).abs().max()):.1e} of {float(outputs.abs().max()):.1f}. 64 images take "
        f"{milliseconds(model, x[:64]):.0f} and {milliseconds(result.model, x[:64]):.0f} ms.",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    typer.run(main)
