"""Fixtures for all tests."""

import pytest
import torch

import regfused
from regfused import extension

ISAS = extension.C.build_info()["isas"] if extension.C else []


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
