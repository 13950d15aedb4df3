"""An existing model with this dropout in it, and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from regfused.dropout import Dropout


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        count: modules that were converted.
        left_alone: the name of each module that drops and was not converted, with the name of its type.
    """

    count: int
    left_alone: dict[str, str]


def convert(model: nn.Module, *, undo: bool = False) -> Conversion:
    """Makes every ``torch.nn.Dropout`` of a model a `regfused.Dropout`, in place.

    The modules stay the objects that they are: ``p``, ``training``, ``inplace``, hooks, names and other references to
    them are kept. Parameters and checkpoints don't change.

    Only a module whose type is ``torch.nn.Dropout`` itself is converted. What else drops is left alone, and named in
    the result: subclasses (they may drop in their own way), ``Dropout1d`` and the like (whole channels),
    ``AlphaDropout``, scripted modules, and modules with a probability of their own in ``dropout``, such as
    ``MultiheadAttention`` and ``LSTM``. A call of ``torch.nn.functional.dropout`` inside of a ``forward`` is not seen.

    Convert before ``torch.compile``: older torch does not notice that a module of a compiled model has another class.

    Args:
        model: any module, also a single ``Dropout``. A module that stands in several places counts once.
        undo: make every `regfused.Dropout` a ``torch.nn.Dropout`` again.

    Returns:
        A `Conversion`: ``count``, the number of converted modules, and ``left_alone``, a dictionary from the name of
        each module that drops and was left alone to the name of its type.

    Raises:
        TypeError: where ``model`` is no module.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1), torch.nn.Dropout2d(0.1))
        >>> regfused.convert(model)
        Conversion(count=1, left_alone={'2': 'Dropout2d'})
        >>> type(model[1]).__module__
        'regfused.dropout'
        >>> regfused.convert(model, undo=True).count
        1
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, but is {model!r}")
    found, wanted = (Dropout, nn.Dropout) if undo else (nn.Dropout, Dropout)
    modules = [module for module in model.modules() if type(module) is found]
    left_alone = dict(_that_drop(model, (nn.Dropout, Dropout)))
    for module in modules:
        module.__class__ = wanted
    return Conversion(len(modules), left_alone)


def _that_drop(model: nn.Module, but: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    """Names and types of the modules that drop, but for those of exactly these types."""
    for name, module in model.named_modules():
        # A scripted module has a type that says nothing.
        kind = getattr(module, "original_name", type(module).__name__)
        own = getattr(module, "dropout", 0)
        drops = "Dropout" in kind or isinstance(module, nn.modules.dropout._DropoutNd)
        if type(module) not in but and (drops or (isinstance(own, (int, float)) and own > 0)):
            yield name, kind
