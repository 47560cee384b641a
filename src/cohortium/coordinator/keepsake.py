"""What a fleet's run leaves behind, as bytes: enough for whoever may read it to rebuild its `Result` exactly."""

from typing import Any

import msgspec

from cohortium.coordinator.ports import Applied
from cohortium.coordinator.result import Result, RoundRecord
from cohortium.core import codec
from cohortium.core.document import from_canonical
from cohortium.guarantees import promise
from cohortium.plan import Compiler, compile_study


class Keepsake(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished run.

    Attributes:
        document: the study's canonical bytes.
        state: the algorithm's last state, from `freeze`.
        rounds: for each round its number, its survivors and the facts of `Applied`.
        bytes_setup: bytes of all messages before the first round and after the last.
    """

    run: str
    document: bytes
    state: bytes
    rounds: tuple[tuple[int, tuple[str, ...], dict[str, Any]], ...]
    bytes_setup: int = 0


def pack(keepsake: Keepsake) -> bytes:
    """Returns a keepsake's bytes."""
    return codec.encode(keepsake)


def unpack(data: bytes, compiler: Compiler = compile_study) -> Result:
    """Returns the result that a keepsake holds.

    Raises:
        ProtocolError: the bytes are no keepsake.
        StudyError: this version cannot compile the study.
    """
    kept = codec.decode(data, Keepsake)
    plan = compiler(from_canonical(kept.document))
    outcome = plan.outcome(plan.algorithm.thaw(kept.state))
    records = tuple(_record(Applied(number=number, survivors=who, facts=facts)) for number, who, facts in kept.rounds)
    return Result(plan.study, plan.study_id, kept.run, outcome, records, kept.bytes_setup, promise(plan))


def _record(applied: Applied) -> RoundRecord:
    facts = applied.facts
    return RoundRecord(
        applied.number,
        applied.survivors,
        int(facts.get("values", 0)),
        int(facts.get("bytes_up", 0)),
        int(facts.get("bytes_down", 0)),
        float(facts.get("seconds", 0.0)),
        facts.get("objective"),
        tuple(facts.get("selected", ())),
    )
