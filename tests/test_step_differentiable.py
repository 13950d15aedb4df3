"""differentiable=True: autograd runs through steps, and gives the derivatives that finite differences give."""

import math

import pytest
import torch
from step_cases import BOTH

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
}


def trained(make, options, hyper, value):
    """The loss after three steps down a bowl, of the hyperparameter under study."""
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    target = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    p = start.clone().requires_grad_(True)
    live = p.clone()
    optimizer = make([torch.nn.Parameter(start)], **{"lr": 0.1, **options, hyper: value}, differentiable=True)
    optimizer.param_groups[0]["params"] = [live]
    for _ in range(3):
        (live.grad,) = torch.autograd.grad((live - target).pow(4).sum(), live, create_graph=True)
        optimizer.step()
    return (live - target).square().sum()


@BOTH
@pytest.mark.parametrize("name", OPTIONS)
def test_derivatives_of_hyperparameters(make, name):
    hyper = name.partition(",")[0]
    options = OPTIONS[name]
    at = options.get(hyper, 0.1)
    value = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(trained(make, options, hyper, value), value)
    step = 1e-5
    above, below = (
        trained(make, options, hyper, torch.tensor(at + d, dtype=torch.float64)).item() for d in (step, -step)
    )
    want = (above - below) / (2 * step)
    # The error of a central difference: its third derivative times step^2, and roundings of 1e-15/step.
    assert abs(want) > 1e-3 and got.item() == pytest.approx(want, rel=1e-5), name


@BOTH
def test_the_numbers_hold_no_graph(make):
    trained(make, {"max_norm": 1.0, "l1": 0.1}, "lr", torch.tensor(0.1, dtype=torch.float64, requires_grad=True))
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = make([p], lr=0.1, max_norm=math.inf, l1=0.1, differentiable=True)
    p.requires_grad_(False)
    p.grad = torch.ones(3, requires_grad=True) * 2
    optimizer.step()
    assert not any(number.requires_grad for number in optimizer.stats)
    assert optimizer._last.record.grad_norm.grad_fn is None
