"""How many weights are exactly zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterSparsity:
    """Exact zeros of one parameter."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    numel: int

    @property
    def fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Sparsity:
    """Exact zeros per parameter and in all; prints as a table."""

    parameters: tuple[ParameterSparsity, ...]

    @property
    def zeros(self) -> int:
        return sum(p.zeros for p in self.parameters)

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)

    @property
    def fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        everything = ParameterSparsity("all", (), self.zeros, self.numel)
        cells = [("parameter", "shape", "zeros", "elements", "share")]
        for p in (*self.parameters, everything):
            cells.append((p.name, "x".join(map(str, p.shape)), f"{p.zeros:,}", f"{p.numel:,}", f"{p.fraction:.2%}"))
        widths = [max(len(row[column]) for row in cells) for column in range(5)]
        lines = []
        for row in cells:
            padded = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(padded))
        return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def sparsity(model_or_params: nn.Module | Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> Sparsity:
    """Count the elements that are exactly zero (0 or -0).

    Args:
        model_or_params: a module, a tensor, or an iterable of tensors or of ``(name, tensor)`` pairs.

    Returns:
        A `Sparsity`: ``.fraction``, ``.zeros``, ``.numel`` in all, ``.parameters`` one by one; ``print`` shows a table.

    Raises:
        TypeError: for something else than tensors.

    Example::

        >>> sparsity([torch.tensor([0.0, 1.0, -0.0, 2.0])]).fraction
        0.5
    """
    if isinstance(model_or_params, nn.Module):
        items: Iterable[object] = model_or_params.named_parameters()
    elif isinstance(model_or_params, Tensor):
        items = [model_or_params]
    else:
        items = model_or_params
    rows = []
    for i, item in enumerate(items):
        name, tensor = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"sparsity: expected tensors, but item {i} is a {type(tensor).__name__}")
        rows.append(ParameterSparsity(name, tuple(tensor.shape), int((tensor == 0).sum()), tensor.numel()))
    return Sparsity(tuple(rows))
