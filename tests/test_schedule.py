"""Options over time: the bits of values written into the groups by hand, and the interface of torch's schedulers."""

import copy
import doctest
import functools
import io
import math
import re

import pytest
import torch
from step_cases import DEVICE, EVERY_OPTIMIZER, is_adam
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, LambdaLR, LRScheduler, SequentialLR

import regfused
import regfused.schedule
from regfused import OptionScheduler, options, ramp, warmup

BASE = {"lr": 0.05, "weight_decay": 0.02, "l1": 0.03, "l2": 0.04, "concavity": 0.01, "group_l1": 0.05, "max_norm": 0.7}
STEPS = 9


def factor_of(t):
    return 1 / (1 + 0.3 * t)


class Halving:
    """A function that remembers something: it must be asked once for each step."""

    def __init__(self):
        self.value = 2.0

    def __call__(self, t):
        self.value /= 2
        return self.value


def base_of(make):
    return {**BASE, **({"eps": 1e-3} if is_adam(make) else {"momentum": 0.9, "dampening": 0.2})}


def made(make, two_groups=True, **more):
    """Parameters and an optimizer with every option that can be scheduled; the groups differ where they may."""
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(40))]
    groups = [{"params": [params[0]]}, {"params": [params[1]], "l1": 0.01, "lr": 0.1}] if two_groups else params
    return params, make(groups, **{**base_of(make), "proximal": True, **more})


def train(params, optimizer, steps, after_step, first=0):
    for t in range(first, first + steps):
        generator = torch.Generator(device=DEVICE).manual_seed(t)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        after_step(t + 1)


def same(params, others):
    return all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def write(optimizer, option, initial, t, function=factor_of):
    for group, value in zip(optimizer.param_groups, initial, strict=True):
        group[option] = value * function(t)


def values_of(optimizer, option):
    return [group[option] for group in optimizer.param_groups]


# --- Values ----------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_the_bits_of_values_written_by_hand(make):
    for option in base_of(make):
        params, optimizer = made(make)
        scheduler = OptionScheduler(optimizer, option, factor_of)
        train(params, optimizer, STEPS, lambda t, scheduler=scheduler: scheduler.step())

        by_hand, loop = made(make)
        initial = values_of(loop, option)
        write(loop, option, initial, 0)
        train(by_hand, loop, STEPS, functools.partial(write, loop, option, initial))
        assert same(params, by_hand), option
        assert scheduler.get_last_value() == values_of(loop, option) == values_of(optimizer, option)
        assert values_of(optimizer, f"initial_{option}") == initial

        constant, plain = made(make)
        train(constant, plain, STEPS, lambda t: None)
        assert not same(params, constant), f"{option} does nothing here"


@EVERY_OPTIMIZER
def test_one_function_for_each_group(make):
    _, optimizer = made(make)
    scheduler = OptionScheduler(optimizer, "l1", [warmup(4), ramp(2, 1.0, 3.0)])
    seen = [values_of(optimizer, "l1")]
    for _ in range(3):
        scheduler.step()
        seen.append(values_of(optimizer, "l1"))
    assert seen == [[0.03 * a, 0.01 * b] for a, b in ((0.0, 1.0), (0.25, 2.0), (0.5, 3.0), (0.75, 3.0))]


@EVERY_OPTIMIZER
def test_lr_as_lambda_lr(make):
    for lr in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        (params, optimizer), (others, loop) = (made(make, two_groups=False, lr=copy.deepcopy(lr)) for _ in range(2))
        tensor = optimizer.param_groups[0]["lr"]
        ours, theirs = OptionScheduler(optimizer, "lr", factor_of), LambdaLR(loop, factor_of)
        train(params, optimizer, STEPS, lambda t, ours=ours: ours.step())
        train(others, loop, STEPS, lambda t, theirs=theirs: theirs.step())
        assert same(params, others)
        assert ours.get_last_lr() == ours.get_lr() == theirs.get_last_lr()
        if isinstance(lr, torch.Tensor):
            assert optimizer.param_groups[0]["lr"] is tensor, "filled in place, as CUDA graphs need it"
            assert optimizer.param_groups[0]["initial_lr"] is not tensor and tensor < lr


def test_a_function_is_asked_once_for_each_step():
    _, optimizer = made(regfused.SGD, two_groups=False)
    scheduler = OptionScheduler(optimizer, "l2", Halving())
    assert scheduler.get_last_value() == [0.04]
    scheduler.step()
    assert scheduler.get_last_value() == [0.02]


@EVERY_OPTIMIZER
def test_what_rounding_puts_below_zero_is_zero(make):
    np = pytest.importorskip("numpy")
    for option in base_of(make):
        for factor in (-4e-18, np.float32(-1e-8)):
            params, optimizer = made(make)
            OptionScheduler(optimizer, option, lambda t, factor=factor: factor)
            if option != "dampening":  # may be anything finite
                assert values_of(optimizer, option) == [0.0, 0.0]
            train(params, optimizer, 1, lambda t: None)


# --- Ready-made functions --------------------------------------------------------------------------


def test_warmup_and_ramp():
    assert [warmup(5)(t) for t in range(8)] == [0.0, 1 / 5, 2 / 5, 3 / 5, 4 / 5, 1.0, 1.0, 1.0]
    assert [warmup(0)(t) for t in (0, 1)] == [1.0, 1.0]
    assert [ramp(4, 1.0, 0.0, delay=2)(t) for t in range(8)] == [1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    assert [ramp(0, 0.2, 0.7, delay=2)(t) for t in range(4)] == [0.2, 0.2, 0.7, 0.7]
    cosine = [ramp(6, 1.0, 0.25, cosine=True)(t) for t in range(8)]
    want = [0.25 + 0.75 * (1 + math.cos(math.pi * min(t, 6) / 6)) / 2 for t in range(8)]
    assert cosine == pytest.approx(want, rel=1e-15)
    assert cosine[0] == 1.0 and cosine[6] == 0.25
    for steps in range(1, 60):
        down = [ramp(steps, 1.0, 0.0, cosine=steps % 2 == 0)(t) for t in range(steps + 1)]
        assert down == sorted(down, reverse=True) and down[-1] == 0.0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: warmup(-1), "warmup: steps must be an int >= 0, but got -1"),
        (lambda: warmup(2.5), "warmup: steps must be an int >= 0, but got 2.5"),
        (lambda: ramp(2, delay=True), "ramp: delay must be an int >= 0, but got True"),
        (lambda: ramp(2, math.nan), "ramp: start and end must be finite, but got nan and 1.0"),
        (lambda: ramp(2, "0"), "ramp: start must be a number, but got '0'"),
    ],
)
def test_what_functions_refuse(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- Resuming --------------------------------------------------------------------------------------


def saved_and_loaded(*objects):
    """State dicts through a file, loaded as torch loads what nobody vouches for."""
    file = io.BytesIO()
    torch.save([x.state_dict() for x in objects], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def schedulers_of(optimizer):
    return [
        CosineAnnealingLR(optimizer, T_max=STEPS),
        OptionScheduler(optimizer, "l1", warmup(4)),
        OptionScheduler(optimizer, "max_norm", ramp(6, 1.0, 0.2, delay=1, cosine=True)),
    ]


def advance(schedulers, t):
    for scheduler in schedulers:
        scheduler.step()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("at", range(STEPS))
def test_resume_at_any_step_from_states(make, at):
    whole, optimizer = made(make)
    train(whole, optimizer, STEPS, functools.partial(advance, schedulers_of(optimizer)))

    params, optimizer = made(make)
    schedulers = schedulers_of(optimizer)
    train(params, optimizer, at, functools.partial(advance, schedulers))
    states = saved_and_loaded(optimizer, *schedulers)
    values = [s.get_last_value() for s in schedulers[1:]]

    again, resumed = made(make, max_norm=5.0)  # the checkpoint's counts
    with torch.no_grad():
        for mine, theirs in zip(again, params, strict=True):
            mine.copy_(theirs)
    schedulers = schedulers_of(resumed)
    for x, state in zip((resumed, *schedulers), states, strict=True):
        x.load_state_dict(state)
    assert [s.get_last_value() for s in schedulers[1:]] == values
    train(again, resumed, STEPS - at, functools.partial(advance, schedulers), first=at)
    assert same(again, whole)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("at", range(STEPS))
def test_resume_at_any_step_from_last_epoch(make, at):
    whole, optimizer = made(make)
    scheduler = OptionScheduler(optimizer, "l1", factor_of)
    train(whole, optimizer, STEPS, lambda t: scheduler.step())

    params, optimizer = made(make)
    before = OptionScheduler(optimizer, "l1", factor_of)
    train(params, optimizer, at, lambda t: before.step())
    (state,) = saved_and_loaded(optimizer)
    again, resumed = made(make, l1=7.0)  # the checkpoint's counts
    with torch.no_grad():
        for mine, theirs in zip(again, params, strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(state)
    after = OptionScheduler(resumed, "l1", factor_of, last_epoch=before.last_epoch - 1)
    assert after.last_epoch == before.last_epoch and after.get_last_value() == before.get_last_value()
    train(again, resumed, STEPS - at, lambda t: after.step(), first=at)
    assert same(again, whole)


def test_functions_that_are_objects_are_saved():
    _, optimizer = made(regfused.SGD, two_groups=False)
    scheduler = OptionScheduler(optimizer, "l2", Halving())
    scheduler.step()
    (state,) = saved_and_loaded(scheduler)
    other = OptionScheduler(made(regfused.SGD, two_groups=False)[1], "l2", Halving())
    other.load_state_dict(state)
    other.step()
    assert other.get_last_value() == [0.01]
    plain = OptionScheduler(optimizer, "l1", [functools.partial(pow, 0.5)])
    plain.load_state_dict(plain.state_dict())
    assert OptionScheduler(optimizer, "l1", math.exp).state_dict()["functions"] == [None]


def test_a_state_is_a_copy():
    _, optimizer = made(regfused.SGD)
    scheduler = OptionScheduler(optimizer, "l1", factor_of)
    state = scheduler.state_dict()
    kept = copy.deepcopy(state)
    scheduler.get_last_value()[0] = 5.0
    scheduler.step()
    assert state == kept and scheduler.state_dict() != kept
    scheduler.load_state_dict(state)
    assert state == scheduler.state_dict() == kept


# --- With torch's schedulers -----------------------------------------------------------------------


def test_is_a_scheduler_of_torch():
    assert issubclass(OptionScheduler, LRScheduler)


def rate_of(t):
    return 0.9**t


def by_hand(make, **functions):
    """Training with these options, and `lr`, written by hand."""
    params, optimizer = made(make)
    initial = {option: values_of(optimizer, option) for option in functions}

    def write_all(t):
        for option, function in functions.items():
            write(optimizer, option, initial[option], t, function)

    write_all(0)
    train(params, optimizer, STEPS, write_all)
    return params


@EVERY_OPTIMIZER
def test_in_a_chain(make):
    params, optimizer = made(make)
    parts = [
        LambdaLR(optimizer, rate_of),
        OptionScheduler(optimizer, "l1", factor_of),
        OptionScheduler(optimizer, "weight_decay", warmup(3)),
    ]
    for chain in (ChainedScheduler(parts), ChainedScheduler(parts[::-1], optimizer=optimizer)):
        assert chain.get_last_lr() == values_of(optimizer, "lr")
    chain = ChainedScheduler(parts)
    train(params, optimizer, 4, lambda t: chain.step())
    optimizer_state, state = saved_and_loaded(optimizer, chain)
    again, resumed = made(make)
    again_chain = ChainedScheduler(
        [
            LambdaLR(resumed, rate_of),
            OptionScheduler(resumed, "l1", factor_of),
            OptionScheduler(resumed, "weight_decay", warmup(3)),
        ]
    )
    with torch.no_grad():
        for mine, theirs in zip(again, params, strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(optimizer_state)
    again_chain.load_state_dict(state)
    train(params, optimizer, STEPS - 4, lambda t: chain.step(), first=4)
    train(again, resumed, STEPS - 4, lambda t: again_chain.step(), first=4)
    want = by_hand(make, lr=rate_of, l1=factor_of, weight_decay=warmup(3))
    assert same(params, want) and same(again, want)


def in_sequence(optimizer):
    return SequentialLR(
        optimizer,
        [OptionScheduler(optimizer, "l1", f) for f in (warmup(3), factor_of, ramp(2, 0.5, 0.0))],
        milestones=[3, 6],
    )


def sequence(t):
    return warmup(3)(t) if t < 3 else factor_of(t - 3) if t < 6 else ramp(2, 0.5, 0.0)(t - 6)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("at", (0, 2, 3, 7))
def test_in_a_sequence_beside_a_schedule_of_lr(make, at):
    def resumable():
        params, optimizer = made(make)
        # The sequence first: it sets lr back.
        return params, optimizer, [in_sequence(optimizer), LambdaLR(optimizer, rate_of)]

    params, optimizer, schedulers = resumable()
    train(params, optimizer, at, functools.partial(advance, schedulers))
    states = saved_and_loaded(optimizer, *schedulers)
    again, resumed, more = resumable()
    with torch.no_grad():
        for mine, theirs in zip(again, params, strict=True):
            mine.copy_(theirs)
    for x, state in zip((resumed, *more), states, strict=True):
        x.load_state_dict(state)
    train(params, optimizer, STEPS - at, functools.partial(advance, schedulers), first=at)
    train(again, resumed, STEPS - at, functools.partial(advance, more), first=at)
    want = by_hand(make, lr=rate_of, l1=sequence)
    assert same(params, want) and same(again, want)


def test_a_sequence_in_a_chain():
    params, optimizer = made(regfused.SGD)
    chain = ChainedScheduler([in_sequence(optimizer), LambdaLR(optimizer, rate_of)])
    train(params, optimizer, STEPS, lambda t: chain.step())
    assert same(params, by_hand(regfused.SGD, lr=rate_of, l1=sequence))


def test_step_to_a_number():
    _, optimizer = made(regfused.SGD)
    scheduler = OptionScheduler(optimizer, "l1", factor_of)
    scheduler.step(7)
    assert scheduler.last_epoch == 7 and scheduler.get_last_value() == [0.03 * factor_of(7), 0.01 * factor_of(7)]
    scheduler.step()
    assert scheduler.last_epoch == 8


# --- What is refused -------------------------------------------------------------------------------


def unchanged(optimizer):
    """A function that says whether the groups are as they are now."""
    before = [{k: copy.deepcopy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return lambda: before == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


BAD_OPTIONS = {
    "none": ("max_norm", {"max_norm": None}, "max_norm must be a number to be scaled, but is None in group 0"),
    **{
        f"{name}": (name, {}, f"option must be one number in the groups of .*l1.*, but got {name!r}")
        for name in ("l3", "nonfinite", "nesterov", "proximal", "group_dim", "norm_type", "betas", "params", None, 3)
    },
}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_options_that_cannot_be_scaled(make, case):
    option, more, message = BAD_OPTIONS[case]
    _, optimizer = made(make, **more)
    is_as_before = unchanged(optimizer)
    with pytest.raises(ValueError, match=f"OptionScheduler: {message}"):
        OptionScheduler(optimizer, option, factor_of)
    assert is_as_before()


@EVERY_OPTIMIZER
def test_options_of_another_rule(make):
    _, optimizer = made(make)
    other = "momentum" if is_adam(make) else "eps"
    with pytest.raises(ValueError, match=f"in the groups of {make.__name__}, one of lr, .*, but got '{other}'"):
        OptionScheduler(optimizer, other, factor_of)


@pytest.mark.parametrize(
    "function, last_epoch, message",
    [
        ([factor_of], -1, "function must be one, or one for each of 2 groups, but got 1"),
        ([factor_of, 0.5], -1, "function must be callable, but got 0.5"),
        (0.5, -1, "function must be callable, but got 0.5"),
        (factor_of, -2, "last_epoch must be an int >= -1, but got -2"),
        (factor_of, 1.0, "last_epoch must be an int >= -1, but got 1.0"),
        (factor_of, 3, "every group must have 'initial_l1', .* group 0 has not, and last_epoch is 3"),
    ],
)
def test_other_arguments(function, last_epoch, message):
    _, optimizer = made(regfused.SGD)
    is_as_before = unchanged(optimizer)
    with pytest.raises(ValueError, match=f"OptionScheduler: .*{message}"):
        OptionScheduler(optimizer, "l1", function, last_epoch)
    assert is_as_before()


def test_other_optimizers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, weight_decay=0.1)
    for other in (optimizer, None):
        with pytest.raises(TypeError, match=f"must be one of regfused, but is a {type(other).__name__}"):
            OptionScheduler(other, "weight_decay", factor_of)


BAD_FACTORS = {
    "negative": -0.5,
    "NaN": math.nan,
    "infinite": math.inf,
    "just too far below zero": -1e-9,
    "text": "1",
    "nothing": None,
    "two numbers": torch.ones(2),
}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("case", BAD_FACTORS)
def test_values_that_the_optimizer_would_refuse(make, case):
    bad = BAD_FACTORS[case]
    for option in base_of(make):
        if option == "dampening" and case in ("negative", "just too far below zero"):
            continue
        if option == "max_norm" and case == "infinite":
            continue
        for at in (0, 2):
            # The second group's alone is bad: the first must not be written either.
            functions = [lambda t: 1.0, lambda t, at=at: bad if t == at else 1.0]
            _, optimizer = made(make)
            is_as_before = unchanged(optimizer)
            message = f"OptionScheduler.step, t = {at}, group 1: ({option}|the factor) must be .*, but got"
            if at == 0:
                with pytest.raises(ValueError, match=message):
                    OptionScheduler(optimizer, option, functions)
                assert is_as_before()
                continue
            scheduler = OptionScheduler(optimizer, option, [lambda t: 1 / (t + 1), functions[1]])
            scheduler.step() if option != "max_norm" else None
            scheduler.last_epoch = 1
            is_as_before, state = unchanged(optimizer), scheduler.state_dict()
            with pytest.raises(ValueError, match=message):
                scheduler.step()
            assert is_as_before() and scheduler.state_dict() == state


def test_every_number_that_options_know_can_be_scheduled():
    for make in (regfused.SGD, regfused.Adam):
        numbers = {name for name, value in made(make)[1].defaults.items() if type(value) is float}
        assert numbers - {"norm_type"} == set(base_of(make)) == set(regfused.schedule._schedulable(make._rule))
        assert numbers <= set(options.names_of(make._rule))


def test_one_max_norm():
    _, optimizer = made(regfused.SGD)
    scheduler = OptionScheduler(optimizer, "max_norm", [lambda t: 1.0, lambda t: 1.0 + (t == 2)])
    scheduler.step()
    is_as_before = unchanged(optimizer)
    with pytest.raises(ValueError, match=r"t = 2: max_norm must be the same in every .*, but got \[0.7, 1.4\]"):
        scheduler.step()
    assert is_as_before() and scheduler.last_epoch == 1


def test_a_function_that_raises():
    _, optimizer = made(regfused.SGD)
    is_as_before = unchanged(optimizer)
    with pytest.raises(ZeroDivisionError):
        OptionScheduler(optimizer, "l1", lambda t: 1 / t)
    assert is_as_before()


def test_a_group_that_came_later():
    _, optimizer = made(regfused.SGD)
    scheduler = OptionScheduler(optimizer, "l1", factor_of)
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})
    is_as_before = unchanged(optimizer)
    with pytest.raises(ValueError, match=r"must have the 2 parameter groups .*, but has 3"):
        scheduler.step()
    assert is_as_before() and scheduler.last_epoch == 0


def test_what_goes_together_is_the_step_s_to_judge():
    # One schedule passes through what another puts right before the step.
    params, optimizer = made(regfused.SGD, two_groups=False, group_l1=0.0, l2=0.0)
    momentum = OptionScheduler(optimizer, "momentum", lambda t: 1 + t)
    l1 = OptionScheduler(optimizer, "l1", lambda t: float(t == 0))
    momentum.step()
    with pytest.raises(ValueError, match="SGD.step: momentum must be < 1"):
        train(params, optimizer, 1, lambda t: None)
    l1.step()
    train(params, optimizer, 1, lambda t: None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"option": "l2"}, "must be that of option 'l1', but is of 'l2'"),
        ({"base_values": [1.0]}, r"base_values must be a list, one for each of 2 groups, but got \[1.0\]"),
        ({"base_values": [1.0, "x"]}, "base_values must be a number, but got 'x'"),
        ({"_last_value": None}, "_last_value must be a list"),
        ({"functions": []}, "functions must be a list"),
        ({"functions": [None, {"value": 1.0}]}, "the function an object that takes it"),
        ({"last_epoch": 2.5}, "last_epoch must be an int, but got 2.5"),
        ({"_step_count": None}, "_step_count must be an int, but got None"),
    ],
)
def test_states_that_do_not_fit(change, message):
    _, optimizer = made(regfused.SGD)
    scheduler = OptionScheduler(optimizer, "l1", factor_of)
    before = scheduler.state_dict()
    with pytest.raises(ValueError, match=f"OptionScheduler.load_state_dict: .*{message}"):
        scheduler.load_state_dict({**before, "base_values": [5.0, 5.0], **change})
    for none in ({}, None, LambdaLR(optimizer, factor_of).state_dict()):
        with pytest.raises(ValueError, match="load_state_dict: a state must be a dict with option, base_values, "):
            scheduler.load_state_dict(none)
    assert scheduler.state_dict() == before


# --- Documentation ---------------------------------------------------------------------------------


def test_examples():
    result = doctest.testmod(regfused.schedule, extraglobs={"regfused": regfused, "torch": torch})
    assert result.attempted > 0 and result.failed == 0
