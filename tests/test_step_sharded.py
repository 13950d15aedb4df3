"""Sharded parameters (DTensor): each rank steps its part, one collective operation makes the norm whole."""

import copy
import datetime
import itertools
import math
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

import regfused
from regfused import extension, reference

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.reference,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is not built"),
]

WORLD = 2
MODULES = {"kernels": regfused, "reference": reference}
SHAPES = ((4, 3), (5, 2), (3, 4), (1,), (7,))  # some rows do not divide, and a rank may have none
OPTIONS = {
    "momentum": {"momentum": 0.9},
    "elastic net and clip": {"momentum": 0.9, "weight_decay": 0.1, "l1": 0.1, "l2": 0.05, "max_norm": 0.5},
    "clip, norm 1": {"max_norm": 0.5, "norm_type": 1.0},
    "clip, norm inf": {"max_norm": 0.1, "norm_type": math.inf},
    "clip, norm 3": {"max_norm": 0.1, "norm_type": 3.0},
    "proximal": {"momentum": 0.9, "l1": 0.3, "l2": 0.1, "proximal": True, "max_norm": 1.0},
    "group lasso": {"momentum": 0.9, "group_l1": 0.3, "max_norm": 1.0},
    "kept zeros": {"momentum": 0.9, "keep_zeros": True, "nonnegative": True, "max_norm": 0.5},
    "concave l1": {"l1": 0.3, "concavity": 0.5, "proximal": True, "max_norm": 0.5},
    "skip": {"momentum": 0.9, "nonfinite": "skip"},
    "not clipped": {},
}
OPTIONS_OF_ADAM = {
    "Adam": {"weight_decay": 0.1},
    "Adam, elastic net and clip": {"l1": 0.1, "l2": 0.05, "max_norm": 0.5, "amsgrad": True},
    "Adam, proximal": {"l1": 0.3, "l2": 0.1, "proximal": True, "max_norm": 1.0},
    "Adam, group lasso": {"group_l1": 0.3, "group_dim": 0, "max_norm": 1.0},
    "Adam, sparse group lasso": {"group_l1": 0.3, "group_dim": -1, "l1": 0.1, "l2": 0.1, "proximal": True},
}
CASES = {
    **{name: ("SGD", options) for name, options in OPTIONS.items()},
    **{name: ("Adam", {"eps": 1e-3, **options}) for name, options in OPTIONS_OF_ADAM.items()},
}
SLOT = {"SGD": "momentum_buffer", "Adam": "exp_avg"}
STEPS = 3
HAS_PEAK = os.access("/proc/self/clear_refs", os.W_OK)


def values(kind: str, step: int = 0) -> list[torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(17 * step + len(kind))
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def placements_of(kind: str) -> list:
    from torch.distributed.tensor import Replicate, Shard

    return {
        "hybrid": [[Replicate(), Shard(0)]] * len(SHAPES),
        "in both dimensions": [
            *([Shard(0), Shard(1)], [Shard(1), Shard(0)], [Shard(0), Shard(0)]),
            *([Replicate(), Shard(0)], None),
        ],
        "sharded": [[Shard(0)]] * len(SHAPES),
        "replicated": [[Replicate()]] * len(SHAPES),
        "mixed": [[Shard(0)], [Replicate()], [Shard(1)], [Replicate()], [Shard(0)]],
        "with plain tensors": [[Shard(0)], None, [Shard(0)], None, [Replicate()]],
    }[kind]


KINDS = ("sharded", "replicated", "mixed", "with plain tensors")
# Of four ranks, two by two.
KINDS_OF_FOUR = ("hybrid", "in both dimensions")
CASES_OF_FOUR = ("elastic net and clip", "clip, norm inf", "skip", "Adam, elastic net and clip", "Adam, group lasso")


def on_mesh(tensors, kind, mesh) -> list[torch.Tensor]:
    from torch.distributed.tensor import distribute_tensor

    return [
        t if placements is None else distribute_tensor(t, mesh, placements)
        for t, placements in zip(tensors, placements_of(kind), strict=True)
    ]


def whole(tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def goes_to_torch(kind: str, options: dict) -> bool:
    """What the kernels do not take: norms that they do not know, and slices that are spread over ranks."""
    if options.get("norm_type", 2) == 3:
        return True
    return "group_l1" in options and not slices_are_whole(kind, options.get("group_dim", 0))


def slices_are_whole(kind: str, dim: int) -> bool:
    split = [
        (shape, p) for shape, of in zip(SHAPES, placements_of(kind), strict=True) for p in of or [] if p.is_shard()
    ]
    return all(p.is_shard(dim % len(shape)) for shape, p in split)


def step_all(rank: int, mesh, kinds=KINDS, cases=tuple(CASES)) -> dict:
    """What each case comes to, and how many collective operations a step took."""
    from torch.distributed.tensor.debug import CommDebugMode

    results = {}
    for kind, name in itertools.product(kinds, cases):
        rule, options = CASES[name]
        for module in MODULES:
            make = getattr(MODULES[module], rule)
            params = [torch.nn.Parameter(t) for t in on_mesh(values("params"), kind, mesh)]
            optimizer = make(params, lr=0.1, **options)
            versions = [p._version for p in params]
            for step in range(STEPS):
                for p, g in zip(params, on_mesh(values("grads", step), kind, mesh), strict=True):
                    p.grad = g
                # The mode that counts must not change the way that a step takes.
                with mock.patch.object(extension.C, "is_watched", return_value=False), CommDebugMode() as counting:
                    optimizer.step()
            assert all(p._version > v for p, v in zip(params, versions, strict=True))
            if module == "kernels":
                sharded = optimizer._sharded
                by_kernels = sum(parts.plan.tensors for parts in sharded._parts) if sharded._members else 0
                assert by_kernels == (0 if goes_to_torch(kind, options) else len(params)), (kind, name)
            stats = optimizer.stats
            if rank == 0:
                norm = stats.grad_norm.item()  # no other rank takes part
            has_slot = rule == "Adam" or "momentum" in options
            buffers = [optimizer.state[p][SLOT[rule]] for p in params] if has_slot else []
            assert [type(b) for b in buffers] == [type(p.data) for p in params][: len(buffers)]
            results[kind, name, module] = {
                "collectives": counting.get_total_counts(),
                "params": [whole(p) for p in params],
                "buffers": [whole(b) for b in buffers],
                "penalty": stats.penalty.item(),
                "zero_fraction": stats.zero_fraction.item(),
                "norm": norm if rank == 0 else None,
            }
    return results


def checkpoint_and_kinds_of_grads(rank: int, mesh) -> dict:
    """State goes through a checkpoint; a buffer from elsewhere is spread as its parameter; copies have the numbers."""
    params = [torch.nn.Parameter(t) for t in on_mesh(values("params"), "sharded", mesh)]
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, l1=0.1)
    for step in range(2):
        for p, g in zip(params, on_mesh(values("grads", step), "sharded", mesh), strict=True):
            p.grad = g
        optimizer.step()
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = regfused.SGD(twins, lr=0.7, momentum=0.9)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy(optimizer)
    assert copied.stats.penalty.item() == optimizer.stats.penalty.item()
    for ps, o in ((params, optimizer), (twins, twin)):
        for p, g in zip(ps, on_mesh(values("grads", 5), "sharded", mesh), strict=True):
            p.grad = g
        o.step()
    return {"params": [whole(p) for p in params], "twins": [whole(p) for p in twins]}


def other_gradients(rank: int, mesh) -> dict:
    """Versions of parameters after steps with other gradients than before, one of them skipped, and the counts."""
    params = [torch.nn.Parameter(t) for t in on_mesh(values("params"), "sharded", mesh)]
    optimizer = regfused.Adam(params, lr=0.1, nonfinite="skip")
    versions, stepped = [], []

    def step(which: tuple[int, ...], nan: bool = False) -> None:
        grads = on_mesh(values("grads", len(versions)), "sharded", mesh)
        for i, p in enumerate(params):
            p.grad = grads[i] * (math.nan if nan else 1) if i in which else None
        optimizer.step()
        versions.append([p._version for p in params])
        stepped.append([i for _, i in optimizer._last._merged().stepped])

    step((0, 1, 2, 3))
    step((0, 1), nan=True)
    step((0, 1))
    step((0, 1))
    step((1, 4))
    steps = [float(optimizer.state[p]["step"]) for p in params]
    return {"versions": versions, "stepped": stepped, "steps": steps}


def memory_of_a_step(rank: int, mesh) -> dict:
    """By how many bytes the memory of a process grows at most while it steps a part of 40 MiB, under each module.

    malloc gives so much back at once, so that no step can use what another one has left.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    def kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    grown = {}
    for name, module in MODULES.items():
        param = torch.nn.Parameter(distribute_tensor(torch.zeros(WORLD * 10 * 2**10, 2**10), mesh, [Shard(0)]))
        param.grad = distribute_tensor(torch.ones(param.shape), mesh, [Shard(0)])
        optimizer = module.AdamW([param], lr=0.1, l1=0.1, max_norm=1.0)
        for _ in range(2):
            optimizer.step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = kilobytes("VmRSS")
        optimizer.step()
        grown[name] = 1024 * (kilobytes("VmHWM") - before)
    return grown


def work(rank: int, folder: str, world: int = WORLD) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=2)
    )
    from torch.distributed.device_mesh import init_device_mesh

    if world == WORLD:
        mesh = init_device_mesh("cpu", (WORLD,))
        results = {"steps": step_all(rank, mesh), "checkpoint": checkpoint_and_kinds_of_grads(rank, mesh)}
        results["other"] = other_gradients(rank, mesh)
        if HAS_PEAK:
            results["memory"] = memory_of_a_step(rank, mesh)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results = {"steps": step_all(rank, mesh, KINDS_OF_FOUR, CASES_OF_FOUR)}
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def of_four_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four_ranks")
    torch.multiprocessing.spawn(work, (str(folder), 4), nprocs=4)
    return [torch.load(folder / f"{rank}.pt") for rank in range(4)]


@pytest.fixture(scope="module", params=CASES)
def unsharded(request):
    """The same training of ordinary tensors in float64."""
    params = [torch.nn.Parameter(t.double()) for t in values("params")]
    rule, options = CASES[request.param]
    optimizer = getattr(reference, rule)(params, lr=0.1, **options)
    for step in range(STEPS):
        for p, g in zip(params, values("grads", step), strict=True):
            p.grad = g.double()
        optimizer.step()
    return request.param, params, optimizer


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", KINDS)
def test_steps(of_ranks, unsharded, kind, module):
    name, params, optimizer = unsharded
    check_steps([ranks["steps"][kind, name, module] for ranks in of_ranks], name, params, optimizer)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", KINDS_OF_FOUR)
@pytest.mark.parametrize("unsharded", CASES_OF_FOUR, indirect=True)
def test_steps_of_four_ranks(of_four_ranks, unsharded, kind, module):
    name, params, optimizer = unsharded
    check_steps([ranks["steps"][kind, name, module] for ranks in of_four_ranks], name, params, optimizer)


def check_steps(results, name, params, optimizer):
    for rank in results:
        for got, want in zip(rank["params"], params, strict=True):
            # Values of a size of 4 in float32.
            torch.testing.assert_close(got.double(), want.detach(), rtol=0, atol=4e-6)
        for got, p in zip(rank["buffers"], params, strict=False):
            slot = optimizer.state[p][SLOT[CASES[name][0]]]
            torch.testing.assert_close(got.double(), slot, rtol=0, atol=4e-6)
        assert rank["penalty"] == pytest.approx(optimizer.stats.penalty.item(), rel=1e-6)
        assert rank["zero_fraction"] == pytest.approx(optimizer.stats.zero_fraction.item())
    assert results[0]["norm"] == pytest.approx(optimizer.stats.grad_norm.item(), rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("module", MODULES)
def test_collective_operations(of_ranks, module):
    """One for each way in which tensors are split where there is a norm; none without, and none for the stats."""
    for kind in KINDS:
        for name, (_, options) in CASES.items():
            if "group_l1" in options and not slices_are_whole(kind, options.get("group_dim", 0)):
                continue
            has_norm = "max_norm" in options or "nonfinite" in options
            split = kind != "replicated"
            got = of_ranks[0]["steps"][kind, name, module]["collectives"]
            assert got == (1 if has_norm and split else 0), (kind, name)


def test_other_gradients_than_before(of_ranks):
    for rank in of_ranks:
        versions = rank["other"]["versions"]
        moved = [[a < b for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(versions)]
        first, none = [True, True, False, False, False], [False] * 5
        assert moved == [none, first, first, [False, True, False, False, True]]
        assert rank["other"]["stepped"] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1], [0, 1], [1, 4]]
        assert rank["other"]["steps"] == [3, 4, 1, 1, 1]


@pytest.mark.skipif(not HAS_PEAK, reason="there is no peak of memory that could begin anew")
def test_a_step_takes_no_memory(of_ranks):
    for rank in of_ranks:
        assert rank["memory"]["kernels"] < 2**20
        assert rank["memory"]["reference"] > 2**23  # so it would show


def test_training_that_resumes(of_ranks):
    for rank in of_ranks:
        for p, q in zip(rank["checkpoint"]["params"], rank["checkpoint"]["twins"], strict=True):
            assert torch.equal(p, q)
