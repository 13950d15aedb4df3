"""differentiable=True: autograd runs through steps, and gives the derivatives that finite differences give."""

import math

import pytest
import torch
from step_cases import EVERY_OPTIMIZER, OPTIMIZERS, is_adam

pytestmark = [pytest.mark.cpu, pytest.mark.reference]

OPTIONS = {
    "lr": {},
    "lr, momentum": {"momentum": 0.9},
    "lr, nesterov": {"momentum": 0.9, "nesterov": True},
    "lr, classical": {"momentum": 0.9, "classical_momentum": True},
    "lr, elastic net": {"l1": 0.1, "l2": 0.2},
    "lr, weight decay": {"weight_decay": 0.1},
    "lr, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "lr, proximal": {"l1": 0.1, "l2": 0.2, "proximal": True},
    "lr, group lasso": {"group_l1": 0.1},
    "lr, clip": {"max_norm": 0.7, "momentum": 0.9, "l2": 0.1},
    "lr, clip, norm 1": {"max_norm": 0.7, "norm_type": 1.0},
    "momentum": {"momentum": 0.9},
    "momentum, nesterov": {"momentum": 0.9, "nesterov": True},
    "dampening": {"momentum": 0.9, "dampening": 0.2},
    "weight_decay": {"weight_decay": 0.1, "momentum": 0.5},
    "weight_decay, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "l1": {"l1": 0.1},
    "l2": {"l2": 0.1, "max_norm": 0.7},
    "l1, proximal": {"l1": 0.1, "proximal": True},
    "l2, outside of the clip": {"l2": 0.1, "max_norm": 0.7, "penalty_in_clip": False},
    "l1, concave": {"l1": 0.1, "concavity": 0.2, "max_norm": 0.7},
    "l1, proximal, concave": {"l1": 0.1, "l2": 0.2, "concavity": 0.2, "max_norm": 0.7, "proximal": True},
    "concavity": {"l1": 0.1, "concavity": 0.2, "max_norm": 0.7},
    "concavity, proximal": {"l1": 0.1, "concavity": 0.2, "max_norm": 0.7, "proximal": True},
    "lr, kept zeros": {"momentum": 0.9, "keep_zeros": True, "max_norm": 0.7},
    "lr, nonnegative": {"nonnegative": True},
}


# The same of Adam. Its eps is large, so that the derivative is none of rounding.
OPTIONS_OF_ADAM = {
    "lr": {},
    "lr, amsgrad": {"amsgrad": True},
    "lr, elastic net": {"l1": 0.1, "l2": 0.2},
    "lr, weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "lr, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "lr, proximal": {"l1": 0.1, "l2": 0.2, "proximal": True},
    "lr, decoupled proximal": {"l1": 0.1, "l2": 0.2, "proximal": True, "decoupled_proximal": True},
    "lr, group lasso": {"group_l1": 0.1, "decoupled_proximal": True},
    "lr, group lasso in the metric": {"group_l1": 0.1},
    "beta2, group lasso in the metric": {"group_l1": 0.1},
    "eps, group lasso in the metric": {"eps": 0.5, "group_l1": 0.1},
    "group_l1, in the metric": {"group_l1": 0.1, "l1": 0.05, "l2": 0.1, "proximal": True},
    "lr, clip": {"max_norm": 0.7, "l2": 0.1},
    "lr, clip, norm 1": {"max_norm": 0.7, "norm_type": 1.0},
    "beta1": {},
    "beta1, amsgrad": {"amsgrad": True},
    "beta1, proximal": {"l1": 0.1, "l2": 0.2, "proximal": True},
    "beta2": {},
    "beta2, amsgrad": {"amsgrad": True},
    "beta2, proximal": {"l1": 0.1, "l2": 0.2, "proximal": True},
    "eps": {"eps": 0.5},
    "eps, proximal": {"eps": 0.5, "l1": 0.1, "l2": 0.2, "proximal": True},
    "weight_decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
    "weight_decay, decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "l1": {"l1": 0.1},
    "l1, proximal": {"l1": 0.1, "proximal": True},
    "l1, decoupled proximal": {"l1": 0.1, "proximal": True, "decoupled_proximal": True},
    "l2": {"l2": 0.1, "max_norm": 0.7},
    "l2, proximal": {"l2": 0.1, "proximal": True},
    "l2, outside of the clip": {"l2": 0.1, "max_norm": 0.7, "penalty_in_clip": False},
    "group_l1": {"group_l1": 0.1, "decoupled_proximal": True},
    "l1, concave": {"l1": 0.1, "concavity": 0.2},
    "l1, proximal, concave": {"l1": 0.1, "l2": 0.2, "concavity": 0.2, "proximal": True},
    "concavity": {"l1": 0.1, "concavity": 0.2},
    "concavity, proximal": {"l1": 0.1, "concavity": 0.2, "proximal": True},
    "lr, kept zeros": {"keep_zeros": True, "max_norm": 0.7},
    "lr, nonnegative": {"nonnegative": True},
}
BETAS = {"beta1": 0.8, "beta2": 0.9}

CASES = [
    pytest.param(make, name, options, id=f"{which}-{name}")
    for which, make in OPTIMIZERS.items()
    for name, options in (OPTIONS_OF_ADAM if is_adam(make) else OPTIONS).items()
    # AdamW has one kind of decay.
    if not (make.__name__ == "AdamW" and options.get("decoupled_weight_decay") is False)
]


def options_of(make, options, hyper, value):
    """Those of the constructor."""
    options = {"lr": 0.1, **options, hyper: value}
    if is_adam(make):
        betas = {name: options.pop(name, torch.tensor(beta, dtype=torch.float64)) for name, beta in BETAS.items()}
        options = {"betas": tuple(betas.values()), "eps": 0.01, **options}
    if make.__name__ == "AdamW":
        options.pop("decoupled_weight_decay", None)
    return options


def trained(make, options, hyper, value):
    """The loss after three steps down a bowl, of the hyperparameter under study."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    target = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    p = start.clone().requires_grad_(True)
    live = p.clone()
    optimizer = make([torch.nn.Parameter(start)], **options_of(make, options, hyper, value), differentiable=True)
    optimizer.param_groups[0]["params"] = [live]
    for _ in range(3):
        (live.grad,) = torch.autograd.grad((live - target).pow(4).sum(), live, create_graph=True)
        optimizer.step()
    return (live - target).square().sum()


@pytest.mark.parametrize("make, name, options", CASES)
def test_derivatives_of_hyperparameters(make, name, options):
    hyper = name.partition(",")[0]
    at = options.get(hyper, BETAS.get(hyper, 0.1))
    value = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(trained(make, options, hyper, value), value)
    step = 1e-5
    above, below = (
        trained(make, options, hyper, torch.tensor(at + d, dtype=torch.float64)).item() for d in (step, -step)
    )
    want = (above - below) / (2 * step)
    # The error of a central difference: its third derivative times step^2, and roundings of 1e-15/step.
    assert abs(want) > 1e-3 and got.item() == pytest.approx(want, rel=1e-5), name


@EVERY_OPTIMIZER
def test_the_numbers_hold_no_graph(make):
    trained(make, {"max_norm": 1.0, "l1": 0.1}, "lr", torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = make([p], lr=0.1, max_norm=math.inf, l1=0.1, differentiable=True)
    p.requires_grad_(False)
    p.grad = torch.ones(3, requires_grad=True) * 2
    optimizer.step()
    assert not any(number.requires_grad for number in optimizer.stats)
    assert optimizer._last.record.grad_norm.grad_fn is None
