"""The same bits for any number of threads, any run and any instruction set; and bounds for what may differ."""

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from step_cases import ADAM_OPTIONS, DTYPES, ON_CUDA_KERNELS, OPTIONS, give_grads, make_params, with_defaults

import regfused

# One chunk, several, and sizes between; slices that lie together and that do not; more than a serial pass takes.
SHAPES = ((3,), (16385,), (300, 333), (5, 1025), (7, 6, 3, 3), (150_001,))
# All but the penalty: `test_the_penalty_of_a_step`.
STATS = ("grad_norm", "clip_coef", "zero_fraction", "skipped")
STEPS = ("elastic net in the clip", "clip, norm 1", "clip, norm inf", "proximal elastic net", "everything")


def _parameters(dtype):
    generator = torch.Generator(torch.get_default_device()).manual_seed(11)
    params = make_params(SHAPES, dtype, generator)
    give_grads(params, generator)
    return params


def _step(name, dtype, make=regfused.SGD, table=OPTIONS, **more):
    params = _parameters(dtype)
    optimizer = make(params, **{**with_defaults(table.get(name, {})), **more})
    optimizer.step()
    optimizer.step()
    state = [tensor for entry in optimizer.state.values() for tensor in entry.values()]
    return [*params, *state, *(getattr(optimizer.stats, name) for name in STATS)]


def _penalty(dtype):
    params = _parameters(dtype)
    value = regfused.penalty(params, l1=0.1, l2=0.2)
    return [value, *torch.autograd.grad(value, params)]


def _clip(dtype):
    params = _parameters(dtype)
    before = regfused.grad_norm(params)
    return [before, regfused.clip_grad_norm_(params, 0.5), *(p.grad for p in params)]


def _dropout(dtype):
    torch.manual_seed(3)
    params = _parameters(dtype)
    out = regfused.dropout(params[2], 0.3)
    return [out, *torch.autograd.grad(out.sum(), [params[2]])]


def _max_norm(dtype):
    params = _parameters(dtype)
    regfused.constrain_max_norm_(params[1:], 0.7, dim=0)
    return params


WORK = {
    **{f"step: {name}": lambda dtype, name=name: _step(name, dtype) for name in STEPS},
    **{
        f"Adam: {name}": lambda dtype, name=name: _step(name, dtype, regfused.Adam, ADAM_OPTIONS)
        for name in ("plain", "amsgrad", "proximal elastic net", "everything")
    },
    "step: group lasso by rows": lambda dtype: _step("", dtype, group_l1=1.0, momentum=0.9),
    "step: group lasso by columns": lambda dtype: _step("", dtype, group_l1=1.0, group_dim=-1, max_norm=1.0),
    "penalty": _penalty,
    "clip_grad_norm_": _clip,
    "dropout": _dropout,
    "constrain_max_norm_": _max_norm,
}


def fingerprints(names=tuple(WORK), dtypes=DTYPES) -> dict[str, str]:
    """What each piece of work computes, as a hash of every bit of it."""
    prints = {}
    for name in names:
        for dtype in dtypes:
            digest = hashlib.sha256()
            for tensor in WORK[name](dtype):
                digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes())
            prints[f"{name}, {dtype}"] = digest.hexdigest()
    return prints


@pytest.fixture(scope="module")
def one_thread():
    """Everything by one thread, on the best instruction set; every other run has to agree."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield fingerprints()
    torch.set_num_threads(before)


@pytest.mark.cpu
@pytest.mark.parametrize("count", range(1, 9))
def test_threads(count, one_thread, threads):
    threads(count)
    assert torch.get_num_threads() == count
    assert fingerprints() == one_thread


@pytest.mark.cpu
def test_instruction_sets(isa, one_thread, threads):
    for count in (1, 4):
        threads(count)
        assert fingerprints() == one_thread


@pytest.mark.cpu
def test_different_work_has_different_fingerprints(one_thread):
    assert len(set(one_thread.values())) == len(one_thread) == len(WORK) * len(DTYPES)


@pytest.mark.cpu
@pytest.mark.long
def test_processes_and_omp_num_threads(one_thread):
    """Other processes have other addresses, other pools of threads and other hash seeds."""
    code = "import json, test_determinism as t; print(json.dumps([t.torch.get_num_threads(), t.fingerprints()]))"
    runs = []
    for count in (1, 3, 8):
        environment = {**os.environ, "OMP_NUM_THREADS": str(count), "PYTHONHASHSEED": str(count)}
        environment["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *sys.path])
        runs.append((count, subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)))
    for count, run in runs:
        out, _ = run.communicate(timeout=240)
        assert run.returncode == 0
        threads, prints = json.loads(out)
        assert (threads > 1) == (count > 1) and prints == one_thread


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_penalty_of_a_step(dtype, isa, threads):
    """A number for the eye: a row of lanes is added up in the type of arithmetic, as wide as the registers are."""
    exact, seen = None, set()
    for count in (1, 2, 5):
        threads(count)
        params = _parameters(dtype)
        exact = sum(0.1 * p.detach().double().abs().sum() + 0.2 * p.detach().double().square().sum() for p in params)
        optimizer = regfused.SGD(params, lr=0.1, l1=0.1, l2=0.2)
        optimizer.step()
        seen.add(optimizer.stats.penalty.item())
    assert len(seen) == 1
    # Terms of one sign: at worst, a rounding for each of the 32 lanes of a row and four for a term.
    bound = 36 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert seen.pop() == pytest.approx(exact.item(), rel=bound, abs=0)


def test_repeated_runs(threads):
    threads(2)
    first = fingerprints(dtypes=(torch.float32,))
    for _ in range(3):
        assert fingerprints(dtypes=(torch.float32,)) == first


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", (33, 16385, 1_000_003))
def test_error_of_a_norm(dtype, size):
    """Another order of additions than torch's, or than that of another device, gives other last bits: how many."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(size)
    p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    p.grad = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    optimizer = regfused.SGD([p], lr=0.1, max_norm=math.inf)
    optimizer.step()
    # Squares of numbers of 24 bits are exact in float64: the sum of them is, but for its own last rounding.
    exact = math.sqrt(math.fsum(x * x for x in p.grad.double().tolist()))
    # On the CPU 32 lanes of float64 add up a chunk, then the chunks are added up: fewer than 16384/32 + n/16384 + 8
    # additions one after the other. A CUDA thread adds up its share of a chunk in the type of arithmetic first.
    bound = (16384 / 32 + size / 16384 + 8) * 2.0**-53
    if ON_CUDA_KERNELS and dtype != torch.float64:
        bound = 64 * 2.0**-24
    assert optimizer.stats.grad_norm.item() == pytest.approx(exact, rel=bound, abs=0)
