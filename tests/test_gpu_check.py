"""The check for machines with a GPU: rehearsed on the CPU, and its readers on output that only a GPU's tools print."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("numpy")

import torch
import typer
from rich.console import Console

from benchmarks import cuda_timing, gpu_check, launches, penalty_jobs, sanitizer, sanitizer_run, stage, suite, targets
from benchmarks.step_jobs import JOBS, OURS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2}  # of regfused; a missing or doubled term moves more


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--rehearse", "--out", str(out)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(run.stdout) < 12_000
    return (out / "sgd_cuda.md").read_text(), json.loads((out / "sgd_cuda.json").read_text())


def test_report_has_every_section_and_says_that_it_is_a_rehearsal(rehearsal):
    markdown, results = rehearsal
    assert "Rehearsal on a CPU" in markdown.splitlines()[0]
    headings = re.findall("^### (.*)", markdown, re.MULTILINE)
    expected = ["Stages", "Environment", "Tests", "What a step, or", "compute-sanitizer", "Wall clock", "Host time"]
    expected += [model for model, _ in cuda_timing.RUNS] + ["Building blocks"]
    expected += [f"{model}, building blocks" for model, _ in cuda_timing.BLOCK_RUNS] + ["Targets"]
    for heading in expected:
        assert any(found.startswith(heading) for found in headings), f"{heading} not in {headings}"
    assert headings[-1] == "Targets"
    assert list(results["stages"]) == [part.name for part in gpu_check.STAGES]
    assert results["rehearsal"] is True


def test_every_arm_was_timed_on_every_model(rehearsal):
    timings = rehearsal[1]["stages"]["timings"]["results"]
    assert timings["skipped"] == []
    assert len(timings["models"]) == len(cuda_timing.RUNS) + len(cuda_timing.REPLAYED)
    for name, model in timings["models"].items():
        replayed = name.endswith("CUDA graph")
        for job in JOBS:
            if replayed and job.name != "clip":
                continue
            arms = model["jobs"][job.name]["arms"]
            assert list(arms) == list(cuda_timing.REPLAYED_WAYS if replayed else job.ways)
            for arm, seen in arms.items():
                assert "problem" not in seen, (name, job.name, arm)
                for clock in cuda_timing.CLOCKS:
                    assert 0 < seen[clock]["p25_us"] <= seen[clock]["median_us"] <= seen[clock]["p75_us"]
            assert replayed or arms[OURS]["error"] < TOLERANCE[model["dtype"]]


def test_every_building_block_was_timed(rehearsal):
    blocks = rehearsal[1]["stages"]["timings"]["results"]["blocks"]
    assert {name: list(model["jobs"]) for name, model in blocks.items()} == {
        name: [job.name for job in jobs] for name, jobs in cuda_timing.BLOCK_RUNS
    }
    for name, jobs in cuda_timing.BLOCK_RUNS:
        for job in jobs:
            found = blocks[name]["jobs"][job.name]
            assert list(found["arms"]) == list(cuda_timing.BLOCKS[job]), (name, job.name)
            for arm, seen in found["arms"].items():
                assert "problem" not in seen, (name, job.name, arm)
                assert seen["wall"]["median_us"] > 0 and seen["gb_per_s"] > 0 and "of_copy" in seen
                assert seen["error"] is None if arm == penalty_jobs.AUTOGRAD_ALONE else seen["error"] < 1e-5


def test_every_case_was_counted(rehearsal):
    counted = rehearsal[1]["stages"]["launches"]["results"]
    assert list(counted) == list(launches.MODELS)
    assert list(counted["mlp_251"]) == [case.name for case in launches.CASES]
    for cases in counted.values():
        for name, case in cases.items():
            assert "problem" not in case, name


def test_all_tests_of_kernels_run_on_the_device():
    """But for those that do not depend on the device, and those that have a stage of their own."""
    assert gpu_check.DEVICE_TESTS[0] == "tests"
    ignored = {option.removeprefix("--ignore=tests/") for option in gpu_check.DEVICE_TESTS[1:]}
    elsewhere = {"bench", "build", "demo", "determinism", "gpu_check", "guarantees", "step_atomic", "step_gpu"}
    assert ignored == {f"test_{name}.py" for name in elsewhere}
    assert all((ROOT / "tests" / name).exists() for name in ignored)


# --- Exit status, time limits ---------------------------------------------------------------------


def fails(check: gpu_check.Check, limit: float) -> gpu_check.Outcome:
    raise OSError("on purpose")


def passes(check: gpu_check.Check, limit: float) -> gpu_check.Outcome:
    return gpu_check.Outcome("passed", "fine")


def exit_status(tmp_path, **options) -> tuple[int, dict]:
    with pytest.raises(typer.Exit) as ended:
        gpu_check.main(tmp_path, seconds=100, rehearse=True, **options)
    return ended.value.exit_code, json.loads((tmp_path / "sgd_cuda.json").read_text())["stages"]


def test_a_stage_that_fails_stops_none_but_shows_in_the_exit_status(tmp_path, monkeypatch):
    parts = [gpu_check.Stage(name, name, run, 50, 10) for name, run in (("tests", fails), ("launches", passes))]
    monkeypatch.setattr(gpu_check, "STAGES", parts)
    status, stages = exit_status(tmp_path)
    assert status == 1
    assert [part["status"] for part in stages.values()] == ["failed", "passed"]
    assert "on purpose" in stages["tests"]["says"]
    monkeypatch.setattr(gpu_check, "STAGES", parts[1:])
    assert exit_status(tmp_path)[0] == 0


def test_a_test_that_fails_is_named_and_shows_in_the_exit_status(tmp_path, monkeypatch):
    file = tmp_path / "test_odd.py"
    file.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2, 'odd | numbers'\n")
    monkeypatch.setattr(gpu_check, "STAGES", [part for part in gpu_check.STAGES if part.name == "tests"])
    status, stages = exit_status(tmp_path, tests=[str(file)])
    assert status == 1
    results = stages["tests"]["results"]
    assert (results["passed"], results["failed"]) == (1, 1)
    [[name, message]] = results["failures"]
    assert name.endswith("test_bad") and "odd | numbers" in message
    assert "odd / numbers" in (tmp_path / "sgd_cuda.md").read_text()


def test_tests_that_do_not_run_are_no_success(tmp_path):
    result = suite.run([str(tmp_path / "test_absent.py")], 60, tmp_path, {}, 0)
    assert result.bad and "exit status 4" in result.says
    nothing = suite.SuiteResult(skipped=3)
    assert gpu_check.of_tests(nothing, "Tests", "failed").status == "failed"


def test_a_command_ends_at_its_limit():
    ended = stage.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 3)
    assert ended.code is None and ended.seconds < 20
    assert "stopped after" in ended.reason and ended.last_lines(20)[0] == "begun"


def test_a_long_message_hides_no_other_column(capsys):
    outcome = gpu_check.Outcome("failed", "RuntimeError: " + "a long message " * 20, seconds=7, limit=30)
    summary = gpu_check.Report(Path("out"), rehearsed=False)
    summary.outcomes = dict.fromkeys([part.name for part in gpu_check.STAGES], outcome)
    summary.stages_table().print(Console(width=180, file=sys.stdout))
    printed = capsys.readouterr().out
    for part in gpu_check.STAGES:
        assert part.title in printed
    assert printed.count("| failed ") == printed.count(" 7 of 30 ") == len(gpu_check.STAGES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    command = [sys.executable, "-m", "benchmarks.gpu_architecture"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stdout == ""
    first, *_, last = run.stderr.splitlines()
    assert first.startswith(f"make gpu-check needs a GPU, but torch {torch.__version__} of ")
    assert "REHEARSE=1" in last and "Traceback" not in run.stderr


def test_later_stages_keep_what_they_need():
    parts = [
        gpu_check.Stage(str(i), "", passes, at_most, at_least)
        for i, (at_most, at_least) in enumerate([(90, 20), (50, 30)])
    ]
    assert gpu_check.limit_of(parts, 200) == 90
    assert gpu_check.limit_of(parts, 70) == 40
    assert gpu_check.limit_of(parts, 25) == 10
    assert gpu_check.limit_of(parts[1:], 200) == 50


# --- What only a GPU's tools print ----------------------------------------------------------------


def event(cat: str, name: str, ts: float, dur: float = 1.0) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


TRACE = [
    {"ph": "M", "name": "process_name"},
    event("user_annotation", launches.REGION, 100, 50),
    event("gpu_user_annotation", launches.REGION, 100, 90),
    event("cuda_runtime", "cudaDeviceSynchronize", 90),
    event("cuda_runtime", "cudaLaunchKernel", 110),
    event("cuda_driver", "cuLaunchKernelEx", 120),
    event("cuda_runtime", "cudaMemcpyAsync", 130),
    event("cuda_runtime", "cudaStreamSynchronize", 140),
    event("cuda_runtime", "cudaDeviceSynchronize", 200),
    event("kernel", "void regfused::(anonymous namespace)::step_norm<float, 4>(regfused::Table)", 115, 2.0),
    event("kernel", "void regfused::step_update<float>(Table)", 160, 4.0),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 135),
]


def test_calls_are_counted_inside_of_the_region_and_kernels_wherever_they_end():
    counted = launches.count(TRACE, 1)
    seen = {column: counted[column] for column in launches.COLUMNS}
    assert seen == {
        "kernels": 2,
        "launch calls": 2,
        "waits": 1,
        "copies": 1,
        "fills": 0,
        "allocations": 0,
        "torch operations": 0,
    }
    assert [launches.short(name) for name in counted["by kernel"]] == ["step_norm<float, 4>", "step_update<float>"]
    assert [kernel["mean us"] for kernel in counted["by kernel"].values()] == [2.0, 4.0]


def test_targets_are_judged_by_what_was_counted():
    def reached(events, witness):
        case = {**launches.count(events, 1), "torch's own witness": witness}
        return [row[-1] for row in targets.launch_rows({"mlp_251": {"regfused: clip": case}})]

    quiet = [e for e in TRACE if e["name"] != "cudaStreamSynchronize" and e.get("cat") != "gpu_memcpy"]
    assert reached(quiet, "none") == ["yes", "yes", "yes", "yes"]
    assert reached(TRACE, "called a synchronizing operation") == ["yes", "no", "no", "no"]
    assert reached([*TRACE, event("kernel", "another", 170)], "none")[0] == "no"
    assert reached(TRACE[:3], "none") == ["?"] * 4  # a profiler that saw nothing
    unknown = 3 * 2 + len(targets.LARGE_BLOCKS) + 4 + len(launches.BLOCKS) + len(targets.RATIOS)
    assert [row[-1] for row in targets.table({}, {}).rows] == ["?"] * unknown
    assert math.isnan(cuda_timing.ratio({}, {}, "wall"))


FOREACH = "void regfused::(anonymous namespace)::foreach_kernel<4096ul, (regfused::ForeachPass)2>(Arguments)"


def test_building_blocks_are_judged_by_their_own_kernels():
    def clip_row(kernels, *more):
        region = event("user_annotation", launches.REGION, 100, 50)
        ran = [event("kernel", name, 110 + i) for i, name in enumerate(kernels)]
        case = launches.count([region, *ran, *more], 1)
        rows = list(targets.block_launch_rows({"mlp_251": {"regfused.clip_grad_norm_": case}}))
        assert [row[-1] for row in rows[1:]] == ["?"] * (len(launches.BLOCKS) - 1)
        return rows[0][2:]

    norm_to_float = "void at::native::unrolled_elementwise_kernel<at::native::direct_copy>(int)"
    assert clip_row([FOREACH, FOREACH, norm_to_float]) == ["2, 0 (and 1 of torch's)", "yes"]
    assert clip_row([FOREACH, FOREACH, FOREACH])[-1] == "no"
    assert clip_row([FOREACH])[-1] == "no"
    assert clip_row([FOREACH, FOREACH], event("cuda_runtime", "cudaStreamSynchronize", 120))[-1] == "no"
    assert clip_row([])[-1] == "?"  # a profiler that saw nothing


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void regfused::<unnamed>::step_update<float>(Table)+0x160
=========     by thread (3,0,0) in block (0,0,0)
=========     Address 0x7f0 is out of bounds
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<4>(int)+0x60
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void regfused::step_norm<float>(Table)+0x90
=========     and Read access at void regfused::step_norm<float>(Table)+0x110 [12 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    "output, code, status, findings",
    [
        (MEMCHECK + sanitizer_run.DONE, 0, "failed", 1),
        (RACECHECK + sanitizer_run.DONE, 0, "failed", 1),
        (f"========= COMPUTE-SANITIZER\n{sanitizer_run.DONE}\n========= ERROR SUMMARY: 0 errors", 0, "passed", 0),
        ("========= Error: Device not supported. Please refer to the documentation", 1, "not possible", 0),
        ("========= Error: Target application terminated before first instrumented API call", 255, "not possible", 0),
        ("Traceback (most recent call last):\nAssertionError: a parameter did not move", 1, "failed", 0),
        ("torch.float32: done", None, "failed", 0),
    ],
)
def test_sanitizer_findings_count_where_they_are_in_our_kernels(output, code, status, findings):
    verdict = sanitizer.judge("memcheck", stage.Ended(code, 1.0, output))
    assert (verdict.status, len(verdict.findings)) == (status, findings)


def test_sanitizer_options_are_those_that_the_version_has():
    usage = "--tool arg --kernel-name arg --print-limit arg"
    limited = ["--print-limit", "1000"]
    assert sanitizer.options("racecheck", usage) == ["--tool", "racecheck", *limited, "--kernel-name", "kns=regfused"]
    assert sanitizer.options("initcheck", usage) == ["--tool", "initcheck", *limited]
