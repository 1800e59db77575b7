"""Ruff's rules, and sizes: what a reader of a shipped file pays."""

import ast
import subprocess
import sys

import pytest

from launch import ROOT
from twins import SOURCE, TWINS


def test_ruff():
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def substance(tree: ast.AST) -> int:
    """Nodes of a syntax tree, which folding code does not change."""
    return sum(not isinstance(node, ast.Load | ast.Store | ast.Del) for node in ast.walk(tree))


def length(function: ast.AST) -> int:
    return function.end_lineno - function.lineno + 1


@pytest.mark.parametrize("name", [SOURCE, *TWINS])
def test_a_file_is_no_longer_than_it_has_to_be(name):
    """Limits that only go down: the goals are 6,500 nodes and 950 lines."""
    text = (ROOT / name).read_text()
    tree = ast.parse(text)
    lines = len(text.splitlines())
    assert substance(tree) <= 6_945 and lines <= 1_080
    assert substance(tree) / lines <= 7.0
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    main = functions.pop("main")
    assert length(main) <= 120 and substance(main) <= 900
    assert max(map(length, functions.values())) <= 50
