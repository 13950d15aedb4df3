"""Times steps and building blocks on a GPU three ways at once.

Between events, until the call returns, and until the device is done.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks import clip_jobs, dropout_jobs, harness, memory, penalty_jobs, report, step_jobs
from benchmarks.arms import us
from benchmarks.harness import Call
from benchmarks.job import Job
from benchmarks.models import checked_part, numel_of, random_params, read_models, reduced
from benchmarks.step_jobs import CLIP_FUSED, CLIP_GRAD_SCALE, FUSED, JOBS, OURS, TUTORIAL_LOOP, TUTORIAL_LOOP_FUSED

# A few large tensors: what the step does where nothing but memory matters, and where nothing but launching does; and
# what dropout is timed on.
FLAT = {"flat_400m": [[100_000_000]] * 4, "flat_1m": [[250_000]] * 4, "2^20": [[2**20]], "2^26": [[2**26]]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# In the order of what would be missed most, should the time run out.
RUNS = [
    ("gpt2_124m", "float32"),
    ("many_small_1000x1k", "float32"),
    ("mlp_251", "float32"),
    ("flat_400m", "float32"),
    ("resnet50", "float32"),
    ("gpt2_124m", "bfloat16"),
    ("flat_1m", "float32"),
]
# Last, because a capture that fails can leave the device unusable.
REPLAYED = [("gpt2_124m", "float32"), ("many_small_1000x1k", "float32"), ("mlp_251", "float32")]
REPLAYED_WAYS = (OURS, CLIP_FUSED)
CLOCKS = ("wall", "device", "host")

# The building blocks, each with the peers that matter most on a GPU.
PENALTY, CLIP, NORM, DROPOUT = penalty_jobs.PENALTY, clip_jobs.CLIP, clip_jobs.NORM, dropout_jobs.JOBS[0]
BLOCKS = {
    PENALTY: (
        penalty_jobs.OURS,
        penalty_jobs.BY_FOREACH,
        penalty_jobs.TWO_LINES,
        penalty_jobs.AUTOGRAD_ALONE,
    ),
    CLIP: (clip_jobs.OURS, clip_jobs.FOREACH),
    NORM: (clip_jobs.OURS_NORM, clip_jobs.TORCH_NORM),
    DROPOUT: (dropout_jobs.OURS, dropout_jobs.TORCH),
}
BLOCK_RUNS: list[tuple[str, tuple[Job, ...]]] = [
    ("gpt2_124m", (CLIP, PENALTY, NORM)),
    ("2^26", (DROPOUT,)),
    ("many_small_1000x1k", (CLIP, PENALTY)),
    ("2^20", (DROPOUT,)),
    ("mlp_251", (CLIP, PENALTY)),
]

MAX_CALLS = 200  # in a sample: two launches each leave the queue of launches (about 1000) unfilled
CHECKED_TENSORS = 200


@dataclass(frozen=True)
class Pace:
    """How much to measure."""

    block_seconds: float  # of calls in one sample
    min_rounds: int
    roofline_mib: int


# Blocks that are long beside the events and the synchronization around them; roofline tensors far larger than the L2.
USUAL = Pace(4e-3, 5, 1024)
REHEARSED = Pace(2e-4, 2, 1)


@dataclass
class Contender:
    """An arm that is set up: what to call, how often in a sample, and its samples in microseconds per call."""

    name: str
    call: Call
    calls: int
    samples: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})
    problem: str = ""

    def median(self, clock: str) -> float:
        return float(np.median(self.samples[clock]))

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"samples": len(self.samples["wall"]), "calls_per_sample": self.calls}
        for clock, values in self.samples.items():
            low, middle, high = np.percentile(values, [25, 50, 75]).tolist()
            found[clock] = {"median_us": middle, "p25_us": low, "p75_us": high}
        return found


# --- Clocks ---------------------------------------------------------------------------------------


def sample(call: Call, calls: int, device: str) -> dict[str, float]:
    """Microseconds per call by each clock; on a CPU, where nothing runs behind the call, by one clock."""
    repeats = itertools.repeat(None, calls)
    if device != "cuda":
        start = time.perf_counter_ns()
        for _ in repeats:
            call()
        return dict.fromkeys(CLOCKS, (time.perf_counter_ns() - start) / 1e3 / calls)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    first.record()
    for _ in repeats:
        call()
    last.record()
    returned = time.perf_counter_ns()
    torch.cuda.synchronize()
    done = time.perf_counter_ns()
    return {
        "wall": (done - start) / 1e3 / calls,
        "device": first.elapsed_time(last) * 1e3 / calls,
        "host": (returned - start) / 1e3 / calls,
    }


def contender(name: str, call: Call, device: str, pace: Pace) -> Contender:
    """With as many calls per sample as fill the block, and all state allocated."""
    for _ in range(3):
        call()
    took = sample(call, 3, device)["wall"] * 1e-6
    return Contender(name, call, min(max(1, round(pace.block_seconds / took)), MAX_CALLS))


def take_turns(contenders: list[Contender], seconds: float, device: str, pace: Pace, seed: int = 0) -> None:
    """Rounds in shuffled order until the time is used up; a contender that raises is out of the race."""
    order = random.Random(seed)
    running = list(contenders)
    start = time.perf_counter()
    gc.disable()
    try:
        for n in itertools.count():
            if n >= pace.min_rounds and time.perf_counter() - start >= seconds:
                return
            order.shuffle(running)
            for c in list(running):
                try:
                    c.call()  # brings back what the others have driven out of the caches
                    taken = sample(c.call, c.calls, device)
                except Exception as error:
                    c.problem = problem_of(error)
                    running.remove(c)
                    continue
                for clock, value in taken.items():
                    c.samples[clock].append(value)
    finally:
        gc.enable()


def problem_of(error: Exception) -> str:
    return f"{type(error).__name__}: {report.cell(str(error))}"


# --- Arms -----------------------------------------------------------------------------------------


def replayed(step: Call, device: str) -> Call:
    """The step as a CUDA graph: one launch, without the host's work."""
    if device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(keep: Call = step) -> None:  # the graph does not hold the tensors that it works on
        graph.replay()

    return replay


def extra_kb(step: Call, device: str) -> int | None:
    """The peak of memory that a step needs beyond what is allocated before it."""
    if device != "cuda":
        return memory.extra_peak_kb(step, repeats=1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) // 1024


def run_job(
    job: Job, ways: Iterable[str], start: list[Tensor], seconds: float, device: str, pace: Pace, *, replay: bool
) -> dict[str, Any]:
    """What goes into the JSON file for one job on one model."""
    dtype = start[0].dtype
    checked = checked_part([list(p.shape) for p in start])[:CHECKED_TENSORS]
    bytes_moved = job.bytes_per_param(dtype) * sum(p.numel() for p in start)
    arms: dict[str, dict[str, Any]] = {}
    contenders = []
    for name in ways:
        arms[name] = {}
        try:
            if not replay:
                arms[name]["error"] = job.error(name, checked, dtype, device)
            step, _ = job.setup(name, start)
            if not replay:
                arms[name]["extra_kb"] = extra_kb(step, device)
            contenders.append(contender(name, replayed(step, device) if replay else step, device, pace))
        except Exception as error:
            arms[name]["problem"] = problem_of(error)
    roofs = harness.rooflines(pace.roofline_mib, device)
    racing = contenders + [contender(roof.name, roof.setup(), device, pace) for roof in roofs]
    take_turns(racing, seconds, device, pace)

    roofline = {
        roof.name: roof.bytes_moved / c.median("device") / 1e3
        for roof, c in zip(roofs, racing[len(contenders) :], strict=True)
        if not c.problem
    }
    for c in contenders:
        if c.problem:
            arms[c.name]["problem"] = c.problem
            continue
        arms[c.name] |= c.summary()
        arms[c.name]["gb_per_s"] = bytes_moved / c.median("device") / 1e3
        if "copy_" in roofline:
            arms[c.name]["of_copy"] = arms[c.name]["gb_per_s"] / roofline["copy_"]
    return {
        "title": job.title,
        "ours": job.ours,
        "bytes_per_param": job.bytes_per_param(dtype),
        "checked_numel": numel_of(checked),
        "roofline_gb_per_s": roofline,
        "arms": arms,
    }


# --- Tables ---------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> list[report.Table]:
    """The ratios of all models, then every arm of every model; then the building blocks alike."""
    found = [*summaries(results), *(model_table(name, model) for name, model in results["models"].items())]
    blocks = results.get("blocks", {})
    if blocks:
        found.append(blocks_summary(blocks))
    return [*found, *(model_table(f"{name}, building blocks", model) for name, model in blocks.items())]


def model_table(name: str, model: dict[str, Any]) -> report.Table:
    rows = []
    for job_name, job in model["jobs"].items():
        ours = job["arms"].get(job["ours"], {})
        for arm_name, arm in job["arms"].items():
            rows.append([job_name, arm_name, *arm_cells(arm, ours)])
    columns = ["job", "arm", "wall us", "quartiles", "between events us", "host us", "GB/s", "of copy_"]
    columns += ["wall x regfused", "host x regfused", "extra KB", "error"]
    roofs = [
        ", ".join(f"{roof} {gb:,.0f}" for roof, gb in job["roofline_gb_per_s"].items())
        for job in model["jobs"].values()
    ]
    note = (
        f"{model['holds']}: {model['working_set_mib']:,.1f} MiB. {model['caches']} "
        "Wall: many calls, then one synchronization. Host: the same calls without it, events and all. GB/s: the bytes "
        f"that the job must move ({', '.join(str(job['bytes_per_param']) for job in model['jobs'].values())} per "
        f"element) over the time between events. Rooflines in the same rounds, GB/s: {'; '.join(roofs)}. "
        f"{model['error']}"
    )
    title = f"{name}: {model['tensors']:,} tensors, {model['numel']:,} elements, {model['dtype']}"
    return report.Table(title, columns, rows, note, names=2)


def arm_cells(arm: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    error = f"{arm['error']:.0e}" if arm.get("error") is not None else ""
    if "problem" in arm:
        return [arm["problem"], *[""] * 8, error]
    wall = arm["wall"]
    return [
        us(wall["median_us"]),
        f"{us(wall['p25_us'])} - {us(wall['p75_us'])}",
        us(arm["device"]["median_us"]),
        us(arm["host"]["median_us"]),
        f"{arm['gb_per_s']:,.4g}",
        f"{100 * arm['of_copy']:.1f} %" if "of_copy" in arm else "",
        times(arm, ours, "wall"),
        times(arm, ours, "host"),
        "" if arm.get("extra_kb") is None else f"{arm['extra_kb']:,}",
        error,
    ]


def ratio(arm: dict[str, Any], ours: dict[str, Any], clock: str) -> float:
    """How many times longer than regfused; NaN where either was not measured."""
    if clock not in arm or clock not in ours:
        return math.nan
    return arm[clock]["median_us"] / ours[clock]["median_us"]


def times(arm: dict[str, Any], ours: dict[str, Any], clock: str) -> str:
    value = ratio(arm, ours, clock)
    return "" if math.isnan(value) else f"{value:.2f}"


PEERS = [
    ("step", FUSED),
    ("clip", CLIP_GRAD_SCALE),
    ("clip", CLIP_FUSED),
    ("elastic_net", TUTORIAL_LOOP_FUSED),
    ("elastic_net", TUTORIAL_LOOP),
]


def summaries(results: dict[str, Any]) -> list[report.Table]:
    found = []
    for clock, title in (("wall", "Wall clock per step"), ("host", "Host time per step")):
        rows = []
        for name, model in results["models"].items():
            cells = []
            for job, peer in PEERS:
                arms = model["jobs"].get(job, {"arms": {}})["arms"]
                cells.append(times(arms.get(peer, {}), arms.get(OURS, {}), clock))
            own = [job["arms"].get(OURS, {}) for job in model["jobs"].values()]
            cells.append(", ".join(us(arm[clock]["median_us"]) for arm in own if clock in arm))
            cells.append(", ".join(f"{100 * arm['of_copy']:.0f}" for arm in own if "of_copy" in arm))
            rows.append([name, *cells])
        columns = ["parameters", "step: fused", "clip: scale + fused", "clip: clip_ + fused"]
        columns += ["net: in loss, fused", "net: in loss", "regfused us", "% of copy_"]
        note = (
            "Medians of the peer over medians of regfused.SGD, whose microseconds and share of the bandwidth of copy_ "
            f"are listed job by job. Peers: {'; '.join(peer for _, peer in PEERS)}."
        )
        found.append(report.Table(f"{title}: how many times longer than regfused.SGD", columns, rows, note))
    return found


def blocks_summary(blocks: dict[str, Any]) -> report.Table:
    rows = []
    for name, model in blocks.items():
        for job_name, job in model["jobs"].items():
            ours = job["arms"].get(job["ours"], {})
            clocks = [us(ours[clock]["median_us"]) if clock in ours else "?" for clock in ("wall", "host")]
            share = f"{100 * ours['of_copy']:.1f} %" if "of_copy" in ours else "?"
            others = [(peer, arm) for peer, arm in job["arms"].items() if peer != job["ours"]]
            seen = "; ".join(f"{peer} {times(arm, ours, 'wall') or '?'}" for peer, arm in others)
            rows.append([name, job_name, seen, *clocks, share])
    note = "Medians of wall clock of each peer over those of regfused, whose microseconds are in the next columns."
    columns = ["tensors", "job", "how many times longer than regfused", "wall us", "host us", "of copy_"]
    return report.Table("Building blocks: wall clock per call", columns, rows, note, names=3)


# --- The command ----------------------------------------------------------------------------------


def shapes_of(model: str, small: bool) -> list[list[int]]:
    if model in FLAT:
        return [[size // 10_000 for size in shape] for shape in FLAT[model]] if small else FLAT[model]
    shapes = read_models()[model]
    return reduced(shapes) if small else shapes


STEP_ERROR = f"Error: the largest after {step_jobs.STEPS} steps, over the largest parameter, against float64."
BLOCK_ERROR = "Error: the largest of a result over the largest result, against float64."


def about(shapes: list[list[int]], dtype: torch.dtype, device: str, *, steps: bool) -> dict[str, Any]:
    mib = (3 if steps else 2) * dtype.itemsize * numel_of(shapes) / 2**20
    caches = ""
    if device == "cuda":
        l2 = torch.cuda.get_device_properties(0).L2_cache_size / 2**20
        caches = f"L2 of {l2:.0f} MiB " + (
            "holds all of it: its bandwidth is measured, not the memory's." if mib < l2 else "holds a part of it."
        )
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(shapes),
        "numel": numel_of(shapes),
        "holds": "Parameters, gradients and momentum buffers" if steps else "Tensors and their gradients",
        "working_set_mib": mib,
        "error": STEP_ERROR if steps else BLOCK_ERROR,
        "caches": caches,
        "jobs": {},
    }


def release(device: str) -> None:
    """The arms of the job before are cycles, and large."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def main(
    device: Annotated[str, typer.Option()],
    out: Annotated[Path, typer.Option()],
    seconds: Annotated[float, typer.Option(min=0.1, help="for everything")] = 150.0,
    small: Annotated[bool, typer.Option(help="a few small tensors of each model; no job is left out")] = False,
) -> None:
    """Time every job on every model; the JSON file is written after each job."""
    deadline = time.monotonic() + seconds
    pace = REHEARSED if small else USUAL
    plan: list[tuple[str, str, dict[Job, Iterable[str]], str]]
    plan = [(*run, {job: job.ways for job in JOBS}, "models") for run in RUNS]
    plan += [(model, "float32", {job: BLOCKS[job] for job in jobs}, "blocks") for model, jobs in BLOCK_RUNS]
    plan += [(*run, {job: REPLAYED_WAYS for job in JOBS if job.name == "clip"}, "replayed") for run in REPLAYED]
    left = sum(len(jobs) for *_, jobs, _ in plan)
    results: dict[str, Any] = {"models": {}, "blocks": {}, "skipped": []}
    for model, dtype_name, jobs, kind in plan:
        replay = kind == "replayed"
        shapes, dtype = shapes_of(model, small), DTYPES[dtype_name]
        name = model + ("" if dtype_name == "float32" else f", {dtype_name}") + (", CUDA graph" if replay else "")
        facts = about(shapes, dtype, device, steps=kind != "blocks")
        start = random_params(shapes, dtype, device)
        for job, ways in jobs.items():
            share = (deadline - time.monotonic()) / left
            left -= 1
            if share <= 0 and not small:
                results["skipped"].append(f"{name}: {job.name}")
                continue
            results["blocks" if kind == "blocks" else "models"][name] = facts
            try:
                facts["jobs"][job.name] = run_job(job, ways, start, share, device, pace, replay=replay)
            except Exception as error:  # such as no memory for the rooflines
                facts["jobs"][job.name] = failed_job(job, dtype, problem_of(error))
            release(device)
            report.write_whole(out, json.dumps(results))
        print(f"{name}: {', '.join(facts['jobs']) or 'no time left'}", flush=True)
        del start
        release(device)
    report.write_whole(out, json.dumps(results))


def failed_job(job: Job, dtype: torch.dtype, problem: str) -> dict[str, Any]:
    return {
        "title": job.title,
        "ours": job.ours,
        "bytes_per_param": job.bytes_per_param(dtype),
        "checked_numel": 0,
        "roofline_gb_per_s": {},
        "arms": {"all": {"problem": problem}},
    }


if __name__ == "__main__":
    typer.run(main)
