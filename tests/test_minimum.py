"""Steps come to rest at the minimum of loss plus penalty: that of scikit-learn, under every rule and momentum."""

from functools import partial

import numpy as np
import pytest
import torch

import regfused
from regfused import reference

linear_model = pytest.importorskip("sklearn.linear_model")

pytestmark = pytest.mark.long

KINDS = pytest.mark.parametrize("module", (regfused, reference), ids=("kernels", "reference"))

# How a step is made of a gradient. Without k the zeros would be those of another strength.
SGD_WAYS = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "dampening": {"lr": 0.3, "momentum": 0.8, "dampening": 0.5},
    "classical": {"lr": 0.05, "momentum": 0.9, "classical_momentum": True},
    "classical nesterov": {"lr": 0.05, "momentum": 0.9, "classical_momentum": True, "nesterov": True},
}
WAYS = {f"SGD, {name}": ("SGD", options) for name, options in SGD_WAYS.items()}
WAYS["Adam"] = ("Adam", {"lr": 0.01})
WAYS["AdamW"] = ("AdamW", {"lr": 0.01, "weight_decay": 0.0})
WAYS["Adam, amsgrad"] = ("Adam", {"lr": 0.01, "amsgrad": True})

N, FEATURES = 200, 30


@pytest.fixture(scope="module")
def data():
    random = np.random.default_rng(0)
    inputs = random.standard_normal((N, FEATURES))
    inputs[:, 1::2] += 0.5 * inputs[:, ::2]  # correlated
    weights = np.where(np.arange(FEATURES) % 5 == 0, random.standard_normal(FEATURES) + 2, 0.0)
    return inputs, inputs @ weights + 0.5 * random.standard_normal(N)


def at_rest(module, way, shape, loss_of, **penalty):
    """The weights where full-batch steps end, and the gradient of the loss there."""
    rule, options = WAYS[way]
    w = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = getattr(module, rule)([w], **options, **penalty)
    for step in range(20_000):
        before = w.detach().clone()
        optimizer.zero_grad()
        loss_of(w).backward()
        optimizer.step()
        if step > 500 and (before - w.detach()).abs().max() < 1e-15:
            break
        if step and step % 2000 == 0 and rule != "SGD":
            # Adam goes round the minimum in a circle of the size of its steps.
            optimizer.param_groups[0]["lr"] /= 3
    w.grad = None
    loss_of(w).backward()
    return w.detach(), w.grad


def worst_residual(w, grad, l1, l2=0.0):
    """How far an optimality condition of loss + l1*sum|w| + l2*sum(w^2) is from holding."""
    slope = grad + 2 * l2 * w
    return torch.where(w == 0, (slope.abs() - l1).clamp(min=0), (slope + l1 * w.sign()).abs()).max().item()


def squares(inputs, targets, w):
    """scikit-learn's loss of its linear models."""
    return (inputs @ w - targets).square().sum() / (2 * len(inputs))


def same_zeros(w, theirs):
    assert 0 < (theirs == 0).sum() < theirs.size, "the case must have zeros, and others"
    assert np.array_equal(w.numpy() == 0, theirs == 0)
    np.testing.assert_allclose(w.numpy(), theirs, rtol=0, atol=1e-7)


@KINDS
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ratio", (1.0, 0.7), ids=("lasso", "elastic net"))
def test_linear_models(module, way, ratio, data):
    l1, l2 = 0.2 * ratio, 0.2 * (1 - ratio) / 2
    loss_of = partial(squares, *map(torch.from_numpy, data))
    w, grad = at_rest(module, way, FEATURES, loss_of, l1=l1, l2=l2, proximal=True)
    theirs = linear_model.ElasticNet(alpha=0.2, l1_ratio=ratio, fit_intercept=False, tol=1e-14, max_iter=100_000)
    same_zeros(w, theirs.fit(*data).coef_)
    assert worst_residual(w, grad, l1, l2) < 1e-8


@KINDS
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("AdamW", "SGD, classical nesterov")])
@pytest.mark.parametrize("ratio", (1.0, 0.7), ids=("lasso", "elastic net"))
def test_nonnegative_linear_models(module, way, ratio, data):
    inputs, targets = data
    targets = targets - 3 * inputs[:, 5]  # which wants to be negative
    l1, l2 = 0.2 * ratio, 0.2 * (1 - ratio) / 2
    loss_of = partial(squares, torch.from_numpy(inputs), torch.from_numpy(targets))
    penalty = {"l1": l1, "l2": l2, "proximal": True, "nonnegative": True}
    w, _ = at_rest(module, way, FEATURES, loss_of, **penalty)
    theirs = linear_model.ElasticNet(
        alpha=0.2, l1_ratio=ratio, fit_intercept=False, positive=True, tol=1e-14, max_iter=100_000
    )
    same_zeros(w, theirs.fit(inputs, targets).coef_)
    free = linear_model.ElasticNet(alpha=0.2, l1_ratio=ratio, fit_intercept=False).fit(inputs, targets)
    assert (free.coef_ < -0.1).any(), "the constraint must matter"


@pytest.mark.parametrize(
    "module, gamma",
    [(regfused, 1.5), (regfused, 3.0), (reference, 3.0)],
    ids=("kernels 1.5", "kernels 3", "reference 3"),
)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "AdamW"])
def test_minimax_concave_penalty(module, way, gamma, data):
    """Coordinate descent (Breheny and Huang, 2011) that starts there stays there, and large weights are not shrunk."""
    inputs, targets = data
    l1 = 0.4
    loss_of = partial(squares, torch.from_numpy(inputs), torch.from_numpy(targets))
    w, _ = at_rest(module, way, FEATURES, loss_of, l1=l1, concavity=1 / gamma, proximal=True)
    w = w.numpy()
    assert 0 < (w == 0).sum() < FEATURES

    descended, scale = w.copy(), (inputs**2).sum(axis=0) / N
    for j in range(FEATURES):
        correlation = inputs[:, j] @ (targets - inputs @ descended) / N + scale[j] * descended[j]
        shrunk = np.sign(correlation) * max(abs(correlation) - l1, 0.0) / (scale[j] - 1 / gamma)
        descended[j] = shrunk if abs(correlation) <= scale[j] * l1 * gamma else correlation / scale[j]
    np.testing.assert_allclose(descended, w, rtol=0, atol=1e-8)

    large = np.abs(w) > l1 * gamma
    assert large.sum() >= 4
    slope = inputs.T @ (inputs @ w - targets) / N
    np.testing.assert_allclose(slope[large], 0, atol=1e-8)
    lasso = linear_model.Lasso(alpha=l1, fit_intercept=False).fit(inputs, targets).coef_
    assert (np.abs(lasso[large]) < np.abs(w[large]) - 0.1).all(), "the lasso's are smaller"


@KINDS
@pytest.mark.parametrize("way", ("SGD, plain", "SGD, momentum", "Adam"))
def test_subgradients_of_the_concave_penalty_rest_there_too(module, way, data):
    """Where no weight is 0: the penalty as it stands in the loss."""
    inputs, targets = data
    inputs, l1, gamma = inputs[:, ::5], 0.4, 1.5
    loss_of = partial(squares, torch.from_numpy(inputs), torch.from_numpy(targets))
    w, grad = at_rest(module, way, inputs.shape[1], loss_of, l1=l1, concavity=1 / gamma)
    slope = (l1 - w.abs() / gamma).clamp(min=0) * w.sign()
    assert (grad + slope).abs().max() < 1e-8 and (w != 0).all()


@KINDS
@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("AdamW", "SGD, classical nesterov")])
def test_multi_task_lasso(module, way, data):
    inputs, _ = data
    random = np.random.default_rng(1)
    true = random.standard_normal((FEATURES, 3)) * (np.arange(FEATURES) % 6 == 0)[:, None]
    targets = inputs @ true + 0.3 * random.standard_normal((N, 3))
    loss_of = partial(squares, torch.from_numpy(inputs), torch.from_numpy(targets))
    w, _ = at_rest(module, way, (FEATURES, 3), loss_of, group_l1=0.2, group_dim=0)
    theirs = linear_model.MultiTaskLasso(alpha=0.2, fit_intercept=False, tol=1e-14, max_iter=100_000)
    same_zeros(w, theirs.fit(inputs, targets).coef_.T)


@pytest.mark.parametrize(
    "module, way",
    [(module, way) for module in (regfused, reference) for way in ("SGD, plain", "SGD, momentum")]
    + [(regfused, "Adam"), (regfused, "Adam, amsgrad")],  # the reference would take a minute each
)
def test_sparse_group_lasso_with_l2(module, way, data):
    """Against the optimality conditions: the length of a group's step is shortened by the map of elements before it."""
    inputs, targets = map(torch.from_numpy, data)
    l1, l2, group_l1 = 0.02, 0.05, 0.1
    pairs = inputs.reshape(N, FEATURES // 2, 2)
    loss_of = lambda w: (torch.einsum("nij,ij->n", pairs, w) - targets).square().sum() / (2 * N)  # noqa: E731
    w, grad = at_rest(
        module, way, (FEATURES // 2, 2), loss_of, l1=l1, l2=l2, proximal=True, group_l1=group_l1, group_dim=0
    )
    slope = grad + 2 * l2 * w
    rows = w.norm(dim=1, keepdim=True)
    assert 0 < (rows == 0).sum() < len(rows)
    alive = (slope + group_l1 * w / rows.clamp(min=1e-300))[rows.flatten() != 0]
    assert worst_residual(w[rows.flatten() != 0], alive, l1) < 1e-8
    shrunk = (slope.abs() - l1).clamp(min=0).norm(dim=1)[rows.flatten() == 0]
    assert shrunk.max() <= group_l1 + 1e-8


@KINDS
@pytest.mark.parametrize("way", ("SGD, plain", "SGD, momentum", "SGD, nesterov", "Adam"))
def test_logistic_regression_with_an_elastic_net(module, way, data):
    inputs, targets = data
    labels = (targets > 0).astype(np.float64)
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    l1, l2 = 0.02, 0.005

    def loss_of(w):
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ w, y)

    w, grad = at_rest(module, way, FEATURES, loss_of, l1=l1, l2=l2, proximal=True)
    assert 0 < (w == 0).sum() < FEATURES
    assert worst_residual(w, grad, l1, l2) < 1e-8


@KINDS
def test_decoupled_proximal_rests_elsewhere(module, data):
    loss_of = partial(squares, *map(torch.from_numpy, data))
    w, grad = at_rest(module, "Adam", FEATURES, loss_of, l1=0.2, proximal=True, decoupled_proximal=True)
    assert worst_residual(w, grad, 0.2) > 1e-3
