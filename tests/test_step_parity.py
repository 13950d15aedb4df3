"""Parity of the step: with the formula in float64, with the loop that people write, with torch's optimizers."""

import copy

import pytest
import torch
from step_cases import (
    ADAM_OPTIONS,
    DEVICE,
    DTYPES,
    ON_CUDA_KERNELS,
    OPTIONS,
    OTHER_EXTENSION,
    SIZES,
    check_against_oracle,
    give_grads,
    make_params,
    share_grads,
    with_defaults,
)

import regfused
from regfused import reference

# Each rule with its table of options. AdamW is Adam with another default.
TABLES = {"SGD": OPTIONS, "Adam": ADAM_OPTIONS}
CASES = [(rule, name) for rule, table in TABLES.items() for name in table]


def of_few_dtypes(case: int) -> tuple[torch.dtype, ...]:
    """Another compiled part is slow: there each third case is one of all types."""
    return DTYPES if OTHER_EXTENSION is None or case % 3 == 0 else (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "rule, name, dtype",
    [(*case, dtype) for i, case in enumerate(CASES) for dtype in of_few_dtypes(i)],
    ids=lambda value: str(value),
)
def test_kernels_against_float64(rule, name, dtype, isa):
    optimizer = check_against_oracle(getattr(regfused, rule), make_params(SIZES, dtype), TABLES[rule][name])
    assert optimizer._plan.tensors == len(SIZES)  # the kernels did it, not the reference


@pytest.mark.reference
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule, name", CASES)
def test_reference_against_float64(rule, name, dtype):
    check_against_oracle(getattr(reference, rule), make_params(SIZES, dtype), TABLES[rule][name])


# With which torch has an optimizer.
TORCH_CASES = [
    *(("SGD", OPTIONS[name]) for name in ("plain", "weight decay", "momentum", "dampening", "nesterov")),
    *(("Adam", ADAM_OPTIONS[name]) for name in ("plain", "betas", "eps", "weight decay", "amsgrad")),
    ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True, "amsgrad": True}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True}),
]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("rule, options", TORCH_CASES, ids=str)
@pytest.mark.parametrize("module", (regfused, reference), ids=("kernels", "reference"))
def test_against_torch_for_loop(module, rule, options, dtype):
    params = make_params(SIZES, dtype)
    theirs = copy.deepcopy(params)
    options = with_defaults(options)
    ours = getattr(module, rule)(params, **options)
    loop = getattr(torch.optim, rule)(theirs, foreach=False, **options)
    assert isinstance(ours, getattr(torch.optim, rule))
    for step in range(6):
        give_grads(params)
        if step == 0:
            params[3].grad = None  # its first gradient comes late
        share_grads(params, theirs)
        ours.step()
        loop.step()
    # torch contracts a*b + c in some loops and not in others: a few roundings a step, on values below 10. Adam divides
    # by roots, which may be small.
    tolerance = 1e-9 if dtype == torch.float64 else 4e-5 if rule == "SGD" else 2e-5
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
        assert ours.state.get(p, {}).keys() == {name for name, x in loop.state.get(q, {}).items() if x is not None}
        for name, slot in ours.state.get(p, {}).items():
            torch.testing.assert_close(slot, loop.state[q][name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("optimizer", (regfused.SGD, reference.SGD), ids=("kernels", "reference"))
def test_nesterov_with_dampening_written_into_the_group(optimizer):
    # The constructors refuse the pair; torch then dampens the buffer, not the gradient of the look-ahead.
    params = make_params([33, 100])
    theirs = copy.deepcopy(params)
    ours = optimizer(params, lr=0.1, momentum=0.9, nesterov=True)
    loop = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
    for each in (ours, loop):
        each.param_groups[0]["dampening"] = 0.3
    for _ in range(3):
        give_grads(params)
        for p, q in zip(params, theirs, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        loop.step()
    for p, q in zip(params, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def train_by_hand(model, batches, *, lr, momentum, weight_decay, l1, l2, max_norm):
    """The loop as people write it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    for x, y in batches:
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss = loss + l1 * sum(p.abs().sum() for p in model.parameters())
        loss = loss + l2 * sum(p.pow(2).sum() for p in model.parameters())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()


def train_in_one_line(model, batches, **options):
    optimizer = regfused.SGD(model.parameters(), **options)
    for x, y in batches:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("l1, l2", [(0.0, 0.0), (0.01, 0.0), (0.0, 0.02), (0.01, 0.02)])
@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_against_the_tutorial_loop(l1, l2, max_norm):
    model = torch.nn.Sequential(torch.nn.Linear(3, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1)).double()
    twin = copy.deepcopy(model)
    batches = [(torch.randn(16, 3).double(), torch.randn(16, 1).double()) for _ in range(30)]
    options = dict(lr=0.05, momentum=0.9, weight_decay=0.01, l1=l1, l2=l2, max_norm=max_norm)
    train_by_hand(model, batches, **options)
    train_in_one_line(twin, batches, **options)
    # Double precision; 30 steps of a smooth model amplify roundings of 1e-16 by far less than a thousand. sign(p) does
    # not make it worse: no weight comes within 1e-13 of zero here.
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_several_groups_share_one_norm():
    params = make_params([4099, 33, 17])
    twins = copy.deepcopy(params)

    def groups(ps):
        return [
            {"params": ps[:1], "lr": 0.5, "l1": 0.1},
            {"params": ps[1:2], "l2": 0.2, "penalty_in_clip": False},
            {"params": ps[2:], "momentum": 0.0, "l1": 0.3, "proximal": True},
        ]

    ours = regfused.SGD(groups(params), lr=0.1, momentum=0.9, max_norm=0.5)
    for _ in range(3):
        give_grads(params)
        hs = [
            params[0].grad + 0.1 * params[0].detach().sign(),
            params[1].grad,
            params[2].grad,
        ]
        norm = torch.cat([h.double().flatten() for h in hs]).norm().item()
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        assert ours.stats.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        assert ours.stats.clip_coef.item() == pytest.approx(0.5 / (norm + 1e-6), rel=1e-6)
    assert ours._plan.tensors == 3
    twin = reference.SGD(groups(twins), lr=0.1, momentum=0.9, max_norm=0.5)
    torch.manual_seed(0)
    params_again = make_params([4099, 33, 17])
    for p, q in zip(params_again, twins, strict=True):
        assert torch.equal(p, q)
    for _ in range(3):
        give_grads(twins)
        twin.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def _train(options, sizes, dtype=torch.float32, steps=3, scale=1.0):
    generator = torch.Generator(DEVICE).manual_seed(3)
    params = make_params(sizes, dtype, generator)
    optimizer = regfused.SGD(params, **with_defaults(options))
    for _ in range(steps):
        give_grads(params, generator)
        for p in params:
            p.grad *= scale
        optimizer.step()
    tensors = [p.detach() for p in params] + [s["momentum_buffer"] for s in optimizer.state.values()]
    return tensors, optimizer.stats


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_type", (1.0, 2.0, float("inf")))
def test_same_bits_for_any_threads_and_instruction_set(norm_type, dtype, threads, monkeypatch):
    options = {**OPTIONS["elastic net in the clip"], "norm_type": norm_type}
    sizes = [*SIZES, 300_000, 5, 70_000]
    baseline = None
    for isa in regfused.build_info()["isas"].split(", "):
        for count in (1, 2, 3, 8):
            monkeypatch.setenv("REGFUSED_ISA", isa)
            threads(count)
            tensors, stats = _train(options, sizes, dtype)
            if baseline is None:
                baseline = tensors, stats
            assert stats.grad_norm.item() == baseline[1].grad_norm.item(), (isa, count)
            for got, want in zip(tensors, baseline[0], strict=True):
                assert torch.equal(_bits(got), _bits(want)), (isa, count)


def test_norm_of_huge_and_tiny_gradients():
    # Squares that float32 cannot hold: 1e30 overflows, 1e-30 underflows. CUDA kernels count squares below the smallest
    # float32 as zero: what they miss is far below the 1e-6 that is added to the norm.
    missed = 1e-22 if ON_CUDA_KERNELS else 0
    for scale in (1e30, 1e-18, 1e-30):
        _, stats = _train({"max_norm": 1.0}, [1000], scale=scale, steps=1)
        generator = torch.Generator(DEVICE).manual_seed(3)
        params = make_params([1000], generator=generator)
        give_grads(params, generator)
        assert stats.grad_norm.item() == pytest.approx(
            (params[0].grad * scale).double().norm().item(), rel=1e-6, abs=missed
        )


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 1e-38, 3e38, float("inf"), float("-inf"), float("nan")]


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"momentum": 0.9}, {"l1": 0.1}], ids=str)
def test_special_values_against_torch(options, isa):
    values = torch.tensor(SPECIAL)
    p = torch.nn.Parameter(values.repeat_interleave(len(SPECIAL)))
    q = torch.nn.Parameter(p.detach().clone())
    p.grad = values.repeat(len(SPECIAL))
    q.grad = p.grad.clone()
    ours = regfused.SGD([p], lr=0.1, **options)
    if "l1" in options:
        q.grad = q.grad + 0.1 * q.detach().sgn()
        options = {}
    theirs = torch.optim.SGD([q], lr=0.1, foreach=False, **options)
    ours.step()
    theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-6, atol=0, equal_nan=True)
    # Signs of zeros too, but for subnormal gradients, whose product with lr torch does not round before the sum.
    zero = (p == 0) & (p.grad == 0)
    assert torch.equal(zero, (q == 0) & (p.grad == 0))
    assert torch.equal(torch.signbit(p[zero]), torch.signbit(q[zero]))


@pytest.mark.parametrize("proximal", (False, True))
def test_lr_zero_keeps_every_bit(proximal, isa):
    p = torch.nn.Parameter(torch.tensor(SPECIAL * 5))
    before = p.detach().clone()
    p.grad = torch.full_like(p, 3.0)
    regfused.SGD(
        [p], lr=0.0, momentum=0.9, l1=0.1, l2=0.1, weight_decay=0.1, proximal=proximal, decoupled_weight_decay=True
    ).step()
    assert torch.equal(_bits(p.detach()[~before.isnan()]), _bits(before[~before.isnan()]))


def test_proximal_makes_exact_zeros_and_subgradient_does_not():
    zeros = {}
    for proximal in (False, True):
        params = make_params([4099])
        with torch.no_grad():
            params[0].normal_(std=0.01)
        optimizer = regfused.SGD(params, lr=0.1, l1=0.1, proximal=proximal)
        for _ in range(5):
            params[0].grad = torch.randn(4099) * 0.001
            optimizer.step()
        zeros[proximal] = optimizer.stats.zero_fraction.item()
    assert zeros[True] > 0.9 and zeros[False] < 0.01
