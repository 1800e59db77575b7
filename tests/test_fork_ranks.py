"""Forked ranks are what the real launchers start, and nothing outlives the session that started it."""

import json
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest

from launch import Command, environment, fabric_run, real_fabric_run, real_torchrun, torchrun, wait_for

SNAPSHOT = """
import json, multiprocessing, os, signal, sys, threading
unset = [s for s in signal.valid_signals() if signal.getsignal(s) in (signal.SIG_DFL, signal.SIG_IGN)]
snapshot = {
    "environment": dict(os.environ),
    "arguments": [os.path.abspath(sys.argv[0]), *sys.argv[1:]],  # runpy makes it absolute
    "folder": os.getcwd(),
    "path": sys.path,
    "main": [__name__, __file__, sys.modules["__main__"].__dict__ is globals()],
    "signals": {s: str(signal.getsignal(s)) for s in signal.valid_signals()},
    "blocked": list(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    "files": sorted(os.listdir("/proc/self/fd")),
    "terminals": [stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)],
    "buffered": [sys.stdout.line_buffering, sys.stdout.write_through],
    "input": sys.stdin.read(),
    "threads": len(os.listdir("/proc/self/task")),
    "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "is a child": multiprocessing.parent_process() is not None or multiprocessing.current_process().daemon,
    "priority": [os.nice(0), os.umask(0o022)],
}
with open(f"{sys.argv[1]}-{os.environ.get('RANK', 0)}.json", "w") as file:
    json.dump(snapshot, file)
"""
# of each run its own: ports, names, the test's mark, and files for errors, of which a rank has one
OWN = {"MASTER_PORT", "TORCHELASTIC_RUN_ID", "TEST_COMMAND", "TORCHELASTIC_ERROR_FILE"}
LAUNCHERS = {
    "python": (torchrun(1), [sys.executable]),
    "torchrun": (torchrun(2), real_torchrun(2)),
    "fabric run": (fabric_run(2), real_fabric_run(2)),
    "fabric run with options": (
        fabric_run(1, "--strategy=ddp", "--precision=bf16-mixed"),
        real_fabric_run(1, "--strategy=ddp", "--precision=bf16-mixed"),
    ),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_forked_rank_finds_what_it_would_under_the_launcher(tmp_path, launcher):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "script.py").write_text(SNAPSHOT)
    forked, real = LAUNCHERS[launcher]
    commands = [
        Command([*start, "folder/script.py", name], cwd=tmp_path)
        for start, name in ((forked, "forked"), (real, "real"))
    ]
    for command in commands:
        status, output = command.finish()
        assert status == 0, output
    paths = sorted(tmp_path.glob("real-*.json"))
    ranks = 2 if launcher in ("torchrun", "fabric run") else 1
    assert len(paths) == len(list(tmp_path.glob("forked-*.json"))) == ranks
    for path in paths:
        real, forked = (json.loads((tmp_path / path.name.replace("real", n)).read_text()) for n in ("real", "forked"))
        for snapshot in (real, forked):
            own = {name: snapshot["environment"].pop(name, None) for name in OWN}
            assert snapshot["arguments"].pop() in ("real", "forked")
            if launcher != "python":
                assert int(own["MASTER_PORT"]) > 1023 and Path(own["TORCHELASTIC_ERROR_FILE"]).is_absolute()
        if launcher == "python":  # started by pytest, where launchers start a session
            assert real.pop("leads") == [False, False] and forked.pop("leads") == [True, True]
        environments = forked.pop("environment"), real.pop("environment")
        assert environments[0].items() ^ environments[1].items() == set()
        assert forked == real


FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    raise SystemExit("error: of rank 1")
def stop(*_):
    print("rank 0 was asked to stop", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
time.sleep(60)
"""


def test_a_rank_that_fails_ends_the_others(tmp_path):
    (tmp_path / "script.py").write_text(FAILS)
    status, output = Command([*torchrun(2), "script.py"], cwd=tmp_path).finish(20)
    assert status == 1
    assert output.index("error: of rank 1") < output.index("rank 0 was asked to stop") < output.index("Root Cause")
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : 1" in output


@pytest.mark.parametrize("code, status", [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", -9)])
def test_the_exit_status_without_a_launcher_is_that_of_the_script(tmp_path, code, status):
    (tmp_path / "script.py").write_text(code)
    assert Command([*torchrun(1), "script.py"], cwd=tmp_path).finish(20)[0] == status


SESSION = """
import time

import launch
from launch import Command, real_torchrun, torchrun

launch.IMPORTS.clear()  # a quick start

def test_that_hangs(tmp_path):
    (tmp_path / "script.py").write_text(
        "import multiprocessing, os, pathlib, time\\n"
        "multiprocessing.Process(target=time.sleep, args=(600,)).start()\\n"
        "pathlib.Path(os.environ['RANK'] + os.environ['NAME']).touch()\\n"
        "time.sleep(600)"
    )
    Command([*torchrun(2), "script.py"], cwd=tmp_path, NAME="forked")
    Command([*real_torchrun(2), "script.py"], cwd=tmp_path, NAME="real")
    while len([path for path in tmp_path.iterdir() if path.name[0] in "01"]) < 4:
        time.sleep(0.1)
    open("started", "w").close()
    FAIL
    time.sleep(600)
"""


@pytest.mark.parametrize("end", [None, signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_test_session(tmp_path, end):
    """One that fails, or is ended by a signal: of forked ranks, the real launcher's, and their children."""
    (tmp_path / "test_session.py").write_text(SESSION.replace("FAIL", "" if end else "raise ValueError"))
    mark = f"TEST_SESSION={uuid.uuid4()}"
    pytest_ = [sys.executable, "-m", "pytest", "-n1", "-p", "conftest", "-p", "no:cacheprovider", "test_session.py"]
    command = Command(pytest_, cwd=tmp_path, **dict([mark.split("=")]))

    def left() -> list[int]:
        return [int(path.name) for path in Path("/proc").glob("[0-9]*") if mark in environment(int(path.name))]

    wait_for((tmp_path / "started").exists)
    if end:
        assert len(left()) >= 2 + 2 * 5  # pytest and the server; twice a launcher, two ranks, and a child of each
        os.kill(command.pid, end)
    status, output = command.finish(20)
    assert status == (1 if end is None else 2 if end == signal.SIGINT else -end), output
    wait_for(lambda: not left(), timeout=5)
