"""Rates and strengths that rounding has put below zero are zero; what is further below is refused."""

import copy

import pytest
import torch
from step_cases import BOTH, give_grads, make_params
from torch.optim import lr_scheduler

STRENGTHS = ("lr", "momentum", "weight_decay", "l1", "l2", "group_l1")
OTHERS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "l1": 0.02, "l2": 0.03, "group_l1": 0.04}

SCHEDULES = {
    "LinearLR": lambda o, n: lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=n),
    "LinearLR down from 1": lambda o, n: lr_scheduler.LinearLR(o, start_factor=1.0, end_factor=0.0, total_iters=n),
    "PolynomialLR": lambda o, n: lr_scheduler.PolynomialLR(o, total_iters=n),
    "PolynomialLR, cubic": lambda o, n: lr_scheduler.PolynomialLR(o, total_iters=n, power=3),
    "CosineAnnealingLR": lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n),
    "OneCycleLR": lambda o, n: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=n + 1, final_div_factor=1e30),
    "ChainedScheduler": lambda o, n: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=n), lr_scheduler.CosineAnnealingLR(o, T_max=n + 1)]
    ),
    "SequentialLR": lambda o, n: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.LinearLR(o, end_factor=0.0, total_iters=n)],
        milestones=[2],
    ),
}
LRS = {
    "float": lambda: 0.1,
    "float32 tensor": lambda: torch.tensor(0.1),
    "float64 tensor": lambda: torch.tensor([0.1], dtype=torch.float64),
    "bfloat16 tensor": lambda: torch.tensor(0.1, dtype=torch.bfloat16),
}


@BOTH
@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedules_of_any_length_end(make, schedule, lr):
    below = 0
    for n in range(1, 59):
        params = make_params([3, 9])
        give_grads(params)
        optimizer = make(params, lr=LRS[lr](), momentum=0.9, l1=0.1, l2=0.1, proximal=True, group_l1=0.1)
        scheduler = SCHEDULES[schedule](optimizer, n)
        optimizer.step()
        for _ in range(n + 2 * (schedule == "SequentialLR")):
            scheduler.step()
        last = float(optimizer.param_groups[0]["lr"])
        twins = copy.deepcopy((params, optimizer.state_dict()))
        optimizer.step()
        if last > 0:
            continue
        below += last < 0
        for param, twin in zip(params, twins[0], strict=True):
            assert torch.equal(param, twin), n
        # The group is the scheduler's.
        assert float(optimizer.param_groups[0]["lr"]) == last
        optimizer.load_state_dict(twins[1])
        assert float(optimizer.param_groups[0]["lr"]) == last
        optimizer.step()
    if schedule == "LinearLR" and lr != "bfloat16 tensor":
        assert below > 10, "no schedule ended below zero"


BY_ROUNDING = {
    "float": -4e-18,
    "float, the least": -1e-12,
    "float64 tensor": torch.tensor(-1e-12, dtype=torch.float64),
    "float32 tensor": torch.tensor([-1e-7]),
    "float16 tensor": torch.tensor(-9e-4, dtype=torch.float16),
    "bfloat16 tensor": torch.tensor(-7e-3, dtype=torch.bfloat16),
}
TOO_FAR = {
    "float": -2e-12,
    "integer": -1,
    "float64 tensor": torch.tensor(-2e-12, dtype=torch.float64),
    "float32 tensor": torch.tensor([-2e-7]),
    "float16 tensor": torch.tensor(-2e-3, dtype=torch.float16),
    "bfloat16 tensor": torch.tensor(-1e-2, dtype=torch.bfloat16),
    "integer tensor": torch.tensor(-1),
}


def stepped(make, name, value, **more):
    """Parameters and buffers after a step that made buffers and two with an option of this value."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(6, 8)[:, ::2])]
    give_grads(params)
    optimizer = make(params, **OTHERS, **more)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        optimizer.step()
    return [*params, *(optimizer.state[p]["momentum_buffer"] for p in params)]


@BOTH
@pytest.mark.parametrize("more", [{}, {"proximal": True}, {"classical_momentum": True, "max_norm": 0.5}], ids=str)
@pytest.mark.parametrize("value", BY_ROUNDING)
@pytest.mark.parametrize("name", STRENGTHS)
def test_every_strength(make, name, value, more):
    want = stepped(make, name, BY_ROUNDING[value] * 0, **more)
    got = stepped(make, name, BY_ROUNDING[value], **more)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@BOTH
@pytest.mark.parametrize("value", TOO_FAR)
@pytest.mark.parametrize("name", STRENGTHS)
def test_what_is_further_below_is_refused(make, name, value):
    with pytest.raises(ValueError, match=f"step: {name} must be finite and >= 0, but got"):
        stepped(make, name, TOO_FAR[value])
    optimizer = make(make_params([3]), **OTHERS)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0][name] = TOO_FAR[value]
    with pytest.raises(ValueError, match=f"load_state_dict: {name} must be finite and >= 0, but got"):
        optimizer.load_state_dict(saved)


@BOTH
@pytest.mark.parametrize("name", STRENGTHS)
def test_what_somebody_wrote_is_not_rounded(make, name):
    for value in BY_ROUNDING.values():
        with pytest.raises(ValueError, match=f"{name} must be finite and >= 0, but got"):
            make(make_params([3]), **{"lr": 0.1, name: value})
        optimizer = make(make_params([3]), lr=0.1)
        with pytest.raises(ValueError, match=f"add_param_group: {name} must be finite and >= 0, but got"):
            optimizer.add_param_group({"params": make_params([4]), name: value})
        # But beside a group that a scheduler has left there, others can be added.
        optimizer.param_groups[0][name] = value
        optimizer.add_param_group({"params": make_params([4])})
        optimizer.step()


@BOTH
def test_numbers_of_numpy(make):
    np = pytest.importorskip("numpy")
    for near, far in ((np.float32(-1e-7), np.float32(-2e-7)), (np.float64(-1e-12), np.float64(-2e-12))):
        want = stepped(make, "lr", 0.0)
        assert all(torch.equal(a, b) for a, b in zip(stepped(make, "lr", near), want, strict=True))
        with pytest.raises(ValueError, match="lr must be finite and >= 0, but got"):
            stepped(make, "lr", far)


@BOTH
def test_a_sparse_gradient(make):
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = make(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    for name in STRENGTHS:
        optimizer.param_groups[0].update(dict.fromkeys(STRENGTHS, 0.0), lr=0.1)
        optimizer.param_groups[0][name] = -4e-18
        before = embedding.weight.detach().clone()
        optimizer.step()
        assert torch.equal(embedding.weight, before) == (name == "lr")


@BOTH
def test_a_learning_rate_with_a_graph(make):
    lr = torch.tensor(-1e-8, requires_grad=True)
    param = torch.ones(3, requires_grad=True).clone()
    param.grad = torch.ones(3)
    optimizer = make([param], lr=torch.tensor(0.1), differentiable=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_the_operator():
    p, g = torch.randn(9), torch.ones(9)
    before = p.clone()
    torch.ops.regfused.sgd_([p], [g], [], [], lr=-4e-18, weight_decay=-4e-18, l1=-4e-18, l2=-4e-18, group_l1=-4e-18)
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match="lr must be finite and >= 0, but got -0.001"):
        torch.ops.regfused.sgd_([p], [g], [], [], lr=-0.001)
