"""What the building blocks should reach on the CPU, with two threads, beside what was seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import clip_jobs, dropout_jobs, penalty_jobs, report
from benchmarks.job import Job


@dataclass(frozen=True)
class Target:
    """How many times longer a peer should take than regfused; None: it should need more memory, by any amount."""

    stem: str  # of the result file
    job: Job
    model: str
    peer: str
    at_least: float | None

    @property
    def piece(self) -> str:
        what = "time" if self.at_least is not None else "peak memory"
        return f"{self.job.ours}, {self.job.title}, {self.model}: {what}"


DROPOUT = dropout_jobs.JOBS[0]
TARGETS = [
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
    how = {f"{found['dtype']}, {found['environment']['threads']} threads" for found in results.values()}
    note = (
        "Medians of the peer over medians of regfused; peak memory: KB that a call needs beyond what it begins with. "
        f"'?': not measured. The targets are for float32 and 2 threads; measured: {'; '.join(sorted(how))}."
    )
    return report.Table("Targets", ["piece", "against", "at least", "seen", "reached"], rows, note, names=2)


def row(target: Target, results: Mapping[str, Any]) -> list[str]:
    model = (results.get("models") or results.get("sizes") or {}).get(target.model, {})
    arms = model.get("jobs", {}).get(target.job.name, {}).get("arms", {})
    ours, peer = arms.get(target.job.ours, {}), arms.get(target.peer, {})
    if target.at_least is None:
        mine, theirs = ours.get("extra_kb"), peer.get("extra_kb")
        if mine is None or theirs is None:
            return [target.piece, target.peer, "lower", "?", "?"]
        return [target.piece, target.peer, "lower", f"{mine:,} of {theirs:,} KB", verdict(mine < theirs)]
    seen = peer.get("times_regfused", math.nan)
    if math.isnan(seen):
        return [target.piece, target.peer, f"{target.at_least:g}", "?", "?"]
    return [target.piece, target.peer, f"{target.at_least:g}", f"{seen:.2f}", verdict(seen >= target.at_least)]


def verdict(reached: bool) -> str:
    return "yes" if reached else "MISSED"


def main(out: Annotated[Path, typer.Option(help="folder with the result files")]) -> None:
    """Print what the result files say about the targets; nothing depends on it."""
    files = {stem: out / f"{stem}.json" for stem in dict.fromkeys(target.stem for target in TARGETS)}
    results = {stem: json.loads(file.read_text()) for stem, file in files.items() if file.exists()}
    table(results).print(Console(width=180))


if __name__ == "__main__":
    typer.run(main)
