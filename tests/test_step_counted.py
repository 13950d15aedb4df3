"""Steps that are counted: t of each parameter, on the host and on devices, by rules that know it."""

import copy
import math

import pytest
import torch
from cuda_runs import Graph, bits, emulated_only, emulator, needs_cuda_kernels
from step_cases import assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused
from regfused import reference

BOTH = pytest.mark.parametrize("make", (regfused.Adam, reference.Adam), ids=("kernels", "reference"))


def steps_of(optimizer, params):
    return [int(optimizer.state[p]["step"]) if p in optimizer.state else 0 for p in params]


@BOTH
def test_each_parameter_counts_for_itself(make):
    params = make_params([33, (5, 7), 0, 4099])
    twins = copy_params(params)
    ours, loop = make(params, lr=0.01), torch.optim.Adam(twins, lr=0.01, foreach=False)
    for live in ([0], [0, 2, 3], [], [1, 3], [0, 1, 2, 3]):
        give_grads(params)
        for i, p in enumerate(params):
            if i not in live:
                p.grad = None
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert steps_of(ours, params) == steps_of(loop, twins)
    assert steps_of(ours, params) == [3, 2, 2, 3]
    assert_params_equal(params, twins, atol=2e-6)


@BOTH
@pytest.mark.parametrize("policy", ("nonfinite", "overflow"))
def test_a_skipped_step_does_not_count(make, policy):
    params = make_params([33, 5000])
    twins = copy_params(params)
    options = {"nonfinite": "skip"} if policy == "nonfinite" else {}
    ours, loop = make(params, lr=0.01, **options), torch.optim.Adam(twins, lr=0.01, foreach=False)
    for bad in (True, False, True, False, False):
        give_grads(params)
        share_grads(params, twins)
        before = bits([*params, *(x for entry in ours.state.values() for x in entry.values())])
        if policy == "overflow":
            ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(float(bad))
        elif bad:
            params[1].grad[7] = math.inf
        ours.step()
        if bad:
            after = bits([*params, *(x for entry in ours.state.values() for x in entry.values())])
            assert len(after) == len(before) and all(map(torch.equal, after, before))
        else:
            loop.step()
    assert steps_of(ours, params) == [3, 3]
    assert ours.stats.skipped == 2
    assert_params_equal(params, twins, atol=2e-6)


@BOTH
@pytest.mark.parametrize("step", (-1.0, 0.5, math.inf, math.nan, [1.0, 2.0], "two"), ids=str)
def test_a_count_that_is_none(make, step):
    params = make_params([33, 5])
    optimizer = make(params, lr=0.01)
    give_grads(params)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1]["step"] = torch.tensor(step) if not isinstance(step, str) else step
    before = bits([*params, *(x for entry in optimizer.state.values() for x in entry.values())])
    with pytest.raises(ValueError, match=r"Adam\.load_state_dict: the step of parameter 1 of group 0 must be"):
        optimizer.load_state_dict(saved)
    if isinstance(step, float) and not regfused.build_info()["cuda"]:
        kept = optimizer.state[params[1]]["step"]
        optimizer.state[params[1]]["step"] = torch.tensor(step)
        with pytest.raises(ValueError, match=r"Adam\.step: the step of parameter 1 of group 0 must be a whole number"):
            optimizer.step()
        optimizer.state[params[1]]["step"] = kept
    after = bits([*params, *(x for entry in optimizer.state.values() for x in entry.values())])
    assert all(map(torch.equal, after, before))


@BOTH
def test_old_checkpoints_have_numbers(make):
    params = make_params([33])
    optimizer, twins = make(params, lr=0.01), copy_params(params)
    loop = torch.optim.Adam(twins, lr=0.01, foreach=False)
    for _ in range(3):
        give_grads(params)
        share_grads(params, twins)
        optimizer.step()
        loop.step()
    saved = copy.deepcopy(loop.state_dict())
    saved["state"][0]["step"] = 3
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[params[0]]["step"], torch.tensor(3.0))
    give_grads(params)
    share_grads(params, twins)
    optimizer.step()
    loop.step()
    assert_params_equal(params, twins, atol=2e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_kind_of_count_is_torchs(dtype):
    torch.set_default_dtype(dtype)
    try:
        for fused in (None, True, False):
            p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
            p.grad, q.grad = torch.ones(3), torch.ones(3)
            ours, theirs = regfused.Adam([p], fused=fused), torch.optim.Adam([q], fused=fused)
            ours.step()
            theirs.step()
            mine, its = ours.state[p]["step"], theirs.state[q]["step"]
            assert (mine.dtype, mine.shape, mine.device) == (its.dtype, its.shape, its.device)
            assert list(ours.state[p]) == list(theirs.state[q])
    finally:
        torch.set_default_dtype(torch.float32)


# --- On a device, which counts by itself ----------------------------------------------------------


@emulated_only
@pytest.mark.parametrize("options, launches", [({}, 1), ({"max_norm": 1.0}, 2), ({"nonfinite": "skip"}, 2)])
def test_launches(options, launches):
    params = make_params([3, 70, 0, 5000, (4, 4)])
    optimizer = regfused.AdamW(params, lr=0.01, **options)
    for step in range(4):
        give_grads(params)
        before = emulator().emulated_launches()
        optimizer.step()
        assert emulator().emulated_launches() - before == launches or step == 0  # the first one uploads its tables
        assert steps_of(optimizer, params) == [step + 1] * 5


@emulated_only
@pytest.mark.parametrize("multiprocessors", (1, 2, 7, 1000))
@pytest.mark.parametrize("order", ("forward", "reverse", "random"))
def test_the_last_block_counts_once(multiprocessors, order, monkeypatch):
    monkeypatch.setenv("REGFUSED_EMULATED_MULTIPROCESSORS", str(multiprocessors))
    monkeypatch.setenv("REGFUSED_EMULATED_ORDER", order)
    torch.manual_seed(0)
    params = make_params([70_000, 3, 300, (40, 40)])
    twins = copy_params(params)
    ours, loop = regfused.Adam(params, lr=0.01), torch.optim.Adam(twins, lr=0.01, foreach=False)
    for step in range(3):
        give_grads(params)
        if step == 0:
            params[2].grad = None
        share_grads(params, twins)
        ours.step()
        loop.step()
    assert steps_of(ours, params) == [3, 3, 2, 3]
    assert_params_equal(params, twins, atol=2e-6)


@needs_cuda_kernels
def test_a_graph_counts_at_each_replay():
    params = make_params([5000, 33])
    twins = copy_params(params)
    ours, loop = regfused.Adam(params, lr=0.01, max_norm=1e6), torch.optim.Adam(twins, lr=0.01, foreach=False)
    give_grads(params)
    share_grads(params, twins)
    ours.step()
    loop.step()
    captured = Graph()
    with captured.capture():
        ours.step()
    # What ran while it was captured on the emulator is undone there; a replay is a step.
    for _ in range(3):
        captured.replay()
        loop.step()
    assert steps_of(ours, params) == steps_of(loop, twins) == [4, 4]
    assert_params_equal(params, twins, atol=2e-6)


# --- What is not finite ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("amsgrad", (False, True))
def test_nan_and_infinity_go_where_they_go_in_torch(make, amsgrad):
    params = make_params([33, 4099])
    twins = copy_params(params)
    ours = make(params, lr=0.01, amsgrad=amsgrad)
    loop = torch.optim.Adam(twins, lr=0.01, amsgrad=amsgrad, foreach=False)
    for step in range(4):
        give_grads(params)
        if step == 1:
            params[0].grad[3], params[1].grad[4098] = math.nan, math.inf
        share_grads(params, twins)
        ours.step()
        loop.step()
    assert math.isnan(params[0][3]) and math.isnan(params[1][4098])
    assert_params_equal(params, twins, atol=2e-6)
    for p, q in zip(params, twins, strict=True):
        for name, slot in ours.state[p].items():
            # torch's lerp makes NaN of the average of an infinity and a number.
            got, want = (x.nan_to_num(posinf=0.0) for x in (slot, loop.state[q][name]))
            torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
            assert torch.equal(slot.isfinite(), loop.state[q][name].isfinite())


@BOTH
def test_the_second_moment_is_of_the_clipped_gradient(make):
    params = make_params([33])
    twins = copy_params(params)
    ours, loop = make(params, lr=0.01, max_norm=0.1), torch.optim.Adam(twins, lr=0.01, foreach=False)
    for _ in range(3):
        give_grads(params)
        share_grads(params, twins)
        torch.nn.utils.clip_grad_norm_(twins, 0.1)
        ours.step()
        loop.step()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[params[0]][name], loop.state[twins[0]][name], rtol=1e-5, atol=0)


@BOTH
def test_a_nan_in_the_largest_moment_stays(make):
    params = make_params([33])
    ours = make(params, lr=0.01, amsgrad=True)
    give_grads(params)
    ours.step()
    ours.state[params[0]]["max_exp_avg_sq"][5] = math.nan
    give_grads(params)
    ours.step()
    assert ours.state[params[0]]["max_exp_avg_sq"].isnan().nonzero().tolist() == [[5]]
    assert params[0].isnan().nonzero().tolist() == [[5]]
