"""stable-baselines3: the clip of PPO inside of the step."""

import pytest
import torch

import regfused

sb3 = pytest.importorskip("stable_baselines3")
pytestmark = pytest.mark.filterwarnings("ignore")


def learned(ours: bool):
    of_policy = {"optimizer_class": torch.optim.Adam, "optimizer_kwargs": {"eps": 1e-3}}
    if ours:
        of_policy = {"optimizer_class": regfused.Adam, "optimizer_kwargs": {"eps": 1e-3, "max_norm": 0.5}}
    agent = sb3.PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=64,
        batch_size=32,
        n_epochs=2,
        seed=0,
        device="cpu",
        policy_kwargs=of_policy,
        max_grad_norm=1e9 if ours else 0.5,
    )
    return agent.learn(128)


def test_ppo(tmp_path):
    ours, theirs = learned(True), learned(False)
    for p, q in zip(ours.policy.parameters(), theirs.policy.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
    assert ours.policy.optimizer.stats.grad_norm > 0
    ours.save(tmp_path / "agent")
    again = sb3.PPO.load(tmp_path / "agent", device="cpu")
    state = ours.policy.optimizer.state_dict()["state"]
    for i, entry in again.policy.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][name]) for name, value in entry.items())
