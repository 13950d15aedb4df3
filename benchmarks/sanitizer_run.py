"""A few steps that touch every kernel at odd sizes and alignments: what compute-sanitizer runs."""

from __future__ import annotations

import argparse

import torch

import regfused

SIZES = (1, 3, 17, 1023, 4099, 16385)
# Of parameter and gradient, in elements, from the start of an allocation: aligned, and each way of not being so.
OFFSETS = ((0, 0), (1, 1), (1, 0), (0, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = (
    {},
    {"momentum": 0.9, "weight_decay": 0.01},
    {"momentum": 0.9, "nesterov": True, "max_norm": 100.0, "l1": 0.1, "l2": 0.1},
    {"momentum": 0.9, "max_norm": 1e4, "norm_type": 1.0, "nonfinite": "skip"},
    {"max_norm": 1.0, "norm_type": float("inf"), "l1": 0.1, "penalty_in_clip": False},
    {"momentum": 0.9, "l1": 0.1, "l2": 0.1, "proximal": True, "max_norm": 100.0, "decoupled_weight_decay": True},
)
SURE_TO_MOVE = 1000  # elements: in bfloat16, a single one may be too large for its step
DONE = "all steps done"


def buffer(size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Made on the CPU and copied, so that no other kernel's work is mixed with ours."""
    return torch.randn(size).to(dtype).to(device)


def make_params(dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters that end where their allocation ends, and the whole allocations."""
    params, whole = [], []
    for size in SIZES:
        for param_offset, grad_offset in OFFSETS:
            whole.append(buffer(size + param_offset, dtype, device))
            param = whole[-1][param_offset:].detach().requires_grad_()
            param.grad = buffer(size + grad_offset, dtype, device)[grad_offset:]
            params.append(param)
    return params, whole


def on_cpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().cpu().clone() for tensor in tensors]


def run(dtype: torch.dtype, options: dict, device: str) -> None:
    params, whole = make_params(dtype, device)
    before = on_cpu(whole)
    optimizer = regfused.SGD(params, lr=0.1, **options)
    for _ in range(3):
        optimizer.step()
    offsets = [param_offset for _ in SIZES for param_offset, _ in OFFSETS]
    for old, new, offset in zip(before, on_cpu(whole), offsets, strict=True):
        assert torch.equal(old[:offset], new[:offset]), f"{dtype}, {options}: wrote in front of a parameter"
        assert new.isfinite().all(), f"{dtype}, {options}: a parameter is not finite"
        if new.numel() > SURE_TO_MOVE:
            assert not torch.equal(old[offset:], new[offset:]), f"{dtype}, {options}: a parameter did not move"


def run_amp(dtype: torch.dtype, device: str) -> None:
    """With a gradient scale: a step without overflow, and one with, which must change nothing."""
    params, whole = make_params(dtype, device)
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=100.0, fused=True)
    for found_inf in (0.0, 1.0):
        optimizer.grad_scale = torch.tensor(2.0).to(device)
        optimizer.found_inf = torch.tensor(found_inf).to(device)
        before = on_cpu(whole)
        optimizer.step()
        same = all(map(torch.equal, before, on_cpu(whole)))
        assert same == bool(found_inf), f"{dtype}: found_inf={found_inf}, but parameters changed: {not same}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for dtype in DTYPES:
        for options in OPTIONS:
            run(dtype, options, device)
        run_amp(dtype, device)
        print(f"{dtype}: done", flush=True)
    print(DONE)


if __name__ == "__main__":
    main()
