"""elastic_net, param_groups and sparsity."""

import pytest
import torch
from torch import nn

import regfused


def test_elastic_net():
    assert regfused.elastic_net(0.5, 0.25) == {"l1": 0.125, "l2": 0.375}
    assert regfused.elastic_net(0.5, 1) == {"l1": 0.5, "l2": 0.0}
    assert regfused.elastic_net(0.5, 0) == {"l1": 0.0, "l2": 0.5}


@pytest.mark.parametrize("strength, alpha, message", [
    (-1, 0.5, "strength must be finite and >= 0, but got -1"),
    (float("nan"), 0.5, "strength must be finite and >= 0, but got nan"),
    (1, -0.1, r"alpha must be in \[0, 1\], but got -0.1"),
    (1, 1.1, r"alpha must be in \[0, 1\], but got 1.1"),
    (1, float("nan"), r"alpha must be in \[0, 1\], but got nan"),
])  # fmt: skip
def test_elastic_net_errors(strength, alpha, message):
    with pytest.raises(ValueError, match=message):
        regfused.elastic_net(strength, alpha)


class MyRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))


def test_param_groups():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        MyRMSNorm(),
        nn.Embedding(5, 4),
        nn.GRU(4, 4),
    )
    model[2].weight.requires_grad_(False)
    groups = regfused.param_groups(model, l1=0.1, l2=0.2, weight_decay=0.3, skip=["5.*"], lr=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    first, second = ([names[id(p)] for p in g["params"]] for g in groups)
    assert first == ["0.weight", "6.weight_ih_l0", "6.weight_hh_l0"]
    assert second == [
        "0.bias", "1.weight", "1.bias", "2.bias", "3.weight", "3.bias", "4.gain", "5.weight",
        "6.bias_ih_l0", "6.bias_hh_l0"
    ]  # fmt: skip
    assert (groups[0]["group_l1"], groups[1]["group_l1"]) == (0.0, 0.0)
    assert (groups[0]["l1"], groups[0]["l2"], groups[0]["weight_decay"], groups[0]["lr"]) == (0.1, 0.2, 0.3, 0.5)
    assert (groups[1]["l1"], groups[1]["l2"], groups[1]["weight_decay"], groups[1]["lr"]) == (0.0, 0.0, 0.0, 0.5)
    regfused.SGD(groups, lr=0.1)


def test_param_groups_skip_must_fit():
    with pytest.raises(ValueError, match=r"every pattern in skip must fit a parameter, but \['head.\*'\] fit none"):
        regfused.param_groups(nn.Linear(2, 2), l1=0.1, skip=["head.*"])


def test_sparsity():
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight[0] = 0.0
        model.weight[1, 0] = -0.0
    report = regfused.sparsity(model)
    assert (report.zeros, report.numel, report.fraction) == (5, 15, 5 / 15)
    assert [(p.name, p.shape, p.zeros) for p in report.parameters] == [("weight", (3, 4), 5), ("bias", (3,), 0)]
    assert str(report).splitlines() == [
        "parameter  shape  zeros  elements   share  zero groups  groups",
        "weight     3x4        5        12  41.67%            1       3",
        "bias       3          0         3   0.00%            0       3",
        "all                   5        15  33.33%            1       6",
    ]
    assert regfused.sparsity([]).fraction == 0.0
    assert regfused.sparsity(torch.zeros(3)).fraction == 1.0
    assert regfused.sparsity(model.named_parameters()).parameters == report.parameters
    columns = regfused.sparsity(model, group_dim=1)
    assert [(p.zero_groups, p.groups) for p in columns.parameters] == [(0, 4), (0, 0)]  # a bias has no columns
    assert (columns.zero_groups, columns.groups, columns.zeros) == (0, 4, 5)
    last = regfused.sparsity(model, group_dim=-1)
    assert [(p.zero_groups, p.groups) for p in last.parameters] == [(0, 4), (0, 3)]
    filters = torch.ones(4, 3, 2, 2)
    filters[[0, 2]] = 0.0
    filters[:, 1] = -0.0
    for layout in (torch.contiguous_format, torch.channels_last):
        tensors = [filters.to(memory_format=layout)]
        counts = [regfused.sparsity(tensors, group_dim=d) for d in range(4)]
        assert [(c.zero_groups, c.groups) for c in counts] == [(2, 4), (1, 3), (0, 2), (0, 2)]
    edges = regfused.sparsity([torch.zeros(()), torch.ones(()), torch.zeros(0, 3), torch.zeros(3, 0)])
    assert [(p.zero_groups, p.groups) for p in edges.parameters] == [(1, 1), (0, 1), (0, 0), (0, 0)]
    with pytest.raises(ValueError, match=r"sparsity: group_dim must be an int, but got 0.5 \(float\)"):
        regfused.sparsity(model, group_dim=0.5)
    with pytest.raises(TypeError, match="expected tensors, but item 0 is a float"):
        regfused.sparsity([1.0])
