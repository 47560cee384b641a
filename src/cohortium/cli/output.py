"""How commands speak: tables and progress for people, JSON for programs, silence on request."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cohortium.coordinator.rounds import RoundClosed
from cohortium.core.document import hides
from cohortium.core.errors import CohortiumError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no tables.")]


@dataclass(frozen=True)
class Output:
    """Where a command's words go. With `as_json` only `result` prints; progress goes to standard error."""

    as_json: bool
    quiet: bool

    @property
    def _console(self) -> Console:
        return Console(quiet=self.quiet or self.as_json, highlight=False, emoji=False, width=_width())

    def result(self, value: Any) -> None:
        """Prints the command's result as JSON, if JSON was asked for."""
        if self.as_json:
            print(json.dumps(value, indent=2, allow_nan=False))

    def say(self, text: str) -> None:
        """Prints a line for people."""
        self._console.print(visible(text), markup=False, soft_wrap=True)

    def pairs(self, rows: "tuple[tuple[str, str], ...]") -> None:
        """Prints questions and their answers in two columns."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in rows:
            grid.add_row(_literal(f"  {label}"), _literal(text))
        self._console.print(grid)

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Prints a table; the first column is text, the others numbers."""
        table = Table(title=_literal(title, "bold"), title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            table.add_column(_literal(column), justify="right" if index else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_literal(cell) for cell in row))
        self._console.print(table)

    @contextmanager
    def bar(self, label: str) -> "Iterator[Bar]":
        """Shows a progress bar over a run's rounds on standard error, where someone watches."""
        hidden = self.quiet or self.as_json or not sys.stderr.isatty()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as progress:
            yield Bar(progress, progress.add_task(label, total=None, note=""))


@dataclass(frozen=True)
class Bar:
    """A bar that rounds or other steps move on."""

    progress: Progress
    task: Any

    def closed(self, event: RoundClosed) -> None:
        """Moves on after a round."""
        note = f"round {event.number}"
        if event.objective is not None:
            note += f", objective {event.objective:.4g}"
        self.progress.update(self.task, completed=event.number, total=event.number + event.left, note=note)

    def step(self, done: int, total: int, note: str) -> None:
        """Moves on to `done` of `total`."""
        self.progress.update(self.task, completed=done, total=total, note=note)


def report_error(error: CohortiumError, as_json: bool) -> int:
    """Prints an error to standard error and returns the exit code."""
    if as_json:
        print(json.dumps({"error": str(error), "exit_code": error.exit_code}), file=sys.stderr)
    else:
        console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
        console.print(Text.assemble(("error:", "bold red"), " ", visible(str(error))))
    return error.exit_code


def visible(text: str) -> str:
    """Returns text for a terminal: '?' for each character that could steer it or hide something, but for newlines."""
    if text.isprintable():
        return text
    return "".join("?" if hides(character) and character != "\n" else character for character in text)


def _literal(text: str, style: str = "") -> Text:
    """Returns text for rich, which would take words in brackets for styles."""
    return Text(visible(text), style)


def _width() -> int | None:
    # a log file or a pipe gets the width that a person reads best
    return None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
