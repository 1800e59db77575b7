"""Do two sets of learning runs differ, and in which direction? For use before a change of algorithm lands.

    git show HEAD:benchmarks/results/learning/change.jsonl > old.jsonl
    python benchmarks/learning.py change
    python benchmarks/compare.py old.jsonl benchmarks/results/learning/change.jsonl

For each environment in both files Welch's test of two figures of each run: the final greedy return, and the mean return
over the steps of the whole run, which says how fast it learned. Being of several tests, p is adjusted (Holm 1979). Exit
status 1 if any is below `--level`.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import product
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
    """the probability of a false alarm, in all figures together"""


def figures(path: Path) -> dict[str, dict[str, list[float]]]:
    """By environment and figure, its value in each run of one command.

    Of the newest source that the file has most seeds of: a sweep may be under way.
    """
    groups, result = defaultdict(lambda: defaultdict(list)), {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups[row["env_id"]][row["source_sha256"]].append(row)
    for env_id, sources in groups.items():
        runs = max(reversed(sources.values()), key=len)
        if len({row["command"].rpartition(" --seed")[0] for row in runs}) > 1 or len(runs) < 2:
            raise SystemExit(f"error: {path}: {env_id} needs two seeds or more of a single command")
        result[env_id] = {"final greedy return": [row["greedy_return"] for row in runs], "mean return of training": []}
        for row in runs:
            steps, _, returns = np.array(row["curve"]).T
            mean_return = np.trapezoid(returns, steps) / (steps[-1] - steps[0])
            result[env_id]["mean return of training"].append(float(mean_return))
    return result


def compare(old: Path, new: Path, level: float = 0.05) -> tuple[str, bool]:
    """A Markdown table of the figures of both files, and whether any differs."""
    runs, others = figures(old), figures(new)
    shared = [env_id for env_id in runs if env_id in others]
    if not shared:
        raise SystemExit(f"error: {old} and {new} have no environment in common")
    tests = {}
    for env_id, name in product(shared, ("final greedy return", "mean return of training")):
        before, after = runs[env_id][name], others[env_id][name]
        same = len({*before, *after}) == 1  # all 500, where the test is not defined
        tests[env_id, name] = 1.0 if same else float(ttest_ind(before, after, equal_var=False).pvalue)
    titles = f"{old.stem}, mean (seeds) | {new.stem}, mean (seeds)"
    lines = [f"| environment | figure | {titles} | p | p, adjusted | {new.stem} is |", "| --- " * 7 + "|"]
    adjusted = holm(tests)
    for (env_id, name), p in tests.items():
        before, after = runs[env_id][name], others[env_id][name]
        better = "better" if np.mean(after) > np.mean(before) else "worse"
        verdict = better if adjusted[env_id, name] < level else "not shown to differ"
        means = [f"{np.mean(values):.1f} ({len(values)})" for values in (before, after)]
        lines.append(
            f"| {env_id} | {name} | {' | '.join(means)} | {p:.2f} | {adjusted[env_id, name]:.2f} | {verdict} |"
        )
    return "\n".join(lines), min(adjusted.values()) < level


def main(args: Args) -> None:
    table, differ = compare(args.old, args.new, args.level)
    print(table)
    raise SystemExit(int(differ))


def holm(tests: dict[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """p adjusted so that all tests together give a false alarm as seldom as one (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for i, (key, p) in enumerate(sorted(tests.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(tests) - i) * p))
        adjusted[key] = highest
    return adjusted


if __name__ == "__main__":
    main(tyro.cli(Args))
