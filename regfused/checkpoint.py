"""What a checkpoint may hold, and what is said when it does not fit the optimizer that loads it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from regfused import options, step_count
from regfused.reference.rule import Rule

# What torch can copy or keep beside the slots of a rule: other people's notes.
_NOTES = (Tensor, int, float, complex, str, bytes, dict, list, tuple, type(None))


def check_outline(operation: str, state_dict: Any) -> None:
    """Raise ``ValueError`` unless ``state_dict`` has the outer form of a checkpoint."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"{operation}: a checkpoint must be a dict with 'state' and 'param_groups', "
            f"but got a {type(state_dict).__name__}"
        )


def fitting(operation: str, param_groups: list[dict[str, Any]], state_dict: Any, rule: Rule) -> dict[str, Any]:
    """A copy of a checkpoint that fits these groups; the slots in it belong to nobody else.

    Raises:
        ValueError: where it does not fit.
    """
    check_outline(operation, state_dict)
    for name, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(name), kind):
            raise ValueError(
                f"{operation}: a checkpoint must have {name!r}, a {kind.__name__}, "
                f"but has {type(state_dict[name]).__name__ if name in state_dict else sorted(map(str, state_dict))}"
            )
    groups: list[dict[str, Any]] = state_dict["param_groups"]
    if len(groups) != len(param_groups):
        raise ValueError(
            f"{operation}: the checkpoint has a different number of parameter groups: {len(groups)}, "
            f"where the optimizer has {len(param_groups)} "
            "(loaded state dict has a different number of parameter groups)"
        )
    for g, (group, own) in enumerate(zip(groups, param_groups, strict=True)):
        _check_group(f"{operation}: group {g} of the checkpoint", group, own)
    _check_class(operation, groups, state_dict["state"], rule)
    options.check_groups(operation, [{**own, **group} for group, own in zip(groups, param_groups, strict=True)], rule)
    _check_names(operation, groups, param_groups)
    state = dict(state_dict["state"])
    for name, param_id, param, group in _pairs(operation, groups, param_groups):
        if param_id in state:
            state[param_id] = _fitting_entry(operation, name, state[param_id], param, group, rule)
    return {**state_dict, "state": state}


def _check_group(place: str, group: Any, own: dict[str, Any]) -> None:
    if not isinstance(group, dict) or not isinstance(group.get("params"), list):
        raise ValueError(f"{place} must be a dict with 'params', a list, but is {_brief(group)}")
    count = len(own["params"])
    if len(group["params"]) != count:
        raise ValueError(
            f"{place} doesn't match the size of optimizer's group: {len(group['params'])} parameters, "
            f"where that has {count} (loaded state dict contains a parameter group that doesn't match the size of "
            "optimizer's group)"
        )
    if "param_names" in group:
        names = group["param_names"]
        if not isinstance(names, list) or len(names) != count or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{place} must have {count} strings as 'param_names', but has {_brief(names)}")


def _check_names(operation: str, groups: list[dict[str, Any]], param_groups: list[dict[str, Any]]) -> None:
    """The same names in another order: state and options would go to the wrong parameters."""
    saved, own = (
        [name for g in all_groups for name in g.get("param_names", ())] for all_groups in (groups, param_groups)
    )
    if saved != own and Counter(saved) == Counter(own):
        there, here = next((a, b) for a, b in zip(saved, own, strict=True) if a != b)
        raise ValueError(
            f"{operation}: the checkpoint has the parameters of this optimizer in another order: "
            f"{there!r} where {here!r} is here"
        )


def _pairs(
    operation: str, groups: list[dict[str, Any]], param_groups: list[dict[str, Any]]
) -> list[tuple[str, Any, Tensor, dict[str, Any]]]:
    """Each parameter with its name in messages, its id in the checkpoint and its group there; one id for one."""
    pairs = []
    param_of: dict[Any, Tensor] = {}
    id_of: dict[Tensor, Any] = {}
    for g, (group, own) in enumerate(zip(groups, param_groups, strict=True)):
        for i, (param_id, param) in enumerate(zip(group["params"], own["params"], strict=True)):
            name = f"parameter {i} of group {g}"
            if not isinstance(param_id, int | str):
                raise ValueError(f"{operation}: the id of {name} must be an int or a str, but is {_brief(param_id)}")
            if param_of.setdefault(param_id, param) is not param or id_of.setdefault(param, param_id) != param_id:
                raise ValueError(
                    f"{operation}: the checkpoint must have one id for each parameter, but {param_id!r} of {name} "
                    "is not the only one, or not its own"
                )
            pairs.append((name, param_id, param, {**own, **group}))
    return pairs


def _check_class(operation: str, groups: list[dict[str, Any]], state: dict[Any, Any], rule: Rule) -> None:
    """A checkpoint of another class: its state would go unused, and ours start anew."""
    for other in (known() for known in Rule.KNOWN):
        if other.name == rule.name:
            continue
        odd = [name for name in other.options if name not in rule.options and any(name in group for group in groups)]
        odd += [
            slot
            for slot in other.slots
            if slot not in rule.slots and any(isinstance(entry, dict) and slot in entry for entry in state.values())
        ]
        if odd and not any(name in group for name in rule.options for group in groups):
            raise ValueError(
                f"{operation}: the checkpoint must be one of the rule {rule.name!r} ({', '.join(rule.options)}), "
                f"but has {', '.join(odd)} of {other.name!r}"
            )


def _fitting_entry(
    operation: str, name: str, entry: Any, param: Tensor, group: dict[str, Any], rule: Rule
) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise ValueError(f"{operation}: the state of {name} must be a dict, but is {_brief(entry)}")
    for key, value in entry.items():
        if not isinstance(value, _NOTES):
            raise ValueError(
                f"{operation}: the state of {name} must hold tensors and plain values, "
                f"but its {key!r} is {_brief(value)}"
            )
        if isinstance(value, Tensor):
            _check_has_values(f"{operation}: the {key} of {name}", value, param)
    fitting = dict(entry)
    for slot in rule.slots:
        if isinstance(entry.get(slot), Tensor):
            _check_slot(f"{operation}: the {slot} of {name}", entry[slot], param, group, rule)
            fitting[slot] = _own_copy(entry[slot], param)
    if rule.counts_steps:
        step = entry.get("step")
        if step is None and any(entry.get(slot) is not None for slot in rule.slots):
            raise ValueError(
                f"{operation}: the state of {name} must have 'step' beside its slots, but has {sorted(entry)}"
            )
        if step is not None:
            step_count.check(f"{operation}: the step of {name}", step, wait=True)
            # Old checkpoints have a number.
            kept = step.detach().clone() if isinstance(step, Tensor) else step_count.as_tensor(step, param, group)
            fitting["step"] = kept
    return fitting


def _check_has_values(place: str, tensor: Tensor, param: Tensor) -> None:
    """Raise ``ValueError`` for what torch cannot bring to the type and device of a parameter."""
    odd = ""
    if tensor.is_meta and not param.is_meta:
        odd = "on the meta device"
    elif tensor.is_quantized:
        odd = "quantized"
    elif tensor.is_nested:
        odd = "nested"
    elif tensor.layout not in (torch.strided, torch.sparse_coo, param.layout):
        odd = f"of layout {tensor.layout}"
    if odd:
        raise ValueError(f"{place} must have values that can be copied, but is {odd}")


def _check_slot(place: str, slot: Tensor, param: Tensor, group: dict[str, Any], rule: Rule) -> None:
    if slot.layout != param.layout and not options.group_allows_sparse(group, rule):
        raise ValueError(f"{place} must have layout {param.layout}, but has {slot.layout}")
    if tuple(slot.shape) != tuple(param.shape):
        raise ValueError(f"{place} must have shape {tuple(param.shape)}, but has {tuple(slot.shape)}")
    options.check_kind(place, slot, param)


@torch.no_grad()
def _own_copy(slot: Tensor, param: Tensor) -> Tensor:
    """The values of a slot in memory of its own, in the layout of the parameter."""
    if options.is_plain(slot) and options.is_plain(param):
        return torch.empty_like(param, requires_grad=False).copy_(slot)
    return slot.detach().clone()


def _brief(value: Any) -> str:
    text = repr(value) if isinstance(value, int | float | str | bytes | list | dict | type(None)) else ""
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"
