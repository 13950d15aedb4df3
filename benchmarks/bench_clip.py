"""Times gradient clipping and the norm of all gradients against every way to do them in torch."""

from __future__ import annotations

import typer

from benchmarks import cpu_targets, model_runs
from benchmarks.arms import Timing
from benchmarks.clip_jobs import CLIP, FOREACH, JOBS, NORM, NOTHING_TO_CLIP, OURS, TORCH, TORCH_NORM
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Models, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import DEFAULT_MODELS, read_models

SUBJECT = Subject(
    "clip",
    JOBS,
    per="parameter",
    error="the largest of a gradient over the largest gradient, or of the norm over the norm",
    # Param and grad of each arm, and of the start; and the temporaries of foreach=True.
    copies=2 * max(len(job.ways) for job in JOBS) + 2 + 1,
)
PEERS = [
    (CLIP.name, TORCH, "clip: torch"),
    (CLIP.name, FOREACH, "clip: foreach=True"),
    (NOTHING_TO_CLIP.name, TORCH, "nothing to clip: torch"),
    (NORM.name, TORCH_NORM, "norm: torch"),
]


def main(
    models: Models = DEFAULT_MODELS,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 20.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
) -> None:
    """Time regfused.clip_grad_norm_ and regfused.grad_norm against every way to do the same in torch.

    Gradients are really clipped in each call, in every arm: max_norm is a little below the norm that they have, and a
    little lower in each call. Where there is nothing to clip is a job of its own: regfused spares a pass there.
    """
    shapes_of = model_runs.chosen(models, read_models())
    runs = ModelRuns(SUBJECT, threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    title = f"Summary: how many times longer than {OURS}, the norm: than regfused.grad_norm"
    note = f"Median time of the peer over the median time of regfused; extra KB: of {OURS} where it clips."
    runs.show(model_runs.summary(runs, title, PEERS, note, extra_kb_of=CLIP.name))
    runs.show(cpu_targets.table({SUBJECT.stem: runs.results}))
    runs.write(out)


if __name__ == "__main__":
    typer.run(main)
