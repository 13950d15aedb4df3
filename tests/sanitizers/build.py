"""Builds for sanitizers: the compiled part of regfused, and its CPU kernels and drivers as a program without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests import compiled
from tests.compiled import BUILD, CSRC, Unit

HERE = Path(__file__).parent
OUT = BUILD / "sanitizers"

# What this machine does not run takes a third of the time that compiling kernels takes.
CPUINFO = Path("/proc/cpuinfo")
HAS_AVX512 = not CPUINFO.exists() or "avx512vl" in CPUINFO.read_text()
ISAS = [path for path in sorted((CSRC / "cpu").glob("isa_*.cpp")) if HAS_AVX512 or path.stem != "isa_avx512"]
# No torch header is in these: the same objects are in the extension and in the program.
KERNELS = [*ISAS, HERE / "planted.cpp"]
# Beside them, of the program; torch's headers are those in shims/.
DRIVERS = [
    *sorted(path for path in (CSRC / "cpu").glob("*.cpp") if not path.stem.startswith("isa_")),
    CSRC / "devices.cpp",
    CSRC / "step_drive.cpp",
]
CHECKS = [HERE / "program.cpp", *sorted(HERE.glob("check_*.cpp"))]
# Beside the kernels, of the extension.
WITH_TORCH = [
    *sorted(CSRC.glob("*.cpp")),
    *sorted(path for path in (CSRC / "cpu").glob("*.cpp") if not path.stem.startswith("isa_")),
]

# As setup.py has them.
FLAGS = ("-std=c++20", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter")
FLAGS += ("-Wno-maybe-uninitialized", "-Wno-psabi", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS += () if HAS_AVX512 else ("-DREGFUSED_WITHOUT_AVX512",)
INCLUDES = (f"-I{CSRC}", f"-I{HERE}")


@dataclass(frozen=True)
class Sanitizer:
    name: str  # of a folder
    flags: tuple[str, ...]
    optimization: str = "-O1"
    compiler: str = ""


ADDRESS = Sanitizer("address", compiled.ADDRESS)
THREAD = Sanitizer("thread", ("-fsanitize=thread",))
# valgrind looks at ordinary code: that which users run.
VALGRIND = Sanitizer("valgrind", (), "-O3")
# No sanitizer, but another machine: tests/aarch64.py.
AARCH64 = Sanitizer("aarch64", (), "-O3", "aarch64-linux-gnu-g++")


def kernels(sanitizer: Sanitizer) -> list[Unit]:
    flags = (*FLAGS, sanitizer.optimization, *sanitizer.flags, *INCLUDES)
    folder = OUT / sanitizer.name
    return [Unit(source, folder / f"{source.stem}.o", flags, sanitizer.compiler) for source in KERNELS]


def program(sanitizer: Sanitizer) -> list[Unit]:
    """The objects of the program."""
    # The drivers demand OpenMP. The threads in shims/ are none of OpenMP's, which ThreadSanitizer does not understand.
    shims = (*FLAGS, "-D_OPENMP", f"-I{HERE / 'shims'}", *INCLUDES)
    folder = OUT / sanitizer.name / "program"
    flags = (*shims, sanitizer.optimization, *sanitizer.flags)
    checks = folder if sanitizer.compiler else OUT / "checks"
    return [
        *kernels(sanitizer),
        *(Unit(source, _object(folder, source), flags, sanitizer.compiler) for source in DRIVERS),
        # What checks results is not what is looked at, and fast without a sanitizer. It is linked last, so
        # that it brings no copy of an inline function that a driver calls.
        *(Unit(source, checks / f"{source.stem}.o", (*shims, "-O2"), sanitizer.compiler) for source in CHECKS),
    ]


def extension() -> list[Unit]:
    """The objects of the extension, under AddressSanitizer and UndefinedBehaviorSanitizer."""
    # Without the two checks of which torch's headers are full: they nearly double the time that compiling takes, and
    # AddressSanitizer stops at a null pointer as well.
    flags = (*FLAGS, "-O1", *ADDRESS.flags, "-fno-sanitize=vptr,null", "-fopenmp", "-DTORCH_EXTENSION_NAME=_C")
    flags += (*INCLUDES, *compiled.torch_includes())
    # Objects that were compiled for another torch are no use.
    folder = OUT / ADDRESS.name / torch.__version__
    return [
        *(Unit(source, _object(folder, source), flags) for source in WITH_TORCH),
        *kernels(ADDRESS),
    ]


def _object(folder: Path, source: Path) -> Path:
    return (folder / source.relative_to(CSRC)).with_suffix(".o")


def compile_all(units: list[Unit], purpose: str = "for the sanitizers") -> None:
    compiled.compile_units(units, [CSRC, HERE], purpose)


def link_program(sanitizer: Sanitizer) -> Path:
    objects = [unit.object for unit in program(sanitizer)]
    return compiled.link(
        OUT / sanitizer.name / "program" / "program", objects, ["-pthread", *sanitizer.flags], linker=sanitizer.compiler
    )


def link_extension() -> Path:
    objects = [unit.object for unit in extension()]
    return compiled.link(
        OUT / ADDRESS.name / torch.__version__ / "_C.so",
        objects,
        ["-shared", *ADDRESS.flags],
        compiled.torch_libraries(),
    )
