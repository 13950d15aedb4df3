"""The compiled part, or why there is none."""

from __future__ import annotations

import importlib.util
import os
import struct
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from torch.autograd import forward_ad

from regfused import openmp, sources

FUSED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

_CHECKOUT = Path(__file__).parent.parent  # or wherever else the package lies

# What Python asks of the compiled part. One that lacks any of it was built from other sources.
_OFFERS = {
    "": (
        "TORCH_VERSION",
        "SOURCES",
        "CUDA",
        "Members",
        "StepPlan",
        "build_info",
        "clip_grad_norm",
        "dropout",
        "in_functional_transform",
        "is_watched",
        "penalty",
        "takes",
    ),
    "Members": ("add", "bump_versions", "changed", "has_grad", "know_state", "open", "release", "settle"),
    "StepPlan": (
        "clip_coef",
        "is_shared",
        "judge",
        "leftover",
        "made",
        "needs_norm",
        "norm",
        "numbers",
        "stepped",
        "outcome",
        "release",
        "step",
        "tensors",
        "update",
    ),
}


def _load() -> tuple[ModuleType | None, str]:
    try:
        broken = _why_incomplete()
        if broken:
            return None, broken
        if importlib.util.find_spec("regfused._C") is None and "regfused._C" not in sys.modules:
            return None, _why_absent()
        from regfused import _C  # type: ignore[attr-defined]
    except Exception as error:  # a damaged file may fail in any way
        return None, f"it cannot be imported ({error})"
    for owner, names in _OFFERS.items():
        for name in names:
            if not hasattr(getattr(_C, owner, _C), name):
                return (
                    None,
                    f"it was built from other sources of regfused: it has no {'.'.join(filter(None, (owner, name)))}",
                )
    if _C.SOURCES and sources.digest(_CHECKOUT) not in ("", _C.SOURCES):
        return None, f"it was built from other sources of regfused than those in {_CHECKOUT / 'csrc'}"
    built = str(_C.TORCH_VERSION).split("+")[0]
    running = torch.__version__.split("+")[0]
    if built != running:
        return None, f"it was built for torch {built}, and this is torch {running}"
    return _C, ""


def _why_absent() -> str:
    reason = Path(__file__).with_name("not_compiled.txt")  # where setup.py could not compile
    return f"it was not compiled: {reason.read_text().strip()}" if reason.exists() else "there is none"


def _why_incomplete() -> str:
    """Why the file of the compiled part cannot be whole, or an empty string.

    The system maps a file that was cut off, and ends the process when something reads beyond its end.
    """
    if "regfused._C" in sys.modules:
        return ""
    spec = importlib.util.find_spec("regfused._C")
    if spec is None or spec.origin is None:
        return ""
    with open(spec.origin, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:  # 64 bits, little-endian
            return ""
        table, entry_size, count = struct.unpack("<32xQ14xHH6x", header)
        file.seek(table)
        segments = file.read(entry_size * count)
    needed = table + entry_size * count
    if needed <= size:
        for at in range(0, entry_size * count, entry_size):
            offset, in_file = struct.unpack_from("<8xQ16xQ", segments, at)
            needed = max(needed, offset + in_file)
    return f"{spec.origin} is damaged or cut off: it has {size} bytes of {needed}" if needed > size else ""


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

if openmp.conflict():
    warnings.warn(f"regfused: {openmp.conflict()}", RuntimeWarning, stacklevel=2)

DEVICES = () if C is None else ("cpu", "cuda") if C.CUDA else ("cpu",)


def kernels_take(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a type that the kernels take, however it lies in memory. A compiler sees through this."""
    return (
        tensor.device.type in DEVICES
        and tensor.dtype in FUSED_DTYPES
        and tensor.layout == torch.strided
        and not tensor.is_nested
    )


# Asked while a program is read: compilers of older torch have answers of their own to is_exporting.
@torch.compiler.assume_constant_result
def compiles_in_torch() -> bool:
    """Whether a compiler has to find torch's own operations: under ``torch.func``, forward-mode AD, ``torch.export``.

    It enters transforms while it reads a program, and its own guards keep apart what was compiled within them. An
    exported program should need nothing but torch.
    """
    in_transform = C is not None and C.in_functional_transform()
    return bool(in_transform or forward_ad._current_level >= 0 or torch.compiler.is_exporting())
