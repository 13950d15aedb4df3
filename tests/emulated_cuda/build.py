"""Builds the compiled part of regfused with its CUDA kernels and driver on an emulator, under sanitizers.

Everything else in it (the plan, the checks, the Python module) is what the ordinary build made of it.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tests import compiled
from tests.compiled import BUILD, CSRC

HERE = Path(__file__).parent
# Objects that were compiled for another torch are no use.
OUT = BUILD / "emulated_cuda" / torch.__version__
LIBRARY = OUT / "_C.so"

SOURCES = [
    *sorted((CSRC / "cuda").glob("*.cu")),
    *sorted(path for path in (CSRC / "cuda").glob("*.cpp") if path.stem != "stream"),
    *sorted(HERE.glob("*.cpp")),
    CSRC / "sources.cpp",  # the ordinary build's is about its own kernels
]
REPLACED = ("devices", "sources")
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas"]
# As the CPU's kernels: no contraction of a*b + c, and neither does nvcc.
FLAGS += ["-ffp-contract=off", "-fvisibility=hidden", *compiled.ADDRESS]


def build() -> Path:
    """The emulated extension, compiled anew where a source is newer."""
    kept = [
        path
        for path in BUILD.glob("csrc/**/*.o")
        if path.stem not in REPLACED
        and path.parent.name != "cuda"
        # Not what an earlier build left of a source that has another name now.
        and (CSRC.parent / path.relative_to(BUILD)).with_suffix(".cpp").exists()
    ]
    if not kept:
        raise RuntimeError(f"there are no object files in {BUILD}: python setup.py build_ext --inplace makes them")
    flags = ("-x", "c++", *FLAGS, f"-I{HERE}", f"-I{CSRC}", *compiled.torch_includes())
    units = [compiled.Unit(source, OUT / f"{source.stem}.o", flags) for source in SOURCES]
    objects = compiled.compile_units(units, [CSRC, HERE], "for the emulator")
    return compiled.link(LIBRARY, [*kept, *objects], ["-shared", *compiled.ADDRESS], compiled.torch_libraries())


def environment() -> dict[str, str]:
    """What a Python process needs so that it can load the library."""
    preloaded = compiled.preloaded()
    return {
        **preloaded,
        "ASAN_OPTIONS": f"{preloaded['ASAN_OPTIONS']}:detect_stack_use_after_return=0",
        "REGFUSED_TEST_EXTENSION": str(build()),
        # An environment of torch's own would only slow this down.
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    print(build(), torch.__version__)
