"""Interruptions, memory, threads, processes, compiled training steps."""

import copy
import gc
import os
import threading
import time
import weakref

import pytest
import torch
from sgd_cases import UNDER_ADDRESS_SANITIZER, assert_params_equal, copy_params, give_grads, make_params

import regfused

pytestmark = pytest.mark.cpu


def test_interrupted_commit_leaves_no_state(monkeypatch):
    params = make_params([5, 6, 7])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    before = copy_params(params)
    calls = 0
    original = torch.Tensor.__hash__

    def hash_and_interrupt(self):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(torch.Tensor, "__hash__", hash_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    monkeypatch.undo()
    assert calls >= 5 and not optimizer.state
    assert_params_equal(params, before)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b.detach() - 0.1 * p.grad)


@pytest.mark.parametrize("cycle", (False, True))
def test_optimizer_and_model_are_freed(cycle):
    model = torch.nn.Linear(30, 30)
    optimizer = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if cycle:
        model.weight.owner = optimizer
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    seen = weakref.ref(model.weight), weakref.ref(optimizer)
    del model, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None, None]


def test_step_inside_of_backward():
    model = torch.nn.Linear(30, 30)
    twin = copy.deepcopy(model)
    for p in model.parameters():
        optimizer = regfused.SGD([p], lr=0.1, momentum=0.9)

        def step(p, optimizer=optimizer):
            optimizer.step()
            p.grad = None

        p.register_post_accumulate_grad_hook(step)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        x = torch.randn(4, 30)
        model(x).square().mean().backward()
        loop.zero_grad()
        twin(x).square().mean().backward()
        loop.step()
    assert_params_equal(model.parameters(), twin.parameters(), atol=1e-6)


def test_a_step_allocates_next_to_nothing():
    params = make_params([1_000_000, 1000])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.1, max_norm=1.0)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    assert allocated == 0


@pytest.mark.skipif(UNDER_ADDRESS_SANITIZER, reason="AddressSanitizer keeps what is freed")
def test_thousands_of_steps_do_not_grow():
    params = make_params([100, 100])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=1e-9, momentum=0.9, l1=0.1, max_norm=1.0)

    def resident():
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for _ in range(500):
        optimizer.step()
    gc.collect()
    before = resident()
    for _ in range(5000):
        optimizer.step()
    gc.collect()
    assert resident() - before < 1 << 20


def test_optimizers_in_several_threads(threads):
    threads(2)
    results = {}

    def train(name):
        generator = torch.Generator().manual_seed(7)
        params = make_params([200_000, 33], generator=generator)
        optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.01, max_norm=1.0)
        for _ in range(20):
            give_grads(params, generator)
            optimizer.step()
        results[name] = params

    workers = [threading.Thread(target=train, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    train("alone")
    for i in range(4):
        assert_params_equal(results[i], results["alone"])


def test_forked_child_steps(threads):
    threads(2)
    params = make_params([300_000])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0)
    optimizer.step()  # the pool of threads exists now
    before = params[0][-1].item()
    pid = os.fork()
    if pid == 0:
        try:
            optimizer.step()
            os._exit(0 if params[0][-1].item() != before else 3)  # no torch operation that would itself wake threads
        finally:
            os._exit(4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the forked child hangs")
    assert os.waitstatus_to_exitcode(status) == 0


def test_inside_a_compiled_training_step():
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    ours = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=0.1)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)

    @torch.compile(backend="eager")
    def train(x):
        ours.zero_grad()
        model(x).square().mean().backward()
        ours.step()

    for _ in range(3):
        x = torch.randn(4, 3)
        train(x)
        loop.zero_grad()
        twin(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        loop.step()
    assert_params_equal(model.parameters(), twin.parameters(), atol=1e-6)
