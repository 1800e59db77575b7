"""What checkpoints cost: their share of the training time of default commands, and of a large network's.

    pip install -r requirements.txt -r requirements-extra.txt -r benchmarks/requirements.txt
    python benchmarks/checkpoints.py

The share is the sum of a run's `Time/checkpoint`, during which all ranks wait, over its time from the first iteration
to the last checkpoint. Rows go to benchmarks/results/checkpoints.jsonl; README's table has the newest of each command.
"""

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from common import BIN, RESULTS, ROOT, end_children_with_us, run, scalars, source_hash, surroundings, with_port
from learning import file_of

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


def cost(command: str) -> tuple[int, int, float, float]:
    """Checkpoints written, bytes of one, milliseconds of one, share of the time."""
    launcher, *rest = [str(ROOT / part) if part.startswith("ppo_") else part for part in command.split()]
    with tempfile.TemporaryDirectory() as folder:
        run(with_port([str(BIN / launcher), *rest, "--eval-episodes", "0"]), folder)
        points = scalars(folder)
        size = next(Path(folder).rglob("*.pt")).stat().st_size
    checkpoints, start_time = points["Time/checkpoint"], points["Time/update"][0].wall_time
    seconds = [point.value for point in checkpoints]
    share = sum(seconds) / (checkpoints[-1].wall_time - start_time)
    return len(seconds), size, 1000 * statistics.mean(seconds), share


def table(rows: list[dict]) -> str:
    """A Markdown table of the newest row of each command: medians, and the lowest and the highest share."""
    newest = {row["command"]: row for row in rows}
    lines = ["| run | checkpoints | size of one | one takes | share of the time |", "| --- " * 5 + "|"]
    for name, command in ((name, command) for name, command in RUNS.items() if command in newest):
        row = newest[command]
        shares, milliseconds = row["shares"], statistics.median(row["milliseconds"])
        cells = f"{row['checkpoints'][0]} | {row['bytes'][0] / 1e6:.2f} MB | {milliseconds:.0f} ms"
        share = f"{statistics.median(shares):.2%} ({min(shares):.2%} to {max(shares):.2%})"
        lines.append(f"| {name} | {cells} | {share} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    end_children_with_us()
    rows = []
    for command in tqdm(RUNS.values()):
        row = {"command": command, "date": time.strftime("%Y-%m-%d"), "source_sha256": source_hash(file_of(command))}
        counts, sizes, milliseconds, shares = zip(*(cost(command) for _ in range(args.repeats)), strict=True)
        row |= {"checkpoints": counts, "bytes": sizes, "milliseconds": [round(value, 2) for value in milliseconds]}
        row |= {"shares": [round(share, 6) for share in shares]} | surroundings("torch", "gymnasium", "lightning")
        rows.append(row)
        with (RESULTS / "checkpoints.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
