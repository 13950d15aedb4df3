"""How strong the penalties are, and which parameters bear them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from regfused.computed import effective

_NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


def elastic_net(strength: float, alpha: float) -> dict[str, float]:
    """The two strengths of an elastic net from one and a mixture: ``strength * (alpha*|p| + (1 - alpha)*p^2)``.

    Args:
        strength: of the whole penalty, finite and >= 0.
        alpha: share of L1, in [0, 1]: 1 is the lasso, 0 is ridge. scikit-learn calls it ``l1_ratio`` and halves the
            squared term (Zou and Hastie, Regularization and variable selection via the elastic net, 2005).

    Returns:
        ``{"l1": strength*alpha, "l2": strength*(1 - alpha)}``, to be passed on:
        ``SGD(params, **elastic_net(1e-4, alpha=0.5))``.

    Raises:
        ValueError: for a strength or an alpha outside its range.

    Example::

        >>> elastic_net(0.5, alpha=0.25)
        {'l1': 0.125, 'l2': 0.375}
    """
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"elastic_net: strength must be finite and >= 0, but got {strength}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"elastic_net: alpha must be in [0, 1], but got {alpha}")
    return {"l1": strength * alpha, "l2": strength * (1 - alpha)}


def param_groups(
    model: nn.Module,
    *,
    l1: float = 0.0,
    l2: float = 0.0,
    weight_decay: float = 0.0,
    group_l1: float = 0.0,
    skip: Iterable[str] = (),
    **options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups with the penalties off for biases and normalization layers.

    A parameter that a weight or bias is computed from (``torch.nn.utils.parametrize``, ``prune``, weight and spectral
    norm) counts as that weight or bias: ``layer.parametrizations.bias.original`` and ``layer.bias_orig`` are
    ``layer.bias``.

    Args:
        model: whose parameters that require a gradient are grouped.
        l1, l2, weight_decay, group_l1: for the first group; 0 in the second.
        skip: further names for the second group, as shell patterns: ``["*.embedding.weight", "head.*"]``. They
            fit what a parameter is called, or what it counts as.
        options: any other option of the optimizer, the same in both groups.

    Returns:
        Two groups, the penalized and the others, each with its ``params`` in the model's order. A group without
        parameters is left out. Biases are parameters whose name starts or ends with ``bias``; normalization layers are
        torch's, and modules whose class name ends in ``Norm`` or ``Norm1d``, ``Norm2d``, ``Norm3d``.

    Raises:
        ValueError: for a pattern in ``skip`` that fits no parameter.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> [len(group["params"]) for group in param_groups(model, l1=1e-4)]
        [1, 3]
    """
    norm_layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_norm(module)}
    in_norm_layer = {id(param) for module in norm_layers.values() for param in module.parameters(recurse=False)}
    known_as = effective(model)
    patterns = list(skip)
    unused = set(patterns)
    penalized: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, param in model.named_parameters():
        plain = known_as[name][0] if name in known_as else name
        fitting = [pattern for pattern in patterns if fnmatchcase(name, pattern) or fnmatchcase(plain, pattern)]
        unused.difference_update(fitting)
        if not param.requires_grad:
            continue
        layer, _, last = plain.rpartition(".")
        in_norm = id(param) in in_norm_layer or (plain != name and layer in norm_layers)
        spared = fitting or in_norm or last.startswith("bias") or last.endswith("bias")
        (others if spared else penalized).append(param)
    if unused:
        raise ValueError(f"param_groups: every pattern in skip must fit a parameter, but {sorted(unused)} fit none")
    strengths = {"l1": l1, "l2": l2, "weight_decay": weight_decay, "group_l1": group_l1}
    groups = [
        {"params": penalized, **strengths, **options},
        {"params": others, **dict.fromkeys(strengths, 0.0), **options},
    ]
    return [group for group in groups if group["params"]]


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _NORM_LAYERS) or type(module).__name__.rstrip("123d").endswith("Norm")
