"""Draws docs/figures/path.png: the regularization path of a small network on scikit-learn's digits."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits

import regfused


def loss(model: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(data[0]), data[1])


def main() -> None:
    # The network is too small to gain from more threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    inputs, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(inputs))
    x, y = torch.tensor(inputs, dtype=torch.float32)[order] / 16, torch.tensor(targets)[order]
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    begin = time.perf_counter()
    result = regfused.path(
        model,
        loss,
        (x[:900], y[:900]),
        count=20,
        steps=300,
        validation=lambda model: (model(x[900:]).argmax(1) == y[900:]).float(),
    )
    print(result.table())
    print(f"{time.perf_counter() - begin:.1f} s with {torch.get_num_threads()} thread, torch {torch.__version__}")
    result.plot(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
