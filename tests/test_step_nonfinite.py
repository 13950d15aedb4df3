"""Gradients that are not finite, and AMP."""

import copy

import pytest
import torch
from step_cases import (
    DEVICE,
    EVERY_OPTIMIZER,
    assert_params_equal,
    copy_params,
    give_grads,
    make_params,
    share_grads,
    torch_twin,
    with_state,
)

import regfused
from regfused.optimizer import Fused

KERNELS = pytest.mark.parametrize("make", (regfused.SGD, regfused.Adam, regfused.AdamW))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("bad", (float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("clip", ({}, {"max_norm": 1.0}), ids=("", "clip"))
@pytest.mark.parametrize("where", (0, 16384, -1))
def test_nonfinite_skip(make, bad, clip, where):
    params = make_params([10, 20_000])
    optimizer = make(params, lr=0.1, **with_state(make), l1=0.1, nonfinite="skip", **clip)
    before = copy_params(params)
    versions = [p._version for p in params]
    give_grads(params)
    params[1].grad[where] = bad
    optimizer.step()
    assert_params_equal(params, before)
    assert not optimizer.state and optimizer.stats.skipped == 1 and [p._version for p in params] == versions
    give_grads(params)
    optimizer.step()
    assert optimizer.stats.skipped == 1
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    params[0].grad[0] = bad
    optimizer.step()
    assert_params_equal(params, before[0])
    for i, entry in optimizer.state_dict()["state"].items():
        assert entry.keys() == before[1][i].keys()
        for name, slot in entry.items():
            assert torch.equal(slot, before[1][i][name])
    assert optimizer.stats.skipped == 2 and not optimizer.stats.grad_norm.isfinite()


@EVERY_OPTIMIZER
def test_nonfinite_error(make):
    params = make_params([10, 20])
    named = [("first", params[0]), ("second", params[1])]
    optimizer = make(named, lr=0.1, **with_state(make), nonfinite="error")
    before = copy_params(params)
    give_grads(params)
    params[1].grad[3] = float("nan")
    with pytest.raises(RuntimeError, match="nonfinite='error' demands a finite gradient norm, but it is nan"):
        optimizer.step()
    if isinstance(optimizer, Fused):
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(second\)"):
            optimizer.step()
    assert_params_equal(params, before)
    assert not optimizer.state


@EVERY_OPTIMIZER
def test_nonfinite_propagates_as_in_torch(make):
    params = make_params([10, 20])
    twins = copy_params(params)
    give_grads(params)
    params[1].grad[3] = float("nan")
    share_grads(params, twins)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    torch_twin(make)(twins, lr=0.1, foreach=False).step()
    make(params, lr=0.1, max_norm=1.0).step()
    assert_params_equal(params, twins)
    assert params[0].isnan().all()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("proximal", (False, True))
def test_with_lr_0_no_gradient_reaches_the_parameters(make, proximal):
    params = make_params([33, 5])
    before = copy_params(params)
    eps = {"eps": 0.0} if issubclass(make, torch.optim.Adam) else {}
    optimizer = make(params, lr=0.0, **with_state(make), **eps, l1=0.1, l2=0.1, proximal=proximal, weight_decay=0.1)
    for bad in (0.0, float("inf"), float("nan")):
        give_grads(params)
        params[0].grad[3] = bad
        optimizer.step()
    assert_params_equal(params, before)
    assert all(torch.equal(p.signbit(), b.signbit()) for p, b in zip(params, before, strict=True))


@EVERY_OPTIMIZER
@pytest.mark.parametrize("fused", (None, True))
@pytest.mark.parametrize("scale", (65536.0, 1000.0, 1.0))
@pytest.mark.parametrize("unscale_first", (False, True))
def test_grad_scaler(make, fused, scale, unscale_first):
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    options = {"lr": 0.1, **with_state(make)}
    ours = make(model.parameters(), max_norm=0.5, fused=fused, **options)
    loop = torch_twin(make)(twin.parameters(), foreach=False, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale, growth_interval=2)
    for step in range(6):
        x = torch.randn(4, 5)
        overflow = step in (0, 3)
        ours.zero_grad()
        loop.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if overflow:
            model.weight.grad[0, 0] = float("inf")
        if unscale_first:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        assert not hasattr(ours, "grad_scale") and not hasattr(ours, "found_inf")
        if not overflow:
            twin(x).square().mean().backward()
            if fused and not unscale_first:  # torch's contract
                for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad)
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            loop.step()
        assert_params_equal(model.parameters(), twin.parameters(), atol=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.state[p].keys() == loop.state[q].keys()
        assert ours.state[p].get("step") == loop.state[q].get("step")


@KERNELS
def test_amp_state_is_cleared_when_a_step_raises(make):
    params = make_params([5])
    give_grads(params)
    optimizer = make(params, lr=0.1, fused=True, nonfinite="error")
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(ValueError, match="lr must be a number, but got 'fast'"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


@KERNELS
def test_unscaled_gradient_is_written_in_its_own_layout(make):
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5))
    q = torch.nn.Parameter(p.detach().clone())
    p.grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    want = q.grad = p.grad / 4
    optimizer = make([p], lr=0.1, fused=True, maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p.grad, want)
    torch_twin(make)([q], lr=0.1, foreach=False, maximize=True).step()
    torch.testing.assert_close(p, q)
