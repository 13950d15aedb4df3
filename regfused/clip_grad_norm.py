"""The norm of all gradients, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from regfused import extension, options, reference, sharded_clip
from regfused.reference.clip_grad_norm import listed

_FUSED_NORM_TYPES = (1.0, 2.0, math.inf)


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Clip the norm of all gradients together, as ``torch.nn.utils.clip_grad_norm_``, in two passes over them.

    ``N`` is the norm of all gradients as one vector; every gradient is multiplied in place by::

        c = min(1, max_norm / (N + 1e-6))

    A NaN in ``N`` reaches every gradient, an infinite ``N`` makes finite ones zero. Where no gradient is clipped, the
    CPU spares the second pass. On CUDA devices the host waits for nothing (but see ``error_if_nonfinite``). (The
    optimizer `regfused.SGD` takes ``max_norm`` itself, which spares writing the gradients.)

    Args:
        parameters: a tensor or an iterable of tensors, whose ``.grad`` is clipped; those without one are passed by.
        max_norm: >= 0; 0 makes all gradients zero.
        norm_type: of ``N``: 1, 2 or inf in the kernels (also as a string, ``"inf"``), others by torch.
        error_if_nonfinite: raise where ``N`` is NaN or infinite, before anything changed. The host waits for ``N``.
        foreach: True or False: torch's own function with this argument.

    Returns:
        ``N``, a 0-dim tensor in the gradients' common dtype, on the device of the first; 0 where there are no
        gradients. It is accumulated in float64 (on CUDA devices: the share of each thread in the type of arithmetic),
        in an order that is always the same.

    Raises:
        ValueError: for a ``max_norm`` or ``norm_type`` outside its range. (torch lets a negative one flip gradients.)
        RuntimeError: see ``error_if_nonfinite``.

    Sharded gradients (DTensor) count with the parts of all ranks, and each rank has to ask. Gradients that the kernels
    do not take (sparse, complex, not dense, of other subclasses, sharing memory) are clipped by torch's function, all
    of them together; so are all where a mode or a tracer (``make_fx``, ``torch.jit.trace``, ``FakeTensorMode``) has
    to see what is done to them. Where one is a nested tensor, which torch does not take, `regfused.reference` clips.
    (Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013.)

    Example::

        >>> weight = torch.ones(4, requires_grad=True)
        >>> (weight * 3).sum().backward()
        >>> regfused.clip_grad_norm_([weight], max_norm=1.0).item(), weight.grad.tolist()
        (6.0, [0.5, 0.5, 0.5, 0.5])
    """
    operation = "clip_grad_norm_"
    norm_type = options.check_norm_type(operation, norm_type)
    limit = options.check_max_norm(operation, max_norm)
    params = listed(parameters)
    if foreach is not None or torch.compiler.is_compiling():
        return torch.nn.utils.clip_grad_norm_(params, limit, norm_type, error_if_nonfinite, foreach)
    if extension.C is None:
        return reference.clip_grad_norm_(params, limit, norm_type, error_if_nonfinite)
    if norm_type in _FUSED_NORM_TYPES:
        norm: Tensor | None = extension.C.clip_grad_norm(params, norm_type, limit, error_if_nonfinite)
        if norm is None:
            norm = sharded_clip.clip_grad_norm(operation, params, norm_type, limit, error_if_nonfinite)
        if norm is not None:
            return norm
    if any(param.grad is not None and param.grad.is_nested for param in params):
        return reference.clip_grad_norm_(params, limit, norm_type, error_if_nonfinite)
    return torch.nn.utils.clip_grad_norm_(params, limit, norm_type, error_if_nonfinite)


def grad_norm(
    parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """The norm of all gradients as one vector, in one pass; nothing is changed.

    Arguments, result and errors are those of `clip_grad_norm_`.

    Example::

        >>> weight = torch.ones(4, requires_grad=True)
        >>> (weight * 3).sum().backward()
        >>> regfused.grad_norm([weight]).item()
        6.0
    """
    norm_type = options.check_norm_type("grad_norm", norm_type)
    params = listed(parameters)
    if extension.C is not None and norm_type in _FUSED_NORM_TYPES and not torch.compiler.is_compiling():
        norm: Tensor | None = extension.C.clip_grad_norm(params, norm_type, None, error_if_nonfinite)
        if norm is None:
            norm = sharded_clip.clip_grad_norm("grad_norm", params, norm_type, None, error_if_nonfinite)
        if norm is not None:
            return norm
    return reference.grad_norm(params, norm_type, error_if_nonfinite)
