"""Draw the learning curves and write the tables of results in README and docs/, all from the committed rows.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/plot.py

benchmarks/results/learning/NAME.png is drawn from the rows of a suite, or of two: the mean over the seeds and its 95%
confidence interval (Student's t), over environment steps and over wall-clock time; and the tables and commands between
`<!-- results: ... -->` marks are written. `--check` writes nothing, and ends with status 1 where a page is out of date.
"""

import re
import statistics
from dataclasses import dataclass

import matplotlib
import numpy as np
import tyro
from matplotlib import pyplot as plt
from scipy.stats import t as student

import checkpoints
import compare
import learning
import scaling
import throughput
import vector_envs
from common import RESULTS, ROOT, read_rows

matplotlib.use("Agg")
LEARNING = RESULTS / "learning"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# others' PPO: of Stable-Baselines3's RL Zoo one run each, greedy mean returns of its benchmark table, steps of its
# ppo.yml; of Tianshou's MuJoCo benchmark the highest during a million steps, means of ten seeds
PEERS = {
    "RL Zoo": {
        "CartPole-v1": "500 (100,000 steps)",
        "Acrobot-v1": "-73.5 (1,000,000)",
        "LunarLander-v3": "242 (1,000,000; v2)",
        "Pendulum-v1": "-172 (100,000)",
        "BipedalWalker-v3": "288 (5,000,000)",
        "HalfCheetah-v5": "5,819 (v3)",
        "Hopper-v5": "2,410 (v3)",
        "Walker2d-v5": "3,479 (v3)",
        "Ant-v5": "1,327 (v3)",
        "Swimmer-v5": "282 (v3)",
    },
    "Tianshou": {
        "HalfCheetah-v5": "5,784 (v3)",
        "Hopper-v5": "2,609 (v3)",
        "Walker2d-v5": "3,589 (v3)",
        "Ant-v5": "3,258 (v3)",
    },
}
# the figures and tables of learning, and the suites whose runs are in them
FIGURES = {name: (name,) for name in ("classic", "mujoco", "pong")} | {"overlap": ("alternating", "overlap")}


@dataclass
class Args:
    check: bool = False
    """write nothing; exit status 1 if a page is out of date"""


def runs(suite: str) -> dict[tuple[str, str], list[dict]]:
    """The newest rows of a suite's commands, by environment and command without the seed."""
    rows = compare.newest(LEARNING / f"{suite}.jsonl")
    keys = [(learning.env_id_of(command), command) for command in learning.SUITES[suite]]
    return {key: rows[key] for key in keys}


def interval(values: list[float] | np.ndarray) -> np.ndarray:
    """Half the width of the 95% confidence interval of the mean over the first axis, of two seeds or more."""
    n = len(values)
    return student.ppf(0.975, n - 1) * np.std(values, axis=0, ddof=1) / np.sqrt(n)


def mean_curve(rows: list[dict], column: int, points: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What all runs of a command have reached: x, the mean return over the runs and half its confidence interval.

    `column` of a curve's points is 0 for environment steps, 1 for seconds.
    """
    curves = [np.array(row["curve"], dtype=float)[:, [column, 2]] for row in rows]
    x = np.linspace(max(c[0, 0] for c in curves), min(c[-1, 0] for c in curves), points)
    means = np.array([smooth(*curve.T, x) for curve in curves])
    return x, means.mean(0), interval(means) if len(means) > 1 else np.zeros(points)


def smooth(at: np.ndarray, returns: np.ndarray, x: np.ndarray) -> np.ndarray:
    """At each x the mean of the returns over the last twentieth of the axis, or the last return before that."""
    means = []
    for end in x:
        known = returns[at <= end]
        window = returns[(at > end - x[-1] / 20) & (at <= end)]
        means.append(window.mean() if len(window) else known[-1])
    return np.array(means)


def draw(name: str) -> None:
    """One row of axes for each environment: returns over steps, and over minutes."""
    groups = {key: rows for suite in FIGURES[name] for key, rows in runs(suite).items()}
    environments = list(dict.fromkeys(env_id for env_id, _ in groups))
    figure, axes = plt.subplots(len(environments), 2, squeeze=False, layout="constrained",
                                figsize=(9, 2.4 * len(environments)), sharey="row")  # fmt: skip
    for pair, env_id in zip(axes, environments, strict=True):
        for (of, command), rows in groups.items():
            if of != env_id:
                continue
            for column, axis in enumerate(pair):
                x, mean, half = mean_curve(rows, column)
                x = x / 60 if column else x
                axis.plot(x, mean, label=f"{label(command)}, {len(rows)} seed{'s' * (len(rows) > 1)}")
                axis.fill_between(x, mean - half, mean + half, alpha=0.2)
                axis.locator_params(axis="x", nbins=6)
        pair[0].set(title=env_id, ylabel="return", xlabel="environment steps")
        pair[1].set(xlabel="minutes")
        pair[0].legend(fontsize="small")
    figure.savefig(LEARNING / f"{name}.png", dpi=90)
    plt.close(figure)


def label(command: str) -> str:
    """The file of a command, and which way it uses its processes."""
    (file,) = re.findall(r"ppo_\w+\.py", command)
    return " ".join([file, *re.findall(r"--(?:exchange tcp|compile|overlap)", command)])


def learning_table(name: str) -> str:
    """A Markdown table of the greedy returns at the end."""
    groups = {key: rows for suite in FIGURES[name] for key, rows in runs(suite).items()}
    peers = [peer for peer, returns in PEERS.items() if any(env_id in returns for env_id, _ in groups)]
    titles = ["environment", "file", "processes", "steps, at most", "seeds"]
    titles += ["greedy return, mean over seeds", "lowest, highest", *peers]
    lines = [" | ".join(["", *titles, "minutes a run", ""]).strip(), "| --- " * (len(titles) + 1) + "|"]
    for (env_id, command), rows in groups.items():
        returns = [row["greedy_return"] for row in rows]
        half = f" ± {interval(returns):,.1f}" if len(returns) > 1 else ""
        processes = (re.findall(r"--(?:nproc_per_node|devices)=(\d+)", command) or ["1"])[0]
        cells = [env_id, f"`{label(command)}`", processes, f"{max(row['steps'] for row in rows):,}", str(len(rows))]
        cells += [f"{statistics.mean(returns):,.1f}{half}"]
        cells += [f"{min(returns):,.1f}, {max(returns):,.1f}", *(PEERS[peer].get(env_id, "") for peer in peers)]
        cells += [f"{statistics.median(row['seconds'] for row in rows) / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def returns(suite: str) -> str:
    """A Markdown table of a suite's commands and the greedy return of each seed."""
    lines = ["| command | seeds | greedy return |", "| --- | --- | --- |"]
    for (_, command), rows in runs(suite).items():
        values = [f"{row['greedy_return']:,.1f}" for row in sorted(rows, key=lambda row: row["seed"])]
        lines.append(f"| `{command}` | {len(rows)} | {', '.join(values)} |")
    return "\n".join(lines)


def commands(suite: str) -> str:
    """A suite's commands as one writes them in a shell."""
    lines = (re.sub(r"(\{\S*\})", r"'\1'", command) for command in learning.SUITES[suite])
    return "\n".join(["```bash", *lines, "```"])


def block(kind: str, *names: str) -> str:
    """The text of a page's `<!-- results: KIND NAMES -->`."""
    if kind in (functions := {"learning": learning_table, "commands": commands, "returns": returns}):
        return functions[kind](*names)
    if kind == "compare":
        return compare.compare(*(LEARNING / f"{name}.jsonl" for name in names))[0]
    if kind in (modules := {"scaling": scaling, "checkpoints": checkpoints, "vector_envs": vector_envs}):
        return modules[kind].table(read_rows(RESULTS / f"{kind}.jsonl"))
    rows = throughput.latest(RESULTS / "throughput.jsonl")[names[0]]
    return {"throughput": throughput.table, "breakdown": throughput.breakdown}[kind](rows)


def rewrite(match: re.Match) -> str:
    """Marked text with what the rows say now."""
    try:
        return f"{match[1]}{block(*match[2].split())}\n{match[3]}"
    except (FileNotFoundError, LookupError, ValueError) as error:
        raise SystemExit(f"error: there are no rows for `results: {match[2]}`: {error}") from error


def main(args: Args) -> None:
    for page in PAGES:
        old = page.read_text()
        new, blocks = re.subn(r"(<!-- results: (.*) -->\n)(?:(?!<!-- ).*\n)*(<!-- end of results -->)", rewrite, old)
        if not blocks == old.count("<!-- result") == old.count("<!-- end of result"):
            raise SystemExit(f"error: {page.name}: a mark of results is without its other one, or misspelt")
        if args.check and new != old:
            raise SystemExit(f"{page.name} is out of date: python benchmarks/plot.py")
        if not args.check:
            page.write_text(new)
    if args.check:
        return
    throughput.draw(RESULTS / "throughput.jsonl")
    for name in FIGURES:
        draw(name)


if __name__ == "__main__":
    main(tyro.cli(Args))
