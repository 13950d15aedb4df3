"""A step whose norm is taken over several processes, by the kernels: each process steps what it has.

That are sharded parameters (DTensor), and ordinary ones under a `NormGroup`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regfused import extension, options
from regfused.norm_group import NormGroup
from regfused.reference.rule import Rule, is_on
from regfused.shards import Shards, has_whole_slices, is_dtensor, like, part_of, shards_of
from regfused.stats import LastStep, Part, Record
from regfused.verdict import Verdict, another_failed, over_ranks

Group = dict[str, Any]


class _Member:
    """A parameter, what this process has of it, and their state."""

    __slots__ = ("entry", "number", "own", "param", "part", "parts", "place", "slots", "spec")

    def __init__(self, number: int, param: Any, part: Tensor, spec: Any, parts: _Parts, place: tuple[int, int]) -> None:
        self.number = number  # among all
        self.param = param
        self.part = part  # the parameter itself where it is no DTensor
        self.spec = spec  # how it is spread; None where it is no DTensor
        self.parts = parts
        self.place = place  # which group, and where in it
        self.own: dict[str, Any] | None = None  # its state
        self.entry: dict[str, Any] = {}  # that of its part
        self.slots: list[tuple[str, Any]] = []  # what of `own` the entry is made of


class _Parts:
    """What this process has of all parameters that are spread in one way, as a plan is given it."""

    def __init__(self, shards: Shards | None, plan: Any, groups: int) -> None:
        self.shards = shards  # None: the same in every process, or no DTensor
        self.plan = plan
        plan.is_shared = True
        self.groups: list[Group] = [{"params": []} for _ in range(groups)]
        self.state: dict[Tensor, dict[str, Any]] = {}
        self.fingerprint = 0

    def take_options(self, param_groups: list[Group]) -> None:
        for own, group in zip(self.groups, param_groups, strict=True):
            params = own["params"]
            own.update(group)
            own["params"] = params
            own.pop("param_names", None)

    def verdict(self, norm_type: float) -> Verdict:
        norm = self.plan.norm() if self.plan.tensors else 0.0
        return Verdict.of(norm, norm_type, fingerprint=self.fingerprint)


class ShardedStep:
    """Plans for the parts of parameters. An optimizer has one once it needs it.

    What was found of the parameters is kept from one step to the next, and looked at again where anything has changed.

    Args:
        new_plan: makes a plan of the compiled part for the optimizer's rule.
        rule: the optimizer's.
        operation: for messages.
        norm_group: over which the norm is taken besides.
    """

    def __init__(
        self, new_plan: Callable[[], Any], rule: Rule, operation: str, norm_group: NormGroup | None = None
    ) -> None:
        self._new_plan = new_plan
        self._rule = rule
        self._operation = operation
        self._norm_group = norm_group
        self._members: list[_Member] = []
        self._watched: Any = None  # looks at the members in every step
        self._stepped: list[tuple[int, int]] = []
        self._parts: list[_Parts] = []
        self._slices: list[Any] = []  # which the group lasso has, by group

    def step(
        self, param_groups: list[Group], state: Any, last: LastStep, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> bool:
        """The whole step. False where it is not for the kernels: then nothing has changed.

        Of sharded parameters that depends on what is the same on every rank, so that all ranks take the same way.
        """
        try:
            try:
                is_for_kernels = self._open(param_groups, state, grad_scale)
            except Exception:
                self._tell_of_error(param_groups, found_inf)
                raise
            if not is_for_kernels:
                return False
            first = param_groups[0]
            needs_norm = self._parts[0].plan.needs_norm
            verdict = self._verdict(float(first["norm_type"]), needs_norm, found_inf)
            if verdict.overflows:
                last.skipped += 1
                return True
            norm = verdict.norm(float(first["norm_type"])) if needs_norm else math.nan
            if needs_norm and not math.isfinite(norm) and first["nonfinite"] != "propagate":
                if first["nonfinite"] == "error":
                    raise RuntimeError(
                        f"{self._operation}: nonfinite='error' demands a finite gradient norm, but it is {norm}"
                    )
                last.skip(norm)
                return True
            self._update(norm, state, last, Record(grad_norm=norm if needs_norm else None))
            return True
        finally:
            self._release()

    def _release(self) -> None:
        """No gradient is held between steps."""
        for parts in self._parts:
            parts.plan.release()
        if self._watched is not None:
            self._watched.release()

    # --- What there is ----------------------------------------------------------------------------

    def _open(self, param_groups: list[Group], state: Any, grad_scale: Tensor | None) -> bool:
        """Everything is checked, nothing is changed. False where a tensor is not for the kernels."""
        if not self._is_current(param_groups, state):
            is_for_kernels = self._collect(param_groups, state)
            if not is_for_kernels or not self._is_current(param_groups, state):
                self._forget()
                return False
        for parts in self._parts:
            parts.take_options(param_groups)
            parts.plan.step(parts.groups, parts.state, grad_scale, None)
            if parts.plan.leftover:
                self._forget()
                return False
        return True

    def _forget(self) -> None:
        self._release()
        self._members = []
        self._watched = None
        self._stepped = []

    def _is_current(self, param_groups: list[Group], state: Any) -> bool:
        """Whether parameters and state are those that were collected; then the parts have their gradients."""
        watched = self._watched
        return watched is not None and self._slices == _slices_of(param_groups) and watched.open(param_groups, state)

    def _collect(self, param_groups: list[Group], state: Any) -> bool:
        """Sorts the parameters by how they are spread. False where one is not for the kernels, or none is sharded."""
        self._forget()
        self._parts = []
        assert extension.C is not None
        watched = extension.C.Members(_is_spread_as, part_of)
        options.list_params(param_groups)
        found: dict[Shards | None, _Parts] = {}
        known: dict[Any, _Parts] = {}  # by mesh and placements; what differs in these may be spread in one way
        if self._norm_group is not None:
            self._among(found, None, len(param_groups))
        for g, group in enumerate(param_groups):
            has_groups = is_on(group["group_l1"])
            for i, param in enumerate(group["params"]):
                spec, part = None, param
                if is_dtensor(param):
                    spec, part = param._spec, param._local_tensor
                    key = (spec.mesh, spec.placements)
                    if key not in known:
                        shards = shards_of(param)
                        if shards is None:
                            return False  # a sum over ranks that is not taken yet
                        known[key] = self._among(found, shards if any(shards.sharded) else None, len(param_groups))
                    parts = known[key]
                    if has_groups and not has_whole_slices(param, group["group_dim"]):
                        return False
                    if type(part) is not Tensor:
                        return False  # one that is still under way
                    if param.grad is not None and param.grad.dtype != part.dtype:
                        return False
                    described = f"{g} {tuple(param.shape)} {param.dtype} {spec.placements}"
                    parts.fingerprint = zlib.crc32(described.encode(), parts.fingerprint)
                else:
                    parts = self._among(found, None, len(param_groups))
                member = _Member(len(self._members), param, part, spec, parts, (g, i))
                watched.add(g, param, part, spec)
                if not self._take_state(member, state):
                    return False
                watched.know_state(member.number, member.own, member.slots)
                parts.groups[g]["params"].append(part)
                self._members.append(member)
        for parts in found.values():
            parts.fingerprint &= 0xFFFF
        self._parts = list(found.values())
        self._slices = _slices_of(param_groups)
        self._watched = watched
        return bool(known) or self._norm_group is not None

    def _among(self, found: dict[Shards | None, _Parts], shards: Shards | None, groups: int) -> _Parts:
        if shards not in found:
            found[shards] = _Parts(shards, self._new_plan(), groups)
        return found[shards]

    def _take_state(self, member: _Member, state: Any) -> bool:
        """The state of the part. False where a tensor of it does not lie as the part does."""
        own = member.own = state.get(member.param)
        member.slots = []
        if not own:
            return True
        if member.spec is None:
            member.entry = member.parts.state[member.part] = own
            return True
        entry = dict(own)
        for name in ("step", *self._rule.slots):
            slot = own.get(name)
            member.slots.append((name, slot))
            if slot is None or name == "step":
                continue
            if not is_dtensor(slot) or not _is_spread_as(slot._spec, member.spec):
                return False
            local = slot._local_tensor
            if local.dtype != member.part.dtype or local.stride() != member.part.stride():
                return False  # the kernels would put another tensor in its place
            entry[name] = local
        member.entry = member.parts.state[member.part] = entry
        return True

    # --- The norm ---------------------------------------------------------------------------------

    def _verdict(self, norm_type: float, needs_norm: bool, found_inf: Tensor | None) -> Verdict:
        """That of all processes. Every process takes part in it, with or without gradients."""
        overflows = found_inf is not None and float(found_inf) != 0
        if not needs_norm and (self._norm_group is None or found_inf is None):
            return Verdict(overflows=overflows)
        verdicts = {parts.shards: parts.verdict(norm_type) for parts in self._parts} if needs_norm else {}
        together = over_ranks(verdicts, norm_type).joined(Verdict(overflows=overflows), norm_type)
        if self._norm_group is not None:
            together = self._norm_group.over_all(together, norm_type)
        if together.failed:
            raise RuntimeError(another_failed(self._operation))
        if together.differs:
            raise RuntimeError(
                f"{self._operation}: every rank must have the same sharded parameters, in the same groups and order, "
                f"but the ranks differ; this one has {len(self._members)} parameters"
            )
        return together

    def _tell_of_error(self, param_groups: list[Group], found_inf: Tensor | None) -> None:
        """The others wait for this process in a collective operation, in which they learn that there is no step."""
        first = param_groups[0]
        try:
            needs_norm = first["max_norm"] is not None or first["nonfinite"] != "propagate"
            norm_type = float(first["norm_type"])
        except (KeyError, TypeError, ValueError):
            return  # nobody knows what the others do
        if not needs_norm and (self._norm_group is None or found_inf is None):
            return
        verdict = Verdict(failed=True)
        if needs_norm:
            # In the order of parameters, as the others have it.
            ways = [shards_of(param) for group in param_groups for param in group["params"] if is_dtensor(param)]
            split = dict.fromkeys(shards for shards in ways if shards is not None and any(shards.sharded))
            over_ranks(dict.fromkeys(split, verdict), norm_type)
        if self._norm_group is not None:
            self._norm_group.over_all(verdict, norm_type)

    # --- The update -------------------------------------------------------------------------------

    def _update(self, norm: float, state: Any, last: LastStep, record: Record) -> None:
        for parts in self._parts:
            parts.plan.judge(norm)
            parts.plan.update([], [])
            record.clip_coef = parts.plan.clip_coef
            penalty = torch.as_tensor(parts.plan.numbers()[2], dtype=torch.float64)
            record.penalties.append(Part(penalty, parts.shards))
        if self._watched.changed or any(parts.plan.made for parts in self._parts):
            self._list_stepped(state)
        self._watched.bump_versions()
        record.stepped = self._stepped
        last.by_reference(record)

    def _list_stepped(self, state: Any) -> None:
        """Which parameters a step with these gradients steps. State that the kernels made goes to them."""
        self._stepped = []
        for member in self._members:
            if not self._watched.has_grad(member.number):
                continue
            self._stepped.append(member.place)
            own = member.own
            if own is None or len(own) < len(member.entry) or own.get("step") is not member.entry.get("step"):
                self._keep_state(member, state)
        self._watched.settle()

    def _keep_state(self, member: _Member, state: Any) -> None:
        """What the kernels have made goes to the parameter's state."""
        made = member.parts.state.get(member.part)
        if made is None:
            return
        if member.spec is None:
            state[member.param] = member.own = member.entry = made
            self._watched.know_state(member.number, made, [])
            return
        member.entry = made
        own = member.own = state[member.param]
        for name, value in made.items():
            if own.get(name) is None or name == "step":
                # A count of steps is the same on every rank.
                own[name] = like(member.param, value) if name != "step" else value
        member.slots = [(name, own.get(name)) for name in ("step", *self._rule.slots)]
        self._watched.know_state(member.number, own, member.slots)


def _slices_of(param_groups: list[Group]) -> list[Any]:
    return [(is_on(group["group_l1"]), group["group_dim"]) for group in param_groups]


def _is_spread_as(a: Any, b: Any) -> bool:
    """Of two specs of DTensors; those of a parameter and its gradient are often one object."""
    return a is b or (a is not None and a.mesh == b.mesh and a.placements == b.placements)
