"""What the README tells people to do works."""

import os
import re
import subprocess
import sys

import pytest

from launch import ROOT, run
from test_launch import scalars

README = (ROOT / "README.md").read_text()
HACKS = README.partition("## How to hack it\n")[2].partition("\n## ")[0]
CHANGES = re.findall(r"### (.*)\n(?:.*\n)*?```diff\n((?:.*\n)*?)```\n(?:.*\n)*?```bash\n(.*)\n```\n", HACKS)
# for a run of seconds in place of a minute
SHORT = ["--total-timesteps", "4096", "--eval-episodes", "2"]


def apply(diff, folder):
    # inside a checkout, git would take the patch for one of the checkout's own files, and pass it over
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "-p0"], input=diff, text=True, cwd=folder, env=env, check=True)


def test_there_are_five_changes():
    assert len(CHANGES) == HACKS.count("```diff") == 5


@pytest.mark.parametrize("title, diff, command", CHANGES, ids=[title for title, *_ in CHANGES])
def test_a_change_of_the_torch_file_applies_and_runs(tmp_path, title, diff, command):
    source = (ROOT / "ppo_torch_ddp.py").read_text()
    (tmp_path / "ppo_torch_ddp.py").write_text(source)
    apply(diff, tmp_path)
    assert (tmp_path / "ppo_torch_ddp.py").read_text() != source
    output = run([sys.executable, *command.split()[1:], *SHORT], cwd=tmp_path)
    assert "greedy return" in output
    assert scalars(tmp_path)["Loss/policy_loss"]


MEMORY = """
import gymnasium as gym
import numpy as np


class Cue(gym.Env):
    '''The first observation says which action is paid at the end; those after it say only the time.'''

    def __init__(self):
        self.observation_space, self.action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.cue = 0, int(self.np_random.integers(2))
        return np.array([2 * self.cue - 1, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        over = self.time == 6
        return np.array([0, self.time / 6], np.float32), float(over and action == self.cue), over, False, {}


gym.register("Cue-v0", Cue)
"""


@pytest.mark.slow
def test_the_recurrent_policy_remembers(tmp_path):
    ((_, diff, command),) = [change for change in CHANGES if "recurrent" in change[0]]
    (tmp_path / "cue.py").write_text(MEMORY)
    (tmp_path / "ppo_torch_ddp.py").write_text((ROOT / "ppo_torch_ddp.py").read_text())
    flags = ["--env-id", "cue:Cue-v0", "--total-timesteps", "60000", "--eval-episodes", "100"]
    run([sys.executable, "ppo_torch_ddp.py", *flags], cwd=tmp_path, timeout=300, PYTHONPATH=str(tmp_path))
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] < 0.8
    apply(diff, tmp_path)
    folder = tmp_path / "recurrent"
    folder.mkdir()
    command = [sys.executable, *command.replace("ppo_", "../ppo_").split()[1:], *flags]
    run(command, cwd=folder, timeout=600, PYTHONPATH=str(tmp_path))
    assert scalars(folder)["Test/cumulative_reward"][-1][1] > 0.95
