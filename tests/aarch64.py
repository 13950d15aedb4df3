"""Compiles the CPU kernels and their drivers for aarch64, and runs their checks under qemu: python -m tests.aarch64.

The compiler and the emulator are those of Debian and its kin: apt-get install g++-aarch64-linux-gnu qemu-user. The
extension itself is not compiled: there is no torch for aarch64 here to link it to.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.sanitizers import build

QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


def main() -> int:
    tools = ((build.AARCH64.compiler, "g++-aarch64-linux-gnu"), (QEMU[0], "qemu-user"))
    for tool, package in tools:
        if shutil.which(tool) is None:
            print(f"the check of aarch64 needs {tool}, which is not installed here: apt-get install {package}")
            return 1
    build.compile_all(build.program(build.AARCH64), "for aarch64")
    program = build.link_program(build.AARCH64)
    count = count_of_vector_instructions(build.OUT / build.AARCH64.name / "isa_plain.o")
    print(f"{count} floating-point instructions of the kernels are of four or two elements (NEON)")
    print("run the checks of the kernels under qemu", flush=True)
    passed = count > 0 and subprocess.run([*QEMU, program, "check"], check=False).returncode == 0
    print(f"aarch64: {'passed' if passed else 'FAILED'}")
    return 0 if passed else 1


def count_of_vector_instructions(kernels: Path) -> int:
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "--disassemble", kernels], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    words = (line.split("\t")[2:] for line in listing)
    return sum(1 for w in words if len(w) > 1 and w[0][0] == "f" and (".4s" in w[1] or ".2d" in w[1]))


if __name__ == "__main__":
    sys.exit(main())
