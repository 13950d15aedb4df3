"""Runs the arms of one job side by side on the CPU, and makes a row of a table of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks import harness, memory, models, report
from benchmarks.harness import Arm, Measurement
from benchmarks.job import Call, Job


@dataclass(frozen=True)
class Timing:
    """How to time: the budget for all jobs of one model, and whether with single calls on cold caches."""

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
    error: float | None


Results = dict[str, ArmResult]


def run(
    job: Job, start: list[Tensor], checked: models.Shapes, timing: Timing, seconds: float, title: str
) -> tuple[Results, dict[str, float]]:
    """A result per arm, and the bandwidth of the rooflines in GB/s."""
    dtype = start[0].dtype
    errors = {name: job.error(name, checked, dtype) for name in job.ways}
    bytes_moved = job.bytes_per_param(dtype) * sum(p.numel() for p in start)
    moved: dict[str, list[Tensor]] = {}
    extra_kb: dict[str, int | None] = {}

    def arm(name: str) -> Arm:
        def setup() -> Call:
            call, moved[name] = job.setup(name, start)
            extra_kb[name] = memory.extra_peak_kb(call)
            return call

        return Arm(name, setup, bytes_moved)

    roofs = harness.rooflines(timing.roofline_mib)
    measured = harness.measure([arm(name) for name in job.ways], seconds, cold=timing.cold, roofs=roofs, title=title)
    for name, tensors in moved.items():
        models.check_ordinary(name, tensors)
    bandwidth = {roof.name: measured[roof.name].gb_per_s for roof in roofs}
    limit, ours = max(bandwidth.values()), measured[job.ours]
    results = {name: arm_result(measured[name], ours, limit, extra_kb[name], errors[name]) for name in job.ways}
    return results, bandwidth


def arm_result(m: Measurement, ours: Measurement, roof: float, extra_kb: int | None, error: float | None) -> ArmResult:
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


def rows(job: Job, results: Results, cold: bool) -> list[list[str]]:
    found = []
    for name, r in results.items():
        row = [job.name, name, us(r.median_us), f"{us(r.p25_us)} - {us(r.p75_us)}"]
        if cold:
            row.append("" if r.cold_us is None else us(r.cold_us))
        share, times = f"{100 * r.roofline_share:.0f} %", f"{r.times_regfused:.2f}"
        error = "" if r.error is None else f"{r.error:.0e}"
        found.append([*row, f"{r.gb_per_s:.1f}", share, times, kb(r.extra_kb), error])
    return found


def table(title: str, of_arms: list[list[str]], cold: bool, note: str) -> report.Table:
    columns = ["job", "arm", "median us", "quartiles"] + ["cold us"] * cold
    columns += ["GB/s", "of roofline", "x regfused", "extra KB", "error"]
    return report.Table(title, columns, of_arms, note, names=2)


def us(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def kb(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
