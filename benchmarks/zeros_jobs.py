"""The jobs that make and keep zeros under Adam: a group lasso over rows and over columns, and zeros that stay.

A group lasso is in the metric of Adam's step, so a slice needs the root of an equation. Tensors of one dimension bear
none. Results are compared with the reference in float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import regfused
from benchmarks import models
from benchmarks.job import Call, Job

LR = 1e-6  # so small that no slice becomes zero in all the calls that are timed
GROUP_L1 = 1e-4
Way = Callable[[list[Tensor], float, float], Call]  # of parameters, learning rate and strength


def groups(params: list[Tensor], **options: Any) -> list[dict[str, Any]]:
    """Parameter groups with the options for matrices and filters alone."""
    large = [p for p in params if p.dim() > 1]
    small = [p for p in params if p.dim() <= 1]
    return [{"params": large, **options}] + ([{"params": small}] if small else [])


def with_regfused(dim: int) -> Way:
    return lambda params, lr, strength: regfused.Adam(groups(params, group_l1=strength, group_dim=dim), lr=lr).step


def without(params: list[Tensor], lr: float, strength: float) -> Call:
    return regfused.Adam(params, lr=lr).step


def with_torch(dim: int) -> Way:
    """``fused=True``, and after it the group's map by torch operations, written with care."""

    def way(params: list[Tensor], lr: float, strength: float) -> Call:
        optimizer = torch.optim.Adam(params, lr=lr, fused=True)
        penalized = [p for p in params if p.dim() > 1]

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            for p in penalized:
                state = optimizer.state[p]
                correction = (1 - 0.999 ** float(state["step"])) ** 0.5
                lengths = state["exp_avg_sq"].sqrt().div_(correction).add_(1e-8).reciprocal_().mul_(lr)
                map_slices(p, lengths, strength, dim)

        return step

    return way


def map_slices(p: Tensor, lengths: Tensor, strength: float, dim: int) -> None:
    """For each slice w with lengths e the r that solves ``sum((w*r / (r + e*strength))^2) = r^2``, by Newton's method;
    then ``w*r / (r + e*strength)``. Where ``norm(w/e) <= strength`` it is zero.
    """
    others = [d for d in range(p.dim()) if d != dim]
    alive = (p / lengths).square_().sum(others, keepdim=True).sqrt_() > strength
    thresholds = lengths.mul_(strength)
    # From a radius at which no slice is too short, towards the root: at most as many as double precision needs.
    r = p.square().sum(others, keepdim=True).sqrt_()
    for _ in range(20):
        ratio = p / (r + thresholds)
        squares = ratio.square_()
        value = squares.sum(others, keepdim=True)
        slope = squares.div_(r + thresholds).sum(others, keepdim=True)
        next_r = torch.where(alive, r + (value.sqrt() - 1) * value / slope, r).clamp_(min=0)
        moved = ((next_r - r).abs() > 1e-7 * r).logical_and_(alive).any()
        r = next_r
        if not moved:
            break
    p.copy_(torch.where(alive, p * r / (r + thresholds), 0))


def with_pat(params: list[Tensor], lr: float, strength: float) -> Call:
    """torchao's PAT: the map of plain Euclidean length, whose zeros are not those of the penalized loss under Adam."""
    from torchao.prototype.pat.optim import PruneOptimizer

    named = groups(params, group_type="Dim0Grouper", prox_type="ProxGroupLasso", reg_lambda=strength)
    return PruneOptimizer(torch.optim.Adam(named, lr=lr, fused=True)).step


def keeping_zeros(params: list[Tensor], lr: float, strength: float) -> Call:
    return regfused.Adam(groups(params, keep_zeros=True), lr=lr).step


def with_mask(params: list[Tensor], lr: float, strength: float) -> Call:
    """``fused=True``, and a mask after it."""
    optimizer = torch.optim.Adam(params, lr=lr, fused=True)
    masked = [p for p in params if p.dim() > 1]
    masks = [(p != 0).to(p.dtype) for p in masked]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_mul_(masked, masks)

    return step


OURS = "regfused.Adam"
WITHOUT = "regfused.Adam without it"
TORCH = "fused=True + torch operations"
PAT = "torchao PAT + fused=True"
MASK = "fused=True + mask"
OTHER_RESULT = (WITHOUT, PAT)


@dataclass(frozen=True, eq=False)
class ZerosJob(Job):
    """``elements_moved``: param, grad and state read, param and state written; for columns the parameter and the
    second moment are read and the parameter written once more.
    """

    ways: Mapping[str, Way]
    options: Mapping[str, Any]  # of the reference
    zeros: float = 0.0  # share of the elements that are zero at first

    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        params = models.own_copy(start)
        self.plant_zeros(params)
        step = self.ways[name](params, LR, GROUP_L1)
        step()
        return step, [] if self.zeros else params

    def error(self, name: str, shapes: models.Shapes, dtype: torch.dtype, device: str = "cpu") -> float | None:
        """Of the parameters after three steps with other gradients, over the largest parameter."""
        if name in OTHER_RESULT:
            return None
        generator = torch.Generator(device).manual_seed(0)
        params = [p.requires_grad_() for p in models.normal(shapes, dtype, device, generator)]
        self.plant_zeros(params)
        exact = [p.detach().double().requires_grad_() for p in params]
        lr, strength = 0.01, 1.0
        step = self.ways[name](params, lr, strength)
        options = {name: strength if name == "group_l1" else value for name, value in self.options.items()}
        reference = regfused.reference.Adam(groups(exact, **options), lr=lr)
        for _ in range(3):
            for p, q, grad in zip(params, exact, models.normal(shapes, dtype, device, generator), strict=True):
                p.grad = grad + grad.sign()  # far from zero, where Adam's first step jumps
                q.grad = p.grad.double()
            step()
            reference.step()
        return models.largest_error(params, [q.detach() for q in exact])

    @torch.no_grad()
    def plant_zeros(self, params: list[Tensor]) -> None:
        for p in params:
            count = int(self.zeros * p.numel())
            p.view(-1)[torch.randperm(p.numel(), generator=torch.Generator().manual_seed(0))[:count]] = 0


def jobs() -> list[Job]:
    # Where it is installed.
    pat: dict[str, Way] = {PAT: with_pat} if importlib.util.find_spec("torchao") else {}
    return [
        ZerosJob(
            "group_rows",
            "group lasso over rows and filters + Adam",
            7,
            {OURS: with_regfused(0), WITHOUT: without, TORCH: with_torch(0), **pat},
            {"group_l1": GROUP_L1, "group_dim": 0},
        ),
        ZerosJob(
            "group_columns",
            "group lasso over columns and input channels + Adam",
            10,
            {OURS: with_regfused(1), WITHOUT: without, TORCH: with_torch(1)},
            {"group_l1": GROUP_L1, "group_dim": 1},
        ),
        ZerosJob(
            "keep_zeros",
            "zeros that stay + Adam",
            7,
            {OURS: keeping_zeros, WITHOUT: without, MASK: with_mask},
            {"keep_zeros": True},
            zeros=0.5,
        ),
    ]


JOBS = jobs()
GROUP_ROWS, GROUP_COLUMNS, KEEP_ZEROS = JOBS
