"""SGD with momentum: its rule, and the optimizer in torch operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from regfused.options import strength, value_of
from regfused.reference.optimizer import Regularized
from regfused.reference.rule import Group, Move, Number, Rule, Slots, is_on


class SgdRule(Rule):
    """::

    b = d                                   at the first gradient of a parameter
    b = momentum*b + (1 - dampening)*d      afterwards
    u = d + momentum*b (nesterov) | b (momentum) | d
    m = lr*u,  e = lr

    Classical momentum: ``b = momentum*b + lr*d; m = u``.
    """

    name = "sgd"
    options = {"momentum": "strength", "dampening": "finite", "nesterov": "flag", "classical_momentum": "flag"}
    slots = ("momentum_buffer",)
    start_from_gradient = True

    def slots_of(self, group: Group) -> tuple[str, ...]:
        return self.slots if is_on(group["momentum"]) else ()

    def steady_gain(self, group: Group) -> Number:
        momentum = group["momentum"]
        if not is_on(momentum):
            return 1.0
        if group["classical_momentum"]:
            return 1 / (1 - momentum)
        buffer = (1 - group["dampening"]) / (1 - momentum)
        return 1 + momentum * buffer if group["nesterov"] else buffer

    def check(self, operation: str, group: Group) -> None:
        has_map = group["proximal"] and (value_of(strength(group["l1"])) or value_of(strength(group["l2"])))
        if not (has_map or value_of(strength(group["group_l1"]))):
            return
        for name, demand, fits in (
            ("momentum", "< 1", value_of(group["momentum"]) < 1),
            ("dampening", "<= 1", value_of(group["dampening"]) <= 1),
        ):
            if not fits:
                raise ValueError(
                    f"{operation}: {name} must be {demand} with a proximal map or a group lasso, for what a gradient "
                    f"moves in the long run is their length of step, but got {group[name]}"
                )

    def check_construction(self, operation: str, group: Group) -> None:
        momentum, dampening = value_of(group["momentum"]), value_of(group["dampening"])
        if group["nesterov"] and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"{operation}: nesterov demands a momentum and zero dampening, "
                f"but got momentum={group['momentum']} and dampening={group['dampening']} "
                "(Nesterov momentum requires a momentum and zero dampening)"
            )
        if group["classical_momentum"] and dampening != 0:
            raise ValueError(f"{operation}: classical_momentum has no dampening, but got dampening={dampening}")

    def allows_sparse(self, group: Group) -> bool:
        return not group["classical_momentum"]

    def move(self, d: Tensor, slots: Slots, group: Group, t: Number | None, lr: Number) -> Move:
        classical, momentum = group["classical_momentum"], group["momentum"]
        u = lr * d if classical else d
        kept = {}
        if is_on(momentum):
            gain = 1.0 if classical else 1.0 - group["dampening"]
            b = slots["momentum_buffer"]
            if b is None:
                b = u
            elif b.layout != torch.strided and u.layout == torch.strided:
                b = gain * u + momentum * b
            else:
                b = momentum * b + gain * u
            kept["momentum_buffer"] = b
            u = u + momentum * b if group["nesterov"] else b
        if classical:
            return Move(u, lr, kept)
        return Move(lr * u if is_on(lr) else None, lr, kept)


class SGD(Regularized, torch.optim.SGD):
    """The twin of `regfused.SGD` in torch operations: same options, same result, no compiled part.

    See `regfused.SGD` for the formula and the options. Arithmetic is float32 for float16 and bfloat16 tensors and the
    tensor's own type otherwise; norms are accumulated in float64. Takes what the kernels do not: complex and
    non-dense tensors, tensor subclasses such as DTensor, sparse gradients (as ``torch.optim.SGD``), any ``norm_type``,
    ``differentiable=True``.
    """

    _rule = SgdRule()

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
        concavity: float = 0.0,
        proximal: bool = False,
        group_l1: float = 0.0,
        group_dim: int = 0,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        penalty_in_clip: bool = True,
        nonfinite: str = "propagate",
        norm_group: Any = None,
        keep_zeros: bool = False,
        nonnegative: bool = False,
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
            "concavity": concavity,
            "proximal": proximal,
            "group_l1": group_l1,
            "group_dim": group_dim,
            "max_norm": max_norm,
            "norm_type": norm_type,
            "penalty_in_clip": penalty_in_clip,
            "nonfinite": nonfinite,
            "keep_zeros": keep_zeros,
            "nonnegative": nonnegative,
            "decoupled_weight_decay": decoupled_weight_decay,
            "classical_momentum": classical_momentum,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._construct(params, defaults, norm_group)
