"""Start the ranks of a script in milliseconds: fork them from a process that has imported everything once.

A fresh Python spends seconds on importing torch, Gymnasium and Lightning, in every rank of every run. `RankServer` pays
for that once. A rank that it forks finds what it would find under the launcher: environment variables, `sys.argv`,
`sys.path`, working directory, a session of its own, default signal handlers, no threads. To test a script of your own,
copy this file:

    server = RankServer(["torch", "lightning"])
    with open("output", "w") as output:
        job = server.start("torchrun", 2, ["train.py", "--seed", "1"], ".", dict(os.environ), output)
    status = job.wait(timeout=60)

If a rank fails, the others get SIGTERM, 30 seconds later SIGKILL, and the output ends with torchrun's report. Restarts
and several machines are for the real launchers. When the process that made the server ends, however it ends, the server
kills what was started and leaves.
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TextIO

MARK = "RANK_SERVER"  # environment variable by which the server knows what was started
# what torchrun sets, and what `fabric run` adds or sets to something else
ELASTIC = """
RANK={rank} LOCAL_RANK={rank} ROLE_RANK={rank} GROUP_RANK=0 ROLE_NAME=default OMP_NUM_THREADS=1
WORLD_SIZE={ranks} LOCAL_WORLD_SIZE={ranks} ROLE_WORLD_SIZE={ranks} GROUP_WORLD_SIZE=1
MASTER_ADDR=localhost MASTER_PORT={port} TORCHELASTIC_USE_AGENT_STORE=True TORCH_NCCL_ASYNC_ERROR_HANDLING=1
TORCHELASTIC_RUN_ID=forked TORCHELASTIC_RESTART_COUNT=0 TORCHELASTIC_MAX_RESTARTS=0
TORCHELASTIC_ERROR_FILE={error_file} TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT
"""
FABRIC = """
LT_CLI_USED=1 LT_ACCELERATOR=cpu LT_DEVICES={ranks} LT_NUM_NODES=1
MASTER_ADDR=127.0.0.1 TORCHELASTIC_RUN_ID=none OMP_NUM_THREADS={threads}
"""


class Job:
    """A running script: `pid` of its launcher and `pids` of its ranks, each the leader of a session."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.pid, self.pids = json.loads(connection.recv(10_000))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, negative for a signal; raises what `subprocess.Popen.wait` raises."""
        if self.returncode is None:
            self.connection.settimeout(timeout)
            try:
                self.returncode = int(self.connection.recv(10) or -signal.SIGKILL)  # a killed launcher sends nothing
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("a forked job", timeout) from error
        return self.returncode


class RankServer:
    """A process that has imported `modules` and forks ranks; it ends with the process that made it."""

    def __init__(self, modules: list[str]):
        os.environ[MARK] = str(uuid.uuid4())  # what the caller starts by itself is killed too
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-u", __file__, str(theirs.fileno()), *modules]
        env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # numpy's, which would start threads
        subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        theirs.close()

    def start(self, launcher: str, ranks: int, argv: list[str], cwd: str, env: dict[str, str], output: TextIO) -> Job:
        """Run a script and its arguments as `launcher` would: "python" (one rank), "torchrun" or "fabric run".

        The launcher itself gets `env`; both streams of all ranks go to the file `output`.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([launcher, ranks, argv, cwd, env]).encode()
        socket.send_fds(self.socket, [request], [output.fileno(), theirs.fileno()])
        theirs.close()
        return Job(ours)


def serve(control: socket.socket, imported: dict[str, str]) -> tuple[list[str], str, dict[str, str]]:
    """Fork a launcher for each request until the caller has ended.

    Returns in the ranks alone: arguments, working directory and environment.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # launchers are not waited for
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1_000_000, 2)
        if not request:
            kill_marked(f"{MARK}={os.environ[MARK]}")
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            launcher, ranks, argv, cwd, env = json.loads(request)
            env |= imported if launcher == "fabric run" else {}
            return argv, cwd, env | launch(launcher, ranks, argv[0], *fds)
        for fd in fds:
            os.close(fd)


def kill_marked(mark: str) -> None:
    """Kill all other processes that were started with this `NAME=value` in their environment."""
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            if int(path.name) != os.getpid() and mark in (path / "environ").read_text(errors="replace").split("\0"):
                os.kill(int(path.name), signal.SIGKILL)


def launch(launcher: str, ranks: int, script: str, output: int, reply: int) -> dict[str, str]:
    """Fork the ranks and wait for them; returns in the ranks alone, what the launcher adds to their environment."""
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    folder = tempfile.mkdtemp()
    listener = socket.create_server(("localhost", 0))  # as under torchrun, the launcher holds the store of the ranks
    port = listener.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(reply)
            listener.close()
            return launcher_variables(launcher, rank, ranks, port, f"{folder}/{rank}")
        pids.append(pid)
    connection = socket.socket(fileno=reply)
    connection.send(json.dumps([os.getpid(), pids]).encode())
    store = TCPStore("localhost", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    failures = {}
    running = set(pids)
    signal.signal(signal.SIGALRM, lambda *_: [os.kill(pid, signal.SIGKILL) for pid in running])
    while running:
        pid, status = os.wait()
        running.remove(pid)
        status = os.waitstatus_to_exitcode(status)
        if status and not failures:
            rank = pids.index(pid)
            failures[rank] = ProcessFailure(rank, pid, status, f"{folder}/{rank}")
            signal.alarm(30)
            for other in running:
                os.kill(other, signal.SIGTERM)
    if failures and launcher != "python":
        print(ChildFailedError(script, failures), file=sys.stderr)
        status = 1
    shutil.rmtree(folder)
    connection.send(str(status).encode())
    del store
    os._exit(0)


def launcher_variables(launcher: str, rank: int, ranks: int, port: int, error_file: str) -> dict[str, str]:
    """What a launcher on one machine adds to the environment of a rank."""
    if launcher == "python":
        return {}
    text = ELASTIC.format(rank=rank, ranks=ranks, port=port, error_file=error_file)
    if launcher == "fabric run":
        text += FABRIC.format(ranks=ranks, threads=len(os.sched_getaffinity(0)))
    return dict(pair.split("=") for pair in text.split())


if __name__ == "__main__":
    environ = dict(os.environ)
    for module in sys.argv[2:]:
        importlib.import_module(module)
    import numpy as np
    from torch.distributed import TCPStore
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("error: an imported module has started a thread, which a fork would not have")
    imported = {name: value for name, value in os.environ.items() if "TORCH" in name and name not in environ}
    gc.freeze()  # a collection would write to, and so copy, what the ranks share with the server
    sys.argv, cwd, env = serve(socket.socket(fileno=int(sys.argv[1])), imported)

    # what follows runs in the ranks
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    np.random.seed()  # from the system, as at a start
    script = os.path.abspath(sys.argv[0])
    folders = [os.path.dirname(script), *filter(None, env.get("PYTHONPATH", "").split(":"))]
    sys.path[:] = [*folders, *sys.path[1:]]
    runpy.run_path(script, run_name="__main__")
