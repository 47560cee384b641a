"""The page that shows a steward what an epsilon costs, before it is approved: one HTML file that needs nothing else."""

from dataclasses import dataclass

from cohortium.core.models import Descriptive
from cohortium.learning.tradeoff import CURVES, Level, Price, Tradeoff, levels, odds, prices, recommended, verdict
from cohortium.web.curves import LOOKS, drawn, picture
from cohortium.web.report import environment

__all__ = ["page", "picture"]
_PRIORS = (0.5, 0.01)


@dataclass(frozen=True)
class _Row:
    """An epsilon's line of the tables; `sure` is how sure one can be at most who began with each prior."""

    epsilon: float | None
    heights: tuple[Level, ...]
    price: Price | None
    sure: tuple[float, ...]


def page(found: Tradeoff) -> bytes:
    """Returns the page. Equal trade-offs give equal bytes."""
    known = {(level.epsilon, level.curve): level for level in levels(found)}
    costs = {price.epsilon: price for price in prices(found)}
    rows = [
        _Row(
            epsilon,
            tuple(known[epsilon, curve] for curve in found.curves),
            None if epsilon is None else costs[epsilon],
            () if epsilon is None else tuple(odds(epsilon, prior) for prior in _PRIORS),
        )
        for epsilon in found.grid
    ]
    price, unit = recommended(found), found.study.privacy.unit
    # somebody who reads the page wants one example: the recommended epsilon, or the largest that was looked at
    example = price.epsilon if price else found.epsilons[-1]
    made = environment()
    made.filters["surely"] = _surely
    text = made.get_template("tradeoff.html").render(
        found=found,
        rows=rows,
        looks=LOOKS,
        meaning={curve: CURVES[curve] for curve in found.curves},
        plot=drawn(found),
        price=price,
        reference=known[None, "distributed"],
        verdict=verdict(found),
        priors=_PRIORS,
        example=next(row for row in rows if row.epsilon == example),
        who={"patient": "a patient", "record": "a single record", "site": "a whole hospital"}[unit],
        unit="hospital" if unit == "site" else unit,
        descriptive=isinstance(found.study.model, Descriptive),
        failed=any(level.failed for row in rows for level in row.heights),
        smallest=min(found.patients.values()),
    )
    return text.encode()


def _surely(share: float) -> str:
    """Returns a probability in percent that is never written as a certainty."""
    return "over 99.9%" if share > 0.999 else f"{100 * share:.3g}%"
