"""Max norm constraints, in torch operations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from regfused import options
from regfused.reference.slices import slice_norms
from regfused.shards import is_dtensor, spread_as

OPERATION = "constrain_max_norm_"


@torch.no_grad()
def constrain_max_norm_(params: Tensor | Iterable[Tensor], max_norm: float, dim: int | None = None) -> None:
    """The twin of `regfused.constrain_max_norm_` in torch operations: same signature, same result.

    Takes what the kernels do not: complex and non-dense tensors, tensor subclasses such as DTensor, tensors that share
    memory (one after the other).
    """
    tensors, radius = check(params, max_norm, dim)
    for tensor in tensors:
        constrain(tensor, radius, dim)


def check(params: Tensor | Iterable[Tensor], max_norm: Any, dim: Any) -> tuple[list[Tensor], float]:
    """The tensors, each once, and max_norm as a number; raises for what is not as it must be."""
    tensors = [params] if isinstance(params, Tensor) else list({id(param): param for param in params}.values())
    radius = options.check_max_norm(OPERATION, max_norm)
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
        raise ValueError(f"{OPERATION}: dim must be None or an int, but got {dim!r} ({type(dim).__name__})")
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{OPERATION}: params must be tensors, but params[{i}] is a {type(tensor).__name__}")
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
            layout = "is a nested tensor" if tensor.is_nested else f"has layout {tensor.layout}"
            raise ValueError(
                f"{OPERATION}: params must be dense and have memory, but params[{i}] {layout} on {tensor.device}"
            )
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{OPERATION}: params must be floating point or complex, but params[{i}] is {tensor.dtype}"
            )
        base = tensor._base  # a view of a parameter is as good as that
        if (tensor if base is None else base).grad_fn is not None:
            _check_stays(tensor, i)
        if dim is not None:
            options.check_dim(OPERATION, "dim", dim, tensor, f"params[{i}]")
    return tensors, radius


def _check_stays(tensor: Tensor, i: int) -> None:
    """Raise ``ValueError`` unless a computed tensor is kept: it is computed again, and what is written into it lost."""
    base = tensor if tensor._base is None else tensor._base
    if tensor.retains_grad or base.retains_grad:
        return
    assert base.grad_fn is not None
    leaves = " or ".join(f"a parameter of shape {tuple(leaf.shape)}" for leaf in _leaves(base))
    raise ValueError(
        f"{OPERATION}: params must be parameters or views of them, but params[{i}] of shape {tuple(tensor.shape)} is "
        f"computed ({base.grad_fn.name()}), as the weight of a pruned or parametrized module is, and would be computed "
        f"again without the constraint. Pass what it is computed from{f', {leaves}' if leaves else ''}: the module's "
        "weight_orig, weight_g or parametrizations.weight.original; or detach() it, to change what it holds now"
    )


def _leaves(tensor: Tensor) -> list[Tensor]:
    """The tensors that autograd computes a tensor from; none where they are many."""
    leaves: dict[int, Tensor] = {}
    nodes, seen = [tensor.grad_fn], set[Any]()
    while nodes and len(seen) < 100:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
        nodes.extend(following for following, _ in node.next_functions)
    return list(leaves.values()) if not nodes and len(leaves) <= 3 else []


def constrain(tensor: Tensor, radius: float, dim: int | None) -> None:
    """w = w * radius/||w|| where ||w|| > radius; a NaN is not above it."""
    if tensor.numel() == 0:
        return
    norms = slice_norms(tensor, dim)
    arithmetic = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    scaled = arithmetic * (radius / norms).to(arithmetic.real.dtype)
    constrained = torch.where(norms > radius, scaled, arithmetic)
    # torch spreads a result in other ways than what it was made of.
    tensor.copy_(spread_as(tensor, constrained) if is_dtensor(tensor) else constrained)
