"""What only the decoupled file has, on many ranks: faults of players and of trainers, and numbers of both."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from launch import BIN, ROOT, Command, fabric_run, free_port, run, torchrun, wait_for
from test_checkpoints import CLOCK, TINY, checkpoints, curves, load
from test_launch import (
    DECOUPLED,
    PLAYERS,
    SLOW,
    SMALL,
    assert_shown_first,
    cases,
    fails,
    fails_with_one_line,
    last_line,
    scalars,
)

OVERLAP = ["--overlap"]


@SLOW
def test_two_machines_and_no_seed_twice(tmp_path):
    """Two agents of the launcher on this machine, two ranks each; every environment of the run has a seed of its own.

    Those are 16 of two players, and the evaluation's two.
    """
    diary, port = tmp_path / "diary", free_port()
    diary.mkdir()
    flags = [*SMALL, "--total-timesteps", 2 * 2 * 8 * 32, "--env-id", "toy_envs:Diary-v0", "--seed", 5]
    flags += [*PLAYERS, "--num-envs", 8]
    machines = []
    for rank, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        launcher = [BIN / "fabric", "run", "--accelerator=cpu", "--num-nodes=2", "--devices=2"]
        launcher += [f"--node-rank={rank}", "--main-address=127.0.0.1", f"--main-port={port}"]
        machines.append(Command([*launcher, DECOUPLED, *flags], cwd=tmp_path / name, DIARY=str(diary)))
    results = [machine.finish() for machine in machines]
    assert [status for status, _ in results] == [0, 0], results
    seeds = {}
    for path in diary.iterdir():
        seeds.setdefault(path.name.split("-")[0], []).append(int(path.read_text()))
    seeds = {rank: sorted(of_rank) for rank, of_rank in seeds.items()}
    evaluation = [5 + 10**9, 6 + 10**9]
    assert seeds == {"0": [*range(5, 13)], "1": [*range(13, 21)], "2": evaluation}
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 2  # and one rank alone writes


ENVS = [(3, "ALE/Pong-v5", "native", []), (2, "Pong-v5", "envpool", []), (3, "Pendulum-v1", "async", OVERLAP)]


@SLOW
@pytest.mark.parametrize("ranks, env_id, vec_env, switches", ENVS)
def test_vector_environments_of_others(tmp_path, ranks, env_id, vec_env, switches):
    flags = ["--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1, "--eval-episodes", 1]
    flags += ["--total-timesteps", 256, "--env-id", env_id, "--vec-env", vec_env, *switches]
    if "Pong" in env_id:  # whose episodes are long
        flags += ["--eval-episodes", 0]
    run([*fabric_run(ranks), DECOUPLED, *flags], cwd=tmp_path)
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 4


BAD_INPUT = {
    "no trainer": (2, [], "--num-players 2", "--num-players 2 of 2 ranks leaves no player or no trainer"),
    "no player": (2, [], "--num-players 0", "--num-players 0 of 2 ranks leaves no player or no trainer"),
    "trainers": (4, [], "--num-envs 2", "--num-envs 2 leaves some of 3 trainers without any"),
    "trainers and two players": (5, [], "--num-players 2 --num-envs 1", "--num-envs 1 leaves some of 3 trainers"),
    "precision": (2, ["--precision=bf16-mixed"], "", "--precision must be 32-true"),
    "strategy": (2, ["--strategy=fsdp"], "", "--strategy ddp"),
    "player on a GPU": (2, [], "--player-on-gpu", "--player-on-gpu needs --cuda"),
    "no GPU": (2, [], "--cuda", "--cuda needs more GPUs than the 0 here: leave --cuda out"),
    "no GPU for a player": (2, [], "--cuda --player-on-gpu", "--player-on-gpu needs more GPUs than the 0 here"),
    "no size": (2, [], "--num-envs 0", "--num-envs must be at least 1"),
    "zero updates": (2, [], "--total-timesteps 500", "--total-timesteps 500"),
    "batch": (3, [], "--per-rank-batch-size 513", "--per-rank-batch-size 513 does not fit a rollout of 512 steps on 2"),
    "unknown environment": (3, [], "--env-id NoSuch-v0", "NoSuch"),
    "NaN reward": (3, [], "--env-id toy_envs:NanReward-v0 --overlap", "iteration 1: not finite: rewards"),
    "NaN observation": (4, [], "--env-id toy_envs:NanObsBox-v0 --num-players 2", "iteration 1: not finite: obs"),
    "NaN in the last observation": (
        3,
        [],
        "--env-id toy_envs:NanObs-v0 --num-steps 5 --per-rank-batch-size 4 --overlap",
        "iteration 1: not finite: ",
    ),
    "divergence": (3, [], "--learning-rate 1e30", "not finite: "),
    "divergence, overlap": (3, [], "--learning-rate 1e30 --overlap", "not finite: "),
    "divergence, two players": (3, [], "--learning-rate 1e30 --overlap --num-players 2", "not finite: "),
}


@pytest.mark.parametrize("case", cases(BAD_INPUT, "no trainer", "NaN observation", "divergence, overlap"))
def test_bad_input(tmp_path, case):
    ranks, options, flags, said = BAD_INPUT[case]
    fails_with_one_line([*fabric_run(ranks, *options), DECOUPLED, *flags.split()], tmp_path, said)


ONE_RANK = {"python": torchrun(1), "fabric run": fabric_run(1, "--num-nodes=1")}


@pytest.mark.parametrize("launcher", cases(ONE_RANK, "python"))
def test_one_rank_is_too_few(tmp_path, launcher):
    fails_with_one_line([*ONE_RANK[launcher], DECOUPLED], tmp_path, "--num-players 1 of 1 ranks leaves no player or no")


@SLOW
def test_torchrun_starts_the_file_as_well(tmp_path):
    run([*torchrun(3), DECOUPLED, *SMALL, "--total-timesteps", 512], cwd=tmp_path)
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 4


KILLED = [(3, 0, []), *(pytest.param(3, rank, more, marks=SLOW) for more in ([], PLAYERS) for rank in (1, 2))]
KILLED += [pytest.param(3, rank, [*PLAYERS, *OVERLAP], marks=SLOW) for rank in range(3)]
KILLED += [pytest.param(4, rank, [*PLAYERS, *more], marks=SLOW) for more in ([], OVERLAP) for rank in range(4)]


@pytest.mark.parametrize("ranks, rank, switches", KILLED)
def test_a_killed_rank_ends_the_others(tmp_path, ranks, rank, switches):
    command = Command([*fabric_run(ranks), DECOUPLED, "--total-timesteps", 10**7, *switches], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.rank_pid(rank), signal.SIGKILL)
    status, output = command.finish(timeout=15)
    assert status != 0 and "SIGKILL" in output.partition("Root Cause")[2], output


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("switches", [[], pytest.param(OVERLAP, marks=SLOW)], ids=["", "overlap"])
def test_a_player_killed_while_another_waits_ends_the_run(tmp_path, ranks, switches):
    step = "            numbers = collect_rollout("
    file = hacked(tmp_path, (step, "            if rank == 1:\n                time.sleep(60)\n" + step))
    command = Command([*fabric_run(ranks), file.name, *PLAYERS, *switches], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)  # player 0 has sent its rollout
    os.kill(command.rank_pid(1), signal.SIGKILL)
    status, output = command.finish(timeout=15)
    assert status != 0 and "SIGKILL" in output.partition("Root Cause")[2], output


BREAKS = """
import os, sys
sys.path.insert(0, {root!r})
import ppo_fabric_decoupled as ppo, tyro
calls, function = [], ppo.{function}
def breaking(*arguments):  # the third time
    calls.append(0)
    if len(calls) == 3 and os.environ["RANK"] == "{rank}":
        raise RuntimeError("the trainer broke")
    return function(*arguments)
ppo.{function} = breaking
try:
    ppo.main(tyro.cli(ppo.Args))
except Exception as error:
    ppo.get_error_handler().record_exception(error)
    raise
"""
BREAKING = [(4, 3, "update", [*PLAYERS, *OVERLAP])]
MORE_BREAKING = [(2, 1, "update", []), (4, 2, "update", PLAYERS), (4, 3, "update", PLAYERS)]
MORE_BREAKING += [(3, 1, "make_batch", []), (3, 2, "make_batch", []), (3, 2, "make_batch", PLAYERS)]
MORE_BREAKING += [(2, 1, "evaluate", []), (3, 1, "evaluate", [])]
for ranks, rank, function, switches in MORE_BREAKING:
    BREAKING += [pytest.param(ranks, rank, function, [*switches, *more], marks=SLOW) for more in ([], OVERLAP)]


@pytest.mark.parametrize("ranks, rank, function, switches", BREAKING)
def test_a_trainer_that_fails_ends_the_others(tmp_path, ranks, rank, function, switches):
    """Before its third update, in it, or in the third evaluation."""
    script = tmp_path / "breaks.py"
    script.write_text(BREAKS.format(root=str(ROOT), function=function, rank=rank))
    flags = [*TINY, "--total-timesteps", 10**6, "--eval-every", 1, "--eval-episodes", 1, *switches]
    status, output = Command([*fabric_run(ranks), script, *flags], cwd=tmp_path).finish(timeout=20)
    assert status != 0
    assert_shown_first("RuntimeError: the trainer broke", output)
    assert "RuntimeError: the trainer broke" in output.partition("Root Cause")[2], output


@pytest.mark.parametrize("ranks, switches", [(2, []), *(pytest.param(3, more, marks=SLOW) for more in ([], OVERLAP))])
def test_a_disk_that_is_full_for_the_first_trainer(tmp_path, ranks, switches):
    flags = [*TINY, "--checkpoint-every", 1, *switches]
    run([*fabric_run(ranks), DECOUPLED, *flags, "--total-timesteps", 256, "--eval-episodes", 0], cwd=tmp_path)
    before = {path: path.read_bytes() for path in checkpoints(tmp_path)}
    (checkpoints(tmp_path)[0].parent / "incomplete").symlink_to("/dev/full")
    command = [*fabric_run(ranks), DECOUPLED, *flags, "--total-timesteps", 8192, "--resume", "auto"]
    output = fails(command, tmp_path, "No space left on device; earlier checkpoints are whole")
    assert_shown_first("No space left on device", output)
    assert {path: path.read_bytes() for path in checkpoints(tmp_path)} == before


SIGNALLED = [(2, 0, []), *(pytest.param(4, rank, [*PLAYERS, *OVERLAP], marks=SLOW) for rank in range(4))]


@pytest.mark.parametrize("ranks, rank, switches", SIGNALLED)
def test_a_signal_to_any_rank_stops_the_run_for_good(tmp_path, ranks, rank, switches):
    flags = [*TINY, "--total-timesteps", 10**7, "--checkpoint-every", 10**6, *switches]
    command = Command([*fabric_run(ranks), DECOUPLED, *flags], cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("events.*")))
    time.sleep(1)
    os.kill(command.rank_pid(rank), signal.SIGTERM)
    status, output = command.finish(timeout=15)
    (path,) = checkpoints(tmp_path)
    assert status != 0 and f"stopped by a signal: go on with --resume {path.relative_to(tmp_path)}" in output, output
    assert not re.search("Traceback|Error", output.partition("=" * 20)[0]), output


@SLOW
def test_a_stopped_and_resumed_run_with_overlap_is_whole(tmp_path):
    """Not with the bits of one that was not stopped: its players begin anew with the newest agent."""
    flags = [*CLOCK, *PLAYERS, *OVERLAP, "--total-timesteps", 100 * 2 * 4 * 16, "--resume", "auto"]
    command = Command([*fabric_run(4), DECOUPLED, *flags], cwd=tmp_path)
    wait_for(lambda: checkpoints(tmp_path))
    os.kill(command.rank_pid(0), signal.SIGTERM)
    assert command.finish()[0] != 0
    done = load(checkpoints(tmp_path)[-1])["rows"] // 128
    run([*fabric_run(4), DECOUPLED, *flags], cwd=tmp_path)
    assert load(checkpoints(tmp_path)[-1])["rows"] == 100 * 128
    lags = [value for _, value in curves(tmp_path)["Info/policy_lag"]]
    assert 0 < done < 100 and len(lags) == 100 and [i for i, lag in enumerate(lags) if lag == 0] == [0, done]


STORED = "    wait_seconds = 0.0\n"  # behind make_storage
WEIGHTS = '    weights = minibatch["weights"]\n'
ONLY_ONE = STORED + '    if rank == {rank}:\n        rollout["bonus"] = np.zeros_like(rollout["rewards"])\n'
SIDES = {  # ranks, the place of a change, what is there then, and what is said
    "a column of player 1": (4, STORED, ONLY_ONE.format(rank=1), "error: not all players send the same column 'bonus'"),
    "a column of player 0": (4, STORED, ONLY_ONE.format(rank=0), "error: not all players send the same column 'bonus'"),
    "another type": (
        4,
        STORED,
        STORED + '    rollout["rewards"] = rollout["rewards"].astype(np.float32 if rank else np.float64)\n',
        "error: not all players send the same column 'rewards'",
    ),
    "no column of rows": (
        4,
        STORED,
        STORED + '    rollout["bonus"] = np.zeros((args.num_steps + 1, 3))\n',
        ", 3), not (num_steps + 1, num_envs, ...)",
    ),
    "a column that nobody sends": (3, WEIGHTS, WEIGHTS + '    minibatch["bonus"]\n', "KeyError: 'bonus'"),
}


@pytest.mark.parametrize("side", cases(SIDES, "a column of player 1", "a column that nobody sends"))
@pytest.mark.parametrize("switches", [[], pytest.param(OVERLAP, marks=SLOW)], ids=["", "overlap"])
def test_a_column_that_one_side_does_not_know(tmp_path, side, switches):
    ranks, old, new, said = SIDES[side]
    file = hacked(tmp_path, (old, new))
    flags = [*TINY, *switches, *(PLAYERS if ranks == 4 else [])]
    status, output = Command([*fabric_run(ranks), file.name, *flags], cwd=tmp_path).finish(timeout=20)
    assert status != 0
    assert_shown_first(said, output)
    assert said in output.partition("Root Cause")[2], output
    if "error: " in said:
        assert "Traceback" not in output.partition("=" * 20)[0] and said in last_line(output), output


def hacked(folder: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the file in which each text is replaced by another."""
    text = DECOUPLED.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} places of {old!r}"
        text = text.replace(old, new)
    path = folder / DECOUPLED.name
    path.write_text(text)
    return path
