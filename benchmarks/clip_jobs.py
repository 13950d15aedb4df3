"""The jobs of gradient clipping, the ways to do them, and the same formulas in float64 to compare with.

A clip leaves gradients whose norm is ``max_norm``, and a second one would find nothing to do: an arm that can tell, as
regfused on the CPU, would skip half of the job. So ``max_norm`` is a little lower in each call than in the one before
(`Falling`), which costs nothing, and is the same for every arm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

import regfused
from benchmarks import models
from benchmarks.job import Call, Job

# From parameters and max_norm to the norm before the clip.
Clip = Callable[[list[Tensor], float], Tensor]
Bounds = Callable[[], float]


class Falling:
    """``max_norm`` of one call after the other: each is below the norm that the gradients have, so that the coefficient
    is below 1 in every call.

    Below by far more than rounding moves a norm: by 2**-12, or by 4 spacings where storage is coarser (a rounding
    moves an element, and so the norm, by half a spacing at most). Gradients fall with it. They begin at the size of 1,
    and once they have fallen to 1/64, far from denormal in any dtype, they begin anew: two passes, once in 17000 calls
    (131 for bfloat16), and in none of the calls that decide on a median.
    """

    LOWEST = 1 / 64

    def __init__(self, params: list[Tensor], begin: Callable[[], None]) -> None:
        self.begin = begin
        self.ratio = 1 - max(2**-12, 4 * torch.finfo(params[0].dtype).eps)
        self.first_norm = norm_in_float64(grads_of(params))
        self.value = self.first_norm

    def __call__(self) -> float:
        self.value *= self.ratio
        if self.value < self.LOWEST * self.first_norm:
            self.begin()
            self.value = self.ratio * self.first_norm
        return self.value


def above(params: list[Tensor], begin: Callable[[], None]) -> Bounds:
    """A ``max_norm`` above the norm, always the same."""
    max_norm = 2 * norm_in_float64(grads_of(params))
    return lambda: max_norm


def norm_in_float64(grads: list[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads))


# --- The ways -------------------------------------------------------------------------------------


def grads_of(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def with_torch(foreach: bool | None) -> Clip:
    return lambda params, max_norm: torch.nn.utils.clip_grad_norm_(params, max_norm, foreach=foreach)


@torch.no_grad()
def scaled_if_above(params: list[Tensor], max_norm: float) -> Tensor:
    """Written with care: the host looks at the norm, and gradients below the limit are left alone."""
    grads = grads_of(params)
    norm = get_total_norm(grads)
    if norm > max_norm:
        torch._foreach_mul_(grads, max_norm / (norm + 1e-6))
    return norm


def norm_with_torch(foreach: bool | None) -> Clip:
    return lambda params, max_norm: get_total_norm(grads_of(params), foreach=foreach)


OURS = "regfused.clip_grad_norm_"
TORCH = "torch clip_grad_norm_"
FOREACH = "torch clip_grad_norm_, foreach=True"
OURS_NORM = "regfused.grad_norm"
TORCH_NORM = "torch get_total_norm"
CLIPS: Mapping[str, Clip] = {
    OURS: regfused.clip_grad_norm_,
    "get_total_norm, scaled if above": scaled_if_above,
    TORCH: with_torch(None),
    FOREACH: with_torch(True),
    "torch clip_grad_norm_, foreach=False": with_torch(False),
}
NORMS: Mapping[str, Clip] = {
    OURS_NORM: lambda params, max_norm: regfused.grad_norm(params),
    TORCH_NORM: norm_with_torch(None),
    "torch get_total_norm, foreach=True": norm_with_torch(True),
    "torch get_total_norm, foreach=False": norm_with_torch(False),
}


@dataclass(frozen=True, eq=False)
class ClipJob(Job):
    """``elements_moved``: the norm reads each gradient; a clip reads it again and writes it."""

    ways: Mapping[str, Clip]
    # Of the parameters, and a function that gives them the gradients that they begin with.
    bounds: Callable[[list[Tensor], Callable[[], None]], Bounds]
    checked_ratio: float  # of max_norm to the norm, where errors are measured

    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        params, clip = models.own_copy(start), self.ways[name]
        first, grads = grads_of(start), grads_of(params)
        size = norm_in_float64(first) / math.sqrt(sum(g.numel() for g in first))

        def begin() -> None:
            torch._foreach_copy_(grads, first)
            torch._foreach_mul_(grads, 1 / size)

        begin()
        max_norm = self.bounds(params, begin)
        return lambda: clip(params, max_norm()), params

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float:
        """Of the gradients over the largest gradient, or of the norm over the norm, whichever is larger."""
        generator = torch.Generator(device).manual_seed(0)
        params = [p.requires_grad_() for p in models.normal(shapes, dtype, device, generator)]
        for p, grad in zip(params, models.normal(shapes, dtype, device, generator), strict=True):
            p.grad = grad
        norm = norm_in_float64(grads_of(params))
        max_norm = self.checked_ratio * norm
        coefficient = min(1.0, max_norm / (norm + 1e-6))
        exact = [coefficient * g.double() for g in grads_of(params)]
        got = float(self.ways[name](params, max_norm))
        return max(models.largest_error(grads_of(params), exact), abs(got - norm) / norm)


JOBS = [
    ClipJob("clip", "clip", 3, CLIPS, Falling, checked_ratio=0.5),
    ClipJob("nothing_to_clip", "nothing to clip", 1, CLIPS, above, checked_ratio=2.0),
    ClipJob("norm", "norm alone", 1, NORMS, above, checked_ratio=2.0),
]
CLIP, NOTHING_TO_CLIP, NORM = JOBS
