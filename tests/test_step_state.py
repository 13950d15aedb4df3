"""Checkpoints, copies, parameters and slots that are exchanged between steps."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from step_cases import (
    EVERY_OPTIMIZER,
    KERNELS,
    OPTIMIZERS,
    assert_params_equal,
    copy_params,
    give_grads,
    has_kernels,
    is_adam,
    make_params,
    share_grads,
    slots_of,
    torch_twin,
    with_state,
)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("weights_only", (True, False))
def test_state_dict_round_trip_is_bit_exact(make, weights_only):
    params = make_params([33, 4099])
    of_the_rule = {"betas": (0.8, 0.9), "eps": 1e-3} if is_adam(make) else {"dampening": 0.1}
    options = dict(lr=0.1, l1=0.1, l2=0.01, max_norm=1.0, proximal=True, **with_state(make), **of_the_rule)
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
        for p, q in zip(params, twins, strict=True):
            assert optimizer.state[p].keys() == resumed.state[q].keys()
            assert all(torch.equal(x, resumed.state[q][name]) for name, x in optimizer.state[p].items())


@EVERY_OPTIMIZER
@pytest.mark.parametrize("stateful", (True, False))
@pytest.mark.parametrize("loop", ({"foreach": False}, {"fused": True}), ids=("for-loop", "fused"))
def test_state_goes_to_and_from_torch(make, stateful, loop):
    params = make_params([33, 4099])
    twins = copy_params(params)
    options = with_state(make) if stateful else {}
    ours = make(params, lr=0.1, l1=0.25, max_norm=1e9, **options)
    theirs = torch_twin(make)(twins, lr=0.1, **loop, **options)
    give_grads(params)
    share_grads(params, twins)
    theirs.step()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    # Keys that torch does not write keep the values of the constructor.
    assert ours.param_groups[0]["l1"] == 0.25 and ours.param_groups[0]["max_norm"] == 1e9
    assert_same_state(ours, theirs)
    ours.param_groups[0]["l1"] = 0.0
    for _ in range(2):
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        theirs.step()
        assert_params_equal(params, twins, atol=1e-6)
        # Bit by bit, and back.
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert_same_state(ours, theirs)


def assert_same_state(ours, theirs):
    """Bit by bit; torch's SGD writes a buffer that is None where it has none."""
    saved, twin = (optimizer.state_dict()["state"] for optimizer in (ours, theirs))
    for entry, other in ((saved.get(i, {}), twin.get(i, {})) for i in {*saved, *twin}):
        present = {name: x for name, x in other.items() if x is not None}
        assert {name for name, x in entry.items() if x is not None} == present.keys()
        assert all(torch.equal(entry[name], x) and entry[name].dtype == x.dtype for name, x in present.items())


@pytest.mark.parametrize("make", [pytest.param(m, id=which) for which, m in OPTIMIZERS.items() if is_adam(m)])
def test_between_adam_and_adamw_as_torch(make):
    """A checkpoint has the kind of weight decay; AdamW stays AdamW."""
    for other in (torch.optim.Adam, torch.optim.AdamW):
        params, twins = ([torch.nn.Parameter(torch.full((5,), 2.0))] for _ in range(2))
        ours, theirs = make(params, lr=0.1), torch_twin(make)(twins, lr=0.1, foreach=False)
        saved = other(copy_params(params), lr=0.1, weight_decay=0.5).state_dict()
        for optimizer, ps in ((ours, params), (theirs, twins)):
            optimizer.load_state_dict(copy.deepcopy(saved))
            for _ in range(2):
                ps[0].grad = torch.ones(5)
                optimizer.step()
        assert ours.param_groups[0]["decoupled_weight_decay"] == theirs.param_groups[0]["decoupled_weight_decay"]
        assert_params_equal(params, twins, atol=1e-6)
        # Through a copy, too.
        assert (
            pickle.loads(pickle.dumps(ours)).param_groups[0]["decoupled_weight_decay"]
            == (theirs.param_groups[0]["decoupled_weight_decay"])
        )


@EVERY_OPTIMIZER
def test_missing_keys_keep_what_each_group_had(make):
    params = make_params([3, 4])
    optimizer = make([{"params": params[:1], "l1": 0.1}, {"params": params[1:], "l2": 0.2}], lr=0.1)
    saved = torch_twin(make)([{"params": [p]} for p in params], lr=0.7).state_dict()
    optimizer.load_state_dict(saved)
    first, second = optimizer.param_groups
    assert (first["l1"], first["l2"], second["l1"], second["l2"]) == (0.1, 0.0, 0.0, 0.2)
    assert first["lr"] == second["lr"] == 0.7


@EVERY_OPTIMIZER
def test_slots_in_another_layout_load_right(make):
    p = torch.nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    q = torch.nn.Parameter(p.detach().clone())
    options = dict(lr=0.1, **with_state(make))
    ours, loop = make([p], **options), torch_twin(make)([q], foreach=False, **options)
    slots = {name: torch.rand(2, 3, 4, 5) for name in slots_of(make)}
    for optimizer in (ours, loop):
        state = optimizer.state_dict()
        state["state"] = {0: {name: slot.clone() for name, slot in slots.items()}}
        if is_adam(make):
            state["state"][0]["step"] = torch.tensor(3.0)
        optimizer.load_state_dict(state)
    # And some put there by hand.
    for _ in range(2):
        p.grad = torch.randn(2, 3, 4, 5)
        q.grad = p.grad.clone()
        ours.step()
        loop.step()
        assert_params_equal([p], [q], atol=1e-6)
        for name in slots:
            ours.state[p][name] = ours.state[p][name].contiguous()


@EVERY_OPTIMIZER
def test_one_tensor_loaded_for_two_parameters(make):
    params = make_params([5, 5])
    twins = copy_params(params)
    optimizer, loop = make(params, lr=0.1, **with_state(make)), make(twins, lr=0.1, **with_state(make))
    shared = torch.ones(5)
    for each, first, second in ((optimizer, shared, shared.expand(5)), (loop, torch.ones(5), torch.ones(5))):
        saved = each.state_dict()
        saved["state"] = {i: dict.fromkeys(slots_of(make), x) for i, x in enumerate((first, second))}
        if is_adam(make):
            step = torch.tensor(1.0)
            for entry in saved["state"].values():
                entry["step"] = step if each is optimizer else step.clone()
        each.load_state_dict(saved)
    for p in (*params, *twins):
        p.grad = torch.zeros(5)
    before = copy_params(params)
    for _ in range(2):
        optimizer.step()
        loop.step()
        assert_params_equal(params, twins)
    assert torch.equal(shared, torch.ones(5))
    for p, b in zip(params, before, strict=True):
        assert (p < b).all()


@KERNELS
def test_slots_sharing_memory_are_refused(make):
    for name in slots_of(make):
        params = make_params([5, 5])
        give_grads(params)
        optimizer = make(params, lr=0.1, **with_state(make))
        optimizer.step()
        optimizer.state[params[0]][name] = optimizer.state[params[1]][name]
        before = copy_params(params)
        with pytest.raises(ValueError, match="must share no memory"):
            optimizer.step()
        assert_params_equal(params, before)


@EVERY_OPTIMIZER
def test_rebuilt_from_its_own_configuration(make):
    params = make_params([5, 6])
    groups = [{"params": params[:1], "l1": 0.3}, {"params": params[1:]}]
    optimizer = make(groups, lr=0.1, max_norm=1.0, nonfinite="skip", **with_state(make))
    # AdamW decides about its decay by itself.
    defaults = {name: x for name, x in optimizer.defaults.items() if name in inspect.signature(make).parameters}
    assert optimizer.defaults.keys() - defaults.keys() <= {"decoupled_weight_decay"}
    again = type(optimizer)(optimizer.param_groups, **defaults)
    assert again.param_groups == optimizer.param_groups and again.defaults == optimizer.defaults
    assert set(optimizer.__dict__) & {k for k in optimizer.__dict__ if not k.startswith("_")} == {
        "defaults",
        "state",
        "param_groups",
    }


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "duplicate", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("deepcopy", "pickle")
)
def test_copies_behave_alike(make, duplicate):
    params = make_params([50, 60])
    optimizer = make(params, lr=0.1, l1=0.1, fused=True if has_kernels(make) else None, **with_state(make))
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


@EVERY_OPTIMIZER
def test_params_added_later(make):
    params = make_params([5, 6, 7])
    twins = copy_params(params)
    ours, loop = (cls(ps[:1], lr=0.1, **with_state(make)) for cls, ps in ((make, params), (torch_twin(make), twins)))
    for step in range(3):
        if step:
            ours.add_param_group({"params": params[step], "lr": 0.2})
            loop.add_param_group({"params": twins[step], "lr": 0.2})
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-6)


@EVERY_OPTIMIZER
def test_exchanged_params_slots_state_and_data(make):
    params = make_params([50, 60])
    twins = copy_params(params)
    options = dict(lr=0.1, **with_state(make))
    ours, loop = make(params, **options), torch_twin(make)(twins, foreach=False, **options)
    names = slots_of(make)

    def entry_of(p, value):
        """State of three steps."""
        counted = {"step": torch.tensor(3.0)} if is_adam(make) else {}
        return {**counted, **{name: torch.full_like(p, value) for name in names}}

    def exchange_data(optimizer, ps):
        ps[0].data = ps[0].detach().clone() + 1

    def exchange_data_shape(optimizer, ps):
        ps[0].grad = None
        ps[0].data = torch.ones(70)
        optimizer.state[ps[0]] = entry_of(ps[0], 2.0)

    def exchange_params(optimizer, ps):
        ps[1] = torch.nn.Parameter(ps[1].detach() * 2)
        optimizer.param_groups[0]["params"] = list(ps)

    def exchange_in_the_list(optimizer, ps):
        ps[1] = torch.nn.Parameter(ps[1].detach() * 3)
        optimizer.param_groups[0]["params"][1] = ps[1]

    def exchange_slot(name):
        def exchange(optimizer, ps):
            optimizer.state[ps[0]][name] = torch.full_like(ps[0], 0.5)

        return exchange

    def exchange_entry(optimizer, ps):
        optimizer.state[ps[0]] = entry_of(ps[0], 0.25)

    def exchange_slot_data(name):
        def exchange(optimizer, ps):
            optimizer.state[ps[0]][name].data = torch.full_like(ps[0], 0.125)

        return exchange

    def exchange_step(optimizer, ps):
        optimizer.state[ps[0]]["step"] = torch.tensor(1.0)

    def write_step(optimizer, ps):
        optimizer.state[ps[0]]["step"].fill_(9.0)

    def forget_buffer(optimizer, ps):
        optimizer.state[ps[0]].pop("momentum_buffer")

    def forget_entry(optimizer, ps):
        optimizer.state.pop(ps[0])

    def forget_state(optimizer, ps):
        optimizer.state.clear()

    def set_option(name, value):
        def change(optimizer, ps):
            optimizer.param_groups[0][name] = value

        return change

    def groups_in_a_new_list(optimizer, ps):
        optimizer.param_groups = [dict(g) for g in optimizer.param_groups]

    # torch's Adam wants its slots with its step.
    of_the_rule = (
        [exchange_step, write_step, set_option("betas", (0.5, 0.9)), set_option("amsgrad", False)]
        if is_adam(make)
        else [forget_buffer, set_option("momentum", 0.0), set_option("momentum", 0.8)]
    )
    actions = [
        exchange_data, exchange_data_shape, exchange_params, exchange_in_the_list, exchange_entry,
        *map(exchange_slot, names), *map(exchange_slot_data, names), *of_the_rule, forget_entry, forget_state,
        groups_in_a_new_list,
    ]  # fmt: skip
    for action in [lambda optimizer, ps: None, *actions]:
        action(ours, params)
        action(loop, twins)
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-5)


@EVERY_OPTIMIZER
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
    options = dict(lr=0.1, max_norm=1.0, fused=fused, **with_state(make))
    ours, loop = make(params, **options), make(twins, **options)
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
    if has_kernels(make) and fused is not False:
        assert ours._plan.tensors == 2
