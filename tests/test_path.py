"""Regularization paths: those of scikit-learn for linear models, the knee of a network's, and what is refused."""

import builtins
import math
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch

import regfused

linear_model = pytest.importorskip("sklearn.linear_model")
datasets = pytest.importorskip("sklearn.datasets")

N, FEATURES = 100, 16
OPTIMIZERS = {
    "SGD": (regfused.SGD, 0.3),
    "SGD, momentum": (partial(regfused.SGD, momentum=0.9), 0.1),
    "Adam": (regfused.Adam, 0.05),
}


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def numbers():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((N, FEATURES))
    inputs[:, 1::2] += 0.5 * inputs[:, ::2]  # correlated
    weights = np.where(np.arange(FEATURES) % 4 == 0, random.standard_normal(FEATURES) + 2, 0.0)
    return inputs, 3 + inputs @ weights + 0.5 * random.standard_normal(N)


@pytest.fixture
def data(numbers):
    return tuple(map(torch.from_numpy, numbers))


def squares(model, data):
    """scikit-learn's loss of its linear models."""
    inputs, targets = data
    return (model(inputs).reshape(targets.shape) - targets).square().sum() / (2 * len(inputs))


def linear(outputs=1, bias=True, inputs=FEATURES):
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64)


quiet = partial(regfused.path, progress=False)
exact = partial(quiet, steps=20_000, tolerance=1e-8)


def centred(numbers):
    inputs, targets = numbers
    return inputs - inputs.mean(0), targets - targets.mean(0)


def same_path(result, theirs):
    ours = result.coefficients["weight"].squeeze(1).numpy()
    assert all(result.converged)
    assert 0 < (theirs == 0).sum() < theirs.size, "the case must have zeros, and others"
    assert np.array_equal(ours == 0, theirs == 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert result.nonzeros == tuple((theirs != 0).reshape(len(theirs), -1).sum(1))


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_lasso_path(way, numbers, data):
    """With a bias, which is fitted and not penalized: scikit-learn's path of centred data."""
    optimizer, lr = OPTIMIZERS[way]
    result = exact(linear(), squares, data, count=8, ratio=1e-2, optimizer=optimizer, lr=lr)
    inputs, targets = centred(numbers)
    largest = np.abs(inputs.T @ targets).max() / N
    assert result.strengths[0] == pytest.approx(largest, rel=1e-6)
    np.testing.assert_allclose(result.strengths, result.strengths[0] * np.geomspace(1, 1e-2, 8))
    assert result.nonzeros[0] == 0 < result.nonzeros[1]
    _, theirs, _ = linear_model.lasso_path(inputs, targets, alphas=result.strengths, tol=1e-14, max_iter=100_000)
    same_path(result, theirs.T)
    assert result.groups == tuple(int(n > 0) for n in result.nonzeros)
    assert (result.size, result.group_count) == (FEATURES, 1)


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_enet_path(way, numbers, data):
    optimizer, lr = OPTIMIZERS[way]
    r = 0.6
    model = linear(bias=False)
    result = exact(model, squares, data, count=6, ratio=1e-2, alpha=2 * r / (1 + r), optimizer=optimizer, lr=lr)
    alphas = np.array(result.strengths) * 2 / (1 + r)
    assert result.nonzeros[0] == 0 < result.nonzeros[1]
    _, theirs, _ = linear_model.enet_path(*numbers, l1_ratio=r, alphas=alphas, tol=1e-14, max_iter=100_000)
    same_path(result, theirs.T)


def test_l2_that_stays(numbers, data):
    """A ridge of l2*sum(w^2) is the lasso of data with sqrt(2*l2*n) times the unit matrix below."""
    result = exact(linear(bias=False), squares, data, count=5, ratio=1e-2, l2=0.1, optimizer=regfused.SGD, lr=0.2)
    inputs, targets = numbers
    below = math.sqrt(2 * 0.1 * N) * np.eye(FEATURES)
    longer, padded = np.concatenate([inputs, below]), np.concatenate([targets, np.zeros(FEATURES)])
    # scikit-learn divides squares by the rows of the longer data.
    alphas = np.array(result.strengths) * N / len(longer)
    _, theirs, _ = linear_model.lasso_path(longer, padded, alphas=alphas, tol=1e-14, max_iter=100_000)
    same_path(result, theirs.T)


@pytest.mark.parametrize("way", ("SGD", "Adam"))
def test_multi_task_lasso(way, numbers):
    optimizer, lr = OPTIMIZERS[way]
    inputs, _ = numbers
    random = np.random.default_rng(1)
    true = random.standard_normal((FEATURES, 3)) * (np.arange(FEATURES) % 4 == 0)[:, None]
    targets = inputs @ true + 0.3 * random.standard_normal((N, 3))
    data = torch.from_numpy(inputs), torch.from_numpy(targets)
    model = linear(3, bias=False)
    options = dict(option="group_l1", group_dim=1, optimizer=optimizer, lr=lr)
    result = exact(model, squares, data, count=4, ratio=2e-2, **options)
    assert result.strengths[0] == pytest.approx(np.linalg.norm(inputs.T @ targets, axis=1).max() / N, rel=1e-6)
    theirs = [
        linear_model.MultiTaskLasso(alpha=alpha, fit_intercept=False, tol=1e-14, max_iter=100_000)
        .fit(inputs, targets)
        .coef_
        for alpha in result.strengths
    ]
    same_path(result, np.stack(theirs))
    assert result.groups == tuple((coef != 0).any(axis=0).sum() for coef in theirs)
    assert result.groups[0] == 0 < result.groups[1]
    assert result.group_count == FEATURES


def test_warm_start(data):
    """Each point begins where the last one ended: it sees that one's parameters first, and few steps are left to do."""
    seen = []

    def loss(model, data):
        if torch.is_grad_enabled():
            seen.append(model.weight.detach().clone())
        return squares(model, data)

    result = exact(linear(), loss, data, count=12, optimizer=regfused.SGD, lr=0.3)
    coefficients = result.coefficients["weight"]
    at = len(seen) - 1
    for i in reversed(range(1, 12)):
        at -= result.steps[i]
        assert torch.equal(seen[at], coefficients[i - 1])
        at -= 1
    last = result.strengths[-1]
    cold = exact(linear(), squares, data, strengths=[last], optimizer=regfused.SGD, lr=0.3)
    assert result.steps[-1] < cold.steps[-1]
    torch.testing.assert_close(cold.coefficients["weight"][0], coefficients[-1], rtol=0, atol=1e-7)


def test_batches(data):
    """A step is a pass over them; at rest the mean gradient of all batches fulfils the conditions."""
    inputs, targets = data
    batches = list(zip(inputs.split(50), targets.split(50), strict=True))
    options = dict(strengths=[1.0, 0.3, 0.1], optimizer=regfused.SGD, steps=1000)
    whole = quiet(linear(), squares, data, lr=0.1, tolerance=1e-6, **options)
    in_parts = quiet(linear(), squares, batches=batches, lr=0.02, tolerance=1e-3, **options)
    torch.testing.assert_close(in_parts.coefficients["weight"], whole.coefficients["weight"], rtol=0, atol=0.05)
    assert in_parts.losses == pytest.approx(whole.losses, rel=0.02)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=50, shuffle=True)
    assert len(quiet(linear(), squares, batches=loader, count=3, steps=5)) == 3


@pytest.fixture(scope="module")
def digits():
    inputs, targets = datasets.load_digits(return_X_y=True)
    inputs, targets = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(targets)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:300], order[300:900]
    return (inputs[train], targets[train]), (inputs[held_out], targets[held_out])


def entropy(model, data):
    return torch.nn.functional.cross_entropy(model(data[0]), data[1])


def test_knee_of_a_network(digits):
    train, (inputs, targets) = digits
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    before = [p.requires_grad for p in model.parameters()]
    result = quiet(
        model, entropy, train, count=12, steps=150, validation=lambda m: (m(inputs).argmax(1) == targets).float()
    )
    best, knee = result.best, result.one_standard_error
    assert result.nonzeros[0] <= 0.01 * result.size
    assert knee <= best
    assert result.scores[knee] >= result.scores[best] - result.standard_errors[best] > 0.8
    # With 16 seeds the knee had 9 to 44 % of the weights.
    assert result.nonzeros[knee] < 0.5 * result.size
    few = [score for score, n in zip(result.scores, result.nonzeros, strict=True) if n <= 0.25 * result.size]
    assert max(few) > result.scores[best] - 0.05
    # The spread of right and wrong is that of a coin.
    share = result.scores[best]
    assert result.standard_errors[best] == pytest.approx(math.sqrt(share * (1 - share) / (len(targets) - 1)), rel=1e-4)
    # It ends with the best point, and loads others.
    for index in (best, knee, -1):
        if index != best:
            result.load(index)
        with torch.no_grad():
            accuracy = (model(inputs).argmax(1) == targets).double().mean()
        assert float(accuracy) == pytest.approx(result.scores[index])
        weights = [p for name, p in model.named_parameters() if "weight" in name]
        assert sum(int(w.count_nonzero()) for w in weights) == result.nonzeros[index]
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())
    table = result.table().splitlines()
    assert "best" in table[1 + best] and "1 SE" in table[1 + knee]
    assert str(result) == result.table()


def test_chosen_by_an_error(data):
    inputs, targets = data
    result = quiet(
        linear(),
        squares,
        data,
        count=6,
        optimizer=regfused.SGD,
        lr=0.3,
        validation=lambda model: (model(inputs).squeeze(1) - targets).square(),
        greater_is_better=False,
    )
    assert result.best == result.scores.index(min(result.scores)) == 5
    assert all(score == pytest.approx(2 * loss) for score, loss in zip(result.scores, result.losses, strict=True))


@pytest.mark.parametrize("validation", (None, lambda model: -float(model.weight.detach().abs().sum())))
def test_keep_nothing(validation, data):
    """Only the point that the model ends with: the smallest strength, or the best score."""
    model = linear()
    result = quiet(model, squares, data, strengths=[1.0, 0.5, 0.1], keep=False, validation=validation)
    end = 2 if validation is None else 0
    assert list(result.states) == [end]
    assert int(model.weight.count_nonzero()) == result.nonzeros[end]
    with pytest.raises(ValueError, match=r"path.load: the point must have been kept"):
        result.load(1)
    with pytest.raises(ValueError, match=r"path.coefficients: every point must have been kept"):
        _ = result.coefficients


def test_modes_and_buffers(data):
    """Trained in the mode that each module has, recorded in evaluation mode; states have the buffers."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(FEATURES), torch.nn.Dropout(), linear()).double()
    model[1].eval()
    model[2].weight.grad = torch.ones_like(model[2].weight)
    modes = []

    def loss(model, data):
        modes.append((torch.is_grad_enabled(), *(part.training for part in model)))
        return squares(model, data)

    result = quiet(model, loss, data, count=3, steps=30)
    assert set(modes) == {(True, True, False, True), (False, False, False, False)}
    assert [part.training for part in model] == [True, False, True]
    assert result.names == ("2.weight",)
    assert torch.equal(model[2].weight.grad, torch.ones_like(model[2].weight))
    assert torch.equal(result.states[2]["0.running_mean"], model[0].running_mean)
    result.load(0)
    assert torch.equal(result.states[0]["0.running_mean"], model[0].running_mean)


@pytest.mark.parametrize("params", (["0.w*"], "0.weight", "the tensor"))
def test_chosen_parameters(params, digits):
    """Inputs that a network looks at: the first layer alone, from zeros."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
    torch.nn.init.normal_(model[2].weight)
    chosen = [model[0].weight] if params == "the tensor" else params
    result = quiet(model, entropy, digits[0], params=chosen, option="group_l1", group_dim=1, count=3, steps=30)
    assert result.names == ("0.weight",)
    assert result.group_count == 64
    assert result.groups[0] == 0 < result.groups[-1]


def copies(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


BAD = {
    "option": (dict(option="l3"), r"path: option must be one of \('l1', 'group_l1'\), but got 'l3'"),
    "not decreasing": (
        dict(strengths=[0.1, 0.2]),
        r"path: strengths must decrease, but strengths\[1\] is 0.2, after 0.1",
    ),
    "not positive": (dict(strengths=[0.1, 0.0]), r"path: strengths must be finite and > 0, but strengths\[1\] is 0.0"),
    "no strengths": (dict(strengths=[]), r"path: strengths must have at least one value"),
    "a word": (dict(strengths=["much"]), r"path: strengths\[0\] must be a number, but got 'much'"),
    "count": (dict(count=0), r"path: count must be an int >= 1, but got 0"),
    "ratio": (dict(ratio=1.0), r"path: ratio must be > 0 and < 1, but got 1.0"),
    "alpha": (dict(alpha=0.0), r"path: alpha must be > 0 and <= 1, but got 0.0"),
    "l2": (dict(l2=-1.0), r"path: l2 must be finite and >= 0, but got -1.0"),
    "steps": (dict(steps=2.5), r"path: steps must be an int >= 1, but got 2.5"),
    "tolerance": (dict(tolerance=0.0), r"path: tolerance must be finite and > 0, but got 0.0"),
    "start": (dict(start="here"), r"path: start must be None or one of .* but got 'here'"),
    "group_dim": (dict(option="group_l1", group_dim=2), r"path: group_dim must be in \[-2, 1\] for parameter 'weight'"),
    "lr": (dict(lr=-1.0), r"Adam: lr must be finite and >= 0, but got -1.0"),
    "params": (dict(params=["head.*"]), r"path: params must be .*'head\.\*' fits none of \['weight', 'bias'\]"),
    "nothing to penalize": (dict(params=[]), r"path: the model must have a parameter to penalize"),
    "a torch optimizer": (dict(optimizer=torch.optim.Adam), r"path: optimizer must make a regfused optimizer"),
    "validation": (dict(validation=0.5), r"path: validation must be None or callable, but got a float"),
    "a score of NaN": (dict(validation=lambda m: math.nan), r"path: validation must return finite scores"),
    "both": (dict(batches=[1]), r"path: data and batches must not both be given"),
    "diverges": (dict(optimizer=regfused.SGD, lr=1e4), r"path: loss must be finite, but got (inf|nan)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, data):
    arguments, message = BAD[case]
    model = linear()
    before = copies(model)
    with pytest.raises(ValueError, match=message):
        quiet(model, squares, data, **{"steps": 50, **arguments})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("loss", "message"),
    (
        (lambda model, data: 1.0, r"path: loss must be a real tensor with one element, but got 1.0"),
        (lambda model, data: model(data[0]), r"but got tensor of shape \(100, 1\), torch.float64"),
        (lambda model, data: squares(model, data) * math.inf, r"path: loss must be finite, but got inf"),
        (lambda model, data: data[0].sum(), r"path: loss must depend on the model's parameters"),
        (lambda model, data: model.bias.square().sum(), r"path: loss must have a gradient|path: the loss must have"),
    ),
)
def test_bad_losses(loss, message, data):
    model = linear()
    model.weight.grad = grad = torch.ones_like(model.weight)
    with torch.no_grad():
        model.bias.zero_()
    before = copies(model)
    with pytest.raises(ValueError, match=message):
        quiet(model, loss, data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.weight.grad is grad


def test_zero_is_a_saddle(digits):
    model = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.ReLU(), torch.nn.Linear(4, 10))
    with torch.no_grad():
        model[0].bias.fill_(-1.0)
    with pytest.raises(ValueError, match=r"the gradient where all penalized parameters are zero must not vanish"):
        quiet(model, entropy, digits[0], start="zeros")


def test_other_bad_input(data):
    with pytest.raises(ValueError, match=r"path: model must be a torch.nn.Module, but got a function"):
        quiet(squares, squares, data)
    with pytest.raises(ValueError, match=r"path: the model must have a parameter to penalize, but got none"):
        quiet(torch.nn.BatchNorm1d(3), squares, data)
    with pytest.raises(ValueError, match=r"path: batches must be an iterable that can be gone through many times"):
        quiet(linear(), squares, batches=iter([data]))
    with pytest.raises(ValueError, match=r"path: batches must have at least one batch"):
        quiet(linear(), squares, batches=[])


def test_as_it_was_after_an_interrupt(data):
    model = linear()
    before, calls = copies(model), []

    def loss(model, data):
        calls.append(1)
        if len(calls) == 40:
            raise KeyboardInterrupt
        return squares(model, data)

    model.eval()
    with pytest.raises(KeyboardInterrupt):
        quiet(model, loss, data)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert model.weight.grad is None


def test_choice_demands_validation(data):
    result = quiet(linear(), squares, data, count=2, steps=20)
    for name in ("best", "one_standard_error"):
        with pytest.raises(ValueError, match=rf"path\.{name}: the path must have been made with validation"):
            getattr(result, name)
    result = quiet(linear(), squares, data, count=2, steps=20, validation=lambda model: 1.0)
    assert result.best == 0
    with pytest.raises(ValueError, match=r"path\.one_standard_error: validation must return a tensor of at least 2"):
        _ = result.one_standard_error
    with pytest.raises(ValueError, match=r"path\.load: index must be an int in \[-2, 1\], but got 2"):
        result.load(2)


def test_without_data_or_gradients():
    """The loss may hold its data itself; an outer no_grad does not matter."""
    x = torch.randn(20, 3)
    with torch.no_grad():
        result = quiet(torch.nn.Linear(3, 1), lambda model: (model(x) - x[:, :1]).square().mean(), count=3, steps=30)
    assert result.nonzeros[0] == 0 < result.nonzeros[-1]


def hide(monkeypatch, hidden):
    imported = builtins.__import__

    def without(name, *arguments, **options):
        if name.split(".")[0] == hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)


def test_progress_by_lines(monkeypatch, capsys, data):
    hide(monkeypatch, "tqdm")
    regfused.path(linear(), squares, data, count=3, steps=20)
    out, lines = capsys.readouterr()
    assert out == ""
    assert [line.split(":")[0] for line in lines.splitlines()] == ["path 1/3", "path 2/3", "path 3/3"]
    regfused.path(linear(), squares, data, count=3, steps=20, progress=False)
    assert capsys.readouterr() == ("", "")


def test_progress_by_a_bar(monkeypatch, capsys, data):
    said = []

    class Bar:
        def __init__(self, total, desc):
            said.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            said.append("closed")

        def set_postfix_str(self, line):
            assert "non-zeros" in line

        def update(self):
            said.append("point")

    module = types.ModuleType("tqdm.auto")
    module.tqdm = Bar
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", module)
    regfused.path(linear(), squares, data, count=2, steps=20)
    assert said == [2, "point", "point", "closed"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("keep", (True, False))
@pytest.mark.parametrize("validated", (True, False))
def test_plot(keep, validated, tmp_path, data):
    pytest.importorskip("matplotlib")
    inputs, targets = data
    result = quiet(
        linear(),
        squares,
        data,
        count=4,
        steps=50,
        keep=keep,
        validation=(lambda m: -(m(inputs).squeeze(1) - targets).square()) if validated else None,
    )
    figure = result.plot(tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    above, below = figure.axes
    assert above.get_ylabel() == ("coefficients" if keep else "non-zeros (of 16)")
    assert below.get_ylabel() == ("validation score ± 1 standard error" if validated else "loss, without the penalty")
    assert below.get_xscale() == "log"
    assert below.get_xlabel() == "l1, strength of the penalty (log scale)"


def test_plot_without_matplotlib(monkeypatch, data):
    result = quiet(linear(), squares, data, count=2, steps=20)
    hide(monkeypatch, "matplotlib")
    with pytest.raises(ModuleNotFoundError, match=r"path.plot needs matplotlib \(pip install matplotlib\)"):
        result.plot()
