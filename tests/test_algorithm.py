"""The shipped functions against references that share no code with them."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.distributions import Categorical, Normal

import ppo_torch_ddp as ppo
from probe import probe

VECTOR = gym.spaces.Box(-1, 1, (3,), np.float32)


def make_agent(action_space: gym.Space) -> ppo.Agent:
    torch.manual_seed(0)
    return ppo.Agent(VECTOR, action_space, "tanh", True)


def brute_force_gae(rewards, values, terminated, dones, gamma, lam):
    """The definition: the sum over l of (gamma lam)^l times the temporal difference, up to the episode's end."""
    T, N = rewards.shape
    advantages = np.zeros((T, N))
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0.0 if terminated[k, n] else gamma * values[k + 1, n]
                advantages[t, n] += (gamma * lam) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
                if dones[k, n]:
                    break
    return advantages


@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.0), (0.97, 1.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_is_the_brute_force_sum(gamma, lam):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        rewards, values = rng.normal(size=(40, 3)), rng.normal(size=(41, 3))
        terminated, truncated = rng.random((40, 3)) < 0.1, rng.random((40, 3)) < 0.1
        dones = terminated | truncated
        inputs = [torch.from_numpy(x) for x in (rewards, values, terminated, dones)]
        expected = brute_force_gae(rewards, values, terminated, dones, gamma, lam)
        np.testing.assert_allclose(ppo.compute_gae(*inputs, gamma, lam), expected, atol=1e-10)


def numpy_ppo_loss(new_log_probs, entropy, new_values, mb, args):
    """PPO's loss row by row, over the valid rows only."""
    n, rows = int(mb["valid"].sum()), np.flatnonzero(mb["valid"])
    policy = value = 0.0
    for i in rows:
        ratio = np.exp(new_log_probs[i] - mb["log_probs"][i])
        clipped = np.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        policy += -min(ratio * mb["advantages"][i], clipped * mb["advantages"][i]) / n
        error = (new_values[i] - mb["returns"][i]) ** 2
        if args.clip_vloss:
            step = np.clip(new_values[i] - mb["values"][i], -args.clip_coef, args.clip_coef)
            error = max(error, (mb["values"][i] + step - mb["returns"][i]) ** 2)
        value += 0.5 * error / n
    log_ratio = (new_log_probs - mb["log_probs"])[rows]
    ratio = np.exp(log_ratio)
    entropy_loss = -entropy[rows].mean()
    means = [policy, value, entropy_loss, (ratio - 1 - log_ratio).mean(), (abs(ratio - 1) > args.clip_coef).mean()]
    return policy + args.vf_coef * value + args.ent_coef * entropy_loss, means


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_loss_is_that_of_plain_numpy(clip_vloss, ent_coef):
    args = ppo.Args(clip_vloss=clip_vloss, ent_coef=ent_coef, vf_coef=0.7, clip_coef=0.2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mb = {name: rng.normal(size=64) for name in ("log_probs", "advantages", "returns", "values")}
        mb["valid"] = rng.random(64) < 0.8
        mb["weights"] = mb["valid"] / mb["valid"].sum()
        new = mb["log_probs"] + rng.normal(size=64) * 0.4, rng.random(64), mb["values"] + rng.normal(size=64) * 0.4
        ratio = np.exp(new[0] - mb["log_probs"])
        for sign in (-1, 1):  # both clips act, with advantages of both signs
            assert ((ratio > 1.2) & (sign * mb["advantages"] > 0)).any() and (ratio < 0.8).any()
        loss, means = ppo.ppo_loss(
            *map(torch.from_numpy, new), {name: torch.from_numpy(x) for name, x in mb.items()}, args
        )
        expected_loss, expected_means = numpy_ppo_loss(*new, mb, args)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
        np.testing.assert_allclose(means, expected_means, rtol=1e-6)


def test_loss_gradient_ignores_rows_that_are_no_experience():
    valid = torch.tensor([True, False, True, True])
    mb = {name: torch.randn(4) for name in ("log_probs", "advantages", "returns", "values")}
    mb["weights"] = valid / valid.sum()
    outputs = [torch.randn(4, requires_grad=True) for _ in range(3)]
    ppo.ppo_loss(*outputs, mb, ppo.Args(ent_coef=0.1))[0].backward()
    for output in outputs:
        assert output.grad[1] == 0 and (output.grad[valid] != 0).any()


def test_categorical_log_probs_and_entropy():
    agent = make_agent(gym.spaces.Discrete(5))
    torch.nn.init.normal_(agent.actor[-1].weight)  # orthogonal initialisation leaves the logits nearly equal
    obs, actions = torch.randn(50, 3), torch.randint(5, (50,))
    log_probs, entropy, values = agent(obs, actions)
    reference = Categorical(logits=agent.actor(obs))
    torch.testing.assert_close(log_probs, reference.log_prob(actions))
    torch.testing.assert_close(entropy, reference.entropy())
    torch.testing.assert_close(values, agent.critic(obs)[:, 0])


def test_gaussian_log_probs_and_entropy():
    agent = make_agent(gym.spaces.Box(-1, 1, (2,)))
    torch.nn.init.normal_(agent.log_std)
    obs, actions = torch.randn(50, 3), torch.randn(50, 2)
    log_probs, entropy, _ = agent(obs, actions)
    reference = Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(log_probs, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, reference.entropy().sum(-1))


@pytest.mark.parametrize("space", [gym.spaces.Discrete(4), gym.spaces.Box(-1, 1, (4,))])
def test_sampled_actions_follow_the_distribution(space):
    agent, obs = make_agent(space), torch.tensor([[0.3, -0.2, 0.5]])
    torch.nn.init.normal_(agent.actor[-1].weight, generator=torch.Generator().manual_seed(0))
    noise = agent.sample_noise((100_000,), torch.Generator().manual_seed(0))
    with torch.no_grad():
        actions, output = agent.act(obs, noise), agent.actor(obs)
        if agent.discrete:
            shares = torch.bincount(actions, minlength=4) / len(actions)
            torch.testing.assert_close(shares, output.softmax(-1)[0], atol=0.01, rtol=0)
            assert agent.act(obs).item() == output.argmax()
        else:
            torch.testing.assert_close(actions.mean(0), output[0], atol=0.02, rtol=0)
            torch.testing.assert_close(actions.std(0), agent.log_std.exp(), atol=0.02, rtol=0)
            torch.testing.assert_close(agent.act(obs), output)


def test_actions_reach_the_environment_within_its_space():
    box = gym.vector.utils.batch_space(gym.spaces.Box(np.array([-1.0, -2.0]), np.array([1.0, 0.5])), 2)
    stepped = ppo.to_env(torch.tensor([[-3.0, -3.0], [0.5, 3.0]]), box)
    np.testing.assert_array_equal(stepped, [[-1, -2], [0.5, 0.5]])
    shifted = gym.vector.utils.batch_space(gym.spaces.Discrete(3, start=-1), 2)
    assert ppo.to_env(torch.tensor([0, 2]), shifted).tolist() == [-1, 1]


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_minibatches_are_a_partition_and_their_weights_make_the_whole_average(num_parts):
    rows = 103
    batch = {"x": torch.randn(rows, dtype=torch.float64), "row": torch.arange(rows), "valid": torch.rand(rows) < 0.7}
    parts = [
        list(ppo.shuffle(batch, 5, torch.Generator().manual_seed(3), part, num_parts)) for part in range(num_parts)
    ]
    seen = []
    for minibatches in zip(*parts, strict=True):  # one minibatch, all parts of it
        whole = torch.cat([mb["row"] for mb in minibatches])
        assert len(whole) in (20, 21)
        average = sum((mb["x"] * mb["weights"]).sum() for mb in minibatches) / num_parts
        torch.testing.assert_close(average, batch["x"][whole][batch["valid"][whole]].mean())
        seen += whole.tolist()
    assert sorted(seen) == list(range(rows)) and seen != list(range(rows))


def test_a_packed_batch_unpacks_to_itself():
    batch = {
        "image": torch.randint(256, (6, 2, 3), dtype=torch.uint8),
        "action": torch.randint(9, (6,)),
        "valid": torch.rand(6) < 0.5,
        "obs": torch.randn(6, 3),
        "wide": torch.randn(6, 2, dtype=torch.float64),
    }
    packed = ppo.pack(batch)
    assert packed.dtype == torch.uint8 and packed.shape == (6, 6 + 8 + 1 + 12 + 16)
    assert torch.equal(ppo.unpack(packed[:1], batch)["obs"], batch["obs"][:1])
    for name, tensor in ppo.unpack(torch.cat([packed, packed]), batch).items():
        assert tensor.dtype == batch[name].dtype and torch.equal(tensor, torch.cat([batch[name], batch[name]]))


def collect(env_id: str, num_steps: int, rollouts: int = 1, num_envs: int = 2, vec_env: str = "sync"):
    envs = ppo.make_envs(env_id, num_envs, vec_env)
    obs, _ = envs.reset(seed=1)
    torch.manual_seed(0)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, "tanh", True)
    storage, generator = ppo.make_storage(num_steps, num_envs, agent, obs), torch.Generator().manual_seed(0)
    results = []
    for _ in range(rollouts):
        rollout, episodes = ppo.collect_rollout(agent, agent, envs, storage, generator, torch.device("cpu"))
        results.append(({name: tensor.clone() for name, tensor in rollout.items()}, episodes))
    envs.close()
    return agent, results


@pytest.mark.parametrize("vec_env", ["sync", "async"])
def test_reset_rows_are_marked_and_counted_nowhere(vec_env):
    """Episodes of 10 steps and a reset row after each: rows 10, 21, 32, ... of the run are no experience."""
    _, results = collect("toy_envs:Truncated-v0", num_steps=15, rollouts=3, vec_env=vec_env)
    valid = torch.cat([rollout["valid"] for rollout, _ in results])
    assert (~valid[:, 0]).nonzero().flatten().tolist() == [10, 21, 32, 43]
    rewards = torch.cat([rollout["rewards"] for rollout, _ in results])
    assert (rewards[valid] == 1).all() and (rewards[~valid] == 0).all()
    episodes = [episode for _, ended in results for episode in ended]
    assert episodes == [(10.0, 10)] * 8
    assert not any(rollout["terminated"].any() for rollout, _ in results)


def test_the_row_after_a_truncation_holds_the_last_observation():
    _, [(rollout, _)] = collect("toy_envs:Terminated-v0", num_steps=25)
    obs, ends = rollout["obs"][:, 0, 0], rollout["dones"][:, 0].nonzero().flatten()
    assert ends.tolist() == [9, 20]
    assert (obs[ends + 1] == 1.0).all() and (obs[ends + 2] == 0.0).all()


def test_log_probs_and_values_are_those_of_the_acting_network():
    agent, [(rollout, _)] = collect("CartPole-v1", num_steps=64)
    with torch.no_grad():
        for t in range(64):
            log_probs, _, values = agent(rollout["obs"][t], rollout["actions"][t])
            torch.testing.assert_close(rollout["log_probs"][t], log_probs)
            torch.testing.assert_close(rollout["values"][t], values)
        torch.testing.assert_close(rollout["values"][64], agent.critic(rollout["obs"][64])[:, 0])


def test_batch_sums_leave_out_reset_rows():
    rng = np.random.default_rng(0)
    batch = {name: torch.from_numpy(rng.normal(size=30)) for name in ("advantages", "returns", "obs")}
    batch["valid"] = torch.from_numpy(rng.random(30) < 0.6)
    rollout = {"obs": torch.tensor([np.inf, np.nan, 0.0]), "rewards": torch.tensor([1.0, np.nan])}
    sums = ppo.batch_sums(batch, rollout, [(3.0, 5), (4.0, 7)]).tolist()
    adv, ret = (batch[name].numpy()[batch["valid"].numpy()] for name in ("advantages", "returns"))
    expected = [len(adv), adv.sum(), (adv**2).sum(), ret.sum(), (ret**2).sum(), 2, 7, 12, 2, 1]
    np.testing.assert_allclose(sums, expected)


@pytest.fixture
def run_main(tmp_path, monkeypatch):
    """Run `main` in this process, in an empty folder; returns what probe.py notes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo, "update", ppo.update)  # the probe's wrapping ends with the test

    def run(**flags):
        notes = probe(ppo)
        ppo.main(ppo.Args(**flags))
        return notes

    return run


def test_values_bootstrap_from_truncation_and_not_from_termination(run_main):
    """Pays 1 a step for 10 steps: worth 1 / (1 - gamma) if truncated, the sum of the steps left if terminated."""
    flags = {"num_envs": 8, "num_steps": 32, "gamma": 0.9, "learning_rate": 3e-3, "total_timesteps": 60_000}
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
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), "tanh", True)
    torch.nn.utils.vector_to_parameters(notes["before"], agent.parameters())
    with torch.no_grad():
        ratio = (agent(batch["obs"], batch["actions"])[0] - batch["log_probs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_target_kl_ends_the_update(run_main):
    steps = 10 * 8  # 10 epochs of 8 minibatches
    assert run_main(total_timesteps=512, eval_episodes=0)["steps"] == steps
    assert run_main(total_timesteps=512, eval_episodes=0, target_kl=1e-6)["steps"] == 8


def test_evaluation_is_greedy_and_of_whole_episodes():
    args = ppo.Args(env_id="CartPole-v1", eval_episodes=5)
    agent, _ = collect("CartPole-v1", num_steps=8)
    returns = ppo.evaluate(agent, args, 7, torch.device("cpu"))
    for i in range(5):
        env, total, over = gym.make("CartPole-v1"), 0.0, False
        obs, _ = env.reset(seed=7 + i)
        while not over:
            action = agent.actor(torch.as_tensor(obs)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        assert returns[i] == total
