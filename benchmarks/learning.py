"""Learning curves: sweep files, environments and seeds through the real launchers.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/learning.py classic
    python benchmarks/learning.py classic --containing LunarLander --seeds 3
    python benchmarks/learning.py mujoco --workers 2

A finished run's row, in benchmarks/results/learning/SUITE.jsonl, is not run again unless the trainer's file or the
command has changed since. A run that fails leaves no row; the others go on, and the exit status is 1. At the end prints
the final greedy returns; plot.py draws the curves and writes the tables.
"""

import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from common import (
    BIN,
    RESULTS,
    ROOT,
    end_children_with_us,
    read_rows,
    run,
    scalars,
    source_hash,
    surroundings,
    with_port,
    write_rows,
)

HOPPER = (
    "python ppo_torch_ddp.py --env-id Hopper-v5 --total-timesteps 1000000 --num-envs 64 --num-steps 32 "
    "--learning-rate 3e-4 --vf-coef 0.25 --no-normalize-advantages --normalize-obs --normalize-rewards "
    "--log-std-init -0.5"
)
SWIMMER = (  # a long horizon, long rollouts
    "python ppo_torch_ddp.py --env-id Swimmer-v5 --total-timesteps 1000000 --num-envs 4 --num-steps 1024 "
    "--learning-rate 6e-4 --gamma 0.9999 --gae-lambda 0.98 --per-rank-batch-size 256 "
    "--normalize-obs --normalize-rewards"
)
MUJOCO = (
    "python ppo_torch_ddp.py --env-id {} --total-timesteps 1000000 --num-envs 64 --num-steps 32 "
    "--learning-rate 3e-4 --gae-lambda 0.9 --vf-coef 0.25 --normalize-obs --normalize-rewards --log-std-init -1"
)
# the contact forces would drown the rest of the observation
ANT = 'Ant-v5 --env-kwargs {"include_cfrc_ext_in_observation":false}'
# small frames, so that two cores do
PONG = (
    "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py --env-id ALE/Pong-v5 --vec-env native "
    '--env-kwargs {"img_height":42,"img_width":42,"repeat_action_probability":0.0} --total-timesteps 2000000 '
    "--num-envs 8 --num-steps 128 --update-epochs 4 --per-rank-batch-size 128 --learning-rate 5e-4 --clip-coef 0.1 "
    "--ent-coef 0.01 --clip-rewards"
)
TORCH = "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py"
FABRIC = "fabric run --accelerator=cpu --strategy=ddp --devices=2 ppo_fabric.py"
DECOUPLED = "fabric run --accelerator=cpu --devices={} ppo_fabric_decoupled.py"
PLAYER_AND_TRAINER = DECOUPLED.format(2)
LUNARLANDER = (
    "--env-id LunarLander-v3 --total-timesteps {} --num-envs {} --num-steps 256 --gamma 0.999 --gae-lambda 0.98 "
    "--ent-coef 0.01 --normalize-rewards --eval-episodes 20"
)
ACROBOT = "--env-id Acrobot-v1 --total-timesteps 1000000 --num-envs 8 --ent-coef 0.01 --eval-episodes 100"
PENDULUM = (
    "--env-id Pendulum-v1 --total-timesteps 200000 --num-steps 256 --gamma 0.95 --normalize-rewards --eval-episodes 100"
)
BIPEDALWALKER = (
    "--env-id BipedalWalker-v3 --total-timesteps 5000000 --num-envs 8 --num-steps 256 --learning-rate 3e-4 "
    "--eval-episodes 20"
)
# suite: commands, to which --seed is added, and their numbers of seeds
SUITES = {
    "classic": {
        TORCH: 10,
        FABRIC: 10,
        f"{DECOUPLED.format(3)} --num-envs 8": 10,
        f"{TORCH} --exchange tcp {ACROBOT}": 5,
        f"{TORCH} --exchange tcp {LUNARLANDER.format(1_000_000, 8)}": 5,
        f"{FABRIC} --exchange tcp {LUNARLANDER.format(1_000_000, 8)}": 5,
        f"{PLAYER_AND_TRAINER} --overlap {LUNARLANDER.format(1_000_000, 16)}": 5,
        f"{TORCH} --exchange tcp {PENDULUM}": 5,
        f"{TORCH} --exchange tcp --compile {BIPEDALWALKER}": 5,
    },
    # for a change of algorithm, see compare.py: before and after it
    "change": {TORCH: 5, f"{TORCH} --exchange tcp {LUNARLANDER.format(500_000, 8)}": 5},
    "compiled": {
        f"{TORCH} --exchange tcp --compile": 5,
        f"{TORCH} --exchange tcp --compile {LUNARLANDER.format(500_000, 8)}": 5,
    },
    # a policy that is one update older acts in the second: README, "Players and trainers"
    "alternating": {
        f"{PLAYER_AND_TRAINER} --num-envs 4": 5,
        f"{PLAYER_AND_TRAINER} {LUNARLANDER.format(500_000, 8)}": 5,
    },
    "overlap": {
        f"{PLAYER_AND_TRAINER} --overlap --num-envs 4": 5,
        f"{PLAYER_AND_TRAINER} --overlap {LUNARLANDER.format(500_000, 8)}": 5,
    },
    # players, trainers and ways to share
    "combinations": {
        f"{DECOUPLED.format(3)} --num-envs 4": 10,
        f"{DECOUPLED.format(3)} --num-envs 4 --share-data": 1,
        f"{DECOUPLED.format(3)} --num-envs 4 --overlap": 1,
        f"{DECOUPLED.format(3)} --num-envs 4 --share-data --overlap": 1,
        f"{DECOUPLED.format(4)} --num-envs 4 --num-players 2": 1,
        f"{DECOUPLED.format(4)} --num-envs 4 --num-players 2 --share-data --overlap": 1,
        f"{DECOUPLED.format(2)} --num-envs 4": 1,
        f"{DECOUPLED.format(2)} --num-envs 4 --overlap": 1,
        f"{DECOUPLED.format(3)} --num-envs 4 --num-players 2 --overlap": 1,
        f"{DECOUPLED.format(4)} --num-envs 4": 1,
        f"{DECOUPLED.format(4)} --num-envs 4 --share-data --overlap": 1,
    },
    "mujoco": {
        MUJOCO.format("HalfCheetah-v5"): 10,
        HOPPER: 10,
        MUJOCO.format("Walker2d-v5"): 10,
        MUJOCO.format(ANT): 10,
        SWIMMER: 10,
    },
    "pong": {PONG: 1},
}


@dataclass
class Args:
    suite: Annotated[Literal[tuple(SUITES)], tyro.conf.Positional]
    """what to run"""
    containing: str = ""
    """only the commands with this in them, such as LunarLander"""
    seeds: int = 0
    """seeds 1 to this (0: as many as the suite has)"""
    workers: int = 1
    """runs at a time"""


def env_id_of(command: str) -> str:
    """The environment that a command trains on."""
    return command.partition("--env-id ")[2].partition(" ")[0] or "CartPole-v1"


def command_of(row: dict) -> str:
    """The command of a row without its seed, with the name that the exchange's flag has now."""
    return row["command"].rpartition(" --seed ")[0].replace("--tcp-all-reduce", "--exchange tcp")


def file_of(command: str) -> str:
    """The file that a command runs."""
    (file,) = [part for part in command.split() if part.endswith(".py")]
    return file


def train(command: str, seed: int, workers: int) -> dict:
    """One run, beside others on the same cores: its returns over steps and wall time, and its greedy evaluation."""
    launcher, *rest = [str(ROOT / part) if part == file_of(command) else part for part in command.split()]
    source, start_time = source_hash(file_of(command)), time.time()
    with tempfile.TemporaryDirectory() as folder:
        run(with_port([str(BIN / launcher), *rest, "--seed", str(seed)]), folder)
        points = scalars(folder)
    returns, speeds = points["Rewards/rew_avg"], points["Time/step_per_second"]
    # seconds from the launch on: starting up and compiling are in them
    curve = [(point.step, round(point.wall_time - start_time, 1), round(point.value, 2)) for point in returns]
    return {
        "env_id": env_id_of(command),
        "seed": seed,
        "command": f"{command} --seed {seed}",
        "greedy_return": round(points["Test/cumulative_reward"][-1].value, 2),
        "steps": speeds[-1].step,
        "seconds": round(time.time() - start_time, 1),
        "steps_per_second": round(statistics.median(point.value for point in speeds)),
        "date": time.strftime("%Y-%m-%d"),
        "source_sha256": source,
        "workers": workers,
        **surroundings("torch", "lightning", "gymnasium", "numpy", "mujoco", "ale-py"),
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def present_rows(path: Path, commands: Iterable[str]) -> list[dict]:
    """The rows of these commands that are of the present trainers.

    A command's last row says which source is its newest, also where that was a change which has been undone since: then
    its present rows are moved to the file's end (not for two sweeps of a suite at once).
    """
    rows, sources = read_rows(path), {command: source_hash(file_of(command)) for command in commands}
    last = {command_of(row): row["source_sha256"] for row in rows}
    present = [row for row in rows if row["source_sha256"] == sources.get(command_of(row))]
    undone = [row for row in present if row["source_sha256"] != last[command_of(row)]]
    if undone:
        write_rows(path, [row for row in rows if row not in undone] + undone)
    return present


def main(args: Args) -> None:
    if args.workers < 1 or args.seeds < 0:
        raise SystemExit("error: --workers must be 1 or more, --seeds 0 or more")
    end_children_with_us()
    path = RESULTS / "learning" / f"{args.suite}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    suite = {c: args.seeds or seeds for c, seeds in SUITES[args.suite].items() if args.containing in c}
    if not suite:
        raise SystemExit(f"error: no command of {args.suite} contains {args.containing}")
    try:
        rows = present_rows(path, SUITES[args.suite]) if path.exists() else []
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    returns = {row["command"]: row["greedy_return"] for row in rows}
    todo = [(c, s) for c, seeds in suite.items() for s in range(1, seeds + 1) if f"{c} --seed {s}" not in returns]
    lock, failed = threading.Lock(), []

    def train_and_write(command: str, seed: int) -> None:
        try:
            row = train(command, seed, args.workers)
        except SystemExit as error:
            failed.append(f"{command} --seed {seed}")
            tqdm.write(str(error), file=sys.stderr)
            return
        with lock, path.open("a") as file:
            returns[row["command"]] = row["greedy_return"]
            file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(train_and_write, *job) for job in todo]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs)):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # should a signal have ended it
    for command, seeds in suite.items():
        values = [returns[row] for s in range(1, seeds + 1) if (row := f"{command} --seed {s}") in returns]
        if values:
            print(f"{command}: {', '.join(f'{value:,.1f}' for value in values)}; mean {statistics.mean(values):,.1f}")
    if failed:
        raise SystemExit(f"error: {len(failed)} of {len(todo)} runs failed, see above: {'; '.join(failed)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
