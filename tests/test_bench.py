"""The benchmarks run, report every arm, and all arms of a job do the same."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("numpy")

import regfused
from benchmarks import clip_jobs, cpu_targets, dropout_jobs, models, penalty_jobs, step_jobs, zeros_jobs

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
JOBS = {
    "sgd": step_jobs.jobs_of("sgd"),
    "adam": step_jobs.jobs_of("adam"),
    "penalty": penalty_jobs.JOBS,
    "clip": clip_jobs.JOBS,
    "dropout": dropout_jobs.JOBS,
    "zeros": zeros_jobs.JOBS,
}
NO_RESULT = (penalty_jobs.AUTOGRAD_ALONE, *zeros_jobs.OTHER_RESULT)
SMALL = {stem: ["--models", "mlp_251"] for stem in JOBS} | {"dropout": ["--sizes", "2^14"]}

# Three steps are a few dozen float32 roundings, each 6e-8 of the largest parameter at most; a penalty or a norm of 251
# elements as many, of terms of one sign, each 6e-8 of the sum; dropout two. A term that is missing or doubled moves a
# result by more than 1e-4 of it.
TOLERANCE = 1e-5


def test_sharded_steps_are_timed(tmp_path):
    """The command compares the arms itself."""
    command = [sys.executable, "-m", "benchmarks.bench_sharded", "--models", "mlp_251", "--repeats", "3"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "sharded.json").read_text())
    assert list(results["cases"]) == ["mlp_251, SGD", "mlp_251, AdamW"]
    for found in results["cases"].values():
        assert all(arm["collectives"] == 1 for arm in found["arms"].values())


@pytest.mark.parametrize("stem", JOBS)
def test_every_arm_is_timed_and_does_the_same_job(stem, tmp_path):
    """One test for each command, because starting it takes most of the time."""
    bench = ["step", "--optimizer", stem] if stem in step_jobs.OPTIMIZERS else [stem]
    command = [sys.executable, "-m", f"benchmarks.bench_{bench[0]}", *bench[1:], *SMALL[stem], "--seconds", "1"]
    # Threads that wait for each other would make it long on a busy machine.
    command += ["--threads", "1", "--roofline-mib", "16", "--out", str(tmp_path)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / f"{stem}.md").read_text().startswith("### Environment")
    results = json.loads((tmp_path / f"{stem}.json").read_text())
    [model] = (results.get("models") or results["sizes"]).values()
    assert list(model["jobs"]) == [job.name for job in JOBS[stem]]
    for job in JOBS[stem]:
        found = model["jobs"][job.name]
        assert found["bytes_per_param"] == 4 * job.elements_moved
        assert list(found["arms"]) == list(job.ways)
        for name, arm in found["arms"].items():
            assert arm["p25_us"] <= arm["median_us"] <= arm["p75_us"], name
            assert arm["samples"] >= 5, name
            if name in NO_RESULT:
                assert arm["error"] is None
            else:
                assert arm["error"] < TOLERANCE, name
        if stem == "dropout":
            kept = results["kept"][job.name]
            assert list(kept) == list(job.ways)
            # Of a normal distribution, once in 1.7 million seeds; and the seed is always the same.
            assert all(abs(found["deviations"]) < 5 for found in kept.values())


# --- What would make an arm do something else -----------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", clip_jobs.CLIP.ways)
def test_gradients_are_clipped_in_every_call(name, dtype, monkeypatch):
    if dtype != torch.bfloat16:  # which comes to its lowest gradients soon
        monkeypatch.setattr(clip_jobs.Falling, "LOWEST", 0.5)
    start = models.random_params([[3, 50], [33], [1]], dtype)
    seen = []

    def bounds(params, begin):
        next_bound = clip_jobs.Falling(params, begin)

        def bound():
            seen.append((next_bound(), clip_jobs.norm_in_float64(clip_jobs.grads_of(params))))
            return seen[-1][0]

        return bound

    job = clip_jobs.ClipJob("", "", 3, clip_jobs.CLIPS, bounds, 0.5)
    call, params = job.setup(name, start)
    calls = 4000 if dtype == torch.float32 else 800
    for _ in range(calls):
        call()
    assert len(seen) == calls
    assert all(bound < norm for bound, norm in seen)
    bounds_seen = [bound for bound, _ in seen]
    assert any(later > earlier for earlier, later in itertools.pairwise(bounds_seen)), "never restored"
    models.check_ordinary(name, params)
    for p, first in zip(start, models.random_params([[3, 50], [33], [1]], dtype), strict=True):
        assert torch.equal(p.grad, first.grad), "the start has changed"


def test_gradients_of_the_floor_are_handed_round():
    start = models.random_params([[3, 50], [33]], torch.float32)
    call, params = penalty_jobs.PENALTY.setup(penalty_jobs.AUTOGRAD_ALONE, start)
    call()
    places = [p.grad.data_ptr() for p in params]
    call()
    assert [p.grad.data_ptr() for p in params] == places, "autograd has copied"


def with_another_mask(p):
    class AnotherMask(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return dropout_jobs.by_rand(p)(x)

        @staticmethod
        def backward(ctx, grad):
            return dropout_jobs.by_rand(p)(grad)

    return AnotherMask.apply


@torch.no_grad()
def norm_of_clipped(params, max_norm):
    regfused.clip_grad_norm_(params, max_norm)
    return regfused.grad_norm(params)


def clipped_twice(params, max_norm):
    norm = regfused.clip_grad_norm_(params, max_norm)
    regfused.clip_grad_norm_(params, max_norm / 8)
    return norm


WRONG = {
    "penalty, no l1": (
        penalty_jobs.PENALTY,
        penalty_jobs.backward_of(lambda ps, l1, l2: penalty_jobs.two_lines(ps, 0, l2)),
    ),
    "penalty, l2 as weight decay has it": (
        penalty_jobs.PENALTY,
        penalty_jobs.backward_of(lambda ps, l1, l2: penalty_jobs.two_lines(ps, l1, l2 / 2)),
    ),
    "penalty, gradients added up": (
        penalty_jobs.PENALTY,
        lambda ps, l1, l2: (
            lambda: (
                [penalty_jobs.two_lines(ps, l1, l2).backward() for _ in range(2)]
                and penalty_jobs.two_lines(ps, l1, l2).detach()
            )
        ),
    ),
    "clip, not clipped": (clip_jobs.CLIP, lambda params, max_norm: regfused.grad_norm(params)),
    "clip, twice": (clip_jobs.CLIP, clipped_twice),
    "clip, the norm afterwards": (clip_jobs.CLIP, norm_of_clipped),
    "nothing to clip, clipped": (clip_jobs.NOTHING_TO_CLIP, clipped_twice),
    "norm, of type 1": (clip_jobs.NORM, lambda params, max_norm: regfused.grad_norm(params, 1.0)),
    "dropout, another mask backward": (dropout_jobs.JOBS[0], with_another_mask),
    "dropout, not scaled": (dropout_jobs.JOBS[1], lambda p: lambda x: x * (torch.rand_like(x) >= p)),
}


@pytest.mark.parametrize("job, wrong", WRONG.values(), ids=WRONG)
def test_a_way_that_does_something_else_has_a_large_error(job, wrong):
    job = dataclasses.replace(job, ways={"right": next(iter(job.ways.values())), "wrong": wrong})
    assert job.error("right", [[300], [40, 3]], torch.float32) < TOLERANCE
    assert job.error("wrong", [[300], [40, 3]], torch.float32) > 100 * TOLERANCE


def test_a_wrong_share_of_zeros_shows():
    ways = {"right": dropout_jobs.WAYS[dropout_jobs.OURS], "wrong": lambda p: dropout_jobs.by_rand(p + 0.01)}
    job = dataclasses.replace(dropout_jobs.JOBS[0], ways=ways)
    assert abs(job.kept("right", [[1_000_000]], torch.float32).deviations) < 5
    assert job.kept("wrong", [[1_000_000]], torch.float32).deviations < -15


def test_targets_show_what_was_missed_and_what_was_not_measured():
    target = next(target for target in cpu_targets.TARGETS if target.stem == "penalty")
    arms = {target.job.ours: {"extra_kb": 7}, target.peer: {"times_regfused": 2.9, "extra_kb": 9}}

    def last_cells(wanted: cpu_targets.Target) -> list[str]:
        found = {"models": {name: {"jobs": {wanted.job.name: {"arms": arms}}} for name in wanted.models}}
        found["environment"] = {"threads": 2}
        return cpu_targets.row(wanted, found)[2:]

    assert last_cells(target) == ["3", "2.90", "MISSED"]
    arms[target.peer]["times_regfused"] = 3.0
    assert last_cells(target) == ["3", "3.00", "yes"]
    memory = cpu_targets.Target(target.stem, target.job, target.model, target.peer, None)
    assert last_cells(memory) == ["lower", "7 of 9 KB", "yes"]
    arms[target.job.ours]["extra_kb"] = 9
    assert last_cells(memory) == ["lower", "9 of 9 KB", "MISSED"]
    arms.clear()
    assert last_cells(target) == ["3", "?", "?"]
    assert last_cells(memory) == ["lower", "?", "?"]
    assert len(cpu_targets.table({}).rows) == 0


def test_the_lowest_of_a_set_of_models_counts():
    target = next(target for target in cpu_targets.TARGETS if target.stem == "adam_in_cache_1")
    found = {
        "environment": {"threads": 1},
        "models": {
            name: {"jobs": {target.job.name: {"arms": {target.peer: {"times_regfused": 1.25 - 0.125 * i}}}}}
            for i, name in enumerate(models.IN_CACHE)
        },
    }
    assert cpu_targets.row(target, found)[2:] == ["1", "0.38 (4m_in_8)", "MISSED by 5 of 8"]
    found["environment"]["threads"] = 2
    assert cpu_targets.row(target, found)[2:] == ["1", "?", "?"]
    found["environment"]["threads"] = 1
    del found["models"]["4m_in_8"]
    assert cpu_targets.row(target, found)[2:] == ["1", "?", "?"]


def test_targets_are_about_arms_and_models_that_are_there():
    known = {*models.read_models(), *models.SETS, "2^14", "2^20", "2^24"}
    for target in cpu_targets.TARGETS:
        jobs = {job.name: job for job in JOBS[target.stem.partition("_in_cache")[0]]}
        assert target.peer in jobs[target.job.name].ways
        assert target.model in known and known.issuperset(target.models)
