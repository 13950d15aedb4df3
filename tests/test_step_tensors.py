"""Tensors that the kernels do not take, alone and beside others that they take."""

import math

import pytest
import torch
from step_cases import (
    BOTH,
    DEVICE,
    EVERY_OPTIMIZER,
    KERNELS,
    OPTIMIZERS,
    assert_params_equal,
    copy_params,
    give_grads,
    has_kernels,
    in_double,
    is_adam,
    make_params,
    share_grads,
    slots_of,
    torch_twin,
    with_state,
    witness_of,
)

import regfused
from regfused import reference


def _beside_loop(make, params, **options):
    """An optimizer with all state that it can have, and torch's for-loop on copies."""
    twins = copy_params(params)
    options = dict(lr=0.1, **with_state(make), **options)
    return make(params, **options), torch_twin(make)(twins, foreach=False, **options), twins


def _against_loop(make, params, expect_kernels, atol=1e-6, **options):
    ours, loop, twins = _beside_loop(make, params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=atol)
    assert ours._plan.tensors == expect_kernels


@KERNELS
def test_mixed_with_complex(make):
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    _against_loop(make, params, 1, weight_decay=0.1)


@KERNELS
def test_mixed_step_has_one_norm_and_one_coefficient(make):
    params = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    ours, loop, twins = _beside_loop(make, params)
    ours.param_groups[0]["max_norm"] = 0.3
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        share_grads(params, twins)
        total = torch.nn.utils.clip_grad_norm_(twins, 0.3, foreach=False)
        ours.step()
        loop.step()
        assert ours.stats.grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
        assert_params_equal(params, twins, atol=1e-6)
    assert ours._plan.tensors == 1


@KERNELS
def test_other_strides(make):
    dense = torch.randn(6, 8)
    transposed = torch.nn.Parameter(dense.clone().t())
    strided = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    _against_loop(make, [transposed, strided, torch.nn.Parameter(torch.randn(()))], 2)


@KERNELS
def test_transposed_parameter_with_contiguous_gradient(make):
    p = torch.nn.Parameter(torch.randn(8, 8).t())
    ours, loop, (q,) = _beside_loop(make, [p])
    for _ in range(2):
        p.grad = torch.randn(8, 8)
        q.grad = p.grad.clone()
        ours.step()
        loop.step()
        assert_params_equal([p], [q], atol=1e-6)
    # The same memory, other strides: the plan must notice.
    p.data, q.data = p.data.t(), q.data.t()
    ours.step()
    loop.step()
    assert_params_equal([p], [q], atol=1e-6)


@KERNELS
def test_expanded_gradient(make):
    p = torch.nn.Parameter(torch.randn(4, 5))
    _, loop, (q,) = _beside_loop(make, [p])
    p.grad = torch.randn(5).expand(4, 5)
    q.grad = p.grad.clone()
    make([p], lr=0.1, fused=True).step()
    loop.step()
    assert_params_equal([p], [q], atol=1e-6)


# SGD alone takes sparse gradients.
@pytest.mark.parametrize("momentum", (0.0, 0.9))
def test_sparse_gradients_as_torch(momentum):
    embeddings = [torch.nn.Embedding(10, 3, sparse=True) for _ in range(2)]
    embeddings[1].load_state_dict(embeddings[0].state_dict())
    ours = regfused.SGD(embeddings[0].parameters(), lr=0.1, momentum=momentum)
    loop = torch.optim.SGD(embeddings[1].parameters(), lr=0.1, momentum=momentum)
    for _ in range(3):
        index = torch.randint(10, (4,))
        for embedding, optimizer in zip(embeddings, (ours, loop), strict=True):
            optimizer.zero_grad()
            embedding(index).square().sum().backward()
            optimizer.step()
        assert_params_equal(embeddings[0].parameters(), embeddings[1].parameters(), atol=1e-6)


@BOTH
def test_dense_gradients_after_sparse_ones(make):
    # torch cannot add them to the sparse momentum buffer.
    p = torch.nn.Parameter(torch.randn(10, 3))
    optimizer = make([p], lr=0.1, momentum=0.9)
    buffer, want = torch.zeros(10, 3), p.detach().clone()
    for step in range(4):
        grad = torch.randn(10, 3)
        if step in (0, 1, 3):
            grad[2:] = 0
        p.grad = grad.to_sparse(1) if step in (0, 1, 3) else grad
        buffer = 0.9 * buffer + grad
        want -= 0.1 * buffer
        optimizer.step()
        torch.testing.assert_close(p.detach(), want, rtol=0, atol=1e-6)
    assert optimizer.state[p]["momentum_buffer"].layout == torch.strided


@KERNELS
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_parameters_sharing_memory_and_listed_twice(make):
    p = torch.nn.Parameter(torch.randn(100_000))
    q = torch.nn.Parameter(p.detach().clone())
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = make([p, p], lr=0.1)
    optimizer.step()
    torch_twin(make)([q, q], lr=0.1, foreach=False).step()
    assert_params_equal([p], [q], atol=1e-6)
    memory = torch.randn(10)
    both = [memory, memory.clone()]
    pairs = [[torch.nn.Parameter(each[:7]), torch.nn.Parameter(each[3:])] for each in both]
    for param in (*pairs[0], *pairs[1]):
        param.grad = torch.ones(7)
    make(pairs[0], lr=0.1).step()
    torch_twin(make)(pairs[1], lr=0.1, foreach=False).step()
    torch.testing.assert_close(*both, rtol=0, atol=1e-6)
    with pytest.raises(RuntimeError, match="fused=True demands parameters that share no memory"):
        make(pairs[0], lr=0.1, fused=True).step()


@KERNELS
def test_other_norm_types_run_through_the_reference(make):
    params = make_params([50, 60])
    ours, loop, twins = _beside_loop(make, params)
    ours.param_groups[0].update(max_norm=0.3, norm_type=3.0)
    for _ in range(2):
        give_grads(params)
        share_grads(params, twins)
        total = torch.nn.utils.clip_grad_norm_(twins, 0.3, norm_type=3.0)
        ours.step()
        loop.step()
        assert ours.stats.grad_norm.item() == pytest.approx(total.item(), rel=1e-5)
        assert_params_equal(params, twins, atol=1e-6)
    ours.param_groups[0]["norm_type"] = 2.0
    ours.step()
    assert ours._plan.tensors == 2


@KERNELS
@pytest.mark.parametrize("flag", ({"fused": False}, {"foreach": True}))
def test_pure_pytorch_on_request(make, flag):
    params = make_params([50])
    twins = copy_params(params)
    options = dict(lr=0.1, **with_state(make))
    ours, loop = make(params, **options, **flag), torch_twin(make)(twins, foreach=False, **options)
    for _ in range(2):
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-6)
    assert ours._plan.tensors == 0


@KERNELS
def test_differentiable(make):
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    # Adam's first step is as long for any gradient, but for eps.
    options = {**with_state(make), **({"eps": 0.5} if is_adam(make) else {})}

    def outcome(p, g):
        q = p.clone()
        q.grad = g
        optimizer = make([q], lr=0.1, l2=0.1, weight_decay=0.2, differentiable=True, **options)
        optimizer.step()
        return q

    g = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outcome, (p, g))


@KERNELS
def test_inference_tensors(make):
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        optimizer = make([p], lr=0.1, **with_state(make))
        p.grad = torch.ones(5)
        optimizer.step()
        torch.testing.assert_close(p.double(), _after_one_step(optimizer, 1.0, 1.0, 5))


def _after_one_step(optimizer, value, grad, *shape):
    """Where a parameter of these values goes by its first gradient, of these."""
    p, g = (torch.full(shape, x, dtype=torch.float64) for x in (value, grad))
    (want,), *_ = witness_of(optimizer).step([p], [g], [{}])
    return want


class Plain(torch.nn.Parameter):
    """A class of its own for parameters, which changes no operation."""


class PlainTensor(torch.Tensor):
    pass


class Counting(torch.nn.Parameter):
    """Sees every operation."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Counting.calls += 1
        return super().__torch_function__(function, types, args, kwargs or {})


@KERNELS
@pytest.mark.parametrize("fused", (None, True))
def test_plain_subclasses_are_ordinary_memory(make, fused):
    params = [
        Plain(torch.randn(33)),
        torch.randn(5, 7).as_subclass(PlainTensor).requires_grad_(),
        torch.nn.Buffer(torch.randn(3)),
    ]
    params = [*params, torch.nn.Parameter(torch.randn(4))]
    twins = copy_params(params)
    options = dict(lr=0.1, weight_decay=0.1, **with_state(make))
    ours, loop = make(params, fused=fused, **options), torch_twin(make)(twins, foreach=False, **options)
    classes = [type(p) for p in params]
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.detach().clone().as_subclass(torch.Tensor)
        ours.step()
        loop.step()
        assert_params_equal([p.detach().as_subclass(torch.Tensor) for p in params], twins, atol=1e-6)
    assert ours._plan.tensors == 4 and [type(p) for p in params] == classes
    assert regfused.clip_grad_norm_(params, 1e-3) > 1


@KERNELS
def test_subclasses_that_see_operations(make):
    p = Counting(torch.ones(33))
    with pytest.raises(RuntimeError, match="fused=True demands dense float32.*parameter 0 .* of class Counting"):
        make([p], lr=0.1, fused=True)
    optimizer = make([p], lr=0.1)
    p.grad = torch.ones(33)
    Counting.calls = 0
    optimizer.step()
    assert Counting.calls > 0 and optimizer._plan.tensors == 0
    torch.testing.assert_close(
        p.detach().as_subclass(torch.Tensor).double(), _after_one_step(optimizer, 1.0, 1.0, 33), rtol=0, atol=1e-6
    )


@EVERY_OPTIMIZER
@pytest.mark.parametrize("fused", (None, True, False))
def test_a_model_that_changes_its_type(make, fused):
    """The slots come along, with their values."""
    model = torch.nn.Linear(7, 5)
    optimizer = make(model.parameters(), lr=0.1, fused=fused, **with_state(make))
    witness = witness_of(optimizer)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        params = list(model.parameters())
        give_grads(params)
        states = []
        for p in params:
            slots = {name: x.to(dtype) if name in slots_of(make) else x for name, x in optimizer.state[p].items()}
            states.append(in_double(slots))
        wants, states, *_ = witness.step(
            [p.detach().double() for p in params], [p.grad.double() for p in params], states
        )
        optimizer.step()
        for p, want, state in zip(params, wants, states, strict=True):
            assert optimizer.state[p].keys() == state.keys()
            # One rounding to the type of storage, and some of arithmetic in float32 of values of a size of 4.
            for got, exact in ((p, want), *((optimizer.state[p][name], x) for name, x in state.items())):
                assert got.dtype == dtype or got is optimizer.state[p].get("step")
                torch.testing.assert_close(got.detach().double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-6)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("stateful", (False, True))
@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_gradients_of_another_type(make, dtype, grad_dtype, stateful):
    options = {"lr": 0.1, **({"max_norm": 1.0, "l1": 0.1, **with_state(make)} if stateful else {})}
    p = torch.nn.Parameter(torch.randn(33, dtype=dtype))
    p.grad_dtype = grad_dtype
    q = torch.nn.Parameter(p.detach().double())
    ours = make([p, other := torch.nn.Parameter(torch.ones(3))], **options)
    twin = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    exact = getattr(reference, make.__name__)([q, twin], **options)
    for _ in range(2):
        p.grad, other.grad = torch.randn(33, dtype=grad_dtype), torch.ones(3)
        q.data.copy_(p.detach())
        q.grad, twin.grad = p.grad.double(), torch.ones(3, dtype=torch.float64)
        for name, x in ours.state.get(p, {}).items():
            exact.state[q][name].copy_(x)
        ours.step()
        exact.step()
        assert p.dtype == dtype and p.grad.dtype == grad_dtype
        # One rounding to the type of storage, some of arithmetic in float32 of values of a size of 4.
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=torch.finfo(dtype).eps, atol=4e-6)


OF_SGD = ({}, {"nesterov": True}, {"dampening": 0.3}, {"weight_decay": 0.1, "maximize": True})
OF_ADAM = ({}, {"betas": (0.5, 0.75)}, {"amsgrad": False}, {"weight_decay": 0.1, "maximize": True})


@pytest.mark.parametrize(
    "make, options",
    [
        pytest.param(make, options, id=f"{which}-{options}")
        for which, make in OPTIMIZERS.items()
        for options in (OF_ADAM if is_adam(make) else OF_SGD)
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_one_parameter_listed_twice_with_state(make, options):
    """As torch's for-loop: of SGD two first gradients, then slots, and a count, that go on twice in each step."""
    p, other = make_params([33, 4])
    q, twin = copy_params([p, other])
    options = {"lr": 0.1, **with_state(make), **options}
    ours, loop = make([p, other, p], **options), torch_twin(make)([q, twin, q], foreach=False, **options)
    for _ in range(4):
        give_grads([p, other])
        share_grads([p, other], [q, twin])
        ours.step()
        loop.step()
        assert_params_equal([p, other], [q, twin], atol=4e-6)
        assert ours.state[p].keys() == loop.state[q].keys()
        for name, x in ours.state[p].items():
            torch.testing.assert_close(x, loop.state[q][name], rtol=0, atol=4e-6)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("fused", (None, True, False))
@pytest.mark.parametrize("swapped", (False, True))
def test_parameters_on_the_meta_device(make, fused, swapped):
    """The optimizer is made before the model has memory; then, if modules swap their tensors, it steps the model."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        with torch.device("meta"):
            model = torch.nn.Linear(7, 5)
        optimizer = make(model.parameters(), lr=0.1, l1=0.1, max_norm=math.inf, fused=fused, **with_state(make))
        if not fused or not has_kernels(make):
            # What has no values is stepped without a look at them, as by torch.
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            assert all(optimizer.state[model.weight][name].is_meta for name in slots_of(make))
            optimizer.zero_grad()
            optimizer.state.clear()
        model.to_empty(device=DEVICE)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        model(torch.ones(3, 7)).sum().backward()
        optimizer.step()
        # As of torch's optimizers, the parameters are those on the meta device if they were not swapped.
        for p in model.parameters():
            want = _after_one_step(optimizer, 1.0, 3.0, *p.shape) if swapped else torch.ones_like(p).double()
            torch.testing.assert_close(p.detach().double(), want, rtol=0, atol=1e-6)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@KERNELS
def test_fused_true_refuses_to_step_meta_parameters(make):
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    optimizer = make([p], lr=0.1, fused=True)
    # The words are torch's, up to the colon.
    message = (
        "`fused=True` requires all the params to be floating point Tensors.*parameter 0 of group 0 is on device meta"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
