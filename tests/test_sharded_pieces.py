"""Sharded tensors (DTensor) in the functions beside the optimizers, under AMP, and where ranks do not agree."""

import itertools
import math

import pytest
import torch
from rank_runs import message_of, on_ranks
from torch import nn

import regfused
from regfused import extension, reference

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.reference,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built"),
]

WORLD = 2
SHAPES = ((4, 3), (5, 2), (3, 4), (1,), (7,))
MODULES = {"kernels": regfused, "reference": reference}
NORM_TYPES = (1.0, 2.0, 3.0, math.inf)


def values(seed: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES]
    found[0][1] = 0  # a row
    found[2][:, 2] = 0  # a column
    return found


def placements_of(kind: str) -> list:
    from torch.distributed.tensor import Replicate, Shard

    return {
        "sharded": [Shard(0)] * 5,
        "by columns": [Shard(1), Shard(1), Shard(1), Shard(0), Shard(0)],
        "mixed": [Shard(0), Replicate(), Shard(1), None, Shard(0)],
    }[kind]


KINDS = ("sharded", "by columns", "mixed")


def spread(tensors: list, kind: str, mesh) -> list:
    from torch.distributed.tensor import distribute_tensor

    placed = zip(tensors, placements_of(kind), strict=True)
    return [t if p is None else distribute_tensor(t, mesh, [p]) for t, p in placed]


def whole(tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def params_of(kind: str, mesh, dtype=torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(t) for t in spread(values(0, dtype), kind, mesh)]
    for p, g in zip(params, spread(values(1, dtype), kind, mesh), strict=True):
        p.grad = g
    return params


def counted(call) -> tuple:
    """What a call returns, and how many collective operations it took."""
    from torch.distributed.tensor.debug import CommDebugMode

    if extension.C is None:
        return call(), 0
    with pytest.MonkeyPatch.context() as patch, CommDebugMode() as mode:
        patch.setattr(extension.C, "is_watched", lambda: False)
        result = call()
    return result, mode.get_total_counts()


def pieces(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for kind, module in itertools.product(KINDS, MODULES):
        package = MODULES[module]
        if module == "kernels":
            for norm_type, dtype in ((2.0, torch.bfloat16), *((n, torch.float32) for n in NORM_TYPES)):
                params = params_of(kind, mesh, dtype)
                norm, count = counted(lambda ps=params, n=norm_type: regfused.grad_norm(ps, n))
                clipped = regfused.clip_grad_norm_(params, 0.5, norm_type)
                results[kind, "clip", norm_type, dtype] = {
                    "norm": float(whole(norm)),
                    "clipped": float(whole(clipped)),
                    "grads": [whole(p.grad) for p in params],
                    "count": count,
                }
        params = params_of(kind, mesh)
        for p in params:
            p.grad = None
        value, count = counted(lambda ps=params, pack=package: pack.penalty(ps, l1=0.3, l2=0.1))
        (2 * value).backward()
        results[kind, "penalty", module] = {
            "value": float(whole(value)),
            "grads": [whole(p.grad) for p in params],
            "count": count,
        }
        for dim in (None, 0, -1):
            params = params_of(kind, mesh)
            package.constrain_max_norm_(params, 1.0, dim)
            results[kind, "max norm", module, dim] = [whole(p) for p in params]
    for kind, dim in itertools.product(KINDS, (0, 1)):
        found = regfused.sparsity(spread(values(0), kind, mesh), dim)
        results[kind, "sparsity", dim] = [(p.zeros, p.numel, p.zero_groups, p.groups) for p in found.parameters]
    return results


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return on_ranks(pieces, WORLD, tmp_path_factory.mktemp("pieces"))


def unsharded(dtype=torch.float32) -> list[nn.Parameter]:
    params = [nn.Parameter(t.double()) for t in values(0, dtype)]
    for p, g in zip(params, values(1, dtype), strict=True):
        p.grad = g.double()
    return params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_clip_grad_norm(of_ranks, kind, norm_type):
    params = unsharded()
    norm = torch.nn.utils.clip_grad_norm_(params, 0.5, norm_type)
    for rank in of_ranks:
        got = rank[kind, "clip", norm_type, torch.float32]
        assert got["norm"] == pytest.approx(norm.item(), rel=1e-6) == got["clipped"]
        for grad, p in zip(got["grads"], params, strict=True):
            torch.testing.assert_close(grad.double(), p.grad, rtol=0, atol=1e-6)
        if norm_type != 3 and extension.C is not None:
            assert got["count"] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_clip_grad_norm_of_bfloat16(of_ranks, kind):
    params = unsharded(torch.bfloat16)
    norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
    for rank in of_ranks:
        got = rank[kind, "clip", 2.0, torch.bfloat16]
        assert got["norm"] == pytest.approx(norm.item(), rel=2**-8)  # rounded to bfloat16
        for grad, p in zip(got["grads"], params, strict=True):
            torch.testing.assert_close(grad.double(), p.grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", KINDS)
def test_penalty(of_ranks, kind, module):
    params = [nn.Parameter(t.double()) for t in values(0)]
    value = sum(0.3 * p.abs().sum() + 0.1 * p.square().sum() for p in params)
    (2 * value).backward()
    for rank in of_ranks:
        got = rank[kind, "penalty", module]
        assert got["value"] == pytest.approx(value.item(), rel=1e-6)
        for grad, p in zip(got["grads"], params, strict=True):
            torch.testing.assert_close(grad.double(), p.grad, rtol=1e-6, atol=0)
        if module == "kernels" and extension.C is not None:
            assert got["count"] == 1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dim", (None, 0, -1))
@pytest.mark.parametrize("kind", KINDS)
def test_constrain_max_norm(of_ranks, kind, dim, module):
    params = values(0, torch.float64)
    params = [p.float().double() for p in values(0)]
    reference.constrain_max_norm_(params, 1.0, dim)
    for rank in of_ranks:
        for got, want in zip(rank[kind, "max norm", module, dim], params, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("kind", KINDS)
def test_sparsity(of_ranks, kind, dim):
    want = [(p.zeros, p.numel, p.zero_groups, p.groups) for p in regfused.sparsity(values(0), dim).parameters]
    for rank in of_ranks:
        assert rank[kind, "sparsity", dim] == want


# --- Options that change between steps ---------------------------------------------------------------


def group_lasso_later(rank: int) -> list[torch.Tensor]:
    """Its rows are spread over ranks, so the kernels, which took the first step, cannot take the second one."""
    from torch.distributed.device_mesh import init_device_mesh

    params = params_of("by columns", init_device_mesh("cpu", (WORLD,)))
    optimizer = regfused.SGD(params, lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["group_l1"] = 5.0
    optimizer.step()
    return [whole(p) for p in params]


def test_group_lasso_later(tmp_path):
    params = unsharded()
    optimizer = reference.SGD(params, lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["group_l1"] = 5.0
    optimizer.step()
    for rank in on_ranks(group_lasso_later, WORLD, tmp_path):
        for got, p in zip(rank, params, strict=True):
            torch.testing.assert_close(got.double(), p.detach(), rtol=0, atol=1e-5)


# --- AMP, and ranks that do not agree ----------------------------------------------------------------


def amp(rank: int) -> dict:
    """torch.amp.GradScaler takes found_inf of all ranks together."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    params = [nn.Parameter(t) for t in spread(values(0), "sharded", mesh)]
    optimizer = regfused.Adam(params, lr=0.1, max_norm=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))  # it begins at the first loss
    for step in range(3):
        for p, g in zip(params, spread(values(10 + step), "sharded", mesh), strict=True):
            p.grad = g * 4.0
        if step == 1 and rank == 1:
            params[0].grad.to_local()[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update(4.0)
    return {
        "params": [whole(p) for p in params],
        "steps": {float(optimizer.state[p]["step"]) for p in params},
    }


@pytest.mark.skipif(extension.C is None, reason="needs the compiled part")
def test_amp(tmp_path):
    params = [nn.Parameter(t.double()) for t in values(0)]
    optimizer = reference.Adam(params, lr=0.1, max_norm=0.5)
    for step in (0, 2):
        for p, g in zip(params, values(10 + step), strict=True):
            p.grad = g.double()
        optimizer.step()
    for rank in on_ranks(amp, WORLD, tmp_path):
        assert rank["steps"] == {2.0}
        for got, p in zip(rank["params"], params, strict=True):
            torch.testing.assert_close(got.double(), p.detach(), rtol=0, atol=1e-5)


def disagreeing(rank: int) -> dict:
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for norm_type, mistake in itertools.product((2.0, math.inf), ("list", "order", "error")):
        params = params_of("sharded", mesh)
        if rank == 1 and mistake == "list":
            params = params[:-1]
        if rank == 1 and mistake == "order":
            params = params[::-1]
        optimizer = regfused.Adam(params, lr=0.1, max_norm=0.5, norm_type=norm_type)
        if rank == 1 and mistake == "error":
            optimizer.param_groups[0]["eps"] = -1.0
        before = [p.to_local().clone() for p in params]
        message = message_of(optimizer.step)
        same = all(torch.equal(p.to_local(), q) for p, q in zip(params, before, strict=True))
        results[norm_type, mistake] = {"message": message, "same": same and not optimizer.state}
    return results


@pytest.mark.skipif(extension.C is None, reason="needs the compiled part")
def test_ranks_that_do_not_agree(tmp_path):
    ranks = on_ranks(disagreeing, WORLD, tmp_path, seconds=20)
    for norm_type in (2.0, math.inf):
        for rank in ranks:
            assert all(rank[norm_type, mistake]["same"] for mistake in ("list", "order", "error"))
            for mistake in ("list", "order"):
                assert "every rank must have the same sharded parameters" in rank[norm_type, mistake]["message"]
        assert "one has an error" in ranks[0][norm_type, "error"]["message"]
        assert "eps must be finite and >= 0" in ranks[1][norm_type, "error"]["message"]
