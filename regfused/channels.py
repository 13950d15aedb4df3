"""Follows the channels of layers through a model, and cuts out those that are constant."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from regfused import reference
from regfused.dropout import dropout

CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# What acts on each element alone. Names are those of functions and methods, and those of modules in lower case.
OF_ELEMENTS = """
    relu relu6 leaky_relu leakyrelu elu selu celu gelu silu mish tanh sigmoid hardtanh hardswish hardsigmoid softplus
    softsign tanhshrink softshrink hardshrink logsigmoid threshold identity abs neg exp square pow clamp clone
    contiguous detach float double
"""
ELEMENTWISE = set(OF_ELEMENTS.split())
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d")
ARITHMETIC = {"add", "sub", "mul", "truediv", "div"}
POOLS = {f"{a}{kind}{b}pool{n}d" for a in ("", "adaptive_", "adaptive") for b in ("", "_") for kind in ("avg", "max")
         for n in (1, 2, 3)}  # fmt: skip
UPSAMPLING = {"upsample", "interpolate"}
RESHAPES = {"flatten", "view", "reshape", "squeeze", "unsqueeze"}
MEANS = {"mean", "amax"}
ABOUT_SHAPE = {"size", "dim"}
OTHERS = {"permute", "transpose", "cat", "concat"}
FUNCTIONS: dict[Any, str] = {
    getattr(space, spelled): name
    for name in ELEMENTWISE.union(DROPOUTS, ARITHMETIC, POOLS, UPSAMPLING, RESHAPES, MEANS, OTHERS)
    for space in (torch, functional, operator)
    for spelled in ((name, "i" + name) if space is operator else (name, name + "_"))
    if hasattr(space, spelled)
}
FUNCTIONS |= {dropout: "dropout", reference.dropout: "dropout"}


@dataclass
class _Channels:
    """Along ``dim`` of a tensor: who the channels are, and the value of those that are constant, NaN for the others."""

    dim: int
    ids: list[int]
    values: Tensor


@dataclass
class _Plan:
    """What to do about one module: channels of its rows, of its columns, or both the same ones."""

    name: str
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    constants: Tensor | None = None
    varies: Tensor | None = None


class Flow(fx.Interpreter):
    """Runs a graph on the example, follows the channels through it, and notes which must stay."""

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.model = model
        self.channels: dict[fx.Node, _Channels] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        # A forest: channels that must go together have the same root.
        self.same: list[int] = []
        # Channels that must stay, and why; "" where they are not constant.
        self.reasons: list[tuple[list[int], str]] = []
        self.plans: dict[nn.Module, _Plan] = {}
        self.left: dict[nn.Module, str] = {}
        self.names = {module: name for name, module in model.named_modules()}
        nodes = list(graph_module.graph.nodes)
        self.calls = Counter(graph_module.get_submodule(n.target) for n in nodes if n.op == "call_module")
        self.owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)
        self.owners.update(operator.attrgetter(n.target)(graph_module) for n in nodes if n.op == "get_attr")

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = tuple(value.shape)
        inputs = [i for i in n.all_input_nodes if i in self.channels]
        result = None
        if n.op == "output":
            self.stay(inputs, "outputs of the model")
        elif n.op == "call_module" or inputs:
            result = self.call(n, inputs)
        if result is not None:
            self.channels[n] = result
            if inputs and value is self.env[inputs[0]]:  # in place: whoever reads the input later reads this
                self.channels[inputs[0]] = result
        return value

    def stay(self, inputs: Iterable[fx.Node], why: str) -> None:
        self.reasons += [(self.channels[i].ids, why) for i in inputs]

    def stay_where(self, mask: Tensor, ids: list[int], why: str) -> None:
        self.reasons.append(([i for i, is_so in zip(ids, mask.tolist(), strict=False) if is_so], why))

    def call(self, n: fx.Node, inputs: list[fx.Node]) -> _Channels | None:
        """The channels of the result. None, and those of the inputs must stay, where nothing is known of it."""
        function: Callable[..., Any]
        alone = [i for i in n.all_input_nodes if i in self.shapes] == inputs[:1]
        given = self.channels[inputs[0]] if inputs and alone else None
        result = None
        if n.op == "call_module":
            module: Any = self.module.get_submodule(str(n.target))
            name, function, label = type(module).__name__.lower(), module, self.names[module]
            why = self.why_left(module)
            if why:
                self.left[module] = why
                self.stay(inputs, f"they go into {label}, and {why}")
                return None
            if type(module) in LAYERS:
                return self.layer(module, given, inputs, len(self.shapes[n]))
            if type(module) in (*NORMS, nn.PReLU):
                return self.per_channel(module, given, inputs)
        elif n.op == "call_method":
            name, label = str(n.target).rstrip("_"), str(n.target)
            function = lambda x, *args, **kwargs: getattr(x, str(n.target))(*args, **kwargs)  # noqa: E731
        else:
            function, label = n.target, getattr(n.target, "__name__", str(n.target))  # type: ignore[assignment]
            name = FUNCTIONS.get(function, "")
        about_shape = name in ABOUT_SHAPE and n.op == "call_method"
        if about_shape or (function is getattr and n.args[1] in ("shape", "ndim", "dtype", "device")):
            return None
        if name in ("cat", "concat"):
            result = self.concatenated(n)
        elif name in ARITHMETIC and len(inputs) == len(n.all_input_nodes) == 2:
            result = self.met(name, function, n)
        elif given is not None and n in self.shapes:
            if name.endswith(DROPOUTS):
                active = n.op != "call_module" and n.kwargs.get("training", n.args[2] if len(n.args) > 2 else True)
                result = None if active else given
            elif name in ELEMENTWISE | ARITHMETIC:
                result = self.elementwise(function, n, given)
            elif not isinstance(n.args[0] if n.args else None, fx.Node):
                pass
            elif name in POOLS | UPSAMPLING:
                result = self.pooled(name, function, n, given, label)
            else:
                result = self.moved(name, n, given)
        if result is None:
            self.stay(inputs, f"read by {label} in a way that is not known here")
        return result

    def why_left(self, module: nn.Module) -> str:
        parameters = [p for p in module._parameters.values() if p is not None]
        if parameters and self.calls[module] > 1:
            return "it is used more than once"
        if any(self.owners[p] > 1 for p in parameters):
            return "its parameters are used elsewhere, too"
        if module._forward_hooks or module._forward_pre_hooks:
            return "it has hooks"
        if not type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, nn.Dropout):
            return "its weights are computed, or its class is not one of torch.nn"
        if type(module) in CONVOLUTIONS and module.groups != 1:
            return "" if module.groups == module.in_channels == module.out_channels else "it has groups"
        return ""

    def layer(self, module: Any, given: _Channels | None, inputs: list[fx.Node], dims: int) -> _Channels | None:
        dim = dims - 1 - CONVOLUTIONS.get(type(module), 0)
        weight, groups = _kernels(module), getattr(module, "groups", 1)
        rows, size = weight.shape[0], weight.shape[1] * groups
        bias = torch.zeros(rows, dtype=torch.float64) if module.bias is None else _numbers(module.bias)
        if given is None or given.dim != dim or len(given.ids) != size:
            self.stay(inputs, f"they go into {self.names[module]} along another dimension")
            given = _Channels(dim, [], torch.full((size,), torch.nan, dtype=torch.float64))
        foldable = ~given.values.isnan() & ((given.values == 0) | (not _pads_with_zeros(module)))
        if groups > 1 and not given.ids:
            self.left[module] = "it reads channels of which nothing is known"
            return None
        padded = f"constant but not 0, and {self.names[module]} pads with zeros"
        plan = self.plans[module] = _Plan(self.names[module], columns=given.ids, constants=given.values)
        if groups > 1:
            folded = given.values.where(foldable, 0) * weight.sum((1, 2)) + bias
            plan.varies = (weight != 0).flatten(1).any(1) & ~foldable
            self.stay_where(plan.varies & ~given.values.isnan(), given.ids, padded)
            plan.rows = given.ids
            return _Channels(dim, plan.rows, folded.where(~plan.varies, torch.nan))
        self.stay_where(given.values.isnan(), given.ids, "")
        self.stay_where(~given.values.isnan() & ~foldable, given.ids, padded)
        folded = weight.sum(2) @ given.values.where(foldable, 0) + bias
        plan.varies = ((weight != 0).any(2) & ~foldable).any(1)
        plan.rows = list(range(len(self.same), len(self.same) + rows))
        self.same += plan.rows
        return _Channels(dim, plan.rows, folded.where(~plan.varies, torch.nan))

    def per_channel(self, module: Any, given: _Channels | None, inputs: list[fx.Node]) -> _Channels | None:
        """BatchNorm and PReLU."""
        x = None if given is None or given.dim != 1 else given.values
        if type(module) is nn.PReLU:
            if x is not None:
                x = x.clamp(min=0) + _numbers(module.weight) * x.clamp(max=0)
            known = x is not None
        else:
            known = module.running_var is not None
            if known and x is not None:
                x = (x - _numbers(module.running_mean)) / (_numbers(module.running_var) + module.eps).sqrt()
                if module.affine:
                    weight = _numbers(module.weight)
                    x = (x * weight).where(weight != 0, 0) + _numbers(module.bias)
        if not known or given is None or x is None:
            self.stay(inputs, f"they go into {self.names[module]}, which makes no constants of them")
            return None
        if type(module) is not nn.PReLU or module.num_parameters > 1:
            self.plans[module] = _Plan(self.names[module], rows=given.ids)
        return _Channels(1, given.ids, _finite(x))

    def elementwise(self, function: Callable[..., Any], n: fx.Node, given: _Channels) -> _Channels:
        args, kwargs = self.arguments(n, given.values)
        return _Channels(given.dim, given.ids, _finite(_numbers(function(*args, **kwargs)), given.values))

    def arguments(self, n: fx.Node, x: Tensor) -> Any:
        """Those of a call, with x in the place of the tensor."""
        return fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: x.clone() if a in self.channels else self.env[a])

    def met(self, name: str, function: Callable[..., Any], n: fx.Node) -> _Channels | None:
        """Of a sum or product of two: the channels of both must go together."""
        nodes = [a for a in n.args if isinstance(a, fx.Node)]
        if len(nodes) != 2 or name in ("truediv", "div"):
            return None
        one, other = (self.channels[a] for a in nodes)
        if len({(c.dim, len(c.ids), len(self.shapes[a])) for c, a in zip((one, other), nodes, strict=True)}) != 1:
            return None
        for i, j in zip(one.ids, other.ids, strict=True):
            self.same[self.root(j)] = self.root(i)
        x = _numbers(function(one.values.clone(), other.values.clone(), *n.args[2:], **n.kwargs))
        if name == "mul":
            x = x.where((one.values != 0) & (other.values != 0), 0)
        return _Channels(one.dim, one.ids, _finite(x))

    def concatenated(self, n: fx.Node) -> _Channels | None:
        nodes = n.args[0] if n.args else None
        dim: Any = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else 0)
        if not isinstance(nodes, (list, tuple)) or any(a not in self.channels for a in nodes):
            return None
        parts = [self.channels[a] for a in nodes]
        dim = dim % len(self.shapes[n])
        if any(part.dim != dim for part in parts):
            return None
        return _Channels(dim, [i for part in parts for i in part.ids], torch.cat([part.values for part in parts]))

    def pooled(
        self, name: str, function: Callable[..., Any], n: fx.Node, given: _Channels, label: str
    ) -> _Channels | None:
        shape = self.shapes[n.all_input_nodes[0]]
        if given.dim != (1 if name in UPSAMPLING else len(shape) - 1 - int(name[-2])):
            return None
        probe = torch.ones([1] * (given.dim + 1) + list(shape[given.dim + 1 :]), dtype=torch.float64)
        values = given.values
        args, kwargs = self.arguments(n, probe)
        if not torch.allclose(function(*args, **kwargs), torch.ones((), dtype=torch.float64)):
            varies = ~values.isnan() & (values != 0)
            self.stay_where(varies, given.ids, f"constant but not 0, and {label} pads with zeros")
            values = values.where(~varies, torch.nan)
        return _Channels(given.dim, given.ids, values)

    def moved(self, name: str, n: fx.Node, given: _Channels) -> _Channels | None:
        """Means over other dimensions, and the same elements in another shape."""
        before, after, d = self.shapes[n.all_input_nodes[0]], self.shapes[n], given.dim
        args: list[Any] = list(n.args[1:])
        if args and isinstance(args[0], list | tuple):
            args = list(args[0])
        if name in MEANS:
            dims: Any = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
            dims = [dims] if isinstance(dims, int) else dims
            if not isinstance(dims, list | tuple) or d in [i % len(before) for i in dims]:
                return None
            gone = sum(i % len(before) < d for i in dims) if len(after) < len(before) else 0
            return _Channels(d - gone, given.ids, given.values)
        if name in ("permute", "transpose"):
            if not args or not all(isinstance(a, int) for a in args):
                return None
            order, places = list(range(len(before))), [a % len(before) for a in args]
            if name == "transpose":
                order[places[0]], order[places[1]] = places[1], places[0]
            return _Channels((order if name == "transpose" else places).index(d), given.ids, given.values)
        if name not in RESHAPES:
            return None
        sizes = args if name in ("view", "reshape") else [-1] * len(after)
        fixed = [isinstance(size, int) and size >= 0 for size in sizes]
        if len(sizes) != len(after):
            return None
        if after[: d + 1] == before[: d + 1] and not fixed[d]:
            return given
        k = len(after) - 1
        if not 0 < k <= d or after != (*before[:k], math.prod(before[k:])) or fixed[k]:
            return None
        ahead, behind = math.prod(before[k:d]), math.prod(before[d + 1 :])
        ids = [i for i in given.ids * ahead for _ in range(behind)]
        return _Channels(k, ids, given.values.repeat(ahead).repeat_interleave(behind))

    def root(self, i: int) -> int:
        while self.same[i] != i:
            self.same[i] = self.same[self.same[i]]
            i = self.same[i]
        return i

    def cut(self) -> list[str]:
        """Resize the modules; what stays, and why."""
        stay: dict[int, str] = {}
        for ids, why in sorted(self.reasons, key=lambda reason: reason[1] == ""):
            for i in ids:
                stay.setdefault(self.root(i), why)
        for plan in self.plans.values():
            if plan.rows and all(self.root(i) not in stay for i in plan.rows):
                stay[self.root(plan.rows[0])] = f"{plan.name or 'a layer'} would be empty"
        keeps = {i: self.root(i) in stay for i in range(len(self.same))}
        messages = self.messages(stay)
        for module, plan in self.plans.items():
            _resize(module, plan, [keeps[i] for i in plan.rows], [keeps[i] for i in plan.columns])
        return messages

    def messages(self, stay: dict[int, str]) -> list[str]:
        sources: dict[int, list[str]] = {}
        for plan in self.plans.values():
            if plan.varies is not None:
                for i, varies in zip(plan.rows, plan.varies.tolist(), strict=True):
                    if varies and plan.name not in sources.setdefault(self.root(i), []):
                        sources[self.root(i)].append(plan.name)
        varying = {self.root(i) for ids, why in self.reasons if not why for i in ids}
        messages = []
        for name, layer in layers_of(self.model):
            zero = (_numbers(layer.weight) == 0).flatten(1).all(1).nonzero().flatten().tolist()
            kind = "row" if isinstance(layer, nn.Linear) else "filter"
            whys = [self.left.get(layer, "it is not called on its own")] * len(zero)
            if layer in self.plans:
                whys = []
                for root in [self.root(self.plans[layer].rows[i]) for i in zero]:
                    others = ", ".join([other for other in sources.get(root, []) if other != name][:3])
                    added = f"added to {others}, whose {kind}s are not zero"
                    if root in stay:
                        why = added if others and root in varying else stay[root]
                        whys.append(why or "not constant where the next layer reads")
            for why, n in Counter(whys).items():
                messages.append(f"{name}: {n} zero {kind}{' stays' if n == 1 else 's stay'}: {why}")
        return messages


def layers_of(model: nn.Module) -> list[tuple[str, Any]]:
    """All Linear and convolutions, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS)]


def _resize(module: Any, plan: _Plan, keep_rows: list[bool], keep_columns: list[bool]) -> None:
    rows, columns = torch.tensor(keep_rows, dtype=torch.bool), torch.tensor(keep_columns, dtype=torch.bool)
    depthwise = getattr(module, "groups", 1) > 1
    if not depthwise and not columns.all():
        assert plan.constants is not None
        folded = _kernels(module).sum(2)[:, ~columns] @ plan.constants[~columns]
        if folded.any():
            old = torch.zeros_like(folded) if module.bias is None else _numbers(module.bias)
            like = module.weight if module.bias is None else module.bias
            module.bias = nn.Parameter((old + folded).to(like), requires_grad=like.requires_grad)
        _select(module, "weight", columns, 1)
    if not rows.all():
        for name in ("weight", "bias", "running_mean", "running_var"):
            _select(module, name, rows, 0)
    size = int(rows.sum())
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NORMS):
        module.num_features = size
    elif isinstance(module, nn.PReLU):
        module.num_parameters = size
    else:
        module.out_channels, module.in_channels = size, size if depthwise else module.weight.shape[1]
        module.groups = size if depthwise else 1


def _select(module: nn.Module, name: str, keep: Tensor, dim: int) -> None:
    old = getattr(module, name, None)
    if old is None:
        return
    new = old.detach().index_select(dim, keep.nonzero().squeeze(1).to(old.device))
    setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _pads_with_zeros(module: Any) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    return any(k > 1 for k in module.kernel_size) if module.padding == "same" else any(module.padding)


def _kernels(module: Any) -> Tensor:
    """The weight, as rows times columns times places of a filter; one place in a Linear."""
    weight = _numbers(module.weight)
    return weight.reshape(*weight.shape[:2], -1)


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _finite(values: Tensor, given: Tensor | None = None) -> Tensor:
    values = values.where(values.isfinite(), torch.nan)
    return values if given is None else values.where(~given.isnan(), torch.nan)
