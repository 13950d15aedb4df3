"""timm: its parameter groups, its scheduler, its average of weights; and our dropout in its models."""

import pytest
import torch
from client_runs import MAX_NORM
from torch import nn

import regfused

timm = pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore")

L2 = 0.01  # smooth: biases that begin at zero would have the sign of a rounding error


def model(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3, img_size=32, **options)


def run(who: str, steps: int = 4):
    from timm.optim import param_groups_weight_decay
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3

    network = model()
    groups = param_groups_weight_decay(network, 0.05)
    if who == "regfused":
        optimizer = regfused.AdamW(groups, lr=1e-3, eps=1e-4, l2=L2, max_norm=MAX_NORM)
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-3, eps=1e-4)
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, warmup_t=1, warmup_lr_init=1e-4, t_in_epochs=False)
    average = ModelEmaV3(network, decay=0.5)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(4, 3, 32, 32, generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), torch.arange(4) % 3)
        if who == "torch":
            loss = loss + L2 * sum(p.square().sum() for p in network.parameters())
        loss.backward()
        if who == "torch":
            torch.nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        optimizer.step()
        scheduler.step_update(step + 1)
        average.update(network)
    return network, average.module


def test_training():
    for ours, theirs in zip(run("regfused"), run("torch"), strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=2e-5)


def test_convert():
    network = model(drop_rate=0.1, proj_drop_rate=0.1)
    there = sum(type(module) is nn.Dropout for module in network.modules())
    assert there > 0
    done = regfused.convert(network)
    assert done.count == there and not any(type(module) is nn.Dropout for module in network.modules())
    network(torch.randn(1, 3, 32, 32)).sum().backward()
