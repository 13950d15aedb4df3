"""Whether values of tensors can be looked at."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor


def values_are_known(tensors: Iterable[Tensor]) -> bool:
    """False where a tracer records operations, or tensors have no values: what depends on one must be an operation.

    So it is under make_fx, FakeTensorMode and torch.func, while torch.jit.trace records, and with meta tensors.
    """
    if torch._C._functorch.maybe_current_level() is not None or torch._C._get_tracing_state() is not None:
        return False
    # What nobody imported is not at work.
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if proxies is not None and proxies.get_proxy_mode() is not None:
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")
    if fakes is not None and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return False
    return not any(t.is_meta or (fakes is not None and isinstance(t, fakes.FakeTensor)) for t in tensors)


def value_is_known(tensor: Tensor) -> bool:
    return values_are_known([tensor])
