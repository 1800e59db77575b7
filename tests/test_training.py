"""Whole runs in this process: what is learned, and what a compiled update computes."""

from copy import deepcopy
from functools import partial
from itertools import product

import gymnasium as gym
import pytest
import torch
from torch.distributions import Categorical

import ppo_torch_ddp as ppo
from probe import probe
from test_algorithm import VECTOR
from toy_envs import PUZZLES, puzzle_flags


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Run `main` in this process, in an empty folder; returns what probe.py notes."""
    monkeypatch.chdir(tmp_path)
    for name in ("update", "Agent", "Normalizer"):
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # the probe's wrapping ends with the test
    monkeypatch.setattr(ppo, "catch_signals", list)  # Ctrl-C is for pytest

    def run(**flags):
        notes = probe(ppo)
        ppo.main(ppo.Args(**flags))
        return notes

    return run


def test_values_bootstrap_from_truncation_and_not_from_termination(run_main):
    """Pays 1 a step for 10 steps: worth 1 / (1 - gamma) if truncated, the sum of the steps left if terminated."""
    flags = {"num_envs": 8, "num_steps": 32, "gamma": 0.9, "learning_rate": 3e-3, "total_timesteps": 60_000}
    flags["per_rank_batch_size"] = 128
    critic = run_main(env_id="toy_envs:Truncated-v0", eval_episodes=0, **flags)["model"].critic
    assert critic(torch.ones(1, 1)).item() == pytest.approx(10.0, abs=0.2)
    critic = run_main(env_id="toy_envs:Terminated-v0", eval_episodes=0, **flags)["model"].critic
    for steps in range(10):
        finite_sum = (1 - 0.9 ** (10 - steps)) / (1 - 0.9)
        assert critic(torch.tensor([[steps / 10]])).item() == pytest.approx(finite_sum, abs=0.2)


def test_first_minibatch_is_on_policy_and_advantages_are_normalised(run_main):
    notes = run_main(total_timesteps=1024, eval_episodes=0)
    batch = notes["batches"][0]
    valid = batch["valid"]
    assert valid.any() and not valid.all()
    advantages = batch["advantages"][valid]
    assert advantages.mean().abs() < 1e-4 and (advantages.std(correction=0) - 1).abs() < 1e-3
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    torch.nn.utils.vector_to_parameters(notes["before"], agent.parameters())
    with torch.no_grad():
        ratio = (agent(batch["obs"], batch["actions"])[0] - batch["log_probs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize(
    "action_space, clip_vloss, ent_coef",
    [
        (gym.spaces.MultiDiscrete([3, 2]), True, 0.01),
        (gym.spaces.Box(-1, 1, (2,)), True, 0.01),
        (gym.spaces.Box(-1, 1, (2,)), False, 0.0),  # as many parameters as the one before: nothing of that is reused
    ],
    ids=["MultiDiscrete", "Box", "other arguments"],
)
def test_the_compiled_gradient_is_that_of_the_loss(action_space, clip_vloss, ent_coef):
    args = ppo.Args(clip_vloss=clip_vloss, ent_coef=ent_coef, compile=True)
    agent = ppo.Agent(VECTOR, action_space, args)
    agent.unpicklable = lambda obs: obs  # someone's own agent may have such
    flat = ppo.flatten_parameters(agent)
    cut = {"num_minibatches": 3, "generator": torch.Generator(), "part": 0, "num_parts": 1}
    batch = ppo.batch_like(agent, 64)
    for name in batch.keys() - {"actions", "valid"}:
        batch[name].normal_()
    batch["valid"][::2] = True
    optimizer = ppo.make_optimizer(flat, args)
    gradient, _ = ppo.compile_update(agent, flat, optimizer, batch, partial(ppo.shuffle, **cut), args)
    for rows, weight in ppo.shuffle(batch, **cut):  # of 21 and of 22 rows
        minibatch = ppo.take(batch, rows, weight)
        loss, means = ppo.ppo_loss(*agent(minibatch["obs"], minibatch["actions"]), minibatch, args)
        flat.grad.zero_()
        loss.backward()
        compiled, (compiled_loss, compiled_means) = gradient(flat.detach(), batch, rows, weight)
        torch.testing.assert_close(compiled, flat.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compiled_loss, loss.detach(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(compiled_means, means, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_a_compiled_update_is_the_eager_one(optimizer):
    """Of two, the second from a checkpoint of the first and with another learning rate; either one compiled or not."""
    kwargs = {"optimizer": optimizer, "max_grad_norm": 0.2, "per_rank_batch_size": 16, "update_epochs": 2}
    cut = {"num_minibatches": 4, "part": 0, "num_parts": 1}
    batch = ppo.batch_like(ppo.Agent(VECTOR, gym.spaces.Discrete(3), ppo.Args()), 64)
    for name in batch.keys() - {"actions", "valid"}:
        batch[name].normal_()
    batch["valid"][1:] = True
    results = []
    for compiles in product([False, True], repeat=2):
        torch.manual_seed(0)
        state, result = None, []
        for compile, learning_rate in zip(compiles, (1e-2, 3e-3), strict=True):
            args = ppo.Args(compile=compile, **kwargs)
            agent = ppo.Agent(VECTOR, gym.spaces.Discrete(3), args)
            flat = ppo.flatten_parameters(agent)
            made = ppo.make_optimizer(flat, args)
            if state:
                ppo.restore(state, agent, made)
            before = flat.detach().clone()
            minibatches = partial(ppo.shuffle, generator=torch.Generator().manual_seed(1), **cut)
            compiled = ppo.compile_update(agent, flat, made, batch, minibatches, args) if compile else None
            assert flat.equal(before)  # compiling is no step
            made.param_groups[0]["lr"] = learning_rate
            minibatches = partial(ppo.shuffle, generator=torch.Generator().manual_seed(2), **cut)
            means = ppo.update(agent, made, batch, args, minibatches, compiled, None, 1)
            assert means[-1] > args.max_grad_norm  # so that the gradient is clipped
            state = {"agent": deepcopy(agent.state_dict()), "optimizer": deepcopy(made.state_dict())}
            result += [means, flat.detach(), *state["optimizer"]["state"][0].values()]
        assert state["optimizer"]["state"][0]["step"] == 2 * 2 * 4
        results.append(result)
    for result in results[1:]:
        for compiled, eager in zip(result, results[0], strict=True):
            torch.testing.assert_close(compiled, eager, atol=1e-4 * eager.abs().max().item(), rtol=1e-4)


def test_target_kl_ends_the_update(run_main):
    steps = 10 * 8  # 10 epochs of 8 minibatches
    assert run_main(total_timesteps=512, eval_episodes=0)["steps"] == steps
    assert run_main(total_timesteps=512, eval_episodes=0, target_kl=1e-6)["steps"] == 8


@pytest.mark.parametrize("name", PUZZLES)
def test_every_kind_of_space_is_learned(run_main, name):
    """The right action depends on the observation: who sees or does only a part of it cannot come this near to 10."""
    notes = run_main(num_envs=8, eval_episodes=0, **puzzle_flags(name))
    args = ppo.Args(env_id=f"toy_envs:{name}-v0", eval_episodes=20)
    agent = notes["model"]
    assert ppo.evaluate(agent, args, seed=100).mean() >= (9.2 if "Box" in name else 9.8)
    torch.nn.init.zeros_(agent.actor[-1].weight)  # a head that does not see what is shown
    assert ppo.evaluate(agent, args, seed=100).mean() < 8


def test_reset_rows_stay_out_of_the_statistics(run_main):
    """The reset row of this environment holds the last observation, 1.0; the rows that were stepped 0.0 to 0.9."""
    notes = run_main(env_id="toy_envs:Terminated-v0", normalize_obs=True, total_timesteps=1024, eval_episodes=0)
    rows = torch.cat(notes["normalised"][1])
    assert sorted(rows.unique().tolist()) == pytest.approx([step / 10 for step in range(10)])
    torch.testing.assert_close(notes["agent"].normalizers["raw_obs"].mean[0], rows.double().mean())


def test_one_epoch_of_one_minibatch_is_a2c(run_main):
    """One RMSprop step on the policy gradient of the advantages, the value error and the entropy, by hand."""
    flags = {"update_epochs": 1, "per_rank_batch_size": 20, "num_steps": 5, "gae_lambda": 1.0, "ent_coef": 0.01}
    flags |= {"optimizer": "rmsprop", "learning_rate": 7e-4, "normalize_advantages": False, "total_timesteps": 20}
    notes = run_main(eval_episodes=0, clip_coef=1e-6, **flags)
    batch = notes["batches"][0]
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    torch.nn.utils.vector_to_parameters(notes["before"].clone(), agent.parameters())
    policy = Categorical(logits=agent.actor(batch["obs"]))
    errors = agent.critic(batch["obs"])[:, 0] - batch["returns"]
    loss = -(policy.log_prob(batch["actions"][:, 0]) * batch["advantages"]).mean()
    (loss + 0.5 * 0.5 * errors.square().mean() - 0.01 * policy.entropy().mean()).backward()
    torch.nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
    torch.optim.RMSprop(agent.parameters(), lr=7e-4, eps=1e-5).step()
    after = torch.nn.utils.parameters_to_vector(agent.parameters())
    torch.testing.assert_close(notes["after"][0], after, atol=1e-6, rtol=1e-5)
    assert not torch.equal(notes["before"], notes["after"][0])
