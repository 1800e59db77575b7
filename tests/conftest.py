import sys
from pathlib import Path

import pytest
import torch

# the files are scripts, not a package: what a test imports it takes from the repository's root and from here
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


@pytest.fixture(autouse=True)
def seeded():
    """The same draws in every run of the tests: one that fails, fails again."""
    torch.manual_seed(0)
