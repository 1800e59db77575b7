"""What checkpoints cost: their share of the training time of default commands, and of a large network's.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/checkpoints.py

The share is the sum of a run's `Time/checkpoint`, during which all ranks wait, over its time from the first iteration
to the last checkpoint. Rows go to benchmarks/results/checkpoints.jsonl; README's table has the newest of each command.
"""

import importlib.metadata
import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from learning import source_hash
from throughput import BIN, RESULTS, ROOT, cpu_model, free_port

RUNS = {
    "`ppo_torch_ddp.py`, two ranks": "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py",
    "`ppo_fabric.py`, two ranks": "fabric run --accelerator=cpu --strategy=ddp --devices=2 ppo_fabric.py",
    "`ppo_fabric_decoupled.py`, three ranks": "fabric run --accelerator=cpu --devices=3 ppo_fabric_decoupled.py",
    "Nature CNN on Pong, two ranks": (
        "torchrun --nproc_per_node=2 --standalone ppo_torch_ddp.py --env-id ALE/Pong-v5 --vec-env native --num-envs 8 "
        '--env-kwargs {"img_height":42,"img_width":42} --update-epochs 4 --per-rank-batch-size 128'
    ),
}


@dataclass
class Args:
    repeats: int = 3
    """runs of each command"""


def run(command: str) -> tuple[int, float, float]:
    """Checkpoints written, milliseconds of one, share of the time."""
    command = command.replace("fabric run", f"fabric run --main-port={free_port()}")
    launcher, *rest = [str(ROOT / part) if part.startswith("ppo_") else part for part in command.split()]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [str(BIN / launcher), *rest, "--eval-episodes", "0"], cwd=folder, check=True, capture_output=True
        )
        (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
        scalars = EventAccumulator(events, size_guidance={"scalars": 0}).Reload().Scalars
        points, start_time = scalars("Time/checkpoint"), scalars("Time/update")[0].wall_time
    seconds = [point.value for point in points]
    return len(seconds), 1000 * statistics.mean(seconds), sum(seconds) / (points[-1].wall_time - start_time)


def table(rows: list[dict]) -> str:
    """A Markdown table of the newest row of each command: medians, and the lowest and the highest share."""
    newest = {row["command"]: row for row in rows}
    lines = ["| run | checkpoints | one takes | share of the time |", "| --- | --- | --- | --- |"]
    for name, command in ((name, command) for name, command in RUNS.items() if command in newest):
        counts, milliseconds, shares = (newest[command][key] for key in ("checkpoints", "milliseconds", "shares"))
        cells = f"{counts[0]} | {statistics.median(milliseconds):.0f} ms | {statistics.median(shares):.2%}"
        lines.append(f"| {name} | {cells} ({min(shares):.2%} to {max(shares):.2%}) |")
    return "\n".join(lines)


def main(args: Args) -> None:
    rows, versions = [], {name: importlib.metadata.version(name) for name in ("torch", "gymnasium", "lightning")}
    for command in tqdm(RUNS.values()):
        row = {"command": command, "date": time.strftime("%Y-%m-%d"), "source_sha256": source_hash(command)}
        counts, milliseconds, shares = zip(*(run(command) for _ in range(args.repeats)), strict=True)
        row |= {"checkpoints": counts, "milliseconds": [round(value, 2) for value in milliseconds]}
        row |= {"shares": [round(share, 6) for share in shares], "versions": versions, "cpu": cpu_model()}
        rows.append(row)
        with (RESULTS / "checkpoints.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
