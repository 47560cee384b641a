"""What a study guarantees and what it does not, before anything runs: for the steward who is asked to approve it."""

import math
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from cohortium.core.events import Sampled
from cohortium.core.models import Descriptive
from cohortium.core.protection import Compression
from cohortium.plan import Phase, Plan, Traffic

_PROTOCOLS = {
    "masking": "masks that cancel in the sum",
    "rlwe": "threshold homomorphic encryption (RLWE)",
    "ckks-single-key": "homomorphic encryption (CKKS) under one key that every hospital holds",
}


@dataclass(frozen=True)
class Security:
    """The protection of a study's secure sums, as figures.

    Attributes:
        protocol: the study's word for it.
        sites: how many hospitals the study names.
        threshold: how many of them must stay to the end of a round.
        dropouts: how many may be lost in a round.
        curious: how many may collude with a coordinator that follows the protocol; None: any single one reads updates.
        malicious: how many may collude with one that lies.
        bytes_a_round: the most bytes that a hospital sends in a round of each phase.
    """

    protocol: str
    sites: int
    threshold: int
    dropouts: int
    curious: int | None
    malicious: int | None
    bytes_a_round: dict[str, int]


def security(plan: Plan) -> Security:
    """Returns the protection of a plan's secure sums."""
    aggregation, withstands = plan.study.aggregation, plan.tolerance
    single_key = aggregation.protocol == "ckks-single-key"
    return Security(
        aggregation.protocol,
        withstands.sites,
        withstands.threshold,
        aggregation.dropouts,
        None if single_key else withstands.curious,
        None if single_key else withstands.malicious,
        {phase.name: plan.traffic(phase.layout).total for phase in plan.phases},
    )


@dataclass(frozen=True)
class Promise:
    """The differential privacy of a study, as figures, for whoever sees its sums, its rounds and its result.

    Attributes:
        unit: whose data is protected: a patient's, a record's or a whole site's.
        epsilon, delta: what the study promises.
        neighbouring: the change of the data that it is promised for.
        sites_per_patient: the most hospitals at which one patient may be.
        dropouts, colluding: the hospitals that may be lost in a round, and those that may give their noise away.
        sampling: the share of units that is drawn secretly for a round of training.
        noise: the distribution of a hospital's share.
        accounting: "exact" (the Gaussian's own curve) or "pld" (privacy loss distributions).
        spent: the epsilon at `delta` that the accountant finds for everything that a run may release.
        spent_rdp: the same by Renyi orders, a second opinion that is never smaller by more than rounding.
        releases: everything that a run may release, as events.
        share: each hospital's share of the deviation that the sum must carry.
        excess: the deviation that a sum over all hospitals carries, relative to what it must.
    """

    unit: str
    epsilon: float
    delta: float
    neighbouring: str
    sites_per_patient: int
    dropouts: int
    colluding: int
    sampling: float
    noise: str
    accounting: str
    spent: float
    spent_rdp: float
    releases: tuple[dict[str, Any], ...]
    share: float
    excess: float


def promise(plan: Plan) -> Promise | None:
    """Returns the differential privacy that a study promises, computed from its plan; None where it promises none."""
    privacy, rule = plan.study.privacy, plan.noise
    if rule is None:
        return None
    from cohortium.privacy.accountant import epsilon

    assert privacy.epsilon is not None and privacy.delta is not None
    return Promise(
        unit=privacy.unit,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        neighbouring=privacy.neighbouring,
        sites_per_patient=privacy.sites_per_patient,
        dropouts=plan.study.aggregation.dropouts,
        colluding=privacy.colluding,
        sampling=privacy.sampling,
        noise="rounded Gaussian",
        accounting="exact" if privacy.sampling == 1 else "pld",
        spent=epsilon(plan.releases, privacy.delta),
        spent_rdp=epsilon(plan.releases, privacy.delta, "rdp"),
        releases=tuple(to_builtins(event) for event in plan.releases),
        share=rule.honest**-0.5,
        excess=(len(plan.sites) / rule.honest) ** 0.5,
    )


def protection(plan: Plan) -> tuple[tuple[str, str], ...]:
    """Returns what a study guarantees and what it does not, as pairs of a question and its answer."""
    study, cohort = plan.study, plan.study.cohort
    vectors = "; ".join(_vector(plan, phase) for phase in plan.phases)
    rows = [
        ("Leaves each hospital", f"one protected vector a round. {vectors[0].upper()}{vectors[1:]}"),
        ("Protocol", _protocol(plan)),
        ("Who can read it", _readers(plan)),
        ("If hospitals drop", _dropouts(plan)),
        *_selection(plan),
        *_buffers(plan),
        *_privacy(plan),
        ("Precision", _precision(plan)),
    ]
    if isinstance(study.model, Descriptive) and plan.noise is None:
        least = study.model.small_cells
        rule = (
            f"a hospital sends no count from 1 to {least - 1}; the mean and spread of a number that takes few values "
            "may still give one away (disclosure control, not differential privacy)"
        )
        rows.append(("Small cells", rule if least > 1 else "counts of any size are sent"))
    fewest = f"{cohort.minimum:,}" if cohort.records == "one" else f"at least {cohort.minimum:,} patients and at most"
    most = f"to {cohort.maximum:,} patients" if cohort.records == "one" else f"{cohort.maximum:,} records"
    rows.append(("Takes part", f"a hospital with {fewest} {most} in the cohort"))
    return tuple(rows)


def _vector(plan: Plan, phase: Phase) -> str:
    traffic = plan.traffic(phase.layout)
    most = "at most " if phase.name == "quantiles" else ""
    rounds = f"at most {phase.rounds} round{'' if phase.rounds == 1 else 's'}"
    return f"{phase.name}: {most}{phase.values:,} numbers ({_bytes(traffic)}) a round, {rounds}"


def _bytes(traffic: Traffic) -> str:
    opening = traffic.total - traffic.payload
    return f"{traffic.payload:,} bytes" + (f" and up to {opening:,} to open the sum" if opening else "")


def _protocol(plan: Plan) -> str:
    withstands, bits = plan.tolerance, plan.quantiser(plan.phases[-1].layout).bits
    return (
        f"{plan.study.aggregation.protocol}: {_PROTOCOLS[plan.study.aggregation.protocol]}; threshold "
        f"{withstands.threshold} of {withstands.sites} hospitals{_asked(plan)}; sums {bits} bits wide"
    )


def _asked(plan: Plan) -> str:
    return " that a round of training asks" if plan.study.sites.per_round else ""


_WAYS = {
    "random": "as public randomness draws them",
    "adaptive": "those that answer fast, and each of them again before long",
}


def _selection(plan: Plan) -> list[tuple[str, str]]:
    sites = plan.study.sites
    if sites.per_round is None or sites.selection is None:
        return []
    text = (
        f"preprocessing asks all {len(plan.sites)} hospitals, each round of training at least {sites.per_round}, "
        f"{_WAYS[sites.selection]}. A coordinator that lies chooses them as it likes, so every figure here is for its "
        f"worst choice. {_of_two_sums(plan, 'selections')}"
    )
    return [("Who is asked", text)]


def _buffers(plan: Plan) -> list[tuple[str, str]]:
    buffer, sites = plan.buffer, len(plan.sites)
    if buffer is None:
        return []
    text = (
        f"a round of training is a buffer: it closes with the first {buffer.buffer} of {sites} hospitals. Who is later "
        f"contributes to the next one, and its work counts (1 + s)^-{buffer.staleness:g} when s rounds have passed "
        f"since it began; after {buffer.latest} it is dropped. The coordinator learns who was late, and one that lies "
        "may have the same work protected for several rounds, each time in a sum over as many hospitals as any"
    )
    return [("Asynchronous", text)]


def _readers(plan: Plan) -> str:
    withstands = plan.tolerance
    if plan.study.aggregation.protocol == "ckks-single-key":
        return (
            "single key: any hospital can decrypt any update it sees, and a coordinator that lies gets one decrypted. "
            "A coordinator that follows the protocol reads sums only"
        )
    # of the threshold's survivors, all colluding but one
    bare = (
        f" With {withstands.curious}, a round of its last {withstands.threshold} survivors is a sum over one honest "
        "hospital, and hides nothing of it."
        if withstands.curious == withstands.threshold - 1
        else ""
    )
    lying = (
        f"or up to {withstands.malicious} if it lies"
        if withstands.malicious < withstands.curious
        else "also if it lies"
    )
    return (
        f"nobody. The coordinator together with up to {withstands.curious} of the {len(plan.sites)} hospitals, "
        f"{lying} to the others, learns only the sum over the remaining survivors (at least two honest), given pinned "
        f"identity keys and signed survivor sets.{bare} {_of_a_sum(plan)} That a hospital takes part or refuses is not "
        "hidden"
    )


def _of_a_sum(plan: Plan) -> str:
    if plan.noise is None:
        return "What a sum reveals is not limited: a lying coordinator chooses the coefficients that it is taken at."
    colluding = plan.study.privacy.colluding
    return (
        f"What the sums reveal of a {plan.study.privacy.unit} is bounded by epsilon, whatever the coordinator asks "
        f"for, as long as at most {colluding} hospitals collude with it."
    )


def _dropouts(plan: Plan) -> str:
    withstands = plan.tolerance
    lost = withstands.sites - withstands.threshold
    if not lost:
        return f"a round needs all {withstands.sites}{_asked(plan)}: if one is missing it yields nothing"
    return (
        f"up to {lost} of {withstands.sites} may be lost in any round, at any step; below {withstands.threshold} it "
        f"yields nothing. {_of_two_sums(plan, 'survivors')}"
    )


def _of_two_sums(plan: Plan, what: str) -> str:
    if plan.noise is not None:
        return f"Sums over different {what} differ by one hospital's vector under noise, which epsilon counts in"
    only = "dropouts: 0" if plan.study.sites.per_round is None else "asking all hospitals in every round"
    return (
        f"Sums over different {what} at the same model differ by one hospital's exact vector: a coordinator that "
        f"lies can ask for them, and an honest run comes near it when the model hardly moves. Only {only} prevents "
        "this, or noise"
    )


_NEIGHBOURS = {"add-or-remove": "adding or removing", "replace": "replacing"}
_METHODS = {"exact": "the Gaussian's exact curve", "pld": "privacy loss distributions (PLD)"}


def _privacy(plan: Plan) -> list[tuple[str, str]]:
    promised, unit = promise(plan), plan.study.privacy.unit
    if promised is None:
        text = (
            "no differential privacy: the sums and the result are exact, and what they reveal of a patient is not "
            f"bounded. Unit: {unit}"
        )
        return [("Privacy", text)]
    places = "one hospital" if promised.sites_per_patient == 1 else f"at most {promised.sites_per_patient} hospitals"
    where = "" if unit == "site" else f" who is at {places}" if unit == "patient" else f" kept at {places}"
    drawn = f"; each round draws a secret {promised.sampling:.3g} of them" if promised.sampling < 1 else ""
    change = f"{_NEIGHBOURS[promised.neighbouring]} one {unit}{where}"
    promise_text = (
        f"{unit} level: epsilon {promised.epsilon:g}, delta {promised.delta:g}, for {change}{drawn}. "
        f"Everything that a run may release comes to epsilon {rounded_up(promised.spent)} by "
        f"{_METHODS[promised.accounting]} ({rounded_up(promised.spent_rdp)} by Renyi orders)"
    )
    return [("Privacy", promise_text), ("Noise", _noise(plan, promised)), ("Not covered", _UNCOVERED)]


_UNCOVERED = (
    "that a hospital takes part, or refuses because too few patients pass or its data break the contract; a colluding "
    "hospital's own patients; whatever is learned of a patient without that patient's data"
)


def _noise(plan: Plan, promised: Promise) -> str:
    rounds = "; ".join(f"{phase.name} {_multiplier(plan, phase):.4g}" for phase in plan.phases)
    return (
        f"each hospital adds a share of integers ({promised.noise}), {promised.share:.3g} of the deviation that a sum "
        f"must carry, so that it does with {promised.dropouts} hospitals lost and {promised.colluding} colluding; a "
        f"sum over all carries {promised.excess:.2f} of it. Noise multipliers: {rounds}"
    )


def _multiplier(plan: Plan, phase: Phase) -> float:
    gaussian = plan.stages(phase.layout).events()[0]
    return gaussian.event.multiplier if isinstance(gaussian, Sampled) else gaussian.multiplier  # type: ignore[union-attr]


def rounded_up(epsilon: float) -> str:
    """Returns an epsilon with three decimals, rounded up: a guarantee is not rounded down."""
    return f"{math.ceil(epsilon * 1000 - 1e-9) / 1000:.3f}"


def _precision(plan: Plan) -> str:
    compression = plan.study.aggregation.compression
    if compression is not None:
        return _compressed(compression)
    largest = max(phase.precision or 0.0 for phase in plan.phases)
    return f"quantising changes a sum by at most {largest:.1g} of its bound"


def _compressed(compression: Compression) -> str:
    scale = f"on the scale of the norm {compression.norm:g}" if compression.norm else "on their bound's scale"
    rotated = "rotated and then " if compression.rotation else ""
    return f"model updates are {rotated}rounded at random to {compression.levels} bits {scale}; other numbers are exact"
