"""Times an SGD step on the parameter shapes of real models, against every way to do the same in torch."""

from __future__ import annotations

import gc
import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import harness, memory, report, sgd_jobs
from benchmarks.harness import Arm, Call, Measurement
from benchmarks.sgd_jobs import CLIP_FUSED, CLIP_GRAD_SCALE, FUSED, JOBS, OURS, SEED_LOOP, SEED_LOOP_FUSED, Job

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MODELS = "mlp_seed,many_small_1000x1k,resnet50,gpt2_124m"
# So small that the parameters keep their size over any number of steps.
TIMED = sgd_jobs.Hyperparameters(lr=1e-9, momentum=0.9, weight_decay=1e-4, l1=1e-5, l2=1e-5, max_norm=1.0)
GRAD_NORM = 2.0  # above max_norm, so that the clip scales
CHECKED_NUMEL = 4_000_000  # errors are measured on tensors of a model with this many elements at most


@dataclass(frozen=True)
class Timing:
    """How to time: the budget per model, and whether with single calls on cold caches."""

    seconds: float
    cold: bool
    roofline_mib: int


@dataclass
class ArmResult:
    """One row of a table, and of the JSON file; times are microseconds per call."""

    median_us: float
    p25_us: float
    p75_us: float
    cold_us: float | None
    samples: int
    calls_per_sample: int
    gb_per_s: float
    roofline_share: float
    times_regfused: float
    extra_kb: int | None
    error: float


# --- Models ---------------------------------------------------------------------------------------


def read_models() -> dict[str, list[list[int]]]:
    """The shapes of all parameters, by the name of the model."""
    runs = json.loads(Path(__file__).with_name("shapes.json").read_text())
    return {name: [shape for shape, repeats in model for _ in range(repeats)] for name, model in runs.items()}


def numel_of(shapes: list[list[int]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def checked_part(shapes: list[list[int]]) -> list[list[int]]:
    """As many tensors of the model, in a seeded order, as fit under the cap."""
    part: list[list[int]] = []
    for shape in random.Random(0).sample(shapes, len(shapes)):
        if numel_of(part) + math.prod(shape) <= CHECKED_NUMEL:
            part.append(shape)
    return part


def reduced(shapes: list[list[int]]) -> list[list[int]]:
    """A few small tensors that stand for the model where only the code is tried, not the speed."""
    return [[min(size, 32) for size in shape] for shape in shapes[:20]]


def random_params(shapes: list[list[int]], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Parameters with gradients of norm ``GRAD_NORM``, as sizes go in training."""
    generator = torch.Generator(device).manual_seed(0)
    scale = GRAD_NORM / math.sqrt(numel_of(shapes))
    params = [torch.randn(shape, generator=generator, device=device).mul_(0.02).to(dtype) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device).mul_(scale).to(dtype)
    return params


def own_copy(params: list[Tensor]) -> list[Tensor]:
    copies = [p.detach().clone().requires_grad_() for p in params]
    for copy, p in zip(copies, params, strict=True):
        assert p.grad is not None
        copy.grad = p.grad.clone()
    return copies


def check_ordinary(name: str, params: list[Tensor]) -> None:
    """Zeros, denormals and infinities take other times than ordinary numbers, so a few of them are the limit."""
    tensors = [t.detach() for p in params for t in (p, p.grad) if t is not None]
    numel = sum(t.numel() for t in tensors)
    odd = sum(count_odd(t) for t in tensors)
    if odd > 0.01 * numel:
        raise RuntimeError(
            f"{name}: ordinary numbers are demanded, but {odd} of {numel} are zero, denormal or infinite"
        )


def count_odd(tensor: Tensor) -> int:
    """Elements that are zero, denormal in float32, which is what arithmetic is done in, or not finite."""
    size = tensor.float().abs()
    return int(((size < torch.finfo(torch.float32).tiny) | ~size.isfinite()).sum())


def needed_bytes(numel: int, dtype: torch.dtype) -> int:
    """Param, grad and momentum buffer of each arm; the start; and what autograd holds for a penalty in the loss."""
    arms = max(len(job.ways) for job in JOBS)
    return numel * dtype.itemsize * (3 * arms + 2 + 3) + sum(roof.bytes_moved for roof in harness.rooflines())


# --- One job on one model -------------------------------------------------------------------------


def run_job(
    job: Job, start: list[Tensor], checked: list[list[int]], timing: Timing, title: str
) -> tuple[dict[str, ArmResult], dict[str, float]]:
    """A result per arm, and the bandwidth of the rooflines in GB/s."""
    dtype = start[0].dtype
    errors = {name: sgd_jobs.error(way, job, checked, dtype) for name, way in job.ways.items()}
    bytes_moved = job.bytes_per_param(dtype) * sum(p.numel() for p in start)
    params_of: dict[str, list[Tensor]] = {}
    extra_kb: dict[str, int | None] = {}

    def arm(name: str) -> Arm:
        def setup() -> Call:
            params_of[name] = own_copy(start)
            step = job.ways[name](params_of[name], job.of(TIMED))
            step()  # allocates the momentum buffers, which are no extra memory
            extra_kb[name] = memory.extra_peak_kb(step)
            return step

        return Arm(name, setup, bytes_moved)

    roofs = harness.rooflines(timing.roofline_mib)
    measured = harness.measure(
        [arm(name) for name in job.ways],
        timing.seconds / len(JOBS),
        cold=timing.cold,
        roofs=roofs,
        title=title,
    )
    for name, params in params_of.items():
        check_ordinary(name, params)
    bandwidth = {roof.name: measured[roof.name].gb_per_s for roof in roofs}
    limit, ours = max(bandwidth.values()), measured[OURS]
    results = {name: arm_result(measured[name], ours, limit, extra_kb[name], errors[name]) for name in job.ways}
    return results, bandwidth


def arm_result(m: Measurement, ours: Measurement, roof: float, extra_kb: int | None, error: float) -> ArmResult:
    return ArmResult(
        median_us=m.median,
        p25_us=m.quartiles[0],
        p75_us=m.quartiles[1],
        cold_us=m.cold_median,
        samples=len(m.warm),
        calls_per_sample=m.calls_per_sample,
        gb_per_s=m.gb_per_s,
        roofline_share=m.gb_per_s / roof,
        times_regfused=m.times(ours),
        extra_kb=extra_kb,
        error=error,
    )


# --- Tables ---------------------------------------------------------------------------------------


def job_rows(job: Job, results: dict[str, ArmResult], cold: bool) -> list[list[str]]:
    rows = []
    for name, r in results.items():
        row = [job.name, name, us(r.median_us), f"{us(r.p25_us)} - {us(r.p75_us)}"]
        if cold:
            row.append("" if r.cold_us is None else us(r.cold_us))
        extra = "?" if r.extra_kb is None else f"{r.extra_kb:,}"
        share, times = f"{100 * r.roofline_share:.0f} %", f"{r.times_regfused:.2f}"
        rows.append([*row, f"{r.gb_per_s:.1f}", share, times, extra, f"{r.error:.0e}"])
    return rows


def model_table(title: str, rows: list[list[str]], cold: bool, note: str) -> report.Table:
    columns = ["job", "arm", "median us", "quartiles"] + ["cold us"] * cold
    columns += ["GB/s", "of roofline", "x regfused", "extra KB", "error"]
    return report.Table(title, columns, rows, note, names=2)


def summary_table(models: dict[str, dict[str, dict[str, ArmResult]]]) -> report.Table:
    def times(results: dict[str, ArmResult], name: str) -> str:
        return f"{results[name].times_regfused:.2f}"

    rows = []
    for model, jobs in models.items():
        clip, net, step = jobs["clip"], jobs["elastic_net"], jobs["step"]
        extra = net[OURS].extra_kb
        row = [times(step, FUSED), times(clip, CLIP_GRAD_SCALE), times(clip, CLIP_FUSED)]
        row += [times(net, SEED_LOOP_FUSED), times(net, SEED_LOOP), "?" if extra is None else f"{extra:,}"]
        rows.append([model, *row])
    columns = ["model", "step: fused", "clip: grad_scale + fused", "clip: clip_grad_norm_ + fused"]
    columns += ["elastic net: in loss, fused", "elastic net: in loss", "extra KB"]
    note = "Median time of the peer over the median time of regfused.SGD; extra KB: of regfused.SGD with elastic net."
    return report.Table("Summary: how many times longer than regfused.SGD", columns, rows, note)


def us(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


# --- The command ----------------------------------------------------------------------------------


def chosen(models: str, known: dict[str, list[list[int]]]) -> list[str]:
    names = list(known) if models == "all" else models.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--models: one of {', '.join(known)} is demanded, but got {name!r}")
    return names


def main(
    models: Annotated[str, typer.Option(help="names in shapes.json, separated by commas, or 'all'")] = DEFAULT_MODELS,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "float32",
    seconds: Annotated[float, typer.Option(min=0.1, help="budget per model for the timed calls")] = 40.0,
    out: Annotated[Path | None, typer.Option(help="folder for sgd.json and sgd.md")] = None,
    cold: Annotated[bool, typer.Option(help="also time single calls after the caches were overwritten")] = False,
    roofline_mib: Annotated[int, typer.Option(min=1, help="size of the tensor whose copy is the roofline")] = 256,
) -> None:
    """Time an SGD step against every way to do the same in torch, and show the error beside the time."""
    if dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: one of {', '.join(DTYPES)} is demanded, but got {dtype!r}")
    torch.set_num_threads(threads)
    console = Console(width=180)
    known = read_models()
    names = chosen(models, known)
    timing = Timing(seconds, cold, roofline_mib)
    facts = report.environment()
    tables = [report.environment_table(facts)]
    tables[0].print(console)

    results: dict[str, Any] = {"environment": facts, "dtype": dtype, "seconds": seconds, "models": {}}
    of_models: dict[str, dict[str, dict[str, ArmResult]]] = {}
    for name in names:
        shapes = known[name]
        available = memory.available_bytes()
        if available is not None and needed_bytes(numel_of(shapes), DTYPES[dtype]) > available:
            console.print(f"{name}: skipped, its arms need more memory than is available")
            continue
        of_models[name], table, results["models"][name] = run_model(name, shapes, DTYPES[dtype], timing)
        tables.append(table)
        table.print(console)
    tables.append(summary_table(of_models))
    tables[-1].print(console)
    if out is not None:
        report.write(out, "sgd", results, tables)


def run_model(
    name: str, shapes: list[list[int]], dtype: torch.dtype, timing: Timing
) -> tuple[dict[str, dict[str, ArmResult]], report.Table, dict[str, Any]]:
    """Results per job and arm, their table, and what goes into the JSON file."""
    numel, checked = numel_of(shapes), checked_part(shapes)
    facts: dict[str, Any] = {"tensors": len(shapes), "numel": numel, "checked_numel": numel_of(checked), "jobs": {}}
    start = random_params(shapes, dtype)
    of_jobs, rows, roofs = {}, [], []
    for job in JOBS:
        title = f"{name}: {job.title}"
        gc.collect()  # the arms of the job before are cycles, and large
        of_jobs[job.name], bandwidth = run_job(job, start, checked, timing, title)
        rows += job_rows(job, of_jobs[job.name], timing.cold)
        roofs.append(" | ".join(f"{name} {gb:.1f}" for name, gb in bandwidth.items()))
        facts["jobs"][job.name] = {
            "bytes_per_param": job.bytes_per_param(dtype),
            "roofline_gb_per_s": bandwidth,
            "arms": {arm: asdict(result) for arm, result in of_jobs[job.name].items()},
        }
    note = (
        f"GB/s: the bytes that the job must move ({', '.join(str(job.bytes_per_param(dtype)) for job in JOBS)} per "
        f"parameter) over the median. Roofline: the faster of copy_ and add_ on {timing.roofline_mib} MiB during the "
        f"job, in GB/s: {', '.join(roofs)}. More than 100 %: from caches, or prefetched, which those two are not. "
        f"Error: the largest after {sgd_jobs.STEPS} steps, over the largest parameter, "
        f"against float64, on {numel_of(checked):,} of {numel:,} elements."
    )
    dtype_name = str(dtype).removeprefix("torch.")
    table_title = f"{name}: {len(shapes)} tensors, {numel:,} elements, {dtype_name}, {torch.get_num_threads()} threads"
    return of_jobs, model_table(table_title, rows, timing.cold, note), facts


if __name__ == "__main__":
    typer.run(main)
