"""convert: an existing model with this dropout in it."""

import copy
import doctest
import importlib
import io

import pytest
import torch
from torch import nn

import regfused


class OwnDropout(nn.Dropout):
    def forward(self, input):
        return input * 2


class DropPath(nn.Module):
    def __init__(self, dropout):
        super().__init__()
        self.dropout = dropout


def model():
    shared = nn.Dropout(0.3)
    return nn.ModuleDict(
        {
            "block": nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.25, inplace=True), shared, shared),
            "encoder": nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1),
            "own": OwnDropout(0.5),
            "channels": nn.Dropout2d(0.5),
            "alpha": nn.AlphaDropout(0.5),
            "lstm": nn.LSTM(8, 8, num_layers=2, dropout=0.5),
            "plain_lstm": nn.LSTM(8, 8),
            "path": DropPath(0.1),
            "holds": DropPath(nn.Dropout(0.1)),
        }
    )


def kinds(module):
    return {name: type(m) for name, m in module.named_modules()}


LEFT = {
    "encoder.self_attn": "MultiheadAttention",
    "own": "OwnDropout",
    "channels": "Dropout2d",
    "alpha": "AlphaDropout",
    "lstm": "LSTM",
    "path": "DropPath",
}


def test_counts_and_says_what_it_left_alone():
    m = model()
    before = kinds(m)
    done = regfused.convert(m)
    # block: two objects; encoder: three; holds: one.
    assert done.count == 6 and done.left_alone == LEFT
    after = kinds(m)
    assert {name for name in after if after[name] is not before[name]} == {
        *("block.1", "block.2", "encoder.dropout", "encoder.dropout1", "encoder.dropout2", "holds.dropout")
    }
    assert regfused.convert(m) == regfused.Conversion(0, LEFT)
    assert regfused.convert(m, undo=True) == regfused.Conversion(6, LEFT)
    assert kinds(m) == before


def test_everything_of_a_module_is_kept():
    m = model()
    drop = m["block"][1]
    drop.eval()
    drop.note = "mine"
    calls = []
    drop.register_forward_hook(lambda module, args, output: calls.append(module))
    before = copy.copy(vars(drop))
    regfused.convert(m)
    assert m["block"][1] is drop and type(drop) is regfused.Dropout
    assert vars(drop) == before
    assert (drop.p, drop.inplace, drop.training, drop.note) == (0.25, True, False, "mine")
    x = torch.ones(8)
    assert drop(x) is x and calls == [drop]
    assert m["block"][2] is m["block"][3]


def test_it_drops_as_ours_and_undone_as_torchs():
    m = nn.Sequential(nn.Dropout(0.5))
    x = torch.ones(1000)

    def run(module):
        torch.manual_seed(3)
        return module(x)

    torchs = run(m)
    assert regfused.convert(m).count == 1
    assert torch.equal(run(m), run(regfused.Dropout(0.5))) and not torch.equal(run(m), torchs)
    regfused.convert(m, undo=True)
    assert torch.equal(run(m), torchs)


def test_a_single_dropout_is_a_model():
    m = nn.Dropout(0.5)
    assert regfused.convert(m) == regfused.Conversion(1, {}) and type(m) is regfused.Dropout


def test_checkpoints_and_copies_of_a_converted_model():
    m = model()
    state = m.state_dict()
    regfused.convert(m)
    assert list(m.state_dict()) == list(state)
    m.load_state_dict(state)
    assert kinds(copy.deepcopy(m)) == kinds(m)
    buffer = io.BytesIO()
    torch.save(m["block"], buffer)
    buffer.seek(0)
    assert kinds(torch.load(buffer, weights_only=False)) == kinds(m["block"])


def test_a_converted_model_is_traced_and_scripted():
    m = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    regfused.convert(m)
    traced = torch.fx.symbolic_trace(m)
    assert type(traced.get_submodule("1")) is regfused.Dropout
    scripted = torch.jit.script(m).eval()
    x = torch.randn(2, 4)
    assert torch.equal(scripted(x), m.eval()(x))
    assert regfused.convert(scripted) == regfused.Conversion(0, {"1": "Dropout"})


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13), reason="torch.compile did not look at classes"
)
def test_compiled_before_is_compiled_again():
    m = nn.Sequential(nn.Dropout(0.5))
    compiled = torch.compile(m, backend="eager")
    x = torch.ones(1000)

    def run(module):
        torch.manual_seed(3)
        return module(x)

    torchs = run(compiled)
    assert regfused.convert(compiled).count == 1
    assert torch.equal(run(compiled), run(m)) and not torch.equal(run(compiled), torchs)


def test_no_module():
    with pytest.raises(TypeError, match=r"convert: model must be a torch.nn.Module, but is \[\]"):
        regfused.convert([])


def test_example_in_the_docstring():
    # The package has a function of this name.
    loaded = importlib.import_module("regfused.convert")
    result = doctest.testmod(loaded, extraglobs={"regfused": regfused, "torch": torch})
    assert result.attempted > 0 and result.failed == 0
