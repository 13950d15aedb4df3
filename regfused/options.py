"""What the options of an optimizer may be, and what is said when they are not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

NONFINITE = ("propagate", "skip", "error")

# Finite and >= 0.
_STRENGTHS = ("lr", "momentum", "weight_decay", "l1", "l2", "group_l1")
_SWITCHES = (
    "nesterov",
    "maximize",
    "proximal",
    "penalty_in_clip",
    "decoupled_weight_decay",
    "classical_momentum",
    "differentiable",
)
_CHOICES = ("foreach", "fused")
# One value for the whole optimizer: there is one norm, over all groups.
_GLOBAL = ("max_norm", "norm_type", "nonfinite")
OPTIONS = (*_STRENGTHS, "group_dim", "dampening", *_SWITCHES, *_CHOICES, *_GLOBAL)


def number(operation: str, name: str, value: Any) -> float:
    """``value`` as a float; a one-element tensor counts as its value."""
    if isinstance(value, torch.Tensor):
        if value.is_meta:
            raise ValueError(f"{operation}: {name} must have a value, but got a meta tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_nested or value.dtype == torch.bool:
            raise ValueError(
                f"{operation}: {name} must be a number or a dense tensor of numbers, "
                f"but got a tensor of layout {value.layout} and dtype {value.dtype}"
            )
        if value.numel() != 1 or value.is_complex():
            raise ValueError(
                f"{operation}: {name} must be a number or a tensor with 1 element, "
                f"but got a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
            )
        return float(value.item())
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
        raise ValueError(f"{operation}: {name} must be a number, but got {value!r} ({type(value).__name__})")
    try:
        return float(value)
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{operation}: {name} must be one number of float64's range, but {error}") from None


def constant(operation: str, name: str, value: Any) -> float:
    """`number`, for what is no variable of the formula: a tensor that waits for a gradient would wait in vain."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ValueError(
            f"{operation}: {name} gets no gradient, and must be a number or a tensor without requires_grad, "
            f"but got {value!r}"
        )
    return number(operation, name, value)


def check_strength(
    operation: str, name: str, value: Any, as_number: Callable[[str, str, Any], float] = number
) -> float:
    """``value`` as a float; ``ValueError`` unless it is finite and >= 0."""
    strength = as_number(operation, name, value)
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"{operation}: {name} must be finite and >= 0, but got {value}")
    return strength


def check_max_norm(operation: str, value: Any) -> float:
    """``value`` as a float; ``ValueError`` unless it is >= 0."""
    max_norm = number(operation, "max_norm", value)
    if not max_norm >= 0:
        raise ValueError(f"{operation}: max_norm must be >= 0, but got {value}")
    return max_norm


def check_norm_type(operation: str, value: Any) -> float:
    """``value``, which may be a string such as "inf", as a float; ``ValueError`` for NaN."""
    try:
        norm_type = float(value)
    except (TypeError, ValueError):
        norm_type = math.nan
    if math.isnan(norm_type):
        raise ValueError(f"{operation}: norm_type must be a number or 'inf', but got {value!r}")
    return norm_type


def check_floating(operation: str, tensors: Iterable[Any]) -> None:
    """Raise for the first item that is no tensor, or neither floating point nor complex."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{operation}: expected tensors, but item {i} is a {type(tensor).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{operation}: tensors must be floating point or complex, but item {i} of shape "
                f"{tuple(tensor.shape)} is {tensor.dtype}"
            )


def check_group(operation: str, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for the first option of ``group`` that is not as it must be."""
    for name in OPTIONS:
        if name not in group:
            raise ValueError(f"{operation}: a parameter group must have {name!r}, but has {sorted(group)}")
    for name in group:
        # Schedulers and people keep notes of their own in a group; a misspelt option is neither.
        if name not in OPTIONS and name not in ("params", "param_names") and isinstance(name, str):
            meant = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.85)
            if meant:
                raise ValueError(f"{operation}: unknown option {name!r}; did you mean {meant[0]!r}?")
    for name in _STRENGTHS:
        check_strength(operation, name, group[name])
    dampening = number(operation, "dampening", group["dampening"])
    if not math.isfinite(dampening):
        raise ValueError(f"{operation}: dampening must be finite, but got {group['dampening']}")
    if group["max_norm"] is not None:
        max_norm = number(operation, "max_norm", group["max_norm"])
        if not max_norm >= 0:
            raise ValueError(f"{operation}: max_norm must be None or >= 0, but got {group['max_norm']}")
    if math.isnan(number(operation, "norm_type", group["norm_type"])):
        raise ValueError(f"{operation}: norm_type must be a number, but got {group['norm_type']}")
    check_group_dim(operation, group)
    if not isinstance(group["nonfinite"], str) or group["nonfinite"] not in NONFINITE:
        raise ValueError(f"{operation}: nonfinite must be one of {NONFINITE}, but got {group['nonfinite']!r}")
    for name in (*_SWITCHES, *_CHOICES):
        value = group[name]
        if not isinstance(value, bool | int) and not (value is None and name in _CHOICES):
            raise ValueError(f"{operation}: {name} must be True or False, but got {value!r}")


def check_group_dim(operation: str, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``group_dim`` is a dimension of every parameter that the group lasso shrinks."""
    dim = group["group_dim"]
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ValueError(f"{operation}: group_dim must be an int, but got {dim!r} ({type(dim).__name__})")
    if float(group["group_l1"]) == 0:
        return
    params = group.get("params", ())
    for i, param in enumerate([params] if isinstance(params, torch.Tensor) else params):
        tensor = param[1] if isinstance(param, tuple) else param
        if isinstance(tensor, torch.Tensor):
            check_dim(operation, "group_dim", dim, tensor, f"parameter {i} of the group")


def check_dim(operation: str, name: str, dim: int, tensor: torch.Tensor, place: str) -> None:
    """Raise ``ValueError`` unless ``dim`` is a dimension of ``tensor``; one without dimensions has dimension 0."""
    dims = max(tensor.dim(), 1)
    if not -dims <= dim < dims:
        raise ValueError(
            f"{operation}: {name} must be in [{-dims}, {dims - 1}] for {place}, which has shape "
            f"{tuple(tensor.shape)}, but got {dim}"
        )


def check_construction(operation: str, group: Mapping[str, Any]) -> None:
    """`check_group`, and what torch asks of a new group only: schedulers may pass through the rest."""
    check_group(operation, group)
    if group["nesterov"] and (float(group["momentum"]) == 0 or float(group["dampening"]) != 0):
        raise ValueError(
            f"{operation}: nesterov demands a momentum and zero dampening, "
            f"but got momentum={group['momentum']} and dampening={group['dampening']}"
        )
    if group["classical_momentum"] and float(group["dampening"]) != 0:
        raise ValueError(f"{operation}: classical_momentum has no dampening, but got dampening={group['dampening']}")
    if group["fused"] and group["foreach"]:
        raise RuntimeError(f"{operation}: `fused` and `foreach` cannot be `True` together")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError(f"{operation}: `fused` does not support `differentiable`")


def _value(option: Any) -> Any:
    """What an option that was checked is compared by: a tensor by its number."""
    return option.item() if isinstance(option, torch.Tensor) else option


def check_groups(operation: str, groups: Iterable[Mapping[str, Any]]) -> None:
    """`check_group` for each, and that they agree where there is one value for the optimizer."""
    first: Mapping[str, Any] | None = None
    for group in groups:
        check_group(operation, group)
        first = group if first is None else first
        for name in _GLOBAL:
            if _value(group[name]) != _value(first[name]):
                raise ValueError(
                    f"{operation}: {name} must be the same in every parameter group, for there is one norm over all, "
                    f"but got {first[name]!r} and {group[name]!r}"
                )


def check_params(operation: str, params: Iterable[Any]) -> None:
    """Raise ``ValueError`` for a tensor that can never be stepped."""
    for param in params:
        tensor = param[1] if isinstance(param, tuple) else param
        if not isinstance(tensor, torch.Tensor):
            continue  # torch says what is wrong with it
        if tensor.is_meta:
            raise ValueError(f"{operation}: parameters must have memory, but got one on the meta device")
        if tensor.is_nested:
            raise ValueError(f"{operation}: parameters must be single tensors, but got a nested tensor")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{operation}: parameters must be floating point or complex, but got {tensor.dtype}")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a dense tensor of torch's own class: what lies in its memory is all there is."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
    )


def check_momentum_buffers(operation: str, groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any]) -> None:
    """Raise ``ValueError`` for a momentum buffer that does not fit its parameter."""
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param not in state:
                continue
            entry = state[param]
            if not isinstance(entry, dict):
                raise ValueError(
                    f"{operation}: the state of parameter {i} of group {g} must be a dict, "
                    f"but is a {type(entry).__name__}"
                )
            buffer = entry.get("momentum_buffer")
            if buffer is None:
                continue
            place = f"{operation}: the momentum_buffer of parameter {i} of group {g}"
            if not isinstance(buffer, torch.Tensor):
                raise ValueError(f"{place} must be a tensor, but got {type(buffer).__name__}")
            for name in ("shape", "dtype", "device", "layout"):
                demanded, got = getattr(param, name), getattr(buffer, name)
                # After a sparse gradient torch keeps a sparse buffer.
                if demanded != got and not (name == "layout" and group_allows_sparse(group)):
                    demanded, got = (tuple(x) if name == "shape" else x for x in (demanded, got))
                    raise ValueError(f"{place} must have {name} {demanded}, but has {got}")


def group_allows_sparse(group: Mapping[str, Any]) -> bool:
    """Whether every option is one under which torch's for-loop takes a sparse gradient."""
    return (
        not group["fused"]
        and float(group["l1"]) == 0
        and float(group["l2"]) == 0
        and float(group["group_l1"]) == 0
        and float(group["weight_decay"]) == 0
        and group["max_norm"] is None
        and group["nonfinite"] == "propagate"
        and not group["classical_momentum"]
        and not group["differentiable"]
    )
