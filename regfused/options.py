"""What the options of an optimizer may be, and what is said when they are not."""

from __future__ import annotations

import difflib
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from regfused import step_count
from regfused.tracing import value_is_known

if TYPE_CHECKING:
    from regfused.reference.rule import Rule

NONFINITE = ("propagate", "skip", "error")

# Options that every optimizer has; a rule has a table of its own. Strengths are finite and >= 0.
_STRENGTHS = ("lr", "weight_decay", "l1", "l2", "concavity", "group_l1")
_SWITCHES = (
    *("maximize", "proximal", "penalty_in_clip", "decoupled_weight_decay"),
    *("keep_zeros", "nonnegative", "differentiable"),
)
_CHOICES = ("foreach", "fused")
# One value for the whole optimizer: there is one norm, over all groups.
_GLOBAL = ("max_norm", "norm_type", "nonfinite")
_SHARED = (*_STRENGTHS, "group_dim", *_SWITCHES, *_CHOICES, *_GLOBAL)

# What torch says of a negative one; programs look for it. So is every phrase in parentheses at the end of a message.
_TORCHS_WORDS = {
    "lr": "Invalid learning rate",
    "momentum": "Invalid momentum value",
    "weight_decay": "Invalid weight_decay value",
    "eps": "Invalid epsilon value",
}

# Schedulers come to zero by some thousand products and sums, each rounded to a part in 2^53 of rates up to about 100.
# csrc/strength.h has the same numbers.
_ROUNDING = 1e-12
_ROUNDING_OF = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def names_of(rule: Rule) -> tuple[str, ...]:
    """Every option of a group under this rule."""
    return (*_SHARED, *rule.options)


def strengths_of(rule: Rule) -> tuple[str, ...]:
    return (*_STRENGTHS, *(name for name, kind in rule.options.items() if kind == "strength"))


def number(operation: str, name: str, value: Any) -> float:
    """``value`` as a float; a one-element tensor counts as its value."""
    if type(value) is float:
        return value
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
                f"but got a tensor of shape {tuple(value.shape)} and dtype {value.dtype} "
                f"(Tensor {name} must be 1-element)"
            )
        # Where there is no value to look at, shape and type are all that can be checked.
        return float(value.item()) if value_is_known(value) else 0.0
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
    operation: str, name: str, value: Any, below: float = 0.0, as_number: Callable[[str, str, Any], float] = number
) -> float:
    """``value`` as a float; ``ValueError`` unless it is finite and >= 0, or ``below`` zero by so much at most."""
    strength = as_number(operation, name, value)
    if not (math.isfinite(strength) and strength >= -below):
        torchs = f" ({_TORCHS_WORDS[name]}: {value})" if strength < 0 and name in _TORCHS_WORDS else ""
        raise ValueError(f"{operation}: {name} must be finite and >= 0, but got {value}{torchs}")
    return strength


def rounding(value: Any) -> float:
    """How far below zero rounding alone can bring a strength that schedulers lead to zero."""
    if isinstance(value, torch.Tensor):
        return _ROUNDING_OF.get(value.dtype, _ROUNDING)
    if isinstance(value, int | float):
        return _ROUNDING
    # Numbers of other libraries, such as numpy.float32, by their size in bytes.
    rounding_of = {2: _ROUNDING_OF[torch.bfloat16], 4: _ROUNDING_OF[torch.float32]}
    size: Any = getattr(value, "itemsize", None)
    return rounding_of.get(size, _ROUNDING)


def strength(value: Any) -> Any:
    """What a strength of a group, checked before, counts as in a step: itself, and 0 where rounding put it below.

    A tensor stays one, on its device: the host does not wait for its value.
    """
    if isinstance(value, torch.Tensor):
        return torch.clamp(value, min=0)
    return value if value >= 0 else 0.0


def as_it_counts(group: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """The group with every `strength` as it counts in a step; the group itself where all are."""
    strengths = strengths_of(rule)
    if all(not isinstance(group[name], torch.Tensor) and group[name] >= 0 for name in strengths):
        return group
    return {**group, **{name: strength(group[name]) for name in strengths}}


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


def check_group(operation: str, group: Mapping[str, Any], rule: Rule, *, new: bool = False) -> None:
    """Raise ``ValueError`` for the first option of ``group`` that is not as it must be.

    Args:
        operation: for messages.
        group: a parameter group.
        rule: of the optimizer.
        new: a strength is what somebody wrote: no scheduler has rounded it.
    """
    for name in names_of(rule):
        if name not in group:
            raise ValueError(f"{operation}: a parameter group must have {name!r}, but has {sorted(group)}")
    for name in strengths_of(rule):
        check_strength(operation, name, group[name], 0.0 if new else rounding(group[name]))
    for name, kind in rule.options.items():
        if kind == "finite" and not math.isfinite(number(operation, name, group[name])):
            raise ValueError(f"{operation}: {name} must be finite, but got {group[name]}")
        if kind == "fractions":
            _check_fractions(operation, name, group[name])
    if group["max_norm"] is not None:
        max_norm = number(operation, "max_norm", group["max_norm"])
        if not max_norm >= 0:
            raise ValueError(f"{operation}: max_norm must be None or >= 0, but got {group['max_norm']}")
    if math.isnan(number(operation, "norm_type", group["norm_type"])):
        raise ValueError(f"{operation}: norm_type must be a number, but got {group['norm_type']}")
    check_group_dim(operation, group)
    if not isinstance(group["nonfinite"], str) or group["nonfinite"] not in NONFINITE:
        raise ValueError(f"{operation}: nonfinite must be one of {NONFINITE}, but got {group['nonfinite']!r}")
    for name in (*_SWITCHES, *_CHOICES, *(name for name, kind in rule.options.items() if kind == "flag")):
        value = group[name]
        if not isinstance(value, bool | int) and not (value is None and name in _CHOICES):
            raise ValueError(f"{operation}: {name} must be True or False, but got {value!r}")
    rule.check(operation, group)


def _check_fractions(operation: str, name: str, pair: Any) -> None:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"{operation}: {name} must be a pair of numbers, but got {pair!r}")
    for i, value in enumerate(pair):
        if not 0 <= number(operation, f"{name}[{i}]", value) < 1:
            raise ValueError(
                f"{operation}: {name}[{i}] must be >= 0 and < 1, but got {value} "
                f"(Invalid beta parameter at index {i}: {value})"
            )


def warn_of_misspelt(operation: str, group: Mapping[str, Any], rule: Rule) -> None:
    """Warn of names in a new group that look like misspelt options.

    Schedulers and people keep notes of their own in a group, such as ``initial_lr`` or ``use_weight_decay``: a name
    with an option's whole name among its words is one.
    """
    options = names_of(rule)
    for name in group:
        if name in options or name in ("params", "param_names") or not isinstance(name, str):
            continue
        words = f"_{name}_"
        meant = difflib.get_close_matches(name.lower(), options, n=1, cutoff=0.85)
        if meant and not any(f"_{option}_" in words for option in options):
            warnings.warn(
                f"{operation}: {name!r} is not an option and does nothing; did you mean {meant[0]!r}?",
                stacklevel=stacklevel_of_the_caller(),
            )


def stacklevel_of_the_caller() -> int:
    """The ``stacklevel`` of a warning, made by the function that asks, about a line outside of regfused and torch."""
    inside = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def check_group_dim(operation: str, group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless ``group_dim`` is a dimension of every parameter that the group lasso shrinks."""
    dim = group["group_dim"]
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise ValueError(f"{operation}: group_dim must be an int, but got {dim!r} ({type(dim).__name__})")
    if value_of(strength(group["group_l1"])) == 0:
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


def check_construction(operation: str, group: Mapping[str, Any], rule: Rule) -> None:
    """`check_group`, and what torch asks of a new group only: schedulers may pass through the rest."""
    check_group(operation, group, rule, new=True)
    rule.check_construction(operation, group)
    if group["fused"] and group["foreach"]:
        raise RuntimeError(f"{operation}: `fused` and `foreach` cannot be `True` together.")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError(f"{operation}: `fused` does not support `differentiable`")


def value_of(option: Any) -> Any:
    """What an option that was checked is compared by: a tensor by its number."""
    return option.item() if isinstance(option, torch.Tensor) else option


def check_groups(operation: str, groups: Iterable[Mapping[str, Any]], rule: Rule) -> None:
    """`check_group` for each, and that they agree where there is one value for the optimizer."""
    first: Mapping[str, Any] | None = None
    for group in groups:
        check_group(operation, group, rule)
        first = group if first is None else first
        for name in _GLOBAL:
            if value_of(group[name]) != value_of(first[name]):
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
        if tensor.is_nested:
            raise ValueError(f"{operation}: parameters must be single tensors, but got a nested tensor")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{operation}: parameters must be floating point or complex, but got {tensor.dtype}")


def list_params(groups: Iterable[dict[str, Any]]) -> None:
    """Replace ``params`` that can be gone through once only by a list of them."""
    for group in groups:
        if iter(group["params"]) is group["params"]:
            group["params"] = list(group["params"])


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether this is a dense tensor of torch's own class, or of one derived from it that changes no operation.

    What lies in the memory of such a tensor is all there is.
    """
    return tensor.layout == torch.strided and not tensor.is_nested and is_plain_class(type(tensor))


def is_plain_class(cls: type[torch.Tensor]) -> bool:
    """Whether a class of tensors has neither ``__torch_function__`` nor ``__torch_dispatch__`` of its own."""
    plain = _PLAIN_CLASSES.get(cls)
    if plain is None:
        functions = [_in_class(own, "__torch_function__") for own in (torch.Tensor, torch.nn.Parameter)]
        dispatch = _in_class(torch.Tensor, "__torch_dispatch__")
        plain = _in_class(cls, "__torch_function__") in functions and _in_class(cls, "__torch_dispatch__") is dispatch
        _PLAIN_CLASSES[cls] = plain
    return plain


# Looked up for every tensor of a step.
_PLAIN_CLASSES: MutableMapping[type, bool] = WeakKeyDictionary()


def _in_class(cls: type, name: str) -> Any:
    """An attribute as it stands in the class, not bound to it."""
    return next(base.__dict__[name] for base in cls.__mro__ if name in base.__dict__)


def check_state(
    operation: str, groups: Iterable[Mapping[str, Any]], state: Mapping[Any, Any], rule: Rule, *, wait: bool = False
) -> None:
    """Raise ``ValueError`` for a slot that does not fit its parameter, or a number of steps that is none.

    Args:
        operation: for messages.
        groups: parameter groups, checked before.
        state: of the optimizer.
        rule: of the optimizer.
        wait: look at values also where the host has to wait for a device.
    """
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
            for slot in rule.slots:
                if entry.get(slot) is not None:
                    _check_slot(
                        f"{operation}: the {slot} of parameter {i} of group {g}", entry[slot], param, group, rule
                    )
            if rule.counts_steps and entry.get("step") is not None:
                place = f"{operation}: the step of parameter {i} of group {g}"
                step_count.check(place, entry["step"], wait=wait)
                if group["differentiable"] and isinstance(entry["step"], torch.Tensor) and entry["step"].requires_grad:
                    raise RuntimeError(
                        f"{place} must not require grad (`requires_grad` is not supported for `step` in differentiable "
                        "mode)"
                    )


def _check_slot(place: str, slot: Any, param: torch.Tensor, group: Mapping[str, Any], rule: Rule) -> None:
    if not isinstance(slot, torch.Tensor):
        raise ValueError(f"{place} must be a tensor, but got {type(slot).__name__}")
    check_kind(place, slot, param)
    for name in ("shape", "device", "layout"):
        demanded, got = getattr(param, name), getattr(slot, name)
        # After a sparse gradient torch keeps a sparse buffer.
        if demanded != got and not (name == "layout" and group_allows_sparse(group, rule)):
            demanded, got = (tuple(x) if name == "shape" else x for x in (demanded, got))
            raise ValueError(f"{place} must have {name} {demanded}, but has {got}")


def check_kind(place: str, slot: torch.Tensor, param: torch.Tensor) -> None:
    """Raise ``ValueError`` unless a slot is complex as its parameter is, or real floating point."""
    if not (slot.is_floating_point() or slot.is_complex()) or slot.is_complex() != param.is_complex():
        kind = "complex" if param.is_complex() else "real floating point"
        raise ValueError(f"{place} must be {kind}, as dtype {param.dtype} is, but has dtype {slot.dtype}")


def group_allows_sparse(group: Mapping[str, Any], rule: Rule) -> bool:
    """Whether every option is one under which torch's for-loop takes a sparse gradient."""
    return (
        rule.allows_sparse(group)
        and not group["fused"]
        and float(strength(group["l1"])) == 0
        and float(strength(group["l2"])) == 0
        and float(strength(group["group_l1"])) == 0
        and float(strength(group["weight_decay"])) == 0
        and group["max_norm"] is None
        and group["nonfinite"] == "propagate"
        and not group["keep_zeros"]
        and not group["nonnegative"]
        and not group["differentiable"]
    )
