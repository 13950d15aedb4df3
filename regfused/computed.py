"""Weights that a module computes from its parameters: parametrized, pruned, with weight or spectral norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


@dataclass(frozen=True)
class Computed:
    """One tensor of a module that is no parameter, but what layers work with."""

    name: str
    sources: tuple[str, ...]  # the parameters that it is made of, by their names in the module
    value: Callable[[], Tensor]  # as the parameters are now; changes nothing


def computed(module: nn.Module) -> Iterator[Computed]:
    """The tensors that this module itself computes, but not those of its children."""
    lists = getattr(module, "parametrizations", None)
    for name, made in lists.items() if isinstance(lists, nn.ModuleDict) else ():
        if isinstance(made, ParametrizationList):
            sources = tuple(f"parametrizations.{name}.{source}" for source, _ in made.named_parameters())
            yield Computed(name, sources, partial(_evaluated, made))
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            yield Computed(name, (f"{name}_orig",), partial(hook.apply_mask, module))
        elif isinstance(hook, WeightNorm):
            sources = (f"{hook.name}_g", f"{hook.name}_v")
            yield Computed(hook.name, sources, partial(hook.compute_weight, module))
        elif isinstance(hook, SpectralNorm):
            value = partial(hook.compute_weight, module, do_power_iteration=False)
            yield Computed(hook.name, (f"{hook.name}_orig",), value)


def _evaluated(made: ParametrizationList) -> Tensor:
    """What the parametrizations give, past torch's cache of them; while training some would move their buffers on."""
    training = [part for part in made.modules() if part.training]
    for part in training:
        part.training = False
    try:
        return made()
    finally:
        for part in training:
            part.training = True


def effective(model: nn.Module) -> dict[str, tuple[str, Callable[[], Tensor]]]:
    """For each parameter that something is computed from: the name in the model of what is, and its value."""
    found: dict[str, tuple[str, Callable[[], Tensor]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for one in computed(module):
            for source in one.sources:
                found[_join(prefix, source)] = (_join(prefix, one.name), one.value)
    for source, (name, value) in found.items():
        while name in found:  # one of two: a pruned direction of weight norm
            name, value = found[name]
        found[source] = (name, value)
    return found


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
