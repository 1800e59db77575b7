"""Which file wins where: steps per second over the number of ranks, of environments per rank, and the network's width.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/scaling.py
    python benchmarks/scaling.py --ranks 1 2 4 8 --num-envs 4 --widths 64

Races as in throughput.py, on CartPole with 128 steps, 4 epochs and 4 minibatches; medians over the races. One thing
varies at a time, around 2 ranks, 4 environments and a width of 64. Rows go to benchmarks/results/scaling.jsonl.
"""

import json
import statistics
import time
from dataclasses import dataclass

import tyro

from common import BIN, PYTHON, RESULTS, ROOT, as_written, end_children_with_us, source_hash, surroundings
from throughput import CARTPOLE, DDP, TCP, race

FILES = ("ppo_torch_ddp.py", "ppo_fabric.py", "ppo_fabric_decoupled.py")


@dataclass
class Args:
    ranks: tuple[int, ...] = (1, 2, 4)
    """numbers of ranks"""
    num_envs: tuple[int, ...] = (1, 4, 16)
    """numbers of environments per rank"""
    widths: tuple[int, ...] = (64, 256, 512)
    """widths of both hidden layers"""
    repeats: int = 3
    """races of each combination"""
    iterations: int = 40
    """iterations of a run"""


def commands(ranks: int, num_envs: int, width: int, iterations: int) -> dict[str, list[str]]:
    """The command lines that can be compared with as many ranks."""
    flags = [*CARTPOLE.split(), "--num-steps", "128", "--update-epochs", "4", "--hidden-sizes", str(width), str(width)]
    flags += ["--num-envs", str(num_envs), "--per-rank-batch-size", str(32 * num_envs), "--eval-episodes", "0"]
    torchrun = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else PYTHON
    fabric_run = [str(BIN / "fabric"), "run", "--accelerator=cpu", f"--devices={ranks}"] if ranks > 1 else PYTHON
    lines = {"torch": [*torchrun, "ppo_torch_ddp.py"], "Fabric": [*fabric_run, "ppo_fabric.py"]}
    actors = dict.fromkeys(lines, ranks)
    if ranks > 1:
        for name in ("torch", "Fabric"):
            lines[f"{name}, TCP"] = [*lines[name], *TCP]
            lines[name] += DDP
            actors[f"{name}, TCP"] = ranks
        for players in sorted({1, ranks - 1}):
            name = f"decoupled, {players} of {ranks} play, overlap"
            lines[name] = [*fabric_run, "ppo_fabric_decoupled.py", "--overlap", "--num-players", str(players)]
            actors[name] = players
    for name, line in lines.items():
        line += [*flags, "--total-timesteps", str(iterations * actors[name] * num_envs * 128)]
        if "decoupled" in name:  # as many minibatches, whatever the number of players and trainers
            trainers = ranks - actors[name]
            line += ["--per-rank-batch-size", str(max(1, 32 * num_envs * actors[name] // trainers))]
    return {
        name: [str(ROOT / part) if part.startswith("ppo_") else part for part in line] for name, line in lines.items()
    }


def main(args: Args) -> None:
    end_children_with_us()
    points = [(ranks, 4, 64) for ranks in args.ranks] + [(2, num_envs, 64) for num_envs in args.num_envs]
    points += [(2, 4, width) for width in args.widths]
    hashes = {name: source_hash(name) for name in FILES}
    for ranks, num_envs, width in dict.fromkeys(points):
        lines = commands(ranks, num_envs, width, args.iterations)
        races = [race(lines, 1.0)[0] for _ in range(args.repeats)]
        row = {"ranks": ranks, "num_envs": num_envs, "width": width}
        row["steps_per_second"] = {name: [round(speeds[name], 1) for speeds in races] for name in lines}
        row["commands"] = {name: as_written(line) for name, line in lines.items()}
        row |= {"date": time.strftime("%Y-%m-%d"), "source_sha256": hashes}
        row |= surroundings("torch", "gymnasium", "lightning")
        with (RESULTS / "scaling.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(table([row]), flush=True)


def table(rows: list[dict]) -> str:
    """A Markdown table of the newest row of each combination: steps per second, and times torch in the same race."""
    newest = {(row["ranks"], row["num_envs"], row["width"]): row["steps_per_second"] for row in rows}
    lines = ["| ranks | environments per rank | width | times torch, the fastest first |", "| --- | --- | --- | --- |"]
    for (ranks, num_envs, width), speeds in sorted(newest.items()):
        ratios = {
            name: statistics.median(a / b for a, b in zip(values, speeds["torch"], strict=True))
            for name, values in speeds.items()
        }
        ordered = sorted(ratios.items(), key=lambda item: -item[1])
        texts = [f"{name} {ratio:.2f}" for name, ratio in ordered]
        base = f"torch: {statistics.median(speeds['torch']):,.0f} steps/s"
        lines.append(f"| {ranks} | {num_envs} | {width} | {'; '.join(texts)} ({base}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Args))
