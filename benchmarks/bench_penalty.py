"""Times a penalty in the loss, forward and backward, against every way to write it in torch."""

from __future__ import annotations

import typer

from benchmarks import cpu_targets, model_runs, report
from benchmarks.arms import Timing, us
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Models, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import DEFAULT_MODELS, read_models
from benchmarks.penalty_jobs import (
    AUTOGRAD_ALONE,
    BY_FOREACH,
    CAT,
    FOREACH_NORMS,
    IN_THE_STEP,
    JOBS,
    ONE_VECTOR,
    OURS,
    PENALTY,
    TWO_LINES,
    WITH,
    WITHOUT,
)

SUBJECT = Subject(
    "penalty",
    JOBS,
    per="parameter",
    error="the largest of a gradient over the largest gradient or of the value over the value; of the optimizer, of a "
    "parameter over the largest parameter after some steps",
    # Parameters and gradients; those of each arm; the copies and temporaries of an arm that makes one vector.
    copies=2 + max(len(PENALTY.ways), 2 * 3) + 5,
)

COLUMNS = {
    BY_FOREACH: "Function over lists",
    FOREACH_NORMS: "_foreach_norm",
    CAT: "cat, norm, dot",
    ONE_VECTOR: "lines on one vector",
    TWO_LINES: "two lines",
    AUTOGRAD_ALONE: "autograd alone",
}


def main(
    models: Models = DEFAULT_MODELS,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 20.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
) -> None:
    """Time regfused.penalty, forward and backward, against every way to write it in torch.

    Gradients are freed in each call before the forward pass, in every arm: they are new memory each time, as in a
    training loop, and no extra memory.
    """
    shapes_of = model_runs.chosen(models, read_models())
    runs = ModelRuns(SUBJECT, threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    title = f"Summary: how many times longer than {OURS}"
    note = f"Median time of the peer over the median time of {OURS}; extra KB: of {OURS}, beside the gradients."
    peers = [(PENALTY.name, name, column) for name, column in COLUMNS.items()]
    runs.show(model_runs.summary(runs, title, peers, note, extra_kb_of=PENALTY.name))
    runs.show(cost_table(runs))
    runs.show(cpu_targets.table({SUBJECT.stem: runs.results}))
    runs.write(out)


def cost_table(runs: ModelRuns) -> report.Table:
    """What a penalty adds, microseconds per step: in the loss, in the optimizer, and what autograd alone would."""
    rows = []
    for model, of_jobs in runs.found.items():
        in_loss, in_step = of_jobs[PENALTY.name], of_jobs[IN_THE_STEP.name]
        added = in_step[WITH].median_us - in_step[WITHOUT].median_us
        rows.append([model, *(us(in_loss[name].median_us) for name in (TWO_LINES, OURS, AUTOGRAD_ALONE)), us(added)])
    note = (
        f"The last column: {WITH}, less {WITHOUT}, a difference of two medians that may be noise. {AUTOGRAD_ALONE}: a "
        "node in Python over all tensors that hands out gradients which are there already; the limit of what such a "
        "node can do. Added to gradients that the loss has given, a penalty in the loss takes one more pass."
    )
    columns = ["model", TWO_LINES, OURS, AUTOGRAD_ALONE, "in regfused.SGD"]
    return report.Table("What a penalty costs, microseconds", columns, rows, note)


if __name__ == "__main__":
    typer.run(main)
