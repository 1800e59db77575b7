"""Do two sets of learning runs differ, and in which direction? For use before a change of algorithm lands.

    git stash; python benchmarks/learning.py change; mv benchmarks/results/learning/change.jsonl old.jsonl
    git stash pop; python benchmarks/learning.py change
    python benchmarks/compare.py old.jsonl benchmarks/results/learning/change.jsonl

For each environment in both files Welch's test of two figures of each run: the final greedy return, and the mean return
over the steps of the whole run, which says how fast it learned. Exit status 1 if any has p below `--level`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import ttest_ind


@dataclass
class Args:
    old: Annotated[Path, tyro.conf.Positional]
    """rows of learning.py before the change"""
    new: Annotated[Path, tyro.conf.Positional]
    """and after it"""
    level: float = 0.05
    """the probability, without any difference, below which a figure counts as different"""


def figures(path: Path) -> dict[str, dict[str, list[float]]]:
    """By environment and figure, its value in each run of the newest source in the file, of one command."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["source_sha256"] == rows[-1]["source_sha256"]]
    result = {}
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        runs = [row for row in rows if row["env_id"] == env_id]
        if len({row["command"].rpartition(" --seed")[0] for row in runs}) > 1 or len(runs) < 2:
            raise SystemExit(f"error: {path}: {env_id} needs two seeds or more of a single command")
        result[env_id] = {"final greedy return": [row["greedy_return"] for row in runs], "mean return of training": []}
        for row in runs:
            steps, _, returns = np.array(row["curve"]).T
            mean_return = np.trapezoid(returns, steps) / (steps[-1] - steps[0])
            result[env_id]["mean return of training"].append(float(mean_return))
    return result


def main(args: Args) -> None:
    old, new = figures(args.old), figures(args.new)
    shared, different = [env_id for env_id in old if env_id in new], False
    if not shared:
        raise SystemExit(f"error: {args.old} and {args.new} have no environment in common")
    print("| environment | figure | old, mean of seeds | new | p | |\n| --- | --- | --- | --- | --- | --- |")
    for env_id in shared:
        for name in old[env_id]:
            before, after = old[env_id][name], new[env_id][name]
            same = len({*before, *after}) == 1  # all 500, where the test is not defined
            p = 1.0 if same else ttest_ind(before, after, equal_var=False).pvalue
            verdict = (
                "no difference shown" if p >= args.level else "better" if np.mean(after) > np.mean(before) else "worse"
            )
            different |= p < args.level
            means = [f"{np.mean(values):.1f} ({len(values)})" for values in (before, after)]
            print(f"| {env_id} | {name} | {' | '.join(means)} | {p:.2f} | {verdict} |")
    raise SystemExit(int(different))


if __name__ == "__main__":
    main(tyro.cli(Args))
