"""Runs pytest on the emulated CUDA kernels: python -m tests.emulated_cuda [pytest's arguments]."""

import os
import sys

from tests.emulated_cuda.build import environment

if __name__ == "__main__":
    os.environ |= environment()
    os.execv(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]])
