"""Hooks, closures and schedulers."""

import pytest
import torch
from step_cases import (
    EVERY_OPTIMIZER,
    KERNELS,
    assert_params_equal,
    copy_params,
    give_grads,
    in_double,
    make_params,
    share_grads,
    torch_twin,
    with_state,
    witness_of,
)


@EVERY_OPTIMIZER
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
    (want,), *_ = witness_of(optimizer).step([before.double()], [2 * before.double()], [{}])
    torch.testing.assert_close(params[0].detach().double(), want, rtol=0, atol=1e-6)
    assert optimizer.step.__self__ is optimizer  # a bound Python method


@EVERY_OPTIMIZER
@pytest.mark.parametrize("tensor_lr", (False, True))
def test_schedulers(make, tensor_lr):
    params = make_params([5, 6])
    twins = copy_params(params)
    options = with_state(make)  # the scheduler moves the momentum, or Adam's first beta
    lr = 0.1
    ours = make(params, lr=torch.tensor(lr) if tensor_lr else lr, **options)
    loop = torch_twin(make)(twins, lr=torch.tensor(lr) if tensor_lr else lr, foreach=False, **options)
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


@KERNELS
def test_tensor_lr_changed_in_place(make):
    params = make_params([5])
    lr = torch.tensor(0.1)
    optimizer = make(params, lr=lr)
    witness = witness_of(optimizer)
    for value in (0.1, 0.25, 0.0):
        lr.fill_(value)
        witness.o["lr"] = value
        params[0].grad = torch.ones(5)
        state = in_double(optimizer.state.get(params[0], {}))
        (want,), *_ = witness.step([params[0].detach().double()], [torch.ones(5).double()], [state])
        optimizer.step()
        torch.testing.assert_close(params[0].detach().double(), want, rtol=0, atol=1e-6)
