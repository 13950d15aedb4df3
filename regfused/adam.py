"""Adam and AdamW with everything between ``backward()`` and the next forward pass in one fused step."""

from __future__ import annotations

from regfused import reference
from regfused.optimizer import Fused


class Adam(Fused, reference.Adam):
    r"""Adam with elastic-net penalties, clipping, proximal maps and weight decay in one fused step.

    A drop-in for ``torch.optim.Adam``. For each parameter ``p`` with gradient ``g``, the old ``p`` on all right-hand
    sides::

        g' = g / grad_scale                            under AMP, otherwise g; negated under maximize
        h  = g' + l1*sign(p) + 2*l2*p                  as if  l1*sum|p| + l2*sum(p^2)  stood in the loss; sign(0) = 0
        N  = norm of all h, over every group           one number
        c  = min(1, max_norm / (N + 1e-6))             as torch.nn.utils.clip_grad_norm_; 1 without max_norm
        d  = c*h + weight_decay*p                      coupled weight decay: after the clip, never in the norm
        exp_avg    = beta1*exp_avg + (1 - beta1)*d
        exp_avg_sq = beta2*exp_avg_sq + (1 - beta2)*d^2
        v  = exp_avg_sq, or under amsgrad the largest so far
        e  = lr / (sqrt(v / (1 - beta2^t)) + eps)      the length of the step of each element
        p  = p*(1 - lr*weight_decay)                   decoupled weight decay only
        p  = p - e*exp_avg/(1 - beta1^t)
        p  = sign(p)*max(|p| - e*l1, 0) / (1 + 2*e*l2) proximal only; l1 and l2 are not in h then
        p  = max(p, 0)                                 nonnegative only
        w  = the group lasso's proximal map             for each slice w of p along group_dim: the w that minimizes
             sum (w - q)^2/(2*e') + group_l1*||w||, q the slice so far, e' = e, or e/(1 + 2*e*l2) with proximal

    ``t`` counts the steps of each parameter, from its first gradient on; a skipped step does not count. With a proximal
    map in the metric of the step the steps come to rest at the minimum of
    ``loss + l1*sum|p| + l2*sum(p^2) + group_l1*sum||w||``, with its exact zeros (Yun, Lozano, Yang, Adaptive proximal
    gradient methods for structured neural networks, 2021). The threshold ``lr*l1`` would come to rest elsewhere: with
    fewer zeros where gradients are small.

    State is torch's: ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq``, to and from ``torch.optim.Adam``.
    dtypes, devices, CUDA graphs, ``stats`` and what a step promises are those of `regfused.SGD`.

    Args:
        params: parameters, named parameters or parameter groups, as for any torch optimizer.
        lr: learning rate, >= 0; a number or a 1-element tensor. With 0 the parameters keep their bits.
        betas: two numbers, or two 1-element tensors, in [0, 1). The host reads tensors, and waits for their device.
        eps: added to the root, >= 0.
        weight_decay: >= 0; see ``decoupled_weight_decay``.
        amsgrad: the largest second moment so far in place of the last (Reddi, Kale, Kumar, On the convergence of Adam
            and beyond, 2018).
        l1, l2, concavity, proximal, max_norm, norm_type, penalty_in_clip, nonfinite, keep_zeros, nonnegative: see
            `regfused.SGD`.
        norm_group: see `regfused.SGD`.
        group_l1, group_dim: see `regfused.SGD`. The map of a slice has no closed form where its elements have steps of
            different lengths: a few Newton steps find its norm.
        decoupled_proximal: the maps take ``lr`` for the length of each element's step, as AdamW's decay does.
        foreach, differentiable, fused: see `regfused.SGD`.
        maximize: ascend instead of descend.
        capturable: as in torch: pure PyTorch keeps ``step`` on the parameter's device. The CUDA kernels always do.
        decoupled_weight_decay: ``p = p*(1 - lr*weight_decay)`` instead of the term in ``d``: AdamW.

    Raises:
        ValueError, RuntimeError: for options, gradients, parameters and loaded state that are not as they must be, with
            the operation, the demand and the value. Nothing has changed then.

    Example::

        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = regfused.Adam(model.parameters(), lr=0.01, l1=1e-4, proximal=True, max_norm=1.0)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> float(optimizer.stats.clip_coef) <= 1
        True
    """


class AdamW(Fused, reference.AdamW):
    r"""`regfused.Adam` with decoupled weight decay: a drop-in for ``torch.optim.AdamW``.

    ``p = p*(1 - lr*weight_decay)`` before the move, 0.01 by default (Loshchilov and Hutter, Decoupled weight decay
    regularization, 2019). All else is that of `regfused.Adam`.

    Example::

        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = regfused.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, max_norm=1.0)
        >>> model(torch.randn(8, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> int(optimizer.state[model.weight]["step"])
        1
    """
