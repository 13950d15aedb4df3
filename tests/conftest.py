"""Fixtures for all tests, and which compiled part they run on.

REGFUSED_TEST_EXTENSION=path loads another one: with emulated CUDA kernels (``python -m tests.emulated_cuda``), or
under sanitizers (``python -m tests.sanitizers``). REGFUSED_TEST_DEVICE=cuda puts the tensors that tests make on a GPU.
REGFUSED_TEST_EXAMPLES=1000 has tests of properties try that many random examples, others each time; without it they
are few and the same.
"""

import importlib.util
import os
import sys

import pytest
import torch

try:
    import hypothesis
except ImportError:  # on machines with a GPU and no network; tests of properties are skipped there
    hypothesis = None

OTHER_EXTENSION = os.environ.get("REGFUSED_TEST_EXTENSION")
OTHER_DEVICE = os.environ.get("REGFUSED_TEST_DEVICE")

if OTHER_EXTENSION:
    spec = importlib.util.spec_from_file_location("regfused._C", OTHER_EXTENSION)
    sys.modules["regfused._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["regfused._C"])

if hypothesis:
    EXAMPLES = os.environ.get("REGFUSED_TEST_EXAMPLES")
    hypothesis.settings.register_profile(
        "regfused",
        max_examples=int(EXAMPLES or (20 if OTHER_EXTENSION else 60)),
        derandomize=EXAMPLES is None,
        database=None,
        deadline=None,  # the machine's other work is no fault of an example
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("regfused")

if OTHER_DEVICE:
    torch.set_default_device(OTHER_DEVICE)

if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread for each worker: with more they mostly wait for each other. Tests of threads set their number.
    torch.set_num_threads(1)

from step_cases import ON_CUDA_KERNELS  # noqa: E402

import regfused  # noqa: E402
from regfused import extension  # noqa: E402

ISAS = extension.C.build_info()["isas"] if extension.C else []
if ON_CUDA_KERNELS:
    ISAS = ISAS[-1:]


def is_about_the_reference(item):
    """Whether a test runs nothing that is compiled: the optimizer in it is the one in torch operations."""
    make = item.callspec.params.get("make") if hasattr(item, "callspec") else None
    of_the_reference = str(getattr(make, "__module__", "")).startswith(regfused.reference.__name__)
    return item.get_closest_marker("reference") is not None or of_the_reference or "_twin_" in item.name


# What make test leaves to make test-all, beside the tests that say so themselves: the contract of the reference, whose
# formulas have tests of their own, interrupts of each of its lines, and options that are one argument more in a graph.
LONG = (
    ("test_step_contract", "_twin_"),
    ("test_interrupt_before_any_line[", "reference"),
    ("test_ten_thousand_steps_do_not_grow[", "reference"),
    ("test_ten_thousand_steps_do_not_grow[", "leftovers"),
    ("test_another_number_of_ranks[", "4]"),
    *(("test_step_in_graph", "test_equal_to_eager[", case) for case in ("elastic net", "proximal", "group lasso")),
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if any(all(part in item.nodeid for part in parts) for parts in LONG):
            item.add_marker(pytest.mark.long)
    if OTHER_EXTENSION:
        other = [item for item in items if is_about_the_reference(item)]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]
    if ON_CUDA_KERNELS:
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="about the CPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _modes_as_found():
    """A test that leaves one of torch's modes switched fails itself, not the tests after it."""

    def look():
        return {
            "autograd": torch.is_grad_enabled(),
            "__torch_function__": torch._C._is_torch_function_enabled(),
            "modes of __torch_function__": torch._C._len_torch_function_stack(),
            "modes of __torch_dispatch__": torch._C._len_torch_dispatch_stack(),
            "autocast": [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")],
            "default dtype": torch.get_default_dtype(),
            "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        }

    before = look()
    yield
    after = look()
    torch.set_grad_enabled(before["autograd"])
    torch._C._set_torch_function_state(torch._C._TorchFunctionState.ENABLED)
    assert after == before


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
