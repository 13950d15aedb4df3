"""What a regularization path found: the points of it, the choice among them, a table and a figure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

# Okabe and Ito's colours, which stay apart for every kind of colour vision.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
_MOST_LINES = 60  # of coefficients in the figure


@dataclass(frozen=True, eq=False)
class RegularizationPath:
    """The points of a regularization path, strengths decreasing; ``print`` shows the table. Made by `regfused.path`.

    Attributes:
        strengths: of the penalty, decreasing.
        losses: without the penalty, in evaluation mode.
        scores: mean of the validation score; None without validation.
        standard_errors: of each score, ``std/sqrt(n)``; NaN where a score was one number. None without validation.
        nonzeros: elements of the penalized parameters that are not exactly zero.
        groups: slices of them along ``group_dim`` with a non-zero element.
        converged: whether the optimality conditions held to the tolerance.
        steps: that training took at the point.
        size, group_count: how many elements and slices the penalized parameters have.
        names: of the penalized parameters.
        states: for each point that was kept, copies of all parameters and buffers by name.
        option, greater_is_better: as `regfused.path` was called.
        model: that `load` writes to.
    """

    strengths: tuple[float, ...]
    losses: tuple[float, ...]
    scores: tuple[float, ...] | None
    standard_errors: tuple[float, ...] | None
    nonzeros: tuple[int, ...]
    groups: tuple[int, ...]
    converged: tuple[bool, ...]
    steps: tuple[int, ...]
    size: int
    group_count: int
    option: str
    greater_is_better: bool
    names: tuple[str, ...]
    states: dict[int, dict[str, Tensor]] = field(repr=False)
    model: nn.Module = field(repr=False)

    def __len__(self) -> int:
        return len(self.strengths)

    @property
    def best(self) -> int:
        """Index of the best score; of equal ones that of the largest strength.

        Raises:
            ValueError: for a path without validation.
        """
        scores = self._signed("best")
        return scores.index(max(scores))

    @property
    def one_standard_error(self) -> int:
        """Index of the largest strength whose score is within one standard error of the best one.

        The rule of Breiman, Friedman, Olshen, Stone, Classification and regression trees, 1984; glmnet's
        ``lambda.1se``.

        Raises:
            ValueError: for a path without validation, or with one that gave a single number.
        """
        scores = self._signed("one_standard_error")
        assert self.standard_errors is not None
        error = self.standard_errors[self.best]
        if not math.isfinite(error):
            raise ValueError(
                "path.one_standard_error: validation must return a tensor of at least 2 scores, of examples or folds, "
                f"but returned one number, {self.scores[self.best] if self.scores else None}"
            )
        worst = max(scores) - error
        return next(i for i, score in enumerate(scores) if score >= worst)

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """For each penalized parameter its values at all points, stacked: ``(len(path), *shape)``.

        Raises:
            ValueError: for a path with ``keep=False``.
        """
        if len(self.states) < len(self):
            raise ValueError(
                f"path.coefficients: every point must have been kept, but with keep=False only {sorted(self.states)} "
                f"of {len(self)} were"
            )
        return {name: torch.stack([self.states[i][name] for i in range(len(self))]) for name in self.names}

    def load(self, index: int) -> None:
        """Put parameters and buffers of one point into the model.

        Args:
            index: of the point, negative from the back: ``path.load(path.best)``.

        Raises:
            ValueError: for a point that is not there or was not kept.
        """
        if isinstance(index, bool) or not isinstance(index, int) or not -len(self) <= index < len(self):
            raise ValueError(f"path.load: index must be an int in [{-len(self)}, {len(self) - 1}], but got {index!r}")
        state = self.states.get(index % len(self))
        if state is None:
            raise ValueError(
                f"path.load: the point must have been kept, but with keep=False only {sorted(self.states)} were, not "
                f"{index}"
            )
        restore(self.model, state)

    def table(self) -> str:
        """The points as text, the best score and the one-standard-error point marked."""
        cells = [("", "strength", "loss", "score", "std. error", "non-zeros", "groups", "steps", "")]
        marks = self._marks()
        for i, strength in enumerate(self.strengths):
            score = "" if self.scores is None else f"{self.scores[i]:.4f}"
            error = self.standard_errors[i] if self.standard_errors else math.nan
            steps = f"{self.steps[i]:,}" + ("" if self.converged[i] else "*")
            counts = f"{self.nonzeros[i]:,}", f"{self.groups[i]:,}", steps
            se = f"{error:.4f}" if math.isfinite(error) else ""
            mark = ", ".join(name for name, at in marks.items() if at == i)
            cells.append((str(i), f"{strength:.4g}", f"{self.losses[i]:.5g}", score, se, *counts, mark))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = []
        for row in cells:
            padded = [cell.rjust(w) for cell, w in zip(row[:-1], widths, strict=False)]
            lines.append("  ".join([*padded, row[-1]]).rstrip())
        lines.append(f"of {self.size:,} elements in {self.group_count:,} groups")
        if not all(self.converged):
            lines.append("* steps used up before the tolerance was reached")
        return "\n".join(lines)

    __str__ = table

    def plot(self, file: str | PathLike[str] | None = None) -> Any:
        """Draw coefficients and score against the strength, as glmnet does.

        Above, the coefficients (the 60 that get largest, where there are more), or, where points were not kept, the
        number of non-zeros; on top, how many are not zero. Below, the score with one standard error to each side, or
        the loss. Dotted lines mark the best score and the one-standard-error point.

        Args:
            file: where to save it; its ending says in which format. None: not saved.

        Returns:
            The ``matplotlib.figure.Figure``.

        Raises:
            ModuleNotFoundError: where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"path.plot needs matplotlib (pip install matplotlib), but {error}", name=error.name
            ) from None
        figure = Figure(figsize=(8, 7.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        if len(self.states) == len(self):
            self._plot_coefficients(above)
        else:
            above.plot(self.strengths, self.nonzeros, "o-", color=_BLUE, markersize=4)
            above.set_ylabel(f"non-zeros (of {self.size:,})")
        if self.scores is None:
            below.plot(self.strengths, self.losses, "o-", color=_BLUE, markersize=4)
            below.set_ylabel("loss, without the penalty")
        else:
            errors = [e if math.isfinite(e) else 0.0 for e in self.standard_errors or ()]
            below.errorbar(
                self.strengths, self.scores, errors, fmt="o-", color=_BLUE, ecolor="#999999", capsize=3, markersize=4
            )
            below.set_ylabel("validation score" + (" ± 1 standard error" if any(errors) else ""))
        below.set_xlabel(f"{self.option}, strength of the penalty (log scale)")
        below.set_xscale("log")
        styles = {"best": (_GREEN, ":", "best score"), "1 SE": (_ORANGE, "--", "one standard error")}
        for name, at in self._marks().items():
            colour, style, label = styles[name]
            for ax in (above, below):
                ax.axvline(self.strengths[at], color=colour, linestyle=style, linewidth=1.5)
            text = f"{label}: {self.option} = {self.strengths[at]:.3g}, {self.nonzeros[at]:,} non-zeros"
            below.plot([], [], color=colour, linestyle=style, linewidth=1.5, label=text)
        if self.scores is not None:
            below.legend(loc="best", fontsize=9)
        for ax in (above, below):
            ax.grid(color="#DDDDDD", linewidth=0.6)
            ax.set_axisbelow(True)
        self._count_on_top(above)
        if file is not None:
            figure.savefig(file, dpi=110)
        return figure

    def _plot_coefficients(self, ax: Any) -> None:
        stacked = [values.flatten(1).float().cpu() for values in self.coefficients.values()]
        values = torch.cat(stacked, dim=1)
        shown = values.abs().amax(dim=0).topk(min(_MOST_LINES, values.shape[1])).indices
        ax.plot(self.strengths, values[:, shown].numpy(), color=_BLUE, linewidth=0.9, alpha=0.55)
        ax.axhline(0, color="black", linewidth=0.8)
        few = len(shown) < values.shape[1]
        ax.set_ylabel("coefficients" + (f" (the {len(shown)} largest of {values.shape[1]:,})" if few else ""))

    def _count_on_top(self, ax: Any) -> None:
        """A few strengths with their numbers of non-zeros, above the upper panel."""
        places = sorted({round(i * (len(self) - 1) / 7) for i in range(8)})
        top = ax.secondary_xaxis("top")
        what, counts = ("groups", self.groups) if self.option == "group_l1" else ("non-zeros", self.nonzeros)
        top.set_xticks([self.strengths[i] for i in places], [f"{counts[i]:,}" for i in places], minor=False)
        top.set_xticks([], minor=True)
        top.set_xlabel(f"{what} (of {self.group_count if what == 'groups' else self.size:,})")

    def _signed(self, operation: str) -> list[float]:
        """Scores, the larger the better."""
        if self.scores is None:
            raise ValueError(f"path.{operation}: the path must have been made with validation, but got validation=None")
        return [score if self.greater_is_better else -score for score in self.scores]

    def _marks(self) -> dict[str, int]:
        if self.scores is None:
            return {}
        marks = {"best": self.best}
        assert self.standard_errors is not None
        if math.isfinite(self.standard_errors[self.best]):
            marks["1 SE"] = self.one_standard_error
        return marks


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put a `snapshot` back, into the tensors that are there."""
    for name, tensor in _tensors(model).items():
        tensor.copy_(state[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
