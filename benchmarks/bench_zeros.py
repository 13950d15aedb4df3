"""Times what makes and keeps zeros under Adam: a group lasso in the metric of its step, and `keep_zeros`."""

from __future__ import annotations

import typer

from benchmarks import cpu_targets, model_runs
from benchmarks.arms import Timing
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Models, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import read_models
from benchmarks.zeros_jobs import GROUP_COLUMNS, GROUP_ROWS, JOBS, KEEP_ZEROS, MASK, OURS, TORCH, WITHOUT

SUBJECT = Subject(
    "zeros",
    JOBS,
    per="parameter",
    error="the largest after 3 steps, over the largest parameter",
    # Param, grad and state of each arm; the start; a mask or temporaries.
    copies=4 * max(len(job.ways) for job in JOBS) + 2 + 3,
)
PEERS = [
    (GROUP_ROWS.name, WITHOUT, "rows: without"),
    (GROUP_ROWS.name, TORCH, "rows: torch operations"),
    (GROUP_COLUMNS.name, WITHOUT, "columns: without"),
    (GROUP_COLUMNS.name, TORCH, "columns: torch operations"),
    (KEEP_ZEROS.name, WITHOUT, "zeros that stay: without"),
    (KEEP_ZEROS.name, MASK, "zeros that stay: mask"),
]


def main(
    models: Models = "mlp_251,large_layers",
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 30.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
) -> None:
    """Time a group lasso and zeros that stay under regfused.Adam, against Adam without and torch operations."""
    shapes_of = model_runs.chosen(models, read_models())
    runs = ModelRuns(SUBJECT, threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    title = f"Summary: how many times as long as {OURS}"
    note = f"Median time of the peer over the median time of {OURS}: below 1, the option costs time."
    runs.show(model_runs.summary(runs, title, PEERS, note, extra_kb_of=GROUP_COLUMNS.name))
    runs.show(cpu_targets.table({SUBJECT.stem: runs.results}))
    runs.write(out)


if __name__ == "__main__":
    typer.run(main)
