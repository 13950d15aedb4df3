"""What an optimizer promises beside the formula: state, hooks, exotic tensors, AMP, threads, processes."""

import copy
import gc
import io
import os
import pickle
import threading
import time
import weakref

import pytest
import torch
from sgd_cases import give_grads, make_params

import regfused
from regfused import reference

BOTH = pytest.mark.parametrize("make", (regfused.SGD, reference.SGD), ids=("kernels", "reference"))


def _copy(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def _share_grads(params, twins):
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


def _assert_equal(params, twins, atol=0.0):
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol, equal_nan=True)


# --- State -----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("weights_only", (True, False))
def test_state_dict_round_trip_is_bit_exact(make, weights_only):
    params = make_params([33, 4099])
    options = dict(lr=0.1, momentum=0.9, dampening=0.1, l1=0.1, l2=0.01, max_norm=1.0, proximal=True)
    optimizer = make(params, **options)
    give_grads(params)
    optimizer.step()
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in loaded["params"]]
    resumed = make(twins, lr=0.5)
    resumed.load_state_dict(loaded["optimizer"])
    assert {k: v for k, v in resumed.param_groups[0].items() if k != "params"} == {
        k: v for k, v in optimizer.param_groups[0].items() if k != "params"
    }
    for _ in range(3):
        give_grads(params)
        _share_grads(params, twins)
        optimizer.step()
        resumed.step()
        _assert_equal(params, twins)


@BOTH
def test_state_goes_to_and_from_torch(make):
    params = make_params([33, 4099])
    twins = _copy(params)
    ours = make(params, lr=0.1, momentum=0.9, l1=0.25, max_norm=1e9)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    give_grads(params)
    _share_grads(params, twins)
    theirs.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    # Keys that torch does not write keep the values of the constructor.
    assert ours.param_groups[0]["l1"] == 0.25 and ours.param_groups[0]["max_norm"] == 1e9
    ours.param_groups[0]["l1"] = 0.0
    give_grads(params)
    _share_grads(params, twins)
    ours.step()
    theirs.step()
    _assert_equal(params, twins, atol=1e-6)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    give_grads(params)
    _share_grads(params, twins)
    ours.step()
    theirs.step()
    _assert_equal(params, twins, atol=1e-6)


@BOTH
def test_missing_keys_keep_what_each_group_had(make):
    params = make_params([3, 4])
    optimizer = make([{"params": params[:1], "l1": 0.1}, {"params": params[1:], "l2": 0.2}], lr=0.1)
    saved = torch.optim.SGD([{"params": [p]} for p in params], lr=0.7).state_dict()
    optimizer.load_state_dict(saved)
    first, second = optimizer.param_groups
    assert (first["l1"], first["l2"], second["l1"], second["l2"]) == (0.1, 0.0, 0.0, 0.2)
    assert first["lr"] == second["lr"] == 0.7


@BOTH
def test_buffers_in_another_layout_load_right(make):
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    q = torch.nn.Parameter(p.detach().clone())
    options = dict(lr=0.1, momentum=0.9)
    ours, loop = make([p], **options), torch.optim.SGD([q], foreach=False, **options)
    buffer = torch.randn(2, 3, 4, 5)
    for optimizer in (ours, loop):
        state = optimizer.state_dict()
        state["state"] = {0: {"momentum_buffer": buffer.clone()}}
        optimizer.load_state_dict(state)
    # And one put there by hand.
    for _ in range(2):
        p.grad = torch.randn(2, 3, 4, 5)
        q.grad = p.grad.clone()
        ours.step()
        loop.step()
        _assert_equal([p], [q], atol=1e-6)
        ours.state[p]["momentum_buffer"] = ours.state[p]["momentum_buffer"].contiguous()


@BOTH
def test_one_buffer_loaded_for_two_parameters(make):
    params = make_params([5, 5])
    optimizer = make(params, lr=0.1, momentum=0.9)
    shared = torch.ones(5)
    state = optimizer.state_dict()
    state["state"] = {0: {"momentum_buffer": shared}, 1: {"momentum_buffer": shared.expand(5)}}
    optimizer.load_state_dict(state)
    for p in params:
        p.grad = torch.zeros(5)
    before = _copy(params)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - 0.1 * 0.9)


def test_buffers_sharing_memory_are_refused():
    params = make_params([5, 5])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[1]]["momentum_buffer"]
    before = _copy(params)
    with pytest.raises(ValueError, match="must share no memory"):
        optimizer.step()
    _assert_equal(params, before)


@BOTH
def test_rebuilt_from_its_own_configuration(make):
    params = make_params([5, 6])
    groups = [{"params": params[:1], "l1": 0.3}, {"params": params[1:]}]
    optimizer = make(groups, lr=0.1, momentum=0.9, max_norm=1.0, nonfinite="skip")
    again = type(optimizer)(optimizer.param_groups, **optimizer.defaults)
    assert again.param_groups == optimizer.param_groups and again.defaults == optimizer.defaults
    assert set(optimizer.__dict__) & {k for k in optimizer.__dict__ if not k.startswith("_")} == {
        "defaults",
        "state",
        "param_groups",
    }


@BOTH
@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "pickle")
)
def test_copies_behave_alike(make, duplicate):
    params = make_params([50, 60])
    optimizer = make(params, lr=0.1, momentum=0.9, l1=0.1, fused=None if make is reference.SGD else True)
    give_grads(params)
    optimizer.step()
    twin = duplicate(optimizer)
    twins = twin.param_groups[0]["params"]
    assert twin._step_supports_amp_scaling == optimizer._step_supports_amp_scaling
    give_grads(params)
    _share_grads(params, twins)
    optimizer.step()
    twin.step()
    _assert_equal(params, twins)


@BOTH
def test_params_added_later(make):
    params = make_params([5, 6, 7])
    twins = _copy(params)
    ours, loop = make(params[:1], lr=0.1, momentum=0.9), torch.optim.SGD(twins[:1], lr=0.1, momentum=0.9)
    for step in range(3):
        if step:
            ours.add_param_group({"params": params[step], "lr": 0.2})
            loop.add_param_group({"params": twins[step], "lr": 0.2})
        give_grads(params)
        _share_grads(params, twins)
        ours.step()
        loop.step()
        _assert_equal(params, twins, atol=1e-6)


@BOTH
def test_exchanged_params_buffers_state_and_data(make):
    params = make_params([50, 60])
    twins = _copy(params)
    ours, loop = make(params, lr=0.1, momentum=0.9), torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)

    def exchange_data(optimizer, ps):
        ps[0].data = ps[0].detach().clone() + 1

    def exchange_data_shape(optimizer, ps):
        ps[0].grad = None
        ps[0].data = torch.ones(70)
        optimizer.state[ps[0]] = {"momentum_buffer": torch.full((70,), 2.0)}

    def exchange_params(optimizer, ps):
        ps[1] = torch.nn.Parameter(ps[1].detach() * 2)
        optimizer.param_groups[0]["params"] = list(ps)

    def exchange_in_the_list(optimizer, ps):
        ps[1] = torch.nn.Parameter(ps[1].detach() * 3)
        optimizer.param_groups[0]["params"][1] = ps[1]

    def exchange_buffer(optimizer, ps):
        optimizer.state[ps[0]]["momentum_buffer"] = torch.full_like(ps[0], 0.5)

    def exchange_entry(optimizer, ps):
        optimizer.state[ps[0]] = {"momentum_buffer": torch.full_like(ps[0], 0.25)}

    def exchange_buffer_data(optimizer, ps):
        optimizer.state[ps[0]]["momentum_buffer"].data = torch.full_like(ps[0], 0.125)

    def forget_buffer(optimizer, ps):
        optimizer.state[ps[0]].pop("momentum_buffer")

    def forget_state(optimizer, ps):
        optimizer.state.clear()

    def momentum_off(optimizer, ps):
        optimizer.param_groups[0]["momentum"] = 0.0

    def momentum_on(optimizer, ps):
        optimizer.param_groups[0]["momentum"] = 0.8

    def groups_in_a_new_list(optimizer, ps):
        optimizer.param_groups = [dict(g) for g in optimizer.param_groups]

    actions = [
        exchange_data, exchange_data_shape, exchange_params, exchange_in_the_list, exchange_buffer, exchange_entry,
        exchange_buffer_data, forget_buffer, momentum_off, momentum_on, forget_state, groups_in_a_new_list,
    ]  # fmt: skip
    for action in [lambda optimizer, ps: None, *actions]:
        action(ours, params)
        action(loop, twins)
        give_grads(params)
        _share_grads(params, twins)
        ours.step()
        loop.step()
        _assert_equal(params, twins, atol=1e-5)


# --- Hooks, closures, schedulers ---------------------------------------------------------------------


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
    twins = _copy(params)
    options = dict(momentum=0.85)
    lr = 0.1
    ours = make(params, lr=torch.tensor(lr) if tensor_lr else lr, **options)
    loop = torch.optim.SGD(twins, lr=torch.tensor(lr) if tensor_lr else lr, foreach=False, **options)
    schedulers = [
        torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10, cycle_momentum=True) for o in (ours, loop)
    ]
    for _ in range(8):
        give_grads(params)
        _share_grads(params, twins)
        ours.step()
        loop.step()
        for s in schedulers:
            s.step()
        _assert_equal(params, twins, atol=1e-5)


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


# --- Tensors that are not for the kernels -------------------------------------------------------------


def _against_loop(params, expect_kernels, atol=1e-6, **options):
    twins = _copy(params)
    ours, loop = regfused.SGD(params, lr=0.1, **options), torch.optim.SGD(twins, lr=0.1, foreach=False, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        _share_grads(params, twins)
        ours.step()
        loop.step()
        _assert_equal(params, twins, atol=atol)
    assert ours._plan.tensors == expect_kernels


def test_mixed_with_complex():
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    _against_loop(params, 1, momentum=0.9, weight_decay=0.1)


def test_mixed_step_has_one_norm_and_one_coefficient():
    params = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    twins = _copy(params)
    ours = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=0.3)
    loop = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        _share_grads(params, twins)
        total = torch.nn.utils.clip_grad_norm_(twins, 0.3, foreach=False)
        ours.step()
        loop.step()
        assert ours.stats.grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
        _assert_equal(params, twins, atol=1e-6)
    assert ours._plan.tensors == 1


def test_other_strides():
    dense = torch.randn(6, 8)
    transposed = torch.nn.Parameter(dense.clone().t())
    strided = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    _against_loop([transposed, strided, torch.nn.Parameter(torch.randn(()))], 2, momentum=0.9)


def test_transposed_parameter_with_contiguous_gradient():
    p = torch.nn.Parameter(torch.randn(8, 8).t())
    q = torch.nn.Parameter(p.detach().clone())
    ours = regfused.SGD([p], lr=0.1, momentum=0.9)
    loop = torch.optim.SGD([q], lr=0.1, momentum=0.9, foreach=False)
    for _ in range(2):
        p.grad = torch.randn(8, 8)
        q.grad = p.grad.clone()
        ours.step()
        loop.step()
        _assert_equal([p], [q], atol=1e-6)
    # The same memory, other strides: the plan must notice.
    p.data, q.data = p.data.t(), q.data.t()
    ours.step()
    loop.step()
    _assert_equal([p], [q], atol=1e-6)


def test_expanded_gradient():
    p = torch.nn.Parameter(torch.randn(4, 5))
    p.grad = torch.randn(5).expand(4, 5)
    before = p.detach().clone()
    regfused.SGD([p], lr=0.1, fused=True).step()
    torch.testing.assert_close(p.detach(), before - 0.1 * p.grad)


@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_sparse_gradients_as_torch(momentum):
    embeddings = [torch.nn.Embedding(10, 3, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    ours = regfused.SGD(embeddings[0].parameters(), lr=0.1, momentum=momentum)
    loop = torch.optim.SGD(embeddings[1].parameters(), lr=0.1, momentum=momentum)
    for _ in range(3):
        index = torch.randint(10, (4,))
        for embedding, optimizer in zip(embeddings, (ours, loop), strict=True):
            optimizer.zero_grad()
            embedding(index).square().sum().backward()
            optimizer.step()
        _assert_equal(embeddings[0].parameters(), embeddings[1].parameters(), atol=1e-6)


def test_parameters_sharing_memory_and_listed_twice():
    p = torch.nn.Parameter(torch.randn(100_000))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = regfused.SGD([p, p], lr=0.1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.2)
    memory = torch.randn(10)
    a, b = torch.nn.Parameter(memory[:7]), torch.nn.Parameter(memory[3:])
    a.grad, b.grad = torch.ones(7), torch.ones(7)
    want = memory.clone()
    want[:7] -= 0.1
    want[3:] -= 0.1
    regfused.SGD([a, b], lr=0.1).step()
    torch.testing.assert_close(memory, want)
    with pytest.raises(RuntimeError, match="fused=True demands parameters that share no memory"):
        regfused.SGD([a, b], lr=0.1, fused=True).step()


def test_other_norm_types_run_through_the_reference():
    params = make_params([50, 60])
    twins = _copy(params)
    ours = regfused.SGD(params, lr=0.1, max_norm=0.3, norm_type=3.0)
    loop = torch.optim.SGD(twins, lr=0.1)
    for _ in range(2):
        give_grads(params)
        _share_grads(params, twins)
        total = torch.nn.utils.clip_grad_norm_(twins, 0.3, norm_type=3.0)
        ours.step()
        loop.step()
        assert ours.stats.grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
        _assert_equal(params, twins, atol=1e-6)
    ours.param_groups[0]["norm_type"] = 2.0
    ours.step()
    assert ours._plan.tensors == 2


@pytest.mark.parametrize("flag", ({"fused": False}, {"foreach": True}))
def test_pure_pytorch_on_request(flag):
    params = make_params([50])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.1, max_norm=0.1, **flag)
    optimizer.step()
    assert optimizer._plan.tensors == 0
    twins = make_params([50], generator=torch.Generator().manual_seed(0))
    assert twins[0].shape == params[0].shape


def test_differentiable():
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lr = 0.1

    def outcome(p, g):
        q = p.clone()
        q.grad = g
        optimizer = regfused.SGD([q], lr=lr, momentum=0.9, l2=0.1, weight_decay=0.2, differentiable=True)
        optimizer.step()
        return q

    g = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outcome, (p, g))


def test_inference_tensors():
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        optimizer = regfused.SGD([p], lr=0.1, momentum=0.9)
        p.grad = torch.ones(5)
        optimizer.step()
        torch.testing.assert_close(p, torch.full((5,), 0.9))


# --- Gradients that are not finite, AMP -----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("bad", (float("inf"), float("-inf"), float("nan")))
@pytest.mark.parametrize("clip", ({}, {"max_norm": 1.0}), ids=("", "clip"))
@pytest.mark.parametrize("where", (0, 16384, -1))
def test_nonfinite_skip(make, bad, clip, where):
    params = make_params([10, 20_000])
    optimizer = make(params, lr=0.1, momentum=0.9, l1=0.1, nonfinite="skip", **clip)
    before = _copy(params)
    versions = [p._version for p in params]
    give_grads(params)
    params[1].grad[where] = bad
    optimizer.step()
    _assert_equal(params, before)
    assert not optimizer.state and optimizer.stats.skipped == 1 and [p._version for p in params] == versions
    give_grads(params)
    optimizer.step()
    assert optimizer.stats.skipped == 1
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    params[0].grad[0] = bad
    optimizer.step()
    _assert_equal(params, before[0])
    for i, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], before[1][i]["momentum_buffer"])
    assert optimizer.stats.skipped == 2 and not optimizer.stats.grad_norm.isfinite()


@BOTH
def test_nonfinite_error(make):
    params = make_params([10, 20])
    optimizer = make([("first", params[0]), ("second", params[1])], lr=0.1, momentum=0.9, nonfinite="error")
    before = _copy(params)
    give_grads(params)
    params[1].grad[3] = float("nan")
    with pytest.raises(RuntimeError, match="nonfinite='error' demands a finite gradient norm, but it is nan"):
        optimizer.step()
    if make is regfused.SGD:
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 \(second\)"):
            optimizer.step()
    _assert_equal(params, before)
    assert not optimizer.state


@BOTH
def test_nonfinite_propagates_as_in_torch(make):
    params = make_params([10, 20])
    twins = _copy(params)
    give_grads(params)
    params[1].grad[3] = float("nan")
    _share_grads(params, twins)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    torch.optim.SGD(twins, lr=0.1).step()
    make(params, lr=0.1, max_norm=1.0).step()
    _assert_equal(params, twins)
    assert params[0].isnan().all()


@BOTH
@pytest.mark.parametrize("fused", (None, True))
@pytest.mark.parametrize("scale", (65536.0, 1000.0, 1.0))
@pytest.mark.parametrize("unscale_first", (False, True))
def test_grad_scaler(make, fused, scale, unscale_first):
    torch.manual_seed(1)
    model = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    ours = make(model.parameters(), lr=0.1, momentum=0.9, max_norm=0.5, fused=fused)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
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
        _assert_equal(model.parameters(), twin.parameters(), atol=1e-6)


def test_amp_state_is_cleared_when_a_step_raises():
    params = make_params([5])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, fused=True, nonfinite="error")
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(ValueError, match="lr must be a number, but got 'fast'"):
        scaler.step(optimizer)
    assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_unscaled_gradient_is_written_in_its_own_layout():
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5))
    p.grad = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    want, before = p.grad / 4, p.detach().clone()
    optimizer = regfused.SGD([p], lr=0.1, fused=True, maximize=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    optimizer.step()
    assert torch.equal(p.grad, want)
    torch.testing.assert_close(p.detach(), before + 0.1 * want)


# --- Interruptions, memory, threads, processes -----------------------------------------------------------


def test_interrupted_commit_leaves_no_state(monkeypatch):
    params = make_params([5, 6, 7])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    before = _copy(params)
    calls = 0
    original = torch.Tensor.__hash__

    def hash_and_interrupt(self):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(torch.Tensor, "__hash__", hash_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert calls >= 5 and not optimizer.state
    _assert_equal(params, before)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - 0.1 * p.grad)


@pytest.mark.parametrize("cycle", (False, True))
def test_optimizer_and_model_are_freed(cycle):
    model = torch.nn.Linear(30, 30)
    optimizer = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if cycle:
        model.weight.owner = optimizer
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    seen = weakref.ref(model.weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_step_inside_of_backward():
    model = torch.nn.Linear(30, 30)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        optimizer = regfused.SGD([p], lr=0.1, momentum=0.9)

        def step(p, optimizer=optimizer):
            optimizer.step()
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 30)
        model(x).square().mean().backward()
        loop.zero_grad()
        twin(x).square().mean().backward()
        loop.step()
    _assert_equal(model.parameters(), twin.parameters(), atol=1e-6)


def test_a_step_allocates_next_to_nothing():
    params = make_params([1_000_000, 1000])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.1, max_norm=1.0)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated == 0


def test_thousands_of_steps_do_not_grow():
    params = make_params([100, 100])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=1e-9, momentum=0.9, l1=0.1, max_norm=1.0)

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(500):
        optimizer.step()
    gc.collect()
    before = resident()
    for _ in range(5000):
        optimizer.step()
    gc.collect()
    assert resident() - before < 1 << 20


def test_optimizers_in_several_threads(threads):
    threads(2)
    results = {}

    def train(name):
        generator = torch.Generator().manual_seed(7)
        params = make_params([200_000, 33], generator=generator)
        optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.01, max_norm=1.0)
        for _ in range(20):
            give_grads(params, generator)
            optimizer.step()
        results[name] = params

    workers = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    train("alone")
    for i in range(4):
        _assert_equal(results[i], results["alone"])


def test_forked_child_steps(threads):
    threads(2)
    params = make_params([300_000])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0)
    optimizer.step()  # the pool of threads exists now
    before = params[0][-1].item()
    pid = os.fork()
    if pid == 0:
        try:
            optimizer.step()
            os._exit(0 if params[0][-1].item() != before else 3)  # no torch operation that would itself wake threads
        finally:
            os._exit(4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_inside_a_compiled_training_step():
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    ours = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=0.1)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)

    @torch.compile(backend="eager")
    def train(x):
        ours.zero_grad()
        model(x).square().mean().backward()
        ours.step()

    for _ in range(3):
        x = torch.randn(4, 3)
        train(x)
        loop.zero_grad()
        twin(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        loop.step()
    _assert_equal(model.parameters(), twin.parameters(), atol=1e-6)
