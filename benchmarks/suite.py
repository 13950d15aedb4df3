"""Runs tests and reads what became of them from the JUnit file that pytest writes."""

from __future__ import annotations

import importlib.util
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import report, stage

SHOWN = 30  # failures in a table; the JSON file has all


@dataclass
class SuiteResult:
    """What became of the tests of one run."""

    passed: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)  # name, first line of the message
    reasons: dict[str, int] = field(default_factory=dict)  # for which tests were skipped, and how many
    problem: str = ""  # of the run as a whole

    @property
    def bad(self) -> bool:
        return bool(self.problem or self.failed)

    @property
    def says(self) -> str:
        counts = f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"
        return f"{counts}; {self.problem}" if self.problem else counts

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self, title: str) -> list[report.Table]:
        row = [str(self.passed), str(self.failed), str(self.skipped), self.problem]
        tables = [report.Table(title, ["passed", "failed", "skipped", "the run"], [row], names=4)]
        if self.failures:
            rows = [[name, report.cell(message)] for name, message in self.failures[:SHOWN]]
            more = f"The first {SHOWN} of {len(self.failures)}." if len(self.failures) > SHOWN else ""
            tables.append(report.Table(f"{title}: failures", ["test", "says"], rows, more, names=2))
        if self.reasons:
            most = sorted(self.reasons.items(), key=lambda item: -item[1])[:10]
            rows = [[report.cell(reason), str(count)] for reason, count in most]
            tables.append(report.Table(f"{title}: skipped", ["reason", "tests"], rows))
        return tables


def run(tests: Sequence[str], limit: float, scratch: Path, env: Mapping[str, str], workers: int) -> SuiteResult:
    """Run pytest on `tests`; `workers` is without effect where pytest-xdist is not installed."""
    file = scratch / "junit.xml"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-p", "no:cacheprovider", f"--junitxml={file}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    ended = stage.run(command, limit, env)
    result = read(file) if file.exists() else SuiteResult()
    # 1: tests failed, and the file says which. 5: no test was found, or files that skip as a whole.
    if not file.exists() or ended.code not in (0, 1, 5):
        result.problem = " | ".join([ended.reason or "no results", *ended.last_lines(3)])
    return result


def read(file: Path) -> SuiteResult:
    result = SuiteResult()
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        bad = [child for child in case if child.tag in ("failure", "error")]
        skip = case.find("skipped")
        if bad:
            result.failed += 1
            result.failures.append((f"{case.get('classname')}::{case.get('name')}", _first_line(bad[0])))
        elif skip is not None:
            result.skipped += 1
            reason = _first_line(skip)
            result.reasons[reason] = result.reasons.get(reason, 0) + 1
        else:
            result.passed += 1
    return result


def _first_line(element: ElementTree.Element) -> str:
    return next(iter((element.get("message") or element.text or "").strip().splitlines()), "")
