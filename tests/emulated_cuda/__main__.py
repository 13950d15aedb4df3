"""Runs pytest on the emulated CUDA kernels: python -m tests.emulated_cuda [ARGS], by default all tests of kernels."""

import os
import platform
import shutil
import sys
from pathlib import Path

from tests.emulated_cuda.build import environment

# Tests that CPU kernels and CUDA kernels have to pass alike, and those of CUDA kernels alone.
FILES = (
    "test_step_*.py",
    "test_adam_*.py",
    "test_foreach_cuda.py",
    "test_penalty.py",
    "test_clip_grad_norm.py",
    "test_dropout.py",
    "test_dropout_statistics.py",
    "test_max_norm.py",
)
# What Python does around the kernels, and schedules of numbers: the same for any of them.
LEFT_OUT = (
    "test_step_contract_state",
    "test_step_checkpoints",
    "test_step_errors",
    "test_step_hooks",
    "test_step_rounding",
)

if __name__ == "__main__":
    if platform.machine() != "x86_64" or shutil.which(os.environ.get("CXX", "g++")) is None:
        print("not run: the emulator needs g++ and an x86-64 processor")
        sys.exit(0)
    arguments = sys.argv[1:]
    if not any(".py" in argument for argument in arguments):
        arguments += sorted(
            str(path) for files in FILES for path in Path("tests").glob(files) if path.stem not in LEFT_OUT
        )
    os.environ |= environment()
    # What a sanitizer says ends the process: it must not be caught.
    os.execv(sys.executable, [sys.executable, "-m", "pytest", "--capture=sys", *arguments])
