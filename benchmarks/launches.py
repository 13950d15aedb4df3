"""Counts what a step, or a building block, asks of the GPU: kernels, copies, calls that launch, calls that wait."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import regfused
from benchmarks import report
from benchmarks.models import own_copy, random_params, read_models, reduced
from benchmarks.penalty_jobs import free_grads
from benchmarks.step_jobs import (
    CLIP_FUSED,
    CLIP_GRAD_SCALE,
    FUSED,
    JOBS,
    OURS,
    TIMED,
    TUTORIAL_LOOP,
    Hyperparameters,
    Step,
)

MODELS = ("mlp_251", "many_small_1000x1k", "gpt2_124m")
REGION = "counted steps"
OUR_KERNELS = "regfused"  # their namespace: in the name of each
LAUNCH = re.compile(r"^(cuda|cu)(Launch|GraphLaunch)")
# A plain cudaMemcpy waits as well; cudaMemcpyAsync to pageable memory too, and counts as a copy.
WAIT = re.compile(r"Synchronize|^cudaMemcpy(2D|3D)?$|^cudaMemset(2D|3D)?$")
ALLOCATION = re.compile(r"^(cudaMalloc|cudaFree|cudaHostAlloc|cudaFreeHost|cuMem(Create|Map|Unmap|Release))")


@dataclass(frozen=True)
class Case:
    """Something to count: how to make its step, and over how many steps."""

    name: str
    make: Callable[[list[Tensor], Hyperparameters], Step]
    ours: bool
    steps: int = 10
    launches: int | None = None  # of our kernels, that a building block should take


def step_with(job: int, way: str) -> Callable[[list[Tensor], Hyperparameters], Step]:
    return lambda params, h: JOBS[job].ways[way](params, JOBS[job].of(h))


def clip_with(**options: Any) -> Callable[[list[Tensor], Hyperparameters], Step]:
    def make(params: list[Tensor], h: Hyperparameters) -> Step:
        values = {"lr": h.lr, "momentum": h.momentum, "weight_decay": h.weight_decay, "max_norm": h.max_norm}
        return regfused.SGD(params, **{**values, **options}).step

    return make


def with_lr_on_the_device(params: list[Tensor], h: Hyperparameters) -> Step:
    return clip_with(lr=torch.tensor(h.lr).to(params[0].device))(params, h)


# --- Building blocks ------------------------------------------------------------------------------


def clip_block(params: list[Tensor], h: Hyperparameters) -> Step:
    assert h.max_norm is not None
    max_norm = h.max_norm
    return lambda: regfused.clip_grad_norm_(params, max_norm)


def norm_block(params: list[Tensor], h: Hyperparameters) -> Step:
    return lambda: regfused.grad_norm(params)


def penalty_forward(params: list[Tensor], h: Hyperparameters) -> Step:
    return lambda: regfused.penalty(params, l1=h.l1, l2=h.l2)


def penalty_backward(params: list[Tensor], h: Hyperparameters) -> Step:
    value = regfused.penalty(params, l1=h.l1, l2=h.l2)

    def step() -> None:
        free_grads(params)
        value.backward(retain_graph=True)

    return step


def dropout_forward(params: list[Tensor], h: Hyperparameters) -> Step:
    """On the largest parameter."""
    x = max(params, key=torch.numel)
    return lambda: regfused.dropout(x, 0.5)


def dropout_backward(params: list[Tensor], h: Hyperparameters) -> Step:
    x = max(params, key=torch.numel)
    y = regfused.dropout(x, 0.5)
    upstream = torch.ones_like(y)

    def step() -> None:
        x.grad = None
        y.backward(upstream, retain_graph=True)

    return step


# --- Cases ----------------------------------------------------------------------------------------

BLOCKS = [
    Case("regfused.clip_grad_norm_", clip_block, ours=True, launches=2),
    Case("regfused.grad_norm", norm_block, ours=True, launches=2),
    Case("regfused.penalty, forward", penalty_forward, ours=True, launches=2),
    Case("regfused.penalty, backward", penalty_backward, ours=True, launches=1),
    Case("regfused.dropout, forward", dropout_forward, ours=True, launches=1),
    Case("regfused.dropout, backward", dropout_backward, ours=True, launches=1),
]
CASES = [
    Case("regfused: update only", step_with(0, OURS), ours=True),
    Case("regfused: clip", step_with(1, OURS), ours=True),
    Case("regfused: elastic net, clip", step_with(2, OURS), ours=True),
    Case("regfused: clip, lr on the device", with_lr_on_the_device, ours=True),
    Case('regfused: clip, nonfinite="skip"', clip_with(nonfinite="skip"), ours=True),
    Case(f"update only: {FUSED}", step_with(0, FUSED), ours=False),
    Case(f"clip: {CLIP_GRAD_SCALE}", step_with(1, CLIP_GRAD_SCALE), ours=False),
    Case(f"clip: {CLIP_FUSED}", step_with(1, CLIP_FUSED), ours=False),
    Case(f"elastic net, clip: {TUTORIAL_LOOP}", step_with(2, TUTORIAL_LOOP), ours=False, steps=2),
    *BLOCKS,
]


# --- Counting -------------------------------------------------------------------------------------


def trace_of(step: Step, steps: int, device: str) -> list[dict[str, Any]]:
    """The events of a trace of `steps` calls, which lie in a region of their own.

    The trace file names the kind of each event; the profiler's event objects do not in every version of torch.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        time.sleep(0.002)  # the profiler itself waits for the device; the pauses keep that out of the region
        with record_function(REGION):
            for _ in range(steps):
                step()
        time.sleep(0.002)
        synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return json.loads(file.read_text())["traceEvents"]


def count(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Counts per step, the calls by name, and number and mean duration of each kernel."""
    by_kind: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_kind[event.get("cat", "")].append(event)
    region = next(event for event in by_kind["user_annotation"] if event["name"] == REGION)
    start, end = region["ts"], region["ts"] + region["dur"]
    # Nothing else of this process runs on the device, and kernels end later than the calls: all of them count.
    kernels: defaultdict[str, list[float]] = defaultdict(list)
    for event in by_kind["kernel"]:
        kernels[event["name"]].append(event["dur"])
    calls = Counter(
        event["name"] for event in by_kind["cuda_runtime"] + by_kind["cuda_driver"] if start <= event["ts"] <= end
    )

    def per_step(pattern: re.Pattern[str]) -> float:
        return sum(n for name, n in calls.items() if pattern.search(name)) / steps

    return {
        "kernels": sum(map(len, kernels.values())) / steps,
        "our kernels": sum(len(us) for name, us in kernels.items() if OUR_KERNELS in name) / steps,
        "launch calls": per_step(LAUNCH),
        "waits": per_step(WAIT),
        "copies": len(by_kind["gpu_memcpy"]) / steps,
        "fills": len(by_kind["gpu_memset"]) / steps,
        "allocations": per_step(ALLOCATION),
        "torch operations": len(by_kind["cpu_op"]) / steps,
        "calls": {name: n / steps for name, n in calls.most_common()},
        "by kernel": {
            name: {"per step": len(us) / steps, "mean us": sum(us) / len(us)} for name, us in kernels.items()
        },
    }


def witness(step: Step, device: str) -> str:
    """What torch itself says about waiting: it raises where an operation of its own would synchronize."""
    if device != "cuda":
        return "not asked"
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return report.cell(str(error), 80)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, start: list[Tensor], device: str) -> dict[str, Any]:
    try:
        step = case.make(own_copy(start), TIMED)
        for _ in range(3):
            step()
        counted = count(trace_of(step, case.steps, device), case.steps)
        return {**counted, "torch's own witness": witness(step, device)}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {report.cell(str(error))}"}


# --- Tables ---------------------------------------------------------------------------------------

COLUMNS = ["kernels", "launch calls", "waits", "copies", "fills", "allocations", "torch operations"]


def tables(results: dict[str, dict[str, Any]]) -> list[report.Table]:
    rows, kernel_rows = [], []
    for model, cases in results.items():
        for name, counted in cases.items():
            if "problem" in counted:
                rows.append([model, name, *[""] * len(COLUMNS), counted["problem"]])
                continue
            numbers = [f"{counted[column]:,.4g}" for column in COLUMNS]
            rows.append([model, name, *numbers, counted["torch's own witness"]])
            if name.startswith("regfused"):
                for kernel, seen in counted["by kernel"].items():
                    row = [model, name, short(kernel), f"{seen['per step']:g}", f"{seen['mean us']:,.2f}"]
                    kernel_rows.append(row)
    note = (
        "Counted by torch.profiler. Waits: calls of cuda*Synchronize, and copies that block. Witness: what an "
        'operation of torch that synchronizes raised under torch.cuda.set_sync_debug_mode("error").'
    )
    columns = ["parameters", "step", *COLUMNS, "witness"]
    found = [report.Table("What a step, or a building block, asks of the GPU, per call", columns, rows, note, names=2)]
    if kernel_rows:
        columns = ["parameters", "step", "kernel", "per step", "mean us"]
        found.append(report.Table("Kernels of regfused", columns, kernel_rows, names=3))
    return found


def short(kernel: str) -> str:
    """The name of a kernel without its return type, arguments and namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void ", "", kernel).split("(")[0]
    return report.cell(re.sub(r"\b\w+::", "", name), 70)


# --- The command ----------------------------------------------------------------------------------


def main(
    device: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    small: Annotated[bool, typer.Option(help="a few small tensors of each model")] = False,
) -> None:
    """Count for every model and every case; the JSON file is written after each model."""
    if device == "cuda":
        trace_of(lambda: torch.zeros(1, device=device), 1, device)  # the profiler's first use loads its libraries
    known, results = read_models(), {}
    for model in MODELS:
        shapes = reduced(known[model]) if small else known[model]
        start = random_params(shapes, torch.float32, device)
        # On a large model the peers' counts are those of any other, times its tensors.
        cases = [case for case in CASES if case.ours or model != "gpt2_124m"]
        results[model] = {case.name: measure(case, start, device) for case in cases}
        report.write_whole(out, json.dumps(results))
        print(f"{model}: counted", flush=True)


if __name__ == "__main__":
    typer.run(main)
