"""The elastic net as a differentiable number, in torch operations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from regfused import options
from regfused.shards import Shards, over_all_ranks, shards_of


def penalty(params: Tensor | Iterable[Tensor], *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    """The twin of `regfused.penalty`: ``l1*sum|p| + l2*sum(p^2)``. Takes complex tensors and subclasses as well."""
    tensors = [params] if isinstance(params, Tensor) else list(params)
    options.check_strength("penalty", "l1", l1, as_number=options.constant)
    options.check_strength("penalty", "l2", l2, as_number=options.constant)
    options.check_floating("penalty", tensors)
    tensors = [part for tensor in tensors for part in (tensor.unbind() if tensor.is_nested else (tensor,))]
    sharded = [tensor for tensor in tensors if shards_of(tensor) is not None]
    terms = [_term(tensor, l1, l2) for tensor in tensors if shards_of(tensor) is None]
    if sharded:
        terms.append(of_all_ranks(sharded, lambda parts: penalty(parts, l1=l1, l2=l2)))
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    dtype = torch.float64 if wide else torch.float32
    if not terms:
        return torch.zeros((), dtype=dtype)
    home = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    total = terms[0].to(home)
    for term in terms[1:]:
        total = total + term.to(home)
    return total.to(dtype)


def of_all_ranks(tensors: list[Tensor], of_parts: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """Of sharded tensors, from what ``of_parts`` makes of a rank's parts: a sum over ranks per way of spreading."""
    by_shards: dict[Shards, list[Tensor]] = {}
    for tensor in tensors:
        shards = shards_of(tensor)
        assert shards is not None
        by_shards.setdefault(shards, []).append(tensor.to_local())  # type: ignore[attr-defined]
    values = [over_all_ranks(of_parts(parts), shards) for shards, parts in by_shards.items()]
    whole = values[0]
    for value in values[1:]:
        whole = whole + value.to(whole.device)
    return whole


def _term(tensor: Tensor, l1: float, l2: float) -> Tensor:
    """Of one tensor, in float64. A strength of zero must not meet infinities."""
    size = torch.abs(tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor)
    term = size.reshape(-1)[:0].sum(dtype=torch.float64)  # zero, and a part of the graph
    if l1:
        term = term + l1 * size.sum(dtype=torch.float64)
    if l2:
        term = term + l2 * size.square().sum(dtype=torch.float64)
    return term
