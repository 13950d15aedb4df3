"""Adam: its rule, and the optimizers Adam and AdamW in torch operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from regfused.reference.optimizer import Regularized
from regfused.reference.rule import Group, Move, Number, Rule, Slots, is_on


class AdamRule(Rule):
    """::

        exp_avg        = beta1*exp_avg + (1 - beta1)*d
        exp_avg_sq     = beta2*exp_avg_sq + (1 - beta2)*d^2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)     amsgrad: v is this one, otherwise exp_avg_sq
        e = lr / (sqrt(v / (1 - beta2^t)) + eps)
        m = e * exp_avg / (1 - beta1^t)

    Kingma and Ba, Adam: a method for stochastic optimization, 2015; amsgrad: Reddi, Kale and Kumar, On the convergence
    of Adam and beyond, 2018.
    """

    name = "adam"
    options = {
        "betas": "fractions",
        "eps": "strength",
        "amsgrad": "flag",
        "capturable": "flag",
        "decoupled_proximal": "flag",
    }
    slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    counts_steps = True

    def slots_of(self, group: Group) -> tuple[str, ...]:
        return self.slots if group["amsgrad"] else self.slots[:2]

    def check_construction(self, operation: str, group: Group) -> None:
        betas = group["betas"]
        of_tensors = [isinstance(beta, Tensor) for beta in betas]
        if any(of_tensors) and not all(of_tensors):
            raise ValueError(
                f"{operation}: betas must be two numbers or two tensors, but got {betas} "
                "(betas must be either both floats or both Tensors)"
            )
        for name, value in (("lr", group["lr"]), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if isinstance(value, Tensor) and group["foreach"] and not group["capturable"]:
                raise ValueError(
                    f"{operation}: foreach=True demands numbers or capturable=True, but {name} is a tensor "
                    f"({name} as a Tensor is not supported for capturable=False and foreach=True)"
                )

    def check_gradient(self, operation: str, place: str, group: Group, param: Tensor, grad: Tensor) -> None:
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{operation}: gradients must be dense, but that of {place} has layout {grad.layout} "
                "(Adam does not support sparse gradients, please consider SparseAdam instead)"
            )
        has_map = group["proximal"] and (is_on(group["l1"]) or is_on(group["l2"]))
        if param.is_complex() and (has_map or is_on(group["group_l1"])) and not group["decoupled_proximal"]:
            raise RuntimeError(
                f"{operation}: a proximal map in the metric of Adam's step demands real parameters, "
                f"but {place} is {param.dtype}"
            )

    def move(self, d: Tensor, slots: Slots, group: Group, t: Number | None, lr: Number) -> Move:
        # A complex number is a pair of real ones, as in torch.
        is_complex = d.is_complex()
        real = torch.view_as_real if is_complex else lambda tensor: tensor
        back = torch.view_as_complex if is_complex else lambda tensor: tensor
        beta1, beta2 = (_on(beta, d) for beta in group["betas"])
        t = _on(t, d)
        g = real(d)
        exp_avg = beta1 * real(_there(slots, "exp_avg")) + (1 - beta1) * g
        exp_avg_sq = beta2 * real(_there(slots, "exp_avg_sq")) + (1 - beta2) * g * g
        kept = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if group["amsgrad"]:
            kept["max_exp_avg_sq"] = torch.maximum(real(_there(slots, "max_exp_avg_sq")), exp_avg_sq)
        lr = _on(lr, d)
        length = self._length(kept, group, beta2, t, lr)
        move = length * (exp_avg / (1 - beta1**t))
        return Move(
            back(move) if is_on(lr) else None,
            lr if group["decoupled_proximal"] or is_complex else length,
            {name: back(slot.contiguous()) if is_complex else slot for name, slot in kept.items()},
        )

    def length(self, slots: Mapping[str, Tensor], group: Group, t: Number | None, lr: Number) -> Number:
        if group["decoupled_proximal"]:
            return lr
        d = slots["exp_avg"]
        return self._length(slots, group, _on(group["betas"][1], d), _on(t, d), _on(lr, d))

    def _length(self, slots: Mapping[str, Tensor], group: Group, beta2: Number, t: Number, lr: Number) -> Tensor:
        v = slots["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        return lr / (v.sqrt() / (1 - beta2**t) ** 0.5 + group["eps"])


def _there(slots: Slots, name: str) -> Tensor:
    slot = slots[name]
    assert slot is not None
    return slot


def _on(value: Any, like: Tensor) -> Any:
    """A number that is a tensor, on the device of another one."""
    return value.to(like.device).reshape(()) if isinstance(value, Tensor) else value


class Adam(Regularized, torch.optim.Adam):
    """The twin of `regfused.Adam` in torch operations: same options, same result, no compiled part.

    See `regfused.Adam` for the formula and the options. Arithmetic is float32 for float16 and bfloat16 tensors and the
    tensor's own type otherwise; norms are accumulated in float64. Takes what the kernels do not: complex tensors,
    tensor subclasses such as DTensor, any ``norm_type``, ``differentiable=True``.
    """

    _rule = AdamRule()

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
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
        decoupled_proximal: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
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
            "decoupled_proximal": decoupled_proximal,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        self._construct(params, defaults, norm_group)


class AdamW(Adam, torch.optim.AdamW):
    """The twin of `regfused.AdamW`: `Adam` with ``decoupled_weight_decay=True``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        decoupled_proximal: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            l1=l1,
            l2=l2,
            concavity=concavity,
            proximal=proximal,
            group_l1=group_l1,
            group_dim=group_dim,
            max_norm=max_norm,
            norm_type=norm_type,
            penalty_in_clip=penalty_in_clip,
            nonfinite=nonfinite,
            norm_group=norm_group,
            keep_zeros=keep_zeros,
            nonnegative=nonnegative,
            decoupled_proximal=decoupled_proximal,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's AdamW, which stays one whatever the checkpoint says."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True
