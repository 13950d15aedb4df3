"""A step of sharded parameters (DTensor) by the kernels: each rank steps what it has, under one norm over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regfused.reference.rule import Rule, is_on
from regfused.shards import (
    Shards,
    has_whole_slices,
    like,
    over_all_ranks,
    part_of,
    shards_of,
    type_of_dtensor,
)
from regfused.stats import LastStep, Part, Record

Group = dict[str, Any]
Member = tuple[Tensor, Tensor, Any, tuple[int, int]]  # parameter, its part, its state, its group and index


class _Parts:
    """What this rank has of all parameters that are spread over the ranks in one way, as a plan is given it."""

    def __init__(self, shards: Shards | None, plan: Any) -> None:
        self.shards = shards  # None: the same on every rank, or no DTensor
        self.plan = plan
        plan.is_shared = True
        self.groups: list[Group] = []
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.members: list[Member] = []  # those that have a gradient

    def begin(self, param_groups: list[Group]) -> None:
        if len(self.groups) != len(param_groups):
            self.groups = [{} for _ in param_groups]
        for own, group in zip(self.groups, param_groups, strict=True):
            own.update(group)
            own["params"] = []
            own.pop("param_names", None)

    def release(self) -> None:
        """Nothing is held between steps: what the user lets go of is free at once."""
        self.plan.release()
        for param, part, _, _ in self.members:
            if part is not param:
                part.grad = None
        for group in self.groups:
            group["params"] = []
        self.state.clear()
        self.members.clear()

    def update(self, clip_norm: float, state: Any, slots: tuple[str, ...]) -> None:
        self.plan.judge(clip_norm)
        self.plan.update([], [])
        written = []
        for param, part, own, _ in self.members:
            made = self.state.get(part)
            if made is not None and (own is None or len(own) < len(made) or own.get("step") is not made.get("step")):
                own = state[param]
                for name, value in made.items():
                    if own.get(name) is None or name == "step":
                        # A count of steps is the same on every rank.
                        own[name] = like(param, value) if part is not param and name != "step" else value
            if part is not param:
                written.append(param)
                if own:
                    written += [own[name] for name in slots if own.get(name) is not None]
        # Autograd must see what was written through the parts.
        torch.autograd.graph.increment_version(written)


class ShardedStep:
    """Plans for the parts of sharded parameters. An optimizer has one once it has met such parameters.

    Args:
        new_plan: makes a plan of the compiled part for the optimizer's rule.
        rule: the optimizer's.
        operation: for messages.
    """

    def __init__(self, new_plan: Callable[[], Any], rule: Rule, operation: str) -> None:
        self._new_plan = new_plan
        self._rule = rule
        self._operation = operation
        self._parts: dict[Shards | None, _Parts] = {}

    def step(self, param_groups: list[Group], state: Any, last: LastStep) -> bool:
        """The whole step. False where it is not for the kernels: then nothing has changed.

        That depends on what is the same on every rank, so that all ranks take the same way.
        """
        try:
            used = self._collect(param_groups, state)
            if used is None or not all(self._opens(parts) for parts in used):
                return False
            first = param_groups[0]
            needs_norm = used[0].plan.needs_norm
            norm = self._norm(used, float(first["norm_type"])) if needs_norm else math.nan
            if needs_norm and not math.isfinite(norm) and first["nonfinite"] != "propagate":
                if first["nonfinite"] == "error":
                    raise RuntimeError(
                        f"{self._operation}: nonfinite='error' demands a finite gradient norm, but it is {norm}"
                    )
                last.skip(norm)
                return True
            record = Record(grad_norm=norm if needs_norm else None)
            for parts in used:
                parts.update(norm, state, self._rule.slots)
                record.clip_coef = parts.plan.clip_coef
                penalty = torch.as_tensor(parts.plan.numbers()[2], dtype=torch.float64)
                record.penalties.append(Part(penalty, parts.shards))
                record.stepped += [place for *_, place in parts.members]
            last.by_reference(record)
            return True
        finally:
            for parts in self._parts.values():
                parts.release()

    def _collect(self, param_groups: list[Group], state: Any) -> list[_Parts] | None:
        """Sorts the parameters by how they are spread. None where one is not for the kernels, or none is sharded."""
        for parts in self._parts.values():
            parts.begin(param_groups)
        dtensor = type_of_dtensor()
        slots = self._rule.slots
        used: dict[Any, _Parts] = {}  # by mesh and placements; what differs in these may be spread in one way
        for g, group in enumerate(param_groups):
            has_groups = is_on(group["group_l1"])
            for i, param in enumerate(group["params"]):
                own = state.get(param)
                if not isinstance(param, dtensor):
                    parts = used.get(None) or self._among(used, None, None, param_groups)
                    part = param
                    if own:
                        parts.state[part] = own
                    if param.grad is not None:
                        parts.members.append((param, part, own, (g, i)))
                    parts.groups[g]["params"].append(part)
                    continue
                spec, part = param._spec, param._local_tensor
                key = (id(spec.mesh), spec.placements)
                parts = used.get(key) or self._among(used, key, param, param_groups)
                if parts is None or (has_groups and not has_whole_slices(param, group["group_dim"])):
                    return None
                if type(part) is not Tensor:
                    part = part_of(param)
                if own:
                    entry = parts.state[part] = dict(own)
                    for name in slots:
                        slot = own.get(name)
                        if slot is None:
                            continue
                        if not isinstance(slot, dtensor) or not _is_spread_as(slot._spec, spec):
                            return None
                        local = slot._local_tensor
                        if local.dtype != part.dtype or local.stride() != part.stride():
                            return None  # the kernels would put another tensor in its place
                        entry[name] = local
                grad = param.grad
                if grad is not None:
                    if not isinstance(grad, dtensor) or not _is_spread_as(grad._spec, spec):
                        return None
                    local = grad._local_tensor
                    if local.dtype != part.dtype:
                        return None
                    part.grad = local if type(local) is Tensor else part_of(grad)
                    parts.members.append((param, part, own, (g, i)))
                parts.groups[g]["params"].append(part)
        return list(dict.fromkeys(used.values())) if any(key is not None for key in used) else None

    def _among(self, used: dict[Any, _Parts], key: Any, param: Any, param_groups: list[Group]) -> Any:
        """Those that a parameter belongs to; None for a sum over ranks that is not taken yet."""
        shards = None
        if key is not None:
            shards = shards_of(param)
            if shards is None:
                return None
            if not any(shards.sharded):
                shards = None
        if shards not in self._parts:
            self._parts[shards] = _Parts(shards, self._new_plan())
            self._parts[shards].begin(param_groups)
        used[key] = self._parts[shards]
        return used[key]

    def _opens(self, parts: _Parts) -> bool:
        """Everything is checked, nothing is changed. False where a tensor is not for the kernels."""
        parts.plan.step(parts.groups, parts.state, None, None)
        return not parts.plan.leftover

    def _norm(self, used: list[_Parts], norm_type: float) -> float:
        """One collective operation for each way in which parameters are spread. Every rank takes part in it."""
        is_max = math.isinf(norm_type)
        total, is_nan = 0.0, False
        for parts in used:
            own = parts.plan.norm() if parts.plan.tensors else 0.0
            # A maximum may lose a NaN, a sum does not.
            values = [0.0 if own != own else own, float(own != own)] if is_max else [own**norm_type, 0.0]
            if parts.shards is not None:
                here = torch.tensor(values, dtype=torch.float64, device=parts.shards.mesh.device_type)
                values = over_all_ranks(here, parts.shards, "max" if is_max else "sum").tolist()
            total = max(total, values[0]) if is_max else total + values[0]
            is_nan = is_nan or values[1] > 0
        return math.nan if is_nan else total if is_max else total ** (1 / norm_type)


def _is_spread_as(a: Any, b: Any) -> bool:
    """Of two specs of DTensors; those of a parameter and its gradient are often one object."""
    return a is b or (a.mesh == b.mesh and a.placements == b.placements)
