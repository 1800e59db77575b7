"""Players and trainers: what they exchange, and that together they do what one process does."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_fabric_decoupled as ppo
from test_launch import DECOUPLED, SLOW, SMALL, TORCH, cartpole_spaces, run_probe, run_probes, scalars

PENDULUM = ["--env-id", "Pendulum-v1", "--normalize-obs", "--normalize-rewards", "--clip-vloss", "--target-kl", "0.02"]
SHARED = ["--share-data"]


def vector_agent(parameters: torch.Tensor) -> ppo.Agent:
    agent = ppo.Agent(*cartpole_spaces(), ppo.Args())
    torch.nn.utils.vector_to_parameters(parameters.clone(), agent.parameters())
    return agent


@pytest.mark.parametrize("num_envs, num_trainers", [(4, 1), (4, 2), (4, 3), (5, 3), (1, 2)])
def test_every_environment_is_dealt_to_one_trainer(num_envs, num_trainers):
    """Each to the trainer of its number in the run, modulo trainers; what pads is marked as no experience."""
    numbers = [[] for _ in range(num_trainers)]
    for player in range(3):
        first = player * num_envs
        array = np.arange(first, first + num_envs)[None, :, None].repeat(7, 0)
        for trainer, taken in enumerate(numbers):
            dealt = ppo.deal(array, first, trainer, num_trainers, -1)
            assert dealt.shape == (7, -(-num_envs // num_trainers), 1) and (dealt == dealt[:1]).all()
            taken += dealt[0, dealt[0] >= 0].tolist()
    assert sorted(number for taken in numbers for number in taken) == list(range(3 * num_envs))
    for trainer, taken in enumerate(numbers):
        assert {number % num_trainers for number in taken} <= {trainer}
    rollout = {name: np.zeros((8, num_envs), bool) for name in ("resets", "terminations")}
    args = ppo.Args(num_steps=7, num_envs=num_envs)
    head, packed = ppo.pack_rollout(rollout, {"episodes": np.int64(3)}, args, 0, num_trainers)
    assert head["numbers"] == {"episodes": 3.0} and head["columns"].keys() == rollout.keys()
    parts = [ppo.unpack_rollout(head["columns"], tensor.numpy()) for tensor in packed]
    assert sum((~part["resets"]).all(0).sum() for part in parts) == num_envs
    assert not any(part["terminations"].any() for part in parts)


def test_a_column_of_the_wrong_shape_is_named():
    rollout = {"resets": np.zeros((8, 4), bool), "bonus": np.zeros((7, 4))}
    with pytest.raises(ValueError, match=r"rollout\['bonus'\] is \(7, 4\)"):
        ppo.pack_rollout(rollout, {}, ppo.Args(num_steps=7, num_envs=4), 0, 2)


def test_recenter_is_the_decoupled_objective():
    """Hilton et al. 2021, eq. 2: clipped around the updated policy, weighted by its ratio to the one that acted."""
    rng = np.random.default_rng(0)
    agent = ppo.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(4), ppo.Args())
    torch.nn.init.normal_(agent.actor[-1].weight)
    batch = {name: torch.from_numpy(rng.normal(size=64)).float() for name in ("advantages", "returns", "values")}
    batch |= {"obs": torch.randn(64, 3), "actions": torch.randint(4, (64, 1))}
    batch["logprobs"] = torch.from_numpy(rng.normal(-1.4, 0.5, size=64)).float()
    logits = agent.actor(batch["obs"]).detach().double().numpy()
    newest = (logits - np.log(np.exp(logits).sum(1, keepdims=True)))[np.arange(64), batch["actions"][:, 0]]
    behaviour, advantages = batch["logprobs"].double().numpy(), batch["advantages"].double().numpy()
    ppo.recenter(agent, batch)
    logprobs = newest + rng.normal(0, 0.3, size=64)  # of the policy on its way
    outputs = {"logprobs": torch.from_numpy(logprobs).float(), "values": batch["values"], "entropy": torch.zeros(64)}
    weights = torch.full((64,), 1 / 64)
    _, metrics = ppo.ppo_loss(outputs, batch | {"weights": weights}, ppo.Args())
    ratio = np.exp(logprobs - newest)
    gain = np.minimum(ratio * advantages, ratio.clip(0.8, 1.2) * advantages)
    assert metrics["policy_loss"] == pytest.approx(-(np.exp(newest - behaviour) * gain).mean(), rel=1e-4)


def test_gpus_are_those_of_the_trainers_first(monkeypatch):
    """Players on the CPU leave none idle, on one machine or two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)

    def devices(ranks_here: int, **flags) -> list:
        found = []
        for rank in range(8):
            monkeypatch.setenv("LOCAL_RANK", str(rank % ranks_here))
            found.append(ppo.choose_device(ppo.Args(**flags), rank).index)
        return found

    assert devices(4) == [None] * 8
    assert devices(4, cuda=True) == [None, 0, 1, 2, 0, 1, 2, 3]
    assert devices(4, cuda=True, player_on_gpu=True) == [0, 1, 2, 3, 0, 1, 2, 3]
    assert devices(4, cuda=True, num_players=5) == [None] * 5 + [0, 1, 2]
    with pytest.raises(SystemExit, match="--player-on-gpu needs --cuda"):
        devices(4, player_on_gpu=True)
    with pytest.raises(SystemExit, match="--cuda needs more GPUs than the 4 here"):
        devices(8, cuda=True)


SAME = [[], pytest.param(PENDULUM, marks=SLOW), pytest.param(["--compile"], marks=SLOW)]
SAME += [pytest.param([*SHARED, "--env-id", "toy_envs:Lives-v0", "--episodic-life", "--clip-rewards"], marks=SLOW)]


@pytest.mark.parametrize("switches", SAME, ids=" ".join)
def test_a_player_and_a_trainer_have_the_bits_of_one_process(tmp_path, switches):
    flags = [*SMALL, "--total-timesteps", 1024, *switches]
    both = run_probes((DECOUPLED, tmp_path / "two", 2), (TORCH, tmp_path / "one", 1), flags=flags)
    (player, trainer), (one,) = both
    assert len(one["after"]) == 8 and not torch.equal(one["before"], one["after"][0])
    for mine, theirs in zip(trainer["after"], one["after"], strict=True):
        assert torch.equal(mine, theirs)
    assert player["seeds"] == one["seeds"][: len(player["seeds"])]
    for name, tensor in one["state"].items():  # normalisers too; all of it has reached the player
        assert torch.equal(trainer["state"][name], tensor)
        assert torch.equal(player["state"][name], tensor.float())
    logs = [scalars(tmp_path / name) for name in ("two", "one")]
    assert all(logs[0][name] == points for name, points in logs[1].items())


def test_two_players_are_one_with_the_environments_of_both(tmp_path):
    flags = [*SMALL, "--total-timesteps", 384]
    (*players, two), (_, one) = (
        run_probe(DECOUPLED, tmp_path / str(ranks), *flags, *switches, ranks=ranks, GREEDY="1")
        for ranks, switches in ((3, ["--num-players", 2, "--num-envs", 2]), (2, ["--num-envs", 4]))
    )
    assert [player["seeds"] for player in players] == [[1, 2], [3, 4]]
    for mine, theirs in zip(two["batches"], one["batches"], strict=True):
        for name, tensor in theirs.items():
            torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.stack(two["after"]), torch.stack(one["after"]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranks, switches", [(3, SHARED), (4, []), pytest.param(4, SHARED, marks=SLOW)])
def test_trainers_are_one_trainer(tmp_path, ranks, switches):
    """With one minibatch an epoch the order of rows does not matter; three trainers get 2, 1 and 1 environments."""
    flags = [*SMALL, "--total-timesteps", 384]
    sizes = ["--per-rank-batch-size", 128 // (ranks - 1)]
    _, *trainers = run_probe(DECOUPLED, tmp_path / "many", *flags, *sizes, *switches, ranks=ranks)
    _, one = run_probe(DECOUPLED, tmp_path / "one", *flags, "--per-rank-batch-size", 128, ranks=2)
    for trainer in trainers:
        assert trainer["steps"] == one["steps"] == 3 * 2
        torch.testing.assert_close(torch.stack(trainer["after"]), torch.stack(one["after"]), atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "switches", [["--overlap"], pytest.param([], marks=SLOW), pytest.param([*SHARED, "--overlap"], marks=SLOW)]
)
def test_the_acting_policy_lags_behind_by_one_update(tmp_path, switches):
    """Two players, two trainers: rows, statistics, and the policy that acted, each found again by independent means."""
    flags = [*SMALL, "--total-timesteps", 1024, "--num-players", 2, "--normalize-obs", "--normalize-rewards", *switches]
    *players, first, second = run_probe(DECOUPLED, tmp_path, *flags, ranks=4)
    updates = [first["before"], *first["after"]]
    is_late = "--overlap" in switches
    for k in range(4):
        # players act with the parameters before the last update, and get them all
        for player in players:
            assert torch.equal(player["acted"][k], updates[max(k - is_late, 0)])
        assert torch.equal(first["after"][k], second["after"][k])
        # no row is lost, none comes twice
        sent = [rollout["obs"][:-1][~rollout["resets"][:-1]] for rollout in (p["rollouts"][k] for p in players)]
        trainers = (first,) if SHARED[0] in switches else (first, second)
        rows = (
            [torch.cat([t["rows"][k][t["weights"][k] > 0] for t in (first, second)])]
            if len(trainers) == 1
            else [t["rows"][k][t["weights"][k] > 0] for t in trainers]
        )
        used = torch.cat([t["batches"][k]["obs"][r] for t, r in zip(trainers, rows, strict=True)])
        assert torch.equal(*(torch.cat(x)[torch.cat(x)[:, 0].argsort()] for x in ([*sent], [used])))
    seen = torch.cat(
        [p["rollouts"][k]["obs"][:-1][~p["rollouts"][k]["resets"][:-1]] for p in players for k in range(4)]
    )
    for rank in (*players, first, second):
        torch.testing.assert_close(rank["state"]["obs_rms.mean"], seen.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(rank["state"]["obs_rms.std"], seen.std(0, correction=0), atol=1e-4, rtol=1e-3)
    logs = scalars(tmp_path)
    assert [value for _, value in logs["Info/policy_lag"]] == ([0, 1, 1, 1] if is_late else [0] * 4)
    assert len(logs["Loss/policy_loss"]) == len(logs["Info/learning_rate"]) == 4


def test_overlap_corrects_for_the_policy_that_acted(tmp_path):
    """The ratio of the newest policy to the acting one is 1 in the first update only, and weighs the advantages."""
    flags = [*SMALL, "--total-timesteps", 512, "--overlap"]
    player, trainer = run_probe(DECOUPLED, tmp_path, *flags, ranks=2)
    updates = [trainer["before"], *trainer["after"]]
    for k in range(4):
        before, batch = trainer["received"][k], trainer["batches"][k]
        with torch.no_grad():
            acting = vector_agent(player["acted"][k])(before)["logprobs"]
            newest = vector_agent(updates[k])(before)["logprobs"]
        torch.testing.assert_close(before["logprobs"], acting, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch["logprobs"], newest, atol=1e-5, rtol=1e-5)
        ratio = (newest - acting).exp()
        assert ((ratio - 1).abs().max() > 0.01) == (k > 0)
        torch.testing.assert_close(batch["advantages"], before["advantages"] * ratio, atol=1e-4, rtol=1e-4)


@SLOW
def test_trainers_stop_together_on_target_kl(tmp_path):
    flags = [*SMALL, "--update-epochs", 20, "--total-timesteps", 1024, "--target-kl", 0.002]
    _, *trainers = run_probe(DECOUPLED, tmp_path, *flags, ranks=4)
    assert len({trainer["steps"] for trainer in trainers}) == 1 and trainers[0]["steps"] < 8 * 20
    assert all(torch.equal(trainer["after"][-1], trainers[0]["after"][-1]) for trainer in trainers)


@pytest.mark.parametrize("switches", [["--overlap"], pytest.param([], marks=SLOW)])
def test_the_times_explain_the_iteration(tmp_path, switches):
    run_probe(DECOUPLED, tmp_path, *SMALL, "--total-timesteps", 4096, "--update-epochs", 40, *switches, ranks=2)
    (events,) = {path.parent for path in tmp_path.rglob("events.*")}
    log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    times = {tag: np.array([point.value for point in log.Scalars(tag)]) for tag in log.Tags()["scalars"]}
    trainer = sum(times[f"Time/{name}"] for name in ("trainer_wait", "batch", "communication", "update"))
    steps = np.diff([0, *(point.step for point in log.Scalars("Time/step_per_second"))])
    np.testing.assert_allclose(times["Time/step_per_second"], steps / trainer, rtol=1e-4)
    assert (times["Time/rollout"] > 0).all() and (times["Time/player_wait"][1:] > 0).all()
    if not switches:  # they take turns: the trainer waits while the player steps, and the other way round
        player = times["Time/rollout"][1:] + times["Time/player_wait"][1:]
        assert np.median(player / trainer[1:]) == pytest.approx(1, abs=0.25)
        assert np.median(times["Time/trainer_wait"] / times["Time/rollout"]) > 0.7
