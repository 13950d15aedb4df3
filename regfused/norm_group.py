"""One norm over the optimizers of several processes, each of which has other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from regfused import options
from regfused.verdict import Verdict, another_failed


class NormGroup:
    """A group of processes whose optimizers have one norm: each element of the model is in one process of it.

    Args:
        operation: for messages.
        group: a process group of ``torch.distributed``, or True for the default one.

    Raises:
        ValueError: for something else, and for a group that this process is not in.
        RuntimeError: where ``torch.distributed`` has not been initialized.
    """

    def __init__(self, operation: str, group: Any) -> None:
        self._operation = operation
        self.given = group
        self._check()

    def _check(self) -> None:
        given, operation = self.given, self._operation
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            raise RuntimeError(
                f"{operation}: norm_group demands that torch.distributed.init_process_group was called, but it was not"
            )
        if given is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(f"{operation}: norm_group must hold this process, but it is a group of others")
        if given is not True and not isinstance(given, torch.distributed.ProcessGroup):
            raise ValueError(
                f"{operation}: norm_group must be a process group, True for the default one, or None, "
                f"but got {given!r} ({type(given).__name__})"
            )
        if torch.distributed.get_rank(self._group) < 0:
            raise ValueError(f"{operation}: norm_group must hold this process, but it is a group of others")

    def __deepcopy__(self, memo: dict[int, Any]) -> NormGroup:
        return self

    def __reduce__(self) -> Any:
        if self.given is not True:
            raise TypeError(
                f"{self._operation}: an optimizer with a process group as norm_group cannot be pickled; "
                "save its state_dict()"
            )
        return NormGroup, (self._operation, True)

    @property
    def _group(self) -> Any:
        return None if self.given is True else self.given

    def judge(self, measure: Callable[[], Verdict], norm_type: float) -> Verdict:
        """That of all processes from what this one has measured; an error here is one in every process."""
        try:
            verdict = measure()
        except Exception:
            self.over_all(Verdict(failed=True), norm_type)
            raise
        verdict = self.over_all(verdict, norm_type)
        if verdict.failed:
            raise RuntimeError(another_failed(f"{self._operation}.step"))
        return verdict

    def over_all(self, verdict: Verdict, norm_type: float) -> Verdict:
        """That of all processes: a collective operation, which every process has to enter."""
        config = torch.distributed.get_backend_config(self._group)
        device = "cpu" if "cpu:" in config else config.split(":")[0]
        values = torch.tensor(verdict.numbers(norm_type), dtype=torch.float64, device=device)
        is_max = math.isinf(norm_type)
        operation = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(values, operation, self._group)
        verdict = Verdict.from_numbers(values.tolist(), norm_type, torch.distributed.get_world_size(self._group))
        return replace(verdict, differs=False)  # every process has other parameters


def norm_group_of(operation: str, group: Any, defaults: Mapping[str, Any]) -> NormGroup | None:
    """For the argument of an optimizer with these defaults; raises as `NormGroup` does."""
    if group is None or group is False:
        return None
    if defaults["differentiable"]:
        raise ValueError(
            f"{operation}: differentiable=True demands norm_group=None, for autograd does not see other processes, "
            f"but got norm_group={group!r}"
        )
    return NormGroup(operation, group)


def has_flat(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a parameter is FSDP1's: a part of a flat tensor, or a view of one."""
    return any(_is_flat(param) for group in groups for param in group["params"])


def _is_flat(param: Any) -> bool:
    # FSDP1 marks its parameters, flat ones and those that use_orig_params=True leaves.
    return bool(getattr(param, "_fsdp_flattened", False))


def check_flat(operation: str, groups: Iterable[Mapping[str, Any]], norm_group: NormGroup | None) -> None:
    """Raise ``ValueError`` where FSDP1's parameters are in a group whose options would mean something else for them."""
    for group in groups:
        params = group["params"]
        if not any(_is_flat(param) for param in ([params] if isinstance(params, Tensor) else params)):
            continue
        if options.value_of(options.strength(group["group_l1"])) != 0:
            raise ValueError(
                f"{operation}: group_l1 demands parameters in their own shapes, but FSDP1 (FullyShardedDataParallel) "
                f"has made them flat, and got group_l1={group['group_l1']}; use FSDP2 (fully_shard)"
            )
        if norm_group is None and (group["max_norm"] is not None or group["nonfinite"] != "propagate"):
            raise ValueError(
                f"{operation}: max_norm and nonfinite demand the norm over all processes, but FSDP1 "
                "(FullyShardedDataParallel) leaves each process a part of the parameters, and got "
                f"max_norm={group['max_norm']} and nonfinite={group['nonfinite']!r}; add norm_group=True, or the "
                "process group over which FSDP1 shards"
            )
