"""What Python lets go of between steps is free at once: the optimizer keeps nothing alive that is not in its state."""

import copy
import gc
import weakref

import pytest
import torch
from step_cases import (
    EVERY_OPTIMIZER,
    KERNELS,
    assert_params_equal,
    copy_params,
    give_grads,
    is_adam,
    make_params,
    share_grads,
    slots_of,
    with_state,
)

OPTIONS = dict(lr=0.1, l1=0.01, max_norm=1.0)


def stepped(make, params=None, **options):
    params = make_params([33, 4099]) if params is None else params
    optimizer = make(params, **OPTIONS, **with_state(make), **options)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
    return params, optimizer


class Gone:
    """Tells which of some tensors are still there."""

    def __init__(self, **tensors):
        self.objects = {name: weakref.ref(tensor) for name, tensor in tensors.items()}

    def assert_gone(self):
        kept = [name for name, ref in self.objects.items() if ref() is not None]
        assert not kept, f"kept alive: {kept}"


def tensors_of(optimizer):
    """Slots and counts."""
    return {f"{name} {i}": tensor for i, entry in enumerate(optimizer.state.values()) for name, tensor in entry.items()}


def clear(optimizer):
    optimizer.state.clear()


def clear_entries(optimizer):
    for entry in optimizer.state.values():
        entry.clear()


def offload(optimizer):
    for entry in optimizer.state.values():
        for name, tensor in entry.items():
            entry[name] = tensor.clone()


def new_entries(optimizer):
    for p in list(optimizer.state):
        optimizer.state[p] = {name: tensor.clone() for name, tensor in optimizer.state[p].items()}


def load(optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def new_state(optimizer):
    optimizer.state = type(optimizer.state)(optimizer.state.default_factory)


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "let_go", (clear, clear_entries, offload, new_entries, load, new_state), ids=lambda f: f.__name__
)
def test_state(make, let_go):
    params, optimizer = stepped(make)
    gone = Gone(**tensors_of(optimizer))
    gc.disable()  # free at once, not at the next collection
    try:
        let_go(optimizer)
        gone.assert_gone()
    finally:
        gc.enable()
    # And the next step is right.
    twins = copy_params(params)
    loop = make(twins, **OPTIONS, **with_state(make))
    loop.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    loop.step()
    assert_params_equal(params, twins)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("stateful", (False, True))
def test_parameters_that_are_replaced(make, stateful):
    """As densification does it for Gaussian splats: another tensor with more rows takes a parameter's place."""
    params = [torch.nn.Parameter(torch.randn(50, 3)) for _ in range(2)]
    options = with_state(make) if stateful else {}
    optimizer = make([{"params": [p], "name": str(i)} for i, p in enumerate(params)], lr=0.1, **options)
    for step in range(4):
        give_grads(params)
        optimizer.step()
        old = params[0]
        kept = optimizer.state.pop(old, {})
        new = torch.nn.Parameter(torch.cat([old.detach(), torch.zeros(10, 3)]))
        if kept:
            optimizer.state[new] = {
                name: torch.cat([x, torch.zeros(10, 3)]) if name in slots_of(make) else x.clone()
                for name, x in kept.items()
            }
        gone_state = Gone(**kept)
        optimizer.param_groups[0]["params"][0] = params[0] = new
        gone = Gone(old=old, grad=old.grad)
        del old, kept
        gone.assert_gone()
        gone_state.assert_gone()
        want = [p.detach() * 1 for p in params]
        assert want[0].shape == (60 + 10 * step, 3)


@EVERY_OPTIMIZER
def test_gradients(make):
    params, optimizer = stepped(make)
    gone = Gone(**{f"grad {i}": p.grad for i, p in enumerate(params)})
    optimizer.zero_grad()
    gone.assert_gone()


@EVERY_OPTIMIZER
def test_groups_and_their_options(make):
    params = make_params([33, 65])
    big = torch.full((1000,), 0.1)
    optimizer = make([{"params": [p], "lr": big[0].clone()} for p in params], **with_state(make))
    give_grads(params)
    optimizer.step()
    gone = Gone(lr=optimizer.param_groups[1]["lr"], param=params[1])
    optimizer.param_groups.pop()
    optimizer.state.pop(params.pop())
    gone.assert_gone()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("nonfinite", ("error", "skip"))
def test_after_a_step_that_did_not_happen(make, nonfinite):
    """Neither an error nor a skipped step leaves gradients behind, with kernels alone and with others beside them."""
    for extra in ([], [torch.nn.Parameter(torch.ones(5, dtype=torch.complex64))]):
        params = [*make_params([33]), *extra]
        optimizer = make(params, lr=0.1, nonfinite=nonfinite, **with_state(make))
        for p in params:
            p.grad = torch.full_like(p, float("nan"))
        if nonfinite == "error":
            with pytest.raises(RuntimeError, match="demands a finite gradient norm"):
                optimizer.step()
        else:
            optimizer.step()
        gone = Gone(**{f"grad {i}": p.grad for i, p in enumerate(params)})
        optimizer.zero_grad()
        gone.assert_gone()


@KERNELS
def test_scale_and_overflow(make):
    _params, optimizer = stepped(make, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    gone = Gone(scale=optimizer.grad_scale, found_inf=optimizer.found_inf)
    del optimizer.grad_scale, optimizer.found_inf
    gone.assert_gone()


NEW = {
    "smaller": lambda: torch.nn.Parameter(torch.zeros(3)),
    "in another order": lambda: torch.nn.Parameter(torch.zeros(2, 64).t()),
    "with gaps": lambda: torch.nn.Parameter(torch.zeros(64, 4)[:, ::2]),
    "float64": lambda: torch.nn.Parameter(torch.zeros(64, 2, dtype=torch.float64)),
    "complex": lambda: torch.nn.Parameter(torch.zeros(64, 2, dtype=torch.complex64)),
}


@KERNELS
@pytest.mark.parametrize("kind", NEW)
def test_another_tensor_at_the_address_of_one_that_is_gone(make, kind):
    """Python gives the memory of objects away again: at an address that is known there may be another one."""
    for _ in range(200):
        params, optimizer = stepped(make, params=[torch.nn.Parameter(torch.zeros(64, 2))])
        address = id(params[0])
        optimizer.state.clear()
        optimizer.param_groups[0]["params"].clear()
        params.clear()
        # All of them stay, so that each takes another place, and one the place that is free.
        others = [NEW[kind]() for _ in range(300)]
        new = next((other for other in others if id(other) == address), others[-1])
        optimizer.param_groups[0]["params"].append(new)
        new.grad = torch.full_like(new, 2.0)
        optimizer.step()
        # Nothing is penalized at zero, and the clip makes the norm of the gradient 1. Adam goes by lr at first, of a
        # complex number in both of its parts, of which one is zero here.
        want = -0.1 * (new.grad.sgn() if is_adam(make) else new.grad / new.grad.norm())
        torch.testing.assert_close(new.detach(), want, rtol=1e-5, atol=1e-5)
        if id(new) == address:
            return
    pytest.fail("no address was used again")


@KERNELS
def test_something_else_at_the_address_of_a_parameter(make):
    _params, optimizer = stepped(make)
    optimizer.param_groups[0]["params"][1] = "no tensor"
    with pytest.raises(TypeError):
        optimizer.step()


@KERNELS
def test_tensors_can_be_swapped_after_a_step(make):
    """torch.utils.swap_tensors refuses what something else refers to."""
    params, optimizer = stepped(make)
    for p in params:
        new = torch.nn.Parameter(torch.full_like(p, 3.0))
        state = list(optimizer.state[p].values())
        p.grad = None
        torch.utils.swap_tensors(p, new)
        for tensor in state:
            torch.utils.swap_tensors(tensor, torch.zeros_like(tensor))
    give_grads(params)
    before = copy_params(params)
    optimizer.step()
    assert all(p.max() > 2 and not torch.equal(p, q) for p, q in zip(params, before, strict=True))
