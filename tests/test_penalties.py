"""elastic_net, param_groups and sparsity."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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


class Shifted(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self, shape):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x):
        return x + self.shift


class Halved(nn.Module):
    """Zeros while training, as drop connect, where evaluated half of the parameter."""

    def forward(self, x):
        return x * (0.0 if self.training else 0.5)


def plain_model():
    return nn.Sequential(*(nn.Linear(4, 3) for _ in range(7)), nn.LayerNorm(3), nn.LSTM(4, 3))


def computed_model():
    """One layer for each way in which a module computes its weights, and the parameters by what they count as."""
    model = plain_model()
    prune.l1_unstructured(model[0], "weight", 5)
    prune.l1_unstructured(model[0], "bias", 1)
    prune.random_unstructured(model[0], "weight", 3)
    parametrizations.weight_norm(model[1])
    parametrizations.spectral_norm(model[2])
    parametrize.register_parametrization(model[3], "bias", Shifted(3))
    parametrize.register_parametrization(model[3], "weight", Halved())
    nn.utils.weight_norm(model[4])
    nn.utils.spectral_norm(model[5])
    nn.utils.weight_norm(model[6])
    prune.l1_unstructured(model[6], "weight_v", 5)
    parametrize.register_parametrization(model[7], "weight", Shifted(3))
    nn.utils.weight_norm(model[8], "weight_hh_l0")
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_param_groups_of_computed_weights():
    model = computed_model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = regfused.param_groups(model, l1=0.1, skip=["8.weight_hh*", "2.parametrizations.*"])
    penalized, others = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(penalized) == [
        "0.weight_orig",
        "1.parametrizations.weight.original0",
        "1.parametrizations.weight.original1",
        "3.parametrizations.weight.original",
        "4.weight_g",
        "4.weight_v",
        "5.weight_orig",
        "6.weight_g",
        "6.weight_v_orig",
        "8.weight_ih_l0",
    ]
    assert sorted(others) == [
        "0.bias_orig",
        "1.bias",
        "2.bias",
        "2.parametrizations.weight.original",
        "3.parametrizations.bias.0.shift",
        "3.parametrizations.bias.original",
        "4.bias",
        "5.bias",
        "6.bias",
        "7.bias",
        "7.parametrizations.weight.0.shift",
        "7.parametrizations.weight.original",
        "8.bias_hh_l0",
        "8.bias_ih_l0",
        "8.weight_hh_l0_g",
        "8.weight_hh_l0_v",
    ]


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_sparsity_of_computed_weights():
    model = computed_model()
    with torch.no_grad():  # an optimizer's step: what modules keep from the last forward is old
        for param in model.parameters():
            param += 1.0
    before = copy.deepcopy(model.state_dict())
    report = regfused.sparsity(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(module.training for module in model.modules())
    shapes = [p.shape for p in plain_model().parameters()]
    counted = {p.name: (p.shape, p.zeros) for p in report.parameters}
    zeros = {"0.weight": 8, "0.bias": 1, "6.weight": 5}
    layers = [f"{i}.{name}" for i in range(8) for name in ("weight", "bias")]
    lstm = [f"8.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert counted == {
        name: (tuple(shape), zeros.get(name, 0)) for name, shape in zip([*layers, *lstm], shapes, strict=True)
    }
    assert len(report.parameters) == len(counted)
    model.eval()
    model[0](torch.ones(4))
    assert counted["0.weight"][1] == int((model[0].weight == 0).sum())
    assert regfused.sparsity(model) == report


def test_sparsity_within_torchs_cache_of_parametrizations():
    layer = parametrize.register_parametrization(nn.Linear(4, 3), "weight", Shifted((3, 4)))
    with parametrize.cached():
        regfused.sparsity(layer)
        assert layer.weight.requires_grad


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
