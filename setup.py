"""Builds regfused._C: lists the sources and decides whether CUDA is compiled; everything else is in pyproject.toml."""

import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    sys.exit(
        f"regfused is compiled against the torch you train with, but torch cannot be imported here ({error}).\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp"))

flags = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fopenmp",  # for at::parallel_for; not given to the linker: torch's own OpenMP runtime is the only one
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",  # in headers of torch
    "-Wno-maybe-uninitialized",  # in the AVX-512 header of g++ 12
    "-Wno-psabi",  # vectors never cross a function that is not inlined
    # The same bits on every instruction set: no contraction of a*b + c. NaN, infinities and signed zeros
    # stay; only errno and floating-point traps, which nothing reads, are given up.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]

setup(
    ext_modules=[CppExtension("regfused._C", sources, extra_compile_args=flags)],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"build_ext": {"build_temp": f"build/{sys.implementation.cache_tag}"}},
)
