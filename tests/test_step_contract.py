"""What torch asks of its own optimizers: the step, in every implementation, with every option."""

import copy
import inspect
import itertools
import math

import pytest
import torch
from beside_float64 import Beside
from optimizer_infos import (
    FLAGS,
    IMPLEMENTATIONS,
    OptimizerErrorEnum,
    TestCase,
    assert_same,
    each_case,
    each_optimizer,
    instantiate,
    labelled,
)
from step_cases import DEVICE, assert_params_equal, copy_params, give_grads, make_params, share_grads

PENALTIES = ("weight_decay", "l1", "l2", "group_l1")
SIZES = (1, 3, 17, 33, 65)


def assorted_params(dtype, dense=True) -> list[torch.nn.Parameter]:
    """Without dimensions, empty, around vector registers, in other orders of memory, and with gaps in it."""
    params = make_params([(), (0,), (1,), (3,), (17,), (33,), (65,), (4099,), (5, 7)], dtype)
    transposed, channels_last, gaps = (p.detach() for p in make_params([(7, 5), (2, 3, 4, 5), (6, 8)], dtype))
    others = [transposed.t(), channels_last.contiguous(memory_format=torch.channels_last)]
    others += [] if dense else [gaps[:, ::2]]
    return [*params, *(torch.nn.Parameter(p) for p in others)]


def give_complex_grads(params) -> None:
    give_grads(params)
    for p in params:
        if p.is_complex():
            p.grad = p.grad * (0.6 - 0.8j)


def check_steps(info, kwargs, params, in_groups=lambda params: params, give=give_complex_grads):
    """Five steps: one parameter is frozen at first, one has no gradient for a step, and once nobody has one."""
    if kwargs.get("differentiable"):
        for p in params:
            p.requires_grad_(False)  # otherwise autograd forbids an update in place
    both = Beside(info, params, kwargs, in_groups)
    trainable = params[3].requires_grad
    for step in range(5):
        give(params)
        if step == 0:
            params[3].requires_grad_(False)
            params[3].grad = None
        elif step == 1:
            params[3].requires_grad_(trainable)
            params[5].grad = None
        elif step == 2:
            params[4].requires_grad_(False)  # one that has a gradient is stepped all the same
        elif step == 3:
            for p in params:
                p.grad = None
        both.step()


def descend(info, kwargs, weight, makers=(), steps=3) -> list[float]:
    """Checks that each step is one in the right direction; the learning rates after each."""
    weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(torch.randn(10))
    # Far enough away for penalties and momentum not to matter.
    x, target = torch.randn(5), 10 * torch.randn(10)
    groups = [{"params": [weight]}, {"params": [bias], "lr": 2e-3, "weight_decay": 0.01}]
    optimizer = info.optim_cls(groups, **copy.deepcopy(kwargs))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (weight @ x + bias - target).square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    rates = rates_of(optimizer, makers, closure, steps)
    closure()
    assert len(losses) == steps + 1, "a closure is called once in a step"
    for before, after in itertools.pairwise(losses):
        assert after > before if kwargs.get("maximize") else after < before, losses
    return rates


def rates_of(optimizer, makers, closure=None, steps=3) -> list[float]:
    schedulers = [make(optimizer) for make in makers]
    rates = []
    for _ in range(steps):
        optimizer.step(closure)
        advance(schedulers)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


def advance(schedulers) -> None:
    for scheduler in schedulers:
        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))


class TestStep(TestCase):
    @each_optimizer
    def test_every_option_is_among_the_cases(self, info):
        parameters = dict(inspect.signature(info.optim_cls).parameters)
        parameters.pop("params")
        parameters.pop("norm_group")  # needs other processes
        others = {name: set() for name in parameters}
        for case in info.optim_inputs_func(DEVICE):
            for flags in (*IMPLEMENTATIONS, {"differentiable": True}):
                for name, value in {**case.kwargs, **flags}.items():
                    if value != parameters[name].default:
                        others[name].add(str(value))
        # What torch takes on a GPU alone.
        assert {name for name, values in others.items() if not values} <= {"capturable"}

    @each_optimizer
    def test_errors(self, info):
        for case in info.optim_error_inputs_func(DEVICE, torch.float32):
            given = case.optimizer_error_input
            for flags in IMPLEMENTATIONS:
                if set(FLAGS) & set(given.kwargs) and flags:
                    continue
                with labelled(f"{given.desc} {flags}"):
                    params = [torch.nn.Parameter(torch.ones(3))] if given.params is None else given.params
                    if issubclass(case.error_type, Warning):
                        with pytest.warns(case.error_type, match=case.error_regex):
                            info.optim_cls(params, **given.kwargs, **flags)
                    elif case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR:
                        with pytest.raises(case.error_type, match=case.error_regex) as raised:
                            info.optim_cls(params, **given.kwargs, **flags)
                        assert type(raised.value) is case.error_type
                    else:
                        before = copy_params(params)
                        optimizer = info.optim_cls(params, **given.kwargs, **flags)
                        with pytest.raises(case.error_type, match=case.error_regex):
                            optimizer.step()
                        assert_params_equal(params, before)
                        assert not optimizer.state

    @each_case(dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16))
    def test_agrees_with_the_formula(self, info, kwargs, dtype):
        check_steps(info, kwargs, assorted_params(dtype, dense=bool(kwargs.get("fused"))))

    @each_case({"differentiable": True})
    def test_agrees_when_differentiable(self, info, kwargs):
        check_steps(info, kwargs, assorted_params(torch.float64, dense=False))

    @each_case()
    def test_agrees_in_groups(self, info, kwargs):
        def in_groups(params):
            rate = torch.tensor(0.3) if info.takes_tensor_lr(kwargs) else 0.3
            own = [{"lr": 0.02, "weight_decay": 0.2}, {"lr": rate}, {"weight_decay": 0.05}, {}]
            return [{"params": params[i::4], **options} for i, options in enumerate(own)]

        check_steps(info, kwargs, assorted_params(torch.float32), in_groups)

    @each_case()
    def test_agrees_in_company_of_dtypes(self, info, kwargs):
        dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
        real = kwargs.get("fused") or kwargs.get("nonnegative")
        dtypes += [] if real else [torch.complex64, torch.complex128]
        params = [p for dtype in dtypes for p in make_params([(), (33,), (3, 5)], dtype)]
        check_steps(info, kwargs, params)

    @each_case(*IMPLEMENTATIONS[:3])
    def test_complex_numbers_are_pairs_of_real_ones(self, info, kwargs):
        if kwargs.get("nonnegative"):
            return  # demands real parameters
        if kwargs.get("l1") or kwargs.get("norm_type", 2) != 2:
            return  # the size of a pair is not the sum of sizes; `test_agrees_in_company_of_dtypes` has these
        params = [torch.nn.Parameter(torch.randn(shape, dtype=torch.complex64)) for shape in ((1,), (33,), (17, 3))]
        twins = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
        ours, pairs = (info.optim_cls(ps, **{"lr": 0.1, **kwargs}) for ps in (params, twins))
        for _ in range(3):
            for p, q in zip(params, twins, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = torch.view_as_real(p.grad).clone()
            ours.step()
            pairs.step()
            # Values of a size of 4 in float32.
            assert_params_equal([torch.view_as_real(p.detach()) for p in params], twins, atol=2e-6)

    @each_case()
    def test_penalties_are_as_in_the_loss(self, info, kwargs):
        """Against autograd, for which a complex number has a size, too."""
        penalties = {name: kwargs[name] for name in ("l1", "l2") if kwargs.get(name)}
        if not penalties or kwargs.get("proximal") or not kwargs.get("penalty_in_clip", True):
            return
        dtypes = [torch.float32] if kwargs.get("fused") else [torch.float32, torch.complex64]
        params = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for dtype in dtypes for size in SIZES]
        twins = copy_params(params)
        ours = info.optim_cls(params, **{"lr": 0.1, **kwargs})
        loop = info.optim_cls(twins, **{"lr": 0.1, **kwargs, **dict.fromkeys(penalties, 0.0)})
        for _ in range(3):
            give_complex_grads(params)
            share_grads(params, twins)
            sizes = [q.abs() for q in twins]
            loss = sum(penalties.get("l1", 0.0) * s.sum() + penalties.get("l2", 0.0) * s.square().sum() for s in sizes)
            (-loss if kwargs.get("maximize") else loss).backward()
            ours.step()
            loop.step()
            # Values of a size of 4 in float32.
            assert_params_equal(params, twins, atol=2e-6)

    @each_case({"fused": True})
    def test_fused_demands_real_numbers(self, info, kwargs):
        if info.has_kernels:
            with pytest.raises(RuntimeError, match="fused=True demands dense float32.*complex64"):
                info.optim_cls([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))], **kwargs)

    @each_optimizer
    def test_sparse_gradients(self, info):
        """Down a curved valley with one coordinate at a time, against the for-loop with dense gradients."""
        if not info.supports_sparse:
            return  # among the errors
        options, schedulers = info.metadata_for_sparse
        for maximize in (False, True):
            for momentum, pieces in ((0, 1), (0, 2), (0.9, 1)):
                for flags in IMPLEMENTATIONS[:3]:
                    with labelled(f"maximize={maximize}, momentum={momentum}, {pieces} pieces, {flags}"):
                        lr = 1e-5 if maximize else 1e-4  # upwards it is steep
                        kwargs = {**options, "maximize": maximize, "momentum": momentum, "lr": lr}
                        p, q = (torch.nn.Parameter(torch.tensor([1.5, 1.5], dtype=torch.float64)) for _ in range(2))
                        ours, loop = info.optim_cls([p], **kwargs, **flags), info.theirs([q], **kwargs, foreach=False)
                        running = [make(o) for o in (ours, loop) for make in schedulers]
                        for i in range(20):
                            x, y = p.detach().tolist()
                            slope = [2 * (x - 1) - 400 * x * (y - x * x), 200 * (y - x * x)][i % 2]
                            index, value = [[i % 2] * pieces], [slope / pieces] * pieces
                            p.grad = torch.sparse_coo_tensor(index, value, (2,), dtype=torch.float64)
                            q.grad = p.grad.to_dense()
                            ours.step()
                            loop.step()
                            advance(running)
                            assert p.grad.is_sparse
                            # The two run apart only by roundings.
                            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-9)
                        assert not torch.equal(p.detach(), torch.tensor([1.5, 1.5], dtype=torch.float64))

    @each_case()
    def test_goes_in_the_right_direction(self, info, kwargs):
        dense = torch.randn(5, 10).t()
        for weight in (torch.randn(10, 5), dense, torch.randn(10, 5, 2)[..., 0]):
            if kwargs.get("fused") and weight.stride() == (10, 2):
                continue  # it demands tensors without gaps
            descend(info, kwargs, weight)

    @each_case()
    def test_goes_in_the_right_direction_with_schedulers(self, info, kwargs):
        if kwargs.get("nonnegative"):
            return  # from weights below 0 the way is uphill
        for makers in info.scheduler_inputs:
            ours = descend(info, kwargs, torch.randn(10, 5), makers)
            loop = info.theirs([torch.nn.Parameter(torch.ones(1))], lr=copy.deepcopy(kwargs.get("lr", 1e-3)))
            assert ours == pytest.approx(rates_of(loop, makers), rel=1e-6), "what the schedulers wrote"

    @each_case()
    def test_tensor_lr(self, info, kwargs):
        if not info.takes_tensor_lr(kwargs):
            return
        forms = [torch.tensor(0.125), torch.tensor([0.125]), torch.tensor(0.125, dtype=torch.float64)]
        params = make_params(SIZES)
        optimizer = info.optim_cls(params, **{**kwargs, "lr": 0.125})
        runs = []
        for lr in forms:
            twins = copy_params(params)
            runs.append((lr, twins, info.optim_cls(twins, **{**kwargs, "lr": lr})))
        for value in (0.125, 0.25, 0.0625):
            give_grads(params)
            optimizer.param_groups[0]["lr"] = value
            optimizer.step()
            for lr, twins, twin in runs:
                lr.fill_(value)
                share_grads(params, twins)
                twin.step()
                assert twin.param_groups[0]["lr"] is lr and lr.item() == value
                assert_params_equal(params, twins)

    @each_case({}, {"fused": False})
    def test_tensor_lr_with_schedulers(self, info, kwargs):
        for makers in info.scheduler_inputs:
            params = make_params([3, 33])
            twins = copy_params(params)
            lr = torch.tensor(0.1, dtype=torch.float64)
            optimizers = [info.optim_cls(ps, **{**kwargs, "lr": rate}) for ps, rate in ((params, 0.1), (twins, lr))]
            schedulers = [make(o) for o in optimizers for make in makers]
            for _ in range(3):
                give_grads(params)
                share_grads(params, twins)
                for o in optimizers:
                    o.step()
                advance(schedulers)
                # The rates may differ in the last of their 53 bits, what is rounded to float32 then in its last one.
                assert_params_equal(params, twins, atol=2e-6)
            assert optimizers[1].param_groups[0]["lr"] is lr

    @each_case()
    def test_closure(self, info, kwargs):
        params = make_params(SIZES)
        both = Beside(info, params, kwargs)
        give_grads(params)
        calls = []

        def closure():
            assert torch.is_grad_enabled()
            calls.append(1)
            return torch.tensor(3.0)

        for grad_enabled in (True, False):
            with torch.set_grad_enabled(grad_enabled):
                assert both.step(closure).item() == 3.0
                assert torch.is_grad_enabled() is grad_enabled
                assert both.step() is None
        assert len(calls) == 2

    @each_case()
    def test_nothing_happens_without_gradients(self, info, kwargs):
        params = make_params(SIZES)
        optimizer = info.optim_cls(params, **kwargs)
        before = copy_params(params)
        optimizer.step()
        assert_params_equal(params, before)
        assert not optimizer.state
        give_grads(params)
        optimizer.step()
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        before = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params]))
        versions = [p._version for p in params]
        optimizer.zero_grad()
        optimizer.step()
        assert_same((optimizer.state_dict(), [p.detach() for p in params]), before)
        assert [p._version for p in params] == versions

    @each_case()
    def test_nothing_happens_to_parameters_that_never_train(self, info, kwargs):
        params = [p.requires_grad_(False) for p in make_params(SIZES)]
        before = copy_params(params)
        optimizer = info.optim_cls(params, **kwargs)
        for _ in range(2):
            optimizer.step()
            optimizer.zero_grad()
        assert_params_equal(params, before)
        assert not optimizer.state

    @each_case()
    def test_gradients_of_zeros(self, info, kwargs):
        def give_zeros(params):
            for p in params:
                p.grad = torch.zeros_like(p)

        params = assorted_params(torch.float32)
        before = copy_params(params)
        check_steps(info, kwargs, params, give=give_zeros)
        defaults = inspect.signature(info.optim_cls).parameters
        if not any(kwargs.get(name, defaults[name].default) for name in (*PENALTIES, "nonnegative")):
            assert_params_equal(params, before)

    @each_case()
    def test_no_state_is_empty(self, info, kwargs):
        params = make_params(SIZES)
        optimizer = info.optim_cls(params, **kwargs)
        give_grads(params)
        params[1].grad = None
        optimizer.step()
        assert params[1] not in optimizer.state
        assert all(len(entry) > 0 for entry in optimizer.state.values())
        twins = copy_params(params)
        share_grads(params, twins)
        options = {k: v for k, v in kwargs.items() if k in info.theirs(twins).defaults and k not in FLAGS}
        loop = info.theirs(twins, foreach=False, **options)
        loop.step()
        theirs, ours = ({i: set(s) for i, s in o.state_dict()["state"].items()} for o in (loop, optimizer))
        assert ours == theirs

    @each_case()
    def test_amp_is_supported_as_by_torch(self, info, kwargs):
        flags = {k: v for k, v in kwargs.items() if k in FLAGS}
        loop = info.theirs(make_params(SIZES), **flags)
        ours = info.optim_cls(make_params(SIZES), **kwargs)
        assert ours._step_supports_amp_scaling == getattr(loop, "_step_supports_amp_scaling", False)

    @each_case({"fused": True})
    def test_an_overflow_leaves_no_trace(self, info, kwargs):
        params = make_params(SIZES)
        both = Beside(info, params, kwargs)
        optimizer = both.ours
        give_grads(params)
        for skipped, found in enumerate((1.0, 2.5, math.inf), 1):
            before, grads = copy_params(params), [p.grad.clone() for p in params]
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), torch.tensor(4.0)
            optimizer.step()
            assert_params_equal(params, before)
            assert_params_equal([p.grad for p in params], grads)
            assert not optimizer.state and optimizer.stats.skipped == skipped
        # After which a first gradient is one, not dampened, and gradients are read through their scale.
        want = copy_params(params)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(4.0)
        for p, w in zip(params, want, strict=True):
            w.grad = p.grad / 4
        optimizer.step()
        other = Beside(info, want, kwargs)
        other.step()
        assert_params_equal(params, want)
        assert_params_equal([p.grad for p in params], [w.grad for w in want])
        del optimizer.found_inf, optimizer.grad_scale
        give_grads(params)
        both.step()


instantiate(TestStep, globals())
