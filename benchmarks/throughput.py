"""Steps per second of the shipped files, of Stable-Baselines3 and of stepping alone, through their launchers.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/throughput.py
    python benchmarks/throughput.py --workload lunarlander
    python benchmarks/throughput.py --file my_ppo.py
    python benchmarks/throughput.py --command "python my_ppo.py --env-id CartPole-v1"

One thread a process. Machines are shared and noisy, and their speed changes from second to second. So the contenders
of a race run side by side but never together: each in turn goes on for `--turn` seconds while the others are stopped by
signals. What counts is the ratio of two contenders in the same race, and of several races the median. A
steps-per-second figure is environment steps (reset rows left out) over the time that the contender was let run, from
when all have started up to when the first ends: logging is in it, starting up and compiling are not.
Rows go to benchmarks/results/throughput.jsonl, the chart of all workloads to benchmarks/results/throughput.png; a race
with `--file` is only printed.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib
import psutil
import tyro
from matplotlib import pyplot as plt

from common import (
    BIN,
    PYTHON,
    RESULTS,
    ROOT,
    TORCHRUN,
    as_written,
    end_children_with_us,
    read_rows,
    scalars,
    source_hash,
    surroundings,
    with_port,
)

matplotlib.use("Agg")
FABRIC_RUN = [str(BIN / "fabric"), "run", "--accelerator=cpu", "--devices=2"]
DDP = ["--exchange", "ddp"]
TCP = ["--exchange", "tcp"]
BASE, PEER, ALONE = "torch, 1 process", "Stable-Baselines3, 1 process", "stepping alone, 1 process"
TWO_RANKS = "torch, 2 ranks, TCP"
# name: launcher, file, further flags
CONTENDERS = {
    BASE: (PYTHON, "ppo_torch_ddp.py", []),
    "torch, 1 process, compiled": (PYTHON, "ppo_torch_ddp.py", ["--compile"]),
    "torch, 1 process, native vector environment": (PYTHON, "ppo_torch_ddp.py", ["--vec-env", "native"]),
    "Fabric, 1 process": (PYTHON, "ppo_fabric.py", []),
    "torch, 2 ranks": (TORCHRUN, "ppo_torch_ddp.py", DDP),
    TWO_RANKS: (TORCHRUN, "ppo_torch_ddp.py", TCP),
    "torch, 2 ranks, TCP, compiled": (TORCHRUN, "ppo_torch_ddp.py", [*TCP, "--compile"]),
    "Fabric, 2 ranks": (FABRIC_RUN, "ppo_fabric.py", DDP),
    "Fabric, 2 ranks, TCP": (FABRIC_RUN, "ppo_fabric.py", TCP),
    "Fabric, 2 ranks, TCP, compiled": (FABRIC_RUN, "ppo_fabric.py", [*TCP, "--compile"]),
    "decoupled, 1 player, 1 trainer": (FABRIC_RUN, "ppo_fabric_decoupled.py", []),
    "decoupled, 1 player, 1 trainer, overlap": (FABRIC_RUN, "ppo_fabric_decoupled.py", ["--overlap"]),
    "decoupled, 1 player, 1 trainer, overlap, compiled": (
        FABRIC_RUN,
        "ppo_fabric_decoupled.py",
        ["--overlap", "--compile"],
    ),
    PEER: (PYTHON, "benchmarks/peer_sb3.py", []),
    ALONE: (PYTHON, "benchmarks/stepping.py", ["--total-timesteps", "1000000000"]),
}
COMMON = (
    "--learning-rate 2.5e-4 --clip-coef 0.2 --vf-coef 0.5 --max-grad-norm 0.5 --gamma 0.99 --gae-lambda 0.95 "
    "--num-threads 1"
)
CARTPOLE = f"--env-id CartPole-v1 --clip-vloss --ent-coef 0.01 {COMMON} --total-timesteps 102400"
# name: flags, contenders, flags that override these for Stable-Baselines3, seconds of a turn: those of some iterations
WORKLOADS = {
    # CleanRL's setting
    "cartpole": (
        f"{CARTPOLE} --num-envs 4 --num-steps 128 --update-epochs 4 --per-rank-batch-size 128",
        CONTENDERS,
        "",
        0.5,
    ),
    # that of Lightning's reinforcement-learning example, against SB3 with the one above
    "cartpole-example-sizes": (
        f"{CARTPOLE} --num-envs 2 --num-steps 128 --update-epochs 10 --per-rank-batch-size 64",
        [name for name in CONTENDERS if "2 ranks" in name or name in (BASE, PEER)],
        "--num-envs 4 --update-epochs 4 --per-rank-batch-size 128",
        0.5,
    ),
    "halfcheetah": (
        f"--env-id HalfCheetah-v5 --num-envs 1 --num-steps 2048 --update-epochs 10 --per-rank-batch-size 64 {COMMON} "
        "--normalize-obs --normalize-rewards --total-timesteps 49152",
        [BASE, "torch, 1 process, compiled", PEER, ALONE],
        "",
        3.0,
    ),
    "lunarlander": (
        f"--env-id LunarLander-v3 --num-envs 4 --num-steps 1024 --update-epochs 4 --per-rank-batch-size 64 {COMMON} "
        "--ent-coef 0.01 --total-timesteps 163840",
        [name for name in CONTENDERS if "Fabric" not in name and "native" not in name and name != PEER],
        "",
        3.0,
    ),
}


@dataclass
class Args:
    workload: Literal[tuple(WORKLOADS)] = "cartpole"
    """environment and sizes of the race"""
    repeats: int = 5
    """races"""
    contenders: tuple[str, ...] = ()
    """the contenders to compare (default: all of the workload)"""
    command: str = ""
    """a contender of your own: a command that prints a line with `step`, no digits, and the steps so far"""
    file: str = ""
    """a copy of a shipped file that was changed, or that of another commit, started as the first of --contenders is"""
    ranks: Literal[1, 2] = 1
    """processes of this file and of ppo_torch_ddp.py where --contenders names none; two with the exchange over TCP"""
    file_flags: str = ""
    """further flags of this file, written --file-flags='--flag value'"""
    turn: float = 0.0
    """seconds that a contender runs before the next one does (0: what suits the workload)"""


class Run:
    """A contender's processes, stopped as soon as it shows progress; `turns` are the times at which it was let run."""

    def __init__(self, command: list[str], folder: Path, file: str = ""):
        self.folder, self.turns, self.lines, self.marks_printed = folder, [], [], []
        shipped = [part for part in command if Path(part).name.startswith("ppo_") and ROOT in Path(part).parents]
        self.is_shipped = bool(shipped) or file in command
        folder.mkdir()
        environ = os.environ | {"PYTHONUNBUFFERED": "1"}
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = psutil.Popen(command, cwd=folder, env=environ, **output)
        threading.Thread(target=self.read, daemon=True).start()
        self.family = []

    def stop_at_progress(self) -> bool:
        """Stop it once it has printed its first mark; whether it has."""
        if not self.is_running():
            raise SystemExit(f"error: {shlex.join(self.process.args)} ended early: {''.join(self.lines)}")
        if self.marks_printed and not self.family:
            self.family = [self.process, *self.process.children(recursive=True)]
            self.send(signal.SIGSTOP)
        return bool(self.family)

    def read(self) -> None:
        """Keep its output, and the time and the count of steps of each line that has one."""
        for line in self.process.stdout:
            self.lines.append(line)
            if match := re.search(r"step\D*([\d,]+)", line, re.IGNORECASE):
                self.marks_printed.append((time.time(), int(match[1].replace(",", ""))))

    def is_running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        for process in self.family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def take_turn(self, seconds: float) -> None:
        """Let it run for so long, or to its end."""
        start = time.time()
        self.send(signal.SIGCONT)
        with contextlib.suppress(psutil.TimeoutExpired):
            self.process.wait(seconds)
        self.send(signal.SIGSTOP)
        self.turns.append((start, time.time()))

    def marks(self) -> list[tuple[float, int]]:
        """Wall-clock time and environment steps, at the end of each iteration of a shipped file, else as printed."""
        if self.is_shipped:
            return [(x.wall_time, x.step) for x in self.points()["Time/step_per_second"]]
        return self.marks_printed

    def points(self) -> dict[str, list]:
        """The `Time/` points in TensorBoard, by tag."""
        return {tag: points for tag, points in scalars(self.folder).items() if tag.startswith("Time/")}

    def milliseconds(self) -> dict[str, float]:
        """Medians of the `Time/` points, of iterations that were in one turn with the two before: some log late."""
        ends = [seconds for seconds, _ in self.marks()]
        whole = [i for i, end in enumerate(ends) if any(b <= ends[max(i - 3, 0)] and end <= e for b, e in self.turns)]
        tags = {tag: xs for tag, xs in self.points().items() if "per_second" not in tag and len(xs) == len(ends)}
        return {tag: round(1e3 * statistics.median(xs[i].value for i in whole), 2) for tag, xs in tags.items() if whole}

    def speed(self, start: float, end: float) -> float:
        """Steps per second of its turns between two wall-clock times."""
        marks = [mark for mark in self.marks() if start <= mark[0] <= end]
        if len(marks) < 2:
            raise SystemExit(f"error: too short a race: less than an iteration of {shlex.join(self.process.args)}")
        (first, first_step), (last, last_step) = marks[0], marks[-1]
        seconds = sum(max(0.0, min(stop, last) - max(begin, first)) for begin, stop in self.turns)
        return (last_step - first_step) / seconds


def contender_command(name: str, flags: str, peer_flags: str = "") -> list[str]:
    """The command line of a contender with a workload's flags."""
    launcher, file, extra = CONTENDERS[name]
    extra = [*extra, *peer_flags.split()] if name == PEER else extra if name == ALONE else [*extra, "--eval-episodes=0"]
    return [*launcher, str(ROOT / file), *flags.split(), *extra]


def race(
    commands: dict[str, list[str]], turn: float, file: str = ""
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Steps per second of each contender, and the medians of a shipped file's `Time/` points in milliseconds.

    `file` logs as the shipped ones do.
    """
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, command in commands.items():
                runs[name] = Run(with_port(command), Path(folder) / str(len(runs)), file)
            deadline = time.time() + 600
            while sum(run.stop_at_progress() for run in runs.values()) < len(runs):
                if time.time() > deadline:
                    silent = [name for name, run in runs.items() if not run.marks_printed]
                    raise SystemExit(f"error: no line with a count of steps within ten minutes: {', '.join(silent)}")
                time.sleep(0.02)
            start = time.time()
            while all(run.is_running() for run in runs.values()):
                for run in runs.values():
                    if run.is_running():
                        run.take_turn(turn)
            for run in runs.values():
                if run.process.poll():
                    raise SystemExit(f"error: {shlex.join(run.process.args)} failed: {''.join(run.lines)}")
            end = max(run.turns[-1][1] for run in runs.values() if not run.is_running())
            for run in runs.values():  # the shipped files' logs are whole only at their end
                run.send(signal.SIGCONT if run.is_shipped else signal.SIGKILL)
            for run in runs.values():
                if run.process.wait() != 0 and run.is_shipped:
                    raise SystemExit(f"error: {shlex.join(run.process.args)} failed: {''.join(run.lines)}")
            speeds = {name: run.speed(start, end) for name, run in runs.items()}
            times = {name: run.milliseconds() for name, run in runs.items() if run.is_shipped}
        finally:
            for run in runs.values():
                if not run.family and run.is_running():
                    run.family = [run.process, *run.process.children(recursive=True)]
                run.send(signal.SIGKILL)
    return speeds, times


def main(args: Args) -> None:
    if unknown := set(args.contenders) - set(CONTENDERS):
        raise SystemExit(f"error: --contenders {', '.join(unknown)}: there are {', '.join(CONTENDERS)}")
    end_children_with_us()
    flags, contenders, peer_flags, turn = WORKLOADS[args.workload]
    turn = args.turn or turn
    own_file = str(Path(args.file).resolve()) if args.file else ""
    shipped = args.contenders or ((TWO_RANKS,) if args.ranks == 2 else (BASE,))
    if own_file:
        if not Path(own_file).is_file():
            raise SystemExit(f"error: --file {args.file}: there is no such file")
        contenders = shipped
    commands = {name: contender_command(name, flags, peer_flags) for name in args.contenders or contenders}
    if own_file:
        launcher, _, _ = CONTENDERS[shipped[0]]
        commands[args.file] = [*launcher, own_file, *flags.split(), "--eval-episodes=0", *shlex.split(args.file_flags)]
    if args.command:  # it runs in a folder of its own
        parts = [str(Path(part).resolve()) if Path(part).is_file() else part for part in shlex.split(args.command)]
        commands[args.command] = parts
    date = time.strftime("%Y-%m-%d")
    machine = surroundings("torch", "gymnasium", "numpy", "lightning", "stable-baselines3")
    sources = {
        name: [part for part in line if Path(part).is_file() and part.endswith(".py")]
        for name, line in commands.items()
    }
    hashes = {name: source_hash(files[-1]) if files else "" for name, files in sources.items()}
    figures = {name: [] for name in commands}
    for repeat in range(args.repeats):
        speeds, times = race(commands, turn, own_file)
        for name, speed in speeds.items():
            figures[name].append(speed)
        print(f"{repeat + 1}/{args.repeats}: " + ", ".join(f"{n} {x:.0f}" for n, x in speeds.items()), flush=True)

    rows = []
    for name, values in figures.items():
        rows.append({
            "workload": args.workload,
            "turn": turn,
            "contender": name,
            "command": as_written(commands[name]),
            "steps_per_second": [round(value, 1) for value in values],
            "median": round(statistics.median(values), 1),
            # its speed over another's in each race
            "times": {
                base: [round(a / b, 3) for a, b in zip(values, figures[base], strict=True)]
                for base in (shipped[:1] if own_file else [BASE, PEER, ALONE])
                if base in figures
            },
            "milliseconds_in_last_race": times.get(name, {}),
            "date": date,
            "source_sha256": hashes[name],
            **machine,
        })  # fmt: skip
    if own_file:
        print("\n" + table(rows))
        return
    path = RESULTS / "throughput.jsonl"
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n" + table(rows))
    print("\n" + breakdown(rows))
    draw(path)


def latest(path: Path) -> dict[str, list[dict]]:
    """The newest row of each contender of each workload; those of a `--command` are for the one who raced it."""
    newest = {(row["workload"], row["contender"]): row for row in read_rows(path)}
    return {w: [newest[w, c] for c in contenders if (w, c) in newest] for w, (_, contenders, *_) in WORKLOADS.items()}


def table(rows: list[dict]) -> str:
    """A Markdown table: medians and ranges of steps per second and of the ratios within the races."""
    bases = list(dict.fromkeys(base for row in rows for base in row["times"]))
    lines = [
        f"| contender | steps/s | {' | '.join(f'times {base}' for base in bases)} |",
        "| --- " * (2 + len(bases)) + "|",
    ]
    for row in rows:
        ratios = [row["times"].get(base) for base in bases]  # none of those that were not in its race
        texts = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" if r else "" for r in ratios]
        lines.append(f"| {row['contender']} | {row['median']:,.0f} | {' | '.join(texts)} |")
    return "\n".join(lines)


def breakdown(rows: list[dict]) -> str:
    """A Markdown table of an iteration's milliseconds in the last race, and those of stepping its rows alone there."""
    lines = ["| contender | stepping | acting, GAE | communication | update |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        times = row["milliseconds_in_last_race"]
        sizes = [re.search(rf"--{flag} (\d+)", row["command"]) for flag in ("num-envs", "num-steps")]
        if times and all(sizes) and ALONE in row["times"] and "native" not in row["contender"]:  # it steps otherwise
            alone = row["steps_per_second"][-1] / row["times"][ALONE][-1]
            stepping = 1e3 * int(sizes[0][1]) * int(sizes[1][1]) / alone
            rest = times["Time/rollout"] - stepping
            figures = stepping, rest, times["Time/communication"], times["Time/update"]
            lines.append(f"| {row['contender']} | {' | '.join(f'{value:.1f}' for value in figures)} |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Bars of the speeds of each workload's newest rows in units of BASE's in the same race: medians and ranges."""
    workloads = {name: rows for name, rows in latest(path).items() if rows}
    figure, axes = plt.subplots(len(workloads), 1, squeeze=False, layout="constrained",
                                figsize=(8, sum(0.7 + 0.26 * len(rows) for rows in workloads.values())),
                                height_ratios=[0.7 + 0.26 * len(rows) for rows in workloads.values()])  # fmt: skip
    for axis, (name, rows) in zip(axes[:, 0], workloads.items(), strict=True):
        ratios = {
            row["contender"]: row["times"][BASE]
            for row in rows[::-1]
            if row["contender"] != ALONE and BASE in row["times"]
        }
        medians = [statistics.median(values) for values in ratios.values()]
        spreads = [(m - min(values), max(values) - m) for m, values in zip(medians, ratios.values(), strict=True)]
        axis.barh(list(ratios), medians, xerr=list(zip(*spreads, strict=True)), color="tab:blue", ecolor="0.4")
        axis.set(title=name, xlabel=f"times {BASE}")
    figure.savefig(path.with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main(tyro.cli(Args))
