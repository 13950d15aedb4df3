"""Cuts out of a model what a group lasso made zero: the same outputs, in smaller layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from regfused.channels import Flow, layers_of


@dataclass(frozen=True)
class LayerRows:
    """Rows of a Linear, or filters of a convolution."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class ShrinkReport:
    """What became of the size of a model, and what could not be cut; prints as a table.

    Multiply-adds are those of Linear and convolutions on the example input.
    """

    parameters_before: int
    parameters_after: int
    multiply_adds_before: int
    multiply_adds_after: int
    layers: tuple[LayerRows, ...]
    stays: tuple[str, ...]

    def __str__(self) -> str:
        cells = [("", "before", "after")]
        cells += [(f"rows of {layer.name}", f"{layer.before:,}", f"{layer.after:,}") for layer in self.layers]
        cells.append(("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"))
        cells.append(("multiply-adds", f"{self.multiply_adds_before:,}", f"{self.multiply_adds_after:,}"))
        first, second, third = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [f"{a.ljust(first)}  {b.rjust(second)}  {c.rjust(third)}" for a, b, c in cells]
        return "\n".join([*lines, *self.stays])


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, and the report of how it came about."""

    model: nn.Module
    report: ShrinkReport


@torch.no_grad()
def shrink(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> Shrunk:
    """Cut out of a copy of a model the rows and filters that are zero, with all that depends on them.

    A channel goes where its value is a known constant whatever the input: its row of weights is zero, or that of its
    BatchNorm, or all that it is computed from is constant. The layer that reads it takes the constant into its bias,
    which it gains where it has none. With the row or filter go its entry of the bias, its BatchNorm channel, and the
    columns of all layers that read it; through activations, pooling, dropout, flatten, concatenation. In sums, as of
    residual blocks, it goes when it is constant in the sum, and then in all summands at once. One row of each layer
    always stays.

    The outputs are those of evaluation mode, to rounding: a BatchNorm in training mode, or dropout, would make
    something else of a constant that is not 0.

    Args:
        model: a module that ``torch.fx`` can trace. Left as it is, in mode, parameters and all.
        example_input: what to call it with: a tensor, or a tuple of arguments.

    Returns:
        A `Shrunk`: ``.model``, a copy of the same class, dtype, device and mode, with smaller layers and new
        parameters, which need an optimizer of their own; ``.report``, a `ShrinkReport`, of which ``print`` shows a
        table and what could not be cut, and why. Linear, convolutions without groups and depthwise ones, BatchNorm and
        PReLU are cut. Stays: what goes into operations that are not known here or that look at all channels
        (LayerNorm, attention), a constant other than 0 before a convolution that pads with zeros, modules and
        parameters that are used more than once or have hooks.

    Raises:
        TypeError: for something else than a module.
        ValueError: for a model that ``torch.fx`` cannot trace, naming the operation, or ``copy.deepcopy`` cannot copy.
        RuntimeError: if the smaller model fails on the example input, or its outputs differ by more than the square
            root of the dtype's epsilon times the largest of them: its code depends on the number of channels.

    Example::

        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model[0].weight.data[2:] = 0
        >>> print(regfused.shrink(model, torch.ones(1, 4)).report)
                       before  after
        rows of 0           8      2
        rows of 2           2      2
        parameters         58     16
        multiply-adds      48     12
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"shrink: expected a module, but got a {type(model).__name__}")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        smaller = copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"shrink: the model must be one that copy.deepcopy can copy; where a weight is computed by a hook, make it "
            f"a parameter first (torch.nn.utils.prune.remove, remove_weight_norm): {error}"
        ) from error
    modes = [(module, module.training) for module in smaller.modules()]
    smaller.eval()
    graph, root = _traced(smaller, inputs)
    parameters_before, rows_before = _count(smaller), _rows(smaller)
    outputs_before, multiply_adds_before = _run(smaller, inputs)
    flow = Flow(smaller, fx.GraphModule(root, graph))
    flow.run(*_clones(inputs))
    stays = flow.cut()
    try:
        outputs_after, multiply_adds_after = _run(smaller, inputs)
    except Exception as error:
        raise RuntimeError(
            f"shrink: the smaller model fails on the example input, so the code of {type(model).__name__} depends on "
            f"the number of channels; the model itself is unchanged: {error}"
        ) from error
    _check(list(_tensors(outputs_before)), list(_tensors(outputs_after)))
    for module, mode in modes:
        module.training = mode
    layers = tuple(LayerRows(name, n, _rows(smaller)[name]) for name, n in rows_before.items())
    report = ShrinkReport(
        parameters_before, _count(smaller), multiply_adds_before, multiply_adds_after, layers, tuple(stays)
    )
    return Shrunk(smaller, report)


class _Tracer(fx.Tracer):
    def to_bool(self, obj: fx.Proxy) -> bool:
        raise fx.proxy.TraceError(f"a condition depends on the value of {obj.node.format_node()}")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        raise fx.proxy.TraceError(f"a loop goes over {obj.node.format_node()}")


def _traced(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[fx.Graph, nn.Module]:
    tracer = _Tracer()
    parameters = list(inspect.signature(model.forward).parameters.values())[len(inputs) :]
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    try:
        return tracer.trace(model, concrete_args=defaults or None), tracer.root
    except Exception as error:
        nodes = list(tracer.graph.nodes) if hasattr(tracer, "graph") else []
        where = f", after {nodes[-1].format_node()}" if nodes else ""
        raise ValueError(
            f"shrink: the model must be traceable by torch.fx, to see which layers read which, but in "
            f"{type(model).__name__} {type(error).__name__}{where}: {error}"
        ) from error


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _rows(model: nn.Module) -> dict[str, int]:
    return {name: layer.weight.shape[0] for name, layer in layers_of(model)}


def _clones(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in inputs)


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, int]:
    """The outputs, and the multiply-adds of Linear and convolutions."""
    total = 0

    def add(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    handles = [layer.register_forward_hook(add) for _, layer in layers_of(model)]
    try:
        return model(*_clones(inputs)), total
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _check(before: list[Tensor], after: list[Tensor]) -> None:
    for one, other in zip(before, after, strict=True):
        same = one.shape == other.shape
        if same and one.is_floating_point():
            tolerance = (
                torch.finfo(one.dtype).eps ** 0.5 * float(one.nan_to_num(0, 0, 0).abs().max()) if one.numel() else 0
            )
            same = torch.allclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
        elif same:
            same = torch.equal(one, other)
        if not same:
            raise RuntimeError(
                "shrink: on the example input the outputs of the smaller model are others, so the code depends on the "
                "number of channels, or on chance; the model itself is unchanged"
            )
