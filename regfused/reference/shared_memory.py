"""Parameters that share memory, or are listed twice: a rare case, in which the order of updates has a meaning."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from regfused import options


def copies(params: list[Tensor]) -> dict[Tensor, Tensor]:
    """Copies of parameters that share their storage with another one, or are listed twice: they share it there too.

    Updates of such parameters follow one another, and each must see what the one before it did.
    """
    storages = [param.untyped_storage() if options.is_plain(param) else None for param in params]
    times = Counter(s.data_ptr() for s in storages if s is not None)
    copied: dict[int, torch.UntypedStorage] = {}
    copies: dict[Tensor, Tensor] = {}
    for param, storage in zip(params, storages, strict=True):
        if storage is None or storage.data_ptr() == 0 or times[storage.data_ptr()] < 2:
            continue
        if storage.data_ptr() not in copied:
            copied[storage.data_ptr()] = storage.clone()
        copy = torch.empty(0, dtype=param.dtype, device=param.device)
        copies[param] = copy.set_(copied[storage.data_ptr()], param.storage_offset(), param.size(), param.stride())
    return copies
