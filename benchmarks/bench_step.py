"""Times a step of an optimizer on the parameter shapes of real models, against every way to do the same in torch."""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks import model_runs, step_jobs
from benchmarks.arms import Timing
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Models, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import DEFAULT_MODELS, read_models
from benchmarks.step_jobs import (
    CLIP_FUSED,
    CLIP_GRAD_SCALE,
    FUSED,
    OPTIMIZERS,
    TUTORIAL_LOOP_FUSED,
    jobs_of,
    tutorial_loop,
)


def subject(optimizer: str, stem: str) -> Subject:
    jobs = jobs_of(optimizer)
    return Subject(
        stem,
        jobs,
        per="parameter",
        error=f"the largest after {step_jobs.STEPS} steps, over the largest parameter",
        # Param, grad and state of each arm; the start; and what autograd holds for a penalty in the loss.
        copies=(2 + OPTIMIZERS[optimizer].slots) * max(len(job.ways) for job in jobs) + 2 + 3,
    )


def peers(optimizer: str) -> list[tuple[str, str, str]]:
    return [
        ("step", FUSED, "step: fused"),
        ("clip", CLIP_GRAD_SCALE, "clip: grad_scale + fused"),
        ("clip", CLIP_FUSED, "clip: clip_grad_norm_ + fused"),
        ("elastic_net", TUTORIAL_LOOP_FUSED, "elastic net: in loss, fused"),
        ("elastic_net", tutorial_loop(optimizer), "elastic net: in loss"),
    ]


def main(
    optimizer: Annotated[str, typer.Option(help=f"one of {', '.join(OPTIMIZERS)}")] = "sgd",
    models: Models = DEFAULT_MODELS,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 40.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
    stem: Annotated[str, typer.Option(help="name of the result files, without the end; else the optimizer's")] = "",
) -> None:
    """Time a step against every way to do the same in torch, and show the error beside the time."""
    if optimizer not in OPTIMIZERS:
        raise typer.BadParameter(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, but is {optimizer!r}")
    shapes_of = model_runs.chosen(models, read_models())
    runs = ModelRuns(subject(optimizer, stem or optimizer), threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    ours = jobs_of(optimizer)[0].ours
    title = f"Summary: how many times longer than {ours}"
    note = f"Median time of the peer over the median time of {ours}; extra KB: of {ours} with elastic net."
    runs.show(model_runs.summary(runs, title, peers(optimizer), note, extra_kb_of="elastic_net"))
    runs.write(out)


if __name__ == "__main__":
    typer.run(main)
