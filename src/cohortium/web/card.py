"""A model's card: what it is, what it was made of, what it promises, in Markdown."""

from collections.abc import Sequence

from cohortium.core.errors import StudyError
from cohortium.core.features import BinaryTarget, Number
from cohortium.core.study import Study
from cohortium.guarantees import Promise, promise, protection, rounded_up
from cohortium.learning.evaluation import Comparison, mean_auc
from cohortium.learning.model import GlobalModel
from cohortium.plan import compile_study


def card(model: GlobalModel, comparison: Sequence[Comparison] = (), attacks: str = "") -> str:
    """Returns a model's card. It holds no patient's data; what it says of privacy is computed from the study.

    Args:
        comparison: how the model fared on held-out patients, if that was seen to.
        attacks: the section that an audit of the study wrote (`cohortium.web.audit.section`), if there was one.

    Raises:
        StudyError: `attacks` is no such section.
    """
    if attacks and not attacks.startswith(ATTACKS):
        raise StudyError(f"this is no section that an audit wrote: it does not begin with '{ATTACKS}'")
    plan = compile_study(model.study)
    study = plan.study
    sections = [
        _title(study, plan.study_id),
        _section("What it predicts", _use(study)),
        _section("What it was fitted to", _data(study)),
        _section("Performance", _performance(comparison)),
        _section("Differential privacy", _privacy(promise(plan))),
        attacks.strip() or _section(ATTACKS.removeprefix("## "), ["Nobody has attacked it in an audit yet."]),
        _section("Protection", [f"- **{question}**: {answer}." for question, answer in protection(plan)]),
        _section("Limits", _LIMITS),
    ]
    return "\n\n".join(sections) + "\n"


ATTACKS = "## Attack results"
_LIMITS = [
    "- It describes the patients of the hospitals named here, and says nothing of how it fares elsewhere.",
    "- An association in it is no cause.",
    "- It is no medical device: nobody has approved it for decisions on single patients.",
]


def _title(study: Study, study_id: str) -> str:
    return (
        f"# Model card: {_plain(study.name)} v{study.version}\n\n{_plain(study.purpose.summary)}\n\nStudy `{study_id}`"
    )


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines])


def _use(study: Study) -> list[str]:
    target = study.cohort.target
    assert target is not None
    what = (
        f"whether `{target.name}` is `{target.levels[1]}`" if isinstance(target, BinaryTarget) else f"`{target.name}`"
    )
    use = ", ".join(f"`{code}`" for code in study.purpose.use) or "none was stated"
    return [f"- **Predicts**: {what}", f"- **Model**: {study.model.kind}", f"- **Stated data use (GA4GH DUO)**: {use}"]


def _data(study: Study) -> list[str]:
    cohort = study.cohort
    rows = ["| feature | what it is | missing values |", "|---|---|---|"]
    for name, feature in cohort.features.items():
        if isinstance(feature, Number):
            what = f"number from {feature.range[0]:g} to {feature.range[1]:g} ({_plain(feature.unit)})"
        else:
            what = "one of " + ", ".join(_plain(level) for level in feature.levels)
        rows.append(f"| {_plain(name)} | {what} | {feature.missing} |")
    sites = ", ".join(_plain(site) for site in study.sites.include)
    where = f"`{_plain(cohort.where)}`" if cohort.where else "everybody in the dataset"
    return [f"- **Hospitals**: {sites}", f"- **Patients**: {where}", "", *rows]


def _performance(comparison: Sequence[Comparison]) -> list[str]:
    found = mean_auc(comparison, "federated")
    if found is None:
        return ["Not measured on held-out patients in this run."]
    rows = ["| hospital | held-out patients | AUC |", "|---|---|---|"]
    for row in comparison:
        mine = row.models["federated"]
        auc = "-" if mine.auc is None else f"{mine.auc:.3f}"
        rows.append(f"| {_plain(row.site)} | {mine.n} | {auc} |")
    return [f"Mean AUC over hospitals, on patients held out of training: {found:.3f}.", "", *rows]


def _privacy(promised: Promise | None) -> list[str]:
    if promised is None:
        return ["None. What the model and the sums behind it reveal of a single patient is not bounded."]
    return [
        "| | |",
        "|---|---|",
        f"| unit | {promised.unit} |",
        f"| epsilon | {promised.epsilon:g} |",
        f"| delta | {promised.delta:g} |",
        f"| neighbouring data | {promised.neighbouring} |",
        f"| most hospitals of one patient (k_max) | {promised.sites_per_patient} |",
        f"| hospitals that may be lost, and collude | {promised.dropouts}, {promised.colluding} |",
        f"| secret sampling rate | {promised.sampling:g} |",
        f"| noise | {promised.noise} shares of each hospital, added before the secure sum |",
        f"| epsilon by the accountant | {rounded_up(promised.spent)} ({promised.accounting}) |",
        f"| epsilon by Renyi orders, a second opinion | {rounded_up(promised.spent_rdp)} |",
    ]


def _plain(text: str) -> str:
    """Returns text that Markdown takes for nothing else."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#+!|~" else c for c in text).replace("\n", " ")
