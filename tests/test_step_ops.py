"""The dispatcher's door: torch.ops.regfused.sgd_ and adam_."""

import copy
import math

import pytest
import torch
from step_cases import (
    ADAM_OPTIONS,
    ON_CUDA_KERNELS,
    OPTIONS,
    AdamMove,
    SgdMove,
    check_against_oracle,
    make_params,
    with_state,
)

import regfused
from regfused import reference

RULES = {"SGD": (reference.SGD._rule, SgdMove), "Adam": (reference.Adam._rule, AdamMove)}
CASES = [(name, case) for name, (_, witness) in RULES.items() for case in witness.options]
EVERY_RULE = pytest.mark.parametrize("name", RULES)


def operator_of(name):
    return getattr(torch.ops.regfused, RULES[name][0].name + "_")


class ByOperator:
    """The operator behind the face of an optimizer, as far as the oracle looks at it."""

    def __init__(self, name, params, **options):
        self.operator, (self.rule, witness) = operator_of(name), RULES[name]
        self.params, self.options, self.state = params, options, {}
        self.slots = self.rule.slots_of({**witness.defaults, **options})
        self.stats = None

    @torch.no_grad()
    def step(self):
        live = [p for p in self.params if p.grad is not None]
        arguments = {"params": live, "grads": [p.grad for p in live]}
        first = [p not in self.state for p in live]
        # What a rule starts from its first gradient, it must not look at before.
        start = math.nan if self.rule.start_from_gradient else 0.0
        for p in live:
            if p not in self.state:
                self.state[p] = {"step": torch.tensor(0.0)} if self.rule.counts_steps else {}
                self.state[p] |= {slot: torch.full_like(p, start) for slot in self.slots}
        for slot in self.rule.slots:
            arguments[slot + "s"] = [self.state[p][slot] for p in live] if slot in self.slots else []
        if self.rule.counts_steps:
            arguments["state_steps"] = [self.state[p]["step"] for p in live]
        else:
            arguments["first"] = first if self.slots else []
        self.operator(**arguments, **self.options)


@pytest.mark.parametrize("name, case", CASES)
def test_against_float64(name, case, isa):
    _, witness = RULES[name]
    check_against_oracle(
        lambda params, **options: ByOperator(name, params, **options),
        make_params([33, 4099]),
        witness.options[case],
        witness=witness,
    )


@pytest.mark.parametrize("make", (regfused.SGD, regfused.Adam, regfused.AdamW))
def test_bits_of_the_operator_and_of_the_optimizer(make):
    options = (
        {"lr": 0.1, **OPTIONS["elastic net in the clip"]}
        if make is regfused.SGD
        else {"lr": 0.1, **ADAM_OPTIONS["elastic net in the clip"], **with_state(make)}
    )
    params = make_params([33, 4099, 70_000])
    twins = copy.deepcopy(params)
    ours = make(params, **options)
    decoupled = {"decoupled_weight_decay": True} if make is regfused.AdamW else {}
    by_operator = ByOperator("SGD" if make is regfused.SGD else "Adam", twins, **options, **decoupled)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        by_operator.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == by_operator.state[q].keys()
        for slot, tensor in ours.state[p].items():
            assert torch.equal(tensor, by_operator.state[q][slot])


def _sample(name):
    """Arguments by name, with tensors in every slot, and the options that ask for those."""
    rule, _ = RULES[name]

    def tensors(make):
        return [make(3, 4), make(5)]

    arguments = {"params": tensors(torch.randn), "grads": tensors(torch.randn)}
    arguments |= {slot + "s": tensors(torch.zeros) for slot in rule.slots}
    if rule.counts_steps:
        arguments["state_steps"] = [torch.tensor(0.0), torch.tensor(2.0)]
    else:
        arguments["first"] = [True, False]
    return arguments, {"lr": 0.1, **with_state(getattr(regfused, name))}


def _mutated(arguments):
    return [t for name, tensors in arguments.items() if name not in ("grads", "first") for t in tensors]


@EVERY_RULE
def test_opcheck(name):
    arguments, options = _sample(name)
    torch.library.opcheck(operator_of(name).default, tuple(arguments.values()), {**options, "max_norm": 1.0})
    with_less = {"momentum_buffers": [], "first": []} if name == "SGD" else {"max_exp_avg_sqs": []}
    torch.library.opcheck(
        operator_of(name).default, tuple((arguments | with_less).values()), dict(lr=0.1, l1=0.1, proximal=True)
    )


def _sample_of_groups(name):
    """Two groups, of which only the second one has slots that an option asks for."""
    _rule, _ = RULES[name]
    arguments, options = _sample(name)
    operator = operator_of(name).groups
    off = {"momentum": 0.0, "nesterov": False, "amsgrad": False}
    if name == "SGD":
        arguments |= {"momentum_buffers": arguments["momentum_buffers"][1:], "first": [False]}
    else:
        arguments["max_exp_avg_sqs"] = arguments["max_exp_avg_sqs"][1:]
    single = {argument.name: argument for argument in operator_of(name).default._schema.arguments}
    lists = {}
    for argument in operator._schema.arguments:
        option = single.get(argument.name)
        if not argument.kwarg_only or argument.name in ("sizes", "max_norm", "norm_type", "nonfinite"):
            continue
        value = options.get(argument.name, option.default_value)
        both = [off.get(argument.name, value), value]
        lists[argument.name] = [n for pair in both for n in pair] if isinstance(value, list | tuple) else both
    arguments["lr_tensors"] = []
    return arguments, {"sizes": [1, 1], **lists}


@EVERY_RULE
def test_groups_are_as_one_call_for_each(name):
    arguments, options = _sample_of_groups(name)
    single, of_single = _sample(name)
    for tensors, others in ((arguments["params"], single["params"]), (arguments["grads"], single["grads"])):
        for t, u in zip(tensors, others, strict=True):
            u.copy_(t)
    numbers = operator_of(name).groups(**arguments, **options)
    with_less = {"momentum": 0.0, "nesterov": False} if name == "SGD" else {"amsgrad": False}
    needless = {"momentum_buffers", "first"} if name == "SGD" else {"max_exp_avg_sqs"}
    for i, off in enumerate((with_less, {})):
        lists = {key: values[i : i + 1] for key, values in single.items()}
        if off:
            lists |= {key: [] for key in needless}
        elif name == "SGD":
            lists["first"] = [False]
        operator_of(name)(**lists, **{**of_single, **off})
    assert all(map(torch.equal, arguments["params"], single["params"]))
    assert numbers.shape == (4,) and numbers.dtype == torch.float64 and numbers[1] == 1 and numbers[3] == 0


@EVERY_RULE
def test_opcheck_of_groups(name):
    arguments, options = _sample_of_groups(name)
    for lr in ([], [torch.tensor(0.1), torch.tensor(0.2, dtype=torch.float64)]):
        arguments["lr_tensors"] = lr
        torch.library.opcheck(
            operator_of(name).groups, tuple(arguments.values()), {**options, "max_norm": 1.0, "nonfinite": "skip"}
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": [1, 2]}, r"sizes must add up to 2 parameters, but got \[1, 2\]|but got 1 2"),
        ({"sizes": [-1, 3]}, "sizes must be >= 0"),
        ({"l1": [0.1]}, "for 2 groups there must be 2 values of l1, but got 1"),
        ({"betas": [0.9, 0.9]}, "for 2 groups there must be 4 values of betas, but got 2"),
        ({"l1": [0.1, -1.0]}, "l1 must be finite and >= 0, but got -1"),
        ({"lr_tensors": [torch.tensor(0.1)]}, "no lr_tensors, or one for each of 2 groups, but got 1"),
        ({"lr_tensors": [torch.tensor(0.1), torch.ones(2)]}, "a floating-point tensor with 1 element"),
        ({"lr_tensors": [torch.tensor(0.1), torch.tensor(1)]}, "a floating-point tensor with 1 element"),
        ({"max_exp_avg_sqs": []}, "there must be 1 max_exp_avg_sqs.*got 0"),
    ],
)
def test_errors_of_groups(change, message):
    arguments, options = _sample_of_groups("Adam")
    before = copy.deepcopy(_mutated({key: value for key, value in arguments.items() if key != "lr_tensors"}))
    with pytest.raises(ValueError, match=message):
        operator_of("Adam").groups(**{**arguments, **options, **change})
    after = _mutated({key: value for key, value in arguments.items() if key != "lr_tensors"})
    assert all(map(torch.equal, after, before))


@pytest.mark.skipif(ON_CUDA_KERNELS, reason="the host does not look at the numbers of a device")
@pytest.mark.parametrize("value", (-1.0, math.nan, math.inf))
def test_a_learning_rate_that_is_none(value):
    arguments, options = _sample_of_groups("SGD")
    arguments["lr_tensors"] = [torch.tensor(0.1), torch.tensor(value)]
    before = copy.deepcopy(arguments["params"])
    with pytest.raises(ValueError, match="lr must be finite and >= 0, but got"):
        operator_of("SGD").groups(**arguments, **options)
    assert all(map(torch.equal, arguments["params"], before))


@EVERY_RULE
def test_compiled_in_one_graph(name):
    operator = operator_of(name)
    arguments, options = _sample(name)

    def step(arguments):
        operator(**{**arguments, "grads": [g * 2 for g in arguments["grads"]]}, **options, l2=0.5)
        return [p + 1 for p in arguments["params"]]

    twins = copy.deepcopy(arguments)
    got, want = torch.compile(step, fullgraph=True, backend="aot_eager")(arguments), step(twins)
    for t, u in zip((*got, *_mutated(arguments)), (*want, *_mutated(twins)), strict=True):
        assert torch.equal(t, u)


@EVERY_RULE
def test_version_counters_and_fake_tensors(name):
    arguments, options = _sample(name)
    versions = [t._version for t in _mutated(arguments)]
    operator_of(name)(**arguments, **options)
    assert all(t._version > v for t, v in zip(_mutated(arguments), versions, strict=True))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {
            key: [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in values]
            for key, values in arguments.items()
        }
        assert operator_of(name)(**fakes, **options) is None


@EVERY_RULE
def test_a_skipped_step_leaves_no_trace(name):
    arguments, options = _sample(name)
    arguments["grads"][1][3] = math.inf
    before = copy.deepcopy(_mutated(arguments))
    operator_of(name)(**arguments, **options, nonfinite="skip")
    assert all(map(torch.equal, _mutated(arguments), before))


def _every_second(tensors):
    return [tensors[0], tensors[1][::2]]


# Of every rule: {slot} is its first one. The change gets the arguments and the name of that one.
ERRORS = [
    (
        lambda a, slot: {"grads": a["grads"][:1]},
        "one gradient for each parameter, but got 2 parameters and 1 gradients",
    ),
    (lambda a, slot: {slot: []}, "there must be 2 {slot}.*got 0"),
    (lambda a, slot: {"grads": [a["grads"][0], torch.randn(6)]}, r"grads\[1\] must have the shape.*\[5\].*\[6\]"),
    (lambda a, slot: {"grads": [a["grads"][0], a["grads"][1].double()]}, r"grads\[1\] must have .*Double"),
    (lambda a, slot: {slot: [a[slot][0], a[slot][1].half()]}, r"{slot}\[1\] must have .*Half"),
    (lambda a, slot: {slot: [a[slot][0].t().contiguous().t(), a[slot][1]]}, r"{slot}\[0\] must have the strides"),
    (lambda a, slot: {slot: [a[slot][0], a["params"][1]]}, "must share no memory"),
    (
        lambda a, slot: {key: _every_second(a[key]) for key in a if key not in ("first", "state_steps")},
        r"params\[1\] is not dense",
    ),
    (lambda a, slot: {"lr": -1.0}, "lr must be finite and >= 0, but got -1"),
    (lambda a, slot: {"l1": math.nan}, "l1 must be finite and >= 0, but got nan"),
    (lambda a, slot: {"max_norm": -1.0}, "max_norm must be None or >= 0"),
    (lambda a, slot: {"norm_type": 3.0}, "norm_type must be 1, 2 or inf, but got 3"),
    (lambda a, slot: {"nonfinite": "x"}, "nonfinite must be .*'x'"),
]
ERRORS_OF = {
    "SGD": [
        (lambda a, slot: {"first": [True]}, "there must be 2 values of first.*got 1"),
        (lambda a, slot: {"momentum": 0.0}, "there must be 0 momentum_buffers.*got 2"),
        (lambda a, slot: {"momentum": -0.5}, "momentum must be finite and >= 0, but got -0.5"),
    ],
    "Adam": [
        (lambda a, slot: {"max_exp_avg_sqs": []}, "there must be 2 max_exp_avg_sqs.*got 0"),
        (lambda a, slot: {"amsgrad": False}, "there must be 0 max_exp_avg_sqs.*got 2"),
        (lambda a, slot: {"exp_avg_sqs": a["exp_avgs"]}, "must share no memory"),
        (lambda a, slot: {"state_steps": a["state_steps"][:1]}, "there must be 2 state_steps.*got 1"),
        (lambda a, slot: {"state_steps": [a["state_steps"][0]] * 2}, "must share no memory"),
        (lambda a, slot: {"state_steps": [torch.ones(()), torch.ones(2)]}, r"state_steps\[1\] must be one .*\[2\]"),
        (lambda a, slot: {"state_steps": [torch.tensor(1), torch.ones(())]}, r"state_steps\[0\] must be one .*Long"),
        (lambda a, slot: {"betas": [0.9]}, "betas must be two numbers, but got 1"),
        (lambda a, slot: {"betas": [0.9, 1.0]}, r"betas must be in \[0, 1\), but got 0.9 1"),
        (lambda a, slot: {"betas": [math.nan, 0.9]}, r"betas must be in \[0, 1\), but got"),
        (lambda a, slot: {"eps": -1e-8}, "eps must be finite and >= 0, but got -1e-08"),
    ],
}


@pytest.mark.parametrize(
    "name, change, message", [(name, *case) for name in RULES for case in (*ERRORS, *ERRORS_OF[name])]
)
def test_errors(name, change, message):
    arguments, options = _sample(name)
    before = copy.deepcopy(_mutated(arguments))
    slot = RULES[name][0].slots[0] + "s"
    changed = {**arguments, **options, **change(arguments, slot)}
    with pytest.raises(ValueError, match=message.replace("{slot}", slot)):
        operator_of(name)(**changed)
    assert all(map(torch.equal, _mutated(arguments), before))


@pytest.mark.skipif(ON_CUDA_KERNELS, reason="the host does not look at the counts of a device")
@pytest.mark.parametrize("count", (-1.0, 0.5, math.inf, math.nan))
def test_a_count_that_is_none(count):
    arguments, options = _sample("Adam")
    arguments["state_steps"][1].fill_(count)
    before = copy.deepcopy(_mutated(arguments)[:-1])  # without the count, which may be NaN
    with pytest.raises(ValueError, match=rf"state_steps\[1\] must be a whole number >= 0, but is {count:g}"):
        operator_of("Adam")(**arguments, **options)
    assert all(map(torch.equal, _mutated(arguments), before))
