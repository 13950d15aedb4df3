"""Runs a function on several ranks (processes, gloo) and hands over what each returns."""

import datetime
import os
from collections.abc import Callable
from pathlib import Path

import torch


def on_ranks(work: Callable, world: int, folder: Path, *args, seconds: int = 120) -> list:
    """What ``work(rank, *args)`` returns on each rank; it must be a function of a module, and what it returns saved."""
    torch.multiprocessing.spawn(_run, (work, world, str(folder), seconds, args), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, work: Callable, world: int, folder: str, seconds: int, args: tuple) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    torch.save(work(rank, *args), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def message_of(call: Callable) -> str:
    """Of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
