"""The numbers of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


class Stats(NamedTuple):
    """Of the last step, as 0-dim tensors.

    ``grad_norm``      norm over all parameters of the gradient, with the penalty's gradient where that is clipped too
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
    def grad_norm(self) -> float: ...
    @property
    def clip_coef(self) -> float: ...
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
    """The numbers of a step of the reference."""

    grad_norm: float = 0.0
    clip_coef: float = 1.0
    penalty: float = 0.0
    zeros: int = 0
    numel: int = 0
    skipped: int = 0


def stats_of(numbers: Numbers) -> Stats:
    def scalar(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    return Stats(
        grad_norm=scalar(numbers.grad_norm),
        clip_coef=scalar(numbers.clip_coef),
        penalty=scalar(numbers.penalty),
        zero_fraction=scalar(numbers.zeros / numbers.numel if numbers.numel else 0.0),
        skipped=torch.tensor(numbers.skipped, dtype=torch.int64),
    )
