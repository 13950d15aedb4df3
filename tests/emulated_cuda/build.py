"""Builds the compiled part of regfused with its CUDA kernels and driver on an emulator, under sanitizers.

Everything else in it (the plan, the checks, the Python module) is what the ordinary build made of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
ORDINARY = ROOT / "build" / str(sys.implementation.cache_tag)
OUT = ORDINARY / "emulated_cuda"
LIBRARY = OUT / "_C.so"

SOURCES = [
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted(path for path in (CSRC / "cuda").glob("*.cpp") if path.stem != "stream"),
    *sorted(HERE.glob("*.cpp")),
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# As the CPU's kernels: no contraction of a*b + c, and neither does nvcc.
FLAGS += ["-ffp-contract=off", "-fvisibility=hidden", *SANITIZE]


def build() -> Path:
    """The emulated extension, compiled anew where a source is newer."""
    newest = max(
        path.stat().st_mtime
        for folder in (CSRC, HERE)
        for path in folder.rglob("*")
        if path.suffix in (".h", ".cuh", ".cu", ".cpp", ".py")
    )
    kept = [path for path in ORDINARY.glob("csrc/**/*.o") if path.stem != "devices" and path.parent.name != "cuda"]
    if not kept:
        raise RuntimeError(f"there are no object files in {ORDINARY}: python setup.py build_ext --inplace makes them")
    newest = max(newest, *(path.stat().st_mtime for path in kept))
    if LIBRARY.exists() and LIBRARY.stat().st_mtime >= newest:
        return LIBRARY
    OUT.mkdir(parents=True, exist_ok=True)
    objects = [OUT / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(_compile, SOURCES, objects))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")
    _run([_compiler(), "-shared", *SANITIZE, "-o", unfinished, *kept, *objects, *libraries])
    unfinished.rename(LIBRARY)
    return LIBRARY


def _compile(source: Path, to: Path) -> None:
    print(f"compile {source.relative_to(ROOT)} for the emulator", flush=True)
    includes = [HERE, CSRC, *cpp_extension.include_paths(), sysconfig.get_paths()["include"]]
    _run([_compiler(), "-x", "c++", *FLAGS, *(f"-I{path}" for path in includes), "-c", source, "-o", to])


def _run(command: list[object]) -> None:
    subprocess.run([str(word) for word in command], check=True)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def environment() -> dict[str, str]:
    """What a Python process needs so that it can load the library."""
    runtimes = [
        subprocess.run(
            [_compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": ":".join(runtimes),
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "REGFUSED_TEST_EXTENSION": str(build()),
        # An environment of torch's own would only slow this down.
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    print(build(), torch.__version__)
