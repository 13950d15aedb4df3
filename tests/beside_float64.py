"""An optimizer beside its oracle in float64, step by step."""

import copy

import torch


def wide(tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def arithmetic_eps(tensor) -> float:
    return torch.finfo(torch.float64 if tensor.dtype in (torch.float64, torch.complex128) else torch.float32).eps


class Beside:
    """One optimizer of ours beside the oracle in float64, which starts every step from what ours has.

    So nothing accumulates, and the tolerance is that of one step: a handful of roundings of the type of arithmetic
    (float32 for half types) of terms no larger than `scale`, and one rounding to the type of storage.
    """

    def __init__(self, info, params, kwargs, in_groups=lambda params: params):
        kwargs = {"lr": 0.1, **kwargs}
        self.params, self.twins = params, [torch.nn.Parameter(wide(p)) for p in params]
        self.ours = info.optim_cls(in_groups(self.params), **copy.deepcopy(kwargs))
        self.exact = info.exact(in_groups(self.twins), kwargs)
        # The roundings of one are in the norm, and so in the step of all.
        self.coarsest = max(map(arithmetic_eps, params)) if "max_norm" in kwargs else 0.0

    def step(self, closure=None):
        scales = []
        self.exact.state.clear()
        for p, q in zip(self.params, self.twins, strict=True):
            q.data.copy_(p.detach())
            q.grad = None if p.grad is None else wide(p.grad)
            state = self.ours.state.get(p, {})
            if state:
                self.exact.state[q] = {k: v.clone() if k == "step" else wide(v) for k, v in state.items()}
            sizes = [q, *(t for t in (q.grad, *(v for k, v in state.items() if k != "step")) if t is not None)]
            scales.append(4 + sum(t.detach().abs().max().item() for t in sizes if t.numel()))
        raw = [p.grad for p in self.params]
        kept = [None if g is None else g.clone() for g in raw]
        result = self.ours.step(closure)
        self.exact.step()
        for i, (p, q) in enumerate(zip(self.params, self.twins, strict=True)):
            assert p.grad is raw[i] and (kept[i] is None or torch.equal(p.grad, kept[i])), "the gradient was written"
            self._compare(f"tensor {i}", p, q, scales[i])
            ours, exact = (o.state.get(t, {}) for o, t in ((self.ours, p), (self.exact, q)))
            assert set(ours) == set(exact), f"state of tensor {i}"
            for name in ours:
                if name != "step":
                    assert ours[name].dtype == p.dtype and ours[name].device == p.device
                    self._compare(f"{name} of tensor {i}", ours[name], exact[name], scales[i])
                else:
                    assert torch.equal(ours[name], exact[name])
        return result

    def _compare(self, place, got, want, scale):
        arithmetic = max(arithmetic_eps(got), self.coarsest)
        storage = torch.finfo(got.dtype).eps / 2
        bound = 16 * arithmetic * scale + torch.finfo(got.dtype).smallest_normal * storage
        if storage > arithmetic:
            # The group lasso takes this away of what was rounded to storage before.
            groups = [group for group in self.ours.param_groups if group.get("group_l1")]
            gains = [1 / (1 - group.get("momentum", 0)) for group in groups]  # at most
            shrunk = max((k * float(g["lr"]) * g["group_l1"] for k, g in zip(gains, groups, strict=True)), default=0.0)
            bound = bound + storage * (2 * shrunk + (3 if shrunk else 1) * want.detach().abs())
        wrong = (wide(got) - want.detach()).abs() > bound
        assert got.shape == want.shape and not wrong.any(), (
            f"{place}: {int(wrong.sum())} of {got.numel()} elements are off, first {got[wrong][0].item()} "
            f"instead of {want[wrong][0].item()}"
        )
