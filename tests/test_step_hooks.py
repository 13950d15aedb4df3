"""Hooks, closures and schedulers."""

import pytest
import torch
from step_cases import BOTH, assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused


@BOTH
def test_hooks_fire_once_and_closures_are_called(make):
    params = make_params([5])
    optimizer = make(params, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *a: calls.append("post"))

    def closure():
        calls.append("closure")
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    before = params[0].detach().clone()
    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    assert loss.item() == pytest.approx(before.square().sum().item())
    torch.testing.assert_close(params[0].detach(), before * 0.8)
    assert optimizer.step.__self__ is optimizer  # a bound Python method


@BOTH
@pytest.mark.parametrize("tensor_lr", (False, True))
def test_schedulers(make, tensor_lr):
    params = make_params([5, 6])
    twins = copy_params(params)
    options = dict(momentum=0.85)
    lr = 0.1
    ours = make(params, lr=torch.tensor(lr) if tensor_lr else lr, **options)
    loop = torch.optim.SGD(twins, lr=torch.tensor(lr) if tensor_lr else lr, foreach=False, **options)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=True) for o in (ours, loop)
    ]
    for _ in range(8):
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        for s in schedulers:
            s.step()
        assert_params_equal(params, twins, atol=1e-5)


def test_tensor_lr_changed_in_place():
    params = make_params([5])
    lr = torch.tensor(0.1)
    optimizer = regfused.SGD(params, lr=lr)
    for value in (0.1, 0.25, 0.0):
        lr.fill_(value)
        params[0].grad = torch.ones(5)
        before = params[0].detach().clone()
        optimizer.step()
        torch.testing.assert_close(params[0].detach(), before - value)
