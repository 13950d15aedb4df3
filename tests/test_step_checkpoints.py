"""Hostile and damaged checkpoints: each loads right, or raises a clean ValueError and changes nothing."""

import copy
import io
import math

import numpy
import pytest
import torch
from step_cases import BOTH, ON_CUDA_KERNELS, assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused

SIZES = (33, 33, 5)
OPTIONS = dict(lr=0.1, momentum=0.9)


def _trained(make, **options):
    params = make_params(SIZES)
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}], **{**OPTIONS, **options})
    give_grads(params)
    optimizer.step()
    return params, optimizer


def _set_buffer(value):
    """The buffer of the first parameter becomes this, or what this makes of the old one."""

    def change(saved, params):
        entry = saved["state"][0]
        entry["momentum_buffer"] = value(entry["momentum_buffer"]) if callable(value) else value

    return change


def _set_entry(value):
    return lambda saved, params: saved["state"].update({0: value})


def _set_option(name, value):
    return lambda saved, params: saved["param_groups"][1].update({name: value})


def _set_ids(*ids):
    return lambda saved, params: saved["param_groups"][0].update({"params": list(ids)})


def _drop(name):
    return lambda saved, params: saved.pop(name)


def _replace(name, value):
    return lambda saved, params: saved.update({name: value})


def _buffers_in_one_memory(saved, params):
    saved["state"][1]["momentum_buffer"] = saved["state"][0]["momentum_buffer"]


def _buffers_overlapping(saved, params):
    memory = torch.randn(40)
    saved["state"][0]["momentum_buffer"], saved["state"][1]["momentum_buffer"] = memory[:33], memory[7:]


def _buffer_is_the_parameter(saved, params):
    saved["state"][0]["momentum_buffer"] = params[0]


def _buffer_is_the_gradient(saved, params):
    saved["state"][0]["momentum_buffer"] = params[0].grad


def _groups_swapped(saved, params):
    saved["param_groups"].reverse()


def _state_of_two_swapped(saved, params):
    saved["state"][0], saved["state"][2] = saved["state"][2], saved["state"][0]


def _one_group_less(saved, params):
    del saved["param_groups"][1]


def _one_parameter_less(saved, params):
    saved["param_groups"][0]["params"].pop()


def _quantized(buffer):
    return torch.quantize_per_tensor(buffer, scale=0.1, zero_point=0, dtype=torch.qint8)


def _with_gradient(buffer):
    return buffer.clone().requires_grad_() * 2


# What raises, and how. Messages begin with the operation and name the place.
REFUSED = {
    "buffer one element short": (_set_buffer(lambda b: b[:-1]), "momentum_buffer of parameter 0 of group 0 must"),
    "buffer one element long": (_set_buffer(torch.zeros(34)), r"must have shape \(33,\), but has \(34,\)"),
    "buffer of a million elements": (_set_buffer(torch.zeros(1_000_000)), "must have shape"),
    "empty buffer": (_set_buffer(torch.zeros(0)), r"must have shape \(33,\), but has \(0,\)"),
    "0-dim buffer": (_set_buffer(torch.zeros(())), r"must have shape \(33,\), but has \(\)"),
    "buffer with one more dimension": (_set_buffer(lambda b: b[None]), r"must have shape \(33,\), but has \(1, 33\)"),
    "state of two parameters swapped": (_state_of_two_swapped, "must have shape"),
    "complex buffer": (_set_buffer(lambda b: b.to(torch.complex64)), "must be real floating point.*complex64"),
    "integer buffer": (_set_buffer(lambda b: b.to(torch.int64)), "must be real floating point.*int64"),
    "bool buffer": (_set_buffer(lambda b: b > 0), "must be real floating point.*bool"),
    "quantized buffer": (_set_buffer(_quantized), "must have values that can be copied, but is quantized"),
    "meta buffer": (_set_buffer(torch.zeros(33, device="meta")), "but is on the meta device"),
    "MKL-DNN buffer": (_set_buffer(lambda b: b.to_mkldnn()), "must have values that can be copied"),
    "buffer is a list": (_set_buffer([0.0] * 33), "must be a tensor, but got list"),
    "buffer is a number": (_set_buffer(0.0), "must be a tensor, but got float"),
    "buffer is text": (_set_buffer("zeros"), "must be a tensor, but got str"),
    "buffer is an array": (_set_buffer(numpy.zeros(33, "float32")), "must hold tensors and plain values"),
    "other state on meta": (_set_entry({"exp_avg": torch.zeros(3, device="meta")}), "exp_avg .* meta device"),
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
        lambda saved, params: saved["param_groups"][0].update({"param_names": [1, 2]}),
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
    "complex momentum": (_set_option("momentum", 1j), "momentum must be a number"),
    "negative momentum": (_set_option("momentum", -1), "momentum must be finite and >= 0"),
    "momentum is an array": (_set_option("momentum", numpy.ones(3)), "momentum must be one number"),
    "negative l1": (_set_option("l1", -1e-3), "l1 must be finite and >= 0"),
    "NaN max_norm": (_set_option("max_norm", math.nan), "max_norm must be"),
    "max_norm of one group alone": (_set_option("max_norm", 1.0), "max_norm must be the same in every"),
    "unknown policy": (_set_option("nonfinite", "ignore"), "nonfinite must be one of"),
    "nesterov is text": (_set_option("nesterov", "no"), "nesterov must be True or False"),
    "group_dim beyond the parameter": (
        lambda saved, params: saved["param_groups"][1].update({"group_l1": 1.0, "group_dim": 3}),
        "group_dim must be in",
    ),
}  # fmt: skip

# What loads, and the momentum buffer of the first parameter that the next step must start from.
ACCEPTED = {
    "as it was": (lambda saved, params: None, lambda b, p: b),
    "no buffer": (_set_entry({}), None),
    "buffer is None": (_set_buffer(None), None),
    "buffer missing from the state": (lambda saved, params: saved["state"].pop(0), None),
    "notes of another optimizer": (
        lambda saved, params: saved["state"][0].update({"exp_avg": torch.ones(7), "step": 3}),
        lambda b, p: b,
    ),
    "state of parameters that are not there": (
        lambda saved, params: saved["state"].update({17: {"momentum_buffer": torch.ones(3)}, "note": {}}),
        lambda b, p: b,
    ),
    "unknown options": (_set_option("betas", (0.9, 0.999)), lambda b, p: b),
    "options missing": (
        lambda saved, params: [saved["param_groups"][0].pop(n) for n in ("l1", "max_norm", "maximize", "fused")],
        lambda b, p: b,
    ),
    "huge lr of a group": (_set_option("lr", 1e300), lambda b, p: b),
    "float64 buffer": (_set_buffer(lambda b: b.double()), lambda b, p: b),
    "bfloat16 buffer": (_set_buffer(lambda b: b.bfloat16()), lambda b, p: b.bfloat16().float()),
    "expanded buffer": (_set_buffer(torch.ones(()).expand(33)), lambda b, p: torch.ones(33)),
    "buffer with gaps": (_set_buffer(lambda b: torch.stack([b, b], 1)[:, 0]), lambda b, p: b),
    "buffer that requires a gradient": (_set_buffer(_with_gradient), lambda b, p: 2 * b),
    "buffer of zeros in a sparse layout": (_set_buffer(lambda b: b.to_sparse()), lambda b, p: b),
    "buffers in one memory": (_buffers_in_one_memory, lambda b, p: b),
    "buffers that overlap": (_buffers_overlapping, "the checkpoint's"),
    "buffer is the parameter": (_buffer_is_the_parameter, lambda b, p: p),
    "buffer is the gradient": (_buffer_is_the_gradient, "the checkpoint's"),
    "infinite buffer": (_set_buffer(lambda b: b * math.inf), lambda b, p: b * math.inf),
    "NaN buffer": (_set_buffer(lambda b: b * math.nan), lambda b, p: b * math.nan),
    "ids that are text": (
        lambda saved, params: (
            saved["param_groups"][0].update({"params": ["a", "b"]}),
            saved["state"].update({"a": saved["state"].pop(0), "b": saved["state"].pop(1)}),
        ),
        lambda b, p: b,
    ),
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
        assert torch.equal(entry["momentum_buffer"], other_entry["momentum_buffer"])


@BOTH
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
@pytest.mark.parametrize("name", REFUSED)
def test_refused(make, name):
    change, message = REFUSED[name]
    params, optimizer = _trained(make)
    undisturbed = copy.deepcopy(optimizer)
    twins = [p for group in undisturbed.param_groups for p in group["params"]]
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved, params)
    look = _look(params, optimizer)
    with pytest.raises(ValueError, match=rf"^SGD\.load_state_dict: .*{message}"):
        optimizer.load_state_dict(saved)
    _assert_same_look(_look(params, optimizer), look)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    # And the optimizer goes on as if nothing had been.
    share_grads(params, twins)
    optimizer.step()
    undisturbed.step()
    assert_params_equal(params, twins)


@BOTH
@pytest.mark.parametrize("what", (None, [], "checkpoint", 7, torch.zeros(3)), ids=lambda x: type(x).__name__)
def test_what_is_no_checkpoint_at_all(make, what):
    optimizer = _trained(make)[1]
    with pytest.raises(ValueError, match=r"^SGD\.load_state_dict: a checkpoint must be a dict with 'state'"):
        optimizer.load_state_dict(what)


@BOTH
@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(make, name):
    change, expected = ACCEPTED[name]
    params, optimizer = _trained(make, dampening=0.0, classical_momentum=False)
    saved = copy.deepcopy(optimizer.state_dict())
    old = saved["state"][0]["momentum_buffer"].clone()
    change(saved, params)
    if expected == "the checkpoint's":
        buffer = saved["state"][0]["momentum_buffer"].clone()
    else:
        buffer = None if expected is None else expected(old, params[0].detach()).clone()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["l1"] == 0 and optimizer.param_groups[0]["max_norm"] is None

    before = params[0].detach().double()
    give_grads(params)
    kept = {k: v.clone() for k, v in _tensors(saved).items()}
    for _ in range(2):  # a second step sees what the first one wrote
        optimizer.step()
        grad = params[0].grad.double()
        buffer = grad if buffer is None else 0.9 * buffer.double() + grad
        before = before - 0.1 * buffer
        # Two steps of float32 on numbers below 10.
        torch.testing.assert_close(params[0].detach().double(), before, rtol=0, atol=1e-5, equal_nan=True)
    own = optimizer.state[params[0]]["momentum_buffer"]
    assert own.dtype == torch.float32 and own.shape == (33,) and own.is_contiguous() and not own.requires_grad
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


@BOTH
def test_names_in_another_order(make):
    params = make_params([33, 33])
    optimizer = make(list(zip("ab", params, strict=True)), **OPTIONS)
    give_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = make(list(zip("ba", reversed(params), strict=True)), **OPTIONS)
    with pytest.raises(ValueError, match="parameters of this optimizer in another order: 'a' where 'b' is here"):
        other.load_state_dict(saved)
    assert not other.state
    # Other names are another model, which may well have the same parameters: as torch.
    renamed = make(list(zip("xy", params, strict=True)), **OPTIONS)
    renamed.load_state_dict(saved)
    assert renamed.param_groups[0]["param_names"] == ["a", "b"]


@BOTH
def test_two_optimizers_from_one_dictionary(make):
    # torch hands out the buffers of the dictionary: two optimizers would step one buffer, twice.
    params, optimizer = _trained(make)
    twins = copy_params(params)
    twin = make([{"params": twins[:2]}, {"params": twins[2:]}], **OPTIONS)
    saved = optimizer.state_dict()
    twin.load_state_dict(saved)
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    twin.step()
    assert_params_equal(params, twins)


@BOTH
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


@BOTH
@pytest.mark.parametrize("name", ("lr", "momentum", "dampening", "l1", "group_l1", "group_dim", "max_norm", "norm_type",
                                  "nonfinite", "nesterov", "proximal", "fused", "foreach"))  # fmt: skip
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
        assert message.startswith(f"SGD.load_state_dict: {name} must "), message
        _assert_same_look(_look(params, optimizer), look)
        if name == "lr" and ON_CUDA_KERNELS and make is regfused.SGD and isinstance(value, torch.Tensor):
            continue  # the value of a tensor on a device is read there, unchecked
        # The same written into a live group.
        for group in optimizer.param_groups:
            group[name] = value
        message = _error_of(optimizer.step)
        assert message is not None and message.startswith(f"SGD.step: {name} must "), message
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


@BOTH
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
    assert regfused.SGD.load_state_dict.__doc__
