"""Runs the compiled part of regfused under every sanitizer, and shows that each of them sees a planted bug.

python -m tests.sanitizers; ends with a table, and with exit code 1 if anything failed.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import compiled
from tests.sanitizers import build

# What CPU kernels have to pass, and what stands between Python and them.
TESTS = (
    "test_step_*.py",
    "test_adam_*.py",
    "test_penalty.py",
    "test_clip_grad_norm.py",
    "test_dropout.py",
    "test_max_norm.py",
)
LEFT_OUT = (
    *("test_step_cuda", "test_step_gpu"),  # all of it would be skipped
    "test_step_contract",  # what torch asks of Python; too long for what it runs of the kernels
    *("test_step_checkpoints", "test_step_errors", "test_step_rounding", "test_step_hooks"),  # likewise
    *("fsdp2", "in_the_rules"),  # these run processes that have other code
    "(test_step_parity and same_bits)",  # the program does that in less time
)

ADDRESS = "AddressSanitizer, UBSan"

VALGRIND = (
    *("valgrind", "--quiet", "--error-exitcode=1", "--leak-check=full"),
    # A vector may not reach beyond an array.
    "--partial-loads-ok=no",
    f"--fullpath-after={compiled.ROOT}/",
)
# What valgrind translates.
VALGRIND_ISAS = ("plain", "avx2")

# A new array is full of NaNs, so that it shows in the results when one is read that should not be.
NAN_AT_FIRST = "max_malloc_fill_size=1073741824:malloc_fill_byte=255"


@dataclass(frozen=True)
class Plant:
    """A bug of planted.cpp, and what a sanitizer must say of it: a regular expression."""

    name: str
    message: str


ADDRESS_PLANTS = (
    # The second is what is said of a vector that begins inside of the array.
    Plant("long row", "heap-buffer-overflow|AddressSanitizer: unknown-crash"),
    Plant("long tail", "heap-buffer-overflow"),
    Plant("no bool", "runtime error: load of value 205"),
)
THREAD_PLANTS = (Plant("shared chunk", "data race"),)
VALGRIND_PLANTS = (
    Plant("long row", "Invalid read"),
    Plant("long tail", "Invalid read"),
    Plant("uninitialised gradient", "depends on uninitialised value"),
)


@dataclass
class Result:
    sanitizer: str
    ran: str
    seconds: float
    clean: bool
    caught: Sequence[bool]

    @property
    def passed(self) -> bool:
        return self.clean and all(self.caught)


Command = Callable[..., list[str]]  # of the program's arguments


def run(command: Sequence[str | Path], environment: dict[str, str] | None = None) -> tuple[bool, str]:
    """Whether it succeeded, and what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    return done.returncode == 0, done.stdout


def is_caught(plant: Plant, succeeded: bool, said: str) -> bool:
    """Whether a sanitizer stopped the run, for this bug, and in a kernel: not in the code around it."""
    lines = said.splitlines()
    at = next((i for i, line in enumerate(lines) if re.search(plant.message, line)), None)
    return not succeeded and at is not None and any("csrc/cpu/" in near for near in lines[at : at + 5])


def report(what: str, right: bool, said: str) -> None:
    print(f"  {what}: {'yes' if right else 'NO'}", flush=True)
    if not right:
        print(said, flush=True)


def plant_all(
    command: Command, isas: Iterable[str], plants: Iterable[Plant], environment: dict[str, str]
) -> list[bool]:
    """Whether each bug is caught on each instruction set."""

    def plant_one(task: tuple[str, Plant]) -> bool:
        isa, plant = task
        succeeded, said = run(command("plant", plant.name), {"REGFUSED_ISA": isa, **environment})
        caught = is_caught(plant, succeeded, said)
        report(f"{isa}, caught the planted {plant.name}", caught, said)
        return caught

    with ThreadPoolExecutor(max_workers=compiled.jobs()) as pool:
        return list(pool.map(plant_one, [(isa, plant) for plant in plants for isa in isas]))


def check_program(
    name: str, command: Command, isas: Sequence[str], plants: Iterable[Plant], environment: dict[str, str]
) -> Result:
    print(f"== {name}: the program")
    start = time.monotonic()

    def check_one(isa: str) -> bool:
        succeeded, said = run(command("check"), {"REGFUSED_ISA": isa, **environment})
        report(f"{isa}, clean", succeeded, said)
        return succeeded

    with ThreadPoolExecutor(max_workers=compiled.jobs()) as pool:
        clean = list(pool.map(check_one, isas))
    caught = plant_all(command, isas, plants, environment)
    return Result(name, f"program: {', '.join(isas)}", time.monotonic() - start, bool(isas) and all(clean), caught)


def check_extension(isas: Sequence[str]) -> Result:
    print(f"== {ADDRESS}: the extension under pytest")
    start = time.monotonic()
    library = build.link_extension()
    environment = {**compiled.preloaded(), "REGFUSED_TEST_EXTENSION": str(library), "OMP_NUM_THREADS": "2"}
    files = sorted(path for pattern in TESTS for path in (compiled.ROOT / "tests").glob(pattern))
    # What a sanitizer says ends the process: it must not be caught.
    pytest = ["pytest", "--capture=sys", "--quiet", "-rNfE", "-n", "2", "--dist", "worksteal"]
    chosen = " and ".join(f"not {name}" for name in LEFT_OUT)
    tests = subprocess.run(
        [sys.executable, "-m", *pytest, "-k", chosen, *files], env={**os.environ, **environment}, check=False
    )
    load = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]).regfused_plant(sys.argv[3].encode())"
    caught = plant_all(
        lambda *arguments: [sys.executable, "-c", load, str(library), *arguments],
        isas[-1:],
        ADDRESS_PLANTS,
        environment,
    )
    return Result(ADDRESS, "extension: pytest", time.monotonic() - start, tests.returncode == 0, caught)


def under_thread_sanitizer(program: Path) -> Command:
    """With a fixed layout of memory where ThreadSanitizer cannot live with a random one."""
    needs_fixed = "unexpected memory mapping" in run([program, "isas"])[1]
    fixed = ("setarch", platform.machine(), "-R") if needs_fixed else ()
    return lambda *arguments: [*fixed, str(program), *arguments]


def show(results: Iterable[Result]) -> None:
    table = Table("sanitizer", "what ran", "seconds", "clean", "planted bugs")
    for result in results:
        caught = f"{sum(result.caught)} of {len(result.caught)} caught"
        table.add_row(result.sanitizer, result.ran, f"{result.seconds:.0f}", "yes" if result.clean else "NO", caught)
    Console().print(table)


def main() -> int:
    for tool, package in ((compiled.compiler(), "g++"), ("valgrind", "valgrind"), ("setarch", "util-linux")):
        if shutil.which(tool) is None:
            print(f"the sanitizers need {tool}, which is not installed here: apt-get install {package}")
            return 1

    start = time.monotonic()
    kinds = (build.ADDRESS, build.THREAD, build.VALGRIND)
    units = {unit.object: unit for unit in (*build.extension(), *(u for kind in kinds for u in build.program(kind)))}
    build.compile_all(list(units.values()))
    address, thread, ordinary = (build.link_program(kind) for kind in kinds)
    compiling = time.monotonic() - start

    isas = run([ordinary, "isas"])[1].split()
    valgrind_isas = [isa for isa in isas if isa in VALGRIND_ISAS]
    results = [
        check_program("valgrind", lambda *args: [*VALGRIND, str(ordinary), *args], valgrind_isas, VALGRIND_PLANTS, {}),
        check_program("ThreadSanitizer", under_thread_sanitizer(thread), isas, THREAD_PLANTS, {}),
        check_program(
            ADDRESS, lambda *args: [str(address), *args], isas, ADDRESS_PLANTS, {"ASAN_OPTIONS": NAN_AT_FIRST}
        ),
        check_extension(isas),
    ]
    show(results)
    print(f"{time.monotonic() - start:.0f} s in all, {compiling:.0f} s of them compiling")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
