"""Fixtures for all tests, and which compiled part they run on.

REGFUSED_TEST_EXTENSION=path loads another one, such as the one with emulated CUDA kernels (``python -m
tests.emulated_cuda``). REGFUSED_TEST_DEVICE=cuda puts the tensors that tests make on a GPU.
"""

import importlib.util
import os
import sys

import pytest
import torch

if path := os.environ.get("REGFUSED_TEST_EXTENSION"):
    spec = importlib.util.spec_from_file_location("regfused._C", path)
    sys.modules["regfused._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["regfused._C"])

import regfused
from regfused import extension

ISAS = extension.C.build_info()["isas"] if extension.C else []
if path:  # another compiled part: instruction sets are not what it is about
    ISAS = ISAS[-1:]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """Every instruction set that this machine runs."""
    monkeypatch.setenv("REGFUSED_ISA", request.param)
    assert regfused.build_info()["isa"] == request.param
    return request.param
