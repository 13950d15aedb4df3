"""Counts the collective operations of a step of sharded parameters, with torch's fake process group: no rank but this.

Shapes are those of real models; each parameter is spread as FSDP2, hybrid sharding, or FSDP2 with tensor parallelism
spread it. The fake process group leaves numbers as they are, so results mean nothing here; counts and bytes do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import regfused
from benchmarks.models import Shapes, read_models
from regfused import extension, verdict

BYTES_OF_STATE = 2 * 4  # of Adam, float32


@dataclass(frozen=True)
class Layout:
    """A mesh of ranks, and how a parameter is spread over it: by dimension of the mesh, R or the dimension to split."""

    name: str
    mesh: tuple[int, ...]
    of_matrix: str
    of_vector: str

    @property
    def ranks(self) -> int:
        return math.prod(self.mesh)

    def placements(self, dims: int) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        letters = self.of_matrix if dims > 1 else self.of_vector
        return [Replicate() if letter == "R" else Shard(int(letter)) for letter in letters]


LAYOUTS = (
    Layout("FSDP2", (64,), "0", "0"),
    Layout("hybrid: 8 groups of 64", (8, 64), "R0", "R0"),
    Layout("FSDP2 with tensor parallelism", (16, 8), "01", "0R"),
    Layout("FSDP2", (1024,), "0", "0"),
)


@contextmanager
def fake_ranks(count: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def parameters(shapes: Shapes, layout: Layout) -> list[nn.Parameter]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", layout.mesh)
    params = []
    for shape in shapes:
        placements = layout.placements(len(shape))
        params.append(nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, placements, src_data_rank=None)))
        params[-1].grad = distribute_tensor(torch.ones(shape), mesh, placements, src_data_rank=None)
    return params


def collectives(call: Callable[[], object]) -> dict[str, int]:
    """By name, of one call."""
    from torch.distributed.tensor.debug import CommDebugMode

    # The mode that counts must not change the way that a step takes.
    with mock.patch.object(extension.C, "is_watched", return_value=False), CommDebugMode() as mode:
        call()
    return {str(operation).split(".")[-1]: count for operation, count in mode.get_comm_counts().items()}


@dataclass(frozen=True)
class Counts:
    tensors: int
    numel: int
    here: int  # elements on this rank
    ours: dict[str, int]
    torchs: dict[str, int]


def count(shapes: Shapes, layout: Layout) -> Counts:
    """Of a step of AdamW with a clip."""
    with fake_ranks(layout.ranks):
        params = parameters(shapes, layout)
        ours = regfused.AdamW(params, max_norm=1.0)
        # What the ranks have to agree on is added up over them, which the fake process group does not do.
        real = verdict.all_reduce_rows

        def as_one_rank(rows: list[list[float]], *arguments: Any, is_max: bool) -> list[int]:
            real(rows, *arguments, is_max=is_max)
            return [1] * len(rows)

        with mock.patch.object(verdict, "all_reduce_rows", as_one_rank):
            ours.step()  # it makes the state
            of_ours = collectives(ours.step)
        theirs = torch.optim.AdamW(params, foreach=True)

        def torchs_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            theirs.step()

        try:
            torchs_step()
            of_torch = collectives(torchs_step)
        except RuntimeError as error:
            of_torch = {f"raises {type(error).__name__}": 0}
        here = sum(p.to_local().numel() for p in params)  # type: ignore[attr-defined]
        return Counts(len(params), sum(math.prod(shape) for shape in shapes), here, of_ours, of_torch)


def shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {name}" if n else name for name, n in counts.items()) or "0"


def main(
    models: Annotated[str, typer.Option(help="Comma-separated names of shape lists.")] = "resnet50,gpt2_124m",
) -> None:
    """Count the collective operations of AdamW with a clip on fake ranks."""
    console = Console(highlight=False)
    table = Table(box=box.ASCII2, title="A step of AdamW with max_norm", title_justify="left")
    for name in ("model", "tensors", "spread as", "ranks", "elements", "on rank 0", "state, MB", "regfused", "torch"):
        table.add_column(name, justify="left" if name in ("model", "spread as", "regfused", "torch") else "right")
    shapes_of = read_models()
    for name in models.split(","):
        for layout in LAYOUTS:
            found = count(shapes_of[name], layout)
            table.add_row(
                name,
                str(found.tensors),
                layout.name,
                f"{layout.ranks:,}",
                f"{found.numel:,}",
                f"{found.here:,}",
                f"{found.here * BYTES_OF_STATE / 1e6:.1f}",
                shown(found.ours),
                shown(found.torchs),
            )
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
