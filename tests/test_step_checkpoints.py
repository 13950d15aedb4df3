"""Hostile and damaged checkpoints: each loads right, or raises a clean ValueError and changes nothing."""

import copy
import io
import math

import numpy
import pytest
import torch
from step_cases import (
    EVERY_OPTIMIZER,
    ON_CUDA_KERNELS,
    OPTIMIZERS,
    assert_params_equal,
    copy_params,
    give_grads,
    has_kernels,
    in_double,
    is_adam,
    make_params,
    share_grads,
    slots_of,
    with_state,
    witness_of,
)

SIZES = (33, 33, 5)


def _trained(make, **options):
    params = make_params(SIZES)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = make(groups, lr=0.1, **{**with_state(make), **options})
    give_grads(params)
    optimizer.step()
    return params, optimizer


# What is done to a checkpoint: each gets it, the parameters, and the name of one of the optimizer's slots.


def _set_slot(value):
    """The slot of the first parameter becomes this, or what this makes of the old one."""
    return lambda saved, params, slot: _set(saved["state"][0], slot, value)


def _set_step(value):
    return lambda saved, params, slot: _set(saved["state"][0], "step", value)


def _set(entry, name, value):
    entry[name] = value(entry[name]) if callable(value) else value


def _set_entry(value):
    return lambda saved, params, slot: saved["state"].update({0: value})


def _set_option(name, value):
    return lambda saved, params, slot: saved["param_groups"][1].update({name: value})


def _set_options(**values):
    return lambda saved, params, slot: [group.update(values) for group in saved["param_groups"]]


def _set_ids(*ids):
    return lambda saved, params, slot: saved["param_groups"][0].update({"params": list(ids)})


def _drop(name):
    return lambda saved, params, slot: saved.pop(name)


def _replace(name, value):
    return lambda saved, params, slot: saved.update({name: value})


def _slots_in_one_memory(saved, params, slot):
    saved["state"][1][slot] = saved["state"][0][slot]


def _slots_overlapping(saved, params, slot):
    memory = torch.rand(40)
    saved["state"][0][slot], saved["state"][1][slot] = memory[:33], memory[7:]


def _every_slot_is_one_tensor(saved, params, slot):
    for entry in saved["state"].values():
        entry.update({name: saved["state"][0][slot] for name, x in entry.items() if x.shape == (33,)})


def _slot_is_the_parameter(saved, params, slot):
    saved["state"][0][slot] = params[0]


def _slot_is_the_gradient(saved, params, slot):
    saved["state"][0][slot] = params[0].grad


def _groups_swapped(saved, params, slot):
    saved["param_groups"].reverse()


def _state_of_two_swapped(saved, params, slot):
    saved["state"][0], saved["state"][2] = saved["state"][2], saved["state"][0]


def _one_group_less(saved, params, slot):
    del saved["param_groups"][1]


def _one_parameter_less(saved, params, slot):
    saved["param_groups"][0]["params"].pop()


def _of_another_class(other):
    """The whole checkpoint is that of an optimizer of torch's."""

    def change(saved, params, slot):
        twins = copy_params(params)
        optimizer = other([{"params": twins[:2]}, {"params": twins[2:]}], lr=0.1)
        give_grads(twins)
        optimizer.step()
        saved.update(optimizer.state_dict())

    return change


def _quantized(slot):
    return torch.quantize_per_tensor(slot, scale=0.1, zero_point=0, dtype=torch.qint8)


def _with_gradient(slot):
    return slot.clone().requires_grad_() * 2


# What raises, and how. Messages begin with the operation and name the place. First what any slot can be.
REFUSED_SLOTS = {
    "one element short": (_set_slot(lambda b: b[:-1]), "SLOT of parameter 0 of group 0 must"),
    "one element long": (_set_slot(torch.zeros(34)), r"SLOT .* must have shape \(33,\), but has \(34,\)"),
    "a million elements": (_set_slot(torch.zeros(1_000_000)), "SLOT .* must have shape"),
    "empty": (_set_slot(torch.zeros(0)), r"SLOT .* must have shape \(33,\), but has \(0,\)"),
    "0-dim": (_set_slot(torch.zeros(())), r"SLOT .* must have shape \(33,\), but has \(\)"),
    "one more dimension": (_set_slot(lambda b: b[None]), r"SLOT .* must have shape \(33,\), but has \(1, 33\)"),
    "complex": (_set_slot(lambda b: b.to(torch.complex64)), "SLOT .* must be real floating point.*complex64"),
    "integer": (_set_slot(lambda b: b.to(torch.int64)), "SLOT .* must be real floating point.*int64"),
    "bool": (_set_slot(lambda b: b > 0), "SLOT .* must be real floating point.*bool"),
    "quantized": (_set_slot(_quantized), "SLOT .* must have values that can be copied, but is quantized"),
    "meta": (_set_slot(torch.zeros(33, device="meta")), "SLOT .* is on the meta device"),
    "MKL-DNN": (_set_slot(lambda b: b.to_mkldnn()), "SLOT .* must have values that can be copied"),
    "a list": (_set_slot([0.0] * 33), "SLOT .* must be a tensor, but got list"),
    "a number": (_set_slot(0.0), "SLOT .* must be a tensor, but got float"),
    "text": (_set_slot("zeros"), "SLOT .* must be a tensor, but got str"),
    "an array": (_set_slot(numpy.zeros(33, "float32")), "must hold tensors and plain values, but its 'SLOT'"),
}
REFUSED_SLOTS_OF_ADAM = {
    "sparse": (_set_slot(lambda b: b.to_sparse()), "SLOT .* must have layout torch.strided, but has torch.sparse_coo"),
}
REFUSED = {
    "state of two parameters swapped": (_state_of_two_swapped, "must have shape"),
    "other state on meta": (_set_entry({"note": torch.zeros(3, device="meta")}), "note .* meta device"),
    "state of a parameter is a list": (_set_entry([1, 2]), r"the state of parameter 0 of group 0 must be a dict"),
    "state of a parameter is None": (_set_entry(None), "must be a dict, but is None"),
    "no state": (_drop("state"), "must have 'state'"),
    "no groups": (_drop("param_groups"), "must have 'param_groups'"),
    "state is a list": (_replace("state", []), "must have 'state', a dict, but has list"),
    "groups are a dict": (_replace("param_groups", {}), "must have 'param_groups', a list, but has dict"),
    "groups are text": (_replace("param_groups", ["a", "b"]), "group 0 of the checkpoint must be a dict"),
    "one group less": (_one_group_less, "different number of parameter groups: 1, where the optimizer has 2"),
    "one parameter less": (_one_parameter_less, "doesn't match the size"),
    "groups of other sizes swapped": (_groups_swapped, "doesn't match the size"),
    "parameters not listed": (_set_ids(), "doesn't match the size"),
    "one id for two parameters": (_set_ids(0, 0), "one id for each parameter"),
    "ids that cannot be keys": (_set_ids([0], [1]), "must be an int or a str"),
    "names that are no names": (
        lambda saved, params, slot: saved["param_groups"][0].update({"param_names": [1, 2]}),
        "must have 2 strings as 'param_names'",
    ),
    "negative lr": (_set_option("lr", -0.1), "lr must be finite and >= 0, but got -0.1"),
    "NaN lr": (_set_option("lr", math.nan), "lr must be finite"),
    "infinite lr": (_set_option("lr", math.inf), "lr must be finite"),
    "lr beyond float64": (_set_option("lr", 10**400), "lr must be one number of float64's range"),
    "lr is text": (_set_option("lr", "0.1"), "lr must be a number"),
    "lr is None": (_set_option("lr", None), "lr must be a number"),
    "lr of two elements": (_set_option("lr", torch.ones(2)), "lr must be a number or a tensor with 1 element"),
    "lr on the meta device": (_set_option("lr", torch.ones((), device="meta")), "lr must have a value"),
    "sparse lr": (_set_option("lr", torch.ones(1).to_sparse()), "lr must be a number or a dense tensor"),
    "negative l1": (_set_option("l1", -1e-3), "l1 must be finite and >= 0"),
    "NaN max_norm": (_set_option("max_norm", math.nan), "max_norm must be"),
    "max_norm of one group alone": (_set_option("max_norm", 1.0), "max_norm must be the same in every"),
    "unknown policy": (_set_option("nonfinite", "ignore"), "nonfinite must be one of"),
    "group_dim beyond the parameter": (
        lambda saved, params, slot: saved["param_groups"][1].update(
            {"group_l1": 1.0, "group_dim": 3, "decoupled_proximal": True}
        ),
        "group_dim must be in",
    ),
}
REFUSED_OF_SGD = {
    "complex momentum": (_set_option("momentum", 1j), "momentum must be a number"),
    "negative momentum": (_set_option("momentum", -1), "momentum must be finite and >= 0"),
    "momentum is an array": (_set_option("momentum", numpy.ones(3)), "momentum must be one number"),
    "nesterov is text": (_set_option("nesterov", "no"), "nesterov must be True or False"),
    "of Adam": (_of_another_class(torch.optim.Adam), "must be one of the rule 'sgd' .* of 'adam'"),
    "of AdamW": (_of_another_class(torch.optim.AdamW), "must be one of the rule 'sgd' .* of 'adam'"),
}
STEP = "the step of parameter 0 of group 0 must be"
REFUSED_OF_ADAM = {
    # Tensors whose value is no count: test_step_counted.py.
    "step missing": (
        lambda saved, params, slot: saved["state"][0].pop("step"),
        "the state of parameter 0 of group 0 must have 'step' beside its slots",
    ),
    "step is None": (_set_step(None), "the state of parameter 0 of group 0 must have 'step' beside its slots"),
    "step is negative": (_set_step(-3), f"{STEP} a whole number >= 0, but is -3"),
    "step is a fraction": (_set_step(2.5), f"{STEP} a whole number >= 0, but is 2.5"),
    "step is NaN": (_set_step(math.nan), f"{STEP} a whole number >= 0, but is nan"),
    "step is infinite": (_set_step(math.inf), f"{STEP} a whole number >= 0, but is inf"),
    "step beyond float64": (_set_step(10**400), f"{STEP} a whole number >= 0, but"),
    "step is text": (_set_step("1"), f"{STEP} a tensor or a number, but is a str"),
    "step is a bool": (_set_step(True), f"{STEP} a tensor or a number, but is a bool"),
    "step is complex": (_set_step(1j), f"{STEP} a tensor or a number, but is a complex"),
    "step is an array": (_set_step(numpy.ones(1)), "must hold tensors and plain values, but its 'step'"),
    "step is a slot": (_set_step(torch.ones(33)), f"{STEP} a dense floating point tensor with 1 element.*shape .33"),
    "empty step": (_set_step(torch.ones(0)), f"{STEP} a dense floating point tensor with 1 element.*shape .0"),
    "integer step": (_set_step(torch.tensor(1)), f"{STEP} a dense floating point tensor.*dtype torch.int64"),
    "bool step": (_set_step(torch.tensor(True)), f"{STEP} a dense floating point tensor.*dtype torch.bool"),
    "complex step": (_set_step(torch.tensor(1 + 0j)), f"{STEP} a dense floating point tensor.*torch.complex64"),
    "sparse step": (_set_step(torch.ones(1).to_sparse()), f"{STEP} a dense floating point tensor.*sparse_coo"),
    "quantized step": (_set_step(_quantized), "must have values that can be copied, but is quantized"),
    "step on the meta device": (_set_step(torch.ones((), device="meta")), "the step of .* is on the meta device"),
    "beta of 1": (_set_option("betas", (0.9, 1.0)), r"betas\[1\] must be >= 0 and < 1, but got 1.0"),
    "negative beta": (_set_option("betas", (-0.1, 0.9)), r"betas\[0\] must be >= 0 and < 1, but got -0.1"),
    "NaN beta": (_set_option("betas", (0.9, math.nan)), r"betas\[1\] must be >= 0 and < 1, but got nan"),
    "beta of two elements": (_set_option("betas", (torch.ones(2), 0.9)), r"betas\[0\] must be a number or a tensor"),
    "beta on the meta device": (
        _set_option("betas", (0.9, torch.ones((), device="meta"))),
        r"betas\[1\] must have a value",
    ),
    "one beta": (_set_option("betas", (0.9,)), r"betas must be a pair of numbers, but got \(0.9,\)"),
    "betas are a number": (_set_option("betas", 0.9), "betas must be a pair of numbers, but got 0.9"),
    "betas are text": (_set_option("betas", ("a", "b")), r"betas\[0\] must be a number"),
    "negative eps": (_set_option("eps", -1e-8), "eps must be finite and >= 0, but got -1e-08"),
    "NaN eps": (_set_option("eps", math.nan), "eps must be finite"),
    "eps is text": (_set_option("eps", "1e-8"), "eps must be a number"),
    "amsgrad is text": (_set_option("amsgrad", "no"), "amsgrad must be True or False"),
    "amsgrad is None": (_set_option("amsgrad", None), "amsgrad must be True or False"),
    "capturable is text": (_set_option("capturable", "no"), "capturable must be True or False"),
    "of SGD": (_of_another_class(torch.optim.SGD), "must be one of the rule 'adam' .* of 'sgd'"),
}  # fmt: skip


def _of_slots(table, of_adam, of_sgd):
    """Cases of the tables, for each slot of each optimizer: make, slot, and what is in the table."""
    for which, make in OPTIMIZERS.items():
        for slot in slots_of(make):
            for name, case in {**table, **(of_adam if is_adam(make) else of_sgd)}.items():
                yield pytest.param(make, slot, *case, id=f"{which}-{slot} {name}")


def _of_all(table, of_adam, of_sgd):
    """The same for each optimizer and its first slot."""
    for which, make in OPTIMIZERS.items():
        for name, case in {**table, **(of_adam if is_adam(make) else of_sgd)}.items():
            yield pytest.param(make, slots_of(make)[0], *case, id=f"{which}-{name}")


# What loads, and the state of the first parameter that the next step must start from, of the old one and the parameter.
def _slot_is(value):
    return lambda old, p, slot: {**old, slot: value(old[slot], p)}


def _as_it_was(old, p, slot):
    return old


def _without_the_slot(old, p, slot):
    return {name: x for name, x in old.items() if name != slot}


def _step_is(value):
    return lambda old, p, slot: {**old, "step": torch.tensor(value, dtype=torch.float64)}


def _amsgrad_off(old, p, slot):
    return {name: x for name, x in old.items() if name != "max_exp_avg_sq"}


ACCEPTED_SLOTS = {
    "None": (_set_slot(None), _without_the_slot),
    "missing": (lambda saved, params, slot: saved["state"][0].pop(slot), _without_the_slot),
    "float64": (_set_slot(lambda b: b.double()), _as_it_was),
    "bfloat16": (_set_slot(lambda b: b.bfloat16()), _slot_is(lambda b, p: b.bfloat16().float())),
    "expanded": (_set_slot(torch.ones(()).expand(33)), _slot_is(lambda b, p: torch.ones(33))),
    "with gaps": (_set_slot(lambda b: torch.stack([b, b], 1)[:, 0]), _as_it_was),
    "requires a gradient": (_set_slot(_with_gradient), _slot_is(lambda b, p: 2 * b)),
    "in one memory": (_slots_in_one_memory, _as_it_was),
    "overlapping": (_slots_overlapping, "the checkpoint's"),
    "all slots are one tensor": (_every_slot_is_one_tensor, "the checkpoint's"),
    "the parameter": (_slot_is_the_parameter, _slot_is(lambda b, p: p)),
    "the gradient": (_slot_is_the_gradient, "the checkpoint's"),
    "infinite": (_set_slot(lambda b: b * math.inf), _slot_is(lambda b, p: b * math.inf)),
    "NaN": (_set_slot(lambda b: b * math.nan), _slot_is(lambda b, p: b * math.nan)),
}
ACCEPTED_SLOTS_OF_SGD = {"sparse": (_set_slot(lambda b: b.to_sparse()), _as_it_was)}
ACCEPTED = {
    "as it was": (lambda saved, params, slot: None, _as_it_was),
    "no state": (_set_entry({}), lambda old, p, slot: {}),
    "state missing": (lambda saved, params, slot: saved["state"].pop(0), lambda old, p, slot: {}),
    "notes of another optimizer": (
        lambda saved, params, slot: saved["state"][0].update({"square_avg": torch.ones(7), "note": 3}),
        _as_it_was,
    ),
    "state of parameters that are not there": (
        lambda saved, params, slot: saved["state"].update({17: {slot: torch.ones(3)}, "note": {}}),
        _as_it_was,
    ),
    "unknown options": (_set_option("trust", 0.9), _as_it_was),
    "options missing": (
        lambda saved, params, slot: [
            saved["param_groups"][0].pop(name) for name in ("l1", "max_norm", "maximize", "fused")
        ],
        _as_it_was,
    ),
    "huge lr of a group": (_set_option("lr", 1e300), _as_it_was),
    "ids that are text": (
        lambda saved, params, slot: (
            saved["param_groups"][0].update({"params": ["a", "b"]}),
            saved["state"].update({"a": saved["state"].pop(0), "b": saved["state"].pop(1)}),
        ),
        _as_it_was,
    ),
}
ACCEPTED_OF_SGD = {
    "slot and option of Adam": (
        lambda saved, params, slot: (
            saved["state"][0].update({"exp_avg": torch.ones(7), "step": 3}),
            saved["param_groups"][1].update({"betas": (0.9, 0.999)}),
        ),
        _as_it_was,
    ),
}
ACCEPTED_OF_ADAM = {
    "slot and option of SGD": (
        lambda saved, params, slot: (
            saved["state"][0].update({"momentum_buffer": torch.ones(7)}),
            saved["param_groups"][1].update({"momentum": 0.9}),
        ),
        _as_it_was,
    ),
    "no step yet": (_set_step(torch.tensor(0.0)), _step_is(0)),
    "step is a number": (_set_step(7), _step_is(7)),
    "step is a huge number": (_set_step(2**24 + 2), _step_is(2**24 + 2)),
    "step beyond float32's whole numbers": (_set_step(torch.tensor(2.0**30)), _step_is(2**30)),
    "float64 step": (_set_step(torch.tensor(5.0, dtype=torch.float64)), _step_is(5)),
    "float64 step beyond float32": (_set_step(torch.tensor(2.0**24 + 1, dtype=torch.float64)), _step_is(2**24 + 1)),
    "bfloat16 step": (_set_step(torch.tensor(5.0, dtype=torch.bfloat16)), _step_is(5)),
    "step with a dimension": (_set_step(torch.tensor([[5.0]])), _step_is(5)),
    "step in a larger memory": (_set_step(torch.full((9,), 5.0)[3]), _step_is(5)),
    "step of two parameters in one memory": (
        lambda saved, params, slot: saved["state"][1].update({"step": saved["state"][0]["step"]}),
        _as_it_was,
    ),
    "step that requires a gradient": (_set_step(torch.tensor(5.0, requires_grad=True)), _step_is(5)),
    "betas in a list": (_set_options(betas=[0.5, 0.9]), _as_it_was),
    "betas are tensors": (_set_options(betas=(torch.tensor(0.5), torch.tensor([0.75]))), _as_it_was),
    "eps is a tensor": (_set_options(eps=torch.tensor(0.25)), _as_it_was),
    "amsgrad off": (_set_options(amsgrad=False), _amsgrad_off),
}


def _look(params, optimizer):
    """What a refused checkpoint must leave as it is."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return copy.deepcopy(
        ([p.detach() for p in params], [p.grad for p in params], optimizer.state_dict()["state"], groups)
    )


def _assert_same_look(look, other):
    for a, b in zip(look[:2], other[:2], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert look[2].keys() == other[2].keys() and look[3] == other[3]
    for entry, other_entry in zip(look[2].values(), other[2].values(), strict=True):
        assert entry.keys() == other_entry.keys()
        assert all(torch.equal(x, other_entry[name]) for name, x in entry.items())


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize(
    "make, slot, change, message",
    [*_of_slots(REFUSED_SLOTS, REFUSED_SLOTS_OF_ADAM, {}), *_of_all(REFUSED, REFUSED_OF_ADAM, REFUSED_OF_SGD)],
)
def test_refused(make, slot, change, message):
    params, optimizer = _trained(make)
    undisturbed = copy.deepcopy(optimizer)
    twins = [p for group in undisturbed.param_groups for p in group["params"]]
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved, params, slot)
    look = _look(params, optimizer)
    with pytest.raises(ValueError, match=rf"^{make.__name__}\.load_state_dict: .*{message.replace('SLOT', slot)}"):
        optimizer.load_state_dict(saved)
    _assert_same_look(_look(params, optimizer), look)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    # And the optimizer goes on as if nothing had been.
    share_grads(params, twins)
    optimizer.step()
    undisturbed.step()
    assert_params_equal(params, twins)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("what", (None, [], "checkpoint", 7, torch.zeros(3)), ids=lambda x: type(x).__name__)
def test_what_is_no_checkpoint_at_all(make, what):
    optimizer = _trained(make)[1]
    with pytest.raises(
        ValueError, match=rf"^{make.__name__}\.load_state_dict: a checkpoint must be a dict with 'state'"
    ):
        optimizer.load_state_dict(what)


@pytest.mark.parametrize(
    "make, slot, change, expected",
    [*_of_slots(ACCEPTED_SLOTS, {}, ACCEPTED_SLOTS_OF_SGD), *_of_all(ACCEPTED, ACCEPTED_OF_ADAM, ACCEPTED_OF_SGD)],
)
def test_accepted(make, slot, change, expected):
    params, optimizer = _trained(make)
    saved = copy.deepcopy(optimizer.state_dict())
    old = copy.deepcopy(saved["state"][0])
    change(saved, params, slot)
    if expected == "the checkpoint's":
        state = in_double(saved["state"][0])
    else:
        state = in_double(expected(old, params[0].detach(), slot))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["l1"] == 0 and optimizer.param_groups[0]["max_norm"] is None

    witness = witness_of(optimizer)
    want = params[0].detach().double()
    give_grads(params)
    kept = {k: v.clone() for k, v in _tensors(saved).items()}
    for _ in range(2):  # a second step sees what the first one wrote
        optimizer.step()
        (want,), (state,), *_ = witness.step([want], [params[0].grad.double()], [state])
        # Two steps of float32 on numbers below 10.
        torch.testing.assert_close(params[0].detach().double(), want, rtol=0, atol=1e-5, equal_nan=True)
    own = optimizer.state[params[0]]
    for name, x in state.items():
        assert not own[name].requires_grad and own[name].is_contiguous()
        if name == "step":
            # Beyond its whole numbers a type of float stands still, as in torch.
            assert own[name].item() == x.to(own[name].dtype).item()
            continue
        assert own[name].dtype == torch.float32 and own[name].shape == (33,)
        torch.testing.assert_close(own[name].double(), x, rtol=1e-5, atol=1e-5, equal_nan=True)
    # Steps do not write into the checkpoint, nor does the checkpoint share memory between parameters.
    for key, tensor in _tensors(saved).items():
        torch.testing.assert_close(tensor, kept[key], rtol=0, atol=0, equal_nan=True)


def _tensors(saved):
    return {
        (key, name): value.detach()
        for key, entry in saved["state"].items()
        for name, value in entry.items()
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)
    }


@EVERY_OPTIMIZER
def test_names_in_another_order(make):
    params = make_params([33, 33])
    optimizer = make(list(zip("ab", params, strict=True)), lr=0.1, **with_state(make))
    give_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(list(zip("ba", reversed(params), strict=True)), lr=0.1, **with_state(make))
    with pytest.raises(ValueError, match="parameters of this optimizer in another order: 'a' where 'b' is here"):
        other.load_state_dict(saved)
    assert not other.state
    # Other names are another model, which may well have the same parameters: as torch.
    renamed = make(list(zip("xy", params, strict=True)), lr=0.1, **with_state(make))
    renamed.load_state_dict(saved)
    assert renamed.param_groups[0]["param_names"] == ["a", "b"]


@EVERY_OPTIMIZER
def test_two_optimizers_from_one_dictionary(make):
    # torch hands out the tensors of the dictionary: two optimizers would write one slot, twice.
    params, optimizer = _trained(make)
    twins = copy_params(params)
    twin = make([{"params": twins[:2]}, {"params": twins[2:]}], lr=0.1, **with_state(make))
    saved = optimizer.state_dict()
    twin.load_state_dict(saved)
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    twin.step()
    assert_params_equal(params, twins)


@EVERY_OPTIMIZER
def test_a_snapshot_can_be_loaded_again_and_again(make):
    params, optimizer = _trained(make)
    snapshot = copy.deepcopy(optimizer.state_dict())
    weights = copy_params(params)
    runs = []
    for _ in range(3):
        optimizer.load_state_dict(snapshot)
        with torch.no_grad():
            for p, w in zip(params, weights, strict=True):
                p.copy_(w)
        optimizer.step()
        optimizer.step()
        runs.append(copy_params(params))
    for run in runs[1:]:
        assert_params_equal(run, runs[0])


OPTIONS = ("lr", "l1", "group_l1", "group_dim", "max_norm", "norm_type", "nonfinite", "proximal", "fused", "foreach")
OPTIONS_OF = {
    "SGD": ("momentum", "dampening", "nesterov"),
    "Adam": ("betas", "eps", "amsgrad", "decoupled_proximal"),
    "AdamW": ("decoupled_weight_decay",),
}


@pytest.mark.parametrize(
    "make, name",
    [
        pytest.param(make, name, id=f"{which}-{name}")
        for which, make in OPTIMIZERS.items()
        for name in (*OPTIONS, *OPTIONS_OF[make.__name__])
    ],
)
def test_any_object_as_an_option_is_a_clean_error(make, name):
    odd = ("x", b"1", math.nan, -1, 10**400, 1j, [1.0], {}, (), object(), numpy.ones(3), torch.ones(2), torch.ones(0),
           torch.tensor(math.nan), torch.ones(1, device="meta"), torch.ones(1).to_sparse(), torch.ones(1) > 0,
           torch.ones((), dtype=torch.complex64), float, Ellipsis)  # fmt: skip
    refused = 0
    for value in odd:
        params, optimizer = _trained(make)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            group[name] = value
        look = _look(params, optimizer)
        message = _error_of(lambda: optimizer.load_state_dict(saved))  # noqa: B023
        if message is None:
            continue  # such as a flag that is a number
        refused += 1
        assert message.startswith(f"{make.__name__}.load_state_dict: {name} must "), message
        _assert_same_look(_look(params, optimizer), look)
        if name == "lr" and ON_CUDA_KERNELS and has_kernels(make) and isinstance(value, torch.Tensor):
            continue  # the value of a tensor on a device is read there, unchecked
        # The same written into a live group.
        for group in optimizer.param_groups:
            group[name] = value
        message = _error_of(optimizer.step)
        assert message is not None and message.startswith(f"{make.__name__}.step: {name} must "), message
        for group in optimizer.param_groups:
            group[name] = optimizer.defaults[name]
        _assert_same_look(_look(params, optimizer), look)
    assert refused >= len(odd) - 4


def _error_of(call):
    """What a ValueError says, or None where there is none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


@EVERY_OPTIMIZER
def test_damaged_files_do_not_reach_the_optimizer(make):
    params, optimizer = _trained(make)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    look = _look(params, optimizer)
    for cut in (0, 1, len(file.getvalue()) // 2, len(file.getvalue()) - 1):
        with pytest.raises(Exception):  # noqa: B017, torch's own, of many kinds
            optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()[:cut]), weights_only=True))
        _assert_same_look(_look(params, optimizer), look)


def test_the_table_is_as_long_as_promised():
    assert len(REFUSED) + len(ACCEPTED) >= 25
    assert all(make.load_state_dict.__doc__ for make in OPTIMIZERS.values())
