"""The documentation says what is so: examples run, tables are complete, generated pages and figures are current."""

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import cohortium
from cohortium import core
from cohortium.core.training import Descent
from cohortium.plan import compile_study
from cohortium.privacy.calibrate import Budget
from cohortium.secagg.group import Tolerance, tolerance
from cohortium.site.budget import tariff

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "cohortium"
COMMAND = Path(sys.executable).with_name("cohortium")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)


@dataclass
class Code:
    """A fenced block: its language, its text, and the text block right below it, if there is one."""

    language: str
    text: str
    below: str | None = None


def blocks(page: Path) -> list[Code]:
    text, end = page.read_text(encoding="utf-8"), 0
    found: list[Code] = []
    for match in FENCE.finditer(text):
        language, inside = match[2], textwrap.dedent(match[3])
        if language == "text" and found and not text[end : match.start()].strip():
            found[-1].below = inside
        found.append(Code(language, inside))
        end = match.end()
    return found


EXAMPLES = [page for page in PAGES if any(code.language in ("python", "console") for code in blocks(page))]


def assert_matches(expected: str, printed: str) -> None:
    """Compares texts apart from blanks at the ends of lines; `...` stands for any text."""
    lines = [re.escape(line.rstrip()).replace(r"\.\.\.", ".*") for line in expected.strip().splitlines()]
    text = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()).rstrip("\n")
    assert re.fullmatch("\n".join(lines), text, re.DOTALL), f"printed:\n{printed}\nexpected:\n{expected}"


def run_console(text: str, folder: Path) -> None:
    for part in re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]:
        line, _, expected = part.partition("\n")
        program, *arguments = shlex.split(line)
        assert program == "cohortium", f"only cohortium's commands run here: {line}"
        done = subprocess.run(
            [COMMAND, *arguments],
            cwd=folder,
            env={**os.environ, "COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert_matches(expected, done.stdout)


@pytest.mark.parametrize("page", EXAMPLES, ids=lambda page: page.stem)
def test_examples_run_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for code in blocks(page):
        if code.language == "console":
            run_console(code.text, tmp_path)
        elif code.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code.text, str(page), "exec"), names)
            if code.below is not None:
                assert_matches(code.below, printed.getvalue())


def modules() -> set[str]:
    found = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    names = {".".join(part for part in path.parts if part != "__init__") for path in found} - {""}
    # what is generated, and steps of the schema that stay as they are
    return {name for name in names if "_pb2" not in name and ".versions." not in name}


def test_architecture_names_every_module_and_no_other() -> None:
    table = re.findall(
        r"^\| `([\w.]+)` \| ([`\w ]*)\|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    listed = {room for room, _ in table}
    listed |= {f"{room}.{name}" for room, names in table for name in re.findall(r"\w+", names)}
    assert listed == modules()


def core_classes() -> Iterator[str]:
    for info in pkgutil.iter_modules(core.__path__):
        module = importlib.import_module(f"cohortium.core.{info.name}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                yield name


def test_glossary_has_a_line_for_every_word() -> None:
    heads = re.findall(r"^- (.*?): ", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.MULTILINE)
    words = {word for head in heads for word in re.findall(r"\*\*(.+?)\*\*|`(.+?)`", head) for word in word if word}
    assert set(cohortium.__all__) | set(core_classes()) <= words
    assert len(heads) == len(set(heads))


def test_the_threat_model_states_the_bounds_that_the_code_keeps() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert len(rows) >= 6
    for row in rows:
        sites, dropouts, threshold, curious, malicious = map(int, row)
        assert tolerance(sites, dropouts) == Tolerance(sites, threshold, curious, malicious)


def test_as_many_studies_fit_into_a_budget_as_the_stewards_page_says() -> None:
    page = (ROOT / "docs" / "data-steward.md").read_text(encoding="utf-8")
    head = re.search(r"^\| budget \|(.*)\|$", page, re.MULTILINE)
    assert head
    epsilons = [float(number) for number in re.findall(r"[\d.]+", head[1])]
    example = dataclasses.replace(cohortium.load_example(), training=Descent(clip=1.0))
    studies = [
        dataclasses.replace(example, privacy=cohortium.Privacy(unit="patient", epsilon=epsilon, delta=1e-5))
        for epsilon in epsilons
    ]
    releases = [compile_study(study).releases for study in studies]
    rows = re.findall(r"^\| (\d+) ((?:\| \d+ )+)\|$", page, re.MULTILINE)
    assert len(rows) >= 4
    for budget, cells in rows:
        kept = tariff(Budget(float(budget), 1e-5))
        assert kept.limit is not None
        prices = [kept.price(events) for events in releases]
        fitting = [min(kept.limit.divergence // price.divergence, kept.limit.slack // price.slack) for price in prices]
        assert fitting == [int(cell) for cell in re.findall(r"\d+", cells)]


def test_tests_that_pages_name_exist() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for path, names in re.findall(r"`(tests/[\w/]+\.py)::([\w:]+)`", page.read_text(encoding="utf-8")):
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in names.split("::"):
                assert re.search(rf"^\s*(def|class) {name}\b", text, re.MULTILINE), f"{page.name}: {path}::{name}"


def test_every_decision_is_listed() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    records = {path.name for path in (ROOT / "docs" / "adr").glob("0*.md")}
    assert set(re.findall(r"\((0\d+[\w-]*\.md)\)", index)) == records
    assert [name[:4] for name in sorted(records)] == [f"{number:04d}" for number in range(1, len(records) + 1)]


def heading_anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!\w+:)([^)\s]*)\)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in heading_anchors(target), f"{page.name} links to {link}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        assert (
            set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
            <= targets
        )


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["study_reference", "command_reference"])
def test_generated_pages_are_current(name: str) -> None:
    generator = tool(name)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), f"run python tools/{name}.py"


def test_figures_are_those_of_the_results() -> None:
    generator = tool("readme_figures")
    text = generator.PAGE.read_text(encoding="utf-8")
    assert generator.figures() in text, "run python tools/readme_figures.py"
    assert text == generator.page(text)
