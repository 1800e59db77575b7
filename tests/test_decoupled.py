"""For the first form of the decoupled file, and goes with it: its functions against references that share no code."""

import re
from copy import deepcopy
from functools import partial
from itertools import product
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from torch.distributions import Categorical, Normal

import ppo_fabric_decoupled as ppo
from toy_envs import StrangeSpaces

VECTOR = gym.spaces.Box(-1, 1, (3,), np.float32)
ALONE = SimpleNamespace(rank=0, world_size=1)  # in place of the group of trainers


def make_agent(action_space: gym.Space) -> ppo.Agent:
    torch.manual_seed(0)
    return ppo.Agent(VECTOR, action_space, ppo.Args())


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
        for sign in (-1, 1):  # ratios outside the range on both sides, where the clip acts and where it does not
            assert ((ratio > 1.2) & (sign * mb["advantages"] > 0)).any()
            assert ((ratio < 0.8) & (sign * mb["advantages"] > 0)).any()
        loss, means = ppo.ppo_loss(
            *map(torch.from_numpy, new), {name: torch.from_numpy(x) for name, x in mb.items()}, args
        )
        expected_loss, expected_means = numpy_ppo_loss(*new, mb, args)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
        np.testing.assert_allclose(means, expected_means, rtol=1e-6)


@pytest.mark.parametrize("clip_vloss", [False, True])
def test_loss_gradient_is_that_of_plain_numpy(clip_vloss):
    """By finite differences, with rows on which each clip acts, rows where it does not, and rows inside its range."""
    args, rng, n = ppo.Args(clip_vloss=clip_vloss, ent_coef=0.3, vf_coef=0.7), np.random.default_rng(0), 256
    mb = {name: rng.normal(size=n) for name in ("log_probs", "advantages", "returns", "values")}
    mb |= {"valid": np.ones(n, dtype=bool), "weights": np.full(n, 1 / n)}
    mb["values"] *= 0.3
    # new values that are no sum of the old one and a step, so that a step is rounded
    new = [mb["log_probs"] + rng.normal(size=n) * 0.4, rng.random(n), rng.normal(size=n) * 0.3]
    outputs = [torch.from_numpy(x).requires_grad_() for x in new]
    ppo.ppo_loss(*outputs, {name: torch.from_numpy(x) for name, x in mb.items()}, args)[0].backward()
    assert (outputs[0].grad == 0).any()
    assert (outputs[2].grad == 0).any() == clip_vloss
    for x, output in zip(new, outputs, strict=True):
        for i in range(len(x)):
            value, losses = x[i], []
            for x[i] in (value + 1e-6, value - 1e-6):
                losses.append(numpy_ppo_loss(*new, mb, args)[0])
            x[i] = value
            np.testing.assert_allclose(output.grad[i], (losses[0] - losses[1]) / 2e-6, atol=1e-7)


def test_loss_gradient_ignores_rows_that_are_no_experience():
    valid = torch.tensor([True, False, True, True])
    mb = {name: torch.randn(4) for name in ("log_probs", "advantages", "returns", "values")}
    mb["weights"] = valid / valid.sum()
    outputs = [(mb["log_probs"] + 0.1).requires_grad_(), *(torch.randn(4, requires_grad=True) for _ in range(2))]
    ppo.ppo_loss(*outputs, mb, ppo.Args(ent_coef=0.1))[0].backward()
    for output in outputs:
        assert output.grad[1] == 0 and (output.grad[valid] != 0).any()


def test_a_policy_that_lags_behind_is_corrected():
    """Hilton et al. 2021: the clip is around the updated policy, the importance weight of the one that acted."""
    args, agent, rng = ppo.Args(), make_agent(gym.spaces.Discrete(4)), np.random.default_rng(0)
    batch = {name: torch.from_numpy(rng.normal(size=64)) for name in ("log_probs", "advantages", "returns", "values")}
    batch |= {"obs": torch.randn(64, 3), "actions": torch.randint(4, (64, 1)), "weights": torch.full((64,), 1 / 64)}
    batch = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    acted, advantages = batch["log_probs"].clone(), batch["advantages"].clone()
    with torch.no_grad():
        updated = agent(batch["obs"], batch["actions"])[0]
    ppo.recenter(agent, batch)
    new = updated + torch.from_numpy(rng.normal(size=64)).float() * 0.4
    ratio = (new - updated).exp()
    expected = -((updated - acted).exp() * torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).mean()
    _, means = ppo.ppo_loss(new, torch.zeros(64), batch["values"], batch, args)
    torch.testing.assert_close(means[0], expected)
    same = {name: tensor.clone() for name, tensor in batch.items()}
    ppo.recenter(agent, same)  # without a lag nothing changes
    assert all(torch.equal(same[name], batch[name]) for name in batch)


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
def test_categorical_log_probs_entropy_and_samples(space, choices):
    agent = make_agent(space)
    torch.nn.init.normal_(agent.actor[-1].weight)  # orthogonal initialisation leaves the logits nearly equal
    obs, actions = torch.randn(50, 3), torch.stack([torch.randint(n, (50,)) for n in choices], -1)
    log_probs, entropy, values = agent(obs, actions)
    logits = agent.actor(obs).view(50, len(choices), max(choices))
    references = [Categorical(logits=logits[:, i, :n]) for i, n in enumerate(choices)]
    expected = sum(reference.log_prob(actions[:, i]) for i, reference in enumerate(references))
    torch.testing.assert_close(log_probs, expected)
    torch.testing.assert_close(entropy, sum(reference.entropy() for reference in references))
    torch.testing.assert_close(values, agent.critic(obs)[:, 0])
    noise = agent.sample_noise((100_000,), torch.Generator().manual_seed(0))
    sampled, greedy = agent.act(obs[:1].expand(100_000, 3).numpy(), noise), agent.act(obs.numpy())
    for i, (reference, n) in enumerate(zip(references, choices, strict=True)):
        shares = np.bincount(sampled[:, i], minlength=n) / len(sampled)
        np.testing.assert_allclose(shares, reference.probs[0].detach(), atol=0.01, rtol=0)
        np.testing.assert_array_equal(greedy[:, i], reference.probs.argmax(-1))
    assert all(action in space for action in ppo.to_env(sampled[:1000], space))


def test_gaussian_log_probs_and_entropy():
    agent = make_agent(gym.spaces.Box(-1, 1, (2,)))
    torch.nn.init.normal_(agent.log_std)
    obs, actions = torch.randn(50, 3), torch.randn(50, 2)
    log_probs, entropy, _ = agent(obs, actions)
    reference = Normal(agent.actor(obs), agent.log_std.exp())
    torch.testing.assert_close(log_probs, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, reference.entropy().sum(-1))


def test_sampled_box_actions_follow_the_gaussian():
    agent, obs = make_agent(gym.spaces.Box(-1, 1, (4,))), torch.tensor([[0.3, -0.2, 0.5]])
    torch.nn.init.normal_(agent.actor[-1].weight, generator=torch.Generator().manual_seed(0))
    noise = agent.sample_noise((100_000,), torch.Generator().manual_seed(0))
    actions, output = torch.from_numpy(agent.act(obs.numpy(), noise)), agent.actor(obs).detach()
    torch.testing.assert_close(actions.mean(0), output[0], atol=0.02, rtol=0)
    torch.testing.assert_close(actions.std(0), agent.log_std.detach().exp(), atol=0.02, rtol=0)
    torch.testing.assert_close(torch.from_numpy(agent.act(obs.numpy())), output)


@pytest.mark.parametrize("activation", ["tanh", "relu", "unknown to numpy"])
@pytest.mark.parametrize("normalize_obs", [False, True])
def test_acting_and_training_know_the_same_actor(activation, normalize_obs):
    """Also after an update, of the parameters where they are."""
    args = ppo.Args(activation_function=activation.split()[0], hidden_sizes=(32, 16), normalize_obs=normalize_obs)
    agent = ppo.Agent(VECTOR, gym.spaces.Box(-1, 1, (4,)), args)
    if "unknown" in activation:
        agent.actor[1], agent.actor[2] = torch.nn.ELU(), torch.nn.Linear(32, 16, bias=False)
    flat, obs = ppo.flatten_parameters(agent), 20 * torch.randn(50, 3)
    network = agent.acting_network()
    for _ in range(2):
        expected = agent.actor(agent.normalize(obs)).detach().numpy()
        np.testing.assert_allclose(network(obs.numpy()), expected, atol=1e-5)
        np.testing.assert_allclose(agent.act(obs.numpy()), expected, atol=1e-5)
        flat.data += 0.1 * torch.randn_like(flat)
        for normalizer in agent.normalizers.values():
            normalizer.merge(normalizer.sums(5 + 3 * torch.randn(100, 3)))


def test_actions_reach_the_environment_within_its_space():
    box = gym.spaces.Box(np.array([-1.0, -2.0]), np.array([1.0, 0.5]), dtype=np.float64)
    stepped = ppo.to_env(np.array([[-3.0, -3.0], [0.5, 3.0]]), box)
    np.testing.assert_array_equal(stepped, [[-1, -2], [0.5, 0.5]])
    assert stepped.dtype == np.float64
    for space in (box, gym.spaces.Box(-np.inf, np.inf, (2,))):  # the rollout's counts tell of NaN, not the simulator
        stepped = ppo.to_env(np.full((1, 2), np.nan), space)[0]
        assert stepped in space and np.isfinite(stepped).all()
    assert ppo.to_env(np.array([[0], [2]]), gym.spaces.Discrete(3, start=-1)).tolist() == [-1, 1]
    grid = gym.spaces.Box(-1, 1, (2, 3))
    assert ppo.to_env(np.arange(12.0).reshape(2, 6), grid).shape == (2, 2, 3)


def test_rescaled_actions_stay_within_any_bounds():
    """Rounding must not lead out of the bounds, nor bounds that leave no choice to NaN."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=500).astype(np.float32)
    high = np.where(rng.random(500) < 0.1, low, low + rng.random(500)).astype(np.float32)
    space = gym.spaces.Box(low, high)
    gym.register("Bounds-v0", partial(StrangeSpaces, action_space=space))
    envs, _ = ppo.make_envs(ppo.Args(env_id="Bounds-v0"), 1, 0)
    for extreme, expected in ((-3.0, low), (3.0, high), (0.0, (low + high) / 2)):
        stepped = envs.func(ppo.to_env(np.full((1, 500), extreme, np.float32), envs.single_action_space))[0]
        assert stepped in space
        np.testing.assert_allclose(stepped, expected, atol=1e-6)


def test_bounded_actions_are_rescaled_and_infinite_ones_are_not():
    for env_id, low, high in (("Pendulum-v1", -1, 1), ("toy_envs:Unbounded-v0", -np.inf, np.inf)):
        envs, _ = ppo.make_envs(ppo.Args(env_id=env_id), 2, 0)
        assert (envs.single_action_space.low == low).all() and (envs.single_action_space.high == high).all()


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_minibatches_are_a_partition_and_their_weights_make_the_whole_average(num_parts):
    rows = 103
    batch = {"x": torch.randn(rows, dtype=torch.float64), "row": torch.arange(rows), "valid": torch.rand(rows) < 0.7}
    generators = [torch.Generator().manual_seed(3) for _ in range(num_parts)]
    parts = [
        [ppo.take(batch, *rows) for rows in ppo.shuffle(batch, 5, generator, part, num_parts)]
        for part, generator in enumerate(generators)
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
    assert packed.dtype == torch.uint8 and packed.shape == (6 * (6 + 8 + 1 + 12 + 16),)
    part = ppo.pack({name: tensor[::5] for name, tensor in batch.items()})  # other rows than `like` has, with gaps
    for name, tensor in ppo.unpack(part.unsqueeze(0), batch).items():
        assert tensor.dtype == batch[name].dtype and torch.equal(tensor, batch[name][::5])
    for name, tensor in ppo.unpack(torch.stack([packed, packed]), batch).items():
        assert tensor.dtype == batch[name].dtype and torch.equal(tensor, torch.cat([batch[name], batch[name]]))


def collect(env_id: str, num_steps: int, rollouts: int = 1, num_envs: int = 2, **flags):
    args = ppo.Args(env_id=env_id, **flags)
    envs, obs = ppo.make_envs(args, num_envs, seed=1)
    torch.manual_seed(0)
    agent = ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    storage, generator = ppo.make_storage(num_steps, num_envs, agent, obs), torch.Generator().manual_seed(0)
    results = []
    for _ in range(rollouts):
        rollout, episodes = ppo.collect_rollout(agent, agent, envs, storage, generator, args)
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


@pytest.mark.parametrize("vec_env", ["native", "envpool"])
def test_vector_environments_of_others_reset_in_the_next_step(vec_env):
    """CartPole pays 1 for each step and nothing for a reset: a return is a length, and a count of valid rows."""
    _, results = collect("CartPole-v1", num_steps=50, rollouts=4, num_envs=3, vec_env=vec_env)
    rows = {name: torch.cat([rollout[name] for rollout, _ in results]) for name in ("valid", "dones", "rewards")}
    assert torch.equal(~rows["valid"][1:], rows["dones"][:-1]) and rows["valid"][0].all()
    assert torch.equal(rows["rewards"], rows["valid"].float())
    episodes = [episode for _, ended in results for episode in ended]
    assert len(episodes) == rows["dones"].sum() > 10
    for env in range(3):
        ends = rows["dones"][:, env].nonzero().flatten()
        lengths = rows["valid"][:, env].cumsum(0)[ends].diff(prepend=torch.tensor([0])).tolist()
        assert all((length, length) in episodes for length in lengths)


def test_discrete_observations_of_envpool_are_flattened():
    _, [(rollout, _)] = collect("FrozenLake-v1", num_steps=20, vec_env="envpool")
    assert rollout["obs"].shape == (21, 2, 16) and (rollout["obs"].sum(-1) == 1).all()


ATARI = [pytest.param("ale_py:ALE/SpaceInvaders-v5", "native", marks=pytest.mark.slow), ("SpaceInvaders-v5", "envpool")]


@pytest.mark.parametrize("env_id, vec_env", ATARI)
def test_returns_of_atari_are_true_and_of_whole_games(env_id, vec_env):
    """Training sees clipped rewards and an end with each lost life; the reported returns know neither."""
    flags = {"vec_env": vec_env, "clip_rewards": True, "episodic_life": True}
    small = '{"img_height": 42, "img_width": 42}'
    _, [(rollout, episodes)] = collect(env_id, num_steps=700, env_kwargs=small, **flags)
    assert rollout["raw_rewards"].max() > 1 == rollout["rewards"].max()
    assert 0 < len(episodes) < rollout["dones"].sum()
    sums = rollout["raw_rewards"].cumsum(0)
    lives = [sums[rollout["dones"][:, env], env].tolist() for env in range(2)]  # returns at each loss of a life
    assert any(episodes[0][0] in returns[2:3] for returns in lives)  # of which a game has three


def test_the_row_after_a_truncation_holds_the_last_observation():
    _, [(rollout, _)] = collect("toy_envs:Terminated-v0", num_steps=25)
    obs, ends = rollout["obs"][:, 0, 0], rollout["dones"][:, 0].nonzero().flatten()
    assert ends.tolist() == [9, 20]
    assert (obs[ends + 1] == 1.0).all() and (obs[ends + 2] == 0.0).all()


def test_log_probs_and_values_are_those_of_the_agent_that_acted():
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
    rollout = {"raw_obs": torch.tensor([np.inf, np.nan, 0.0]), "raw_rewards": torch.tensor([1.0, np.nan])}
    sums = ppo.batch_sums(batch, rollout, [(3.0, 5), (4.0, 7)]).tolist()
    adv, ret = (batch[name].numpy()[batch["valid"].numpy()] for name in ("advantages", "returns"))
    expected = [len(adv), adv.sum(), (adv**2).sum(), ret.sum(), (ret**2).sum(), 2, 7, 12, 2, 1]
    np.testing.assert_allclose(sums, expected)


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
        ("--hidden-sizes 64 0", "--hidden-sizes must be in 1"),
        ("--gamma 1.5", "--gamma must be in 0"),
        ("--learning-rate nan", "--learning-rate must be in"),
        ("--log-std-init inf", "--log-std-init must be in"),
        ("--seed 5000000000", "--seed must be in"),
        ("--update-epochs 0", "--update-epochs must be in 1"),
        ("--num-steps 0", "--num-steps must be in 2"),
        ("--num-envs -1", "--num-envs must be in 1"),
        ("--env-id toy_envs:ImageObs-v0", "needs ResizeObservation"),
        ("--env-id toy_envs:TupleAction-v0", "wrappers.TransformAction"),
        ("--env-id NoSuch-v0 --vec-env envpool", "NoSuch-v0 is not supported"),
        ("--env-id ALE/Pang-v5 --vec-env native", "`Pang` doesn't exist"),
        ("--env-id ALE/Pong-v5 --vec-env native --capture-video", "--vec-env sync for --capture-video"),
        ("--vec-env envpool --capture-video", "--vec-env sync for --capture-video"),
        ("--env-id ALE/Pong-v5 --episodic-life", "--vec-env native for --episodic-life"),
        (
            '--env-id ALE/Breakout-v5 --vec-env native --env-kwargs {"episodic_life":true}',
            "take --clip-rewards and --episodic-life",
        ),
    ],
)
def test_bad_arguments_are_named_in_one_line(flags, said):
    with pytest.raises(SystemExit) as error:
        args = tyro.cli(ppo.Args, args=flags.split())
        envs, _ = ppo.make_envs(args, 1, 0)
        ppo.Agent(envs.single_observation_space, envs.single_action_space, args)
    assert re.fullmatch(f"error: .*{re.escape(said)}.*", error.value.code)  # a dot is no newline


@pytest.mark.parametrize("others_kl, target_kl, epochs", [(1e3, 10.0, 1), (-1e3, 1e-9, 3)])
def test_target_kl_is_of_all_ranks(others_kl, target_kl, epochs):
    """One of two ranks stops after the first epoch although it is below the limit, or goes on although it is above."""

    def add_others(approx_kl: torch.Tensor) -> torch.Tensor:
        return approx_kl.add_(others_kl)

    group = SimpleNamespace(rank=0, world_size=2, all_reduce=add_others)
    args = ppo.Args(target_kl=target_kl, update_epochs=3, per_rank_batch_size=32)
    agent = ppo.Agent(VECTOR, gym.spaces.Discrete(2), args)
    flat = ppo.flatten_parameters(agent)
    optimizer = torch.optim.Adam([flat], lr=1e-3)
    obs, actions = torch.randn(64, *agent.obs_shape), torch.randint(2, (64, 1))
    log_probs, _, values = (x.detach() for x in agent(obs, actions))
    batch = {"obs": obs, "actions": actions, "log_probs": log_probs, "values": values, "returns": torch.randn(64)}
    batch |= {"advantages": torch.randn(64), "valid": torch.ones(64, dtype=torch.bool)}
    cut = {"num_minibatches": 2, "generator": torch.Generator().manual_seed(0), "part": 0, "num_parts": 1}
    ppo.update(agent, optimizer, batch, args, partial(ppo.shuffle, **cut), None, group)
    assert optimizer.state[flat]["step"] == 2 * epochs


def test_evaluation_is_greedy_and_of_whole_episodes():
    args = ppo.Args(env_id="CartPole-v1", eval_episodes=5)
    agent, _ = collect("CartPole-v1", num_steps=8)
    returns = ppo.evaluate(agent, args, 7)
    for i in range(5):
        env, total, over = gym.make("CartPole-v1"), 0.0, False
        obs, _ = env.reset(seed=7 + i)
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

    envs = SimpleNamespace(step=step, close=lambda: None, single_action_space=gym.spaces.Discrete(2))
    monkeypatch.setattr(ppo, "make_envs", lambda *_: (envs, np.zeros((2, 4))))
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), ppo.Args())
    assert ppo.evaluate(agent, ppo.Args(eval_episodes=2), 0).tolist() == [2.0, 1.0]


def test_an_evaluation_that_is_paid_nan_is_an_error():
    agent, _ = collect("toy_envs:NanReward-v0", num_steps=2)
    with pytest.raises(SystemExit, match="error: evaluation: 3 returns are not finite"):
        ppo.evaluate(agent, ppo.Args(env_id="toy_envs:NanReward-v0", eval_episodes=3), 0)


def test_merged_statistics_are_those_of_all_rows():
    """Three batches of two ranks, means far from zero: numpy's mean and variance of everything seen."""
    rng, normalizer, seen = np.random.default_rng(0), ppo.Normalizer(4), []
    for count in (50, 1, 400):
        ranks = [torch.from_numpy(rng.normal(1e3, [1, 0.1, 10, 3], (n, 4))) for n in (count, 2 * count)]
        normalizer.merge(sum(normalizer.sums(rows) for rows in ranks))
        seen += ranks
        everything = torch.cat(seen).numpy()
        np.testing.assert_allclose(normalizer.mean, everything.mean(0), rtol=1e-12)
        np.testing.assert_allclose(normalizer.squares / normalizer.count, everything.var(0), rtol=1e-6)
        expected = ((everything[-1] - everything.mean(0)) / everything.std(0)).clip(-10, 10)
        np.testing.assert_allclose(normalizer(seen[-1][-1]), expected, atol=1e-2)  # means rounded to 32 bits
    assert normalizer(torch.full((4,), 1e9)).tolist() == [10] * 4


@pytest.mark.parametrize("size", [1e2, 1e4, 1e5, 1e6])
def test_constants_are_normalised_to_zero(size):
    constants, normalizer = (torch.rand(200) + 0.5) * size, ppo.Normalizer(200)
    for count in (507, 2031, 8111):
        normalizer.merge(normalizer.sums(constants.expand(count, 200)))
        assert normalizer(constants).abs().max() <= 10 and (normalizer.squares >= 0).all()


def test_discounted_returns_end_with_the_episode_and_cross_rollouts():
    _, results = collect("toy_envs:Truncated-v0", num_steps=15, rollouts=3, normalize_rewards=True, gamma=0.9)
    got = torch.cat([rollout["discounted_returns"] for rollout, _ in results])[:, 0, 0]
    expected, total = [], 0.0
    for row in range(45):
        is_reset = row % 11 == 10  # which follows the last of ten steps
        total = 0.0 if is_reset else 0.9 * total + 1.0
        expected.append(total)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_rewards_are_clipped_or_scaled_and_returns_reported_whole():
    for flags in ({"clip_rewards": True}, {"normalize_rewards": True}):
        agent, [(rollout, episodes)] = collect("toy_envs:Lives-v0", num_steps=40, episodic_life=True, **flags)
        if agent.normalizers:
            assert rollout["rewards"].max() == 5  # nothing is known before the first merge
        else:
            assert rollout["rewards"].max() == 1
        # three lives of four steps that pay 5 each, a reset row after each life
        assert rollout["dones"][:, 0].nonzero().flatten().tolist() == [3, 8, 13, 18, 23, 28, 33, 38]
        assert episodes == [(60.0, 12)] * 4
    _, [(_, early), (_, late)] = collect("toy_envs:Lives-v0", num_steps=20, rollouts=2, episodic_life=True)
    assert (early, late) == ([(60.0, 12)] * 2, [(60.0, 12)] * 2)  # the second game spans the rollouts
    # without the flag lives mean nothing: the end of an episode is its end
    for episodic_life, expected in ((True, [60, 60]), (False, [20, 20])):
        args = ppo.Args(env_id="toy_envs:Lives-v0", eval_episodes=2, episodic_life=episodic_life)
        assert ppo.evaluate(agent, args, 0).tolist() == expected
    _, [(_, episodes)] = collect("toy_envs:Lives-v0", num_steps=40)
    assert set(episodes) == {(20.0, 4)}


@pytest.mark.parametrize("shape", [(3, 40, 50), (40, 50, 3), (4, 40, 50, 3), (4, 3, 40, 50), (4, 40, 40)], ids=str)
def test_images_reach_the_network_as_channels_first_floats(shape):
    images = torch.randint(256, (2, *shape), dtype=torch.uint8)
    planes = ppo.Images()(images)
    frames = shape[0] if len(shape) == 4 else 1
    channels = 4 if shape == (4, 40, 40) else 3 * frames
    assert planes.shape == (2, channels, 40, shape[-1] if shape[-1] > 4 else shape[-2])
    last = (
        images.numpy().reshape(2, frames, 40, 50, 3).transpose(0, 1, 4, 2, 3) if shape[-1] == 3 else images
    ).reshape(planes.shape)
    np.testing.assert_allclose(planes, np.asarray(last) / 255, rtol=1e-6)
    agent = ppo.Agent(gym.spaces.Box(0, 255, shape, np.uint8), gym.spaces.Discrete(3), ppo.Args())
    _, _, values = agent(images, torch.zeros(2, 1, dtype=torch.int64))
    assert values.shape == (2,) and agent.act(images.numpy()).shape == (2, 1)
    for layer in agent.trunk:
        if isinstance(layer, torch.nn.Conv2d):  # orthogonal rows of norm sqrt(2), as far as there are dimensions
            rows = layer.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)


def test_hidden_sizes_activation_and_log_std():
    args = ppo.Args(hidden_sizes=(32, 16, 8), activation_function="relu", log_std_init=-2.0)
    agent = ppo.Agent(VECTOR, gym.spaces.Box(-1, 1, (2,)), args)
    assert [layer.out_features for layer in agent.actor if hasattr(layer, "out_features")] == [32, 16, 8, 2]
    assert any(isinstance(layer, torch.nn.ReLU) for layer in agent.critic)
    assert agent.log_std.tolist() == [-2, -2]


@pytest.mark.slow
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


@pytest.mark.parametrize("optimizer", ["adam", pytest.param("rmsprop", marks=pytest.mark.slow)])
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
            means = ppo.update(agent, made, batch, args, minibatches, compiled, ALONE)
            assert means[-1] > args.max_grad_norm  # so that the gradient is clipped
            state = {"agent": deepcopy(agent.state_dict()), "optimizer": deepcopy(made.state_dict())}
            result += [means, flat.detach(), *state["optimizer"]["state"][0].values()]
        assert state["optimizer"]["state"][0]["step"] == 2 * 2 * 4
        results.append(result)
    for result in results[1:]:
        for compiled, eager in zip(result, results[0], strict=True):
            torch.testing.assert_close(compiled, eager, atol=1e-4 * eager.abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
def test_nothing_that_is_not_finite_reaches_the_parameters(compile):
    """In the first update of a run, which finds the optimizer without a past, and in the second."""
    args = ppo.Args(update_epochs=2, per_rank_batch_size=8, compile=compile)
    names = ("log_probs", "values", "advantages", "returns")
    batch = {"obs": torch.randn(32, 4), "actions": torch.zeros(32, 1, dtype=torch.int64)}
    batch |= {name: torch.randn(32) for name in names} | {"valid": torch.ones(32, dtype=torch.bool)}
    minibatches = partial(ppo.shuffle, num_minibatches=4, generator=torch.Generator(), part=0, num_parts=1)
    for good_updates in (0, 1):
        agent = ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), args)
        flat = ppo.flatten_parameters(agent)
        optimizer = ppo.make_optimizer(flat, args)
        compiled = ppo.compile_update(agent, flat, optimizer, batch, minibatches, args) if compile else None
        start = flat.detach().clone()
        for _ in range(good_updates):
            ppo.update(agent, optimizer, batch, args, minibatches, compiled, ALONE)
        before = flat.detach().clone()
        assert torch.equal(before, start) == (good_updates == 0)
        bad = batch | {"advantages": torch.full((32,), torch.inf)}
        means = ppo.update(agent, optimizer, bad, args, minibatches, compiled, ALONE)
        assert not means.isfinite().all() and torch.equal(flat, before)
