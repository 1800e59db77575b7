"""Start the shipped files as a user would: in a folder of their own, with a time limit, leaving no process behind."""

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

TESTS = Path(__file__).parent
ROOT = TESTS.parent
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def torchrun(ranks: int) -> list:
    """The launcher's part of a command line: plain Python for one rank."""
    return [BIN / "torchrun", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else [sys.executable]


def fabric_run(ranks: int, *options: str) -> list:
    """The same on the CPU with Fabric's launcher; plain Python for one rank without options."""
    if ranks == 1 and not options:
        return [sys.executable]
    return [BIN / "fabric", "run", "--accelerator=cpu", f"--devices={ranks}", f"--main-port={free_port()}", *options]


class Command:
    """A running command whose descendants, in whatever session, are known by a mark in their environment."""

    started: ClassVar[list["Command"]] = []  # conftest.py kills what a failing test has left

    def __init__(self, command: list, cwd: Path, **env: str):
        self.mark = f"TEST_COMMAND={uuid.uuid4()}"
        env = {"PYTHONPATH": str(TESTS), "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""} | env
        env = os.environ | env | dict([self.mark.split("=")])
        self.process = subprocess.Popen(
            list(map(str, command)), cwd=cwd, env=env, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        Command.started.append(self)

    def pids(self) -> list[int]:
        """The processes of this command that are alive."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        return [pid for pid in pids if self.mark in environment(pid)]

    def rank_pid(self, rank: int) -> int:
        """The process of a rank, of which AsyncVectorEnv's are children."""
        pids = [pid for pid in self.pids() if f"RANK={rank}" in environment(pid)]
        return min(pids)

    def kill(self) -> None:
        """Kill what is alive of it."""
        for pid in self.pids():
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, timeout: float = 120) -> tuple[int, str]:
        """Exit status and output. Every process has to be gone when the command is; what is not is killed."""
        output = ""
        try:
            output, _ = self.process.communicate(timeout=timeout)
            deadline = time.monotonic() + 5
            while (left := self.pids()) and time.monotonic() < deadline:
                time.sleep(0.1)
        except subprocess.TimeoutExpired as error:
            output, left = (error.stdout or b"").decode(errors="replace"), self.pids()
        finally:
            self.kill()
        assert not left, f"processes {left} were still there after {timeout} s:\n{output}"
        return self.process.returncode, output


def environment(pid: int) -> list[str]:
    """The `NAME=value` of a process, none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return []


def run(command: list, cwd: Path, timeout: float = 120, **env: str) -> str:
    """The output of a command that must succeed."""
    status, output = Command(command, cwd, **env).finish(timeout)
    assert status == 0, output
    return output
