"""Checkpoints through torch.distributed.checkpoint, nested and flat, of this optimizer and of torch's."""

import copy

import pytest
import torch
from step_cases import BOTH
from torch import nn

import regfused

state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")

OURS = {"momentum": 0.5, "l1": 0.01, "max_norm": 2.0, "nonfinite": "skip"}
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


def groups(model, **first):
    return [{"params": list(model[0].parameters()), **first}, {"params": list(model[1].parameters())}]


def assert_loaded(model, optimizer, saved_model, saved, kept):
    for p, q in zip(model.parameters(), saved_model.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], saved.state[q]["momentum_buffer"])
    for group, other, options in zip(optimizer.param_groups, saved.param_groups, kept, strict=True):
        for name in group:
            if name != "params":
                assert group[name] == other.get(name, options.get(name)), name


@BOTH
@FORMS
def test_round_trip(make, form):
    saved_model, saved = trained(make, momentum=0.9, l1=0.3, l2=0.1, max_norm=1.0, nonfinite="error", group_dim=-1)
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model), lr=0.7, **OURS)
    state_dict.set_optimizer_state_dict(model, optimizer, copy.deepcopy(checkpoint), options=form)
    assert_loaded(model, optimizer, saved_model, saved, [{}, {}])


@BOTH
@FORMS
def test_to_torchs(make, form):
    saved_model, saved = trained(make, momentum=0.9, l1=0.3)
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(groups(model), lr=0.7)
    state_dict.set_optimizer_state_dict(model, optimizer, checkpoint, options=form)
    for group, other in zip(optimizer.param_groups, saved.param_groups, strict=True):
        assert (group["lr"], group["momentum"]) == (other["lr"], 0.9)


@BOTH
@FORMS
def test_from_torchs(make, form):
    """torch asks a flat one for every option that the optimizer has: those that are not in it are put there before."""
    saved_model, saved = trained(torch.optim.SGD, momentum=0.9)
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=form)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(groups(model, l1=0.2), lr=0.7, **OURS)
    kept = [dict(group) for group in optimizer.param_groups]
    weights = copy.deepcopy(list(model.parameters()))
    if form is FLAT:
        checkpoint = {**state_dict.get_optimizer_state_dict(model, optimizer, options=form), **checkpoint}
    state_dict.set_optimizer_state_dict(model, optimizer, checkpoint, options=form)
    assert_loaded(model, optimizer, saved_model, saved, kept)
    assert [group["l1"] for group in optimizer.param_groups] == [0.2, 0.01]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


@pytest.mark.cpu
@pytest.mark.filterwarnings("ignore:torch.distributed is (unavailable|disabled|not available):UserWarning")
def test_from_torchs_through_files(tmp_path):
    import torch.distributed.checkpoint as dcp

    saved_model, saved = trained(torch.optim.SGD, momentum=0.9)
    checkpoint = state_dict.get_optimizer_state_dict(saved_model, saved, options=FLAT)
    dcp.save({"optimizer": checkpoint}, checkpoint_id=tmp_path, no_dist=True)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = regfused.SGD(groups(model), lr=0.7, **OURS)
    kept = [dict(group) for group in optimizer.param_groups]
    here = {"optimizer": state_dict.get_optimizer_state_dict(model, optimizer, options=FLAT)}
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(here, checkpoint_id=tmp_path, planner=planner, no_dist=True)
    state_dict.set_optimizer_state_dict(model, optimizer, here["optimizer"], options=FLAT)
    assert_loaded(model, optimizer, saved_model, saved, kept)
