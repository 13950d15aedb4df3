"""Norms of slices of a tensor, and the group lasso's proximal maps, in torch operations."""

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


def shrink_slices(tensor: Tensor, lengths: Tensor | float, dim: int | None) -> Tensor:
    """The proximal map of the group lasso: for each slice ``q`` the ``w`` that minimizes

    ``sum (w - q)^2 / (2*lengths) + ||w||``

    in the type of the tensor. With one length for all elements, ``w = q * max(1 - length/||q||, 0)``.

    Args:
        tensor: of slices along ``dim``, as in `slice_norms`.
        lengths: strength of the group lasso times the length of the step: a number or a tensor of one, or a tensor of
            the shape of ``tensor``, in the metric of a step that has another length for each element.
    """
    if not isinstance(lengths, Tensor) or lengths.numel() == 1:
        if isinstance(lengths, Tensor) and lengths.dim() > tensor.dim():
            lengths = lengths.reshape(())
        return _scaled(tensor, lengths, dim)
    others = [d for d in range(tensor.dim()) if dim is None or d != dim % tensor.dim()]
    q, a = tensor.double(), lengths.double()
    if not others:
        return torch.where(a == 0, q, torch.sign(q) * torch.clamp(q.abs() - a, min=0)).to(tensor.dtype)
    if q.numel() == 0:
        return tensor
    # w = q * r/(r + a) where r = ||w|| solves  sum (q/(r + a))^2 = 1;  none does where that sum is below 1 at r = 0.
    norm = slice_norms(q, dim)
    r = torch.clamp(norm - a.amin(others, keepdim=True), min=0)
    for _ in range(16):  # Newton's method on 1/sqrt(sum) - 1, which is nearly linear
        x = _quotient(q, r + a)
        squares = (x * x).sum(others, keepdim=True)
        slope = _quotient(x * x, r + a).sum(others, keepdim=True)
        r = torch.clamp(r + _quotient(squares * (squares.sqrt() - 1), slope), min=0)
    zero = _quotient(q, a).square().sum(others, keepdim=True) <= 1
    w = torch.where(zero, 0 * q, q * _quotient(r.expand_as(q), r + a))
    # Where no element may move, and where nothing can be measured, the slice is as it was.
    as_it_was = ((a != 0).sum(others, keepdim=True) == 0) | norm.isinf()
    return torch.where(as_it_was, q, w).to(tensor.dtype)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """``a/b``, and 0 where a is 0."""
    return torch.where(a == 0, 0.0, a / b)


def _scaled(tensor: Tensor, length: Tensor | float, dim: int | None) -> Tensor:
    """With one length for all elements; a NaN norm stays NaN."""
    # A quotient of equal numbers is 1: where the norm is below the threshold the factor is exactly 0.
    factors = 1 - length / torch.clamp(slice_norms(tensor, dim), min=length)
    if isinstance(length, Tensor):
        factors = torch.where(length > 0, factors, 1.0)
    arithmetic = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
    return (arithmetic * factors.to(arithmetic.real.dtype)).to(tensor.dtype)
