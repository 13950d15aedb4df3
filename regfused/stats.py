"""The numbers of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch


class Stats(NamedTuple):
    """Of the last step, as 0-dim tensors.

    ``grad_norm``      norm over all parameters of the gradient, with the penalty's gradient where that is clipped too;
                       NaN where neither ``max_norm`` nor ``nonfinite`` asked for it: it would cost a pass over the
                       gradients (``max_norm=math.inf`` measures and does not clip)
    ``clip_coef``      factor by which the clip scaled it; 0 for a step skipped by ``nonfinite="skip"``
    ``penalty``        l1*sum|p| + l2*sum(p^2) of the stepped parameters, before the step; without the group lasso. Its
                       last digits depend on the instruction set, for rows are added up in the type of arithmetic
    ``zero_fraction``  share of exact zeros among the elements of the stepped parameters, after the step
                       and the group lasso; parameters with a sparse gradient are not looked through
    ``skipped``        how many steps so far left no trace, by ``nonfinite="skip"`` or an AMP overflow

    ``penalty`` and ``zero_fraction`` are those of the last step that was not skipped. Where CUDA kernels made the step,
    the tensors are on their device, and reading the stats does not wait for it.
    """

    grad_norm: torch.Tensor
    clip_coef: torch.Tensor
    penalty: torch.Tensor
    zero_fraction: torch.Tensor
    skipped: torch.Tensor


Number = float | torch.Tensor


class Numbers(Protocol):
    """What a step leaves behind for `Stats`: a `Record`, or a plan of the compiled part."""

    def numbers(self) -> tuple[Number, Number, Number, Number, Number, Number]:
        """grad_norm, clip_coef, penalty, how many exact zeros, among how many elements, skipped steps."""
        ...


@dataclass
class Record:
    """The numbers of a step of the reference; tensors stay on their device until somebody reads the stats."""

    grad_norm: Number = math.nan
    clip_coef: Number = 1.0
    penalties: list[torch.Tensor] = field(default_factory=list)
    zero_counts: list[torch.Tensor] = field(default_factory=list)
    numel: int = 0
    skipped: int = 0

    @property
    def penalty(self) -> float:
        return sum(float(penalty) for penalty in self.penalties)

    @property
    def zeros(self) -> int:
        return sum(int(count) for count in self.zero_counts)

    def numbers(self) -> tuple[Number, Number, Number, Number, Number, Number]:
        return self.grad_norm, self.clip_coef, self.penalty, self.zeros, self.numel, self.skipped


def stats_of(source: Numbers) -> Stats:
    """Stats of a step of the kernels or of the reference."""
    grad_norm, clip_coef, penalty, zeros, numel, skipped = (
        torch.as_tensor(number, dtype=torch.float64).detach() for number in source.numbers()
    )
    return Stats(
        grad_norm=grad_norm,
        clip_coef=clip_coef,
        penalty=penalty,
        zero_fraction=zeros / numel.clamp(min=1),
        skipped=skipped.to(torch.int64),
    )
