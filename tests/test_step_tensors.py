"""Tensors that the kernels do not take, alone and beside others that they take."""

import math

import pytest
import torch
from step_cases import BOTH, DEVICE, assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused
from regfused import reference


def _against_loop(params, expect_kernels, atol=1e-6, **options):
    twins = copy_params(params)
    ours, loop = regfused.SGD(params, lr=0.1, **options), torch.optim.SGD(twins, lr=0.1, foreach=False, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=atol)
    assert ours._plan.tensors == expect_kernels


def test_mixed_with_complex():
    params = [torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    _against_loop(params, 1, momentum=0.9, weight_decay=0.1)


def test_mixed_step_has_one_norm_and_one_coefficient():
    params = [torch.nn.Parameter(torch.randn(50)), torch.nn.Parameter(torch.randn(6, dtype=torch.complex64))]
    twins = copy_params(params)
    ours = regfused.SGD(params, lr=0.1, momentum=0.9, max_norm=0.3)
    loop = torch.optim.SGD(twins, lr=0.1, momentum=0.9, foreach=False)
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


def test_other_strides():
    dense = torch.randn(6, 8)
    transposed = torch.nn.Parameter(dense.clone().t())
    strided = torch.nn.Parameter(torch.randn(6, 8)[:, ::2])
    _against_loop([transposed, strided, torch.nn.Parameter(torch.randn(()))], 2, momentum=0.9)


def test_transposed_parameter_with_contiguous_gradient():
    p = torch.nn.Parameter(torch.randn(8, 8).t())
    q = torch.nn.Parameter(p.detach().clone())
    ours = regfused.SGD([p], lr=0.1, momentum=0.9)
    loop = torch.optim.SGD([q], lr=0.1, momentum=0.9, foreach=False)
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


def test_expanded_gradient():
    p = torch.nn.Parameter(torch.randn(4, 5))
    p.grad = torch.randn(5).expand(4, 5)
    before = p.detach().clone()
    regfused.SGD([p], lr=0.1, fused=True).step()
    torch.testing.assert_close(p.detach(), before - 0.1 * p.grad)


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


def test_parameters_sharing_memory_and_listed_twice():
    p = torch.nn.Parameter(torch.randn(100_000))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = regfused.SGD([p, p], lr=0.1)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 0.2)
    memory = torch.randn(10)
    a, b = torch.nn.Parameter(memory[:7]), torch.nn.Parameter(memory[3:])
    a.grad, b.grad = torch.ones(7), torch.ones(7)
    want = memory.clone()
    want[:7] -= 0.1
    want[3:] -= 0.1
    regfused.SGD([a, b], lr=0.1).step()
    torch.testing.assert_close(memory, want)
    with pytest.raises(RuntimeError, match="fused=True demands parameters that share no memory"):
        regfused.SGD([a, b], lr=0.1, fused=True).step()


def test_other_norm_types_run_through_the_reference():
    params = make_params([50, 60])
    twins = copy_params(params)
    ours = regfused.SGD(params, lr=0.1, max_norm=0.3, norm_type=3.0)
    loop = torch.optim.SGD(twins, lr=0.1)
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


@pytest.mark.parametrize("flag", ({"fused": False}, {"foreach": True}))
def test_pure_pytorch_on_request(flag):
    params = make_params([50])
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9)
    ours, loop = regfused.SGD(params, **options, **flag), torch.optim.SGD(twins, foreach=False, **options)
    for _ in range(2):
        give_grads(params)
        share_grads(params, twins)
        ours.step()
        loop.step()
        assert_params_equal(params, twins, atol=1e-6)
    assert ours._plan.tensors == 0


def test_differentiable():
    p = torch.randn(4, dtype=torch.float64, requires_grad=True)
    lr = 0.1

    def outcome(p, g):
        q = p.clone()
        q.grad = g
        optimizer = regfused.SGD([q], lr=lr, momentum=0.9, l2=0.1, weight_decay=0.2, differentiable=True)
        optimizer.step()
        return q

    g = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(outcome, (p, g))


def test_inference_tensors():
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        optimizer = regfused.SGD([p], lr=0.1, momentum=0.9)
        p.grad = torch.ones(5)
        optimizer.step()
        torch.testing.assert_close(p, torch.full((5,), 0.9))


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


@pytest.mark.parametrize("fused", (None, True))
def test_plain_subclasses_are_ordinary_memory(fused):
    params = [
        Plain(torch.randn(33)),
        torch.randn(5, 7).as_subclass(PlainTensor).requires_grad_(),
        torch.nn.Buffer(torch.randn(3)),
    ]
    params = [*params, torch.nn.Parameter(torch.randn(4))]
    twins = copy_params(params)
    options = dict(lr=0.1, momentum=0.9, weight_decay=0.1)
    ours, loop = regfused.SGD(params, fused=fused, **options), torch.optim.SGD(twins, foreach=False, **options)
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


def test_subclasses_that_see_operations():
    p = Counting(torch.ones(33))
    with pytest.raises(RuntimeError, match="fused=True demands dense float32.*parameter 0 .* of class Counting"):
        regfused.SGD([p], lr=0.1, fused=True)
    optimizer = regfused.SGD([p], lr=0.1)
    p.grad = torch.ones(33)
    Counting.calls = 0
    optimizer.step()
    assert Counting.calls > 0 and optimizer._plan.tensors == 0
    torch.testing.assert_close(p.detach().as_subclass(torch.Tensor), torch.full((33,), 0.9))


@BOTH
@pytest.mark.parametrize("fused", (None, True, False))
def test_a_model_that_changes_its_type(make, fused):
    """The momentum buffer comes along, with its values."""
    model = torch.nn.Linear(7, 5)
    optimizer = make(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bfloat16, torch.float16, torch.float32):
        model.to(dtype)
        wants = []
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            buffer = optimizer.state[p].get("momentum_buffer", torch.zeros_like(p)).to(dtype)
            velocity = 0.9 * buffer.double() + p.grad.double()
            wants.append((velocity, p.detach().double() - 0.1 * velocity))
        optimizer.step()
        for p, (velocity, want) in zip(model.parameters(), wants, strict=True):
            buffer = optimizer.state[p]["momentum_buffer"]
            assert buffer.dtype == p.dtype == dtype
            # One rounding to the type of storage, and some of arithmetic in float32 of values of a size of 4.
            for got, exact in ((buffer, velocity), (p.detach(), want)):
                torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-6)


@BOTH
@pytest.mark.parametrize("options", ({}, {"momentum": 0.9, "max_norm": 1.0, "l1": 0.1}), ids=str)
@pytest.mark.parametrize("grad_dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_gradients_of_another_type(make, dtype, grad_dtype, options):
    p = torch.nn.Parameter(torch.randn(33, dtype=dtype))
    p.grad_dtype = grad_dtype
    q = torch.nn.Parameter(p.detach().double())
    ours = make([p, other := torch.nn.Parameter(torch.ones(3))], lr=0.1, **options)
    exact = reference.SGD([q, twin := torch.nn.Parameter(torch.ones(3, dtype=torch.float64))], lr=0.1, **options)
    for _ in range(2):
        p.grad, other.grad = torch.randn(33, dtype=grad_dtype), torch.ones(3)
        q.data.copy_(p.detach())
        q.grad, twin.grad = p.grad.double(), torch.ones(3, dtype=torch.float64)
        if p in ours.state:
            exact.state[q]["momentum_buffer"].copy_(ours.state[p]["momentum_buffer"])
        ours.step()
        exact.step()
        assert p.dtype == dtype and p.grad.dtype == grad_dtype
        # One rounding to the type of storage, some of arithmetic in float32 of values of a size of 4.
        torch.testing.assert_close(p.detach().double(), q.detach(), rtol=torch.finfo(dtype).eps, atol=4e-6)


@BOTH
@pytest.mark.parametrize(
    "options", ({}, {"nesterov": True}, {"dampening": 0.3}, {"weight_decay": 0.1, "maximize": True}), ids=str
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_one_parameter_listed_twice_with_momentum(make, options):
    """As torch's for-loop: two first gradients, then one buffer that goes on twice in each step."""
    p, other = make_params([33, 4])
    q, twin = copy_params([p, other])
    ours = make([p, other, p], lr=0.1, momentum=0.9, **options)
    loop = torch.optim.SGD([q, twin, q], lr=0.1, momentum=0.9, foreach=False, **options)
    for _ in range(4):
        give_grads([p, other])
        share_grads([p, other], [q, twin])
        ours.step()
        loop.step()
        assert_params_equal([p, other], [q, twin], atol=4e-6)
        buffers = [o.state[t]["momentum_buffer"] for o, t in ((ours, p), (loop, q))]
        torch.testing.assert_close(*buffers, rtol=0, atol=4e-6)


@BOTH
@pytest.mark.parametrize("fused", (None, True, False))
@pytest.mark.parametrize("swapped", (False, True))
def test_parameters_on_the_meta_device(make, fused, swapped):
    """The optimizer is made before the model has memory; then, if modules swap their tensors, it steps the model."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swapped)
    try:
        with torch.device("meta"):
            model = torch.nn.Linear(7, 5)
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9, l1=0.1, max_norm=math.inf, fused=fused)
        if not fused or make is reference.SGD:
            # What has no values is stepped without a look at them, as by torch.
            for p in model.parameters():
                p.grad = torch.empty_like(p)
            optimizer.step()
            assert optimizer.state[model.weight]["momentum_buffer"].is_meta
            optimizer.zero_grad()
            optimizer.state.clear()
        model.to_empty(device=DEVICE)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(1.0)
        model(torch.ones(3, 7)).sum().backward()
        optimizer.step()
        # As of torch's optimizers, the parameters are those on the meta device if they were not swapped.
        want = 1 - 0.1 * (3 + 0.1) if swapped else 1.0
        for p in model.parameters():
            torch.testing.assert_close(p.detach(), torch.full_like(p, want))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_fused_true_refuses_to_step_meta_parameters():
    p = torch.nn.Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    optimizer = regfused.SGD([p], lr=0.1, fused=True)
    # The words are torch's, up to the colon.
    message = (
        "`fused=True` requires all the params to be floating point Tensors.*parameter 0 of group 0 is on device meta"
    )
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
