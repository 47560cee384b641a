"""Arguments that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from cohortium.core.errors import StudyError

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A study file (YAML).", show_default=False)]
SiteData = Annotated[
    list[str],
    typer.Option(
        "--site",
        metavar="NAME=FILE",
        help="A site's data: CSV, TSV, Parquet or JSON. Once for each site.",
        default_factory=list,
        show_default=False,
    ),
]


def site_files(assignments: list[str]) -> dict[str, Path]:
    """Returns the file of each site, as `--site` names them.

    Raises:
        StudyError: an assignment is none, or a site is given twice.
    """
    sites: dict[str, Path] = {}
    for assignment in assignments:
        name, separator, path = assignment.partition("=")
        if not (name and separator and path):
            raise StudyError(f"--site {assignment}: write NAME=FILE, as in --site zurich=zurich.csv")
        if name in sites:
            raise StudyError(f"--site {name} is given twice: give each site once")
        sites[name] = Path(path)
    return sites
