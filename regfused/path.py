"""A regularization path: one model trained at many strengths of a penalty, each from the last one's parameters."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from regfused import options
from regfused.adam import Adam
from regfused.path_result import RegularizationPath, restore, snapshot
from regfused.penalties import param_groups
from regfused.reference.optimizer import Regularized

_OPTIONS = ("l1", "group_l1")
_STARTS = ("zeros", "model")
_CHECK_EVERY = 10  # steps, in full batch
_PATIENCE = 10  # checks without progress, until the learning rate is divided
_DIVISOR = 3.0
_BELOW = 16.0  # how far below an estimate the search for the largest strength of such a path begins
_MOST_TRIALS = 30  # of strengths in it
_DENSE = 5  # times as many steps for the dense model that a path from the model's own weights begins with


def path(
    model: nn.Module,
    loss: Callable[..., Tensor],
    data: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    option: str = "l1",
    params: Iterable[str | Tensor] | None = None,
    strengths: Sequence[float] | None = None,
    count: int = 20,
    ratio: float = 1e-3,
    alpha: float = 1.0,
    l2: float = 0.0,
    group_dim: int = 0,
    start: str | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = Adam,
    lr: float = 1e-2,
    steps: int = 1000,
    tolerance: float = 1e-3,
    validation: Callable[[nn.Module], Any] | None = None,
    greater_is_better: bool = True,
    keep: bool = True,
    progress: bool = True,
) -> RegularizationPath:
    r"""Train a model along a grid of strengths, each point from the last one's parameters: a regularization path.

    At each ``strength`` the model is trained towards the minimum of::

        loss + alpha*strength*sum|p| + ((1 - alpha)*strength + l2)*sum(p^2)      option "l1"
        loss + alpha*strength*sum||w|| + ((1 - alpha)*strength + l2)*sum(p^2)    option "group_l1", w slices of p

    by proximal steps, so that zeros are exact. For a linear model and squares it is scikit-learn's ``lasso_path`` and
    glmnet (Friedman, Hastie, Tibshirani, Regularization paths for generalized linear models via coordinate descent,
    2010).

    The grid is geometric, from the smallest strength at which all penalized parameters are zero down to ``ratio`` times
    it. With ``start="zeros"`` that strength follows from the gradient at zero, after the other parameters were fitted
    there: ``max|g|/alpha``, or ``max||g_w||/alpha`` over slices; ``tolerance`` is added to it. The path goes down from
    there. In a network with several penalized layers zero is a saddle, which no training leaves. With
    ``start="model"`` the path begins with a dense model, trained from the weights that are there, and goes up, as in
    Lemhadri, Ruan, Abraham, Tibshirani, LassoNet, 2021. The largest strength is then the first at which all of them
    are zero when strengths are doubled from point to point; on the finer grid of the path a few may be left there.

    A point is done when the optimality conditions hold, or after ``steps``. Where the residual of the conditions makes
    no progress for 100 steps (10 passes over batches), the learning rate is divided by 3, until the next point.

    Args:
        model: trained in the mode in which it is; it is in evaluation mode while ``losses`` and scores are taken.
        loss: ``loss(model, data)``, or ``loss(model)`` without data, a scalar tensor. Without the penalty.
        data: the full batch, handed to ``loss`` as it is.
        batches: instead of ``data`` an iterable of batches, such as a DataLoader: a step is one pass then, with an
            optimizer step for each batch; the loss is the mean of ``loss(model, batch)``.
        option: the penalty whose strength varies: ``"l1"`` on elements, ``"group_l1"`` on slices along ``group_dim``.
        params: the penalized parameters, as tensors, or as names or shell patterns of names. None: those that
            `regfused.param_groups` penalizes, which leaves out biases and normalization layers.
        strengths: the grid itself, positive and strictly decreasing. None: made from ``count`` and ``ratio``.
        count: of points in the grid.
        ratio: smallest strength by largest, in (0, 1).
        alpha: share of the varying penalty in (0, 1], as in `regfused.elastic_net`: 1 is the lasso. scikit-learn's
            ``enet_path(alphas, l1_ratio=r)`` has ``strength = alphas*(1 + r)/2`` and ``alpha = 2*r/(1 + r)``.
        l2: strength of ``sum(p^2)`` over the penalized parameters that stays the same at all points.
        group_dim: dimension of the slices, which ``groups`` counts, for either option.
        start: ``"zeros"`` or ``"model"``. None: zeros, but the model's own weights where a penalized parameter has no
            gradient there.
        optimizer: a class of regfused, or what makes one: called as ``optimizer(groups, lr=lr)``, the strengths in the
            groups. ``functools.partial(regfused.SGD, momentum=0.9)`` sets other options.
        lr: learning rate.
        steps: the most at one point.
        tolerance: of the optimality conditions, relative to the strength at the point: how far a gradient may be from
            what the penalty demands.
        validation: ``validation(model)``, called at each point without gradients: a number, or a tensor of scores of
            examples or folds, whose mean is the score and whose spread gives the standard error.
        greater_is_better: whether a score of validation is; False for an error or a loss.
        keep: keep a copy of parameters and buffers of each point. False: only of the point that the model ends with.
        progress: a bar, where tqdm is installed, otherwise a line for each point, on stderr.

    Returns:
        A `RegularizationPath`, its strengths decreasing, whichever way training went: ``.strengths``, ``.losses``,
        ``.scores``, ``.nonzeros``, ``.groups``, ``.coefficients``, ``.best``, ``.one_standard_error``,
        ``.load(index)``, ``.table()``, ``.plot(file)``.

        The model ends with the parameters of the best score, without validation with those of the smallest strength.
        Its modes, ``requires_grad`` and ``.grad`` are as before. After an exception everything is.

    Raises:
        ValueError: for an argument that is not as it must be, a model without penalized parameters, or a loss that is
            not one finite number, with the operation, the demand and the value.

    Example::

        >>> x, model = torch.randn(50, 8), torch.nn.Linear(8, 1)
        >>> def loss(model, data):
        ...     return (model(data[0]) - data[1]).square().mean()
        >>> result = path(model, loss, (x, 2 * x[:, :1]), count=5, progress=False)
        >>> result.nonzeros[0], result.nonzeros[1]
        (0, 1)
    """
    _check(option, batches, data, count, ratio, alpha, l2, group_dim, start, steps, tolerance, validation)
    if strengths is not None:
        strengths = _checked_strengths(strengths)
    names, penalized, others = _split(model, params)
    if option == "group_l1":
        for name, param in zip(names, penalized, strict=True):
            options.check_dim("path", "group_dim", group_dim, param, f"parameter {name!r}")
    trainer = _Trainer(model, loss, data, batches, option, penalized, others, alpha, l2, group_dim, steps, tolerance)
    with _as_it_was(model):
        trainer.start(optimizer, lr)
        start = start or ("zeros" if trainer.moves_from_zero() else "model")
        largest = trainer.from_zeros() if start == "zeros" else trainer.from_dense(ratio, grid=strengths is None)
        if strengths is None:
            strengths = [largest * ratio ** (i / max(count - 1, 1)) for i in range(count)]
        points = _Points(trainer, validation, greater_is_better, keep, len(strengths))
        order = range(len(strengths))[:: 1 if start == "zeros" else -1]
        with _report(progress, len(strengths)) as report:
            for i in order:
                report(points.add(i, strengths[i], *trainer.train(strengths[i], steps)))
        result = points.result(strengths, names, option)
        result.load(result.best if validation else -1)
    return result


def _check(
    option: Any,
    batches: Any,
    data: Any,
    count: Any,
    ratio: Any,
    alpha: Any,
    l2: Any,
    group_dim: Any,
    start: Any,
    steps: Any,
    tolerance: Any,
    validation: Any,
) -> None:
    if option not in _OPTIONS:
        raise ValueError(f"path: option must be one of {_OPTIONS}, but got {option!r}")
    if start is not None and start not in _STARTS:
        raise ValueError(f"path: start must be None or one of {_STARTS}, but got {start!r}")
    if batches is not None and data is not None:
        raise ValueError("path: data and batches must not both be given, but got both")
    if batches is not None and (not isinstance(batches, Iterable) or iter(batches) is batches):
        raise ValueError(
            f"path: batches must be an iterable that can be gone through many times, but got a {type(batches).__name__}"
        )
    for name, value in (("count", count), ("steps", steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"path: {name} must be an int >= 1, but got {value!r}")
    options.check_group_dim("path", {"group_dim": group_dim, "group_l1": 0.0})
    if not 0 < options.number("path", "ratio", ratio) < 1:
        raise ValueError(f"path: ratio must be > 0 and < 1, but got {ratio}")
    if not 0 < options.number("path", "alpha", alpha) <= 1:
        raise ValueError(f"path: alpha must be > 0 and <= 1, but got {alpha}")
    options.check_strength("path", "l2", l2)
    if not 0 < options.number("path", "tolerance", tolerance) < math.inf:
        raise ValueError(f"path: tolerance must be finite and > 0, but got {tolerance}")
    if validation is not None and not callable(validation):
        raise ValueError(f"path: validation must be None or callable, but got a {type(validation).__name__}")


def _checked_strengths(strengths: Sequence[float]) -> list[float]:
    grid = [options.number("path", f"strengths[{i}]", s) for i, s in enumerate(strengths)]
    if not grid:
        raise ValueError("path: strengths must have at least one value, but got none")
    for i, strength in enumerate(grid):
        if not 0 < strength < math.inf:
            raise ValueError(f"path: strengths must be finite and > 0, but strengths[{i}] is {strength}")
        if i and strength >= grid[i - 1]:
            raise ValueError(f"path: strengths must decrease, but strengths[{i}] is {strength}, after {grid[i - 1]}")
    return grid


def _split(
    model: nn.Module, params: Iterable[str | Tensor] | None
) -> tuple[tuple[str, ...], list[nn.Parameter], list[nn.Parameter]]:
    """Names of the penalized parameters, they themselves, and the others that require a gradient."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"path: model must be a torch.nn.Module, but got a {type(model).__name__}")
    trained = {name: param for name, param in model.named_parameters() if param.requires_grad}
    chosen: set[int] = set()
    if params is None:
        # A mark tells the group of the penalized from that of the others, either of which may be missing.
        for group in param_groups(model, l1=1.0):
            if group["l1"]:
                chosen.update(map(id, group["params"]))
    else:
        for one in [params] if isinstance(params, str | Tensor) else params:
            fitting = [
                p for name, p in trained.items() if (fnmatchcase(name, one) if isinstance(one, str) else p is one)
            ]
            if not fitting:
                what = repr(one) if isinstance(one, str) else f"a {type(one).__name__}"
                raise ValueError(
                    "path: params must be parameters of the model that require a gradient, or patterns of their "
                    f"names, but {what} fits none of {list(trained)}"
                )
            chosen.update(map(id, fitting))
    names = tuple(name for name, param in trained.items() if id(param) in chosen and param.numel())
    if not names:
        raise ValueError(f"path: the model must have a parameter to penalize, but got none among {list(trained)}")
    others = [param for name, param in trained.items() if id(param) not in chosen]
    return names, [trained[name] for name in names], others


def _fits(one: str | Tensor, name: str, param: Tensor) -> bool:
    return fnmatchcase(name, one) if isinstance(one, str) else param is one


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes and gradients are restored in any case; parameters and buffers after an exception."""
    state = snapshot(model)
    modes = {module: module.training for module in model.modules()}
    gradients = [(param, param.grad) for param in model.parameters()]
    for param, _ in gradients:
        param.grad = None
    try:
        with torch.enable_grad():
            yield
    except BaseException:
        restore(model, state)
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
        for param, grad in gradients:
            param.grad = grad


class _Trainer:
    """Brings the model to the minimum at one strength after the other, with one optimizer."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        data: Any,
        batches: Iterable[Any] | None,
        option: str,
        penalized: list[nn.Parameter],
        others: list[nn.Parameter],
        alpha: float,
        l2: float,
        group_dim: int,
        steps: int,
        tolerance: float,
    ) -> None:
        self.model, self.loss, self.data, self.batches = model, loss, data, batches
        self.option, self.penalized, self.others = option, penalized, others
        self.alpha, self.l2, self.group_dim = float(alpha), float(l2), group_dim
        self.steps, self.tolerance = steps, float(tolerance)

    def start(self, make: Callable[..., torch.optim.Optimizer], lr: float) -> None:
        penalized = {"params": self.penalized, "l1": 0.0, "l2": 0.0, "proximal": True, "group_l1": 0.0}
        groups = [{**penalized, "group_dim": self.group_dim if self.option == "group_l1" else 0}]
        if self.others:
            groups.append({"params": self.others, "l1": 0.0, "l2": 0.0, "group_l1": 0.0})
        self.lr, self.make, self.groups = lr, make, groups
        self.fresh_optimizer()

    def fresh_optimizer(self) -> None:
        self.optimizer = self.make([dict(group) for group in self.groups], lr=self.lr)
        if not isinstance(self.optimizer, Regularized):
            raise ValueError(
                "path: optimizer must make a regfused optimizer, such as regfused.Adam, but made a "
                f"{type(self.optimizer).__name__}"
            )

    # ------------------------------------------------------------------------------------------------------------
    # The loss and its gradient.

    def evaluate(self, *arguments: Any) -> Tensor:
        value = self.loss(self.model, *arguments)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            shape = f"tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"path: loss must be a real tensor with one element, but got {shape}")
        return value.reshape(())

    def inputs(self) -> Iterable[tuple[Any, ...]]:
        """What the loss is called with, beside the model."""
        if self.batches is not None:
            return ((batch,) for batch in self.batches)
        return [() if self.data is None else (self.data,)]

    def finite(self, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(
                f"path: loss must be finite, but got {value} (in training, a smaller lr than {self.lr} may help)"
            )
        return value

    def mean_loss(self) -> float:
        """Over the whole data, without gradients."""
        with torch.no_grad():
            values = [float(self.evaluate(*arguments)) for arguments in self.inputs()]
        return self.finite(sum(values) / len(values))

    def backward(self, arguments: tuple[Any, ...]) -> Tensor:
        self.optimizer.zero_grad()
        value = self.evaluate(*arguments)
        if not value.requires_grad:
            raise ValueError("path: loss must depend on the model's parameters, but got a tensor without a gradient")
        value.backward()
        return value.detach()

    def gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (*self.penalized, *self.others)]

    def one_gradient(self, looks: bool) -> list[Tensor]:
        """That of the full batch; as a list, and the loss checked, where somebody looks at it."""
        value = self.backward(() if self.data is None else (self.data,))
        if looks:
            self.finite(float(value))
        return self.gradients() if looks else []

    def one_pass(self, step: bool) -> list[Tensor]:
        """The mean gradient of all batches, with an optimizer step after each or without."""
        total: list[Tensor] = []
        values = []
        for arguments in self.inputs():
            values.append(self.backward(arguments))
            now = self.gradients()
            total = [t + g for t, g in zip(total, now, strict=True)] if total else [g.clone() for g in now]
            if step:
                self.optimizer.step()
        if not values:
            raise ValueError("path: batches must have at least one batch, but got none")
        self.finite(float(torch.stack(values).mean()))
        return [t / len(values) for t in total]

    # ------------------------------------------------------------------------------------------------------------
    # Optimality.

    def norms(self, tensor: Tensor) -> Tensor:
        """Of what the penalty adds up: absolute values of elements, or norms of slices."""
        return tensor.abs().flatten() if self.option == "l1" else slices(tensor, self.group_dim).norm(dim=1)

    @torch.no_grad()
    def residual(self, gradients: list[Tensor], strength: float) -> float:
        """How far the optimality conditions are from holding: the largest distance of 0 from the subdifferential."""
        first, second = self.alpha * strength, (1 - self.alpha) * strength + self.l2
        worst = [g.abs().max() for g in gradients[len(self.penalized) :] if g.numel()]
        for p, g in zip(self.penalized, gradients, strict=False):
            slope = g + 2 * second * p if second else g
            if self.option == "l1":
                off = torch.where(p == 0, (slope.abs() - first).clamp(min=0), (slope + first * p.sgn()).abs())
            else:
                rows, slope = slices(p, self.group_dim), slices(slope, self.group_dim)
                norm = rows.norm(dim=1, keepdim=True)
                alive = (slope + first * rows / torch.where(norm == 0, 1, norm)).norm(dim=1)
                off = torch.where(norm[:, 0] == 0, (slope.norm(dim=1) - first).clamp(min=0), alive)
            worst.append(off.max())
        return float(torch.stack([w.double() for w in worst]).max())

    def all_zero(self) -> bool:
        return not any(bool(p.detach().any()) for p in self.penalized)

    # ------------------------------------------------------------------------------------------------------------
    # Training.

    def set_strength(self, strength: float) -> None:
        group = self.optimizer.param_groups[0]
        group[self.option] = self.alpha * strength
        group["l2"] = (1 - self.alpha) * strength + self.l2

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def train(self, strength: float, steps: int, until_zero: bool = False, scale: float = 0.0) -> tuple[int, bool]:
        """Train until the conditions hold to ``tolerance*strength``; the steps that it took, and whether they do.

        Args:
            strength: of the penalty.
            steps: at most.
            until_zero: be done as soon as all penalized parameters are zero.
            scale: what the tolerance is relative to, where it is not the strength.
        """
        self.set_strength(strength)
        lr = self.lr
        self.set_lr(lr)
        best, without_progress = math.inf, 0
        demanded = self.tolerance * (scale or strength)
        for step in range(steps + 1):
            looks = step % _CHECK_EVERY == 0 or step == steps
            if self.batches is None:
                gradients = self.one_gradient(looks)
            elif step < steps:
                looks = True
                gradients = self.one_pass(step=True)
            else:
                break
            if looks:
                residual = self.residual(gradients, strength)
                if residual <= demanded or (until_zero and self.all_zero()):
                    return step, residual <= demanded
                without_progress = 0 if residual < best else without_progress + 1
                best = min(best, residual)
                if without_progress >= _PATIENCE:
                    lr /= _DIVISOR
                    self.set_lr(lr)
                    without_progress = 0
            if self.batches is None and step < steps:
                self.optimizer.step()
        return steps, False

    # ------------------------------------------------------------------------------------------------------------
    # Where a path begins.

    def moves_from_zero(self) -> bool:
        """Whether every penalized parameter has a gradient where all of them are zero."""
        state = snapshot(self.model)
        self.zero()
        gradients = self.one_pass(step=False)[: len(self.penalized)]
        restore(self.model, state)
        return all(bool(g.any()) for g in gradients)

    @torch.no_grad()
    def zero(self) -> None:
        for param in self.penalized:
            param.zero_()

    def from_zeros(self) -> float:
        """Set the penalized parameters to zero, fit the others; the strength at which they stay there."""
        self.zero()
        largest = self.largest_slope()
        if self.others and largest:
            # A strength that nothing overcomes keeps zeros where they are.
            self.train(1e6 * largest / self.alpha, self.steps, scale=largest)
            largest = self.largest_slope()
        if not largest:
            raise ValueError(
                'path: the gradient where all penalized parameters are zero must not vanish with start="zeros", but it '
                'does (start="model" begins with the weights of the model)'
            )
        rounding = 16 * max(torch.finfo(p.dtype).eps for p in self.penalized)
        return largest / self.alpha * (1 + max(self.tolerance, rounding))

    def largest_slope(self) -> float:
        gradients = self.one_pass(step=False)[: len(self.penalized)]
        return max(float(self.norms(g).max()) for g in gradients)

    def from_dense(self, ratio: float, grid: bool) -> float:
        """Train the model almost without penalty; the strength that brings it from there to zero."""
        slope = self.largest_slope()
        if not slope:
            raise ValueError("path: the loss must have a gradient at the model's weights, but it is zero there")
        self.train(ratio * slope / self.alpha, _DENSE * self.steps)
        if not grid:
            return 0.0
        dense = snapshot(self.model)
        norm = sum(float(self.norms(p.detach()).sum()) for p in self.penalized)
        with_all = self.mean_loss()
        self.zero()
        gain = self.mean_loss() - with_all
        restore(self.model, dense)
        # Above it the objective is lower at zero than at the dense model. Sparser ones than that hold out longer.
        strength = (gain / norm / self.alpha if gain > 0 and norm > 0 else slope) / _BELOW
        for _ in range(_MOST_TRIALS):
            if not self.goes_to_zero(strength):
                break
            strength /= _BELOW
            restore(self.model, dense)
            self.fresh_optimizer()
        for _ in range(_MOST_TRIALS):
            strength *= 2
            if self.goes_to_zero(strength):
                break
        restore(self.model, dense)
        self.fresh_optimizer()
        return strength

    def goes_to_zero(self, strength: float) -> bool:
        self.train(strength, self.steps, until_zero=True)
        return self.all_zero()


def slices(tensor: Tensor, dim: int) -> Tensor:
    """A row for each slice along a dimension."""
    return tensor.movedim(dim, 0).flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)


class _Points:
    """What is recorded at each point."""

    def __init__(
        self,
        trainer: _Trainer,
        validation: Callable[[nn.Module], Any] | None,
        greater_is_better: bool,
        keep: bool,
        count: int,
    ) -> None:
        self.trainer, self.validation, self.keep = trainer, validation, keep
        self.greater_is_better = greater_is_better
        self.rows: list[dict[str, Any]] = [{} for _ in range(count)]
        self.states: dict[int, dict[str, Tensor]] = {}

    def add(self, index: int, strength: float, steps: int, converged: bool) -> str:
        """Record the model as it is now; a line that says how it is."""
        row = self.rows[index]
        row.update(steps=steps, converged=converged)
        model = self.trainer.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        row["loss"] = self.trainer.mean_loss()
        if self.validation is not None:
            row["score"], row["error"] = _score(self.validation, model)
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            row["nonzeros"] = sum(int(p.count_nonzero()) for p in self.trainer.penalized)
            dim = self.trainer.group_dim
            in_slices = [slices(p, dim) for p in self.trainer.penalized if -max(p.dim(), 1) <= dim < max(p.dim(), 1)]
            row["groups"] = sum(int((rows != 0).any(dim=1).sum()) for rows in in_slices)
            self.group_count = sum(rows.shape[0] for rows in in_slices)
        self.keep_state(index)
        score = f", score {row['score']:.4g}" if self.validation is not None else ""
        return f"strength {strength:.4g}: loss {row['loss']:.4g}{score}, {row['nonzeros']:,} non-zeros"

    def keep_state(self, index: int) -> None:
        if not self.keep:
            for other in list(self.states):
                if not self.prefers(index, other):
                    return
                del self.states[other]
        self.states[index] = snapshot(self.trainer.model)

    def prefers(self, index: int, other: int) -> bool:
        """Whether the model should end with a point rather than with another."""
        if self.validation is None:
            return index > other
        sign = 1 if self.greater_is_better else -1
        one, two = (sign * self.rows[i]["score"] for i in (index, other))
        return one > two or (one == two and index < other)

    def result(self, strengths: Sequence[float], names: tuple[str, ...], option: str) -> RegularizationPath:
        def column(name: str) -> tuple[Any, ...]:
            return tuple(row[name] for row in self.rows)

        return RegularizationPath(
            strengths=tuple(strengths),
            losses=column("loss"),
            scores=column("score") if self.validation else None,
            standard_errors=column("error") if self.validation else None,
            nonzeros=column("nonzeros"),
            groups=column("groups"),
            converged=column("converged"),
            steps=column("steps"),
            size=sum(p.numel() for p in self.trainer.penalized),
            group_count=self.group_count,
            option=option,
            greater_is_better=self.greater_is_better,
            names=names,
            states=self.states,
            model=self.trainer.model,
        )


def _score(validation: Callable[[nn.Module], Any], model: nn.Module) -> tuple[float, float]:
    """Mean and standard error of what validation gives."""
    with torch.no_grad():
        scores = torch.as_tensor(validation(model)).detach().double().flatten()
    if not scores.numel() or not bool(scores.isfinite().all()):
        raise ValueError(f"path: validation must return finite scores, but returned {scores.tolist()[:10]}")
    n = scores.numel()
    return float(scores.mean()), float(scores.std()) / math.sqrt(n) if n > 1 else math.nan


@contextmanager
def _report(progress: bool, count: int) -> Iterator[Callable[[str], None]]:
    """A function to be called with a line after each point."""
    if not progress:
        yield lambda line: None
        return
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError:
        done = iter(range(1, count + 1))
        yield lambda line: print(f"path {next(done)}/{count}: {line}", file=sys.stderr, flush=True)
        return
    with tqdm(total=count, desc="path") as bar:

        def advance(line: str) -> None:
            bar.set_postfix_str(line)
            bar.update()

        yield advance
