"""What the shipped files repeat is the same, and the diff of the coupled ones stays a lesson."""

import dataclasses
import importlib
import re
import subprocess

import pytest

from launch import ROOT
from twins import (
    DECOUPLED,
    FABRIC,
    MAY_DIFFER,
    PAGES,
    SOURCE,
    TWINS,
    definitions,
    differences,
    fix,
    flags_table,
    with_table,
)

TEXT = (ROOT / SOURCE).read_text()


@pytest.mark.parametrize("name", TWINS)
def test_shared_definitions_are_identical(name):
    twin = (ROOT / name).read_text()
    assert differences(TEXT, twin, name) == []
    shared = set(definitions(TEXT)) & set(definitions(twin))
    assert {"Agent", "collect_rollout", "compute_gae", "ppo_loss", "evaluate", "Args.seed"} <= shared
    assert set(MAY_DIFFER[name]) <= shared


@pytest.mark.parametrize(
    "old, new, found",
    [
        ("reversed(range(len(deltas)))", "range(len(deltas))", "compute_gae"),
        ("gamma: float = 0.99", "gamma: float = 0.98", "Args.gamma"),
        ("# discount factor", "# discount", "Args.gamma"),
        ("seed: int = 1", "seed: float = 1", "Args.seed"),
        ("@torch.no_grad()\ndef predict", "def predict", "predict"),
        ("CHUNK = 1024", "CHUNK = 2048", "CHUNK"),
    ],
)
def test_a_planted_difference_is_found_and_fixed(old, new, found):
    assert old in TEXT
    planted = TEXT.replace(old, new)
    for name in TWINS:
        assert differences(TEXT, planted, name) == [found]
        assert fix(TEXT, planted, name) == TEXT


def test_a_planted_reordering_is_found():
    first, last = definitions(TEXT)["ppo_loss"]
    lines = TEXT.splitlines(keepends=True)
    reordered = "".join(lines[:first] + lines[last:] + ["\n\n"] + lines[first:last])
    assert differences(TEXT, reordered, DECOUPLED) == ["order"]


def test_the_diff_of_the_coupled_files_stays_short():
    output = subprocess.run(["diff", SOURCE, FABRIC], cwd=ROOT, text=True, stdout=subprocess.PIPE).stdout
    changed = [line for line in output.splitlines() if line[0] in "<>"]
    hunks = [line for line in output.splitlines() if line[0].isdigit()]
    assert len(hunks) <= 19 and 0 < len(changed) <= 90, (len(hunks), len(changed))


def test_the_pages_show_the_diff_and_the_flags():
    for title, page in PAGES.items():
        assert page.read_text() == with_table(title)
    assert "<pre>loss.backward()</pre></td><td><pre>fabric.backward(loss)</pre>" in PAGES["diff"].read_text()
    for name in (SOURCE, *TWINS):
        fields = [field.name for field in dataclasses.fields(importlib.import_module(name.removesuffix(".py")).Args)]
        table = flags_table({name: (ROOT / name).read_text()})
        assert re.findall(r"^\| `--([\w-]+)", table, re.MULTILINE) == [field.replace("_", "-") for field in fields]
