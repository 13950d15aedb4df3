"""Runs the compiled part of regfused under every sanitizer, and shows that each of them sees a planted bug.

python -m tests.sanitizers; ends with a table, and with exit code 1 if anything failed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests import compiled
from tests.sanitizers import build

# Each kernel, dtype, instruction set and size of a tail, and what stands between Python and them.
TESTS = ("test_sgd_parity.py",)
NOT_REPEATED = "reference"

VALGRIND = (
    "valgrind",
    "--quiet",
    "--leak-check=full",
    "--error-exitcode=1",
    f"--fullpath-after={compiled.ROOT}/",
)
# What valgrind translates.
VALGRIND_ISAS = ("plain", "avx2")

# A new array is full of NaNs, so that an element that is not written shows in the results.
NAN_AT_FIRST = "max_malloc_fill_size=1073741824:malloc_fill_byte=255"


@dataclass(frozen=True)
class Plant:
    """A bug of planted.cpp, and what a sanitizer must say of it."""

    name: str
    message: str


ADDRESS_PLANTS = (Plant("long row", "heap-buffer-overflow"), Plant("long tail", "heap-buffer-overflow"))
UNDEFINED_PLANTS = (Plant("no bool", "runtime error: load of value 205"),)
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


def run(command: Sequence[str | Path], **environment: str) -> tuple[bool, str]:
    """Whether it succeeded, and what it said."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    return done.returncode == 0, done.stdout


def is_caught(plant: Plant, succeeded: bool, said: str) -> bool:
    """Whether a sanitizer stopped the run, for this bug, and in a kernel: not in the code around it."""
    lines = said.splitlines()
    for i, line in enumerate(lines):
        if plant.message in line:
            return not succeeded and any("csrc/cpu/" in near for near in lines[i : i + 5])
    return False


def check_program(
    name: str, command: Command, isas: Sequence[str], plants: Sequence[Plant], **environment: str
) -> Result:
    """The program with every instruction set, and with every planted bug."""
    start = time.monotonic()
    tasks = [("check", isa, None) for isa in isas] + [("plant", isa, plant) for plant in plants for isa in isas]

    def one(task: tuple[str, str, Plant | None]) -> bool:
        what, isa, plant = task
        arguments = [what] if plant is None else [what, plant.name]
        succeeded, said = run(command(*arguments), REGFUSED_ISA=isa, **environment)
        right = succeeded if plant is None else is_caught(plant, succeeded, said)
        describe = "every check" if plant is None else f"planted: {plant.name}"
        print(f"  {isa}, {describe}: {('clean' if plant is None else 'caught') if right else 'FAILED'}", flush=True)
        if not right:
            print(said, flush=True)
        return right

    with ThreadPoolExecutor(max_workers=int(os.environ.get("MAX_JOBS", "2"))) as pool:
        right = list(pool.map(one, tasks))
    ran = f"kernels and drivers, {', '.join(isas)}"
    return Result(name, ran, time.monotonic() - start, all(right[: len(isas)]), right[len(isas) :])


def check_extension(isas: Sequence[str]) -> Result:
    start = time.monotonic()
    library = build.link_extension()
    environment = {
        **compiled.preloaded(),
        "REGFUSED_TEST_EXTENSION": str(library),
        "OMP_NUM_THREADS": "2",
    }
    # What a sanitizer says ends the process: it must not be caught.
    command = [sys.executable, "-m", "pytest", "--capture=sys", "-q", "-n", "2", "--dist", "worksteal"]
    tests = subprocess.run(
        [*command, "-k", f"not {NOT_REPEATED}", *(f"tests/{name}" for name in TESTS)],
        env={**os.environ, **environment},
        check=False,
    )
    load = "import ctypes, sys, torch; ctypes.CDLL(sys.argv[1]).regfused_plant(sys.argv[2].encode())"
    caught = []
    for plant in (*ADDRESS_PLANTS, *UNDEFINED_PLANTS):
        said = run([sys.executable, "-c", load, library, plant.name], REGFUSED_ISA=isas[-1], **environment)
        caught.append(is_caught(plant, *said))
        print(f"  {isas[-1]}, planted: {plant.name}: {'caught' if caught[-1] else 'FAILED'}", flush=True)
        if not caught[-1]:
            print(said[1], flush=True)
    name = "AddressSanitizer, UndefinedBehaviorSanitizer"
    return Result(name, "the extension under pytest", time.monotonic() - start, tests.returncode == 0, caught)


def under_thread_sanitizer(program: Path) -> Command:
    """With a fixed layout of memory where ThreadSanitizer cannot live with a random one."""
    fixed = ("setarch", platform.machine(), "-R")
    needs_fixed = "unexpected memory mapping" in run([program, "isas"])[1]
    return lambda *arguments: [*(fixed if needs_fixed else ()), str(program), *arguments]


def show(results: Sequence[Result]) -> None:
    table = Table("sanitizer", "what ran", "seconds", "clean", "planted bugs caught")
    for result in results:
        table.add_row(
            result.sanitizer,
            result.ran,
            f"{result.seconds:.0f}",
            "yes" if result.clean else "NO",
            f"{sum(result.caught)} of {len(result.caught)}" + ("" if all(result.caught) else ": NOT ALL"),
        )
    Console().print(table)


def main() -> int:
    for tool, package in ((compiled.compiler(), "g++"), ("valgrind", "valgrind"), ("setarch", "util-linux")):
        if shutil.which(tool) is None:
            print(f"the sanitizers need {tool}, which is not installed here: apt-get install {package}")
            return 1

    start = time.monotonic()
    programs = (build.ADDRESS, build.THREAD, build.VALGRIND)
    units = {unit.object: unit for unit in (*build.extension(), *(u for kind in programs for u in build.program(kind)))}
    build.compile_all(list(units.values()), "for the sanitizers")
    address, thread, plain = (build.link_program(kind) for kind in programs)
    isas = run([plain, "isas"])[1].split()
    print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)

    results = []
    print("== valgrind")
    results.append(
        check_program(
            "valgrind",
            lambda *arguments: [*VALGRIND, str(plain), *arguments],
            [isa for isa in isas if isa in VALGRIND_ISAS],
            VALGRIND_PLANTS,
        )
    )
    print("== ThreadSanitizer")
    results.append(check_program("ThreadSanitizer", under_thread_sanitizer(thread), isas, THREAD_PLANTS))
    print("== AddressSanitizer and UndefinedBehaviorSanitizer")
    results.append(
        check_program(
            "AddressSanitizer, UndefinedBehaviorSanitizer",
            lambda *arguments: [str(address), *arguments],
            isas,
            (*ADDRESS_PLANTS, *UNDEFINED_PLANTS),
            ASAN_OPTIONS=NAN_AT_FIRST,
        )
    )
    print("== AddressSanitizer and UndefinedBehaviorSanitizer on the extension")
    results.append(check_extension(isas))
    show(results)
    print(f"{time.monotonic() - start:.0f} s in all")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
