"""The norm of all gradients, and clipping by it, in torch operations."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor

from regfused import options


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The twin of `regfused.clip_grad_norm_`. ``foreach`` is there for the signature."""
    operation = "clip_grad_norm_"
    norm_type = options.check_norm_type(operation, norm_type)
    limit = options.check_max_norm(operation, max_norm)
    grads = _grads(listed(parameters))
    norm = norm_of(grads, norm_type)
    check_finite(operation, norm, norm_type, error_if_nonfinite)
    clip_coef = torch.clamp(limit / (norm + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(clip_coef.to(grad.device))
    return _as_torch_returns_it(norm, grads)


@torch.no_grad()
def grad_norm(
    parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """The twin of `regfused.grad_norm`."""
    norm_type = options.check_norm_type("grad_norm", norm_type)
    grads = _grads(listed(parameters))
    norm = norm_of(grads, norm_type)
    check_finite("grad_norm", norm, norm_type, error_if_nonfinite)
    return _as_torch_returns_it(norm, grads)


def listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters; warns of a generator that has been used up."""
    if isinstance(parameters, Tensor):
        return [parameters]
    params = list(parameters)
    if not params and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "there are no gradients (`parameters` is an empty generator, no gradient clipping will occur.)",
            stacklevel=options.stacklevel_of_the_caller(),
        )
    return params


def _grads(params: list[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _without_nesting(grads: list[Tensor]) -> list[Tensor]:
    """The parts of nested tensors, which have no norms of their own, in their place."""
    return [part for grad in grads for part in (grad.unbind() if grad.is_nested else (grad,))]


def norm_of(grads: list[Tensor], norm_type: float) -> Tensor:
    """0-dim float64, on the device of the first gradient."""
    norms = []
    for grad in _without_nesting(grads):
        values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
        if values.numel() == 0:
            continue  # the maximum of nothing is an error in torch
        dtype = torch.complex128 if values.is_complex() else torch.float64
        norms.append(torch.linalg.vector_norm(values, norm_type, dtype=dtype).to(grads[0].device))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack(norms), norm_type)


def check_finite(operation: str, norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(
            f"{operation}: error_if_nonfinite=True demands a finite norm of the gradients, but it is {norm.item()} "
            f"(The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`)"
        )


def _as_torch_returns_it(norm: Tensor, grads: list[Tensor]) -> Tensor:
    if not grads:
        return torch.tensor(0.0)
    dtype = grads[0].dtype
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    return norm.to(dtype.to_real())
