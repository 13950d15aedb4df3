"""Which OpenMP runtimes are in the process: torch brings one, and each further one has threads of its own."""

from __future__ import annotations

import re

# GNU, LLVM, Intel; wheels add a hash to the name.
_RUNTIME = re.compile(r"/lib(gomp|omp|iomp5)\b[^/]*\.so[^/]*$")
_FAMILIES = {"gomp": "GNU", "omp": "LLVM", "iomp5": "LLVM"}


def runtimes() -> dict[str, str]:
    """The family of each runtime that is loaded now, by its path; empty where the system does not tell."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    except OSError:
        return {}
    found = {path: _RUNTIME.search(path) for path in sorted(paths)}
    return {path: _FAMILIES[match[1]] for path, match in found.items() if match}


def conflict() -> str:
    """What is wrong with the runtimes together, or an empty string."""
    loaded = runtimes()
    if len(set(loaded.values())) < 2:
        return ""
    return (
        f"OpenMP runtimes of {' and '.join(sorted(set(loaded.values())))} are in one process "
        f"({', '.join(loaded)}), which may hang or crash, and torch.set_num_threads reaches one of them alone. "
        "Import torch first, and install packages that bring none of their own"
    )
