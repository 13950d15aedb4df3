"""What all fused optimizers have in common: which steps the kernels take, and which the reference."""

from __future__ import annotations

import math
from typing import Any

import torch

from regfused import extension, options, step_in_graph
from regfused.norm_group import check_flat, has_flat
from regfused.reference.optimizer import Regularized
from regfused.reference.rule import Rule
from regfused.reference.step import Update, collect, norm
from regfused.sharded_step import ShardedStep
from regfused.shards import is_dtensor
from regfused.tracing import value_is_known, values_are_known


class Fused(Regularized):
    """A step by the kernels where they can take it. To be mixed in before the optimizer of `regfused.reference`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["fused"]:
            problem = _why_not_fused(group["params"])
            if problem:
                self.param_groups.pop()
                raise RuntimeError(f"{type(self).__name__}: fused=True demands {problem}")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_sharded", None)  # which holds the state that was there

    def _step(self) -> None:
        if torch.compiler.is_compiling():
            return self._step_while_compiling()
        # What kernels write, no mode, tracer or transform sees.
        if extension.C is None or extension.C.is_watched():
            return super()._step()
        plan = self.__dict__.get("_plan")
        if plan is None:
            options.list_params(self.param_groups)
            self._has_flat = has_flat(self.param_groups)
            if any(is_dtensor(param) for group in self.param_groups for param in group["params"]):
                self._sharded = self._new_sharded()
            plan = self._plan = self._last.counting = _new_plan(type(self).__name__, self._rule)
        if self._has_flat:
            check_flat(f"{type(self).__name__}.step", self.param_groups, self._norm_group)
        grad_scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        sharded, norm_group = self.__dict__.get("_sharded"), self._norm_group
        if norm_group is not None:
            if sharded is None:
                sharded = self._sharded = self._new_sharded()
            if not sharded.step(self.param_groups, self.state, self._last, grad_scale, found_inf):
                super()._step()
            return
        scaled = grad_scale is not None or found_inf is not None
        if sharded is not None and not scaled and sharded.step(self.param_groups, self.state, self._last, None, None):
            return
        if plan.step(self.param_groups, self.state, grad_scale, found_inf):
            last = self._last
            if last.kernels is not plan or last.record is not None:
                last.by_kernels(plan, plan.outcome)
        else:
            try:
                if sharded is None and any(is_dtensor(param) for _, _, param in plan.leftover):
                    plan.release()
                    self._sharded = self._new_sharded()
                    return self._step()
                if not plan.tensors or not values_are_known(param for _, _, param in plan.leftover):
                    return super()._step()
                self._step_with_leftovers(plan, None if grad_scale is None else float(grad_scale))
            finally:
                plan.release()

    def _step_while_compiling(self) -> None:
        """The plan, as in eager mode, behind a break of the graph; where there must be none, one operator."""
        if not step_in_graph.is_demanded():
            return _step_outside_of_the_graph(self)
        problem = step_in_graph.why_not(self.param_groups, self.state, self._rule)
        if self._norm_group is not None:
            problem = "norm_group takes part in it"
        if "grad_scale" in self.__dict__ or "found_inf" in self.__dict__:
            problem = "torch.amp.GradScaler takes part in it"
        if problem:
            raise RuntimeError(
                f"{type(self).__name__}.step: torch.compile cannot have this step in one graph: {problem}"
            )
        step_in_graph.step(self.param_groups, self.state, self._rule, self._last)

    def _new_sharded(self) -> ShardedStep:
        name, rule = type(self).__name__, self._rule
        return ShardedStep(lambda: _new_plan(name, rule), rule, f"{name}.step", self._norm_group)

    def _step_with_leftovers(self, plan: Any, grad_scale: float | None) -> None:
        """The rest of a step in which some tensors are not for the kernels: one norm over both, one coefficient."""
        norm_type = float(self.param_groups[0]["norm_type"])
        operation = f"{type(self).__name__}.step"
        options.check_state(operation, self.param_groups, self.state, self._rule)
        with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
            params = [(g, i, self.param_groups[g], param) for g, i, param in plan.leftover]
            entries = collect(params, grad_scale, operation, self.state, self._rule)
            grad_norm = math.nan
            if plan.needs_norm:
                grad_norm = float(norm(entries, norm_type, [plan.norm()] if plan.tensors else []))
            if not plan.judge(grad_norm):
                self._last.by_kernels(plan, plan.outcome)
                return
            update = Update(entries, self.state, self._rule, plan.clip_coef)
            update.record.judged = False
            update.commit(plan.update)
            self._last.by_kernels(plan, plan.outcome, update.record)


def _new_plan(name: str, rule: Rule) -> Any:
    def check(param_groups: list[dict[str, Any]], state: dict[Any, Any]) -> None:
        """Called by the plan when something is odd, to say what."""
        options.check_groups(f"{name}.step", param_groups, rule)
        options.check_state(f"{name}.step", param_groups, state, rule)

    assert extension.C is not None
    return extension.C.StepPlan(rule.name, name, check)


@torch.compiler.disable
def _step_outside_of_the_graph(optimizer: Fused) -> None:
    optimizer._step()


def _why_not_fused(params: list[torch.Tensor]) -> str:
    if extension.C is None:
        return f"the compiled part of regfused, but {extension.why_missing}"
    for i, param in enumerate(params):
        if not value_is_known(param):
            continue  # it may get memory, and a device, before the first step
        if not extension.kernels_take(param) or not options.is_plain(param):
            plain = "" if options.is_plain_class(type(param)) else f" of class {type(param).__name__}"
            return (
                "dense float32, float64, bfloat16 or float16 parameters on "
                f"{' or '.join(extension.DEVICES)}, but parameter "
                f"{i} of the group is {param.layout}, {param.dtype}, on {param.device}{plain} "
                "(`fused=True` requires all the params to be floating point Tensors of supported devices)"
            )
    return ""
