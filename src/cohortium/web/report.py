"""The report of a study as one HTML page that needs nothing else: no script, no font, no picture from elsewhere.

`Report` says what is on the page; every section but the header may be left out. Equal reports give equal bytes.
The page holds counts, sums and estimates over groups of patients; nothing here takes a patient's record.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cohortium.coordinator.result import Sample
from cohortium.learning.evaluation import Comparison, mean_auc
from cohortium.web import plots

_MOST_SITES_DRAWN = 24
_MOST_EFFECTS_DRAWN = 40
_INTEGERS_LISTED = 12


@dataclass(frozen=True, kw_only=True)
class SiteCount:
    """A hospital and its patients, used for training and held out."""

    name: str
    training: int
    held_out: int = 0


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the page is about. `date` is text and printed as it is; without it the page has no date."""

    study: str
    version: int
    study_id: str
    purpose: str = ""
    sites: tuple[SiteCount, ...] = ()
    engine: str | None = None
    seed: int | None = None
    date: str | None = None


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What was learned, in one sentence; `left` says what left each hospital, as in "1 masked vector a round"."""

    sentence: str
    left: str = ""


@dataclass(frozen=True, kw_only=True)
class Coefficient:
    """A coefficient with its standard error, confidence interval and p-value, where the model has them."""

    name: str
    estimate: float
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True, kw_only=True)
class FittedModel:
    """A regression.

    Attributes:
        coefficients: all but the intercept, on the scale of the linear predictor.
        intercept: listed in the table, not drawn.
        effect: name of the effects, as in "odds ratio".
        exponentiate: the effect is the exponential of the coefficient, drawn on a logarithmic axis.
        confidence: level of the intervals.
        note: what a reader must know of the scale or of the penalty.
        objective: its value after each round.
        objective_label: what it is.
    """

    coefficients: tuple[Coefficient, ...] = ()
    intercept: Coefficient | None = None
    effect: str = "odds ratio"
    exponentiate: bool = True
    confidence: float = 0.95
    note: str = ""
    objective: tuple[float, ...] = ()
    objective_label: str = "objective"


@dataclass(frozen=True, kw_only=True)
class TrafficRound:
    """One round's traffic of one hospital: integers and bytes sent, bytes received."""

    round: int
    values: int
    sent: int
    received: int


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What the coordinator saw. `traffic` holds the protected rounds of one hospital; all hospitals send alike."""

    sample: Sample | None = None
    traffic: tuple[TrafficRound, ...] = ()


@dataclass(frozen=True, kw_only=True)
class NumberSummary:
    """A number's line of Table 1. `quantiles` holds pairs of probability and value; `missing` is a rate in 0..1.

    `histogram` holds the counts of equal bins from `low` to `high`, None where a count was withheld.
    """

    name: str
    n: int
    missing: float
    unit: str
    mean: float | None
    sd: float | None
    quantiles: tuple[tuple[float, float], ...] = ()
    histogram: tuple[int | None, ...] = ()
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True, kw_only=True)
class CategorySummary:
    """A category's line of Table 1: its levels with their counts, None where a count was withheld."""

    name: str
    n: int
    missing: float
    levels: tuple[tuple[str, int | None], ...]


FeatureSummary = NumberSummary | CategorySummary


@dataclass(frozen=True, kw_only=True)
class Report:
    """The page's sections. `protection` holds pairs such as ("Who can read it", "nobody ...")."""

    header: Header
    headline: Headline | None = None
    comparison: tuple[Comparison, ...] = ()
    model: FittedModel | None = None
    wire: Wire | None = None
    summary: tuple[FeatureSummary, ...] = ()
    protection: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    look: str = ""


@dataclass(frozen=True)
class _SitePlots:
    site: str
    roc: Markup | None
    calibration: Markup | None


def render(report: Report) -> str:
    """Returns the page."""
    model, wire = report.model, report.wire
    return (
        environment()
        .get_template("report.html")
        .render(
            report=report,
            header=report.header,
            cards=_cards(report),
            models=[name for name in plots.LOOKS if any(name in row.models for row in report.comparison)],
            means={name: mean_auc(report.comparison, name) for name in plots.LOOKS},
            auc_plot=_auc_plot(report.comparison) if report.comparison else None,
            site_plots=[_site_plots(index, row) for index, row in enumerate(report.comparison[:_MOST_SITES_DRAWN])],
            effects_plot=_effects_plot(model) if model and model.coefficients else None,
            effects_drawn=_MOST_EFFECTS_DRAWN,
            convergence_plot=_convergence_plot(model) if model and model.objective else None,
            wire_plots=_wire_plots(wire.sample) if wire and wire.sample else None,
            wire_rows=_wire_rows(wire.sample) if wire and wire.sample else [],
            sparklines={
                row.name: plots.sparkline(row.histogram, f"histogram of {row.name} from {row.low:g} to {row.high:g}")
                for row in report.summary
                if isinstance(row, NumberSummary) and row.histogram
            },
        )
    )


def environment() -> Environment:
    """Returns what fills in the pages' templates."""
    made = Environment(
        loader=PackageLoader("cohortium.web"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        count=lambda value: f"{value:,}",
        size=_size,
        decimal=_decimal,
        significant=_significant,
        p_value=_p_value,
        percent=lambda share: f"{share:.0%}" if share in (0, 1) else f"{share:.1%}",
        exponential=_exponential,
        breakable=_breakable,
    )
    made.globals["looks"] = plots.LOOKS
    made.tests["number_summary"] = lambda row: isinstance(row, NumberSummary)
    return made


def _cards(report: Report) -> list[_Card]:
    titles = {
        "federated": "Mean AUC, federated",
        "alone": "Mean AUC, each hospital alone",
        "pooled": "Mean AUC, pooled",
    }
    means = [(look, mean_auc(report.comparison, look)) for look in titles]
    cards = [_Card(titles[look], f"{mean:.3f}", look) for look, mean in means if mean is not None]
    traffic = report.wire.traffic if report.wire else ()
    if traffic:
        cards.append(_Card("Rounds", f"{len(traffic):,}"))
        cards.append(_Card("Sent by each hospital", _size(sum(row.sent for row in traffic))))
    if report.headline and report.headline.left:
        cards.append(_Card("What left each hospital", report.headline.left))
    return cards


def _auc_plot(comparison: Sequence[Comparison]) -> Markup:
    groups = []
    for row in comparison[:_MOST_SITES_DRAWN]:
        found = [(look, row.models[look]) for look in plots.LOOKS if look in row.models]
        intervals = [
            plots.Interval(look, one.auc, one.auc_low, one.auc_high) for look, one in found if one.auc is not None
        ]
        groups.append(plots.Group(row.site, intervals))
    title = "AUC on each hospital's held-out patients"
    return plots.forest("auc", title, groups, axis_label="AUC (95% interval)", reference=0.5, legend=True)


def _site_plots(index: int, row: Comparison) -> _SitePlots:
    curves = {look: one.roc for look, one in row.models.items() if one.roc is not None}
    areas = {look: one.auc for look, one in row.models.items() if one.auc is not None}
    roc = plots.roc_curves(f"roc{index}", f"ROC curves, {row.site}", curves, areas) if curves else None
    federated = row.models.get("federated")
    if federated is None or not federated.n:
        return _SitePlots(row.site, roc, None)
    title = f"Calibration of the federated model, {row.site}"
    return _SitePlots(row.site, roc, plots.calibration_curve(f"calibration{index}", title, federated.calibration))


def _effects_plot(model: FittedModel) -> Markup:
    scale = _exponential if model.exponentiate else float
    groups = []
    for row in model.coefficients[:_MOST_EFFECTS_DRAWN]:
        ends = [None if end is None else scale(end) for end in (row.low, row.high)]
        groups.append(plots.Group(row.name, [plots.Interval("federated", scale(row.estimate), ends[0], ends[1])]))
    return plots.forest(
        "effects",
        f"{model.effect.capitalize()} of each feature",
        groups,
        axis_label=f"{model.effect} ({model.confidence:.0%} interval)",
        reference=1.0 if model.exponentiate else 0.0,
        logarithmic=model.exponentiate,
    )


def _convergence_plot(model: FittedModel) -> Markup:
    return plots.convergence("convergence", "Convergence", model.objective, model.objective_label)


def _signed(value: int, bits: int) -> int:
    """Returns the representative of a residue modulo 2^bits nearest to zero."""
    half = 1 << (bits - 1)
    return (value + half) % (2 * half) - half


def _wire_plots(sample: Sample) -> tuple[Markup, Markup]:
    def plot(name: str, title: str, values: Sequence[int], kind: plots.WireKind) -> Markup:
        return plots.scatter_of_integers(name, title, [_signed(v, sample.bits) for v in values], sample.bits, kind)

    return (
        plot("computed", f"What {sample.site} computed", sample.plain, "computed"),
        plot("sent", f"What left {sample.site}", sample.masked, "sent"),
    )


def _wire_rows(sample: Sample) -> list[tuple[str, int, int]]:
    entries = zip(sample.names, sample.plain, sample.masked, strict=True)
    rows = [(name, _signed(plain, sample.bits), masked % 2**sample.bits) for name, plain, masked in entries]
    return rows[:_INTEGERS_LISTED]


def _breakable(name: str) -> Markup:
    """Returns a name that a narrow column may break before a bracket or after an underscore."""
    return Markup("<wbr>[").join(Markup("_<wbr>").join(part.split("_")) for part in name.split("["))


def _exponential(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _size(count: int) -> str:
    """Returns bytes in decimal units, as in '5.0 kB'."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"


def _decimal(value: float | None, places: int = 3) -> str:
    """Returns a number with a true minus sign, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.{places}f}".replace("-", "−")


def _significant(value: float | None, digits: int = 4, *, zeros: bool = False) -> str:
    """Returns a number with so many significant digits, trailing zeros on request.

    A large number keeps every digit before the point.
    """
    if value is None or math.isnan(value):
        return "–"
    written = (
        f"{value:,.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:{'#' if zeros else ''}.{digits}g}".rstrip(".")
    )
    return written.replace("-", "−")


def _p_value(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
