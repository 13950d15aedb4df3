"""Runs a command as a process group of its own, up to a time limit, and keeps what it printed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 10  # between the request to stop and the end: pytest writes its results in it

_running: set[subprocess.Popen] = set()
stopped = False  # by `end_all`


@dataclass
class Ended:
    """How a command ended."""

    code: int | None  # None: it was stopped at its time limit
    seconds: float
    output: str

    @property
    def reason(self) -> str:
        """Why it is no success, or an empty string."""
        if self.code == 0:
            return ""
        if self.code is None:
            return f"stopped after {self.seconds:.0f} s"
        return f"exit status {self.code}" if self.code > 0 else f"ended by signal {-self.code}"

    def last_lines(self, count: int) -> list[str]:
        return [line.rstrip() for line in self.output.splitlines() if line.strip()][-count:]


def run(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run `command` in the root of the checkout for up to `limit` seconds; `env` is added to the environment."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        # A session of its own makes one group of the command and of all that it starts.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        _running.add(process)
        try:
            code = _wait(process, limit)
        finally:
            _kill_group(process)
            process.wait()
            _running.discard(process)
        output.seek(0)
        text = output.read().decode(errors="replace")
    return Ended(code, time.perf_counter() - start, text)


def end_all() -> None:
    """For the moment when this process itself is told to stop: its commands must not outlive it."""
    global stopped
    stopped = True
    for process in list(_running):
        _kill_group(process)  # `run`, which this may have interrupted, does the waiting


def _wait(process: subprocess.Popen, limit: float) -> int | None:
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        return None


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
