"""What the README tells people to do works."""

import importlib
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import BIN, ROOT, Command, free_port, run, torchrun
from test_launch import scalars
from twins import SOURCE, TWINS

README = (ROOT / "README.md").read_text()
HACKS = README.partition("## How to hack it\n")[2].partition("\n## ")[0]
CHANGES = re.findall(r"### (.*)\n(?:.*\n)*?```diff\n((?:.*\n)*?)```\n(?:.*\n)*?```bash\n(.*)\n```\n", HACKS)
COMMANDS = [
    line.rpartition("&& ")[2]
    for block in re.findall(r"```bash\n((?:.*\n)*?)```", README.replace(HACKS, ""))
    for line in block.splitlines()
    if re.search(r"(python|torchrun|fabric run) .*ppo_\w+\.py", line)
]
# for a run of seconds in place of a minute
SHORT = ["--total-timesteps", "4096", "--eval-episodes", "2"]


def test_a_trained_agent_in_two_minutes(tmp_path):
    """The first commands, as they are written."""
    shutil.copy(ROOT / "ppo_torch_ddp.py", tmp_path)
    train, evaluate = COMMANDS[:2]
    path = f"{BIN}:{os.environ['PATH']}"
    output = run(["bash", "-c", train], cwd=tmp_path, timeout=240, PATH=path)
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] >= 475, output
    lines = re.findall(r"^step \d+ of 99328: return [\d.]+, \d+ steps/s$", output, re.MULTILINE)
    assert len(lines) == math.ceil(97 / 5)  # of 97 iterations every fifth, so that it is about twenty lines
    (events,) = {path.parent for path in tmp_path.rglob("events.*")}
    log = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    assert "hyperparameters/text_summary" in log.Tags()["tensors"]
    names = ("Time/rollout", "Time/communication", "Time/update")
    for *parts, speed in zip(*map(log.Scalars, (*names, "Time/step_per_second")), strict=True):
        assert 0.8 * 1024 < sum(part.value for part in parts) * speed.value <= 1024.5  # less its reset rows
    (trained,) = re.findall("greedy return .*", output)
    output = run(["bash", "-c", evaluate], cwd=tmp_path, PATH=path)
    assert trained in output and list(tmp_path.rglob("step-*-videos/*.mp4"))


TAG = r'"((?:Rewards|Game|Test|Loss|Info|Time)/\w+)"'
INLINE = re.findall(r"`((?:python|torchrun|fabric run) [^`\n]*ppo_\w+\.py[^`\n]*)`", README)


def test_there_are_commands():
    assert len(COMMANDS) > 20 and len(INLINE) > 15


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *INLINE]))
def test_the_flags_of_a_command_are_known(command):
    (file,) = [part for part in shlex.split(command) if part.endswith(".py")]
    flags = shlex.split(command.partition(file)[2])
    tyro.cli(importlib.import_module(file.removesuffix(".py")).Args, args=flags)


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS[2:] if not re.search("HOST|--cuda|--evaluate", c)])
def test_a_command_runs(tmp_path, command):
    for file in ROOT.glob("ppo_*.py"):
        shutil.copy(file, tmp_path)
    command = command.replace("fabric run ", f"fabric run --main-port={free_port()} ")
    output = run(["bash", "-c", f"{command} {' '.join(SHORT)}"], cwd=tmp_path, PATH=f"{BIN}:{os.environ['PATH']}")
    assert "greedy return" in output


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if "HOST" in command])
def test_two_machines(tmp_path, command):
    """The commands of both, on this one."""
    port, machines = free_port(), []
    for rank in "01":
        folder = tmp_path / rank
        folder.mkdir()
        for file in ROOT.glob("ppo_*.py"):
            shutil.copy(file, folder)
        line = command.replace("HOST:29500", f"localhost:{port}").replace("--node-rank=0", f"--node-rank={rank}")
        line = line.replace("--main-address=HOST", f"--main-address=localhost --main-port={port}")
        command_line = ["bash", "-c", f"{line} {' '.join(SHORT)}"]
        machines.append(Command(command_line, cwd=folder, PATH=f"{BIN}:{os.environ['PATH']}"))
    results = [machine.finish() for machine in machines]
    assert [status for status, _ in results] == [0, 0] and "greedy return" in results[0][1] + results[1][1], results


def test_every_metric_is_explained():
    _, _, table = README.partition("## Metrics")
    table, _, _ = table.partition("## Flags")
    explained = set(re.findall(r"`(\w+/\w+)`", table))
    tags = {file: set(re.findall(TAG, (ROOT / file).read_text())) for file in (SOURCE, *TWINS)}
    for file in (SOURCE, *TWINS):
        source = (ROOT / file).read_text()
        losses = re.findall(r'"(\w+)": ', source.partition("    metrics = {\n")[2].partition("    }\n")[0])
        losses += re.findall(r'metrics \| \{"(\w+)"', source)
        ((times,),) = {tuple(re.findall(r"dict\(zip\(\((.*?)\), np.diff\(times\)", source))}
        tags[file] |= {f"Loss/{name}" for name in losses} | {f"Time/{name}" for name in re.findall(r"\w+", times)}
        assert {"Loss/policy_loss", "Loss/clip_fraction", "Loss/grad_norm", "Time/communication"} <= tags[file]
    assert set.union(*tags.values()) == explained


def test_the_tables_are_those_of_the_rows(tmp_path):
    run([sys.executable, ROOT / "benchmarks" / "plot.py", "--check"], cwd=tmp_path)


def apply(diff, folder):
    # inside a checkout, git would take the patch for one of the checkout's own files, and pass it over
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    subprocess.run(["git", "apply", "-p0"], input=diff, text=True, cwd=folder, env=env, check=True)


def test_there_are_five_changes():
    assert len(CHANGES) == HACKS.count("```diff") == 5


def last_checkpoint(folder):
    return torch.load(max(folder.rglob("step-*.pt")))


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """The checkpoint of the file as it is."""
    folder = tmp_path_factory.mktemp("unchanged")
    run([*torchrun(1), ROOT / "ppo_torch_ddp.py", *SHORT], cwd=folder)
    return last_checkpoint(folder)


# of the checkpoint of a changed file and that of the file as it is: whether the change did what it is for
EFFECTS = {
    "Another network": lambda new, old: len(new["agent"]) == len(old["agent"]) + 8,  # of four LayerNorms
    "Another environment": lambda new, old: new["args"]["env_id"] == "Corridor-v0",
    "A recurrent policy": lambda new, old: "memory.weight_ih" in new["agent"],
    "Another loss term": lambda new, old: not torch.equal(new["agent"]["actor.4.bias"], old["agent"]["actor.4.bias"]),
    "Another optimizer": lambda new, old: "momentum_buffer" in new["optimizer"]["state"][0],
}


@pytest.mark.parametrize("title, diff, command", CHANGES, ids=[title for title, *_ in CHANGES])
def test_a_change_of_the_torch_file_applies_and_works(tmp_path, unchanged, title, diff, command):
    (tmp_path / "ppo_torch_ddp.py").write_text((ROOT / "ppo_torch_ddp.py").read_text())
    apply(diff, tmp_path)
    output = run([*torchrun(1), *command.split()[1:], *SHORT], cwd=tmp_path)
    assert "greedy return" in output
    assert EFFECTS[title](last_checkpoint(tmp_path), unchanged)


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
    run([*torchrun(1), "ppo_torch_ddp.py", *flags], cwd=tmp_path, timeout=300, PYTHONPATH=str(tmp_path))
    assert scalars(tmp_path)["Test/cumulative_reward"][-1][1] < 0.8
    apply(diff, tmp_path)
    folder = tmp_path / "recurrent"
    folder.mkdir()
    command = [*torchrun(1), *command.replace("ppo_", "../ppo_").split()[1:], *flags]
    run(command, cwd=folder, timeout=600, PYTHONPATH=str(tmp_path))
    assert scalars(folder)["Test/cumulative_reward"][-1][1] > 0.95
