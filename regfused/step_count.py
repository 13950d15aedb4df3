"""How many steps a parameter has made: ``state["step"]``, as torch keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regfused.tracing import value_is_known


def as_tensor(value: float, param: Tensor, group: Mapping[str, Any]) -> Tensor:
    """0-dim: on the CPU, or, where a device counts, beside the parameter."""
    on_device = group.get("capturable") or group["fused"]
    return torch.tensor(float(value), dtype=dtype_of(group), device=param.device if on_device else "cpu")


def dtype_of(group: Mapping[str, Any]) -> torch.dtype:
    """Of a new count."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 and not group["fused"] else torch.float32


def check(place: str, step: Any, *, wait: bool) -> None:
    """Raise ``ValueError`` unless ``step`` is a count, as a tensor, or as a number, which old checkpoints have.

    Args:
        place: for messages.
        step: what is in the state.
        wait: look at the value also where the host has to wait for a device.
    """
    if isinstance(step, Tensor):
        if step.numel() != 1 or not step.is_floating_point() or step.layout != torch.strided:
            raise ValueError(
                f"{place} must be a dense floating point tensor with 1 element, "
                f"but has shape {tuple(step.shape)}, dtype {step.dtype} and layout {step.layout}"
            )
        if not value_is_known(step) or (step.device.type != "cpu" and not wait):
            return
    elif isinstance(step, bool) or not isinstance(step, int | float):
        raise ValueError(f"{place} must be a tensor or a number, but is a {type(step).__name__}")
    try:
        value = float(step.detach() if isinstance(step, Tensor) else step)
    except OverflowError:  # an int beyond float64
        value = math.inf
    if not (math.isfinite(value) and value >= 0 and value == math.floor(value)):
        raise ValueError(f"{place} must be a whole number >= 0, but is {value}")
