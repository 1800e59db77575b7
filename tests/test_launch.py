"""The shipped files under their real launchers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_torch_ddp as ppo
from launch import ROOT, TESTS, TORCHRUN, Command, free_port, run, torchrun

FILE = ROOT / "ppo_torch_ddp.py"
SMALL = ["--num-steps", 32, "--per-rank-batch-size", 32, "--update-epochs", 2, "--eval-episodes", 2]


def run_probe(launcher: list, folder: Path, *flags, ranks: int = 1) -> list[dict]:
    """Run `main` under a launcher; what probe.py noted on each rank."""
    run([*launcher, TESTS / "probe.py", FILE, folder, *flags], cwd=folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All (step, value) of the only run below a folder, but the times."""
    (events,) = {path.parent for path in folder.rglob("events.*")}
    accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in accumulator.Tags()["scalars"] if not tag.startswith("Time/")]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


@pytest.mark.parametrize("share_data", [False, True])
def test_two_ranks_train_on_different_rollouts_and_agree(tmp_path, share_data):
    flags = [*SMALL, "--total-timesteps", 1024, *(["--share-data"] if share_data else [])]
    first, second = run_probe(torchrun(2), tmp_path, *flags, ranks=2)
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


def test_sharing_ranks_equal_one_process_with_the_same_rows(tmp_path):
    """Two ranks with --share-data take the steps that one process takes on all the rows."""
    flags = [*SMALL, "--total-timesteps", 1024, "--share-data"]
    first, _ = run_probe(torchrun(2), tmp_path, *flags, ranks=2)
    args = ppo.Args(num_steps=64, per_rank_batch_size=64, update_epochs=2, share_data=True)
    agent = ppo.Agent(*cartpole_spaces(), "tanh", True)
    torch.nn.utils.vector_to_parameters(first["before"].clone(), agent.parameters())
    optimizer = torch.optim.Adam(agent.parameters(), lr=args.learning_rate, eps=1e-5, fused=True)
    generator = torch.Generator().manual_seed(np.random.SeedSequence(1).generate_state(4).tolist()[1])
    for iteration, (batch, after) in enumerate(zip(first["batches"], first["after"], strict=True)):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - iteration / len(first["after"]))
        assert not batch["valid"].all()  # so that the ranks' counts of valid rows differ
        ppo.update(agent, optimizer, batch, args, generator, 0, 1)
        parameters = torch.nn.utils.parameters_to_vector(agent.parameters())
        torch.testing.assert_close(parameters, after, atol=2e-5, rtol=1e-4)


def cartpole_spaces():
    envs = ppo.make_envs("CartPole-v1", 1, "sync")
    return envs.single_observation_space, envs.single_action_space


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_same_command_logs_the_same(tmp_path, ranks):
    logs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        run([*torchrun(ranks), FILE, *SMALL, "--total-timesteps", 2048, "--eval-every", 2], cwd=folder)
        logs.append(scalars(folder / "logs" / "torch_logs"))
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


def test_two_machines_and_no_seed_twice(tmp_path):
    """Two torchrun agents on this machine, two ranks each: ten environments, and the evaluation's, one seed each."""
    diary = tmp_path / "diary"
    diary.mkdir()
    rendezvous = ["--nnodes=2", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}"]
    flags = [*SMALL, "--total-timesteps", 2 * 4 * 4 * 32, "--env-id", "toy_envs:Diary-v0", "--seed", 5]
    machines = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        machines.append(Command([*TORCHRUN, *rendezvous, FILE, *flags], cwd=tmp_path / name, DIARY=str(diary)))
    results = [machine.finish() for machine in machines]
    assert [status for status, _ in results] == [0, 0], results
    seeds = sorted(int(path.read_text()) for path in diary.iterdir())
    assert seeds == list(range(5, 5 + 4 * 4 + 2))
    assert {path.name.split("-")[0] for path in diary.iterdir()} == {"0", "1", "2", "3"}
    assert len(scalars(tmp_path)["Loss/policy_loss"]) == 2  # and rank 0 alone writes


@pytest.mark.parametrize(
    "env_id, vec_env",
    [("CartPole-v1", "sync"), ("CartPole-v1", "async"), ("CartPole-v1", "native"), ("Pendulum-v1", "sync")],
)
def test_a_lone_copy_runs_and_makes_videos(tmp_path, env_id, vec_env):
    shutil.copy(FILE, tmp_path)
    flags = [*SMALL, "--total-timesteps", 1024, "--capture-video", "--env-id", env_id, "--vec-env", vec_env]
    output = run([*torchrun(1), "ppo_torch_ddp.py", *flags], cwd=tmp_path, PYTHONPATH="", SDL_VIDEODRIVER="dummy")
    assert "greedy return" in output
    videos = {path.parent.name.split("-")[0] for path in tmp_path.rglob("*.mp4") if path.stat().st_size > 1000}
    assert videos == {"train", "test"}


@pytest.mark.timeout(300)
def test_default_command_learns_cartpole(tmp_path):
    output = run([*torchrun(2), FILE], cwd=tmp_path, timeout=240)
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] >= 475, output


BAD = {
    "unknown environment": ("--env-id NoSuch-v0", "NoSuch"),
    "outdated environment": ("--env-id LunarLander-v2", "LunarLander-v3"),
    "unknown module": ("--env-id no_such_module:Env-v0", "no_such_module"),
    "observation space": ("--env-id toy_envs:TextObs-v0", "FlattenObservation"),
    "image observations": ("--env-id toy_envs:ImageObs-v0", "FlattenObservation"),
    "action space": ("--env-id toy_envs:TupleAction-v0", "Discrete and Box"),
    "no vector version": ("--env-id Acrobot-v1 --vec-env native", "--vec-env native"),
    "zero updates": ("--total-timesteps 1000", "--total-timesteps 1000"),
    "batch": ("--per-rank-batch-size 513", "--per-rank-batch-size 513"),
    "negative size": ("--num-envs -1", "--num-envs"),
    "zero size": ("--num-steps 0", "--num-steps"),
    "fraction": ("--gamma 1.5", "--gamma"),
    "not a number": ("--learning-rate nan", "--learning-rate"),
    "no GPU": ("--cuda", "--cuda"),
    "NaN observation": ("--env-id toy_envs:NanObs-v0", "non-finite observations"),
    "NaN reward": ("--env-id toy_envs:NanReward-v0", "non-finite rewards"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_all_ranks_with_one_line(tmp_path, case):
    flags, said = BAD[case]
    status, output = Command([*torchrun(2), FILE, *flags.split()], cwd=tmp_path).finish(timeout=20)
    assert status != 0
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert lines and len(set(lines)) == 1 and said in lines[0], output  # ranks that say it, say the same
    assert 'ppo_torch_ddp.py", line' not in output  # a message, not a traceback
