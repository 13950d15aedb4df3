"""The norm of sharded gradients (DTensor), and clipping by it: the parts by the kernels, one norm over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from regfused import extension
from regfused.reference.clip_grad_norm import check_finite, norm_of
from regfused.shards import Shards, is_dtensor, part_of, shards_of
from regfused.verdict import Verdict, over_ranks


@torch.no_grad()
def clip_grad_norm(
    operation: str, params: list[Tensor], norm_type: float, limit: float | None, error_if_nonfinite: bool
) -> Tensor | None:
    """As `regfused.clip_grad_norm_`; without a limit nothing is clipped. None where that is not for the kernels.

    That depends on what is the same on every rank.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not any(map(is_dtensor, grads)):
        return None
    parts: dict[Shards | None, list[Tensor]] = {}
    for grad in grads:
        shards = shards_of(grad)
        if is_dtensor(grad) and shards is None:
            return None  # a sum over ranks that is not taken yet
        part = part_of(grad) if is_dtensor(grad) else grad
        if not extension.kernels_take(part):
            return None
        parts.setdefault(shards if shards is not None and any(shards.sharded) else None, []).append(part)
    verdicts = {shards: Verdict.of(_norm_here(of_rank, norm_type), norm_type) for shards, of_rank in parts.items()}
    together = over_ranks(verdicts, norm_type)
    norm = together.norm(norm_type)
    check_finite(operation, torch.tensor(norm), norm_type, error_if_nonfinite)
    if limit is not None:
        clip_coef = min(1.0, limit / (norm + 1e-6)) if not math.isnan(norm) else norm
        if clip_coef != 1:
            for of_rank in parts.values():
                torch._foreach_mul_(of_rank, clip_coef)
            torch.autograd.graph.increment_version([grad for grad in grads if is_dtensor(grad)])
    dtype = grads[0].dtype
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    return torch.tensor(norm, dtype=dtype, device=grads[0].device)


def _norm_here(grads: list[Tensor], norm_type: float) -> float:
    """Of what this rank has, by the kernels where they take it; they round as the tensors are."""
    norm: Tensor | None = None
    if not any(grad.dtype in (torch.float16, torch.bfloat16) for grad in grads):
        holders = []
        for grad in grads:
            holder = grad.detach()
            holder.grad = grad
            holders.append(holder)
        assert extension.C is not None
        norm = extension.C.clip_grad_norm(holders, norm_type, None, False)
    return float(norm_of(grads, norm_type) if norm is None else norm)
