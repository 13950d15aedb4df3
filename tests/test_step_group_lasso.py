"""Group lasso in the step: slices are shrunk by their norms, whole ones to exact zeros."""

import copy
import io
import math

import pytest
import torch
from step_cases import (
    BOTH,
    DEVICE,
    DTYPES,
    EMULATED,
    ON_CUDA_KERNELS,
    SLICED_SHAPES,
    assert_params_equal,
    check_against_oracle,
    copy_params,
    give_grads,
    laid_out,
    make_params,
    memory_orders,
    share_grads,
    shrink_groups,
)

import regfused
from regfused import reference

INF, NAN = math.inf, math.nan

LASSO = {"group_l1": 2.0, "momentum": 0.9, "l2": 0.01, "max_norm": 1.0}
# Elements first, then groups.
SPARSE = {"group_l1": 15.0, "l1": 3.0, "l2": 0.1, "proximal": True, "weight_decay": 0.01}
OPTIONS = {"lasso": LASSO, "sparse": SPARSE}


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def shaped(dim, dtype):
    """A parameter of every shape that has this dimension, in every memory format."""
    # The emulator is slow, and its kernels' tiles and segments are small: test_max_norm.py has the large shapes.
    most = 9000 if EMULATED else INF
    shapes = [s for s in SLICED_SHAPES if -max(len(s), 1) <= dim < max(len(s), 1) and math.prod(s) < most]
    params = []
    for shape in shapes:
        orders = memory_orders(len(shape))
        # Large ones in one format: which, depends on the shape.
        for order in orders if math.prod(shape) < 1000 else orders[len(params) % len(orders) :][:1]:
            tensor = make_params([shape], dtype)[0].detach()
            params.append(torch.nn.Parameter(laid_out(tensor, order)))
    return params


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, dim", [("lasso", 0), ("lasso", 1), ("sparse", -2), ("sparse", -1), ("lasso", 4)])
def test_kernels_against_float64(name, dim, dtype, isa, threads):
    threads(1)  # for the oracle, which is slow: below, any number of threads gives the same bits
    params = shaped(dim, dtype)
    optimizer = check_against_oracle(regfused.SGD, params, {**OPTIONS[name], "group_dim": dim}, steps=2)
    assert optimizer._plan.tensors == len(params)  # the kernels did it
    if dim != 4:
        assert 0.01 < optimizer.stats.zero_fraction < 0.9


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name, dim", [("lasso", -1), ("sparse", 0), ("sparse", 1)])
def test_reference_against_float64(name, dim, dtype, threads):
    threads(1)
    check_against_oracle(reference.SGD, shaped(dim, dtype), {**OPTIONS[name], "group_dim": dim}, steps=2)


@BOTH
@pytest.mark.parametrize("proximal", (False, True))
def test_l1_and_l2_act_as_without_groups(make, proximal):
    # The step without groups, and then the map: on the CPU the same up to the rounding of a factor and a product.
    params = make_params([(40, 30), (7, 2100)])
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, l1=0.5, l2=0.1, proximal=proximal, max_norm=2.0)
    ours = make(params, **options, group_l1=2.5, group_dim=1)
    plain = make(twins, **options)
    for _ in range(3):
        give_grads(params)
        share_grads(params, twins)
        with torch.no_grad():
            for p, q in zip(params, twins, strict=True):
                q.copy_(p)
        ours.step()
        plain.step()
        for p, q in zip(params, twins, strict=True):
            # lr*group_l1 of what momentum makes of it.
            threshold = 2.5 / (1 + 2 * 0.1) if proximal else 2.5
            want = shrink_groups(q.detach().double(), threshold, 1)
            # CUDA kernels add up squares in float32.
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-5 if ON_CUDA_KERNELS else 2e-7, atol=1e-6)
            assert torch.equal(p == 0, want == 0)
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(ours.state[p]["momentum_buffer"], plain.state[q]["momentum_buffer"])
        # On the CPU it is added up piece by piece of what the slices are measured in, some numbers of it in float32.
        assert float(ours.stats.penalty) == pytest.approx(float(plain.stats.penalty), rel=1e-7)
        assert ours.stats.grad_norm == plain.stats.grad_norm


@BOTH
def test_whole_groups_become_exact_zeros(make, threads):
    threads(1)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(20, 50), torch.nn.ReLU(), torch.nn.Linear(50, 1))
    groups = regfused.param_groups(model, group_l1=0.05, skip=["2.*"])
    assert [group["group_l1"] for group in groups] == [0.05, 0.0]
    optimizer = make(groups, lr=0.1)
    inputs = torch.randn(200, 20)
    targets = inputs[:, :2].sum(1, keepdim=True)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
    report = regfused.sparsity(model)
    weight = report.parameters[0]
    assert weight.groups == 50 and 10 < weight.zero_groups < 50
    assert weight.zeros == 20 * weight.zero_groups  # nothing else is exactly zero
    stepped = sum(p.numel() for p in model.parameters())
    assert optimizer.stats.zero_fraction.item() == report.zeros / stepped


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_instruction_set(dtype, threads, monkeypatch):
    baseline = None
    for isa in regfused.build_info()["isas"].split(", "):
        for count in (1, 2, 5):
            monkeypatch.setenv("REGFUSED_ISA", isa)
            threads(count)
            torch.manual_seed(0)
            params = make_params([(300, 500), (2, 70_000), (20_000, 3), (50, 9, 130)], dtype)
            options = dict(lr=0.1, momentum=0.9, max_norm=1.0, group_l1=5.0)
            optimizer = regfused.SGD([{"params": params, "group_dim": 0}], **options)
            for dim in (0, 1):
                optimizer.param_groups[0]["group_dim"] = dim
                give_grads(params)
                optimizer.step()
            results = [bits(p) for p in params] + [optimizer.stats.zero_fraction]
            baseline = baseline or results
            assert all(torch.equal(a, b) for a, b in zip(results, baseline, strict=True)), (isa, count)


@pytest.mark.skipif(EMULATED, reason="large tensors, for the CPU's kernels")
@pytest.mark.parametrize("name", ("SGD", "Adam"))
def test_more_tensors_than_are_worked_on_at_a_time(name, threads):
    shapes = [(300, 500), (7, 5), (400, 500), (2, 300_000), (600, 300), (3, 2)]
    options = {"lr": 0.1, "group_l1": {"SGD": 3.0, "Adam": 5.0}[name], "group_dim": 1, "l1": 0.1}
    runs = []
    for count in (1, 2):  # of threads: so many times 2^18 elements are worked on at a time
        threads(count)
        torch.manual_seed(0)
        params = make_params(shapes)
        twins = copy_params(params)
        ours, twin = getattr(regfused, name)(params, **options), getattr(reference, name)(twins, **options)
        penalties = []
        for _ in range(2):
            give_grads(params)
            share_grads(params, twins)
            ours.step()
            twin.step()
            assert_params_equal(params, twins, atol=1e-6)
            assert float(ours.stats.penalty) == pytest.approx(float(twin.stats.penalty), rel=1e-6)
            penalties.append(float(ours.stats.penalty))
        assert 0.01 < ours.stats.zero_fraction < 0.9
        runs.append((params, penalties))
    assert_params_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


SPECIAL = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, INF, -INF, NAN]


@BOTH
@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("options", ({"lr": 0.0, "group_l1": 5.0}, {"lr": 0.0, "group_l1": 5.0, "l1": 1.0}), ids=str)
def test_lr_zero_keeps_every_bit(make, options, dim, isa):
    p = torch.nn.Parameter(torch.tensor(SPECIAL).repeat(33, 4))
    before = bits(p)
    p.grad = torch.ones_like(p)
    optimizer = make([p], momentum=0.9, group_dim=dim, **options)
    optimizer.step()
    assert torch.equal(bits(p), before)
    assert optimizer.stats.zero_fraction == 0.2
    # It is a step all the same, as with a warm-up that begins at 0.
    [q] = twins = copy_params([p])
    share_grads([p], twins)
    plain = make(twins, momentum=0.9, **{**options, "group_l1": 0.0})
    plain.step()
    assert torch.equal(bits(optimizer.state[p]["momentum_buffer"]), bits(plain.state[q]["momentum_buffer"]))


@BOTH
def test_group_l1_zero_is_no_group_lasso(make):
    params = make_params([(40, 30), 7])
    twins = copy_params(params)
    ours, plain = make(params, lr=0.1, group_l1=0.0, group_dim=17), make(twins, lr=0.1)  # a dimension nobody has
    give_grads(params)
    share_grads(params, twins)
    ours.step()
    plain.step()
    assert_params_equal(params, twins)


@BOTH
@pytest.mark.parametrize("shape", [(4, 9), (4, 70), (70, 4)], ids=str)
def test_nan_infinity_and_zero_norm(make, shape, isa):
    p = torch.nn.Parameter(torch.full(shape, 2.0))
    with torch.no_grad():
        p[0, 3], p[1, 2] = NAN, INF
        p[2] = 0.0
    p.grad = torch.zeros_like(p)
    optimizer = make([p], lr=0.5, group_l1=2.0)
    optimizer.step()
    assert p[0].isnan().all()
    assert p[1, 2] == INF and (p[1, 3:] == 2).all()  # nothing beside an infinite norm
    assert (p[2] == 0).all()
    want = 2 * (1 - 1 / (2 * math.sqrt(shape[1])))
    torch.testing.assert_close(p[3:].detach(), torch.full((shape[0] - 3, shape[1]), want))
    assert optimizer.stats.zero_fraction.item() == 1 / shape[0]


@BOTH
def test_threshold_is_exact(make, isa):
    # Norms of 5 below, at and above the threshold: 3-4-5 triangles, without roundings.
    p = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [-6.0, 8.0], [0.3, 0.4], [0.0, -5.0]]))
    p.grad = torch.zeros_like(p)
    make([p], lr=0.5, group_l1=10.0).step()
    assert torch.equal(p.detach() + 0.0, torch.tensor([[0.0, 0.0], [-3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]))


# --- Steps that leave things alone ----------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dim", (0, 1))
def test_skipped_steps_shrink_nothing(make, dim):
    params = make_params([(60, 50), (5, 20_000)])
    optimizer = make(params, lr=0.1, momentum=0.9, group_l1=7.0, group_dim=dim, nonfinite="skip")
    for bad in (False, True, False, True, True):
        give_grads(params)
        if bad:
            params[1].grad[2, 777] = INF
        before, stats = copy_params(params), optimizer.stats
        optimizer.step()
        if bad:
            assert_params_equal(params, before)
            assert optimizer.stats.zero_fraction == stats.zero_fraction
        else:
            zeros = sum(int((p == 0).sum()) for p in params)
            assert optimizer.stats.zero_fraction.item() == zeros / sum(p.numel() for p in params)
    assert optimizer.stats.skipped == 3


@BOTH
def test_amp_overflow_shrinks_nothing(make):
    params = make_params([(60, 50), (5, 20_000)])
    optimizer = make(params, lr=0.1, group_l1=70.0, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.ones(()))
    for bad in (False, True, False):
        give_grads(params)
        if bad:
            params[0].grad[0, 0] = NAN
        before = copy_params(params)
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p, q) == bad for p, q in zip(params, before, strict=True))
    assert optimizer.stats.skipped == 1


@BOTH
def test_frozen_and_late_parameters(make):
    params = make_params([(30, 4), (3, 20_000), (30, 40), (6, 5)])
    optimizer = make(params, lr=0.1, momentum=0.9, group_l1=0.5, group_dim=1)
    for live in ([0, 3], [0, 1, 3], [2], [0, 1, 2, 3]):
        give_grads(params)
        for i, p in enumerate(params):
            if i not in live:
                p.grad = None
        before = copy_params(params)
        optimizer.step()
        assert [i for i, (p, q) in enumerate(zip(params, before, strict=True)) if not torch.equal(p, q)] == live
        zeros = sum(int((params[i] == 0).sum()) for i in live)
        assert optimizer.stats.zero_fraction.item() == zeros / sum(params[i].numel() for i in live)


# --- Groups, and what changes between steps -------------------------------------------------------


@BOTH
def test_groups_with_dimensions_of_their_own(make):
    params = make_params([(30, 20), (30, 20), (30, 20), 20])
    starts = copy_params(params)
    optimizer = make(
        [
            {"params": params[:1], "group_l1": 20.0, "group_dim": 1},
            {"params": params[1:2], "group_l1": 10.0, "group_dim": -2},
            {"params": params[2:], "group_dim": 1},
        ],
        lr=0.1,
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    # 600 squares in float32 on CUDA devices.
    for i, (threshold, dim) in enumerate([(2.0, 1), (1.0, 0), (0.0, 0), (0.0, 0)]):
        want = shrink_groups(starts[i].detach().double(), threshold, dim)
        torch.testing.assert_close(params[i].detach().double(), want, rtol=1e-5, atol=1e-6)


@BOTH
def test_options_that_change_between_steps(make):
    params = make_params([(30, 20), (5, 20_000)])
    optimizer = make(params, lr=0.1)
    for options in (
        {"group_l1": 5.0},
        {"group_dim": 1},
        {"group_l1": 8.0},
        {"lr": torch.tensor(0.2)},
        {"group_l1": 0.0},
        {"group_l1": 3.0, "group_dim": -2},
        {"lr": torch.tensor(0.0)},
        {"lr": 0.3},
    ):
        optimizer.param_groups[0].update(options)
        group = optimizer.param_groups[0]
        before = copy_params(params)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        threshold = float(group["lr"]) * group["group_l1"]
        for p, q in zip(params, before, strict=True):
            want = shrink_groups(q.detach().double(), threshold, group["group_dim"])
            # CUDA kernels add up squares in float32.
            torch.testing.assert_close(p.detach().double(), want, rtol=1e-5, atol=1e-6)
        assert optimizer.stats.zero_fraction.item() == sum(int((p == 0).sum()) for p in params) / 100_600


@BOTH
def test_a_parameter_that_is_reshaped_in_place(make):
    p = make_params([(40, 30)])[0]
    optimizer = make([p], lr=0.1, group_l1=30.0)
    for shape in ((40, 30), (30, 40), (1200,), (4, 10, 30)):
        p.grad = None
        p.data = p.data.view(shape)
        p.grad = torch.zeros_like(p)
        before = p.detach().double()
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), shrink_groups(before, 3.0, 0), rtol=1e-5, atol=1e-6)


def test_beside_tensors_that_the_kernels_do_not_take():
    plain = torch.nn.Parameter(torch.randn(6, 8))
    strided = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    z = torch.nn.Parameter(torch.randn(6, 8, dtype=torch.complex64))
    params = [plain, strided, z]
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = regfused.SGD(params, lr=0.1, group_l1=20.0)
    optimizer.step()
    assert optimizer._plan.tensors == 1
    for p, q in zip(params, before, strict=True):
        norms = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        # A few roundings of float32.
        torch.testing.assert_close(p.detach(), q * (1 - 2 / norms).clamp(min=0), rtol=1e-5, atol=1e-6)
    assert optimizer.stats.zero_fraction.item() == sum(int((p == 0).sum()) for p in params) / 120


def test_differentiable():
    start = torch.randn(5, 4, dtype=torch.float64)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def stepped(scale):
        p = (start * scale).clone()
        p.grad = torch.ones_like(start)
        optimizer = regfused.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, group_l1=20.0, differentiable=True)
        optimizer.param_groups[0]["params"] = [p]
        optimizer.step()
        return p

    assert (stepped(scale) == 0).any()
    assert torch.autograd.gradcheck(stepped, (scale,))


def test_by_operator():
    params = make_params([(30, 20), (5, 20_000), (7, 300)])
    twins = copy_params(params)
    give_grads(params)
    options = dict(lr=0.1, l1=0.5, proximal=True, group_l1=30.0, group_dim=-1, max_norm=1.0)
    regfused.SGD(twins, **options)
    share_grads(params, twins)
    regfused.SGD(twins, **options).step()
    with torch.no_grad():
        torch.ops.regfused.sgd_(params, [p.grad for p in params], [], [], **options)
    assert_params_equal(params, twins)
    tensors = [torch.randn(3, 4)], [torch.randn(3, 4)], [], []
    torch.library.opcheck(torch.ops.regfused.sgd_.default, tensors, dict(lr=0.1, group_l1=1.0, group_dim=1))
    for change, message in (
        ({"group_dim": 2}, r"group_dim must be in \[-2, 1\] for params\[0\] of shape \[3, 4\], but got 2"),
        ({"group_l1": -1.0}, "group_l1 must be finite and >= 0, but got -1"),
        ({"group_l1": INF}, "group_l1 must be finite and >= 0, but got inf"),
    ):
        before = tensors[0][0].clone()
        with pytest.raises(ValueError, match=message):
            torch.ops.regfused.sgd_(*tensors, **{"lr": 0.1, "group_l1": 1.0, **change})
        assert torch.equal(tensors[0][0], before)


# --- Checkpoints ----------------------------------------------------------------------------------


@BOTH
def test_state_dict_round_trip(make):
    params = make_params([(30, 20), (5, 2000)])
    optimizer = make(params, lr=0.1, momentum=0.9, group_l1=2.0, group_dim=-1)
    give_grads(params)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = copy_params(params)
    resumed = make(twins, lr=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.param_groups[0]["group_l1"] == 2.0 and resumed.param_groups[0]["group_dim"] == -1
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    resumed.step()
    assert_params_equal(params, twins)


@BOTH
@pytest.mark.parametrize("old", ("torch", "regfused"))
def test_checkpoints_that_know_no_groups(make, old):
    params = make_params([(30, 20)])
    saved = torch.optim.SGD(params, lr=0.7).state_dict()
    if old == "regfused":
        saved = make(params, lr=0.7).state_dict()
        for group in saved["param_groups"]:
            del group["group_l1"], group["group_dim"]
    optimizer = make(params, lr=0.1, group_l1=2.0, group_dim=1)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["group_l1"], group["group_dim"]) == (0.7, 2.0, 1)


# --- Errors ---------------------------------------------------------------------------------------

ERRORS = [
    ({"group_l1": -1.0}, "group_l1 must be finite and >= 0, but got -1.0"),
    ({"group_l1": NAN}, "group_l1 must be finite and >= 0, but got nan"),
    ({"group_l1": INF}, "group_l1 must be finite and >= 0, but got inf"),
    ({"group_l1": "1"}, r"group_l1 must be a number, but got '1' \(str\)"),
    ({"group_dim": 0.0}, r"group_dim must be an int, but got 0.0 \(float\)"),
    ({"group_dim": None}, r"group_dim must be an int, but got None \(NoneType\)"),
    ({"group_dim": True}, r"group_dim must be an int, but got True \(bool\)"),
    ({"group_l1": 1.0, "group_dim": 2}, r"group_dim must be in \[-2, 1\] for parameter 0 .*shape \(3, 4\), but got 2"),
    ({"group_l1": 1.0, "group_dim": -3}, r"group_dim must be in \[-2, 1\] for parameter 0 .*\(3, 4\), but got -3"),
    ({"group_l1": 1.0, "group_dim": 1}, r"group_dim must be in \[-1, 0\] for parameter 1 .*shape \(5,\), but got 1"),
    ({"group_l1": 1.0, "group_dim": 10**30}, r"group_dim must be in \[-2, 1\] .* but got 10{30}"),
]


@BOTH
@pytest.mark.parametrize("options, message", ERRORS, ids=str)
def test_errors_change_nothing(make, options, message):
    params = make_params([(3, 4), 5])
    with pytest.raises(ValueError, match=message):
        make(params, lr=0.1, **options)
    with pytest.raises(ValueError, match=message):
        make([("weight", params[0]), ("bias", params[1])], lr=0.1, **options)
    optimizer = make(make_params([7]), lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": (p for p in params), **options})
    assert len(optimizer.param_groups) == 1

    optimizer = make(params, lr=0.1, momentum=0.9)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)

    optimizer = make(params, lr=0.1, momentum=0.9)
    give_grads(params)
    optimizer.step()
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    optimizer.param_groups[0].update(options)
    for _ in range(2):  # the second step must complain as the first one
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert_params_equal(params, before[0])
    for i, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], before[1][i]["momentum_buffer"])


@BOTH
def test_a_parameter_that_loses_the_dimension(make):
    p = make_params([(4, 3)])[0]
    optimizer = make([p], lr=0.1, group_l1=1.0, group_dim=1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    p.data = p.data.view(12)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"group_dim must be in \[-1, 0\] for parameter 0 .*shape \(12,\), but got 1"):
        optimizer.step()
    assert torch.equal(p, before)


@BOTH
def test_sparse_gradients_are_refused(make):
    p = torch.nn.Parameter(torch.randn(4, 3, device="cpu"))
    before = p.detach().clone()
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="demand dense gradients"):
        make([p], lr=0.1, group_l1=1.0).step()
    assert torch.equal(p, before)
