"""Rates and strengths that rounding has put below zero are zero; what is further below is refused."""

import copy
import random

import pytest
import torch
from step_cases import BOTH, EVERY_OPTIMIZER, OPTIMIZERS, give_grads, is_adam, make_params, slots_of, with_state
from torch.optim import lr_scheduler

SHARED = {"lr": 0.1, "weight_decay": 0.01, "l1": 0.02, "l2": 0.03, "group_l1": 0.04}


def strengths_of(make):
    """Every strength, with a value."""
    return {**SHARED, **({"eps": 1e-3} if is_adam(make) else {"momentum": 0.9})}


def others_of(make):
    """Options beside them, for as much state as there can be; the group lasso of Adam's demands one."""
    return {**with_state(make), "decoupled_proximal": True} if is_adam(make) else {}


OF_EACH_STRENGTH = pytest.mark.parametrize(
    "make, name",
    [
        pytest.param(make, name, id=f"{which}-{name}")
        for which, make in OPTIMIZERS.items()
        for name in strengths_of(make)
    ],
)

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


@EVERY_OPTIMIZER
@pytest.mark.parametrize("lr", LRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
def test_schedules_of_any_length_end(make, schedule, lr):
    below = 0
    # The lengths are dealt out to the optimizers. How they round depends on what divides them.
    lengths = random.Random(0).sample(range(1, 59), 58)
    for n in lengths[list(OPTIMIZERS.values()).index(make) :: len(OPTIMIZERS)]:
        params = make_params([3, 9])
        give_grads(params)
        optimizer = make(
            params, lr=LRS[lr](), **{**with_state(make), **others_of(make)}, l1=0.1, l2=0.1, proximal=True, group_l1=0.1
        )
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
        assert below > 0, "no schedule ended below zero"


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
    """Parameters and slots after a step that made slots and two with an option of this value."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(6, 8)[:, ::2])]
    give_grads(params)
    optimizer = make(params, **strengths_of(make), **others_of(make), **more)
    optimizer.step()
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        optimizer.step()
    return [*params, *(optimizer.state[p][slot] for p in params for slot in slots_of(make))]


@OF_EACH_STRENGTH
@pytest.mark.parametrize("more", [{}, {"proximal": True}, {"max_norm": 0.5}], ids=str)
def test_every_strength(make, name, more):
    if more.get("max_norm") and not is_adam(make):
        more = {**more, "classical_momentum": True}
    for kind, value in BY_ROUNDING.items():
        want = stepped(make, name, value * 0, **more)
        got = stepped(make, name, value, **more)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), kind


@OF_EACH_STRENGTH
def test_what_is_further_below_is_refused(make, name):
    optimizer = make(make_params([3]), **strengths_of(make), **others_of(make))
    for value in TOO_FAR.values():
        with pytest.raises(ValueError, match=f"step: {name} must be finite and >= 0, but got"):
            stepped(make, name, value)
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0][name] = value
        with pytest.raises(ValueError, match=f"load_state_dict: {name} must be finite and >= 0, but got"):
            optimizer.load_state_dict(saved)


@OF_EACH_STRENGTH
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


@EVERY_OPTIMIZER
def test_numbers_of_numpy(make):
    np = pytest.importorskip("numpy")
    for near, far in ((np.float32(-1e-7), np.float32(-2e-7)), (np.float64(-1e-12), np.float64(-2e-12))):
        want = stepped(make, "lr", 0.0)
        assert all(torch.equal(a, b) for a, b in zip(stepped(make, "lr", near), want, strict=True))
        with pytest.raises(ValueError, match="lr must be finite and >= 0, but got"):
            stepped(make, "lr", far)


@BOTH  # Adam takes none
def test_a_sparse_gradient(make):
    embedding = torch.nn.Embedding(10, 3, sparse=True)
    optimizer = make(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    for name in strengths_of(make):
        optimizer.param_groups[0].update(dict.fromkeys(strengths_of(make), 0.0), lr=0.1)
        optimizer.param_groups[0][name] = -4e-18
        before = embedding.weight.detach().clone()
        optimizer.step()
        assert torch.equal(embedding.weight, before) == (name == "lr")


@EVERY_OPTIMIZER
def test_a_learning_rate_with_a_graph(make):
    lr = torch.tensor(-1e-8, requires_grad=True)
    param = torch.ones(3, requires_grad=True).clone()
    param.grad = torch.ones(3)
    optimizer = make([param], lr=torch.tensor(0.1), differentiable=True)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert torch.equal(param, torch.ones(3))


def test_the_operators():
    p, g = torch.randn(9), torch.ones(9)
    before = p.clone()
    of_adam = ([g.clone()], [g.clone()], [], [torch.ones(())])
    strengths = dict.fromkeys(SHARED, -4e-18)
    torch.ops.regfused.sgd_([p], [g], [], [], **strengths)
    torch.ops.regfused.adam_([p], [g], *of_adam, eps=-4e-18, decoupled_proximal=True, **strengths)
    assert torch.equal(p, before)
    for operator, state in ((torch.ops.regfused.sgd_, ([], [])), (torch.ops.regfused.adam_, of_adam)):
        with pytest.raises(ValueError, match="lr must be finite and >= 0, but got -0.001"):
            operator([p], [g], *state, lr=-0.001)
