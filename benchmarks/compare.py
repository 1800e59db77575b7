"""Do two sets of learning runs differ, and in which direction? For use before a change of algorithm lands.

    git show HEAD:benchmarks/results/learning/change.jsonl > old.jsonl
    python benchmarks/learning.py change
    python benchmarks/compare.py old.jsonl benchmarks/results/learning/change.jsonl

Of each command the rows of the newest source count, which has to be another in the new file than in the old; a command
that the other file lacks is compared with the only one that the other has of its environment. Welch's test of two
figures of each run: the final greedy return, and the mean return over the steps of the whole run, which says how fast
it learned. Being of several tests, p is adjusted (Holm 1979); the intervals of the differences are not. Exit status 1
if any p is below `--level`.
"""

import json
import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import ttest_ind

from learning import file_of


@dataclass
class Args:
    old: Annotated[Path, tyro.conf.Positional]
    """rows of learning.py before the change"""
    new: Annotated[Path, tyro.conf.Positional]
    """and after it"""
    level: float = 0.05
    """the probability of a false alarm, in all figures together"""


def newest(path: Path) -> dict[tuple[str, str], list[dict]]:
    """A file's rows by environment and command without the seed, of each command those of its last row's source."""
    rows, groups = [json.loads(line) for line in path.read_text().splitlines()], defaultdict(list)
    keys = [(row["env_id"], row["command"].rpartition(" --seed")[0]) for row in rows]
    sources = {key: row["source_sha256"] for key, row in zip(keys, rows, strict=True)}
    for key, row in zip(keys, rows, strict=True):
        if row["source_sha256"] == sources[key]:
            groups[key].append(row)
    return groups


def pairs(old: Path, new: Path) -> dict[tuple[str, str], tuple[list[dict], list[dict]]]:
    """By environment and command of the new file, the rows to compare: two seeds or more each."""
    before, after, result = newest(old), newest(new), {}
    for env_id, command in after:
        others = [other for other in before if other[0] == env_id and other not in after]
        mine = [key for key in after if key[0] == env_id and key not in before]
        if (env_id, command) in before:
            other = env_id, command
        elif len(others) == len(mine) == 1:
            (other,) = others
        else:
            print(f"not compared, for want of one command to compare it with: {command}", file=sys.stderr)
            continue
        runs = before[other], after[env_id, command]
        if other == (env_id, command) and len({rows[0]["source_sha256"] for rows in runs}) == 1:
            print(f"not compared, being of the same source in both files: {command}", file=sys.stderr)
            continue
        if min(map(len, runs)) < 2:
            raise SystemExit(f"error: {old}, {new}: two seeds or more are needed of {command}")
        result[env_id, command] = runs
    if not result:
        raise SystemExit(f"error: {old} and {new} have nothing to compare")
    return result


def figures(rows: list[dict]) -> dict[str, list[float]]:
    """The figures that are compared, of each run."""
    means = []
    for row in rows:
        steps, _, returns = np.array(row["curve"]).T
        means.append(float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])))
    return {"final greedy return": [row["greedy_return"] for row in rows], "mean return of training": means}


def compare(old: Path, new: Path, level: float = 0.05) -> tuple[str, bool]:
    """A Markdown table of the figures of both files, and whether any differs."""
    runs, samples, tests = pairs(old, new), {}, {}
    environments = [env_id for env_id, _ in runs]
    for (env_id, command), (before, after) in runs.items():
        label = env_id if environments.count(env_id) == 1 else f"{env_id}, {file_of(command)}"
        for name, values in figures(before).items():
            samples[label, name, command] = values, figures(after)[name]
    for key, (before, after) in samples.items():
        same = len({*before, *after}) == 1  # all 500, where the test is not defined
        with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # those of one side are all 500
            tests[key] = None if same else ttest_ind(after, before, equal_var=False)
    titles = f"{old.stem}, mean (seeds) | {new.stem}, mean (seeds) | difference (95% interval)"
    lines = [f"| environment | figure | {titles} | p | p, adjusted | {new.stem} is |", "| --- " * 8 + "|"]
    p = {key: float(test.pvalue) if test else 1.0 for key, test in tests.items()}
    adjusted = holm(p)
    for (label, name, command), (before, after) in samples.items():
        key, difference = (label, name, command), np.mean(after) - np.mean(before)
        interval = "({:+.1f} to {:+.1f})".format(*tests[key].confidence_interval()) if tests[key] else ""
        verdict = ("better" if difference > 0 else "worse") if adjusted[key] < level else "not shown to differ"
        cells = [f"{np.mean(values):.1f} ({len(values)})" for values in (before, after)]
        cells += [f"{difference:+.1f} {interval}".strip(), f"{p[key]:.2f}", f"{adjusted[key]:.2f}", verdict]
        lines.append(f"| {label} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines), min(adjusted.values()) < level


def main(args: Args) -> None:
    table, differ = compare(args.old, args.new, args.level)
    print(table)
    raise SystemExit(int(differ))


def holm(p: dict[tuple, float]) -> dict[tuple, float]:
    """p adjusted so that all tests together give a false alarm as seldom as one (Holm 1979)."""
    adjusted, highest = {}, 0.0
    for i, (key, value) in enumerate(sorted(p.items(), key=lambda item: item[1])):
        highest = max(highest, min(1.0, (len(p) - i) * value))
        adjusted[key] = highest
    return adjusted


if __name__ == "__main__":
    main(tyro.cli(Args))
