"""The elastic net as a number that can be added to a loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regfused import extension, options, reference
from regfused.reference.penalty import of_all_ranks
from regfused.shards import shards_of


def penalty(params: Tensor | Iterable[Tensor], *, l1: float = 0.0, l2: float = 0.0) -> Tensor:
    r"""The elastic net ``l1*sum|p| + l2*sum(p^2)`` over all elements of all tensors, differentiable.

    One pass over memory forward, one backward, whatever the number of tensors::

        loss = criterion(model(x), y) + regfused.penalty(model.parameters(), l1=1e-5)

    is ``loss + 1e-5 * sum(p.abs().sum() for p in model.parameters())``. The gradient is ``l1*sign(p) + 2*l2*p`` with
    ``sign(0) = 0``; tensors that do not require one count, and get none. Gradients of gradients work. (The optimizer
    `regfused.SGD` takes ``l1`` and ``l2`` itself, and then there is no pass at all for them.)

    Args:
        params: a tensor or an iterable of tensors, of any shapes and strides, on any devices; float32, float64,
            bfloat16 and float16 in any mixture on the CPU or CUDA devices go to the kernels, and so do sharded ones
            (DTensor) by their parts, each rank its own, with one sum over ranks. Others (nested ones by their parts) go
            to `regfused.reference`, and so does everything under ``torch.func``, ``torch.jit.trace`` and
            ``torch.export``.
        l1: strength of ``sum|p|``, finite and >= 0. A number: it gets no gradient.
        l2: strength of ``sum(p^2)``, likewise.

    Returns:
        A 0-dim tensor: float64 where one of the tensors is, float32 otherwise; on the first device that is not the CPU.
        Terms are formed in float32 (float64 for float64) and added up in float64, in an order that is always the same.

    Raises:
        ValueError: for a strength outside its range or one that requires a gradient, and for tensors that are neither
            floating point nor complex.
        TypeError: for something else than tensors.

    The elastic net is that of Zou and Hastie, Regularization and variable selection via the elastic net, 2005, without
    its halves.

    Example::

        >>> weight = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
        >>> value = regfused.penalty([weight], l1=0.5, l2=0.25)
        >>> value.backward()
        >>> value.item(), weight.grad.tolist()
        (2.75, [1.0, -1.5, 0.0])
    """
    tensors = [params] if isinstance(params, Tensor) else list(params)
    options.check_strength("penalty", "l1", l1, as_number=options.constant)
    options.check_strength("penalty", "l2", l2, as_number=options.constant)
    if torch.compiler.is_compiling():
        return _while_compiling(tensors, float(l1), float(l2))
    if extension.C is None:
        return reference.penalty(tensors, l1=l1, l2=l2)
    value, leftovers = extension.C.penalty(tensors, float(l1), float(l2))
    sharded = [tensors[i] for i in leftovers if shards_of(tensors[i]) is not None]
    others = [tensors[i] for i in leftovers if shards_of(tensors[i]) is None]
    if sharded:
        part = of_all_ranks(sharded, lambda parts: penalty(parts, l1=l1, l2=l2))
        value = part if value is None else _sum(value, part)
    if others or value is None:
        rest = reference.penalty(others, l1=l1, l2=l2)
        value = rest if value is None else _sum(value, rest)
    return value


def _while_compiling(tensors: list[Tensor], l1: float, l2: float) -> Tensor:
    """Nothing here breaks a graph."""
    taken = [t for t in tensors if extension.kernels_take(t)]
    if not taken or extension.compiles_in_torch():
        return reference.penalty(tensors, l1=l1, l2=l2)
    rest = [t for t in tensors if not extension.kernels_take(t)]
    value: Tensor = torch.ops.regfused.penalty(taken, l1, l2)
    return _sum(value, reference.penalty(rest, l1=l1, l2=l2)) if rest else value


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return a + b.to(a.device) if b.device.type == "cpu" else a.to(b.device) + b
