"""One step in torch operations: collect, norm, and an update that is formed whole before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regfused import options, step_count
from regfused.reference import shared_memory
from regfused.reference.rule import Move, Rule, is_on
from regfused.reference.slices import shrink_slices
from regfused.shards import Shards, are_alike, has_whole_slices, is_dtensor, like, over_all_ranks, part_of, shards_of
from regfused.stats import Part, Record
from regfused.tracing import values_are_known

Group = dict[str, Any]
State = MutableMapping[Any, Any]
#: Writes each second tensor into the first one; adds it where it is sparse.
Write = Callable[[list[Tensor], list[Tensor]], None]


@dataclass
class Entry:
    """One parameter that has a gradient, with its group. What is derived of both is made when asked for, not kept.

    Of a sharded parameter an entry has what this rank has: a step works element by element.
    """

    group: Group
    place: tuple[int, int]  # which group, and where in it
    param: Tensor
    target: Tensor  # what is written: the parameter, or this rank's part of it
    value: Tensor  # what is read as p: the target, but see `shared_memory`
    raw_grad: Tensor
    grad_scale: float | Tensor | None
    shards: Shards | None = None  # where `target` is a part

    @property
    def sparse(self) -> bool:
        return self.raw_grad.layout != torch.strided

    def unscaled(self) -> Tensor:
        """g / grad_scale, in the type of arithmetic."""
        grad = _arithmetic(self.raw_grad)
        return grad if self.grad_scale is None else grad * (1.0 / self.grad_scale)

    def grad(self) -> Tensor:
        """g': of what is minimized."""
        return -self.unscaled() if self.group["maximize"] else self.unscaled()

    def h(self) -> Tensor:
        """What the norm is taken of."""
        h = self.grad()
        if self.group["penalty_in_clip"] and not self.group["proximal"]:
            h = _add_penalty_gradient(h, self.value, self.group)
        return torch.where(self.value == 0, 0, h) if self.group["keep_zeros"] else h


def collect(
    params: Iterable[tuple[int, int, Group, Tensor]],
    grad_scale: float | Tensor | None,
    operation: str,
    state: State,
    rule: Rule,
) -> list[Entry]:
    """Entries for all parameters that have a gradient. Checks, and changes nothing.

    Args:
        params: each with the index of its group, its index in it, and the group.
        grad_scale: by which gradients are to be divided, or None.
        operation: for messages.
        state: of the optimizer.
        rule: of the optimizer.
    """
    entries = []
    counted: dict[int, Group] = {}
    for g, i, given, param in params:
        if param.grad is None:
            continue
        if g not in counted:
            counted[g] = options.as_it_counts(given, rule)
        group = counted[g]
        entry = Entry(group, (g, i), param, param, param, param.grad, grad_scale)
        _check(entry, f"parameter {i} of group {g}, of shape {tuple(param.shape)},", operation, rule)
        if is_dtensor(param) and _is_local(entry, state, rule):
            part = part_of(param)
            entry = Entry(group, (g, i), param, part, part, part_of(param.grad), grad_scale, shards_of(param))
        entries.append(entry)
    return entries


def _check(entry: Entry, place: str, operation: str, rule: Rule) -> None:
    param, grad = entry.param, entry.raw_grad
    rule.check_gradient(operation, place, entry.group, param, grad)
    if entry.sparse and not (entry.grad_scale is None and options.group_allows_sparse(entry.group, rule)):
        raise RuntimeError(
            f"{operation}: penalties, clipping, weight decay, nonfinite, keep_zeros, nonnegative, classical_momentum, "
            f"differentiable and fused=True demand dense gradients, but one of shape {tuple(param.shape)} has layout "
            f"{grad.layout}"
        )
    if entry.group["nonnegative"] and param.is_complex():
        raise RuntimeError(f"{operation}: nonnegative demands real parameters, but {place} is {param.dtype}")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{operation}: a gradient must have the shape of its parameter, but {place} has one of {tuple(grad.shape)}"
        )
    written = [("parameter", param)] if entry.grad_scale is None else [("parameter", param), ("gradient", grad)]
    for name, tensor in written:
        why = why_not_written(tensor)
        if why:
            raise RuntimeError(f"{operation}: a step has to write every {name}, but that of {place} {why}")


def _is_local(entry: Entry, state: State, rule: Rule) -> bool:
    """True if a step of a DTensor is one of its parts: then no rank needs what another one has, but for the norm."""
    param, own = entry.param, state.get(entry.param, {})
    return (
        shards_of(param) is not None
        and are_alike(param, entry.raw_grad)
        and all(own.get(slot) is None or are_alike(param, own[slot]) for slot in rule.slots)
        and not torch.is_grad_enabled()
        and (not is_on(entry.group["group_l1"]) or has_whole_slices(param, entry.group["group_dim"]))
    )


def why_not_written(tensor: Tensor) -> str:
    """Why torch would refuse to write into a tensor, or an empty string."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode, where this step is not"
    if options.is_plain(tensor) and torch._debug_has_internal_overlap(tensor) == 1:
        return "has elements that share memory, as in an expanded tensor"
    return ""


def norm(entries: list[Entry], norm_type: float, others: Iterable[float] = ()) -> Tensor:
    """The norm over all entries, and over norms of tensors that are not among them: 0-dim, accumulated in float64.

    Of sharded entries each rank has its part: one collective operation for all that are spread over the same ranks.
    Autograd runs through it where it is on.
    """
    by_shards: dict[Shards | None, list[Tensor]] = {None: [torch.tensor(n, dtype=torch.float64) for n in others]}
    for entry in entries:
        h = entry.raw_grad.coalesce().values() if entry.sparse else entry.h()
        if h.numel() == 0:
            if entry.shards is None:
                continue  # the maximum of nothing is an error in torch
            h = h.new_zeros(1)  # other ranks have a part
        dtype = torch.complex128 if h.is_complex() else torch.float64
        h_norm = torch.linalg.vector_norm(h, norm_type, dtype=dtype)
        by_shards.setdefault(entry.shards, []).append(over_all_ranks(h_norm, None).to(torch.float64))
    device = next((norms[-1].device for norms in reversed(by_shards.values()) if norms), None)
    if device is None:
        return torch.zeros((), dtype=torch.float64)
    whole = []
    for shards, norms in by_shards.items():
        if norms:
            whole.append(_norms_over_all_ranks(torch.stack([n.to(device) for n in norms]), norm_type, shards))
    return torch.linalg.vector_norm(torch.cat(whole), norm_type)


def _norms_over_all_ranks(norms: Tensor, norm_type: float, shards: Shards | None) -> Tensor:
    """Norms of tensors from norms of their parts: some power of them can be added up."""
    if shards is None or not any(shards.sharded):
        return norms
    if norm_type in (float("inf"), float("-inf")):
        return over_all_ranks(norms, shards, "max" if norm_type > 0 else "min")
    if norm_type == 0:  # how many are not zero
        return over_all_ranks(norms, shards)
    return over_all_ranks(norms**norm_type, shards) ** (1 / norm_type)


def needs_norm(group: Group) -> bool:
    """Whether the step as a whole needs its norm before anything can be updated."""
    return group["max_norm"] is not None or group["nonfinite"] != "propagate"


def clip_coefficient(max_norm: float | None, grad_norm: Tensor) -> Tensor | None:
    """c = min(1, max_norm / (norm + 1e-6)), where NaN stays NaN; None for no clip at all."""
    return None if max_norm is None else torch.clamp(max_norm / (grad_norm + 1e-6), max=1.0)


class Update:
    """Everything that a step will write: the new parameters and state.

    It is formed whole, beside the old ones, before the first tensor changes: what raises until then, or interrupts, has
    changed nothing. `commit` then writes all of it, plain dense tensors in one call of torch.

    Args:
        entries: as collected.
        state: of the optimizer.
        rule: of the optimizer.
        clip_coef: c, or None for no clip at all.
        happens: a 0-dim tensor of a bool where the host cannot know whether the step happens: what is written is what
            was there, where it does not. State that the step makes is zero then.
        first: parameters whose gradient is their first one; by default those that lack state.
    """

    def __init__(
        self,
        entries: list[Entry],
        state: State,
        rule: Rule,
        clip_coef: Tensor | float | None,
        happens: Tensor | None = None,
        first: set[Tensor] | None = None,
    ) -> None:
        #: Penalty and places of what will have been stepped.
        self.record = Record(clip_coef=_detached(clip_coef))
        self._state = state
        self._rule = rule
        self._clip_coef = clip_coef
        self._happens = happens
        self._first = first_gradients(entries, state, rule) if first is None else first
        self._known = values_are_known(entry.param for entry in entries)
        self._to: list[Tensor] = []
        self._from: list[Tensor] = []
        #: State of parameters that share their memory, as stored: one that is listed twice finds what it left.
        self._left: dict[Tensor, dict[str, Any]] = {}
        self._fresh: dict[Tensor, dict[str, Any]] = {}  # state that is to replace what is there, by parameter
        self._parts_of: list[Tensor] = []  # sharded tensors whose parts are written
        in_turn = self._known and not torch.is_grad_enabled()
        copies = shared_memory.copies([entry.param for entry in entries]) if in_turn else {}
        for entry in entries:
            if entry.param in copies:
                entry = replace(entry, value=copies[entry.param])
            if entry.sparse:
                self._step_sparse(entry)
            else:
                self._step_dense(entry)
            if entry.value is not entry.target:
                self._write(entry.target, entry.value)

    def commit(self, write: Write | None = None) -> None:
        """All of it, or, where this raises, nothing.

        Args:
            write: what writes, instead of torch alone.
        """
        done = torch.zeros((), device="cpu")
        if self._known:
            self._to.append(done)
            self._from.append(torch.ones((), device="cpu"))
        before = {param: self._state.get(param) for param in self._fresh}
        try:
            # One call, which runs no Python: tensors that are keys of a dictionary have been hashed.
            self._state.update(self._fresh)
            (write or _write_in_torch)(self._to, self._from)
        except BaseException:
            if not (self._known and done):
                for param, entry in before.items():
                    if entry is None:
                        self._state.pop(param, None)
                    else:
                        self._state[param] = entry
            raise
        if self._parts_of:
            torch.autograd.graph.increment_version(self._parts_of)

    def _write(self, to: Tensor, source: Tensor) -> None:
        if self._happens is not None:
            source = torch.where(self._happens.to(to.device), source.to(to.dtype), to)
        self._to.append(to)
        self._from.append(source)

    def _step_dense(self, entry: Entry) -> None:
        group, param = entry.group, entry.value
        lr, weight_decay = self._number(group["lr"]), group["weight_decay"]
        if is_on(group["l1"]) or is_on(group["l2"]):
            self.record.penalties.append(Part(_penalty(param.detach(), group), entry.shards))
        old = _arithmetic(param)

        d = entry.h()
        if self._clip_coef is not None:
            d = d * (self._clip_coef.to(d.device) if isinstance(self._clip_coef, Tensor) else self._clip_coef)
        if not group["penalty_in_clip"] and not group["proximal"]:
            d = _add_penalty_gradient(d, param, group)
        if is_on(weight_decay) and not group["decoupled_weight_decay"]:
            d = d + weight_decay * old
        if group["proximal"] and is_on(group["l1"]) and is_on(group["concavity"]):
            d = d - _bent(param, group)  # l1*|p| itself is in the map
        if group["keep_zeros"]:
            d = torch.where(old == 0, 0, d)

        moved, t = self._moved(entry, d, lr)

        new = old
        if is_on(weight_decay) and group["decoupled_weight_decay"]:
            new = new * (1 - lr * weight_decay)
        if moved.move is not None:
            new = new - moved.move
        # With lr = 0 the parameter keeps its bits: the sign of a zero, and all of them where a length is 0/0 or NaN.
        if group["proximal"] and (is_on(group["l1"]) or is_on(group["l2"])) and is_on(lr):
            length = self._rule.steady_gain(group) * moved.length
            shrunk = torch.clamp(torch.abs(new) - length * group["l1"], min=0)
            new = torch.sgn(new) * shrunk / (1 + 2 * length * group["l2"])
        if group["nonnegative"] and is_on(lr):
            new = torch.where(new < 0, 0, new)
        if group["keep_zeros"]:
            new = torch.where(old == 0, old, new)
        new = new.to(param.dtype)
        if is_on(group["group_l1"]) and is_on(lr):
            # In the metric of the step, made of the slots as they are stored.
            slots = {name: _arithmetic(slot.to(param.dtype)) for name, slot in moved.slots.items()}
            lengths = self._rule.steady_gain(group) * self._rule.length(slots, group, t, lr)
            if group["proximal"] and is_on(group["l2"]):
                lengths = lengths / (1 + 2 * lengths * group["l2"])
            new = shrink_slices(new, lengths * group["group_l1"], group["group_dim"])

        if param is entry.target:
            self._write(entry.target, new)
        else:
            param.copy_(new)
        if entry.shards is not None:
            self._parts_of.append(entry.param)
        if entry.grad_scale is not None:  # torch's AMP contract
            self._write(entry.raw_grad, entry.unscaled())
        self.record.stepped.append(entry.place)

    def _step_sparse(self, entry: Entry) -> None:
        """As torch's for-loop, for which the options were checked to be torch's."""
        moved, _ = self._moved(entry, entry.grad(), float(entry.group["lr"]))
        if moved.move is None:
            return
        step = (-moved.move).to(entry.param.dtype)
        if entry.value is not entry.param:
            entry.value.add_(step)
        elif step.layout == torch.strided:
            self._write(entry.param, entry.param + step)
        else:
            self._write(entry.param, step.coalesce())

    def _moved(self, entry: Entry, d: Tensor, lr: float | Tensor) -> tuple[Move, float | Tensor | None]:
        """What the rule makes of d, and t; its slots are kept for later."""
        param, group, rule = entry.param, entry.group, self._rule
        there = self._state.get(param, {})
        left = self._left.get(param, {})
        slots: dict[str, Tensor | None] = {}
        written: dict[str, Tensor | None] = {}  # what is in the state
        for name in rule.slots_of(group):
            stored = there.get(name)
            if stored is not None and entry.shards is not None:
                self._parts_of.append(stored)
                stored = part_of(stored)
            written[name] = stored
            slots[name] = self._slot(entry, left.get(name, stored))
        t = self._time(there, left) if rule.counts_steps else None
        moved = rule.move(d, slots, group, t, lr)
        if entry.value is not entry.target:
            self._left[param] = {name: slot.to(param.dtype) for name, slot in moved.slots.items()}
        if t is not None:
            self._keep_count(entry, there.get("step"), t)
        for name, slot in moved.slots.items():
            self._keep(entry, name, written[name], slot)
        return moved, t

    def _slot(self, entry: Entry, stored: Tensor | None) -> Tensor | None:
        """A slot as the rule reads it."""
        if self._rule.start_from_gradient:
            # A parameter that is listed twice has two first gradients, and one slot, that of the second.
            stored = None if entry.param in self._first else stored
        elif stored is None:
            stored = torch.zeros_like(entry.target, requires_grad=False)
        if stored is None or stored.layout != torch.strided:
            return stored
        return _arithmetic(stored.to(entry.param.dtype))  # the parameter may have come to another type

    def _time(self, there: dict[str, Any], left: dict[str, Any]) -> float | Tensor:
        """t, the number of this step; a tensor where the host must not wait for it."""
        before = left.get("step", there.get("step"))
        if before is None:
            return 1.0
        waits = isinstance(before, Tensor) and (not self._known or before.device.type != "cpu")
        return before.detach().reshape(()).to(torch.float64) + 1 if waits else float(before) + 1

    def _keep(self, entry: Entry, name: str, stored: Tensor | None, slot: Tensor) -> None:
        """A slot as it is after the step, over the one in the state where it fits."""
        param = entry.param
        first = self._rule.start_from_gradient and param in self._first
        if (
            stored is not None
            and stored.layout == slot.layout == torch.strided
            and stored.dtype == param.dtype
            and not first
        ):
            self._write(stored, slot)
            return
        if slot.layout != torch.strided:
            kept = slot.clone()
        else:
            kept = torch.empty_like(entry.target, requires_grad=False)
            kept.copy_(slot if self._happens is None else torch.where(self._happens, slot, 0))
        if entry.shards is not None:
            kept = like(param, kept)
        self._add_fresh(param, name, kept)

    def _keep_count(self, entry: Entry, stored: Any, t: float | Tensor) -> None:
        param = entry.param
        if entry.value is not entry.target:
            self._left[param]["step"] = t
        if isinstance(stored, Tensor):
            self._write(stored, torch.as_tensor(t, dtype=stored.dtype, device=stored.device).expand(stored.shape))
            return
        count = step_count.as_tensor(0.0, param, entry.group)
        happens = 1.0 if self._happens is None else self._happens.to(count.device, torch.float64)
        self._add_fresh(param, "step", count.copy_(torch.as_tensor(t * happens)))

    def _add_fresh(self, param: Tensor, name: str, value: Tensor) -> None:
        if param not in self._fresh:
            self._fresh[param] = dict(self._state.get(param, {}))
        self._fresh[param][name] = value

    def _number(self, value: float | Tensor) -> float | Tensor:
        """A learning rate as a number, or as a 0-dim tensor where its value cannot be looked at."""
        if not isinstance(value, Tensor) or torch.is_grad_enabled():
            return value
        return value.item() if self._known else value.reshape(()).to(torch.float64)


def first_gradients(entries: list[Entry], state: State, rule: Rule) -> set[Tensor]:
    """Parameters that have none of a rule's slots yet."""
    return {e.param for e in entries if all(state.get(e.param, {}).get(slot) is None for slot in rule.slots)}


def update_in_turn(
    entries: list[Entry], state: State, rule: Rule, clip_coef: Tensor | float | None, happens: Tensor | None
) -> Record:
    """One update after the other, for tracers: nothing can be torn there.

    Parameters may share memory, which a tracer does not see, and a step is seen to take the memory of one update.
    """
    record = Record(clip_coef=_detached(clip_coef))
    first = first_gradients(entries, state, rule)
    for entry in entries:
        update = Update([entry], state, rule, clip_coef, happens, first)
        update.commit()
        record.penalties += update.record.penalties
        record.stepped += update.record.stepped
    return record


def _write_in_torch(to: list[Tensor], sources: list[Tensor]) -> None:
    """One call for all plain dense tensors, in which nothing can come between two of them, not even a signal."""
    plain_to, plain_sources = [], []
    for tensor, source in zip(to, sources, strict=True):
        if source.layout != torch.strided:
            tensor.add_(source)
        elif options.is_plain(tensor) and options.is_plain(source) and not torch.is_grad_enabled():
            plain_to.append(tensor)
            plain_sources.append(source)
        else:
            tensor.copy_(source)
    if plain_to:
        torch._foreach_copy_(plain_to, plain_sources)
        # Under a TorchDispatchMode that call does not do it.
        torch.autograd.graph.increment_version([tensor for tensor in plain_to if not tensor.is_inference()])


def _detached(clip_coef: Tensor | float | None) -> Tensor | float:
    """For the numbers of a step, which keep no graph alive."""
    return 1.0 if clip_coef is None else clip_coef.detach() if isinstance(clip_coef, Tensor) else clip_coef


def _arithmetic(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 in float32; everything else as it is.

    Where autograd runs through the step it is a copy: the parameter itself will be written, and its graph may need it.
    """
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _add_penalty_gradient(grad: Tensor, param: Tensor, group: Group) -> Tensor:
    """grad + l1*sign(p) + 2*l2*p - clamp(concavity*p, -l1, l1), with sign(0) = 0."""
    p = _arithmetic(param)
    if is_on(group["l1"]):
        grad = grad + group["l1"] * torch.sgn(p)
        if is_on(group["concavity"]):
            grad = grad - _bent(param, group)
    if is_on(group["l2"]):
        grad = grad + 2 * group["l2"] * p
    return grad


def _bent(param: Tensor, group: Group) -> Tensor:
    """clamp(concavity*p, -l1, l1): by what the gradient of the concave penalty is less than that of l1*|p|."""
    p = _arithmetic(param)
    return torch.sgn(p) * torch.clamp(group["concavity"] * torch.abs(p), max=group["l1"])


@torch.no_grad()
def _penalty(param: Tensor, group: Group) -> Tensor:
    """The value of l1*sum|p| + l2*sum(p^2), l1 concave or not: 0-dim, in float64."""
    size = torch.abs(param).double()
    absolute = size.new_zeros(())
    if is_on(group["l1"]):
        l1, concavity = group["l1"], group["concavity"]
        if is_on(concavity):
            bent = torch.clamp(size, max=l1 / concavity)
            absolute = (l1 * bent - concavity / 2 * bent.square()).sum()
        else:
            absolute = l1 * size.sum()
    return absolute + (group["l2"] * size.square().sum() if is_on(group["l2"]) else 0.0)
