"""Steps per second of each --vec-env: training on one and on two processes, and stepping alone.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/vector_envs.py

Stepping alone is the same vector environment with random actions in one process, by stepping.py: the limit that no
trainer in one process exceeds. Everything runs alternating, `--repeats` times; a figure is a median. Rows go to
benchmarks/results/vector_envs.jsonl; of each combination the newest is in README's table.
"""

import json
import os
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass

import tyro
from tqdm import tqdm

from common import (
    PYTHON,
    RESULTS,
    ROOT,
    TORCHRUN,
    as_written,
    end_children_with_us,
    run,
    scalars,
    source_hash,
    surroundings,
)

FILE = ROOT / "ppo_torch_ddp.py"
# environment: its flags, the iterations of a run, and its id by --vec-env
WORKLOADS = {
    "CartPole": (
        "--num-envs 8 --num-steps 128 --update-epochs 4 --per-rank-batch-size 256",
        24,
        dict.fromkeys(("sync", "async", "native", "envpool"), "CartPole-v1"),
    ),
    "HalfCheetah": (
        "--num-envs 8 --num-steps 256 --update-epochs 10 --per-rank-batch-size 64 --normalize-obs --normalize-rewards",
        8,
        dict.fromkeys(("sync", "async", "envpool"), "HalfCheetah-v5"),  # Gymnasium has no vector version of its own
    ),
    "Pong": (
        "--num-envs 8 --num-steps 64 --update-epochs 2 --per-rank-batch-size 128",
        4,
        {
            "sync": "atari_envs:StackedPong-v0",  # the frames that the other two make
            "async": "atari_envs:StackedPong-v0",
            "native": "ALE/Pong-v5",
            "envpool": "Pong-v5",
        },
    ),
}
PYTHONPATH = str(ROOT / "benchmarks")  # of atari_envs


@dataclass
class Args:
    repeats: int = 3
    """runs of each combination"""
    seconds: float = 2.0
    """duration of stepping alone"""


def stepping(env_id: str, vec_env: str, seconds: float) -> float:
    """Environment steps per second without an agent."""
    command = [*PYTHON, str(ROOT / "benchmarks" / "stepping.py"), "--env-id", env_id, "--vec-env", vec_env]
    command += ["--num-envs", "8", "--total-timesteps", "1000000000"]
    marks, output = [], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **output, env=os.environ | {"PYTHONPATH": PYTHONPATH}) as process:
        for line in process.stdout:
            marks.append((time.perf_counter(), int(line.split()[1])))
            if marks[-1][0] - marks[0][0] > seconds:
                process.kill()
                break
        else:
            raise SystemExit(f"{process.stderr.read()}\nerror: {as_written(command)} ended early")
    (start, first), (end, last) = marks[0], marks[-1]
    return (last - first) / (end - start)


def training(ranks: int, env_id: str, vec_env: str, flags: str, iterations: int) -> float:
    """Environment steps per second of a run through its launcher, from the end of its first quarter to its end."""
    sizes = dict(zip(flags.split()[:4:2], map(int, flags.split()[1:4:2]), strict=True))
    steps = ranks * iterations * sizes["--num-envs"] * sizes["--num-steps"]
    command = [*(TORCHRUN if ranks == 2 else PYTHON), str(FILE), "--env-id", env_id, "--vec-env", vec_env]
    command += [*flags.split(), "--total-timesteps", str(steps), "--eval-episodes", "0", "--exchange", "ddp"]
    with tempfile.TemporaryDirectory() as folder:
        run(command, folder, PYTHONPATH=PYTHONPATH)
        points = scalars(folder)["Time/step_per_second"]
    start, end = points[iterations // 4 - 1], points[-1]
    return (end.step - start.step) / (end.wall_time - start.wall_time)


def main(args: Args) -> None:
    end_children_with_us()
    figures = {}
    combinations = [(name, vec_env) for name, (_, _, ids) in WORKLOADS.items() for vec_env in ids]
    for name, vec_env in tqdm(combinations * args.repeats):
        flags, iterations, ids = WORKLOADS[name]
        row = figures.setdefault((name, vec_env), {"stepping": [], "1": [], "2": []})
        row["stepping"].append(stepping(ids[vec_env], vec_env, args.seconds))
        for ranks in (1, 2):
            row[str(ranks)].append(training(ranks, ids[vec_env], vec_env, flags, iterations))

    rows = []
    for (name, vec_env), columns in figures.items():
        row = {
            "environment": WORKLOADS[name][2][vec_env],
            "vec_env": vec_env,
            "flags": WORKLOADS[name][0],
            **{column: [round(value, 1) for value in values] for column, values in columns.items()},
            "date": time.strftime("%Y-%m-%d"),
            "source_sha256": source_hash(FILE),
            **surroundings("torch", "gymnasium", "numpy", "envpool", "ale-py", "mujoco"),
        }
        rows.append(row)
    with (RESULTS / "vector_envs.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


def table(rows: list[dict]) -> str:
    """A Markdown table of the newest row of each combination: steps per second, medians."""
    newest = {(row["environment"], row["vec_env"]): row for row in rows}
    lines = ["| environment | `--vec-env` | stepping alone | training, one process | two processes |"]
    lines += ["| --- " * 5 + "|"]
    for name, (_, _, ids) in WORKLOADS.items():
        for vec_env, env_id in ids.items():
            columns = [newest[env_id, vec_env][column] for column in ("stepping", "1", "2")]
            cells = " | ".join(f"{statistics.median(values):,.0f}" for values in columns)
            lines.append(f"| {name if vec_env == 'sync' else ''} | `{vec_env}` | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
