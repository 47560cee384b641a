"""A data file that goes away while a study runs: one sentence, exit code 2, nothing written."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cohortium.cli import app
from cohortium.cli.output import Bar

FILES = Path(__file__).parent / "files"
SITES = ("north", "south", "west")


def test_a_data_file_may_vanish_between_two_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(FILES, tmp_path, dirs_exist_ok=True)

    def close_and_lose(self: Bar, event: Any) -> None:
        if event.number == 2:
            (tmp_path / "south.csv").unlink()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Bar, "closed", close_and_lose)
    given = [word for site in SITES for word in ("--site", f"{site}={site}.csv")]
    monkeypatch.setattr("sys.argv", ["cohortium", "study", "simulate", "study.yaml", "--seed", "1", *given])

    with pytest.raises(SystemExit) as ended:
        app.main()

    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: south: south.csv: the data file is gone or cannot be opened")
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", "north.csv", "west.csv"}
