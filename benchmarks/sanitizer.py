"""Runs ``sanitizer_run`` below the tools of compute-sanitizer, and reads what they say about our kernels."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report, sanitizer_run, stage

OUR_KERNELS = "regfused"  # their namespace: in the name of each, mangled or not
TOOLS = ("memcheck", "initcheck", "racecheck", "synccheck")
# Each allocation of torch becomes one of the driver, whose bounds the tool knows.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
FIRST_PORT, PORTS = 49300, 20  # tools that run at the same time must not share ports
# What it says where it fails with any program, be it /bin/echo.
NOT_STARTED = "terminated before first instrumented API call"
SHOWN = 6


@dataclass
class Verdict:
    """What one tool found."""

    tool: str
    status: str  # "passed", "failed" or "not possible"
    says: str
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def find() -> str | None:
    at = shutil.which("compute-sanitizer")
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return at or (str(usual) if usual.exists() else None)


def run(limit: float) -> list[Verdict]:
    """All tools at the same time; they need little of the GPU and a lot of starting up."""
    program = find()
    if program is None:
        return [Verdict(tool, "not possible", "compute-sanitizer: not found") for tool in TOOLS]
    usage = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30).stdout
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return list(pool.map(lambda tool: run_tool(program, usage, tool, limit), TOOLS))


def run_tool(program: str, usage: str, tool: str, limit: float) -> Verdict:
    command = [program, *options(tool, usage), sys.executable, "-m", sanitizer_run.__name__, "--device", "cuda"]
    ended = stage.run(command, limit, UNCACHED if tool in ("memcheck", "initcheck") else {})
    return judge(tool, ended)


def options(tool: str, usage: str) -> list[str]:
    """Of the options wanted, those that this version of compute-sanitizer has."""
    port = FIRST_PORT + PORTS * TOOLS.index(tool)
    wanted = {
        "--tool": tool,
        "--port": str(port),
        "--show-backtrace": "no",
        "--print-limit": "1000",
        # Where torch tries out what the driver has, some calls fail on purpose.
        "--report-api-errors": "no" if tool == "memcheck" else None,
        # initcheck must see the writes of every kernel, or memory that another has filled counts as never written.
        "--kernel-name": f"kns={OUR_KERNELS}" if tool != "initcheck" else None,
    }
    return [word for name, value in wanted.items() if value and name in usage for word in (name, value)]


def run_plainly(limit: float) -> list[Verdict]:
    """The program without any tool, on the CPU."""
    ended = stage.run([sys.executable, "-m", sanitizer_run.__name__, "--device", "cpu"], limit)
    return [judge("no tool, on the CPU", ended)]


def judge(tool: str, ended: stage.Ended) -> Verdict:
    findings = findings_in(ended.output)
    summary = re.search(r"=========.* SUMMARY: (.*)", ended.output)
    says = f"{len(findings)} findings in our kernels" + (f"; of all kernels checked: {summary[1]}" if summary else "")
    if findings:
        status = "failed"
    elif "device not supported" in ended.output.lower():
        status, says = "not possible", "compute-sanitizer does not support this device or machine"
    elif NOT_STARTED in ended.output and "Traceback" not in ended.output:
        status, says = "not possible", "compute-sanitizer cannot start a program here"
    elif sanitizer_run.DONE not in ended.output:
        status, says = "failed", " | ".join([ended.reason or "incomplete", *ended.last_lines(4)])
    else:
        status = "passed"
    return Verdict(tool, status, report.cell(says, 400), ended.seconds, findings)


def findings_in(output: str) -> list[str]:
    """The findings, each a line, that name one of our kernels.

    A finding is a line behind ``=========`` that starts without indentation, and indented lines that give details.
    """
    found: list[list[str]] = []
    for line in output.splitlines():
        match = re.match(r"=========( +)(\S.*)", line)
        if match is None:
            continue
        if len(match[1]) == 1:
            found.append([match[2]])
        elif found:
            found[-1].append(match[2])
    return [" | ".join(lines) for lines in found if any(OUR_KERNELS in line for line in lines)]


def tables(verdicts: list[dict[str, Any]]) -> list[report.Table]:
    rows = [[v["tool"], v["status"], v["says"], f"{v['seconds']:.0f}"] for v in verdicts]
    note = (
        f"Checked are kernels with {OUR_KERNELS} in their names; initcheck watches all and reports on those. memcheck "
        "and initcheck ran with every allocation made by the driver. Four dtypes, sizes "
        f"{', '.join(map(str, sanitizer_run.SIZES))}, each at aligned and misaligned addresses, "
        f"{len(sanitizer_run.OPTIONS)} sets of options, AMP with and without overflow, clip_grad_norm_, "
        "grad_norm, penalty and dropout."
    )
    found = [report.Table("compute-sanitizer", ["tool", "status", "says", "s"], rows, note, names=3)]
    findings = [[v["tool"], report.cell(finding, 300)] for v in verdicts for finding in v["findings"][:SHOWN]]
    if findings:
        found.append(report.Table("compute-sanitizer: findings", ["tool", "finding"], findings, names=2))
    return found
