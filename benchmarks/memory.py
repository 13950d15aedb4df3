"""The peak of memory that one call needs beyond what the process holds before it (Linux; None elsewhere)."""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable
from pathlib import Path


def available_bytes() -> int | None:
    """Memory that the machine can still hand out."""
    kb = _read_kb("/proc/meminfo", "MemAvailable")
    return None if kb is None else 1024 * kb


def extra_peak_kb(call: Callable[[], object], repeats: int = 3, seconds: float = 1.0) -> int | None:
    """The smallest growth of the resident set's peak over up to `repeats` calls, in KB.

    The smallest, because other threads of the process only ever add. Counts pages, so that what fits into pages that
    the process touched before is not seen.
    """
    growths: list[int] = []
    deadline = time.perf_counter() + seconds
    while not growths or (len(growths) < repeats and time.perf_counter() < deadline):
        _return_free_memory()
        if not _reset_peak():
            return None
        before = _read_kb("/proc/self/status", "VmRSS")
        call()
        peak = _read_kb("/proc/self/status", "VmHWM")
        if before is None or peak is None:
            return None
        growths.append(max(peak - before, 0))
    return min(growths)


def _return_free_memory() -> None:
    """Without this, a block that the allocator kept would serve the call and stay unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _read_kb(path: str, key: str) -> int | None:
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1])
    return None
