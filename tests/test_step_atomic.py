"""A step happens whole or not at all, wherever an error or an interrupt comes; and the next step is right."""

import gc
import os
import random
import signal
import sys
import time

import pytest
import torch
from step_cases import OTHER_EXTENSION, give_grads, make_params
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

import regfused
from regfused import extension, reference

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Thousands of steps over a handful of elements: waking threads would take most of the time."""
    threads(1)


SIZES = (3, 33, 65)


class Training:
    """An optimizer with its parameters, the same at each construction."""

    def __init__(self, make=regfused.SGD, *, warm=True, complex_param=False, sparse=False, amp=False, **options):
        generator = torch.Generator(torch.get_default_device()).manual_seed(5)
        self.params = make_params(SIZES, generator=generator)
        self.params.append(torch.nn.Parameter(torch.randn(2, 3, 4, 5, generator=generator)))
        if complex_param:
            self.params.append(torch.nn.Parameter(torch.randn(4, dtype=torch.complex64, generator=generator)))
        if sparse:
            self.params.append(torch.nn.Parameter(torch.randn(10, 3, generator=generator)))
        self.sparse, self.amp, self.generator = sparse, amp, generator
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.2}]
        momentum = {"momentum": 0.9} if issubclass(make, torch.optim.SGD) else {}
        self.optimizer = make(groups, lr=0.1, **momentum, **options)
        self.new_grads()
        if warm:
            # One parameter has had no gradient: its state is still to be made.
            self.params[1].grad = None
            self.step()
            self.new_grads()

    def new_grads(self):
        dense = self.params[:-1] if self.sparse else self.params
        give_grads([p for p in dense if not p.is_complex()], self.generator)
        for p in dense:
            if p.is_complex():
                p.grad = torch.randn(p.shape, dtype=p.dtype, generator=self.generator)
        # In another layout than its parameter.
        self.params[3].grad = self.params[3].grad.contiguous(memory_format=torch.channels_last)
        if self.sparse:
            rows = torch.tensor([[1, 4, 1]])
            values = torch.randn(3, 3, generator=self.generator)
            self.params[-1].grad = torch.sparse_coo_tensor(rows, values, (10, 3), check_invariants=True)

    def arm(self):
        """What torch.amp.GradScaler leaves at the optimizer for the time of a step."""
        if self.amp:
            self.optimizer.grad_scale, self.optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)

    def disarm(self):
        self.optimizer.__dict__.pop("grad_scale", None)
        self.optimizer.__dict__.pop("found_inf", None)

    def step(self):
        self.arm()
        self.optimizer.step()
        self.disarm()

    def bits(self):
        """Parameters, gradients and state as bytes that can be compared."""
        tensors = {f"param {i}": p for i, p in enumerate(self.params)}
        tensors |= {f"grad {i}": p.grad for i, p in enumerate(self.params)}
        for i, p in enumerate(self.params):
            for name, value in self.optimizer.state.get(p, {}).items():
                tensors[f"state {i} {name}"] = value
        return {name: _bytes(tensor) for name, tensor in tensors.items()}


def _bytes(tensor):
    if tensor is None:
        return None
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().to_dense()
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


TRAININGS = {
    "first step": dict(warm=False),
    "kernels": dict(max_norm=0.5, l1=0.1),
    "group lasso": dict(group_l1=0.5),
    "AMP": dict(amp=True, fused=True, max_norm=0.5),
    "kernels and a complex parameter": dict(complex_param=True, max_norm=0.5),
    "first step with a complex parameter": dict(complex_param=True, warm=False),
    "kernels and a sparse gradient": dict(sparse=True),
    "first step with a sparse gradient": dict(sparse=True, warm=False),
    "reference": dict(make=reference.SGD, max_norm=0.5, l1=0.1, nonfinite="skip"),
    "reference, first step": dict(make=reference.SGD, warm=False, group_l1=0.5),
    "reference, AMP": dict(make=reference.SGD, amp=True, fused=True),
    "Adam, first step": dict(make=regfused.Adam, warm=False, amsgrad=True),
    "Adam": dict(make=regfused.Adam, max_norm=0.5, l1=0.1, proximal=True),
    "AdamW, AMP": dict(make=regfused.AdamW, amp=True, fused=True, max_norm=0.5),
    "Adam and a complex parameter": dict(make=regfused.Adam, complex_param=True, max_norm=0.5),
    "Adam, reference, first step": dict(make=reference.Adam, warm=False, max_norm=0.5, l1=0.1),
}
REFERENCES = (reference.SGD, reference.Adam)
# Nothing of the reference is compiled: there is no use in it for another compiled part.
NAMES = [name for name in TRAININGS if not (OTHER_EXTENSION and TRAININGS[name].get("make") in REFERENCES)]
ALL = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def whole(name):
    """What an undisturbed training looks like after no, one and two more steps."""
    training = Training(**TRAININGS[name])
    looks = [training.bits()]
    for _ in range(2):
        training.step()
        looks.append(training.bits())
    assert all(looks[0][f"param {i}"] != looks[1][f"param {i}"] for i in range(len(training.params)))
    return looks


def assert_whole_or_nothing(training, whole, where):
    """Everything is as before the step, or everything as after it; and the next step is right."""
    now = training.bits()
    steps = [n for n in (0, 1) if now == whole[n]]
    torn = [key for key in now if now[key] != whole[0].get(key)]
    assert steps, f"half a step, disturbed at {where}: changed were {torn} of {list(now)}"
    training.step()
    assert training.bits() == whole[steps[0] + 1], f"a wrong step after one that was disturbed at {where}"
    return steps[0]


class _Interrupt:
    """A trace function that raises KeyboardInterrupt before the n-th line of the step, as a signal handler may.

    In functions that write, or run while something is written, before the n-th bytecode. Lines of other libraries are
    left out: to the step it is the same where in a call the interrupt comes.
    """

    WRITERS = ("step", "_step", "_step_in_torch", "_step_with_leftovers", "commit", "_write_in_torch", "__hash__")
    # Whole paths: this checkout may lie in a folder of any name, and its environment with torch in this checkout.
    FILES = tuple(os.path.dirname(module.__file__) + os.sep for module in (regfused, torch.optim))
    FILES += (torch._tensor.__file__,)

    def __init__(self, n):
        self.left = n
        self.frame = None

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.FILES):
            return None
        frame.f_trace_opcodes = frame.f_code.co_name in self.WRITERS
        if event == ("opcode" if frame.f_trace_opcodes else "line"):
            if self.left == 0:
                self.frame, self.line = frame, frame.f_lineno
                sys.settrace(None)
                raise KeyboardInterrupt
            self.left -= 1
        return self

    def where(self):
        return f"{self.frame.f_code.co_filename}:{self.line}"

    def came_in(self, function):
        return self.frame.f_code is function.__code__


def _interrupted_step(training, n):
    """The interrupt, or None where the step ended before it came."""
    training.arm()
    interrupt = _Interrupt(n)
    gc.disable()  # what others finalize is not ours to interrupt
    sys.settrace(interrupt)
    try:
        training.optimizer.step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        gc.enable()
    return interrupt if interrupt.frame is not None else None


# What comes between kernels is the same for another compiled part.
@pytest.mark.parametrize("name", ("kernels", "group lasso", "Adam, first step") if OTHER_EXTENSION else NAMES)
def test_interrupt_before_any_line(name, whole):
    length = 10_000
    for n in range(length):
        training = Training(**TRAININGS[name])
        interrupt = _interrupted_step(training, n)
        if interrupt is None:
            length = n
            break
        # A bytecode before the outermost try, or after it, is out of its reach.
        if not interrupt.came_in(type(training.optimizer).step):
            assert not {"grad_scale", "found_inf"} & training.optimizer.__dict__.keys(), interrupt.where()
        assert torch.is_grad_enabled(), interrupt.where()
        training.disarm()
        assert_whole_or_nothing(training, whole, interrupt.where())
    assert 50 < length < 10_000


class _FailAt(TorchDispatchMode):
    """Fails the n-th operation of torch for want of memory. Writing into memory that is there takes none."""

    def __init__(self, n, training):
        super().__init__()
        self.left, self.failed = n, None
        self.params = {id(p) for p in training.params}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.only_writes(function, args):
            if self.left == 0:
                self.failed = str(function)
                self.left -= 1
                raise MemoryError(f"no memory for {function}")
            self.left -= 1
        return function(*args, **(kwargs or {}))

    def only_writes(self, function, args):
        if function.namespace == "profiler" or function.overloadpacket in (aten.copy_, aten._foreach_copy_):
            return True
        return function.overloadpacket is aten.add_ and id(args[0]) in self.params


@ALL
@pytest.mark.parametrize("seen", (False, True), ids=("unseen", "seen"))
def test_any_allocation_fails(name, whole, seen, monkeypatch):
    """The mode that fails them is hidden from a step, as memory that runs out has no mode; or it is seen."""
    if not seen:
        monkeypatch.setattr(extension.C, "is_watched", lambda: False)
    failed = []
    while True:
        training = Training(**TRAININGS[name])
        training.arm()
        mode = _FailAt(len(failed), training)
        try:
            with mode:
                training.optimizer.step()
        except MemoryError:
            assert mode.failed
        if mode.failed is None:
            break
        failed.append(mode.failed)
        assert not {"grad_scale", "found_inf"} & training.optimizer.__dict__.keys(), mode.failed
        assert assert_whole_or_nothing(training, whole, mode.failed) == 0
    # A warm step of the kernels makes the buffer of one parameter and the copy of one gradient.
    assert len(failed) >= 2 and any("empty" in name for name in failed)


class _Planted(Exception):
    pass


def _raise(*_):
    raise _Planted


@ALL
@pytest.mark.parametrize("place", ("pre hook", "global pre hook", "closure", "post hook", "global post hook"))
def test_hooks_and_closures_that_raise(name, whole, place):
    training = Training(**TRAININGS[name])
    handles = {
        "pre hook": training.optimizer.register_step_pre_hook,
        "global pre hook": register_optimizer_step_pre_hook,
        "post hook": training.optimizer.register_step_post_hook,
        "global post hook": register_optimizer_step_post_hook,
    }
    handle = None if place == "closure" else handles[place](_raise)
    training.arm()
    try:
        with pytest.raises(_Planted):
            training.optimizer.step(_raise if place == "closure" else None)
    finally:
        if handle:
            handle.remove()
    assert not {"grad_scale", "found_inf"} & training.optimizer.__dict__.keys()
    assert assert_whole_or_nothing(training, whole, place) == ("post" in place)


def _lr_of_the_last_group(training):
    training.optimizer.param_groups[-1]["lr"] = float("nan")


def _lr_tensor_of_the_last_group(training):
    training.optimizer.param_groups[-1]["lr"] = torch.tensor([0.1, 0.2])


def _buffer_of_the_last_parameter(training):
    slot = training.optimizer._rule.slots[0]
    training.optimizer.state[training.params[-1]][slot] = torch.zeros(7)


def _state_that_is_no_dict(training):
    training.optimizer.state[training.params[-1]] = [1]


def _gradient_of_another_shape(training):
    p = training.params[-1]
    p.grad.data = torch.ones((*p.shape, 2), dtype=p.dtype)


def _parameter_without_memory(training):
    training.params[2].data = torch.ones(1).expand(65)


def _nonfinite(training):
    for group in training.optimizer.param_groups:
        group["nonfinite"] = "error"
    grad = training.params[-1].grad
    grad[(0,) * grad.dim()] = float("nan")


MISTAKES = (
    _lr_of_the_last_group,
    _lr_tensor_of_the_last_group,
    _buffer_of_the_last_parameter,
    _state_that_is_no_dict,
    _gradient_of_another_shape,
    _parameter_without_memory,
    _nonfinite,
)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if TRAININGS[n].get("warm", True) and not TRAININGS[n].get("sparse")]
)
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__.strip("_"))
def test_mistakes_found_late(name, mistake):
    training = Training(**TRAININGS[name])
    mistake(training)
    before = {p: _bytes(p) for p in training.params}
    state = {p: dict(e) if isinstance(e, dict) else e for p, e in training.optimizer.state.items()}
    slots = {p: {k: _bytes(v) for k, v in e.items()} for p, e in state.items() if isinstance(e, dict)}
    grads = {p: _bytes(p.grad) for p in training.params}
    training.arm()
    with pytest.raises((ValueError, RuntimeError), match=r"(SGD|AdamW?)\.step: "):
        training.optimizer.step()
    assert not {"grad_scale", "found_inf"} & training.optimizer.__dict__.keys()
    assert before == {p: _bytes(p) for p in training.params} and grads == {p: _bytes(p.grad) for p in training.params}
    now = training.optimizer.state
    assert {p: dict(e) if isinstance(e, dict) else e for p, e in now.items()}.keys() == state.keys()
    assert slots == {p: {k: _bytes(v) for k, v in e.items()} for p, e in now.items() if isinstance(e, dict)}


def test_amp_gradient_that_cannot_be_written():
    # torch's contract has a step write the unscaled gradient; the elements of this one share memory.
    for make in (regfused.SGD, reference.SGD):
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 5))]
        params[0].grad = torch.ones(3)
        params[1].grad = torch.ones(5).expand(4, 5)
        optimizer = make(params, lr=0.1, momentum=0.9, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        with pytest.raises(RuntimeError, match=r"SGD\.step: .*gradient.* elements that share memory"):
            optimizer.step()
        assert all(torch.equal(p, torch.ones_like(p)) for p in params) and not optimizer.state


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no interval timers")
@pytest.mark.parametrize(
    "name", [n for n in ("first step", "kernels", "kernels and a complex parameter", "reference") if n in NAMES]
)
def test_interrupts_by_signal(name):
    looks, length = {}, 1.0
    training = Training(**TRAININGS[name])
    for step in range(400):
        looks[step] = training.bits()
        begin = time.perf_counter()
        training.step()
        length = min(time.perf_counter() - begin, length)
    choose = random.Random(1)
    done = interrupted = 0
    training = Training(**TRAININGS[name])

    def interrupt(*_):
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(350):
            try:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, 4 * length))
                training.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
                done += 1
            except KeyboardInterrupt:
                interrupted += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                now = training.bits()
                assert now in (looks[done], looks[done + 1]), f"half a step, after {done} whole ones"
                done += now == looks[done + 1]
                training.disarm()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert training.bits() == looks[done]
    assert interrupted > 10
