"""Runs pytest on the emulated CUDA kernels, by default the tests of the step: python -m tests.emulated_cuda [ARGS]."""

import os
import platform
import shutil
import sys
from pathlib import Path

from tests.emulated_cuda.build import environment

if __name__ == "__main__":
    if platform.machine() != "x86_64" or shutil.which(os.environ.get("CXX", "g++")) is None:
        print("not run: the emulator needs g++ and an x86-64 processor")
        sys.exit(0)
    arguments = sys.argv[1:] or sorted(map(str, Path("tests").glob("test_sgd_*.py")))
    os.environ |= environment()
    # What a sanitizer says ends the process: it must not be caught.
    os.execv(sys.executable, [sys.executable, "-m", "pytest", "--capture=sys", *arguments])
