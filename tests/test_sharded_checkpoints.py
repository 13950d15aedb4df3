"""FSDP2 training that goes on with another number of ranks, through torch.distributed.checkpoint."""

import pytest
import torch
from rank_runs import on_ranks
from torch import nn

import regfused
from regfused import extension

pytest.importorskip("torch.distributed.checkpoint.state_dict")
pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(extension.C is None, reason="needs the compiled part"),
]

OPTIMIZERS = {
    "SGD": (regfused.SGD, {"momentum": 0.9, "l1": 1e-3}),
    "Adam": (regfused.Adam, {"amsgrad": True, "group_l1": 1e-3}),
    "AdamW": (regfused.AdamW, {"l1": 1e-3, "proximal": True}),
}
FORMS = ("nested", "flat")
STEPS = 2


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def sharded(world: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = model()
    fully_shard(network, mesh=init_device_mesh("cpu", (world,)))
    return network


def fit(network: nn.Module, optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 6, generator=generator), torch.randn(16, 5, generator=generator)
        optimizer.zero_grad()
        (network(x) - y).square().sum().backward()
        optimizer.step()


def make(name: str, params):
    cls, options = OPTIMIZERS[name]
    return cls(params, lr=0.05, max_norm=0.5, **options)


def whole(network: nn.Module) -> list[torch.Tensor]:
    return [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for p in network.parameters()]


def options_of(form: str):
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(flatten_optimizer_state_dict=form == "flat")


def saved(rank: int, folder: str) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict

    for name in OPTIMIZERS:
        network = sharded(2)
        optimizer = make(name, network.parameters())
        fit(network, optimizer, range(STEPS))
        for form in FORMS:
            weights, state = get_state_dict(network, optimizer, options=options_of(form))
            checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/{name}-{form}")


def loaded(rank: int, folder: str, world: int) -> dict:
    """Loads, goes on, and hands over what comes of it; and what asking for a state leaves behind."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    results = {}
    for name in OPTIMIZERS:
        for form in FORMS:
            network = sharded(world)
            optimizer = make(name, network.parameters())
            before = whole(network)
            weights, state = get_state_dict(network, optimizer, options=options_of(form))
            slots = [s for p in network.parameters() for n, s in optimizer.state[p].items() if n != "step"]
            counts = [float(optimizer.state[p].get("step", 0)) for p in network.parameters()]
            results["asked", name, form] = {
                "same": all(torch.equal(p, q) for p, q in zip(whole(network), before, strict=True)),
                "zero": len(slots) > 0 and all(not s.to_local().any() for s in slots),
                "counts": counts,
            }
            both = {"model": weights, "optimizer": state}
            checkpoint.load(both, checkpoint_id=f"{folder}/{name}-{form}")
            set_state_dict(
                network,
                optimizer,
                model_state_dict=both["model"],
                optim_state_dict=both["optimizer"],
                options=options_of(form),
            )
            fit(network, optimizer, range(STEPS, 2 * STEPS))
            results["went on", name, form] = whole(network)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    on_ranks(saved, 2, folder, str(folder))
    return folder


def test_a_first_step_with_gradients_counts_even_where_the_rate_is_zero():
    """As where a schedule begins at 0: only gradients of zero say that nobody trains."""
    for name in OPTIMIZERS:
        param = nn.Parameter(torch.ones(3))
        optimizer = make(name, [param])
        optimizer.param_groups[0]["lr"] = 0.0
        param.grad = torch.tensor([0.0, 1.0, 0.0])
        optimizer.step()
        slot = "momentum_buffer" if name == "SGD" else "exp_avg"
        assert optimizer.state[param][slot].any() and optimizer.state[param].get("step", 1) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world", (1, 4))
def test_another_number_of_ranks(folder, tmp_path, world):
    ranks = on_ranks(loaded, world, tmp_path, str(folder), world)
    for name in OPTIMIZERS:
        network = model()
        fit(network, make(name, network.parameters()), range(2 * STEPS))
        for rank in ranks:
            for form in FORMS:
                asked = rank["asked", name, form]
                assert asked["same"] and asked["zero"] and set(asked["counts"]) == {0.0}, (name, form)
                for got, want in zip(rank["went on", name, form], whole(network), strict=True):
                    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
