"""An audit of a study's privacy as a picture, and as the section that a model's card gives it."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from cohortium.coordinator.audit import Audit, CanaryTest, MembershipTest, figures, sentences
from cohortium.web.curves import LIGHT
from cohortium.web.plots import ALONE, FEDERATED, MUTED, POOLED, SURFACE, styled

BLUE, ORANGE, GREEN, GREY = (LIGHT[colour] for colour in (FEDERATED, ALONE, POOLED, MUTED))
_STYLE: dict[Any, Any] = {"axes.titleweight": "bold", "axes.titlepad": 26}
_LEAST = 1e-3
"""Rates below it rest on too few patients to be drawn."""


def section(audit: Audit) -> str:
    """Returns the section "Attack results" of a model's card, in Markdown."""
    rows = [f"| {' | '.join(cell or '–' for cell in row)} |" for row in figures(audit)]
    table = ["| tried | promised | measured | verdict |", "|---|---|---|---|", *rows, ""] if rows else []
    said = [f"- {_plain(sentence)}" for sentence in sentences(audit)]
    return "\n".join(["## Attack results", "", *table, *said])


def picture(audit: Audit) -> bytes:
    """Returns the audit as a PNG: the canaries' scores, and the ROC curve of the membership attack."""
    drawn = [test for test in (audit.canaries, audit.membership) if test is not None]
    with styled("audit", LIGHT), mpl.rc_context(_STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.04)
        figure = Figure(figsize=(5.6 * len(drawn), 4.5), layout=layout, facecolor=LIGHT[SURFACE])
        grid = figure.subplots(1, len(drawn), squeeze=False)[0]
        for axes, test in zip(grid, drawn, strict=True):
            if isinstance(test, CanaryTest):
                _canaries(axes, test)
            else:
                _membership(axes, test)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _canaries(axes: Axes, test: CanaryTest) -> None:
    """Draws the scores of both kinds of canaries as two histograms over each other."""
    both = np.array(test.included + test.left_out)
    edges = np.linspace(both.min(), both.max(), max(8, min(36, len(both) // 12)) + 1).tolist()
    for values, colour, label in ((test.left_out, ORANGE, "left out"), (test.included, BLUE, "took part")):
        axes.hist(values, edges, color=colour, alpha=0.28, linewidth=0)
        axes.hist(values, edges, histtype="step", color=colour, linewidth=1.6, label=f"{label} ({len(values):,})")
    axes.set_title("Canaries: who took part?")
    _under(axes, f"epsilon at least {test.lower:.2f} ({test.confidence:.0%} confidence), promised {test.epsilon:g}")
    axes.set_xlabel("score: log likelihood ratio of a canary's sums")
    axes.set_ylabel("canaries")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.16)
    axes.legend(loc="upper right", ncols=2, handlelength=1.2, borderaxespad=0, columnspacing=1.2)
    axes.grid(axis="y")
    axes.margins(x=0.02)


def _membership(axes: Axes, test: MembershipTest) -> None:
    """Draws the attack's ROC curve on logarithmic axes below what the promise admits."""
    least = min(0.1, max(_LEAST, 1 / max(1, test.patients - test.members)))
    rates = np.geomspace(least, 1, 200)
    if test.bound is not None:
        axes.fill_between(test.bound.fpr, test.bound.tpr, 1, color=GREEN, alpha=0.09, linewidth=0)
        axes.plot(
            test.bound.fpr,
            test.bound.tpr,
            color=GREEN,
            linewidth=1.6,
            dashes=(5, 2),
            label="upper limit",
        )
    axes.plot(rates, rates, color=GREY, linewidth=1, dashes=(1, 2), label="a coin")
    axes.step(test.roc.fpr, test.roc.tpr, where="post", color=BLUE, linewidth=1.9, label="the attack")
    error = [[max(0.0, test.tpr - test.tpr_low)], [max(0.0, test.tpr_high - test.tpr)]]
    axes.errorbar(test.fpr, test.tpr, error, color=BLUE, marker="o", markersize=5, capsize=3, linewidth=1.4)
    axes.set(xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:g}%"))
    axes.set_title("Membership inference on the model")
    area = f"AUC {test.auc:.3f} ({test.auc_low:.3f} to {test.auc_high:.3f})"
    _under(axes, f"{area}; {test.tpr:.1%} found at {test.fpr:.0%} false alarms")
    axes.set_xlabel("false alarms: share of other patients")
    axes.set_ylabel("found: share of members")
    axes.grid(which="major")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", handlelength=2.4, borderaxespad=0.3)


def _under(axes: Axes, text: str) -> None:
    """Writes a line under a title."""
    axes.annotate(text, (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points", color=GREY, fontsize=10)


def _plain(text: str) -> str:
    """Returns text that Markdown takes for nothing else."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text).replace("\n", " ")
