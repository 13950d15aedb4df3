"""Trains a sharded model (FSDP2) with AdamW, a clip and a group lasso, and goes on from its checkpoint.

    torchrun --nproc_per_node=2 examples/fsdp2.py
    torchrun --nproc_per_node=2 examples/fsdp2.py --resume

NCCL where there are GPUs, gloo on the CPU otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import regfused


def digits() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """1797 images of 8 x 8 points from scikit-learn: four fifths to train, the rest to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 5], order[len(x) // 5 :]
    return TensorDataset(x[train], y[train]), (x[test], y[test])


def network(hidden: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def groups(model: nn.Sequential, group_l1: float) -> list[dict[str, Any]]:
    """A group lasso for the rows of the hidden layers: a row is all that makes one unit.

    FSDP2 splits a parameter along its rows, so each of them is whole on its rank, and the kernels shrink it there.
    """
    hidden = [model[0].weight, model[2].weight]
    others = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [{"params": hidden, "group_l1": group_l1}, {"params": others}]


def on_this_rank(tensors: Iterator[Tensor]) -> int:
    parts = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(part.numel() * part.element_size() for part in parts)


def bytes_per_rank(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> Table:
    state = [t for entry in optimizer.state.values() for t in entry.values() if t.dim()]
    kinds = {
        "parameters": list(model.parameters()),
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "state": state,
    }
    here = torch.tensor([on_this_rank(iter(tensors)) for tensors in kinds.values()], device=device)
    of_ranks = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, here)
    table = Table(box=box.SIMPLE_HEAD, title="Bytes", title_justify="left")
    for name in ("", "whole", *(f"rank {rank}" for rank in range(len(of_ranks)))):
        table.add_column(name, justify="right" if name else "left")
    for i, (name, tensors) in enumerate(kinds.items()):
        whole = sum(t.numel() * t.element_size() for t in tensors)
        table.add_row(name, f"{whole:,}", *(f"{int(rank[i]):,}" for rank in of_ranks))
    return table


def main(
    epochs: Annotated[int, typer.Option(min=1, help="To train now.")] = 10,
    hidden: Annotated[int, typer.Option(min=1, help="Units of a hidden layer.")] = 256,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    group_l1: Annotated[float, typer.Option(help="Strength of the group lasso.")] = 4e-3,
    max_norm: Annotated[float, typer.Option(help="Of the gradient, over all ranks.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The checkpoint, a folder.")] = Path("out/fsdp2"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint.")] = False,
) -> None:
    """Train on digits with as many processes as torchrun starts."""
    use_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
    console = Console(quiet=rank != 0, highlight=False)
    if resume and not out.exists():
        if rank == 0:
            Console(stderr=True).print(f"--resume demands a checkpoint, but there is no folder {out}", style="red")
        dist.destroy_process_group()
        raise typer.Exit(2)

    model = network(hidden).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = regfused.AdamW(groups(model, group_l1), lr=lr, max_norm=max_norm)

    first = 0
    if resume:
        weights, state = get_state_dict(model, optimizer)
        saved: dict[str, Any] = {"model": weights, "optimizer": state, "epochs": 0}
        checkpoint.load(saved, checkpoint_id=out)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        first = saved["epochs"]
        console.print(f"Going on after epoch {first}.")

    train, (x, y) = digits()
    sampler: DistributedSampler[Any] = DistributedSampler(train, world, rank)
    batches = DataLoader(train, batch_size=128 // world, sampler=sampler)
    for epoch in track(range(first, first + epochs), "epochs", console=console, disable=rank != 0):
        sampler.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()

    stats = optimizer.stats.as_floats()  # on every rank: the penalty is summed up over all
    sparsity = regfused.sparsity([model[0].weight, model[2].weight])
    memory = bytes_per_rank(model, optimizer, device)
    with torch.no_grad():
        accuracy = (model(x.to(device)).argmax(1).cpu() == y).float().mean().item()
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state, "epochs": first + epochs}, checkpoint_id=out)

    console.print(f"{world} ranks on {device.type}, {first + epochs} epochs: accuracy on test images {accuracy:.1%}")
    console.print(
        f"Last step: norm of the gradient {stats['grad_norm']:.3f}, clipped by {stats['clip_coef']:.3f}; "
        f"hidden units without input: {sparsity.zero_groups} of {sparsity.groups}"
    )
    console.print(memory)
    console.print(f"Checkpoint: {out} (--resume goes on from it, with any number of ranks)", soft_wrap=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
