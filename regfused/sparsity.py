"""How many weights, and how many groups of them, are exactly zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from regfused.computed import effective
from regfused.shards import Shards, has_whole_slices, is_dtensor, part_of, shards_of, whole
from regfused.verdict import all_reduce_rows


@dataclass(frozen=True)
class ParameterSparsity:
    """Exact zeros of one parameter."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    numel: int
    zero_groups: int = 0
    groups: int = 0

    @property
    def fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros, and groups of nothing else, per parameter and in all; prints as a table."""

    parameters: tuple[ParameterSparsity, ...]

    @property
    def zeros(self) -> int:
        return sum(p.zeros for p in self.parameters)

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def zero_groups(self) -> int:
        return sum(p.zero_groups for p in self.parameters)

    @property
    def groups(self) -> int:
        return sum(p.groups for p in self.parameters)

    @property
    def fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        everything = ParameterSparsity("all", (), self.zeros, self.numel, self.zero_groups, self.groups)
        cells = [("parameter", "shape", "zeros", "elements", "share", "zero groups", "groups")]
        for p in (*self.parameters, everything):
            counts = (f"{p.zeros:,}", f"{p.numel:,}", f"{p.fraction:.2%}", f"{p.zero_groups:,}", f"{p.groups:,}")
            cells.append((p.name, "x".join(map(str, p.shape)), *counts))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded))
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def sparsity(
    model_or_params: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]], group_dim: int = 0
) -> Sparsity:
    """Count the elements that are exactly zero (0 or -0), and the groups of elements that all are.

    Args:
        model_or_params: a module, a tensor, or an iterable of tensors or of ``(name, tensor)`` pairs. Of a module the
            weights that it works with: a pruned or parametrized one, or one with weight or spectral norm, as it is
            computed from the parameters of now, under its own name (``0.weight``), not ``0.weight_orig``.
        group_dim: the groups of a tensor are its slices along this dimension, as in the group lasso of `regfused.SGD`:
            rows, filters (0), columns (1); negative from the back. A tensor without dimensions is one group; one that
            does not have the dimension, or no elements, has no groups.

    Returns:
        A `Sparsity`: ``.fraction``, ``.zeros``, ``.numel``, ``.zero_groups``, ``.groups`` in all, ``.parameters`` one
        by one; ``print`` shows a table.

    Raises:
        TypeError: for something else than tensors.
        ValueError: for a group_dim that is not an int.

    Of sharded tensors (DTensor) the counts are those of all ranks, and each rank has to ask.

    Example::

        >>> sparsity([torch.tensor([0.0, 1.0, -0.0, 2.0])]).fraction
        0.5
    """
    if not isinstance(group_dim, int) or isinstance(group_dim, bool):
        raise ValueError(f"sparsity: group_dim must be an int, but got {group_dim!r} ({type(group_dim).__name__})")
    if isinstance(model_or_params, nn.Module):
        items: Iterable[object] = _weights(model_or_params)
    elif isinstance(model_or_params, Tensor):
        items = [model_or_params]
    else:
        items = model_or_params
    rows: list[_Counts] = []
    for i, item in enumerate(items):
        name, tensor = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"sparsity: expected tensors, but item {i} is a {type(tensor).__name__}")
        shards = shards_of(tensor)
        if shards is None or not has_whole_slices(tensor, group_dim):
            tensor, shards = whole(tensor), None
        found = _Counts(name, tensor, part_of(tensor) if is_dtensor(tensor) else tensor, shards)
        rows.append(found)
    counts = _of_all_ranks([(row.shards, _counted(row.part, group_dim)) for row in rows])
    return Sparsity(
        tuple(
            ParameterSparsity(row.name, tuple(row.tensor.shape), zeros, row.tensor.numel(), zero_groups, groups)
            for row, (zeros, zero_groups, groups) in zip(rows, counts, strict=True)
        )
    )


class _Counts(NamedTuple):
    """A tensor, what of it is counted here, and how that is spread over ranks."""

    name: str
    tensor: Tensor
    part: Tensor
    shards: Shards | None


def _counted(tensor: Tensor, dim: int) -> tuple[int, int, int]:
    """Zeros, zero groups and groups."""
    return int((tensor == 0).sum()), *_groups(tensor, dim)


def _of_all_ranks(counts: list[tuple[Shards | None, tuple[int, int, int]]]) -> list[tuple[int, ...]]:
    """The counts of all ranks together."""
    everywhere: list[tuple[int, ...]] = [here for _, here in counts]
    split = [(i, shards) for i, (shards, _) in enumerate(counts) if shards is not None and any(shards.sharded)]
    for mesh in dict.fromkeys(shards.mesh for _, shards in split):
        of_mesh = [(i, shards) for i, shards in split if shards.mesh == mesh]
        rows = [[float(count) for count in counts[i][1]] for i, _ in of_mesh]
        all_reduce_rows(rows, [shards for _, shards in of_mesh], mesh, is_max=False)
        for (i, _), row in zip(of_mesh, rows, strict=True):
            everywhere[i] = tuple(int(count) for count in row)
    return everywhere


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model, and in the place of those that a weight is computed from, once, that weight."""
    computed = effective(model)
    seen = set()
    for name, param in model.named_parameters():
        if name not in computed:
            yield name, param
        elif computed[name][0] not in seen:
            seen.add(computed[name][0])
            yield computed[name][0], computed[name][1]()


def _groups(tensor: Tensor, dim: int) -> tuple[int, int]:
    """How many groups are zero, of how many."""
    dims = max(tensor.dim(), 1)
    if not -dims <= dim < dims or tensor.numel() == 0:
        return 0, 0
    rows = tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return int((rows == 0).all(dim=1).sum()), rows.shape[0]
