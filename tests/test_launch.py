"""The files on many ranks; forked ones, and the real launchers where these are what is tested."""

import re
import shutil
import time
from collections.abc import Iterable
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
TCP = ["--exchange", "tcp"]
DDP = ["--exchange", "ddp"]
PLAYERS = ["--num-players", 2]
SMALL = ["--num-steps", 32, "--per-rank-batch-size", 32, "--update-epochs", 2, "--eval-episodes", 2]


def fewest_ranks(file: Path) -> int:
    """One, or one player and one trainer."""
    return 2 if file == DECOUPLED else 1


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
    valid = first["weights"][0] > 0, second["weights"][0] > 0
    assert valid[0].shape == valid[1].shape == (4, 32)
    for iteration in range(iterations):  # the mean over the ranks of a minibatch is the mean over its rows
        weights = first["weights"][iteration], second["weights"][iteration]
        torch.testing.assert_close((weights[0].sum(1) + weights[1].sum(1)) / 2, torch.ones(4))
    assert_normalised(first, second, share_data, tmp_path)


def assert_normalised(first: dict, second: dict, share_data: bool, folder: Path) -> None:
    """The advantages of all ranks' valid rows have mean 0 and deviation 1, and their number is the steps logged."""
    steps = [0]
    for iteration in range(len(first["batches"])):
        parts = [notes["batches"][iteration] for notes in ((first,) if share_data else (first, second))]
        rows = torch.cat([torch.stack([part["returns"], part["values"], part["advantages"]]) for part in parts], dim=1)
        returns, values, advantages = rows.double()
        dealt = sum((notes["weights"][iteration] > 0).sum() for notes in (first, second))
        steps.append(steps[-1] + int(dealt))
        # before normalising they were returns less values: an increasing linear function with the same two numbers
        raw = returns - values
        slope = (advantages - advantages.mean()) @ (raw - raw.mean()) / ((raw - raw.mean()) ** 2).sum()
        torch.testing.assert_close(advantages, slope * (raw - raw.mean()) + advantages.mean(), atol=1e-4, rtol=1e-4)
    assert [step for step, _ in scalars(folder)["Loss/policy_loss"]] == steps[1:]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=SLOW)])
@pytest.mark.parametrize("exchange", [DDP, TCP], ids=["ddp", "tcp"])
def test_sharing_ranks_equal_one_process_with_the_same_rows(tmp_path, exchange, compiled):
    """Two ranks with --share-data take the steps that one process takes on all the rows, in plain torch."""
    switches = ["--compile"] if compiled else []
    flags = [*SMALL, "--total-timesteps", 1024, "--share-data", *exchange, *switches]
    first, second = run_probe(TORCH, tmp_path, *flags, ranks=2)
    assert first["exchange"] == second["exchange"] == exchange[1]
    args = ppo.Args(update_epochs=2)
    agent = ppo.Agent(*cartpole_spaces(), ppo.Args())
    torch.nn.utils.vector_to_parameters(first["before"].clone(), agent.parameters())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5)
    for iteration, (batch, after) in enumerate(zip(first["batches"], first["after"], strict=True)):
        rng = np.random.default_rng((1, iteration * 2 * 4 * 32, 1, 0))
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / len(first["after"]))
        valid = np.sort(dealt_rows(first, second, iteration))
        assert len(valid) < len(batch["obs"])
        for _ in range(args.update_epochs):
            shuffled = rng.permutation(valid)
            for m in range(4):
                rows = shuffled[m::4]
                minibatch = {name: tensor[rows] for name, tensor in batch.items()}
                minibatch["weights"] = torch.full((len(rows),), 1 / len(rows))
                loss, _ = ppo.ppo_loss(agent(minibatch), minibatch, args)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
                optimizer.step()
        parameters = torch.nn.utils.parameters_to_vector(agent.parameters())
        torch.testing.assert_close(parameters, after, atol=2e-5, rtol=1e-3)
        assert torch.equal(after, second["after"][iteration])


def dealt_rows(first: dict, second: dict, iteration: int) -> np.ndarray:
    """The numbers of the rows that an iteration's first epoch has dealt to two ranks."""
    return torch.cat([note["rows"][iteration][note["weights"][iteration] > 0] for note in (first, second)]).numpy()


@pytest.mark.parametrize("switches", [[], pytest.param(["--compile"], marks=SLOW)], ids=["eager", "compiled"])
def test_two_ranks_over_tcp_have_the_bits_of_ddp(tmp_path, switches):
    """Of two summands the sum is the same in any order, and half of it is exact."""
    flags = [*SMALL, "--total-timesteps", 1024, *switches]
    ddp, _ = run_probe(TORCH, tmp_path / "ddp", *flags, *DDP, ranks=2)
    tcp, _ = run_probe(TORCH, tmp_path / "tcp", *flags, ranks=2)
    assert (ddp["exchange"], tcp["exchange"]) == ("ddp", "tcp")  # the default on one machine
    for mine, yours in zip(ddp["after"], tcp["after"], strict=True):
        assert torch.equal(mine, yours)


def cartpole_spaces() -> tuple[gym.Space, gym.Space]:
    envs, *_ = ppo.make_envs(ppo.Args(), 1, 0)
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


@pytest.mark.parametrize("file", [TORCH, pytest.param(FABRIC, marks=SLOW)], **NAMES)
def test_two_machines_and_no_seed_twice(tmp_path, file):
    """Two agents of the launcher on this machine, two ranks each; every environment of the run has a seed of its own.

    Those are 16 and the evaluation's two.
    """
    diary, port = tmp_path / "diary", free_port()
    diary.mkdir()
    flags = [*SMALL, "--total-timesteps", 2 * 4 * 4 * 32, "--env-id", "toy_envs:Diary-v0", "--seed", 5]
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
    assert len(seeds) == 4 * 4 + 2 and len(set(seeds)) == len(seeds) and min(seeds) == 5
    assert {path.name.split("-")[0] for path in diary.iterdir()} == {"0", "1", "2", "3"}
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 2  # and rank 0 alone writes
    assert re.search(r"4 ranks, \d+ parameters, exchange: ddp", results[0][1] + results[1][1])


SAME_BITS = [
    ("CartPole-v1", 1, []),
    ("CartPole-v1", 2, TCP),
    ("Pendulum-v1", 2, DDP),
    ("CartPole-v1", 2, ["--share-data"]),
]
MORE_BITS = [("CartPole-v1", 1, ["--share-data"]), ("CartPole-v1", 2, [*DDP, "--share-data"]), ("Pendulum-v1", 1, [])]
MORE_BITS += [("CartPole-v1", 1, ["--compile"]), ("CartPole-v1", 2, [*DDP, "--compile"])]
MORE_BITS += [("Pendulum-v1", 2, ["--compile"]), ("Pendulum-v1", 2, ["--compile", "--share-data"])]
SAME_BITS += [pytest.param(*case, marks=SLOW) for case in MORE_BITS]


@pytest.mark.parametrize("env_id, ranks, switches", SAME_BITS)
def test_the_coupled_twins_end_with_the_same_bits(tmp_path, env_id, ranks, switches):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", env_id, *switches]
    flags += ["--normalize-obs", "--normalize-rewards"] if env_id == "Pendulum-v1" and ranks == 2 else []
    both = run_probes(*((file, tmp_path / file.stem, ranks) for file in (TORCH, FABRIC)), flags=flags)
    for mine, yours in zip(*both, strict=True):
        exchange = "none" if ranks == 1 else "ddp" if DDP[1] in switches else "tcp"
        assert mine["exchange"] == yours["exchange"] == exchange
        assert mine["steps"] == yours["steps"] == 1024 // (ranks * 4 * 32) * 2 * 4
        assert torch.equal(mine["after"][-1], yours["after"][-1])
        assert not torch.equal(mine["before"], mine["after"][-1])
        assert mine["seeds"] == yours["seeds"]


COMPILERS = [(TORCH, 1), *(pytest.param(file, 2, marks=SLOW) for file in (FABRIC, DECOUPLED))]


@pytest.mark.parametrize("file, ranks", COMPILERS, **NAMES)
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
    assert status != 0 and re.search("InvalidCxxCompiler: No working C.. compiler found", output), output
    assert not list(tmp_path.rglob("step-*.pt"))


def test_the_coupled_twins_log_the_same(tmp_path):
    logs = []
    for file, folder in ((TORCH, "torch_logs"), (FABRIC, "fabric_logs")):
        run([*LAUNCHERS[file](2), file, *SMALL, "--total-timesteps", 1024, "--target-kl", 0.01], cwd=tmp_path)
        logs.append(scalars(tmp_path / "logs" / folder))
    assert logs[0].keys() == logs[1].keys()
    for tag in logs[0]:
        assert logs[0][tag] == [(step, pytest.approx(value, rel=1e-5)) for step, value in logs[1][tag]]


@pytest.mark.parametrize("file", [TORCH, pytest.param(FABRIC, marks=SLOW)], **NAMES)
def test_training_ranks_stop_together_on_target_kl(tmp_path, file):
    flags = [*SMALL, "--total-timesteps", 512, "--target-kl", 1e-9, "--env-id", "toy_envs:Truncated-v0"]
    notes = run_probe(file, tmp_path, *flags, ranks=2)
    for note in notes:  # the first epoch of each update and no more
        assert note["steps"] == len(note["after"]) * 4 and len(note["after"]) >= 2
    first, second = (note["batches"][0] for note in notes)
    assert torch.equal(first["obs"], second["obs"])  # constants: only the ranks' noise can make their actions differ
    assert not torch.equal(first["actions"], second["actions"])


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
    (FABRIC, "Pendulum-v1", "sync"),
    (DECOUPLED, "CartPole-v1", "async"),
]


@pytest.mark.parametrize("file, env_id, vec_env", VIDEOS, **NAMES)
def test_a_lone_copy_runs_and_makes_videos(tmp_path, file, env_id, vec_env):
    shutil.copy(file, tmp_path)
    flags = [*SMALL, "--total-timesteps", 2048, "--capture-video", "--env-id", env_id, "--vec-env", vec_env]
    launcher = LAUNCHERS[file](fewest_ranks(file))
    if vec_env == "sync":
        launcher = real_torchrun(1)  # a fresh process, which has imported nothing
    output = run([*launcher, file.name, *flags], cwd=tmp_path, PYTHONPATH="")
    assert "greedy return" in output
    videos = {path.parent.name.split("-")[0] for path in tmp_path.rglob("*.mp4") if path.stat().st_size > 1000}
    assert videos == {"train", "test"}


KINDS = [name if name == "Float64-Box" else pytest.param(name, marks=SLOW) for name in PUZZLES]


# `ppo_fabric.py` has the same bits
@pytest.mark.parametrize("file", [TORCH, *(pytest.param(file, marks=SLOW) for file in (FABRIC, DECOUPLED))], **NAMES)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_space_is_learned_on_many_ranks(tmp_path, name, file):
    flags = ["--no-normalize-advantages"]
    for flag, value in puzzle_flags(name).items():
        flags += [f"--{flag.replace('_', '-')}", value] if value is not False else []
    flags += ["--num-envs", 4, "--per-rank-batch-size", 32]
    ranks = 2
    if file == DECOUPLED:  # one player's eight environments for two trainers are as many rows
        ranks, flags = 3, [*flags, "--num-envs", 8]
    run([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path, timeout=120)
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] >= (9.2 if "Box" in name else 9.8)


@pytest.mark.parametrize("file", [TORCH, pytest.param(FABRIC, marks=SLOW)], **NAMES)
def test_normalisers_hold_the_statistics_of_all_ranks_and_make_the_evaluation(tmp_path, file):
    flags = [*SMALL, "--total-timesteps", 1024, "--env-id", "Pendulum-v1", "--env-kwargs", '{"max_episode_steps": 50}']
    flags += ["--normalize-obs", "--normalize-rewards"]
    notes = run_probe(file, tmp_path, *flags, ranks=2)
    states = [note["state"] for note in notes]
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    for rms, size in (("obs_rms", 3), ("reward_rms", 1)):
        rows = torch.cat([row for note in notes for row in note["normalised"][size]]).double().numpy()
        assert len(rows) == 1024 - 2 * 8  # of 128 rows of each environment two are resets
        count, mean, squares = states[0][f"{rms}.moments"]
        np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-9)
        np.testing.assert_allclose(squares / count, rows.var(0), rtol=1e-9)
    short = {"env_id": "Pendulum-v1", "env_kwargs": '{"max_episode_steps": 50}', "eval_episodes": 2}
    args = ppo.Args(normalize_obs=True, normalize_rewards=True, **short)
    agent = ppo.Agent(gym.spaces.Box(-8, 8, (3,)), gym.spaces.Box(-2, 2, (1,)), args)
    agent.load_state_dict(states[0])
    logged = scalars(tmp_path)["Test/cumulative_reward"][-1][1]
    assert ppo.evaluate(agent, args, None, []).mean() == pytest.approx(logged, rel=1e-6)
    for name, buffer in agent.named_buffers():
        assert torch.equal(buffer, states[0][name]), "evaluation must leave the statistics alone"


def test_environment_of_ones_own_with_keyword_arguments(tmp_path):
    flags = [*SMALL, "--total-timesteps", 512, "--env-id", "toy_envs:Terminated-v0", "--env-kwargs", '{"length": 7}']
    run([*torchrun(1), TORCH, *flags], cwd=tmp_path)
    logs = scalars(tmp_path)
    assert {value for _, value in logs["Game/ep_len_avg"]} == {7} and logs["Test/cumulative_reward"][-1][1] == 7


VECTOR_ENVS = [
    (TORCH, 2, "LunarLander-v3", "envpool"),
    (TORCH, 2, "CartPole-v1", "async"),
    pytest.param(FABRIC, 2, "HalfCheetah-v5", "envpool", marks=SLOW),
    pytest.param(TORCH, 2, "Pendulum-v1", "envpool", marks=SLOW),
    pytest.param(TORCH, 2, "ALE/Pong-v5", "native", marks=SLOW),
    pytest.param(FABRIC, 2, "Pong-v5", "envpool", marks=SLOW),
]


@pytest.mark.parametrize("file, ranks, env_id, vec_env", VECTOR_ENVS, **NAMES)
def test_vector_environments_of_others(tmp_path, file, ranks, env_id, vec_env):
    flags = ["--num-steps", 16, "--per-rank-batch-size", 32, "--update-epochs", 1, "--eval-episodes", 0]
    flags += ["--total-timesteps", 256]
    notes = run_probe(file, tmp_path, *flags, "--env-id", env_id, "--vec-env", vec_env, ranks=ranks)
    batches = [note["batches"][0] for note in notes if note["batches"]]
    if "Pong" in env_id:
        assert all(batch["obs"].dtype == torch.uint8 and batch["obs"].shape[1:] == (4, 84, 84) for batch in batches)
    assert not torch.equal(*(batch["obs"] for batch in batches))  # no two ranks with the same seeds
    assert len(scalars(tmp_path)["Loss/policy_loss"]) >= 2


BAD = {
    "unknown environment": ("--env-id NoSuch-v0", "NoSuch"),
    "zero updates": ("--total-timesteps 1000", "--total-timesteps 1000"),
    "batch": ("--per-rank-batch-size 1025", "--per-rank-batch-size 1025"),
    "negative size": ("--num-envs -1", "--num-envs"),
    "zero size": ("--num-steps 0", "--num-steps"),
    "no GPU": ("--cuda", "--cuda"),
    "NaN in the last observation": (
        "--env-id toy_envs:NanObs-v0 --num-steps 5 --per-rank-batch-size 4",
        "not finite: ",
    ),
    "divergence": ("--learning-rate 1e30", "not finite: "),
    "NaN observation": ("--env-id toy_envs:NanObsBox-v0", "iteration 1: not finite: observations"),
    "NaN reward": ("--env-id toy_envs:NanReward-v0", "iteration 1: not finite: rewards"),
}


BAD_FOR_FABRIC = {
    "precision": (["--precision=64-true"], "", "--precision"),
    "precision, compiled": (["--precision=bf16-mixed"], "--compile", "--precision"),
    "unknown environment": ([], "--env-id NoSuch-v0", "NoSuch"),
    "zero updates": ([], "--total-timesteps 1000", "--total-timesteps 1000"),
    "negative size": ([], "--num-envs -1", "--num-envs"),
    "NaN observation": ([], "--env-id toy_envs:NanObsBox-v0", "iteration 1: not finite: observations"),
    "NaN reward": ([], "--env-id toy_envs:NanReward-v0", "iteration 1: not finite: rewards"),
    "divergence": ([], "--learning-rate 1e30", "not finite: "),
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
    """The same, and that line is the only message before a launcher's report; no traceback."""
    output = fails(command, folder, said)
    printed, _, _ = output.partition("=" * 20)
    last = last_line(output)
    assert all(last in line for line in re.findall(r"error: .*", printed)), output  # all ranks that say it say the same
    assert "Traceback" not in printed, output


def last_line(output: str) -> str:
    """The error that the output ends with: as a line of its own, or as the last of a launcher's report."""
    *_, last = [line.strip() for line in output.splitlines() if not re.fullmatch("[= ]*", line)]
    last = re.sub("^(traceback : |SystemExit: )*", "", last)
    assert last.startswith("error: "), output
    return last


@pytest.mark.parametrize("case", cases(BAD, "unknown environment", "no GPU", "NaN observation"))
def test_bad_input_to_the_torch_file(tmp_path, case):
    flags, said = BAD[case]
    fails_with_one_line([*torchrun(2), TORCH, *flags.split()], tmp_path, said)


@pytest.mark.parametrize("case", cases(BAD_FOR_FABRIC))
def test_bad_input_to_the_fabric_file(tmp_path, case):
    options, flags, said = BAD_FOR_FABRIC[case]
    fails_with_one_line([*fabric_run(2, *options), FABRIC, *flags.split()], tmp_path, said)


@pytest.mark.slow
def test_a_strategy_that_cannot_run_the_file(tmp_path):
    """The error is Fabric's own."""
    status, output = Command([*fabric_run(2, "--strategy=fsdp"), FABRIC], cwd=tmp_path).finish()
    assert status != 0 and "FSDP" in output.splitlines()[-2] + output.partition("Root Cause")[0], output


def test_fabric_run_starts_its_two_files(tmp_path):
    """As README does, with few steps; its first command, which a test runs in full, is torchrun's."""
    commands = []
    for file, options in ((FABRIC, ["--strategy=ddp"]), (DECOUPLED, [])):
        (tmp_path / file.stem).mkdir()
        ranks = 2 if file == FABRIC else 3
        command = [*real_fabric_run(ranks, *options), file, *SMALL, "--total-timesteps", 1024]
        commands.append(Command(command, cwd=tmp_path / file.stem))
    for status, output in [command.finish() for command in commands]:
        assert status == 0 and "greedy return" in output, output


def test_torchrun_is_not_for_the_fabric_file(tmp_path):
    fails_with_one_line([*torchrun(2), FABRIC], tmp_path, "fabric run")


def test_a_launcher_without_gpus_starts_nothing(tmp_path):
    """That error is the launcher's own: `fabric run` raises it before our first line."""
    command = [BIN / "fabric", "run", "--accelerator=gpu", "--devices=2", FABRIC]
    status, output = Command(command, cwd=tmp_path).finish()
    assert status != 0 and "MisconfigurationException" in output


BREAKING = [(TORCH, 2, 0, []), (TORCH, 2, 1, []), (DECOUPLED, 4, 1, [*PLAYERS, "--overlap"])]
BREAKING += [pytest.param(file, 2, rank, DDP, marks=SLOW) for file in (TORCH, FABRIC) for rank in range(2)]
BREAKING += [pytest.param(DECOUPLED, ranks, rank, PLAYERS, marks=SLOW) for ranks in (3, 4) for rank in range(2)]
BREAKING += [pytest.param(DECOUPLED, 3, rank, [*PLAYERS, "--overlap"], marks=SLOW) for rank in range(2)]


@pytest.mark.parametrize("file, ranks, rank, switches", BREAKING, **NAMES)
def test_one_rank_that_fails_ends_the_others(tmp_path, file, ranks, rank, switches):
    """The environments of one rank alone raise an exception, in the middle of a rollout."""
    flags = ["--env-id", "toy_envs:Raises-v0", "--env-kwargs", f'{{"rank":{rank}}}', "--eval-episodes", 0, *switches]
    status, output = Command([*LAUNCHERS[file](ranks), file, *flags], cwd=tmp_path).finish(30)
    assert status != 0
    assert_shown_first("RuntimeError: the simulator broke", output)
    assert not switches or "RuntimeError: the simulator broke" in output.partition("Root Cause")[2], output


def assert_shown_first(cause: str, output: str) -> None:
    """The other ranks' complaints that they have lost their peer come later, if at all."""
    complaints = r"RuntimeError: .*[Gg]loo|Connection closed|Connection\w*Error|BrokenPipeError"
    others = [match.start() for match in re.finditer(complaints, output)]
    assert cause in output and output.index(cause) < min(others, default=len(output)), output
