"""Everything that makes a graph of what a function does to tensors, and modes that see every operation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

#: Each makes of a function and example arguments a graph: a function to be called with others.
TRACERS: dict[str, Callable] = {
    "make_fx real": lambda f, *args: make_fx(f)(*args),
    "make_fx fake": lambda f, *args: make_fx(f, tracing_mode="fake")(*args),
    "make_fx symbolic": lambda f, *args: make_fx(f, tracing_mode="symbolic")(*args),
    "make_fx pre_dispatch": lambda f, *args: make_fx(f, pre_dispatch=True)(*args),
    "make_fx of functionalize": lambda f, *args: make_fx(torch.func.functionalize(f))(*args),
    "functionalize": lambda f, *args: torch.func.functionalize(f),
    "jit.trace": lambda f, *args: torch.jit.trace(f, args, check_trace=False),
}


class Dispatched(TorchDispatchMode):
    """Names the operators that were called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Names the functions that were called."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))
