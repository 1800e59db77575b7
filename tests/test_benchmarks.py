"""The benchmarks' arithmetic, and the rows that they keep and leave out."""

import importlib
import json
import os
import re
import shlex
import signal
import sys
import threading
import time

import numpy as np
import pytest
import tyro

from launch import BIN, ROOT, Command

sys.path.append(str(ROOT / "benchmarks"))
import common
import compare
import learning
import plot
import throughput

COMMAND = learning.TORCH
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"]
DOCUMENTS = "".join(page.read_text() for page in PAGES)
COMMANDS = re.findall(r"(?:^|&& )python benchmarks/(\w+)\.py(.*)$", DOCUMENTS, re.MULTILINE)
COMMANDS += re.findall(r"`python\sbenchmarks/(\w+)\.py([^`]*)`", DOCUMENTS)


def test_there_are_commands():
    assert len({script for script, _ in COMMANDS}) == 7


@pytest.mark.parametrize("script, flags", dict.fromkeys(COMMANDS))
def test_the_flags_of_a_command_are_known(script, flags):
    words = [word.replace("...", "") for word in shlex.split(flags)]
    tyro.cli(importlib.import_module(script).Args, args=words)


def write(path, returns, source, command=COMMAND, env_id="CartPole-v1"):
    """Append rows of seeds 1, 2, ... that reached `returns` at once and kept them."""
    with path.open("a") as file:
        for seed, value in enumerate(returns, start=1):
            row = {"env_id": env_id, "command": f"{command} --seed {seed}", "source_sha256": source, "seed": seed}
            row |= {"versions": {"torch": "2.13.0"}, "cpu": "one core"}
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
    with pytest.raises(ValueError, match="nothing to compare"):
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
    with pytest.raises(ValueError, match="nothing to compare"):
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


def test_what_a_comparison_leaves_out_is_said(old, tmp_path):
    write(old, [1.0, 2.0], source="old", command=f"{COMMAND} --compile")
    new = tmp_path / "new.jsonl"
    write(new, [3.0, 4.0], source="new")
    new.write_text(new.read_text().replace("one core", "another"))
    _, notes = compare.pairs(old, new)
    assert notes == [
        f"not all of the same versions and processor: {COMMAND}",
        f"not compared, {new} has nothing of it: {COMMAND} --compile",
    ]


def test_a_seed_that_was_run_twice_is_one_sample(old):
    write(old, [100.0, 110.0, 120.0, 135.0], source="old")
    ((_, rows),) = compare.newest(old).items()
    assert [row["greedy_return"] for row in rows] == [100.0, 110.0, 120.0, 135.0]


@pytest.mark.parametrize("returns, level, status", [([200, 210], 0.05, 1), ([200, 210], 1e-9, 0), ([], 0.05, 2)])
def test_the_exit_status_of_a_comparison(old, new, capsys, returns, level, status):
    write(new, returns, source="new")
    with pytest.raises(SystemExit) as end:
        compare.main(compare.Args(old, new, level))
    output = capsys.readouterr()
    assert end.value.code == status and ("error: " in output.err) == (status == 2) == (not output.out)


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "No such file"),
        ('{"seed": 1}\n{"seed"', "line 2 is no row"),
        ('{"workload": "cartpole"}', "KeyError: 'env_id'"),
    ],
)
def test_rows_that_cannot_be_read(old, tmp_path, capsys, text, reason):
    path = tmp_path / "rows.jsonl"
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit) as end:
        compare.main(compare.Args(old, path))
    assert end.value.code == 2 and re.fullmatch(f"error: .*{reason}.*\n", capsys.readouterr().err)


def test_returns_that_are_all_the_same(old, new):
    """Welch's test is not defined on those."""
    write(old, [500.0, 500.0], source="old", command="python ppo_torch_ddp.py")
    write(new, [500.0, 500.0, 500.0], source="new", command="python ppo_torch_ddp.py")
    table, differ, _ = compare.compare(old, new)
    assert not differ and table.count("| 500.0 (2) | 500.0 (3) | +0.0 | 1.00 | 1.00 | not shown to differ |") == 2


def test_p_is_adjusted_as_in_holm():
    assert compare.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_intervals_are_of_student():
    # t is 2.776 for four degrees of freedom, the deviation of 1 to 5 is the root of 2.5
    assert plot.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2.776 * (2.5 / 5) ** 0.5, abs=1e-3)


def test_curves_look_back_and_not_ahead():
    at, returns = np.array([0.0, 96.0, 98.0, 100.0]), np.array([1.0, 2.0, 4.0, 6.0])
    assert plot.smooth(at, returns, np.array([0.0, 50.0, 97.0, 98.0, 100.0])).tolist() == [1.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("column, last", [(0, 40.0), (1, 8.0)])
def test_a_mean_curve_is_over_the_runs(column, last):
    """Over environment steps or seconds, as far as all runs have come."""
    ends = [[40, 10.0, 0.0], [50, 8.0, 0.0]]
    rows = [{"curve": [[0, 0.0, value], *([20, 4.0, value], end)]} for value, end in zip([1.0, 3.0], ends, strict=True)]
    x, mean, half = plot.mean_curve(rows, column, points=3)
    assert x.tolist() == [0.0, last / 2, last]
    # 1 and 3 until one of the runs ends with 0; t is 12.706 for one degree of freedom, the mean's deviation is 1
    one, other = (0.0, 3.0) if column == 0 else (1.0, 0.0)
    assert mean.tolist() == [2.0, 2.0, (one + other) / 2]
    assert half == pytest.approx([12.706, 12.706, 12.706 * abs(one - other) / 2], abs=1e-2)


def test_a_page_that_is_out_of_date(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(plot, "PAGES", [page])
    text = "".join((ROOT / "docs" / name).read_text() for name in ("results.md", "speed.md"))
    (cell,) = re.findall(r"\| HalfCheetah-v5 \|.* ([\d,.]+) ± .*\n", text)
    end = "<!-- end of results -->\n"
    for content, message in (
        (text, None),
        (text.replace(cell, f"1{cell}"), "out of date"),
        (text.replace(end, "", 1), "a mark"),
        (text.replace("results: scaling", "result"), "a mark"),
        (text.replace("results: scaling", "results: scalings"), "no rows"),
    ):
        page.write_text(content)
        if message is None:
            plot.main(plot.Args(check=True))
        else:
            with pytest.raises(SystemExit, match=message):
                plot.main(plot.Args(check=True))
        assert page.read_text() == content


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


def test_rows_of_the_exchange_by_its_former_flag_are_found(old):
    write(old, [1.0, 2.0], source="old", command=f"{COMMAND} --tcp-all-reduce --compile")
    assert ("CartPole-v1", f"{COMMAND} --exchange tcp --compile") in compare.newest(old)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """What has been run by `learning.main`, whose runs are of `source` and fail if `fails` says so of their seed."""

    class Sweep:
        ran, source, path = [], "one", tmp_path / "learning" / "change.jsonl"

        def fails(self, seed):
            return False

        def train(self, command, seed, workers):
            if self.fails(seed):
                raise SystemExit(f"error: of seed {seed}")
            self.ran.append(seed)
            row = {"env_id": "LunarLander-v3", "command": f"{command} --seed {seed}", "seed": seed}
            return row | {"greedy_return": float(seed), "source_sha256": self.source}

    sweep = Sweep()
    monkeypatch.setattr(learning, "RESULTS", tmp_path)
    monkeypatch.setattr(learning, "train", sweep.train)
    monkeypatch.setattr(learning, "end_children_with_us", lambda: None)  # not of pytest
    monkeypatch.setattr(learning, "source_hash", lambda _: sweep.source)
    return sweep


LUNARLANDER = learning.Args("change", containing="LunarLander")


def test_a_finished_row_is_not_run_again(sweep, capsys):
    sweep.fails = lambda seed: seed in (2, 4)
    with pytest.raises(SystemExit, match=r"2 of 5 runs failed.*LunarLander.* --seed 2; .* --seed 4"):
        learning.main(LUNARLANDER)
    output = capsys.readouterr()
    assert sweep.ran == [1, 3, 5] and "of seed 2" in output.err and "1.0, 3.0, 5.0; mean 3.0" in output.out
    del sweep.fails
    learning.main(LUNARLANDER)
    assert sweep.ran == [1, 3, 5, 2, 4] and "1.0, 2.0, 3.0, 4.0, 5.0; mean 3.0" in capsys.readouterr().out
    learning.main(LUNARLANDER)
    assert len(sweep.ran) == 5
    sweep.source = "another"
    learning.main(LUNARLANDER)
    assert sweep.ran == [1, 3, 5, 2, 4, 1, 2, 3, 4, 5]
    rows = common.read_rows(sweep.path)
    assert len(rows) == 10 and all("LunarLander" in row["command"] for row in rows)


def test_a_change_that_was_undone(sweep):
    """The figures are then of the rows from before it."""
    learning.main(LUNARLANDER)
    sweep.source, sweep.fails = "change", lambda seed: seed > 2
    with pytest.raises(SystemExit):
        learning.main(LUNARLANDER)
    assert [row["source_sha256"] for rows in compare.newest(sweep.path).values() for row in rows] == 2 * ["change"]
    sweep.source = "one"
    learning.main(LUNARLANDER)
    assert len(sweep.ran) == 7 and len(common.read_rows(sweep.path)) == 7
    assert [row["source_sha256"] for rows in compare.newest(sweep.path).values() for row in rows] == 5 * ["one"]


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_runs_at_a_time(sweep, workers):
    running, most, meeting = [], [], threading.Barrier(workers)

    def fails(seed):
        running.append(seed)
        most.append(len(running))
        meeting.wait(10)  # fails if the others are not there
        running.remove(seed)

    sweep.fails = fails
    learning.main(learning.Args("change", containing="LunarLander", seeds=4, workers=workers))
    assert sorted(sweep.ran) == [1, 2, 3, 4] and max(most) == workers


def test_a_row_is_of_a_run():
    command = "python ppo_torch_ddp.py --total-timesteps 4096 --eval-episodes 2 --env-id CartPole-v1"
    row = learning.train(command, seed=3, workers=2)
    steps, seconds, returns = np.array(row["curve"]).T
    assert row["command"] == f"{command} --seed 3" and row["env_id"] == "CartPole-v1" and row["workers"] == 2
    assert 3500 < row["steps"] == steps[-1] < 4096 and len(steps) == 8 and (np.diff(steps) > 0).all()
    assert 0 < seconds[0] < seconds[-1] < row["seconds"] < 100 and (np.diff(seconds) >= 0).all()
    assert returns.min() > 8 and returns[-1] > returns[0] and 8 < row["greedy_return"] <= 500
    assert row["source_sha256"] == common.source_hash("ppo_torch_ddp.py") and row["versions"]["torch"].startswith("2.")
    with pytest.raises(SystemExit, match=r"--num-envs must be at least 1\s(?s:.*)error: exit status 1: python ppo_"):
        learning.train("python ppo_torch_ddp.py --num-envs 0", seed=3, workers=1)


def test_a_sigterm_leaves_no_run_behind(tmp_path):
    """Command.finish asserts it."""
    words = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2", str(ROOT / "ppo_torch_ddp.py")]
    lines = ["import common", "common.end_children_with_us()", f"common.run({words}, {str(tmp_path)!r})"]
    program = Command([sys.executable, "-c", "\n".join(lines)], tmp_path, PYTHONPATH=str(ROOT / "benchmarks"))
    deadline = time.monotonic() + 60
    while not list(tmp_path.rglob("events.*")):
        assert time.monotonic() < deadline and program.is_running()
        time.sleep(0.1)
    os.kill(program.pid, signal.SIGTERM)
    status, output = program.finish()
    assert status == 1 and output.endswith("error: terminated\n")


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


STEPS = "import itertools, time\nfor i in itertools.count():\n    print('step', i, flush=True)\n    time.sleep(0.01)\n"


@pytest.mark.parametrize("end, failed", [("", False), ("raise ValueError('of mine')", True)])
def test_a_race_ends_with_the_first_but_not_with_a_crash(end, failed):
    first = STEPS.replace("itertools.count()", "range(60)") + end
    commands = {"first": [sys.executable, "-c", first], "other": [sys.executable, "-c", STEPS]}
    if failed:
        with pytest.raises(SystemExit, match="of mine"):
            throughput.race(commands, turn=0.1)
    else:
        speeds, _ = throughput.race(commands, turn=0.1)
        assert all(20 < speed < 200 for speed in speeds.values())


ONE = pytest.param(1, "torch, 1 process", marks=pytest.mark.slow)


@pytest.mark.parametrize("ranks, contender", [ONE, (2, "torch, 2 ranks, TCP")])
def test_a_race_of_a_changed_file_with_the_shipped_one(tmp_path, monkeypatch, capsys, ranks, contender):
    """One that sleeps in each iteration is slower, whatever its name."""
    sizes = "--num-envs 4 --num-steps 128 --update-epochs 1 --per-rank-batch-size 128 --total-timesteps 16384"
    monkeypatch.setitem(throughput.WORKLOADS, "cartpole", (sizes, [], "", 0.3))
    monkeypatch.setattr(throughput, "RESULTS", tmp_path)  # nothing is to be written there
    source = (ROOT / "ppo_torch_ddp.py").read_text()
    first = '    resets = rollout["resets"]\n    rewards'
    assert first in source
    mine = tmp_path / "mine.py"
    mine.write_text(source.replace(first, f"    time.sleep(0.1 * args.keep_checkpoints)\n{first}", 1))
    throughput.main(throughput.Args(repeats=1, file=str(mine), ranks=ranks, file_flags="--keep-checkpoints 1"))
    table = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split(" | ")[0] for row in table] == [f"| {contender}", f"| {mine}"]
    assert [0.02 < float(row.split(" | ")[2].split()[0]) < 0.7 for row in table] == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
