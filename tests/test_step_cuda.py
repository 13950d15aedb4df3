"""What is particular to the CUDA kernels: launches, grids, numbers on the device, graphs. On a GPU or emulated."""

import copy
import math

import pytest
import torch
from cuda_runs import Graph, bits, emulated_only, emulator, needs_cuda_kernels, run_again
from step_cases import (
    DEVICE,
    DTYPES,
    EMULATED,
    OPTIONS,
    assert_params_equal,
    check_against_oracle,
    copy_params,
    give_grads,
    make_params,
    share_grads,
    with_defaults,
)

import regfused
from regfused import reference

pytestmark = needs_cuda_kernels


def everything_of(optimizer, params):
    return [*params, *(s["momentum_buffer"] for s in optimizer.state.values())]


# --- Launches and grids ---------------------------------------------------------------------------


@emulated_only
@pytest.mark.parametrize(
    "options, launches",
    [({}, 1), ({"max_norm": 1.0}, 2), ({"nonfinite": "skip", "l1": 0.1}, 2), ({"max_norm": 1.0, "group_l1": 0.1}, 5)],
)
def test_launches_of_a_step(options, launches):
    params = [p for dtype in DTYPES for p in make_params([3, 70, 0, 5000], dtype)]
    groups = [{"params": params[:5], "lr": 0.1}, {"params": params[5:], "l2": 0.3}]
    optimizer = regfused.SGD(groups, lr=0.2, momentum=0.9, **options)
    for step in range(4):
        give_grads(params)
        before = emulator().emulated_launches()
        optimizer.step()
        seen = emulator().emulated_launches() - before
        assert seen == launches or step == 0  # the first one uploads its tables


@emulated_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_every_grid_and_in_every_order(dtype, monkeypatch):
    # Multiprocessors: one block runs everything, or each span has a block of its own.
    results = {}
    for multiprocessors in (1, 2, 7, 1000):
        for order in ("forward", "reverse", "random"):
            monkeypatch.setenv("REGFUSED_EMULATED_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("REGFUSED_EMULATED_ORDER", order)
            torch.manual_seed(0)
            params = make_params([4099, 1, 1025, 33, 2048], dtype)
            optimizer = regfused.SGD(params, **with_defaults(OPTIONS["elastic net in the clip"]))
            for _ in range(2):
                give_grads(params)
                optimizer.step()
            results[multiprocessors, order] = bits([*everything_of(optimizer, params), *optimizer.stats])
    baseline = results.pop((1, "forward"))
    for how, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, baseline, strict=True)), how


@emulated_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_have_the_same_bits_on_every_grid_and_in_every_order(dtype, monkeypatch):
    results = {}
    for multiprocessors in (1, 1000):
        for order in ("forward", "reverse", "random"):
            monkeypatch.setenv("REGFUSED_EMULATED_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("REGFUSED_EMULATED_ORDER", order)
            torch.manual_seed(0)
            params = make_params([(4, 300), (2, 5000), (300, 3), (1100, 2)], dtype)
            optimizer = regfused.SGD(params, lr=0.1, group_l1=15.0)
            for dim in (0, 1):
                optimizer.param_groups[0]["group_dim"] = dim
                give_grads(params)
                optimizer.step()
            regfused.constrain_max_norm_(params, 3.0, dim=0)
            results[multiprocessors, order] = bits([*params, optimizer.stats.zero_fraction])
    baseline = results.pop((1, "forward"))
    for how, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, baseline, strict=True)), how


@pytest.mark.parametrize("count", (100, 600, 4200))
@pytest.mark.parametrize("driver", (13000, 11000))
def test_any_number_of_tensors(count, driver):
    # Gradients fit 4 KB of arguments, 32 KB where the driver takes them, or neither; above 4096 chunks, several of
    # them share a partial norm.
    if driver == 11000:
        if not EMULATED or count == 100:
            pytest.skip("an old driver is emulated")
        code = f"import test_step_cuda; test_step_cuda.step_many({count})"
        run_again(code, REGFUSED_EMULATED_DRIVER=str(driver))
    else:
        step_many(count)


def step_many(count):
    # Neighbours differ in their type, and so in what a block makes of the options.
    params = [make_params([1 + i % 7], (torch.float32, torch.float64)[i % 2])[0] for i in range(count)]
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, l1=0.01, max_norm=1.0)
    ours, theirs = regfused.SGD(params, **options), reference.SGD(twins, **options)
    for step in range(3):
        give_grads(params)
        params[step].grad = None
        share_grads(params, twins)
        ours.step()
        theirs.step()
        assert ours.stats.grad_norm.item() == pytest.approx(theirs.stats.grad_norm.item(), rel=1e-6)
    assert ours._plan.tensors == count
    assert_params_equal(params, twins, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (3, 3, 3), (0, 1, 2), (1, 0, 0), (5, 5, 4)], ids=str)
@pytest.mark.parametrize("amp", (False, True))
def test_views_that_start_anywhere(dtype, offsets, amp):
    # Parameter, gradient and momentum buffer inside larger tensors, whose other elements must stay.
    n, around = 1100, 7.0
    big = [torch.full((n + 16,), around, dtype=dtype) for _ in offsets]
    param, grad, buffer = (b[o : o + n] for b, o in zip(big, offsets, strict=True))
    torch.nn.init.normal_(param)
    torch.nn.init.normal_(grad)
    torch.nn.init.normal_(buffer)
    p = torch.nn.Parameter(param)
    assert p.data_ptr() == param.data_ptr()
    q = torch.nn.Parameter(param.clone())
    p.grad, q.grad = grad, grad.clone()
    options = dict(lr=0.1, momentum=0.9, l1=0.1, l2=0.1, max_norm=3.0, fused=amp or None)
    ours, theirs = regfused.SGD([p], **options), reference.SGD([q], **options)
    for optimizer in (ours, theirs) if amp else ():
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"] = buffer, buffer.clone()
    ours.step()
    theirs.step()
    tolerance = dict(rtol=torch.finfo(dtype).eps * 2, atol=1e-6)
    torch.testing.assert_close(p, q, **tolerance)
    assert torch.equal(p.grad, q.grad)  # a power of two scales without rounding
    torch.testing.assert_close(buffer, theirs.state[q]["momentum_buffer"], **tolerance)
    for b, o in zip(big, offsets, strict=True):
        assert (b[:o] == around).all() and (b[o + n :] == around).all()


@pytest.mark.parametrize("norm_type", (1.0, 2.0, math.inf))
@pytest.mark.parametrize("scale", (1e25, 1e-17))
def test_norms_beyond_float32(norm_type, scale):
    params = make_params([2000, 10])
    give_grads(params)
    for p in params:
        p.grad *= scale
    optimizer = regfused.SGD(params, lr=0.1, max_norm=1.0, norm_type=norm_type)
    optimizer.step()
    everything = torch.cat([p.grad.flatten() for p in params]).double()
    want = torch.linalg.vector_norm(everything, norm_type).item()
    assert optimizer.stats.grad_norm.item() == pytest.approx(want, rel=1e-6, abs=0)
    assert all(p.isfinite().all() for p in params)


# --- Numbers that stay on the device --------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize(
    "options", ["plain", "elastic net in the clip", "proximal elastic net", "sparse group lasso", "classical"]
)
def test_lr_on_the_device(options, dtype):
    params = make_params([4099, 33])
    twins = copy_params(params)
    options = {k: v for k, v in OPTIONS[options].items() if k != "lr"}
    lr = torch.tensor(0.25, dtype=dtype)
    ours, theirs = regfused.SGD(params, lr=lr, **options), reference.SGD(twins, lr=0.25, **options)
    for value in (0.25, 0.5, 0.0, 0.125):
        lr.fill_(value)
        theirs.param_groups[0]["lr"] = value
        give_grads(params)
        share_grads(params, twins)
        before = bits(params)
        ours.step()
        theirs.step()
        assert_params_equal(params, twins, atol=2e-6)
        if value == 0 and not options.get("classical_momentum"):  # its velocity has the learning rates of the past
            assert all(torch.equal(a, b) for a, b in zip(bits(params), before, strict=True))


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"momentum": 0.9, "dampening": 0.5, "l1": 0.1}], ids=str)
@pytest.mark.parametrize("scale", (1.0, 1024.0, 1000.0))
def test_grad_scale_and_found_inf(options, scale):
    params = make_params([4099, 33, 1])
    twins = copy_params(params)
    ours = regfused.SGD(params, lr=0.1, fused=True, **options)
    theirs = reference.SGD(twins, lr=0.1, **options)
    for step, overflow in enumerate((True, False, True, False)):
        give_grads(params)
        share_grads(params, twins)
        for p in params:
            p.grad *= scale
        if overflow:
            params[0].grad[7] = math.inf
        ours.grad_scale, ours.found_inf = torch.tensor(scale), torch.tensor(float(overflow))
        before = bits([*everything_of(ours, params), *(p.grad for p in params)])
        stats_before = ours.stats
        ours.step()
        if overflow:
            after = bits([*everything_of(ours, params), *(p.grad for p in params)])
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
            assert step > 0 or not ours.state
            # Before the first update the host does not know that there was none.
            for name in ("grad_norm", "clip_coef", "penalty", *(["zero_fraction"] if step else [])):
                torch.testing.assert_close(
                    getattr(ours.stats, name), getattr(stats_before, name), rtol=0, atol=0, equal_nan=True
                )
        else:
            theirs.step()
            assert_params_equal(params, twins, atol=1e-6)
            for p, q in zip(params, twins, strict=True):
                torch.testing.assert_close(p.grad, q.grad)
        assert ours.stats.skipped == (step + 2) // 2
        del ours.grad_scale, ours.found_inf


def test_skipped_on_the_device():
    params = make_params([4099, 33])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.1, nonfinite="skip")
    give_grads(params)
    optimizer.step()
    good = optimizer.stats
    for value in (math.inf, math.nan):
        give_grads(params)
        params[1].grad[32] = value
        before = bits(everything_of(optimizer, params))
        optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(bits(everything_of(optimizer, params)), before, strict=True))
    stats = optimizer.stats
    assert stats.skipped == 2 and stats.clip_coef == 0 and not stats.grad_norm.isfinite()
    assert stats.penalty == good.penalty and stats.zero_fraction == good.zero_fraction
    give_grads(params)
    optimizer.step()
    assert optimizer.stats.skipped == 2 and optimizer.stats.clip_coef == 1 and stats.clip_coef == 0


def test_stats_are_on_the_device():
    params = make_params([40])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, max_norm=1.0)
    optimizer.step()
    assert all(number.device.type == DEVICE and number.dim() == 0 for number in optimizer.stats)


# --- Graphs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["plain", "clip, norm inf", "elastic net in the clip", "proximal l1", "group lasso", "classical"]
)
def test_graph_with_changing_lr_and_gradients(options):
    options = {k: v for k, v in OPTIONS[options].items() if k != "lr"}
    params = make_params([4099, 33, 5])
    twins = copy_params(params)
    lr = torch.tensor(0.1)
    ours, theirs = regfused.SGD(params, lr=lr, **options), reference.SGD(twins, lr=0.1, **options)

    def their_step():
        share_grads(params, twins)
        theirs.step()

    give_grads(params)
    ours.step()  # makes the momentum buffers and the plan
    their_step()
    captured = Graph()
    with captured.capture():
        ours.step()
    launches = (2 if options.get("max_norm") is not None else 1) + (3 if options.get("group_l1") else 0)
    assert not EMULATED or captured.launches == launches
    for value in (0.1, 0.05, 0.5):
        lr.fill_(value)
        theirs.param_groups[0]["lr"] = value
        generator = torch.Generator(DEVICE).manual_seed(int(value * 100))
        for p in params:
            p.grad.copy_(torch.randn(p.shape, generator=generator))
        captured.replay()
        their_step()
        assert_params_equal(params, twins, atol=3e-6)
    assert math.isnan(theirs.stats.grad_norm) or ours.stats.grad_norm.item() == pytest.approx(
        theirs.stats.grad_norm.item(), rel=1e-6
    )
    # And eagerly again.
    give_grads(params)
    ours.step()
    their_step()
    assert_params_equal(params, twins, atol=3e-6)


def test_graph_that_may_skip():
    params = make_params([300])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, nonfinite="skip")
    give_grads(params)
    optimizer.step()
    captured = Graph()
    with captured.capture():
        optimizer.step()
    captured.replay()
    before = bits(everything_of(optimizer, params))
    params[0].grad[5] = math.nan
    captured.replay()
    captured.replay()
    assert optimizer.stats.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(bits(everything_of(optimizer, params)), before, strict=True))


def test_graph_survives_what_comes_after_it():
    # The tables that a graph reads outlive a plan that was built anew.
    params = make_params([3000, 20])
    twins = copy_params(params)
    ours, theirs = (make(ps, lr=0.1, max_norm=1.0) for make, ps in ((regfused.SGD, params), (reference.SGD, twins)))
    give_grads(params)
    share_grads(params, twins)
    ours.step()
    captured = Graph()
    with captured.capture():
        ours.step()
    late = torch.nn.Parameter(torch.ones(70))
    late.grad = torch.ones(70)
    ours.add_param_group({"params": [late]})
    before = copy_params(params)
    ours.step()
    with torch.no_grad():
        for p, b in zip(params, before, strict=True):
            p.copy_(b)
    captured.replay()
    theirs.step()
    share_grads(params, twins)
    theirs.step()
    assert_params_equal(params, twins, atol=1e-6)


@pytest.mark.parametrize(
    "prepare, message",
    [
        (lambda o, ps: o.param_groups[0].update(nonfinite="error"), "nonfinite='error' may raise"),
        (lambda o, ps: o.state.clear(), "a tensor of the state has to be made"),
        (lambda o, ps: o.add_param_group({"params": make_params([3]), "momentum": 0.0}), None),
        (lambda o, ps: setattr(ps[0], "grad", ps[0].grad.to_sparse()), "the reference has to step a tensor"),
    ],
    ids=("error", "first", "new group", "sparse"),
)
def test_what_a_graph_cannot_hold(prepare, message):
    params = make_params([30, 7])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    give_grads(params)
    optimizer.step()
    prepare(optimizer, params)
    for group in optimizer.param_groups[1:]:
        give_grads(group["params"])
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    before = copy_params(everything)
    message = message or "must find everything as the step before left it"
    with pytest.raises(RuntimeError, match=message), Graph().capture():
        optimizer.step()
    assert_params_equal(everything, before)


# --- Several devices, failures --------------------------------------------------------------------


@emulated_only
@pytest.mark.parametrize("options", ["clip, norm inf", "elastic net in the clip", "everything", "momentum"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_devices_have_one_norm(options, dtype, monkeypatch):
    monkeypatch.setenv("REGFUSED_EMULATED_DEVICES", "2")  # odd sizes on one, even ones on the other
    params = make_params([4099, 16, 1, 2050, 33], dtype)
    check_against_oracle(regfused.SGD, params, OPTIONS[options])


@emulated_only
def test_several_devices_skip_together(monkeypatch):
    monkeypatch.setenv("REGFUSED_EMULATED_DEVICES", "2")
    params = make_params([40, 41])
    optimizer = regfused.SGD(params, lr=0.1, nonfinite="skip")
    before = copy_params(params)
    give_grads(params)
    params[1].grad[0] = math.nan
    optimizer.step()
    assert_params_equal(params, before)
    assert optimizer.stats.skipped == 1
    give_grads(params)
    optimizer.step()
    assert optimizer.stats.skipped == 1 and not torch.equal(params[0], before[0])


@emulated_only
@pytest.mark.parametrize("nth, kernel", [(0, "norm"), (1, "step")])
def test_a_launch_that_fails(nth, kernel):
    params = make_params([40, 41])
    optimizer = regfused.SGD(params, lr=0.1, max_norm=1.0)
    give_grads(params)
    optimizer.step()
    before = copy_params(params)
    emulator().emulated_fail(nth)
    with pytest.raises(RuntimeError, match=f"CUDA refused to launch the {kernel} kernel: invalid argument"):
        optimizer.step()
    assert_params_equal(params, before)
    optimizer.step()
    assert not torch.equal(params[0], before[0])


@emulated_only
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"nonfinite": "error"}], ids=str)
def test_a_first_launch_that_fails_leaves_no_state(options):
    params = make_params([40, 41])
    give_grads(params)
    before = copy_params(params)
    for nth, what in enumerate(("upload a table", *(["launch the norm kernel"] if options else []), "launch the step")):
        optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, **options)
        emulator().emulated_fail(nth)
        with pytest.raises(RuntimeError, match=what):
            optimizer.step()
        assert not optimizer.state
        assert_params_equal(params, before)
    optimizer.step()
    assert len(optimizer.state) == 2


def test_deepcopy_goes_its_own_way():
    params = make_params([40])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    give_grads(params)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin_params = twin.param_groups[0]["params"]
    give_grads(twin_params)
    twin.step()
    assert not torch.equal(twin_params[0], params[0])
