"""What one optimizer does of its own in a step; `regfused.reference.step` does what all have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

Number = float | Tensor
Group = Mapping[str, Any]
Slots = Mapping[str, Tensor | None]


class Move(NamedTuple):
    """What a rule makes of ``d``."""

    move: Tensor | None  # what the parameter is reduced by; None: its bits stay as they are
    length: Number  # of the step of each element, or of all of them: what ``lr`` is to plain gradient descent
    slots: Mapping[str, Tensor]  # as they are after the step, in the type of arithmetic


class Rule:
    """A rule without options and state of its own; each method is for a rule to replace."""

    #: Every rule there is.
    KNOWN: ClassVar[list[type[Rule]]] = []

    name: ClassVar[str]
    #: Each option of this rule alone, with its kind: "strength" (finite, >= 0), "finite", "fractions" (a pair, each in
    #: [0, 1)) or "flag".
    options: ClassVar[Mapping[str, str]] = {}
    #: Tensors of a parameter's shape that the rule may keep in its state.
    slots: ClassVar[tuple[str, ...]] = ()
    #: Those of them that are not there before a parameter's first gradient, and are not zeros then: `move` gets None.
    #: In a step with two gradients for a parameter that is listed twice, both are its first.
    start_from_gradient: ClassVar[bool] = False
    #: Whether ``state["step"]`` has the number of steps that a parameter has made.
    counts_steps: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        Rule.KNOWN.append(cls)

    def slots_of(self, group: Group) -> tuple[str, ...]:
        """The slots that this group needs."""
        return self.slots

    def steady_gain(self, group: Group) -> Number:
        """k: by how much a constant ``d`` moves a parameter in the long run, in lengths of a step."""
        return 1.0

    def check(self, operation: str, group: Group) -> None:
        """Raise for options that do not go together. Each was checked for its kind before."""

    def check_construction(self, operation: str, group: Group) -> None:
        """Raise for what a new group may not have, but schedulers may pass through."""

    def check_gradient(self, operation: str, place: str, group: Group, param: Tensor, grad: Tensor) -> None:
        """Raise for a parameter and a gradient that the rule has no step for."""

    def allows_sparse(self, group: Group) -> bool:
        """Whether, as far as the rule is concerned, a gradient may be sparse."""
        return False

    def move(self, d: Tensor, slots: Slots, group: Group, t: Number | None, lr: Number) -> Move:
        """The move of one parameter. Nothing that is handed in is changed.

        Args:
            d: what the gradient has become: scaled, clipped, with penalty and coupled weight decay.
            slots: those of `slots_of`, in the type of arithmetic.
            group: the options of the parameter.
            t: the number of this step, from 1, a 0-dim tensor where the host cannot know it; None without
                `counts_steps`.
            lr: the learning rate, likewise.
        """
        raise NotImplementedError

    def length(self, slots: Mapping[str, Tensor], group: Group, t: Number | None, lr: Number) -> Number:
        """`Move.length`, made again from the slots as they are after the step."""
        return lr


def is_on(value: Any) -> bool:
    """Whether an option does anything; one that is off must not meet infinities, and a tensor may need its graph."""
    return isinstance(value, Tensor) or value != 0
