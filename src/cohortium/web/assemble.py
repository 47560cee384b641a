"""From a result to the report's sections."""

from cohortium.coordinator.result import Result, headline, losses
from cohortium.core.features import BinaryTarget, Number, NumberTarget
from cohortium.core.study import Study
from cohortium.guarantees import protection
from cohortium.learning.coefficients import CoefficientFit
from cohortium.learning.descriptive import NumberSummary, Summary
from cohortium.learning.evaluation import Comparison
from cohortium.learning.model import GlobalModel
from cohortium.learning.network import NetworkFit
from cohortium.learning.quantile import decimals
from cohortium.plan import Plan
from cohortium.web import report

_EFFECTS = {"logistic": "odds ratio", "poisson": "rate ratio", "linear": "difference"}


def assemble(
    result: Result,
    plan: Plan,
    comparison: tuple[Comparison, ...] = (),
) -> report.Report:
    """Returns the report of a run, with held-out evaluations if they were made."""
    study, simulated = result.study, result.simulated
    sites = len(plan.sites)
    return report.Report(
        header=report.Header(
            study=study.name,
            version=study.version,
            study_id=result.study_id,
            purpose=study.purpose.summary,
            sites=tuple(
                report.SiteCount(name=name, training=count)
                for name, count in (simulated.patients.items() if simulated else ())
            ),
            engine="local engine (one process, the messages of a network)" if simulated else None,
            seed=simulated.seed if simulated else None,
        ),
        headline=report.Headline(sentence=headline(result, comparison), left="1 masked vector a round"),
        comparison=comparison,
        model=None if isinstance(result.outcome, Summary) else _model(result, result.outcome),
        wire=report.Wire(
            sample=simulated.sample if simulated else None,
            traffic=tuple(
                report.TrafficRound(
                    round=record.number,
                    values=record.values,
                    sent=record.bytes_up // sites,
                    received=record.bytes_down // sites,
                )
                for record in result.rounds
            ),
        ),
        summary=tuple(_table_one(result.outcome, study)) if isinstance(result.outcome, Summary) else (),
        protection=protection(plan),
    )


def _model(result: Result, model: GlobalModel) -> report.FittedModel:
    objective = tuple(record.objective for record in result.rounds if record.objective is not None)
    lost = "".join(f" {loss}." for loss in losses(result))
    if isinstance(model.fit, NetworkFit):
        label = "mean training loss"
        note = (
            f"A network with {sum(weight.size for weight in model.fit.weights):,} parameters; it has no coefficients."
        )
        return report.FittedModel(note=note + lost, objective=objective, objective_label=label)
    fit, study = model.fit, result.study
    if isinstance(fit, CoefficientFit):
        bare = [report.Coefficient(name=n, estimate=b) for n, b in zip(fit.names, fit.coefficients, strict=True)]
        return report.FittedModel(
            coefficients=tuple(bare[1:]),
            intercept=bare[0],
            effect=_EFFECTS[fit.kind],
            exponentiate=fit.kind != "linear",
            note=f"{_note(study)} Trained by '{study.training.algorithm}', which gives no standard errors." + lost,  # type: ignore[union-attr]
            objective=objective,
            objective_label="mean loss",
        )
    rows = [
        report.Coefficient(name=name, estimate=estimate, standard_error=error, low=low, high=high, p=p)
        for name, estimate, error, low, high, p in zip(
            fit.names, fit.coefficients, fit.errors, fit.lower, fit.upper, fit.p_values, strict=True
        )
    ]
    return report.FittedModel(
        coefficients=tuple(rows[1:]),
        intercept=rows[0],
        effect=_EFFECTS[fit.kind],
        exponentiate=fit.kind != "linear",
        confidence=study.model.confidence,  # type: ignore[union-attr]  # a GlmFit comes from a Regression
        note=_note(study) + lost,
        objective=objective,
        objective_label="minus log-likelihood" if fit.kind != "linear" else "half the sum of squares at zero",
    )


def _note(study: Study) -> str:
    target = study.cohort.target
    unit = f" in {target.unit}" if isinstance(target, NumberTarget) else ""
    ridge = study.model.penalty.l2  # type: ignore[union-attr]
    scale = study.preprocessing.scale
    penalty = f" A ridge penalty of {ridge:g} on the '{scale}' scale shrinks them a little." if ridge else ""
    what = f"'{target.name}' being '{target.levels[1]}'" if isinstance(target, BinaryTarget) else f"the target{unit}"
    return f"Effects on {what}: of one unit of a number, or of a level against the first.{penalty}"


def _table_one(summary: Summary, study: Study) -> "list[report.FeatureSummary]":
    rows: list[report.FeatureSummary] = []
    for feature in summary.features:
        if isinstance(feature, NumberSummary):
            edges = feature.histogram.edges
            rows.append(
                report.NumberSummary(
                    name=feature.name,
                    n=feature.known,
                    missing=feature.missing_rate,
                    unit=_unit(feature.name, study),
                    mean=feature.mean,
                    sd=feature.sd,
                    quantiles=tuple((one.q, round(one.value, decimals(feature.sd))) for one in feature.quantiles),
                    histogram=feature.histogram.counts,
                    low=edges[0],
                    high=edges[-1],
                )
            )
        else:
            least = study.model.small_cells  # type: ignore[union-attr]  # a Summary comes from a Descriptive
            pairs = zip(feature.levels, feature.counts, strict=True)
            levels = tuple((level, count if count or least == 1 else None) for level, count in pairs)
            if feature.hidden:
                levels += (("(withheld)", feature.hidden),)
            rows.append(
                report.CategorySummary(name=feature.name, n=feature.known, missing=feature.missing_rate, levels=levels)
            )
    return rows


def _unit(name: str, study: Study) -> str:
    feature, target = study.cohort.features.get(name), study.cohort.target
    if isinstance(feature, Number):
        return feature.unit
    return target.unit if isinstance(target, NumberTarget) else "count"
