"""What README and the pages of docs/ tell people to do works."""

import importlib
import math
import os
import re
import shlex
import shutil
import sys

import pytest
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch import BIN, ROOT, Command, free_port, run, torchrun
from test_launch import scalars
from twins import SOURCE, TWINS

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "".join(PAGES.values())
COMMANDS = [
    line.rpartition("&& ")[2]
    for block in re.findall(r"```bash\n((?:.*\n)*?)```", TEXT)
    for line in block.splitlines()
    if re.search(r"(python|torchrun|fabric run) .*ppo_\w+\.py", line) and not line.startswith("srun")
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
    lines = re.findall(r"^step \d+ of 99328: return [\d.]+, \d+ steps/s, learning_rate \S+$", output, re.MULTILINE)
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
INLINE = re.findall(r"`((?:python|torchrun|fabric run) [^`\n]*ppo_\w+\.py[^`\n]*)`", TEXT)


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
    _, _, table = TEXT.partition("## Metrics")
    table, _, _ = table.partition("## Flags")
    explained = set(re.findall(r"`(\w+/\w+)`", table))
    tags = {file: set(re.findall(TAG, (ROOT / file).read_text())) for file in (SOURCE, *TWINS)}
    for file in (SOURCE, *TWINS):
        source = (ROOT / file).read_text()
        losses = re.findall(r'"(\w+)": ', source.partition("    metrics = {\n")[2].partition("    }\n")[0])
        losses += re.findall(r'metrics \| \{"(?!stop")(\w+)"', source)
        ((times,),) = {tuple(re.findall(r"dict\(zip\(\((.*?)\), np.diff\(times\)", source))}
        tags[file] |= {f"Info/{name}" for name in re.findall(r'"name": "(learning_rate)"', source)}
        tags[file] |= {f"Loss/{name}" for name in losses} | {f"Time/{name}" for name in re.findall(r"\w+", times)}
        assert {"Loss/policy_loss", "Loss/clip_fraction", "Loss/grad_norm", "Time/communication"} <= tags[file]
    assert set.union(*tags.values()) == explained


def test_the_tables_are_those_of_the_rows(tmp_path):
    run([sys.executable, ROOT / "benchmarks" / "plot.py", "--check"], cwd=tmp_path)


def test_readme_is_a_page_and_every_link_resolves():
    assert len(README.splitlines()) <= 220
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)]+)\)", text):
            if not link.startswith("http"):
                file, _, heading = link.partition("#")
                assert (page.parent / file).exists() if file else heading, f"{page.name}: {link}"


def test_the_five_lines_of_a_program_of_ones_own_work(tmp_path):
    """With a run's checkpoint in place of RUN."""
    (program,) = re.findall(r"```python\n((?:.*\n)*?)```", (ROOT / "docs" / "hacking.md").read_text())
    run([*torchrun(1), ROOT / "ppo_torch_ddp.py", *SHORT], cwd=tmp_path)
    (path,) = tmp_path.rglob("step-*.pt")
    (tmp_path / "program.py").write_text(re.sub('path = ".*"', f'path = "{path}"', program) + "print(action)\n")
    output = run([sys.executable, "program.py"], cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert output.strip() in ("0", "1")
