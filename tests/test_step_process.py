"""Interruptions, memory, threads, processes, compiled training steps."""

import copy
import gc
import itertools
import math
import os
import threading
import time
import weakref

import pytest
import torch
from step_cases import UNDER_ADDRESS_SANITIZER, assert_params_equal, copy_params, give_grads, make_params

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


@pytest.mark.parametrize("cycle", (None, "attribute", "scheduler", "hooks", "closure"))
@pytest.mark.parametrize("make", (regfused.SGD, regfused.reference.SGD), ids=("kernels", "reference"))
def test_optimizer_and_model_are_freed(cycle, make):
    model = torch.nn.Linear(30, 30)
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
    if cycle == "attribute":
        model.weight.owner = optimizer
    elif cycle == "scheduler":
        model.scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    elif cycle == "hooks":
        optimizer.register_step_pre_hook(lambda *_, optimizer=optimizer: None)
        optimizer.register_load_state_dict_post_hook(lambda *_, model=model: None)
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step((lambda model=model: model(torch.ones(2, 30)).sum()) if cycle == "closure" else None)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert optimizer.stats.grad_norm > 0
    seen = (
        weakref.ref(model.weight),
        weakref.ref(optimizer),
        weakref.ref(optimizer.state[model.weight]["momentum_buffer"]),
    )
    # Where nothing refers in a circle, no collector is needed.
    gc.disable()
    try:
        del model, optimizer
        if cycle in (None, "closure"):
            assert [ref() for ref in seen] == [None, None, None]
    finally:
        gc.enable()
    gc.collect()
    assert [ref() for ref in seen] == [None, None, None]


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
@pytest.mark.parametrize("kind", ("kernels", "leftovers", "reference", "AMP", "groups that come and go"))
def test_ten_thousand_steps_do_not_grow(kind, threads):
    threads(1)
    params = make_params([100, 100])
    give_grads(params)
    if kind == "leftovers":
        params.append(torch.nn.Parameter(torch.ones(5, dtype=torch.complex64)))
        params[-1].grad = torch.ones_like(params[-1])
    make = regfused.reference.SGD if kind == "reference" else regfused.SGD
    optimizer = make(params, lr=1e-9, momentum=0.9, l1=0.1, max_norm=1.0, fused=True if kind == "AMP" else None)
    extra = make_params([50])
    give_grads(extra)

    def step(i):
        if kind == "AMP":
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(float(i % 3 == 0))
        if kind == "groups that come and go" and i % 10 == 0:
            # Everything that is known of the parameters is made anew.
            optimizer.add_param_group({"params": extra})
        optimizer.step()
        if kind == "groups that come and go" and i % 10 == 5:
            optimizer.state.pop(extra[0])
            optimizer.param_groups.pop()
        if i % 100 == 0:
            assert optimizer.stats.zero_fraction >= 0

    def resident():
        gc.collect()
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for i in range(1000):
        step(i)
    before = resident()
    for i in range(10_000):
        step(i)
    # A tensor of 100 floats left behind by every step would be 4 MB; a Python object, half of one.
    assert resident() - before < 1 << 19


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


def test_one_optimizer_in_two_threads(threads):
    """A step that finds another one at work raises, and changes nothing: what happened is a number of whole steps."""
    threads(1)
    p = torch.nn.Parameter(torch.zeros(4_000_000))  # a step of milliseconds, for the others to find it at work
    p.grad = torch.full_like(p, -1.0)
    optimizer = regfused.SGD([p], lr=1.0, max_norm=math.inf)
    optimizer.step()
    done, refused = [], []
    together = threading.Barrier(3)
    deadline = time.monotonic() + 60

    def work():
        together.wait()
        for i in itertools.count():  # on a busy machine it can take many steps until two of them meet
            if (i >= 20 and refused) or time.monotonic() > deadline:
                return
            try:
                optimizer.step()
                done.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert refused, "they never met"
    assert all("one step at a time, but another thread is inside a step" in message for message in refused)
    assert torch.equal(p.detach(), torch.full_like(p, 1.0 + len(done)))


def _exit_code_of_a_child(work) -> int:
    """Runs `work` in a forked child. No torch operation may be in it that would itself wake threads."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if work() else 3)
        finally:
            os._exit(4)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    pytest.fail("the forked child hangs")


@pytest.mark.parametrize(
    "options", ({"max_norm": 1.0}, {"group_l1": 1e-3}, {"group_l1": 1e-3, "group_dim": 1}), ids=str
)
def test_forked_child_steps(options, threads):
    threads(2)
    params = make_params([(300, 1000)])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, **options)
    optimizer.step()  # the pool of threads exists now
    before = params[0][-1, -1].item()

    def step():
        optimizer.step()
        return params[0][-1, -1].item() != before

    assert _exit_code_of_a_child(step) == 0
    assert _exit_code_of_a_child(lambda: _exit_code_of_a_child(step) == 0) == 0  # a child's child
    assert params[0][-1, -1].item() == before
    optimizer.step()
    assert params[0][-1, -1].item() != before


def test_forked_child_uses_the_pieces(threads):
    threads(2)
    params = make_params([300_000])
    give_grads(params)
    regfused.clip_grad_norm_(params, 1.0)

    def pieces():
        with torch.no_grad():
            penalty = regfused.penalty(params, l1=0.1).item()
            norm = regfused.clip_grad_norm_(params, 0.5).item()
            regfused.constrain_max_norm_(params, 1.0)
            dropped = regfused.dropout(params[0], 0.5)[:2].tolist()
        return penalty > 0 and norm > 0 and len(dropped) == 2

    assert _exit_code_of_a_child(pieces) == 0


def test_children_of_a_process_whose_threads_step(threads):
    threads(2)
    stop = threading.Event()

    def train():
        params = make_params([200_000])
        give_grads(params)
        busy = regfused.SGD(params, lr=1e-3, momentum=0.9, max_norm=1.0)
        while not stop.is_set():
            busy.step()

    worker = threading.Thread(target=train)
    params = make_params([200_000])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9)
    optimizer.step()
    worker.start()
    try:
        for _ in range(10):
            assert _exit_code_of_a_child(lambda: optimizer.step() is None) == 0
    finally:
        stop.set()
        worker.join()


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
