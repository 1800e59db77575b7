"""Start the shipped files in a folder of their own, with a time limit, leaving no process behind."""

import functools
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, NamedTuple

from fork_ranks import Job, RankServer

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BIN = Path(sys.executable).parent
IMPORTS = ["torch.utils.tensorboard", "torch._inductor.compile_fx", "gymnasium.envs.box2d", "lightning", "tyro", "tqdm"]


class Fork(NamedTuple):
    """In place of a launcher: ranks forked from a process that has imported everything, see fork_ranks.py."""

    launcher: str
    ranks: int
    options: tuple[str, ...] = ()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def torchrun(ranks: int) -> list:
    """The launcher's part of a command, replaced by a fork: torchrun, or plain Python for one rank."""
    return [Fork("torchrun" if ranks > 1 else "python", ranks)]


def fabric_run(ranks: int, *options: str) -> list:
    """The same for `fabric run`; plain Python for one rank without options."""
    return [Fork("fabric run" if ranks > 1 or options else "python", ranks, options)]


def real_torchrun(ranks: int) -> list:
    """The launcher itself, or plain Python for one rank."""
    return [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]


def real_fabric_run(ranks: int, *options: str) -> list:
    """The launcher itself on the CPU, or plain Python for one rank without options."""
    if ranks == 1 and not options:
        return [sys.executable]
    return [BIN / "fabric", "run", "--accelerator=cpu", f"--devices={ranks}", f"--main-port={free_port()}", *options]


@functools.cache
def rank_server() -> RankServer:
    return RankServer(IMPORTS)


class Command:
    """A running command, forked or not; `pid` is its launcher, or its process if it has none."""

    started: ClassVar[list["Command"]] = []  # conftest.py kills what a failing test has left

    def __init__(self, command: list, cwd: Path, **env: str):
        self.mark = f"TEST_COMMAND={uuid.uuid4()}"
        server = rank_server()  # first: it puts a mark of its own into the environment
        env = {"PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""} | env
        env = os.environ | env | dict([self.mark.split("=")])
        self.output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115, `kill` closes it
        first, *rest = command
        words = list(map(str, rest))
        if isinstance(first, Fork):
            options = [option.lstrip("-").split("=") for option in first.options]
            env |= {f"LT_{name.upper().replace('-', '_')}": value for name, value in options}
            self.job = server.start(first.launcher, first.ranks, words, str(cwd), env, self.output)
            self.pid = self.job.pids[0] if first.launcher == "python" else self.job.pid
        else:
            self.job = subprocess.Popen(
                [str(first), *words], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output
            )
            self.pid = self.job.pid
        Command.started.append(self)

    def pids(self) -> list[int]:
        """The processes of this command that are alive: of a fork's sessions, or with its mark."""
        sessions = {self.job.pid, *self.job.pids} if isinstance(self.job, Job) else set()
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if session(pid) in sessions or self.mark in environment(pid)]

    def rank_pid(self, rank: int) -> int:
        """The process of a rank, of which AsyncVectorEnv's are children."""
        if isinstance(self.job, Job):
            return self.job.pids[rank]
        return min(pid for pid in self.pids() if f"RANK={rank}" in environment(pid))

    def is_running(self) -> bool:
        try:
            self.job.wait(0.001)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self) -> None:
        """Kill what is alive of it."""
        for pid in self.pids():
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        self.job.wait()
        self.output.close()

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        """Exit status and output. Every process has to be gone when the command is; what is not is killed."""
        with suppress(subprocess.TimeoutExpired):
            self.job.wait(timeout)
        deadline = time.monotonic() + 5
        while (left := self.pids()) and not self.is_running() and time.monotonic() < deadline:
            time.sleep(0.02)
        self.output.seek(0)
        output = self.output.read()
        self.kill()
        assert not left, f"processes {left} were still there after {timeout} s:\n{output}"
        return self.job.returncode, output


def environment(pid: int) -> list[str]:
    """The `NAME=value` that a process was started with, none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def session(pid: int) -> int:
    """The session that a process is in, 0 for one that has ended."""
    try:
        state, _, _, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state == "Z" else int(session)


def run(command: list, cwd: Path, timeout: float = 120, **env: str) -> str:
    """The output of a command that must succeed."""
    status, output = Command(command, cwd, **env).finish(timeout)
    assert status == 0, output
    return output


def wait_for(found, timeout: float = 60):
    """What `found` finds, as soon as it does."""
    deadline = time.monotonic() + timeout
    while not (value := found()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value
    return value
