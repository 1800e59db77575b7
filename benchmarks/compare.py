"""Do two sets of learning runs differ, and in which direction? For use before a change of algorithm lands.

    git show HEAD:benchmarks/results/learning/change.jsonl > old.jsonl
    python benchmarks/learning.py change
    python benchmarks/compare.py old.jsonl benchmarks/results/learning/change.jsonl

Of each command the rows of the last source in its file count. Equal commands are compared where their sources differ,
and a command that is new with the only one of its environment that is then left of the old file's. Welch's test of two
figures of each run: the final greedy return, and the mean return over the steps of the whole run, which says how fast
it learned. Being of several tests, p is adjusted (Holm 1979); the intervals of the differences are not. Exit status 1
if any adjusted p is below `--level`, 2 if there is nothing to compare.
"""

import sys
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from scipy.stats import ttest_ind

from common import read_rows
from learning import command_of


@dataclass
class Args:
    old: Annotated[Path, tyro.conf.Positional]
    """rows of learning.py before the change"""
    new: Annotated[Path, tyro.conf.Positional]
    """and after it"""
    level: float = 0.05
    """the probability of a false alarm, in all figures together"""


def newest(path: Path) -> dict[tuple[str, str], list[dict]]:
    """A file's rows by environment and command without the seed, of each command those of its last row's source.

    Of a seed that was run twice the last row: it is one sample.
    """
    rows, groups = read_rows(path), defaultdict(dict)
    keys = [(row["env_id"], command_of(row)) for row in rows]
    sources = {key: row["source_sha256"] for key, row in zip(keys, rows, strict=True)}
    for key, row in zip(keys, rows, strict=True):
        if row["source_sha256"] == sources[key]:
            groups[key][row["seed"]] = row
    return {key: list(by_seed.values()) for key, by_seed in groups.items()}


def pairs(old: Path, new: Path) -> tuple[dict[tuple[str, str], tuple[list[dict], list[dict]]], list[str]]:
    """By environment and command of the new file the rows to compare, two seeds or more each; and what else to say."""
    before, after, result, notes, partners = newest(old), newest(new), {}, [], set()
    sources = {key: [rows[key][0]["source_sha256"] for rows in (before, after)] for key in before.keys() & after.keys()}
    equal = {key for key, (one, other) in sources.items() if one != other}
    for key, rows in after.items():
        env_id, command = key
        left = [other for other in before if other[0] == env_id and other not in equal]
        added = [other for other in after if other[0] == env_id and other not in before]
        partner = key if key in equal else left[0] if key in added and len(left) == len(added) == 1 else None
        if partner is None:
            why = "its rows are of the same source in both" if key in before else "not one command to compare it with"
            notes.append(f"not compared, {why}: {command}")
        elif min(len(rows), len(before[partner])) < 2:
            notes.append(f"not compared, it needs two seeds or more in both: {command}")
        else:
            result[key] = before[partner], rows
            partners.add(partner)
            if partner != key:
                notes.append(f"compared with {partner[1]}: {command}")
            if len({str((row["versions"], row["cpu"])) for row in before[partner] + rows}) > 1:
                notes.append(f"not all of the same versions and processor: {command}")
    left = before.keys() - partners - after.keys()
    notes += [f"not compared, {new} has nothing of it: {command}" for _, command in sorted(left)]
    if not result:
        raise ValueError("; ".join([*notes, f"{old} and {new} have nothing to compare"]))
    return result, notes


def figures(rows: list[dict]) -> dict[str, list[float]]:
    """The figures that are compared, of each run."""
    means = []
    for row in rows:
        steps, _, returns = np.array(row["curve"]).T
        means.append(float(np.trapezoid(returns, steps) / (steps[-1] - steps[0])) if len(steps) > 1 else returns[0])
    return {"final greedy return": [row["greedy_return"] for row in rows], "mean return of training": means}


def compare(old: Path, new: Path, level: float = 0.05) -> tuple[str, bool, list[str]]:
    """A Markdown table of the figures of both files, whether any differs, and which commands were compared or not."""
    (runs, notes), samples, tests = pairs(old, new), {}, {}
    environments = [env_id for env_id, _ in runs]
    for (env_id, command), (before, after) in runs.items():
        label = env_id if environments.count(env_id) == 1 else f"{env_id}: `{command}`"
        for name, values in figures(before).items():
            samples[label, name] = values, figures(after)[name]
    for key, (before, after) in samples.items():
        same = len({*before, *after}) == 1  # all 500, where the test is not defined
        with warnings.catch_warnings(category=RuntimeWarning, action="ignore"):  # those of one side are all 500
            tests[key] = None if same else ttest_ind(after, before, equal_var=False)
    titles = f"{old.stem}, mean (seeds) | {new.stem}, mean (seeds) | difference (95% interval)"
    lines = [f"| environment | figure | {titles} | p | p, adjusted | {new.stem} is |", "| --- " * 8 + "|"]
    p = {key: float(test.pvalue) if test else 1.0 for key, test in tests.items()}
    adjusted = holm(p)
    for key, (before, after) in samples.items():
        difference = np.mean(after) - np.mean(before)
        interval = "({:+.1f} to {:+.1f})".format(*tests[key].confidence_interval()) if tests[key] else ""
        verdict = ("better" if difference > 0 else "worse") if adjusted[key] < level else "not shown to differ"
        cells = [f"{np.mean(values):.1f} ({len(values)})" for values in (before, after)]
        cells += [f"{difference:+.1f} {interval}".strip(), f"{p[key]:.2f}", f"{adjusted[key]:.2f}", verdict]
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    return "\n".join(lines), min(adjusted.values()) < level, notes


def main(args: Args) -> None:
    try:
        table, differ, notes = compare(args.old, args.new, args.level)
    except (OSError, ValueError, LookupError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    for note in notes:
        print(note, file=sys.stderr)
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
