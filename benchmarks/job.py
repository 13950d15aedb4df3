"""What a job of a benchmark is: ways to do the same thing, the bytes that it must move, the error of each way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True, eq=False)
class Job(ABC):
    """The first of the ways is regfused's."""

    name: str
    title: str
    elements_moved: int  # reads and writes that no implementation can avoid, for each element of the tensors
    ways: Mapping[str, Any]

    @property
    def ours(self) -> str:
        return next(iter(self.ways))

    def bytes_per_param(self, dtype: torch.dtype) -> int:
        return self.elements_moved * dtype.itemsize

    @abstractmethod
    def setup(self, name: str, start: list[Tensor]) -> tuple[Call, list[Tensor]]:
        """What is timed for one way, ready to go, and the tensors that must stay ordinary numbers in it.

        `start` are tensors with gradients, for all ways alike: no way changes their elements.
        """

    @abstractmethod
    def error(self, name: str, shapes: list[list[int]], dtype: torch.dtype, device: str = "cpu") -> float | None:
        """The largest relative error of one way against float64; None for what has no result."""
