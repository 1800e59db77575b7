"""For the first form of the decoupled file, and goes with it: runs on many ranks, signals, faults and checkpoints.

Until it is rebuilt nothing compares it with the coupled files: the bits of one process (eager, compiled, of Pendulum),
sharing trainers that equal one process, and checkpoints that go from file to file.
"""

import os
import pickle
import re
import shutil
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_fabric_decoupled as ppo
from launch import BIN, ROOT, TESTS, Command, fabric_run, free_port, real_fabric_run, run, torchrun, wait_for
from test_checkpoints import CLOCK, TINY, assert_equal, checkpoints, load
from test_launch import DECOUPLED, SLOW, SMALL, cases, scalars
from toy_envs import PUZZLES, puzzle_flags

PROBE = TESTS / "probe_decoupled.py"


def run_probes(*runs: tuple[Path, int], flags: list, **env: str) -> list[list[dict]]:
    """Run `main` in several folders at a time, on so many ranks; what probe_decoupled.py noted on each."""
    commands = []
    for folder, ranks in runs:
        folder.mkdir(exist_ok=True)
        command = [*fabric_run(ranks), PROBE, DECOUPLED, folder, *flags]
        commands.append(Command(command, cwd=folder, **env))
    for status, output in [command.finish() for command in commands]:
        assert status == 0, output
    return [[torch.load(folder / f"{rank}.pt") for rank in range(ranks)] for folder, ranks in runs]


def run_probe(folder: Path, *flags, ranks: int, **env: str) -> list[dict]:
    return run_probes((folder, ranks), flags=flags, **env)[0]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) of the only run below a folder but the times; nothing is left out as out of order."""
    (events,) = {path.parent for path in folder.rglob("events.*")}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("Time/")]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def assert_whole(folder: Path, rows: int, rollout: int) -> None:
    """The right number of steps, and a point for each iteration, none twice."""
    assert load(checkpoints(folder)[-1])["rows"] == rows
    logs = curves(folder)
    assert len(logs["Info/learning_rate"]) == rows // rollout
    for tag, points in logs.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


def assert_normalised(iterations: list[tuple[dict, ...]], folder: Path) -> None:
    """The valid advantages of all parts of an iteration's batch have mean 0 and deviation 1, and they are the steps."""
    for parts in iterations:
        advantages = [part["advantages"][part["valid"]] for part in parts]
        whole = torch.cat(advantages)
        assert abs(whole.mean()) < 1e-4 and abs(whole.std(correction=0) - 1) < 1e-3
        assert len(parts) == 1 or max(abs(part.mean()) for part in advantages) > 1e-3  # of all ranks, not of each
    steps = sum(int(part["valid"].sum()) for parts in iterations for part in parts)
    assert scalars(folder)["Loss/policy_loss"][-1][0] == steps


def cartpole_spaces() -> tuple[gym.Space, gym.Space]:
    envs, _ = ppo.make_envs(ppo.Args(), 1, 0)
    return envs.single_observation_space, envs.single_action_space


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
        file = command.index(DECOUPLED)
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


@SLOW
def test_two_machines_and_no_seed_twice(tmp_path):
    """Two agents of the launcher on this machine, two ranks each; every environment of the run has a seed of its own.

    Those are 8 of two players, the evaluation's two, and two that trainers look at.
    """
    diary, port = tmp_path / "diary", free_port()
    diary.mkdir()
    flags = [*SMALL, "--total-timesteps", 2 * 4 * 4 * 32, "--env-id", "toy_envs:Diary-v0", "--seed", 5]
    flags += ["--num-players", 2, "--num-envs", 8]
    machines = []
    for rank, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        launcher = [BIN / "fabric", "run", "--accelerator=cpu", "--num-nodes=2", "--devices=2"]
        launcher += [f"--node-rank={rank}", "--main-address=127.0.0.1", f"--main-port={port}"]
        machines.append(Command([*launcher, DECOUPLED, *flags], cwd=tmp_path / name, DIARY=str(diary)))
    results = [machine.finish() for machine in machines]
    assert [status for status, _ in results] == [0, 0], results
    seeds = sorted(int(path.read_text()) for path in diary.iterdir())
    assert len(seeds) == 4 * 4 + 2 + 2 and len(set(seeds)) == len(seeds) and min(seeds) == 5
    assert {path.name.split("-")[0] for path in diary.iterdir()} == {"0", "1", "2", "3"}
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 2  # and one rank alone writes


@SLOW
def test_a_compiler_that_is_missing_is_named(tmp_path):
    script = tmp_path / "script.py"  # what $CXX sets as torch is imported
    script.write_text(
        "import runpy, sys, torch._inductor.config as config\n"
        "config.cpp.cxx = (None, 'nowhere')\n"
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
    )
    command = [*fabric_run(2), script, DECOUPLED, "--compile"]
    status, output = Command(command, tmp_path, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).finish()
    assert status != 0 and "error: --compile: " in output, output


@pytest.mark.parametrize("players, switches", [pytest.param(2, [], marks=SLOW), (1, ["--overlap"])])
def test_the_times_of_player_and_trainer_explain_the_iteration(tmp_path, players, switches):
    flags = ["--total-timesteps", 10240, "--eval-episodes", 0, "--num-players", players, *switches]
    allowed = sorted(os.sched_getaffinity(0))
    notes = run_probe(tmp_path, *flags, ranks=players + 1, CPUS="2")
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
    runs = [notes[2:] for notes in run_probes(*((folder, 5) for folder in folders), flags=flags)]
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


def test_training_ranks_stop_together_on_target_kl(tmp_path):
    flags = [*SMALL, "--total-timesteps", 512, "--target-kl", 1e-9, "--env-id", "toy_envs:Truncated-v0"]
    notes = run_probe(tmp_path, *flags, ranks=3)[-2:]
    for note in notes:  # the first epoch of each update and no more
        assert note["steps"] == len(note["after"]) * (4 * 32 // 2 // 32) and len(note["after"]) >= 2
    first, second = (note["batches"][0] for note in notes)
    assert torch.equal(first["obs"], second["obs"])


TWO_PLAYERS = ["--num-players", "2", "--overlap"]


KILLED = [(3, 0, []), pytest.param(3, 1, [], marks=SLOW)]
KILLED += [pytest.param(3, rank, ["--overlap"], marks=SLOW) for rank in (0, 2)]
KILLED += [pytest.param(4, rank, TWO_PLAYERS, marks=SLOW) for rank in range(4)]


@pytest.mark.parametrize("ranks, rank, switches", KILLED)
def test_a_killed_rank_ends_the_run(tmp_path, ranks, rank, switches):
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


def test_a_lone_copy_runs_and_makes_videos(tmp_path):
    shutil.copy(DECOUPLED, tmp_path)
    flags = [*SMALL, "--total-timesteps", 2048, "--capture-video"]
    output = run([*fabric_run(2), DECOUPLED.name, *flags], cwd=tmp_path, PYTHONPATH="")
    assert "greedy return" in output
    videos = {path.parent.name.split("-")[0] for path in tmp_path.rglob("*.mp4") if path.stat().st_size > 1000}
    assert videos == {"train", "test"}


KINDS = [name if name == "Float64-Box" else pytest.param(name, marks=SLOW) for name in PUZZLES]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_space_is_learned_on_many_ranks(tmp_path, name):
    flags = ["--num-envs", 8, "--per-rank-batch-size", 32, "--no-normalize-advantages"]
    for flag, value in puzzle_flags(name).items():
        flags += [f"--{flag.replace('_', '-')}", value] if value is not False else []
    run([*fabric_run(3), DECOUPLED, *flags], cwd=tmp_path, timeout=120)
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] >= (9.2 if "Box" in name else 9.8)


def test_normalisers_hold_the_statistics_of_all_ranks_and_make_the_evaluation(tmp_path):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", "Pendulum-v1", "--env-kwargs", '{"max_episode_steps": 50}']
    flags += ["--normalize-obs", "--normalize-rewards"]
    notes = run_probe(tmp_path, *flags, "--num-players", 2, ranks=4)[:2]
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


@SLOW
@pytest.mark.parametrize("ranks, env_id, vec_env", [(3, "ALE/Pong-v5", "native"), (2, "Pong-v5", "envpool")])
def test_vector_environments_of_others(tmp_path, ranks, env_id, vec_env):
    flags = ["--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1, "--eval-episodes", 0]
    flags += ["--total-timesteps", 256]
    notes = run_probe(tmp_path, *flags, "--env-id", env_id, "--vec-env", vec_env, ranks=ranks)
    batches = [note["batches"][0] for note in notes if note["batches"]]
    assert all(batch["obs"].dtype == torch.uint8 and batch["obs"].shape[1:] == (4, 84, 84) for batch in batches)
    assert len(scalars(tmp_path)["Loss/policy_loss"]) >= 2


BAD_INPUT = {
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


@pytest.mark.parametrize("case", cases(BAD_INPUT))
def test_bad_input(tmp_path, case):
    ranks, flags, said = BAD_INPUT[case]
    fails_with_one_line([*fabric_run(ranks), DECOUPLED, *flags.split()], tmp_path, said)


ONE_RANK = {
    "python": torchrun(1),
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node=1"],
    "fabric run": [BIN / "fabric", "run", "--accelerator=cpu", "--devices=1"],
}


@pytest.mark.parametrize("launcher", cases(ONE_RANK, "python"))
def test_one_rank_is_too_few(tmp_path, launcher):
    fails_with_one_line([*ONE_RANK[launcher], DECOUPLED], tmp_path, "--num-players 1 of 1 ranks")


@pytest.mark.parametrize("case", cases(("players", "trainers", "player on a GPU", "no GPU"), "players"))
def test_bad_ranks_under_torchrun(tmp_path, case):
    ranks, flags, said = BAD_INPUT[case]
    fails_with_one_line([*torchrun(ranks), DECOUPLED, *flags.split()], tmp_path, said)


@SLOW
@pytest.mark.parametrize(
    "ranks, rank, switches", [(3, 1, ["--num-players", "2"]), (4, 0, TWO_PLAYERS), (4, 1, TWO_PLAYERS)]
)
def test_one_rank_that_fails_ends_the_others(tmp_path, ranks, rank, switches):
    """The environments of one rank alone raise an exception, in the middle of a rollout."""
    flags = ["--env-id", "toy_envs:Raises-v0", "--env-kwargs", f'{{"rank":{rank}}}', "--eval-episodes", 0, *switches]
    output = fails([*fabric_run(ranks), DECOUPLED, *flags], tmp_path, "toy_envs:Raises-v0: RuntimeError: the simulator")
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


STOPPED = [pytest.param(3, 0, [], marks=SLOW), pytest.param(3, 2, ["--num-players", 2], marks=SLOW)]


@pytest.mark.parametrize("ranks, stopped_rank, switches", STOPPED)
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_one_that_was_not(tmp_path, ranks, stopped_rank, switches):
    """Stopped by SIGTERM to one rank wherever it happens to be; episodes end where the rollouts do."""
    actors = 2 if switches else 1
    flags = [DECOUPLED, *CLOCK, "--total-timesteps", 100 * actors * 4 * 16, *switches]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = Command([*fabric_run(ranks), *flags], cwd=tmp_path / "straight")
    stopped = Command([*fabric_run(ranks), *flags], cwd=tmp_path / "stopped")
    wait_for(lambda: checkpoints(tmp_path / "stopped"))
    os.kill(stopped.rank_pid(stopped_rank), signal.SIGTERM)
    status, output = stopped.finish()
    assert status == 1, output
    last = checkpoints(tmp_path / "stopped")[-1]
    assert f"stopped by a signal: go on with --resume {last.relative_to(tmp_path / 'stopped')}" in output
    assert 0 < load(last)["rows"] < 100 * actors * 4 * 16
    assert not re.search(r'ppo_\w+.py", line', output), output
    output = run([*fabric_run(ranks), *flags, "--resume", "auto"], cwd=tmp_path / "stopped")
    assert "resuming" in output and "changed" not in output
    assert straight.finish()[0] == 0
    ends = [load(checkpoints(tmp_path / name)[-1]) for name in ("straight", "stopped")]
    assert ends[0]["rows"] == 100 * actors * 4 * 16
    for end in ends:
        end["args"].pop("resume")
    assert_equal(*ends)
    logs = [curves(tmp_path / name) for name in ("straight", "stopped")]
    assert logs[0] == logs[1]  # the same points, none twice
    assert len(logs[0]["Info/learning_rate"]) == 100


SIGNALLED = [(2, 0, []), (2, 1, ["--overlap"])]
SIGNALLED += [pytest.param(4, 3, ["--num-players", 2], marks=SLOW), pytest.param(4, 0, TWO_PLAYERS, marks=SLOW)]


@pytest.mark.parametrize("ranks, signalled_rank, switches", SIGNALLED)
def test_a_signal_during_an_update_ends_the_run_with_it(tmp_path, ranks, signalled_rank, switches):
    """One that takes seconds; with `overlap` the rollout that was under way goes no further."""
    flags = ["--env-id", "toy_envs:Noted-v0", "--env-kwargs", '{"num_steps":16}', "--num-steps", 16, *switches]
    flags += ["--per-rank-batch-size", 16, "--update-epochs", 1200, "--total-timesteps", 10**6]
    command = Command([*fabric_run(ranks), DECOUPLED, *flags], cwd=tmp_path)
    wait_for((tmp_path / "rollout-1").exists)
    time.sleep(0.5)
    os.kill(command.rank_pid(signalled_rank), signal.SIGTERM)
    time.sleep(0.5)
    assert not checkpoints(tmp_path)  # the update is still under way
    _, output = command.finish()
    assert "stopped by a signal" in output, output
    (path,) = checkpoints(tmp_path)
    actors = 2 if "--num-players" in switches else 1
    assert load(path)["rows"] == 16 * 4 * actors, output
    assert (tmp_path / "rollout-2").exists() == ("--overlap" in switches)
    assert not (tmp_path / "rollout-3").exists()


@SLOW
def test_a_signal_ends_an_evaluation(tmp_path):
    """That of an agent whose episodes never end, before the last checkpoint."""
    flags = ["--env-id", "toy_envs:Evaluated-v0", "--env-kwargs", '{"raises":false}', "--total-timesteps", 512]
    command = Command([*real_fabric_run(2), DECOUPLED, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(3)
    assert command.is_running() and not checkpoints(tmp_path)
    os.kill(command.pid, signal.SIGTERM)
    command.finish(timeout=20)
    assert len(checkpoints(tmp_path)) == 1
    logs = curves(tmp_path)
    assert len(logs["Loss/value_loss"]) == 1 and "Test/cumulative_reward" not in logs


def test_rank_0_writes_its_checkpoint_before_the_others_leave(tmp_path):
    """A rank that leaves makes the launcher send a signal to the others, here long after the first one."""
    flags = ["--num-steps", 5000, "--update-epochs", 1, "--hidden-sizes", 512, 512, "--checkpoint-every", 1]
    flags += ["--per-rank-batch-size", 2500, "--total-timesteps", 10**8]
    command = Command([*fabric_run(3), DECOUPLED, *flags], cwd=tmp_path)
    (first,) = wait_for(lambda: checkpoints(tmp_path), timeout=90)
    os.kill(command.rank_pid(0), signal.SIGTERM)
    status, output = command.finish(timeout=60)
    assert status != 0 and "stopped by a signal" in output and checkpoints(tmp_path)[-1] != first, output


@SLOW
def test_the_launcher_passes_a_signal_on(tmp_path):
    flags = [*TINY, "--total-timesteps", 10**7, "--vec-env", "async", "--checkpoint-every", 10**6]
    command = Command([*real_fabric_run(3), DECOUPLED, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.pid, signal.SIGTERM)
    status, output = command.finish(timeout=20)
    assert status != 0 and "stopped by a signal" in output and len(checkpoints(tmp_path)) == 1, output


def kill_and_finish(ranks: int, flags: list, kills: list[tuple[int, float]], folder: Path) -> None:
    """Kill ranks, each some seconds after a new checkpoint, and start again; nothing in a checkpoint may be lost."""
    output, newest, written = "", None, []
    command = Command([*fabric_run(ranks), DECOUPLED, *flags], cwd=folder)
    for rank, delay in kills:
        newest = wait_for(lambda old=newest: [path for path in checkpoints(folder)[-1:] if path != old], timeout=90)[0]
        time.sleep(delay)
        written.append(int(checkpoints(folder)[-1].stem.removeprefix("step-")))
        os.kill(command.rank_pid(rank), signal.SIGKILL)
        status, printed = command.finish(timeout=30)
        output += printed
        assert status != 0, output
        command = Command([*fabric_run(ranks), DECOUPLED, *flags], cwd=folder)
        newest = checkpoints(folder)[-1]
    status, printed = command.finish(timeout=600)
    output += printed
    assert status == 0, output
    resumed = [int(step) for step in re.findall(r"resuming .* at step (\d+)", output)]
    assert len(resumed) == len(kills), output
    assert all(after >= before for before, after in zip(written, resumed, strict=True)), (written, resumed)


@SLOW
@pytest.mark.parametrize("ranks, kill, switches", [(3, (0, 0.2), []), (4, (3, 0.2), [*TWO_PLAYERS, "--eval-every", 7])])
def test_a_killed_rank_costs_no_more_than_an_interval(tmp_path, ranks, kill, switches):
    rollout = (2 if switches else 1) * 4 * 16
    flags = [*TINY, "--total-timesteps", 200 * rollout, "--eval-episodes", 1, "--checkpoint-every", 10, *switches]
    kill_and_finish(ranks, [*flags, "--resume", "auto"], [kill], tmp_path)
    assert_whole(tmp_path, 200 * rollout, rollout)


@SLOW
@pytest.mark.timeout(1800)
def test_many_kills_and_a_solved_cartpole(tmp_path):
    """Each rank in turn, at random moments."""
    kills = [(i % 3, 2 * moment) for i, moment in enumerate(torch.rand(5).tolist())]
    kill_and_finish(3, ["--resume", "auto", "--checkpoint-every", 5], kills, tmp_path)
    assert_whole(tmp_path, 100_000 // 512 * 512, 512)
    assert curves(tmp_path)["Test/cumulative_reward"][-1][1] >= 475


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run directory of a short training of one player and one trainer."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--total-timesteps", 4096, "--checkpoint-every", 20, "--eval-every", 8, "--eval-episodes", 3]
    (folder / "output").write_text(run([*fabric_run(2), DECOUPLED, *flags], cwd=folder))
    return folder


@SLOW
def test_a_saved_agent_is_evaluated(trained, tmp_path):
    """In a fresh process it scores what it did at the end of training; the two-rank form does it once."""
    last = checkpoints(trained)[-1]
    line = re.findall(r"^step \d+: greedy return .*$", (trained / "output").read_text(), re.MULTILINE)[-1]
    copy = shutil.copy(last, tmp_path / "agent.pt")
    output = run([*fabric_run(2), DECOUPLED, "--evaluate", copy, "--capture-video"], cwd=tmp_path)
    assert output.count("greedy return") == 1 and line in output
    assert not (tmp_path / "logs").exists()
    assert {path.parent.name for path in tmp_path.rglob("*.mp4")} == {"agent-videos"}


def test_a_run_goes_on_with_other_ranks(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    rows, flags = 4096, [*TINY, "--eval-episodes", 0, "--resume"]
    for ranks, switches in ((3, []), (4, ["--num-players", 2])):
        rows += 1024
        last = checkpoints(tmp_path)[-1]
        output = run([*fabric_run(ranks), DECOUPLED, *flags, last, "--total-timesteps", rows, *switches], cwd=tmp_path)
        assert re.search(r"world_size \d -> \d", output), output
        assert f"total_timesteps {rows - 1024} -> {rows}" in output
        assert load(checkpoints(tmp_path)[-1])["rows"] == rows
    assert len({path.parent for path in tmp_path.rglob("events.*")}) == 1  # all of it in one directory
    steps = [step for step, _ in curves(tmp_path)["Info/learning_rate"]]
    assert steps == sorted(set(steps)) and len(steps) == 64 + 16 + 8


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def damage(path: Path, how: str) -> None:
    """Make a checkpoint one that must be refused."""
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "malicious":
        with path.open("wb") as file:
            pickle.dump({"version": 1, "agent": Malicious()}, file)
    elif how == "malicious in torch's format":
        torch.save({"version": 1, "agent": Malicious()}, path)
    elif how == "another version":
        torch.save(load(path) | {"version": 99}, path)


BAD = {
    "truncated": ({}, "is damaged, or not of these files"),
    "empty": ({}, "is damaged, or not of these files"),
    "missing": ({}, "cannot read"),
    "malicious": ({}, "is damaged, or not of these files"),
    "malicious in torch's format": ({}, "is damaged, or not of these files"),
    "another version": ({}, "is of version 99"),
    "another environment": ({"env_id": "Acrobot-v1"}, "env_id CartPole-v1 -> Acrobot-v1"),
    "another optimizer": ({"optimizer": "rmsprop"}, "optimizer adam -> rmsprop"),
    "other sizes": ({"hidden_sizes": (16,)}, "of another agent"),
    "other normalisers": ({"normalize_obs": True}, "of another agent"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_checkpoint_is_refused(trained, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(checkpoints(trained)[-1], tmp_path / "agent.pt"))
    damage(path, how)
    flags, said = BAD[how]
    args = ppo.Args(resume=str(path), **{"hidden_sizes": (8,)} | flags)
    with pytest.raises(SystemExit, match=re.escape(said)) as refusal:
        _, state = ppo.open_run(args, "logs", {"num_actors": 1, "world_size": 1})
        ppo.restore(state, ppo.Agent(gym.spaces.Box(-1, 1, (4,)), gym.spaces.Discrete(2), args))
    assert "\n" not in str(refusal.value) and not (tmp_path / "owned").exists()


@SLOW
@pytest.mark.parametrize(
    "how, flags, flag", [("malicious", [], "--evaluate"), ("other sizes", ["--hidden-sizes", 16], "--resume")]
)
def test_a_bad_checkpoint_ends_all_ranks(trained, tmp_path, how, flags, flag):
    path = Path(shutil.copy(checkpoints(trained)[-1], tmp_path / "agent.pt"))
    damage(path, how)
    fails_with_one_line([*fabric_run(2), DECOUPLED, *TINY, *flags, flag, path], tmp_path, BAD[how][1])
    assert not (tmp_path / "owned").exists() and not list(tmp_path.rglob("step-*.pt"))


DIES_WRITING = """
import os, signal, sys
sys.path.insert(0, {root!r})
import {file} as ppo, tyro
calls, fsync = [], os.fsync
def dying(fd):  # the file is written, but not yet in place
    calls.append(fd)
    if len(calls) == 3:
        os.truncate(fd, os.fstat(fd).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(fd)
ppo.os.fsync = dying
ppo.main(tyro.cli(ppo.Args))
"""


@SLOW
def test_the_writer_killed_while_it_writes_a_checkpoint(tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(DIES_WRITING.format(root=str(ROOT), file=DECOUPLED.stem))
    flags = [*TINY, "--total-timesteps", 2048, "--checkpoint-every", 5, "--eval-episodes", 1, "--resume", "auto"]
    status, _ = Command([*fabric_run(2), script, *flags], cwd=tmp_path).finish()
    assert status != 0 and [load(path)["rows"] for path in checkpoints(tmp_path)] == [5 * 64, 10 * 64]
    assert len(list(tmp_path.rglob("incomplete"))) == 1
    run([*fabric_run(2), DECOUPLED, *flags], cwd=tmp_path)
    assert_whole(tmp_path, 2048, 64)
    assert not list(tmp_path.rglob("incomplete"))


FAULTS = {
    "no checkpoint to keep": ("--keep-checkpoints 0", "--keep-checkpoints"),
    "a player's environment process is lost": ("--env-id toy_envs:Dies-v0 --vec-env async", "toy_envs:Dies-v0: "),
}


@SLOW
@pytest.mark.parametrize("case", FAULTS)
def test_faults(tmp_path, case):
    flags, said = FAULTS[case]
    fails([*fabric_run(2), DECOUPLED, *flags.split()], tmp_path, said)


@SLOW
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path):
    flags = [*TINY, "--total-timesteps", 10**7, "--dist-timeout", 3]
    command = Command([*fabric_run(2), DECOUPLED, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    hanging = command.rank_pid(1)
    os.kill(hanging, signal.SIGSTOP)
    time.sleep(5)
    os.kill(hanging, signal.SIGCONT)  # a stopped process only dies of SIGKILL, which takes the launcher 30 seconds
    status, output = command.finish(timeout=30)
    assert status != 0 and re.search("[Tt]imed out", last_line(output)), output
