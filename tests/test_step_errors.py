"""Bad input: an error that names operation, demand and value, and nothing has changed."""

import copy
import re
import warnings

import pytest
import torch
from bad_options import NEW_OF_ADAM, NEW_OF_SGD, OPTIONS, OPTIONS_OF_ADAM, OPTIONS_OF_SGD
from step_cases import (
    DEVICE,
    EVERY_OPTIMIZER,
    KERNELS,
    OPTIMIZERS,
    give_grads,
    is_adam,
    make_params,
    slots_of,
    torch_twin,
    with_state,
)


def of_every_optimizer(shared, of_sgd, of_adam):
    """Cases of the tables for each optimizer."""
    return pytest.mark.parametrize(
        "make, options, message",
        [
            pytest.param(make, *case, id=f"{which}-{str(case[0])[:40]}")
            for which, make in OPTIMIZERS.items()
            for case in (*shared, *(of_adam if is_adam(make) else of_sgd))
        ],
    )


@of_every_optimizer(OPTIONS, [*OPTIONS_OF_SGD, *NEW_OF_SGD], [*OPTIONS_OF_ADAM, *NEW_OF_ADAM])
def test_options(make, options, message):
    params = make_params([3, 4])
    with pytest.raises(ValueError, match=message):
        make(params, **options)
    # The same in one group of an optimizer that exists.
    optimizer = make(params[:1], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **options})
    assert len(optimizer.param_groups) == 1


@of_every_optimizer([case for case in OPTIONS if len(case[0]) == 1], OPTIONS_OF_SGD, OPTIONS_OF_ADAM)
def test_options_written_into_a_group(make, options, message):
    params = make_params([3, 4])
    give_grads(params)
    optimizer = make([{"params": [p]} for p in params], lr=0.1, **with_state(make))
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.param_groups[1].update(options)
    for _ in range(2):  # the second step must complain as the first one
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    for p, q in zip(params, before[0], strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, q.grad if q.grad is not None else p.grad)
    for i, entry in optimizer.state_dict()["state"].items():
        assert entry.keys() == before[1][i].keys()
        assert all(torch.equal(x, before[1][i][name]) for name, x in entry.items())


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "values", [{"max_norm": 2.0}, {"max_norm": None}, {"norm_type": 1.0}, {"nonfinite": "skip"}], ids=str
)
def test_options_that_must_agree_between_groups(make, values):
    params = make_params([3, 4])
    give_grads(params)
    name = next(iter(values))
    with pytest.raises(ValueError, match=f"{name} must be the same in every parameter group"):
        make([{"params": params[:1]}, {"params": params[1:], **values}], lr=0.1, max_norm=1.0)
    optimizer = make([{"params": [p]} for p in params], lr=0.1, max_norm=1.0)
    optimizer.param_groups[1].update(values)
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=f"{name} must be the same in every parameter group"):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@EVERY_OPTIMIZER
def test_unknown_options(make):
    with pytest.raises(TypeError, match="l3"):
        make(make_params([3]), lr=0.1, l3=0.1)
    with pytest.raises(TypeError, match="weightdecay"):
        make(make_params([3]), lr=0.1, weightdecay=0.1)


MISSPELT = {"weightdecay": "weight_decay", "weight_decy": "weight_decay", "max_nrom": "max_norm", "LR": "lr"}
MISSPELT_OF_SGD = {"momentun": "momentum", "nestrov": "nesterov"}
MISSPELT_OF_ADAM = {"beta": "betas", "amsgrd": "amsgrad"}


@pytest.mark.parametrize(
    "make, name, meant",
    [
        pytest.param(make, name, meant, id=f"{which}-{name}")
        for which, make in OPTIMIZERS.items()
        for name, meant in {**MISSPELT, **(MISSPELT_OF_ADAM if is_adam(make) else MISSPELT_OF_SGD)}.items()
    ],
)
def test_misspelt_options_in_a_group_are_warned_of_where_they_are_written(make, name, meant):
    message = f"{name!r} is not an option and does nothing; did you mean {meant!r}?"
    params = make_params([3, 4])
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        optimizer = make([{"params": params[:1], name: 0.1}], lr=0.1)
    with pytest.warns(UserWarning, match=re.escape(message)) as caught_later:
        optimizer.add_param_group({"params": params[1:], name: 0.1})
    for warning in (*caught, *caught_later):
        assert warning.filename == __file__
    assert (len(caught), len(caught_later)) == (1, 1)
    give_grads(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        copy.deepcopy(optimizer).step()
        with pytest.raises(UserWarning):
            optimizer.add_param_group({"params": make_params([5]), name: 0.1})
    assert len(optimizer.param_groups) == 2


NOTES = (
    *("use_weight_decay", "no_weight_decay", "min_weight_decay", "weight_decay_mult", "weight_decay_", "group_lr"),
    *("initial_lr", "max_lr", "swa_lr", "lr_scale", "base_momentum", "max_momentum", "l1_ratio", "nesterov_", "name"),
    *("trust_coefficient", "schedule", 7),
)
# Options of another rule.
NOTES_FOR_SGD = ("betas", "eps", "amsgrad", "capturable", "decoupled_proximal")
NOTES_FOR_ADAM = ("momentum", "dampening", "nesterov", "classical_momentum")


@EVERY_OPTIMIZER
def test_notes_of_others_in_a_group(make):
    notes = dict.fromkeys((*NOTES, *(NOTES_FOR_ADAM if is_adam(make) else NOTES_FOR_SGD)), 0.5)
    params = make_params([3])
    give_grads(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make([{"params": params, **notes}], lr=0.1)
        optimizer.param_groups[0]["no_weight_decays"] = True  # written later, and close to an option
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        other = make(make_params([3]), lr=0.1)
        other.load_state_dict(saved)
        optimizer.load_state_dict(saved)
    for group in (optimizer.param_groups[0], other.param_groups[0]):
        assert {name: group[name] for name in notes} == notes and group["no_weight_decays"] is True


# What torch says of the same mistake: programs look for it.
TORCHS_WORDS = [
    {"lr": -0.1},
    {"lr": torch.tensor([0.1, 0.2])},
    {"weight_decay": -1e-4},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
]
TORCHS_WORDS_OF_SGD = [
    {"momentum": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
]
TORCHS_WORDS_OF_ADAM = [
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.5)},
    {"betas": (torch.tensor(0.9), 0.5)},
    {"betas": (torch.tensor(0.9), torch.tensor(0.9)), "foreach": True},
    {"eps": -1e-8},
    {"lr": torch.tensor(0.1), "foreach": True},
]


@pytest.mark.parametrize(
    "make, options",
    [
        pytest.param(make, options, id=f"{which}-{options}")
        for which, make in OPTIMIZERS.items()
        for options in (*TORCHS_WORDS, *(TORCHS_WORDS_OF_ADAM if is_adam(make) else TORCHS_WORDS_OF_SGD))
    ],
)
def test_messages_have_torchs_words(make, options):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        torch_twin(make)(make_params([3]), **options)
    with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
        make(make_params([3]), **options)
    if theirs.type is ValueError:
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            make([{"params": make_params([3]), **options}])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("sizes", ([[3], [4]], [[3, 4]]), ids=("groups", "parameters"))
def test_checkpoints_that_do_not_fit_have_torchs_words(make, sizes):
    theirs, ours = (cls([{"params": make_params([3])}], lr=0.1) for cls in (torch_twin(make), make))
    saved = make([{"params": make_params(group)} for group in sizes], lr=0.1).state_dict()
    with pytest.raises(ValueError) as error:
        theirs.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match=re.escape(str(error.value))):
        ours.load_state_dict(saved)


@EVERY_OPTIMIZER
def test_a_group_that_lost_an_option(make):
    params = make_params([3])
    give_grads(params)
    optimizer = make(params, lr=0.1)
    del optimizer.param_groups[0]["l1"]
    with pytest.raises(ValueError, match="a parameter group must have 'l1'"):
        optimizer.step()


@EVERY_OPTIMIZER
@pytest.mark.parametrize(
    "tensor, message",
    [
        (torch.zeros(3, dtype=torch.int64), "parameters must be floating point or complex, but got torch.int64"),
        (torch.zeros(3, dtype=torch.bool), "parameters must be floating point or complex, but got torch.bool"),
        (torch.nested.nested_tensor([torch.zeros(3)]), "parameters must be single tensors, but got a nested tensor"),
    ],
    ids=("integer", "bool", "nested"),
)
def test_parameters(make, tensor, message):
    with pytest.raises(ValueError, match=message):
        make([tensor], lr=0.1)
    with pytest.raises(ValueError, match=message):
        make([("weight", tensor)], lr=0.1)
    with pytest.raises(ValueError, match=message):
        make([{"params": tensor}], lr=0.1)
    with pytest.raises(ValueError, match=message):
        make([{"params": (t for t in [tensor])}], lr=0.1)


@EVERY_OPTIMIZER
def test_torchs_own_complaints(make):
    with pytest.raises(ValueError, match="empty parameter list"):
        make([], lr=0.1)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        make(["weight"], lr=0.1)
    with pytest.raises(ValueError, match="non-leaf"):
        make([torch.ones(3, requires_grad=True) * 2], lr=0.1)
    with pytest.raises(RuntimeError, match="`fused` and `foreach` cannot be `True` together"):
        make(make_params([3]), fused=True, foreach=True)
    with pytest.raises(RuntimeError, match="`fused` does not support `differentiable`"):
        make(make_params([3]), fused=True, differentiable=True)


@KERNELS
@pytest.mark.parametrize("dtype", (torch.complex64, torch.float8_e5m2), ids=str)
def test_fused_true_demands_what_the_kernels_take(make, dtype):
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float32).to(dtype), requires_grad=False)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors of supp"):
        make([p], lr=0.1, fused=True)
    with pytest.raises(
        RuntimeError, match=f"^{make.__name__}: fused=True demands dense float32.*parameter 0 .*{dtype}"
    ):
        make([p], lr=0.1, fused=True)
    strided = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    strided.grad = torch.ones(6, 4)
    with pytest.raises(RuntimeError, match="fused=True demands dense.*parameter 0 of group 0 is not dense in memory"):
        make([strided], lr=0.1, fused=True).step()
    q = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="fused=True demands norm_type 1, 2 or inf, but got 3"):
        optimizer = make([q], lr=0.1, fused=True, max_norm=1.0, norm_type=3.0)
        q.grad = torch.ones(3)
        optimizer.step()


@KERNELS
@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"l1": 0.1}, {"l2": 0.1}, {"max_norm": 1.0}, {"weight_decay": 0.1}, {"nonfinite": "skip"}],
    ids=str,
)
def test_sparse_gradients(make, options):
    dense, embedding = torch.nn.Parameter(torch.ones(5)), torch.nn.Embedding(10, 3, sparse=True)
    optimizer = make([dense, embedding.weight], lr=0.1, **with_state(make), **options)
    dense.grad = torch.ones(5)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"{make.__name__}\.step: .*(demand|must be).*(dense|Sparse)"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(5)) and torch.equal(embedding.weight, before) and not optimizer.state


@pytest.mark.parametrize(
    "make, name",
    [pytest.param(make, name, id=f"{which}-{name}") for which, make in OPTIMIZERS.items() for name in slots_of(make)],
)
@pytest.mark.parametrize(
    "slot, message",
    [
        (torch.zeros(3), r"must have shape \(4,\), but has \(3,\)"),
        (torch.zeros(4, dtype=torch.int64), "must be real floating point, as dtype torch.float32 is, but has dtype"),
        (torch.zeros(4, dtype=torch.complex64), "must be real floating point, as dtype torch.float32 is, but has"),
        (torch.zeros(4).to_sparse(), "must have layout torch.strided, but has torch.sparse_coo"),
        (torch.zeros(4, device="meta"), f"must have device {DEVICE}(:0)?, but has meta"),
        ([0.0] * 4, "must be a tensor, but got list"),
        ("zeros", "must be a tensor, but got str"),
    ],
    ids=("shape", "integer", "complex", "layout", "device", "list", "str"),
)
def test_slots(make, name, slot, message):
    params = make_params([4, 4])
    optimizer = make(params, lr=0.1, l1=0.1, **with_state(make))
    give_grads(params)
    optimizer.step()
    before = copy.deepcopy(params)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1][name] = slot
    kept = optimizer.state[params[1]][name].clone()
    message = f"{name} of parameter 1 of group 0 {message}"
    if not (isinstance(slot, torch.Tensor) and slot.is_meta):  # torch says what is wrong with that
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[params[1]][name], kept)
    optimizer.state[params[1]][name] = slot
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)


@EVERY_OPTIMIZER
def test_loaded_hyperparameters(make):
    params = make_params([4])
    optimizer = make(params, lr=0.1, l1=0.1, **with_state(make))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["l1"] = -3.0
    with pytest.raises(ValueError, match="load_state_dict: l1 must be finite and >= 0, but got -3.0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["l1"] == 0.1
    give_grads(params)
    optimizer.step()


@KERNELS
def test_a_parameter_whose_memory_is_gone(make):
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    optimizer = make([p], lr=0.1, fused=True)
    optimizer.step()
    p.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has no memory"):
        optimizer.step()


@KERNELS
@pytest.mark.cpu
def test_unknown_instruction_set(make, monkeypatch):
    monkeypatch.setenv("REGFUSED_ISA", "avx1024")
    params = make_params([3])
    give_grads(params)
    with pytest.raises(RuntimeError, match="REGFUSED_ISA must be one of plain.*on this machine, but is 'avx1024'"):
        make(params, lr=0.1).step()
