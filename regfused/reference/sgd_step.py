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
from regfused.stats import Record

Group = dict[str, Any]
State = MutableMapping[Any, Any]
#: Writes each second tensor into the first one; adds it where it is sparse.
Write = Callable[[list[Tensor], list[Tensor]], None]


@dataclass
class Entry:
    """One parameter that has a gradient, with its group. What is derived of both is made when asked for, not kept."""

    group: Group
    param: Tensor
    value: Tensor  # what is read as p: the parameter, but see `_copies_of_shared_memory`
    grad_scale: float | None

    @property
    def sparse(self) -> bool:
        return self.raw_grad.layout != torch.strided

    @property
    def raw_grad(self) -> Tensor:
        assert self.param.grad is not None
        return self.param.grad

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


def collect(pairs: Iterable[tuple[Group, Tensor]], grad_scale: float | None, operation: str) -> list[Entry]:
    """Entries for all parameters that have a gradient. Checks, and changes nothing."""
    entries = [
        Entry(options.as_it_counts(group), param, param, grad_scale) for group, param in pairs if param.grad is not None
    ]
    for i, entry in enumerate(entries):
        param, grad = entry.param, entry.raw_grad
        if entry.sparse and not (grad_scale is None and options.group_allows_sparse(entry.group)):
            raise RuntimeError(
                f"{operation}: penalties, clipping, weight decay, nonfinite, classical_momentum, differentiable and "
                f"fused=True demand dense gradients, but one of shape {tuple(param.shape)} has layout {grad.layout}"
            )
        place = f"item {i} of those with a gradient, of shape {tuple(param.shape)},"
        if grad.shape != param.shape:
            raise RuntimeError(
                f"{operation}: a gradient must have the shape of its parameter, but {place} has one of "
                f"{tuple(grad.shape)}"
            )
        written = [("parameter", param)] if grad_scale is None else [("parameter", param), ("gradient", grad)]
        for name, tensor in written:
            why = why_not_written(tensor)
            if why:
                raise RuntimeError(f"{operation}: a step has to write every {name}, but that of {place} {why}")
    return entries


def why_not_written(tensor: Tensor) -> str:
    """Why torch would refuse to write into a tensor, or an empty string."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode, where this step is not"
    if options.is_plain(tensor) and torch._debug_has_internal_overlap(tensor) == 1:
        return "has elements that share memory, as in an expanded tensor"
    return ""


@torch.no_grad()
def norm(entries: list[Entry], norm_type: float, others: Iterable[float] = ()) -> Tensor:
    """The norm over all entries, and over norms of tensors that are not among them: 0-dim, accumulated in float64."""
    norms = [torch.tensor(other, dtype=torch.float64) for other in others]
    for entry in entries:
        h = entry.raw_grad.coalesce().values() if entry.sparse else entry.h()
        if h.numel() == 0:
            continue  # the maximum of nothing is an error in torch
        dtype = torch.complex128 if h.is_complex() else torch.float64
        norms.append(_on_every_rank(torch.linalg.vector_norm(h, norm_type, dtype=dtype)).to(torch.float64))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    device = norms[-1].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]), norm_type)


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
    """

    def __init__(self, entries: list[Entry], state: State, clip_coef: Tensor | float | None) -> None:
        #: Penalty and zeros of what will have been stepped.
        self.record = Record(clip_coef=1.0 if clip_coef is None else clip_coef)
        self._state = state
        self._clip_coef = clip_coef
        self._to: list[Tensor] = []
        self._from: list[Tensor] = []
        self._velocities: dict[Tensor, Tensor] = {}  # of parameters that share their memory, as stored
        self._fresh: dict[Tensor, dict[str, Any]] = {}  # state that is to replace what is there, by parameter
        copies = {} if torch.is_grad_enabled() else _copies_of_shared_memory(entries)
        for entry in entries:
            entry = replace(entry, value=copies.get(entry.param, entry.param))
            if entry.sparse:
                self._step_sparse(entry)
            else:
                self._step_dense(entry)
            if entry.value is not entry.param:
                self._write(entry.param, entry.value)

    def commit(self, write: Write | None = None) -> None:
        """All of it, or, where this raises, nothing.

        Args:
            write: what writes, instead of torch alone.
        """
        done = torch.zeros((), device="cpu")
        self._write(done, torch.ones((), device="cpu"))
        before = {param: self._state.get(param) for param in self._fresh}
        try:
            # One call, which runs no Python: tensors that are keys of a dictionary have been hashed.
            self._state.update(self._fresh)
            (write or _write_in_torch)(self._to, self._from)
        except BaseException:
            if not done:
                for param, entry in before.items():
                    if entry is None:
                        self._state.pop(param, None)
                    else:
                        self._state[param] = entry
            raise

    def _write(self, to: Tensor, source: Tensor) -> None:
        self._to.append(to)
        self._from.append(source)

    def _step_dense(self, entry: Entry) -> None:
        group, param = entry.group, entry.value
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        if isinstance(lr, Tensor) and not group["differentiable"]:
            lr = lr.item()
        if _is_on(group["l1"]) or _is_on(group["l2"]):
            self.record.penalties.append(_penalty(param.detach(), group))
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

        if param is entry.param:
            self._write(param, new)
        else:
            param.copy_(new)
        if entry.grad_scale is not None:  # torch's AMP contract
            self._write(entry.raw_grad, entry.unscaled())
        self.record.zero_counts.append(_on_every_rank(torch.sum(new.detach() == 0)))
        self.record.numel += param.numel()

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
        param = entry.param
        buffer = self._state.get(param, {}).get("momentum_buffer")
        b = self._velocities.get(param, buffer)
        if b is None:
            velocity = u
        elif b.layout != torch.strided and u.layout == torch.strided:
            velocity = gain * u + entry.group["momentum"] * b
        else:
            velocity = entry.group["momentum"] * _arithmetic(b) + gain * u
        if entry.value is not param:
            self._velocities[param] = velocity.to(param.dtype)
        if buffer is not None and buffer.layout == velocity.layout == torch.strided:
            self._write(buffer, velocity)
            return velocity
        kept = velocity.clone()
        if velocity.layout == torch.strided:
            kept = torch.empty_like(param, requires_grad=False)
            kept.copy_(velocity)
        self._fresh[param] = {**self._state.get(param, {}), "momentum_buffer": kept}
        return velocity


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


def _copies_of_shared_memory(entries: list[Entry]) -> dict[Tensor, Tensor]:
    """Copies of parameters that share their storage with another one, or are listed twice: they share it there too.

    Updates of such parameters follow one another, and each must see what the one before it did.
    """
    storages = [e.param.untyped_storage() if options.is_plain(e.param) else None for e in entries]
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
    if float(threshold) == 0 or param.numel() == 0:
        return param
    # A quotient of equal numbers is 1: where the norm is below the threshold the factor is exactly 0.
    factors = 1 - threshold / torch.clamp(slice_norms(param, dim), min=threshold)
    return (_arithmetic(param) * factors.to(_arithmetic(param).real.dtype)).to(param.dtype)


def _arithmetic(tensor: Tensor) -> Tensor:
    """float16 and bfloat16 in float32; everything else as it is."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    return tensor


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
    return _on_every_rank(absolute + (group["l2"] * size.square().sum() if _is_on(group["l2"]) else 0.0))


def _on_every_rank(tensor: Tensor) -> Tensor:
    """The whole of a DTensor; another tensor as it is."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def _is_on(value: Any) -> bool:
    """Whether an option does anything; one that is off must not meet infinities, and a tensor may need its graph."""
    return isinstance(value, Tensor) or value != 0
