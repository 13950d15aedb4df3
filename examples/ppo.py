"""PPO on CartPole by stable-baselines3, with torch's Adam and with regfused's, whose step clips as well.

    pip install -r examples/requirements-ppo.txt
    python examples/ppo.py

Small networks and a clip at every minibatch: a third of the training phase is the clip and the optimizer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import regfused

MAX_NORM = 0.5  # what stable-baselines3 clips to by default

# The change: one class, and the clip in its step.
TORCH = dict(policy_kwargs=dict(optimizer_class=torch.optim.Adam, optimizer_kwargs=dict(eps=1e-5)))
REGFUSED = dict(
    policy_kwargs=dict(optimizer_class=regfused.Adam, optimizer_kwargs=dict(eps=1e-5, max_norm=MAX_NORM)),
    max_grad_norm=math.inf,
)
SIDES = {"torch.optim.Adam": TORCH, "regfused.Adam": REGFUSED}


PARTS = ("rollouts", "training", "clip", "step")


@dataclass
class Run:
    """One training; times in seconds."""

    score: float = 0.0  # mean return of 20 episodes afterwards
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("rollouts", "training", "clip", "step"), 0.0)
    )


@contextlib.contextmanager
def timed(owner: Any, name: str, seconds: dict[str, float], key: str) -> Iterator[None]:
    """Adds up how long the calls of ``owner.name`` take."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        seconds[key] += time.perf_counter() - start
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def without_a_second_clip(off: bool) -> Iterator[None]:
    """stable-baselines3 has no switch for its clip, and would measure the norm even where the bound is infinite."""
    original = torch.nn.utils.clip_grad_norm_
    if off:
        torch.nn.utils.clip_grad_norm_ = lambda *args, **kwargs: None  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.utils.clip_grad_norm_ = original


def train(side: dict[str, Any], seed: int, steps: int) -> Run:
    run = Run()
    model = PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", **side)
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_a_second_clip(side is REGFUSED))
        stack.enter_context(timed(torch.nn.utils, "clip_grad_norm_", run.seconds, "clip"))
        stack.enter_context(timed(model.policy.optimizer, "step", run.seconds, "step"))
        stack.enter_context(timed(model, "train", run.seconds, "training"))
        stack.enter_context(timed(model, "collect_rollouts", run.seconds, "rollouts"))
        model.learn(steps)
    run.score = float(evaluate_policy(model, model.get_env(), n_eval_episodes=20)[0])
    return run


def first_actions(side: dict[str, Any], seed: int, count: int = 64) -> torch.Tensor:
    """What the untrained policy does: the same on both sides."""
    model = PPO("MlpPolicy", "CartPole-v1", seed=seed, device="cpu", **side)
    observations = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(model.predict(observations.numpy(), deterministic=True)[0])


def report(runs: dict[str, list[Run]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in runs:
        table.add_column(name, justify="right")
    table.add_column("ratio", justify="right")

    def row(title: str, values: list[float], form: str = "{:.2f} s") -> None:
        table.add_row(title, *(form.format(value) for value in values), f"{values[0] / values[1]:.2f}")

    def medians(key: str) -> list[float]:
        return [median(run.seconds[key] for run in of_side) for of_side in runs.values()]

    row("mean return", [mean(run.score for run in of_side) for of_side in runs.values()], "{:.0f}")
    row("rollouts", medians("rollouts"))
    row("training phase", medians("training"))
    row("  of it clip and step", [a + b for a, b in zip(medians("clip"), medians("step"), strict=True)])
    return table


def main(
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each side")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="of the environment, in each training")] = 20_000,
) -> None:
    """Train both sides, taking turns, on one thread, and show returns and where the time goes."""
    torch.set_num_threads(1)
    console = Console()
    runs: dict[str, list[Run]] = {name: [] for name in SIDES}
    for seed in track(range(seeds), "PPO on CartPole", console=console):
        assert torch.equal(first_actions(TORCH, seed), first_actions(REGFUSED, seed))
        for name, side in SIDES.items():
            runs[name].append(train(side, seed, steps))
    console.print(report(runs))
    console.print("Medians over seeds; the return is the mean of 20 episodes after each training, at most 500.")


if __name__ == "__main__":
    typer.run(main)
