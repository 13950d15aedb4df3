"""The jobs of dropout, the ways to do them, and what can be checked of results whose masks all differ.

In every call each way first frees the gradient of the call before, makes a mask, applies it to the same input, and
brings the same gradient back through it.

No arm is compiled by ``torch.compile``: compiled dropout is another program for each size and probability, and each
takes the compiler seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import regfused
from benchmarks import models
from benchmarks.job import Call, Job

Way = Callable[[float], Callable[[Tensor], Tensor]]  # from p to the layer


def by_bernoulli(p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)


def by_rand(p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * (torch.rand_like(x) >= p) * (1 / (1 - p))


def by_where(p: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.where(torch.rand_like(x) < p, 0.0, x * (1 / (1 - p)))


OURS = "regfused.Dropout"
TORCH = "torch.nn.Dropout"
BERNOULLI = "mask by bernoulli_"
RAND = "mask by rand"
WHERE = "mask by rand, where"
WAYS: Mapping[str, Way] = {
    OURS: regfused.Dropout,
    TORCH: nn.Dropout,
    BERNOULLI: by_bernoulli,
    RAND: by_rand,
    WHERE: by_where,
}


@dataclass(frozen=True)
class Kept:
    """How many elements a way has kept, and how far that is from their expected number."""

    kept: int
    numel: int
    p: float

    @property
    def share(self) -> float:
        return self.kept / self.numel

    @property
    def deviations(self) -> float:
        """In standard deviations of that number; beyond 4 once in 16000 times."""
        return (self.kept - self.numel * (1 - self.p)) / math.sqrt(self.numel * self.p * (1 - self.p))


@dataclass(frozen=True, eq=False)
class DropoutJob(Job):
    """``elements_moved``: forward reads the input and writes the output, backward reads and writes their gradients."""

    ways: Mapping[str, Way]
    p: float

    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        """On the first of the tensors. Its outputs are zero by design, so that none has to be ordinary."""
        [x, *_] = start
        upstream = x.grad.clone()
        x = x.detach().requires_grad_()
        layer = self.ways[name](self.p)

        def call() -> None:
            x.grad = None
            layer(x).backward(upstream)

        call()  # allocates the gradient, which is no extra memory
        return call, []

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float:
        """Of output and gradient, over the largest of them, against ``x/(1 - p)`` or 0: the mask that the output shows
        must be the gradient's as well.
        """
        x, y, upstream = self.applied(name, shapes, dtype, device)
        assert x.grad is not None
        factor = (y != 0).double() / (1 - self.p)
        exact = [factor * x.detach().double(), factor * upstream.double()]
        return max(models.largest_error([got], [want]) for got, want in zip([y, x.grad], exact, strict=True))

    def kept(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> Kept:
        _, y, _ = self.applied(name, shapes, dtype, device)
        return Kept(int(y.count_nonzero()), y.numel(), self.p)

    def applied(
        self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Input, which has its gradient, output, and the gradient that came from above; none of the inputs is zero."""
        generator = torch.Generator(device).manual_seed(0)
        [x, *_] = models.normal(shapes, dtype, device, generator)
        [upstream, *_] = models.normal(shapes, dtype, device, generator)
        x = (x + torch.where(x < 0, -1, 1)).requires_grad_()
        torch.manual_seed(1)
        y = self.ways[name](self.p)(x)
        y.backward(upstream)
        return x, y.detach(), upstream


JOBS = [DropoutJob(f"p={p}", f"dropout forward + backward, p = {p}", 4, WAYS, p) for p in (0.5, 0.1)]
