"""SGD with everything between ``backward()`` and the next forward pass in one fused step."""

from __future__ import annotations

from regfused import reference
from regfused.optimizer import Fused


class SGD(Fused, reference.SGD):
    r"""Stochastic gradient descent with elastic-net penalties, clipping, momentum and weight decay in one fused step.

    A drop-in for ``torch.optim.SGD``. For each parameter ``p`` with gradient ``g``, the old ``p`` on all right-hand
    sides::

        g' = g / grad_scale                            under AMP, otherwise g; negated under maximize
        h  = g' + l1*sign(p) + 2*l2*p                  as if  l1*sum|p| + l2*sum(p^2)  stood in the loss; sign(0) = 0
        N  = norm of all h, over every group           one number
        c  = min(1, max_norm / (N + 1e-6))             as torch.nn.utils.clip_grad_norm_; 1 without max_norm
        d  = c*h + weight_decay*p                      coupled weight decay: after the clip, never in the norm
        b  = d                                         at the first gradient of this parameter
        b  = momentum*b + (1 - dampening)*d            afterwards
        u  = d + momentum*b (nesterov) | b (momentum) | d
        p  = p - lr*u
        p  = sign(p)*max(|p| - k*lr*l1, 0) / (1 + 2*k*lr*l2)     proximal only; l1 and l2 are not in h then
        p  = max(p, 0)                                 nonnegative only
        w  = w * max(1 - k*lr'*group_l1/||w||, 0)      for each slice w of p along group_dim, after all this

    ``k`` is what momentum makes of a direction that stays: 1 without momentum, ``G = (1 - dampening)/(1 - momentum)``
    with it, ``1 + momentum*G`` under nesterov, ``1/(1 - momentum)`` under classical momentum. So the steps come to rest
    at the minimum of ``loss + l1*sum|p| + l2*sum(p^2) + group_l1*sum||w||``, whatever the momentum and whether
    ``proximal`` or not. ``lr'`` is ``lr``, or ``lr/(1 + 2*k*lr*l2)`` after a proximal map.

    So ``SGD(params, lr, momentum, weight_decay, l1=.., l2=.., max_norm=..)`` gives the weights of a loop that adds
    ``l1*sum(p.abs().sum()) + l2*sum(p.pow(2).sum())`` to the loss, calls ``clip_grad_norm_`` and steps
    ``torch.optim.SGD``. ``l2`` is the strength of ``sum(p^2)``: where nothing is clipped, ``weight_decay = 2*l2``.

    Parameters, gradients and momentum buffers keep their shapes, strides and dtypes. Arithmetic is float32 for
    float16 and bfloat16, the parameter's own type otherwise; norms are accumulated in float64, with the same bits for
    any number of threads and any instruction set. (On CUDA devices a thread accumulates its share of a chunk in the
    type of arithmetic, the rest is float64; the same bits on every card.) ``p.grad`` is read, not written (but see
    ``fused``).

    On CUDA devices the host waits for nothing, and a step can be captured in a CUDA graph, after one that made the
    momentum buffers. It waits, and refuses a capture, with ``nonfinite="error"``, with tensors that the kernels do not
    take, with CPU and CUDA tensors in one optimizer, and where a step makes momentum buffers and may be skipped.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer.
        lr: learning rate, >= 0; a number or a 1-element tensor. Below 0 by rounding, where schedulers leave it, is 0,
            here and in the strengths below. With 0 the parameters keep their bits (but under
            ``classical_momentum``, whose velocity goes on). The value of a tensor on a CUDA device is read there,
            unchecked.
        momentum: >= 0.
        dampening: of momentum; not applied to the first gradient of a parameter.
        weight_decay: coupled weight decay, >= 0.
        nesterov: Nesterov momentum; demands ``momentum > 0`` and ``dampening = 0``.
        l1: strength of ``sum|p|``, >= 0. Per group.
        l2: strength of ``sum(p^2)``, >= 0. Per group.
        concavity: >= 0; the ``l1`` penalty becomes the minimax concave penalty (MCP) of ``gamma = 1/concavity``:
            ``l1*|p| - concavity*p^2/2`` up to ``|p| = l1/concavity``, constant beyond (Zhang, Nearly unbiased variable
            selection under minimax concave penalty, 2010). What is large is not shrunk. Its gradient is
            ``l1*sign(p) - clamp(concavity*p, -l1, l1)``. With ``proximal`` the map is that of ``l1*|p|``, and
            ``-clamp(concavity*p, -l1, l1)`` is added to ``d``, after the clip: it is smooth, a part of the loss (Yao
            and Kwok, Efficient learning with a family of nonconvex regularizers by redistributing nonconvexity, 2018).
            With 0 the penalty is ``l1*|p|``. Per group.
        proximal: ``l1`` and ``l2`` leave ``h``; the proximal map after the update makes exact zeros (soft thresholding,
            ISTA: Daubechies, Defrise, De Mol 2004; Parikh and Boyd, Proximal Algorithms, 2014). Demands
            ``momentum < 1`` and ``dampening <= 1``.
        group_l1: strength of the group lasso ``sum ||w||`` over the slices ``w = p.select(group_dim, i)``, >= 0: its
            proximal map, with ``proximal`` or without, after everything else has been done to ``p`` and on ``p`` as it
            is stored. A slice whose L2 norm is not above ``k*lr'*group_l1`` becomes exactly zero, the others keep their
            direction (Yuan and Lin, Model selection and estimation in regression with grouped variables, 2006). With
            ``l1`` and ``proximal`` it is the sparse group lasso, elements first (Simon, Friedman, Hastie, Tibshirani, A
            sparse-group lasso, 2013). All slices of a parameter have one size; who weighs groups by the square root of
            theirs writes it into ``group_l1``. Demands ``momentum < 1`` and ``dampening <= 1``. A NaN
            makes its slice NaN; with ``lr = 0`` nothing moves. Not part of ``stats.penalty``. Per group.
        group_dim: dimension of the slices, negative from the back: 0 has the rows of a ``Linear`` weight (outputs) or
            the filters of a convolution, 1 the columns (inputs). Where ``group_l1`` is not 0, every parameter of the
            group must have it; one without dimensions is one slice. Per group.
        max_norm: clip the global norm ``N`` to it, >= 0, or None. The same in every group.
        norm_type: of ``N``. 1, 2 and inf run fused, others through the reference. The same in every group.
        penalty_in_clip: False: ``N`` and ``c`` see ``g'`` alone; the penalty's gradient is added after the clip.
        nonfinite: what happens when ``N`` is not finite: ``"propagate"`` it, as torch does; ``"skip"`` the step, which
            then leaves no trace but a count in `stats`; ``"error"``: RuntimeError before anything changed. The same in
            every group.
        norm_group: a process group of ``torch.distributed``, or True for the default one: the norm and ``nonfinite``
            are of all its processes together, each of which steps other parameters. For what autograd cannot see:
            ZeroRedundancyOptimizer, FSDP1, pipeline and expert parallelism. Sharded parameters (DTensor) need none.
            Every process has to take every step, with gradients or without: it is one collective operation. An error
            in one is an error in all of them. ``stats.penalty`` and ``stats.zero_fraction`` stay those of the process.
            Kept by the optimizer, not in its ``state_dict``.
        keep_zeros: elements of ``p`` that are 0 keep their bits, for training on after pruning: ``h`` and ``d`` are 0
            there, whatever the gradient, so the norm and the state are those of a model without them. Per group.
        nonnegative: what is below 0 after the step becomes 0: the projection. With ``l1``, ``l2``, ``group_l1`` the map
            is that of the penalty and the constraint together. Real parameters only. Per group.
        decoupled_weight_decay: ``p = p*(1 - lr*weight_decay)`` instead of the term in ``d`` (Loshchilov and Hutter,
            Decoupled weight decay regularization, 2019).
        classical_momentum: ``b = momentum*b + lr*d; p = p - b``, as in textbooks and Keras; no dampening
            (Polyak 1964).
        maximize: ascend instead of descend.
        foreach: True: pure PyTorch, by `regfused.reference`.
        differentiable: True: pure PyTorch, and autograd runs through the step.
        fused: None: the kernels for every tensor they can take, the reference for the rest. True: demand the kernels,
            and under ``torch.amp.GradScaler`` unscale inside the step, which, as torch's ``fused=True``, leaves the
            unscaled gradient in ``p.grad``. False: pure PyTorch. Under modes that watch operations, tracers
            (``make_fx``, ``FakeTensorMode``, ``torch.jit.trace``) and ``torch.func`` a step is made of torch
            operations, whatever this says, so that it is seen there.

    Raises:
        ValueError, RuntimeError: for options, gradients, parameters and loaded state that are not as they must be, with
            the operation, the demand and the value. Nothing has changed then.

    Example::

        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = regfused.SGD(model.parameters(), lr=0.1, momentum=0.9, l1=1e-4, l2=1e-4, max_norm=1.0)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> float(optimizer.stats.clip_coef) <= 1
        True
    """
