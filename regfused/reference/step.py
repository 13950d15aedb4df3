"""One SGD step in torch operations: collect, norm, and an update that is formed whole before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regfused import options
from regfused.reference.slices import slice_norms
from regfused.shards import Shards, are_alike, is_dtensor, like, over_all_ranks, part_of, shards_of
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
    value: Tensor  # what is read as p: the target, but see `_copies_of_shared_memory`
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
        if self.group["penalty_in_clip"] and not self.group["proximal"]:
            return _add_penalty_gradient(self.grad(), self.value, self.group)
        return self.grad()


def collect(
    params: Iterable[tuple[int, int, Group, Tensor]], grad_scale: float | Tensor | None, operation: str, state: State
) -> list[Entry]:
    """Entries for all parameters that have a gradient. Checks, and changes nothing.

    Args:
        params: each with the index of its group, its index in it, and the group.
        grad_scale: by which gradients are to be divided, or None.
        operation: for messages.
        state: of the optimizer.
    """
    entries = []
    counted: dict[int, Group] = {}
    for g, i, given, param in params:
        if param.grad is None:
            continue
        if g not in counted:
            counted[g] = options.as_it_counts(given)
        group = counted[g]
        entry = Entry(group, (g, i), param, param, param, param.grad, grad_scale)
        _check(entry, f"parameter {i} of group {g}, of shape {tuple(param.shape)},", operation)
        if is_dtensor(param) and _is_local(entry, state):
            part = part_of(param)
            entry = Entry(group, (g, i), param, part, part, part_of(param.grad), grad_scale, shards_of(param))
        entries.append(entry)
    return entries


def _check(entry: Entry, place: str, operation: str) -> None:
    param, grad = entry.param, entry.raw_grad
    if entry.sparse and not (entry.grad_scale is None and options.group_allows_sparse(entry.group)):
        raise RuntimeError(
            f"{operation}: penalties, clipping, weight decay, nonfinite, classical_momentum, differentiable and "
            f"fused=True demand dense gradients, but one of shape {tuple(param.shape)} has layout {grad.layout}"
        )
    if grad.shape != param.shape:
        raise RuntimeError(
            f"{operation}: a gradient must have the shape of its parameter, but {place} has one of {tuple(grad.shape)}"
        )
    written = [("parameter", param)] if entry.grad_scale is None else [("parameter", param), ("gradient", grad)]
    for name, tensor in written:
        why = why_not_written(tensor)
        if why:
            raise RuntimeError(f"{operation}: a step has to write every {name}, but that of {place} {why}")


def _is_local(entry: Entry, state: State) -> bool:
    """Whether a step of a DTensor is one of its parts: then no rank needs what another one has, but for the norm."""
    param, buffer = entry.param, state.get(entry.param, {}).get("momentum_buffer")
    return (
        shards_of(param) is not None
        and are_alike(param, entry.raw_grad)
        and (buffer is None or are_alike(param, buffer))
        and not torch.is_grad_enabled()
        and float(entry.group["group_l1"]) == 0
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
    """Everything that a step will write: the new parameters and momentum buffers.

    It is formed whole, beside the old ones, before the first tensor changes: what raises until then, or interrupts, has
    changed nothing. `commit` then writes all of it, plain dense tensors in one call of torch.

    Args:
        entries: as collected.
        state: of the optimizer.
        clip_coef: c, or None for no clip at all.
        happens: a 0-dim tensor of a bool where the host cannot know whether the step happens: what is written is what
            was there, where it does not. A momentum buffer that the step makes is zero then.
        first: parameters whose gradient is their first one; those that have no momentum buffer, by default.
    """

    def __init__(
        self,
        entries: list[Entry],
        state: State,
        clip_coef: Tensor | float | None,
        happens: Tensor | None = None,
        first: set[Tensor] | None = None,
    ) -> None:
        #: Penalty and places of what will have been stepped.
        self.record = Record(clip_coef=_detached(clip_coef))
        self._state = state
        self._clip_coef = clip_coef
        self._happens = happens
        self._first = first_gradients(entries, state) if first is None else first
        self._known = values_are_known(entry.param for entry in entries)
        self._to: list[Tensor] = []
        self._from: list[Tensor] = []
        self._velocities: dict[Tensor, Tensor] = {}  # of parameters that share their memory, as stored
        self._fresh: dict[Tensor, dict[str, Any]] = {}  # state that is to replace what is there, by parameter
        self._parts_of: list[Tensor] = []  # sharded tensors whose parts are written
        copies = _copies_of_shared_memory(entries) if self._known and not torch.is_grad_enabled() else {}
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
        lr, momentum, weight_decay = self._number(group["lr"]), group["momentum"], group["weight_decay"]
        if _is_on(group["l1"]) or _is_on(group["l2"]):
            self.record.penalties.append(Part(_penalty(param.detach(), group), entry.shards))
        old = _arithmetic(param)

        d = entry.h()
        if self._clip_coef is not None:
            d = d * (self._clip_coef.to(d.device) if isinstance(self._clip_coef, Tensor) else self._clip_coef)
        if not group["penalty_in_clip"] and not group["proximal"]:
            d = _add_penalty_gradient(d, param, group)
        if _is_on(weight_decay) and not group["decoupled_weight_decay"]:
            d = d + weight_decay * old

        u = lr * d if group["classical_momentum"] else d
        if _is_on(momentum):
            gain = 1.0 if group["classical_momentum"] else 1.0 - group["dampening"]
            velocity = self._accelerate(entry, u, gain)
            u = u + momentum * velocity if group["nesterov"] else velocity

        new = old
        if _is_on(weight_decay) and group["decoupled_weight_decay"]:
            new = new * (1 - lr * weight_decay)
        if group["classical_momentum"]:
            new = new - u
        elif _is_on(lr):
            new = new - lr * u
        if group["proximal"] and (_is_on(group["l1"]) or _is_on(group["l2"])):
            shrunk = torch.clamp(torch.abs(new) - lr * group["l1"], min=0)
            new = torch.sgn(new) * shrunk / (1 + 2 * lr * group["l2"])
        new = new.to(param.dtype)
        if _is_on(group["group_l1"]) and _is_on(lr):
            new = _shrink_groups(new, lr * group["group_l1"], group["group_dim"])

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
        group = entry.group
        d = u = entry.grad()
        if _is_on(group["momentum"]):
            velocity = self._accelerate(entry, d, 1.0 - group["dampening"])
            u = d + group["momentum"] * velocity if group["nesterov"] else velocity
        step = (u * -float(group["lr"])).to(entry.param.dtype)
        if entry.value is not entry.param:
            entry.value.add_(step)
        elif step.layout == torch.strided:
            self._write(entry.param, entry.param + step)
        else:
            self._write(entry.param, step.coalesce())

    def _accelerate(self, entry: Entry, u: Tensor, gain: float) -> Tensor:
        """The velocity momentum*b + gain*u, or u itself at the first gradient; it goes to the momentum buffer."""
        param, momentum = entry.param, entry.group["momentum"]
        state = self._state.get(param, {})
        buffer = state.get("momentum_buffer")
        if buffer is not None and entry.shards is not None:
            self._parts_of.append(buffer)
            buffer = part_of(buffer)
        # A parameter that is listed twice has two first gradients, and one buffer, that of the second.
        b = None if param in self._first else self._velocities.get(param, buffer)
        if b is not None and b.layout == torch.strided:
            b = b.to(param.dtype)  # the parameter may have come to another type
        if b is None:
            velocity = u
        elif b.layout != torch.strided and u.layout == torch.strided:
            velocity = gain * u + momentum * b
        else:
            velocity = momentum * _arithmetic(b) + gain * u
        if entry.value is not entry.target:
            self._velocities[param] = velocity.to(param.dtype)
        if (
            buffer is not None
            and buffer.layout == velocity.layout == torch.strided
            and buffer.dtype == param.dtype
            and param not in self._first
        ):
            self._write(buffer, velocity)
            return velocity
        if velocity.layout != torch.strided:
            kept = velocity.clone()
        else:
            kept = torch.empty_like(entry.target, requires_grad=False)
            kept.copy_(velocity if self._happens is None else torch.where(self._happens, velocity, 0))
        if entry.shards is not None:
            kept = like(param, kept)
        self._fresh[param] = {**state, "momentum_buffer": kept}
        return velocity

    def _number(self, value: float | Tensor) -> float | Tensor:
        """A learning rate as a number, or as a 0-dim tensor where its value cannot be looked at."""
        if not isinstance(value, Tensor) or torch.is_grad_enabled():
            return value
        return value.item() if self._known else value.reshape(()).to(torch.float64)


def first_gradients(entries: list[Entry], state: State) -> set[Tensor]:
    """Parameters that have no momentum buffer yet."""
    return {e.param for e in entries if state.get(e.param, {}).get("momentum_buffer") is None}


def update_in_turn(
    entries: list[Entry], state: State, clip_coef: Tensor | float | None, happens: Tensor | None
) -> Record:
    """One update after the other, for tracers: nothing can be torn there.

    Parameters may share memory, which a tracer does not see, and a step is seen to take the memory of one update.
    """
    record = Record(clip_coef=_detached(clip_coef))
    first = first_gradients(entries, state)
    for entry in entries:
        update = Update([entry], state, clip_coef, happens, first)
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


def _storages(entries: list[Entry]) -> list[torch.UntypedStorage | None]:
    return [e.param.untyped_storage() if options.is_plain(e.param) else None for e in entries]


def _copies_of_shared_memory(entries: list[Entry]) -> dict[Tensor, Tensor]:
    """Copies of parameters that share their storage with another one, or are listed twice: they share it there too.

    Updates of such parameters follow one another, and each must see what the one before it did.
    """
    storages = _storages(entries)
    times = Counter(s.data_ptr() for s in storages if s is not None)
    copied: dict[int, torch.UntypedStorage] = {}
    copies: dict[Tensor, Tensor] = {}
    for entry, storage in zip(entries, storages, strict=True):
        if storage is None or storage.data_ptr() == 0 or times[storage.data_ptr()] < 2:
            continue
        if storage.data_ptr() not in copied:
            copied[storage.data_ptr()] = storage.clone()
        param = entry.param
        copy = torch.empty(0, dtype=param.dtype, device=param.device)
        copies[param] = copy.set_(copied[storage.data_ptr()], param.storage_offset(), param.size(), param.stride())
    return copies


def _shrink_groups(param: Tensor, threshold: float | Tensor, dim: int) -> Tensor:
    """w * max(1 - threshold/||w||, 0) for each slice w of a parameter as it is stored; a NaN norm stays NaN."""
    if param.numel() == 0 or (not isinstance(threshold, Tensor) and threshold == 0):
        return param
    # A quotient of equal numbers is 1: where the norm is below the threshold the factor is exactly 0.
    factors = 1 - threshold / torch.clamp(slice_norms(param, dim), min=threshold)
    if isinstance(threshold, Tensor):
        factors = torch.where(threshold > 0, factors, 1.0)
    return (_arithmetic(param) * factors.to(_arithmetic(param).real.dtype)).to(param.dtype)


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
    """grad + l1*sign(p) + 2*l2*p, with sign(0) = 0."""
    p = _arithmetic(param)
    if _is_on(group["l1"]):
        grad = grad + group["l1"] * torch.sgn(p)
    if _is_on(group["l2"]):
        grad = grad + 2 * group["l2"] * p
    return grad


@torch.no_grad()
def _penalty(param: Tensor, group: Group) -> Tensor:
    """l1*sum|p| + l2*sum(p^2): 0-dim, in float64."""
    size = torch.abs(param).double()
    absolute = group["l1"] * size.sum() if _is_on(group["l1"]) else size.new_zeros(())
    return absolute + (group["l2"] * size.square().sum() if _is_on(group["l2"]) else 0.0)


def _is_on(value: Any) -> bool:
    """Whether an option does anything; one that is off must not meet infinities, and a tensor may need its graph."""
    return isinstance(value, Tensor) or value != 0
