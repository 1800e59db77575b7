"""Steps per second of the shipped files and of Stable-Baselines3, through their real launchers, alternating.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py
    python benchmarks/throughput.py --workload lunarlander

One thread a process. Machines are shared and noisy, and their speed changes from second to second. So the contenders
of a race run side by side but never together: each in turn goes on for `--turn` seconds while the others are stopped by
signals. What counts is the ratio of two contenders in the same race, and of several races the median. A
steps-per-second figure is environment steps (reset rows left out) over the time that the contender was let run, from
when all have started up to when the first ends: logging is in it, starting up is not.
Rows go to benchmarks/results/throughput.jsonl.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
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
    "--gamma 0.99 --gae-lambda 0.95 --num-threads 1 --num-envs 4 --per-rank-batch-size 128"
)
SHIPPED = [name for name in CONTENDERS if "2 ranks" in name or "decoupled" in name]
# name: flags, contenders; stepping takes about as long as the update in the second, so that overlapping gains most
WORKLOADS = {
    "cartpole": (f"--env-id CartPole-v1 --num-steps 128 --update-epochs 4 {COMMON}", list(CONTENDERS)),
    "lunarlander": (
        f"--env-id LunarLander-v3 --num-steps 256 --update-epochs 7 {COMMON}",
        ["torch, 1 process", *SHIPPED],
    ),
}


@dataclass
class Args:
    workload: Literal["cartpole", "lunarlander"] = "cartpole"
    """CleanRL's CartPole setting, or LunarLander-v3 with 256 steps and 7 epochs"""
    repeats: int = 5
    """races"""
    total_timesteps: int = 51_200
    """environment steps of a run"""
    contenders: tuple[str, ...] = ()
    """the contenders to compare (default: all of the workload)"""
    turn: float = 1.0
    """seconds that a contender runs before the next one does"""
    results: Path = ROOT / "benchmarks" / "results" / "throughput.jsonl"
    """file that the rows are appended to"""


class Run:
    """A contender's processes, stopped as soon as it shows progress; `turns` are the times at which it was let run."""

    def __init__(self, name: str, flags: list[str], folder: Path):
        launcher, file, extra = CONTENDERS[name]
        self.folder, self.output, self.turns = folder, folder / "output.txt", []
        self.is_peer = file == "benchmarks/peer_sb3.py"
        if launcher == FABRIC_RUN:
            launcher = [*launcher, f"--main-port={free_port()}"]  # its default is the same for all
        extra = extra if self.is_peer else [*extra, "--eval-episodes", "0"]
        folder.mkdir()
        with self.output.open("w") as output:
            command = [*launcher, str(ROOT / file), *flags, *extra]
            self.process = psutil.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while self.is_running() and not any(line.startswith("step ") for line in self.output.open()):
            time.sleep(0.02)
        if not self.is_running():
            raise SystemExit(f"error: {name} ended early: {self.output.read_text()}")
        self.family = [self.process, *self.process.children(recursive=True)]
        self.send(signal.SIGSTOP)

    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def take_turn(self, seconds: float) -> None:
        start = time.time()
        self.send(signal.SIGCONT)
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(seconds)
        self.send(signal.SIGSTOP)
        self.turns.append((start, time.time()))

    def marks(self) -> list[tuple[float, int]]:
        """Wall-clock time and environment steps at the end of each iteration."""
        if self.is_peer:
            lines = [line.split() for line in self.output.open() if line.startswith("step ")]
            return [(float(seconds), int(step)) for _, step, seconds in lines]
        return [(x.wall_time, x.step) for x in self.points()["Time/step_per_second"]]

    def points(self) -> dict[str, list]:
        """The `Time/` points in TensorBoard, by tag."""
        (events,) = {str(path.parent) for path in self.folder.rglob("events.*")}
        accumulator = EventAccumulator(events, size_guidance={"scalars": 0}).Reload()
        return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"] if tag.startswith("Time/")}

    def milliseconds(self) -> dict[str, float]:
        """Medians of the `Time/` points, of iterations that were in one turn with the two before: some log late."""
        ends = [seconds for seconds, _ in self.marks()]
        whole = [i for i, end in enumerate(ends) if any(b <= ends[max(i - 3, 0)] and end <= e for b, e in self.turns)]
        tags = {tag: points for tag, points in self.points().items() if "per_second" not in tag}
        return {tag: round(1e3 * statistics.median(xs[i].value for i in whole), 2) for tag, xs in tags.items() if whole}

    def speed(self, start: float, end: float) -> float:
        """Steps per second of its turns between two wall-clock times."""
        marks = [mark for mark in self.marks() if start <= mark[0] <= end]
        (first, first_step), (last, last_step) = marks[0], marks[-1]
        seconds = sum(max(0.0, min(stop, last) - max(begin, first)) for begin, stop in self.turns)
        return (last_step - first_step) / seconds


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def race(names: list[str], flags: list[str], turn: float) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Steps per second of each contender, and the medians of a shipped file's `Time/` points in milliseconds."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in names:
                runs[name] = Run(name, flags, Path(folder) / str(len(runs)))
            start = time.time()
            while any(run.is_running() for run in runs.values()):
                for run in runs.values():
                    if run.is_running():
                        run.take_turn(turn)
        finally:
            for run in runs.values():
                run.send(signal.SIGKILL)
        end = min(run.marks()[-1][0] for run in runs.values())
        speeds = {name: run.speed(start, end) for name, run in runs.items()}
        times = {name: run.milliseconds() for name, run in runs.items() if not run.is_peer}
    return speeds, times


def main(args: Args) -> None:
    workload_flags, contenders = WORKLOADS[args.workload]
    contenders = args.contenders or contenders
    if unknown := set(contenders) - set(CONTENDERS):
        raise SystemExit(f"error: --contenders {', '.join(unknown)}: there are {', '.join(CONTENDERS)}")
    flags = [*workload_flags.split(), "--total-timesteps", str(args.total_timesteps)]
    figures = {name: [] for name in contenders}
    for repeat in range(args.repeats):
        speeds, times = race(contenders, flags, args.turn)
        for name, speed in speeds.items():
            figures[name].append(speed)
        print(f"{repeat + 1}/{args.repeats}: " + ", ".join(f"{n} {x:.0f}" for n, x in speeds.items()), flush=True)

    def ratios(name: str, base: str) -> list[float]:
        """A contender's speed over another's in each race, empty where the other did not take part."""
        return [round(a / b, 3) for a, b in zip(figures[name], figures.get(base, []), strict=False)]

    packages = ("torch", "gymnasium", "numpy", "lightning", "stable-baselines3")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    print("\n| contender | steps/s, median | range | times torch, 1 process | times SB3 | times torch twin |")
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
                "times_one_process": ratios(name, "torch, 1 process"),
                "times_sb3": ratios(name, "Stable-Baselines3, 1 process"),
                "times_torch_twin": ratios(name, name.replace("Fabric", "torch")) if "Fabric" in name else [],
                "milliseconds_in_last_race": times.get(name, {}),
                "date": time.strftime("%Y-%m-%d"),
                "source_sha256": hashlib.sha256((ROOT / file_name).read_bytes()).hexdigest()[:16],
                "versions": {package: importlib.metadata.version(package) for package in packages},
                "python": platform.python_version(),
                "cpu": cpu_model(),
            }
            file.write(json.dumps(row) + "\n")
            columns = [row[key] for key in ("times_one_process", "times_sb3", "times_torch_twin")]
            texts = [f"{statistics.median(c):.2f} ({min(c):.2f} to {max(c):.2f})" if c else "-" for c in columns]
            print(f"| {name} | {row['median']:.0f} | {min(values):.0f} to {max(values):.0f} | {' | '.join(texts)} |")
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
