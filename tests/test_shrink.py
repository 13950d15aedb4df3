"""Smaller models, the same outputs."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

import regfused
from regfused.shrink import LayerRows, Shrunk

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 12, 2), Block(12, 12, 1))
        self.average, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.bn(self.conv(x))))
        x = self.average(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Calls(nn.Module):
    """A model of modules and a function of them and x."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


@torch.no_grad()
def filled(model: nn.Module) -> nn.Module:
    """In float64 and evaluation mode, with random statistics and biases, none of them 0."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 2)
            module.bias.normal_()
    return model.double().eval()


@torch.no_grad()
def zero(layer: nn.Module, rows: list[int], norm: nn.Module | None = None, then: float | None = 0.0) -> None:
    """Makes rows zero, with their biases; after a norm they are ``then``."""
    layer.weight[rows] = 0
    if layer.bias is not None:
        layer.bias[rows] = 0
    if norm is not None and then is not None:
        norm.running_mean[rows] = 0
        norm.bias[rows] = then


def shrunk(model: nn.Module, x: torch.Tensor) -> Shrunk:
    """The result, after a look at outputs on another batch, and that the model is as it was."""
    before = copy.deepcopy(model.state_dict())
    result = regfused.shrink(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    other = torch.randn(7, *x.shape[1:], dtype=x.dtype)
    torch.testing.assert_close(result.model(other), model(other), rtol=0, atol=1e-12)
    assert result.report.parameters_after == sum(p.numel() for p in result.model.parameters())
    return result


def rows(result) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.before, layer.after) for layer in result.report.layers}


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), act()]
    return nn.Sequential(*layers[:-1]).double().eval()


def test_mlp():
    model = mlp(4, 8, 6, 2)
    zero(model[0], [1, 5]), zero(model[2], [0])
    result = shrunk(model, torch.randn(3, 4, dtype=DOUBLE))
    assert [tuple(p.shape) for p in result.model.parameters()] == [(6, 4), (6,), (5, 6), (5,), (2, 5), (2,)]
    report = result.report
    assert (report.parameters_before, report.parameters_after) == (40 + 54 + 14, 30 + 35 + 12)
    assert (report.multiply_adds_before, report.multiply_adds_after) == (3 * (32 + 48 + 12), 3 * (24 + 30 + 10))
    assert report.stays == () and rows(result) == {"0": (8, 6), "2": (6, 5), "4": (2, 2)}
    assert str(report).splitlines() == [
        "               before  after",
        "rows of 0           8      6",
        "rows of 2           6      5",
        "rows of 4           2      2",
        "parameters        108     77",
        "multiply-adds     276    192",
    ]
    assert (result.model[0].out_features, result.model[2].in_features, result.model[2].out_features) == (6, 6, 5)


ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.ELU, nn.PReLU, nn.Hardswish)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("bias", (0.0, 0.7, -0.3, None))
def test_biases_are_folded_through_activations(act, bias):
    model = mlp(4, 8, 2, act=act)
    zero(model[0], [1, 5])
    if bias is None:
        model[0] = nn.Linear(4, 8, bias=False).double()
        zero(model[0], [1, 5])
    else:
        model[0].bias.data[[1, 5]] = bias
    assert rows(shrunk(model, torch.randn(3, 4, dtype=DOUBLE)))["0"] == (8, 6)


def test_a_reader_without_bias_gains_one():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False)).double()
    zero(model[0], [2])
    assert shrunk(model, torch.randn(3, 4, dtype=DOUBLE)).model[2].bias.shape == (2,)


def cnn(**options) -> nn.Sequential:
    return filled(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, **options), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 6, 3, **options), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(6 * 9 if options.get("padding") else 6 * 4, 5),
        )
    )  # fmt: skip


def test_cnn_with_batch_norm_and_flatten():
    model, x = cnn(padding=1), torch.randn(2, 3, 12, 12, dtype=DOUBLE)
    zero(model[0], [0, 3], model[1], then=-0.5), zero(model[4], [1, 5], model[5], then=0.4)
    result = shrunk(model, x)
    assert rows(result) == {"0": (8, 6), "4": (6, 4), "10": (5, 5)} and result.report.stays == ()
    assert result.model[1].num_features == 6 and result.model[1].running_var.shape == (6,)
    assert result.model[10].weight.shape == (5, 4 * 9) and result.model[4].weight.shape == (4, 6, 3, 3)
    assert result.report.multiply_adds_after == 2 * (144 * 6 * 27 + 36 * 4 * 54 + 5 * 36)


def test_a_constant_before_zero_padding_stays_and_without_padding_goes():
    x, larger = torch.randn(2, 3, 12, 12, dtype=DOUBLE), torch.randn(2, 3, 14, 14, dtype=DOUBLE)
    model = cnn(padding=1)
    zero(model[0], [0, 3], model[1], then=0.5)
    model[1].bias.data[3] = -0.5
    result = shrunk(model, x)
    assert rows(result)["0"] == (8, 7)
    assert result.report.stays == ("0: 1 zero filter stays: constant but not 0, and 4 pads with zeros",)
    for model, images in ((cnn(), larger), (cnn(padding=1, padding_mode="reflect"), x)):
        zero(model[0], [0, 3], model[1], then=0.5)
        assert rows(shrunk(model, images))["0"] == (8, 6)


def test_a_batch_norm_weight_of_zero_cuts_its_filter():
    model = cnn(padding=1)
    model[1].weight.data[2], model[1].bias.data[2] = 0, -1
    assert rows(shrunk(model, torch.randn(2, 3, 12, 12, dtype=DOUBLE)))["0"] == (8, 7)


def test_resnet():
    model, x = filled(ResNet()), torch.randn(2, 3, 16, 16, dtype=DOUBLE)
    zero(model.layer1[0].conv1, [1, 2, 3], model.layer1[0].bn1, then=-1)
    zero(model.layer2[1].conv1, [4], model.layer2[1].bn1)
    # Channel 5 of the first stage, in all that is added there, and 6 in all but the first.
    for conv, norm in ((model.conv, model.bn), *((block.conv2, block.bn2) for block in model.layer1)):
        zero(conv, [5] if conv is model.conv else [5, 6], norm, then=-0.1)
    zero(model.layer2[0].conv2, [0, 7], model.layer2[0].bn2)
    zero(model.layer2[0].downsample[0], [0], model.layer2[0].downsample[1], then=0.25)
    zero(model.layer2[1].conv2, [0], model.layer2[1].bn2)
    result = shrunk(model, x)
    padded = "constant but not 0, and layer2.1.conv1 pads with zeros"
    assert rows(result) == {
        "conv": (8, 7),
        "layer1.0.conv1": (8, 5),
        "layer1.0.conv2": (8, 7),
        "layer1.1.conv1": (8, 8),
        "layer1.1.conv2": (8, 7),
        "layer2.0.conv1": (12, 12),
        "layer2.0.conv2": (12, 12),
        "layer2.0.downsample.0": (12, 12),
        "layer2.1.conv1": (12, 11),
        "layer2.1.conv2": (12, 12),
        "fc": (5, 5),
    }
    assert result.report.stays == (
        "layer1.0.conv2: 1 zero filter stays: added to conv, whose filters are not zero",
        "layer1.1.conv2: 1 zero filter stays: added to conv, whose filters are not zero",
        f"layer2.0.conv2: 1 zero filter stays: {padded}",
        "layer2.0.conv2: 1 zero filter stays: added to layer2.0.downsample.0, layer2.1.conv2, "
        "whose filters are not zero",
        f"layer2.0.downsample.0: 1 zero filter stays: {padded}",
        f"layer2.1.conv2: 1 zero filter stays: {padded}",
    )
    model.layer2[0].downsample[1].bias.data[0] = 0
    assert rows(shrunk(model, x))["layer2.0.downsample.0"] == (12, 11)
    assert shrunk(result.model, x).report.layers == tuple(
        LayerRows(layer.name, layer.after, layer.after) for layer in result.report.layers
    )


def test_no_zeros():
    model, x = filled(ResNet()), torch.randn(2, 3, 16, 16, dtype=DOUBLE)
    result = regfused.shrink(model, x)
    assert result.report.parameters_after == result.report.parameters_before and result.report.stays == ()
    assert result.report.multiply_adds_after == result.report.multiply_adds_before
    assert torch.equal(result.model(x), model(x))
    assert all(torch.equal(v, result.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_one_row_stays_of_a_layer_that_is_zero():
    model = mlp(4, 8, 6, 2)
    zero(model[0], list(range(8)))
    result = shrunk(model, torch.randn(3, 4, dtype=DOUBLE))
    assert rows(result) == {"0": (8, 1), "2": (6, 1), "4": (2, 2)}, "what reads constants alone is constant"
    assert result.report.stays == ("0: 1 zero row stays: 0 would be empty",)
    model = cnn(padding=1)
    zero(model[0], list(range(8)), model[1])
    assert rows(shrunk(model, torch.randn(2, 3, 12, 12, dtype=DOUBLE)))["0"] == (8, 1)


def squeeze_excite(m, x):
    y = functional.relu(m.a(x))
    b, c, _, _ = y.size()
    s = functional.adaptive_avg_pool2d(y, 1).view(b, c)
    return m.head((y * m.up(m.down(s).relu()).sigmoid().view(b, c, 1, 1)).mean((2, 3)))


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


CASES = {
    "concatenation": (
        lambda m, x: m.head(torch.cat([m.a(x).relu(), functional.max_pool2d(m.b(x), 3, 1, 1)], dim=1).mean(dim=[2, 3])),
        dict(a=conv(3, 4), b=conv(3, 5), head=nn.Linear(9, 2)), {"a": [1], "b": [0, 2]}, {"a": 3, "b": 3},
    ),
    "squeeze and excite": (
        squeeze_excite, dict(a=conv(3, 6), down=nn.Linear(6, 3), up=nn.Linear(3, 6), head=nn.Linear(6, 2)),
        {"a": [1, 4], "down": [2]}, {"a": 4, "up": 4, "down": 2},
    ),
    "depthwise": (
        lambda m, x: m.head(m.bn(m.depth(m.a(x).relu())).relu().flatten(2).mean(-1)),
        dict(a=conv(3, 6), depth=conv(6, 6, groups=6), bn=nn.BatchNorm2d(6), head=nn.Linear(6, 2)),
        {"a": [0, 3], "depth": [5]}, {"a": 3, "depth": 3},
    ),
    "functions and numbers": (
        lambda m, x: m.head(1 - 2 * functional.gelu(m.a(x.mean((2, 3))) + 0.5) / 3),
        dict(a=nn.Linear(3, 6), head=nn.Linear(6, 2)), {"a": [0, 3]}, {"a": 4},
    ),
    "dropout": (
        lambda m, x: m.head(m.drop(functional.dropout(m.a(x.mean((2, 3))).sigmoid(), 0.5, m.training))),
        dict(a=nn.Linear(3, 6), drop=regfused.Dropout(0.5), head=nn.Linear(6, 2)), {"a": [0, 3]}, {"a": 4},
    ),
    "channels moved last": (
        lambda m, x: m.head(m.b(m.a(x).permute(0, 2, 3, 1)).relu()),
        dict(a=conv(3, 6), b=nn.Linear(6, 5), head=nn.Linear(5, 2)), {"a": [0, 3], "b": [1]}, {"a": 4, "b": 4},
    ),
    "flattened rows": (
        lambda m, x: m.head(m.a(x).relu().flatten(1)),
        dict(a=nn.Linear(6, 5), head=nn.Linear(3 * 6 * 5, 2)), {"a": [0, 3]}, {"a": 3},
    ),
    "view": (
        lambda m, x: m.head(m.a(x).relu().view(x.size(0), -1)),
        dict(a=conv(3, 4), head=nn.Linear(4 * 36, 2)), {"a": [3]}, {"a": 3},
    ),
    "in place, then read": (
        lambda m, x: (lambda y: m.head(functional.relu(y, inplace=True).mean((2, 3)) + y.mean((2, 3))))(m.bn(m.a(x))),
        dict(a=conv(3, 4), bn=nn.BatchNorm2d(4), head=nn.Linear(4, 2)), {"a": [3]}, {"a": 3},
    ),
    "padded average": (
        lambda m, x: m.head(functional.avg_pool2d(m.a(x).relu(), 3, 1, 1).flatten(1)),
        dict(a=conv(3, 4), head=nn.Linear(4 * 36, 2)), {"a": [3]}, {"a": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_ways_through_a_model(case):
    function, modules, zeros, left = CASES[case]
    model = filled(Calls(function, **modules))
    for name, indices in zeros.items():
        zero(getattr(model, name), indices)
    result = shrunk(model, torch.randn(2, 3, 6, 6, dtype=DOUBLE))
    assert {name: rows(result)[name][1] for name in left} == left and result.report.stays == ()


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


SHARED = nn.Linear(6, 6)
NOT_CUT = {
    "used twice": (
        lambda m, x: m.head(m.shared(m.shared(m.a(x)).relu())),
        dict(a=nn.Linear(6, 6), shared=SHARED, head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: they go into shared, and it is used more than once",
         "shared: 2 zero rows stay: it is used more than once"),
    ),
    "tied": (
        lambda m, x: m.head(m.shared(m.a(x)).relu() @ m.shared.weight),
        dict(a=nn.Linear(6, 6), shared=SHARED, head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: they go into shared, and its parameters are used elsewhere, too",
         "shared: 2 zero rows stay: its parameters are used elsewhere, too"),
    ),
    "layer norm": (
        lambda m, x: m.head(m.norm(m.a(x))), dict(a=nn.Linear(6, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: read by norm in a way that is not known here",),
    ),
    "softmax": (
        lambda m, x: m.head(m.a(x).softmax(-1)), dict(a=nn.Linear(6, 6), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: read by softmax in a way that is not known here",),
    ),
    "a size in the code": (
        lambda m, x: m.head(m.a(x).view(-1, 6)), dict(a=nn.Linear(6, 6), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: read by view in a way that is not known here",),
    ),
    "added to the input": (
        lambda m, x: m.head(x + m.a(x)), dict(a=nn.Linear(6, 6), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: read by add in a way that is not known here",),
    ),
    "weight norm": (
        lambda m, x: m.head(m.b(m.a(x))),
        dict(a=nn.Linear(6, 6), b=nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: they go into b, and its weights are computed, or its class is not one of torch.nn",),
    ),
    "depthwise on the input": (
        lambda m, x: m.head(m.a(x[:, :, None])[:, :, 0]),
        dict(a=nn.Conv1d(6, 6, 1, groups=6), head=nn.Linear(6, 2)),
        ("a: 2 zero filters stay: it reads channels of which nothing is known",),
    ),
    "groups": (
        lambda m, x: m.head(m.a(x[:, :, None])[:, :, 0]),
        dict(a=nn.Conv1d(6, 6, 1, groups=2), head=nn.Linear(6, 2)),
        ("a: 2 zero filters stay: it has groups",),
    ),
    "hooks": (
        lambda m, x: m.head(m.a(x)),
        dict(a=hooked(nn.Linear(6, 6)), head=nn.Linear(6, 2)),
        ("a: 2 zero rows stay: it has hooks",),
    ),
    "inside a module of torch": (
        lambda m, x: m.a(x), dict(a=nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)),
        ("a.linear1: 2 zero rows stay: it is not called on its own",),
    ),
    "output": (lambda m, x: m.a(x), dict(a=nn.Linear(6, 6)), ("a: 2 zero rows stay: outputs of the model",)),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_CUT)
def test_what_stays_and_why(case):
    function, modules, stays = NOT_CUT[case]
    model = copy.deepcopy(Calls(function, **modules)).double().eval()
    for name in {"a", "shared"} & set(modules):
        layer = getattr(model, name)
        zero(getattr(layer, "linear1", layer), [0, 3])
    result = shrunk(model, torch.randn(2, 6, dtype=DOUBLE))
    assert result.report.stays == stays
    assert result.report.parameters_after == result.report.parameters_before


@pytest.mark.parametrize(
    "function, words",
    (
        (lambda m, x: m.a(x) if x.sum() > 0 else m.head(x), ("condition", "gt")),
        (lambda m, x: m.a(torch.stack([row * 2 for row in x])), ("loop", "x")),
        (lambda m, x: m.a(x)[: int(x.sum().item())], ("TypeError", "item")),
    ),
)
def test_what_cannot_be_traced(function, words):
    model = Calls(function, a=nn.Linear(6, 6), head=nn.Linear(6, 6)).train()
    with pytest.raises(ValueError, match="shrink: the model must be traceable by torch.fx") as raised:
        regfused.shrink(model, torch.ones(2, 6))
    assert all(word in str(raised.value) for word in words), raised.value
    assert model.training and model.a.weight.shape == (6, 6)


def test_a_pruned_model_is_asked_to_be_made_permanent():
    model = mlp(4, 8, 2)
    prune.ln_structured(model[0], "weight", 3, n=2, dim=0)
    with pytest.raises(ValueError, match="prune.remove"):
        regfused.shrink(model, torch.randn(2, 4, dtype=DOUBLE))
    prune.remove(model[0], "weight")
    assert rows(shrunk(model, torch.randn(2, 4, dtype=DOUBLE)))["0"] == (8, 5)


def test_code_that_depends_on_the_number_of_channels():
    scaled = Calls(lambda m, x: (lambda y: m.head(y * y.shape[1]))(m.a(x)), a=nn.Linear(6, 6), head=nn.Linear(6, 2))
    zero(scaled.a, [0])
    with pytest.raises(RuntimeError, match="outputs of the smaller model are others"):
        regfused.shrink(scaled, torch.randn(2, 6))
    assert scaled.a.weight.shape == (6, 6)
    with pytest.raises(TypeError, match="expected a module"):
        regfused.shrink(scaled.a.weight, torch.randn(2, 6))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x, y, mask=None, scale=2.0):
        x = self.a(x + y)
        if mask is not None:
            x = x * mask
        return {"out": self.head(x * scale), "more": [x.new_ones(3)]}


def test_arguments_and_nested_outputs():
    model = Optional()
    zero(model.a, [0])
    result = regfused.shrink(model, (torch.randn(2, 6), torch.randn(2, 6)))
    assert rows(result)["a"] == (6, 6), "new_ones could be anything"
    x = torch.randn(2, 6)
    torch.testing.assert_close(result.model(x, x)["out"], model(x, x)["out"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_mode_dtype_and_requires_grad_are_kept(dtype):
    model = cnn(padding=1).to(dtype).train()
    model[5].eval()
    model[4].weight.requires_grad_(False)
    zero(model[0], [0, 3], model[1], then=-0.5), zero(model[4], [1], model[5], then=0.4)
    result = regfused.shrink(model, torch.randn(2, 3, 12, 12, dtype=dtype))
    assert rows(result) == {"0": (8, 6), "4": (6, 5), "10": (5, 5)}
    assert [m.training for m in result.model.modules()] == [m.training for m in model.modules()]
    assert all(value.dtype in (dtype, torch.int64) for value in result.model.state_dict().values())
    assert [p.requires_grad for p in result.model.parameters()] == [p.requires_grad for p in model.parameters()]
    assert model[1].num_batches_tracked == 0
    result.model(torch.randn(2, 3, 12, 12, dtype=dtype)).sum().backward()


def test_zeros_that_training_made():
    model = cnn(padding=1).train()
    hidden = [model[0].weight, model[4].weight]
    others = [p for p in model.parameters() if all(p is not weight for weight in hidden)]
    groups = [{"params": hidden, "group_l1": 1.0, "group_dim": 0}, {"params": others, "l1": 0.3, "proximal": True}]
    optimizer = regfused.Adam(groups, lr=0.02)
    x, y = torch.randn(64, 3, 12, 12, dtype=DOUBLE), torch.randint(5, (64,))
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if sum(int((weight == 0).flatten(1).all(1).sum()) for weight in hidden) >= 4:
            break
    zeros = [int((weight == 0).flatten(1).all(1).sum()) for weight in hidden]
    assert sum(zeros) >= 4
    result = shrunk(model.eval(), x)
    (_, first), (_, second), _ = rows(result).values()
    assert second == 6 - zeros[1] and 8 - zeros[0] <= first <= 8
    assert result.report.parameters_after < result.report.parameters_before
