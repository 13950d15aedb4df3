"""One norm over processes whose optimizers have other parameters: norm_group, ZeRO, FSDP1."""

import copy
import itertools
import math
import os
import pickle

import pytest
import torch
from rank_runs import message_of, on_ranks
from torch import nn

import regfused
from regfused import reference

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.reference,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built"),
]

WORLD = 2
MODULES = {"kernels": regfused, "reference": reference}
SHAPES = ((4, 3), (5,), (3, 4), (1,), (7, 2))
STEPS = 3
CASES = {
    "SGD": ("SGD", {"momentum": 0.9, "max_norm": 0.5}),
    "elastic net": ("SGD", {"l1": 0.1, "l2": 0.05, "max_norm": 0.5}),
    "norm 1": ("SGD", {"max_norm": 0.5, "norm_type": 1.0}),
    "norm inf": ("SGD", {"max_norm": 0.1, "norm_type": math.inf}),
    "no clip": ("SGD", {"momentum": 0.9}),
    "Adam": ("Adam", {"eps": 1e-3, "max_norm": 0.5}),
    "AdamW, group lasso": ("AdamW", {"eps": 1e-3, "max_norm": 0.5, "group_l1": 0.1}),
}


def values(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def some_of(tensors: list, rank: int) -> list:
    """What a rank has: rank 1 has every other one."""
    return tensors[rank::WORLD]


def trained(make, params, select, steps=range(STEPS), **options):
    optimizer = make(params, lr=0.1, **options)
    for step in steps:
        for p, g in zip(params, select(values(10 + step)), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return optimizer


# --- Steps ------------------------------------------------------------------------------------------


def all_steps(rank: int) -> dict:
    results = {}
    for name, module in itertools.product(CASES, MODULES):
        rule, options = CASES[name]
        params = [nn.Parameter(p) for p in some_of(values(0), rank)]
        optimizer = trained(
            getattr(MODULES[module], rule), params, lambda all_: some_of(all_, rank), norm_group=True, **options
        )
        stats = optimizer.stats
        results[name, module] = {
            "params": [p.detach() for p in params],
            "norm": stats.grad_norm.item(),
            "state": [dict(optimizer.state[p]) for p in params],
            "norm_group": optimizer.norm_group,
        }
    return results


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    return on_ranks(all_steps, WORLD, tmp_path_factory.mktemp("steps"))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", CASES)
def test_steps(steps, name, module):
    rule, options = CASES[name]
    params = [nn.Parameter(p.double()) for p in values(0)]
    optimizer = trained(getattr(reference, rule), params, list, **options)
    for rank, results in enumerate(steps):
        got = results[name, module]
        assert got["norm_group"] is True
        for p, q in zip(got["params"], some_of(params, rank), strict=True):
            torch.testing.assert_close(p.double(), q.detach(), rtol=0, atol=4e-6)
        assert got["norm"] == pytest.approx(optimizer.stats.grad_norm.item(), rel=1e-6, nan_ok=True)


# --- What the processes tell each other --------------------------------------------------------------


def with_nan_on_one_rank(rank: int, module: str, policy: str, on_rank: int = 1) -> dict:
    params = [nn.Parameter(p) for p in some_of(values(0), rank)]
    optimizer = MODULES[module].SGD(params, lr=0.1, momentum=0.9, nonfinite=policy, norm_group=True)
    for p in params:
        p.grad = torch.full_like(p, math.nan if rank == on_rank else 1.0)
    before = [p.detach().clone() for p in params]
    message = message_of(optimizer.step)
    return {
        "message": message,
        "unchanged": all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and not optimizer.state,
        "skipped": int(optimizer.stats.skipped),
    }


def overflow_on_one_rank(rank: int, module: str, **options) -> dict:
    """As torch.amp.GradScaler leaves it to a fused optimizer."""
    params = [nn.Parameter(p) for p in some_of(values(0), rank)]
    optimizer = MODULES[module].SGD(params, lr=0.1, norm_group=True, **options)
    before = [p.detach().clone() for p in params]
    results = {}
    for name, overflows in (("overflow", rank == 1), ("none", False)):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(float(overflows))
        optimizer.step()
        results[name] = all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        results[f"skipped after {name}"] = int(optimizer.stats.skipped)
    results["params"] = [(p.detach() - q) / -0.1 for p, q in zip(params, before, strict=True)]
    return results


def with_little(rank: int, module: str, has: str) -> dict:
    """Rank 1 has no gradient, no parameter, or one that is not for the kernels."""
    params = [nn.Parameter(p) for p in some_of(values(0), rank)]
    if rank == 1 and has == "complex":
        params = [nn.Parameter(torch.ones(3, dtype=torch.complex64))]
    optimizer = MODULES[module].SGD([{"params": [] if rank == 1 and has == "no parameter" else params}],
                                    lr=0.1, max_norm=0.5, norm_group=True)  # fmt: skip
    for step in range(2):
        for p in params if rank == 0 or has == "complex" else ():
            p.grad = torch.ones_like(p) * (1 + step)
        optimizer.step()
    size = sum(p.numel() for p in params) if rank == 0 else 0
    return {"norm": optimizer.stats.grad_norm.item(), "size": size}


def error_on_one_rank(rank: int, module: str, mistake: str) -> dict:
    params = [nn.Parameter(p) for p in some_of(values(0), rank)]
    optimizer = MODULES[module].Adam(params, lr=0.1, max_norm=0.5, norm_group=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy([p.detach() for p in params]), copy.deepcopy(optimizer.state_dict()["state"])
    if rank == 1 and mistake == "option":
        optimizer.param_groups[0]["eps"] = -1.0
    if rank == 1 and mistake == "gradient":
        params[0].grad = torch.ones_like(params[0]).to_sparse()
    if rank == 1 and mistake == "state":
        optimizer.state[params[0]]["exp_avg"] = torch.ones(99)
    message = message_of(optimizer.step)
    unchanged = all(torch.equal(p, q) for p, q in zip(params, before[0], strict=True))
    kept = all(float(optimizer.state[p]["step"]) == 1 for p in params)
    return {"message": message, "unchanged": unchanged and kept}


def all_told(rank: int) -> dict:
    results = {}
    for module in MODULES:
        for policy in ("skip", "error"):
            results["nan", module, policy] = with_nan_on_one_rank(rank, module, policy)
        results["overflow", module, "clip"] = overflow_on_one_rank(rank, module, max_norm=1e3)
        results["overflow", module, "no clip"] = overflow_on_one_rank(rank, module)
        for has in ("no gradient", "no parameter", "complex"):
            results["little", module, has] = with_little(rank, module, has)
        for mistake in ("option", "gradient", "state"):
            results["error", module, mistake] = error_on_one_rank(rank, module, mistake)
    return results


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return on_ranks(all_told, WORLD, tmp_path_factory.mktemp("told"))


@pytest.mark.parametrize("module", MODULES)
def test_a_nan_of_one_process_is_one_of_all(told, module):
    for rank in told:
        got = rank["nan", module, "skip"]
        assert got == {"message": "no error", "unchanged": True, "skipped": 1}
        got = rank["nan", module, "error"]
        assert "nonfinite='error'" in got["message"] and got["unchanged"]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("clip", ("clip", "no clip"))
def test_an_overflow_of_one_process_is_one_of_all(told, module, clip):
    for rank in told:
        got = rank["overflow", module, clip]
        assert got["overflow"] and got["skipped after overflow"] == 1
        assert not got["none"] and got["skipped after none"] == 1
        for moved in got["params"]:
            torch.testing.assert_close(moved, torch.full_like(moved, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("has", ("no gradient", "no parameter", "complex"))
def test_every_process_takes_part(told, module, has):
    first, second = (rank["little", module, has] for rank in told)
    elements = first["size"] + (3 if has == "complex" else 0)
    assert first["norm"] == second["norm"] == pytest.approx(2 * math.sqrt(elements))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("mistake", ("option", "gradient", "state"))
def test_an_error_of_one_process_is_one_of_all(told, module, mistake):
    of_others, own = (rank["error", module, mistake] for rank in told)
    assert "one has an error" in of_others["message"]
    assert "Adam.step" in own["message"] and "one has an error" not in own["message"]
    assert of_others["unchanged"] and own["unchanged"]


def killed(rank: int, folder: str) -> dict:
    params = [nn.Parameter(p) for p in some_of(values(0), rank)]
    optimizer = trained(regfused.Adam, params, lambda all_: some_of(all_, rank), max_norm=0.5, norm_group=True)
    before = copy.deepcopy([[p.detach(), optimizer.state[p]] for p in params])
    if rank == 1:
        torch.save({}, f"{folder}/1.pt")
        os._exit(0)
    message = message_of(optimizer.step)
    after = [[p.detach(), optimizer.state[p]] for p in params]
    same = all(
        torch.equal(p, q) and all(torch.equal(s[name], t[name]) for name in s)
        for (p, s), (q, t) in zip(before, after, strict=True)
    )
    torch.save({"message": message, "same": same}, f"{folder}/0.pt")
    os._exit(0)


def test_a_process_that_is_gone(tmp_path):
    results = on_ranks(killed, WORLD, tmp_path, str(tmp_path), seconds=20)
    assert results[0]["message"] != "no error" and results[0]["same"]


# --- Arguments ---------------------------------------------------------------------------------------


def all_arguments(rank: int) -> dict:
    param = nn.Parameter(torch.ones(2))
    alone = [torch.distributed.new_group([r]) for r in range(WORLD)]
    optimizer = regfused.SGD([param], lr=0.1, norm_group=alone[rank], max_norm=1.0)
    copied = copy.deepcopy(optimizer)
    whole = pickle.loads(pickle.dumps(regfused.SGD([param], lr=0.1, norm_group=True)))
    return {
        "of others": message_of(lambda: regfused.SGD([param], lr=0.1, norm_group=alone[1 - rank])),
        "number": message_of(lambda: regfused.SGD([param], lr=0.1, norm_group=3)),
        "differentiable": message_of(lambda: regfused.SGD([param], lr=0.1, norm_group=True, differentiable=True)),
        "pickled": message_of(lambda: pickle.dumps(optimizer)),
        "copied": copied.norm_group is alone[rank],
        "unpickled": whole.norm_group is True,
        "in groups": "norm_group" in optimizer.param_groups[0] or "norm_group" in optimizer.state_dict(),
    }


def test_arguments(tmp_path):
    for got in on_ranks(all_arguments, WORLD, tmp_path):
        assert got["of others"].startswith("ValueError: SGD: norm_group must hold this process")
        assert got["number"].startswith("ValueError: SGD: norm_group must be a process group") and "3" in got["number"]
        assert got["differentiable"].startswith("ValueError: SGD: differentiable=True demands norm_group=None")
        assert got["pickled"].startswith("TypeError: SGD: an optimizer with a process group as norm_group cannot be")
        assert got["copied"] and got["unpickled"] and not got["in groups"]


def test_without_processes():
    with pytest.raises(RuntimeError, match="SGD: norm_group demands that torch.distributed.init_process_group was"):
        regfused.SGD([nn.Parameter(torch.ones(2))], lr=0.1, norm_group=True)


# --- Clients -----------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 6, generator=generator), torch.randn(16, 2, generator=generator)


def fit(network: nn.Module, optimizer) -> None:
    x, y = data()
    for _ in range(STEPS):
        optimizer.zero_grad()
        (network(x) - y).square().sum().backward()
        optimizer.step()


def zero(rank: int) -> list:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    network = model()
    optimizer = ZeroRedundancyOptimizer(
        network.parameters(), regfused.Adam, lr=0.05, max_norm=0.5, l1=1e-3, norm_group=True
    )
    fit(network, optimizer)
    return [p.detach() for p in network.parameters()]


def fsdp1(rank: int) -> dict:
    from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp

    results = {}
    for original in (False, True):
        # On other devices FSDP1 needs them to be there.
        network = Fsdp(model(), use_orig_params=original, device_id=torch.device("cpu"))
        params = list(network.parameters())
        results["clip", original] = message_of(lambda ps=params: regfused.SGD(ps, lr=0.1, max_norm=1.0))
        results["skip", original] = message_of(lambda ps=params: regfused.SGD(ps, lr=0.1, nonfinite="skip"))
        results["group lasso", original] = message_of(
            lambda ps=params: regfused.SGD(ps, lr=0.1, group_l1=1.0, norm_group=True)
        )
        late = regfused.SGD(params, lr=0.1)
        late.param_groups[0]["max_norm"] = 1.0
        results["late", original] = message_of(late.step)
        optimizer = regfused.Adam(params, lr=0.05, max_norm=0.5, l1=1e-3, norm_group=True)
        fit(network, optimizer)
        with Fsdp.summon_full_params(network):
            results["params", original] = [p.detach().clone() for p in network.parameters()]
    return results


@pytest.fixture(scope="module")
def alone():
    network = model()
    fit(network, regfused.Adam(network.parameters(), lr=0.05, max_norm=0.5, l1=1e-3))
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_zero(tmp_path, alone):
    for rank in on_ranks(zero, WORLD, tmp_path):
        torch.testing.assert_close(torch.cat([p.flatten() for p in rank]), alone, rtol=0, atol=1e-6)


def test_fsdp1(tmp_path, alone):
    for rank in on_ranks(fsdp1, WORLD, tmp_path):
        for original in (False, True):
            for name in ("clip", "skip", "late"):
                message = rank[name, original]
                assert message.startswith("ValueError: SGD") and "add norm_group=True" in message, (name, message)
            assert "group_l1 demands parameters in their own shapes" in rank["group lasso", original]
            params = torch.cat([p.flatten() for p in rank["params", original]])[: alone.numel()]
            torch.testing.assert_close(params, alone, rtol=0, atol=1e-6)
