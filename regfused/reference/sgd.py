"""SGD with penalties, clipping and proximal steps, in torch operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as sgd_for_loop

from regfused import options
from regfused.reference.slices import slice_norms
from regfused.stats import Record, Stats, stats_of

Group = dict[str, Any]
State = MutableMapping[Any, Any]


@dataclass
class Entry:
    """One parameter that has a gradient, with its group. What is derived of both is made when asked for, not kept."""

    group: Group
    param: Tensor
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
            return _add_penalty_gradient(self.grad(), self.param, self.group)
        return self.grad()


def collect(pairs: Iterable[tuple[Group, Tensor]], grad_scale: float | None, operation: str) -> list[Entry]:
    """Entries for all parameters that have a gradient. Checks, and changes nothing."""
    entries = [Entry(group, param, grad_scale) for group, param in pairs if param.grad is not None]
    for entry in entries:
        if entry.sparse and not (grad_scale is None and options.group_allows_sparse(entry.group)):
            raise RuntimeError(
                f"{operation}: penalties, clipping, weight decay, nonfinite, classical_momentum, differentiable and "
                f"fused=True demand dense gradients, but one of shape {tuple(entry.param.shape)} has layout "
                f"{entry.raw_grad.layout}"
            )
    return entries


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


def update(entries: list[Entry], state: State, clip_coef: Tensor | float | None) -> Record:
    """Update every entry's parameter and state; the record has penalty and zeros of what was stepped."""
    record = Record(clip_coef=1.0 if clip_coef is None else clip_coef)
    for entry in entries:
        group, param = entry.group, entry.param
        if entry.sparse:
            _update_sparse(entry, state)
        else:
            if _is_on(group["l1"]) or _is_on(group["l2"]):
                record.penalties.append(_penalty(param.detach(), group))
            _update_dense(entry, state, clip_coef)
            if entry.grad_scale is not None:  # torch's AMP contract
                entry.raw_grad.copy_(entry.unscaled())
        record.zero_counts.append(_on_every_rank(torch.sum(param.detach() == 0)))
        record.numel += param.numel()
    return record


def _update_dense(entry: Entry, state: State, clip_coef: Tensor | float | None) -> None:
    group, param = entry.group, entry.param
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and not group["differentiable"]:
        lr = lr.item()
    old = _arithmetic(param)

    d = entry.h()
    if clip_coef is not None:
        d = d * (clip_coef.to(d.device) if isinstance(clip_coef, Tensor) else clip_coef)
    if not group["penalty_in_clip"] and not group["proximal"]:
        d = _add_penalty_gradient(d, param, group)
    if _is_on(weight_decay) and not group["decoupled_weight_decay"]:
        d = d + weight_decay * old

    u = lr * d if group["classical_momentum"] else d
    if _is_on(momentum):
        buffer = state.get(param, {}).get("momentum_buffer")
        velocity = u
        if buffer is not None:
            gain = 1.0 if group["classical_momentum"] else 1.0 - group["dampening"]
            velocity = momentum * _arithmetic(buffer) + gain * u
        u = u + momentum * velocity if group["nesterov"] else velocity
        if buffer is None:
            buffer = torch.empty_like(param, requires_grad=False)
            if param not in state:
                state[param] = {}
            state[param]["momentum_buffer"] = buffer
        buffer.copy_(velocity)

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
    param.copy_(new)
    if _is_on(group["group_l1"]) and _is_on(lr):
        _shrink_groups(param, lr * group["group_l1"], group["group_dim"])


def _shrink_groups(param: Tensor, threshold: float | Tensor, dim: int) -> None:
    """w = w * max(1 - threshold/||w||, 0) for each slice w of the stored parameter; a NaN norm stays NaN."""
    if float(threshold) == 0 or param.numel() == 0:
        return
    # Where autograd runs through the step, what it saves must not change.
    stored = param.clone() if torch.is_grad_enabled() else param
    # A quotient of equal numbers is 1: where the norm is below the threshold the factor is exactly 0.
    factors = 1 - threshold / torch.clamp(slice_norms(stored, dim), min=threshold)
    param.copy_(_arithmetic(stored) * factors.to(_arithmetic(stored).real.dtype))


def _update_sparse(entry: Entry, state: State) -> None:
    """torch's own for-loop, for which the options were checked to be torch's."""
    group, param = entry.group, entry.param
    buffers = [state.get(param, {}).get("momentum_buffer")]
    sgd_for_loop(
        [param],
        [entry.raw_grad],
        buffers,
        has_sparse_grad=True,
        foreach=False,
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
    if _is_on(group["momentum"]):
        if param not in state:
            state[param] = {}
        state[param]["momentum_buffer"] = buffers[0]


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


class SGD(torch.optim.SGD):
    """The twin of `regfused.SGD` in torch operations: same options, same result, no compiled part.

    See `regfused.SGD` for the formula and the options. Arithmetic is float32 for float16 and bfloat16 tensors and the
    tensor's own type otherwise; norms are accumulated in float64. Takes what the kernels do not: complex and
    non-dense tensors, tensor subclasses such as DTensor, sparse gradients (as ``torch.optim.SGD``), any ``norm_type``,
    ``differentiable=True``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        l1: float = 0.0,
        l2: float = 0.0,
        proximal: bool = False,
        group_l1: float = 0.0,
        group_dim: int = 0,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        penalty_in_clip: bool = True,
        nonfinite: str = "propagate",
        decoupled_weight_decay: bool = False,
        classical_momentum: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "l1": l1,
            "l2": l2,
            "proximal": proximal,
            "group_l1": group_l1,
            "group_dim": group_dim,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "penalty_in_clip": penalty_in_clip,
            "nonfinite": nonfinite,
            "decoupled_weight_decay": decoupled_weight_decay,
            "classical_momentum": classical_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        options.check_construction(type(self).__name__, defaults)
        # Not torch.optim.SGD.__init__: its defaults would lack ours.
        torch.optim.Optimizer.__init__(self, params, defaults)

    # --- Configuration and state ------------------------------------------------------------------

    @property
    def _step_supports_amp_scaling(self) -> bool:  # type: ignore[override]
        """torch.amp.GradScaler asks: with ``fused=True`` the step itself unscales, and skips on overflow."""
        return bool(self.defaults["fused"])

    def add_param_group(self, param_group: Group) -> None:
        operation = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            complete = {**self.defaults, **param_group}
            options.check_construction(operation, complete)
            options.check_groups(operation, [*self.param_groups, complete])
            options.check_params(operation, [params] if isinstance(params, Tensor) else params)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the last step of ``load_state_dict``: what is missing keeps the values it had; what is wrong raises."""
        operation = f"{type(self).__name__}.load_state_dict"
        defaults = state.get("defaults", self.__dict__.get("defaults", {}))
        before = self.__dict__.get("param_groups", [])
        groups = state["param_groups"]
        for g, group in enumerate(groups):
            known = before[g] if len(before) == len(groups) else defaults
            for name in options.OPTIONS:
                if name in known:
                    group.setdefault(name, known[name])
        options.check_groups(operation, groups)
        options.check_momentum_buffers(operation, groups, state["state"])
        _own_buffers(groups, state["state"])
        torch.optim.Optimizer.__setstate__(self, state)

    @property
    def stats(self) -> Stats:
        """Numbers of the last step as 0-dim tensors, collected by the step itself; see `regfused.stats.Stats`."""
        return stats_of(self.__dict__.get("_numbers") or Record())

    # --- The step ---------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; see the class for the formula.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        try:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._step()
            return loss
        except BaseException:
            # torch.amp.GradScaler leaves these behind when a step raises; the next step must not see them.
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)
            raise

    def _amp(self) -> tuple[float | None, bool]:
        """The scale of the gradients, and whether one overflowed."""
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        return None if grad_scale is None else float(grad_scale), found_inf is not None and float(found_inf) != 0

    def _step(self) -> None:
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._step_in_torch()

    def _step_in_torch(self) -> None:
        operation = f"{type(self).__name__}.step"
        last = self.__dict__.get("_numbers") or Record()
        grad_scale, overflow = self._amp()
        if overflow:
            self._numbers = replace(last, skipped=last.skipped + 1)
            return
        options.check_groups(operation, self.param_groups)
        options.check_momentum_buffers(operation, self.param_groups, self.state)
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        entries = collect(pairs, grad_scale, operation)
        first = self.param_groups[0]
        grad_norm = torch.tensor(math.nan)
        if needs_norm(first):
            grad_norm = norm(entries, float(first["norm_type"]))
        # The one place where the host waits for a device, and only under these policies.
        if first["nonfinite"] != "propagate" and not math.isfinite(grad_norm.item()):
            if first["nonfinite"] == "error":
                raise RuntimeError(
                    f"{operation}: nonfinite='error' demands a finite gradient norm, but it is {grad_norm.item()}"
                )
            self._numbers = replace(last, grad_norm=grad_norm, clip_coef=0.0, skipped=last.skipped + 1)
            return
        record = update(entries, self.state, clip_coefficient(first["max_norm"], grad_norm))
        self._numbers = replace(record, grad_norm=grad_norm, skipped=last.skipped)


def _own_buffers(groups: list[Group], state: State) -> None:
    """Give every parameter a momentum buffer of its own, in its own layout.

    A checkpoint may hold buffers with other strides, expanded ones, or one tensor several times.
    """
    storages: set[int] = {p.untyped_storage().data_ptr() for g in groups for p in g["params"] if _is_plain(p)}
    for group in groups:
        for param in group["params"]:
            buffer = state[param].get("momentum_buffer") if param in state else None
            if buffer is None or not (_is_plain(param) and _is_plain(buffer)):
                continue
            storage = buffer.untyped_storage().data_ptr()
            if buffer.stride() != torch.empty_like(param, device="meta").stride() or storage in storages:
                buffer = torch.empty_like(param, requires_grad=False).copy_(buffer)
                state[param]["momentum_buffer"] = buffer
            storages.add(buffer.untyped_storage().data_ptr())


def _is_plain(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
