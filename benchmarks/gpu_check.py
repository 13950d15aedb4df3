"""One command for a machine with a GPU: tests, launches, memory checks and timings, written into one report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import cuda_timing, gpu_facts, launches, report, sanitizer, stage, suite, targets

GPU_TESTS = "tests/test_step_gpu.py"
# What does not depend on the device, and takes long.
OTHER_TESTS = tuple(
    f"tests/test_{name}.py"
    for name in ("bench", "build", "demo", "determinism", "gpu_check", "guarantees", "step_atomic")
)
# All files that there are: a new one needs no word here.
DEVICE_TESTS = ["tests", *(f"--ignore={file}" for file in (GPU_TESTS, *OTHER_TESTS))]
REHEARSED_TESTS = "tests/test_penalties.py"
WORKERS = 8
REHEARSED_SECONDS = 6  # of timings
START_UP_SECONDS = 20  # of a stage that plans its own time: to import torch, to start CUDA, to end
TOO_LITTLE_SECONDS = 3
REHEARSAL = (
    "**Rehearsal on a CPU: no GPU was used. Every stage ran on small shapes, to try the code of this check; "
    "the numbers below say nothing about any GPU.**"
)


@dataclass
class Outcome:
    """What became of a stage; only "failed" turns the exit status nonzero."""

    status: str  # "passed", "failed", "cut short" or "not possible"
    says: str
    results: Any = None
    tables: list[report.Table] = field(default_factory=list)
    seconds: float = 0.0
    limit: float = 0.0


@dataclass
class Check:
    """Where and on what the stages run."""

    device: str
    tests: list[str]  # pytest arguments
    scratch: Path
    env: dict[str, str]

    @property
    def rehearsed(self) -> bool:
        return self.device == "cpu"

    def module(self, module: Any, limit: float, *options: str) -> tuple[stage.Ended, Path]:
        """Run one of this folder's commands, which writes a JSON file as it goes."""
        out = self.scratch / f"{module.__name__}.json"
        command = [sys.executable, "-m", module.__name__, "--device", self.device, "--out", str(out), *options]
        return stage.run(command, limit, self.env), out


@dataclass(frozen=True)
class Stage:
    """One part of the check."""

    name: str
    title: str
    run: Callable[[Check, float], Outcome]
    at_most: float  # seconds
    at_least: float  # seconds that earlier stages leave to it


# --- The stages -----------------------------------------------------------------------------------


def read_facts(check: Check, limit: float) -> Outcome:
    ended, out = check.module(gpu_facts, limit)
    return of_module(ended, out, lambda facts: [report.environment_table(facts)], lambda facts: facts.get("gpu", "CPU"))


def run_all_tests(check: Check, limit: float) -> Outcome:
    env = check.env if check.rehearsed else {**check.env, "REGFUSED_TEST_DEVICE": check.device}
    result = suite.run(check.tests, limit, check.scratch, env, 0 if check.rehearsed else WORKERS)
    return of_tests(result, f"Tests: {' '.join(check.tests)}", "failed")


def run_gpu_tests(check: Check, limit: float) -> Outcome:
    """Alone, because they need the whole memory, and time for graphs and streams without company."""
    if not (stage.ROOT / GPU_TESTS).exists():
        return Outcome("not possible" if check.rehearsed else "failed", f"{GPU_TESTS}: not found")
    env = {**check.env, "REGFUSED_TEST_DEVICE": check.device}
    result = suite.run([GPU_TESTS], limit, check.scratch, env, 0)
    return of_tests(result, f"Tests: {GPU_TESTS}", "not possible" if check.rehearsed else "failed")


def count_launches(check: Check, limit: float) -> Outcome:
    ended, out = check.module(launches, limit, *small(check))
    return of_module(ended, out, launches.tables, lambda found: f"{sum(map(len, found.values()))} cases")


def run_sanitizers(check: Check, limit: float) -> Outcome:
    verdicts = sanitizer.run_plainly(limit) if check.rehearsed else sanitizer.run(limit)
    states = {verdict.status for verdict in verdicts}
    status = next(state for state in ("failed", "not possible", "passed") if state in states)
    says = "; ".join(f"{verdict.tool}: {verdict.status}" for verdict in verdicts)
    results = [verdict.as_dict() for verdict in verdicts]
    return Outcome(status, says, results, sanitizer.tables(results))


def time_everything(check: Check, limit: float) -> Outcome:
    seconds = REHEARSED_SECONDS if check.rehearsed else max(limit - START_UP_SECONDS, 1.0)
    ended, out = check.module(cuda_timing, limit, "--seconds", str(seconds), *small(check))

    def says(found: dict[str, Any]) -> str:
        skipped = f", no time for {', '.join(found['skipped'])}" if found["skipped"] else ""
        sets = f"{len(found['models'])} sets of parameters, {len(found['blocks'])} of the building blocks"
        return f"{sets}{skipped}"

    outcome = of_module(ended, out, cuda_timing.tables, says)
    if ended.code is None:
        outcome.status = "cut short"
    return outcome


STAGES = [
    Stage("facts", "what is there", read_facts, 30, 10),
    Stage("tests", "all tests on the device", run_all_tests, 130, 70),
    Stage("gpu_tests", "tests that only a GPU can run", run_gpu_tests, 70, 30),
    Stage("launches", "launches and waits per step", count_launches, 50, 25),
    Stage("sanitizers", "compute-sanitizer", run_sanitizers, 90, 40),
    Stage("timings", "timings", time_everything, 210, 110),
]


def small(check: Check) -> list[str]:
    return ["--small"] if check.rehearsed else []


def of_tests(result: suite.SuiteResult, title: str, if_none_ran: str) -> Outcome:
    status = "failed" if result.bad else "passed" if result.passed else if_none_ran
    return Outcome(status, result.says, result.as_dict(), result.tables(title))


def of_module(
    ended: stage.Ended, out: Path, tables: Callable[[Any], list[report.Table]], says: Callable[[Any], str]
) -> Outcome:
    """A stage that was a command: what its file has is shown however the command ended."""
    results = json.loads(out.read_text()) if out.exists() else None
    summary = says(results) if results else "no results"
    if ended.reason:
        summary = " | ".join([summary, ended.reason, *ended.last_lines(4)])
    return Outcome("failed" if ended.reason else "passed", summary, results, tables(results) if results else [])


# --- The report -----------------------------------------------------------------------------------


class Report:
    """All outcomes so far, as files and as a summary."""

    def __init__(self, out: Path, rehearsed: bool) -> None:
        self.out, self.rehearsed = out, rehearsed
        self.outcomes: dict[str, Outcome] = {}

    def result_of(self, name: str) -> Any:
        outcome = self.outcomes.get(name)
        return (outcome.results if outcome else None) or {}

    def stages_table(self) -> report.Table:
        rows = []
        for part in STAGES:
            outcome = self.outcomes.get(part.name, Outcome("not run yet", ""))
            seconds = f"{outcome.seconds:.0f} of {outcome.limit:.0f}" if outcome.limit else ""
            rows.append([part.title, outcome.status, report.cell(outcome.says, 220), seconds])
        return report.Table("Stages", ["stage", "status", "says", "s"], rows, names=4)

    def targets_table(self) -> report.Table:
        return targets.table(self.result_of("timings"), self.result_of("launches"))

    def failed(self) -> bool:
        return any(outcome.status == "failed" for outcome in self.outcomes.values())

    def write(self) -> None:
        """Both files, as far as the check has come."""
        where = self.result_of("facts").get("gpu", "a GPU")
        title = REHEARSAL if self.rehearsed else f"**The CUDA kernels of regfused on {where}; `make gpu-check`.**"
        parts: list[report.Table | report.Text] = [report.Text(title), self.stages_table()]
        for outcome in self.outcomes.values():
            parts += outcome.tables
        parts.append(self.targets_table())
        results = {
            "rehearsal": self.rehearsed,
            "stages": {
                name: {"status": o.status, "says": o.says, "seconds": o.seconds, "limit": o.limit, "results": o.results}
                for name, o in self.outcomes.items()
            },
        }
        report.write(self.out, "sgd_cuda", results, parts)


def run_stage(part: Stage, check: Check, limit: float) -> Outcome:
    start = time.perf_counter()
    try:
        enough = limit >= TOO_LITTLE_SECONDS
        outcome = part.run(check, limit) if enough else Outcome("failed", "no time was left")
    except Exception as error:
        outcome = Outcome("failed", f"{type(error).__name__}: {error}")
    outcome.seconds, outcome.limit = time.perf_counter() - start, max(limit, 0.0)
    return outcome


# --- The command ----------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="folder for sgd_cuda.md and sgd_cuda.json")],
    seconds: Annotated[float, typer.Option(min=1, help="for all stages; later ones get shorter")] = 400.0,
    rehearse: Annotated[bool, typer.Option(help="every stage on the CPU, small and short: tries this command")] = False,
    tests: Annotated[list[str] | None, typer.Option(help="pytest arguments instead of all tests")] = None,
) -> None:
    """Run every stage, whatever became of the others; the exit status is 1 where one failed."""
    console = Console(width=180, highlight=False, markup=False)
    usual_tests = [REHEARSED_TESTS] if rehearse else DEVICE_TESTS
    scratch = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    # Threads that wait for each other would make a rehearsal on a busy machine long.
    env = {"OMP_NUM_THREADS": "1"} if rehearse else {}
    check = Check("cpu" if rehearse else "cuda", tests or usual_tests, scratch, env)
    summary = Report(out, rehearse)
    start = time.perf_counter()
    try:
        for i, part in enumerate(STAGES):
            if stage.stopped:
                break
            limit = limit_of(STAGES[i:], seconds - (time.perf_counter() - start))
            console.print(f"== {part.title} (at most {limit:.0f} s)")
            outcome = summary.outcomes[part.name] = run_stage(part, check, limit)
            said = report.cell(outcome.says, 300)
            console.print(f"   {outcome.status}, {outcome.seconds:.0f} s: {said}")
            summary.write()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    show(summary, console)
    console.print(f"in all {time.perf_counter() - start:.0f} s; everything is in {os.path.relpath(out)}/sgd_cuda.md")
    raise typer.Exit(int(summary.failed() or stage.stopped))


def limit_of(stages: list[Stage], left: float) -> float:
    """Seconds for the first of the stages to come: the others keep what they need, or all get less alike."""
    needed = [part.at_least for part in stages]
    spare = left - sum(needed)
    return min(stages[0].at_most, needed[0] + spare if spare >= 0 else left * needed[0] / sum(needed))


def show(summary: Report, console: Console) -> None:
    """The end of the output may be all that its reader has, so it is short and has what matters."""
    timings = summary.result_of("timings")
    for table in cuda_timing.summaries(timings)[:1] if timings else []:
        table.print(console)
    for name in ("tests", "gpu_tests"):
        for test, message in summary.result_of(name).get("failures", [])[:8]:
            console.print(f"{test}: {report.cell(message, 200)}")
    summary.targets_table().print(console)
    summary.stages_table().print(console)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    # The stage that runs ends with what it has, and the report is written.
    signal.signal(signal.SIGTERM, lambda *_: stage.end_all())
    typer.run(main)
