"""The jobs of an SGD step, the ways to do them, and the same formula in float64 to compare with.

All ways read and write tensors that they own. Peers that clip scale ``p.grad`` in place, and those that have no penalty
of their own add its gradient to ``p.grad``: over many calls their gradients stay at the norm ``max_norm``, so they keep
moving ordinary numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

import regfused
from benchmarks import job as jobs
from benchmarks import models


@dataclass(frozen=True)
class Hyperparameters:
    lr: float
    momentum: float
    weight_decay: float
    l1: float
    l2: float
    max_norm: float | None


Step = jobs.Call
Way = Callable[[list[Tensor], Hyperparameters], Step]

# So small that the parameters keep their size over any number of steps; max_norm is below the norm of the gradients
# that steps are timed with, so that the clip scales.
TIMED = Hyperparameters(lr=1e-9, momentum=0.9, weight_decay=1e-4, l1=1e-5, l2=1e-5, max_norm=0.5 * models.GRAD_NORM)


@dataclass(frozen=True, eq=False)
class Job(jobs.Job):
    """``elements_moved``: param, grad and momentum buffer read, param and buffer written; for the norm, the gradient
    (and with a penalty the parameter) once more.
    """

    ways: dict[str, Way]
    clips: bool
    penalizes: bool

    def of(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """The hyperparameters with what this job leaves out switched off."""
        if not self.clips:
            hyperparameters = replace(hyperparameters, max_norm=None)
        if not self.penalizes:
            hyperparameters = replace(hyperparameters, l1=0.0, l2=0.0)
        return hyperparameters

    def setup(self, name: str, start: list[Tensor]) -> tuple[Step, list[Tensor]]:
        """The step, after a first one: it allocates the momentum buffers, which are no extra memory."""
        params = models.own_copy(start)
        step = self.ways[name](params, self.of(TIMED))
        step()
        return step, params

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float:
        return error(self.ways[name], self, shapes, dtype, device=device)


# --- The ways -------------------------------------------------------------------------------------


def with_regfused(params: list[Tensor], h: Hyperparameters) -> Step:
    optimizer = regfused.SGD(
        params, h.lr, h.momentum, weight_decay=h.weight_decay, l1=h.l1, l2=h.l2, max_norm=h.max_norm
    )
    return optimizer.step


def with_torch(params: list[Tensor], h: Hyperparameters, **implementation: bool) -> torch.optim.SGD:
    return torch.optim.SGD(params, h.lr, h.momentum, weight_decay=h.weight_decay, **implementation)


def plain(**implementation: bool) -> Way:
    """``step()`` alone."""
    return lambda params, h: with_torch(params, h, **implementation).step


def clipped(**implementation: bool) -> Way:
    """``clip_grad_norm_`` and ``step()``."""

    def way(params: list[Tensor], h: Hyperparameters) -> Step:
        optimizer = with_torch(params, h, **implementation)

        def step() -> None:
            clip_grad_norm_(params, _bound(h))
            optimizer.step()

        return step

    return way


def clipped_by_grad_scale(params: list[Tensor], h: Hyperparameters) -> Step:
    """The clip handed to ``fused=True`` as a gradient scale, which saves a pass over the gradients."""
    optimizer = with_torch(params, h, fused=True)
    optimizer.found_inf = torch.zeros((), device=params[0].device)
    max_norm = _bound(h)

    def step() -> None:
        grads = [p.grad for p in params if p.grad is not None]
        norm = get_total_norm(grads).float()
        optimizer.grad_scale = 1.0 / torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        optimizer.step()

    return step


def penalty_in_loss(**implementation: bool) -> Way:
    """The penalty through autograd, on top of the gradients of the loss, as a training loop writes it."""

    def way(params: list[Tensor], h: Hyperparameters) -> Step:
        optimizer = with_torch(params, h, **implementation)

        def step() -> None:
            penalty = h.l1 * sum(p.abs().sum() for p in params) + h.l2 * sum(p.pow(2).sum() for p in params)
            penalty.backward()  # adds to the p.grad that is there
            clip_grad_norm_(params, _bound(h))
            optimizer.step()

        return step

    return way


@torch.no_grad()
def penalty_by_foreach(params: list[Tensor], h: Hyperparameters) -> Step:
    """Written with care: no autograd for the penalty, and every line one call for all tensors."""
    optimizer = with_torch(params, h, fused=True)

    @torch.no_grad()
    def step() -> None:
        grads = [p.grad for p in params]
        torch._foreach_add_(grads, torch._foreach_sign(params), alpha=h.l1)
        torch._foreach_add_(grads, params, alpha=2 * h.l2)
        clip_grad_norm_(params, _bound(h))
        optimizer.step()

    return step


def _bound(h: Hyperparameters) -> float:
    assert h.max_norm is not None
    return h.max_norm


OURS = "regfused.SGD"
FUSED = "torch fused=True"
CLIP_FUSED = "clip_grad_norm_ + fused=True"
CLIP_GRAD_SCALE = "norm as grad_scale + fused=True"
SEED_LOOP = "penalty in loss + clip_grad_norm_ + SGD"
SEED_LOOP_FUSED = "penalty in loss + clip_grad_norm_ + fused=True"

JOBS = [
    Job(
        "step",
        "momentum + weight decay",
        5,
        clips=False,
        penalizes=False,
        ways={
            OURS: with_regfused,
            FUSED: plain(fused=True),
            "torch foreach=True": plain(foreach=True),
            "torch for-loop": plain(foreach=False),
        },
    ),
    Job(
        "clip",
        "clip + momentum + weight decay",
        6,
        clips=True,
        penalizes=False,
        ways={
            OURS: with_regfused,
            CLIP_GRAD_SCALE: clipped_by_grad_scale,
            CLIP_FUSED: clipped(fused=True),
            "clip_grad_norm_ + foreach=True": clipped(foreach=True),
            "clip_grad_norm_ + for-loop": clipped(foreach=False),
        },
    ),
    Job(
        "elastic_net",
        "elastic net + clip + momentum + weight decay",
        7,
        clips=True,
        penalizes=True,
        ways={
            OURS: with_regfused,
            "penalty by foreach + clip_grad_norm_ + fused=True": penalty_by_foreach,
            SEED_LOOP_FUSED: penalty_in_loss(fused=True),
            SEED_LOOP: penalty_in_loss(),
        },
    ),
]


# --- The error of a way ---------------------------------------------------------------------------

STEPS = 3


def checked_hyperparameters(numel: int) -> Hyperparameters:
    """Strong enough that a term left out, or doubled, shows; made for standard normal gradients."""
    return Hyperparameters(0.1, 0.9, weight_decay=1e-2, l1=1e-2, l2=1e-2, max_norm=0.5 * math.sqrt(numel))


def error(way: Way, job: Job, shapes: list[list[int]], dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> float:
    """The largest error of a parameter after some steps, relative to the largest parameter, against float64."""
    generator = torch.Generator(device).manual_seed(seed)
    # Farther from zero than the steps go: near zero, one rounding turns sign(p) over, and l1*sign(p) with it.
    params = [p + p.sign() for p in models.normal(shapes, dtype, device, generator)]
    grads_of_steps = [models.normal(shapes, dtype, device, generator) for _ in range(STEPS)]
    h = job.of(checked_hyperparameters(sum(p.numel() for p in params)))
    exact = step_in_float64(params, grads_of_steps, h)
    for p in params:
        p.requires_grad_()
        p.grad = torch.zeros_like(p)
    step = way(params, h)
    for grads in grads_of_steps:
        for p, grad in zip(params, grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(grad)
        step()
    return models.largest_error(params, exact)


def step_in_float64(params: list[Tensor], grads_of_steps: list[list[Tensor]], h: Hyperparameters) -> list[Tensor]:
    """The parameters after one step for each list of gradients."""
    params = [p.double() for p in params]
    buffers: list[Tensor] = []
    for grads in grads_of_steps:
        penalized = [g.double() + h.l1 * p.sign() + 2 * h.l2 * p for p, g in zip(params, grads, strict=True)]
        norm = math.sqrt(sum(float(x.square().sum()) for x in penalized))
        c = 1.0 if h.max_norm is None else min(1.0, h.max_norm / (norm + 1e-6))
        updates = [c * x + h.weight_decay * p for p, x in zip(params, penalized, strict=True)]
        buffers = [h.momentum * b + d for b, d in zip(buffers, updates, strict=True)] if buffers else updates
        params = [p - h.lr * b for p, b in zip(params, buffers, strict=True)]
    return params
