"""What the processes of a step tell each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from regfused.shards import Shards


@dataclass
class Verdict:
    """The norm, and why there is no step: all in one collective operation.

    ``size`` is the norm to the power of its type, or the norm itself where that is infinite: what can be summed up, or
    the maximum taken of. A maximum may lose a NaN, so it goes beside it.
    """

    size: float = 0.0
    is_nan: bool = False
    overflows: bool = False  # under AMP
    failed: bool = False  # a process found an error
    fingerprint: int = 0  # of what must be the same in every process; below 2^16
    differs: bool = False  # it is not

    @classmethod
    def of(cls, norm: float, norm_type: float, **others: Any) -> Verdict:
        is_nan = math.isnan(norm)
        try:
            size = norm if math.isinf(norm_type) or norm == 0 else norm**norm_type
        except OverflowError:  # the other processes wait for an answer
            size = math.inf
        return cls(0.0 if is_nan else size, is_nan, **others)

    def norm(self, norm_type: float) -> float:
        if self.is_nan:
            return math.nan
        return self.size if math.isinf(norm_type) or self.size == 0 else self.size ** (1 / norm_type)

    def joined(self, other: Verdict, norm_type: float) -> Verdict:
        """With that of other parameters."""
        return Verdict(
            max(self.size, other.size) if math.isinf(norm_type) else self.size + other.size,
            self.is_nan or other.is_nan,
            self.overflows or other.overflows,
            self.failed or other.failed,
            differs=self.differs or other.differs,
        )

    def numbers(self, norm_type: float) -> list[float]:
        """What processes exchange: the sums of these, or, for an infinite norm, the maxima.

        That fingerprints are equal shows in their maximum and that of their negatives, or in the sum of their squares,
        which is exact.
        """
        print_ = float(self.fingerprint)
        pair = (print_, -print_) if math.isinf(norm_type) else (print_, print_ * print_)
        return [self.size, float(self.is_nan), float(self.overflows), float(self.failed), *pair]

    @classmethod
    def from_numbers(cls, numbers: list[float], norm_type: float, count: int) -> Verdict:
        """Of all ``count`` processes, from what they have exchanged."""
        size, is_nan, overflows, failed, a, b = numbers
        differs = a != -b if math.isinf(norm_type) else count * b != a * a
        return cls(size, is_nan > 0, overflows > 0, failed > 0, differs=differs)


def over_ranks(verdicts: dict[Shards | None, Verdict], norm_type: float) -> Verdict:
    """That of all ranks, joined, from what this one has of parameters that are spread in one way or another.

    One collective operation for each dimension of a mesh along which some are split.
    """
    together = Verdict()
    of_meshes: dict[Any, list[tuple[Shards, Verdict]]] = {}
    for shards, verdict in verdicts.items():
        if shards is None:
            together = together.joined(verdict, norm_type)
        else:
            of_meshes.setdefault(shards.mesh, []).append((shards, verdict))
    for mesh, of_mesh in of_meshes.items():
        rows = [verdict.numbers(norm_type) for _, verdict in of_mesh]
        counts = all_reduce_rows(rows, [shards for shards, _ in of_mesh], mesh, is_max=math.isinf(norm_type))
        for row, count in zip(rows, counts, strict=True):
            together = together.joined(Verdict.from_numbers(row, norm_type, count), norm_type)
    return together


def all_reduce_rows(rows: list[list[float]], of_rows: list[Shards], mesh: Any, *, is_max: bool) -> list[int]:
    """Sums of rows (or maxima) in place, each over the ranks that have different parts; how many these are for each."""
    values = torch.tensor(rows, dtype=torch.float64, device=mesh.device_type)
    operation = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
    counts = [1] * len(rows)
    for dim in range(mesh.ndim):
        places = [i for i, shards in enumerate(of_rows) if shards.sharded[dim]]
        if places:
            some = values[places]
            torch.distributed.all_reduce(some, operation, mesh.get_group(dim))
            values[places] = some
            for i in places:
                counts[i] *= mesh.size(dim)
    rows[:] = values.tolist()
    return counts


def another_failed(operation: str) -> str:
    return (
        f"{operation}: every process must be able to take the step, but one has an error, of which it has the message"
    )
