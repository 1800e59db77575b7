"""What --overlap costs in learning: returns over steps with and without, several seeds, in one figure.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/overlap.py

One player and one trainer through `fabric run`. A finished run's row, in benchmarks/results/overlap.jsonl, is not run
again unless ppo_fabric_decoupled.py or the command has changed since. The figure goes to overlap.png beside.
"""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILE = ROOT / "ppo_fabric_decoupled.py"
LAUNCHER = [str(Path(sys.executable).parent / "fabric"), "run", "--accelerator=cpu", "--devices=2"]
ENVIRONMENTS = {
    "CartPole-v1": "--num-envs 4",
    "LunarLander-v3": "--total-timesteps 200000 --num-envs 8 --num-steps 256 "
    "--gamma 0.999 --gae-lambda 0.98 --ent-coef 0.01",
}


@dataclass
class Args:
    seeds: int = 5
    """seeds 1 to this"""


def source_hash() -> str:
    return hashlib.sha256(FILE.read_bytes()).hexdigest()[:16]


def flags_of(env_id: str, overlap: bool, seed: int) -> list[str]:
    switches = ["--overlap"] if overlap else []
    return ["--env-id", env_id, *ENVIRONMENTS[env_id].split(), "--seed", str(seed), *switches]


def command_of(env_id: str, overlap: bool, seed: int) -> str:
    return " ".join(["fabric run --accelerator=cpu --devices=2", FILE.name, *flags_of(env_id, overlap, seed)])


def run(env_id: str, overlap: bool, seed: int) -> dict:
    """One run: its returns over steps and its greedy evaluation at the end."""
    flags, source = flags_of(env_id, overlap, seed), source_hash()
    start_time = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*LAUNCHER, str(FILE), *flags], cwd=folder, check=True, capture_output=True)
        (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
        scalars = EventAccumulator(events, size_guidance={"scalars": 0}).Reload().Scalars
        curve = [(point.step, round(point.value, 3)) for point in scalars("Rewards/rew_avg")]
        evaluation = scalars("Test/cumulative_reward")[-1].value
    return {
        "env_id": env_id,
        "overlap": overlap,
        "seed": seed,
        "command": command_of(env_id, overlap, seed),
        "greedy_return": round(evaluation, 2),
        "seconds": round(time.perf_counter() - start_time, 1),
        "source_sha256": source,
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "gymnasium", "lightning")},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "curve": curve,
    }


def plot(rows: list[dict]) -> None:
    """Mean over seeds and its 95% interval (Student's t), each curve smoothed over a twentieth of the run."""
    student = scipy.stats.t.ppf(0.975, df=len({row["seed"] for row in rows}) - 1)
    figure, axes = plt.subplots(1, len(ENVIRONMENTS), figsize=(11, 4))
    for axis, env_id in zip(axes, ENVIRONMENTS, strict=True):
        for overlap, color in ((False, "tab:blue"), (True, "tab:orange")):
            curves = [np.array(row["curve"]) for row in rows if (row["env_id"], row["overlap"]) == (env_id, overlap)]
            last = min(curve[-1, 0] for curve in curves)
            steps = np.linspace(last / 40, last, 60)
            window = last / 20
            smooth = np.array(
                [[curve[np.abs(curve[:, 0] - step) <= window, 1].mean() for step in steps] for curve in curves]
            )
            mean, half = smooth.mean(0), student * smooth.std(0, ddof=1) / np.sqrt(len(curves))
            axis.plot(steps, mean, color=color, label="--overlap" if overlap else "alternating")
            axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        axis.set(
            title=f"{env_id}, {len(curves)} seeds", xlabel="environment steps", ylabel="return of training episodes"
        )
        axis.locator_params(axis="x", nbins=5)
        axis.legend()
    figure.tight_layout()
    figure.savefig(RESULTS / "overlap.png", dpi=90)


def main(args: Args) -> None:
    path = RESULTS / "overlap.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    wanted = {
        command_of(e, o, s): (e, o, s) for e in ENVIRONMENTS for s in range(1, args.seeds + 1) for o in (False, True)
    }
    rows = [row for row in rows if row["source_sha256"] == source_hash() and row["command"] in wanted]
    done = {row["command"] for row in rows}
    for key in tqdm([key for command, key in wanted.items() if command not in done]):
        rows.append(run(*key))
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    plot(rows)
    for env_id in ENVIRONMENTS:
        for name in ("greedy return at the end", "mean return over the run"):
            values = {overlap: [] for overlap in (False, True)}
            for row in [row for row in rows if row["env_id"] == env_id]:
                mean = round(float(np.mean([value for _, value in row["curve"]])), 1)
                values[row["overlap"]].append(row["greedy_return"] if name.startswith("greedy") else mean)
            p = scipy.stats.ttest_ind(values[False], values[True], equal_var=False).pvalue
            print(f"{env_id}, {name}: {np.mean(values[False]):.1f} without --overlap {values[False]}, ")
            print(f"    {np.mean(values[True]):.1f} with {values[True]}, Welch's test: p = {p:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
