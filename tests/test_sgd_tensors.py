"""Tensors that the kernels do not take, alone and beside others that they take."""

import pytest
import torch
from sgd_cases import BOTH, assert_params_equal, copy_params, give_grads, make_params, share_grads

import regfused


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
