"""Cases in which torch.optim.Adam(fused=True) has been wrong on the CPU (torch 2.13.0); held to the for-loop."""

import copy
import math

import pytest
import torch
from step_cases import assert_params_equal, copy_params, give_grads, make_params

import regfused

CLASSES = pytest.mark.parametrize("name", ("Adam", "AdamW"))


def pair(name, params, **options):
    twins = copy_params(params)
    ours = getattr(regfused, name)(params, lr=0.1, fused=True, **options)
    return ours, getattr(torch.optim, name)(twins, lr=0.1, foreach=False, **options), twins


@CLASSES
@pytest.mark.parametrize("form", ("channels_last", "expanded", "transposed"))
def test_gradients_that_lie_in_memory_in_another_way(name, form):
    # torch's kernel pairs elements in the order of memory: wrong ones, without a word.
    params = [torch.nn.Parameter(torch.randn(2, 3, 4, 4))]
    ours, loop, twins = pair(name, params, amsgrad=True)
    for _ in range(3):
        grad = {
            "channels_last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
            "expanded": torch.randn(3, 4, 4).expand(2, 3, 4, 4),
            "transposed": torch.randn(2, 3, 4, 4).transpose(2, 3),
        }[form]
        params[0].grad, twins[0].grad = grad, grad.clone()
        ours.step()
        loop.step()
    assert ours._plan.tensors == 1
    assert_params_equal(params, twins, atol=1e-6)


@CLASSES
@pytest.mark.parametrize("slot", ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
def test_a_slot_of_another_size(name, slot):
    # torch reads and writes beyond it, until the process ends.
    params = make_params([4000])
    ours, _, _ = pair(name, params, amsgrad=True)
    give_grads(params)
    ours.step()
    before = copy.deepcopy((ours.state_dict(), [p.detach() for p in params]))
    saved = copy.deepcopy(ours.state_dict())
    saved["state"][0][slot] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=rf"{name}\.load_state_dict: the {slot} of parameter 0 of group 0 must have shape"
    ):
        ours.load_state_dict(saved)
    ours.state[params[0]][slot], kept = torch.zeros(3), ours.state[params[0]][slot]
    with pytest.raises(ValueError, match=rf"{name}\.step: the {slot} of parameter 0 of group 0 must have shape"):
        ours.step()
    ours.state[params[0]][slot] = kept
    after = (ours.state_dict(), [p.detach() for p in params])
    for name in ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(after[0]["state"][0][name], before[0]["state"][0][name])
    assert torch.equal(after[1][0], before[1][0])


@CLASSES
def test_an_error_in_the_second_group_changes_nothing(name):
    params = make_params([33, 5])
    ours = getattr(regfused, name)([{"params": [p]} for p in params], lr=0.1, fused=True)
    give_grads(params)
    before = copy_params(params)
    for betas in ("x", (0.9, 1.0), (0.9,)):
        ours.param_groups[1]["betas"] = betas
        with pytest.raises(ValueError, match=rf"{name}\.step: betas"):
            ours.step()
        assert_params_equal(params, before)
        assert not ours.state


@CLASSES
def test_an_overflow_at_the_first_step_leaves_no_state(name):
    # torch leaves zeros, and a count of 0.
    params = make_params([40])
    ours, loop, twins = pair(name, params)
    params[0].grad = torch.full((40,), math.inf)
    ours.grad_scale, ours.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    ours.step()
    assert not ours.state and ours.stats.skipped == 1
    ours.found_inf = torch.tensor(0.0)
    give_grads(params)
    twins[0].grad = params[0].grad.clone()
    ours.step()
    loop.step()
    assert_params_equal(params, twins, atol=1e-6)


@CLASSES
def test_amsgrad_switched_on_later(name):
    # torch: KeyError.
    params = make_params([40])
    ours, _, _ = pair(name, params)
    for _ in range(2):
        give_grads(params)
        ours.step()
        ours.param_groups[0]["amsgrad"] = True
    entry = ours.state[params[0]]
    assert torch.equal(entry["max_exp_avg_sq"], entry["exp_avg_sq"])
    assert list(entry) == ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"] and entry["step"] == 2
