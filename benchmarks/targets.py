"""What the CUDA kernels should reach, beside what was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks import launches as counts
from benchmarks import report
from benchmarks.cuda_timing import CLIP, DROPOUT, PENALTY, ratio
from benchmarks.step_jobs import CLIP_FUSED, JOBS, OURS, TUTORIAL_LOOP

COPY_SHARE = 0.90
LARGE = ("gpt2_124m", "flat_400m")  # at least 100 million parameters
LARGE_BLOCKS = [("gpt2_124m", CLIP), ("gpt2_124m", PENALTY), ("2^26", DROPOUT)]
LAUNCHES = 2
# model, job, peer, clock, how many times longer the peer should take
RATIOS = [
    ("gpt2_124m", "clip", CLIP_FUSED, "wall", 1.3),
    ("many_small_1000x1k", "clip", CLIP_FUSED, "wall", 10.0),
    ("mlp_251", "clip", CLIP_FUSED, "host", 4.0),
    ("gpt2_124m", "elastic_net", TUTORIAL_LOOP, "wall", 5.0),
    ("many_small_1000x1k", "elastic_net", TUTORIAL_LOOP, "wall", 50.0),
]


def table(timings: dict[str, Any], launches: dict[str, Any]) -> report.Table:
    rows = [*copy_rows(timings), *launch_rows(launches), *block_launch_rows(launches), *ratio_rows(timings)]
    note = "Speed has no influence on the exit status; '?' is what was not measured."
    return report.Table("Targets", ["target", "wanted", "seen", "reached"], rows, note)


def arms_of(timings: dict[str, Any], model: str, job: str, kind: str = "models") -> dict[str, Any]:
    return timings.get(kind, {}).get(model, {}).get("jobs", {}).get(job, {}).get("arms", {})


def copy_rows(timings: dict[str, Any]) -> Iterator[list[str]]:
    large = [(model, job, "models") for model in LARGE for job in JOBS]
    large += [(model, job, "blocks") for model, job in LARGE_BLOCKS]
    for model, job, kind in large:
        seen = arms_of(timings, model, job.name, kind).get(job.ours, {}).get("of_copy", math.nan)
        target = f"{model}, {job.title}: share of the bandwidth of copy_"
        yield row(target, f">= {100 * COPY_SHARE:.0f} %", f"{100 * seen:.1f} %", seen, seen >= COPY_SHARE)


def launch_rows(launches: dict[str, Any]) -> Iterator[list[str]]:
    """The largest number over all cases and models; a profiler that saw nothing at all has measured nothing."""
    blocks = {case.name for case in counts.BLOCKS}
    ours = [
        (name, case)
        for cases in launches.values()
        for name, case in cases.items()
        if name.startswith("regfused") and name not in blocks
    ]
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


def block_launch_rows(launches: dict[str, Any]) -> Iterator[list[str]]:
    """Kernels of regfused, by their names as the device recorded them: each block runs some of torch's as well, which
    are shown, such as the draw of a seed, or a norm in float32 made of one in float64.
    """
    for block in counts.BLOCKS:
        found = [cases[block.name] for cases in launches.values() if block.name in cases]
        good = bool(found) and all("problem" not in case and case["kernels"] > 0 for case in found)
        worst = max(found, key=lambda case: (case["waits"], abs(case["our kernels"] - block.launches))) if good else {}
        ours, waits, kernels = (worst.get(column, math.nan) for column in ("our kernels", "waits", "kernels"))
        shown = f"{ours:g}, {waits:g} (and {kernels - ours:g} of torch's)"
        target = f"launches of {block.name}, and calls in it that wait"
        yield row(target, f"{block.launches}, 0", shown, ours, ours == block.launches and waits == 0)


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
