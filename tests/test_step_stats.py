"""The numbers of a step: through wrappers and copies, for a logger, counted only where somebody asks."""

import copy
import math
import pickle

import pytest
import torch
from step_cases import EVERY_OPTIMIZER, KERNELS, assert_params_equal, copy_params, give_grads, make_params, with_state

FIELDS = ("grad_norm", "clip_coef", "penalty", "zero_fraction", "skipped")


def stepped(make, complex_param=False, **options):
    params = make_params([33, 65])
    if complex_param:
        params.append(torch.nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    optimizer = make(params, lr=0.1, l1=0.1, **{**with_state(make), "max_norm": 1.0, **options})
    for _ in range(2):
        give_grads(params[:2])
        for p in params[2:]:
            p.grad = torch.ones_like(p)
        optimizer.step()
    return params, optimizer


class Wrapper:
    """As Lightning and Fabric wrap an optimizer: of its class, too, with what it has not asked of the optimizer."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def __getattr__(self, name):
        return getattr(self._optimizer, name)

    def step(self, closure=None):
        return self._optimizer.step(closure)


class CopyingWrapper(Wrapper):
    """As earlier ones did: with the attributes that the optimizer had when it was wrapped."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k != "step"})


class DelegatingWrapper:
    """Forwards attributes and is of no class of the optimizer's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class OpaqueWrapper(torch.optim.Optimizer):
    """As Accelerate has it: an optimizer that holds one, and forwards what it knows of."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step(closure)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("wrapper", (Wrapper, CopyingWrapper, DelegatingWrapper))
def test_through_wrappers(make, wrapper):
    params = make_params([33, 65])
    optimizer = make(params, lr=0.1, l1=0.1, max_norm=1.0, **with_state(make))
    wrapped = wrapper(optimizer)
    for _ in range(3):
        give_grads(params)
        wrapped.step()
        for name in FIELDS:
            assert torch.equal(getattr(wrapped.stats, name), getattr(optimizer.stats, name)), name
        assert wrapped.stats.penalty > 0 and wrapped.stats.grad_norm > 0
        assert wrapped.stats.as_floats() == optimizer.stats.as_floats()


@KERNELS
def test_a_wrapper_that_forwards_nothing_has_no_stats(make):
    _, optimizer = stepped(make)
    with pytest.raises(AttributeError):
        _ = OpaqueWrapper(optimizer).stats


@EVERY_OPTIMIZER
@pytest.mark.parametrize("complex_param", (False, True))
@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "copy", "pickle")
)
def test_copies_have_the_numbers(make, duplicate, complex_param):
    params, optimizer = stepped(make, complex_param)
    params[0].grad[0] = math.nan
    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    optimizer.step()
    twin = duplicate(optimizer)
    for name in FIELDS:
        got, want = getattr(twin.stats, name), getattr(optimizer.stats, name)
        assert torch.equal(got.nan_to_num(-1), want.nan_to_num(-1)), name
    assert twin.stats.skipped == 1
    optimizer.step()
    assert twin.stats.skipped == 1 and optimizer.stats.skipped == 2, "the copy's numbers are its own"
    for p in twin.param_groups[0]["params"]:
        p.grad = torch.full_like(p, math.nan)
    twin.step()
    twin.step()
    assert twin.stats.skipped == 3


@EVERY_OPTIMIZER
def test_loading_a_checkpoint_keeps_the_numbers(make):
    _, optimizer = stepped(make)
    want = optimizer.stats.as_floats()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.stats.as_floats() == want


@EVERY_OPTIMIZER
@pytest.mark.parametrize("complex_param", (False, True))
def test_floats_for_a_logger(make, complex_param):
    params, optimizer = stepped(make, complex_param)
    floats = optimizer.stats.as_floats()
    assert list(floats) == list(FIELDS) and all(type(value) is float for value in floats.values())
    assert floats == {name: float(getattr(optimizer.stats, name)) for name in FIELDS}
    # What nothing has measured is left out.
    params, optimizer = stepped(make, complex_param, max_norm=None)
    assert list(optimizer.stats.as_floats()) == list(FIELDS[1:]) and optimizer.stats.grad_norm.isnan()
    # A NaN that was measured is not.
    for group in optimizer.param_groups:
        group["max_norm"] = 1.0
    params[0].grad[0] = math.nan
    optimizer.step()
    assert math.isnan(optimizer.stats.as_floats()["grad_norm"])


@EVERY_OPTIMIZER
def test_before_the_first_step(make):
    optimizer = make(make_params([3]), lr=0.1, max_norm=1.0)
    assert optimizer.stats.as_floats() == {} and repr(optimizer.stats) == "Stats()"
    assert [number.dim() for number in optimizer.stats] == [0] * 5 and optimizer.stats.grad_norm.isnan()


@EVERY_OPTIMIZER
def test_printed(make):
    p = torch.nn.Parameter(torch.tensor([0.5, -2.0]))
    optimizer = make([p], lr=0.1, l1=1.0, proximal=True)
    p.grad = torch.tensor([4.0, 0.0])
    optimizer.step()
    assert repr(optimizer.stats) == "Stats(clip_coef=1, penalty=2.5, zero_fraction=0.5, skipped=0)"


@EVERY_OPTIMIZER
def test_numbers_stay_after_later_steps(make):
    params, optimizer = stepped(make)
    stats = optimizer.stats
    zeros, before = stats.zero_fraction.item(), copy_params(params)
    with torch.no_grad():
        for p in params:
            p.zero_()
    give_grads(params)
    optimizer.step()
    assert stats.zero_fraction.item() == zeros < 1
    with pytest.raises(AssertionError):
        assert_params_equal(params, before)


@EVERY_OPTIMIZER
def test_zeros_are_counted_where_parameters_have_gone(make):
    params, optimizer = stepped(make)
    optimizer.param_groups[0]["params"].pop()
    with torch.no_grad():
        params[0][:11] = 0
    zeros = int((params[0] == 0).sum())
    assert optimizer.stats.zero_fraction.item() == zeros / 33
    optimizer.param_groups.clear()
    assert optimizer.stats.zero_fraction.item() == 0
