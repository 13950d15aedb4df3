"""The parameters that benchmarks work on: the shapes of real models, and tensors of ordinary numbers."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MODELS = "mlp_251,many_small_1000x1k,resnet50,gpt2_124m"
# Where most models on a CPU are, between the cache of a core and the memory: elements in all, in one tensor or eight.
IN_CACHE = tuple(f"{size}_in_{tensors}" for size in ("64k", "256k", "1m", "4m") for tensors in (1, 8))
SETS = {"in_cache": IN_CACHE, "large_layers": ("layers_4x1024", "resnet50", "gpt2_124m")}
GRAD_NORM = 2.0
CHECKED_NUMEL = 4_000_000  # errors are measured on tensors of a model with this many elements at most

Shapes = list[list[int]]


def read_models() -> dict[str, Shapes]:
    """The shapes of all parameters, by the name of the model."""
    runs = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return {name: [shape for shape, repeats in model for _ in range(repeats)] for name, model in runs.items()}


def numel_of(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def checked_part(shapes: Shapes) -> Shapes:
    """As many tensors of the model, in a seeded order, as fit under the cap; where none does, one of that size."""
    part: Shapes = []
    for shape in random.Random(0).sample(shapes, len(shapes)):
        if numel_of(part) + math.prod(shape) <= CHECKED_NUMEL:
            part.append(shape)
    return part or [[CHECKED_NUMEL]]


def reduced(shapes: Shapes) -> Shapes:
    """A few small tensors that stand for the model where only the code is tried, not the speed."""
    return [[min(size, 32) for size in shape] for shape in shapes[:20]]


def random_params(shapes: Shapes, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Parameters with gradients of norm ``GRAD_NORM``, as sizes go in training."""
    generator = torch.Generator(device).manual_seed(0)
    scale = GRAD_NORM / math.sqrt(numel_of(shapes))
    params = [torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device).mul_(scale).to(dtype)
    return params


def normal(shapes: Shapes, dtype: torch.dtype, device: str, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]


def own_copy(params: list[Tensor]) -> list[Tensor]:
    copies = [p.detach().clone().requires_grad_() for p in params]
    for copy, p in zip(copies, params, strict=True):
        assert p.grad is not None
        copy.grad = p.grad.clone()
    return copies


def check_ordinary(name: str, params: list[Tensor]) -> None:
    """Zeros, denormals and infinities take other times than ordinary numbers, so a few of them are the limit."""
    tensors = [t.detach() for p in params for t in (p, p.grad) if t is not None]
    numel = sum(t.numel() for t in tensors)
    odd = sum(count_odd(t) for t in tensors)
    if odd > 0.01 * numel:
        raise RuntimeError(
            f"{name}: ordinary numbers are demanded, but {odd} of {numel} are zero, denormal or infinite"
        )


def count_odd(tensor: Tensor) -> int:
    """Elements that are zero, denormal in float32, which is what arithmetic is done in, or not finite."""
    size = tensor.float().abs()
    return int(((size < torch.finfo(torch.float32).tiny) | ~size.isfinite()).sum())


def largest_error(got: list[Tensor], exact: list[Tensor]) -> float:
    """Of any element, over the largest element."""
    largest = max(float(x.abs().max()) for x in exact)
    return max(float((x.detach() - y).abs().max()) for x, y in zip(got, exact, strict=True)) / largest
