"""What tests of CUDA kernels need, on a GPU or emulated: counted launches, captured graphs, other drivers, bits."""

import contextlib
import ctypes
import os
import subprocess
import sys

import pytest
import torch
from step_cases import EMULATED, ON_CUDA_KERNELS

needs_cuda_kernels = pytest.mark.skipif(
    not ON_CUDA_KERNELS, reason="no CUDA kernels: python -m tests.emulated_cuda runs this"
)
emulated_only = pytest.mark.skipif(not EMULATED, reason="looks into the emulator")


def emulator():
    return ctypes.CDLL(os.environ["REGFUSED_TEST_EXTENSION"])


class Graph:
    """A captured step: torch's CUDA graph, or the emulator's list of launches."""

    @contextlib.contextmanager
    def capture(self):
        if EMULATED:
            emulator().emulated_capture()
            try:
                yield
            finally:
                self.launches = emulator().emulated_end_capture()
        else:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                yield

    def replay(self):
        if EMULATED:
            assert emulator().emulated_replay() == 0
        else:
            self.graph.replay()


def bits(tensors):
    return [t.detach().clone().reshape(-1).view(torch.uint8) for t in tensors]


def run_again(code, **environment):
    """Runs `code` in a process of its own, where the tests can be imported."""
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import conftest; {code}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
