"""A step inside of a graph of torch.compile with fullgraph=True: one operator, the same bits as in eager mode."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
from step_cases import ADAM_OPTIONS, OPTIONS, copy_params, give_grads, make_params, share_grads, with_state

import regfused

EVERY_CLASS = pytest.mark.parametrize("make", (regfused.SGD, regfused.Adam, regfused.AdamW))
SIZES = (3, 33, (5, 7), 4099)
CASES = ("plain", "everything", "elastic net in the clip", "proximal", "group lasso", "skip")


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """The compiled step of an optimizer, and how often it was compiled."""

    def __init__(self, optimizer, backend="aot_eager"):
        self.graphs = 0
        self.operators = set()

        def count(graph, inputs):
            self.graphs += 1
            self.operators |= {str(node.target) for node in graph.graph.nodes if "regfused" in str(node.target)}
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        # A scheduler puts a function around optimizer.step that compilers do not look into.
        make = type(optimizer)
        self.step = torch.compile(lambda: make.step(optimizer), fullgraph=True, backend=count)


def two_groups(params):
    return [{"params": params[:2], "l1": 0.02, "lr": torch.tensor(0.03)}, {"params": params[2:]}]


def pair_of(make):
    """Parameters, their copies, an optimizer for each, and the compiled step of the first."""
    params = make_params(SIZES)
    twins = copy_params(params)
    ours, twin = (make(tensors, lr=0.1, **with_state(make)) for tensors in (params, twins))
    return params, twins, ours, twin, Compiled(ours)


def assert_same(ours, twin):
    for group, other in zip(ours.param_groups, twin.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            assert torch.equal(p, q)
            assert ours.state[p].keys() == twin.state[q].keys()
            assert all(torch.equal(ours.state[p][name], twin.state[q][name]) for name in ours.state[p])
    assert ours.stats.as_floats() == twin.stats.as_floats()
    assert ours._last._merged().stepped == twin._last._merged().stepped


def options_of(make, case):
    return {
        "plain": {"momentum": 0.9, "dampening": 0.5} if make is regfused.SGD else {},
        "everything": {**with_state(make), "l1": 1e-2, "l2": 1e-2, "max_norm": 0.5, "weight_decay": 0.1},
        "elastic net in the clip": (OPTIONS if make is regfused.SGD else ADAM_OPTIONS)["elastic net in the clip"],
        "proximal": {"l1": 0.05, "l2": 0.1, "proximal": True, "nonnegative": True},
        "group lasso": {"group_l1": 0.1, "max_norm": 1.0, "norm_type": math.inf},
        "skip": {"nonfinite": "skip", "keep_zeros": True, "maximize": True},
    }[case]


@pytest.mark.parametrize(
    "make, case",
    [
        *((make, case) for make in (regfused.SGD, regfused.Adam) for case in CASES),
        (regfused.AdamW, "everything"),
    ],
)
def test_equal_to_eager(make, case):
    """Ten steps with a learning rate that a scheduler moves: compiled at most twice, for state comes with the first."""
    options = {"lr": torch.tensor(0.1), **options_of(make, case)}
    params = make_params(SIZES)
    twins = copy_params(params)
    ours, twin = (make(two_groups(tensors), **copy.deepcopy(options)) for tensors in (params, twins))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in (ours, twin)]
    compiled = Compiled(ours)
    for _ in range(10):
        give_grads(params)
        share_grads(params, twins)
        compiled.step()
        twin.step()
        for schedule in schedules:
            schedule.step()
    assert_same(ours, twin)
    assert compiled.graphs <= 2 + (case == "skip")  # it makes one graph anew to have a number of it as a tensor
    assert compiled.operators == {f"regfused.{ours._rule.name}_.groups"}


@EVERY_CLASS
def test_by_inductor_in_a_larger_graph(make):
    """What is computed of a parameter after the step sees it stepped; gradients are scaled in the graph."""
    params = make_params(SIZES)
    twins = copy_params(params)
    ours, twin = (make(tensors, lr=0.1, l1=0.01, max_norm=1.0) for tensors in (params, twins))

    def step(optimizer, tensors):
        before = [p * 2 for p in tensors]
        optimizer.step()
        return before, [p * 3 for p in tensors]

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        give_grads(params)
        share_grads(params, twins)
        got, want = compiled(ours, params), step(twin, twins)
        for some, others in zip(got, want, strict=True):
            assert all(map(torch.equal, some, others))
    assert_same(ours, twin)


@EVERY_CLASS
def test_parameters_without_a_gradient_and_ones_that_come_later(make):
    params, twins, ours, twin, compiled = pair_of(make)
    for _ in range(4):
        give_grads(params)
        share_grads(params, twins)
        params[1].grad = twins[1].grad = None
        compiled.step()
        twin.step()
    assert not ours.state.get(params[1])
    give_grads(params)
    share_grads(params, twins)
    compiled.step()
    twin.step()
    assert_same(ours, twin)


@EVERY_CLASS
def test_eager_goes_on_where_the_graph_has_stopped_and_back(make):
    params, twins, ours, twin, compiled = pair_of(make)
    for step in (compiled.step, ours.step, compiled.step, compiled.step, ours.step):
        give_grads(params)
        share_grads(params, twins)
        step()
        twin.step()
        assert_same(ours, twin)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    give_grads(params)
    share_grads(params, twins)
    compiled.step()
    twin.step()
    assert_same(ours, twin)


@EVERY_CLASS
def test_a_norm_that_is_not_finite(make):
    params = make_params(SIZES)
    optimizer = make(params, lr=0.1, nonfinite="skip", max_norm=1.0)
    compiled = Compiled(optimizer)
    give_grads(params)
    compiled.step()
    before = copy.deepcopy([*params, *(t for state in optimizer.state.values() for t in state.values())])
    params[0].grad[0] = math.nan
    compiled.step()
    after = [*params, *(t for state in optimizer.state.values() for t in state.values())]
    assert all(map(torch.equal, after, before))
    stats = optimizer.stats.as_floats()
    assert stats["skipped"] == 1 and math.isnan(stats["grad_norm"])
    for group in optimizer.param_groups:
        group["nonfinite"] = "error"
    with pytest.raises(RuntimeError, match="nonfinite='error' demands a finite gradient norm, but it is nan"):
        compiled.step()
    assert all(map(torch.equal, params, before))


def _reference(params):
    return regfused.SGD(params, lr=0.1, fused=False)


def _complex(params):
    return regfused.SGD([*params, torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=0.1)


def _tensor_option(params):
    return regfused.Adam(params, lr=torch.tensor(0.1), betas=(torch.tensor(0.9), torch.tensor(0.9)))


def _odd_norm(params):
    return regfused.SGD(params, lr=0.1, max_norm=1.0, norm_type=3.0)


def _two_norms(params):
    optimizer = regfused.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, max_norm=1.0)
    optimizer.param_groups[1]["max_norm"] = 2.0
    return optimizer


def _scaled(params):
    optimizer = regfused.SGD(params, lr=0.1, fused=True)
    optimizer.grad_scale = torch.tensor(2.0)
    return optimizer


def _count_as_a_number(params):
    optimizer = regfused.Adam(params, lr=0.1)
    optimizer.step()
    optimizer.state[params[0]]["step"] = 1.0
    return optimizer


@pytest.mark.parametrize(
    "make, reason",
    [
        (_reference, "fused=False, foreach=True and differentiable=True are pure PyTorch"),
        (_complex, "the kernels do not take a parameter of torch.complex64"),
        (_tensor_option, "betas is a Tensor: a number is demanded, or of lr a floating-point tensor"),
        (_odd_norm, "norm_type is 3.0, and not 1, 2 or inf"),
        (_two_norms, "max_norm is not the same in every group, and there is one norm over all"),
        (_scaled, "torch.amp.GradScaler takes part in it"),
        (_count_as_a_number, "a step count is not a tensor on the device of its parameter"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_be_in_a_graph(make, reason):
    params = make_params(SIZES)
    give_grads(params)
    optimizer = make(params)
    give_grads([p for group in optimizer.param_groups for p in group["params"]])
    before = copy.deepcopy(params)
    with pytest.raises(Exception, match=f"step: torch.compile cannot have this step in one graph: {reason}"):
        Compiled(optimizer).step()
    assert all(map(torch.equal, params, before))
    if make not in (_scaled, _two_norms):
        torch.compile(lambda: optimizer.step(), backend="eager")()  # breaks the graph
        assert not any(map(torch.equal, params, before))


def test_without_fullgraph_the_plan_takes_the_step():
    params = make_params(SIZES)
    optimizer = regfused.SGD(params, lr=0.1)
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    give_grads(params)
    torch.compile(lambda: optimizer.step(), backend=backend)()
    assert optimizer._last.kernels is optimizer._plan
    assert not any("regfused" in target for target in seen)
