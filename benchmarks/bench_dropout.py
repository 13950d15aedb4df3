"""Times dropout, forward and backward, on tensors of several sizes, against torch's and masks made by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from benchmarks import cpu_targets, model_runs, report
from benchmarks.arms import Timing
from benchmarks.dropout_jobs import BERNOULLI, JOBS, OURS, RAND, TORCH, WHERE
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import DTYPES

SUBJECT = Subject(
    "dropout",
    JOBS,
    per="element",
    error="the largest of output or gradient, over the largest of them, given the mask that the output shows",
    # Input and gradient of each arm; the start; and masks and products.
    copies=2 * len(JOBS[0].ways) + 2 + 4,
    sets="sizes",
)

KEPT_NUMEL = 2**20
COLUMNS = {TORCH: "torch", BERNOULLI: "bernoulli_", RAND: "rand", WHERE: "where"}


def main(
    sizes: Annotated[str, typer.Option(help="elements as powers of two, separated by commas")] = "2^14,2^20,2^24",
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 15.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
) -> None:
    """Time regfused.Dropout, forward and backward, against torch.nn.Dropout and masks made by hand.

    Masks differ from arm to arm, so the error is that of the elements that are kept, and how many are kept stands in a
    table of its own.
    """
    shapes_of = {size: [[numel_of(size)]] for size in sizes.split(",")}
    runs = ModelRuns(SUBJECT, threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    title = f"Summary: how many times longer than {OURS}"
    note = f"Median time of the peer over the median time of {OURS}; extra KB: of {OURS} with {JOBS[0].name}."
    peers = [(job.name, name, f"{job.name}: {column}") for job in JOBS for name, column in COLUMNS.items()]
    runs.show(model_runs.summary(runs, title, peers, note, extra_kb_of=JOBS[0].name))
    runs.show(kept_table(runs))
    runs.show(cpu_targets.table({SUBJECT.stem: runs.results}))
    runs.write(out)


def numel_of(size: str) -> int:
    base, power, exponent = size.partition("^")
    if (base, power) != ("2", "^") or not exponent.isdigit() or not 4 <= int(exponent) <= 32:
        raise typer.BadParameter(f"--sizes: powers from 2^4 to 2^32 are demanded, but got {size!r}")
    return 2 ** int(exponent)


def kept_table(runs: ModelRuns) -> report.Table:
    shapes = [[KEPT_NUMEL]]
    rows, facts = [], {}
    for job in JOBS:
        found = {name: job.kept(name, shapes, DTYPES[runs.dtype]) for name in job.ways}
        facts[job.name] = {name: asdict(kept) | {"deviations": kept.deviations} for name, kept in found.items()}
        rows += [[job.name, name, f"{kept.share:.5f}", f"{kept.deviations:+.2f}"] for name, kept in found.items()]
    runs.results["kept"] = facts
    note = "Standard deviations of the number of elements that are kept from its expected value, for one seed."
    columns = ["job", "arm", "kept share", "off by, deviations"]
    return report.Table(f"Elements that are kept, of {KEPT_NUMEL:,}", columns, rows, note, names=2)


if __name__ == "__main__":
    typer.run(main)
