"""The report's plots as inline SVG: equal input gives equal bytes, and colours are the page's CSS variables."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from cohortium.learning.evaluation import Calibration, Roc

# Matplotlib knows no CSS variables: it draws with these stand-ins, which `finished` replaces.
INK, MUTED, GRID, SURFACE = "#010101", "#010102", "#010103", "#010104"
FEDERATED, ALONE, POOLED, LOCAL = "#010105", "#010106", "#010107", "#010108"
_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    SURFACE: "var(--surface)",
    FEDERATED: "var(--federated)",
    ALONE: "var(--alone)",
    POOLED: "var(--pooled)",
    LOCAL: "var(--local)",
}
# The type of its keys differs between versions of Matplotlib.
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "axes.titlesize": 12.5,
    "axes.labelsize": 11.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
}
_LONGEST_LABEL = 24
_MOST_DOTS = 600
POINTS_PER_INCH = 72
_WIDTH = 400
_GROWTH = 1.3
"""A plot may be shown this much larger than it is drawn; on a telephone it shrinks only a little."""
_WIDEST = 2.0**10
"""Effects beyond a factor of about a thousand, which only a separated cohort gives, end at the axis's edge."""

WireKind = Literal["computed", "sent"]


class Look(NamedTuple):
    """How one model is drawn; shape and dashes differ as well as colour."""

    label: str
    colour: str
    marker: str
    dashes: str


LOOKS: Mapping[str, Look] = {
    "federated": Look("federated", FEDERATED, "o", "-"),
    "alone": Look("hospital alone", ALONE, "s", "--"),
    "pooled": Look("pooled rows", POOLED, "D", ":"),
}


class Interval(NamedTuple):
    """One estimate of a forest plot, drawn in a model's look; without ends only its mark is drawn."""

    look: str
    estimate: float
    low: float | None
    high: float | None


class Group(NamedTuple):
    """A labelled row of a forest plot."""

    label: str
    intervals: Sequence[Interval]


def forest(
    name: str,
    title: str,
    groups: Sequence[Group],
    *,
    axis_label: str,
    reference: float,
    logarithmic: bool = False,
    legend: bool = False,
) -> Markup:
    """Returns a forest plot: one row for each group, its intervals below one another, and a line at `reference`."""
    most = max([len(group.intervals) for group in groups], default=0) or 1
    height = len(groups) * (13 * most + 10) + (84 if legend else 58)
    with styled(name):
        figure, axes = empty_axes(_WIDTH, height)
        if logarithmic:
            _octaves(axes, [value for group in groups for interval in group.intervals for value in interval[1:]])
        for row, group in enumerate(groups):
            _draw_group(axes, row, group, most)
        axes.axvline(reference, color=MUTED, linewidth=1, dashes=(2, 3), zorder=1)
        axes.set_yticks(range(len(groups)), [_shortened(group.label) for group in groups])
        axes.set_ylim(len(groups) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(axis_label)
        if legend:
            looks = [key for key in LOOKS if any(key == i.look for group in groups for i in group.intervals)]
            figure.legend(handles=_handles(looks), loc="outside upper center", ncols=3, columnspacing=1.2)
        description = "; ".join(f"{group.label}: {_spoken(group)}" for group in groups)
        return finished(figure, name, title, f"{axis_label} with intervals. {description}.")


def roc_curves(name: str, title: str, curves: Mapping[str, Roc], areas: Mapping[str, float]) -> Markup:
    """Returns the ROC curves of several models at one hospital, on a square."""
    with styled(name):
        _, axes = _square("false positive rate", "true positive rate")
        # The federated curve comes last, so that it lies on top.
        for model in reversed([key for key in LOOKS if key in curves]):
            look, curve = LOOKS[model], curves[model]
            axes.plot(curve.fpr, curve.tpr, color=look.colour, linestyle=look.dashes, linewidth=1.8, label=look.label)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="lower right", handlelength=2.2, borderaxespad=0.2)
        figure = axes.get_figure(root=True)
        assert figure is not None
        spoken = ", ".join(f"{LOOKS[model].label} {area:.2f}" for model, area in areas.items() if model in LOOKS)
        return finished(figure, name, title, f"Area under the curve: {spoken}.")


def calibration_curve(name: str, title: str, bins: Calibration) -> Markup:
    """Returns observed against predicted risk of the federated model, dots sized by the patients in a bin."""
    with styled(name):
        figure, axes = _square("predicted risk", "observed share")
        axes.plot(bins.predicted, bins.observed, color=FEDERATED, linewidth=1.2)
        largest = max(bins.count, default=1)
        areas = [18 + 45 * count / largest for count in bins.count]
        axes.scatter(bins.predicted, bins.observed, s=areas, color=FEDERATED, zorder=3, clip_on=False)
        pairs = ", ".join(f"{p:.2f} and {o:.2f}" for p, o in zip(bins.predicted, bins.observed, strict=True))
        return finished(figure, name, title, f"Predicted and observed, bin by bin: {pairs}.")


def convergence(name: str, title: str, objective: Sequence[float], axis_label: str) -> Markup:
    """Returns the objective by round."""
    with styled(name):
        figure, axes = empty_axes(_WIDTH, 220)
        rounds = range(1, len(objective) + 1)
        marker = "o" if len(objective) <= 40 else ""
        axes.plot(rounds, objective, color=FEDERATED, linewidth=1.8, marker=marker, markersize=5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(axis="y")
        axes.set_xlabel("round")
        axes.set_ylabel(axis_label)
        description = f"{axis_label}: {objective[0]:.6g} after the first round, {objective[-1]:.6g} after the last."
        return finished(figure, name, title, description)


def scatter_of_integers(name: str, title: str, values: Sequence[int], bits: int, kind: WireKind) -> Markup:
    """Returns a vector of signed integers as dots over the whole range of `bits` bits, with its histogram beside it."""
    shown, half = values[:_MOST_DOTS], 2 ** (bits - 1)
    heights = [value / half for value in shown]
    colour, marker = (ALONE, "s") if kind == "computed" else (FEDERATED, "o")
    with styled(name):
        figure = _empty(_WIDTH, 210)
        grid = figure.add_gridspec(1, 2, width_ratios=(4, 1))
        dots = figure.add_subplot(grid[0])
        histogram = figure.add_subplot(grid[1], sharey=dots)
        dots.axhline(0, color=GRID, linewidth=1)
        dots.scatter(range(1, len(shown) + 1), heights, s=13, color=colour, marker=marker, linewidths=0, clip_on=False)
        dots.set_ylim(-1, 1)
        dots.set_yticks((-1, 0, 1), (f"−2{_raised(bits - 1)}", "0", f"2{_raised(bits - 1)}"))
        dots.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        dots.set_xlabel("position in the vector")
        histogram.hist(heights, bins=15, range=(-1, 1), orientation="horizontal", color=colour, rwidth=0.82)
        histogram.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=2))
        histogram.tick_params(axis="y", left=False, labelleft=False)
        histogram.set_xlabel("count")
        inside = sum(abs(height) < 1 / 15 for height in heights) / max(len(heights), 1)
        description = f"{len(shown)} integers; {inside:.0%} of them lie within a fifteenth of the range, around zero."
        return finished(figure, name, title, description)


def sparkline(counts: Sequence[int | None], label: str) -> Markup:
    """Returns a histogram as small as a word; a bin whose count is unknown is left out."""
    largest = max((count for count in counts if count is not None), default=0) or 1
    step = 96 / max(len(counts), 1)
    bars = "".join(
        f'<rect x="{index * step:.2f}" y="{24 - 24 * count / largest:.2f}" width="{step * 0.86:.2f}" '
        f'height="{24 * count / largest:.2f}"/>'
        for index, count in enumerate(counts)
        if count
    )
    opening = f'<svg class="spark" viewBox="0 0 96 25" role="img" aria-label="{escape(label)}">'
    return Markup(f'{opening}<path d="M0 24.5H96"/>{bars}</svg>')  # noqa: S704  the label is escaped, the rest is numbers


@contextmanager
def styled(name: str, paint: Mapping[str, str] | None = None) -> Iterator[None]:
    """Applies the report's style, whatever the caller's own Matplotlib settings are, and restores those.

    `paint` gives colours for the stand-ins, where what is drawn is no part of a page.
    """
    colours = {key: (paint or {}).get(value, value) for key, value in _STYLE.items() if isinstance(value, str)}
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**_STYLE, **colours, "svg.hashsalt": name})
        yield


def _empty(width: int, height: int) -> Figure:
    """Returns a figure whose unit is the CSS pixel."""
    size = (width / POINTS_PER_INCH, height / POINTS_PER_INCH)
    return Figure(figsize=size, layout="constrained", facecolor="none")


def empty_axes(width: int, height: int) -> tuple[Figure, Axes]:
    """Returns a figure of so many CSS pixels, and its axes."""
    figure = _empty(width, height)
    return figure, figure.add_subplot()


def _square(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Returns axes from 0 to 1 with the diagonal."""
    figure, axes = empty_axes(230, 230)
    axes.plot((0, 1), (0, 1), color=MUTED, linewidth=1, dashes=(2, 3))
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel=x_label, ylabel=y_label)
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.grid()
    return figure, axes


def _draw_group(axes: Axes, row: int, group: Group, most: int) -> None:
    logarithmic = axes.get_xscale() == "log"
    for place, interval in enumerate(group.intervals):
        y = row + (0.66 * ((place + 0.5) / most - 0.5) if most > 1 else 0.0)
        look, estimate, ends = LOOKS[interval.look], interval.estimate, [interval.low, interval.high]
        known = [end for end in ends if end is not None]
        marker = look.marker
        if logarithmic:
            marker = "<" if estimate < 1 / _WIDEST else ">" if estimate > _WIDEST else marker
            estimate, known = _within(estimate), [_within(end) for end in known]
        if len(known) == 2:
            axes.plot(known, (y, y), color=look.colour, linewidth=1.8, solid_capstyle="butt")
        size = 7 if marker == "o" else 6
        axes.plot(estimate, y, marker, color=look.colour, markersize=size, mec=SURFACE, mew=1, clip_on=False)
    if not group.intervals:
        axes.text(0.5, row, "cannot be estimated", transform=axes.get_yaxis_transform(), ha="center", va="center")


def _handles(looks: Sequence[str]) -> list[Line2D]:
    chosen = [LOOKS[key] for key in looks]
    return [Line2D([], [], color=look.colour, marker=look.marker, label=look.label) for look in chosen]


def _within(effect: float) -> float:
    return min(max(effect, 1 / _WIDEST), _WIDEST)


def _octaves(axes: Axes, values: Sequence[float | None]) -> None:
    """Makes the axis logarithmic over the values, with at most seven ticks at powers of two and 1 among them."""
    shown = [_within(value) for value in values if value is not None]
    lowest, highest = min([*shown, 0.5]), max([*shown, 2.0])
    first, last = math.floor(math.log2(lowest)), math.ceil(math.log2(highest))
    step = max(1, math.ceil((last - first) / 6))
    ticks = [2.0**exponent for exponent in range(first, last + 1) if exponent % step == 0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(lowest / 1.1, highest * 1.1)
    axes.set_xticks(ticks, [f"{tick:.2g}" if tick < 1 else f"{tick:.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _spoken(group: Group) -> str:
    def one(interval: Interval) -> str:
        ends = "" if interval.low is None else f" ({interval.low:.2f} to {interval.high:.2f})"
        label = f"{LOOKS[interval.look].label} " if len(group.intervals) > 1 else ""
        return f"{label}{interval.estimate:.2f}{ends}"

    return ", ".join(one(interval) for interval in group.intervals) or "cannot be estimated"


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST_LABEL else label[: _LONGEST_LABEL - 1] + "…"


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def finished(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Returns a drawn figure as an SVG element with a title and a description, its ids unique to `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    drawn = re.sub(r"<style.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    for here, there in (('id="', f'id="{name}-'), ('href="#', f'href="#{name}-'), ("url(#", f"url(#{name}-")):
        drawn = drawn.replace(here, there)
    for colour, variable in _VARIABLES.items():
        drawn = drawn.replace(colour, variable)
    width, height = (round(inches * POINTS_PER_INCH) for inches in figure.get_size_inches())
    opening = (
        f'<svg class="plot" viewBox="0 0 {width} {height}" style="max-width: {_GROWTH * width:.0f}px" role="img" '
        f'aria-labelledby="{name}-title {name}-description"><title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return Markup(opening + drawn)  # noqa: S704  Matplotlib and `escape` have escaped every text in it
