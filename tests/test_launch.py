"""The shipped files on many ranks; forked ones, and the real launchers where these are what is tested."""

import os
import re
import shutil
import signal
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_torch_ddp as ppo
from launch import (
    BIN,
    ROOT,
    TESTS,
    Command,
    fabric_run,
    free_port,
    real_fabric_run,
    real_torchrun,
    run,
    torchrun,
)
from toy_envs import PUZZLES, puzzle_flags

TORCH, FABRIC, DECOUPLED = ROOT / "ppo_torch_ddp.py", ROOT / "ppo_fabric.py", ROOT / "ppo_fabric_decoupled.py"
PROBE = TESTS / "probe.py"
LAUNCHERS = {TORCH: torchrun, FABRIC: fabric_run, DECOUPLED: fabric_run}
REAL_LAUNCHERS = {TORCH: real_torchrun, FABRIC: real_fabric_run, DECOUPLED: real_fabric_run}
SLOW = pytest.mark.slow
NAMES = {"ids": lambda value: value.stem if isinstance(value, Path) else None}
TCP = ["--tcp-all-reduce"]
SMALL = ["--num-steps", 32, "--per-rank-batch-size", 32, "--update-epochs", 2, "--eval-episodes", 2]


def run_probe(file: Path, folder: Path, *flags, ranks: int = 1, **env: str) -> list[dict]:
    """Run a file's `main` on so many ranks; what probe.py noted on each."""
    return run_probes((file, folder, ranks), flags=flags, **env)[0]


def run_probes(*runs: tuple[Path, Path, int], flags: list, **env: str) -> list[list[dict]]:
    """The same for several (file, folder, ranks) at a time."""
    commands = []
    for file, folder, ranks in runs:
        folder.mkdir(exist_ok=True)
        command = [*LAUNCHERS[file](ranks), PROBE, file, folder, *flags]
        commands.append(Command(command, cwd=folder, **env))
    for status, output in [command.finish() for command in commands]:
        assert status == 0, output
    return [[torch.load(folder / f"{rank}.pt") for rank in range(ranks)] for _, folder, ranks in runs]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) of the only run below a folder, but the times."""
    (events,) = {path.parent for path in folder.rglob("events.*")}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("Time/")]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("share_data", [False, True])
def test_two_ranks_train_on_different_rollouts_and_agree(tmp_path, share_data):
    flags = [*SMALL, "--total-timesteps", 1024, *(["--share-data"] if share_data else [])]
    first, second = run_probe(TORCH, tmp_path, *flags, ranks=2)
    iterations = 1024 // (2 * 4 * 32)
    assert first["steps"] == second["steps"] == iterations * 2 * (4 * 32 // 32)
    assert len(first["after"]) == iterations
    assert torch.equal(first["before"], second["before"])
    for mine, yours in zip(first["after"], second["after"], strict=True):
        assert torch.equal(mine, yours)
    assert not torch.equal(first["before"], first["after"][0])
    for mine, yours in zip(first["batches"], second["batches"], strict=True):
        assert torch.equal(mine["obs"], yours["obs"]) == share_data
        if share_data:  # both hold both rollouts, which differ
            a, b = mine["obs"].chunk(2)
            assert len(mine["obs"]) == 2 * 4 * 32 and not torch.isin(a, b).all()
    batches = [first["batches"]] if share_data else [first["batches"], second["batches"]]
    assert_normalised(list(zip(*batches, strict=True)), tmp_path)


def assert_normalised(iterations: list[tuple[dict, ...]], folder: Path) -> None:
    """The valid advantages of all parts of an iteration's batch have mean 0 and deviation 1, and they are the steps."""
    for parts in iterations:
        advantages = [part["advantages"][part["valid"]] for part in parts]
        whole = torch.cat(advantages)
        assert abs(whole.mean()) < 1e-4 and abs(whole.std(correction=0) - 1) < 1e-3
        assert len(parts) == 1 or max(abs(part.mean()) for part in advantages) > 1e-3  # of all ranks, not of each
    steps = sum(int(part["valid"].sum()) for parts in iterations for part in parts)
    assert scalars(folder)["Loss/policy_loss"][-1][0] == steps


@pytest.mark.parametrize("switches", [[], TCP], ids=["ddp", "tcp"])
def test_sharing_ranks_equal_one_process_with_the_same_rows(tmp_path, switches):
    """Two ranks with --share-data take the steps that one process takes on all the rows."""
    flags = [*SMALL, "--total-timesteps", 1024, "--share-data", *switches]
    first, second = run_probe(TORCH, tmp_path, *flags, ranks=2)
    assert first["reduces"] == second["reduces"] == ("tcp_all_reduce" if switches else "sum_over_ranks")
    args = ppo.Args(update_epochs=2)
    agent = ppo.Agent(*cartpole_spaces(), ppo.Args())
    torch.nn.utils.vector_to_parameters(first["before"].clone(), agent.parameters())
    optimizer = torch.optim.Adam([ppo.flatten_parameters(agent)], lr=args.learning_rate, eps=1e-5, fused=True)
    generator = torch.Generator()
    minibatches = partial(ppo.shuffle, num_minibatches=4, generator=generator, part=0, num_parts=1)
    for iteration, (batch, after) in enumerate(zip(first["batches"], first["after"], strict=True)):
        generator.manual_seed(np.random.SeedSequence((1, iteration * 2 * 4 * 32)).generate_state(4).tolist()[1])
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / len(first["after"]))
        assert not batch["valid"].all()  # so that the ranks' counts of valid rows differ
        ppo.update(agent, optimizer, batch, args, minibatches, None, ppo.sum_over_ranks, 1)
        parameters = torch.nn.utils.parameters_to_vector(agent.parameters())
        torch.testing.assert_close(parameters, after, atol=2e-5, rtol=1e-4)
        assert torch.equal(after, second["after"][iteration])


def test_two_ranks_over_tcp_have_the_bits_of_ddp(tmp_path):
    """Of two summands the sum is the same in any order, and half of it is exact."""
    flags = [*SMALL, "--total-timesteps", 1024]
    ddp, _ = run_probe(TORCH, tmp_path / "ddp", *flags, ranks=2)
    tcp, _ = run_probe(TORCH, tmp_path / "tcp", *flags, *TCP, ranks=2)
    assert (ddp["reduces"], tcp["reduces"]) == ("sum_over_ranks", "tcp_all_reduce")
    for mine, yours in zip(ddp["after"], tcp["after"], strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("file", [TORCH, pytest.param(FABRIC, marks=SLOW)])
def test_ranks_whose_parameters_differ_go_on_with_those_of_rank_0(tmp_path, file):
    """The third update of rank 1 ends elsewhere: rank 0 does not notice, the fourth starts from rank 0's."""
    flags = ["--total-timesteps", 1024, *SMALL, *TCP]
    (tmp_path / "drifting").mkdir()
    command = [*LAUNCHERS[file](2), PROBE, file, tmp_path / "drifting", *flags]
    output = run(command, cwd=tmp_path / "drifting", DRIFTS="1")
    assert output.count("iteration 3: the ranks' parameters differ") == output.count("differ") == 1
    first, second = (torch.load(tmp_path / "drifting" / f"{rank}.pt")["after"] for rank in range(2))
    equal = [torch.equal(mine, yours) for mine, yours in zip(first, second, strict=True)]
    assert equal == [True, True, False, True]
    undisturbed, _ = run_probe(file, tmp_path / "undisturbed", *flags, ranks=2)
    for mine, yours in zip(first, undisturbed["after"], strict=True):
        assert torch.equal(mine, yours)


def cartpole_spaces() -> tuple[gym.Space, gym.Space]:
    envs, _ = ppo.make_envs(ppo.Args(), 1, 0)
    return envs.single_observation_space, envs.single_action_space


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_logs_the_same(tmp_path, ranks):
    folders, commands = (tmp_path / "a", tmp_path / "b"), []
    for folder in folders:
        folder.mkdir()
        command = [*torchrun(ranks), TORCH, *SMALL, "--total-timesteps", 2048, "--eval-every", 2]
        commands.append(Command(command, cwd=folder))
    assert [command.finish()[0] for command in commands] == [0, 0]
    logs = [scalars(folder / "logs" / "torch_logs") for folder in folders]
    assert logs[0] == logs[1]
    iterations = 2048 // (ranks * 4 * 32)
    once_an_iteration = (
        "Loss/policy_loss Loss/value_loss Loss/entropy_loss Loss/approx_kl Loss/clip_fraction Loss/grad_norm "
        "Loss/explained_variance Info/entropy Info/learning_rate"
    )
    for tag in once_an_iteration.split():
        steps = [step for step, _ in logs[0][tag]]
        assert len(steps) == iterations and steps == sorted(set(steps)) and steps[-1] < 2048  # reset rows left out
        assert np.isfinite([value for _, value in logs[0][tag]]).all()
    assert len(logs[0]["Test/cumulative_reward"]) == iterations // 2
    assert logs[0]["Rewards/rew_avg"] and logs[0]["Game/ep_len_avg"] == logs[0]["Rewards/rew_avg"]  # CartPole pays 1


@pytest.mark.parametrize("file", [TORCH, *(pytest.param(file, marks=SLOW) for file in (FABRIC, DECOUPLED))], **NAMES)
def test_two_machines_and_no_seed_twice(tmp_path, file):
    """Two agents of the launcher on this machine, two ranks each; every environment of the run has a seed of its own.

    Those are 16 and the evaluation's two; decoupled, 8 of two players, the evaluation's, and two that trainers look at.
    """
    diary, port = tmp_path / "diary", free_port()
    diary.mkdir()
    flags = [*SMALL, "--total-timesteps", 2 * 4 * 4 * 32, "--env-id", "toy_envs:Diary-v0", "--seed", 5]
    flags += {TORCH: TCP, FABRIC: [], DECOUPLED: ["--num-players", 2, "--num-envs", 8]}[file]
    machines = []
    for rank, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        launcher = [BIN / "torchrun", "--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        launcher += [f"--rdzv_endpoint=localhost:{port}"]
        if file != TORCH:
            launcher = [BIN / "fabric", "run", "--accelerator=cpu", "--num-nodes=2", "--devices=2"]
            launcher += [f"--node-rank={rank}", "--main-address=127.0.0.1", f"--main-port={port}"]
        machines.append(Command([*launcher, file, *flags], cwd=tmp_path / name, DIARY=str(diary)))
    results = [machine.finish() for machine in machines]
    assert [status for status, _ in results] == [0, 0], results
    seeds = sorted(int(path.read_text()) for path in diary.iterdir())
    assert len(seeds) == 4 * 4 + 2 + 2 * (file == DECOUPLED) and len(set(seeds)) == len(seeds) and min(seeds) == 5
    assert {path.name.split("-")[0] for path in diary.iterdir()} == {"0", "1", "2", "3"}
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 2  # and rank 0 alone writes


SAME_BITS = [("CartPole-v1", 1, []), ("CartPole-v1", 2, TCP), ("Pendulum-v1", 2, [])]
MORE_BITS = [("CartPole-v1", 1, ["--share-data"]), ("CartPole-v1", 2, []), ("CartPole-v1", 2, ["--share-data"])]
MORE_BITS += [("CartPole-v1", 1, ["--compile"]), ("CartPole-v1", 2, ["--compile"])]
MORE_BITS += [("Pendulum-v1", 2, [*TCP, "--compile"]), ("Pendulum-v1", 2, [*TCP, "--share-data"])]
MORE_BITS += [("Pendulum-v1", ranks, switches) for ranks, switches in ((1, []), (1, TCP), (2, ["--share-data"]))]
SAME_BITS += [pytest.param(*case, marks=SLOW) for case in MORE_BITS]


@pytest.mark.parametrize("env_id, ranks, switches", SAME_BITS)
def test_the_coupled_twins_end_with_the_same_bits(tmp_path, env_id, ranks, switches):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", env_id, *switches]
    flags += ["--normalize-obs", "--normalize-rewards"] if env_id == "Pendulum-v1" and ranks == 2 else []
    both = run_probes(*((file, tmp_path / file.stem, ranks) for file in (TORCH, FABRIC)), flags=flags)
    for mine, yours in zip(*both, strict=True):
        names = ("sum_over_ranks", "all_reduce")
        names = ("tcp_all_reduce", "tcp_all_reduce") if "--tcp-all-reduce" in switches and ranks > 1 else names
        assert (mine["reduces"], yours["reduces"]) == names
        assert mine["steps"] == yours["steps"] == 1024 // (ranks * 4 * 32) * 2 * 4
        assert torch.equal(mine["after"][-1], yours["after"][-1])
        assert not torch.equal(mine["before"], mine["after"][-1])


def test_the_compiled_update_of_the_decoupled_file_has_the_bits_of_one_process(tmp_path):
    flags = [*SMALL, "--total-timesteps", 1024, "--compile"]
    both = run_probes(*((file, tmp_path / file.stem, n) for file, n in ((TORCH, 1), (DECOUPLED, 2))), flags=flags)
    for mine, yours in zip(both[0][0]["after"], both[1][1]["after"], strict=True):
        assert torch.equal(mine, yours)
    (eager,) = run_probe(TORCH, tmp_path / "eager", *flags[:-1])
    assert torch.equal(eager["before"], both[0][0]["before"])
    assert not torch.equal(eager["after"][-1], both[0][0]["after"][-1])  # its sums are in another order
    torch.testing.assert_close(eager["after"][0], both[0][0]["after"][0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("file, ranks", [(TORCH, 1), *(pytest.param(f, 2, marks=SLOW) for f in (FABRIC, DECOUPLED))])
def test_a_compiler_that_is_missing_is_named(tmp_path, file, ranks):
    script = tmp_path / "script.py"  # what $CXX sets as torch is imported
    script.write_text(
        "import runpy, sys, torch._inductor.config as config\n"
        "config.cpp.cxx = (None, 'nowhere')\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    command = [*LAUNCHERS[file](ranks), script, file, "--compile"]
    command = Command(command, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    status, output = command.finish()
    assert status != 0 and "error: --compile: " in output, output


def test_the_coupled_twins_log_the_same(tmp_path):
    logs = []
    for file, folder in ((TORCH, "torch_logs"), (FABRIC, "fabric_logs")):
        run([*LAUNCHERS[file](2), file, *SMALL, "--total-timesteps", 1024, "--target-kl", 0.01], cwd=tmp_path)
        logs.append(scalars(tmp_path / "logs" / folder))
    assert logs[0].keys() == logs[1].keys()
    for tag in logs[0]:
        assert logs[0][tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in logs[1][tag]]


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_one_player_and_one_trainer_end_with_the_bits_of_one_process(tmp_path, env_id):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", env_id]
    flags += ["--normalize-obs", "--normalize-rewards"] if env_id == "Pendulum-v1" else []  # it has reset rows, too
    both = run_probes(*((file, tmp_path / file.stem, n) for file, n in ((TORCH, 1), (DECOUPLED, 2))), flags=flags)
    one, trainer = both[0][0], both[1][1]
    for mine, yours in zip(one["after"], trainer["after"], strict=True):
        assert torch.equal(mine, yours)
    assert one["steps"] == trainer["steps"] == 1024 // (4 * 32) * 2 * 4
    logs = [scalars(tmp_path / file.stem / "logs") for file in (TORCH, DECOUPLED)]
    assert logs[0] == {tag: points for tag, points in logs[1].items() if tag != "Info/policy_lag"}
    assert {value for _, value in logs[1]["Info/policy_lag"]} == {0}


def test_sharing_trainers_equal_one_process_with_minibatches_of_their_sum(tmp_path):
    """One player and two trainers with --share-data take the steps of one process of the torch file."""
    flags = [*SMALL, "--total-timesteps", 1024, "--per-rank-batch-size"]
    (one,) = run_probe(TORCH, tmp_path / "one", *flags, 64)
    _, *trainers = run_probe(DECOUPLED, tmp_path / "shared", *flags, 32, "--share-data", ranks=3)
    for trainer in trainers:
        for mine, yours in zip(one["after"], trainer["after"], strict=True):
            torch.testing.assert_close(mine, yours, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("players, switches", [pytest.param(2, [], marks=SLOW), (1, ["--overlap"])])
def test_the_times_of_player_and_trainer_explain_the_iteration(tmp_path, players, switches):
    flags = ["--total-timesteps", 10240, "--eval-episodes", 0, "--num-players", players, *switches]
    allowed = sorted(os.sched_getaffinity(0))
    notes = run_probe(DECOUPLED, tmp_path, *flags, ranks=players + 1, CPUS="2")
    cpus = [[cpu] for cpu in allowed[:2]] if switches and len(allowed) > 1 else [allowed[:2]] * (players + 1)
    assert [note["cpus"] for note in notes] == cpus  # with overlap, each of two ranks has one of its own
    (events,) = {path.parent for path in tmp_path.rglob("events.*")}
    points = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars
    duration = points("Time/step_per_second")[-1].wall_time - points("Time/step_per_second")[0].wall_time
    seconds = {}
    for tags in (
        ("Time/rollout", "Time/player_wait", "Time/communication"),
        ("Time/update", "Time/trainer_wait", "Time/trainer_communication"),
    ):
        seconds |= {tag: sum(point.value for point in points(tag)[1:]) for tag in tags}
        assert 0.85 * duration < sum(seconds[tag] for tag in tags) < 1.1 * duration  # logging is in none of them
    if not switches:  # one side works while the other waits
        assert 0.7 * seconds["Time/update"] < seconds["Time/player_wait"]
        assert 0.7 * seconds["Time/rollout"] < seconds["Time/trainer_wait"]


ROWS = [(False, True), *(pytest.param(*case, marks=SLOW) for case in ((False, False), (True, False), (True, True)))]


@pytest.mark.parametrize("share_data, overlap", ROWS)
def test_trainers_get_the_rows_of_all_players(tmp_path, share_data, overlap):
    """Two players, three trainers, 2 x 4 x 32 rows, which three does not divide."""
    switches = [*(["--share-data"] if share_data else []), *(["--overlap"] if overlap else [])]
    flags = [*SMALL, "--total-timesteps", 1024, "--num-players", 2, *switches]
    folders = [tmp_path / "a", tmp_path / "b"][: 1 + overlap]  # with overlap twice: it must not race
    runs = [notes[2:] for notes in run_probes(*((DECOUPLED, folder, 5) for folder in folders), flags=flags)]
    for iteration in range(4):
        for run_ in runs:  # the trainers agree, and the same command does the same
            for trainer in run_:
                assert torch.equal(trainer["after"][iteration], runs[0][0]["after"][iteration])
        batches = [trainer["batches"][iteration] for trainer in runs[0]]
        rows = [batch["obs"][batch["valid"]] for batch in batches]
        if share_data:
            assert [len(batch["valid"]) for batch in batches] == [256] * 3
            assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
        else:
            assert [len(batch["valid"]) for batch in batches] == [2 * 43] * 3  # 128 rows of a player make 3 x 43 - 1
            assert sum(len(batch["valid"]) - batch["valid"].sum() for batch in batches) >= 2
            rows = [torch.cat(rows)]
        assert len(rows[0].unique(dim=0)) == len(rows[0])  # no row twice
    trainers = runs[0][:1] if share_data else runs[0]
    sent = "received" if overlap else "batches"
    assert_normalised(list(zip(*(trainer[sent] for trainer in trainers), strict=True)), tmp_path / "a")
    minibatches = round(256 / (32 * 3))  # with or without sharing
    assert all(trainer["steps"] == 4 * 2 * minibatches for trainer in runs[0])
    assert_acted(runs[0][0], runs[0][0][sent], lag=int(overlap))
    if overlap:  # what is updated with is as if the policy that is updated had acted
        assert_acted(runs[0][0], runs[0][0]["batches"], lag=0)
    logs = scalars(tmp_path / "a")
    assert not overlap or logs == scalars(tmp_path / "b")
    assert [value for _, value in logs["Info/policy_lag"]] == ([0, 1, 1, 1] if overlap else [0] * 4)
    assert len(logs["Loss/policy_loss"]) == len(logs["Info/learning_rate"]) == 4


def assert_acted(notes: dict, batches: list[dict], lag: int) -> None:
    """The log-probabilities of rollout k are those of the parameters after update k - 1 - lag, and of no other's."""
    parameters = [notes["before"]] * 2 + notes["after"]
    agent = ppo.Agent(*cartpole_spaces(), ppo.Args())
    for k, batch in enumerate(batches):
        for other in (0, 1):
            torch.nn.utils.vector_to_parameters(parameters[k + 1 - other].clone(), agent.parameters())
            with torch.no_grad():
                log_probs = agent(batch["obs"], batch["actions"])[0]
            acted = torch.allclose(log_probs, batch["log_probs"], atol=1e-5)
            assert acted == (other == lag or k == 0)


@pytest.mark.parametrize("file, ranks", [(TORCH, 2), pytest.param(FABRIC, 2, marks=SLOW), (DECOUPLED, 3)], **NAMES)
def test_training_ranks_stop_together_on_target_kl(tmp_path, file, ranks):
    flags = [*SMALL, "--total-timesteps", 512, "--target-kl", 1e-9, "--env-id", "toy_envs:Truncated-v0"]
    notes = run_probe(file, tmp_path, *flags, ranks=ranks)[-2:]
    minibatches = 4 * 32 // 32 if file != DECOUPLED else 4 * 32 // 2 // 32
    for note in notes:  # the first epoch of each update and no more
        assert note["steps"] == len(note["after"]) * minibatches and len(note["after"]) >= 2
    first, second = (note["batches"][0] for note in notes)
    assert torch.equal(first["obs"], second["obs"])  # constants: only the ranks' noise can make their actions differ
    assert file == DECOUPLED or not torch.equal(first["actions"], second["actions"])


TWO_PLAYERS = ["--num-players", "2", "--overlap"]
KILLED = [(3, 0, []), pytest.param(3, 1, [], marks=SLOW)]
KILLED += [pytest.param(3, rank, ["--overlap"], marks=SLOW) for rank in (0, 2)]
KILLED += [pytest.param(4, rank, TWO_PLAYERS, marks=SLOW) for rank in range(4)]


@pytest.mark.parametrize("ranks, rank, switches", KILLED)
def test_a_killed_rank_ends_the_decoupled_run(tmp_path, ranks, rank, switches):
    flags = ["--total-timesteps", 10_000_000, "--env-id", "toy_envs:Diary-v0", *switches]
    command = Command([*fabric_run(ranks), DECOUPLED, *flags], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("events.*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.rglob("events.*"))
    time.sleep(2)
    os.kill(command.rank_pid(rank), signal.SIGKILL)
    status, output = command.finish(timeout=30)
    assert status != 0 and "SIGKILL" in output


def test_fabric_options(tmp_path):
    commands = []
    for option in ("--strategy=ddp", "--precision=bf16-mixed"):
        (tmp_path / option).mkdir()
        command = [*fabric_run(1, option), FABRIC, *SMALL, "--total-timesteps", 512]
        commands.append(Command(command, cwd=tmp_path / option))
    for status, output in [command.finish() for command in commands]:
        assert status == 0 and "greedy return" in output, output
    losses = [scalars(folder)["Loss/value_loss"][0][1] for folder in tmp_path.iterdir()]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)  # the precision has an effect


VIDEOS = [
    (TORCH, "CartPole-v1", "sync"),
    pytest.param(TORCH, "CartPole-v1", "async", marks=SLOW),
    pytest.param(TORCH, "CartPole-v1", "native", marks=SLOW),
    (FABRIC, "Pendulum-v1", "sync"),
    (DECOUPLED, "CartPole-v1", "sync"),
]


@pytest.mark.parametrize("file, env_id, vec_env", VIDEOS, **NAMES)
def test_a_lone_copy_runs_and_makes_videos(tmp_path, file, env_id, vec_env):
    shutil.copy(file, tmp_path)
    flags = [*SMALL, "--total-timesteps", 2048, "--capture-video", "--env-id", env_id, "--vec-env", vec_env]
    output = run([*LAUNCHERS[file](2 if file == DECOUPLED else 1), file.name, *flags], cwd=tmp_path, PYTHONPATH="")
    assert "greedy return" in output
    videos = {path.parent.name.split("-")[0] for path in tmp_path.rglob("*.mp4") if path.stat().st_size > 1000}
    assert videos == {"train", "test"}


KINDS = [name if name == "Float64-Box" else pytest.param(name, marks=SLOW) for name in PUZZLES]


FABRIC_TOO = pytest.param(FABRIC, 2, 2, marks=SLOW)  # it ends with the torch file's bits


@pytest.mark.parametrize("file, ranks, trainers", [(TORCH, 2, 2), FABRIC_TOO, (DECOUPLED, 3, 2)], **NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_space_is_learned_on_many_ranks(tmp_path, name, file, ranks, trainers):
    sizes = ["--num-envs", 8 // (ranks - trainers or 2), "--per-rank-batch-size", 64 // trainers]
    flags = ["--no-normalize-advantages"]
    for flag, value in puzzle_flags(name).items():
        flags += [f"--{flag.replace('_', '-')}", value] if value is not False else []
    run([*LAUNCHERS[file](ranks), file, *flags, *sizes], cwd=tmp_path, timeout=120)
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] >= (9.2 if "Box" in name else 9.8)


@pytest.mark.parametrize("file, ranks, actors", [(TORCH, 2, 2), FABRIC_TOO, (DECOUPLED, 4, 2)], **NAMES)
def test_normalisers_hold_the_statistics_of_all_ranks_and_make_the_evaluation(tmp_path, file, ranks, actors):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", "Pendulum-v1", "--env-kwargs", '{"max_episode_steps": 50}']
    flags += ["--normalize-obs", "--normalize-rewards"]
    notes = run_probe(file, tmp_path, *flags, *(["--num-players", 2] if file == DECOUPLED else []), ranks=ranks)[
        :actors
    ]
    states = [note["state"] for note in notes]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    for normalizer, size in (("raw_obs", 3), ("discounted_returns", 1)):
        rows = torch.cat([row for note in notes for row in note["normalised"][size]]).double().numpy()
        assert len(rows) == 1024 - 2 * 8  # of 128 rows of each environment two are resets
        np.testing.assert_allclose(states[0][f"normalizers.{normalizer}.mean"], rows.mean(0), rtol=1e-9)
        squares = states[0][f"normalizers.{normalizer}.squares"]
        np.testing.assert_allclose(squares / len(rows), rows.var(0), rtol=1e-9)
    short = {"env_id": "Pendulum-v1", "env_kwargs": '{"max_episode_steps": 50}', "eval_episodes": 2}
    args = ppo.Args(normalize_obs=True, normalize_rewards=True, **short)
    agent = ppo.Agent(gym.spaces.Box(-8, 8, (3,)), gym.spaces.Box(-1, 1, (1,)), args)
    agent.load_state_dict(states[0])
    logged = scalars(tmp_path)["Test/cumulative_reward"][-1][1]
    assert ppo.evaluate(agent, args, seed=1 + 2 * 4).mean() == pytest.approx(logged, rel=1e-6)
    for name, buffer in agent.normalizers.named_buffers():
        assert torch.equal(buffer, states[0][f"normalizers.{name}"]), "evaluation must leave the statistics alone"


def test_environment_of_ones_own_with_keyword_arguments(tmp_path):
    flags = [*SMALL, "--total-timesteps", 512, "--env-id", "toy_envs:Terminated-v0", "--env-kwargs", '{"length": 7}']
    run([*torchrun(1), TORCH, *flags], cwd=tmp_path)
    logs = scalars(tmp_path)
    assert {value for _, value in logs["Game/ep_len_avg"]} == {7} and logs["Test/cumulative_reward"][-1][1] == 7


VECTOR_ENVS = [
    (TORCH, 2, "LunarLander-v3", "envpool"),
    (TORCH, 2, "CartPole-v1", "async"),
    pytest.param(DECOUPLED, 3, "ALE/Pong-v5", "native", marks=SLOW),
    pytest.param(FABRIC, 2, "HalfCheetah-v5", "envpool", marks=SLOW),
    pytest.param(TORCH, 2, "Pendulum-v1", "envpool", marks=SLOW),
    pytest.param(TORCH, 2, "ALE/Pong-v5", "native", marks=SLOW),
    pytest.param(DECOUPLED, 2, "Pong-v5", "envpool", marks=SLOW),
]


@pytest.mark.parametrize("file, ranks, env_id, vec_env", VECTOR_ENVS, **NAMES)
def test_vector_environments_of_others(tmp_path, file, ranks, env_id, vec_env):
    flags = ["--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1, "--eval-episodes", 0]
    flags += ["--total-timesteps", 256]
    notes = run_probe(file, tmp_path, *flags, "--env-id", env_id, "--vec-env", vec_env, ranks=ranks)
    batches = [note["batches"][0] for note in notes if note["batches"]]
    if "Pong" in env_id:
        assert all(batch["obs"].dtype == torch.uint8 and batch["obs"].shape[1:] == (4, 84, 84) for batch in batches)
    firsts = [batch["obs"][batch["valid"]] for batch in batches]
    if file != DECOUPLED:
        assert not torch.equal(*firsts)  # no two ranks with the same seeds
    assert len(scalars(tmp_path)["Loss/policy_loss"]) >= 2


BAD = {
    "unknown environment": ("--env-id NoSuch-v0", "NoSuch"),
    "observation space": ("--env-id toy_envs:TextObs-v0", "wrappers.TransformObservation"),
    "zero updates": ("--total-timesteps 1000", "--total-timesteps 1000"),
    "batch": ("--per-rank-batch-size 513", "--per-rank-batch-size 513"),
    "negative size": ("--num-envs -1", "--num-envs"),
    "zero size": ("--num-steps 0", "--num-steps"),
    "no GPU": ("--cuda", "--cuda"),
    "NaN in the last observation": (
        "--env-id toy_envs:NanObs-v0 --num-steps 5 --per-rank-batch-size 4",
        "not finite: 8 observations, 0 rewards",
    ),
    "divergence": ("--learning-rate 1e30", "not finite: "),
    "NaN observation": ("--env-id toy_envs:NanObsBox-v0", " observations, 0 rewards"),
    "NaN reward": ("--env-id toy_envs:NanReward-v0", ": 0 observations, "),
}


BAD_FOR_FABRIC = {
    "strategy": (["--strategy=fsdp"], "", "FSDP"),
    "precision": (["--precision=64-true"], "", "--precision"),
    "precision, compiled": (["--precision=bf16-mixed"], "--compile", "--precision"),
    "unknown environment": ([], "--env-id NoSuch-v0", "NoSuch"),
    "zero updates": ([], "--total-timesteps 1000", "--total-timesteps 1000"),
    "negative size": ([], "--num-envs -1", "--num-envs"),
    "batch": ([], "--per-rank-batch-size 513", "--per-rank-batch-size 513"),
    "observation space": ([], "--env-id toy_envs:TextObs-v0", "wrappers.TransformObservation"),
    "NaN observation": ([], "--env-id toy_envs:NanObsBox-v0", " observations, 0 rewards"),
    "NaN reward": ([], "--env-id toy_envs:NanReward-v0", ": 0 observations, "),
    "divergence": ([], "--learning-rate 1e30", "not finite: "),
}


BAD_FOR_DECOUPLED = {
    "players": (2, "--num-players 2", "--num-players 2 of 2 ranks"),
    "trainers": (4, "--num-envs 1 --num-steps 2 --per-rank-batch-size 1", "3 trainers"),
    "player on a GPU": (2, "--player-on-gpu", "--player-on-gpu needs --cuda"),
    "no GPU": (2, "--cuda", "--cuda needs more GPUs"),
    "no GPU for a player": (2, "--cuda --player-on-gpu", "--player-on-gpu needs more GPUs"),
    "trainers and two players": (
        5,
        "--num-players 2 --num-envs 1 --num-steps 2 --per-rank-batch-size 1",
        "3 trainers are more than the 2 rows",
    ),
    "unknown environment": (3, "--env-id NoSuch-v0", "NoSuch"),
    "zero updates": (2, "--total-timesteps 500", "--total-timesteps 500"),
    "NaN reward": (3, "--env-id toy_envs:NanReward-v0 --overlap", ": 0 observations, "),
    "NaN observation": (4, "--env-id toy_envs:NanObsBox-v0 --num-players 2", " observations, 0 rewards"),
    "divergence": (3, "--learning-rate 1e30", "not finite: "),
    "divergence, overlap": (3, "--learning-rate 1e30 --overlap", "not finite: "),
}


def cases(names: Iterable[str], *fast: str) -> list:
    """All names, those not in `fast` marked as slow: a launcher takes seconds to start, and they are many."""
    return [name if name in fast else pytest.param(name, marks=SLOW) for name in names]


def fails(command: list, folder: Path, said: str) -> str:
    """An end soon, no process left, a status that is not 0, and the cause in the last line of the output returned.

    Soon is 10 seconds more than starting up takes: the launcher, the imports, and the flags that are read.
    """
    start_time = time.monotonic()
    status, output = Command(command, cwd=folder).finish()
    seconds = time.monotonic() - start_time
    assert status != 0
    if seconds > 10:
        start_time = time.monotonic()
        (file,) = [i for i, word in enumerate(command) if word in LAUNCHERS]
        assert Command([*command[: file + 1], "-h"], cwd=folder).finish()[0] == 0
        assert seconds <= time.monotonic() - start_time + 10, output
    assert said in last_line(output), output
    return output


def fails_with_one_line(command: list, folder: Path, said: str) -> None:
    """The same, and that line is the only message; no traceback."""
    output = fails(command, folder, said)
    last = last_line(output)
    assert all(last in line for line in re.findall(r"error: .*", output)), output  # all ranks that say it say the same
    assert not re.search(r'ppo_\w+.py", line', output), output


def last_line(output: str) -> str:
    """The error that the output ends with: as a line of its own, or as the last of a launcher's report."""
    *_, last = [line for line in output.splitlines() if not re.fullmatch("=*", line)]
    assert re.match("(  traceback : )?error: ", last), output
    return last.removeprefix("  traceback : ")


@pytest.mark.parametrize("case", cases(BAD, "unknown environment", "no GPU", "NaN observation"))
def test_bad_input_to_the_torch_file(tmp_path, case):
    flags, said = BAD[case]
    fails_with_one_line([*torchrun(2), TORCH, *flags.split()], tmp_path, said)


@pytest.mark.parametrize("case", cases(BAD_FOR_FABRIC))
def test_bad_input_to_the_fabric_file(tmp_path, case):
    options, flags, said = BAD_FOR_FABRIC[case]
    fails_with_one_line([*fabric_run(2, *options), FABRIC, *flags.split()], tmp_path, said)


@pytest.mark.parametrize("case", cases(BAD_FOR_DECOUPLED))
def test_bad_input_to_the_decoupled_file(tmp_path, case):
    ranks, flags, said = BAD_FOR_DECOUPLED[case]
    fails_with_one_line([*fabric_run(ranks), DECOUPLED, *flags.split()], tmp_path, said)


ONE_RANK = {
    "python": torchrun(1),
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node=1"],
    "fabric run": [BIN / "fabric", "run", "--accelerator=cpu", "--devices=1"],
}


@pytest.mark.parametrize("launcher", cases(ONE_RANK, "python"))
def test_one_rank_is_too_few_for_the_decoupled_file(tmp_path, launcher):
    fails_with_one_line([*ONE_RANK[launcher], DECOUPLED], tmp_path, "--num-players 1 of 1 ranks")


@pytest.mark.parametrize("case", cases(("players", "trainers", "player on a GPU", "no GPU"), "players"))
def test_bad_ranks_of_the_decoupled_file_under_torchrun(tmp_path, case):
    ranks, flags, said = BAD_FOR_DECOUPLED[case]
    fails_with_one_line([*torchrun(ranks), DECOUPLED, *flags.split()], tmp_path, said)


def test_torchrun_is_not_for_the_fabric_file(tmp_path):
    fails_with_one_line([*torchrun(2), FABRIC], tmp_path, "fabric run")


def test_a_launcher_without_gpus_starts_nothing(tmp_path):
    """That error is the launcher's own: `fabric run` raises it before our first line."""
    command = [BIN / "fabric", "run", "--accelerator=gpu", "--devices=2", FABRIC]
    status, output = Command(command, cwd=tmp_path).finish()
    assert status != 0 and "MisconfigurationException" in output


BREAKING = [(TORCH, 2, 1, []), pytest.param(FABRIC, 2, 1, [], marks=SLOW)]
BREAKING += [pytest.param(DECOUPLED, 3, 1, ["--num-players", "2"], marks=SLOW)]
BREAKING += [pytest.param(DECOUPLED, 4, rank, TWO_PLAYERS, marks=SLOW) for rank in range(2)]
BREAKING += [pytest.param(file, 2, rank, TCP, marks=SLOW) for file in (TORCH, FABRIC) for rank in range(2)]


@pytest.mark.parametrize("file, ranks, rank, switches", BREAKING, **NAMES)
def test_one_rank_that_fails_ends_the_others(tmp_path, file, ranks, rank, switches):
    """The environments of one rank alone raise an exception, in the middle of a rollout."""
    flags = ["--env-id", "toy_envs:Raises-v0", "--env-kwargs", f'{{"rank":{rank}}}', "--eval-episodes", 0, *switches]
    output = fails([*LAUNCHERS[file](ranks), file, *flags], tmp_path, "toy_envs:Raises-v0: RuntimeError: the simulator")
    assert_shown_first("the simulator broke", output)


def assert_shown_first(cause: str, output: str) -> None:
    """The other ranks' complaints that they have lost their peer come later, if at all."""
    complaints = r"RuntimeError: .*[Gg]loo|Connection closed|Connection\w*Error|BrokenPipeError"
    others = [match.start() for match in re.finditer(complaints, output)]
    assert cause in output and output.index(cause) < min(others, default=len(output)), output


BREAKING_TRAINER = [(1, ["--overlap"]), pytest.param(2, [], marks=SLOW), pytest.param(2, ["--overlap"], marks=SLOW)]


@pytest.mark.parametrize("rank, switches", BREAKING_TRAINER)
def test_a_trainer_that_fails_ends_the_players(tmp_path, rank, switches):
    """The third update of one of two trainers raises an exception."""
    command = [*fabric_run(3), PROBE, DECOUPLED, tmp_path, "--eval-episodes", 0, *switches]
    status, output = Command(command, cwd=tmp_path, BREAKS=str(rank)).finish()
    assert status != 0
    assert_shown_first("the update broke", output)
