import ctypes
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# the files are scripts, not a package: what a test imports it takes from the repository's root and from here
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from launch import Command  # noqa: E402

# what the tests start has the signals of a terminal, also where a shell runs the tests in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
if "PYTEST_XDIST_WORKER" in os.environ:  # it ends with the session, however that ends; 1 is PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run of the tests: one that fails, fails again."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def reaped():
    """A test that fails before it has waited for all its commands leaves no process behind."""
    yield
    for command in Command.started:
        command.kill()
    Command.started.clear()
