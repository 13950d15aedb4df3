"""Checkpoints, copies, parameters and buffers that are exchanged between steps."""

import copy
import io
import pickle

import pytest
import torch
from step_cases import BOTH, assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused
from regfused import reference


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
        share_grads(params, twins)
        optimizer.step()
        resumed.step()
        assert_params_equal(params, twins)


@BOTH
def test_state_goes_to_and_from_torch(make):
    params = make_params([33, 4099])
    twins = copy_params(params)
    ours = make(params, lr=0.1, momentum=0.9, l1=0.25, max_norm=1e9)
    theirs = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    give_grads(params)
    share_grads(params, twins)
    theirs.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    # Keys that torch does not write keep the values of the constructor.
    assert ours.param_groups[0]["l1"] == 0.25 and ours.param_groups[0]["max_norm"] == 1e9
    ours.param_groups[0]["l1"] = 0.0
    give_grads(params)
    share_grads(params, twins)
    ours.step()
    theirs.step()
    assert_params_equal(params, twins, atol=1e-6)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    give_grads(params)
    share_grads(params, twins)
    ours.step()
    theirs.step()
    assert_params_equal(params, twins, atol=1e-6)


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
        assert_params_equal([p], [q], atol=1e-6)
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
    before = copy_params(params)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - 0.1 * 0.9)


def test_buffers_sharing_memory_are_refused():
    params = make_params([5, 5])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    optimizer.state[params[0]]["momentum_buffer"] = optimizer.state[params[1]]["momentum_buffer"]
    before = copy_params(params)
    with pytest.raises(ValueError, match="must share no memory"):
        optimizer.step()
    assert_params_equal(params, before)


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
    share_grads(params, twins)
    optimizer.step()
    twin.step()
    assert_params_equal(params, twins)


@BOTH
def test_params_added_later(make):
    params = make_params([5, 6, 7])
    twins = copy_params(params)
    ours, loop = make(params[:1], lr=0.1, momentum=0.9), torch.optim.SGD(twins[:1], lr=0.1, momentum=0.9)
    for step in range(3):
        if step:
            ours.add_param_group({"params": params[step], "lr": 0.2})
            loop.add_param_group({"params": twins[step], "lr": 0.2})
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-6)


@BOTH
def test_exchanged_params_buffers_state_and_data(make):
    params = make_params([50, 60])
    twins = copy_params(params)
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
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-5)


@BOTH
@pytest.mark.parametrize("fused", (None, True, False))
@pytest.mark.parametrize(
    "contain",
    (tuple, torch.nn.ParameterList, iter, lambda params: (p for p in params), list),
    ids=("tuple", "ParameterList", "iterator", "generator", "list"),
)
def test_params_in_other_containers(make, fused, contain):
    """Written into a group of an optimizer that exists; what can be gone through once is there at the next step."""
    params = make_params([5, 6])
    twins = copy_params(params)
    ours = make(params, lr=0.1, momentum=0.9, max_norm=1.0, fused=fused)
    loop = make(twins, lr=0.1, momentum=0.9, max_norm=1.0, fused=fused)
    for _ in range(2):
        ours.param_groups[0]["params"] = contain(params)
        for _ in range(2):
            give_grads(params)
            share_grads(params, twins)
            ours.stats.as_floats()
            ours.step()
            loop.step()
            assert_params_equal(params, twins)
            assert ours.stats.as_floats() == loop.stats.as_floats()
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        ours.param_groups[0]["params"] = contain(params)
        ours.load_state_dict(copy.deepcopy(loop.state_dict()))
        assert len(ours.state) == 2
    if make is regfused.SGD and fused is not False:
        assert ours._plan.tensors == 2
