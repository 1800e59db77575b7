"""The benchmarks' arithmetic, and the rows that they keep and leave out."""

import importlib
import json
import re
import shlex
import sys

import numpy as np
import pytest
import tyro

from launch import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import common
import compare
import learning
import plot
import throughput

COMMAND = learning.TORCH
DOCUMENTS = (ROOT / "README.md").read_text() + (ROOT / "benchmarks" / "README.md").read_text()
COMMANDS = re.findall(r"(?:^|&& )python benchmarks/(\w+)\.py(.*)$", DOCUMENTS, re.MULTILINE)
COMMANDS += re.findall(r"`python\sbenchmarks/(\w+)\.py([^`]*)`", DOCUMENTS)


@pytest.mark.parametrize("script, flags", dict.fromkeys(COMMANDS))
def test_the_flags_of_a_command_are_known(script, flags):
    words = [word.replace("...", "") for word in shlex.split(flags)]
    tyro.cli(importlib.import_module(script).Args, args=words)


def write(path, returns, source, command=COMMAND, env_id="CartPole-v1"):
    """Append rows of seeds 1, 2, ... that reached `returns` at once and kept them."""
    with path.open("a") as file:
        for seed, value in enumerate(returns, start=1):
            row = {"env_id": env_id, "command": f"{command} --seed {seed}", "source_sha256": source, "seed": seed}
            row |= {"greedy_return": value, "curve": [[0, 0.0, value], [10, 1.0, value], [40, 4.0, value]]}
            file.write(json.dumps(row) + "\n")


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "old.jsonl"
    write(path, [0.0, 1000.0, 50.0], source="older")
    write(path, [100.0, 110.0, 120.0, 130.0], source="old")
    return path


@pytest.fixture
def new(tmp_path, old):
    path = tmp_path / "new.jsonl"
    path.write_text(old.read_text())
    return path


@pytest.mark.parametrize(
    "returns, verdict, differ",
    [
        ([200.0, 210.0, 220.0], "better", True),
        ([20.0, 10.0, 30.0], "worse", True),
        ([90.0, 150.0, 120.0], "not shown to differ", False),
    ],
)
def test_a_comparison_says_the_direction(old, new, returns, verdict, differ):
    write(new, returns, source="new")
    table, differs, _ = compare.compare(old, new)
    lines = table.splitlines()[2:]
    assert differs == differ and len(lines) == 2
    assert all(line.endswith(f"| {verdict} |") for line in lines)
    assert all(f"| 115.0 (4) | {np.mean(returns):.1f} (3) |" in line for line in lines)


def test_a_comparison_is_of_welch(old, new):
    write(new, [90.0, 150.0, 120.0], source="new")
    # by hand: variances of the means 41.67 and 300, t = 5 / 18.48 of 2.561 degrees of freedom, whose 97.5% is 3.514
    table, *_ = compare.compare(old, new)
    assert "| +5.0 (-60.0 to +70.0) | 0.81 | 1.00 |" in table


@pytest.mark.parametrize("returns, env_id", [([], "CartPole-v1"), ([200.0], "CartPole-v1"), ([1.0, 2.0], "Acrobot-v1")])
def test_rows_are_not_compared_with_themselves(old, new, returns, env_id):
    """As a sweep that has not reached them yet would have it."""
    write(new, returns, source="new", env_id=env_id)
    with pytest.raises(SystemExit, match="nothing to compare"):
        compare.compare(old, new)


def test_another_command_is_compared_where_there_is_but_one(old, new):
    """A suite's command was changed: the file keeps the rows of the former one."""
    write(new, [1.0, 2.0], source="old", command=f"{COMMAND} --compile")
    runs, notes = compare.pairs(old, new)
    ((key, (before, after)),) = runs.items()
    assert key == ("CartPole-v1", f"{COMMAND} --compile")
    assert [row["greedy_return"] for row in before] == [100.0, 110.0, 120.0, 130.0]
    assert [row["greedy_return"] for row in after] == [1.0, 2.0]
    assert f"compared with {COMMAND}: {COMMAND} --compile" in notes
    write(new, [1.0, 2.0], source="old", command=f"{COMMAND} --gamma 0.9")
    with pytest.raises(SystemExit, match="nothing to compare"):
        compare.pairs(old, new)


def test_equal_commands_are_compared_first(old, new):
    write(old, [1.0, 2.0], source="old", command=f"{COMMAND} --compile")
    write(new, [3.0, 4.0], source="new", command=f"{COMMAND} --compile")
    write(new, [200.0, 210.0], source="new")
    write(new, [5.0], source="new", command=f"{COMMAND} --gamma 0.9")  # a sweep under way
    runs, _ = compare.pairs(old, new)
    returns = [[row["greedy_return"] for rows in pair for row in rows] for pair in runs.values()]
    assert sorted(returns) == [[1.0, 2.0, 3.0, 4.0], [100.0, 110.0, 120.0, 130.0, 200.0, 210.0]]
    table, *_ = compare.compare(old, new)
    assert f"| CartPole-v1: `{COMMAND} --compile` |" in table


def test_p_is_adjusted_as_in_holm():
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_intervals_are_of_student():
    # t is 2.776 for four degrees of freedom, the deviation of 1 to 5 is the root of 2.5
    assert plot.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776 * (2.5 / 5) ** 0.5, abs=1e-3)


def test_curves_look_back_and_not_ahead():
    at, returns = np.array([0.0, 96.0, 98.0, 100.0]), np.array([1.0, 2.0, 4.0, 6.0])
    assert plot.smooth(at, returns, np.array([0.0, 50.0, 97.0, 98.0, 100.0])).tolist() == [1.0, 1.0, 2.0, 3.0, 4.0]


def test_figures_are_of_the_newest_source(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "LEARNING", tmp_path)
    monkeypatch.setitem(learning.SUITES, "change", {COMMAND: 3})
    write(tmp_path / "change.jsonl", [1.0, 2.0, 3.0], source="old")
    write(tmp_path / "change.jsonl", [4.0, 5.0], source="new")
    write(tmp_path / "change.jsonl", [6.0, 7.0], source="new", command="python ppo_torch_ddp.py")  # no longer in it
    ((key, rows),) = plot.runs("change").items()
    assert key == ("CartPole-v1", COMMAND) and [row["greedy_return"] for row in rows] == [4.0, 5.0]
    monkeypatch.setitem(learning.SUITES, "change", {f"{COMMAND} --compile": 3})
    with pytest.raises(KeyError):
        plot.runs("change")


def test_a_finished_row_is_not_run_again(tmp_path, monkeypatch, capsys):
    ran, source, last = [], "one", 3

    def run(command, seed, workers):
        if seed > last:
            raise SystemExit("error: interrupted")
        ran.append(seed)
        return {"command": f"{command} --seed {seed}", "seed": seed, "greedy_return": 1.0, "source_sha256": source}

    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "run", run)
    monkeypatch.setattr(learning, "source_hash", lambda _: source)
    args = learning.Args("change", containing="LunarLander")
    with pytest.raises(SystemExit, match="interrupted"):
        learning.main(args)
    assert ran == [1, 2, 3]
    last = 5
    learning.main(args)
    assert ran == [1, 2, 3, 4, 5] and "1.0, 1.0, 1.0, 1.0, 1.0; mean 1.0" in capsys.readouterr().out
    learning.main(args)
    assert ran == [1, 2, 3, 4, 5]
    source = "another"
    learning.main(args)
    assert ran == 2 * [1, 2, 3, 4, 5]
    rows = [json.loads(line) for line in (tmp_path / "learning" / "change.jsonl").read_text().splitlines()]
    assert len(rows) == 10 and all("LunarLander" in row["command"] for row in rows)


def test_only_fabric_run_is_given_a_port():
    command = ["bin/fabric", "run", "--devices=2", "ppo_fabric.py"]
    words = common.with_port(command)
    assert words[:2] + words[3:] == command and words[2].startswith("--main-port=")
    for command in (["uv", "run", "ppo_torch_ddp.py"], ["fabric", "run", "--main-port=29400", "ppo_fabric.py"]):
        assert common.with_port(command) == command


def test_a_speed_is_of_the_turns():
    run = throughput.Run.__new__(throughput.Run)
    # the race has its marks from 2 to 8: a second of its first turn, and its second; from 3 to 5 it was stopped
    run.is_shipped, run.turns = False, [(0.0, 3.0), (5.0, 8.0), (9.0, 11.0)]
    run.marks_printed = [(1.0, 10), (2.0, 20), (6.0, 40), (8.0, 60), (10.0, 70)]
    assert run.speed(start=1.5, end=9.5) == pytest.approx((60 - 20) / (1 + 3))
