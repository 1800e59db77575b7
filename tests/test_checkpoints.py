"""No run is lost: checkpoints, resuming, signals and faults, with real signals."""

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    PLAYERS,
    REAL_LAUNCHERS,
    SLOW,
    TORCH,
    cases,
    fails,
    fails_with_one_line,
    fewest_ranks,
    last_line,
)

TCP, DDP = ["--exchange", "tcp"], ["--exchange", "ddp"]
CLOCK = ["--env-id", "toy_envs:Clock-v0", "--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 2]
CLOCK += ["--normalize-obs", "--normalize-rewards", "--eval-episodes", 2, "--checkpoint-every", 5]
TINY = ["--hidden-sizes", 8, "--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1]


def stepping_ranks(file: Path, ranks: int, switches: list) -> int:
    """The number of ranks that step environments."""
    return ranks if file != DECOUPLED else 2 if PLAYERS[0] in switches else 1


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.rglob("checkpoints/step-*.pt"))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) of the only run below a folder but the times, as TensorBoard shows them."""
    (events,) = {path.parent for path in folder.rglob("events.*")}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}, purge_orphaned_data=True).Reload()
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


STOPPED = [(TORCH, 1, 0, []), (DECOUPLED, 2, 0, [])]
MORE = [(TORCH, 2, 1, ["--share-data"]), (TORCH, 2, 0, ["--optimizer", "rmsprop"]), (FABRIC, 2, 0, [])]
MORE += [(TORCH, 2, 0, DDP), (DECOUPLED, 2, 1, []), (DECOUPLED, 3, 2, [])]
MORE += [(DECOUPLED, 4, 1, PLAYERS), (DECOUPLED, 4, 3, [*PLAYERS, "--share-data"])]
STOPPED += [pytest.param(*case, marks=SLOW) for case in MORE]


@pytest.mark.parametrize("file, ranks, stopped_rank, switches", STOPPED, **NAMES)
def test_a_stopped_and_resumed_run_ends_with_the_bits_of_one_that_was_not(
    tmp_path, file, ranks, stopped_rank, switches
):
    """Stopped by SIGTERM to one rank wherever it happens to be; episodes end where the rollouts do."""
    rows = 100 * stepping_ranks(file, ranks, switches) * 4 * 16
    flags = [file, *CLOCK, "--total-timesteps", rows, *switches]
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
    global_step = load(last)["global_step"]
    assert 0 < load(last)["rows"] < rows
    output = run([*LAUNCHERS[file](ranks), *flags, "--resume", "auto"], cwd=tmp_path / "stopped")
    assert f"resuming {last.relative_to(tmp_path / 'stopped')} at step {global_step}" in output
    assert straight.finish()[0] == 0
    ends = [load(checkpoints(tmp_path / name)[-1]) for name in ("straight", "stopped")]
    assert ends[0]["rows"] == rows
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
    assert status == 143 and "stopped by a signal" in output and len(checkpoints(tmp_path)) == 1
    flags = ["--num-steps", 10**5, "--total-timesteps", 10**7, "--per-rank-batch-size", 10**5, "--vec-env", vec_env]
    command = Command([*torchrun(1), TORCH, *flags], cwd=tmp_path)  # whose first iteration takes long
    wait_for(lambda: len({path.parent for path in tmp_path.rglob("events.*")}) == 2)
    time.sleep(1)
    os.kill(command.pid, number)
    time.sleep(1.5)
    assert command.is_running()
    os.kill(command.pid, number)
    assert command.finish(timeout=5)[0] == 128 + number
    assert len(checkpoints(tmp_path)) == 1


SIGNALLED = [(TORCH, 1, 0, []), (TORCH, 2, 1, TCP), (DECOUPLED, 2, 1, ["--overlap"])]
SIGNALLED += [pytest.param(*case, marks=SLOW) for case in ((TORCH, 2, 0, DDP), (FABRIC, 2, 0, []))]
SIGNALLED += [pytest.param(DECOUPLED, 4, rank, PLAYERS, marks=SLOW) for rank in (2, 3)]


@pytest.mark.parametrize("file, ranks, signalled_rank, switches", SIGNALLED, **NAMES)
def test_a_signal_during_an_update_ends_the_run_with_it(tmp_path, file, ranks, signalled_rank, switches):
    """One that takes seconds; no rank begins another rollout, but for players who have done so before."""
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
    assert load(path)["rows"] == 16 * 4 * stepping_ranks(file, ranks, switches), output
    assert (tmp_path / "rollout-2").exists() == ("--overlap" in switches)
    assert not (tmp_path / "rollout-3").exists()


EVALUATED = [(TORCH, 1), *(pytest.param(file, 2, marks=SLOW) for file in (FABRIC, DECOUPLED))]


@pytest.mark.parametrize("file, ranks", EVALUATED, **NAMES)
def test_a_signal_ends_an_evaluation(tmp_path, file, ranks):
    """That of an agent whose episodes never end; the last checkpoint is already there."""
    rows = 512 * stepping_ranks(file, ranks, [])
    flags = ["--env-id", "toy_envs:Evaluated-v0", "--env-kwargs", '{"raises":false}', "--total-timesteps", rows]
    command = Command([*REAL_LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    (path,) = wait_for(lambda: checkpoints(tmp_path))
    time.sleep(1)
    assert command.is_running() and load(path)["rows"] == rows
    os.kill(command.pid, signal.SIGTERM)
    status, _ = command.finish(timeout=20)
    assert status == 143 if ranks == 1 else status != 0
    assert checkpoints(tmp_path) == [path]
    logs = curves(tmp_path)
    assert len(logs["Loss/value_loss"]) == 1 and "Test/cumulative_reward" not in logs


def test_an_evaluation_that_raises_leaves_the_checkpoint_and_a_resumed_run_evaluates(tmp_path):
    flags = ["--env-id", "toy_envs:Evaluated-v0", "--total-timesteps", 1024, "--eval-every", 1, "--resume", "auto"]
    command = [*torchrun(1), TORCH, *flags, "--checkpoint-every", 1, "--env-kwargs"]
    for rows in (512, 1024):  # the second run evaluates its last checkpoint only
        raises([*command, '{"raises":true}'], tmp_path, "RuntimeError: the simulator broke")
        assert load(checkpoints(tmp_path)[-1])["rows"] == rows
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    sound = ['{"raises":true}', "--num-envs", 2, "--eval-episodes", 2]  # the first four environments are
    output = run([*command, *sound], cwd=tmp_path)
    last = load(checkpoints(tmp_path)[-1])["global_step"]
    assert f"step {last}: greedy return 10.00" in output
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)} == before
    logs = curves(tmp_path)
    assert logs["Test/cumulative_reward"] == [(last, 10.0)] and len(logs["Info/learning_rate"]) == 2


EACH = [TORCH, *(pytest.param(file, marks=SLOW) for file in (FABRIC, DECOUPLED))]


@pytest.mark.parametrize("file", EACH, **NAMES)
def test_rank_0_writes_its_checkpoint_before_the_others_leave(tmp_path, file):
    """A rank that leaves makes the launcher send a signal to the others, here long after the first one."""
    flags = ["--num-steps", 5000, "--update-epochs", 1, "--hidden-sizes", 512, 512, "--checkpoint-every", 1]
    flags += ["--per-rank-batch-size", 2500, "--total-timesteps", 10**8]
    ranks = 3 if file == DECOUPLED else 2
    command = Command([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path)
    (first,) = wait_for(lambda: checkpoints(tmp_path), timeout=90)
    os.kill(command.rank_pid(0), signal.SIGTERM)
    status, output = command.finish(timeout=60)
    assert status != 0 and "stopped by a signal" in output and checkpoints(tmp_path)[-1] != first, output


@SLOW
@pytest.mark.parametrize(
    "file, ranks, switches",
    [(TORCH, 2, []), (FABRIC, 2, []), (DECOUPLED, 3, []), (DECOUPLED, 4, [*PLAYERS, "--overlap"])],
    **NAMES,
)
def test_the_launcher_passes_a_signal_on(tmp_path, file, ranks, switches):
    flags = [*TINY, *switches, "--total-timesteps", 10**7, "--vec-env", "async", "--checkpoint-every", 10**6]
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
MORE_KILLS = [(FABRIC, 2, (0, 0.1), []), (TORCH, 2, (0, 0.2), [*DDP, "--eval-every", 7])]
MORE_KILLS += [(DECOUPLED, 2, (rank, 0.1), []) for rank in range(2)]
MORE_KILLS += [(DECOUPLED, 4, (rank, 0.2), [*PLAYERS, "--overlap", "--eval-every", 7]) for rank in range(4)]
KILLS += [pytest.param(*case, marks=SLOW) for case in MORE_KILLS]


@pytest.mark.parametrize("file, ranks, kill, switches", KILLS, **NAMES)
def test_a_killed_rank_costs_no_more_than_an_interval(tmp_path, file, ranks, kill, switches):
    rollout = stepping_ranks(file, ranks, switches) * 4 * 16
    flags = [*TINY, "--total-timesteps", 200 * rollout, "--eval-episodes", 1, "--checkpoint-every", 10, *switches]
    kill_and_finish(file, ranks, [*flags, "--resume", "auto"], [kill], tmp_path)
    assert_whole(tmp_path, 200 * rollout, rollout)


@SLOW
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("file, ranks, runs", [(TORCH, 2, 4), (FABRIC, 2, 1), (DECOUPLED, 3, 1)], **NAMES)
def test_many_kills_and_a_solved_cartpole(tmp_path, file, ranks, runs):
    """Each rank in turn, at random moments, five kills a run: twenty under torchrun, ten of them with DDP."""
    moments = torch.rand(runs, 5)
    for number in range(runs):
        kills = [((number * 5 + i) % ranks, 2 * float(moments[number, i])) for i in range(5)]
        folder = tmp_path / str(number)
        folder.mkdir()
        switches = [] if file == DECOUPLED else DDP if number % 2 else TCP
        kill_and_finish(file, ranks, ["--resume", "auto", "--checkpoint-every", 5, *switches], kills, folder)
        rollout = stepping_ranks(file, ranks, []) * 512
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
    files = [(TORCH, 2, []), (DECOUPLED, 3, []), (FABRIC, 1, []), (FABRIC, 2, [])]
    files += [(DECOUPLED, 4, [*PLAYERS, "--overlap"]), (TORCH, 1, [])]
    for file, ranks, switches in files:
        rows += 1024
        last = checkpoints(tmp_path)[-1]
        command = [*LAUNCHERS[file](ranks), file, *flags, last, "--total-timesteps", rows, *switches]
        output = run(command, cwd=tmp_path)
        assert f"resuming {last} at step" in output and re.search(f"{ranks} ranks|players", output)
        assert load(checkpoints(tmp_path)[-1])["rows"] == rows
    assert len({path.parent for path in tmp_path.rglob("events.*")}) == 1  # all of it in one directory
    steps = [step for step, _ in curves(tmp_path)["Info/learning_rate"]]
    assert steps == sorted(set(steps)) and len(steps) == 64 + 8 + 16 + 16 + 8 + 8 + 16


def test_a_complete_run_that_is_resumed_evaluates(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    flags = [*TINY, "--total-timesteps", 4096, "--eval-episodes", 3, "--resume", "auto"]
    output = run([*torchrun(1), TORCH, *flags], cwd=tmp_path)
    line = re.findall(r"^step \d+: greedy return .*$", (trained / "output").read_text(), re.MULTILINE)[-1]
    assert output.count("greedy return") == 1 and line in output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pt")} == before
    assert len(curves(tmp_path)["Info/learning_rate"]) == 64


@pytest.mark.parametrize("name", ["the first", "best"])
def test_an_older_checkpoint_begins_a_new_run(trained, tmp_path, name):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    path = checkpoints(tmp_path)[0] if name == "the first" else next(tmp_path.rglob("best.pt"))
    flags = [*TINY, "--total-timesteps", 8192, "--eval-episodes", 0, "--resume", path]
    run([*torchrun(1), TORCH, *flags], cwd=tmp_path)
    _, new = sorted({path.parent for path in tmp_path.rglob("events.*")})
    assert load(checkpoints(new)[-1])["rows"] == 8192
    assert len(curves(new)["Info/learning_rate"]) == (8192 - load(path)["rows"]) // 64
    assert all(path.read_bytes() == content for path, content in before.items())


def test_auto_is_the_last_of_the_newest_run_of_this_name(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ppo.Args(resume="auto", hidden_sizes=(8,))
    run_dir, state = ppo.open_run(args, "logs")
    assert state is None and re.fullmatch(r"logs/CartPole-v1_ppo_1_\d{4}-\d\d-\d\d_[\d-]+", run_dir)
    (old,) = {path.parents[1] for path in checkpoints(trained)}
    names = ["2100-01-01_00-00-00-000000", "2100-01-02_00-00-00-000000"]
    for i, name in enumerate(names):
        folder = tmp_path / "logs" / f"CartPole-v1_ppo_1_{name}"
        shutil.copytree(old, folder)
        checkpoints(folder)[i].rename(folder / "checkpoints" / f"step-{10**11 - i:012d}.pt")
    (tmp_path / "logs" / "CartPole-v1_ppo_1_2100-01-03_00-00-00-000000").mkdir()  # that has not come so far
    for other in ("CartPole-v1_ppo_2", "CartPole-v1_ppo_1_2", "CartPole-v1_ppo2_1"):
        shutil.copytree(old, tmp_path / "logs" / f"{other}_2100-01-04_00-00-00-000000")
    run_dir, state = ppo.open_run(args, "logs")
    assert run_dir == f"logs/CartPole-v1_ppo_1_{names[1]}" and state["rows"] == 60 * 64


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
            pickle.dump({"version": 2, "agent": Malicious()}, file)
    elif how == "malicious in torch's format":
        torch.save({"version": 2, "agent": Malicious()}, path)
    elif how == "another version":
        torch.save(load(path) | {"version": 99}, path)


BAD = {
    "truncated": ({}, "is no checkpoint of this program: "),
    "empty": ({}, "is no checkpoint of this program: EOFError"),
    "missing": ({}, "is no checkpoint of this program: FileNotFoundError"),
    "malicious": ({}, "is no checkpoint of this program: UnpicklingError"),
    "malicious in torch's format": ({}, "is no checkpoint of this program: UnpicklingError"),
    "another version": ({}, "is of version 99, this program reads version 2"),
    "another environment": ({"env_id": "Acrobot-v1"}, "was trained with env_id CartPole-v1"),
    "another optimizer": ({"optimizer": "rmsprop"}, "was trained with optimizer adam"),
    "other sizes": ({"hidden_sizes": (16,)}, "was trained with hidden_sizes (8,)"),
    "other observations": ({"normalize_obs": True}, "was trained with normalize_obs False"),
    "other rewards": ({"normalize_rewards": True}, "was trained with normalize_rewards False"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_checkpoint_is_refused(trained, tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copy(checkpoints(trained)[-1], tmp_path / "agent.pt"))
    damage(path, how)
    flags, said = BAD[how]
    args = ppo.Args(resume=str(path), **{"hidden_sizes": (8,)} | flags)
    with pytest.raises(SystemExit, match=re.escape(f"error: {path} {said}")) as refusal:
        ppo.open_run(args, "logs")
    assert "\n" not in str(refusal.value) and not (tmp_path / "owned").exists()


REFUSED = [("malicious", [], "--evaluate"), ("other sizes", ["--hidden-sizes", 16], "--resume")]


@pytest.mark.parametrize("file", EACH, **NAMES)
@pytest.mark.parametrize("how, flags, flag", REFUSED)
def test_a_bad_checkpoint_ends_all_ranks(trained, tmp_path, how, file, flags, flag):
    path = Path(shutil.copy(checkpoints(trained)[-1], tmp_path / "agent.pt"))
    damage(path, how)
    fails([*LAUNCHERS[file](2), file, *TINY, *flags, flag, path], tmp_path, BAD[how][1])
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
    script = tmp_path / "dies.py"
    script.write_text(DIES_WRITING.format(root=str(ROOT), file=file.stem))
    flags = [*TINY, "--total-timesteps", 2048, "--checkpoint-every", 5, "--eval-episodes", 1, "--resume", "auto"]
    launcher = LAUNCHERS[file](fewest_ranks(file))
    status, _ = Command([*launcher, script, *flags], cwd=tmp_path).finish()
    assert status != 0 and [load(path)["rows"] for path in checkpoints(tmp_path)] == [5 * 64, 10 * 64]
    assert len(list(tmp_path.rglob("incomplete"))) == 1
    run([*launcher, file, *flags], cwd=tmp_path)
    assert_whole(tmp_path, 2048, 64)
    assert not list(tmp_path.rglob("incomplete"))


def test_a_full_disk(trained, tmp_path):
    """/dev/full in place of the file that is written; test_a_full_tmpfs is the real thing."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    full = checkpoints(tmp_path)[0].parent / "incomplete"
    full.symlink_to("/dev/full")
    command = [*torchrun(1), TORCH, *TINY, "--total-timesteps", 8192, "--resume", "auto"]
    fails_with_one_line(command, tmp_path, "No space left on device; earlier checkpoints are whole")
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)} == before
    full.unlink()  # there is space again
    run(command, cwd=tmp_path)
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
    assert load(whole)["rows"] == 512


FAULTS = {
    "an unknown flag": (TORCH, 1, "--no-such-flag 1", "no-such-flag"),
    "a word for a number": (TORCH, 1, "--num-envs four", "four"),
    "a value that is no choice": (TORCH, 1, "--vec-env fast", "fast"),
    "arguments that are no JSON": (TORCH, 2, "--env-kwargs {length:7}", "error: --env-id CartPole-v1 "),
    "an argument that the environment has not": (FABRIC, 2, '--env-kwargs {"no_such":1}', "no_such"),
    "no checkpoint to keep": (FABRIC, 2, "--keep-checkpoints 0", "error: --keep-checkpoints"),
    "a package that is not there": (TORCH, 1, "--env-id no_such_package:Env-v0", "error: --env-id no_such_package"),
    "a lost environment process": (TORCH, 1, "--env-id toy_envs:Dies-v0 --vec-env async", "Error"),
    "one of two ranks' lost": (TORCH, 2, "--env-id toy_envs:Dies-v0 --vec-env async", "Error"),
    "a player's": (DECOUPLED, 3, "--env-id toy_envs:Dies-v0 --vec-env async --overlap", "Error"),
    "a wrong shape": (TORCH, 1, "--env-id toy_envs:WrongShape-v0", "ValueError: "),
    "a player's wrong shape": (DECOUPLED, 2, "--env-id toy_envs:WrongShape-v0", "ValueError: "),
    "a wrong shape, async": (TORCH, 1, "--env-id toy_envs:WrongShape-v0 --vec-env async", "ValueError: "),
}


def raises(command: list, folder: Path, said: str) -> str:
    """An end soon, no process left, a status that is not 0, and the cause in the output returned."""
    status, output = Command(command, cwd=folder).finish(timeout=60)
    assert status != 0 and said in output, output
    return output


@pytest.mark.parametrize("case", cases(FAULTS, "an unknown flag", "a lost environment process"))
def test_faults(tmp_path, case):
    file, ranks, flags, said = FAULTS[case]
    raises([*LAUNCHERS[file](ranks), file, *flags.split()], tmp_path, said)
    assert not checkpoints(tmp_path)


MORE_HANGS = [(TORCH, DDP), (FABRIC, TCP), (FABRIC, DDP), (DECOUPLED, [])]
HANGS = [(TORCH, TCP), *(pytest.param(*case, marks=SLOW) for case in MORE_HANGS)]


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
    assert status != 0
    if switches == TCP:
        assert "error: --dist-timeout: waited 3 seconds" in last_line(output), output
    else:
        assert re.search("[Tt]imed out", output), output


DIVERGES = """
import sys
sys.path.insert(0, {root!r})
import {file} as ppo, tyro
steps, ppo_loss = [], ppo.ppo_loss
def diverging(*arguments):  # in the sixth minibatch, in the middle of the third update
    steps.append(0)
    loss, metrics = ppo_loss(*arguments)
    return (loss * float("inf"), metrics) if len(steps) == 6 else (loss, metrics)
ppo.ppo_loss = diverging
ppo.main(tyro.cli(ppo.Args))
"""


@pytest.mark.parametrize("file", EACH, **NAMES)
def test_nothing_that_is_not_finite_reaches_a_checkpoint_or_a_curve(tmp_path, file):
    """Nor do the parameters that it has made; the run goes on from the last checkpoint."""
    script = tmp_path / "diverges.py"
    script.write_text(DIVERGES.format(root=str(ROOT), file=file.stem))
    flags = [*TINY, "--total-timesteps", 512, "--checkpoint-every", 1, "--keep-checkpoints", 9, "--resume", "auto"]
    launcher = LAUNCHERS[file](fewest_ranks(file))
    output = raises([*launcher, script, *flags], tmp_path, "error: iteration 3: not finite: ")
    assert "grad_norm" in output
    assert [load(path)["rows"] for path in checkpoints(tmp_path)] == [64, 128]
    assert all(tensor.isfinite().all() for tensor in load(checkpoints(tmp_path)[-1])["agent"].values())
    assert len(curves(tmp_path)["Loss/grad_norm"]) == 2
    run([*launcher, file, *flags], cwd=tmp_path)
    assert_whole(tmp_path, 512, 64)


def test_a_simulator_that_hangs_is_no_orphan(tmp_path):
    flags = ["--env-id", "toy_envs:Hangs-v0", "--vec-env", "async", "--eval-episodes", 0]
    command = Command([*real_torchrun(2), TORCH, *flags], cwd=tmp_path, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="2")
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.pid, signal.SIGTERM)
    assert command.finish(timeout=20)[0] != 0
