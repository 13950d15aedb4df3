"""What is particular to CUDA kernels in passes over lists of tensors: launches, grids, graphs. On a GPU or emulated."""

import pytest
import torch
from cuda_runs import Graph, bits, emulated_only, emulator, needs_cuda_kernels, run_again
from step_cases import DTYPES, EMULATED

import regfused
from regfused import reference

pytestmark = needs_cuda_kernels


def with_grads(sizes, dtypes=(torch.float32,)):
    params = [torch.randn(size).to(dtype).requires_grad_() for dtype in dtypes for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def launches_of(call):
    before = emulator().emulated_launches()
    call()
    return emulator().emulated_launches() - before


@emulated_only
def test_launches():
    params = with_grads([3, 70, 0, 5000], DTYPES)
    assert launches_of(lambda: regfused.grad_norm(params)) == 2
    assert launches_of(lambda: regfused.clip_grad_norm_(params, 0.1)) == 2
    value = []
    assert launches_of(lambda: value.append(regfused.penalty(params, l1=0.1))) == 2
    assert launches_of(value[0].backward) == 1


def test_the_last_chunk_of_many_tensors():
    """Tensors of one chunk, of several, and of one element more."""
    for sizes in ([1024, 1025, 1, 2048, 2049, 0, 0, 5], [0, 0], [0, 7], [7, 0]):
        params = with_grads(sizes)
        everything = torch.cat([p.grad for p in params])
        norm = regfused.clip_grad_norm_(params, 0.5).item()
        assert norm == pytest.approx(everything.double().norm().item(), rel=1e-6)
        c = min(1.0, 0.5 / (norm + 1e-6))
        torch.testing.assert_close(torch.cat([p.grad for p in params]), c * everything)


@pytest.mark.parametrize("driver", (13000, 11000))
def test_more_tensors_than_one_launch_takes(driver):
    # 32 KB of arguments hold some 1000 tensors, 4 KB of an old driver some 120.
    if driver == 11000:
        if not EMULATED:
            pytest.skip("an old driver is emulated")
        run_again("import test_foreach_cuda; test_foreach_cuda.pass_over_many()", REGFUSED_EMULATED_DRIVER="11000")
    else:
        pass_over_many()


def pass_over_many():
    params = with_grads([i % 7 for i in range(2500)], (torch.float32,))
    everything = torch.cat([p.grad for p in params]).double()
    assert regfused.clip_grad_norm_(params, 1.0).item() == pytest.approx(everything.norm().item(), rel=1e-6)
    clipped = torch.cat([p.grad for p in params]).double()
    torch.testing.assert_close(clipped, everything / (everything.norm() + 1e-6), rtol=1e-6, atol=0)
    twins = [p.detach().clone().requires_grad_() for p in params]
    grads = torch.autograd.grad(regfused.penalty(params, l1=0.3, l2=0.7), params)
    want = torch.autograd.grad(reference.penalty(twins, l1=0.3, l2=0.7), twins)
    torch.testing.assert_close(torch.cat(grads), torch.cat(want))


@emulated_only
def test_same_bits_on_every_grid_and_in_every_order(monkeypatch):
    results = {}
    for multiprocessors in (1, 3, 1000):
        for order in ("forward", "reverse", "random"):
            monkeypatch.setenv("REGFUSED_EMULATED_MULTIPROCESSORS", str(multiprocessors))
            monkeypatch.setenv("REGFUSED_EMULATED_ORDER", order)
            torch.manual_seed(0)
            params = with_grads([4099, 1, 1025, 33, 2048], DTYPES)
            norm = regfused.clip_grad_norm_(params, 1.0)
            clipped = [p.grad for p in params]
            value = regfused.penalty(params, l1=0.3, l2=0.7)
            results[multiprocessors, order] = bits([norm, *clipped, value, *torch.autograd.grad(value, params)])
    baseline = results.pop((1, "forward"))
    for how, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(result, baseline, strict=True)), how


@emulated_only
def test_tensors_on_two_devices(monkeypatch):
    monkeypatch.setenv("REGFUSED_EMULATED_DEVICES", "2")
    params = with_grads([30, 31, 4000, 4001])
    everything = torch.cat([p.grad for p in params]).double()
    assert regfused.grad_norm(params).item() == pytest.approx(everything.norm().item(), rel=1e-6)
    assert regfused.clip_grad_norm_(params, 1.0).item() == pytest.approx(everything.norm().item(), rel=1e-6)
    clipped = torch.cat([p.grad for p in params]).double()
    torch.testing.assert_close(clipped, everything / (everything.norm() + 1e-6), rtol=1e-6, atol=1e-12)
    value = regfused.penalty(params, l1=0.3, l2=0.7)
    value.backward()
    torch.testing.assert_close(value, reference.penalty(params, l1=0.3, l2=0.7))


@pytest.mark.skipif(
    EMULATED, reason="what a pass allocates during a capture is kept by torch's graphs, not the emulator's"
)
def test_a_clip_in_a_graph():
    params = with_grads([70, 5000])
    regfused.clip_grad_norm_(params, 1.0)
    graph = Graph()
    with graph.capture():
        norm = regfused.clip_grad_norm_(params, 1.0)
    for scale in (3.0, 0.01):
        for p in params:
            p.grad.normal_().mul_(scale)
        want = torch.cat([p.grad for p in params]).double().norm().item()
        graph.replay()
        assert (
            norm.item() == pytest.approx(want, rel=1e-6) or EMULATED
        )  # the result in float32 is an operation of torch
        after = torch.cat([p.grad for p in params]).double().norm().item()
        assert after == pytest.approx(min(want, 1.0), rel=1e-5)


@emulated_only
def test_a_launch_that_is_refused():
    params = with_grads([70])
    emulator().emulated_fail(0)
    with pytest.raises(RuntimeError, match="CUDA refused to launch a pass over a list of tensors"):
        regfused.clip_grad_norm_(params, 1.0)
    regfused.clip_grad_norm_(params, 1.0)


def test_large_and_tiny_squares_are_taken_again_in_double():
    params = with_grads([3000])
    for scale in (1e25, 1e-20, 1e-25):
        params[0].grad = torch.randn(3000) * scale
        want = params[0].grad.double().norm().item()
        assert regfused.grad_norm(params).item() == pytest.approx(want, rel=1e-6, abs=1e-21)
