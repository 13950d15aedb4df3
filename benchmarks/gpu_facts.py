"""What a reader must know of the machine to judge numbers from its GPU."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import regfused
from benchmarks import report

QUERY = "driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,ecc.mode.current"


def facts(device: str) -> dict[str, Any]:
    """Versions, and what there is of the GPU; what cannot be found out says why."""
    found = report.environment()
    found["system"] = platform.platform()
    found["torch built for CUDA"] = torch.version.cuda
    found["nvcc"] = attempt(lambda: last_line("nvcc", "--version"))
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpus"] = torch.cuda.device_count()
        found["compute capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        found["memory MiB"] = properties.total_memory // 2**20
        found["L2 MiB"] = attempt(lambda: properties.L2_cache_size / 2**20)
        found[f"nvidia-smi {QUERY}"] = attempt(
            lambda: last_line("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
        )
    return found


def attempt(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        return f"not known: {error}"


def last_line(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not found"
    run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return ((run.stdout + run.stderr).strip().splitlines() or ["no output"])[-1]


def main(device: Annotated[str, typer.Option()], out: Annotated[Path, typer.Option()]) -> None:
    """Write what is there into a JSON file."""
    report.write_whole(out, json.dumps(facts(device)))
    print(regfused.build_info())


if __name__ == "__main__":
    typer.run(main)
