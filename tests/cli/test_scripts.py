"""Runs the scripts beside this file: what a person types, what must be printed, and which files may be there after.

A script runs in a folder of its own that holds a copy of `files/`. It is made of

    --- file NAME          and the text that the file gets, up to the next line that begins with `---` or `$`
    --- change NAME        and, for each line that is changed, `-old line` and below it `+new line`, one or several
    $ cohortium ...        and the output expected, standard error included; `...` stands for any text
    [exit 2]               the exit code expected, 0 if not said
    [files a.json b/c.csv] the files that the command writes or changes, none if not said
    [json key other]       instead of expected text: the output is one JSON object that has these keys

So a command that fails and leaves anything behind fails its script, whatever it left.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
COMMAND = Path(sys.executable).with_name("cohortium")


@dataclass
class Step:
    """A line that begins with `$` or `---`, and the lines below it."""

    head: str
    body: list[str] = field(default_factory=list)

    def directive(self, name: str) -> list[str] | None:
        """Takes `[name word word]` out of the body and returns its words."""
        for line in self.body:
            if found := re.fullmatch(rf"\[{name}( .*)?\]", line):
                self.body.remove(line)
                return (found[1] or "").split()
        return None

    def text(self) -> str:
        return "\n".join(self.body)


def steps(script: str) -> Iterator[Step]:
    current = None
    for line in script.splitlines():
        if line.startswith(("$ ", "--- ")):
            if current:
                yield current
            current = Step(line)
        elif current:
            current.body.append(line)
        else:
            assert not line or line.startswith("#"), f"before the first step only comments stand: {line}"
    assert current, "the script holds no step"
    yield current


def matches(expected: str, printed: str) -> bool:
    """Tells whether the text is as expected, apart from blanks at the ends of lines and of the text."""
    lines = [re.escape(line.rstrip()).replace(r"\.\.\.", ".*") for line in expected.strip().splitlines()]
    text = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()).rstrip("\n")
    return re.fullmatch("\n".join(lines), text, re.DOTALL) is not None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change(path: Path, diff: str) -> None:
    text = path.read_text()
    for part in re.split(r"^-", diff.strip(), flags=re.MULTILINE)[1:]:
        old, *new = part.splitlines(keepends=True)
        old = old.rstrip("\n") + "\n"
        assert all(line.startswith("+") for line in new), f"a change is a line with '-', then lines with '+': {part}"
        assert text.count(old) == 1, f"{path.name} holds {old!r} not once"
        text = text.replace(old, "".join(line[1:].rstrip("\n") + "\n" for line in new))
    path.write_text(text)


def run(step: Step, folder: Path) -> None:
    program, *arguments = shlex.split(step.head.removeprefix("$ "))
    assert program == "cohortium"
    code, files, keys = (step.directive(name) for name in ("exit", "files", "json"))
    before = contents(folder)
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    after = contents(folder)
    what = f"{step.head}\n{done.stdout}"
    assert done.returncode == int((code or ["0"])[0]), what
    assert before.keys() <= after.keys(), what
    assert {name for name in after if before.get(name) != after[name]} == set(files or []), what
    if keys is None:
        assert matches(step.text(), done.stdout), f"{what}\nexpected:\n{step.text()}"
    else:
        assert set(keys) <= json.loads(done.stdout).keys(), what


@pytest.mark.parametrize("script", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_script(script: Path, tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "files", tmp_path, dirs_exist_ok=True)
    # the copy has the mode of the checkout, and a site's home is one that others cannot write
    tmp_path.chmod(0o700)
    for step in steps(script.read_text()):
        action, _, name = step.head.removeprefix("--- ").partition(" ")
        if step.head.startswith("$ "):
            run(step, tmp_path)
        elif action == "file":
            (tmp_path / name).write_text(f"{step.text()}\n" if step.body else "")
        else:
            assert action == "change", step.head
            change(tmp_path / name, step.text())
