"""The jobs of a step, the ways to do them, and the same formula in float64 to compare with: a table of optimizers.

All ways read and write tensors that they own. Peers that clip scale ``p.grad`` in place, and those that have no penalty
of their own add its gradient to ``p.grad``: over many calls their gradients stay at the norm ``max_norm``, so they keep
moving ordinary numbers.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

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
    optimizer: str = "sgd"  # one of OPTIMIZERS


@dataclass(frozen=True)
class Optimizer:
    """One class of regfused, the one of torch that it replaces, and the rule in float64."""

    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer]
    title: str  # what a step has beside clip and penalty
    slots: int  # tensors of state that a step reads and writes
    options: Callable[[Hyperparameters], dict[str, Any]]
    move: Callable[[Tensor, dict[str, Tensor], Hyperparameters, int], Tensor]  # of d and the state, which it changes


def sgd_move(d: Tensor, state: dict[str, Tensor], h: Hyperparameters, t: int) -> Tensor:
    state["b"] = h.momentum * state["b"] + d if t > 1 else d
    return h.lr * state["b"]


def adam_move(d: Tensor, state: dict[str, Tensor], h: Hyperparameters, t: int) -> Tensor:
    zero = torch.zeros_like(d)
    state["m"] = 0.9 * state.get("m", zero) + 0.1 * d
    state["v"] = 0.999 * state.get("v", zero) + 0.001 * d * d
    return h.lr * (state["m"] / (1 - 0.9**t)) / ((state["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


OPTIMIZERS = {
    "sgd": Optimizer(
        regfused.SGD,
        torch.optim.SGD,
        "momentum + weight decay",
        1,
        lambda h: {"lr": h.lr, "momentum": h.momentum, "weight_decay": h.weight_decay},
        sgd_move,
    ),
    "adam": Optimizer(
        regfused.Adam,
        torch.optim.Adam,
        "Adam + weight decay",
        2,
        lambda h: {"lr": h.lr, "weight_decay": h.weight_decay},
        adam_move,
    ),
}


Step = jobs.Call
Way = Callable[[list[Tensor], Hyperparameters], Step]

# So small that the parameters keep their size over any number of steps; max_norm is below the norm of the gradients
# that steps are timed with, so that the clip scales.
TIMED = Hyperparameters(lr=1e-9, momentum=0.9, weight_decay=1e-4, l1=1e-5, l2=1e-5, max_norm=0.5 * models.GRAD_NORM)


@dataclass(frozen=True, eq=False)
class Job(jobs.Job):
    """``elements_moved``: param, grad and state read, param and state written; for the norm, the gradient (and with a
    penalty the parameter) once more.
    """

    ways: dict[str, Way]
    clips: bool
    penalizes: bool
    optimizer: str = "sgd"

    def of(self, hyperparameters: Hyperparameters) -> Hyperparameters:
        """The hyperparameters with what this job leaves out switched off."""
        if not self.clips:
            hyperparameters = replace(hyperparameters, max_norm=None)
        if not self.penalizes:
            hyperparameters = replace(hyperparameters, l1=0.0, l2=0.0)
        return replace(hyperparameters, optimizer=self.optimizer)

    def setup(self, name: str, start: list[Tensor]) -> tuple[Step, list[Tensor]]:
        """The step, after a first one: it allocates the state, which is no extra memory."""
        params = models.own_copy(start)
        step = self.ways[name](params, self.of(TIMED))
        step()
        return step, params

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float:
        return error(self.ways[name], self, shapes, dtype, device=device)


# --- The ways -------------------------------------------------------------------------------------


def with_regfused(params: list[Tensor], h: Hyperparameters) -> Step:
    optimizer = OPTIMIZERS[h.optimizer]
    return optimizer.ours(params, **optimizer.options(h), l1=h.l1, l2=h.l2, max_norm=h.max_norm).step


def with_torch(params: list[Tensor], h: Hyperparameters, **implementation: bool) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[h.optimizer]
    return optimizer.theirs(params, **optimizer.options(h), **implementation)


def with_optimi(params: list[Tensor], h: Hyperparameters) -> Step:
    """torch-optimi, in the fastest way that it has on this device."""
    import optimi

    optimizer = optimi.Adam(params, h.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=h.weight_decay)
    if h.max_norm is None:
        return optimizer.step

    def step() -> None:
        clip_grad_norm_(params, _bound(h))
        optimizer.step()

    return step


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
TUTORIAL_LOOP = "penalty in loss + clip_grad_norm_ + SGD"
TUTORIAL_LOOP_FUSED = "penalty in loss + clip_grad_norm_ + fused=True"


def tutorial_loop(name: str) -> str:
    """The arm of the loop that tutorials have, with this optimizer."""
    return TUTORIAL_LOOP.replace("SGD", OPTIMIZERS[name].theirs.__name__)


def jobs_of(name: str) -> list[Job]:
    optimizer = OPTIMIZERS[name]
    ours, title = f"regfused.{optimizer.ours.__name__}", optimizer.title
    elements = 3 + 2 * optimizer.slots
    # Where it is installed.
    optimi: dict[str, Way] = (
        {"torch-optimi": with_optimi} if name == "adam" and importlib.util.find_spec("optimi") else {}
    )
    return [
        Job(
            "step",
            title,
            elements,
            clips=False,
            penalizes=False,
            optimizer=name,
            ways={
                ours: with_regfused,
                FUSED: plain(fused=True),
                "torch foreach=True": plain(foreach=True),
                "torch for-loop": plain(foreach=False),
                **optimi,
            },
        ),
        Job(
            "clip",
            f"clip + {title}",
            elements + 1,
            clips=True,
            penalizes=False,
            optimizer=name,
            ways={
                ours: with_regfused,
                CLIP_GRAD_SCALE: clipped_by_grad_scale,
                CLIP_FUSED: clipped(fused=True),
                "clip_grad_norm_ + foreach=True": clipped(foreach=True),
                "clip_grad_norm_ + for-loop": clipped(foreach=False),
                **{f"clip_grad_norm_ + {peer}": way for peer, way in optimi.items()},
            },
        ),
        Job(
            "elastic_net",
            f"elastic net + clip + {title}",
            elements + 2,
            clips=True,
            penalizes=True,
            optimizer=name,
            ways={
                ours: with_regfused,
                "penalty by foreach + clip_grad_norm_ + fused=True": penalty_by_foreach,
                TUTORIAL_LOOP_FUSED: penalty_in_loss(fused=True),
                tutorial_loop(name): penalty_in_loss(),
            },
        ),
    ]


JOBS = jobs_of("sgd")


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
    states: list[dict[str, Tensor]] = [{} for _ in params]
    for t, grads in enumerate(grads_of_steps, start=1):
        penalized = [g.double() + h.l1 * p.sign() + 2 * h.l2 * p for p, g in zip(params, grads, strict=True)]
        norm = math.sqrt(sum(float(x.square().sum()) for x in penalized))
        c = 1.0 if h.max_norm is None else min(1.0, h.max_norm / (norm + 1e-6))
        directions = [c * x + h.weight_decay * p for p, x in zip(params, penalized, strict=True)]
        move = OPTIMIZERS[h.optimizer].move
        params = [p - move(d, s, h, t) for p, d, s in zip(params, directions, states, strict=True)]
    return params
