"""Cases of a step as data, and the oracle they are held to: the formula in float64, element by element."""

from __future__ import annotations

import ctypes
import math
import os

import pytest
import torch

import regfused
from regfused import reference
from regfused.optimizer import Fused

# Where tensors are made: the CPU, but for a run of the same tests on a GPU.
DEVICE = torch.get_default_device().type

# Whether the CUDA kernels do the steps: on a GPU, or emulated on the host, for tensors on the CPU.
EMULATED = regfused.build_info().get("cuda") == "emulated"
ON_CUDA_KERNELS = DEVICE == "cuda" or EMULATED

# Whether the compiled part is not the ordinary one, but emulates a device or is under sanitizers.
OTHER_EXTENSION = os.environ.get("REGFUSED_TEST_EXTENSION")

# Whether AddressSanitizer is in this process.
UNDER_ADDRESS_SANITIZER = hasattr(ctypes.CDLL(None), "__asan_init")

BOTH = pytest.mark.parametrize("make", (regfused.SGD, reference.SGD), ids=("kernels", "reference"))

# Every optimizer, with kernels and without.
OPTIMIZERS = {
    f"{which}-{name}": getattr(module, name)
    for which, module in (("kernels", regfused), ("reference", reference))
    for name in ("SGD", "Adam", "AdamW")
}
EVERY_OPTIMIZER = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)

# The three that have kernels.
KERNELS = pytest.mark.parametrize("make", (regfused.SGD, regfused.Adam, regfused.AdamW), ids=lambda make: make.__name__)

# Around the vector registers (4 to 16 floats), a row of 32 lanes and a chunk of 16384 elements.
SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 4099, 16383, 16384, 16385)

# Shapes whose slices are single elements, tiny, around a vector register, a row of 32 lanes, a chunk of 16384 elements,
# and, where they do not lie together, around tiles of 512, 1024 and 2048 columns and of 16 and 64 rows.
SLICED_SHAPES = (
    *((), (1,), (7,), (4099,), (1, 5), (5, 1), (0, 3), (3, 0), (17, 3), (33, 31), (5, 32), (7, 33), (3, 65), (1100, 2)),
    *((2, 4099), (3, 16383), (2, 16384), (2, 16385), (63, 1023), (65, 1025), (16, 513), (2, 3, 1025), (129, 1, 7)),
    *((31, 5, 9), (17, 6, 3, 3), (2, 3, 4, 5, 6)),
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Every option, alone and in company.
OPTIONS = {
    "plain": {},
    "lr zero": {"lr": 0.0, "momentum": 0.9, "l1": 0.1, "weight_decay": 0.1, "group_l1": 1.0},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"momentum": 0.9, "maximize": True, "l1": 0.05, "l2": 0.02, "max_norm": 0.7},
    "l1": {"l1": 0.3},
    "l2": {"l2": 0.3},
    "elastic net, momentum": {"momentum": 0.9, "l1": 0.1, "l2": 0.2},
    "clip": {"max_norm": 0.5},
    "clip out of reach": {"max_norm": 1e6, "momentum": 0.5},
    "measured, not clipped": {"max_norm": math.inf, "momentum": 0.5},
    "clip to zero": {"max_norm": 0.0, "momentum": 0.5},
    "clip, norm 1": {"max_norm": 0.5, "norm_type": 1.0, "momentum": 0.9, "l2": 0.1},
    "clip, norm inf": {"max_norm": 0.5, "norm_type": math.inf, "momentum": 0.9, "l1": 0.1},
    "elastic net in the clip": {"momentum": 0.9, "weight_decay": 0.01, "l1": 0.2, "l2": 0.1, "max_norm": 1.0},
    "elastic net outside": {"momentum": 0.9, "l1": 0.2, "l2": 0.1, "max_norm": 1.0, "penalty_in_clip": False},
    "proximal l1": {"momentum": 0.9, "l1": 3.0, "proximal": True, "max_norm": 1.0},
    "proximal elastic net": {"l1": 2.0, "l2": 0.5, "proximal": True, "weight_decay": 0.01},
    "group lasso": {"group_l1": 3.0, "momentum": 0.9, "max_norm": 1.0},
    "sparse group lasso": {"l1": 2.0, "proximal": True, "group_l1": 4.0, "group_dim": -1, "weight_decay": 0.01},
    "concave l1": {"l1": 0.5, "l2": 0.1, "concavity": 0.4, "momentum": 0.9, "max_norm": 1.0},
    "concave l1 outside": {"l1": 0.5, "concavity": 0.4, "max_norm": 1.0, "penalty_in_clip": False},
    "proximal concave l1": {"l1": 2.0, "l2": 0.5, "concavity": 1.5, "proximal": True, "momentum": 0.5},
    "concave sparse group lasso": {"l1": 1.0, "concavity": 0.8, "proximal": True, "group_l1": 1.0, "max_norm": 1.0},
    "kept zeros": {"momentum": 0.9, "keep_zeros": True, "max_norm": 1.0},
    "kept zeros, nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "keep_zeros": True},
    "kept zeros, elastic net": {"l1": 0.1, "l2": 0.2, "keep_zeros": True, "max_norm": 1.0},
    "nonnegative": {"momentum": 0.9, "nonnegative": True, "max_norm": 1.0},
    "nonnegative sparse group lasso": {"nonnegative": True, "l1": 0.5, "proximal": True, "group_l1": 1.0},
    "decoupled": {"momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True, "l2": 0.1},
    "classical": {"momentum": 0.9, "classical_momentum": True, "weight_decay": 0.1, "max_norm": 2.0},
    "classical nesterov": {"momentum": 0.9, "classical_momentum": True, "nesterov": True, "l1": 0.1},
    "everything": {
        "momentum": 0.8,
        "weight_decay": 0.05,
        "l1": 1.0,
        "l2": 0.3,
        "proximal": True,
        "group_l1": 1.0,
        "max_norm": 1.0,
        "norm_type": 1.0,
        "decoupled_weight_decay": True,
        "nesterov": True,
        "maximize": True,
        "keep_zeros": True,
        "nonnegative": True,
        "nonfinite": "error",
    },
}

DEFAULTS = {
    "lr": 0.1,
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "l1": 0.0,
    "l2": 0.0,
    "concavity": 0.0,
    "proximal": False,
    "group_l1": 0.0,
    "group_dim": 0,
    "max_norm": None,
    "norm_type": 2.0,
    "penalty_in_clip": True,
    "nonfinite": "propagate",
    "decoupled_weight_decay": False,
    "classical_momentum": False,
    "keep_zeros": False,
    "nonnegative": False,
    "maximize": False,
}


# Every option of Adam's, alone and in company.
ADAM_OPTIONS = {
    "plain": {},
    "lr zero": {"lr": 0.0, "l1": 0.1, "weight_decay": 0.1, "proximal": True},
    "betas": {"betas": (0.5, 0.9)},
    "no memory": {"betas": (0.0, 0.0)},
    "eps": {"eps": 0.5},
    "weight decay": {"weight_decay": 0.1},
    "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True, "l2": 0.1},
    "amsgrad": {"amsgrad": True, "weight_decay": 0.01},
    "maximize": {"maximize": True, "l1": 0.05, "l2": 0.02, "max_norm": 0.7},
    "l1": {"l1": 0.3},
    "l2": {"l2": 0.3},
    "elastic net": {"l1": 0.1, "l2": 0.2},
    "clip": {"max_norm": 0.5},
    "measured, not clipped": {"max_norm": math.inf},
    "clip, norm 1": {"max_norm": 0.5, "norm_type": 1.0, "l2": 0.1},
    "clip, norm inf": {"max_norm": 0.5, "norm_type": math.inf, "l1": 0.1},
    "elastic net in the clip": {"weight_decay": 0.01, "l1": 0.2, "l2": 0.1, "max_norm": 1.0},
    "elastic net outside": {"l1": 0.2, "l2": 0.1, "max_norm": 1.0, "penalty_in_clip": False},
    "proximal l1": {"l1": 0.5, "proximal": True, "max_norm": 1.0},
    "proximal elastic net": {"l1": 0.2, "l2": 0.5, "proximal": True, "weight_decay": 0.01},
    "decoupled proximal": {"l1": 3.0, "l2": 0.5, "proximal": True, "decoupled_proximal": True},
    "group lasso": {"group_l1": 0.3, "max_norm": 1.0},
    "sparse group lasso": {"l1": 0.2, "l2": 0.1, "proximal": True, "group_l1": 0.3, "amsgrad": True},
    "concave l1": {"l1": 0.5, "l2": 0.1, "concavity": 0.4, "max_norm": 1.0},
    "proximal concave l1": {"l1": 0.3, "l2": 0.5, "concavity": 0.3, "proximal": True},
    "concave sparse group lasso": {"l1": 0.3, "concavity": 0.5, "proximal": True, "group_l1": 0.2, "nonnegative": True},
    "decoupled concave l1": {"l1": 3.0, "concavity": 2.0, "proximal": True, "decoupled_proximal": True},
    "kept zeros": {"keep_zeros": True, "max_norm": 1.0},
    "kept zeros, elastic net": {"l1": 0.1, "l2": 0.2, "weight_decay": 0.1, "keep_zeros": True, "max_norm": 1.0},
    "nonnegative": {"nonnegative": True, "max_norm": 1.0},
    "nonnegative sparse group lasso": {"nonnegative": True, "l1": 0.2, "proximal": True, "group_l1": 0.3},
    "decoupled group lasso": {"group_l1": 3.0, "decoupled_proximal": True, "max_norm": 1.0},
    "everything": {
        "weight_decay": 0.05,
        "l1": 0.3,
        "l2": 0.3,
        "proximal": True,
        "max_norm": 1.0,
        "norm_type": 1.0,
        "decoupled_weight_decay": True,
        "amsgrad": True,
        "maximize": True,
        "keep_zeros": True,
        "nonnegative": True,
        "nonfinite": "error",
    },
}

_OF_SGD_ALONE = ("momentum", "dampening", "nesterov", "classical_momentum")
ADAM_DEFAULTS = {
    **{name: value for name, value in DEFAULTS.items() if name not in _OF_SGD_ALONE},
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "amsgrad": False,
    "decoupled_proximal": False,
}


def has_kernels(make) -> bool:
    """Whether the class is not the twin in torch operations."""
    return issubclass(make, Fused)


def is_adam(make) -> bool:
    """Adam or AdamW."""
    return issubclass(make, torch.optim.Adam)


def torch_twin(make):
    """torch's optimizer of the same rule."""
    return getattr(torch.optim, make.__name__)


def with_state(make) -> dict:
    """Options with which the optimizer keeps each of its slots: the most state that its rule can have."""
    return {"amsgrad": True} if is_adam(make) else {"momentum": 0.9}


def slots_of(make) -> tuple[str, ...]:
    """The names of those slots."""
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if is_adam(make) else ("momentum_buffer",)


def with_defaults(options: dict) -> dict:
    return {"lr": DEFAULTS["lr"], **options}


def make_params(sizes, dtype=torch.float32, generator=None) -> list[torch.nn.Parameter]:
    """Standard normal, some of them exactly zero and minus zero."""
    params = []
    for size in sizes:
        p = torch.randn(size, generator=generator, dtype=torch.float64)
        flat = p.view(-1)
        flat[5::11] = 0.0
        flat[7::13] = -0.0
        params.append(torch.nn.Parameter(p.to(dtype)))
    return params


def memory_orders(dims: int) -> list[tuple[int, ...]]:
    """Dimensions from the outermost in memory to the innermost: contiguous, transposed, channels last, a mixture."""
    orders = {tuple(range(dims)), tuple(reversed(range(dims)))}
    if dims >= 4:
        orders |= {(0, *range(2, dims), 1), (*range(1, dims, 2), *range(0, dims, 2))}
    return sorted(orders)


def laid_out(tensor, order) -> torch.Tensor:
    """A copy that lies in memory in this order of dimensions."""
    if tensor.dim() < 2:
        return tensor.clone()
    back = [order.index(d) for d in range(tensor.dim())]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def dims_of(tensor) -> range:
    """Every dimension, and every one again, counted from the back."""
    dims = max(tensor.dim(), 1)
    return range(-dims, dims)


def give_grads(params, generator=None) -> None:
    """Never zero: a kernel that forgets an element must show."""
    for p in params:
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = torch.where(g.abs() < 0.05, torch.full_like(g, 0.5), g).to(p.dtype)


def copy_params(params) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def share_grads(params, twins) -> None:
    """Gives each twin a copy of its gradient."""
    for p, q in zip(params, twins, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


def assert_params_equal(params, twins, atol=0.0) -> None:
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=atol, equal_nan=True)


def scale_slices(p, dim, factor_of) -> torch.Tensor:
    """Each slice of a float64 tensor along a dimension times the factor of its norm; without one, all of it."""
    if p.numel() == 0:
        return p.clone()
    whole = dim is None or p.dim() == 0
    rows = p.reshape(1, -1) if whole else p.movedim(dim, 0).reshape(p.shape[dim], -1)
    if rows.shape[0] <= rows.shape[1]:
        squares = [(row * row).sum().item() for row in rows]
    else:
        squares = sum(column * column for column in rows.unbind(1)).tolist()
    factors = torch.tensor([factor_of(math.sqrt(square)) for square in squares], dtype=torch.float64)
    if whole:
        return p * factors.item()
    return p * factors.reshape([-1 if d == dim % p.dim() else 1 for d in range(p.dim())])


def shrink_groups(p, threshold, dim) -> torch.Tensor:
    """The group lasso's proximal map, slice by slice."""
    return scale_slices(p, dim, lambda norm: 1 if threshold == 0 else 0 if norm <= threshold else 1 - threshold / norm)


def group_map(q, lengths, dim) -> torch.Tensor:
    """The same where each element has a threshold of its own: for each slice q the w that minimizes

    ``sum (w - q)^2 / (2*lengths) + ||w||``: ``w = q * r/(r + lengths)`` with ``r = ||w||``, found by bisection.
    """
    if q.numel() == 0:
        return q.clone()
    whole = dim is None or q.dim() == 0
    rows = (lambda x: x.reshape(1, -1)) if whole else (lambda x: x.movedim(dim, 0).reshape(x.shape[dim], -1))
    of_q, a = rows(q), rows(lengths.expand(q.shape))
    low, high = torch.zeros(len(of_q), 1, dtype=torch.float64), of_q.norm(dim=1, keepdim=True)
    for _ in range(60):
        middle = (low + high) / 2
        above = (of_q / (middle + a)).square().sum(1, keepdim=True) < 1  # of the solution
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    w = torch.where(high < 1e-14 * of_q.norm(dim=1, keepdim=True), 0 * of_q, of_q * (high / (high + a)))
    w = torch.where(a == 0, of_q, w)
    return w.reshape(q.shape) if whole else w.reshape(q.movedim(dim, 0).shape).movedim(0, dim)


class SgdMove:
    """What SGD makes of d, in float64: state is the momentum buffer, or nothing at a first gradient."""

    options, defaults = OPTIONS, DEFAULTS

    @staticmethod
    def gain(o):
        """u in the long run, for d = 1, by the formula of the buffer run until it rests."""
        b = u = 1.0
        for _ in range(2000):
            b = o["momentum"] * b + (1 - (0 if o["classical_momentum"] else o["dampening"]))
            u = 1 + o["momentum"] * b if o["nesterov"] else b
        return u if o["momentum"] else 1.0

    @staticmethod
    def move(d, state, o):
        if o["classical_momentum"]:
            d = o["lr"] * d
        u = d
        if o["momentum"] != 0:
            b = state.get("momentum_buffer")
            if b is None:
                b = d
            elif o["classical_momentum"]:
                b = o["momentum"] * b + d
            else:
                b = o["momentum"] * b + (1 - o["dampening"]) * d
            state = {"momentum_buffer": b}
            u = d + o["momentum"] * b if o["nesterov"] else b
        return (u if o["classical_momentum"] else o["lr"] * u), o["lr"], state

    @staticmethod
    def length(state, o, dtype=torch.float64):
        return o["lr"]


class AdamMove:
    """What Adam makes of d, in float64."""

    options, defaults = ADAM_OPTIONS, ADAM_DEFAULTS

    @staticmethod
    def gain(o):
        return 1.0

    @staticmethod
    def move(d, state, o):
        (beta1, beta2), zero = o["betas"], torch.zeros_like(d)
        t = float(state.get("step", 0)) + 1
        m = beta1 * state.get("exp_avg", zero) + (1 - beta1) * d
        v = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * d * d
        new = {"step": torch.tensor(t, dtype=torch.float64), "exp_avg": m, "exp_avg_sq": v}
        if o["amsgrad"]:
            v = new["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", zero), v)
        length = o["lr"] / (torch.sqrt(v / (1 - beta2**t)) + o["eps"])
        return length * m / (1 - beta1**t), AdamMove.length(new, o), new

    @staticmethod
    def length(state, o, dtype=torch.float64):
        """Of the step, with the second moment as it is stored."""
        if o["decoupled_proximal"]:
            return o["lr"]
        v = state["max_exp_avg_sq" if o["amsgrad"] else "exp_avg_sq"].to(dtype).double()
        return o["lr"] / (torch.sqrt(v / (1 - o["betas"][1] ** float(state["step"]))) + o["eps"])


def move_of(make_optimizer):
    """The witness of an optimizer's rule."""
    return AdamMove if is_adam(make_optimizer) else SgdMove


class Oracle:
    """The formula in float64 for one parameter group, as straight as it can be written.

    ``dtype`` is what parameters are rounded to before the group lasso looks at them.
    """

    def __init__(self, options: dict, dtype=torch.float64, rule=SgdMove):
        self.o = {**rule.defaults, **options}
        self.rule = rule
        self.dtype = dtype

    def times(self, name, x):
        """A strength times this; one that is off does not meet infinities."""
        return self.o[name] * x if self.o[name] != 0 else torch.zeros_like(x)

    def penalty_gradient(self, p):
        if self.o["concavity"] != 0:
            slope = (self.o["l1"] - self.o["concavity"] * p.abs()).clamp(min=0) * torch.sign(p)
        else:
            slope = self.times("l1", torch.sign(p))
        return slope + 2 * self.times("l2", p)

    def bent(self, size):
        """l1*|p|, or what the concavity makes of it."""
        l1, concavity = self.o["l1"], self.o["concavity"]
        if l1 == 0 or concavity == 0:
            return l1 * size
        return torch.where(size < l1 / concavity, l1 * size - concavity * size**2 / 2, l1**2 / concavity / 2)

    def step(self, params, grads, states):
        """New parameters and states from old ones (lists of float64; a state may be {}); also N and c."""
        o = self.o
        gs = [-g if o["maximize"] else g for g in grads]
        inside = o["penalty_in_clip"] and not o["proximal"]
        hs = [g + self.penalty_gradient(p) if inside else g for p, g in zip(params, gs, strict=True)]
        if o["keep_zeros"]:  # a mask of the gradient
            hs = [torch.where(p == 0, 0.0, h) for p, h in zip(params, hs, strict=True)]
        everything = torch.cat([h.reshape(-1) for h in hs]) if hs else torch.zeros(0, dtype=torch.float64)
        if o["norm_type"] == 1:
            norm = everything.abs().sum().item()
        elif o["norm_type"] == 2:
            norm = math.sqrt((everything * everything).sum().item())
        else:
            norm = everything.abs().max().item() if everything.numel() else 0.0
        c = 1.0 if o["max_norm"] is None else min(1.0, o["max_norm"] / (norm + 1e-6))
        new_params, new_states = [], []
        for p, h, state in zip(params, hs, states, strict=True):
            d = c * h
            if not o["penalty_in_clip"] and not o["proximal"]:
                d = d + self.penalty_gradient(p)
            if not o["decoupled_weight_decay"]:
                d = d + self.times("weight_decay", p)
            if o["proximal"] and o["l1"] != 0 and o["concavity"] != 0:
                # The gradient of the penalty without its convex part, which the map takes care of.
                d = d + self.penalty_gradient(p) - o["l1"] * torch.sign(p) - 2 * self.times("l2", p)
            zeros = p == 0
            move, length, state = self.rule.move(d, state, o)
            if o["decoupled_weight_decay"]:
                p = p * (1 - o["lr"] * o["weight_decay"])
            p = p - move
            if o["proximal"] or o["group_l1"] != 0:
                length = self.rule.gain(o) * length
            if o["proximal"]:
                shrunk = torch.maximum(p.abs() - length * o["l1"], torch.zeros_like(p))
                p = torch.sign(p) * shrunk / (1 + 2 * length * o["l2"])
            if o["nonnegative"] and o["lr"] != 0:
                p = torch.where(p < 0, 0.0, p)
            if o["keep_zeros"]:  # and one of the parameter
                p = torch.where(zeros, 0.0, p)
            if o["group_l1"] != 0:
                length = self.rule.gain(o) * self.rule.length(state, o, self.dtype)
                if o["proximal"]:
                    length = length / (1 + 2 * length * o["l2"])
                p = p.to(self.dtype).double()
                if isinstance(length, torch.Tensor):
                    p = group_map(p, length * o["group_l1"], o["group_dim"])
                else:
                    p = shrink_groups(p, length * o["group_l1"], o["group_dim"])
            new_params.append(p)
            new_states.append(state)
        return new_params, new_states, norm, c


def witness_of(optimizer) -> Oracle:
    """The oracle with the options of an optimizer's first group."""
    options = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    return Oracle(options, rule=move_of(type(optimizer)))


def in_double(entry: dict) -> dict:
    """The state of a parameter as the oracle reads it."""
    return {name: x.detach().double().clone() for name, x in entry.items() if x is not None}


def check_against_oracle(make_optimizer, params, options, steps=3, witness=None):
    """Step by step: each step is compared with the oracle started from the very tensors it started from.

    ``witness`` is that of the rule, where ``make_optimizer`` is no class of torch's.

    So nothing accumulates, and the tolerance is that of one step: a handful of roundings of the type of arithmetic
    (float32 for half types) on terms no larger than `scale`, and one rounding to the type of storage.
    """
    optimizer = make_optimizer(params, **with_defaults(options))
    dtype = params[0].dtype
    oracle = Oracle(with_defaults(options), dtype, witness or move_of(make_optimizer))
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    storage = torch.finfo(dtype).eps / 2
    for step in range(steps):
        give_grads(params)
        if step == 1:
            params[-1].grad = None  # passed by, and it keeps its state
        live = [p for p in params if p.grad is not None]
        old = [p.detach().double().clone() for p in live]
        grads = [p.grad.double().clone() for p in live]
        states = [in_double(optimizer.state.get(p, {})) for p in live]
        raw_grads = [p.grad.clone() for p in live]
        optimizer.step()
        want, want_states, norm, c = oracle.step(old, grads, states)
        # Where d is about 0 what rounding makes of it decides about Adam's move, which has a size all the same.
        rounded = [4 * arithmetic * (4 + g.abs()) if oracle.rule is AdamMove else 0 * g for g in grads]
        up, down = (
            oracle.step(old, [g + sign * x for g, x in zip(grads, rounded, strict=True)], states)[0] for sign in (1, -1)
        )
        for i, p in enumerate(live):
            assert torch.equal(p.grad, raw_grads[i]), "the gradient was written"
            pairs = [("param", p.detach(), want[i])]
            assert optimizer.state.get(p, {}).keys() == want_states[i].keys()
            if "step" in want_states[i]:
                assert optimizer.state[p]["step"] == want_states[i].pop("step")
            pairs += [(name, optimizer.state[p][name], slot) for name, slot in want_states[i].items()]
            scale = 4 + old[i].abs().max().item() + grads[i].abs().max().item() if p.numel() else 1
            for name, got, expected in pairs:
                assert got.dtype == dtype and got.shape == expected.shape
                bound = 16 * arithmetic * scale + (storage if storage > arithmetic else 0) * expected.abs()
                # Half the spacing of subnormals, below which a relative bound means nothing.
                bound = bound + torch.finfo(dtype).smallest_normal * storage
                if name == "param":
                    bound = bound + (up[i] - down[i]).abs()
                if name == "param" and storage > arithmetic:
                    # What the group lasso shrinks was rounded to storage before, where the oracle may have come down on
                    # the other side of a tie: an element of this size.
                    of_tie = old[i].abs() + oracle.o["lr"] * (4 + grads[i].abs()) + expected.abs()
                    bound = bound + (2 * storage if oracle.o["group_l1"] else 0) * of_tie
                wrong = (got.double() - expected).abs() > bound
                assert not wrong.any(), (
                    f"step {step}, tensor {i} of {p.numel()} elements, {name}: {int(wrong.sum())} elements are off, "
                    f"first at {wrong.nonzero()[0].tolist()}: {got[wrong][0]} instead of {expected[wrong][0]}"
                )
        if optimizer.stats is None:
            continue
        got_norm = optimizer.stats.grad_norm.item()
        if options.get("max_norm") is None and options.get("nonfinite", "propagate") == "propagate":
            assert math.isnan(got_norm)
        else:
            assert math.isclose(got_norm, norm, rel_tol=1e-5, abs_tol=1e-12)
        assert math.isclose(optimizer.stats.clip_coef.item(), c, rel_tol=1e-5, abs_tol=1e-12)
        penalties = sum(oracle.bent(p.abs()).sum().item() + options.get("l2", 0) * p.square().sum().item() for p in old)
        assert math.isclose(optimizer.stats.penalty.item(), penalties, rel_tol=1e-5, abs_tol=1e-12)
        numel = sum(p.numel() for p in live)
        zeros = sum(int((p == 0).sum()) for p in live)
        assert optimizer.stats.zero_fraction.item() == (zeros / numel if numel else 0)
    return optimizer
