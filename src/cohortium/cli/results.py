"""How results look in a terminal."""

from cohortium.cli.output import Output
from cohortium.coordinator.result import SEED_TELLS, Result, Sample, losses
from cohortium.learning.coefficients import CoefficientFit
from cohortium.learning.descriptive import NumberSummary, Summary
from cohortium.learning.evaluation import Comparison, mean_auc
from cohortium.learning.model import GlobalModel
from cohortium.learning.network import NetworkFit
from cohortium.learning.quantile import Quantile, decimals

_COLUMNS = {"federated": "together", "alone": "alone", "pooled": "pooled rows"}


def show_outcome(output: Output, result: Result, comparison: tuple[Comparison, ...] = ()) -> None:
    """Prints a model's coefficients or a cohort's summary, and the comparison if there is one."""
    if isinstance(result.outcome, Summary):
        show_summary(output, result.outcome)
    else:
        show_model(output, result.outcome)
    if result.privacy:
        promised = result.privacy
        output.say(
            f"Differential privacy: {promised.unit} level, epsilon {promised.epsilon:g} at delta {promised.delta:g}, "
            f"{promised.neighbouring} ({promised.noise} noise shares under the secure sum)"
            + (f"; {SEED_TELLS}" if result.simulated else "")
        )
    if comparison:
        show_comparison(output, comparison, result.study.model.kind)
    up, down = sum(r.bytes_up for r in result.rounds), sum(r.bytes_down for r in result.rounds)
    sites, rounds = len(result.study.sites.include), len(result.rounds)
    output.say(
        f"{rounds} round{'' if rounds == 1 else 's'} in {sum(r.seconds for r in result.rounds):.2f} s; "
        f"each site sent {up // sites:,} bytes and received {down // sites:,}"
    )
    for loss in losses(result):
        output.say(loss)


def show_model(output: Output, model: GlobalModel) -> None:
    """Prints a regression's table, or a network's size."""
    fit = model.fit
    if isinstance(fit, NetworkFit):
        loss = "" if fit.loss is None else f", loss {fit.loss:.4f}"
        output.say(f"A network with {sum(weight.size for weight in fit.weights):,} parameters{loss}")
        return
    if isinstance(fit, CoefficientFit):
        about = "about " if model.study.privacy.epsilon is not None else ""
        title = f"{fit.kind} regression of {about}{fit.patients:,} patients (no standard errors)"
        rows = [[name, f"{estimate:.4f}"] for name, estimate in zip(fit.names, fit.coefficients, strict=True)]
        output.table(title, ["", "coefficient"], rows)
        return
    columns = zip(fit.names, fit.coefficients, fit.errors, fit.lower, fit.upper, fit.p_values, strict=True)
    rows = [
        [name, f"{estimate:.4f}", f"{error:.4f}", f"{low:.4f}", f"{high:.4f}", f"{p:.2g}"]
        for name, estimate, error, low, high, p in columns
    ]
    title = f"{fit.kind} regression of {fit.patients:,} patients"
    level = f"{model.study.model.confidence:.0%}"  # type: ignore[union-attr]  # a GlmFit comes from a Regression
    output.table(title, ["", "coefficient", "std. error", f"{level} low", f"{level} high", "p"], rows)


def show_summary(output: Output, summary: Summary) -> None:
    """Prints a cohort's Table 1."""
    numbers = [feature for feature in summary.features if isinstance(feature, NumberSummary)]
    if numbers:
        title, spread = f"Numbers, {summary.n:,} patients", ["known", "missing", "mean", "sd"]
        output.table(title, ["", *spread], [_moments(feature) for feature in numbers])
        quantiles = [f"{quantile.q:.0%}" for quantile in numbers[0].quantiles]
        rows = [[feature.name, *(_quantile(one, feature.sd) for one in feature.quantiles)] for feature in numbers]
        output.table("Quantiles (± where they are uncertain)", ["", *quantiles], rows)
    levels = []
    for feature in summary.features:
        if not isinstance(feature, NumberSummary):
            for level, count in zip(feature.levels, feature.counts, strict=True):
                # a zero beside withheld patients may be one of theirs
                sure = count > 0 or not feature.hidden
                share = f"{count / feature.known:.1%}" if feature.known and sure else "–"
                levels.append([f"{feature.name}: {level}", f"{count:,}" if sure else "–", share])
            if feature.hidden:
                levels.append([f"{feature.name}: (withheld)", f"{feature.hidden:,}", ""])
    if levels:
        output.table("Categories", ["", "patients", "share"], levels)


def show_sample(output: Output, sample: Sample, entries: int = 6) -> None:
    """Prints the first entries of a site's vector before and after masking."""
    rows = [
        [name, f"{plain if plain < 1 << (sample.bits - 1) else plain - (1 << sample.bits):,}", f"{masked:,}"]
        for name, plain, masked in zip(sample.names, sample.plain, sample.masked, strict=True)
    ]
    title = f"What the coordinator saw of {sample.site} in round {sample.round}"
    output.table(title, [f"first {entries} of {len(rows)}", "computed, stays", "left the hospital"], rows[:entries])


def show_comparison(output: Output, comparison: tuple[Comparison, ...], name: str) -> None:
    """Prints each site's held-out AUC together, alone and pooled."""
    rows = [[row.site, *(_auc(row, model) for model in _COLUMNS)] for row in comparison]
    means = [mean_auc(comparison, model) for model in _COLUMNS]
    rows.append(["mean", *("–" if mean is None else f"{mean:.3f}" for mean in means)])
    output.table(f"{name}: AUC on held-out patients, 95% interval", ["site", *_COLUMNS.values()], rows)


def _auc(row: Comparison, model: str) -> str:
    one = row.models[model]
    if one.auc is None:
        return "–"
    interval = "" if one.auc_low is None else f" ({one.auc_low:.2f}–{one.auc_high:.2f})"
    return f"{one.auc:.3f}{interval}"


def _moments(feature: NumberSummary) -> list[str]:
    places = decimals(feature.sd)
    moments = ("–" if value is None else f"{value:.{places}f}" for value in (feature.mean, feature.sd))
    return [feature.name, f"{feature.known:,}", f"{feature.missing_rate:.1%}", *moments]


def _quantile(quantile: Quantile, sd: float | None) -> str:
    places = decimals(sd)
    within = f"{quantile.within:.{places}f}"
    return f"{quantile.value:.{places}f}" + (f" ±{within}" if float(within) else "")
