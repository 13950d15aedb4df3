"""The dispatcher's door: torch.ops.regfused.sgd_."""

import copy

import pytest
import torch
from step_cases import DEFAULTS, OPTIONS, check_against_oracle, make_params

import regfused

sgd_ = torch.ops.regfused.sgd_


class ByOperator:
    """The operator behind the face of an optimizer, as far as the oracle looks at it."""

    def __init__(self, params, **options):
        self.params, self.options, self.state = params, options, {}
        self.stats = None

    @torch.no_grad()
    def step(self):
        live = [p for p in self.params if p.grad is not None]
        buffers, first = [], []
        if self.options.get("momentum"):
            first = [p not in self.state for p in live]
            for p in live:
                self.state.setdefault(p, {"momentum_buffer": torch.empty_like(p)})
            buffers = [self.state[p]["momentum_buffer"] for p in live]
        sgd_(live, [p.grad for p in live], buffers, first, **self.options)


@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name, isa):
    options = {k: v for k, v in OPTIONS[name].items() if k in DEFAULTS}
    check_against_oracle(ByOperator, make_params([33, 4099]), options)


def test_bits_of_the_operator_and_of_the_optimizer():
    options = {"lr": 0.1, **OPTIONS["elastic net in the clip"]}
    params = make_params([33, 4099, 70_000])
    twins = copy.deepcopy(params)
    ours, by_operator = regfused.SGD(params, **options), ByOperator(twins, **options)
    for _ in range(3):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        by_operator.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


def _sample():
    return (
        [torch.randn(3, 4), torch.randn(5)],
        [torch.randn(3, 4), torch.randn(5)],
        [torch.zeros(3, 4), torch.zeros(5)],
    )


def test_opcheck():
    params, grads, buffers = _sample()
    torch.library.opcheck(
        sgd_.default, (params, grads, buffers, [True, False]), dict(lr=0.1, momentum=0.9, max_norm=1.0)
    )
    torch.library.opcheck(sgd_.default, (params, grads, [], []), dict(lr=0.1, l1=0.1, proximal=True))


def test_compiled_in_one_graph():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(p, g, b):
        sgd_([p], [g * 2], [b], [False], lr=0.1, momentum=0.9, l2=0.5)
        return p + 1

    p, g, b = (torch.randn(4) for _ in range(3))
    d = 2 * g + p
    want = p - 0.1 * (0.9 * b + d)
    torch.testing.assert_close(step(p, g, b), want + 1)
    torch.testing.assert_close(p, want)


def test_version_counters_and_fake_tensors():
    params, grads, buffers = _sample()
    versions = [t._version for t in params + buffers]
    sgd_(params, grads, buffers, [True, True], lr=0.1, momentum=0.9)
    assert all(t._version > v for t, v in zip(params + buffers, versions, strict=True))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [[mode.from_tensor(t) for t in tensors] for tensors in (params, grads, buffers)]
        assert sgd_(*fakes, [True, True], lr=0.1, momentum=0.9) is None


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda p, g, b: (p, g[:1], b, [True, True], {}),
            "one gradient for each parameter, but got 2 parameters and 1 gradients",
        ),
        (lambda p, g, b: (p, g, [], [], {}), "there must be 2 momentum_buffers.*got 0"),
        (
            lambda p, g, b: (p, [g[0], torch.randn(6)], b, [True, True], {}),
            r"grads\[1\] must have the shape.*\[5\].*\[6\]",
        ),
        (lambda p, g, b: (p, [g[0], g[1].double()], b, [True, True], {}), r"grads\[1\] must have .*Double"),
        (
            lambda p, g, b: (p, g, [b[0].t().contiguous().t(), b[1]], [True, True], {}),
            r"momentum_buffers\[0\] must have the strides",
        ),
        (lambda p, g, b: (p, g, [b[0], p[1]], [True, True], {}), "must share no memory"),
        (
            lambda p, g, b: ([p[0], p[1][::2]], [g[0], g[1][::2]], [b[0], b[1][::2]], [True, True], {}),
            r"params\[1\] is not dense",
        ),
        (lambda p, g, b: (p, g, b, [True, True], {"lr": -1.0}), "lr must be finite and >= 0, but got -1"),
        (lambda p, g, b: (p, g, b, [True, True], {"l1": float("nan")}), "l1 must be finite and >= 0, but got nan"),
        (lambda p, g, b: (p, g, b, [True, True], {"max_norm": -1.0}), "max_norm must be None or >= 0"),
        (lambda p, g, b: (p, g, b, [True, True], {"norm_type": 3.0}), "norm_type must be 1, 2 or inf, but got 3"),
        (lambda p, g, b: (p, g, b, [True, True], {"nonfinite": "x"}), "nonfinite must be .*'x'"),
    ],
)
def test_errors(change, message):
    params, grads, buffers = _sample()
    before = copy.deepcopy((params, buffers))
    p, g, b, first, options = change(params, grads, buffers)
    with pytest.raises(ValueError, match=message):
        sgd_(p, g, b, first, **{"lr": 0.1, "momentum": 0.9, **options})
    for now, then in zip((params, buffers), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(now, then, strict=True))
