"""A step as one operator in a graph: what ``torch.compile`` makes of it with ``fullgraph=True``.

Everything here is read by a compiler: it looks at options, tensors and what is in the state, compiles again when these
have changed, and finds `torch.ops.regfused.sgd_.groups` or its like, which says what it writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from regfused import extension, options, step_count
from regfused.reference.rule import Rule
from regfused.reference.step import Group, needs_norm
from regfused.stats import LastStep, Part, Record

# Arguments that are no option with a value for each group.
_OTHERS = ("sizes", "lr", "max_norm", "norm_type", "nonfinite")


def _operators() -> dict[str, tuple[Any, tuple[str, ...]]]:
    """By rule: the operator, and its options that have a value for each group."""
    found = {}
    for rule in Rule.KNOWN if extension.C is not None else ():
        operator = getattr(torch.ops.regfused, f"{rule.name}_").groups
        keywords = [argument.name for argument in operator._schema.arguments if argument.kwarg_only]
        found[rule.name] = operator, tuple(name for name in keywords if name not in _OTHERS)
    return found


_OPERATORS = _operators()


@torch.compiler.assume_constant_result
def is_demanded() -> bool:
    """Whether whoever compiles wants one graph, in which a step cannot be left to the plan."""
    try:
        compiler = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return False  # beside a graph that was broken nobody compiles
    return bool(getattr(compiler, "one_graph", False) or getattr(compiler, "error_on_graph_break", False))


def why_not(param_groups: Sequence[Group], state: Mapping[Any, Any], rule: Rule) -> str:
    """What keeps a step out of a graph, or an empty string."""
    if extension.C is None:
        return "there is no compiled part"
    home = None
    for group in param_groups:
        if group["fused"] is False or group["foreach"] or group["differentiable"]:
            return "fused=False, foreach=True and differentiable=True are pure PyTorch"
        for name in (*_OPERATORS[rule.name][1], *_OTHERS[1:]):
            values = group[name] if isinstance(group[name], tuple | list) else (group[name],)
            for value in values:
                if isinstance(value, Tensor) and name == "lr" and value.is_floating_point():
                    continue
                if not (value is None or isinstance(value, bool | int | float | str)):
                    return f"{name} is a {type(value).__name__}: a number is demanded, or of lr a floating-point tensor"
        for name in _OTHERS[2:]:
            if group[name] != param_groups[0][name]:
                return f"{name} is not the same in every group, and there is one norm over all"
        if needs_norm(group) and float(group["norm_type"]) not in (1.0, 2.0, float("inf")):
            return f"norm_type is {group['norm_type']}, and not 1, 2 or inf"
        for param in group["params"]:
            if param.grad is None:
                continue
            home = param.device if home is None else home
            if not extension.kernels_take(param) or type(param) not in (Tensor, torch.nn.Parameter):
                return f"the kernels do not take a parameter of {param.dtype} and class {type(param).__name__}"
            if param.device != home or param.grad.device != home:
                return "the tensors are on several devices"
            if param.grad.dtype != param.dtype or param.grad.layout != torch.strided:
                return f"a gradient is {param.grad.dtype} and {param.grad.layout}"
            if rule.counts_steps and param in state and len(state[param]) > 0:
                count = state[param].get("step")
                if not isinstance(count, Tensor) or count.device != home:
                    return "a step count is not a tensor on the device of its parameter"
    return ""


@torch.no_grad()
def step(param_groups: Sequence[Group], state: Any, rule: Rule, last: LastStep) -> None:
    """The whole step, where `why_not` has nothing against it.

    The operator checks what it is given. A step that is skipped leaves zeros as state where it is the first one.
    """
    operator, names = _OPERATORS[rule.name]
    params: list[Tensor] = []
    grads: list[Tensor] = []
    slots: list[list[Tensor]] = [[] for _ in rule.slots]
    counts: list[Tensor] = []
    first: list[bool] = []
    sizes: list[int] = []
    stepped: list[tuple[int, int]] = []
    for g, group in enumerate(param_groups):
        needed = rule.slots_of(options.as_it_counts({**group, "lr": 0.0}, rule))
        before = len(params)
        for i, param in enumerate(group["params"]):
            if param.grad is None:
                continue
            params.append(param)
            grads.append(param.grad)
            stepped.append((g, i))
            if not needed and not rule.counts_steps:
                continue
            entry = state[param]
            if rule.counts_steps:
                if "step" not in entry:
                    entry["step"] = torch.zeros((), dtype=step_count.dtype_of(group), device=param.device)
                counts.append(entry["step"])
            else:
                first.append(entry.get(needed[0]) is None)
            for slot, name in enumerate(rule.slots):
                if name in needed:
                    if entry.get(name) is None:
                        entry[name] = torch.zeros_like(param)
                    slots[slot].append(entry[name])
        sizes.append(len(params) - before)
    rates = [group["lr"] for group in param_groups]
    tensors: list[Tensor] = []
    if any(isinstance(lr, Tensor) for lr in rates):
        tensors = [lr if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64) for lr in rates]
        rates = [0.0 for _ in rates]
    values = {name: _values_of(name, param_groups, rule) for name in names}
    shared = param_groups[0]
    measured = needs_norm(shared)
    outcome = operator(
        params,
        grads,
        *slots,
        counts if rule.counts_steps else first,
        tensors,
        sizes=sizes,
        lr=rates,
        **values,
        max_norm=shared["max_norm"],
        norm_type=float(shared["norm_type"]) if measured else 2.0,
        nonfinite=shared["nonfinite"],
    )
    grad_norm, clip_coef, penalty, skipped = outcome.unbind()
    last.by_reference(
        Record(
            grad_norm=grad_norm if measured else None, clip_coef=clip_coef, penalties=[Part(penalty)], stepped=stepped
        )
    )
    if shared["nonfinite"] == "skip":
        last.skipped = last.skipped + skipped


def _values_of(name: str, param_groups: Sequence[Group], rule: Rule) -> list[Any]:
    """An option's value for each group; of a pair of fractions both."""
    if rule.options.get(name) == "fractions":
        return [float(value) for group in param_groups for value in group[name]]
    if name == "group_dim":
        return [group[name] for group in param_groups]
    if name in options.strengths_of(rule) or rule.options.get(name) == "finite":
        return [float(group[name]) for group in param_groups]
    return [bool(group[name]) for group in param_groups]
