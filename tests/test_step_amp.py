"""Automatic mixed precision: torch.amp.GradScaler around the step, against torch's for-loop without a scaler."""

import copy
import math

import pytest
import torch
from step_cases import (
    DEVICE,
    EVERY_OPTIMIZER,
    ON_CUDA_KERNELS,
    assert_params_equal,
    copy_params,
    give_grads,
    make_params,
    share_grads,
    torch_twin,
    with_state,
)

import regfused
from regfused import reference

INF, NAN = math.inf, math.nan

# fused=True unscales inside the step and skips there; with None the scaler does both.
FUSED = pytest.mark.parametrize("fused", (None, True))
SCALES = (65536.0, 1.0, 1000.0, 3.7, 2.0**-10)
OVERFLOWS = ((), (0,), (1, 2), (0, 1, 4))

# What a scale does to gradients is the same for all rules: the others have fewer of the scales and overflows.
TRAINING = [
    (getattr(module, name), scale, overflows)
    for module in (regfused, reference)
    for name, scales, all_overflows in (
        ("SGD", SCALES, OVERFLOWS),
        ("Adam", (65536.0, 3.7), OVERFLOWS[1:]),
        ("AdamW", (1000.0,), OVERFLOWS[-1:]),
    )
    for scale in scales
    for overflows in all_overflows
]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The models are tiny: torch's threads would wait for one another most of the time."""
    threads(1)


def _options(make):
    """State in every slot. With a larger eps, roundings of gradients near 0 do not decide about Adam's moves."""
    return {"lr": 0.1, **with_state(make), **({"eps": 1e-3} if "amsgrad" in with_state(make) else {})}


def _id(value):
    if not isinstance(value, type):
        return str(value)
    return f"{'reference' if value.__module__.startswith(reference.__name__) else 'kernels'}-{value.__name__}"


def _model():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))


def _scaler(**options):
    return torch.amp.GradScaler(DEVICE, **{"init_scale": 1024.0, **options})


def _assert_disarmed(optimizer):
    assert not {"grad_scale", "found_inf"} & optimizer.__dict__.keys()


def _assert_same_state(ours, loop):
    """The slots and the steps that were counted: those of torch's for-loop."""
    states = [[o.state.get(p, {}) for g in o.param_groups for p in g["params"]] for o in (ours, loop)]
    for entry, other in zip(*states, strict=True):
        assert entry.keys() == {name for name, slot in other.items() if slot is not None}
        for name, slot in entry.items():
            atol = 0 if name == "step" else 1e-5
            torch.testing.assert_close(slot, other[name], rtol=0, atol=atol, check_device=name != "step")


def _look(optimizer):
    """Parameters and state, to be compared with _assert_untouched."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    return copy_params(params), copy.deepcopy(optimizer.state_dict()["state"]), [p._version for p in params]


def _assert_untouched(optimizer, look):
    params = [p for g in optimizer.param_groups for p in g["params"]]
    now = _look(optimizer)
    assert_params_equal(params, look[0])
    assert now[1].keys() == look[1].keys()
    # Where a device decides about the step, the host does not learn that nothing was written.
    assert now[2] == look[2] or ON_CUDA_KERNELS
    for entry, other in zip(now[1].values(), look[1].values(), strict=True):
        assert entry.keys() == other.keys()
        for name, slot in entry.items():
            assert torch.equal(slot, other[name])


@FUSED
@pytest.mark.parametrize("make, scale, overflows", TRAINING, ids=_id)
@pytest.mark.parametrize("unscale_first", (False, True))
def test_training_with_overflows(make, fused, scale, overflows, unscale_first):
    model = _model()
    twin = copy.deepcopy(model)
    ours = make(model.parameters(), **_options(make), max_norm=0.5, fused=fused)
    loop = torch_twin(make)(twin.parameters(), foreach=False, **_options(make))
    scaler = _scaler(init_scale=scale, growth_interval=2)
    for step in range(6):
        x = torch.randn(4, 5)
        ours.zero_grad()
        loop.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if step in overflows:
            model[0].weight.grad[3, 1] = INF if step % 2 else NAN
        look = _look(ours)
        if unscale_first:
            scaler.unscale_(ours)
        scaler.step(ours)
        before = scaler.get_scale()
        scaler.update()
        _assert_disarmed(ours)
        if step in overflows:
            _assert_untouched(ours, look)
            assert scaler.get_scale() == before / 2
            continue
        twin(x).square().mean().backward()
        if fused or unscale_first:
            # A gradient of the scaled loss has the roundings of another loss.
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        loop.step()
        assert_params_equal(model.parameters(), twin.parameters(), atol=1e-5)
        _assert_same_state(ours, loop)
    if fused:
        assert ours.stats.skipped == len(overflows)


@EVERY_OPTIMIZER
@FUSED
def test_accumulated_gradients(make, fused):
    model = _model()
    twin = copy.deepcopy(model)
    ours = make(model.parameters(), **_options(make), max_norm=0.5, l2=0.01, fused=fused)
    loop = torch_twin(make)(twin.parameters(), foreach=False, **_options(make))
    scaler = _scaler()
    for step in range(3):
        batches = torch.randn(4, 8, 5)
        ours.zero_grad()
        loop.zero_grad()
        for x in batches:
            scaler.scale(model(x).square().mean() / 4).backward()
            (twin(x).square().mean() / 4).backward()
        if step == 1:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        sum(0.01 * p.square().sum() for p in twin.parameters()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        loop.step()
        assert_params_equal(model.parameters(), twin.parameters(), atol=1e-5)
        _assert_same_state(ours, loop)


@EVERY_OPTIMIZER
@FUSED
@pytest.mark.parametrize("bad", (None, 0, 1))
def test_two_optimizers_with_one_scaler(make, fused, bad):
    models = [_model(), _model()]
    twins = copy.deepcopy(models)
    ours = [make(m.parameters(), **_options(make), fused=fused) for m in models]
    loops = [torch_twin(make)(m.parameters(), foreach=False, **_options(make)) for m in twins]
    scaler = _scaler()
    for step in range(3):
        x = torch.randn(4, 5)
        for optimizer in (*ours, *loops):
            optimizer.zero_grad()
        for model, weight in zip(models, (1.0, 2.0), strict=True):
            scaler.scale(weight * model(x).square().mean()).backward()
        overflow = step == 1 and bad is not None
        if overflow:
            models[bad][2].bias.grad[0] = INF
        for optimizer in ours:
            scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        assert scaler.get_scale() == (before / 2 if overflow else before)
        # One optimizer's overflow is none of the other's.
        for i, (twin, weight, loop) in enumerate(zip(twins, (1.0, 2.0), loops, strict=True)):
            if not (overflow and i == bad):
                (weight * twin(x).square().mean()).backward()
                loop.step()
            assert_params_equal(models[i].parameters(), twin.parameters(), atol=1e-5)
            _assert_same_state(ours[i], loop)


@EVERY_OPTIMIZER
@FUSED
@pytest.mark.parametrize("policy", ("propagate", "skip", "error"))
def test_an_overflow_is_the_scaler_s_whatever_the_policy(make, fused, policy):
    params = make_params([10, 33])
    optimizer = make(params, **_options(make), nonfinite=policy, fused=fused)
    scaler = _scaler()
    scaler.scale(torch.ones(()))
    give_grads(params)
    params[1].grad[4] = INF
    look = _look(optimizer)
    scaler.step(optimizer)  # "error" too: a scaler that tries its scale overflows now and then
    scaler.update()
    _assert_untouched(optimizer, look)
    assert not optimizer.state and scaler.get_scale() == 512.0


@EVERY_OPTIMIZER
@pytest.mark.parametrize("policy", ("propagate", "skip", "error"))
def test_policy_for_a_norm_that_the_scaler_found_finite(make, policy):
    # Finite as they are, infinite once they are unscaled: 1e30 / 1e-20.
    params = make_params([10, 33])
    optimizer = make(params, lr=0.1, **with_state(make), weight_decay=0.0, nonfinite=policy, fused=True)
    scaler = _scaler(init_scale=1e-20)
    scaler.scale(torch.ones(()))
    for p in params:
        p.grad = torch.full_like(p, 1e-20)
    params[1].grad[4] = 1e30
    look = _look(optimizer)
    if policy == "error":
        with pytest.raises(RuntimeError, match="nonfinite='error' demands a finite gradient norm, but it is inf"):
            scaler.step(optimizer)
        _assert_disarmed(optimizer)
        _assert_untouched(optimizer, look)
    elif policy == "skip":
        scaler.step(optimizer)
        _assert_untouched(optimizer, look)
        assert optimizer.stats.skipped == 1
    else:
        scaler.step(optimizer)
        assert not params[1].isfinite().all()
        return
    # Training goes on.
    scaler.update()
    for p in params:
        p.grad = torch.full_like(p, 1e-20)
    before = copy_params(params)
    scaler.step(optimizer)
    # The first step with gradients of 1 is lr, whatever the rule.
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - 0.1)


@EVERY_OPTIMIZER
def test_a_step_that_raised_does_not_multiply_the_next_scale(make):
    # GradScaler multiplies its scale by the grad_scale that it finds.
    params = make_params([10])
    optimizer = make(params, lr=0.1, weight_decay=0.0, fused=True)
    scaler = _scaler()
    scaler.scale(torch.ones(()))

    def refuse(*_):
        raise KeyError("planted")

    for place in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        params[0].grad = torch.full_like(params[0], 1024.0)
        handle = place(refuse)
        with pytest.raises(KeyError, match="planted"):
            scaler.step(optimizer)
        handle.remove()
        _assert_disarmed(optimizer)
        scaler.update()
        params[0].grad = torch.full_like(params[0], scaler.get_scale())
        before = params[0].detach().clone()
        scaler.step(optimizer)
        scaler.update()
        # With gradients of 1 alone a step is lr, whatever the rule.
        torch.testing.assert_close(params[0].detach(), before - 0.1)


@EVERY_OPTIMIZER
def test_disabled_scaler(make):
    params = make_params([10])
    twins = copy_params(params)
    give_grads(params)
    share_grads(params, twins)
    scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    optimizer = make(params, lr=0.1, fused=True)
    scaler.step(optimizer)
    scaler.update()
    torch_twin(make)(twins, lr=0.1, foreach=False).step()
    assert_params_equal(params, twins, atol=1e-6)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("scale", (1.0, 4.0, 3.7, 1e-3))
def test_grad_scale_by_hand(make, scale):
    # Without a scaler: torch's fused optimizers divide by it, which some use to clip.
    params = make_params([33, 5])
    give_grads(params)
    raw = [p.grad.clone() for p in params]
    twins = copy_params(params)
    optimizer = make(params, lr=0.1, fused=True, maximize=True)
    loop = torch_twin(make)(twins, lr=0.1, foreach=False, maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    for p, q, g in zip(params, twins, raw, strict=True):
        torch.testing.assert_close(p.grad, g / scale, rtol=1e-6, atol=0)
        q.grad = g / scale
    loop.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    # It stays until it is taken back, as in torch.
    assert optimizer.grad_scale == scale


@EVERY_OPTIMIZER
@pytest.mark.parametrize("group_dim", (0, 1))
def test_gradients_are_left_unscaled_beside_a_group_lasso(make, group_dim):
    params = make_params([(40, 30), (3, 20_000)])
    give_grads(params)
    raw = [p.grad.clone() for p in params]
    optimizer = make(params, lr=0.1, fused=True, group_l1=0.5, group_dim=group_dim)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    for p, g in zip(params, raw, strict=True):
        assert torch.equal(p.grad, g / 4)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("found_inf", (1.0, 2.0, -1.0, INF, NAN))
def test_found_inf_counts_as_set_when_it_is_not_0(make, found_inf):
    params = make_params([33, 5])
    give_grads(params)
    optimizer = make(params, **_options(make), fused=True)
    look = _look(optimizer)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found_inf)
    optimizer.step()
    _assert_untouched(optimizer, look)
    assert not optimizer.state and optimizer.stats.skipped == 1


@EVERY_OPTIMIZER
@FUSED
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_parameters(make, fused, dtype):
    # Small gradients of float16 live by the scale: 1e-6 / 8 is its spacing around zero. The scaler itself refuses to
    # unscale float16 gradients, fused=True does not.
    if fused is None and dtype == torch.float16:
        pytest.skip("torch.amp.GradScaler refuses to unscale float16 gradients")
    params = make_params([33, 64], dtype)
    optimizer = make(params, lr=1.0, fused=fused)
    scaler = _scaler(init_scale=1024.0)
    scaler.scale(torch.ones(()))
    twins = [torch.nn.Parameter(p.detach().double()) for p in params]
    for p, q in zip(params, twins, strict=True):
        p.grad = (1024.0 * torch.linspace(-1e-3, 1e-3, p.numel())).to(dtype)
        q.grad = p.grad.double() / 1024.0
    scaler.step(optimizer)
    torch_twin(make)(twins, lr=1.0, foreach=False).step()
    # A rounding to the type of storage, and one of float32 where a parameter comes down near 0.
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@EVERY_OPTIMIZER
def test_a_parameter_listed_twice_is_unscaled_once(make):
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    p.grad, q.grad = torch.full_like(p, 4.0), torch.full_like(q, 2.0)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer, loop = make([p, p], lr=0.1), torch_twin(make)([q, q], lr=0.1, foreach=False)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p.grad, torch.full_like(p, 2.0))
    loop.step()
    torch.testing.assert_close(p, q)
    _assert_same_state(optimizer, loop)


@pytest.mark.parametrize("name", ("SGD", "Adam", "AdamW"))
def test_kernels_and_reference_agree_under_a_scaler(name):
    models = [_model(), _model()]
    optimizers = [
        make(m.parameters(), **_options(make), l1=1e-3, max_norm=0.5, nonfinite="skip", fused=True)
        for make, m in zip((getattr(regfused, name), getattr(reference, name)), models, strict=True)
    ]
    scalers = [_scaler(growth_interval=2), _scaler(growth_interval=2)]
    for step in range(8):
        x = torch.randn(4, 5)
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            if step in (0, 5):
                model[0].bias.grad[2] = INF
            scaler.step(optimizer)
            scaler.update()
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert optimizers[0].stats.skipped == optimizers[1].stats.skipped
        assert_params_equal(models[0].parameters(), models[1].parameters(), atol=1e-5)
        _assert_same_state(*optimizers)
        models[1].load_state_dict(models[0].state_dict())
        optimizers[1].load_state_dict(optimizers[0].state_dict())
