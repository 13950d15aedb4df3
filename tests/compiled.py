"""Compiles what tests need beside the ordinary build, anew where a source is newer, and says how to load it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / str(sys.implementation.cache_tag)

ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


@dataclass(frozen=True)
class Unit:
    """A source, the object file that is made of it, and how."""

    source: Path
    object: Path
    flags: tuple[str, ...]
    compiler: str = ""  # of this machine, if empty


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS", "2"))


def torch_includes() -> tuple[str, ...]:
    from torch.utils import cpp_extension

    return tuple(f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"]))


def torch_libraries() -> tuple[str, ...]:
    from torch.utils import cpp_extension

    folders = (f"-L{path}" for path in cpp_extension.library_paths())
    return (*folders, "-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python")


def compile_units(units: Sequence[Unit], folders: Iterable[Path], purpose: str) -> list[Path]:
    """The objects; `folders` have all headers that sources include, and the build.py that knows the flags."""
    paths = [path for folder in folders for path in folder.rglob("*")]
    shared = [path for path in paths if path.suffix in (".h", ".cuh") or path.name == "build.py"]
    newest = max(path.stat().st_mtime for path in (*shared, Path(__file__)))
    stale = [unit for unit in units if not _is_newer(unit.object, max(newest, unit.source.stat().st_mtime))]

    def compile_one(unit: Unit) -> None:
        print(f"compile {unit.source.relative_to(ROOT)} {purpose}", flush=True)
        unit.object.parent.mkdir(parents=True, exist_ok=True)
        _make(unit.compiler, unit.object, *unit.flags, "-c", unit.source)

    with ThreadPoolExecutor(max_workers=jobs()) as pool:
        list(pool.map(compile_one, stale))
    return [unit.object for unit in units]


def link(
    target: Path, objects: Sequence[Path], flags: Iterable[str], libraries: Iterable[str] = (), linker: str = ""
) -> Path:
    if not _is_newer(target, max(path.stat().st_mtime for path in objects)):
        _make(linker, target, *flags, *objects, *libraries)
    return target


def preloaded() -> dict[str, str]:
    """The environment in which an ordinary program can load a library with AddressSanitizer."""
    runtimes = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "LD_PRELOAD": ":".join(run.stdout.strip() for run in runtimes),
        # Python and torch keep memory until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _is_newer(path: Path, time: float) -> bool:
    return path.exists() and path.stat().st_mtime >= time


def _make(tool: str, target: Path, *arguments: object) -> None:
    # Renamed when it is complete: an interrupted run leaves nothing that looks finished.
    unfinished = target.with_suffix(f".{os.getpid()}{target.suffix}")
    subprocess.run([tool or compiler(), *(str(word) for word in arguments), "-o", str(unfinished)], check=True)
    unfinished.rename(target)
