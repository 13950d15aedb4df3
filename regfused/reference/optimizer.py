"""What all regularized optimizers have in common, in torch operations: options, state, checkpoints, stats, the step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from regfused import checkpoint, options, step_count
from regfused.norm_group import check_flat, has_flat, norm_group_of
from regfused.reference.rule import Rule
from regfused.reference.step import Entry, Update, clip_coefficient, collect, needs_norm, norm, update_in_turn
from regfused.stats import LastStep, Stats
from regfused.tracing import value_is_known, values_are_known
from regfused.verdict import Verdict


class Regularized(torch.optim.Optimizer):
    """An optimizer's rule with penalties, clipping and proximal maps around it. To be mixed in before torch's class."""

    #: What the class does of its own.
    _rule: ClassVar[Rule]

    def _construct(self, params: ParamsT, defaults: dict[str, Any], norm_group: Any) -> None:
        """Not torch's constructor of the class: its defaults would lack ours."""
        options.check_construction(type(self).__name__, defaults, self._rule)
        self._norm_group = norm_group_of(type(self).__name__, norm_group, defaults)
        self._last = LastStep()
        torch.optim.Optimizer.__init__(self, params, defaults)

    # --- Configuration and state ------------------------------------------------------------------

    @property
    def norm_group(self) -> Any:
        """The process group that was given, True for the default one, or None."""
        return None if self._norm_group is None else self._norm_group.given

    # An attribute to type checkers, as in torch's classes.
    if TYPE_CHECKING:
        _step_supports_amp_scaling: bool
    else:

        @property
        def _step_supports_amp_scaling(self) -> bool:
            """torch.amp.GradScaler asks: with ``fused=True`` the step itself unscales, and skips on overflow."""
            return bool(self.defaults["fused"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        operation = f"{type(self).__name__}.add_param_group"
        if isinstance(param_group, dict) and "params" in param_group:
            params = param_group["params"]
            if not isinstance(params, Tensor | set):
                param_group["params"] = params = list(params)
            complete = {**self.defaults, **param_group}
            options.check_construction(operation, complete, self._rule)
            options.check_groups(operation, [*self.param_groups, complete], self._rule)
            options.check_params(operation, [params] if isinstance(params, Tensor) else params)
            options.warn_of_misspelt(operation, param_group, self._rule)
            check_flat(operation, [complete], self._norm_group)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch's of the same name.

        Options that it does not have keep the values that they have here. State is copied: an optimizer
        shares it neither with the dictionary nor with another optimizer that loads it.

        A flat checkpoint of torch's class (``torch.distributed.checkpoint.state_dict`` with
        ``options=StateDictOptions(flatten_optimizer_state_dict=True)``) is taken apart by torch, which asks it for
        every option here. Put those that it lacks into it first::

            saved = {**get_optimizer_state_dict(model, optimizer, options=options), **saved}
            set_optimizer_state_dict(model, optimizer, saved, options=options)

        Args:
            state_dict: as ``state_dict()`` returns it.

        Raises:
            ValueError: for what does not fit, with the place, the demand and the value. Nothing has changed then.
        """
        checkpoint.check_outline(f"{type(self).__name__}.load_state_dict", state_dict)
        # The last hook sees what all others made of the dictionary.
        handle = self.register_load_state_dict_pre_hook(_fitting)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_last": self._last.frozen(), "_norm_group": self._norm_group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also the last step of ``load_state_dict``: what is missing keeps the values it had; what is wrong raises."""
        operation = f"{type(self).__name__}.load_state_dict"
        defaults = state.get("defaults", self.__dict__.get("defaults", {}))
        before = self.__dict__.get("param_groups", [])
        groups = state["param_groups"]
        for g, group in enumerate(groups):
            known = before[g] if len(before) == len(groups) else defaults
            for name in options.names_of(self._rule):
                if name in known:
                    group.setdefault(name, known[name])
        options.check_groups(operation, groups, self._rule)
        options.check_state(operation, groups, state["state"], self._rule, wait=True)
        torch.optim.Optimizer.__setstate__(self, state)
        self.__dict__.setdefault("_last", LastStep())
        self.__dict__.setdefault("_norm_group", None)

    @property
    def stats(self) -> Stats:
        """Numbers of the last step as 0-dim tensors, collected by the step itself; see `regfused.stats.Stats`.

        ``optimizer.stats.as_floats()`` has them for a logger.
        """
        # Plain attributes: on an object that is put around an optimizer, and has its class, they lead to it.
        options.list_params(self.param_groups)
        return self._last.stats(self.param_groups)

    # --- The step ---------------------------------------------------------------------------------

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of ``step``, which runs the hooks; and where any of it raises, nothing is left behind.

        ``torch.amp.GradScaler`` takes ``grad_scale`` and ``found_inf`` back only after a step that returned, and would
        multiply the next scale by the one that it finds. An interrupt that comes while torch switches autograd off or
        on would leave it so.
        """
        with_hooks = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(with_hooks)
        def step(self: Regularized, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return with_hooks(self, *args, **kwargs)
            with_grad = torch.is_grad_enabled()
            try:
                return with_hooks(self, *args, **kwargs)
            except BaseException:
                torch.set_grad_enabled(with_grad)
                self.__dict__.pop("grad_scale", None)
                self.__dict__.pop("found_inf", None)
                raise

        return step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one step; see the class for the formula.

        It happens whole or not at all: after an error, or an interrupt, parameters and state are those of before (or,
        where an interrupt came after the last write, those of after). Not promised of tensor subclasses, of several
        sparse gradients in pure PyTorch, and with ``differentiable=True``.

        Args:
            closure: reevaluates the model and returns the loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling() and not self.state and self._only_makes_state():
            self._make_state()
        else:
            self._step()
        return loss

    def _only_makes_state(self) -> bool:
        """Whether somebody steps to have a state, as torch.distributed.checkpoint does before it saves or loads one.

        That is a first step with learning rates of zero and gradients of zero. It would not change a parameter, but
        leave penalties in the slots, and be counted.
        """
        for group in self.param_groups:
            lr = group["lr"]
            # The value of a tensor on a device would have to be waited for.
            if isinstance(lr, Tensor) and (lr.device.type != "cpu" or lr.numel() != 1 or not value_is_known(lr)):
                return False
            if options.value_of(lr) != 0:
                return False
        options.list_params(self.param_groups)
        grads = [param.grad for group in self.param_groups for param in group["params"] if param.grad is not None]
        dense = (grad for grad in grads if grad.layout == torch.strided and not grad.is_nested)
        return values_are_known(grads) and len(grads) == sum(1 for grad in dense if not grad.any())

    @torch.no_grad()
    def _make_state(self) -> None:
        operation = f"{type(self).__name__}.step"
        options.check_groups(operation, self.param_groups, self._rule)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                made: dict[str, Any] = {}
                if self._rule.counts_steps:
                    made["step"] = step_count.as_tensor(0.0, param, group)
                for name in self._rule.slots_of(options.as_it_counts(group, self._rule)):
                    made[name] = torch.zeros_like(param, requires_grad=False)
                if made:
                    self.state[param] = made

    @torch.compiler.disable
    def _step(self) -> None:
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            self._step_in_torch()

    def _step_in_torch(self) -> None:
        operation = f"{type(self).__name__}.step"
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        options.list_params(self.param_groups)
        known = values_are_known(param for group in self.param_groups for param in group["params"])
        overflows = found_inf is not None and known and float(found_inf) != 0
        if overflows and self._norm_group is None:
            self._last.skipped += 1
            return

        def measured() -> tuple[list[Entry], Tensor | None]:
            options.check_groups(operation, self.param_groups, self._rule)
            if has_flat(self.param_groups):
                check_flat(operation, self.param_groups, self._norm_group)
            options.check_state(operation, self.param_groups, self.state, self._rule)
            scale = grad_scale
            if scale is not None:
                scale = float(scale) if known else scale.to(torch.float64)
            params = (
                (g, i, group, param)
                for g, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
            )
            entries = collect(params, scale, operation, self.state, self._rule)
            first = self.param_groups[0]
            return entries, norm(entries, float(first["norm_type"])) if needs_norm(first) else None

        first = self.param_groups[0]
        if self._norm_group is not None and (needs_norm(first) or found_inf is not None):
            entries, grad_norm, overflows = self._measured_by_all(measured, overflows, known)
            if overflows:
                self._last.skipped += 1
                return
        else:
            entries, grad_norm = measured()
        clip_coef = None if grad_norm is None else clip_coefficient(first["max_norm"], grad_norm)
        if known:
            # The one place where the host waits for a device, and only under these policies.
            if grad_norm is not None and first["nonfinite"] != "propagate" and not math.isfinite(grad_norm.item()):
                if first["nonfinite"] == "error":
                    raise RuntimeError(_nonfinite(operation, grad_norm.item()))
                self._last.skip(grad_norm)
                return
            update = Update(entries, self.state, self._rule, clip_coef)
            record = replace(update.record, grad_norm=None if grad_norm is None else grad_norm.detach())
            update.commit()
            self._last.by_reference(record)
        else:
            self._step_unseen(operation, entries, grad_norm, clip_coef, found_inf)

    def _measured_by_all(
        self, measured: Callable[[], tuple[list[Entry], Tensor | None]], overflows: bool, known: bool
    ) -> tuple[list[Entry], Tensor | None, bool]:
        """Entries, the norm over the processes of `norm_group`, and whether the step of one of them overflows."""
        assert self._norm_group is not None
        if not known:
            raise RuntimeError(
                f"{type(self).__name__}.step: norm_group demands gradients whose values are known, but a tracer is on"
            )
        norm_type = float(self.param_groups[0]["norm_type"])
        entries: list[Entry] = []
        has_norm = False

        def measure() -> Verdict:
            nonlocal entries, has_norm
            entries, grad_norm = measured()
            has_norm = grad_norm is not None
            return Verdict.of(0.0 if grad_norm is None else grad_norm.item(), norm_type, overflows=overflows)

        verdict = self._norm_group.judge(measure, norm_type)
        grad_norm = torch.tensor(verdict.norm(norm_type), dtype=torch.float64) if has_norm else None
        return entries, grad_norm, verdict.overflows

    def _step_unseen(
        self,
        operation: str,
        entries: list[Entry],
        grad_norm: Tensor | None,
        clip_coef: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """The end of a step whose values nobody can look at: what depends on one is an operation, for tracers to see.

        A step that does not happen leaves zeros as state where it is the first one.
        """
        overflows = None if found_inf is None else found_inf.reshape(()) != 0
        happens = None if overflows is None else ~overflows
        policy = self.param_groups[0]["nonfinite"]
        if grad_norm is not None and policy != "propagate":
            finite = grad_norm.isfinite()
            if policy == "skip":
                happens = finite if happens is None else finite & happens
                clip_coef = torch.where(finite, 1.0 if clip_coef is None else clip_coef, 0.0)
            else:
                torch._assert_async(finite if overflows is None else finite | overflows, _nonfinite(operation, "not"))
        record = update_in_turn(entries, self.state, self._rule, clip_coef, happens)
        self._last.by_reference(replace(record, grad_norm=grad_norm))
        if happens is not None:
            self._last.skipped = self._last.skipped + (~happens).to(torch.float64)


def _nonfinite(operation: str, norm: float | str) -> str:
    return f"{operation}: nonfinite='error' demands a finite gradient norm, but it is {norm}"


def _fitting(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A hook of ``load_state_dict``."""
    options.list_params(optimizer.param_groups)
    operation = f"{type(optimizer).__name__}.load_state_dict"
    return checkpoint.fitting(operation, optimizer.param_groups, state_dict, optimizer._rule)
