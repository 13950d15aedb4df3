"""Max norm constraints: slices of parameters are drawn back into a ball."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from regfused import extension
from regfused.reference import max_norm as in_torch
from regfused.shards import has_whole_slices, is_dtensor, part_of, shards_of


@torch.no_grad()
def constrain_max_norm_(params: Tensor | Iterable[Tensor], max_norm: float, dim: int | None = None) -> None:
    r"""Draw every slice whose L2 norm is above ``max_norm`` back to it, in place.

    For each slice ``w`` of each tensor, with ``r = max_norm``::

        w = w * r/||w||     where ||w|| > r; the bits of every other slice stay

    Meant to follow ``optimizer.step()``: ``constrain_max_norm_(layer.weight, 3.0, dim=0)`` bounds the incoming weights
    of each output of a ``Linear`` or a convolution (Srebro and Shraibman, Rank, trace-norm and max-norm, 2005; with
    dropout: Hinton et al., Improving neural networks by preventing co-adaptation of feature detectors, 2012).

    Norms are accumulated in float64, with the same bits for any number of threads and any instruction set (on CUDA
    devices a thread accumulates its share in the type of arithmetic); the product is made in float32 for float16 and
    bfloat16, in the tensor's own type otherwise. A norm of zero is safe. A slice with a NaN stays as it is, as in
    ``torch.renorm``; in one with an infinity the finite elements become 0, and the infinite ones NaN.

    Works on what the parameters hold: autograd does not see it, but for the version counters. On CUDA devices the host
    waits for nothing. Tensors that the kernels do not take (complex, not dense in memory, subclasses) go through
    `regfused.reference`; so do all within ``torch.func``, ``torch.jit.trace`` and ``torch.compile``.

    Args:
        params: a tensor, or an iterable of them, such as ``model.parameters()``; floating point or complex, of any
            shape and memory format. One that is listed twice counts once. Views such as ``weight[:10]`` are fine; of a
            pruned or parametrized module, whose ``weight`` is computed anew each time, what it is computed from.
        max_norm: the bound ``r``, >= 0, in the units of the parameters. 0 makes zeros, inf changes nothing.
        dim: the slices are ``p.select(dim, i)``, negative from the back: 0 has the rows of a ``Linear`` weight or the
            filters of a convolution. None: each tensor as a whole is one slice.

    Raises:
        ValueError: for a max_norm that is negative or NaN, a dim that a tensor does not have, tensors that are not
            floating point or complex, and for those that autograd has computed. Nothing has changed then.

    Example::

        >>> weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
        >>> constrain_max_norm_(weight, 1.0, dim=0)
        >>> weight
        tensor([[0.6000, 0.8000],
                [0.3000, 0.4000]])
    """
    tensors, radius = in_torch.check(params, max_norm, dim)
    kernels = None if torch.compiler.is_compiling() else extension.C
    sharded = [] if kernels is None else [t for t in tensors if is_dtensor(t) and _is_for_each_rank(t, dim)]
    if sharded:
        taken_apart = set(map(id, sharded))
        tensors = [part_of(t) if id(t) in taken_apart else t for t in tensors]
    taken = [False] * len(tensors) if kernels is None else kernels.takes(tensors)
    fused = [tensor for tensor, takes in zip(tensors, taken, strict=True) if takes]
    if fused:
        torch.ops.regfused.constrain_max_norm_.default(fused, radius, dim)
    for tensor, takes in zip(tensors, taken, strict=True):
        if not takes:
            in_torch.constrain(tensor, radius, dim)
    torch.autograd.graph.increment_version(sharded)


def _is_for_each_rank(tensor: Tensor, dim: int | None) -> bool:
    """Whether each slice of a sharded tensor is whole on a rank."""
    return shards_of(tensor) is not None and has_whole_slices(tensor, dim)
