"""Cases in which torch.optim.SGD(fused=True) has been wrong on the CPU; held to the for-loop."""

import copy
import datetime
import os

import pytest
import torch
from step_cases import DEVICE, give_grads, make_params

import regfused


def _loop(params, **options):
    return torch.optim.SGD(params, foreach=False, **options)


def _twin(params):
    twins = [torch.nn.Parameter(p.detach().clone(memory_format=torch.preserve_format)) for p in params]
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone(memory_format=torch.preserve_format)
    return twins


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_types_of_32_or_more_elements(dtype, isa):
    # torch 2.13.0 never stored whole vectors of half types.
    params = make_params([31, 32, 33, 64, 1000], dtype)
    give_grads(params)
    want = [(p.detach().double() - 0.1 * p.grad.double()).to(dtype) for p in params]
    regfused.SGD(params, lr=0.1, fused=True).step()
    for p, w in zip(params, want, strict=True):
        # lr is 0.1 rounded to float32: it may tip a rounding to the half type.
        torch.testing.assert_close(p.detach(), w, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("fused", (None, True))
@pytest.mark.parametrize("options", ({}, {"momentum": 0.9}, {"momentum": 0.9, "max_norm": 0.5}), ids=str)
def test_gradient_in_another_memory_format(options, fused):
    shape = (4, 3, 5, 7)
    for p_format, g_format in [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
        (torch.channels_last, torch.channels_last),
    ]:
        p = torch.nn.Parameter(torch.randn(shape).contiguous(memory_format=p_format))
        twin = torch.nn.Parameter(p.detach().clone())
        ours = regfused.SGD([p], lr=0.1, fused=fused, **options)
        theirs = _loop([twin], lr=0.1, momentum=options.get("momentum", 0))
        for _ in range(3):
            p.grad = torch.randn(shape).contiguous(memory_format=g_format)
            twin.grad = p.grad.clone()
            before = p.grad.clone()
            if "max_norm" in options:
                torch.nn.utils.clip_grad_norm_([twin], options["max_norm"])
            ours.step()
            theirs.step()
            assert torch.equal(p.grad, before) and p.grad.stride() == before.stride()
            torch.testing.assert_close(p, twin, rtol=0, atol=1e-6)
        assert p.is_contiguous(memory_format=p_format)
        assert ours._plan.tensors == 1


@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_amp_overflow_on_the_first_step_leaves_no_trace(momentum):
    params = make_params([100, 33])
    before = copy.deepcopy(params)
    optimizer = regfused.SGD(params, lr=0.1, momentum=momentum, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    for p in params:
        p.grad = torch.full_like(p, float("inf"))
    raw = [p.grad.clone() for p in params]
    scaler.scale(torch.ones(()))  # the scaler starts lazily
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert not optimizer.state and optimizer.stats.skipped == 1
    for p, q, g in zip(params, before, raw, strict=True):
        assert torch.equal(p, q) and torch.equal(p.grad, g)
    # And the next step is right.
    want = []
    for p in params:
        p.grad = torch.full_like(p, 512.0)
        want.append(p.detach() - 0.1)
    scaler.step(optimizer)
    for p, w in zip(params, want, strict=True):
        torch.testing.assert_close(p.detach(), w)
        assert torch.equal(p.grad, torch.ones_like(p))  # torch's contract: unscaled in place


@pytest.mark.parametrize("fused", (None, True))
def test_first_gradient_later(fused):
    params = make_params([10, 20, 30])
    options = dict(lr=0.1, momentum=0.9, dampening=0.5)
    give_grads(params)
    params[1].grad = None
    twins = _twin(params)
    ours, theirs = regfused.SGD(params, fused=fused, **options), _loop(twins, **options)
    for step in range(3):
        ours.step()
        theirs.step()
        give_grads(params)
        if step == 0:
            params[0].grad = None
        for p, q in zip(params, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert ours._plan.tensors == 3


def _fsdp_worker(rank: int, world: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    # Without a limit, the processes wait half an hour for each other where "lo" is down.
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=world, timeout=datetime.timedelta(minutes=2)
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, l1=0.01, l2=0.02, max_norm=0.1)
    x = torch.randn(8, 7)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    weights = [p.full_tensor().detach() for p in model.parameters()]
    if rank == 0:
        torch.save((weights, optimizer.stats.grad_norm), f"{folder}/weights.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.cpu
def test_fsdp2_parameters(tmp_path):
    torch.multiprocessing.spawn(_fsdp_worker, (2, str(tmp_path)), nprocs=2)
    weights, norm = torch.load(tmp_path / "weights.pt")
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))
    theirs = _loop(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 7)
    for _ in range(3):
        theirs.zero_grad()
        loss = model(x).square().mean()
        loss = loss + sum(0.01 * p.abs().sum() + 0.02 * p.square().sum() for p in model.parameters())
        loss.backward()
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        theirs.step()
    assert norm.item() == pytest.approx(total.item(), rel=1e-5)
    for got, want in zip(weights, model.parameters(), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fused", (None, True))
def test_momentum_buffer_of_a_wrong_size(fused):
    params = make_params([10, 20])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, fused=fused)
    give_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["momentum_buffer"] = torch.zeros(7)
    before = copy.deepcopy((params, optimizer.state_dict()))
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 1 of group 0 must have shape \(20,\).*\(7,\)"):
        optimizer.load_state_dict(saved)
    _assert_same(before, (params, optimizer.state_dict()))
    # The same behind the optimizer's back.
    optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(7)
    give_grads(params)
    before = copy.deepcopy(params)
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 1 of group 0 must have shape \(20,\)"):
        optimizer.step()
    _assert_same([p.detach() for p in before], [p.detach() for p in params])


def _assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            _assert_same(a[k], b[k])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            _assert_same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("fused", (None, True, False))
def test_version_counters_are_bumped(fused):
    params = make_params([10, 200_000])
    optimizer = regfused.SGD(params, lr=0.1, momentum=0.9, fused=fused)
    give_grads(params)
    optimizer.step()
    versions = [t._version for p in params for t in (p, optimizer.state[p]["momentum_buffer"])]
    graph = (params[0] * params[0]).sum()
    optimizer.step()
    after = [t._version for p in params for t in (p, optimizer.state[p]["momentum_buffer"])]
    assert all(b > a for a, b in zip(versions, after, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        graph.backward()


@pytest.mark.parametrize("fused", (None, True))
def test_an_error_in_group_2_changes_nothing_in_group_1(fused):
    params = make_params([10, 20])
    give_grads(params)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = regfused.SGD(groups, lr=0.1, momentum=0.9, fused=fused)
    optimizer.param_groups[1]["lr"] = float("nan")
    before = copy.deepcopy([p.detach() for p in params])
    with pytest.raises(ValueError, match="lr must be finite and >= 0, but got nan"):
        optimizer.step()
    _assert_same(before, [p.detach() for p in params])
    assert not optimizer.state
    optimizer.param_groups[1]["lr"] = 0.1
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), b - 0.1 * p.grad)
