"""Repeating yourself is the policy of the shipped files; this checks that what they repeat is the same.

    python tests/twins.py          # say what differs, exit 1 if anything does
    python tests/twins.py --fix    # copy what differs from ppo_torch_ddp.py, write the tables of diff and flags

A definition is a top-level function, class or name, but for `Args` each of its members with its help string. One that
two files share has to be byte-identical and in the same order, or be listed in MAY_DIFFER with the reason.
"""

import ast
import difflib
import html
import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = "ppo_torch_ddp.py"
FABRIC = "ppo_fabric.py"
DECOUPLED = "ppo_fabric_decoupled.py"
TWINS = (FABRIC, DECOUPLED)
MAY_DIFFER = {
    FABRIC: {
        "make_train_step": "Fabric runs the backward pass",
        "main": "Fabric sets up processes, device and model, and moves what ranks exchange",
    },
    DECOUPLED: {
        "gather_rows": "only the trainers exchange rows",
        "main": "sets up players and trainers, and leaves the training to them",
    },
}

# what each hunk of the diff between the coupled files is about, in order
HUNKS = (
    "launching",
    "imports of Fabric",
    "imports of torch.distributed",
    "and of DDP, which Fabric chooses",
    "the launcher's flag chooses the device",
    "what trains the model",
    "backward pass, in the launcher's precision",
    "sums over the ranks, rank 0's values, all ranks' rows",
    "processes, device, process group",
    "where rank 0 logs",
    "one object for all of these",
    "summing over the ranks",
    "the model, wrapped for training",
    "the train step",
    "sharing rollouts",
    "update, with DDP's exchange of gradients or without",
    "leaving",
    "closing the process group",
)
# the pages of the tables, and what these stand between
PAGES = {"diff": ROOT / "docs" / "fabric.md", "flags": ROOT / "docs" / "reference.md"}
TABLE = "<!-- {0}, written by tests/twins.py --fix -->\n{1}<!-- end of {0} -->"


def definitions(source: str) -> dict[str, tuple[int, int]]:
    """First and last line (from 0, the last exclusive) of each definition, in the order of the file."""
    slices = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Args":
            for member in node.body:  # a field's help is the comment on its line
                name = member.target.id if isinstance(member, ast.AnnAssign) else member.name
                slices[f"Args.{name}"] = (member.lineno - 1, member.end_lineno)
        elif isinstance(node, ast.Assign):
            slices[ast.unparse(node.targets[0])] = (node.lineno - 1, node.end_lineno)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            slices[node.name] = (first - 1, node.end_lineno)
    return slices


def differences(source: str, twin: str, name_of_twin: str) -> list[str]:
    """The names of shared definitions that should be the same and are not, or `order`."""
    ours, theirs = definitions(source), definitions(twin)
    shared = [name for name in ours if name in theirs]
    lines = source.splitlines(), twin.splitlines()
    found = [
        name
        for name in shared
        if name not in MAY_DIFFER[name_of_twin] and lines[0][slice(*ours[name])] != lines[1][slice(*theirs[name])]
    ]
    return found + (["order"] if shared != [name for name in theirs if name in ours] else [])


def fix(source: str, twin: str, name_of_twin: str) -> str:
    """The twin with the source's text of every definition that should be the same."""
    ours, lines = definitions(source), twin.splitlines()
    wrong = differences(source, twin, name_of_twin)
    for name, (first, last) in reversed(list(definitions(twin).items())):
        if name in wrong:
            lines[first:last] = source.splitlines()[slice(*ours[name])]
    return "\n".join(lines) + "\n"


def diff_hunks(source: str, twin: str) -> list[tuple[str, str]]:
    """The text on both sides of each place where two files differ."""
    ours, theirs = source.splitlines(), twin.splitlines()
    opcodes = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes()
    return [("\n".join(ours[i:j]), "\n".join(theirs[k:m])) for tag, i, j, k, m in opcodes if tag != "equal"]


def diff_table(source: str, twin: str) -> str:
    """The hunks of the diff side by side, in HTML since Markdown's tables hold no code of several lines."""
    rows = [f"<tr><th></th><th>{SOURCE}</th><th>{FABRIC}</th></tr>"]
    for title, sides in zip(HUNKS, diff_hunks(source, twin), strict=True):
        cells = [f"<td><pre>{html.escape(textwrap.dedent(side), quote=False)}</pre></td>" for side in sides]
        rows.append(f"<tr><td>{title}</td>{''.join(cells)}</tr>")
    return "<table>\n" + "\n".join(rows) + "\n</table>\n"


def flags_table(sources: dict[str, str]) -> str:
    """All flags of the files, from the lines of `Args`: group, choices, default, first help, the files that have it."""
    found = {}
    for file, source in sources.items():
        group = ""
        for line in source.partition("class Args:\n")[2].partition("\n    def ")[0].splitlines():
            if heading := re.fullmatch("    # (.*)", line):
                group = heading[1]
            elif field := re.fullmatch(r"    (\w+): (.+?) = (.*?)  # (.*)", line):
                name, kind, default, text = field.groups()
                choices = " {" + ",".join(re.findall(r'"(\w+)"', kind)) + "}" if "Literal" in kind else ""
                flag = f"--{name.replace('_', '-')}{choices}"
                default = {"False": "off", "True": "on", '""': ""}.get(default, default.strip('"'))
                found.setdefault((group, flag, default), (text, []))[1].append(file)
    lines = ["| flag | default | |", "| --- | --- | --- |"]
    for group in dict.fromkeys(group for group, *_ in found):
        lines.append(f"| *{group}* | | |")
        for (of, flag, default), (text, files) in found.items():
            if of == group:
                only = "" if len(files) == len(sources) else f" ({', '.join(f'`{file}`' for file in files)})"
                lines.append(f"| `{flag}` | {f'`{default}`' if default else ''} | {text}{only} |")
    return "\n".join(lines) + "\n"


def with_table(title: str) -> str:
    """The page of a table as it should be."""
    sources = {name: (ROOT / name).read_text() for name in (SOURCE, *TWINS)}
    table = diff_table(sources[SOURCE], sources[FABRIC]) if title == "diff" else flags_table(sources)
    start, end = TABLE.format(title, "\0").split("\0")
    before, _, rest = PAGES[title].read_text().partition(start)
    return before + start + table + end + rest.partition(end)[2]


def main() -> None:
    source = (ROOT / SOURCE).read_text()
    wrong = False
    for name in TWINS:
        path = ROOT / name
        if "--fix" in sys.argv and differences(source, path.read_text(), name):
            path.write_text(fix(source, path.read_text(), name))
        found = differences(source, path.read_text(), name)
        wrong |= bool(found)
        print(f"{name}: {'differs from ' + SOURCE + ' in ' + ', '.join(found) if found else 'a twin'}")
    for title, page in PAGES.items():
        expected = with_table(title)
        if "--fix" in sys.argv:
            page.write_text(expected)
        elif page.read_text() != expected:
            print(f"{page.name}: the table is out of date")
            wrong = True
    sys.exit(wrong)


if __name__ == "__main__":
    main()
