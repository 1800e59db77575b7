"""No run is lost: checkpoints, resuming, signals and faults, with the real launchers and real signals."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_torch_ddp as ppo
from launch import ROOT, Command, fabric_run, real_torchrun, run, torchrun, wait_for
from test_launch import (
    DECOUPLED,
    FABRIC,
    LAUNCHERS,
    NAMES,
    REAL_LAUNCHERS,
    SLOW,
    TCP,
    TORCH,
    cases,
    fails,
    fails_with_one_line,
    last_line,
)

CLOCK = ["--env-id", "toy_envs:Clock-v0", "--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 2]
CLOCK += ["--normalize-obs", "--normalize-rewards", "--eval-episodes", 2, "--checkpoint-every", 5]
TINY = ["--hidden-sizes", 8, "--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("checkpoints/step-*.pt"))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) of the only run below a folder but the times; nothing is left out as out of order."""
    (events,) = {path.parent for path in folder.rglob("events.*")}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}, purge_orphaned_data=False).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("Time/")]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def assert_equal(a, b, path: str = "") -> None:
    """The same values, bit by bit, in two nested dictionaries, lists and tensors."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
    if isinstance(a, dict | list | tuple):
        keys = a.keys() if isinstance(a, dict) else range(max(len(a), len(b)))
        for key in keys:
            assert_equal(a[key], b[key], f"{path}.{key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


STOPPED = [(TORCH, 1, 0, [])]
MORE = [(TORCH, 2, 1, ["--share-data"]), (TORCH, 2, 0, ["--optimizer", "rmsprop"]), (FABRIC, 2, 0, [])]
MORE += [(DECOUPLED, 3, 0, []), (DECOUPLED, 3, 2, ["--num-players", 2])]
STOPPED += [pytest.param(*case, marks=SLOW) for case in MORE]


@pytest.mark.parametrize("file, ranks, stopped_rank, switches", STOPPED, **NAMES)
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_one_that_was_not(
    tmp_path, file, ranks, stopped_rank, switches
):
    """Stopped by SIGTERM to one rank wherever it happens to be; episodes end where the rollouts do."""
    actors = 2 if "--num-players" in switches else 1 if file == DECOUPLED else ranks
    flags = [file, *CLOCK, "--total-timesteps", 100 * actors * 4 * 16, *switches]
    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = Command([*LAUNCHERS[file](ranks), *flags], cwd=tmp_path / "straight")
    stopped = Command([*LAUNCHERS[file](ranks), *flags], cwd=tmp_path / "stopped")
    wait_for(lambda: checkpoints(tmp_path / "stopped"))
    os.kill(stopped.rank_pid(stopped_rank) if ranks > 1 else stopped.pid, signal.SIGTERM)
    status, output = stopped.finish()
    assert status == (143 if ranks == 1 else 1), output
    last = checkpoints(tmp_path / "stopped")[-1]
    assert f"stopped by a signal: go on with --resume {last.relative_to(tmp_path / 'stopped')}" in output
    assert 0 < load(last)["rows"] < 100 * actors * 4 * 16
    assert not re.search(r'ppo_\w+.py", line', output), output
    output = run([*LAUNCHERS[file](ranks), *flags, "--resume", "auto"], cwd=tmp_path / "stopped")
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


SIGNALS = [("sync", signal.SIGTERM), ("async", signal.SIGINT)]
SIGNALS += [pytest.param("sync", signal.SIGINT, marks=SLOW), pytest.param("async", signal.SIGTERM, marks=SLOW)]


@pytest.mark.parametrize("vec_env, number", SIGNALS)
def test_a_signal_stops_within_an_iteration_and_a_second_one_at_once(tmp_path, vec_env, number):
    flags = [*TINY, "--total-timesteps", 10**7, "--vec-env", vec_env, "--checkpoint-every", 10**6]
    command = Command([*torchrun(1), TORCH, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.killpg(command.pid, number)  # as Ctrl-C and launchers do: to the whole group
    status, output = command.finish(timeout=10)
    assert status == 128 + number and "stopped by a signal" in output and len(checkpoints(tmp_path)) == 1
    flags = ["--num-steps", 10**5, "--total-timesteps", 10**7, "--per-rank-batch-size", 10**5, "--vec-env", vec_env]
    command = Command([*torchrun(1), TORCH, *flags], cwd=tmp_path)  # whose first iteration takes long
    wait_for(lambda: len({path.parent for path in tmp_path.rglob("events.*")}) == 2)
    time.sleep(1)
    os.kill(command.pid, number)
    time.sleep(1.5)
    assert command.is_running()
    os.kill(command.pid, number)
    assert command.finish(timeout=5)[0] == -number
    assert len(checkpoints(tmp_path)) == 1


SIGNALLED = [(TORCH, 1, 0, []), (DECOUPLED, 2, 0, []), (DECOUPLED, 2, 1, ["--overlap"])]
MORE = [(TORCH, 2, 1, TCP), (FABRIC, 2, 0, [])]
MORE += [(DECOUPLED, 4, 3, ["--num-players", 2]), (DECOUPLED, 4, 0, ["--num-players", 2, "--overlap"])]
SIGNALLED += [pytest.param(*case, marks=SLOW) for case in MORE]


@pytest.mark.parametrize("file, ranks, signalled_rank, switches", SIGNALLED, **NAMES)
def test_a_signal_during_an_update_ends_the_run_with_it(tmp_path, file, ranks, signalled_rank, switches):
    """One that takes seconds; with `overlap` the rollout that was under way goes no further."""
    flags = ["--env-id", "toy_envs:Noted-v0", "--env-kwargs", '{"num_steps":16}', "--num-steps", 16, *switches]
    flags += ["--per-rank-batch-size", 16, "--update-epochs", 1200, "--total-timesteps", 10**6]
    command = Command([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    wait_for((tmp_path / "rollout-1").exists)
    time.sleep(0.5)
    os.kill(command.rank_pid(signalled_rank) if ranks > 1 else command.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert not checkpoints(tmp_path)  # the update is still under way
    _, output = command.finish()
    assert "stopped by a signal" in output, output
    (path,) = checkpoints(tmp_path)
    actors = 2 if "--num-players" in switches else 1 if file == DECOUPLED else ranks
    assert load(path)["rows"] == 16 * 4 * actors, output
    assert (tmp_path / "rollout-2").exists() == ("--overlap" in switches)
    assert not (tmp_path / "rollout-3").exists()


@pytest.mark.parametrize("file, ranks", [(TORCH, 1), pytest.param(DECOUPLED, 2, marks=SLOW)], **NAMES)
def test_a_signal_ends_an_evaluation(tmp_path, file, ranks):
    """That of an agent whose episodes never end, before the last checkpoint."""
    flags = ["--env-id", "toy_envs:Evaluated-v0", "--env-kwargs", '{"raises":false}', "--total-timesteps", 512]
    command = Command([*REAL_LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(3)
    assert command.is_running() and not checkpoints(tmp_path)
    os.kill(command.pid, signal.SIGTERM)
    command.finish(timeout=20)
    assert len(checkpoints(tmp_path)) == 1
    logs = curves(tmp_path)
    assert len(logs["Loss/value_loss"]) == 1 and "Test/cumulative_reward" not in logs


ALL = [pytest.param(TORCH, 2, marks=SLOW), pytest.param(FABRIC, 2, marks=SLOW), (DECOUPLED, 3)]  # one for the three


@pytest.mark.parametrize("file, ranks", ALL, **NAMES)
def test_rank_0_writes_its_checkpoint_before_the_others_leave(tmp_path, file, ranks):
    """A rank that leaves makes the launcher send a signal to the others, here long after the first one."""
    flags = ["--num-steps", 5000, "--update-epochs", 1, "--hidden-sizes", 512, 512, "--checkpoint-every", 1]
    flags += ["--per-rank-batch-size", 2500, "--total-timesteps", 10**8]
    command = Command([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    (first,) = wait_for(lambda: checkpoints(tmp_path), timeout=90)
    os.kill(command.rank_pid(0), signal.SIGTERM)
    status, output = command.finish(timeout=60)
    assert status != 0 and "stopped by a signal" in output and checkpoints(tmp_path)[-1] != first, output


@SLOW
@pytest.mark.parametrize("file, ranks", [(TORCH, 2), (FABRIC, 2), (DECOUPLED, 3)], **NAMES)
def test_the_launcher_passes_a_signal_on(tmp_path, file, ranks):
    flags = [*TINY, "--total-timesteps", 10**7, "--vec-env", "async", "--checkpoint-every", 10**6]
    command = Command([*REAL_LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.pid, signal.SIGTERM)
    status, output = command.finish(timeout=20)
    assert status != 0 and "stopped by a signal" in output and len(checkpoints(tmp_path)) == 1, output


def kill_and_finish(file: Path, ranks: int, flags: list, kills: list[tuple[int, float]], folder: Path) -> None:
    """Kill ranks, each some seconds after a new checkpoint; nothing that was in a checkpoint may be lost.

    torchrun restarts them by itself, `fabric run` is started again.
    """
    output, launcher, newest, written = "", LAUNCHERS[file](ranks), None, []
    if file == TORCH:
        launcher = real_torchrun(ranks)
        launcher = [*launcher[:1], f"--max-restarts={len(kills)}", *launcher[1:]]
    command = Command([*launcher, file, *flags], cwd=folder)
    for rank, delay in kills:
        newest = wait_for(lambda old=newest: [path for path in checkpoints(folder)[-1:] if path != old], timeout=90)[0]
        time.sleep(delay)
        written.append(int(checkpoints(folder)[-1].stem.removeprefix("step-")))
        os.kill(command.rank_pid(rank), signal.SIGKILL)
        if file != TORCH:
            status, printed = command.finish(timeout=30)
            output += printed
            assert status != 0, output
            command = Command([*fabric_run(ranks), file, *flags], cwd=folder)
        newest = checkpoints(folder)[-1]
    status, printed = command.finish(timeout=600)
    output += printed
    assert status == 0, output
    resumed = [int(step) for step in re.findall(r"resuming .* at step (\d+)", output)]
    assert len(resumed) == len(kills), output
    assert all(after >= before for before, after in zip(written, resumed, strict=True)), (written, resumed)


def assert_whole(folder: Path, rows: int, rollout: int) -> None:
    """The right number of steps, and a point for each iteration, none twice."""
    assert load(checkpoints(folder)[-1])["rows"] == rows
    logs = curves(folder)
    assert len(logs["Info/learning_rate"]) == rows // rollout
    for tag, points in logs.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag


KILLS = [(TORCH, 2, (1, 0.3), [])]
MORE_KILLS = [(FABRIC, 2, (0, 0.1), []), (DECOUPLED, 3, (0, 0.2), [])]
MORE_KILLS += [(DECOUPLED, 4, (3, 0.2), ["--num-players", 2, "--overlap", "--eval-every", 7])]
KILLS += [pytest.param(*case, marks=SLOW) for case in MORE_KILLS]


@pytest.mark.parametrize("file, ranks, kill, switches", KILLS, **NAMES)
def test_a_killed_rank_costs_no_more_than_an_interval(tmp_path, file, ranks, kill, switches):
    actors = 2 if "--num-players" in switches else 1 if file == DECOUPLED else ranks
    rollout = actors * 4 * 16
    flags = [*TINY, "--total-timesteps", 200 * rollout, "--eval-episodes", 1, "--checkpoint-every", 10, *switches]
    kill_and_finish(file, ranks, [*flags, "--resume", "auto"], [kill], tmp_path)
    assert_whole(tmp_path, 200 * rollout, rollout)


@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file, ranks, runs", [(TORCH, 2, 4), (FABRIC, 2, 1), (DECOUPLED, 3, 1)], **NAMES)
def test_many_kills_and_a_solved_cartpole(tmp_path, file, ranks, runs):
    """Each rank in turn, at random moments, five kills a run: twenty under torchrun, ten of them with TCP."""
    moments = torch.rand(runs, 5)
    for number in range(runs):
        kills = [((number * 5 + i) % ranks, 2 * float(moments[number, i])) for i in range(5)]
        folder = tmp_path / str(number)
        folder.mkdir()
        flags = ["--resume", "auto", "--checkpoint-every", 5, *(TCP if number % 2 else [])]
        kill_and_finish(file, ranks, flags, kills, folder)
        rollout = (1 if file == DECOUPLED else ranks) * 512
        assert_whole(folder, 100_000 // rollout * rollout, rollout)
        assert curves(folder)["Test/cumulative_reward"][-1][1] >= 475


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The run directory of a short training of the torch file."""
    folder = tmp_path_factory.mktemp("trained")
    flags = [*TINY, "--total-timesteps", 4096, "--checkpoint-every", 20, "--eval-every", 8, "--eval-episodes", 3]
    (folder / "output").write_text(run([*torchrun(1), TORCH, *flags], cwd=folder))
    return folder


def test_the_last_checkpoints_and_the_best_are_kept(trained):
    rows = [load(path)["rows"] for path in checkpoints(trained)]
    assert rows == [40 * 64, 60 * 64, 64 * 64]  # of 64 iterations: the last three of every twentieth and the end
    (best,) = trained.rglob("best.pt")
    returns = [value for _, value in curves(trained)["Test/cumulative_reward"]]
    assert len(returns) == 8 and load(best)["best_return"] == pytest.approx(max(returns))
    output = run([*torchrun(1), TORCH, "--evaluate", best], cwd=best.parent)
    assert f"greedy return {max(returns):.2f} +-" in output
    assert not list(trained.rglob("incomplete"))


EACH = [TORCH, pytest.param(FABRIC, marks=SLOW), pytest.param(DECOUPLED, marks=SLOW)]


@pytest.mark.parametrize("file", EACH, **NAMES)
def test_a_saved_agent_is_evaluated_by_any_file(trained, tmp_path, file):
    """In a fresh process it scores what it did at the end of training; the two-rank form does it once."""
    last = checkpoints(trained)[-1]
    line = re.findall(r"^step \d+: greedy return .*$", (trained / "output").read_text(), re.MULTILINE)[-1]
    copy = shutil.copy(last, tmp_path / "agent.pt")
    output = run([*LAUNCHERS[file](2), file, "--evaluate", copy, "--capture-video"], cwd=tmp_path)
    assert output.count("greedy return") == 1 and line in output
    assert not (tmp_path / "logs").exists()
    assert {path.parent.name for path in tmp_path.rglob("*.mp4")} == {"agent-videos"}


def test_a_run_goes_on_with_other_ranks_and_in_another_file(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    rows, flags = 4096, [*TINY, "--eval-episodes", 0, "--resume"]
    for file, ranks in ((TORCH, 2), (FABRIC, 1), (DECOUPLED, 3), (TORCH, 1)):
        rows += 1024
        last = checkpoints(tmp_path)[-1]
        command = [*LAUNCHERS[file](ranks), file, *flags, last, "--total-timesteps", rows]
        output = run(command, cwd=tmp_path)
        assert re.search(r"world_size \d -> \d", output), output
        assert f"total_timesteps {rows - 1024} -> {rows}" in output
        assert load(checkpoints(tmp_path)[-1])["rows"] == rows
    assert len({path.parent for path in tmp_path.rglob("events.*")}) == 1  # all of it in one directory
    steps = [step for step, _ in curves(tmp_path)["Info/learning_rate"]]
    assert steps == sorted(set(steps)) and len(steps) == 64 + 8 + 16 + 16 + 16


def test_an_older_checkpoint_branches_and_a_complete_run_says_so(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    flags = [*TINY, "--total-timesteps", 4096, "--eval-episodes", 0]
    output = run([*torchrun(1), TORCH, *flags, "--resume", "auto"], cwd=tmp_path)
    assert "nothing left to train" in output
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    run([*torchrun(1), TORCH, *flags, "--resume", checkpoints(tmp_path)[0]], cwd=tmp_path)
    assert len({path.parent for path in tmp_path.rglob("events.*")}) == 2
    assert all(path.read_bytes() == content for path, content in before.items())


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


REFUSED = [("malicious", [], "--evaluate"), ("other sizes", ["--hidden-sizes", 16], "--resume")]


@pytest.mark.parametrize("file", EACH, **NAMES)
@pytest.mark.parametrize("how, flags, flag", REFUSED)
def test_a_bad_checkpoint_ends_all_ranks(trained, tmp_path, how, file, flags, flag):
    path = Path(shutil.copy(checkpoints(trained)[-1], tmp_path / "agent.pt"))
    damage(path, how)
    fails_with_one_line([*LAUNCHERS[file](2), file, *TINY, *flags, flag, path], tmp_path, BAD[how][1])
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


@pytest.mark.parametrize("file", EACH, **NAMES)
def test_the_writer_killed_while_it_writes_a_checkpoint(tmp_path, file):
    ranks = 2 if file == DECOUPLED else 1
    script = tmp_path / "dies.py"
    script.write_text(DIES_WRITING.format(root=str(ROOT), file=file.stem))
    flags = [*TINY, "--total-timesteps", 2048, "--checkpoint-every", 5, "--eval-episodes", 1, "--resume", "auto"]
    status, _ = Command([*LAUNCHERS[file](ranks), script, *flags], cwd=tmp_path).finish()
    assert status != 0 and [load(path)["rows"] for path in checkpoints(tmp_path)] == [5 * 64, 10 * 64]
    assert len(list(tmp_path.rglob("incomplete"))) == 1
    run([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    assert_whole(tmp_path, 2048, 64)
    assert not list(tmp_path.rglob("incomplete"))


def test_a_full_disk(trained, tmp_path):
    """/dev/full in place of the file that is written; test_a_full_tmpfs is the real thing."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    (checkpoints(tmp_path)[0].parent / "incomplete").symlink_to("/dev/full")
    command = [*torchrun(1), TORCH, *TINY, "--total-timesteps", 8192, "--resume", "auto"]
    fails_with_one_line(command, tmp_path, "No space left on device; earlier checkpoints are whole")
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)} == before
    run(command, cwd=tmp_path)  # there is space again
    assert load(checkpoints(tmp_path)[-1])["rows"] == 8192


def test_a_full_tmpfs(tmp_path):
    """The second checkpoint does not fit any more; the first is whole."""
    mount = "mkdir logs && mount -t tmpfs -o size=2m tmpfs logs"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs; test_a_full_disk does without")
    train = f"{sys.executable} {TORCH} --hidden-sizes 256 256 --checkpoint-every 1 --total-timesteps 10240"
    script = f"{mount}; {train}; [ $? = 1 ] && cp -r logs kept"
    (tmp_path / "logs").rmdir()
    status, output = Command(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path).finish()
    assert status == 0 and "No space left on device; earlier checkpoints are whole" in output.splitlines()[-1], output
    (whole,) = checkpoints(tmp_path / "kept")
    assert load(whole)["rows"] == 512 and not list(tmp_path.rglob("incomplete"))


FAULTS = {
    "an unknown flag": (TORCH, 1, "--no-such-flag 1", "no-such-flag"),
    "a word for a number": (TORCH, 1, "--num-envs four", "four"),
    "a value that is no choice": (TORCH, 1, "--vec-env fast", "fast"),
    "arguments that are no JSON": (TORCH, 2, "--env-kwargs {length:7}", "--env-kwargs"),
    "an argument that the environment has not": (FABRIC, 2, '--env-kwargs {"no_such":1}', "no_such"),
    "an interval below zero": (TORCH, 1, "--checkpoint-every -1", "--checkpoint-every"),
    "no checkpoint to keep": (DECOUPLED, 2, "--keep-checkpoints 0", "--keep-checkpoints"),
    "no time": (FABRIC, 1, "--dist-timeout 0", "--dist-timeout"),
    "a package that is not there": (TORCH, 1, "--env-id no_such_package:Env-v0", "no_such_package"),
    "a lost environment process": (TORCH, 1, "--env-id toy_envs:Dies-v0 --vec-env async", "toy_envs:Dies-v0: "),
    "one of two ranks' lost": (DECOUPLED, 2, "--env-id toy_envs:Dies-v0 --vec-env async", "toy_envs:Dies-v0: "),
    "an evaluation that raises": (
        TORCH,
        1,
        '--env-id toy_envs:Evaluated-v0 --env-kwargs {"raises":true} --total-timesteps 512',
        "RuntimeError: the simulator broke",
    ),
    "a wrong shape": (TORCH, 1, "--env-id toy_envs:WrongShape-v0", "toy_envs:WrongShape-v0: ValueError"),
    "a wrong shape, async": (TORCH, 1, "--env-id toy_envs:WrongShape-v0 --vec-env async", "toy_envs:WrongShape-v0: "),
}


FAST = ("an unknown flag", "a lost environment process", "an evaluation that raises")


@pytest.mark.parametrize("case", cases(FAULTS, *FAST))
def test_faults(tmp_path, case):
    file, ranks, flags, said = FAULTS[case]
    fails([*LAUNCHERS[file](ranks), file, *flags.split()], tmp_path, said)


HANGS = [(TORCH, []), *(pytest.param(*case, marks=SLOW) for case in ((TORCH, TCP), (FABRIC, []), (DECOUPLED, [])))]


@pytest.mark.parametrize("file, switches", HANGS, **NAMES)
def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path, file, switches):
    flags = [*TINY, "--total-timesteps", 10**7, "--dist-timeout", 3, *switches]
    command = Command([*LAUNCHERS[file](2), file, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    hanging = command.rank_pid(1)
    os.kill(hanging, signal.SIGSTOP)
    time.sleep(5)
    os.kill(hanging, signal.SIGCONT)  # a stopped process only dies of SIGKILL, which takes the launcher 30 seconds
    status, output = command.finish(timeout=30)
    said = "timed out after 3 seconds of waiting for another rank" if switches else "[Tt]imed out"
    assert status != 0 and re.search(said, last_line(output)), output


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
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
            ppo.update(agent, optimizer, batch, args, minibatches, compiled, ppo.sum_over_ranks, 1)
        before = flat.detach().clone()
        assert torch.equal(before, start) == (good_updates == 0)
        bad = batch | {"advantages": torch.full((32,), torch.inf)}
        means = ppo.update(agent, optimizer, bad, args, minibatches, compiled, ppo.sum_over_ranks, 1)
        assert not means.isfinite().all() and torch.equal(flat, before)


def test_a_simulator_that_hangs_is_no_orphan(tmp_path):
    flags = ["--env-id", "toy_envs:Hangs-v0", "--vec-env", "async", "--eval-episodes", 0]
    command = Command([*real_torchrun(2), TORCH, *flags], cwd=tmp_path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.pid, signal.SIGTERM)
    assert command.finish(timeout=20)[0] != 0
