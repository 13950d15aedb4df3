"""A few steps and building blocks that touch every kernel at odd sizes and alignments: what compute-sanitizer runs."""

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
NORM_TYPES = (1.0, 2.0, float("inf"))
SURE_TO_MOVE = 1000  # elements: in bfloat16, a single one may be too large for its step
DONE = "all steps and building blocks done"


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


def on_the_cpu(params: list[torch.Tensor]) -> list[torch.Tensor]:
    twins = [p.detach().cpu().clone().requires_grad_() for p in params]
    for twin, p in zip(twins, params, strict=True):
        twin.grad = p.grad.cpu().clone()
    return twins


def assert_same(what: str, dtype: torch.dtype, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Up to what the order of a sum does to it in float32, and a rounding to the dtype."""
    torch.testing.assert_close(
        [x.detach().cpu() for x in got], [x.detach() for x in want], msg=lambda found: f"{what}, {dtype}: {found}"
    )


def run_lists(dtype: torch.dtype, device: str) -> None:
    """What passes over lists of tensors gives what it does on the CPU, and writes nothing in front of a gradient."""
    for norm_type in NORM_TYPES:
        params, _ = make_params(dtype, device)
        twins = on_the_cpu(params)
        whole = [p.grad._base for p in params]
        before = on_cpu(whole)
        norms = [regfused.grad_norm(params, norm_type), regfused.clip_grad_norm_(params, 1.0, norm_type)]
        norm = regfused.clip_grad_norm_(twins, 1.0, norm_type)
        grads = [p.grad for p in params]
        assert_same("clip_grad_norm_", dtype, [*norms, *grads], [norm, norm, *(p.grad for p in twins)])
        offsets = [grad_offset for _ in SIZES for _, grad_offset in OFFSETS]
        for old, new, offset in zip(before, on_cpu(whole), offsets, strict=True):
            assert torch.equal(old[:offset], new[:offset]), f"{dtype}: clipping wrote in front of a gradient"
    value, want = (regfused.penalty(tensors, l1=0.1, l2=0.3) for tensors in (params, twins))
    assert_same("penalty", dtype, [value], [want])
    assert_same("penalty backward", dtype, torch.autograd.grad(value, params), torch.autograd.grad(want, twins))


def run_dropout(dtype: torch.dtype, device: str) -> None:
    """With p = 0.5: each element becomes zero or exactly twice what it was, forward, backward and in place."""
    for size in SIZES:
        for offset, _ in OFFSETS:
            whole = buffer(size + offset, dtype, device)
            x = whole[offset:].detach().requires_grad_()
            old = x.detach().cpu().clone()
            y = regfused.dropout(x, 0.5)
            y.backward(buffer(size, dtype, device).fill_(1))
            kept = (y != 0).cpu()
            assert torch.equal(y.detach().cpu(), 2 * kept * old), f"dropout, {dtype}, {size} elements: wrong"
            assert torch.equal(x.grad.cpu(), 2 * kept.to(dtype)), f"dropout, {dtype}, {size} elements: another mask"
            in_front = whole[:offset].cpu().clone()
            z = regfused.dropout(whole[offset:], 0.5, inplace=True).cpu()
            assert torch.equal(z, 2 * (z != 0) * old), f"dropout in place, {dtype}, {size} elements: wrong"
            assert torch.equal(whole[:offset].cpu(), in_front), f"dropout, {dtype}: wrote in front of its input"
            if size > SURE_TO_MOVE:
                assert 0 < kept.sum() < size and (z == 0).any(), f"dropout, {dtype}, {size} elements: nothing dropped"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    torch.manual_seed(0)
    for dtype in DTYPES:
        for options in OPTIONS:
            run(dtype, options, device)
        run_amp(dtype, device)
        run_lists(dtype, device)
        run_dropout(dtype, device)
        print(f"{dtype}: done", flush=True)
    print(DONE)


if __name__ == "__main__":
    main()
