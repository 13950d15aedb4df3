"""regfused.penalty beside the lines of a training loop, and beside float64."""

import math

import pytest
import torch
from step_cases import DEVICE, DTYPES, EMULATED, SIZES
from torch import nn

import regfused
from regfused import extension, reference

BOTH = pytest.mark.parametrize("penalty", (regfused.penalty, reference.penalty), ids=("kernels", "reference"))
STRENGTHS = {"l1": (0.3, 0.0), "l2": (0.0, 0.7), "elastic net": (0.3, 0.7), "nothing": (0.0, 0.0)}
needs_kernels = pytest.mark.skipif(extension.C is None, reason="there is no compiled part")


def make(sizes, dtype=torch.float32):
    tensors = []
    for size in sizes:
        p = torch.randn(size, dtype=torch.float64)
        p.view(-1)[5::11] = 0.0
        p.view(-1)[7::13] = -0.0
        tensors.append(p.to(dtype).requires_grad_())
    return tensors


def loop(params, l1, l2):
    """As people write it; in float64, so that it is an oracle."""
    wide = [p.double() for p in params]
    return l1 * sum(p.abs().sum() for p in wide) + l2 * sum(p.pow(2).sum() for p in wide)


def check(penalty, params, l1, l2, gain=1.0):
    """Value and gradients against the loop's."""
    twins = [p.detach().clone().requires_grad_(p.requires_grad) for p in params]
    value = penalty(params, l1=l1, l2=l2)
    want = loop(twins, l1, l2)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if any(p.dtype == torch.float64 for p in params) else torch.float32)
    # Terms are formed in float32, each a few roundings; sums are exact beside that, and so is their sign.
    torch.testing.assert_close(value.double(), want.detach(), rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    (gain * value).backward()
    (gain * want).backward()
    for p, q in zip(params, twins, strict=True):
        if not p.requires_grad:
            assert p.grad is None
            continue
        assert p.grad.dtype == p.dtype and p.grad.stride() == torch.empty_like(p).stride()
        # Three roundings of the arithmetic, one of the storage.
        arithmetic = torch.finfo(torch.float64 if p.dtype == torch.float64 else torch.float32).eps
        bound = 4 * arithmetic + (torch.finfo(p.dtype).eps if p.dtype.itemsize == 2 else 0)
        torch.testing.assert_close(p.grad.double(), q.grad.double(), rtol=bound, atol=bound * abs(gain))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("l1, l2", STRENGTHS.values(), ids=STRENGTHS)
def test_value_and_gradient(penalty, l1, l2, dtype):
    check(penalty, make(SIZES, dtype), l1, l2, gain=-1.5)


@needs_kernels
def test_every_instruction_set(isa):
    for dtype in DTYPES:
        check(regfused.penalty, make(SIZES, dtype), 0.3, 0.7)


@BOTH
def test_the_same_as_a_formula_for_each_element(penalty):
    p = torch.tensor([1.0, -2.0, 0.0, -0.0, 3.0], requires_grad=True)
    value = penalty(p, l1=0.5, l2=0.25)
    value.backward()
    assert value.item() == 0.5 * 6 + 0.25 * 14
    assert p.grad.tolist() == [1.0, -1.5, 0.0, 0.0, 2.0]


@BOTH
def test_mixed_dtypes_frozen_tensors_and_generators(penalty):
    params = [t for dtype in DTYPES for t in make((3, 100), dtype)]
    params[2].requires_grad_(False)
    check(lambda tensors, **strengths: penalty((t for t in tensors), **strengths), params, 0.3, 0.7)
    module = nn.Linear(3, 2)
    assert penalty(module.parameters(), l1=1.0).item() == pytest.approx(
        sum(p.abs().sum().item() for p in module.parameters())
    )
    frozen = [p.detach() for p in params]
    assert not penalty(frozen, l1=0.1).requires_grad


def layouts():
    yield "transposed", lambda: torch.randn(33, 65).t()
    yield "channels_last", lambda: torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    yield "sliced", lambda: torch.randn(40, 66)[3:, ::2]
    yield "expanded", lambda: torch.randn(5, 1).expand(5, 9)
    yield "offset", lambda: torch.randn(101)[1:]
    yield "0-dim", lambda: torch.randn(())
    yield "empty", lambda: torch.randn(0, 3)


@BOTH
@pytest.mark.parametrize("make_one", [pytest.param(f, id=name) for name, f in layouts()])
def test_any_layout(penalty, make_one):
    leaf = make_one().requires_grad_()
    twin = leaf.detach().clone().requires_grad_()
    value = penalty([leaf, torch.ones(3)], l1=0.3, l2=0.7)
    want = loop([twin, torch.ones(3)], 0.3, 0.7)
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-6, atol=0)
    value.backward()
    want.backward()
    torch.testing.assert_close(leaf.grad, twin.grad, rtol=1e-6, atol=1e-6)


@BOTH
def test_no_tensors(penalty):
    assert penalty([], l1=1.0).item() == 0
    assert penalty([torch.zeros(0)], l1=1.0, l2=1.0).item() == 0


@BOTH
def test_gradients_add_up_and_flow_through_what_made_a_tensor(penalty):
    p = torch.tensor([1.0, -2.0], requires_grad=True)
    (penalty([3 * p], l1=0.5) + p.square().sum()).backward()
    assert p.grad.tolist() == [1.5 + 2, -1.5 - 4]
    (grad,) = torch.autograd.grad(penalty([p], l2=0.5), [p])
    assert grad.tolist() == [1.0, -2.0]
    value = penalty([p, p], l1=0.5)  # one tensor twice counts twice, as in the loop
    value.backward()
    assert value.item() == 3.0 and p.grad.tolist() == [4.5, -6.5]


@BOTH
def test_gradients_of_gradients(penalty):
    p = torch.randn(7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: penalty([x], l1=0.3, l2=0.7), [p])
    assert torch.autograd.gradgradcheck(lambda x: penalty([x], l1=0.3, l2=0.7), [p])
    (grad,) = torch.autograd.grad(penalty([p], l1=0.3, l2=0.7), [p], create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), [p])
    assert torch.equal(second, torch.full_like(p, 1.4))


@BOTH
def test_a_tensor_that_changed_before_backward_is_noticed(penalty):
    p = torch.randn(5, requires_grad=True)
    value = penalty([p], l2=1.0)
    with torch.no_grad():
        p.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@BOTH
def test_sums_do_not_overflow_nor_lose_small_terms(penalty):
    half = torch.full((70000,), 2.0, dtype=torch.float16)
    assert penalty([half], l1=1.0).item() == 140000  # more than float16 holds
    small = torch.full((2**20,), 1e-4)
    small[0] = 1e4
    want = float((small.double().abs()).sum())
    assert penalty([small], l1=1.0).item() == pytest.approx(want, rel=1e-7)
    large = torch.full((100,), 1e20)  # whose squares are more than float32 holds
    assert math.isinf(penalty([large], l2=1.0).item())
    assert penalty([large.double()], l2=1.0).item() == pytest.approx(100 * large[0].double().item() ** 2, rel=1e-12)


@BOTH
def test_what_is_not_finite_shows(penalty):
    assert math.isnan(penalty([torch.tensor([1.0, math.nan])], l1=1.0).item())
    assert math.isinf(penalty([torch.tensor([1.0, -math.inf])], l1=1.0).item())
    p = torch.tensor([1.0, -math.inf], requires_grad=True)
    penalty([p], l1=0.5).backward()
    assert p.grad.tolist() == [0.5, -0.5]


@needs_kernels
@pytest.mark.cpu
def test_the_same_bits_for_any_number_of_threads(threads, monkeypatch):
    params = [torch.randn(n) for n in (100_000, 7, 300_001)]
    seen = set()
    for isa in extension.C.build_info()["isas"]:
        monkeypatch.setenv("REGFUSED_ISA", isa)
        for n in (1, 2, 3, 8):
            threads(n)
            seen.add(regfused.penalty([p.double() for p in params], l1=0.3, l2=0.7).item())
    assert len(seen) == 1


def test_what_the_kernels_do_not_take_is_the_references():
    a = torch.randn(5, requires_grad=True)
    z = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    value = regfused.penalty([a, z], l1=0.5, l2=0.25)
    want = sum(0.5 * t.abs().sum() + 0.25 * t.abs().square().sum() for t in (a, z))
    torch.testing.assert_close(value, want)
    value.backward()
    assert a.grad is not None and z.grad is not None
    sub = nn.Parameter(torch.randn(3)).as_subclass(type("Sub", (torch.Tensor,), {}))
    torch.testing.assert_close(
        regfused.penalty([sub], l1=1.0).as_subclass(torch.Tensor), sub.abs().sum().as_subclass(torch.Tensor)
    )


@needs_kernels
def test_operator():
    params = make((3, 17))
    samples = [
        (params, 0.3, 0.7),
        ([p.detach() for p in params], 0.3, 0.0),
        ([params[0].detach(), params[1]], 0.0, 0.1),
    ]
    for sample in samples:
        torch.library.opcheck(torch.ops.regfused.penalty.default, sample)
    with pytest.raises(ValueError, match=r"params\[0\] has dtype Int"):
        torch.ops.regfused.penalty([torch.zeros(3, dtype=torch.int32)], 1.0, 0.0)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ("eager", "aot_eager"))
def test_compiled_as_one_graph(backend):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(16, 4)

    def loss(penalty):
        return model(x).square().mean() + penalty(model.parameters(), l1=1e-2, l2=1e-2)

    def grads(value):
        model.zero_grad()
        value.backward()
        return [p.grad.clone() for p in model.parameters()]

    want = loss(reference.penalty)
    want_grads = grads(want)
    got = torch.compile(lambda: loss(regfused.penalty), fullgraph=True, backend=backend)()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grads(got), want_grads)


def test_functional_transforms_go_through_the_reference():
    p = torch.randn(4, 3)
    strengths = {"l1": 0.3, "l2": 0.7}
    for _ in range(2):
        grads = torch.func.grad(lambda named: regfused.penalty(named.values(), **strengths))({"weight": p})
        torch.testing.assert_close(grads["weight"], 0.3 * p.sign() + 1.4 * p)
        values = torch.vmap(lambda row: regfused.penalty([row], **strengths))(p)
        torch.testing.assert_close(values, 0.3 * p.abs().sum(1) + 0.7 * p.square().sum(1))
        _, along = torch.func.jvp(lambda t: regfused.penalty([t], **strengths), (p,), (torch.ones_like(p),))
        torch.testing.assert_close(along, grads["weight"].sum())
        torch._dynamo.reset()
        torch.compile(lambda: regfused.penalty([p], **strengths), backend="eager")()  # leaves nothing behind


def test_under_autocast():
    p = torch.randn(100, requires_grad=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = regfused.penalty([p], l1=0.3, l2=0.7)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), loop([p], 0.3, 0.7), rtol=1e-6, atol=0)


@BOTH
@pytest.mark.parametrize("strengths, message", [
    ({"l1": -0.1}, "penalty: l1 must be finite and >= 0, but got -0.1"),
    ({"l2": math.nan}, "penalty: l2 must be finite and >= 0, but got nan"),
    ({"l1": math.inf}, "penalty: l1 must be finite and >= 0, but got inf"),
    ({"l1": "a lot"}, "penalty: l1 must be a number, but got 'a lot'"),
])  # fmt: skip
def test_bad_strengths(penalty, strengths, message):
    with pytest.raises(ValueError, match=message):
        penalty([torch.ones(2)], **strengths)


@BOTH
def test_bad_tensors(penalty):
    with pytest.raises(
        ValueError, match=r"must be floating point or complex, but item \d of shape \(2,\) is torch.int64"
    ):
        penalty([torch.ones(2, dtype=torch.int64)], l1=1.0)
    with pytest.raises(TypeError, match="item 1 is a (float|builtins.float)"):
        penalty([torch.ones(2), 1.0], l1=1.0)


@needs_kernels
def test_one_operator_whatever_the_number_of_tensors():
    params = [torch.randn(5, requires_grad=True) for _ in range(50)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        regfused.penalty(params, l1=0.1).backward()
    names = [event.name for event in profile.events()]
    assert names.count("regfused::penalty") == 1 and names.count("regfused::penalty_backward") == 1
    assert EMULATED or "aten::abs" not in names
