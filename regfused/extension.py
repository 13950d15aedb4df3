"""The compiled part, or why there is none."""

from __future__ import annotations

import warnings
from types import ModuleType

import torch

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _load() -> tuple[ModuleType | None, str]:
    try:
        from regfused import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return None, f"it cannot be imported ({error})"
    built = str(_C.TORCH_VERSION).split("+")[0]
    running = torch.__version__.split("+")[0]
    if built != running:
        return None, f"it was built for torch {built}, and this is torch {running}"
    return _C, ""


#: ``regfused._C``, or None where it is missing or was built for another torch; then `why_missing` says why.
C, why_missing = _load()

if C is None:
    warnings.warn(
        f"regfused runs in pure PyTorch, for its compiled part is not usable: {why_missing}. "
        "To build it for this torch: pip install --no-build-isolation --force-reinstall --no-deps regfused "
        "(in a checkout: python setup.py build_ext --inplace)",
        RuntimeWarning,
        stacklevel=2,
    )

DEVICES = () if C is None else ("cpu", "cuda") if C.CUDA else ("cpu",)


def kernels_take(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a type that the kernels take, however it lies in memory. A compiler sees through this."""
    return tensor.device.type in DEVICES and tensor.dtype in FUSED_DTYPES and tensor.layout == torch.strided
