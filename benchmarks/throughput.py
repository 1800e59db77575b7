"""Steps per second of ppo_torch_ddp.py against Stable-Baselines3, through the command line, alternating.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py

CleanRL's CartPole setting, one process, one thread. Machines are shared and noisy, so the contenders take turns and
what counts is the ratio of the medians. A steps-per-second figure is environment steps (reset rows left out) over wall
time, from the end of iteration `--warmup` to the end of the last: logging is in it, starting up is not.
Rows go to benchmarks/results/throughput.jsonl.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
PEER = ROOT / "benchmarks" / "peer_sb3.py"
FILE = ROOT / "ppo_torch_ddp.py"
CLEANRL = (
    "--env-id CartPole-v1 --num-envs 4 --num-steps 128 --per-rank-batch-size 128 --update-epochs 4 "
    "--learning-rate 2.5e-4 --clip-coef 0.2 --clip-vloss --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 "
    "--gamma 0.99 --gae-lambda 0.95 --num-threads 1"
)


@dataclass
class Args:
    repeats: int = 5
    """runs of each contender"""
    total_timesteps: int = 51_200
    """environment steps of a run"""
    warmup: int = 20
    """iterations before the clock starts"""
    results: Path = ROOT / "benchmarks" / "results" / "throughput.jsonl"
    """file that the rows are appended to"""


def run(command: list[str], cwd: str) -> str:
    return subprocess.run(command, cwd=cwd, check=True, text=True, stdout=subprocess.PIPE).stdout


def measure_ours(flags: list[str], args: Args) -> float:
    """Steps per second of a run of the shipped file, read off the wall times of its TensorBoard events."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, str(FILE), *flags, "--eval-episodes", "0"], folder)
        (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
        points = EventAccumulator(events, size_guidance={"scalars": 0}).Reload().Scalars("Time/step_per_second")
    start, end = points[args.warmup - 1], points[-1]
    return (end.step - start.step) / (end.wall_time - start.wall_time)


def measure_peer(flags: list[str], args: Args) -> float:
    return float(run([sys.executable, str(PEER), *flags, "--warmup", str(args.warmup)], str(ROOT)))


def main(args: Args) -> None:
    flags = [*CLEANRL.split(), "--total-timesteps", str(args.total_timesteps)]
    contenders = {
        "ppo_torch_ddp.py": lambda: measure_ours(flags, args),
        "ppo_torch_ddp.py --vec-env native": lambda: measure_ours([*flags, "--vec-env", "native"], args),
        "Stable-Baselines3": lambda: measure_peer(flags, args),
    }
    figures = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        for name, measure in contenders.items():
            figures[name].append(measure())
            print(f"{repeat + 1}/{args.repeats} {name}: {figures[name][-1]:.0f} steps/s", flush=True)

    packages = ("torch", "gymnasium", "numpy", "stable-baselines3")
    peer = statistics.median(figures["Stable-Baselines3"])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    print("\n| contender | steps/s, median | lowest | highest | times SB3 |\n| --- | --- | --- | --- | --- |")
    with args.results.open("a") as file:
        for name, values in figures.items():
            row = {
                "contender": name,
                "flags": " ".join(flags),
                "steps_per_second": [round(value, 1) for value in values],
                "median": round(statistics.median(values), 1),
                "times_sb3": round(statistics.median(values) / peer, 3),
                "date": time.strftime("%Y-%m-%d"),
                "source_sha256": hashlib.sha256((PEER if "SB3" in name else FILE).read_bytes()).hexdigest()[:16],
                "versions": {name: importlib.metadata.version(name) for name in packages},
                "python": platform.python_version(),
                "cpu": cpu_model(),
            }
            file.write(json.dumps(row) + "\n")
            print(f"| {name} | {row['median']:.0f} | {min(values):.0f} | {max(values):.0f} | {row['times_sb3']:.2f} |")


def cpu_model() -> str:
    """The processor's name, which platform.processor() leaves empty on Linux, and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main(tyro.cli(Args))
