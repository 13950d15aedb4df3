"""Steps that a mode, a tracer or a functional transform watches: what is written is seen there."""

import math

import pytest
import torch
from step_cases import (
    ADAM_OPTIONS,
    OPTIONS,
    Oracle,
    SgdMove,
    copy_params,
    give_grads,
    make_params,
    move_of,
    share_grads,
    with_defaults,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from watchers import Called

import regfused
from regfused import extension, reference

pytestmark = [pytest.mark.cpu, pytest.mark.reference]

SIZES = (3, 33, (5, 7))

# A norm that is not finite is refused, or the step is left out: in a graph by operations.
CASES = {**OPTIONS, "skip": {"momentum": 0.9, "nonfinite": "skip"}, "tensor lr": {"lr": torch.tensor(0.1)}}
ADAM_CASES = {**ADAM_OPTIONS, "skip": {"nonfinite": "skip"}, "tensor lr": {"lr": torch.tensor(0.1)}}
BY_RULE = [
    *((make, name, CASES[name]) for make in (regfused.SGD, reference.SGD) for name in CASES),
    *((make, name, ADAM_CASES[name]) for make in (regfused.Adam, reference.Adam) for name in ADAM_CASES),
]
ALL_CASES = pytest.mark.parametrize(
    "make, options",
    [(make, options) for make, _, options in BY_RULE],
    ids=[f"{make.__module__}-{make.__name__}-{name}" for make, name, _ in BY_RULE],
)


class Written(TorchDispatchMode):
    """Notes which memory the operators that it sees say that they write."""

    def __init__(self):
        super().__init__()
        self.written = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema = function._schema.arguments
        for argument, value in zip(schema, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written |= {t.data_ptr() for t in (value if isinstance(value, list | tuple) else [value])}
        return function(*args, **(kwargs or {}))


def stepped_by_oracle(params, options, rule=SgdMove):
    """New values, from the very gradients and no state."""
    options = {name: float(v) if isinstance(v, torch.Tensor) else v for name, v in with_defaults(options).items()}
    wide = [p.detach().double() for p in params]
    return Oracle(options, rule=rule).step(wide, [p.grad.double() for p in params], [{}] * len(params))[0]


def assert_close(params, want):
    for p, w in zip(params, want, strict=True):
        # Values of a size of 4 in float32.
        torch.testing.assert_close(p.detach().double(), w, rtol=0, atol=4e-6)


@ALL_CASES
@pytest.mark.parametrize("tracing_mode", ("real", "symbolic"))
def test_a_traced_step_is_in_the_graph(make, options, tracing_mode):
    """The graph, run on other values, steps them. A first step: buffers are made in it."""
    params = make_params(SIZES)
    twins = copy_params(params)
    optimizer = make(params, **with_defaults(options))

    def step(*grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        return [p.clone() for p in params]

    grads = [torch.randn_like(p) for p in params]
    graph = make_fx(step, tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(*grads)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            p.copy_(q)
    give_grads(twins)
    with torch.no_grad():
        graph(*[q.grad for q in twins])
    assert_close(params, stepped_by_oracle(twins, options, move_of(make)))


@pytest.mark.parametrize("fused", (None, True, False))
def test_momentum_goes_on_in_the_graph(fused):
    params = make_params(SIZES)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=1.0, fused=fused)
    give_grads(params)
    optimizer.step()
    twins = copy_params(params)
    loop = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    for p, q in zip(params, twins, strict=True):
        loop.state[q]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].clone()
    saved = [optimizer.state[p]["momentum_buffer"].clone() for p in params]

    def step(*grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    graph = make_fx(step)(*[torch.randn_like(p) for p in params])
    with torch.no_grad():
        for p, q, buffer in zip(params, twins, saved, strict=True):
            p.copy_(q)
            optimizer.state[p]["momentum_buffer"].copy_(buffer)
    for _ in range(3):
        give_grads(twins)
        with torch.no_grad():
            graph(*[q.grad.clone() for q in twins])
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        loop.step()
        assert_close(params, [q.detach().double() for q in twins])
    # The plan takes over where the graph has left it.
    give_grads(params)
    share_grads(params, twins)
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    loop.step()
    optimizer.step()
    assert_close(params, [q.detach().double() for q in twins])


@pytest.mark.parametrize("policy", ("skip", "error"))
def test_policies_are_operations_of_the_graph(policy):
    params = make_params([3, 33])
    optimizer = regfused.SGD(params, lr=0.1, nonfinite=policy)

    def step(*grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()

    graph = make_fx(step)(*[torch.ones_like(p) for p in params])
    before = copy_params(params)
    bad = [torch.ones(3), torch.full((33,), math.nan)]
    with torch.no_grad():
        if policy == "skip":
            graph(*bad)
        else:
            with pytest.raises(RuntimeError, match="nonfinite='error' demands a finite gradient norm"):
                graph(*bad)
    for p, q in zip(params, before, strict=True):
        assert torch.equal(p, q)
    with torch.no_grad():
        graph(*[torch.ones_like(p) for p in params])
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1, rtol=0, atol=1e-6)


def test_a_first_step_that_is_skipped_while_it_is_traced():
    """Nobody can know there that it is. The momentum buffer that it makes is zero, and the next step is right."""
    params = make_params([3, 33])
    twins = copy_params(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, nonfinite="skip")
    loop = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    make_fx(lambda x: (optimizer.step(), x)[1])(torch.ones(1))
    assert_close(params, [q.detach().double() for q in twins])
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    loop.step()
    assert_close(params, [q.detach().double() for q in twins])


@pytest.mark.parametrize("finite", (True, False))
def test_scaled_gradients_in_a_graph(finite):
    """found_inf and grad_scale are inputs of the graph."""
    params = make_params([3, 33])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, fused=True)

    def step(scale, found_inf, *grads):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf
        optimizer.step()

    ones = [torch.ones_like(p) for p in params]
    graph = make_fx(step)(torch.tensor(2.0), torch.tensor(0.0), *[g.clone() for g in ones])
    before = copy_params(params)
    for p in params:
        optimizer.state[p]["momentum_buffer"].zero_()
    with torch.no_grad():
        graph(torch.tensor(4.0), torch.tensor(0.0 if finite else 1.0), *ones)
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - (0.1 / 4 if finite else 0), rtol=0, atol=1e-6)
    assert all(torch.equal(g, torch.full_like(g, 0.25 if finite else 1.0)) for g in ones)


def test_parameters_that_share_memory_in_a_graph():
    memory = torch.randn(10)
    a, b = torch.nn.Parameter(memory[:7]), torch.nn.Parameter(memory[3:])
    optimizer = regfused.SGD([a, b, a], lr=0.1)

    def step(x, y):
        a.grad, b.grad = x, y
        optimizer.step()

    graph = make_fx(step)(torch.ones(7), torch.ones(7))
    memory.zero_()
    with torch.no_grad():
        graph(torch.ones(7), torch.ones(7))
    want = torch.zeros(10)
    want[:7] -= 0.2
    want[3:] -= 0.1
    torch.testing.assert_close(memory, want)


@ALL_CASES
def test_fake_tensors(make, options):
    for fused in (None, True, False) if make in (regfused.SGD, regfused.Adam) else (None,):
        with torch._subclasses.FakeTensorMode():
            params = [torch.nn.Parameter(torch.empty(size)) for size in SIZES]
            options = {k: torch.tensor(0.1) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            optimizer = make(params, **with_defaults(options), fused=fused)
            for _ in range(2):
                for p in params:
                    p.grad = torch.empty_like(p)
                optimizer.step()
            assert [number.shape for number in optimizer.stats] == [()] * 5
            for p in params:
                for slot in optimizer._rule.slots_of(optimizer.param_groups[0]):
                    assert optimizer.state[p][slot].shape == p.shape


def test_real_parameters_under_fake_mode_keep_their_values():
    """As when the memory of a training step is estimated before it runs."""
    with torch._subclasses.FakeTensorMode() as mode:
        model = torch.nn.Linear(4, 3)
        optimizer = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=1.0)
        model(torch.randn(5, 4)).sum().backward()
        optimizer.step()
        assert all(mode is p.fake_mode for p in model.parameters())


@pytest.mark.parametrize("mode", (Written, Called))
@pytest.mark.parametrize("name", ("momentum", "elastic net in the clip", "proximal l1", "sparse group lasso"))
def test_a_step_under_a_mode_is_the_step(name, mode):
    params = make_params(SIZES)
    give_grads(params)
    options = {k: v for k, v in OPTIONS[name].items() if k != "group_dim"}
    want = stepped_by_oracle(params, options)
    optimizer = regfused.SGD(params, **with_defaults(options))
    versions = [p._version for p in params]
    with mode() as watching:
        optimizer.step()
    assert_close(params, want)
    assert all(p._version > version for p, version in zip(params, versions, strict=True))
    if mode is Written:
        assert {p.data_ptr() for p in params} <= watching.written
    else:
        assert "_foreach_copy_" in watching.seen


def test_steps_with_and_without_a_mode_take_turns():
    params = make_params(SIZES)
    twins = copy_params(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, nonfinite="skip", l1=0.01)
    loop = regfused.reference.SGD(twins, lr=0.1, momentum=0.9, nonfinite="skip", l1=0.01)
    skipped = 0
    for step in range(9):
        give_grads(params)
        if step % 3 == 2:
            params[0].grad[0] = math.inf
            skipped += 1
        share_grads(params, twins)
        if step % 2:
            with Written():
                optimizer.step()
        else:
            optimizer.step()
        loop.step()
        assert optimizer.stats.skipped == loop.stats.skipped == skipped
        for name in ("grad_norm", "clip_coef", "penalty", "zero_fraction"):
            got, want = getattr(optimizer.stats, name), getattr(loop.stats, name)
            assert got.item() == pytest.approx(want.item(), rel=1e-6, nan_ok=True), (step, name)
        assert_close(params, [q.detach().double() for q in twins])


def test_the_default_device_is_no_watcher():
    """torch.set_default_device is a mode: it must not take the kernels away."""
    params = make_params([33])
    give_grads(params)
    optimizer = regfused.SGD(params, lr=0.1)
    with params[0].device:
        assert not extension.C.is_watched()
        optimizer.step()
    assert optimizer._plan.tensors == 1


def test_under_functional_transforms():
    """A step inside of torch.func.grad, of parameters that are not its inputs."""
    params = make_params([3])
    params[0].grad = torch.ones(3)
    optimizer = regfused.SGD(params, lr=0.1, max_norm=1.0)
    before = params[0].detach().clone()

    def loss(x):
        optimizer.step()
        return x.square().sum()

    assert torch.equal(torch.func.grad(loss)(torch.ones(2)), torch.full((2,), 2.0))
    torch.testing.assert_close(params[0].detach(), before - 0.1 / math.sqrt(3))
