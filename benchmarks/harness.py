"""Measures callables side by side: interleaved rounds, medians and spread, and the memory bandwidth of the same run."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

Call = Callable[[], object]

# A block of calls this long hides the timer's resolution and the cost of reading it.
BLOCK_SECONDS = 200e-6
# A budget that allows it is spent on at least this many rounds, so that slow drift of the machine hits all arms alike.
ROUNDS = 20
MIN_SAMPLES = 5
MAX_SAMPLES_PER_TURN = 100
MIB = 2**20


@dataclass
class Arm:
    """One contender: `setup` allocates what it needs and returns the call to be timed."""

    name: str
    setup: Callable[[], Call]
    bytes_moved: int = 0  # what the job must move per call, whoever does it


@dataclass
class Measurement:
    """Times of one arm in microseconds per call; `cold` holds the calls made after the caches were overwritten."""

    name: str
    bytes_moved: int
    calls_per_sample: int
    warm: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return float(np.median(self.warm))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.warm, [25, 75])
        return float(low), float(high)

    @property
    def cold_median(self) -> float | None:
        return float(np.median(self.cold)) if self.cold else None

    @property
    def gb_per_s(self) -> float:
        return self.bytes_moved / self.median / 1e3

    def times(self, other: Measurement) -> float:
        """The ratio of the medians: above 1 where this arm is slower."""
        return self.median / other.median


@dataclass
class _Runner:
    """An arm that is set up, with its timings planned."""

    call: Call
    seconds: float  # of one call, from calibration
    result: Measurement

    @property
    def block(self) -> int:
        return self.result.calls_per_sample

    def run_block(self) -> float:
        """Run one block of calls; microseconds per call."""
        call = self.call
        repeats = itertools.repeat(None, self.block)
        start = time.perf_counter_ns()
        for _ in repeats:
            call()
        return (time.perf_counter_ns() - start) / self.block / 1e3

    def run_turn(self, seconds: float) -> None:
        """A burst: the first block is not counted, so that the arm starts with its own data as warm as it gets."""
        samples = int(seconds / (self.seconds * self.block)) - 1
        self.run_block()
        for _ in range(min(max(samples, 1), MAX_SAMPLES_PER_TURN)):
            self.result.warm.append(self.run_block())

    def run_cold(self, evict: Call) -> None:
        """One call after the caches were overwritten: what a step costs after a forward and a backward pass."""
        evict()
        start = time.perf_counter_ns()
        self.call()
        self.result.cold.append((time.perf_counter_ns() - start) / 1e3)


def rooflines(mib: int = 256, device: str = "cpu") -> list[Arm]:
    """The bandwidth limit, twice, on float32 tensors of `mib` MiB, which no cache holds.

    ``copy_`` reads one tensor and writes another. ``add_`` reads two and writes one of them, which is more like a step:
    a cache line that is only written is first fetched all the same, and those bytes do not count.
    """

    def setup(operation: Callable[[torch.Tensor, torch.Tensor], object]) -> Call:
        target, source = torch.ones(mib * MIB // 4, device=device), torch.zeros(mib * MIB // 4, device=device)
        return lambda: operation(target, source)

    return [
        Arm("copy_", lambda: setup(torch.Tensor.copy_), 2 * mib * MIB),
        Arm("add_", lambda: setup(torch.Tensor.add_), 3 * mib * MIB),
    ]


def measure(
    arms: list[Arm],
    seconds: float,
    *,
    cold: bool = False,
    roofs: list[Arm] | None = None,
    seed: int = 0,
    title: str = "",
) -> dict[str, Measurement]:
    """Measure all arms, and the rooflines as further arms, in interleaved rounds.

    Args:
        arms: what to measure; all are set up at once and stay allocated.
        seconds: budget for the rounds. Every arm gets at least ``MIN_SAMPLES`` samples, whatever that takes.
        cold: spend half of the budget on single calls, each after the last roofline has run, without a warm-up.
        roofs: the rooflines, `rooflines()` by default.
        seed: of the order of the arms, which is shuffled anew each round.
        title: of the progress bar.

    Returns:
        A measurement per name, those of the rooflines included.
    """
    random_order = random.Random(seed)
    runners = [_calibrated(arm) for arm in [*arms, *(roofs or rooflines())]]
    evict = runners[-1].call
    warm_seconds = seconds / 2 if cold else seconds
    turn_seconds = warm_seconds / ROUNDS / len(runners)
    with _timing(title) as advance:
        for done in _rounds(warm_seconds):
            random_order.shuffle(runners)
            for runner in runners:
                runner.run_turn(turn_seconds)
            advance(done * warm_seconds / seconds)
        for done in _rounds(seconds - warm_seconds) if cold else ():
            random_order.shuffle(runners)
            for runner in runners:
                runner.run_cold(evict)
            advance((1 + done) / 2)
    return {runner.result.name: runner.result for runner in runners}


def _calibrated(arm: Arm) -> _Runner:
    call = arm.setup()
    call()  # allocates state, and is not what a step costs
    start = time.perf_counter()
    call()
    took = time.perf_counter() - start
    if took < BLOCK_SECONDS:
        repeats = math.ceil(BLOCK_SECONDS / took)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        took = (time.perf_counter() - start) / repeats
    block = max(1, round(BLOCK_SECONDS / took))
    return _Runner(call, took, Measurement(arm.name, arm.bytes_moved, block))


def _rounds(seconds: float) -> Iterator[float]:
    """One item per round, the share of the budget that is used up, until the time is spent."""
    start = time.perf_counter()
    for n in itertools.count(1):
        share = (time.perf_counter() - start) / seconds
        if share >= 1 and n > MIN_SAMPLES:
            return
        yield min(share, 1.0)


@contextlib.contextmanager
def _timing(title: str) -> Iterator[Callable[[float], None]]:
    """Garbage collection off; yields a function that shows the share of the work that is done."""
    console = Console(stderr=True)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # No thread of its own that refreshes: it would run beside what is timed.
        with Progress(console=console, transient=True, auto_refresh=False, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task(title, total=1.0)

            def advance(share: float) -> None:
                progress.update(task, completed=share, refresh=True)

            yield advance
    finally:
        if collecting:
            gc.enable()
