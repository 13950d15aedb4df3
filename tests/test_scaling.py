"""Collective operations of a step on many ranks, counted with torch's fake process group."""

import pytest
import torch

from regfused import extension

pytest.importorskip("rich")
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.long,
    pytest.mark.skipif(extension.C is None or not torch.distributed.is_available(), reason="needs the compiled part"),
]

SHAPES = [[64, 32], [64], [128, 64], [10, 128], [10]]


def test_one_collective_operation_for_each_dimension_of_the_mesh_that_splits():
    from benchmarks.scaling import LAYOUTS, count

    found = {(layout.name, layout.ranks): count(SHAPES, layout) for layout in LAYOUTS}
    assert {key: sum(counts.ours.values()) for key, counts in found.items()} == {
        ("FSDP2", 64): 1,
        ("hybrid: 8 groups of 64", 512): 1,
        ("FSDP2 with tensor parallelism", 128): 2,
        ("FSDP2", 1024): 1,
    }
    assert all(sum(counts.torchs.values()) >= 1 or "raises" in str(counts.torchs) for counts in found.values())
    assert found["FSDP2", 64].here == 32 + 1 + 2 * 64 + 1 * 128 + 1
