"""Times an SGD step on the parameter shapes of real models, against every way to do the same in torch."""

from __future__ import annotations

import typer

from benchmarks import model_runs, step_jobs
from benchmarks.arms import Timing
from benchmarks.model_runs import Cold, Dtype, ModelRuns, Models, Out, RooflineMib, Seconds, Subject, Threads
from benchmarks.models import DEFAULT_MODELS, read_models
from benchmarks.step_jobs import CLIP_FUSED, CLIP_GRAD_SCALE, FUSED, JOBS, OURS, SEED_LOOP, SEED_LOOP_FUSED

SUBJECT = Subject(
    "sgd",
    JOBS,
    per="parameter",
    error=f"the largest after {step_jobs.STEPS} steps, over the largest parameter",
    # Param, grad and momentum buffer of each arm; the start; and what autograd holds for a penalty in the loss.
    copies=3 * max(len(job.ways) for job in JOBS) + 2 + 3,
)
PEERS = [
    ("step", FUSED, "step: fused"),
    ("clip", CLIP_GRAD_SCALE, "clip: grad_scale + fused"),
    ("clip", CLIP_FUSED, "clip: clip_grad_norm_ + fused"),
    ("elastic_net", SEED_LOOP_FUSED, "elastic net: in loss, fused"),
    ("elastic_net", SEED_LOOP, "elastic net: in loss"),
]


def main(
    models: Models = DEFAULT_MODELS,
    threads: Threads = 2,
    dtype: Dtype = "float32",
    seconds: Seconds = 40.0,
    out: Out = None,
    cold: Cold = False,
    roofline_mib: RooflineMib = 256,
) -> None:
    """Time an SGD step against every way to do the same in torch, and show the error beside the time."""
    shapes_of = model_runs.chosen(models, read_models())
    runs = ModelRuns(SUBJECT, threads, dtype, Timing(seconds, cold, roofline_mib))
    runs.run(shapes_of)
    title = f"Summary: how many times longer than {OURS}"
    note = f"Median time of the peer over the median time of {OURS}; extra KB: of {OURS} with elastic net."
    runs.show(model_runs.summary(runs, title, PEERS, note, extra_kb_of="elastic_net"))
    runs.write(out)


if __name__ == "__main__":
    typer.run(main)
