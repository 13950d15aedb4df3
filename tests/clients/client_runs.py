"""One training run for all clients: the same model and data, torch's optimizer against ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regfused

L1 = 0.01
MAX_NORM = 0.5
LR = 0.02


@dataclass(frozen=True)
class Recipe:
    """What a run is to do: our optimizer does it inside of its step, torch's leaves it to the loss and the client."""

    rule: str
    regularized: bool

    def ours(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        options = {"l1": L1, "max_norm": MAX_NORM} if self.regularized else {}
        return getattr(regfused, self.rule)(params, lr=LR, **self.of_rule, **options)

    def torchs(self, params: Iterable[Any]) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.rule)(params, lr=LR, **self.of_rule)

    @property
    def of_rule(self) -> dict[str, Any]:
        return {"momentum": 0.9, "weight_decay": 0.01} if self.rule == "SGD" else {"eps": 1e-4}

    @property
    def l1(self) -> float:
        """In the loss, beside torch's optimizer."""
        return L1 if self.regularized else 0.0

    @property
    def max_norm(self) -> float | None:
        """Of the client's own clip, beside torch's optimizer."""
        return MAX_NORM if self.regularized else None

    def make(self, who: str) -> Callable[[Iterable[Any]], torch.optim.Optimizer]:
        return self.ours if who == "regfused" else self.torchs


RECIPES = pytest.mark.parametrize(
    "recipe",
    [Recipe(rule, regularized) for rule in ("SGD", "AdamW") for regularized in (False, True)],
    ids=lambda recipe: f"{recipe.rule}-{'regularized' if recipe.regularized else 'plain'}",
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))


def rows(count: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 6, generator=generator)
    return x, torch.stack([x[:, 0] - 2 * x[:, 1], x[:, 2].tanh()], 1)


def loss_of(model: nn.Module, x: Tensor, y: Tensor, l1: float) -> Tensor:
    loss = nn.functional.mse_loss(model(x), y)
    return loss + l1 * sum(p.abs().sum() for p in model.parameters() if p.requires_grad) if l1 else loss


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def assert_same(got: nn.Module, want: nn.Module, start: nn.Module, atol: float = 1e-5) -> None:
    """The same weights, and others than at the start."""
    assert not torch.allclose(weights(got), weights(start), atol=1e-3)
    torch.testing.assert_close(weights(got), weights(want), rtol=0, atol=atol)


def assert_regularized(optimizer: Any, recipe: Recipe) -> None:
    """Its own numbers say what it did."""
    stats = optimizer.stats.as_floats()
    assert ("grad_norm" in stats) == recipe.regularized
    assert (stats["penalty"] > 0) == recipe.regularized
