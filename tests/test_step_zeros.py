"""Zeros that stay (keep_zeros), and parameters that are not below 0 (nonnegative)."""

import copy
import math

import pytest
import torch
from step_cases import DTYPES, EVERY_OPTIMIZER, torch_twin, with_state
from torch.nn.utils import prune

SIZES = (5, 33, 16385)
# What moves a zero without a gradient: momentum, decay, noise.
COMPANY = {"weight_decay": 0.1, "l1": 0.01, "l2": 0.02, "max_norm": 1.0}


def randn(size, seed, dtype=torch.float32):
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(
        torch.get_default_device(), dtype
    )


def pruned(sizes=SIZES, dtype=torch.float32):
    """Parameters of which about half are 0, some of them -0."""
    params = []
    for i, size in enumerate(sizes):
        p = randn(size, i, dtype)
        p[randn(size, i + 100) < 0] = 0.0
        p[::11] = -0.0
        params.append(torch.nn.Parameter(p))
    return params


def noise(params, seed):
    for i, p in enumerate(params):
        p.grad = randn(p.shape, 1000 * seed + i, p.dtype)


def same_bits(a, b):
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("proximal", (False, True), ids=("subgradients", "proximal"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_stay_as_they_are(make, proximal, dtype):
    params = pruned(dtype=dtype)
    before = copy.deepcopy(params)
    optimizer = make(params, lr=0.1, keep_zeros=True, proximal=proximal, **COMPANY, **with_state(make))
    for step in range(5):
        noise(params, step)
        optimizer.step()
        if not proximal:
            continue
        before = [torch.where(p == 0, p, q) for p, q in zip(params, before, strict=True)]  # new zeros stay as well
    for p, q in zip(params, before, strict=True):
        assert same_bits(p[q == 0], q[q == 0])
    assert any((p != q).any() for p, q in zip(params, before, strict=True))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("company", ({}, COMPANY, {**COMPANY, "proximal": True}), ids=("alone", "company", "proximal"))
def test_zeros_stay_that_momentum_would_move(make, company):
    """Pruned in the middle of training: the state remembers gradients of before."""
    params = [torch.nn.Parameter(randn(size, i)) for i, size in enumerate(SIZES)]
    optimizer = make(params, lr=0.1, keep_zeros=True, **company, **with_state(make))
    for step in range(5):
        noise(params, step)
        optimizer.step()
        if step == 2:
            with torch.no_grad():
                for i, p in enumerate(params):
                    p[randn(p.shape, i + 100) < 0] = 0.0
            zeros = [p.detach() == 0 for p in params]
            slots = [optimizer.state[p].get("momentum_buffer", optimizer.state[p].get("exp_avg")) for p in params]
            assert all((slot[zero] != 0).any() for slot, zero in zip(slots, zeros, strict=True))
    assert all((p[zero] == 0).all() for p, zero in zip(params, zeros, strict=True))
    assert all((p[~zero] != 0).any() for p, zero in zip(params, zeros, strict=True))


@EVERY_OPTIMIZER
def test_without_it_they_go(make):
    """What is promised above does not hold by itself: a mask of gradients is not enough, for torch's neither."""
    for which in (make, torch_twin(make)):
        params = pruned()
        optimizer = which(params, lr=0.1, weight_decay=0.1, **with_state(make))
        zeros = [p.detach() == 0 for p in params]
        noise(params, 0)
        optimizer.step()  # before the mask is there
        with torch.no_grad():
            for p, zero in zip(params, zeros, strict=True):
                p[zero] = 0
        noise(params, 1)
        for p, zero in zip(params, zeros, strict=True):
            p.grad[zero] = 0
        optimizer.step()
        assert all((p[zero] != 0).all() for p, zero in zip(params, zeros, strict=True))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("proximal", (False, True), ids=("subgradients", "proximal"))
def test_the_others_step_as_if_the_zeros_were_not_there(make, proximal):
    """Norm, clip and state are those of a model without them: the same weights in smaller tensors."""
    params = [torch.nn.Parameter(p.detach().double()) for p in pruned()]
    masks = [p.detach() != 0 for p in params]
    packed = [torch.nn.Parameter(p.detach()[m]) for p, m in zip(params, masks, strict=True)]
    options = {"lr": 0.1, "proximal": proximal, "max_norm": 0.7, "weight_decay": 0.1, "l2": 0.02, **with_state(make)}
    full, small = make(params, keep_zeros=True, **options), make(packed, keep_zeros=True, **options)
    for step in range(4):
        noise(params, step)
        for p, q, m in zip(params, packed, masks, strict=True):
            q.grad = p.grad[m]
        full.step()
        small.step()
        assert full.stats.grad_norm.item() == pytest.approx(small.stats.grad_norm.item(), rel=1e-13)
        assert full.stats.clip_coef.item() < 1
    for p, q, m in zip(params, packed, masks, strict=True):
        torch.testing.assert_close(p.detach()[m], q.detach(), rtol=1e-12, atol=1e-12)
        for name, slot in full.state[p].items():
            if name != "step":
                assert (slot[~m] == 0).all()
                torch.testing.assert_close(slot[m], small.state[q][name], rtol=1e-12, atol=1e-12)


@EVERY_OPTIMIZER
def test_the_norm_is_that_of_the_masked_loop(make):
    params = pruned()
    noise(params, 0)
    masked = [torch.where(p == 0, 0, p.grad.double() + 0.3 * p.sign() + 0.2 * p) for p in params]
    norm = torch.cat(masked).norm().item()
    optimizer = make(params, lr=0.1, l1=0.3, l2=0.1, keep_zeros=True, max_norm=math.inf)
    optimizer.step()
    assert optimizer.stats.grad_norm.item() == pytest.approx(norm, rel=1e-6)


@EVERY_OPTIMIZER
def test_what_comes_to_a_zero_does_not_count(make):
    """NaN and infinity too: nothing but the mask says what they would do."""
    params = pruned()
    noise(params, 0)
    for p in params:
        p.grad[p == 0] = math.nan
    optimizer = make(params, lr=0.1, keep_zeros=True, max_norm=1.0, nonfinite="error", **with_state(make))
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert all(slot.isfinite().all() for p in params for slot in optimizer.state[p].values())


@EVERY_OPTIMIZER
def test_lr_0_and_a_nan_of_the_parameter(make):
    p = torch.nn.Parameter(torch.tensor([0.0, -0.0, math.nan, 1.0]))
    p.grad = torch.ones(4)
    before = p.detach().clone()
    make([p], lr=0.0, keep_zeros=True, nonnegative=True).step()
    assert same_bits(p, before)
    make([p], lr=0.1, keep_zeros=True, nonnegative=True).step()
    assert same_bits(p[:2], before[:2]) and p[2].isnan() and 0 < p[3] < 1


@EVERY_OPTIMIZER
def test_pruned_layers_are_trained_on(make):
    """torch.nn.utils.prune: the mask is removed, and the zeros are the mask."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 3))
    inputs, targets = torch.randn(64, 20), torch.randint(3, (64,))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", 0.7)
    loss_of = lambda: torch.nn.functional.cross_entropy(model(inputs), targets)  # noqa: E731
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1, keep_zeros=True, **with_state(make))
    loss_of().backward()
    optimizer.step()  # a mask in torch's hands does not disturb
    for layer in (model[0], model[2]):
        prune.remove(layer, "weight")
    zeros = [layer.weight.detach() == 0 for layer in (model[0], model[2])]
    lr = 0.02 if make._rule.counts_steps else 0.2
    optimizer = make(model.parameters(), lr=lr, weight_decay=0.01, keep_zeros=True, **with_state(make))
    first = loss_of().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    assert loss_of().item() < 0.9 * first
    for layer, zero in zip((model[0], model[2]), zeros, strict=True):
        assert zero.double().mean() > 0.69 and torch.equal(layer.weight == 0, zero)


@EVERY_OPTIMIZER
def test_two_of_four(make):
    """The pattern of semi-structured sparsity: two zeros in every four neighbours."""
    weight = randn((16, 32), 0).view(-1, 4)
    smallest = weight.abs().argsort(dim=1)[:, :2]
    weight = torch.nn.Parameter(weight.scatter(1, smallest, 0.0).view(16, 32))
    optimizer = make([weight], lr=0.1, keep_zeros=True, weight_decay=0.1, **with_state(make))
    for step in range(10):
        noise([weight], step)
        optimizer.step()
    assert ((weight.view(-1, 4) == 0).sum(dim=1) == 2).all()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonnegative(make, dtype):
    params = [torch.nn.Parameter(randn(size, size, dtype)) for size in SIZES]
    free = copy.deepcopy(params)
    options = {"lr": 0.1, "max_norm": 5.0, **with_state(make)}
    optimizer, loose = make(params, nonnegative=True, **options), make(free, **options)
    noise(params, 0)
    for p, q in zip(params, free, strict=True):
        q.grad = p.grad
    optimizer.step()
    loose.step()
    for p, q in zip(params, free, strict=True):
        assert same_bits(p, torch.where(q < 0, 0, q))
        assert (p == 0).any() and (p > 0).any()
    for step in range(1, 6):
        noise(params, step)
        optimizer.step()
        assert all((p >= 0).all() for p in params)


@EVERY_OPTIMIZER
def test_nonnegative_refuses_complex_parameters(make):
    params = [torch.nn.Parameter(randn(3, 0)), torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    noise(params[:1], 0)
    params[1].grad = torch.ones(3, dtype=torch.complex64)
    before = copy.deepcopy(params)
    optimizer = make(params, lr=0.1, nonnegative=True)
    with pytest.raises(RuntimeError, match="nonnegative demands real parameters, but .* is torch.complex64"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not optimizer.state


@EVERY_OPTIMIZER
def test_complex_zeros_stay(make):
    p = torch.nn.Parameter(torch.tensor([0j, 1 + 1j, -0j, 1j]))
    p.grad = torch.full((4,), 1 - 1j)
    make([p], lr=0.1, keep_zeros=True, **with_state(make)).step()
    assert p[0] == 0 and p[2] == 0 and p[1] != 1 + 1j and p[3] != 1j


@EVERY_OPTIMIZER
def test_a_group_can_change_its_mind(make):
    params = pruned()
    optimizer = make(params, lr=0.1, **with_state(make))
    for step, keeps in enumerate((True, False)):
        zeros = [p.detach() == 0 for p in params]
        optimizer.param_groups[0]["keep_zeros"] = keeps
        noise(params, step)
        optimizer.step()
        assert all((p[zero] == 0).all() == keeps for p, zero in zip(params, zeros, strict=True))
