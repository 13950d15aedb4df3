"""The optimizers with all their options, registered in the terms in which torch tests its own optimizers."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import warnings
from collections.abc import Callable, Iterator

import bad_options
import pytest
import torch
from step_cases import DEVICE, OTHER_EXTENSION

import regfused
from regfused import reference

pytest.importorskip("expecttest", reason="torch's test code imports it")


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Puts back what torch's test code changes in the whole process when it is imported."""
    environment = dict(os.environ)
    # How to start a failed test in torch's own repository.
    os.environ["PYTORCH_PRINT_REPRO_ON_FAILURE"] = "0"
    flag = "__allow_nonbracketed_mutation_flag"
    assignable = getattr(torch.backends, flag)
    try:
        from hypothesis import settings
    except ImportError:
        settings = None
    profile = settings.get_current_profile_name() if settings else ""
    try:
        with warnings.catch_warnings():
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        setattr(torch.backends, flag, assignable)
        if settings:
            settings.load_profile(profile)


with _contained():
    from torch.testing._internal.common_device_type import instantiate_device_type_tests
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInfo,
        OptimizerInput,
        optim_db,
        optims,
    )
    from torch.testing._internal.common_utils import TestCase  # noqa: F401

# Who does the step: the kernels where they can, torch's operations twice, the kernels or nobody.
IMPLEMENTATIONS = ({}, {"fused": False}, {"foreach": True}, {"fused": True})

FLAGS = ("fused", "foreach", "differentiable")

# What torch's optimizers have no words for.
SGD_INPUTS = {
    "l1": {"l1": 0.1},
    "l2": {"l2": 0.1},
    "elastic net with momentum": {"momentum": 0.9, "l1": 0.05, "l2": 0.05},
    "proximal l1": {"momentum": 0.9, "l1": 0.2, "proximal": True},
    "clip": {"momentum": 0.9, "max_norm": 1.0},
    "clip, norm 1": {"max_norm": 2.0, "norm_type": 1, "l2": 0.05},
    "clip, norm inf": {"momentum": 0.9, "max_norm": 0.5, "norm_type": math.inf},
    "penalty outside of the clip": {"momentum": 0.9, "l1": 0.05, "l2": 0.02, "max_norm": 1.0, "penalty_in_clip": False},
    "group lasso": {"momentum": 0.9, "group_l1": 0.5},
    "group lasso, last dimension": {"group_l1": 0.5, "group_dim": -1, "l1": 0.1, "proximal": True},
    "decoupled weight decay": {"momentum": 0.9, "weight_decay": 0.3, "decoupled_weight_decay": True},
    "classical momentum": {"momentum": 0.9, "classical_momentum": True, "weight_decay": 0.1},
    "concave l1": {"l1": 0.2, "concavity": 0.1, "proximal": True},
    "keep zeros": {"momentum": 0.9, "keep_zeros": True, "max_norm": 1.0},
    "nonnegative": {"momentum": 0.9, "nonnegative": True},
    "nonfinite skip": {"momentum": 0.9, "dampening": 0.3, "nonfinite": "skip"},
    "maximize, l1": {"l1": 0.05, "maximize": True},
}


def _errors(*tables: list[tuple[dict[str, object], str]]) -> list[tuple[dict[str, object], type[Exception], str]]:
    values = [(options, ValueError, message) for table in tables for options, message in table]
    return [
        *values,
        ({"group_l1": 0.1, "group_dim": 2}, ValueError, r"group_dim must be in \[-1, 0\] for parameter 0"),
        ({"fused": True, "foreach": True}, RuntimeError, "`fused` and `foreach` cannot be `True` together"),
        ({"fused": True, "differentiable": True}, RuntimeError, "`fused` does not support `differentiable`"),
    ]


SGD_ERRORS = _errors(bad_options.OPTIONS, bad_options.OPTIONS_OF_SGD, bad_options.NEW_OF_SGD)
ADAM_ERRORS = _errors(bad_options.OPTIONS, bad_options.OPTIONS_OF_ADAM, bad_options.NEW_OF_ADAM)

ADAM_INPUTS = {
    "l1": {"l1": 0.1},
    "l2": {"l2": 0.1},
    "elastic net": {"l1": 0.05, "l2": 0.05},
    "proximal elastic net, decoupled": {"l1": 0.2, "l2": 0.1, "proximal": True, "decoupled_proximal": True},
    "clip": {"max_norm": 1.0},
    "clip, norm 1": {"max_norm": 2.0, "norm_type": 1, "l2": 0.05},
    "clip, norm inf": {"amsgrad": True, "max_norm": 0.5, "norm_type": math.inf},
    "penalty outside of the clip": {"l1": 0.05, "l2": 0.02, "max_norm": 1.0, "penalty_in_clip": False},
    "group lasso": {"group_l1": 0.5, "decoupled_proximal": True},
    "group lasso, last dimension": {
        "group_l1": 0.5,
        "group_dim": -1,
        "l1": 0.1,
        "proximal": True,
        "decoupled_proximal": True,
    },
    "concave l1": {"l1": 0.2, "concavity": 0.1, "proximal": True, "decoupled_proximal": True},
    "keep zeros": {"keep_zeros": True, "max_norm": 1.0},
    "nonnegative": {"nonnegative": True},
    "nonfinite skip": {"betas": (0.5, 0.9), "nonfinite": "skip"},
    "maximize, l1": {"l1": 0.05, "maximize": True},
    "eps": {"eps": 0.1},
}


class Contract(OptimizerInfo):
    """An optimizer, the one of torch whose contract it keeps, and its twin in torch operations."""

    def __init__(
        self,
        optim_cls: type[torch.optim.Optimizer],
        *,
        theirs: type[torch.optim.Optimizer],
        twin: type[torch.optim.Optimizer],
        own_inputs: dict[str, dict],
        own_errors: list[tuple[dict, type[Exception], str]],
    ):
        entry = next(info for info in optim_db if info.optim_cls is theirs)
        self.theirs, self.twin = theirs, twin
        self.torchs_inputs = entry.optim_inputs_func
        self.own_inputs = own_inputs

        def inputs(device, dtype=None):
            own = [OptimizerInput(None, copy.deepcopy(kwargs), desc) for desc, kwargs in own_inputs.items()]
            return [*entry.optim_inputs_func(device, dtype), *own]

        def error_inputs(device, dtype):
            # torch makes them for the CPU alone, for they are about Python.
            cases = entry.optim_error_inputs_func("cpu", dtype)
            for kwargs, error, message in own_errors:
                case = OptimizerInput(None, dict(kwargs), str(kwargs))
                cases.append(ErrorOptimizerInput(case, error_type=error, error_regex=message))
            return [*cases, *_step_errors(dtype, own_errors is SGD_ERRORS)]

        super().__init__(
            optim_cls,
            optim_inputs_func=inputs,
            optim_error_inputs_func=error_inputs,
            scheduler_inputs=entry.scheduler_inputs,
            supported_impls=entry.supported_impls,
            not_og_supported_flags=entry.not_og_supported_flags,
            supports_sparse=entry.supports_sparse,
            metadata_for_sparse=entry.metadata_for_sparse,
            supports_complex=entry.supports_complex,
            supports_fused_on=entry.supports_fused_on,
        )

    @property
    def name(self) -> str:
        return f"twin_{self.optim_cls.__name__}" if self.optim_cls is self.twin else self.optim_cls.__name__

    @property
    def counts_steps(self) -> bool:
        return self.optim_cls._rule.counts_steps

    def takes_tensor_lr(self, kwargs: dict) -> bool:
        """torch's Adam refuses one together with foreach=True."""
        return not (self.counts_steps and kwargs.get("foreach"))

    @property
    def has_kernels(self) -> bool:
        return self.optim_cls is not self.twin

    def is_torchs(self, kwargs: dict) -> bool:
        """Whether torch's own optimizer takes these options."""
        own = set().union(*self.own_inputs.values())
        return not own & (set(kwargs) - set(self.theirs([torch.nn.Parameter(torch.ones(1))]).defaults))

    def exact(self, params, kwargs: dict) -> torch.optim.Optimizer:
        """The oracle: torch's for-loop where torch has the options, the twin elsewhere; both want float64 tensors."""
        options = {k: v for k, v in copy.deepcopy(kwargs).items() if k not in FLAGS}
        if self.is_torchs(options):
            return self.theirs(params, foreach=False, **options)
        return self.twin(params, fused=False, **options)


def _step_errors(dtype, is_sgd) -> list[ErrorOptimizerInput]:
    """A gradient that no step can take: parameters come with it."""
    momentum = {"momentum": 0.9} if is_sgd else {}

    def with_grad(grad):
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        param.grad = grad.to(dtype)
        return [param]

    sparse = torch.tensor([0.0, 1.0, 2.0]).to_sparse()
    cases = [
        ({"nonfinite": "error", **momentum}, torch.tensor([1.0, math.inf, 2.0]), "demands a finite gradient norm"),
        *(
            (
                {**option, **momentum},
                sparse,
                "demand" if is_sgd else "Adam does not support sparse gradients|fused=True demand",
            )
            for option in ({"l1": 0.1}, {"max_norm": 1.0}, {"weight_decay": 0.1})
        ),
    ]
    return [
        ErrorOptimizerInput(
            OptimizerInput(with_grad(grad), kwargs, str(kwargs)),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex=message,
        )
        for kwargs, grad, message in cases
    ]


def _sgd(optim_cls):
    return Contract(
        optim_cls,
        theirs=torch.optim.SGD,
        twin=reference.SGD,
        own_inputs=SGD_INPUTS,
        own_errors=SGD_ERRORS,
    )


def _adam(optim_cls, theirs, twin):
    inputs = ADAM_INPUTS
    if theirs is torch.optim.Adam:
        inputs = {**inputs, "decoupled weight decay": {"weight_decay": 0.3, "decoupled_weight_decay": True}}
    return Contract(optim_cls, theirs=theirs, twin=twin, own_inputs=inputs, own_errors=ADAM_ERRORS)


OPTIMIZERS = [
    _sgd(regfused.SGD),
    _sgd(reference.SGD),
    _adam(regfused.Adam, torch.optim.Adam, reference.Adam),
    _adam(reference.Adam, torch.optim.Adam, reference.Adam),
    _adam(regfused.AdamW, torch.optim.AdamW, reference.AdamW),
]


def each_optimizer(test: Callable, dtypes: tuple[torch.dtype, ...] = ()) -> Callable:
    """Makes ``test(self, info)`` one of torch's generic tests, for each of `OPTIMIZERS`, with ``dtype`` if asked."""

    def generic(self, device, dtype, optim_info):
        test(self, optim_info, **({"dtype": dtype} if dtypes else {}))

    generic.__name__ = test.__name__
    return optims(OPTIMIZERS, dtypes=dtypes or (torch.float32,))(generic)


def _implementations(info: Contract, dtype: torch.dtype = torch.float32) -> tuple[dict, ...]:
    """All of them in the two types that differ most. The twin has two; another compiled part has the kernels."""
    if OTHER_EXTENSION or dtype not in (torch.float32, torch.bfloat16):
        return IMPLEMENTATIONS[:1]
    return IMPLEMENTATIONS if info.has_kernels else IMPLEMENTATIONS[1:3]


def each_case(*implementations: dict, dtypes: tuple[torch.dtype, ...] = ()) -> Callable:
    """The same for ``test(self, info, kwargs)``, called with each set of options, by each implementation."""

    def decorate(test):
        def all_cases(self, info, **dtype):
            wrong = {}
            for case in info.optim_inputs_func(DEVICE):
                for flags in implementations or _implementations(info, **dtype):
                    torch.manual_seed(0)
                    try:
                        test(self, info, {**copy.deepcopy(case.kwargs), **flags}, **dtype)
                    except (Exception, pytest.fail.Exception) as error:
                        wrong[f"{case.desc} {flags}"] = error
            if wrong:
                lines = [f"{label}: {str(error).partition(chr(10))[0]}" for label, error in wrong.items()]
                raise AssertionError("\n".join(["cases that fail:", *lines])) from next(iter(wrong.values()))

        all_cases.__name__ = test.__name__
        return each_optimizer(all_cases, dtypes)

    return decorate


@contextlib.contextmanager
def labelled(label: str) -> Iterator[None]:
    """Says which of several cases in a test has failed."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"case that fails: {label}") from error


def assert_same(got, want) -> None:
    """The same containers, keys in the same order, the same types, tensors of the same bits."""
    assert type(got) is type(want), f"{type(got)} instead of {type(want)}"
    if isinstance(got, torch.Tensor):
        assert (got.dtype, got.device, got.shape, got.stride()) == (want.dtype, want.device, want.shape, want.stride())
        assert torch.equal(got, want)
    elif isinstance(got, dict):
        assert list(got) == list(want), f"{list(got)} instead of {list(want)}"
        assert_same(list(got.values()), list(want.values()))
    elif isinstance(got, list | tuple):
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert_same(g, w)
    else:
        assert got == want, f"{got!r} instead of {want!r}"


def instantiate(test_class, scope: dict) -> None:
    """For the device of this run alone: a second one is a second run."""
    instantiate_device_type_tests(test_class, scope, only_for=(DEVICE,))
