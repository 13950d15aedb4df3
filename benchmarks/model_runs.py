"""Runs the jobs of a benchmark on one set of tensors after the other, shows a table of each, and writes the results."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import arms, harness, memory, models, report
from benchmarks.arms import Results, Timing
from benchmarks.job import Job
from benchmarks.models import DTYPES, Shapes

Models = Annotated[str, typer.Option(help="names in shapes.json, separated by commas, 'in_cache' or 'all'")]
Threads = Annotated[int, typer.Option(min=1)]
Dtype = Annotated[str, typer.Option(help=", ".join(DTYPES))]
Seconds = Annotated[float, typer.Option(min=0.1, help="budget for the timed calls of each table")]
Out = Annotated[Path | None, typer.Option(help="folder for the result files, .json and .md")]
Cold = Annotated[bool, typer.Option(help="also time single calls after the caches were overwritten")]
RooflineMib = Annotated[int, typer.Option(min=1, help="size of the tensor whose copy is the roofline")]


@dataclass(frozen=True)
class Subject:
    """What a benchmark is about."""

    stem: str  # of the result files
    jobs: Sequence[Job]
    per: str  # what the bytes that must be moved are counted for: "parameter"
    error: str  # what the column of errors means
    copies: int  # of all tensors that the arms of one job need at the same time, at most
    sets: str = "models"  # in the JSON file


@dataclass
class ModelRuns:
    """The results so far; made with the options of a command."""

    subject: Subject
    threads: int
    dtype: str
    timing: Timing
    results: dict[str, Any] = field(init=False)
    tables: list[report.Table] = field(default_factory=list)
    found: dict[str, dict[str, Results]] = field(default_factory=dict)  # by model and job

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise typer.BadParameter(f"--dtype: one of {', '.join(DTYPES)} is demanded, but got {self.dtype!r}")
        torch.set_num_threads(self.threads)
        self.console = Console(width=180)
        facts = report.environment()
        self.results = {"environment": facts, "dtype": self.dtype, "seconds": self.timing.seconds}
        self.results[self.subject.sets] = {}
        self.show(report.environment_table(facts))

    def show(self, table: report.Table) -> None:
        self.tables.append(table)
        table.print(self.console)

    def run(self, shapes_of: dict[str, Shapes]) -> None:
        """All jobs on all sets of tensors, but for those that are too large for this machine."""
        for name, shapes in shapes_of.items():
            available = memory.available_bytes()
            if available is not None and self.needed_bytes(models.numel_of(shapes)) > available:
                self.console.print(f"{name}: skipped, its arms need more memory than is available")
                continue
            self.run_one(name, shapes)

    def needed_bytes(self, numel: int) -> int:
        rooflines = sum(roof.bytes_moved for roof in harness.rooflines(self.timing.roofline_mib))
        return numel * DTYPES[self.dtype].itemsize * self.subject.copies + rooflines

    def run_one(self, name: str, shapes: Shapes) -> None:
        dtype, jobs = DTYPES[self.dtype], self.subject.jobs
        numel, checked = models.numel_of(shapes), models.checked_part(shapes)
        facts: dict[str, Any] = {"tensors": len(shapes), "numel": numel, "checked_numel": models.numel_of(checked)}
        facts["jobs"] = {}
        start = models.random_params(shapes, dtype)
        rows, roofs = [], []
        self.found[name] = {}
        for job in jobs:
            gc.collect()  # the arms of the job before are cycles, and large
            seconds = self.timing.seconds / len(jobs)
            results, bandwidth = arms.run(job, start, checked, self.timing, seconds, f"{name}: {job.title}")
            self.found[name][job.name] = results
            rows += arms.rows(job, results, self.timing.cold)
            roofs.append(" | ".join(f"{roof} {gb:.1f}" for roof, gb in bandwidth.items()))
            facts["jobs"][job.name] = {
                "bytes_per_param": job.bytes_per_param(dtype),
                "roofline_gb_per_s": bandwidth,
                "arms": {arm: asdict(result) for arm, result in results.items()},
            }
        self.results[self.subject.sets][name] = facts
        bytes_moved = ", ".join(str(job.bytes_per_param(dtype)) for job in jobs)
        note = (
            f"GB/s: the bytes that the job must move ({bytes_moved} per {self.subject.per}) over the median. Roofline: "
            f"the faster of copy_ and add_ on {self.timing.roofline_mib} MiB during the job, in GB/s: "
            f"{', '.join(roofs)}. More than 100 %: from caches, or prefetched, which those two are not. "
            f"Error: {self.subject.error}, against float64, on {facts['checked_numel']:,} of {numel:,} elements."
        )
        tensors = f"{len(shapes)} tensor{'s' * (len(shapes) != 1)}"
        title = f"{name}: {tensors}, {numel:,} elements, {self.dtype}, {torch.get_num_threads()} threads"
        self.show(arms.table(title, rows, self.timing.cold, note))

    def write(self, out: Path | None) -> None:
        if out is not None:
            report.write(out, self.subject.stem, self.results, self.tables)


def chosen(names: str, known: dict[str, Shapes]) -> dict[str, Shapes]:
    listed = list(known) if names == "all" else [n for name in names.split(",") for n in models.SETS.get(name, (name,))]
    for name in listed:
        if name not in known:
            raise typer.BadParameter(f"--models: one of {', '.join(known)} is demanded, but got {name!r}")
    return {name: known[name] for name in listed}


def summary(
    runs: ModelRuns, title: str, peers: Sequence[tuple[str, str, str]], note: str, extra_kb_of: str
) -> report.Table:
    """How many times longer than regfused; `peers`: job, arm and column, `extra_kb_of`: the job whose memory shows."""

    def cells(of_jobs: dict[str, Results]) -> list[str]:
        times = [f"{of_jobs[job][arm].times_regfused:.2f}" for job, arm, _ in peers]
        ours = next(iter(of_jobs[extra_kb_of].values()))
        return [*times, arms.kb(ours.extra_kb)]

    rows = [[name, *cells(of_jobs)] for name, of_jobs in runs.found.items()]
    columns = [runs.subject.sets.removesuffix("s"), *(column for *_, column in peers), "extra KB"]
    return report.Table(title, columns, rows, note)
