"""Options of parameter groups over time, as torch's schedulers do it for the learning rate."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from regfused import options
from regfused.reference.optimizer import Regularized
from regfused.reference.rule import Rule

_NAME = "OptionScheduler"


class OptionScheduler(LRScheduler):
    r"""Sets an option of every parameter group to its initial value times a factor, at each step of the schedule.

    What ``torch.optim.lr_scheduler.LambdaLR`` is for ``lr``, for ``l1``, ``l2``, ``group_l1``, ``weight_decay``,
    ``max_norm``, ``momentum`` and every other option that is one number::

        value(t) = initial * function(t)        t = 0 when the scheduler is made, one more with each step()

    The initial value is kept in the group under torch's kind of name: ``initial_l1`` for ``l1``. A value that rounding
    alone has put below zero is written as 0. Options that are tensors are filled in place.

    It is an ``LRScheduler``, so that loops and wrappers take it, but changes no ``lr`` (unless that is its option). It
    works beside torch's schedulers on one optimizer. Two schedulers of one option do not multiply: the last to step
    writes.

    ``ChainedScheduler`` takes it, alone or with schedulers of ``lr``. ``SequentialLR`` takes it with others of the
    same option; each counts from 0 at its milestone. Make that ``SequentialLR`` before the schedulers of ``lr``: its
    constructor sets every ``lr`` back to ``initial_lr`` (which this class notes, as torch's do).

    To resume, as in torch: make the scheduler, then call ``load_state_dict`` of the optimizer and of the scheduler. Or
    without its state: load the optimizer, then make the scheduler with ``last_epoch`` one less than it had.

    Args:
        optimizer: one of `regfused` or `regfused.reference`.
        option: name of an option that is one number, and is set in every group. Not flags, ``group_dim``,
            ``norm_type``, ``nonfinite``, ``betas``.
        function: takes ``t`` and returns the factor; or a list of functions, one for each group. See `warmup`, `ramp`.
        last_epoch: the ``t`` before the first one. Other than -1, ``initial_...`` must be in every group.

    Raises:
        TypeError: where the optimizer is another.
        ValueError: for arguments that are not as they must be; also in ``step()``, for a value that the optimizer would
            refuse. With the operation, the demand and the value; nothing has changed then. Options that do not go
            together are refused by the optimizer's step, when all schedulers have written theirs.

    Example::

        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = regfused.SGD(model.parameters(), lr=0.1, l1=0.5, proximal=True)
        >>> scheduler = regfused.OptionScheduler(optimizer, "l1", regfused.warmup(4))
        >>> for _ in range(3):
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> scheduler.get_last_value()
        [0.375]
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        option: str,
        function: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        # Not torch's constructor: it is about the learning rate, and changes the optimizer before all is checked.
        if not isinstance(optimizer, Regularized):
            raise TypeError(f"{_NAME}: optimizer must be one of regfused, but is a {type(optimizer).__name__}")
        groups = optimizer.param_groups
        names = _schedulable(optimizer._rule)
        if not isinstance(option, str) or option not in names:
            raise ValueError(
                f"{_NAME}: option must be one number in the groups of {type(optimizer).__name__}, one of "
                f"{', '.join(names)}, but got {option!r}"
            )
        if not isinstance(last_epoch, int) or isinstance(last_epoch, bool) or last_epoch < -1:
            raise ValueError(f"{_NAME}: last_epoch must be an int >= -1, but got {last_epoch!r}")
        initial = f"initial_{option}"
        for g, group in enumerate(groups):
            if group[option] is None:
                raise ValueError(f"{_NAME}: {option} must be a number to be scaled, but is None in group {g}")
            if last_epoch >= 0 and initial not in group:
                raise ValueError(
                    f"{_NAME}: with last_epoch >= 0 every group must have {initial!r}, as a checkpoint of a scheduled "
                    f"optimizer has, but group {g} has not, and last_epoch is {last_epoch}"
                )
        self.optimizer = optimizer
        self._rule = optimizer._rule
        self.option = option
        self.functions = _one_for_each(function, len(groups))
        self.base_values = [options.number(_NAME, initial, group.get(initial, group[option])) for group in groups]
        self.last_epoch = last_epoch
        self._step_count = 0
        values = self._values(last_epoch + 1)
        if last_epoch == -1:
            for group in groups:
                for name in ("lr", option):
                    group.setdefault(f"initial_{name}", _copied(group[name]))
        self._write(last_epoch + 1, values)
        self._step_count += 1

    def step(self, epoch: int | None = None) -> None:
        """Write the next values into the groups. Call it after the optimizer's step, as any scheduler of torch.

        Args:
            epoch: go to this ``t`` instead of the next one.

        Raises:
            ValueError: for a value that the optimizer would refuse; nothing has changed then.
        """
        self._update_lr(epoch)
        self._step_count += 1

    def get_last_value(self) -> list[float]:
        """The values that were written last, one for each group."""
        return list(self._last_value)

    def get_last_lr(self) -> list[float | torch.Tensor]:
        """The learning rates as they are in the groups, for torch's schedulers of schedulers."""
        return [_copied(group["lr"]) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | torch.Tensor]:
        """`get_last_lr`."""
        return self.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values. Of functions, only objects with ``__call__`` have a state, their ``__dict__``."""
        return {
            "option": self.option,
            "base_values": list(self.base_values),
            "last_epoch": self.last_epoch,
            "functions": [dict(vars(function)) if _has_state(function) else None for function in self.functions],
            "_last_value": list(self._last_value),
            "_step_count": self._step_count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. The values in the groups come with the optimizer's, which must be loaded after this was made.

        Args:
            state_dict: as ``state_dict()`` returned it.

        Raises:
            ValueError: for the state of another option, of other groups, or none; nothing has changed then.
        """
        operation = f"{_NAME}.load_state_dict"
        expected = ("option", "base_values", "last_epoch", "functions", "_last_value", "_step_count")
        if not isinstance(state_dict, dict) or any(name not in state_dict for name in expected):
            got = sorted(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(f"{operation}: a state must be a dict with {', '.join(expected)}, but got {got}")
        if state_dict["option"] != self.option:
            raise ValueError(
                f"{operation}: the state must be that of option {self.option!r}, but is of {state_dict['option']!r}"
            )
        count = len(self.functions)
        for name in ("base_values", "functions", "_last_value"):
            value = state_dict[name]
            if not isinstance(value, list | tuple) or len(value) != count:
                raise ValueError(
                    f"{operation}: {name} must be a list, one for each of {count} groups, but got {value!r}"
                )
        for name in ("last_epoch", "_step_count"):  # below zero where a SequentialLR has not come to it yet
            if not isinstance(state_dict[name], int):
                raise ValueError(f"{operation}: {name} must be an int, but got {state_dict[name]!r}")
        for function, own in zip(self.functions, state_dict["functions"], strict=True):
            if own is not None and not (isinstance(own, dict) and _has_state(function)):
                raise ValueError(
                    f"{operation}: a state of a function must be a dict, and the function an object that takes it, "
                    f"but got {own!r} for {function!r}"
                )
        base_values, last_value = (
            [options.number(operation, name, value) for value in state_dict[name]]
            for name in ("base_values", "_last_value")
        )
        self.base_values, self._last_value = base_values, last_value
        self.last_epoch, self._step_count = state_dict["last_epoch"], state_dict["_step_count"]
        for function, own in zip(self.functions, state_dict["functions"], strict=True):
            if own is not None:
                vars(function).update(own)

    # --- What torch's SequentialLR calls ----------------------------------------------------------

    def _initial_step(self) -> None:
        self._step_count = 0
        self.step()

    def _update_lr(self, epoch: int | None = None) -> None:
        t = self.last_epoch + 1 if epoch is None else epoch
        self._write(t, self._values(t))

    # ----------------------------------------------------------------------------------------------

    def _values(self, t: int) -> list[float]:
        """One for each group, checked; nothing is changed."""
        groups = self.optimizer.param_groups
        if len(groups) != len(self.functions):
            raise ValueError(
                f"{_NAME}.step: the optimizer must have the {len(self.functions)} parameter groups that it had when "
                f"the scheduler was made, but has {len(groups)}"
            )
        values = []
        for g, (function, base) in enumerate(zip(self.functions, self.base_values, strict=True)):
            place = f"{_NAME}.step, t = {t}, group {g}"
            factor = function(t)
            value = base * options.number(place, "the factor", factor)
            values.append(_checked(place, self.option, value, options.rounding(factor), self._rule))
        if self.option == "max_norm" and any(value != values[0] for value in values):
            raise ValueError(
                f"{_NAME}.step, t = {t}: max_norm must be the same in every parameter group, but got {values}"
            )
        return values

    def _write(self, t: int, values: list[float]) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=True):
            if isinstance(group[self.option], torch.Tensor):
                with torch.no_grad():
                    group[self.option].fill_(value)
            else:
                group[self.option] = value
        self.last_epoch = t
        self._last_value = values


def warmup(steps: int) -> Callable[[int], float]:
    """A factor that grows from 0 to 1: ``min(t/steps, 1)``; always 1 with ``steps = 0``. For `OptionScheduler`.

    Args:
        steps: how many, an int >= 0.

    Raises:
        ValueError: for another number of steps.

    Example::

        >>> [warmup(4)(t) for t in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return _ramp("warmup", steps, 0.0, 1.0, 0, False)


def ramp(
    steps: int, start: float = 0.0, end: float = 1.0, *, delay: int = 0, cosine: bool = False
) -> Callable[[int], float]:
    """A factor that goes from one value to another, and stays there. For `OptionScheduler`::

        x      = min(max(t - delay, 0)/steps, 1)
        x      = (1 - cos(pi*x))/2                 cosine only (Loshchilov and Hutter, SGDR, 2017)
        factor = (1 - x)*start + x*end

    Args:
        steps: how many it takes, an int >= 0; with 0 it jumps after the delay.
        start, end: finite.
        delay: how long it stays at ``start``, an int >= 0.
        cosine: slow at both ends, instead of linear.

    Raises:
        ValueError: for arguments outside of these ranges.

    Example::

        >>> [ramp(2, 1.0, 0.5, delay=1)(t) for t in range(5)]
        [1.0, 1.0, 0.75, 0.5, 0.5]
    """
    return _ramp("ramp", steps, start, end, delay, cosine)


def _ramp(operation: str, steps: int, start: float, end: float, delay: int, cosine: bool) -> Callable[[int], float]:
    for name, count in (("steps", steps), ("delay", delay)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"{operation}: {name} must be an int >= 0, but got {count!r}")
    first, last = (options.number(operation, name, value) for name, value in (("start", start), ("end", end)))
    if not (math.isfinite(first) and math.isfinite(last)):
        raise ValueError(f"{operation}: start and end must be finite, but got {start} and {end}")

    def factor(t: int) -> float:
        if t - delay >= steps:
            return last
        if t <= delay:
            return first
        x = (t - delay) / steps
        if cosine:
            x = (1 - math.cos(math.pi * x)) / 2
        return (1 - x) * first + x * last

    return factor


def _schedulable(rule: Rule) -> tuple[str, ...]:
    """Options that are one number, and where more or less of it means something."""
    return (*options.strengths_of(rule), *(name for name, kind in rule.options.items() if kind == "finite"), "max_norm")


def _checked(place: str, option: str, value: float, below: float, rule: Rule) -> float:
    """The value as it is written; ``ValueError`` where the optimizer would refuse it."""
    if option == "max_norm":
        return options.strength(value) if value >= -below else options.check_max_norm(place, value)
    if option in options.strengths_of(rule):
        return float(options.strength(options.check_strength(place, option, value, below)))
    if not math.isfinite(value):
        raise ValueError(f"{place}: {option} must be finite, but got {value}")
    return value


def _one_for_each(function: Any, count: int) -> list[Callable[[int], float]]:
    functions = list(function) if isinstance(function, list | tuple) else [function] * count
    if len(functions) != count:
        raise ValueError(f"{_NAME}: function must be one, or one for each of {count} groups, but got {len(functions)}")
    for one in functions:
        if not callable(one):
            raise ValueError(f"{_NAME}: function must be callable, but got {one!r}")
    return functions


def _has_state(function: Any) -> bool:
    """Whether this is an object that may remember something."""
    return not isinstance(function, types.FunctionType | types.MethodType | type) and hasattr(function, "__dict__")


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
