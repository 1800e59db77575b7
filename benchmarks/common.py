"""What the benchmarks share: where things are, how a command is run, what a row says, and a run's TensorBoard data."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator, ScalarEvent

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BIN = Path(sys.executable).parent
PYTHON = [sys.executable]
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node=2"]


def end_children_with_us() -> None:
    """From now on a SIGTERM ends whatever this process has started too, launchers' ranks included."""

    def end(*_: object) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        raise SystemExit("error: terminated")

    signal.signal(signal.SIGTERM, end)


def run(command: list[str], folder: str | Path, **environ: str) -> None:
    """Run a command in a folder. Raises SystemExit, with all that it has printed, if it fails."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    result = subprocess.run(command, cwd=folder, env=os.environ | environ, **output)
    if result.returncode:
        raise SystemExit(f"{result.stdout}\nerror: exit status {result.returncode}: {as_written(command)}")


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines. Raises ValueError with the line that is none, as a full disk may leave it."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no row: {error}") from error
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write a file of rows anew, aside and renamed: it is whole at any time."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    new.replace(path)


def with_port(command: list[str]) -> list[str]:
    """The command line, `fabric run` on a free port if it names none: its default is the same for all."""
    if Path(command[0]).name != "fabric" or any(word.startswith("--main-port") for word in command):
        return command
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return [*command[:2], f"--main-port={server.getsockname()[1]}", *command[2:]]


def as_written(command: list[str]) -> str:
    """The command line for a shell in the repository's root, without this machine's paths."""
    return shlex.join(command).replace(f"{BIN}/", "").replace(f"{ROOT}/", "")


def scalars(folder: str | Path) -> dict[str, list[ScalarEvent]]:
    """All points of the one run below a folder, by tag."""
    (events,) = {str(path.parent) for path in Path(folder).rglob("events.*")}
    accumulator = EventAccumulator(events, size_guidance={"scalars": 0}).Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def source_hash(file: str | Path) -> str:
    """Of a file, by its path or its name in the repository's root."""
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def surroundings(*packages: str) -> dict[str, object]:
    """The versions of those packages that are installed, of Python, and the processor."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # an extra one
            versions[package] = importlib.metadata.version(package)
    return {"versions": versions, "python": platform.python_version(), "cpu": cpu_model()}


def cpu_model() -> str:
    """The processor's name, which platform.processor() leaves empty on Linux, and the number of its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
