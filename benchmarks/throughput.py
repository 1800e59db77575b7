"""Steps per second of the shipped files and of Stable-Baselines3, through their real launchers, alternating.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py
    python benchmarks/throughput.py --workload lunarlander

One thread a process. Machines are shared and noisy, so the contenders take turns and
what counts is the ratio of the medians. A steps-per-second figure is environment steps (reset rows left out) over wall
time, from the end of iteration `--warmup` to the end of the last: logging is in it, starting up is not.
Rows go to benchmarks/results/throughput.jsonl.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
PYTHON = [sys.executable]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]
FABRIC_RUN = [str(BIN / "fabric"), "run", "--accelerator=cpu", "--devices=2"]
# name: launcher, file, further flags
CONTENDERS = {
    "torch, 1 process": (PYTHON, "ppo_torch_ddp.py", []),
    "torch, 1 process, native vector environment": (PYTHON, "ppo_torch_ddp.py", ["--vec-env", "native"]),
    "Fabric, 1 process": (PYTHON, "ppo_fabric.py", []),
    "Stable-Baselines3, 1 process": (PYTHON, "benchmarks/peer_sb3.py", []),
    "torch, 2 ranks": (TORCHRUN, "ppo_torch_ddp.py", []),
    "Fabric, 2 ranks": (FABRIC_RUN, "ppo_fabric.py", []),
    "decoupled, 1 player, 1 trainer": (FABRIC_RUN, "ppo_fabric_decoupled.py", []),
    "decoupled, 1 player, 1 trainer, overlap": (FABRIC_RUN, "ppo_fabric_decoupled.py", ["--overlap"]),
}
COMMON = (
    "--learning-rate 2.5e-4 --clip-coef 0.2 --clip-vloss --ent-coef 0.01 --vf-coef 0.5 --max-grad-norm 0.5 "
    "--gamma 0.99 --gae-lambda 0.95 --num-threads 1 --num-envs 4 --num-steps 128 --per-rank-batch-size 128"
)
SHIPPED = [name for name in CONTENDERS if "2 ranks" in name or "decoupled" in name]
# name: flags, contenders; stepping takes about as long as the update in the second, so that overlapping gains most
WORKLOADS = {
    "cartpole": (f"--env-id CartPole-v1 --update-epochs 4 {COMMON}", list(CONTENDERS)),
    "lunarlander": (f"--env-id LunarLander-v3 --update-epochs 6 {COMMON}", ["torch, 1 process", *SHIPPED]),
}


@dataclass
class Args:
    workload: Literal["cartpole", "lunarlander"] = "cartpole"
    """CleanRL's CartPole setting, or LunarLander-v3 with 6 epochs"""
    repeats: int = 5
    """runs of each contender"""
    total_timesteps: int = 51_200
    """environment steps of a run"""
    contenders: tuple[str, ...] = ()
    """the contenders to compare (default: all); the fewer, the nearer in time are the runs that make a ratio"""
    warmup: int = 20
    """iterations before the clock starts"""
    results: Path = ROOT / "benchmarks" / "results" / "throughput.jsonl"
    """file that the rows are appended to"""


def measure(launcher: list[str], file: str, flags: list[str], args: Args) -> tuple[float, dict[str, float]]:
    """Steps per second of one run, and the medians of its `Time/` points in milliseconds.

    The peer prints the former and has none of the latter, a shipped file's are read off its TensorBoard events.
    """
    command = [*launcher, str(ROOT / file), *flags]
    if file == "benchmarks/peer_sb3.py":
        command += ["--warmup", str(args.warmup)]
        return float(subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout), {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, "--eval-episodes", "0"], cwd=folder, check=True, capture_output=True)
        (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
        accumulator = EventAccumulator(events, size_guidance={"scalars": 0}).Reload()
    points = {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"] if tag.startswith("Time/")}
    speeds = points.pop("Time/step_per_second")
    start, end = speeds[args.warmup - 1], speeds[-1]
    times = {tag: 1e3 * statistics.median(x.value for x in xs[args.warmup :]) for tag, xs in points.items()}
    return (end.step - start.step) / (end.wall_time - start.wall_time), times


def main(args: Args) -> None:
    workload_flags, contenders = WORKLOADS[args.workload]
    contenders = args.contenders or contenders
    if unknown := set(contenders) - set(CONTENDERS):
        raise SystemExit(f"error: --contenders {', '.join(unknown)}: there are {', '.join(CONTENDERS)}")
    flags = [*workload_flags.split(), "--total-timesteps", str(args.total_timesteps)]
    figures, times = {name: [] for name in contenders}, {}
    for repeat in range(args.repeats):
        for name in contenders:
            launcher, file, extra = CONTENDERS[name]
            speed, times[name] = measure(launcher, file, [*flags, *extra], args)
            figures[name].append(speed)
            print(f"{repeat + 1}/{args.repeats} {name}: {figures[name][-1]:.0f} steps/s", flush=True)

    packages = ("torch", "gymnasium", "numpy", "lightning", "stable-baselines3")
    one_process = statistics.median(figures.get("torch, 1 process", [math.nan]))
    peer = statistics.median(figures.get("Stable-Baselines3, 1 process", [math.nan]))
    args.results.parent.mkdir(parents=True, exist_ok=True)
    print("\n| contender | steps/s, median | lowest | highest | times torch, 1 process | times SB3 |")
    print("| --- | --- | --- | --- | --- | --- |")
    with args.results.open("a") as file:
        for name, values in figures.items():
            launcher, file_name, extra = CONTENDERS[name]
            row = {
                "workload": args.workload,
                "contender": name,
                "command": " ".join([Path(launcher[0]).name, *launcher[1:], file_name, *flags, *extra]),
                "steps_per_second": [round(value, 1) for value in values],
                "median": round(statistics.median(values), 1),
                "times_one_process": round(statistics.median(values) / one_process, 3) if one_process > 0 else None,
                "milliseconds_of_last_run": {tag: round(value, 2) for tag, value in times[name].items()},
                "times_sb3": round(statistics.median(values) / peer, 3) if peer == peer else None,
                "date": time.strftime("%Y-%m-%d"),
                "source_sha256": hashlib.sha256((ROOT / file_name).read_bytes()).hexdigest()[:16],
                "versions": {package: importlib.metadata.version(package) for package in packages},
                "python": platform.python_version(),
                "cpu": cpu_model(),
            }
            file.write(json.dumps(row) + "\n")
            ratios = f"{row['times_one_process'] or '-'} | {row['times_sb3'] or '-'}"
            print(f"| {name} | {row['median']:.0f} | {min(values):.0f} | {max(values):.0f} | {ratios} |")
    for name, values in times.items():
        print(f"{name}, ms per iteration: " + ", ".join(f"{tag[5:]} {value:.1f}" for tag, value in values.items()))


def cpu_model() -> str:
    """The processor's name, which platform.processor() leaves empty on Linux, and the number of its cores."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main(tyro.cli(Args))
