"""The group lasso of Adam, in the metric of its step: against the equation that defines it, solved by bisection."""

import copy
import math

import pytest
import torch
from step_cases import (
    DTYPES,
    ON_CUDA_KERNELS,
    SLICED_SHAPES,
    assert_params_equal,
    copy_params,
    dims_of,
    group_map,
    laid_out,
    memory_orders,
    share_grads,
)

import regfused
from regfused import reference

KINDS = pytest.mark.parametrize("make", (regfused.Adam, reference.Adam), ids=("kernels", "reference"))
GROUP_L1 = 20.0


def parameter(shape, order, dtype, seed):
    """Slices of many sizes: some that the map makes zero, some that it hardly changes."""
    generator = torch.Generator("cpu").manual_seed(seed)
    p = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    for dim in range(p.dim()):
        sizes = torch.linspace(-6, 1, p.shape[dim], dtype=torch.float64, device="cpu").exp()
        p = p * sizes.reshape([-1 if d == dim else 1 for d in range(p.dim())])
    p = torch.nn.Parameter(laid_out(p.to(torch.get_default_device(), dtype), order))
    scales = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").exp()
    p.grad = laid_out((scales.to(p.device) * p.detach().double().sign()).to(dtype), order)
    return p


def stepped(make, params, group_dim=0, **options):
    """The parameters after a second step without the group lasso, and the lengths of the steps of its elements.

    Takes the same step, with the group lasso, on `params`.
    """
    options = {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, **options}
    without = copy_params(params)
    share_grads(params, without)
    plain = make(without, **options)
    plain.step()
    optimizer = make(params, **options, group_l1=GROUP_L1, group_dim=group_dim)
    optimizer.load_state_dict(
        {**copy.deepcopy(plain.state_dict()), "param_groups": optimizer.state_dict()["param_groups"]}
    )
    with torch.no_grad():
        for p, q in zip(params, without, strict=True):
            p.copy_(q)
    plain.step()
    optimizer.step()
    lengths = []
    for q in without:
        entry = plain.state[q]
        v = entry["max_exp_avg_sq" if options.get("amsgrad") else "exp_avg_sq"].double()
        t = float(entry["step"])
        lengths.append(options["lr"] / ((v / (1 - options["betas"][1] ** t)).sqrt() + options["eps"]))
    return without, lengths


def assert_mapped(params, without, lengths, dim, l2=0.0):
    for p, q, e in zip(params, without, lengths, strict=True):
        e = e / (1 + 2 * e * l2)
        want = group_map(q.detach().double(), GROUP_L1 * e, dim)
        dtype = p.dtype
        arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        storage = torch.finfo(dtype).eps
        # The radius of a slice has a few roundings of the type of arithmetic, relative to it and to the thresholds.
        scale = 1 + q.detach().double().abs().max().item() if q.numel() else 1
        bound = 64 * arithmetic * scale + storage * want.abs() + torch.finfo(dtype).smallest_normal
        wrong = (p.detach().double() - want).abs() > bound
        assert not wrong.any(), (p.shape, dim, wrong.nonzero()[0].tolist(), p[wrong][0].item(), want[wrong][0].item())


# Every shape in one type; a few of each kind in the others.
CASES = [(shape, torch.float32) for shape in SLICED_SHAPES]
CASES += [(shape, dtype) for shape in ((5, 32), (16, 513), (2, 4099), (31, 5, 9)) for dtype in DTYPES[1:]]


@KINDS
@pytest.mark.parametrize("shape, dtype", CASES, ids=str)
def test_any_shape_dim_and_memory_format(make, shape, dtype):
    for dim in dims_of(torch.empty(shape)) if math.prod(shape) < 1000 else range(len(shape)):
        orders = memory_orders(len(shape))
        params = [parameter(shape, order, dtype, seed) for seed, order in enumerate(orders)]
        without, lengths = stepped(make, params, group_dim=dim)
        assert_mapped(params, without, lengths, dim)


OPTIONS = {
    "amsgrad": {"amsgrad": True},
    "sparse group lasso": {"l1": 0.3, "l2": 0.4, "proximal": True},
    "clip": {"weight_decay": 0.1, "max_norm": 1.0, "decoupled_weight_decay": True},
}


@KINDS
@pytest.mark.parametrize("name", OPTIONS)
def test_with_other_options(make, name):
    options = OPTIONS[name]
    shapes = (((40, 33), (0, 1)), ((5, 3000), (0, 1)), ((3000, 5), (0, 1)), ((2, 40_000), (0, 1)), ((300, 300), (1, 0)))
    params = [parameter(shape, order, torch.float32, i) for i, (shape, order) in enumerate(shapes)]
    without, lengths = stepped(make, params, **options)
    assert_mapped(params, without, lengths, 0, l2=options.get("l2", 0.0))
    zeros = sum(int((p.flatten(1) == 0).all(1).sum()) for p in params)
    assert 0 < zeros < sum(p.shape[0] for p in params)


@KINDS
@pytest.mark.parametrize("shape", ((4, 100), (100, 4), (2, 20_000)), ids=str)
def test_what_cannot_be_measured(make, shape):
    """Moments of zero, lr = 0, infinite and NaN elements: each slice by itself, and nothing new is NaN."""
    p = parameter(shape, (0, 1), torch.float32, 0)
    # Never a gradient: the step of these elements is long, so the map makes them zero.
    p.grad = torch.zeros_like(p)
    make([p], lr=0.01, group_l1=0.1).step()
    assert torch.equal(p.detach(), torch.zeros_like(p))

    p = parameter(shape, (0, 1), torch.float32, 0)
    before = p.detach().clone()
    make([p], lr=0.0, group_l1=0.1).step()
    assert torch.equal(p.detach(), before)

    for odd in (math.nan, math.inf):
        p = parameter(shape, (0, 1), torch.float32, 0)
        with torch.no_grad():
            p[1, 2] = odd
        make([p], lr=1e-3, group_l1=1e-4).step()
        assert p[0].isfinite().all() and p[2:].isfinite().all()
        if math.isnan(odd):
            assert p[1].isnan().all()
        else:
            assert p[1, 2] == math.inf and p[1].isfinite().sum() == shape[1] - 1

    # The square of such a gradient is infinite: its element does not move, as in torch, and the others do.
    p = parameter(shape, (0, 1), torch.float32, 0)
    p.grad[1, 2] = 1e30
    kept = p[1, 2].item()
    make([p], lr=1e-3, group_l1=1e-4).step()
    assert p.isfinite().all() and p[1, 2].item() == pytest.approx(kept, rel=1e-6)


@KINDS
@pytest.mark.parametrize("group_dim", (0, 1))
def test_lr_zero_moves_the_moments_alone(make, group_dim):
    params = [parameter((70, 40), (0, 1), torch.float32, seed=0)]
    twins, before = copy_params(params), copy_params(params)
    share_grads(params, twins)
    ours, plain = make(params, lr=0.0, group_l1=GROUP_L1, group_dim=group_dim), make(twins, lr=0.0)
    for _ in range(2):
        ours.step()
        plain.step()
    assert_params_equal(params, before)
    for name, value in plain.state[twins[0]].items():
        assert torch.equal(ours.state[params[0]][name], value), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_the_same_bits_on_every_instruction_set_and_number_of_threads(monkeypatch, threads, dtype):
    if ON_CUDA_KERNELS:
        pytest.skip("about the CPU's kernels")
    shapes = ((40, 33), (7, 3), (5, 3000), (3000, 5), (2, 40_000), (31, 5, 9))
    runs = []
    for isa in regfused.build_info()["isas"].split(", "):
        for count in (1, 3):
            monkeypatch.setenv("REGFUSED_ISA", isa)
            threads(count)
            params = [parameter(shape, tuple(range(len(shape))), dtype, 1) for shape in shapes]
            optimizer = regfused.Adam(params, lr=0.02, eps=1e-3, group_l1=GROUP_L1)
            for _ in range(2):
                optimizer.step()
            runs.append(params)
    for run in runs[1:]:
        assert_params_equal(run, runs[0])
    assert any((p == 0).any() for p in runs[0])


def test_resumed_training_has_the_same_bits():
    params = [parameter((30, 50), (0, 1), torch.float32, 2)]
    optimizer = regfused.AdamW(params, lr=0.02, group_l1=0.05, amsgrad=True)
    for _ in range(3):
        optimizer.step()
    twins = copy_params(params)
    again = regfused.AdamW(twins, lr=1.0)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        share_grads(params, twins)
        optimizer.step()
        again.step()
    assert_params_equal(params, twins)
