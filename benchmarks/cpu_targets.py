"""What steps and building blocks should reach on the CPU, beside what was seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import clip_jobs, dropout_jobs, models, penalty_jobs, report, step_jobs, zeros_jobs
from benchmarks.job import Job


@dataclass(frozen=True)
class Target:
    """How many times longer a peer should take than regfused; None: it should need more memory, by any amount."""

    stem: str  # of the result file
    job: Job
    model: str  # or a set of models, of which the lowest counts
    peer: str
    at_least: float | None
    threads: int = 2

    @property
    def piece(self) -> str:
        what = "time" if self.at_least is not None else "peak memory"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.job.ours}, {self.job.title}, {self.model}{threads}: {what}"

    @property
    def models(self) -> tuple[str, ...]:
        return models.SETS.get(self.model, (self.model,))


def in_cache(optimizer: str, threads: int) -> list[Target]:
    """Each number of elements, in one tensor and in eight, must reach them."""
    step, clip, elastic_net = step_jobs.jobs_of(optimizer)
    wanted = [
        (step, step_jobs.FUSED, 1.0),
        (clip, step_jobs.CLIP_FUSED, 1.3 if threads == 1 else 1.6),
        (elastic_net, step_jobs.tutorial_loop(optimizer), 8.0),
    ]
    stem = f"{optimizer}_in_cache_{threads}"
    return [Target(stem, job, "in_cache", peer, at_least, threads) for job, peer, at_least in wanted]


STEP, CLIP, _ = step_jobs.jobs_of("adam")
DROPOUT = dropout_jobs.JOBS[0]
TARGETS = [
    Target("adam", CLIP, "mlp_251", step_jobs.CLIP_FUSED, 8),
    Target("adam", CLIP, "many_small_1000x1k", step_jobs.CLIP_FUSED, 12),
    Target("adam", CLIP, "many_small_10000x64", step_jobs.CLIP_FUSED, 20),
    Target("adam", CLIP, "resnet50", step_jobs.CLIP_FUSED, 1.2),
    Target("adam", CLIP, "gpt2_124m", step_jobs.CLIP_FUSED, 1.2),
    Target("adam", STEP, "resnet50", step_jobs.FUSED, 0.97),
    Target("adam", STEP, "gpt2_124m", step_jobs.FUSED, 0.97),
    *(target for optimizer in step_jobs.OPTIMIZERS for threads in (1, 2) for target in in_cache(optimizer, threads)),
    # The option must not cost more than this share: 1/1.3 and 1/2.
    Target("zeros", zeros_jobs.GROUP_ROWS, "large_layers", zeros_jobs.WITHOUT, 0.77),
    Target("zeros", zeros_jobs.GROUP_ROWS, "large_layers", zeros_jobs.TORCH, 3),
    Target("zeros", zeros_jobs.GROUP_COLUMNS, "large_layers", zeros_jobs.WITHOUT, 0.5),
    Target("zeros", zeros_jobs.GROUP_COLUMNS, "large_layers", zeros_jobs.TORCH, 3),
    Target("zeros", zeros_jobs.KEEP_ZEROS, "large_layers", zeros_jobs.WITHOUT, 0.97),
    Target("penalty", penalty_jobs.PENALTY, "resnet50", penalty_jobs.TWO_LINES, 3),
    Target("penalty", penalty_jobs.PENALTY, "many_small_1000x1k", penalty_jobs.TWO_LINES, 30),
    Target("clip", clip_jobs.CLIP, "resnet50", clip_jobs.TORCH, 1.15),
    Target("clip", clip_jobs.CLIP, "many_small_1000x1k", clip_jobs.TORCH, 10),
    Target("dropout", DROPOUT, "2^14", dropout_jobs.TORCH, 3),
    Target("dropout", DROPOUT, "2^20", dropout_jobs.TORCH, 12),
    Target("dropout", DROPOUT, "2^24", dropout_jobs.TORCH, 4),
    # Tensors of this size are mappings of their own; smaller ones share pages, whose peak moves by whole tensors.
    Target("dropout", DROPOUT, "2^24", dropout_jobs.TORCH, None),
]


def table(results: Mapping[str, Mapping[str, Any]]) -> report.Table:
    """The targets of the result files that are there, by their stems."""
    rows = [row(target, results[target.stem]) for target in TARGETS if target.stem in results]
    how = {found["dtype"] for found in results.values()}
    note = (
        "Medians of the peer over medians of regfused; peak memory: KB that a call needs beyond what it begins with. "
        "large_layers: the lowest of layers_4x1024, resnet50 and gpt2_124m. "
        f"in_cache: the lowest of 64 K, 256 K, 1 M and 4 M elements, each in one tensor and in eight. "
        f"'?': not measured. The targets are for float32; measured: {', '.join(sorted(how))}."
    )
    return report.Table("Targets", ["piece", "against", "at least", "seen", "reached"], rows, note, names=2)


def row(target: Target, results: Mapping[str, Any]) -> list[str]:
    sets = results.get("models") or results.get("sizes") or {}
    arms = {name: _arms(sets.get(name, {}), target.job) for name in target.models}
    if target.at_least is None:
        mine, theirs = (arms[target.model].get(arm, {}).get("extra_kb") for arm in (target.job.ours, target.peer))
        if mine is None or theirs is None:
            return [target.piece, target.peer, "lower", "?", "?"]
        return [target.piece, target.peer, "lower", f"{mine:,} of {theirs:,} KB", verdict(mine < theirs)]
    if results and results["environment"]["threads"] != target.threads:
        return [target.piece, target.peer, f"{target.at_least:g}", "?", "?"]
    times = {name: found.get(target.peer, {}).get("times_regfused", math.nan) for name, found in arms.items()}
    if any(math.isnan(seen) for seen in times.values()):
        return [target.piece, target.peer, f"{target.at_least:g}", "?", "?"]
    lowest = min(times, key=lambda name: times[name])
    shown = f"{times[lowest]:.2f}" + (f" ({lowest})" if len(times) > 1 else "")
    missed = [name for name, seen in times.items() if seen < target.at_least]
    return [target.piece, target.peer, f"{target.at_least:g}", shown, verdict(not missed, missed, len(times))]


def _arms(model: Mapping[str, Any], job: Job) -> Mapping[str, Any]:
    arms: Mapping[str, Any] = model.get("jobs", {}).get(job.name, {}).get("arms", {})
    return arms


def verdict(reached: bool, missed: Sequence[str] = (), of: int = 1) -> str:
    return "yes" if reached else "MISSED" + (f" by {len(missed)} of {of}" if of > 1 else "")


def main(out: Annotated[Path, typer.Option(help="folder with the result files")]) -> None:
    """Show what the result files say about the targets, and write it into targets.md; nothing depends on it."""
    files = {stem: out / f"{stem}.json" for stem in dict.fromkeys(target.stem for target in TARGETS)}
    results = {stem: json.loads(file.read_text()) for stem, file in files.items() if file.exists()}
    found = table(results)
    found.print(Console(width=180))
    report.write_whole(out / "targets.md", found.markdown())


if __name__ == "__main__":
    typer.run(main)
