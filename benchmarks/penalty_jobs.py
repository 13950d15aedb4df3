"""The jobs of a penalty in the loss, the ways to do them, and the same formula in float64 to compare with.

All ways read the same parameters, which nobody changes. In every call each way first frees its gradients of the call
before, as ``zero_grad`` does, and ends with new ones in ``p.grad``.

No arm is compiled by ``torch.compile``: the two lines unroll into several operations for each tensor, forward and
backward, which takes the compiler more than a minute on ResNet-50 with its 161 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import regfused
from benchmarks import models, step_jobs
from benchmarks.job import Call, Job

Way = Callable[[list[Tensor], float, float], Call]

TIMED_L1, TIMED_L2 = 1e-5, 1e-5
# Strong enough that a term left out, or doubled, shows.
CHECKED_L1, CHECKED_L2 = 0.3, 0.7


def free_grads(params: list[Tensor]) -> None:
    for p in params:
        p.grad = None


def backward_of(value: Callable[[list[Tensor], float, float], Tensor]) -> Way:
    """Forward and backward pass; the call returns the penalty."""

    def way(params: list[Tensor], l1: float, l2: float) -> Call:
        def call() -> Tensor:
            free_grads(params)
            penalty = value(params, l1, l2)
            penalty.backward()
            return penalty.detach()

        return call

    return way


# --- The ways -------------------------------------------------------------------------------------


def with_regfused(params: list[Tensor], l1: float, l2: float) -> Tensor:
    return regfused.penalty(params, l1=l1, l2=l2)


def two_lines(params: list[Tensor], l1: float, l2: float) -> Tensor:
    """As a training loop writes it."""
    penalty = l1 * sum(p.abs().sum() for p in params)
    return penalty + l2 * sum(p.pow(2).sum() for p in params)


def of_one_vector(params: list[Tensor], l1: float, l2: float) -> Tensor:
    """The two lines on a copy of everything."""
    flat = torch.nn.utils.parameters_to_vector(params)
    return l1 * flat.abs().sum() + l2 * flat.pow(2).sum()


def norms_of_one_vector(params: list[Tensor], l1: float, l2: float) -> Tensor:
    """A copy of everything, and the two operations with the fewest passes over it."""
    flat = torch.cat([p.view(-1) for p in params])
    return l1 * torch.linalg.vector_norm(flat, 1) + l2 * flat.dot(flat)


def foreach_norms(params: list[Tensor], l1: float, l2: float) -> Tensor:
    """Lists of norms, through autograd."""
    ones, twos = torch._foreach_norm(params, 1), torch._foreach_norm(params, 2)
    return l1 * torch.stack(ones).sum() + l2 * torch.stack(twos).square().sum()


class ByForeach(torch.autograd.Function):
    """Written with care: one node for autograd, and every line one call for all tensors."""

    @staticmethod
    def forward(ctx: Any, l1: float, l2: float, *params: Tensor) -> Tensor:
        ctx.save_for_backward(*params)
        ctx.strengths = l1, l2
        return foreach_norms(list(params), l1, l2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gain: Tensor) -> tuple[Tensor | None, ...]:
        params = ctx.saved_tensors
        l1, l2 = ctx.strengths
        grads = torch._foreach_sign(params)
        torch._foreach_mul_(grads, l1)
        torch._foreach_add_(grads, params, alpha=2 * l2)
        torch._foreach_mul_(grads, gain)
        return None, None, *grads


def by_foreach(params: list[Tensor], l1: float, l2: float) -> Tensor:
    return ByForeach.apply(l1, l2, *params)


class HandOut(torch.autograd.Function):
    """One node that computes nothing; its gradients are tensors that are there already."""

    @staticmethod
    def forward(ctx: Any, ready: list[Tensor], *params: Tensor) -> Tensor:
        ctx.ready = ready
        return torch.zeros((), device=params[0].device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gain: Tensor) -> tuple[Tensor | None, ...]:
        grads = tuple(ctx.ready)
        ctx.ready.clear()  # or autograd would copy what somebody else holds
        return None, *grads


def autograd_alone(params: list[Tensor], l1: float, l2: float) -> Call:
    """No peer: what autograd takes to bring a gradient to every tensor, whoever computes it. The gradients are handed
    round: those of the call before, whatever they are.
    """

    def call() -> None:
        ready = [p.grad if p.grad is not None else torch.ones_like(p) for p in params]
        free_grads(params)
        HandOut.apply(ready, *params).backward()

    return call


OURS = "regfused.penalty"
TWO_LINES = "two lines in the loss"
ONE_VECTOR = "two lines on parameters_to_vector"
CAT = "torch.cat, vector_norm and dot"
FOREACH_NORMS = "_foreach_norm through autograd"
BY_FOREACH = "autograd.Function over lists"
AUTOGRAD_ALONE = "autograd alone (no penalty)"


@dataclass(frozen=True, eq=False)
class PenaltyJob(Job):
    """``elements_moved``: forward reads each parameter, backward reads it again and writes its gradient."""

    ways: Mapping[str, Way]

    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        params = [p.detach().requires_grad_() for p in start]
        call = self.ways[name](params, TIMED_L1, TIMED_L2)
        call()  # allocates gradients, which are no extra memory
        return call, params

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float | None:
        """Of the gradients over the largest gradient, or of the value over the value, whichever is larger."""
        if name == AUTOGRAD_ALONE:
            return None
        generator = torch.Generator(device).manual_seed(0)
        params = [p.requires_grad_() for p in models.normal(shapes, dtype, device, generator)]
        value = self.ways[name](params, CHECKED_L1, CHECKED_L2)()
        assert isinstance(value, Tensor)
        wide = [p.detach().double() for p in params]
        exact = sum(float(CHECKED_L1 * p.abs().sum() + CHECKED_L2 * p.square().sum()) for p in wide)
        grads = [p.grad for p in params if p.grad is not None]
        of_grads = models.largest_error(grads, [CHECKED_L1 * p.sign() + 2 * CHECKED_L2 * p for p in wide])
        return max(of_grads, abs(float(value) - exact) / exact)


@dataclass(frozen=True, eq=False)
class InTheStep(Job):
    """What the same penalty costs where the optimizer has it: each way is a job of a step."""

    ways: Mapping[str, step_jobs.Job]

    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        return self.ways[name].setup(step_jobs.OURS, start)

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float:
        return self.ways[name].error(step_jobs.OURS, shapes, dtype, device)


PENALTY = PenaltyJob(
    "penalty",
    "penalty forward + backward",
    3,
    {
        OURS: backward_of(with_regfused),
        BY_FOREACH: backward_of(by_foreach),
        FOREACH_NORMS: backward_of(foreach_norms),
        CAT: backward_of(norms_of_one_vector),
        ONE_VECTOR: backward_of(of_one_vector),
        TWO_LINES: backward_of(two_lines),
        AUTOGRAD_ALONE: autograd_alone,
    },
)

WITH, WITHOUT = "regfused.SGD, l1 and l2", "regfused.SGD without"


def _step(penalizes: bool) -> step_jobs.Job:
    ways = {step_jobs.OURS: step_jobs.with_regfused}
    return step_jobs.Job("step", "momentum + weight decay", 5, ways, clips=False, penalizes=penalizes)


IN_THE_STEP = InTheStep(
    "in_the_step", "penalty inside of the optimizer's step", 5, {WITH: _step(True), WITHOUT: _step(False)}
)

JOBS = [PENALTY, IN_THE_STEP]
