"""What people see in a terminal: no text of a study, a file or an error steers it."""

import sys
from pathlib import Path

import pytest

from cohortium.cli import app
from cohortium.cli.output import Output, report_error, visible
from cohortium.core.errors import StudyError

EVIL = "\x1b[2J[red]x[/] :smile: \u202e\r\x07\u2028\\"
PLAIN = "?[2J[red]x[/] :smile: ????\\"


def test_visible() -> None:
    assert visible(EVIL) == PLAIN
    assert visible("Ä ≥ 3\nµmol/L \ud800") == "Ä ≥ 3\nµmol/L ?"


def test_lines_pairs_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(as_json=False, quiet=False)
    output.say(EVIL)
    output.pairs(((EVIL, EVIL),))
    output.table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]])
    printed = capsys.readouterr().out
    assert printed.count(PLAIN) == 8
    assert f"{PLAIN}\\" not in printed
    assert not any(character in printed for character in "\x1b\u202e\r\x07\u2028")


def test_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_error(StudyError(EVIL), as_json=False) == 2
    assert capsys.readouterr().err == f"error: {PLAIN}\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_predictions_are_made_visible_for_a_terminal_and_left_alone_in_a_pipe(
    terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = Path(__file__).parent / "files"
    monkeypatch.chdir(tmp_path)
    for name in ("north", "south", "west"):
        (tmp_path / f"{name}.csv").write_bytes((files / f"{name}.csv").read_bytes())
    given = [word for name in ("north", "south", "west") for word in ("--site", f"{name}={name}.csv")]
    study = ["study", "simulate", str(files / "study.yaml"), "--seed", "1", "--out", "result", "--quiet"]
    with pytest.raises(SystemExit):
        app.app([*study, *given])
    west = (tmp_path / "west.csv").read_text()
    (tmp_path / "new.csv").write_text(west.replace("w1,", "w\x1b1,"))
    capsys.readouterr()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with pytest.raises(SystemExit):
        app.app(["predict", "result/model.json", "new.csv"])
    printed = capsys.readouterr().out
    assert ("w?1," in printed) is terminal
    assert ("w\x1b1," in printed) is not terminal
