"""The verdict on a trial: what every run should have given, and what was promised and did not come."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cohortium as co
from chaos_faults import World
from cohortium.coordinator.result import Result
from cohortium.core.messages import MaskedUpdate
from cohortium.core.study import Study
from cohortium.engines.fleet.client import Consortium

Survivors = tuple[tuple[str, ...], ...]


@dataclass
class Verdict:
    """What was found.

    Attributes:
        wrong: runs whose result is not the undisturbed one, or whose rounds are not 1 to n, and how.
        lost: contributions that sites saw accepted and no round holds, and runs without an end.
        reasons: why runs failed, with how many.
        ends: how many runs ended how.
        checked: finished runs that were compared; `partial`, those of them with a round without somebody.
    """

    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    checked: int = 0
    partial: int = 0
    acknowledged: int = 0


@dataclass
class Judge:
    """Compares runs with simulations over the same survivors; each comparison is computed once."""

    studies: Mapping[str, Study]
    sites: Mapping[str, Path]
    seed: int
    _expected: dict[tuple[str, Survivors], str] = field(default_factory=dict)

    def verdict(self, world: World, connection: Consortium, acknowledged: Path) -> Verdict:
        """Returns what the store, the results and the sites say."""
        found = Verdict()
        applied: dict[tuple[str, int], tuple[str, ...]] = {}
        numbers: dict[str, list[int]] = {}
        for run, number, survivors in world.asked(
            "SELECT run, number, survivors FROM cohortium.rounds ORDER BY run, number"
        ):
            applied[str(run), int(str(number))] = tuple(survivors)  # type: ignore[arg-type]
            numbers.setdefault(str(run), []).append(int(str(number)))
        told = Counter(
            (str(run), str(number))
            for run, number in world.asked("SELECT run, facts->>'number' FROM cohortium.events WHERE kind = 'round'")
        )
        found.wrong += [
            f"{run}: round {number} was announced {often} times" for (run, number), often in told.items() if often > 1
        ]
        rows = world.asked("SELECT run, status, reason FROM cohortium.runs ORDER BY submitted")
        status = {str(run): str(how) for run, how, _ in rows}
        for run, how, reason in ((str(run), str(how), reason) for run, how, reason in rows):
            found.ends[how] += 1
            mine = numbers.get(run, [])
            found.rounds += len(mine)
            if mine != list(range(1, len(mine) + 1)):
                found.wrong.append(f"{run}: its rounds are {mine}")
            if how == "finished":
                self._compare(run, tuple(applied[run, number] for number in mine), connection, found)
            elif how == "failed" and reason:
                found.reasons[str(reason)] += 1
            else:
                found.lost.append(f"{run}: it is {how}, for no reason that was said")
        self._kept(acknowledged, applied, status, found)
        return found

    def _compare(self, run: str, survivors: Survivors, connection: Consortium, found: Verdict) -> None:
        result = connection.run(run).result()
        kind = run.rsplit("-", 1)[0]
        if tuple(record.survivors for record in result.rounds) != survivors:
            found.wrong.append(f"{run}: the result names other survivors than the store")
        found.checked += 1
        found.partial += any(len(sites) < len(self.sites) for sites in survivors)
        if bits(result) != self._undisturbed(kind, survivors):
            found.wrong.append(f"{run}: its result is not the undisturbed one over {survivors}")

    def _undisturbed(self, kind: str, survivors: Survivors) -> str:
        if (kind, survivors) not in self._expected:

            def lost(site: str, message: Any) -> bool:
                return isinstance(message, MaskedUpdate) and (
                    message.round > len(survivors) or site not in survivors[message.round - 1]
                )

            try:
                result = co.simulate(self.studies[kind], self.sites, seed=self.seed, faults=lost)
                self._expected[kind, survivors] = bits(result)
            except co.CohortiumError as error:
                self._expected[kind, survivors] = f"{type(error).__name__}: {error}"
        return self._expected[kind, survivors]

    @staticmethod
    def _kept(
        path: Path, applied: Mapping[tuple[str, int], tuple[str, ...]], status: Mapping[str, str], found: Verdict
    ) -> None:
        """Looks for what sites endorsed, thus saw chosen for ever, and is in no round."""
        for line in {line for file in path.glob("*.jsonl") for line in file.read_text().splitlines()}:
            site, run, number, sites = json.loads(line)
            found.acknowledged += 1
            kept = applied.get((run, number))
            if kept is not None and sorted(kept) != sites:
                found.lost.append(f"{run}: {site} endorsed {sites} in round {number}, which has {kept}")
            elif kept is None and status.get(run) == "finished":
                found.lost.append(f"{run}: {site} endorsed round {number}, which was never applied")


def bits(result: Result) -> str:
    """Returns a result to the last bit, as text."""
    coefficients = getattr(result.outcome, "coef_", None)
    if coefficients is None:
        return repr(result.outcome)
    return f"{coefficients.tobytes().hex()} {len(result.rounds)}"
