"""The loop as people write it, the same with regfused, and what trains both side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from csv_table import read_csv
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import regfused

# ---------------------------------------------------------------------------------------------------------------------
# The comparison: what people write, and the one line that replaces it.


@dataclass(frozen=True)
class Setting:
    """One way to regularize; what else goes into a step is the same for all, see `Recipe`."""

    name: str
    l1: float = 0.0
    l2: float = 0.0
    proximal: bool = False
    group_l1: float = 0.0  # on the rows of each parameter
    dropout: float = 0.0  # of the hidden units
    adam: bool = False  # instead of SGD with momentum


def loop_step(model, optimizer, loss_fn, inputs, targets, *, l1: float, l2: float, max_norm: float) -> None:
    """A training step as people write it: penalty in the loss, backward, clip, step."""
    loss = loss_fn(model(inputs), targets)
    if l1:
        loss = loss + l1 * sum(p.abs().sum() for p in model.parameters())
    if l2:
        loss = loss + l2 * sum(p.pow(2).sum() for p in model.parameters())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def proximal_loop_step(
    model, optimizer, loss_fn, inputs, targets, *, lr: float, l1: float, momentum: float, max_norm: float
) -> None:
    """The same for proximal L1: after the step each parameter moves towards zero and stops there.

    It moves by as much as a constant gradient l1 would move it under this momentum in the long run.
    """
    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.sign() * (p.abs() - lr / (1 - momentum) * l1).clamp(min=0))


def group_lasso_loop_step(
    model, optimizer, loss_fn, inputs, targets, *, lr: float, group_l1: float, momentum: float, max_norm: float
) -> None:
    """The same for a group lasso: after the step each row moves towards zero and stops there."""
    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            rows = p.view(len(p), -1)
            threshold = lr / (1 - momentum) * group_l1
            rows.mul_((1 - threshold / rows.norm(dim=1, keepdim=True)).clamp(min=0))


def regfused_step(model, optimizer, loss_fn, inputs, targets) -> None:
    """With regfused, for every setting: penalty, clip and shrinkage are inside the optimizer's step."""
    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def forward_and_backward(model, optimizer, loss_fn, inputs, targets) -> None:
    """What both have in common: subtracted, it leaves the cost of penalty, clip and update."""
    loss = loss_fn(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()


# ---------------------------------------------------------------------------------------------------------------------
# The data.


Step = Callable[[torch.Tensor, torch.Tensor], None]  # takes inputs and targets of a batch


@dataclass
class Task:
    """Data in a training and a test split, with what is to be minimized and what is to be reported."""

    description: str
    train: TensorDataset
    outputs: int
    loss_fn: nn.Module
    curvature: float  # bound of the second derivative of loss_fn with respect to an output
    score_name: str
    score: Callable[[nn.Module], float]


def digits_task(seed: int) -> Task:
    # Imported here: a CSV needs no scikit-learn.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(
        torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), stratify=labels, random_state=seed
    )

    def accuracy(model: nn.Module) -> float:
        return 100 * (model(x_test).argmax(dim=1) == y_test).float().mean().item()

    return Task(
        f"scikit-learn's handwritten digits: 64 pixels, 10 classes, {len(x_train)} to train, {len(x_test)} to test",
        TensorDataset(x_train, y_train),
        outputs=10,
        loss_fn=nn.CrossEntropyLoss(),
        curvature=0.5,
        score_name="accuracy, %",
        score=accuracy,
    )


def csv_task(path: Path, seed: int) -> Task:
    """Regression of the last column; features and target are standardized by the training split."""
    table = read_csv(path)
    order = torch.randperm(len(table.target), generator=torch.Generator().manual_seed(seed))
    train, test = order[len(order) // 4 :], order[: len(order) // 4]

    def standardize(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = values.double()
        std, mean = torch.std_mean(values[train], dim=0, correction=0)
        std[std == 0] = 1  # a constant column
        return ((values - mean) / std).float(), std

    x, _ = standardize(table.features)
    y, unit = standardize(table.target[:, None])

    def rmse(model: nn.Module) -> float:
        return nn.functional.mse_loss(model(x[test]), y[test]).sqrt().item() * unit.item()

    return Task(
        f"{path.name}: {table.names[-1]} from {x.shape[1]} features, {len(train)} rows to train, {len(test)} to test; "
        f"the target's standard deviation is {unit.item():.4g}",
        TensorDataset(x[train], y[train]),
        outputs=1,
        loss_fn=nn.MSELoss(),
        curvature=2.0,
        score_name="RMSE",
        score=rmse,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The training.


@dataclass(frozen=True)
class Recipe:
    """What all settings share."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    adam_lr: float = 0.003
    max_norm: float = 1.0
    seed: int = 0


@dataclass
class Result:
    """Of one setting, trained by the loop and by regfused; `bare` is forward and backward alone."""

    setting: Setting
    score: dict[str, float] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)  # all parameters in one vector
    step_us: dict[str, list[float]] = field(default_factory=lambda: {"loop": [], "regfused": [], "bare": []})

    @property
    def largest_difference(self) -> float:
        return (self.weights["loop"] - self.weights["regfused"]).abs().max().item()

    def zeros(self, who: str) -> float:
        """Share of exact zeros, in percent."""
        return 100 * (self.weights[who] == 0).float().mean().item()

    def median_us(self, who: str) -> float:
        return median(self.step_us[who])

    def replaced_us(self, who: str) -> float:
        """Penalty, clip and update: what a step costs beyond forward and backward."""
        return median(step - bare for step, bare in zip(self.step_us[who], self.step_us["bare"], strict=True))


def build_mlp(task: Task, seed: int, dropout: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    features = task.train.tensors[0].shape[1]
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), dropout, nn.Linear(64, task.outputs))


# The layer that each side has where the setting asks for dropout. Forward and backward alone have none: what it takes
# shows beside penalty, clip and update.
DROPOUT: dict[str, type[nn.Dropout]] = {"loop": nn.Dropout, "regfused": regfused.Dropout}


def training_steps(
    models: dict[str, nn.Module], loss_fn: nn.Module, setting: Setting, recipe: Recipe
) -> dict[str, Step]:
    """A step of the loop, of regfused, and of forward and backward alone."""
    lr, momentum, max_norm = recipe.lr, recipe.momentum, recipe.max_norm
    l1, l2, proximal = setting.l1, setting.l2, setting.proximal
    loop, fused, bare = models["loop"], models["regfused"], models["bare"]

    penalties = dict(l1=l1, l2=l2, proximal=proximal, group_l1=setting.group_l1, max_norm=max_norm)
    if setting.adam:
        of_torch = torch.optim.Adam(loop.parameters(), lr=recipe.adam_lr)
        of_regfused = regfused.Adam(fused.parameters(), lr=recipe.adam_lr, **penalties)
    else:
        of_torch = torch.optim.SGD(loop.parameters(), lr=lr, momentum=momentum)
        of_regfused = regfused.SGD(fused.parameters(), lr=lr, momentum=momentum, **penalties)
    never_stepped = torch.optim.SGD(bare.parameters(), lr=lr)

    if setting.group_l1:
        loop_kind = partial(
            group_lasso_loop_step, lr=lr, group_l1=setting.group_l1, momentum=momentum, max_norm=max_norm
        )
    elif proximal:
        loop_kind = partial(proximal_loop_step, lr=lr, l1=l1, momentum=momentum, max_norm=max_norm)
    else:
        loop_kind = partial(loop_step, l1=l1, l2=l2, max_norm=max_norm)
    return {
        "loop": partial(loop_kind, loop, of_torch, loss_fn),
        "regfused": partial(regfused_step, fused, of_regfused, loss_fn),
        "bare": partial(forward_and_backward, bare, never_stepped, loss_fn),
    }


def train_both(
    task: Task, setting: Setting, recipe: Recipe, dtype: torch.dtype, after_epoch: Callable[[], None] = lambda: None
) -> Result:
    """Trains the two side by side, batch by batch and taking turns in going first: noise of the machine hits both."""
    models = {}
    for who in ("loop", "regfused", "bare"):
        drops = setting.dropout and who in DROPOUT
        layer = DROPOUT[who](setting.dropout) if drops else nn.Identity()
        models[who] = build_mlp(task, recipe.seed, layer).to(dtype)
    steps = training_steps(models, task.loss_fn, setting, recipe)
    data = TensorDataset(*(t.to(dtype) if t.is_floating_point() else t for t in task.train.tensors))
    shuffle = torch.Generator().manual_seed(recipe.seed)
    batches = DataLoader(data, batch_size=recipe.batch_size, shuffle=True, generator=shuffle)

    result = Result(setting)
    order = list(steps)
    for _ in range(recipe.epochs):
        for inputs, targets in batches:
            for who in order:
                torch.manual_seed(len(result.step_us[who]))  # dropout draws from the same state on both sides
                start = time.perf_counter()
                steps[who](inputs, targets)
                result.step_us[who].append(1e6 * (time.perf_counter() - start))
            order.append(order.pop(0))
        after_epoch()
    for who in ("loop", "regfused"):
        result.weights[who] = nn.utils.parameters_to_vector(models[who].parameters()).detach()
        with torch.no_grad():
            result.score[who] = task.score(models[who].float().eval())
    return result


def regularization_path(task: Task, strengths: int, steps: int, recipe: Recipe) -> Iterator[tuple[float, torch.Tensor]]:
    """A linear model by proximal L1 at rising `l1`, each from the same start: (l1, weights), one after the other.

    Linear, on all rows at once: the objective is convex, so the weights are a function of `l1` alone.
    """
    inputs, targets = task.train.tensors
    # One over the largest curvature of the loss in any direction: stable for any data.
    lr = 1 / (task.curvature * (torch.linalg.matrix_norm(inputs, ord=2) ** 2 / len(inputs) + 1).item())
    for l1 in torch.logspace(-3.5, 0, strengths).mul(smallest_l1_without_weights(task)).tolist():
        torch.manual_seed(recipe.seed)
        model = nn.Linear(inputs.shape[1], task.outputs)
        groups = [{"params": [model.weight], "l1": l1}, {"params": [model.bias]}]
        optimizer = regfused.SGD(groups, lr=lr, momentum=0.9, proximal=True)
        for _ in range(steps):
            regfused_step(model, optimizer, task.loss_fn, inputs, targets)
        yield l1, model.weight.detach().flatten()


def smallest_l1_without_weights(task: Task) -> float:
    """A little above the largest gradient at zero weights: no weight of a linear model gains by leaving zero."""
    inputs, targets = task.train.tensors
    model = nn.Linear(inputs.shape[1], task.outputs)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    task.loss_fn(model(inputs), targets).backward()
    return 1.1 * model.weight.grad.abs().max().item()
