"""Checkpoints through torch.distributed.checkpoint, nested and flat, of this optimizer and of torch's."""

import copy

import pytest
import torch
from step_cases import EVERY_OPTIMIZER, KERNELS, is_adam, torch_twin, with_state
from torch import nn

state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")

OURS = {"l1": 0.01, "max_norm": 2.0, "nonfinite": "skip"}
FLAT = state_dict.StateDictOptions(flatten_optimizer_state_dict=True)
NESTED = state_dict.StateDictOptions()
FORMS = pytest.mark.parametrize("form", (FLAT, NESTED), ids=("flat", "nested"))


def trained(make, **options):
    """A model and its optimizer after a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model, lr=0.05), lr=0.1, **options)
    model(torch.ones(5, 3)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def of_the_rule(make):
    """Other values of options that torch's class has, too; of a flat checkpoint torch loads slots that are here."""
    return {"betas": (0.5, 0.75), "eps": 0.5, "amsgrad": True} if is_adam(make) else {"momentum": 0.5}


def groups(model, **first):
    return [{"params": list(model[0].parameters()), **first}, {"params": list(model[1].parameters())}]


def assert_loaded(model, optimizer, saved_model, saved, kept):
    for p, q in zip(model.parameters(), saved_model.parameters(), strict=True):
        assert optimizer.state[p].keys() == saved.state[q].keys()
        assert all(torch.equal(optimizer.state[p][name], x) for name, x in saved.state[q].items())
    for group, other, options in zip(optimizer.param_groups, saved.param_groups, kept, strict=True):
        for name in group:
            if name != "params":
                assert group[name] == other.get(name, options.get(name)), name


@EVERY_OPTIMIZER
@FORMS
def test_round_trip(make, form):
    saved_model, saved = trained(
        make, l1=0.3, l2=0.1, max_norm=1.0, nonfinite="error", group_dim=-1, **with_state(make)
    )
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model), lr=0.7, **OURS, **of_the_rule(make))
    state_dict.set_optimizer_state_dict(model, optimizer, copy.deepcopy(checkpoint), options=form)
    assert_loaded(model, optimizer, saved_model, saved, [{}, {}])


@EVERY_OPTIMIZER
@FORMS
def test_to_torchs(make, form):
    saved_model, saved = trained(make, l1=0.3, **with_state(make))
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch_twin(make)(groups(model), lr=0.7, **of_the_rule(make))
    state_dict.set_optimizer_state_dict(model, optimizer, checkpoint, options=form)
    for group, other in zip(optimizer.param_groups, saved.param_groups, strict=True):
        assert all(group[name] == other[name] for name in group if name != "params")
    for p, q in zip(model.parameters(), saved_model.parameters(), strict=True):
        assert all(torch.equal(optimizer.state[p][name], x) for name, x in saved.state[q].items())


@EVERY_OPTIMIZER
@FORMS
def test_from_torchs(make, form):
    """torch asks a flat one for every option that the optimizer has: those that are not in it are put there before."""
    saved_model, saved = trained(torch_twin(make), **with_state(make))
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model, l1=0.2), lr=0.7, **OURS, **of_the_rule(make))
    kept = [dict(group) for group in optimizer.param_groups]
    weights = copy.deepcopy(list(model.parameters()))
    if form is FLAT:
        checkpoint = {**state_dict.get_optimizer_state_dict(model, optimizer, options=form), **checkpoint}
    state_dict.set_optimizer_state_dict(model, optimizer, checkpoint, options=form)
    assert_loaded(model, optimizer, saved_model, saved, kept)
    assert [group["l1"] for group in optimizer.param_groups] == [0.2, 0.01]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


@KERNELS
@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:torch.distributed is (unavailable|disabled|not available):UserWarning")
def test_from_torchs_through_files(make, tmp_path):
    import torch.distributed.checkpoint as dcp

    saved_model, saved = trained(torch_twin(make), **with_state(make))
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=FLAT)
    dcp.save({"optimizer": checkpoint}, checkpoint_id=tmp_path, no_dist=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model), lr=0.7, **OURS, **of_the_rule(make))
    kept = [dict(group) for group in optimizer.param_groups]
    here = {"optimizer": state_dict.get_optimizer_state_dict(model, optimizer, options=FLAT)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(here, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    state_dict.set_optimizer_state_dict(model, optimizer, here["optimizer"], options=FLAT)
    assert_loaded(model, optimizer, saved_model, saved, kept)
