"""Utility against epsilon, as inline SVG for a page and as a PNG picture."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cohortium.learning.tradeoff import Level, Tradeoff, levels, recommended
from cohortium.web.plots import (
    ALONE,
    FEDERATED,
    GRID,
    INK,
    LOCAL,
    MUTED,
    POINTS_PER_INCH,
    POOLED,
    SURFACE,
    Look,
    empty_axes,
    finished,
    styled,
)

LOOKS: Mapping[str, Look] = {
    "distributed": Look("distributed: this study", FEDERATED, "o", "-"),
    "central": Look("central", POOLED, "D", ":"),
    "local": Look("local", LOCAL, "^", "-."),
    "alone": Look("each hospital alone", ALONE, "s", "--"),
}
LIGHT: Mapping[str, str] = {
    INK: "#1c1f24",
    MUTED: "#5b626d",
    GRID: "#dcdcd6",
    SURFACE: "#ffffff",
    FEDERATED: "#0069a8",
    ALONE: "#c25400",
    POOLED: "#00795a",
    LOCAL: "#8a4bb0",
}
"""The page's light colours, for a picture that stands by itself."""
WIDTH, HEIGHT, SCALE = 720, 400, 2
"""The plot in CSS pixels, and how many pixels of the picture each of them gets."""
_APART = 0.07
"""Curves are moved this far from each other, in octaves, so that their error bars stand side by side."""
_BREAK = 1.35
"""Octaves from the largest epsilon to the study without noise."""
_ROOM = 0.06


def drawn(found: Tradeoff) -> Markup:
    """Returns the plot for a page, whose style names the colours."""
    with styled("tradeoff"):
        figure = _figure(found, lambda colour: colour)
        heights = [level for level in levels(found) if level.curve == "distributed"]
        spoken = ", ".join(f"{_named(level.epsilon)} {level.mean:.3f}" for level in heights)
        return finished(
            figure, "tradeoff", _title(found), f"The study itself, {found.utility.name} at each epsilon: {spoken}."
        )


def picture(found: Tradeoff) -> bytes:
    """Returns the plot as a PNG picture of `SCALE` times its size on a page."""
    with styled("tradeoff", LIGHT):
        figure = _figure(found, lambda colour: LIGHT.get(colour, colour), f"{found.study.name}: {_title(found)}")
        figure.set_facecolor(LIGHT[SURFACE])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=SCALE * POINTS_PER_INCH, metadata={"Software": None})
        return buffer.getvalue()


Paint = Callable[[str], str]


def _figure(found: Tradeoff, paint: Paint, title: str | None = None) -> Figure:
    figure, axes = empty_axes(WIDTH, HEIGHT)
    place = {epsilon: math.log2(epsilon) for epsilon in found.epsilons}
    end = place[found.epsilons[-1]] + _BREAK
    low, high = _limits(found)
    axes.set_ylim(low, high)
    axes.set_xlim(place[found.epsilons[0]] - 0.45, end + 0.45)
    axes.set_xticks([*place.values(), end], [*(f"{epsilon:g}" for epsilon in place), "no noise"])
    axes.set_xlabel("epsilon (logarithmic): more privacy on the left, less on the right")
    axes.set_ylabel(found.utility.name)
    axes.grid(axis="y")
    _reference(axes, found, end, paint)
    for index, curve in enumerate(found.curves):
        heights = [level for level in levels(found) if level.curve == curve]
        shift = _APART * (index - (len(found.curves) - 1) / 2)
        _curve(axes, heights, [*(x + shift for x in place.values()), end + shift], LOOKS[curve], paint)
    _recommendation(axes, found, place, paint)
    _broken(axes, end - _BREAK / 2, paint)
    handles = [_handle(LOOKS[curve], paint) for curve in found.curves]
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=4, columnspacing=1.6, handlelength=2.6, title=title
    )
    legend.set_alignment("left")
    legend.get_title().set_fontsize(13)
    return figure


def _curve(axes: Axes, heights: Sequence[Level], places: Sequence[float], look: Look, paint: Paint) -> None:
    colour, front = paint(look.colour), 4 if look.marker == "o" else 3
    floor, ceiling = axes.get_ylim()
    shown = [min(max(level.mean, floor), ceiling) for level in heights]
    # the study without noise is no epsilon, and no line leads to it
    axes.plot(places[:-1], shown[:-1], color=colour, linestyle=look.dashes, linewidth=1.8, zorder=front)
    for x, y, level in zip(places, shown, heights, strict=True):
        axes.plot((x, x), (level.low, level.high), color=colour, linewidth=1.3, zorder=front, solid_capstyle="butt")
        marker = look.marker if y == level.mean else ("v" if level.mean < floor else "^")
        axes.plot(x, y, marker, color=colour, markersize=7, mec=paint(SURFACE), mew=0.9, zorder=front, clip_on=False)


def _reference(axes: Axes, found: Tradeoff, end: float, paint: Paint) -> None:
    """Draws what the study reaches without noise, and the loss that is allowed, as a band."""
    best = next(level.mean for level in levels(found) if (level.curve, level.epsilon) == ("distributed", None))
    least = best - found.allowed if found.utility.higher_is_better else best + found.allowed
    axes.axhspan(min(best, least), max(best, least), color=paint(GRID), alpha=0.45, linewidth=0, zorder=0)
    axes.axhline(best, color=paint(MUTED), linewidth=1, dashes=(2, 3), zorder=1)
    side = "bottom" if found.utility.higher_is_better else "top"
    axes.annotate(
        f"loss of {found.allowed:g} allowed",
        (axes.get_xlim()[1], least),
        (-4, 2 if side == "bottom" else -2),
        textcoords="offset points",
        ha="right",
        va=side,
        color=paint(MUTED),
        size=10,
    )


def _recommendation(axes: Axes, found: Tradeoff, place: Mapping[float, float], paint: Paint) -> None:
    price = recommended(found)
    if price is None:
        return
    x = place[price.epsilon]
    axes.axvspan(x - 0.22, x + 0.22, color=paint(FEDERATED), alpha=0.1, linewidth=0, zorder=0)
    axes.annotate(
        f"recommended: {price.epsilon:g}",
        (x if x > min(place.values()) else x - 0.2, 1),
        (0, -3),
        xycoords=axes.get_xaxis_transform(),
        textcoords="offset points",
        ha="center" if x > min(place.values()) else "left",
        va="top",
        color=paint(INK),
        weight="bold",
        size=10.5,
    )


def _broken(axes: Axes, x: float, paint: Paint) -> None:
    """Marks where the axis is broken."""
    line: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(),
        "clip_on": False,
        "zorder": 5,
        "solid_capstyle": "butt",
    }
    axes.plot((x - 0.035, x + 0.035), (0, 0), color=paint(SURFACE), linewidth=3, **line)
    for shift in (-0.05, 0.02):
        axes.plot((x + shift, x + shift + 0.03), (-0.018, 0.018), color=paint(MUTED), linewidth=1, **line)


def _limits(found: Tradeoff) -> tuple[float, float]:
    """Returns the ends of the utility's axis: all intervals, but for what cannot be or is much worse than useless."""
    shown = levels(found)
    low, high, useless = min(level.low for level in shown), max(level.high for level in shown), found.utility.useless
    reference = next(level.mean for level in shown if (level.curve, level.epsilon) == ("distributed", None))
    if found.utility.higher_is_better:
        high = min(high, 1.0)
        low = min(max(low, useless - 0.1 * (1 - useless)), reference - found.allowed)
    else:
        low, high = 0.0, max(min(high, useless), found.allowed)
    room = _ROOM * (high - low) or 0.01
    # the recommendation's word stands at the top
    return low - room, high + 2.2 * room


def _handle(look: Look, paint: Paint) -> Line2D:
    colour = paint(look.colour)
    line = Line2D([], [], color=colour, marker=look.marker, label=look.label, mec=paint(SURFACE), markersize=7)
    line.set(linestyle=look.dashes)
    return line


def _title(found: Tradeoff) -> str:
    return f"{found.utility.name} against epsilon, with 95% intervals over {len(found.seeds)} seeds"


def _named(epsilon: float | None) -> str:
    return "without noise" if epsilon is None else f"epsilon {epsilon:g}"
