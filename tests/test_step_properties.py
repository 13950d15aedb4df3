"""What holds for every step, whatever the tensors and options: properties, tried on generated examples."""

import copy
import io
import math
import os
from contextlib import contextmanager

import pytest
import torch
from step_cases import DTYPES, Oracle, assert_params_equal, move_of, torch_twin, with_state

import regfused
from regfused import reference

pytest.importorskip("hypothesis", reason="makes the examples")

from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

ISAS = regfused.build_info()["isas"].split(", ")

# Around vector registers, rows of 32 lanes and chunks of 16384 elements, and anything in between.
sizes = st.one_of(st.sampled_from((0, 1, 8, 15, 16, 17, 31, 32, 33, 65, 16383, 16384, 16385)), st.integers(0, 200))
strengths = st.sampled_from((0.0, 1e-3, 0.1, 0.7))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32)


EVERY_RULE = pytest.mark.parametrize("rule", ("SGD", "Adam"))


def common(draw, *, clip=True):
    """Any options that all constructors take; the clip is often off."""
    chosen = {
        "lr": draw(st.sampled_from((1e-3, 0.1, 0.5))),
        "weight_decay": draw(strengths),
        "decoupled_weight_decay": draw(st.booleans()),
        "l1": draw(strengths),
        "l2": draw(strengths),
        "proximal": draw(st.booleans()),
        "penalty_in_clip": draw(st.booleans()),
        "maximize": draw(st.booleans()),
        "concavity": draw(st.sampled_from((0.0, 0.0, 0.5, 20.0))),
        "keep_zeros": draw(st.sampled_from((False, False, True))),
        "nonnegative": draw(st.sampled_from((False, False, True))),
    }
    if clip:
        chosen["max_norm"] = draw(st.sampled_from((None, 0.3, 5.0, math.inf)))
        chosen["norm_type"] = draw(st.sampled_from((1.0, 2.0, math.inf)))
    return chosen


@st.composite
def options_of_sgd(draw, *, clip=True, group_lasso=True):
    """Momentum is often off."""
    chosen = common(draw, clip=clip)
    momentum = draw(st.sampled_from((0.0, 0.5, 0.9)))
    classical = draw(st.booleans())
    nesterov = momentum > 0 and draw(st.booleans())
    chosen |= {
        "momentum": momentum,
        "dampening": 0.0 if nesterov or classical else draw(st.sampled_from((0.0, 0.3))),
        "nesterov": nesterov,
        "classical_momentum": classical,
    }
    if group_lasso:
        chosen["group_l1"] = draw(st.sampled_from((0.0, 0.0, 0.5)))
    return regfused.SGD, chosen


@st.composite
def options_of_adam(draw, *, clip=True, group_lasso=True):
    """Where weight decay is decoupled, of AdamW too. The group lasso demands decoupled_proximal."""
    chosen = common(draw, clip=clip)
    chosen |= {
        "betas": draw(st.sampled_from(((0.9, 0.999), (0.5, 0.9), (0.0, 0.0)))),
        "eps": draw(st.sampled_from((1e-8, 1e-3, 0.0))),
        "amsgrad": draw(st.booleans()),
        "decoupled_proximal": draw(st.booleans()),
    }
    if group_lasso and chosen["decoupled_proximal"]:
        chosen["group_l1"] = draw(st.sampled_from((0.0, 0.5)))
    if chosen["decoupled_weight_decay"] and draw(st.booleans()):
        del chosen["decoupled_weight_decay"]
        return regfused.AdamW, chosen
    return regfused.Adam, chosen


def optimizers(rule, **what):
    """An optimizer of this rule, and options for it."""
    return (options_of_sgd if rule == "SGD" else options_of_adam)(**what)


@contextmanager
def on_isa(isa):
    before = os.environ.get("REGFUSED_ISA")
    os.environ["REGFUSED_ISA"] = isa
    try:
        yield
    finally:
        del os.environ["REGFUSED_ISA"]
        if before is not None:
            os.environ["REGFUSED_ISA"] = before


def randn(size, dtype, seed):
    return torch.randn(size, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu").to(
        torch.get_default_device(), dtype
    )


def parameters(values, grads):
    params = [torch.nn.Parameter(v.clone()) for v in values]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    return params


def bits(tensors):
    """All elements behind one another, NaN of any kind as one NaN."""
    flat = torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else torch.zeros(0)
    flat = torch.where(flat.isnan(), torch.full_like(flat, math.nan), flat)
    return flat.view(torch.uint8)


def same_bits(tensors, others):
    return torch.equal(bits(tensors), bits(others))


def step_twice(make, params, **chosen):
    """Parameters and slots, one kind of them after the other, after two steps with the same gradients."""
    optimizer = make(params, **chosen)
    optimizer.step()
    optimizer.step()
    slots = optimizer._rule.slots_of(optimizer.param_groups[0])
    return params, [optimizer.state[p][slot] for slot in slots for p in params]


# --- Tensors are only memory --------------------------------------------------------------------------


@EVERY_RULE
@given(st.data(), dtypes, st.lists(sizes, min_size=1, max_size=5), seeds)
def test_split_concatenated_and_permuted_tensors_have_the_same_bits(rule, data, dtype, pieces, seed):
    make, chosen = data.draw(optimizers(rule, clip=False, group_lasso=False))
    p, g = randn(sum(pieces), dtype, seed), randn(sum(pieces), dtype, seed + 1)
    whole, whole_slots = step_twice(make, parameters([p], [g]), **chosen)
    split, split_slots = step_twice(make, parameters(p.split(pieces), g.split(pieces)), **chosen)
    assert same_bits(whole, split) and same_bits(whole_slots, split_slots)
    assert p.numel() == 0 or dtype in (torch.bfloat16, torch.float16) or not torch.equal(whole[0], p)
    order = data.draw(st.permutations(range(len(pieces))))
    permuted, _ = step_twice(
        make, parameters([p.split(pieces)[i] for i in order], [g.split(pieces)[i] for i in order]), **chosen
    )
    assert same_bits([permuted[order.index(i)] for i in range(len(pieces))], split)


@EVERY_RULE
@given(st.data(), dtypes, st.lists(sizes, min_size=1, max_size=4), seeds)
def test_with_lr_0_parameters_keep_their_bits(rule, data, dtype, pieces, seed):
    make, chosen = data.draw(optimizers(rule))
    assume(not chosen.get("classical_momentum"))
    values = [randn(n, dtype, seed + i) for i, n in enumerate(pieces)]
    for value in values:
        value[::7] = -0.0
    grads = [randn(n, dtype, seed - i) for i, n in enumerate(pieces)]
    for grad in grads:
        grad[::3] = 0.0
    params = parameters(values, grads)
    step_twice(make, params, **{**chosen, "lr": 0.0})
    assert same_bits(params, values)


@EVERY_RULE
@given(st.data(), dtypes, st.lists(sizes, min_size=1, max_size=4), seeds)
def test_maximize_is_a_step_with_negated_gradients(rule, data, dtype, pieces, seed):
    make, chosen = data.draw(optimizers(rule))
    values = [randn(n, dtype, seed + i) for i, n in enumerate(pieces)]
    grads = [randn(n, dtype, seed - i) for i, n in enumerate(pieces)]
    up, up_slots = step_twice(make, parameters(values, grads), **{**chosen, "maximize": True})
    down, down_slots = step_twice(make, parameters(values, [-g for g in grads]), **{**chosen, "maximize": False})
    assert same_bits(up, down) and same_bits(up_slots, down_slots)


# --- The clip -----------------------------------------------------------------------------------------

# With which the first slot becomes what the gradient was turned into, at the first step.
SEEN = {"SGD": {"momentum": 0.9}, "Adam": {"betas": (0.0, 0.0)}}


def seen(optimizer, params):
    slot = optimizer._rule.slots[0]
    return [optimizer.state[p][slot] for p in params]


@EVERY_RULE
@given(
    st.lists(sizes, min_size=1, max_size=4),
    st.sampled_from((1.0, 2.0, math.inf)),
    st.sampled_from((0.0, 1e-3, 0.7, 30.0)),
    st.sampled_from((1e-20, 1.0, 1e20)),
    seeds,
)
def test_after_a_clip_the_norm_is_at_most_max_norm(rule, pieces, norm_type, max_norm, scale, seed):
    grads = [scale * randn(n, torch.float64, seed + i) for i, n in enumerate(pieces)]
    params = parameters([torch.zeros_like(g) for g in grads], grads)
    optimizer = getattr(regfused, rule)(params, lr=1.0, max_norm=max_norm, norm_type=norm_type, **SEEN[rule])
    optimizer.step()
    if rule == "SGD":  # from 0, with lr = 1
        assert all(torch.equal(p.detach(), -d) for p, d in zip(params, seen(optimizer, params), strict=True))
    clipped, raw = (torch.linalg.vector_norm(torch.cat(ts), norm_type) if sum(pieces) else torch.zeros(())
                    for ts in (seen(optimizer, params), grads))  # fmt: skip
    # Both norms are sums of as many roundings as there are terms, at worst.
    assert clipped <= max_norm * (1 + (sum(pieces) + 8) * 2.0**-53)
    coefficient = min(1.0, max_norm / (float(raw) + 1e-6))
    assert float(clipped) == pytest.approx(coefficient * float(raw), rel=1e-12)


@EVERY_RULE
@given(
    st.lists(st.tuples(sizes, st.sampled_from((0.1, 1.0)), strengths), min_size=2, max_size=5),
    st.sampled_from((0.1, 2.0)),
    seeds,
)
def test_one_coefficient_for_all_groups(rule, groups, max_norm, seed):
    # From parameters of 1, so that the gradient of the penalty is l1.
    assume(sum(n for n, _, _ in groups) > 0)
    grads = [randn(n, torch.float64, seed + i) for i, (n, _, _) in enumerate(groups)]
    params = parameters([torch.ones_like(g) for g in grads], grads)
    optimizer = getattr(regfused, rule)(
        [{"params": [p], "lr": lr, "l1": l1} for p, (_, lr, l1) in zip(params, groups, strict=True)],
        max_norm=max_norm,
        **SEEN[rule],
    )
    optimizer.step()
    hs = [g + l1 for g, (_, _, l1) in zip(grads, groups, strict=True)]
    coefficient = min(1.0, max_norm / (torch.cat(hs).norm().item() + 1e-6))
    assert optimizer.stats.clip_coef.item() == pytest.approx(coefficient, rel=1e-12)
    for p, d, h, (_, lr, _) in zip(params, seen(optimizer, params), hs, groups, strict=True):
        torch.testing.assert_close(d, coefficient * h, rtol=0, atol=1e-13)
        if rule == "SGD":
            torch.testing.assert_close(p.detach(), 1 - lr * coefficient * h, rtol=0, atol=1e-13)


# --- Proximal steps -----------------------------------------------------------------------------------


@EVERY_RULE
@given(st.data(), dtypes, sizes, seeds)
def test_a_proximal_step_shrinks_and_never_crosses_zero(rule, data, dtype, size, seed):
    make, chosen = data.draw(optimizers(rule, group_lasso=False))
    # A concavity makes of l1 a part of the direction too.
    chosen |= {"proximal": True, "concavity": 0.0, **({"momentum": 0.0, "nesterov": False} if rule == "SGD" else {})}
    p, g = randn(size, dtype, seed), randn(size, dtype, seed + 1)
    with_penalty, without = parameters([p], [g]), parameters([p], [g])
    make(with_penalty, **chosen).step()
    make(without, **{**chosen, "l1": 0.0, "l2": 0.0}).step()
    shrunk, plain = with_penalty[0].detach(), without[0].detach()
    # Without eps a direction of 0 makes 0/0 of Adam's move, as in torch.
    finite = plain.isfinite()
    assert bool(finite.all()) or chosen.get("eps") == 0
    assert bool((shrunk.abs() <= plain.abs())[finite].all())
    assert bool((shrunk * plain.sign() >= 0)[finite].all())
    if chosen["l1"] > 0 and chosen.get("decoupled_proximal", True):
        # A rounding of the arithmetic and one of the storage decide about elements at the threshold alone.
        inside = plain.double().abs() < chosen["lr"] * chosen["l1"] * (1 - 4 * torch.finfo(dtype).eps)
        assert bool((shrunk[inside] == 0).all())


# --- Special values -----------------------------------------------------------------------------------

special = st.sampled_from((0.0, -0.0, 1.0, -2.5, 1e-45, -1e-45, 1e-39, -1e-38, 6e-8, 1e30, -1e30, math.inf, -math.inf,
                           math.nan))  # fmt: skip


@EVERY_RULE
@settings(max_examples=2 * settings().max_examples)
@given(st.data(), dtypes, st.lists(st.tuples(*[special] * 5), min_size=1, max_size=70), st.sampled_from(ISAS))
def test_special_values_follow_the_reference(rule, data, dtype, rows, isa):
    make, chosen = data.draw(optimizers(rule, group_lasso=False))
    p, g, *slots = (torch.tensor(column, dtype=torch.float64).to(dtype) for column in zip(*rows, strict=True))
    slots = dict(zip(make._rule.slots, slots, strict=False))
    # An average of squares has no sign, and the largest is none of the smaller ones.
    for name in slots.keys() - {"exp_avg", "momentum_buffer"}:
        slots[name] = slots[name].abs()
    state = {"step": torch.tensor(3.0)} if make._rule.counts_steps else {}
    results = []
    for maker in (make, getattr(reference, make.__name__)):
        params = parameters([p], [g])
        optimizer = maker(params, **chosen)
        kept = optimizer._rule.slots_of(optimizer.param_groups[0])
        if kept:
            optimizer.state[params[0]] = copy.deepcopy(state | {name: slots[name] for name in kept})
        with on_isa(isa):
            optimizer.step()
        results.append({"param": params[0].detach(), **optimizer.state.get(params[0], {})})
    # Where an infinity or a NaN took part, both have the same of them; elsewhere they agree within roundings of the
    # type of arithmetic on the terms, and one of the type of storage.
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    storage = torch.finfo(dtype)
    size_of = {name: t.double().abs().nan_to_num(0, 0, 0) for name, t in {"param": p, "grad": g, **slots}.items()}
    terms = 4 + size_of["param"] + size_of["grad"] + sum(size_of[name] for name in make._rule.slots[:1])
    bounds = {name: 32 * arithmetic * terms for name in results[0]}
    if rule == "Adam":
        for name in make._rule.slots[1:]:
            bounds[name] = 32 * arithmetic * (terms * terms + size_of[name])
        # A move is a ratio, which may be large where all terms are small; where d is about 0 by cancellation, what
        # rounding makes of it decides about the move, which has a size all the same.
        oracle = Oracle(chosen, rule=move_of(make))
        rounded = 32 * arithmetic * (g.double().abs() + (1 + 2 * p.double().abs()) * (p != 0))
        up, down = (
            oracle.step(
                [p.double()], [g.double() + sign * rounded], [{n: t.double() for n, t in (state | slots).items()}]
            )
            for sign in (1, -1)
        )
        bounds["param"] = bounds["param"] + (up[0][0] - down[0][0]).abs().nan_to_num(0, 0, 0)
        bounds["param"] = bounds["param"] + 32 * arithmetic * results[1]["param"].double().abs()
    # The kernels scale l2 by the coefficient before they meet p. Where an infinite norm has made it 0, an infinite
    # parameter may so stay infinite that 0 * infinity has made NaN in the reference.
    lost = p.isinf() & (chosen["l2"] > 0 and chosen["max_norm"] is not None)
    assert not any(result["param"][lost].isfinite().any() for result in results)
    if rule == "Adam" and chosen["eps"] == 0:
        # An average of squares of 0 makes a move infinite then. The kernels multiply exp_avg by lr first: where nothing
        # is left of the product, 0 * infinity is NaN.
        smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).smallest_normal
        squares, moment = (results[1][name].double() for name in (kept[-1], "exp_avg"))
        lost = lost | ((squares == 0) & (moment.abs() * chosen["lr"] < smallest))
    assert results[0].keys() == results[1].keys()
    for name, got in results[0].items():
        want = results[1][name]
        note(f"{name}\n{got}\n{want}")
        if name == "step":
            assert got == want == 4
            continue
        got, want = got[~lost], want[~lost]
        assert torch.equal(got.isnan(), want.isnan())
        finite = got.isfinite() & want.isfinite()
        assert torch.equal(got[~finite & ~got.isnan()], want[~finite & ~want.isnan()])
        bound = bounds[name][~lost] + storage.eps * want.double().abs() + storage.smallest_normal * storage.eps
        assert bool(((got.double() - want.double()).abs() <= bound)[finite].all())


# --- Memory layouts -----------------------------------------------------------------------------------


@st.composite
def laid_out(draw, shape, *, overlap):
    """A tensor of this shape whose elements lie anyhow: permuted, with gaps and an offset, expanded, overlapping."""
    kind = draw(st.sampled_from(("dense", "gaps", "negated", *(("expanded", "overlapping") if overlap else ()))))
    dims = len(shape)
    if kind == "expanded":
        small = [1 if draw(st.booleans()) else n for n in shape]
        return randn(small, torch.float64, draw(seeds)).float().expand(shape)
    if kind == "overlapping":
        strides = [draw(st.integers(0, 3)) for _ in shape]
        needed = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        return randn(max(needed, 1), torch.float64, draw(seeds)).float().as_strided(shape, strides)
    order = draw(st.permutations(range(dims)))
    steps = [draw(st.integers(1, 3)) if kind == "gaps" else 1 for _ in shape]
    offset = draw(st.integers(0, 3))
    outer = [shape[d] * steps[d] for d in order]
    memory = randn(offset + math.prod(outer), torch.float64, draw(seeds)).float()[offset:].view(outer)
    tensor = memory.permute([order.index(d) for d in range(dims)])
    tensor = tensor[tuple(slice(None, None, step) for step in steps)]
    # Lazily negated, as the imaginary part of a conjugate is.
    return torch._neg_view(tensor) if kind == "negated" and overlap else tensor


@EVERY_RULE
@settings(max_examples=2 * settings().max_examples)
@given(st.data(), st.lists(st.integers(1, 6), max_size=4), st.sampled_from((None, 0.5)), st.booleans())
def test_any_layout_of_parameter_and_gradient(rule, data, shape, max_norm, most_state):
    value = data.draw(laid_out(shape, overlap=False))
    param = torch.nn.Parameter(value)
    twin = torch.nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))
    neighbour = torch.nn.Parameter(torch.ones(5))
    make = getattr(regfused, rule)
    chosen = {"lr": 0.1, **(with_state(make) if most_state else {})}
    optimizer = make([param, neighbour], max_norm=max_norm, **chosen)
    loop = torch_twin(make)([twin], foreach=False, **chosen)
    strides = param.stride()
    for _ in range(2):
        grad = data.draw(laid_out(shape, overlap=True))
        kept = grad.clone()
        # The setter of .grad asks for nothing but shape, dtype and device.
        param.grad, twin.grad = grad, grad.clone(memory_format=torch.contiguous_format)
        neighbour.grad = torch.full((5,), 2.0)
        if max_norm is not None:
            twins = [twin, torch.nn.Parameter(torch.ones(5))]
            twins[1].grad = neighbour.grad.clone()
            torch.nn.utils.clip_grad_norm_(twins, max_norm)
        optimizer.step()
        loop.step()
        assert param.grad is grad and torch.equal(grad, kept) and param.stride() == strides
        torch.testing.assert_close(param.detach(), twin.detach(), rtol=1e-5, atol=1e-6)


# --- Any history --------------------------------------------------------------------------------------


class History(RuleBasedStateMachine):
    """What people do to an optimizer between steps, in any order, beside torch's for-loop doing the same.

    Of one optimizer: ``make``, with its ``options``; ``changes`` are what people change in a group, ``others`` other
    options.
    """

    make, options, changes, others = None, {}, {}, {}

    @initialize(
        data=st.data(),
        weight_decay=st.sampled_from((0.0, 0.1)),
        fused=st.sampled_from((None, True, False)),
    )
    def begin(self, data, weight_decay, fused):
        self.count = 0
        self.params, self.twins = [], []
        self.fused = fused
        self.chosen = dict(lr=0.1, weight_decay=weight_decay)
        self.chosen |= {name: data.draw(values, label=name) for name, values in self.options.items()}
        groups = [self.new_params((3, 33)), self.new_params((16385,))]
        self.ours = self.make([{"params": ours} for ours, _ in groups], fused=fused, **self.chosen)
        twin = torch_twin(self.make)
        self.loop = twin([{"params": theirs} for _, theirs in groups], foreach=False, **self.chosen)

    def new_params(self, sizes):
        ours = []
        for size in sizes:
            self.count += 1
            ours.append(torch.nn.Parameter(randn(size, torch.float32, self.count)))
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        self.params += ours
        self.twins += theirs
        return ours, theirs

    @rule(data=st.data())
    def step(self, data):
        """Any parameters may have no gradient."""
        for p, q in zip(self.params, self.twins, strict=True):
            self.count += 1
            with_grad = data.draw(st.sampled_from((True, True, False))) and p.requires_grad
            p.grad = randn(p.shape, torch.float32, self.count) if with_grad else None
            q.grad = None if p.grad is None else p.grad.clone()
        self.ours.step()
        self.loop.step()
        # A handful of roundings a step, on numbers around 1; what is compared goes on from torch's numbers.
        assert_params_equal(self.params, self.twins, atol=1e-5)
        for p, q in zip(self.params, self.twins, strict=True):
            ours, theirs = (
                {name: x for name, x in o.state.get(t, {}).items() if x is not None}
                for o, t in ((self.ours, p), (self.loop, q))
            )
            assert ours.keys() == theirs.keys()
            with torch.no_grad():
                p.copy_(q)
                for name, slot in ours.items():
                    atol = 0 if name == "step" else 1e-5
                    torch.testing.assert_close(slot, theirs[name], rtol=0, atol=atol, check_device=False)
                    slot.copy_(theirs[name])

    @rule(size=st.sampled_from((0, 1, 65)), lr=st.sampled_from((0.05, 0.2)))
    def add_group(self, size, lr):
        ours, theirs = self.new_params((size,))
        self.ours.add_param_group({"params": ours, "lr": lr})
        self.loop.add_param_group({"params": theirs, "lr": lr})

    @rule(data=st.data())
    def change_an_option(self, data):
        name = data.draw(st.sampled_from(list(self.changes)))
        value = data.draw(st.sampled_from(self.changes[name]))
        group = data.draw(st.integers(0, len(self.ours.param_groups) - 1))
        for optimizer in (self.ours, self.loop):
            optimizer.param_groups[group][name] = value

    @rule(through_a_file=st.booleans())
    def checkpoint(self, through_a_file):
        saved = copy.deepcopy(self.ours.state_dict())
        if through_a_file:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        before = self.ours
        groups = [{"params": g["params"], "lr": 7.0, **self.others} for g in before.param_groups]
        self.ours = self.make(groups, fused=self.fused, **self.chosen)
        self.ours.load_state_dict(saved)
        for group, old in zip(self.ours.param_groups, before.param_groups, strict=True):
            assert group == old

    @rule(to_torch=st.booleans())
    def exchange_state_with_torch(self, to_torch):
        giver, taker = (self.ours, self.loop) if to_torch else (self.loop, self.ours)
        options = [dict(g) for g in taker.param_groups]
        taker.load_state_dict(copy.deepcopy(giver.state_dict()))
        for group, old in zip(taker.param_groups, options, strict=True):
            group.update({name: old[name] for name in old if name in ("foreach", "fused")})

    @rule(data=st.data())
    def freeze_or_thaw(self, data):
        i = data.draw(st.integers(0, len(self.params) - 1))
        self.params[i].requires_grad_(not self.params[i].requires_grad)

    @rule(data=st.data())
    def exchange_the_memory(self, data):
        i = data.draw(st.integers(0, len(self.params) - 1))
        self.params[i].data = self.params[i].detach().clone() * 0.5
        self.twins[i].data = self.twins[i].detach().clone() * 0.5

    @precondition(lambda self: self.ours.state)
    @rule(data=st.data(), entirely=st.booleans())
    def forget_state(self, data, entirely):
        i = data.draw(st.integers(0, len(self.params) - 1))
        for optimizer, p in ((self.ours, self.params[i]), (self.loop, self.twins[i])):
            if entirely:
                optimizer.state.pop(p, None)
            elif p in optimizer.state:
                self.forget_slots(optimizer.state[p])

    @rule()
    def copy_the_optimizer(self):
        """A copy has parameters of its own; training goes on with it."""
        position = {id(p): i for i, p in enumerate(self.params)}
        order = [position[id(p)] for g in self.ours.param_groups for p in g["params"]]
        self.ours = copy.deepcopy(self.ours)
        copies = [p for g in self.ours.param_groups for p in g["params"]]
        for i, p in zip(order, copies, strict=True):
            self.params[i] = p

    @rule()
    def skip_a_step(self):
        """An overflow under AMP leaves no trace."""
        for p in self.params:
            p.grad = torch.full_like(p, math.inf)
        before = [p.detach().clone() for p in self.params]
        self.ours.grad_scale, self.ours.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        keys = {id(p): set(e) for p, e in self.ours.state.items()}
        self.ours.step()
        del self.ours.grad_scale, self.ours.found_inf
        assert_params_equal(self.params, before)
        assert keys == {id(p): set(e) for p, e in self.ours.state.items()}


class HistoryOfSgd(History):
    make = regfused.SGD
    options = {"momentum": st.sampled_from((0.0, 0.9)), "dampening": st.sampled_from((0.0, 0.3))}
    changes = {name: (0.0, 0.01, 0.5) for name in ("lr", "momentum", "weight_decay")}
    others = {"momentum": 0.1}

    @staticmethod
    def forget_slots(entry):
        entry["momentum_buffer"] = None


class HistoryOfAdam(History):
    make = regfused.Adam
    options = {
        "betas": st.sampled_from(((0.9, 0.999), (0.5, 0.9))),
        "amsgrad": st.booleans(),
        "decoupled_weight_decay": st.booleans(),
    }
    changes = {
        **{name: (0.0, 0.01, 0.5) for name in ("lr", "weight_decay", "eps")},
        "betas": ((0.9, 0.999), (0.0, 0.5), (0.9, 0.0)),
    }
    others = {"betas": (0.1, 0.2)}

    @staticmethod
    def forget_slots(entry):
        entry.clear()


@pytest.mark.parametrize("history", (HistoryOfSgd, HistoryOfAdam))
def test_any_history(history):
    run_state_machine_as_test(history, settings=settings(max_examples=settings().max_examples, stateful_step_count=15))


@EVERY_RULE
@given(st.data(), dtypes, st.lists(sizes, min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 3), seeds)
def test_resumed_training_has_the_same_bits(rule, data, dtype, pieces, steps, more, seed):
    make, chosen = data.draw(optimizers(rule))

    def train(optimizer, params, first, last):
        for step in range(first, last):
            for i, p in enumerate(params):
                p.grad = None if (step + i) % 4 == 1 else randn(p.shape, dtype, seed + 17 * step + i)
            optimizer.step()

    values = [randn(n, dtype, seed - i) for i, n in enumerate(pieces)]
    params = [torch.nn.Parameter(v.clone()) for v in values]
    optimizer = make(params, **chosen)
    train(optimizer, params, 0, steps)
    file = io.BytesIO()
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, steps, steps + more)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(v) for v in saved["params"]]
    again = make(resumed, lr=1e-3)
    again.load_state_dict(saved["optimizer"])
    train(again, resumed, steps, steps + more)
    assert same_bits(params, resumed)
    state, same = (each.state_dict()["state"] for each in (optimizer, again))
    assert [(i, *entry) for i, entry in state.items()] == [(i, *entry) for i, entry in same.items()]
    for i, entry in state.items():
        assert all(same_bits([tensor], [same[i][name]]) for name, tensor in entry.items())
