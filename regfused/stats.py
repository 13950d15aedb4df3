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
    ``penalty``        l1*sum|p| + l2*sum(p^2) of the stepped parameters, before the step
    ``zero_fraction``  share of exact zeros among the elements of the stepped parameters, after the step
    ``skipped``        how many steps so far left no trace, by ``nonfinite="skip"`` or an AMP overflow

    ``penalty`` and ``zero_fraction`` are those of the last step that was not skipped.
    """

    grad_norm: torch.Tensor
    clip_coef: torch.Tensor
    penalty: torch.Tensor
    zero_fraction: torch.Tensor
    skipped: torch.Tensor


class Numbers(Protocol):
    """What a step leaves behind for `Stats`: a `Record`, or a plan of the compiled part."""

    @property
    def grad_norm(self) -> float | torch.Tensor: ...
    @property
    def clip_coef(self) -> float | torch.Tensor: ...
    @property
    def penalty(self) -> float: ...
    @property
    def zeros(self) -> int: ...
    @property
    def numel(self) -> int: ...
    @property
    def skipped(self) -> int: ...


@dataclass
class Record:
    """The numbers of a step of the reference; tensors stay on their device until somebody reads the stats."""

    grad_norm: float | torch.Tensor = math.nan
    clip_coef: float | torch.Tensor = 1.0
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


def stats_of(numbers: Numbers) -> Stats:
    """Stats of a step of the kernels or of the reference."""

    def scalar(value: float | torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float64).detach()

    return Stats(
        grad_norm=scalar(numbers.grad_norm),
        clip_coef=scalar(numbers.clip_coef),
        penalty=scalar(numbers.penalty),
        zero_fraction=scalar(numbers.zeros / numbers.numel if numbers.numel else 0.0),
        skipped=torch.tensor(numbers.skipped, dtype=torch.int64),
    )
