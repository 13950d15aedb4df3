"""Norms of slices of a tensor, in torch operations."""

from __future__ import annotations

import torch
from torch import Tensor


def slice_norms(tensor: Tensor, dim: int | None) -> Tensor:
    """The L2 norm of each ``tensor.select(dim, i)``, in float64, in a shape that broadcasts against the tensor.

    Without ``dim``, and for a tensor without dimensions, the whole tensor is one slice.
    """
    others = [d for d in range(tensor.dim()) if dim is None or d != dim % tensor.dim()]
    if not others:  # to torch no dimensions are all of them
        return torch.abs(tensor).to(torch.float64)
    dtype = torch.complex128 if tensor.is_complex() else torch.float64
    return torch.linalg.vector_norm(tensor, 2, dim=others, keepdim=True, dtype=dtype).to(torch.float64)
