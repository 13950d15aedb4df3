"""What only a GPU can show: real graphs' streams, waiting, several devices, more than 2^31 elements."""

import copy
import math

import pytest
import torch
from step_cases import OPTIONS, assert_params_equal, copy_params, give_grads, make_params, share_grads, with_defaults

import regfused
from regfused import reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or regfused.build_info()["cuda"] in ("not built", "emulated"),
    reason="no GPU, or no CUDA kernels",
)

GIB = 2**30


@pytest.fixture(autouse=True)
def _on_the_gpu():
    before = torch.get_default_device()
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(before)


@pytest.fixture
def waiting_is_an_error():
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9, "max_norm": 1.0},
        {"momentum": 0.9, "l1": 0.1, "l2": 0.1, "max_norm": 1.0},
        {"nonfinite": "skip", "momentum": 0.9},
        {"proximal": True, "l1": 0.1, "norm_type": math.inf, "max_norm": 1.0},
    ],
    ids=str,
)
def test_a_step_waits_for_nothing(options, waiting_is_an_error):
    params = make_params([1000, 33, 70_000])
    optimizer = regfused.SGD(params, lr=torch.tensor(0.1), **options)
    for step in range(3):
        give_grads(params)
        if step == 1:  # the first step makes buffers and tables
            waiting_is_an_error()
        optimizer.step()
        _ = optimizer.stats


@pytest.mark.parametrize("name", ["plain", "momentum", "elastic net, momentum", "proximal elastic net", "decoupled"])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_bits_of_the_cpu_kernels_where_no_norm_is_needed(name, dtype):
    params = make_params([4099, 70_000], dtype)
    twins = [torch.nn.Parameter(p.detach().cpu()) for p in params]
    options = with_defaults(OPTIONS[name])
    ours, theirs = regfused.SGD(params, **options), regfused.SGD(twins, **options)
    for _ in range(3):
        give_grads(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.cpu()
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p.cpu(), q)


def test_grad_scaler_on_the_gpu(waiting_is_an_error):
    torch.manual_seed(1)
    model = torch.nn.Linear(50, 30)
    twin = copy.deepcopy(model)
    ours = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, max_norm=0.5, fused=True)
    loop = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=65536.0, growth_interval=2)
    for step in range(6):
        x = torch.randn(40, 50)
        overflow = step in (0, 3)
        ours.zero_grad()
        loop.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        if overflow:
            model.weight.grad[0, 0] = math.inf
        if step == 2:
            waiting_is_an_error()
        scaler.step(ours)
        torch.cuda.set_sync_debug_mode("default")
        scaler.update()
        if not overflow:
            twin(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            loop.step()
        assert_params_equal(model.parameters(), twin.parameters(), atol=1e-6)
    assert ours.stats.skipped == 2


def test_on_another_stream():
    params = make_params([300_000])
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, max_norm=1.0)
    ours, theirs = regfused.SGD(params, **options), reference.SGD(twins, **options)
    stream = torch.cuda.Stream()
    for step in range(4):
        give_grads(params)
        share_grads(params, twins)
        theirs.step()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream if step % 2 else torch.cuda.current_stream()):
            ours.step()
        torch.cuda.current_stream().wait_stream(stream)
    assert_params_equal(params, twins, atol=1e-6)


def test_cpu_and_gpu_in_one_optimizer():
    devices = ["cuda", "cpu", *(f"cuda:{i}" for i in range(1, torch.cuda.device_count()))]
    params = [torch.nn.Parameter(torch.randn(1000 + i, device=d)) for i, d in enumerate(devices * 2)]
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, l1=0.01, max_norm=1.0)
    ours, theirs = regfused.SGD(params, **options), reference.SGD(twins, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, device=p.device)
        share_grads(params, twins)
        ours.step()
        theirs.step()
        assert ours.stats.grad_norm.item() == pytest.approx(theirs.stats.grad_norm.item(), rel=1e-6)
    assert_params_equal(params, twins, atol=1e-6)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_have_one_norm_and_wait_for_nothing(waiting_is_an_error):
    params = [torch.nn.Parameter(torch.randn(5000, device=f"cuda:{i % 2}")) for i in range(6)]
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, max_norm=1.0)
    ours, theirs = regfused.SGD(params, **options), reference.SGD(twins, **options)
    for step in range(4):
        for p in params:
            p.grad = torch.randn(p.shape, device=p.device)
        share_grads(params, twins)
        if step == 2:
            waiting_is_an_error()
        ours.step()
        torch.cuda.set_sync_debug_mode("default")
        theirs.step()
    assert_params_equal(params, twins, atol=1e-6)


def test_parameter_moved_after_construction():
    p = torch.nn.Parameter(torch.ones(4, device="cpu"))
    p.grad = torch.ones(4, device="cpu")
    optimizer = regfused.SGD([p], lr=0.1, momentum=0.9)
    optimizer.step()
    moved = p.detach().cuda()
    p.grad = None
    p.data = moved
    p.grad = torch.ones(4)
    with pytest.raises(
        ValueError, match="momentum_buffer of parameter 0 of group 0 must have device cuda:0, but has cpu"
    ):
        optimizer.step()
    assert torch.equal(p.detach(), moved)


def test_gradient_on_another_device():
    p = torch.nn.Parameter(torch.ones(4, device="cpu"))
    p.grad = torch.ones(4, device="cpu")
    optimizer = regfused.SGD([p], lr=0.1)
    p.data = p.data.cuda()
    with pytest.raises(RuntimeError, match="a gradient must be on the device of its parameter"):
        optimizer.step()
    assert (p == 1).all()


@pytest.mark.parametrize("max_norm", (None, 1.0))
def test_more_than_2_to_the_31_elements(max_norm):
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB")
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    p.grad = torch.full((n,), 0.5, dtype=torch.bfloat16)
    p.grad[-1] = 2.0
    optimizer = regfused.SGD([p], lr=0.25, momentum=0.9, max_norm=max_norm)
    optimizer.step()
    norm = math.sqrt(0.25 * (n - 1) + 4)
    c = 1 if max_norm is None else 1 / norm
    if max_norm is not None:
        assert optimizer.stats.grad_norm.item() == pytest.approx(norm, rel=1e-6)
    want = torch.tensor([1 - 0.25 * 0.5 * c, 1 - 0.25 * 2 * c]).bfloat16()
    assert (p[: n - 1 : 2**20] == want[0]).all() and (p[-5000:-1] == want[0]).all() and p[-1] == want[1]
    assert int((p == want[0]).sum()) >= n - 1
