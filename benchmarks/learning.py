"""Learning curves: sweep files, environments and seeds through the real launchers.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/learning.py classic
    python benchmarks/learning.py classic --containing LunarLander --seeds 3
    python benchmarks/learning.py mujoco --workers 2

A finished run's row, in benchmarks/results/learning/SUITE.jsonl, is not run again unless the trainer's file or the
command has changed since. At the end prints the final greedy returns; plot.py draws the curves and writes the tables.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from throughput import BIN, ROOT, cpu_model, free_port

MUJOCO = (
    "python ppo_torch_ddp.py --env-id {} --total-timesteps 1000000 --num-envs 64 --num-steps 32 --learning-rate 3e-4 "
    "--vf-coef 0.25 --no-normalize-advantages --normalize-obs --normalize-rewards --log-std-init -0.5"
)
SWIMMER = (  # a long horizon, long rollouts
    "python ppo_torch_ddp.py --env-id Swimmer-v5 --total-timesteps 1000000 --num-envs 4 --num-steps 1024 "
    "--learning-rate 6e-4 --gamma 0.9999 --gae-lambda 0.98 --per-rank-batch-size 256 "
    "--normalize-obs --normalize-rewards"
)
WALKER2D = (
    "python ppo_torch_ddp.py --env-id Walker2d-v5 --total-timesteps 1000000 --num-envs 64 --num-steps 32 "
    "--learning-rate 3e-4 --gae-lambda 0.9 --vf-coef 0.25 --normalize-obs --normalize-rewards --log-std-init -1"
)
# the contact forces would drown the rest of the observation
ANT = WALKER2D.replace("Walker2d-v5", 'Ant-v5 --env-kwargs {"include_cfrc_ext_in_observation":false}')
# small frames, so that two cores do
PONG = (
    "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py --env-id ALE/Pong-v5 --vec-env native "
    '--env-kwargs {"img_height":42,"img_width":42,"repeat_action_probability":0.0} --total-timesteps 2000000 '
    "--num-envs 8 --num-steps 128 --update-epochs 4 --per-rank-batch-size 128 --learning-rate 5e-4 --clip-coef 0.1 "
    "--ent-coef 0.01 --clip-rewards"
)
TORCH = "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py"
FABRIC = "fabric run --accelerator=cpu --strategy=ddp --devices=2 ppo_fabric.py"
PLAYER_AND_TRAINER = "fabric run --accelerator=cpu --devices=2 ppo_fabric_decoupled.py"
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
        "fabric run --accelerator=cpu --devices=3 ppo_fabric_decoupled.py --num-envs 8": 10,
        f"{TORCH} --tcp-all-reduce {ACROBOT}": 5,
        f"{TORCH} --tcp-all-reduce {LUNARLANDER.format(1_000_000, 8)}": 5,
        f"{FABRIC} --tcp-all-reduce {LUNARLANDER.format(1_000_000, 8)}": 5,
        f"{PLAYER_AND_TRAINER} --overlap {LUNARLANDER.format(1_000_000, 16)}": 5,
        f"{TORCH} --tcp-all-reduce {PENDULUM}": 5,
        f"{TORCH} --tcp-all-reduce --compile {BIPEDALWALKER}": 5,
    },
    # for a change of algorithm, see compare.py: before and after it
    "change": {TORCH: 5, f"{TORCH} --tcp-all-reduce {LUNARLANDER.format(500_000, 8)}": 5},
    "compiled": {
        f"{TORCH} --tcp-all-reduce --compile": 5,
        f"{TORCH} --tcp-all-reduce --compile {LUNARLANDER.format(500_000, 8)}": 5,
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
    "mujoco": {
        MUJOCO.format("HalfCheetah-v5"): 10,
        MUJOCO.format("Hopper-v5"): 3,
        WALKER2D: 3,
        ANT: 3,
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
    return command.partition("--env-id ")[2].partition(" ")[0] or "CartPole-v1"


def source_hash(command: str) -> str:
    """Of the file that a command runs."""
    (file,) = [part for part in command.split() if part.endswith(".py")]
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra one
        return importlib.metadata.version(package)


def run(command: str, seed: int) -> dict:
    """One run: its returns over steps and wall time, and its greedy evaluation at the end."""
    versions = {name: version(name) for name in ("torch", "lightning", "gymnasium", "numpy", "mujoco", "ale-py")}
    # fabric's default port is the same for all
    words = command.replace("fabric run", f"fabric run --main-port={free_port()}")
    launcher, *rest = f"{words} --seed {seed}".split()
    (file,) = [part for part in rest if part.endswith(".py")]
    arguments = [str(ROOT / part) if part == file else part for part in rest]
    source, start_time = source_hash(command), time.time()
    with tempfile.TemporaryDirectory() as folder:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        result = subprocess.run([str(BIN / launcher), *arguments], cwd=folder, **output)
        if result.returncode:
            raise SystemExit(f"{result.stdout}\nerror: {command} --seed {seed} failed")
        (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
        scalars = EventAccumulator(events, size_guidance={"scalars": 0}).Reload().Scalars
        points, speeds = scalars("Rewards/rew_avg"), scalars("Time/step_per_second")
        steps = speeds[-1].step
        evaluation = scalars("Test/cumulative_reward")[-1].value
    # seconds from the launch on: starting up and compiling are in them
    curve = [(point.step, round(point.wall_time - start_time, 1), round(point.value, 2)) for point in points]
    return {
        "env_id": env_id_of(command),
        "seed": seed,
        "command": f"{command} --seed {seed}",
        "greedy_return": round(evaluation, 2),
        "steps": steps,
        "seconds": round(time.time() - start_time, 1),
        "steps_per_second": round(statistics.median(point.value for point in speeds)),
        "date": time.strftime("%Y-%m-%d"),
        "source_sha256": source,
        "versions": versions,
        "python": sys.version.split()[0],
        "cpu": cpu_model(),
        "curve": curve[:: max(1, len(curve) // 200)],
    }


def main(args: Args) -> None:
    path = ROOT / "benchmarks" / "results" / "learning" / f"{args.suite}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["source_sha256"] == source_hash(row["command"])]
    done = {row["command"] for row in rows}
    suite = {c: args.seeds or seeds for c, seeds in SUITES[args.suite].items() if args.containing in c}
    if not suite:
        raise SystemExit(f"error: no command of {args.suite} contains {args.containing}")
    todo = [(c, s) for c, seeds in suite.items() for s in range(1, seeds + 1) if f"{c} --seed {s}" not in done]
    lock = threading.Lock()

    def run_and_write(command: str, seed: int) -> None:
        row = run(command, seed)
        with lock, path.open("a") as file:
            rows.append(row)
            file.write(json.dumps(row) + "\n")

    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(run_and_write, *job) for job in todo]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs)):
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # should a run have failed, or Ctrl-C ended it
    for command, seeds in suite.items():
        by_seed = {row["seed"]: row["greedy_return"] for row in rows if row["command"].startswith(f"{command} --seed ")}
        returns = [by_seed[seed] for seed in range(1, seeds + 1)]
        print(f"{command}: {', '.join(f'{value:,.1f}' for value in returns)}; mean {statistics.mean(returns):,.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
