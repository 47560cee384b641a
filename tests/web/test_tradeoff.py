"""The page of a trade-off: whole, safe, honest about its limits, and the same numbers in words, table and picture."""

import re
import struct
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

import cohortium as co
from cohortium.learning.tradeoff import Basis, Point, Tradeoff, Utility, levels, prices, verdict
from cohortium.web import curves
from cohortium.web.tradeoff import page

HOSTILE = "<script>alert('x')</script>"
ERROR = Utility("mean error of shares", higher_is_better=False, useless=1.0)
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Collects a page's ids and text, and fails on a tag that is closed out of turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attributes if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def tradeoff(**changes: object) -> Tradeoff:
    study = co.Study(
        name="heart-risk",
        purpose=co.Purpose(summary="Disease from routine findings"),
        sites=co.Sites(include=("a", "b", "c")),
        cohort=co.Cohort(
            dataset="d",
            patient="id",
            features={"age": co.Number(unit="a", range=(0, 120))},
            target=co.BinaryTarget(name="y"),
        ),
        model=co.Regression(kind="logistic"),
        privacy=co.Privacy(unit="patient"),
    )
    random, points = np.random.default_rng(1), []
    for epsilon, loss in ((0.5, 0.03), (1.0, 0.004), (4.0, 0.002), (None, 0.0)):
        for seed in range(1, 5):
            best = 0.83 + 0.004 * seed
            worse = {"distributed": 1.0, "central": 0.9, "local": 2.0, "alone": 4.0}
            scores = {curve: best - factor * loss + random.normal(0, 3e-4) for curve, factor in worse.items()}
            points.append(Point(epsilon, seed, scores, {"alone": 1} if epsilon == 0.5 else {}))
    whole = Tradeoff(
        study=study,
        basis=Basis("0.1.0", "sha256:9f2c41", "sha256:77aa", 1e-5, 0.25),
        utility=Utility("AUC", higher_is_better=True, useless=0.5),
        curves=("distributed", "central", "local", "alone"),
        epsilons=(0.5, 1.0, 4.0),
        seeds=(1, 2, 3, 4),
        patients={"a": 1234, "b": 310, "c": 95},
        allowed=0.01,
        points=tuple(points),
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def written() -> str:
    return page(tradeoff()).decode()


def pixels(png: bytes) -> tuple[tuple[int, int], set[bytes]]:
    """Returns a PNG's size and the bytes of its lines' distinct contents."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    size, place, packed = struct.unpack(">II", png[16:24]), 8, b""
    while place < len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        packed += png[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    lines = zlib.decompress(packed)
    stride = 1 + 4 * size[0]
    return size, {lines[start : start + stride] for start in range(0, len(lines), stride)}


def test_the_page_is_well_formed_and_asks_for_nothing(written: str) -> None:
    checker = Checker(written)
    assert len(set(checker.ids)) == len(checker.ids)
    assert {"price", "meaning", "made", "limits"} <= set(checker.ids)
    assert {name for name in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', written) for name in name if name} <= set(
        checker.ids
    )
    assert not {"script", "link", "img", "iframe", "object"} & checker.tags
    assert not re.search(r"https?://|@import", written)
    assert not re.search(r"#0101\d\d", written), "a stand-in for a colour was left"


def test_the_numbers_are_on_the_page(written: str) -> None:
    whole, text = tradeoff(), Checker(written).text
    assert verdict(whole) in text
    for level in levels(whole):
        assert f"{level.mean:.3f}" in text
        assert f"{level.low:.3f} to {level.high:.3f}" in text
    for price in prices(whole):
        assert f"{price.loss:.3f}" in text
        assert f"{price.bound:.3f}" in text
    for expected in (
        "heart-risk", "sha256:9f2c41", "sha256:77aa", "1,639 patients of 3 hospitals, at least 95 each", "25%",
        # e^1 / (1 + e^1), and from odds of 1 to 99 with e^4
        "73.1%", "35.5%", "2.72 times", "54.6 times", "4, from 1 to 4", "1e-05",
    ):  # fmt: skip
        assert expected in text, expected
    assert 'class="chosen"><th scope="row">1</th>' in written
    assert "recommended: 1" in text


def test_the_page_says_what_it_does_not_protect(written: str) -> None:
    text = " ".join(Checker(written).text.split())
    assert "This page is itself not private." in text
    assert "Make it from public or synthetic data" in text
    assert "found no model in the noise" in text


def test_equal_trade_offs_give_equal_bytes(written: str) -> None:
    assert page(tradeoff()).decode() == written
    assert curves.picture(tradeoff()) == curves.picture(tradeoff())


def test_hostile_texts_are_escaped() -> None:
    whole = tradeoff()
    study = replace(whole.study, purpose=co.Purpose(summary=HOSTILE))
    written = page(replace(whole, study=study)).decode()
    assert "<script" not in written
    assert HOSTILE in Checker(written).text


def test_the_picture_has_its_size_and_shows_something() -> None:
    size, lines = pixels(curves.picture(tradeoff()))
    assert size == (curves.SCALE * curves.WIDTH, curves.SCALE * curves.HEIGHT)
    assert len(lines) > 100


def test_nothing_is_recommended_where_nothing_keeps_within_the_loss() -> None:
    text = Checker(page(tradeoff(allowed=0.0001)).decode()).text
    assert "No epsilon of the list" in text
    assert "recommended:" not in text


def test_an_error_of_a_description_and_a_useless_curve_are_drawn() -> None:
    whole = tradeoff()
    study = replace(whole.study, model=co.Descriptive(refinements=0), training=None)
    three = replace(whole, study=study, utility=ERROR, curves=("distributed", "central", "local"))
    errors = tuple(
        replace(point, scores={curve: 0.9 - value for curve, value in point.scores.items()}) for point in whole.points
    )
    assert "half the sum of absolute differences" in Checker(page(replace(three, points=errors)).decode()).text
    far = tuple(replace(point, scores={**point.scores, "alone": -50.0}) for point in whole.points)
    explained = replace(whole, utility=Utility("R²", higher_is_better=True, useless=0.0), points=far)
    low, high = curves._limits(explained)
    assert -0.3 < low < high < 1.1
    assert "R²" in Checker(page(explained).decode()).text


def test_who_is_protected_is_named() -> None:
    whole = tradeoff()
    for privacy, expected in (
        (co.Privacy(unit="site"), "What epsilon means for a whole hospital"),
        (co.Privacy(unit="record"), "whether one record is in the study"),
        (co.Privacy(unit="patient", neighbouring="replace"), "what the data of one patient say"),
        (co.Privacy(unit="patient", colluding=2), "without the shares of 2 hospitals"),
    ):
        text = " ".join(
            Checker(page(replace(whole, study=replace(whole.study, privacy=privacy))).decode()).text.split()
        )
        assert expected in text
