"""What was built, and what of it is in use."""

from __future__ import annotations

import platform
from typing import Any

import torch

from regfused import extension, openmp


class BuildInfo(dict[str, Any]):
    """A dictionary that prints as a table."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in self.items())


def build_info() -> BuildInfo:
    """Versions, instruction sets and devices.

    Returns:
        A dictionary that prints as a table: ``regfused``, ``torch`` and ``python`` (versions that run), ``compiled``
        (True, or why the compiled part is not used), ``threads``, and where it is compiled ``built for torch``,
        ``compiler``, ``isa`` (in use; the environment variable ``REGFUSED_ISA`` chooses another), ``isas`` (that this
        machine runs) and ``cuda`` (toolkit and architectures of the CUDA kernels, or "not built"). ``openmp`` has the
        runtimes in the process now: where there are several, their threads compete for the processor.

    Raises:
        RuntimeError: where ``REGFUSED_ISA`` asks for what this machine does not run.
    """
    from regfused import __version__

    info = BuildInfo(
        {
            "regfused": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiled": extension.C is not None or f"no: {extension.why_missing}",
        }
    )
    if extension.C is not None:
        built = extension.C.build_info()
        info |= {
            "built for torch": built["torch"],
            "compiler": built["compiler"],
            "isa": built["isa"],
            "isas": ", ".join(built["isas"]),
            "cuda": built["cuda"] or "not built",
        }
    info["threads"] = torch.get_num_threads()
    info["openmp"] = ", ".join(openmp.runtimes()) or "unknown"
    if openmp.conflict():
        info["openmp"] += f" ({openmp.conflict()})"
    return info
