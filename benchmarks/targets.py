"""What the CUDA step should reach, beside what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks import report
from benchmarks.cuda_timing import ratio
from benchmarks.sgd_jobs import CLIP_FUSED, JOBS, OURS, SEED_LOOP

COPY_SHARE = 0.90
LARGE = ("gpt2_124m", "flat_400m")  # at least 100 million parameters
LAUNCHES = 2
# model, job, peer, clock, how many times longer the peer should take
RATIOS = [
    ("gpt2_124m", "clip", CLIP_FUSED, "wall", 1.3),
    ("many_small_1000x1k", "clip", CLIP_FUSED, "wall", 10.0),
    ("mlp_seed", "clip", CLIP_FUSED, "host", 4.0),
    ("gpt2_124m", "elastic_net", SEED_LOOP, "wall", 5.0),
    ("many_small_1000x1k", "elastic_net", SEED_LOOP, "wall", 50.0),
]


def table(timings: dict[str, Any], launches: dict[str, Any]) -> report.Table:
    rows = [*copy_rows(timings), *launch_rows(launches), *ratio_rows(timings)]
    note = "Speed has no influence on the exit status; '?' is what was not measured."
    return report.Table("Targets", ["target", "wanted", "seen", "reached"], rows, note)


def arms_of(timings: dict[str, Any], model: str, job: str) -> dict[str, Any]:
    return timings.get("models", {}).get(model, {}).get("jobs", {}).get(job, {}).get("arms", {})


def copy_rows(timings: dict[str, Any]) -> Iterator[list[str]]:
    for model in LARGE:
        for job in JOBS:
            seen = arms_of(timings, model, job.name).get(OURS, {}).get("of_copy", math.nan)
            target = f"{model}, {job.title}: share of the bandwidth of copy_"
            yield row(target, f">= {100 * COPY_SHARE:.0f} %", f"{100 * seen:.1f} %", seen, seen >= COPY_SHARE)


def launch_rows(launches: dict[str, Any]) -> Iterator[list[str]]:
    """The largest number over all cases and models; a profiler that saw nothing at all has measured nothing."""
    ours = [(name, case) for cases in launches.values() for name, case in cases.items() if name.startswith("regfused")]
    good = bool(ours) and all("problem" not in case and launched(case) for _, case in ours)

    def largest(*columns: str) -> float:
        return max(sum(case[column] for column in columns) for _, case in ours) if good else math.nan

    kernels = max(launched(case) for _, case in ours) if good else math.nan
    waits, others = largest("waits"), largest("copies", "fills")
    witnesses = {case["torch's own witness"] for _, case in ours} if good else set()
    yield row("launches of a regfused step, any case", f"<= {LAUNCHES}", f"{kernels:g}", kernels, kernels <= LAUNCHES)
    yield row("calls in it that wait for the device", "0", f"{waits:g}", waits, waits == 0)
    yield row("copies and fills in it", "0", f"{others:g}", others, others == 0)
    said = "; ".join(sorted(witnesses)) or "?"
    reached = ("yes" if witnesses == {"none"} else "no") if good else "?"
    yield ["waits that torch's own witness saw in it", "none", said, reached]


def launched(case: dict[str, Any]) -> float:
    """As the device recorded it, or the host where the profiler does not see the device."""
    return case["kernels"] or case["launch calls"]


def ratio_rows(timings: dict[str, Any]) -> Iterator[list[str]]:
    for model, job, peer, clock, wanted in RATIOS:
        arms = arms_of(timings, model, job)
        seen = ratio(arms.get(peer, {}), arms.get(OURS, {}), clock)
        target = f"{model}, {job}, {clock}: {peer} over regfused.SGD"
        yield row(target, f">= {wanted:g}", f"{seen:.2f}", seen, seen >= wanted)


def row(target: str, wanted: str, shown: str, seen: float, reached: bool) -> list[str]:
    if math.isnan(seen):
        return [target, wanted, "?", "?"]
    return [target, wanted, shown, "yes" if reached else "no"]
