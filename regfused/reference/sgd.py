"""SGD with penalties, clipping and proximal steps, in torch operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd as sgd_for_loop

from regfused import options
from regfused.stats import Record, Stats, stats_of

Group = dict[str, Any]
State = MutableMapping[Any, Any]


@dataclass
class Entry:
    """One parameter of a step: its group, its unscaled gradient g', and h, what the norm is taken of."""

    group: Group
    param: Tensor
    grad: Tensor
    h: Tensor
    sparse: bool = False


def collect(pairs: Iterable[tuple[Group, Tensor]], grad_scale: float | None, operation: str) -> list[Entry]:
    """Entries for all parameters that have a gradient. Checks, and changes nothing."""
    entries = []
    for group, param in pairs:
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            if not options.group_allows_sparse(group) or grad_scale is not None:
                raise RuntimeError(
                    f"{operation}: penalties, clipping, weight decay, nonfinite, classical_momentum, differentiable "
                    f"and fused=True demand dense gradients, but one of shape {tuple(param.shape)} has a gradient "
                    f"of layout {param.grad.layout}"
                )
            grad = -param.grad if group["maximize"] else param.grad
            entries.append(Entry(group, param, grad, grad, sparse=True))
            continue
        grad = _arithmetic(param.grad)
        if grad_scale is not None:
            grad = grad * (1.0 / grad_scale)
        if group["maximize"]:
            grad = -grad
        h = grad
        if group["penalty_in_clip"] and not group["proximal"]:
            h = grad + _penalty_gradient(param, group)
        entries.append(Entry(group, param, grad, h))
    return entries


def norm(entries: list[Entry], norm_type: float, others: Iterable[float] = ()) -> float:
    """The norm over all entries, and over norms of tensors that are not among them, in float64."""
    norms = [torch.tensor(other, dtype=torch.float64) for other in others]
    for entry in entries:
        h = entry.h.coalesce().values() if entry.sparse else entry.h
        if h.numel() == 0:
            continue  # the maximum of nothing is an error in torch
        dtype = torch.complex128 if h.is_complex() else torch.float64
        of_tensor = torch.linalg.vector_norm(h.detach(), norm_type, dtype=dtype)
        if hasattr(of_tensor, "full_tensor"):  # a DTensor: one number for all ranks
            of_tensor = of_tensor.full_tensor()
        norms.append(of_tensor.to(device="cpu", dtype=torch.float64))
    return float(torch.linalg.vector_norm(torch.stack(norms), norm_type)) if norms else 0.0


def clip_coefficient(max_norm: float | None, grad_norm: float) -> float:
    """c = min(1, max_norm / (norm + 1e-6)); NaN stays NaN."""
    if max_norm is None:
        return 1.0
    c = max_norm / (grad_norm + 1e-6)
    return 1.0 if c > 1 else c


def update(entries: list[Entry], state: State, clip_coef: float, grad_scale: float | None) -> Record:
    """Update every entry's parameter and state; penalty, zeros and numel of what was stepped."""
    record = Record(clip_coef=clip_coef)
    for entry in entries:
        group, param = entry.group, entry.param
        if entry.sparse:
            _update_sparse(entry, state)
        else:
            record.penalty += _penalty(param.detach(), group)
            _update_dense(entry, state, clip_coef)
            if grad_scale is not None:  # torch's AMP contract
                assert param.grad is not None
                param.grad.copy_(-entry.grad if group["maximize"] else entry.grad)
        record.zeros += _number(torch.sum(param.detach() == 0))
        record.numel += param.numel()
    return record


def _update_dense(entry: Entry, state: State, clip_coef: float) -> None:
    group, param = entry.group, entry.param
    lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
    if isinstance(lr, Tensor) and not group["differentiable"]:
        lr = lr.item()
    old = _arithmetic(param)

    d = clip_coef * entry.h
    if not group["penalty_in_clip"] and not group["proximal"]:
        d = d + _penalty_gradient(param, group)
    if _is_on(weight_decay) and not group["decoupled_weight_decay"]:
        d = d + weight_decay * old

    u = lr * d if group["classical_momentum"] else d
    if _is_on(momentum):
        own = state.get(param, {})
        buffer = own.get("momentum_buffer")
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


def _update_sparse(entry: Entry, state: State) -> None:
    """torch's own for-loop, for which the options were checked to be torch's."""
    group, param = entry.group, entry.param
    buffers = [state.get(param, {}).get("momentum_buffer")]
    sgd_for_loop(
        [param],
        [entry.grad],
        buffers,
        has_sparse_grad=True,
        foreach=False,
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=False,
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


def _penalty_gradient(param: Tensor, group: Group) -> Tensor | float:
    """l1*sign(p) + 2*l2*p, with sign(0) = 0."""
    p = _arithmetic(param)
    total: Tensor | float = -0.0
    if _is_on(group["l1"]):
        total = group["l1"] * torch.sgn(p) + total
    if _is_on(group["l2"]):
        total = 2 * group["l2"] * p + total
    return total


def _penalty(param: Tensor, group: Group) -> float:
    """l1*sum|p| + l2*sum(p^2), in float64."""
    if not (_is_on(group["l1"]) or _is_on(group["l2"])):
        return 0.0
    size = torch.abs(param).double()
    return group["l1"] * _number(size.sum()) + group["l2"] * _number(size.square().sum())


def _number(tensor: Tensor) -> Any:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).item()


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
        numbers = self.__dict__.get("_numbers")
        if not isinstance(numbers, Record):
            numbers = Record()
        self._numbers = numbers
        grad_scale, overflow = self._amp()
        if overflow:
            numbers.skipped += 1
            return
        options.check_groups(operation, self.param_groups)
        options.check_momentum_buffers(operation, self.param_groups, self.state)
        pairs = ((group, param) for group in self.param_groups for param in group["params"])
        entries = collect(pairs, grad_scale, operation)
        first = self.param_groups[0] if self.param_groups else self.defaults
        grad_norm = norm(entries, float(first["norm_type"]))
        clip_coef = judge(first, grad_norm, operation)
        if clip_coef is None:
            self._numbers = Record(grad_norm, 0.0, numbers.penalty, numbers.zeros, numbers.numel, numbers.skipped + 1)
            return
        record = update(entries, self.state, clip_coef, grad_scale)
        record.grad_norm, record.skipped = grad_norm, numbers.skipped
        self._numbers = record


def judge(group: Group, grad_norm: float, operation: str) -> float | None:
    """The clip coefficient, or None for a step to be skipped; raises under ``nonfinite="error"``."""
    if not math.isfinite(grad_norm):
        if group["nonfinite"] == "skip":
            return None
        if group["nonfinite"] == "error":
            raise RuntimeError(f"{operation}: nonfinite='error' demands a finite gradient norm, but it is {grad_norm}")
    return clip_coefficient(group["max_norm"], grad_norm)


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
