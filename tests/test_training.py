"""Whole runs in this process: what is learned, and what a compiled update computes."""

from copy import deepcopy
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical

import ppo_torch_ddp as ppo
from probe import probe
from test_algorithm import VECTOR, collect, join
from toy_envs import PUZZLES, puzzle_flags


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Run `main` in this process, in an empty folder; returns what probe.py notes."""
    monkeypatch.chdir(tmp_path)
    for name in ("update", "make_optimizer", "choose_exchange", "make_envs"):
        monkeypatch.setattr(ppo, name, getattr(ppo, name))  # the probe's wrapping ends with the test
    monkeypatch.setattr(ppo.RunningMeanStd, "update", ppo.RunningMeanStd.update)
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
    critic = run_main(env_id="toy_envs:Truncated-v0", eval_episodes=0, **flags)["agent"].critic
    assert critic(torch.ones(1, 1)).item() == pytest.approx(10.0, abs=0.2)
    critic = run_main(env_id="toy_envs:Terminated-v0", eval_episodes=0, **flags)["agent"].critic
    for steps in range(10):
        finite_sum = (1 - 0.9 ** (10 - steps)) / (1 - 0.9)
        assert critic(torch.tensor([[steps / 10]])).item() == pytest.approx(finite_sum, abs=0.2)


@pytest.mark.parametrize("flags", ["total_timesteps=511", "per_rank_batch_size=1025"])
def test_bad_sizes_of_a_run_are_named_in_one_line(run_main, flags):
    name, value = flags.split("=")
    with pytest.raises(SystemExit) as error:
        run_main(**{name: int(value)})
    flag = f"--{name.replace('_', '-')} {value}"
    assert error.value.code.startswith("error: ") and f"{flag} " in error.value.code and "\n" not in error.value.code


def test_first_minibatch_is_on_policy_and_advantages_are_normalised(run_main):
    notes = run_main(total_timesteps=1024, eval_episodes=0)
    for batch, weights in zip(notes["batches"], notes["weights"], strict=True):
        assert weights.shape[0] * weights.shape[1] == 512  # minibatches of one size
        dealt = weights > 0
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
        assert dealt.sum() < 512 and len(batch["advantages"]) == 512
    batch = notes["batches"][0]
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    torch.nn.utils.vector_to_parameters(notes["before"], agent.parameters())
    with torch.no_grad():
        ratio = (agent(batch)["logprobs"] - batch["logprobs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


SPACES = [(gym.spaces.MultiDiscrete([3, 2]), True), (gym.spaces.Box(-1, 1, (2,)), False)]


def make_minibatch(agent: ppo.Agent, args: ppo.Args, rows: int = 64) -> dict:
    names = ("logprobs", "values", "advantages", "returns")
    minibatch = {name: torch.randn(rows) for name in names} | {"obs": torch.randn(rows, 3)}
    actions = torch.randint(2, (rows, agent.num_actions)) if agent.is_discrete else torch.randn(rows, agent.num_actions)
    return minibatch | {"actions": actions, "weights": torch.rand(rows) / rows}


@pytest.mark.parametrize("action_space, clip_vloss", SPACES, ids=["MultiDiscrete", "Box"])
def test_the_compiled_gradient_is_that_of_the_loss_and_of_no_frozen_layer(action_space, clip_vloss):
    """Also with a frozen layer, parameters in another order, and coefficients that change."""
    args = ppo.Args(clip_vloss=clip_vloss, ent_coef=0.01)
    agent = ppo.Agent(VECTOR, action_space, args)
    agent.unpicklable = lambda obs: obs  # someone's own agent may have such
    agent.actor[0].requires_grad_(False)
    _, flat = ppo.make_optimizer(agent, args)
    assert len(flat) == sum(p.numel() for p in agent.parameters()) - 4 * 64
    minibatch = make_minibatch(agent, args)
    gradient = torch.compile(ppo.make_gradient(agent, args), fullgraph=True, dynamic=False)
    for ent_coef, clip_coef in ((0.01, 0.2), (0.5, 0.01)):
        args.ent_coef, args.clip_coef = ent_coef, clip_coef
        loss, metrics = ppo.ppo_loss(agent(minibatch), minibatch, args)
        flat.grad.zero_()
        loss.backward()
        compiled, compiled_metrics = gradient(flat, minibatch)
        torch.testing.assert_close(compiled, flat.grad, atol=1e-5, rtol=1e-4)
        assert compiled_metrics.keys() == metrics.keys()
        for name, metric in metrics.items():
            torch.testing.assert_close(compiled_metrics[name], metric, atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in agent.actor[0].parameters())


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
def test_updates_are_those_of_plain_torch(optimizer):
    """Of two, the second from a checkpoint of the first and with another learning rate; both compiled or not."""
    args = ppo.Args(optimizer=optimizer, max_grad_norm=0.2, update_epochs=2)
    torch.manual_seed(0)
    start = ppo.Agent(VECTOR, gym.spaces.Discrete(3), args)
    batch = make_minibatch(start, args, rows=64)
    del batch["weights"]
    deal = partial(ppo.shuffle, np.arange(64) > 0, np.array([63]), 4, 0, 1)

    reference = deepcopy(start)
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.RMSprop
    plain, rng = kind(reference.parameters(), args.learning_rate, eps=1e-5), np.random.default_rng(2)
    for learning_rate in (1e-2, 3e-3):
        plain.param_groups[0]["lr"] = learning_rate
        epochs = deal(rng)
        for _ in range(args.update_epochs):
            for rows, weights in zip(*next(epochs).values(), strict=True):
                minibatch = {name: tensor[rows] for name, tensor in batch.items()}
                minibatch["weights"] = weights
                loss, _ = ppo.ppo_loss(reference(minibatch), minibatch, args)
                plain.zero_grad()
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), args.max_grad_norm)
                assert norm > args.max_grad_norm
                plain.step()
    expected = torch.nn.utils.parameters_to_vector(reference.parameters())

    for compile_ in (False, True):
        args.compile = compile_
        agent, state, rng = deepcopy(start), None, np.random.default_rng(2)
        for learning_rate in (1e-2, 3e-3):
            agent = deepcopy(agent)
            made, flat = ppo.make_optimizer(agent, args)
            if state:
                made.load_state_dict(made.state_dict() | {"state": state})
            made.param_groups[0]["lr"] = learning_rate
            train_step = ppo.make_train_step(agent, agent, made, flat, None, 1, args)
            metrics = ppo.update(batch, train_step, deal(rng), None, args)
            assert metrics["grad_norm"] > args.max_grad_norm
            state = deepcopy(made.state_dict()["state"])
        assert state[0]["step"] == 2 * 2 * 4
        torch.testing.assert_close(flat, expected.detach(), atol=1e-4, rtol=1e-4)


def test_target_kl_ends_the_update(run_main):
    steps = 10 * 8  # 10 epochs of 8 minibatches
    assert run_main(total_timesteps=512, eval_episodes=0)["steps"] == steps
    assert run_main(total_timesteps=512, eval_episodes=0, target_kl=1e-6)["steps"] == 8


@pytest.mark.parametrize("name", PUZZLES)
def test_every_kind_of_space_is_learned(run_main, name):
    """The right action depends on the observation: who sees or does only a part of it cannot come this near to 10."""
    notes = run_main(num_envs=8, eval_episodes=0, **puzzle_flags(name))
    args = ppo.Args(env_id=f"toy_envs:{name}-v0", eval_episodes=20)
    agent = notes["agent"]
    assert ppo.evaluate(agent, args, None, []).mean() >= (9.2 if "Box" in name else 9.8)
    torch.nn.init.zeros_(agent.actor[-1].weight)  # a head that does not see what is shown
    assert ppo.evaluate(agent, args, None, []).mean() < 8


def test_reset_rows_stay_out_of_the_statistics(run_main):
    """The reset row of this environment holds the last observation, 1.0; the rows that were stepped 0.0 to 0.9."""
    notes = run_main(env_id="toy_envs:Terminated-v0", normalize_obs=True, total_timesteps=1024, eval_episodes=0)
    rows = torch.cat(notes["normalised"][1])
    assert sorted(rows.unique().tolist()) == pytest.approx([step / 10 for step in range(10)])
    torch.testing.assert_close(notes["agent"].obs_rms.mean[0].double(), rows.double().mean())


def test_reset_rows_of_environments_in_processes_are_marked():
    """Episodes of 10 steps and a reset row after each, as in one process."""
    _, results = collect("toy_envs:Truncated-v0", num_steps=15, rollouts=3, vec_env="async")
    resets = join(results, "resets")
    assert np.flatnonzero(resets[:, 0]).tolist() == [10, 21, 32, 43]
    assert np.array_equal(join(results, "rewards"), ~resets)


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


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "compiled"])
def test_groups_of_parameters_have_learning_rates_of_their_own(monkeypatch, run_main, compile_):
    """The groups as for any optimizer of torch; the critic's rate is 0, and a frozen layer is in no group."""

    class OtherAgent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            self.actor[0].requires_grad_(False)

    monkeypatch.setattr(ppo, "Agent", OtherAgent)
    source = ppo.make_optimizer
    monkeypatch.setattr(ppo, "make_optimizer", with_groups(source))
    notes = run_main(total_timesteps=1024, eval_episodes=0, compile=compile_)
    before, after = (deepcopy(notes["agent"]) for _ in range(2))
    torch.nn.utils.vector_to_parameters(notes["before"], before.parameters())
    torch.nn.utils.vector_to_parameters(notes["after"][-1], after.parameters())
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) == (name.startswith("critic") or name.startswith("actor.0")), name
    rates = [group["lr"] for group in notes["optimizer"].param_groups]
    assert rates == [0.0, pytest.approx(1e-3 / 2)]  # annealed, the second of two iterations


def with_groups(source):
    """`make_optimizer` with the line that a hacker writes in place of the shipped one."""
    import inspect

    text = inspect.getsource(source)
    line = '    groups = [{"params": trained, "lr": args.learning_rate, "name": "learning_rate"}]\n'
    assert line in text
    new = (
        '    groups = [{"params": list(agent.critic.parameters()), "lr": 0.0, "name": "critic"}]\n'
        "    actor = [p for p in agent.actor.parameters() if p.requires_grad]\n"
        '    groups += [{"params": actor, "lr": args.learning_rate, "name": "actor"}]\n'
    )
    scope = {}
    exec(text.replace(line, new), vars(ppo), scope)
    return scope["make_optimizer"]
