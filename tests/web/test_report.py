"""The HTML report: well formed, safe, complete, reproducible, and whole with any section left out."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cohortium.core.random import Randomness
from cohortium.learning.evaluation import Comparison, evaluate
from cohortium.web.report import (
    CategorySummary,
    Coefficient,
    FittedModel,
    Header,
    Headline,
    NumberSummary,
    Report,
    Sample,
    SiteCount,
    TrafficRound,
    Wire,
    render,
)

VOID = {"wbr", "meta", "br", "link", "img", "input", "hr"}
HOSTILE = "<script>alert('x')</script>"


class Checker(HTMLParser):
    """Collects a page's elements and fails on a tag that is closed out of turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def ids(self) -> list[str]:
        return [found["id"] or "" for _, found in self.tags if "id" in found]


SIZES = {
    "budapest": (206, 88, 0.36),
    "cleveland": (213, 90, 0.46),
    "long-beach": (140, 60, 0.74),
    "zurich": (87, 36, 0.93),
}


def comparisons() -> tuple[Comparison, ...]:
    random = Randomness.of_seed(1).generator()
    rows = []
    for site, (_, held_out, prevalence) in SIZES.items():
        target = (np.arange(held_out) < round(prevalence * held_out)).astype(float)
        base = 2.2 * target - 1.1 + np.log(prevalence / (1 - prevalence)) + random.normal(0, 1.1, held_out)
        models = {
            name: evaluate(target, 1 / (1 + np.exp(-(base + random.normal(0, noise, held_out)))))
            for name, noise in (("federated", 0.2), ("alone", 1.4), ("pooled", 0.2))
        }
        rows.append(Comparison(site, models))
    return tuple(rows)


def model() -> FittedModel:
    rows = (
        ("age", 0.31, 0.105), ("chest_pain[atypical]", -0.42, 0.39), ("chest_pain[non-anginal]", -0.11, 0.35),
        ("chest_pain[asymptomatic]", 1.22, 0.33), ("chol", 0.12, 0.11), ("exang[yes]", 0.83, 0.21),
        ("fbs[yes]", 0.28, 0.26), ("oldpeak", 0.62, 0.12), ("restecg[st-t]", 0.05, 0.24), ("restecg[lvh]", 0.01, 0.25),
        ("sex[male]", 1.31, 0.24), ("thalach", -0.38, 0.11), ("trestbps", 0.06, 0.097),
    )  # fmt: skip
    coefficients = tuple(
        Coefficient(
            name=n, estimate=e, standard_error=s, low=e - 1.96 * s, high=e + 1.96 * s, p=0.0004 if e > 1 else 0.21
        )
        for n, e, s in rows
    )
    return FittedModel(
        coefficients=coefficients,
        intercept=Coefficient(name="(intercept)", estimate=-2.1, standard_error=0.4, low=-2.9, high=-1.3, p=1e-6),
        note="Numbers are per standard deviation over all hospitals; ridge penalty 1.",
        objective=(447.8, 331.2, 318.4, 317.91, 317.905, 317.905),
        objective_label="penalised loss",
    )


def wire() -> Wire:
    random = Randomness.of_seed(2).generator()
    names = ("loss", "rows", *["gradient"] * 13, *["hessian"] * 90)
    plain = tuple(int(value) for value in np.concatenate([random.normal(0, 4e7, 60), random.normal(0, 4e6, 45)]))
    masked = tuple(int(value) for value in random.integers(0, 2**32, len(names)))
    traffic = [TrafficRound(round=number, values=105, sent=468, received=330) for number in range(1, 8)]
    return Wire(
        sample=Sample(site="zurich", round=3, bits=32, names=names, plain=plain, masked=masked),
        traffic=tuple(traffic),
    )


def summary() -> tuple[NumberSummary | CategorySummary, ...]:
    quantiles = ((0.05, 37.2), (0.25, 47.0), (0.5, 54.0), (0.75, 60.1), (0.95, 68.3))
    histogram = (0, None, 12, 60, 133, 240, 260, 130, 74, 9, None, 0)
    return (
        NumberSummary(
            name="age", n=920, missing=0.0, unit="years", mean=53.51, sd=9.42, quantiles=quantiles, histogram=histogram,
            low=18, high=100,
        ),
        NumberSummary(
            name="oldpeak", n=858, missing=0.0674, unit="mm", mean=0.8788, sd=1.091, quantiles=((0.5, 0.5),),
            histogram=(None, 390, 140, 150, 90, 40, 20, None, None), low=-5, high=10,
        ),
        CategorySummary(name="sex", n=920, missing=0.0, levels=(("female", 194), ("male", 726))),
        CategorySummary(
            name="chest_pain", n=920, missing=0.0,
            levels=(("typical", 46), ("atypical", 174), ("non-anginal", 204), ("asymptomatic", 496), ("unknown", None)),
        ),
    )  # fmt: skip


def whole() -> Report:
    return Report(
        header=Header(
            study="heart-risk",
            version=1,
            study_id="sha256:9f2c41d07b5a6e83f1b7c2d940ee5a7713c86f0b2a94d15e07f38ac6b1d2e3e1",
            purpose="Angiographic coronary artery disease from routine findings",
            sites=tuple(SiteCount(name=site, training=size[0], held_out=size[1]) for site, size in SIZES.items()),
            engine="simulation in one process",
            seed=7,
        ),
        headline=Headline(
            sentence="Learning together found the patients with disease better than any hospital could alone, and "
            "about as well as if every record lay in one place.",
            left="one masked vector of 105 integers a round",
        ),
        comparison=comparisons(),
        model=model(),
        wire=wire(),
        summary=summary(),
        protection=(
            ("Who can read it", "Nobody reads one hospital's vector; the coordinator learns the sum over the four."),
            ("If a hospital drops", "The round yields nothing and the run ends."),
            ("Privacy", "The sums carry no noise: what the model itself gives away is not limited."),
        ),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return render(whole())


def test_the_page_is_well_formed_with_unique_ids_and_no_dangling_reference(page: str) -> None:
    checker = Checker(page)
    ids = checker.ids()
    assert len(set(ids)) == len(ids)
    referred = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
    labels = [name for _, found in checker.tags for name in (found.get("aria-labelledby") or "").split()]
    assert {first or second for first, second in referred} | set(labels) <= set(ids)


def test_the_page_asks_for_nothing_from_elsewhere(page: str) -> None:
    checker = Checker(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in checker.tags}
    assert not re.search(r"https?://|@import|url\((?!#)", page)


def test_every_plot_has_a_title_and_a_description(page: str) -> None:
    checker = Checker(page)
    drawn = [found for tag, found in checker.tags if tag == "svg"]
    assert len(drawn) == 1 + 2 * 4 + 1 + 1 + 2 + 2  # AUC, four hospitals, effects, convergence, wire, two sparklines
    assert all(found["role"] == "img" for found in drawn)
    assert all(found.get("aria-label") or len((found["aria-labelledby"] or "").split()) == 2 for found in drawn)
    assert "Area under the curve: federated" in checker.text


def test_the_numbers_are_on_the_page(page: str) -> None:
    report, text = whole(), Checker(page).text
    federated = report.comparison[0].models["federated"]
    for expected in (
        "heart-risk", report.header.study_id, "budapest", "206", f"{federated.auc:.3f}",
        f"{federated.auc_low:.2f}–{federated.auc_high:.2f}", "3.71", "1.310", "0.84 to 1.78", "< 0.001", "−0.380",
        "3.3 kB", "735", "53.51 (9.42)", "6.7%", "726 (78.9%)", "few", "Who can read it", "one masked vector",
    ):  # fmt: skip
        assert expected in text, expected


def test_equal_reports_give_equal_bytes(page: str) -> None:
    assert render(whole()) == page


def test_hostile_names_are_escaped_everywhere() -> None:
    report = whole()
    assert report.model is not None
    assert report.wire is not None
    assert report.wire.sample is not None
    hostile = dataclasses.replace(
        report,
        header=dataclasses.replace(
            report.header, study=HOSTILE, purpose=HOSTILE, engine=HOSTILE, sites=(SiteCount(name=HOSTILE, training=1),)
        ),
        headline=Headline(sentence=HOSTILE, left=HOSTILE),
        comparison=(Comparison(HOSTILE, report.comparison[0].models), Comparison("$x_1$ --> \"'", {})),
        model=dataclasses.replace(
            report.model, coefficients=(Coefficient(name=HOSTILE, estimate=0.1),), note=HOSTILE, effect=HOSTILE
        ),
        wire=Wire(sample=dataclasses.replace(report.wire.sample, site=HOSTILE)),
        summary=(
            NumberSummary(name=f'"{HOSTILE}', n=1, missing=0, unit=HOSTILE, mean=1, sd=1, histogram=(1,)),
            CategorySummary(name=HOSTILE, n=1, missing=0, levels=((HOSTILE, 1),)),
        ),
        protection=((HOSTILE, HOSTILE),),
    )
    page = render(hostile)
    checker = Checker(page)
    assert "<script" not in page
    assert HOSTILE in checker.text


@pytest.mark.parametrize("section", ["headline", "comparison", "model", "wire", "summary", "protection"])
def test_each_section_alone_and_each_left_out_make_a_page(section: str) -> None:
    report, bare = whole(), Report(header=Header(study="s", version=1, study_id="sha256:0"))
    empty = getattr(bare, section)
    for chosen in (
        dataclasses.replace(report, **{section: empty}),
        dataclasses.replace(bare, **{section: getattr(report, section)}),
    ):
        present = getattr(chosen, section) != empty
        checker = Checker(render(chosen))
        if section != "headline":
            assert (section in checker.ids()) == present


def test_a_header_alone_makes_a_page() -> None:
    checker = Checker(render(Report(header=Header(study="bare", version=3, study_id="sha256:0", date="1 May 2031"))))
    assert "1 May 2031" in checker.text
    assert not any(tag == "section" for tag, _ in checker.tags)


def test_a_hospital_with_one_outcome_says_so() -> None:
    found = evaluate([1, 1, 1], [0.2, 0.5, 0.7])
    text = Checker(render(Report(header=whole().header, comparison=(Comparison("a", {"federated": found}),)))).text
    assert "Only one outcome occurs" in text
    assert "cannot be estimated" in text


def test_extreme_effects_and_many_hospitals_are_drawn() -> None:
    wide = tuple(
        Coefficient(name=f"f{i}", estimate=e, low=e - 30, high=e + 30) for i, e in enumerate((-900.0, 0.0, 900.0))
    )
    many = tuple(dataclasses.replace(row, site=f"{row.site}{i}") for i in range(10) for row in comparisons())
    page = render(Report(header=whole().header, model=FittedModel(coefficients=wide), comparison=many))
    assert "The first 24 hospitals are drawn." in Checker(page).text


def test_a_wire_sample_needs_entries_of_equal_number() -> None:
    with pytest.raises(ValueError, match="a name, a plain and a masked integer"):
        Sample(site="a", round=1, bits=32, names=("x",), plain=(1, 2), masked=(1,))


def test_plain_residues_are_shown_with_their_sign() -> None:
    sample = Sample(site="a", round=1, bits=32, names=("x",), plain=(2**32 - 5,), masked=(7,))
    assert "−5" in Checker(render(Report(header=whole().header, wire=Wire(sample=sample)))).text
