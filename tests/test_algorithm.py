"""The shipped functions against references that share no code with them."""

import re
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from torch.distributions import Categorical, Normal

import ppo_torch_ddp as ppo

VECTOR = gym.spaces.Box(-1, 1, (3,), np.float32)


def make_agent(action_space: gym.Space, **flags) -> ppo.Agent:
    torch.manual_seed(0)
    return ppo.Agent(VECTOR, action_space, ppo.Args(**flags))


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
        expected = brute_force_gae(rewards, values, terminated, dones, gamma, lam)
        advantages = ppo.compute_gae(rewards, values, terminated, dones, gamma, lam)
        np.testing.assert_allclose(advantages, expected, atol=1e-5)  # gamma * lam has 32 bits


METRICS = ("policy_loss", "value_loss", "entropy_loss", "approx_kl", "clip_fraction")


def numpy_ppo_loss(new_logprobs, entropy, new_values, mb, args):
    """PPO's loss row by row, over the rows with a weight only."""
    rows = np.flatnonzero(mb["weights"])
    n = len(rows)
    policy = value = 0.0
    for i in rows:
        ratio = np.exp(new_logprobs[i] - mb["logprobs"][i])
        clipped = np.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
        policy += -min(ratio * mb["advantages"][i], clipped * mb["advantages"][i]) / n
        error = (new_values[i] - mb["returns"][i]) ** 2
        if args.clip_vloss:
            step = np.clip(new_values[i] - mb["values"][i], -args.clip_coef, args.clip_coef)
            error = max(error, (mb["values"][i] + step - mb["returns"][i]) ** 2)
        value += 0.5 * error / n
    log_ratio = (new_logprobs - mb["logprobs"])[rows]
    ratio = np.exp(log_ratio)
    entropy_loss = -entropy[rows].mean()
    means = [policy, value, entropy_loss, (ratio - 1 - log_ratio).mean(), (abs(ratio - 1) > args.clip_coef).mean()]
    return policy + args.vf_coef * value + args.ent_coef * entropy_loss, means


def to_torch(arrays: dict) -> dict:
    return {name: torch.from_numpy(x) for name, x in arrays.items()}


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_loss_is_that_of_plain_numpy(clip_vloss, ent_coef):
    args = ppo.Args(clip_vloss=clip_vloss, ent_coef=ent_coef, vf_coef=0.7, clip_coef=0.2)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        mb = {name: rng.normal(size=64) for name in ("logprobs", "advantages", "returns", "values")}
        valid = rng.random(64) < 0.8
        mb["weights"] = valid / valid.sum()
        new = mb["logprobs"] + rng.normal(size=64) * 0.4, rng.random(64), mb["values"] + rng.normal(size=64) * 0.4
        ratio = np.exp(new[0] - mb["logprobs"])
        for sign in (-1, 1):  # ratios outside the range on both sides, where the clip acts and where it does not
            assert ((ratio > 1.2) & (sign * mb["advantages"] > 0)).any()
            assert ((ratio < 0.8) & (sign * mb["advantages"] > 0)).any()
        outputs = to_torch(dict(zip(("logprobs", "entropy", "values"), new, strict=True)))
        loss, metrics = ppo.ppo_loss(outputs, to_torch(mb), args)
        expected_loss, expected_means = numpy_ppo_loss(*new, mb, args)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
        np.testing.assert_allclose([metrics[name] for name in METRICS], expected_means, rtol=1e-6)


def test_clip_fraction():
    weights = torch.tensor([0.25, 0.25, 0.5, 0.0])
    mb = {name: torch.zeros(4) for name in ("logprobs", "advantages", "returns", "values")} | {"weights": weights}
    outputs = {
        "logprobs": torch.tensor([1.1, 1.3, 0.7, 2.0]).log(),
        "entropy": torch.zeros(4),
        "values": torch.zeros(4),
    }
    _, metrics = ppo.ppo_loss(outputs, mb, ppo.Args(clip_coef=0.2))
    assert metrics["clip_fraction"] == 0.75


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_gradient_is_that_of_plain_numpy(clip_vloss):
    """By finite differences, with rows on which each clip acts, rows where it does not, and rows inside its range."""
    args, rng, n = ppo.Args(clip_vloss=clip_vloss, ent_coef=0.3, vf_coef=0.7), np.random.default_rng(0), 256
    mb = {name: rng.normal(size=n) for name in ("logprobs", "advantages", "returns", "values")}
    mb["weights"] = np.full(n, 1 / n)
    mb["values"] *= 0.3
    # new values that are no sum of the old one and a step, so that a step is rounded
    new = {"logprobs": mb["logprobs"] + rng.normal(size=n) * 0.4, "entropy": rng.random(n)}
    new["values"] = rng.normal(size=n) * 0.3
    outputs = {name: x.requires_grad_() for name, x in to_torch(new).items()}
    loss, metrics = ppo.ppo_loss(outputs, to_torch(mb), args)
    loss.backward()
    assert not any(metric.requires_grad for metric in metrics.values())
    assert (outputs["logprobs"].grad == 0).any()
    assert (outputs["values"].grad == 0).any() == clip_vloss
    for name, output in outputs.items():
        x = output.detach().numpy().copy()
        for i in range(n):
            losses = []
            for step in (1e-6, -1e-6):
                moved = x.copy()
                moved[i] += step
                losses.append(numpy_ppo_loss(*(new | {name: moved}).values(), mb, args)[0])
            np.testing.assert_allclose(output.grad[i], (losses[0] - losses[1]) / 2e-6, atol=1e-7)


def test_loss_gradient_ignores_rows_without_weight():
    valid = torch.tensor([True, False, True, True])
    mb = {name: torch.randn(4) for name in ("logprobs", "advantages", "returns", "values")}
    mb["weights"] = valid / valid.sum()
    outputs = {"logprobs": (mb["logprobs"] + 0.1).requires_grad_()}
    outputs |= {name: torch.randn(4, requires_grad=True) for name in ("entropy", "values")}
    ppo.ppo_loss(outputs, mb, ppo.Args(ent_coef=0.1))[0].backward()
    for output in outputs.values():
        assert output.grad[1] == 0 and (output.grad[valid] != 0).any()


@pytest.mark.parametrize(
    "space, choices",
    [
        (gym.spaces.Discrete(5, start=3), [5]),
        (gym.spaces.MultiDiscrete([3, 5, 2]), [3, 5, 2]),
        (gym.spaces.MultiDiscrete([[3, 2], [4, 3]]), [3, 2, 4, 3]),
        (gym.spaces.MultiBinary(4), [2] * 4),
        (gym.spaces.MultiBinary((2, 3)), [2] * 6),
    ],
    ids=str,
)
def test_categorical_logprobs_entropy_and_samples(space, choices):
    agent = make_agent(space)
    torch.nn.init.normal_(agent.actor[-1].weight)  # orthogonal initialisation leaves the logits nearly equal
    obs, actions = torch.randn(50, 3), torch.stack([torch.randint(n, (50,)) for n in choices], -1)
    outputs = agent({"obs": obs, "actions": actions})
    logits = agent.actor(obs).view(50, len(choices), max(choices))
    references = [Categorical(logits=logits[:, i, :n]) for i, n in enumerate(choices)]
    expected = sum(reference.log_prob(actions[:, i]) for i, reference in enumerate(references))
    torch.testing.assert_close(outputs["logprobs"], expected)
    torch.testing.assert_close(outputs["entropy"], sum(reference.entropy() for reference in references))
    torch.testing.assert_close(outputs["values"], agent.critic(obs)[:, 0])
    many = {"obs": obs[:1].expand(100_000, 3).numpy()}
    noise = agent.make_noise((100_000,), np.random.default_rng(0))
    sampled, greedy = agent.sample(agent.torch_policy(many), noise), agent.act({"obs": obs.numpy()})
    for i, (reference, n) in enumerate(zip(references, choices, strict=True)):
        shares = np.bincount(sampled[:, i], minlength=n) / len(sampled)
        np.testing.assert_allclose(shares, reference.probs[0].detach(), atol=0.01, rtol=0)
        np.testing.assert_array_equal(greedy[:, i], reference.probs.argmax(-1))
    assert all(action in space for action in agent.to_env(sampled[:1000]))


def test_gaussian_logprobs_and_entropy():
    agent = make_agent(gym.spaces.Box(-1, 1, (2,)))
    torch.nn.init.normal_(agent.log_std)
    obs, actions = torch.randn(50, 3), torch.randn(50, 2)
    outputs = agent({"obs": obs, "actions": actions})
    reference = Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(outputs["logprobs"], reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(outputs["entropy"], reference.entropy().sum(-1))


def test_sampled_box_actions_follow_the_gaussian():
    agent, obs = make_agent(gym.spaces.Box(-1, 1, (4,))), torch.tensor([[0.3, -0.2, 0.5]])
    torch.nn.init.normal_(agent.actor[-1].weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(agent.log_std, generator=torch.Generator().manual_seed(0))
    many = {"obs": obs.expand(100_000, 3).numpy()}
    noise = agent.make_noise((100_000,), np.random.default_rng(0))
    actions = torch.from_numpy(agent.sample(agent.torch_policy(many), noise))
    mean = agent.actor(obs).detach()
    torch.testing.assert_close(actions.mean(0), mean[0], atol=0.04, rtol=0)
    torch.testing.assert_close(actions.std(0), agent.log_std.detach().exp(), atol=0.02, rtol=0.01)
    torch.testing.assert_close(torch.from_numpy(agent.act({"obs": obs.numpy()})), mean)


@pytest.mark.parametrize("activation", ["tanh", "relu", "unknown to numpy"])
@pytest.mark.parametrize("normalize_obs", [False, True])
def test_acting_and_training_know_the_same_actor(activation, normalize_obs):
    """Also after an update, of the parameters where they are."""
    flags = {"activation_function": activation.split()[0], "hidden_sizes": (32, 16), "normalize_obs": normalize_obs}
    agent = make_agent(gym.spaces.Box(-1, 1, (4,)), **flags)
    if "unknown" in activation:
        agent.actor[1] = torch.nn.ELU()
    _, flat = ppo.make_optimizer(agent, ppo.Args())
    obs = 20 * torch.randn(50, 3)
    numpy_policy = ppo.make_numpy_policy(agent)
    assert (numpy_policy is None) == ("unknown" in activation)
    for _ in range(2):
        expected = agent({"obs": obs, "actions": torch.zeros(50, 4)})["mean"].detach().numpy()
        if numpy_policy:
            np.testing.assert_allclose(agent.sample(numpy_policy({"obs": obs.numpy()})), expected, atol=1e-5)
        np.testing.assert_allclose(agent.act({"obs": obs.numpy()}), expected, atol=1e-5)
        flat += 0.1 * torch.randn_like(flat)
        if normalize_obs:
            agent.obs_rms.update(5 + 3 * torch.randn(100, 3), lambda tensor: tensor)


def test_actions_reach_the_environment_within_its_space():
    box = gym.spaces.Box(np.array([-1.0, -2.0]), np.array([1.0, 0.5]), dtype=np.float64)
    stepped = make_agent(box).to_env(np.array([[-3.0, -3.0], [0.5, 3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(stepped, [[-1, -2], [0.5, 0.5], [0, -0.75]])  # 0 is the middle
    assert stepped.dtype == np.float64
    for space in (box, gym.spaces.Box(-np.inf, np.inf, (2,))):  # a rollout's sums tell of NaN, not the simulator
        stepped = make_agent(space).to_env(np.full((1, 2), np.nan))[0]
        assert stepped in space and np.isfinite(stepped).all()
    assert make_agent(gym.spaces.Discrete(3, start=-1)).to_env(np.array([[0], [2]])).tolist() == [-1, 1]
    assert make_agent(gym.spaces.Box(-1, 1, (2, 3))).to_env(np.arange(12.0).reshape(2, 6)).shape == (2, 2, 3)


def test_rescaled_actions_stay_within_any_bounds():
    """Rounding must not lead out of the bounds, nor bounds that leave no choice to NaN; infinite ones do not scale."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=500).astype(np.float32)
    high = np.where(rng.random(500) < 0.1, low, low + rng.random(500)).astype(np.float32)
    high[:100] = np.inf
    low[50:150] = -np.inf
    space = gym.spaces.Box(low, high)
    agent = make_agent(space)
    finite = np.isfinite(low) & np.isfinite(high)
    for extreme, expected in ((-3.0, low), (3.0, high), (0.0, (low + high) / 2)):
        (stepped,) = agent.to_env(np.full((1, 500), extreme, np.float32))
        assert stepped in space
        np.testing.assert_allclose(stepped[finite], expected[finite], atol=1e-6)
        np.testing.assert_array_equal(stepped[~finite], np.clip(extreme, low, high)[~finite].astype(np.float32))


def deal(valid, counts, num_minibatches, part, num_parts, seed) -> tuple[np.ndarray, np.ndarray]:
    """The row numbers and weights of the second epoch."""
    epochs = ppo.shuffle(valid, counts, num_minibatches, part, num_parts, np.random.default_rng(seed))
    first, second = next(epochs), next(epochs)
    assert torch.equal(first["weights"], second["weights"])
    return second["rows"].numpy(), second["weights"].numpy()


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_minibatches_are_a_partition_and_their_weights_make_the_whole_average(num_parts):
    """All ranks' rows are shuffled together; each rank takes a part of every minibatch."""
    R, M = 103, 5
    valid, x = np.random.default_rng(0).random(R) < 0.7, np.random.default_rng(1).normal(size=R)
    counts = np.array([valid.sum()])
    parts = [deal(valid, counts, M, part, num_parts, 3) for part in range(num_parts)]
    seen = []
    for m in range(M):
        whole = np.concatenate([rows[m][weights[m] > 0] for rows, weights in parts])
        assert len(whole) in (valid.sum() // M, valid.sum() // M + 1)
        average = sum((x[rows[m]] * weights[m]).sum() for rows, weights in parts) / num_parts
        np.testing.assert_allclose(average, x[whole].mean(), rtol=1e-6)
        seen += whole.tolist()
    assert len({rows.shape for rows, _ in parts}) == 1
    assert sorted(seen) == np.flatnonzero(valid).tolist() and seen != sorted(seen)


def test_ranks_with_fewer_valid_rows_weigh_less():
    """Each rank shuffles its own rows: the mean over the ranks is that of all valid rows of a minibatch."""
    R, M, rng = 60, 4, np.random.default_rng(0)
    valid = [rng.random(R) < share for share in (0.9, 0.3, 0.02)]
    x = [rng.normal(size=R) for _ in valid]
    counts = np.array([float(v.sum()) for v in valid])
    assert 0 < counts[2] < M  # not even a row for each minibatch
    deals = [deal(v, counts, M, 0, 1, rank) for rank, v in enumerate(valid)]
    for m in range(M):
        whole = np.concatenate([x[r][rows[m][weights[m] > 0]] for r, (rows, weights) in enumerate(deals)])
        average = sum((x[r][rows[m]] * weights[m]).sum() for r, (rows, weights) in enumerate(deals)) / len(valid)
        np.testing.assert_allclose(average, whole.mean(), rtol=1e-6)
    assert [(weights > 0).sum() for _, weights in deals] == counts.tolist()


def collect(env_id: str, num_steps: int, rollouts: int = 1, num_envs: int = 2, **flags):
    """The agent, and of each rollout its arrays, the numbers of its episodes, and its batch."""
    args = ppo.Args(env_id=env_id, num_steps=num_steps, num_envs=num_envs, **flags)
    envs, obs, infos = ppo.make_envs(args, num_envs, seed=1)
    torch.manual_seed(0)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    rollout, episodes = ppo.make_storage(args, agent, obs, infos)
    rng, results = np.random.default_rng(0), []
    for _ in range(rollouts):
        ended = ppo.collect_rollout(agent, envs, rollout, episodes, rng, args)
        del ended["rewards"], ended["observations"]
        batch = ppo.make_batch(agent, rollout, torch.device("cpu"), args)
        results.append(({name: array.copy() for name, array in rollout.items()}, ended, batch))
    envs.close()
    return agent, results


def join(results: list, name: str) -> np.ndarray:
    """The steps of all rollouts, (T, N, ...)."""
    return np.concatenate([rollout[name][:-1] for rollout, _, _ in results])


def test_reset_rows_are_marked_and_counted_nowhere():
    """Episodes of 10 steps and a reset row after each: rows 10, 21, 32, ... of the run are no experience."""
    _, results = collect("toy_envs:Truncated-v0", num_steps=15, rollouts=3)
    resets = join(results, "resets")
    assert np.flatnonzero(resets[:, 0]).tolist() == [10, 21, 32, 43]
    rewards = join(results, "rewards")
    assert (rewards[~resets] == 1).all() and (rewards[resets] == 0).all()
    totals = {name: sum(ended[name] for _, ended, _ in results) for name in results[0][1]}
    assert totals == {"episodes": 8, "episode_returns": 80, "episode_lengths": 80}
    assert not join(results, "terminations").any()
    valid = torch.cat([batch["valid"] for _, _, batch in results]) > 0
    assert valid.tolist() == (~resets).flatten().tolist()


@pytest.mark.parametrize("vec_env", ["native", "envpool"])
def test_vector_environments_of_others_reset_in_the_next_step(vec_env):
    """CartPole pays 1 for each step and nothing for a reset: a return is a length, and a count of valid rows."""
    _, results = collect("CartPole-v1", num_steps=50, rollouts=4, num_envs=3, vec_env=vec_env)
    resets, ends = join(results, "resets"), join(results, "terminations")
    assert np.array_equal(resets[1:], ends[:-1]) and not resets[0].any()
    assert np.array_equal(join(results, "rewards"), ~resets)
    totals = {name: sum(ended[name] for _, ended, _ in results) for name in results[0][1]}
    lengths = sum((~resets[: np.flatnonzero(ends[:, n])[-1] + 1, n]).sum() for n in range(3))
    assert totals == {"episodes": ends.sum(), "episode_returns": lengths, "episode_lengths": lengths}
    assert ends.sum() > 10


def test_discrete_observations_of_envpool_are_flattened():
    _, [(rollout, _, _)] = collect("FrozenLake-v1", num_steps=20, vec_env="envpool")
    assert rollout["obs"].shape == (21, 2, 16) and (rollout["obs"].sum(-1) == 1).all()


ATARI = [("ale_py:ALE/SpaceInvaders-v5", "native"), ("SpaceInvaders-v5", "envpool")]


@pytest.mark.parametrize("env_id, vec_env", ATARI)
def test_returns_of_atari_are_true_and_of_whole_games(env_id, vec_env):
    """Training sees clipped rewards and an end with each lost life; the reported returns know neither."""
    flags = {"vec_env": vec_env, "clip_rewards": True, "episodic_life": True}
    small = '{"img_height": 42, "img_width": 42}'
    _, [(rollout, ended, _)] = collect(env_id, num_steps=700, env_kwargs=small, **flags)
    assert rollout["rewards"].max() == 1
    assert 0 < ended["episodes"] < rollout["resets"][1:].sum()
    assert ended["episode_returns"] / ended["episodes"] > rollout["rewards"].sum() / 2 / 3  # points are 5 to 200


def test_the_row_after_a_truncation_holds_the_last_observation():
    _, [(rollout, _, _)] = collect("toy_envs:Terminated-v0", num_steps=25)
    obs, ends = rollout["obs"][:, 0, 0], np.flatnonzero(rollout["terminations"][:, 0])
    assert ends.tolist() == [9, 20]
    assert (obs[ends + 1] == 1.0).all() and (obs[ends + 2] == 0.0).all()


def test_a_batch_is_what_the_agent_that_acted_says_of_a_rollout(monkeypatch):
    """Values of all rows and of the one after the last, in chunks; returns and advantages by the definition."""
    monkeypatch.setattr(ppo, "CHUNK", 70)
    agent, [_, (rollout, _, batch)] = collect("CartPole-v1", num_steps=64, rollouts=2)
    rows = {"obs": torch.from_numpy(rollout["obs"]), "actions": torch.from_numpy(rollout["actions"])}
    with torch.no_grad():
        outputs = agent({name: tensor.flatten(0, 1) for name, tensor in rows.items()})
    values = outputs["values"].view(65, 2).numpy()
    advantages = brute_force_gae(
        rollout["rewards"][:64], values, rollout["terminations"][:64], rollout["resets"][1:], 0.99, 0.95
    )
    assert rollout["resets"][:64].any() and not rollout["resets"][-1].all()
    expected = {
        "obs": rows["obs"][:64].flatten(0, 1),
        "actions": rows["actions"][:64].flatten(0, 1),
        "logprobs": outputs["logprobs"][:128],
        "values": outputs["values"][:128],
        "advantages": torch.from_numpy(advantages.flatten()).float(),
        "returns": torch.from_numpy((advantages + values[:-1]).flatten()).float(),
        "valid": torch.from_numpy(~rollout["resets"][:64].flatten()).float(),
    }
    assert batch.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(batch[name], tensor, atol=1e-4, rtol=1e-4)


def test_a_policy_that_acts_otherwise_than_it_trains_is_an_error(monkeypatch):
    def other_actor(inputs):
        return {"logits": np.ones((len(inputs["obs"]), 1, 2), np.float32)}

    monkeypatch.setattr(ppo, "make_numpy_policy", lambda agent: other_actor)
    with pytest.raises(SystemExit, match=r"what acted differs from Agent\.forward in logits"):
        collect("CartPole-v1", num_steps=8)


def test_numbers_of_a_rollout_leave_out_reset_rows():
    rng = np.random.default_rng(0)
    batch = to_torch({name: rng.normal(size=30) for name in ("advantages", "returns", "obs", "values")})
    batch["valid"] = torch.from_numpy(rng.random(30) < 0.6).double()
    numbers = ppo.rollout_numbers(batch)
    adv, ret = (batch[name].numpy()[batch["valid"].numpy() > 0] for name in ("advantages", "returns"))
    expected = {"valid_rows": len(adv), "advantages": adv.sum(), "squared_advantages": (adv**2).sum()}
    expected["explained_variance"] = 1 - adv.var() / ret.var()
    for name, number in expected.items():
        assert float(numbers[name]) == pytest.approx(number)
    gathered = {name: np.array([float(number), float(number)]) for name, number in numbers.items()}
    gathered["valid_rows"][1], gathered["advantages"][1], gathered["squared_advantages"][1] = 2, 3.0, 5.0  # 1 and 2
    normalised = ppo.normalize(torch.tensor([1.0, 2.0]), gathered)
    both = np.append(adv, [1.0, 2.0])
    np.testing.assert_allclose(normalised, (np.array([1.0, 2.0]) - both.mean()) / both.std(), rtol=1e-5)


@pytest.mark.parametrize("name", ["observations", "rewards"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(name, value):
    def step(actions):
        obs, rewards = np.zeros((2, 4), np.float32), np.zeros(2)
        (obs if name == "observations" else rewards)[1] = value
        return obs, rewards, np.zeros(2, bool), np.zeros(2, bool), {}

    args = ppo.Args(num_steps=8, num_envs=2)
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), args)
    rollout, sums = ppo.make_storage(args, agent, np.zeros((2, 4)), {})
    envs, rng = SimpleNamespace(step=step), np.random.default_rng(0)
    numbers = ppo.collect_rollout(agent, envs, rollout, sums, rng, args)
    numbers = ppo.gather_numbers(numbers, 1, 3, lambda x: x, torch.device("cpu"))
    with pytest.raises(SystemExit, match=f"error: iteration 5: not finite: {name} of rank 1"):
        ppo.check_finite(numbers, 5)


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--env-id LunarLander-v2", "LunarLander-v3"),
        ("--env-id no_such_module:Env-v0", "No module named 'no_such_module'"),
        ("--env-kwargs gravity=1", "Expecting value"),
        ("--env-kwargs [1]", "must be a mapping, not list"),
        ('--env-kwargs {"gravitas":1}', "unexpected keyword argument 'gravitas'"),
        ('--env-id HalfCheetah-v5 --env-kwargs {"xml_file":"/no.xml"}', "File /no.xml does not exist"),
        ("--env-id Acrobot-v1 --vec-env native", "doesn't have a vector entry point"),
        ("--update-epochs 0", "--update-epochs must be at least 1"),
        ("--num-steps 0", "--num-steps must be at least 1"),
        ("--num-envs -1", "--num-envs must be at least 1"),
        ("--keep-checkpoints 0", "--keep-checkpoints must be at least 1"),
        ("--env-id toy_envs:TupleAction-v0", "wrappers.TransformAction"),
        ("--env-id NoSuch-v0 --vec-env envpool", "NoSuch-v0 is not supported"),
        ("--env-id ALE/Pang-v5 --vec-env native", "`Pang` doesn't exist"),
        ("--env-id ALE/Pong-v5 --vec-env native --capture-video", "--capture-video needs --vec-env sync"),
        ("--vec-env envpool --capture-video", "--capture-video needs --vec-env sync"),
        ("--env-id ALE/Pong-v5 --episodic-life", "--episodic-life needs --vec-env native"),
    ],
)
def test_bad_arguments_are_named_in_one_line(flags, said):
    with pytest.raises(SystemExit) as error:
        args = tyro.cli(ppo.Args, args=flags.split())
        envs, *_ = ppo.make_envs(args, 1, 0)
        ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    assert re.fullmatch(f"error: .*{re.escape(said)}.*", error.value.code)  # a dot is no newline


def on_three_ranks(task) -> list:
    """What `task(rank, peers)` returns or raises on each of three connected ranks: threads of this process."""
    told = Future()

    def run(rank: int):
        def broadcast(value: object) -> object:
            if rank == 0:
                told.set_result(value)
            return told.result(timeout=10)

        peers = ppo.connect_ranks(rank, 3, broadcast)
        try:
            return task(rank, peers)
        except SystemExit as error:
            return error
        finally:
            for peer in peers:
                peer.close()

    with ThreadPoolExecutor(3) as ranks:
        return list(ranks.map(run, range(3)))


def test_sums_over_tcp_are_the_same_on_all_ranks():
    """Of no dimension, of a few numbers, and of more than the sockets' buffers hold, one after the other."""
    shapes = [((), torch.float64), ((3, 5), torch.float32), ((3_000_000,), torch.float32), ((11,), torch.float64)]
    tensors = [[torch.randn(shape, dtype=dtype) for shape, dtype in shapes] for _ in range(3)]
    expected = [x + y + z for x, y, z in zip(*tensors, strict=True)]

    def task(rank, peers):
        return [ppo.sum_over_tcp(x.clone(), rank, peers, 60) for x in tensors[rank]]

    for sums in on_three_ranks(task):
        assert all(torch.equal(x, y) for x, y in zip(sums, expected, strict=True))


def test_a_rank_that_leaves_is_an_error_for_the_others():
    def task(rank, peers):
        return ppo.sum_over_tcp(torch.zeros(5), rank, peers, 60) if rank < 2 else None

    first, second, left = on_three_ranks(task)
    assert str(first) == str(second) == "error: lost the connection to another rank" and left is None


def test_a_rank_that_hangs_is_an_error_for_the_others():
    over = Event()

    def task(rank, peers):
        if rank == 2:
            return over.wait(60)
        try:
            return ppo.sum_over_tcp(torch.zeros(5), rank, peers, 1)
        finally:
            if rank == 0:
                over.set()

    first, second, hung = on_three_ranks(task)
    assert str(first) == "error: --dist-timeout: waited 1 seconds for another rank" and hung
    assert isinstance(second, SystemExit)


@pytest.mark.parametrize("ranks, of_machine, parameters, flag, expected", [
    (2, "2", 1000, "auto", "tcp"),
    (2, "2", 1000, "ddp", "ddp"),
    (2, "1", 1000, "auto", "ddp"),
    (2, "2", 250_001, "auto", "ddp"),
    (2, "2", 250_001, "tcp", "tcp"),
    (1000, "1000", 1000, "auto", "ddp"),
])  # fmt: skip
def test_the_exchange_is_chosen_by_size_and_place(monkeypatch, ranks, of_machine, parameters, flag, expected):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", of_machine)
    monkeypatch.setattr(ppo.os, "cpu_count", lambda: 2)
    assert ppo.choose_exchange(ppo.Args(exchange=flag), ranks, torch.zeros(parameters)) == expected


def test_evaluation_is_greedy_and_of_whole_episodes():
    args = ppo.Args(env_id="CartPole-v1", eval_episodes=5, seed=7)
    agent, _ = collect("CartPole-v1", num_steps=8)
    returns = ppo.evaluate(agent, args, None, [])
    for i in range(5):
        env, total, over = gym.make("CartPole-v1"), 0.0, False
        obs, _ = env.reset(seed=10**9 + 7 + i)
        while not over:
            action = agent.actor(torch.as_tensor(obs)).argmax().item()
            obs, reward, terminated, truncated, _ = env.step(action)
            total, over = total + reward, terminated or truncated
        assert returns[i] == total


def test_what_follows_an_evaluated_episode_is_not_in_its_return(monkeypatch):
    """Of two environments the second ends first, and then pays NaN."""
    steps = iter(zip([[1.0, 1.0], [1.0, np.nan]], [[False, True], [True, False]], strict=True))

    def step(actions):
        rewards, terminated = map(np.array, next(steps))
        return np.zeros((2, 4)), rewards, terminated, np.zeros(2, dtype=bool), {}

    envs = SimpleNamespace(step=step, close=lambda: None)
    monkeypatch.setattr(ppo, "make_envs", lambda *_: (envs, np.zeros((2, 4)), {}))
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    assert ppo.evaluate(agent, ppo.Args(eval_episodes=2), None, []).tolist() == [2.0, 1.0]


def test_merged_statistics_are_those_of_all_rows():
    """Three batches of two ranks, means far from zero: numpy's mean and variance of everything seen."""
    rng, rms, seen = np.random.default_rng(0), ppo.RunningMeanStd(4), []
    for count in (50, 1, 400):
        mine, yours = (torch.from_numpy(rng.normal(1e3, [1, 0.1, 10, 3], (n, 4))) for n in (count, 2 * count))
        x = yours.double() - rms.moments[1]
        others = torch.stack([torch.ones_like(x), x, x**2]).sum(1)
        rms.update(mine, lambda tensor, others=others: tensor + others)
        seen += [mine, yours]
        everything = torch.cat(seen).numpy()
        np.testing.assert_allclose(rms.moments[1], everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(rms.moments[2] / rms.moments[0], everything.var(0), rtol=1e-6)
        expected = ((everything[-1] - everything.mean(0)) / everything.std(0)).clip(-10, 10)
        np.testing.assert_allclose(rms(seen[-1][-1]), expected, atol=1e-2)  # means rounded to 32 bits
    assert rms(torch.full((4,), 1e9)).tolist() == [10] * 4


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5, 1e6])
def test_constants_are_normalised_to_zero(size):
    constants, rms = (torch.rand(200) + 0.5) * size, ppo.RunningMeanStd(200)
    for count in (507, 2031, 8111):
        rms.update(constants.expand(count, 200), lambda tensor: tensor)
        assert rms(constants).abs().max() <= 10 and (rms.moments[2] >= 0).all()


def test_discounted_returns_end_with_the_episode_and_cross_rollouts():
    _, results = collect("toy_envs:Truncated-v0", num_steps=15, rollouts=3, normalize_rewards=True, gamma=0.9)
    got = join(results, "discounted_returns")[:, 0]  # each row's is that before its step
    expected, total = [0.0], 0.0
    for row in range(44):
        is_reset = row % 11 == 10  # which follows the last of ten steps
        total = 0.0 if is_reset else 0.9 * total + 1.0
        expected.append(total)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_rewards_are_clipped_or_scaled_and_returns_reported_whole():
    three_lives = {"episodes": 4, "episode_returns": 240, "episode_lengths": 48}
    _, [(rollout, ended, _)] = collect("toy_envs:Lives-v0", num_steps=40, episodic_life=True, clip_rewards=True)
    assert rollout["rewards"].max() == 1
    # three lives of four steps that pay 5 each, a reset row after each life
    assert np.flatnonzero(rollout["resets"][1:, 0]).tolist() == [3, 8, 13, 18, 23, 28, 33, 38]
    assert ended == three_lives
    agent, [(rollout, _, batch)] = collect("toy_envs:Lives-v0", num_steps=40, normalize_rewards=True, gae_lambda=0.0)
    assert rollout["rewards"].max() == 5
    agent.reward_rms.std[:] = 2.0  # a termination's advantage is its reward less its value
    args = ppo.Args(num_steps=40, num_envs=2, gae_lambda=0.0)
    scaled = ppo.make_batch(agent, rollout, torch.device("cpu"), args)["returns"]
    assert scaled[6] == pytest.approx(2.5) and batch["returns"][6] == pytest.approx(5.0)
    _, results = collect("toy_envs:Lives-v0", num_steps=20, rollouts=2, episodic_life=True)
    for _, ended, _ in results:  # the second game spans the rollouts
        assert ended == {"episodes": 2, "episode_returns": 120, "episode_lengths": 24}
    # without the flag lives mean nothing: the end of an episode is its end
    for episodic_life, expected in ((True, [60, 60]), (False, [20, 20])):
        args = ppo.Args(env_id="toy_envs:Lives-v0", eval_episodes=2, episodic_life=episodic_life)
        assert ppo.evaluate(agent, args, None, []).tolist() == expected
    _, [(_, ended, _)] = collect("toy_envs:Lives-v0", num_steps=40)
    assert ended["episode_returns"] == 20 * ended["episodes"] > 0


@pytest.mark.parametrize(
    "shape", [(3, 40, 50), (40, 50, 3), (4, 40, 50, 3), (4, 3, 40, 50), (4, 40, 40), (40, 50)], ids=str
)
def test_images_reach_the_network_as_channels_first_floats(shape):
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    planes = ppo.Images()(images)
    if len(shape) == 2:
        np.testing.assert_allclose(planes[:, 0], images / 255, rtol=1e-6)
    else:
        frames = shape[0] if len(shape) == 4 else 1
        channels = 4 if shape == (4, 40, 40) else 3 * frames
        assert planes.shape == (2, channels, 40, shape[-1] if shape[-1] > 4 else shape[-2])
        if shape[-1] == 3:
            images_first = images.numpy().reshape(2, frames, 40, 50, 3).transpose(0, 1, 4, 2, 3).reshape(planes.shape)
        else:
            images_first = images.numpy().reshape(planes.shape)
        np.testing.assert_allclose(planes, images_first / 255, rtol=1e-6)
    agent = ppo.Agent(gym.spaces.Box(0, 255, shape, np.uint8), gym.spaces.Discrete(3), ppo.Args())
    values = agent({"obs": images, "actions": torch.zeros(2, 1, dtype=torch.int64)})["values"]
    assert values.shape == (2,) and agent.act({"obs": images.numpy()}).shape == (2, 1)
    for layer in agent.trunk:
        if isinstance(layer, torch.nn.Conv2d):  # orthogonal rows of norm sqrt(2), as far as there are dimensions
            rows = layer.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)


def test_hidden_sizes_activation_and_log_std():
    flags = {"hidden_sizes": (32, 16, 8), "activation_function": "relu", "log_std_init": -2.0}
    agent = make_agent(gym.spaces.Box(-1, 1, (2,)), **flags)
    assert [layer.out_features for layer in agent.actor if hasattr(layer, "out_features")] == [32, 16, 8, 2]
    assert any(isinstance(layer, torch.nn.ReLU) for layer in agent.critic)
    assert agent.log_std.tolist() == [-2, -2]


def test_a_trained_agent_is_used_in_five_lines():
    trained, _ = collect("Pendulum-v1", num_steps=8, normalize_obs=True)
    state = {"agent": trained.state_dict(), "args": vars(ppo.Args(env_id="Pendulum-v1", normalize_obs=True))}
    # a program of one's own
    env = gym.make("Pendulum-v1")
    agent = ppo.Agent(env.observation_space, env.action_space, ppo.Args(**state["args"]))
    agent.load_state_dict(state["agent"])
    obs, info = env.reset(seed=0)
    obs, *_, info = env.step(agent.to_env(agent.act(agent.from_env(obs, info)))[0])
    assert np.array_equal(*(each.act(each.from_env(obs, info)) for each in (agent, trained)))


def test_an_action_of_the_wrong_width_is_an_error():
    args = ppo.Args(num_steps=4, env_id="Pendulum-v1")
    envs, obs, infos = ppo.make_envs(args, 4, 0)
    agent = ppo.Agent(envs.single_observation_space, gym.spaces.Box(-2, 2, (2,)), args)
    rollout, episodes = ppo.make_storage(args, agent, obs, infos)
    agent.actor[-1] = torch.nn.Linear(64, 1)  # where two actions are expected
    agent.log_std = torch.nn.Parameter(torch.zeros(1))
    agent.num_actions = 1
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"Agent.sample returns \(4, 1\), not \(4, 2\)"):
        ppo.collect_rollout(agent, envs, rollout, episodes, rng, args)


KL = [(1e3, 10.0, 1), (-1e3, 1e-9, 3)]


@pytest.mark.parametrize("others_kl, target_kl, epochs", KL)
def test_target_kl_is_of_all_ranks(others_kl, target_kl, epochs):
    """One of two ranks stops after the first epoch although it is below the limit, or goes on although it is above."""
    args = ppo.Args(target_kl=target_kl, update_epochs=3)
    batch = {"obs": torch.randn(64, 3)}
    steps = []

    def train_step(minibatch):
        steps.append(minibatch)
        return {"approx_kl": torch.tensor(1.0)}

    def gather(numbers):
        return {name: np.array([float(number), others_kl]) for name, number in numbers.items()}

    epochs_ = ppo.shuffle(np.ones(64, bool), np.array([64]), 2, 0, 1, np.random.default_rng(0))
    ppo.update(batch, train_step, epochs_, gather, args)
    assert len(steps) == 2 * epochs
