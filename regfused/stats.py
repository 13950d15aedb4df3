"""The numbers of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from regfused.shards import Shards, part_of, shards_of, whole_sum

Number = float | Tensor


class Numbers(Protocol):
    """What a plan of the compiled part says of the last step of its kernels."""

    def numbers(self) -> tuple[Number | None, Number, Number, Number]:
        """grad_norm or None, clip_coef, penalty, skipped steps."""
        ...

    def stepped(self) -> list[tuple[int, int]]:
        """Group and index of each tensor that the last step that was not skipped has updated."""
        ...


@dataclass
class Part:
    """A number of some tensors, 0-dim: of this rank alone where they are sharded."""

    value: Tensor
    shards: Shards | None = None


@dataclass
class Record:
    """The numbers of a step of the reference. Tensors stay on their device until somebody reads the stats."""

    judged: bool = True  # False: beside kernels, which have the norm and the coefficient
    grad_norm: Number | None = None  # None: nothing asked for it
    clip_coef: Number = 1.0
    penalties: list[Part] = field(default_factory=list)
    stepped: list[tuple[int, int]] = field(default_factory=list)  # group and index of each tensor


@dataclass
class LastStep:
    """What the last step left behind.

    An optimizer has one such object as long as it lives: wrappers that copy its attributes share it.
    """

    record: Record | None = None  # of the reference, where it took part
    kernels: Numbers | None = None  # of the compiled part, likewise
    skipped: Number = 0  # steps that left no trace, but those that `kernels` have counted
    counting: Numbers | None = None  # who has counted others

    def by_kernels(self, kernels: Numbers, outcome: str, record: Record | None = None) -> None:
        """They have counted a skipped step; then what the step before left stays."""
        if outcome == "stepped":
            self.kernels, self.record = kernels, record
        elif outcome == "nonfinite":
            grad_norm, clip_coef, *_ = kernels.numbers()
            self.by_reference(replace(self._merged(), grad_norm=grad_norm, clip_coef=clip_coef))

    def by_reference(self, record: Record) -> None:
        self.kernels, self.record = None, record

    def skip(self, grad_norm: Number) -> None:
        """By a policy for norms that are not finite; what the step before left stays."""
        self.by_reference(replace(self._merged(), grad_norm=grad_norm, clip_coef=0.0))
        self.skipped = self.skipped + 1

    def stats(self, param_groups: Sequence[dict[str, Any]]) -> Stats:
        return Stats(self._merged(), self._skipped(), self.was_taken, param_groups)

    @property
    def was_taken(self) -> bool:
        return self.record is not None or self.kernels is not None

    def frozen(self) -> LastStep:
        """A copy that can be pickled."""
        return LastStep(record=self._merged() if self.was_taken else None, skipped=self._skipped())

    def _skipped(self) -> Number:
        return self.skipped if self.counting is None else self.skipped + self.counting.numbers()[3]

    def _merged(self) -> Record:
        record = self.record or Record(judged=self.kernels is None)
        if self.kernels is None:
            return record
        grad_norm, clip_coef, penalty, _ = self.kernels.numbers()
        if record.judged:
            grad_norm, clip_coef = record.grad_norm, record.clip_coef
        return replace(
            record,
            judged=True,
            grad_norm=grad_norm,
            clip_coef=clip_coef,
            penalties=[Part(_tensor(penalty)), *record.penalties],
            stepped=[*self.kernels.stepped(), *record.stepped],
        )


class Stats:
    """Of the last step, as 0-dim tensors, which can be gone through in this order.

    ``grad_norm``      norm over all parameters of the gradient, with the penalty's gradient where that is clipped too;
                       NaN where neither ``max_norm`` nor ``nonfinite`` asked for it: it would cost a pass over the
                       gradients (``max_norm=math.inf`` measures and does not clip)
    ``clip_coef``      factor by which the clip scaled it; 0 for a step skipped by ``nonfinite="skip"``
    ``penalty``        l1*sum|p| + l2*sum(p^2) of the stepped parameters, before the step, with the concave penalty in
                       place of l1*|p| where there is a concavity; without the group lasso. Its
                       last digits depend on the instruction set, for rows are added up in the type of arithmetic
    ``zero_fraction``  share of exact zeros among the elements of the stepped parameters, as they are when this is
                       read for the first time; parameters with a sparse gradient are not looked through
    ``skipped``        how many steps so far left no trace, by ``nonfinite="skip"`` or an AMP overflow

    ``penalty`` and ``zero_fraction`` are those of the last step that was not skipped (where a device decides by itself,
    ``zero_fraction`` is of the parameters of the last step that it was given). Where CUDA kernels made the step,
    the tensors are on their device, and reading the stats does not wait for it.

    No step counts zeros: reading ``zero_fraction`` costs a pass over the parameters, the other numbers cost none. Of
    sharded parameters (DTensor) each rank has its share of ``penalty`` and
    ``zero_fraction``: reading one of the two adds up the shares in a collective operation, in which every rank has to
    take part. The other numbers need none.
    """

    FIELDS = ("grad_norm", "clip_coef", "penalty", "zero_fraction", "skipped")

    grad_norm: Tensor
    clip_coef: Tensor
    skipped: Tensor

    def __init__(
        self, record: Record, skipped: Number, was_taken: bool, param_groups: Sequence[dict[str, Any]]
    ) -> None:
        self.grad_norm = _tensor(math.nan if record.grad_norm is None else record.grad_norm)
        self.clip_coef = _tensor(record.clip_coef)
        self.skipped = _tensor(skipped).to(torch.int64)
        self._was_taken = was_taken
        self._has_norm = record.grad_norm is not None
        self._penalties = record.penalties
        params = {(g, i): p for g, group in enumerate(param_groups) for i, p in enumerate(group["params"])}
        # One that was stepped may have gone since.
        self._stepped = [params[place] for place in record.stepped if place in params]

    @cached_property
    def penalty(self) -> Tensor:
        return whole_sum((part.value, part.shards) for part in self._penalties)

    @cached_property
    def zero_fraction(self) -> Tensor:
        zeros = whole_sum((part.value, part.shards) for part in map(_zeros_of, self._stepped))
        return zeros / max(sum(param.numel() for param in self._stepped), 1)

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, name) for name in self.FIELDS)

    def __repr__(self) -> str:
        return f"Stats({', '.join(f'{name}={value:.6g}' for name, value in self.as_floats().items())})"

    def as_floats(self) -> dict[str, float]:
        """The numbers for a logger, by name: plain floats, and only what was measured.

        ``grad_norm`` is left out where nothing asked for it, everything before the first step. A NaN in it is one of
        the gradients'. Waits for a device that has the numbers; a collective operation where parameters are sharded.

        Example::

            >>> p = torch.nn.Parameter(torch.tensor([0.5, -2.0]))
            >>> optimizer = regfused.SGD([p], lr=0.1, l1=1.0, proximal=True)
            >>> p.grad = torch.tensor([4.0, 0.0])
            >>> optimizer.step()
            >>> optimizer.stats.as_floats()
            {'clip_coef': 1.0, 'penalty': 2.5, 'zero_fraction': 0.5, 'skipped': 0.0}
        """
        names = self.FIELDS if self._has_norm else self.FIELDS[1:]
        return {name: float(getattr(self, name)) for name in names} if self._was_taken else {}


@torch.no_grad()
def _zeros_of(param: Tensor) -> Part:
    shards = shards_of(param)
    here = part_of(param) if shards is not None else param
    return Part((here == 0).sum(), shards)


def _tensor(number: Number) -> Tensor:
    return torch.as_tensor(number, dtype=torch.float64).detach()
