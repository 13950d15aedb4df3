"""What this rank has of sharded tensors (DTensor), and sums over all ranks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """How a tensor is spread over a mesh of ranks: for each dimension of the mesh, whether ranks have different parts.

    Where they have the same, a sum over the ranks must count it once.
    """

    mesh: Any
    sharded: tuple[bool, ...]


def is_dtensor(tensor: Any) -> bool:
    # Where nobody imported it there is none; importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def shards_of(tensor: Tensor) -> Shards | None:
    """Of a DTensor that is split or repeated; None for another tensor, and for one that is a sum over ranks."""
    if not is_dtensor(tensor) or any(placement.is_partial() for placement in tensor.placements):  # type: ignore[attr-defined]
        return None
    placements = tensor.placements  # type: ignore[attr-defined]
    return Shards(tensor.device_mesh, tuple(not placement.is_replicate() for placement in placements))  # type: ignore[attr-defined]


def are_alike(a: Any, b: Any) -> bool:
    """Whether two DTensors lie on the same ranks in the same way, so that their parts are pairs."""
    return is_dtensor(a) and is_dtensor(b) and a.device_mesh == b.device_mesh and a.placements == b.placements


def has_whole_slices(tensor: Any, dim: int | None) -> bool:
    """Whether each slice of a DTensor along ``dim`` is whole on its rank: if it is split at all, then along ``dim``.

    Without ``dim`` the tensor is one slice.
    """
    split = [placement for placement in tensor.placements if not placement.is_replicate()]
    if not split or dim is None or not -tensor.dim() <= dim < tensor.dim():
        return not split
    return all(placement.is_shard(dim % tensor.dim()) for placement in split)


def part_of(tensor: Any) -> Tensor:
    """What this rank has of a DTensor; shares its memory. Autograd does not see it."""
    with contextlib.nullcontext() if not torch.is_grad_enabled() else torch.no_grad():
        part: Tensor = tensor.to_local()
        return part


def like(tensor: Any, part: Tensor) -> Tensor:
    """A DTensor that is spread as another one, with this part on this rank."""
    made = type_of_dtensor().from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    if made._spec == tensor._spec:
        made._spec = tensor._spec  # one object is compared at once
    return made


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, on every rank: a collective operation. Another tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def spread_as(tensor: Any, other: Any) -> Any:
    """Another DTensor of the same mesh, spread as this one."""
    return other if other.placements == tensor.placements else other.redistribute(tensor.device_mesh, tensor.placements)


def type_of_dtensor() -> Any:
    return sys.modules["torch.distributed.tensor"].DTensor


def over_all_ranks(parts: Tensor, shards: Shards | None, reduce: str = "sum") -> Tensor:
    """The sum (or "max", "min") over all ranks of what each has; a collective operation where they differ."""
    if is_dtensor(parts):
        return parts.full_tensor()  # type: ignore[attr-defined]
    if shards is None or not any(shards.sharded):
        return parts
    module = sys.modules["torch.distributed.tensor"]
    placements = [module.Partial(reduce) if sharded else module.Replicate() for sharded in shards.sharded]
    return module.DTensor.from_local(parts, shards.mesh, placements, run_check=False).full_tensor()


def whole_sum(parts: Iterable[tuple[Tensor, Shards | None]]) -> Tensor:
    """The sum of 0-dim tensors, of all ranks where they are parts: float64, on the first device that is not the CPU."""
    by_shards: dict[Shards | None, list[Tensor]] = {}
    for value, shards in parts:
        by_shards.setdefault(shards, []).append(over_all_ranks(value, None))
    sums = []
    for shards, values in by_shards.items():
        home = next((value.device for value in values if value.device.type != "cpu"), values[0].device)
        stacked = torch.stack([value.to(home, torch.float64) for value in values])
        sums.append(over_all_ranks(stacked.sum(), shards))
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    home = next((value.device for value in sums if value.device.type != "cpu"), sums[0].device)
    total = sums[0].to(home)
    for value in sums[1:]:
        total = total + value.to(home)
    return total
