"""`cohortium site`: a site's home, its policy, and what its patients' privacy budget was spent on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cohortium import bootstrap
from cohortium.cli import approvals, membership
from cohortium.cli.output import Json, Output, Quiet
from cohortium.privacy.calibrate import Budget
from cohortium.privacy.renyi import Price
from cohortium.site.budget import HIDDEN, SMALL, Accounts, StudyCost, distribution, shown
from cohortium.site.policy import PrivacyPolicy

app = typer.Typer(help="A site's own side: its policy, and its patients' privacy budget.", no_args_is_help=True)

Home = Annotated[
    Path, typer.Argument(metavar="HOME", help="The site's folder: policy, ledger and key.", show_default=False)
]
_BAR = 40
_NOT_LIMITED = "not limited"


@app.command()
def init(path: Home, as_json: Json = False, quiet: Quiet = False) -> None:
    """Begin a site's home: an empty privacy ledger, its key, a policy and a setup to edit."""
    written = bootstrap.create_home(path)
    output = Output(as_json, quiet)
    output.say(f"Wrote {', '.join(map(str, written))}. Keep all of it at the hospital.")
    output.result({"home": str(path), "files": [str(file) for file in written]})


@app.command()
def policy(path: Home, as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what this site allows a study to ask for in privacy."""
    rules = bootstrap.load_policy(path)
    output = Output(as_json, quiet)
    output.say(f"Policy of {path}")
    output.pairs(
        (
            ("Differential privacy", "required of every study" if rules.needs_privacy else "not required"),
            ("Epsilon of a study", _at_most(rules.epsilon)),
            ("Delta of a study", _at_most(rules.delta)),
            ("Privacy units", " or ".join(rules.units)),
            ("Column of patients", rules.patient or _NOT_LIMITED),
            ("Budget of a patient", _budget(rules.budget)),
            ("Colluding hospitals", _at_least("allow for", rules.colluding)),
            ("Hospitals of a patient", _at_least("allow for", rules.sites_per_patient)),
            ("Minimum of patients", _at_least("ask for", rules.minimum)),
        )
    )
    output.result(
        {
            "required": rules.needs_privacy,
            "epsilon": rules.epsilon,
            "delta": rules.delta,
            "units": list(rules.units),
            "patient": rules.patient,
            "budget": _budget_facts(rules),
            "colluding": rules.colluding,
            "sites_per_patient": rules.sites_per_patient,
            "minimum": rules.minimum,
        }
    )


@app.command()
def budget(
    path: Home,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compute the whole ledger again first, to find what was changed.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what studies have cost this site's patients in privacy, and how much is left. Nothing is written."""
    rules, accounts = bootstrap.read_accounts(path, verify=verify)
    spread = distribution(accounts)
    *spent, out = shown(spread) if spread else (None,)
    output = Output(as_json, quiet)
    output.say(f"Privacy budget at {path}")
    facts: list[tuple[str, str]] = [("Budget of a patient", _budget(rules.budget))]
    if accounts.site.divergence:
        facts.append(("Spent by the site", f"epsilon {_epsilon(accounts, accounts.site)}, as one unit of its own"))
    if verify:
        facts.append(("Verified", "every entry and cohort is as it was written"))
    output.pairs(tuple(facts))
    _show_studies(output, accounts)
    if spread and accounts.studies:
        _show_distribution(output, shown(spread))
    output.result(
        {
            "budget": _budget_facts(rules),
            "delta": accounts.tariff.delta,
            "verified": verify,
            "studies": [_study_facts(accounts, cost) for cost in accounts.studies],
            "site_epsilon": _finite(accounts.tariff.epsilon(accounts.site)) if accounts.site.divergence else 0.0,
            "spent": [
                {"from": tenth / 10, "to": (tenth + 1) / 10, "patients": count} for tenth, count in enumerate(spent)
            ],
            "out_of_budget": out,
        }
    )


@app.command()
def run(path: Home) -> None:
    """Serve this site's runs until stopped: attach to the consortium, answer approved studies."""
    bootstrap.run_agent(path)


membership.register(app)
approvals.register(app)


def _show_studies(output: Output, accounts: Accounts) -> None:
    if not accounts.studies:
        output.say("No study has cost anything yet.")
        return
    rows = [
        [
            _short(cost.study),
            str(cost.runs),
            str(cost.rounds),
            _day(cost.first),
            _day(cost.last),
            _epsilon(accounts, cost.most),
        ]
        for cost in accounts.studies
    ]
    title = f"What studies cost a patient at most (delta {accounts.tariff.delta:g})"
    output.table(title, ["study", "runs", "rounds", "first (UTC)", "last (UTC)", "epsilon"], rows)


def _show_distribution(output: Output, counts: Sequence[int | str]) -> None:
    output.say("Patients by the share of the budget that is spent:")
    largest = max((count for count in counts if isinstance(count, int)), default=0)
    labels = [*(f"{10 * tenth} to {10 * tenth + 10} %" for tenth in range(len(counts) - 1)), "out of budget"]
    output.pairs(tuple((label, _bar(count, largest)) for label, count in zip(labels, counts, strict=True)))
    if HIDDEN in counts:
        output.say(f"Hidden: fewer than {SMALL} patients, or more where these alone could be had by subtraction.")


def _bar(count: int | str, largest: int) -> str:
    # a hidden count has no bar, whose length would tell it
    return f"{'█' * max(1, round(_BAR * count / largest))} {count:,}" if isinstance(count, int) else count


def _study_facts(accounts: Accounts, cost: StudyCost) -> dict[str, Any]:
    return {
        "study_id": cost.study,
        "runs": cost.runs,
        "rounds": cost.rounds,
        "first": cost.first,
        "last": cost.last,
        "epsilon": _finite(accounts.tariff.epsilon(cost.most)),
    }


def _budget_facts(rules: PrivacyPolicy) -> dict[str, float] | None:
    return {"epsilon": rules.budget.epsilon, "delta": rules.budget.delta} if rules.budget else None


def _budget(budget: Budget | None) -> str:
    if budget is None:
        return f"{_NOT_LIMITED}: charges are counted, and nobody is left out"
    return f"epsilon {budget.epsilon:g} at delta {budget.delta:g}, over all studies"


def _at_most(figure: float | None) -> str:
    return _NOT_LIMITED if figure is None else f"at most {figure:g}"


def _at_least(verb: str, figure: int | None) -> str:
    return _NOT_LIMITED if figure is None else f"a study must {verb} at least {figure}"


def _short(study: str) -> str:
    return study.removeprefix("sha256:")[:12]


def _day(time: str) -> str:
    return time[:16].replace("T", " ")


def _epsilon(accounts: Accounts, price: Price) -> str:
    epsilon = _finite(accounts.tariff.epsilon(price))
    return "without limit" if epsilon is None else f"{epsilon:.3g}"


def _finite(epsilon: float) -> float | None:
    # JSON has no infinity
    return epsilon if math.isfinite(epsilon) else None
