"""Writes docs/commands.md: the help of every command, as the command line prints it without colours and boxes.

    python tools/command_reference.py

Terminal settings are read when the command line is imported, so a process of its own gathers the help.
"""

import os
import subprocess
import sys
from pathlib import Path

from typer import Typer
from typer.testing import CliRunner

from cohortium.cli.app import app

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
INTRODUCTION = """\
# Commands

<!-- Written by tools/command_reference.py from the commands' own help; do not edit by hand. -->

Every command that computes takes `--json` for one JSON document on standard output, and `--quiet` for silence; errors
go to standard error, with `--json` as JSON too (but for mistakes in the command line itself). The
[operator's page](operator.md) explains the exit codes.

`cohortium --install-completion` completes commands in bash, zsh, fish and PowerShell.
"""
# plain help, whatever the terminal
PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "TYPER_USE_RICH": "0"}


def page() -> str:
    """Returns the page's text."""
    command = [sys.executable, __file__, "--print"]
    return subprocess.run(command, env={**os.environ, **PLAIN}, capture_output=True, text=True, check=True).stdout


def gathered() -> str:
    parts = [INTRODUCTION]
    for words in [(), *commands(app)]:
        help_text = (
            CliRunner()
            .invoke(app, [*words, "--help"], prog_name="cohortium", max_content_width=100, terminal_width=100)
            .output
        )
        lines = "\n".join(line.rstrip() for line in help_text.strip().splitlines())
        parts.append(f"## {' '.join(('cohortium', *words))}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def commands(group: Typer, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Returns the words of each command and group below `group`, in the order of their registration."""
    found: list[tuple[str, ...]] = []
    for command in group.registered_commands:
        name = command.name or (command.callback.__name__ if command.callback else "")
        found.append((*above, name.replace("_", "-")))
    for inner in group.registered_groups:
        assert inner.name and inner.typer_instance
        found += [(*above, inner.name), *commands(inner.typer_instance, (*above, inner.name))]
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--print"]:
        print(gathered(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")
