"""constrain_max_norm_: slices are drawn back into a ball; the kernels, the operator and the reference."""

import math

import pytest
import torch
from step_cases import (
    DEVICE,
    DTYPES,
    ON_CUDA_KERNELS,
    SLICED_SHAPES,
    dims_of,
    laid_out,
    memory_orders,
    scale_slices,
)
from torch.nn.utils import parametrizations, parametrize, prune
from watchers import TRACERS, Called, Dispatched

import regfused
from regfused import extension, reference

BOTH = pytest.mark.parametrize(
    "constrain", (regfused.constrain_max_norm_, reference.constrain_max_norm_), ids=("kernels", "reference")
)
INF, NAN = math.inf, math.nan


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def oracle(tensor, max_norm, dim):
    """Slice by slice in float64."""
    return scale_slices(tensor.double(), dim, lambda norm: max_norm / norm if norm > max_norm else 1)


def middling_norm(tensor, dim):
    """So that of slices of standard normal elements about half are outside of the ball."""
    count = 1 if dim is None or tensor.dim() == 0 else max(tensor.shape[dim], 1)
    return 0.8 * math.sqrt(max(tensor.numel(), 1) / count)


def assert_constrained(got, before, max_norm, dim, want=None):
    """Two roundings in the type of arithmetic, one to the type of storage. CUDA kernels add up squares in the type of
    arithmetic, 128 in a row at most; float64 sums are added up in other orders by the oracle."""
    want = oracle(before, max_norm, dim) if want is None else want
    double = got.dtype == torch.float64
    relative = torch.finfo(torch.float64 if double else torch.float32).eps * (64 if ON_CUDA_KERNELS or double else 2)
    storage = torch.finfo(got.dtype).eps
    if got.dtype in (torch.float16, torch.bfloat16):
        relative += storage
    wrong = (got.double() - want).abs() > relative * want.abs() + torch.finfo(got.dtype).smallest_normal * storage
    assert not wrong.any(), (tuple(got.shape), got.stride(), dim, int(wrong.sum()), wrong.nonzero()[0].tolist())


def check_every_dim_and_order(constrain, shape, dtype):
    original = torch.randn(shape, dtype=torch.float64).to(dtype)
    for dim in (None, *dims_of(original)):
        max_norm = middling_norm(original, dim)
        want = oracle(original, max_norm, dim)
        for order in memory_orders(original.dim()):
            tensor = laid_out(original, order)
            stride = tensor.stride()
            assert constrain(tensor, max_norm, dim) is None
            assert tensor.stride() == stride
            assert_constrained(tensor, original, max_norm, dim, want)
            yield tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SLICED_SHAPES, ids=str)
def test_kernels_against_float64(shape, dtype, isa, threads):
    threads(1)  # for the oracle, which is slow: below, any number of threads gives the same bits
    for tensor in check_every_dim_and_order(regfused.constrain_max_norm_, shape, dtype):
        assert extension.C.takes([tensor]) == [True]  # the kernels did it


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SLICED_SHAPES, ids=str)
def test_reference_against_float64(shape, dtype, threads):
    threads(1)
    assert list(check_every_dim_and_order(reference.constrain_max_norm_, shape, dtype))


@BOTH
def test_many_tensors_of_all_dtypes_at_once(constrain):
    params, befores = [], []
    for i in range(70):
        for dtype in DTYPES:
            params.append(torch.randn(3 + i, 1 + 5 * (i % 9)).to(dtype))
            befores.append(params[-1].clone())
    constrain((p for p in params), 2.0, dim=1)
    for p, before in zip(params, befores, strict=True):
        assert_constrained(p, before, 2.0, 1)


@BOTH
def test_bits_inside_of_the_ball_stay(constrain, isa):
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-20, 0.5, -0.5])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = values.to(dtype).repeat(40, 5)
        rows[::7] *= 100
        for dim in (0, 1, None):
            p = rows.clone()
            before = bits(p)
            constrain(p, INF, dim)
            assert torch.equal(bits(p), before)
            constrain(p, p.double().norm().item() * 1.001, dim)
            assert torch.equal(bits(p), before)
        p = rows.clone()
        constrain(p, 10.0, 0)
        for i, row in enumerate(p):
            assert torch.equal(bits(row), bits(rows[i])) == (i % 7 != 0)


@BOTH
@pytest.mark.parametrize("dim", (None, 0, 1))
def test_radius_zero_and_zero_norm(constrain, dim, isa):
    for shape in ((5, 3), (3, 40), (40, 33)):
        p = torch.zeros(shape)
        constrain(p, 1.0, dim)
        constrain(p, 0.0, dim)
        assert (p == 0).all()
        p = torch.randn(shape)
        p[0] = 1e-30  # whose squares float32 has not
        constrain(p, 0.0, dim)
        assert (p == 0).all()


@BOTH
def test_huge_and_tiny_elements(constrain, isa):
    for scale in (1e25, 1e-25):
        for shape, dim in (((4, 100), 0), ((100, 4), 1), ((4, 5), 0)):
            p = torch.randn(shape) * scale
            before = p.clone()
            constrain(p, 2 * scale, dim)
            assert_constrained(p, before, 2 * scale, dim)


@BOTH
@pytest.mark.parametrize("shape", [(4, 9), (4, 70)], ids=str)
def test_slices_with_nan_and_infinity(constrain, shape, isa):
    p = torch.full(shape, 2.0)
    p[0, 3], p[1, 2] = NAN, INF
    before = p.clone()
    constrain(p, 1.0, 0)
    assert torch.equal(bits(p[0]), bits(before[0]))  # as torch.renorm
    assert p[1, 2].isnan() and (p[1].nan_to_num() == 0).all()
    torch.testing.assert_close(p[2:].norm(dim=1), torch.ones(2))
    p = before.clone()
    constrain(p, 1.0, 1)
    assert torch.equal(bits(p[:, 3]), bits(before[:, 3]))
    assert p[1, 2].isnan() and (p[:, 2].nan_to_num() == 0).all()


@pytest.mark.parametrize("dim", (0, 1, 2))
def test_against_torch_renorm(dim):
    p = torch.randn(20, 30, 9)
    want = torch.renorm(p, 2, dim, 10.0)
    regfused.constrain_max_norm_(p, 10.0, dim)
    # torch divides by the norm plus 1e-7: 1e-8 here; the rest are roundings.
    torch.testing.assert_close(p, want, rtol=1e-6, atol=0)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_instruction_set(dtype, threads, monkeypatch):
    shapes = ((350, 300), (3, 50_000), (20_000, 7), (50, 9, 130), (3, 2000, 17))
    originals = [torch.randn(shape).to(dtype) for shape in shapes]
    cases = [(p, d) for p in originals for d in (None, *range(p.dim()))]
    baseline = None
    for isa in regfused.build_info()["isas"].split(", "):
        for count in (1, 2, 5):
            monkeypatch.setenv("REGFUSED_ISA", isa)
            threads(count)
            results = []
            for p, dim in cases:
                q = p.clone()
                regfused.constrain_max_norm_(q, middling_norm(q, dim), dim)
                results.append(bits(q))
            baseline = baseline or results
            for (p, dim), got, want in zip(cases, results, baseline, strict=True):
                assert torch.equal(got, want), (isa, count, tuple(p.shape), dim)


@BOTH
def test_parameters_versions_and_autograd(constrain):
    layer = torch.nn.Linear(30, 20)
    versions = [p._version for p in layer.parameters()]
    with torch.no_grad():
        layer.weight *= 100
    constrain(layer.parameters(), 3.0, dim=0)
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.full((20,), 3.0))
    assert all(p._version > v for p, v in zip(layer.parameters(), versions, strict=True))
    assert layer.weight.requires_grad and layer.weight.is_leaf
    kept = layer.weight.square().sum()
    constrain(layer.weight, 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@BOTH
def test_listed_twice_and_shared_memory(constrain):
    p = torch.randn(10, 20)
    before = p.clone()
    constrain([p, p], 1.0, 0)
    assert_constrained(p, before, 1.0, 0)
    constrain([p, p.t()], 0.5)
    assert p.norm().item() == pytest.approx(0.5, rel=1e-6)
    constrain([], 1.0)


@BOTH
def test_tensors_that_the_kernels_do_not_take(constrain):
    whole = torch.randn(8, 12)
    before = whole.clone()
    view = whole[:, ::2]
    z = torch.randn(5, 6, dtype=torch.complex64)
    z_before = z.clone()
    plain = torch.randn(9, 6)
    plain_before = plain.clone()
    constrain([view, z, plain], 1.0, dim=0)
    assert torch.equal(whole[:, 1::2], before[:, 1::2])
    assert_constrained(view, before[:, ::2], 1.0, 0)
    assert_constrained(plain, plain_before, 1.0, 0)
    norms = torch.linalg.vector_norm(z_before, dim=1, keepdim=True)
    torch.testing.assert_close(z, torch.where(norms > 1, z_before / norms, z_before))


def test_without_the_compiled_part(monkeypatch):
    monkeypatch.setattr(extension, "C", None)
    p = torch.randn(10, 20)
    before = p.clone()
    regfused.constrain_max_norm_(p, 1.0, 0)
    assert_constrained(p, before, 1.0, 0)


ERRORS = [
    (dict(max_norm=-1.0), "max_norm must be >= 0, but got -1.0"),
    (dict(max_norm=NAN), "max_norm must be >= 0, but got nan"),
    (dict(max_norm="1"), r"max_norm must be a number, but got '1' \(str\)"),
    (dict(max_norm=1.0, dim=2), r"dim must be in \[-2, 1\] for params\[0\], which has shape \(3, 4\), but got 2"),
    (dict(max_norm=1.0, dim=-3), r"dim must be in \[-2, 1\] for params\[0\].*but got -3"),
    (dict(max_norm=1.0, dim=1), r"dim must be in \[-1, 0\] for params\[1\], which has shape \(5,\), but got 1"),
    (dict(max_norm=1.0, dim=0.0), r"dim must be None or an int, but got 0.0 \(float\)"),
    (dict(max_norm=1.0, dim=True), r"dim must be None or an int, but got True \(bool\)"),
]


@BOTH
@pytest.mark.parametrize("arguments, message", ERRORS, ids=str)
def test_errors_change_nothing(constrain, arguments, message):
    params = [torch.randn(3, 4) * 10, torch.randn(5) * 10]
    befores = [p.clone() for p in params]
    with pytest.raises(ValueError, match=f"constrain_max_norm_: {message}"):
        constrain(params, **arguments)
    assert all(torch.equal(p, q) and p._version == 0 for p, q in zip(params, befores, strict=True))


@BOTH
def test_tensors_that_cannot_be_constrained(constrain):
    p = torch.randn(3, 4) * 10
    before = p.clone()
    for other, message in (
        (torch.ones(3, dtype=torch.int64), r"floating point or complex, but params\[1\] is torch.int64"),
        (torch.ones(3, dtype=torch.bool), r"floating point or complex, but params\[1\] is torch.bool"),
        (torch.ones(3, device="meta"), r"have memory, but params\[1\] has layout torch.strided on meta"),
        (torch.ones(3, device="cpu").to_sparse(), r"must be dense .* params\[1\] has layout torch.sparse_coo"),
        (torch.nested.nested_tensor([torch.ones(2)]), r"must be dense .* params\[1\] is a nested tensor"),
        (3.0, r"must be tensors, but params\[1\] is a float"),
    ):
        with pytest.raises(ValueError, match=message):
            constrain([p, other], 1.0)
    assert torch.equal(p, before)


# --- Computed weights -----------------------------------------------------------------------------


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def pruned():
    layer = torch.nn.Linear(4, 3)
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = {
    "pruned": (pruned, r"MulBackward0.*Pass what it is computed from, a parameter of shape \(3, 4\): .*weight_orig"),
    "parametrized": (
        lambda: parametrize.register_parametrization(torch.nn.Linear(4, 3), "weight", Doubled()),
        r"a parameter of shape \(3, 4\): .*parametrizations.weight.original",
    ),
    "weight norm": (
        lambda: parametrizations.weight_norm(torch.nn.Linear(4, 3)),
        r"a parameter of shape \(3, 1\) or a parameter of shape \(3, 4\)",
    ),
    "old weight norm": (lambda: torch.nn.utils.weight_norm(torch.nn.Linear(4, 3)), "weight_g"),
    "old spectral norm": (lambda: torch.nn.utils.spectral_norm(torch.nn.Linear(4, 3)), "weight_orig"),
}


@BOTH
@pytest.mark.parametrize("case", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_computed_weight_is_refused(constrain, case):
    make_layer, message = COMPUTED[case]
    layer, plain = make_layer(), torch.randn(5) * 10
    befores = [p.detach().clone() for p in (*layer.parameters(), plain)]
    layer(torch.ones(4))
    weight = layer.weight
    for computed, shape in ((weight, r"\(3, 4\)"), (weight[:2], r"\(2, 4\)"), (weight.t(), r"\(4, 3\)")):
        with pytest.raises(ValueError, match=rf"params\[1\] of shape {shape} is computed .*{message}"):
            constrain([plain, computed], 0.1)
    assert all(torch.equal(p, q) for p, q in zip((*layer.parameters(), plain), befores, strict=True))
    constrain([*layer.parameters(), plain], 0.1)
    constrain(layer.weight.detach(), 0.1)


@BOTH
def test_views_of_parameters(constrain):
    views = {
        "rows": lambda w: w[:10],
        "rows of rows": lambda w: w[:10][2:],
        "transposed": lambda w: w.t(),
        "flat": lambda w: w.view(-1),
        "detached": lambda w: w.detach(),
        "data": lambda w: w.data,
    }
    for name, view in views.items():
        layer = torch.nn.Linear(30, 20)
        before = layer.weight.detach().clone()
        constrain(view(layer.weight), 0.1)
        assert_constrained(view(layer.weight.detach()), view(before), 0.1, None)
        with torch.no_grad():
            constrain(view(layer.weight), 0.05)
        assert view(layer.weight).norm().item() == pytest.approx(0.05, rel=1e-6), name
    kept = torch.nn.Linear(30, 20).weight * 2
    kept.retain_grad()  # as torch's optimizers take it
    constrain(kept, 0.1)
    assert kept.norm().item() == pytest.approx(0.1, rel=1e-6)


# --- Where somebody watches -----------------------------------------------------------------------


def constrained(dim):
    def of_tensors(*tensors):
        copies = [tensor.clone() for tensor in tensors]
        regfused.constrain_max_norm_(copies, 0.5, dim)
        return copies

    return of_tensors


@pytest.mark.parametrize("dim", (None, 0))
@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_graph_holds_it(tracer, dim):
    first, second = ([scale * torch.randn(5), scale * torch.randn(3, 4)] for scale in (1.0, 0.02))
    graph = TRACERS[tracer](constrained(dim), *first)
    if isinstance(graph, torch.fx.GraphModule):
        graph.graph.eliminate_dead_code()
        graph.recompile()
    for tensors in (first, second):
        for got, want, before in zip(graph(*tensors), constrained(dim)(*tensors), tensors, strict=True):
            # Two roundings, of the norm and of the quotient, where torch's operations do it.
            torch.testing.assert_close(got, want, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
            assert torch.equal(got, before) == (before.norm() <= 0.5 if dim is None else (got == before).all())


def test_tensors_without_values():
    with torch._subclasses.FakeTensorMode():
        layer = torch.nn.Linear(4, 3)
        assert regfused.constrain_max_norm_(layer.parameters(), 1.0, 0) is None
        assert regfused.constrain_max_norm_([torch.ones(5)], 1.0) is None


def test_modes_see_it():
    tensors = [torch.randn(5), torch.randn(3, 4)]
    want = constrained(0)(*tensors)
    for mode in (Dispatched(), Called()):
        with mode:
            got = constrained(0)(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert any("constrain_max_norm_" in name for name in mode.seen)


def test_within_vmap_and_grad():
    batch = torch.randn(6, 3, 4)
    want = torch.stack(constrained(0)(*batch))
    got = torch.func.vmap(lambda x: constrained(0)(x)[0])(batch)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(torch.float32).eps, atol=0)

    def loss(weight):
        ball = constrained(1)(weight.detach())[0]
        return (ball * weight).sum()

    torch.testing.assert_close(torch.func.grad(loss)(batch[0]), constrained(1)(batch[0])[0])


@pytest.mark.cpu
def test_while_compiling():
    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 3)
    twin = layer.weight.detach().clone()
    torch.compile(lambda: regfused.constrain_max_norm_(layer.weight, 0.5), backend="aot_eager", fullgraph=True)()
    regfused.constrain_max_norm_(twin, 0.5)
    torch.testing.assert_close(layer.weight, twin, rtol=2 * torch.finfo(torch.float32).eps, atol=0)


# --- The operator ---------------------------------------------------------------------------------

operator = torch.ops.regfused.constrain_max_norm_


def test_operator():
    p, q = torch.randn(30, 40), torch.randn(7)
    twins = [p.clone(), q.clone()]
    assert operator([p, q], 1.0, 0) is None
    regfused.constrain_max_norm_(twins, 1.0, 0)
    assert torch.equal(p, twins[0]) and torch.equal(q, twins[1]) and p._version == 1
    torch.library.opcheck(operator.default, ([torch.randn(3, 4)], 1.0, 1))
    torch.library.opcheck(operator.default, ([torch.randn(3, 4), torch.randn(2)], 1.0))


def test_operator_compiled_in_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def constrained(p):
        operator([p], 1.0, 0)
        return p * 2

    p = torch.randn(5, 30) * 9
    want = 2 * oracle(p, 1.0, 0)
    torch.testing.assert_close(constrained(p).double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([torch.ones(3)], -1.0), "max_norm must be >= 0, but got -1"),
        (([torch.ones(3)], NAN), "max_norm must be >= 0, but got nan"),
        (
            ([torch.ones(3), torch.ones(3, 4)], 1.0, 1),
            r"dim must be None or in \[-1, 0\] for params\[0\] of shape \[3\]",
        ),
        (([torch.ones(3, dtype=torch.int32)], 1.0), r"must be dense .*, but params\[0\] has dtype Int"),
        (([torch.ones(6)[::2]], 1.0), r"params\[0\] is not dense"),
    ],
)
def test_operator_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        operator(*arguments)
    shared = torch.ones(4, 4)
    with pytest.raises(ValueError, match="must share no memory"):
        operator([shared, shared.t()], 1.0)
    assert (shared == 1).all()


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_no_synchronization_and_graph():
    params = [torch.randn(300, 200), torch.randn(50, 20, 3, 3)]
    twins = [p.clone() for p in params]
    regfused.constrain_max_norm_(params, 1.0, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        regfused.constrain_max_norm_(twins, 1.0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        regfused.constrain_max_norm_(params, 0.5, 0)
    graph.replay()
    torch.testing.assert_close(params[0].norm(dim=1), torch.full((300,), 0.5))
