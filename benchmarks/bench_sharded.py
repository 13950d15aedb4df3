"""Times the step of sharded parameters (DTensor) against torch's clip and optimizer on the same parts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from benchmarks import model_runs, report
from benchmarks.model_runs import Models, Out
from benchmarks.models import read_models

OPTIONS = {"SGD": {"momentum": 0.9}, "AdamW": {}}
MAX_NORM = 1.0
# How many times longer torch should take.
AT_LEAST = {"many_small_1000x1k": 10, "resnet50": 3}
# After three steps in float32, of the largest parameter; a norm of one rank alone would be far beyond it.
TOLERANCE = 1e-5


def sharded(shapes: list[list[int]], mesh: Any) -> list[nn.Parameter]:
    """Parameters with gradients, split along their first dimension; the same in every call."""
    from torch.distributed.tensor import Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)

    def tensor(shape: list[int], scale: float) -> Tensor:
        return distribute_tensor(scale * torch.randn(shape, generator=generator), mesh, [Shard(0)])

    params = []
    for shape in shapes:
        param = nn.Parameter(tensor(shape or [1], 0.02))
        param.grad = tensor(shape or [1], 1.0)
        params.append(param)
    return params


def arms_of(rule: str, shapes: list[list[int]], mesh: Any) -> dict[str, tuple[list[nn.Parameter], Callable[[], Any]]]:
    import regfused

    options = {"lr": 1e-4, "weight_decay": 0.01, **OPTIONS[rule]}
    mine, theirs = sharded(shapes, mesh), sharded(shapes, mesh)
    ours = getattr(regfused, rule)(mine, max_norm=MAX_NORM, **options)
    torchs = getattr(torch.optim, rule)(theirs, foreach=True, **options)

    def by_torch() -> None:
        nn.utils.clip_grad_norm_(theirs, MAX_NORM, foreach=True)
        torchs.step()

    return {f"regfused.{rule}": (mine, ours.step), f"clip_grad_norm_ + foreach {rule}": (theirs, by_torch)}


def collectives_in(call: Callable[[], Any]) -> int:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        call()
    return int(mode.get_total_counts())


def measure(shapes: list[list[int]], rule: str, mesh: Any, repeats: int) -> dict[str, Any]:
    arms = arms_of(rule, shapes, mesh)
    for _ in range(3):
        for _, call in arms.values():
            call()
    (mine, _), (theirs, _) = arms.values()
    pairs = [(p._local_tensor, q._local_tensor) for p, q in zip(mine, theirs, strict=True)]
    largest = max(float(q.abs().max()) for _, q in pairs if q.numel())
    error = max(float((p - q).abs().max()) for p, q in pairs if q.numel()) / largest
    assert error < TOLERANCE, f"{rule}: the steps differ by {error}"
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, (_, call) in arms.items():
            torch.distributed.barrier()
            begin = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - begin))
    found: dict[str, Any] = {"error": error, "arms": {}}
    for name, (_, call) in arms.items():
        low, _, high = quantiles(times[name], n=4)
        found["arms"][name] = {
            "milliseconds": median(times[name]),
            "quartiles": [low, high],
            "collectives": collectives_in(call),
        }
    ours, torchs = (found["arms"][name]["milliseconds"] for name in arms)
    found["times_regfused"] = torchs / ours
    return found


def work(rank: int, ranks: int, port: int, shapes_of: dict[str, list[list[int]]], repeats: int, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    mesh = torch.distributed.init_device_mesh("cpu", (ranks,))
    for model, shapes in shapes_of.items():
        for rule in OPTIONS:
            found = measure(shapes, rule, mesh, repeats)
            if rank == 0:
                print(f"{model}, {rule}: {found['times_regfused']:.1f}", flush=True)
                results[f"{model}, {rule}"] = found
    torch.distributed.destroy_process_group()


def table(results: dict[str, Any]) -> report.Table:
    rows = []
    for case, found in results.items():
        for name, arm in found["arms"].items():
            low, high = arm["quartiles"]
            ratio = f"{found['times_regfused']:.1f}" if not name.startswith("regfused") else "1"
            target = "" if name.startswith("regfused") else f"{AT_LEAST.get(case.split(',')[0], '')}"
            numbers = [f"{arm['milliseconds']:.2f}", f"{low:.2f} to {high:.2f}", ratio, target, str(arm["collectives"])]
            rows.append([case, name, *numbers])
    columns = ["parameters", "step", "ms", "quartiles", "times regfused", "at least", "collective operations"]
    note = "Medians on rank 0, of steps that took turns; gloo, one thread a rank, parts along the first dimension."
    return report.Table("Sharded parameters", columns, rows, note, names=2)


def main(
    models: Models = "many_small_200x64x64,many_small_1000x1k,resnet50",
    ranks: Annotated[int, typer.Option(min=1, help="processes")] = 2,
    repeats: Annotated[int, typer.Option(min=3, help="steps of each arm that are timed")] = 21,
    out: Out = None,
) -> None:
    """Time regfused's step with a clip on DTensors against torch's clip_grad_norm_ and foreach optimizer."""
    shapes_of = model_runs.chosen(models, read_models())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(work, (ranks, port, shapes_of, repeats, results), nprocs=ranks)
    environment = {**report.environment(), "threads": 1, "ranks": ranks}
    found = table(dict(results))
    found.print(Console(width=160))
    if out is not None:
        everything = {"environment": environment, "cases": dict(results)}
        report.write(out, "sharded", everything, [report.environment_table(environment), found])


if __name__ == "__main__":
    typer.run(main)
