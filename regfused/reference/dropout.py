"""Dropout by Philox4x32-10, in torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from regfused import options

# What is not for torch alone. Subclasses of Tensor may mean anything by a multiplication.
TENSORS = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_LOWER = 0xFFFFFFFF
_ROW = 64  # elements that share eight counters

# What Philox multiplies by, and what it adds to the two halves of its key after each of ten rounds.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four random words for each counter, under a key of two words; a word is 32 bits in an int64.

    Source: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
    """
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        # The product of two words fills 64 bits: as int64 it may be negative, but its bits are right.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (right >> 32 & _LOWER) ^ b ^ k0, right & _LOWER
        c, d = (left >> 32 & _LOWER) ^ d ^ k1, left & _LOWER
        k0, k1 = k0 + _INCREMENTS[0] & _LOWER, k1 + _INCREMENTS[1] & _LOWER
    return a, b, c, d


def random_bits(first_row: int, rows: int, seed: Tensor) -> Tensor:
    """The 32 random bits of each element of some rows of 64, in memory order: two halves, from two streams of words."""
    halves = []
    for stream in (0, 1):
        index = torch.arange(first_row * 8, (first_row + rows) * 8, device=seed.device)
        counter = (index & _LOWER, index >> 32, torch.full_like(index, stream), torch.zeros_like(index))
        random = philox(counter, (seed & _LOWER, seed >> 32 & _LOWER))
        # Of counter j, the upper halves of words 0 and 1 are for elements 2j and 2j + 1, the lower ones for
        # 16 + 2j and 17 + 2j; words 2 and 3 for those that stand 32 further on.
        runs = [
            half_of(torch.stack(random[first : first + 2], dim=-1).view(rows, 16))
            for first in (0, 2)
            for half_of in (lambda words: words >> 16, lambda words: words & 0xFFFF)
        ]
        halves.append(torch.cat(runs, dim=1).view(-1))
    return halves[0] << 16 | halves[1]


def factor_like(input: Tensor, p: float, seed: Tensor) -> Tensor:
    """0 with probability ``p``, otherwise ``1/(1 - p)``, laid out as ``empty_like(input)``, in the type of arithmetic.

    ``p`` counts as the nearest multiple of 2^-32.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    like = torch.empty_like(input, dtype=dtype, requires_grad=False)
    threshold = int(p * 2**32 + 0.5)
    scale = 1 / (1 - p) if threshold < 2**32 else 0.0
    numel = input.numel()
    kept = random_bits(0, -(-numel // _ROW), seed)[:numel] >= threshold
    factor = kept.to(dtype) * torch.tensor(scale, dtype=dtype, device=input.device)
    return factor.as_strided(like.size(), like.stride())


def by_seed(input: Tensor, p: float, seed: Tensor) -> Tensor:
    """What ``torch.ops.regfused.dropout`` computes: ``input * factor``; ``seed`` is a 0-dim int64 tensor."""
    return (input * factor_like(input, p, seed)).to(input.dtype)


def draw_seed(device: torch.device) -> Tensor:
    """The seed of a call, from torch's generator of that device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def probability(p: float) -> float:
    """``p`` as a float, or ``ValueError``."""
    value = options.constant("dropout", "p", p)
    if not 0 <= value <= 1:
        # Programs look for torch's words.
        raise ValueError(
            f"dropout: p must be in [0, 1], but got {p} (dropout probability has to be between 0 and 1, but got {p})"
        )
    return value


def drops_nothing(input: Tensor, p: float, training: bool) -> bool:
    """Whether dropout is the identity; ``ValueError`` for an input that cannot be scaled."""
    # torch.jit.trace would record the number of elements, and what is done with it.
    if not training or p == 0 or (not torch.jit.is_tracing() and input.numel() == 0):
        return True
    if not (input.is_floating_point() or input.is_complex()):
        raise ValueError(f"dropout: input must be floating point, but got {input.dtype}")
    return False


def is_for_torch(input: Tensor) -> bool:
    """Whether only torch's own dropout knows what to do with an input, or should be what a trace holds."""
    return (
        type(input) not in TENSORS
        or input.layout != torch.strided
        or input.is_nested
        or input.dtype not in DTYPES
        or torch.jit.is_tracing()
    )


def recorded(
    function: Any, owner: type[nn.Module], module: Any, input: Proxy, p: Any, training: Any, inplace: Any
) -> Any:
    """A call as a node of the graph that ``torch.fx`` makes of a model.

    A call of a module stays one, as that of ``torch.nn.Dropout`` does: it has to drop by the mode that the graph module
    is in when it runs. A subclass of the ``owner`` whose forward does more would do it twice then.
    """
    tracer = input.tracer
    if getattr(type(module), "forward", None) is owner.forward and hasattr(tracer, "path_of_module"):
        try:
            path = tracer.path_of_module(module)
        except NameError:  # made on the way, and no part of the model
            path = ""
        if path:
            return tracer.create_proxy("call_module", path, (input,), {})
    return tracer.create_proxy("call_function", function, (input,), {"p": p, "training": training, "inplace": inplace})


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """See `regfused.dropout`: the same result from the same seed."""
    if not torch.jit.is_scripting():
        return _dropout(input, p, training, inplace)
    return nn.functional.dropout(input, p, training, inplace)


def _dropout(input: Tensor, p: float, training: bool, inplace: bool, module: nn.Module | None = None) -> Tensor:
    if isinstance(input, Proxy):
        return recorded(dropout, Dropout, module, input, p, training, inplace)
    p = probability(p)
    if type(input) in TENSORS and drops_nothing(input, p, training):
        return input
    if is_for_torch(input):
        return nn.functional.dropout(input, p, training, inplace)
    seed = draw_seed(input.device)
    return input.mul_(factor_like(input, p, seed)) if inplace else by_seed(input, p, seed)


class Dropout(nn.Dropout):
    """See `regfused.Dropout`."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        probability(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return _dropout(input, self.p, self.training, self.inplace, self)
        return nn.functional.dropout(input, self.p, self.training, self.inplace)
