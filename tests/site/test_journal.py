"""An agent that is killed, starved or lied to answers each request once, and with the same bytes ever after."""

import os
import random
import resource
import select
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.adapters import journal as journals
from cohortium.adapters.journal import Approved, SqliteJournal
from cohortium.bootstrap import coordinator_key, create_home, open_home
from cohortium.core import codec
from cohortium.core.document import canonical_bytes
from cohortium.core.errors import ProtocolError, SiteError
from cohortium.core.messages import (
    Announcement,
    CloseRun,
    FromSite,
    KeySet,
    MaskedUpdate,
    OpenRound,
    OpenRun,
    Refusal,
    Survivors,
    ToSite,
    decode_from_site,
)
from cohortium.core.models import Network
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.core.training import Asynchronous, Averaging, Local
from cohortium.engines import local
from cohortium.plan import Plan, compile_study
from cohortium.site.agent import Agent
from cohortium.site.ports import Frozen, Request
from cohortium.site.session import Membership

from .hospital import DATA, ROOT, STUDIES, agents_of, network, study

PLAN = compile_study(STUDIES["masking with dropouts"])
PRIVATE = compile_study(STUDIES["private"])
ME = "zurich"
DEADLINE = 60.0


@pytest.fixture
def home(tmp_path: Path) -> Path:
    create_home(tmp_path / "home")
    return tmp_path / "home"


def journal_of(home: Path, agent: Agent) -> SqliteJournal:
    return journals.connect(home, ME, agent.membership.identity.public_key().public_bytes_raw())


def agent_of(plan: Plan = PLAN) -> Agent:
    agent = agents_of(plan)[ME]
    if agent.ledger is not None:
        agent.ledger.close()  # type: ignore[attr-defined]
        agent.ledger = None
    agent.compiler = lambda _: plan
    return agent


@dataclass
class Hospital:
    """An agent with a journal on the disk; `restart` is what a kill and a new start are to everything but the disk."""

    home: Path
    plan: Plan = PLAN
    agent: Any = None
    stack: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.agent = agent_of(self.plan)
        self.agent.approved = {self.plan.study_id: 99}
        self.agent.journal = self.stack.enter_context(journal_of(self.home, self.agent))
        self.agent.ledger = self.stack.enter_context(open_home(self.home)).ledger

    def restart(self) -> None:
        self.stack.close()
        self.start()

    def __enter__(self) -> "Hospital":
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def membership(self) -> Membership:
        membership: Membership = self.agent.membership
        return membership

    @property
    def failure(self) -> Exception | None:
        failure: Exception | None = self.agent.failure
        return failure

    def receive(self, data: bytes) -> list[bytes]:
        answers: list[bytes] = self.agent.receive(data)
        return answers


@dataclass
class Recording:
    """An agent that remembers what it was asked and what it said."""

    agent: Any
    heard: list[tuple[ToSite, list[bytes]]] = field(default_factory=list)

    @property
    def membership(self) -> Membership:
        membership: Membership = self.agent.membership
        return membership

    @property
    def failure(self) -> Exception | None:
        failure: Exception | None = self.agent.failure
        return failure

    def receive(self, data: bytes) -> list[bytes]:
        answers: list[bytes] = self.agent.receive(data)
        self.heard.append((codec.decode(data, ToSite), answers))  # type: ignore[arg-type]
        return answers


class Unreadable:
    """A dataset that nobody may touch."""

    def read(self, names: Any, *, as_text: Any = ()) -> Any:
        raise AssertionError("data were read")

    def fingerprint(self) -> str:
        raise AssertionError("data were looked at")


def played(plan: Plan, mine: Any, name: str = "run", **options: Any) -> Any:
    agents = agents_of(plan)
    others = [agent for site, agent in agents.items() if site != ME]
    seed = None if plan.noise else 5
    try:
        return local.run(
            plan, {**agents, ME: mine}, name, lambda: 0.0, coordinator_key(ROOT), seed=seed, **options
        ).outcome
    finally:
        for agent in [*others, agents[ME]]:
            if agent.ledger is not None:
                agent.ledger.close()  # type: ignore[attr-defined]


def undisturbed(plan: Plan) -> tuple[bytes, list[tuple[ToSite, list[bytes]]]]:
    recording = Recording(agents_of(plan)[ME])
    outcome = played(plan, recording)
    if recording.agent.ledger is not None:
        recording.agent.ledger.close()
    return outcome.to_bytes(), recording.heard


@pytest.fixture(scope="module")
def script() -> list[tuple[ToSite, list[bytes]]]:
    """What a coordinator asks of zurich in a whole run, and the answers."""
    return undisturbed(PLAN)[1]


def say(agent: Any, message: ToSite) -> list[bytes]:
    answers: list[bytes] = agent.receive(codec.encode(message))
    return answers


def up_to(agent: Any, script: list[tuple[ToSite, list[bytes]]], kind: type, number: int = 1) -> int:
    """Plays a script up to a round's message of a kind, that one too; returns the place after it."""
    for place, (message, expected) in enumerate(script):
        assert say(agent, message) == expected
        if isinstance(message, kind) and getattr(message, "round", 1) == number:
            return place + 1
    raise AssertionError("no such message")


def told(answers: list[bytes]) -> FromSite:
    (data,) = answers
    return decode_from_site(data)


class TestOnce:
    def test_a_run_with_a_restart_after_every_message_is_the_undisturbed_one(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as hospital:
            for message, expected in script:
                for _ in range(2):
                    assert say(hospital, message) == expected
                    hospital.restart()

    def test_an_altered_request_gets_the_old_answer_and_nothing_is_computed(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as hospital:
            up_to(hospital, script, Survivors, 2)
            asked = {(type(m), getattr(m, "round", 0)): (m, said) for m, said in script}
            for restart in (False, True):
                if restart:
                    hospital.restart()
                hospital.agent.source = Unreadable()
                for key, change in (
                    ((OpenRun, 0), {"study": b"{}", "seed": 9}),
                    ((KeySet, 0), {"announcements": ()}),
                    ((OpenRound, 1), {"broadcast": b"other"}),
                    ((OpenRound, 2), {"broadcast": b"other"}),
                    ((Survivors, 2), {"sites": ("a",), "sealed": ()}),
                ):
                    message, expected = asked[key]
                    assert say(hospital, msgspec.structs.replace(message, **change)) == expected
                assert hospital.failure is None

    def test_of_older_rounds_nothing_is_said(self, home: Path, script: list[tuple[ToSite, list[bytes]]]) -> None:
        with Hospital(home) as hospital:
            up_to(hospital, script, OpenRound, 3)
            message = next(m for m, _ in script if isinstance(m, OpenRound) and m.round == 1)
            assert say(hospital, message) == []
            hospital.restart()
            assert say(hospital, message) == []

    def test_a_closed_run_leaves_its_name_and_nothing_else(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as hospital:
            for message, _ in script:
                say(hospital, message)
            assert isinstance(script[-1][0], CloseRun)
            hospital.restart()
            assert say(hospital, script[-1][0]) == []
            refused = told(say(hospital, script[0][0]))
            assert isinstance(refused, Refusal) and "name was used before" in refused.reason
        with closing(sqlite3.connect(home / "journal.sqlite")) as connection:
            for table in ("parts", "answers", "intents"):
                assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
            assert connection.execute("SELECT run, study FROM runs").fetchall() == [("run", PLAN.study_id)]
        assert os.listdir(home / "spool") == []

    def test_a_refusal_is_the_runs_last_word(self, home: Path, script: list[tuple[ToSite, list[bytes]]]) -> None:
        with Hospital(home) as hospital:
            place = up_to(hospital, script, OpenRound, 1)
            message = script[place][0]
            refusal = say(hospital, msgspec.structs.replace(message, sites=("zurich",)))
            assert isinstance(told(refusal), Refusal)
            for _ in range(2):
                for later, _ in script[:-1]:
                    assert say(hospital, later) == refusal
                hospital.restart()

    def test_a_round_that_is_refused_stays_refused_and_the_run_goes_on(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as hospital:
            place = up_to(hospital, script, OpenRound, 1)
            message, _ = script[place]
            assert isinstance(message, Survivors)
            broken = msgspec.structs.replace(message, sealed=tuple(bytes(len(one)) for one in message.sealed))
            refusal = say(hospital, broken)
            said = told(refusal)
            assert isinstance(said, Refusal) and said.round == 1
            hospital.restart()
            assert say(hospital, message) == refusal
            following = next(i for i, (m, _) in enumerate(script) if isinstance(m, OpenRound) and m.round == 2)
            assert say(hospital, script[following][0]) == script[following][1]

    def test_what_was_never_opened_leaves_nothing(self, home: Path, script: list[tuple[ToSite, list[bytes]]]) -> None:
        with Hospital(home) as hospital:
            hospital.agent.approved = {}
            for message in (script[0][0], script[1][0], script[2][0], CloseRun("run", "failed")):
                say(hospital, message)
            hospital.agent.approved = {PLAN.study_id: 1}
            assert say(hospital, script[0][0]) == script[0][1]
            again = say(hospital, OpenRun("other", canonical_bytes(PLAN.study), 5))
            refused = told(again)
            assert isinstance(refused, Refusal) and "had all the runs" in refused.reason
            hospital.restart()
            hospital.agent.approved = {PLAN.study_id: 1}
            assert say(hospital, OpenRun("other", canonical_bytes(PLAN.study), 5)) == again

    def test_the_oldest_of_too_many_runs_ends_for_good(self, home: Path) -> None:
        with Hospital(home) as hospital:
            study_bytes = canonical_bytes(PLAN.study)
            said = [say(hospital, OpenRun(f"run-{number}", study_bytes)) for number in range(17)]
            assert all(isinstance(told(one), Announcement) for one in said)
            hospital.restart()
            assert isinstance(told(say(hospital, OpenRun("run-0", study_bytes))), Refusal)
            assert say(hospital, OpenRun("run-1", study_bytes)) == said[1]
            assert len(hospital.agent._sessions) == 16

    def test_data_that_change_while_the_agent_is_down_end_the_run(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as hospital:
            up_to(hospital, script, KeySet)
            hospital.restart()
            hospital.agent.source = DATA["cleveland"]
            refused = told(say(hospital, script[2][0]))
            assert isinstance(refused, Refusal) and "data changed during the run" in refused.reason


@dataclass
class Failing:
    """A journal that fails when it is told to, before or after it has written; for one run if it is named."""

    real: SqliteJournal
    fail: str = ""
    run: str = ""

    def runs(self, but: Any = ()) -> Any:
        return self.real.runs(but)

    def answers(self, request: Request) -> Any:
        return self.real.answers(request)

    def intend(self, request: Request, digest: bytes, *, charged: bool) -> bool:
        return self.real.intend(request, digest, charged=charged)

    def keep(self, study: str, request: Request, answers: Any, after: Frozen | None) -> None:
        fail = self.fail if self.run in ("", request.run) else ""
        if fail == "before":
            raise SiteError("the disk is full", public="this site's journal cannot be used")
        self.real.keep(study, request, answers, after)
        if fail == "after":
            raise SiteError("the disk is full", public="this site's journal cannot be used")


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_cannot_be_kept_is_not_sent_and_is_said_later(home: Path, when: str) -> None:
    _, script = undisturbed(PRIVATE)
    with Hospital(home, PRIVATE) as hospital:
        hospital.agent.journal = Failing(hospital.agent.journal)
        # a key that was not kept is not announced, and the next try has another
        assert say(hospital, script[0][0]) == script[0][1]
        for message, answers in script[1:]:
            hospital.agent.journal.fail = when
            assert say(hospital, message) == []
            assert "disk is full" in str(hospital.failure)
            hospital.agent.journal.fail = ""
            assert say(hospital, message) == answers
        hospital.agent.ledger.verify()
        (cost,) = hospital.agent.ledger.accounts().studies
        assert (cost.runs, cost.rounds) == (1, sum(isinstance(m, OpenRound) for m, _ in script))


def test_what_was_paid_for_is_not_exchanged(home: Path) -> None:
    _, script = undisturbed(PRIVATE)
    with Hospital(home, PRIVATE) as hospital:
        place = up_to(hospital, script, KeySet)
        hospital.agent.journal = Failing(hospital.agent.journal, "before")
        message = script[place][0]
        assert isinstance(message, OpenRound) and say(hospital, message) == []
        hospital.restart()
        # the same round of the same run, asked for in other words: another broadcast that could be honest
        other = codec.decode(message.broadcast, PRIVATE.algorithm.broadcast_type)
        inner = codec.encode(other)
        assert inner == message.broadcast
        with pytest.raises(ProtocolError, match="with another broadcast"):
            hospital.agent.journal.intend(Request("run", "OpenRound", 1), b"another", charged=True)
        assert say(hospital, message) == script[place][1]
        # once it is answered, nothing makes the ledger take the round for unpaid
        for _ in range(2):
            request = Request("run", "OpenRound", 1)
            assert hospital.agent.journal.intend(request, b"another", charged=True) is False


class Kill(BaseException):
    """What ends an agent at once."""


@dataclass
class Deadly:
    """A ledger before whose charge the agent is killed."""

    real: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def charge(self, *_: Any, **__: Any) -> Any:
        raise Kill


@pytest.mark.parametrize("how", ["killed", "not kept"])
def test_what_was_sent_under_a_lost_journal_pays_for_nothing_more(home: Path, how: str) -> None:
    _, script = undisturbed(PRIVATE)
    opened, agreed, asked = (message for message, _ in script[:3])
    assert isinstance(agreed, KeySet)
    with Hospital(home, PRIVATE) as hospital:
        up_to(hospital, script, OpenRound, 1)
    for path in home.glob("journal.sqlite*"):
        path.unlink()
    shutil.rmtree(home / "spool")
    with Hospital(home, PRIVATE) as hospital:
        # the steward approved the study again, and the run's name comes back; the agent has other randomness now
        hospital.agent.randomness = Randomness.of_seed(99)
        mine = told(say(hospital, opened))
        assert isinstance(mine, Announcement)
        others = tuple(mine if one.site == ME else one for one in agreed.announcements)
        assert say(hospital, msgspec.structs.replace(agreed, announcements=others)) == []
        if how == "killed":
            hospital.agent.ledger = Deadly(hospital.agent.ledger)
            with pytest.raises(Kill):
                say(hospital, asked)
            hospital.restart()
        else:
            hospital.agent.journal = Failing(hospital.agent.journal, "before")
            assert say(hospital, asked) == []
            hospital.agent.journal.fail = ""
        refused = told(say(hospital, asked))
        assert isinstance(refused, Refusal) and "charged for it before" in refused.reason
        assert hospital.agent.ledger.head()[0] == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_cannot_be_kept_disturbs_no_other(
    home: Path, script: list[tuple[ToSite, list[bytes]]], when: str
) -> None:
    other = OpenRun("other", canonical_bytes(PLAN.study), 5)
    with Hospital(home) as hospital:
        hospital.agent.journal = Failing(hospital.agent.journal, when, "other")
        place = up_to(hospital, script, KeySet)
        work = hospital.agent.take(codec.encode(script[place][0])).work
        assert say(hospital, other) == []
        # training that was under way is taken in
        assert hospital.agent.finish(work, work.done()).answers == script[place][1]
        hospital.agent.journal.fail = ""
        said = say(hospital, other)
        assert isinstance(told(said), Announcement)
        hospital.agent.journal.fail = when
        assert say(hospital, CloseRun("other", "failed")) == []
        for message, expected in script[place + 1 :]:
            assert say(hospital, message) == expected
        # where the other run stands is what the journal says
        hospital.agent.journal.fail = ""
        assert ("other" in hospital.agent._sessions) is (when == "before")
        assert (say(hospital, other) == said) is (when == "before")


def test_a_run_whose_end_is_not_kept_goes_on(home: Path) -> None:
    study_bytes = canonical_bytes(PLAN.study)
    with Hospital(home) as hospital:
        for number in range(16):
            say(hospital, OpenRun(f"run-{number}", study_bytes))
        hospital.agent.journal = Failing(hospital.agent.journal, "before", "run-0")
        assert isinstance(told(say(hospital, OpenRun("run-16", study_bytes))), Refusal)
        say(hospital, CloseRun("none", "failed"))
        assert len(hospital.agent._sessions) == 16 and "run-0" in hospital.agent._sessions


@pytest.fixture(scope="module")
def wide() -> tuple[Plan, list[tuple[ToSite, list[bytes]]]]:
    """A study whose rounds are large, and its script."""
    plan = compile_study(study(**network(hidden=2300, scaffold=True)))
    return plan, undisturbed(plan)[1]


class TestLarge:
    def test_large_values_are_files_and_go_on(self, home: Path, wide: Any) -> None:
        plan, script = wide
        with Hospital(home, plan) as hospital:
            for message, expected in script:
                assert say(hospital, message) == expected
                hospital.restart()
                if isinstance(message, OpenRound) and message.round == 3:
                    # two rounds' answers, the last broadcast, and the control variate
                    assert len(os.listdir(home / "spool")) == 4
                    modes = {os.stat(home / "spool" / name).st_mode & 0o777 for name in os.listdir(home / "spool")}
                    assert modes == {0o600}
            assert os.listdir(home / "spool") == []

    @pytest.mark.parametrize("tear", [lambda data: data[:-1], lambda data: bytes(len(data)), None])
    def test_a_torn_answer_is_never_sent(self, home: Path, wide: Any, tear: Callable[[bytes], bytes] | None) -> None:
        plan, script = wide
        with Hospital(home, plan) as hospital:
            place = up_to(hospital, script, OpenRound, 2)
            answer = script[place - 1][1][0]
            (file,) = [path for path in (home / "spool").iterdir() if path.read_bytes() == answer]
            file.unlink() if tear is None else file.write_bytes(tear(answer))
            said = told(say(hospital, script[place - 1][0]))
            assert isinstance(said, Refusal)
            assert (said.round, said.reason) == (2, "round 2 was refused: this site lost what it had answered")
            # the round is lost, the run goes on
            assert say(hospital, script[place][0]) == script[place][1]

    def test_a_torn_session_ends_its_run_and_no_other(self, home: Path, wide: Any) -> None:
        plan, script = wide
        with Hospital(home, plan) as hospital:
            place = up_to(hospital, script, OpenRound, 2)
            other = say(hospital, OpenRun("other", canonical_bytes(plan.study), 5))
            for file in (home / "spool").iterdir():
                file.write_bytes(file.read_bytes()[:-1])
            hospital.restart()
            refused = say(hospital, script[place][0])
            said = told(refused)
            assert isinstance(said, Refusal) and "started anew and cannot go on" in said.reason
            assert say(hospital, script[0][0]) == refused
            assert say(hospital, OpenRun("other", canonical_bytes(plan.study), 5)) == other

    def test_what_a_crash_left_without_a_row_is_deleted(self, home: Path) -> None:
        Hospital(home).stack.close()
        (home / "spool" / "part-left").write_bytes(b"x")
        Hospital(home).stack.close()
        assert os.listdir(home / "spool") == []


@pytest.fixture
def journal(home: Path) -> Iterator[SqliteJournal]:
    with journal_of(home, agent_of()) as one:
        yield one


FIRST, LARGE = Request("run", "OpenRun"), bytes(300_000)


class TestFilesOfAFailure:
    def test_what_is_refused_leaves_none(self, home: Path, journal: SqliteJournal) -> None:
        journal.keep("study", FIRST, [LARGE], Frozen(b"core", {}))
        with pytest.raises(SiteError, match="has an answer for round 0 already"):
            journal.keep("study", FIRST, [LARGE], Frozen(b"core", {"memory": LARGE}))
        assert len(os.listdir(home / "spool")) == 1
        assert journal.answers(FIRST) == [LARGE]

    def test_what_cannot_be_written_leaves_none(self, home: Path, journal: SqliteJournal) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
        try:
            with pytest.raises(SiteError, match="File too large"):
                journal.keep("study", FIRST, [LARGE], Frozen(b"core", {"memory": LARGE * 2}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(home / "spool") == []

    def test_what_was_committed_nevertheless_keeps_its_own(self, journal: SqliteJournal) -> None:
        real: Any = journal._connection

        class Late:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def execute(self, statement: str, *values: Any) -> Any:
                done = real.execute(statement, *values)
                if statement == "COMMIT":
                    raise sqlite3.OperationalError("disk I/O error")
                return done

        journal._connection = Late()  # type: ignore[assignment]
        with pytest.raises(SiteError):
            journal.keep("study", FIRST, [LARGE], Frozen(b"core", {"memory": LARGE}))
        journal._connection = real
        assert journal.answers(FIRST) == [LARGE]
        assert journal.runs()[0].frozen == Frozen(b"core", {"memory": LARGE})


SECRET = b"a key that must not stay" * 20_000


def on_the_disk(home: Path) -> bool:
    """Returns whether a secret is in any file of the journal."""
    files = [*home.glob("journal.sqlite*"), *(home / "spool").iterdir()]
    return any(SECRET[:100] in path.read_bytes() for path in files)


class TestWhatIsOverLeavesNoKey:
    def test_while_others_read_it_is_put_off_and_nobody_waits_long(self, home: Path, journal: SqliteJournal) -> None:
        journal.keep("study", FIRST, [b"answer"], Frozen(SECRET, {}))
        assert os.listdir(home / "spool") == [] and on_the_disk(home)
        with closing(sqlite3.connect(home / "journal.sqlite", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM runs").fetchone()
            began = time.monotonic()
            journal.keep("study", Request("run", "CloseRun"), [], None)
            assert time.monotonic() - began < 5.0
            assert on_the_disk(home)
        journal.keep("study", Request("other", "OpenRun"), [b"answer"], Frozen(b"core", {}))
        assert not on_the_disk(home)
        assert journal._connection.execute("PRAGMA busy_timeout").fetchone() == (30_000,)

    def test_after_a_kill_between_the_end_and_that_it_is_made_up_for(self, home: Path) -> None:
        # the steward's connection keeps SQLite from emptying the log when the agent's is closed, as a kill does
        with Approved(home):
            with journal_of(home, agent_of()) as journal:
                journal.keep("study", FIRST, [b"answer"], Frozen(SECRET, {}))
                journal._empty_log = lambda: None  # type: ignore[method-assign]
                journal.keep("study", Request("run", "CloseRun"), [], None)
            assert on_the_disk(home)
            journal_of(home, agent_of()).close()
            assert not on_the_disk(home)


class TestRefused:
    def test_another_sites_or_identitys(self, home: Path) -> None:
        Hospital(home).stack.close()
        stranger = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        mine = agent_of().membership.identity.public_key().public_bytes_raw()
        for site, key in ((ME, stranger), ("ulm", mine)):
            with pytest.raises(SiteError, match="is the journal of another site or identity"):
                journals.connect(home, site, key)

    @pytest.mark.parametrize(("name", "mode"), [("journal.sqlite", 0o640), ("spool", 0o750), (".", 0o770)])
    def test_what_others_may_read_or_write(self, home: Path, name: str, mode: int) -> None:
        Hospital(home).stack.close()
        (home / name).chmod(mode)
        with pytest.raises(SiteError, match=r"can be (read|written) by others"):
            journal_of(home, agent_of())

    def test_what_another_agent_has(self, home: Path) -> None:
        with Hospital(home):
            with pytest.raises(SiteError, match="another agent of this site runs already"):
                journal_of(home, agent_of())

    def test_what_another_agent_took_although_the_lock_was_deleted(
        self, home: Path, script: list[tuple[ToSite, list[bytes]]]
    ) -> None:
        with Hospital(home) as first:
            place = up_to(first, script, KeySet)
            shutil.rmtree(home / "spool")
            with Hospital(home) as second:
                for _ in range(2):
                    assert say(first, script[place][0]) == []
                    assert "was taken by another agent of this site" in str(first.failure)
                with pytest.raises(SiteError, match="was taken by another agent"):
                    first.agent.journal.intend(Request("run", "OpenRound", 1), b"digest", charged=False)
                for message, expected in script[place:]:
                    assert say(second, message) == expected

    @pytest.mark.parametrize("content", [b"no journal at all", b""])
    def test_what_is_no_journal(self, home: Path, content: bytes) -> None:
        path = home / "journal.sqlite"
        path.write_bytes(content * 100)
        path.chmod(0o600)
        if content:
            with pytest.raises(SiteError, match="cannot be read or written"):
                journal_of(home, agent_of())
        else:
            journal_of(home, agent_of()).close()

    def test_other_databases_and_later_versions(self, home: Path) -> None:
        path = home / "journal.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE other (x)")
        path.chmod(0o600)
        with pytest.raises(SiteError, match="is no journal"):
            journal_of(home, agent_of())
        path.unlink()
        Hospital(home).stack.close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA user_version = 2")
        with pytest.raises(SiteError, match="version 2"):
            journal_of(home, agent_of())

    def test_files_are_private(self, home: Path) -> None:
        with Hospital(home):
            for path in home.iterdir():
                assert path.stat().st_mode & 0o077 == 0, path.name


def test_approvals_take_effect_while_the_agent_runs(home: Path) -> None:
    with Hospital(home) as hospital, Approved(home) as steward, Approved(home) as approved:
        hospital.agent.approved = approved
        asked = [OpenRun(f"run-{number}", canonical_bytes(PLAN.study)) for number in range(4)]
        kinds = [type(told(say(hospital, asked[0])))]
        steward.approve(PLAN.study_id, "heart", 1, "2031-01-01T00:00:00+00:00")
        kinds += [type(told(say(hospital, message))) for message in asked[:2]]
        steward.approve(PLAN.study_id, "heart", 1, "2031-01-02T00:00:00+00:00")
        (one,) = steward.all()
        assert (one.runs, one.had) == (2, 1)
        kinds += [type(told(say(hospital, message))) for message in asked[2:]]
        assert kinds == [Refusal, Announcement, Refusal, Announcement, Refusal]
        assert steward.revoke(PLAN.study_id)
        assert not steward.revoke(PLAN.study_id)
        assert steward.all() == []
        assert "has not approved it" in told(say(hospital, asked[3])).reason  # type: ignore[union-attr]


def test_a_dataset_that_is_not_offered_is_refused_unread(home: Path) -> None:
    agent = agent_of()
    agent.approved, agent.source = {PLAN.study_id: 2}, {"other": Unreadable()}
    said = told(say(agent, OpenRun("run", canonical_bytes(PLAN.study))))
    assert isinstance(said, Refusal) and "offers no dataset 'heart_disease'" in said.reason
    agent.source = {"other": Unreadable(), "heart_disease": DATA[ME]}
    assert isinstance(told(say(agent, OpenRun("run-2", canonical_bytes(PLAN.study)))), Announcement)


def test_memory_that_runs_out_is_told_without_figures() -> None:
    class Huge:
        def fingerprint(self) -> str:
            raise MemoryError("Unable to allocate 4.27 GiB for an array with shape (573921873,)")

    agent = agent_of()
    agent.approved, agent.source = {PLAN.study_id: 1}, Huge()
    said = told(say(agent, OpenRun("run", canonical_bytes(PLAN.study))))
    assert isinstance(said, Refusal) and said.reason == "the site's agent ran out of the memory that it may use"


# killed


@dataclass
class Killed:
    """An agent in a process of its own that is killed at random instants, whereupon it is started and asked again."""

    home: Path
    plan: Plan
    chance: random.Random
    kills: int
    membership: Membership
    answers: dict[Request, set[tuple[bytes, ...]]] = field(default_factory=lambda: defaultdict(set))
    died: int = 0
    child: int = 0
    there: int = -1
    back: int = -1
    failure: Exception | None = None

    def receive(self, data: bytes) -> list[bytes]:
        message: Any = codec.decode(data, ToSite)  # type: ignore[arg-type]
        request = Request(message.run, type(message).__name__, getattr(message, "round", 0))
        while True:
            answers = self._asked(data)
            if answers is not None:
                self.answers[request].add(tuple(answers))
                if self.died >= self.kills or self.chance.random() < 0.15:
                    return answers
                # asked again, and then in other words
                if isinstance(message, OpenRound):
                    data = codec.encode(msgspec.structs.replace(message, broadcast=b"other"))

    def _asked(self, data: bytes) -> list[bytes] | None:
        """Returns the answers, or None if the process was killed before it gave them."""
        if not self.child:
            self._start()
        patience, lost = DEADLINE, False
        if self.died < self.kills and self.chance.random() < 0.7:
            # an answer takes a few milliseconds, and some more in a process that has just begun
            patience = self.chance.uniform(0, self.chance.choice([0.002, 0.005, 0.03]))
            # an answer may be given, and lost with whoever gave it, however fast that was
            lost = self.chance.random() < 0.5
        _write(self.there, data)
        if select.select([self.back], [], [], patience)[0] and not lost:
            return codec.decode(_read(self.back) or b"", list[bytes])
        assert patience < DEADLINE, "no answer came"
        self.stop()
        self.died += 1
        return None

    def _start(self) -> None:
        (take, self.there), (self.back, give) = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            # the child starts no thread that it does not own
            warnings.simplefilter("ignore", DeprecationWarning)
            self.child = os.fork()
        if self.child == 0:
            try:
                os.close(self.there)
                os.close(self.back)
                with Hospital(self.home, self.plan) as hospital:
                    while (data := _read(take)) is not None:
                        _write(give, codec.encode(hospital.receive(data)))
            finally:
                os._exit(0)
        os.close(take)
        os.close(give)

    def stop(self) -> None:
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            os.close(self.there)
            os.close(self.back)
            self.child = 0


def _write(pipe: int, data: bytes) -> None:
    data = len(data).to_bytes(8, "big") + data
    while data:
        data = data[os.write(pipe, data) :]


def _read(pipe: int) -> bytes | None:
    parts = b""
    wanted = 8
    while len(parts) < wanted:
        more = os.read(pipe, wanted - len(parts))
        if not more:
            return None
        parts += more
        if wanted == 8 and len(parts) == 8:
            wanted += int.from_bytes(parts, "big")
    return parts[8:]


@pytest.fixture
def killed(home: Path) -> Iterator[Callable[[Plan, int], Killed]]:
    made: list[Killed] = []

    def make(plan: Plan, kills: int) -> Killed:
        made.append(Killed(home, plan, random.Random(20310507), kills, agent_of(plan).membership))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.mark.parametrize("plan", [PLAN, PRIVATE], ids=["exact", "private"])
def test_an_agent_that_is_killed_at_any_instant_contributes_once(
    home: Path, killed: Callable[[Plan, int], Killed], plan: Plan
) -> None:
    expected, script = undisturbed(plan)
    mine = killed(plan, 40)
    assert played(plan, mine).to_bytes() == expected
    mine.stop()
    assert mine.died > 5
    assert all(len(said) == 1 for said in mine.answers.values())
    sent = [data for said in mine.answers.values() for one in said for data in one]
    assert sorted(sent) == sorted(data for _, answers in script for data in answers)
    updates = [one.round for one in map(decode_from_site, sent) if isinstance(one, MaskedUpdate)]
    assert updates == list(range(1, len(updates) + 1))
    with open_home(home) as kept:
        kept.ledger.verify()
        charged = [cost.rounds for cost in kept.ledger.accounts().studies]
        assert charged == ([len(updates)] if plan.noise else [])


def test_another_process_that_approves_takes_nothing_away_from_an_agent_that_runs(home: Path) -> None:
    # an agent has the journal's file open twice; whoever opens and closes it elsewhere must find its locks
    approve = (
        "import sys, pathlib; from cohortium.adapters.journal import Approved\n"
        "with Approved(pathlib.Path(sys.argv[1])) as approved: approved.approve(sys.argv[2], 'name', 1, 'now')\n"
    )
    with Approved(home) as approved, journals.connect(home, "zurich", bytes(32)):
        for study in ("first", "second"):
            assert approved.get(study, 0) == 0
            subprocess.run([sys.executable, "-c", approve, str(home), study], check=True)
            assert approved.get(study, 0) == 1
            assert (home / "journal.sqlite-wal").exists()


class TestBuffers:
    """A site whose rounds are buffers notes a round, and contributes to it once, whenever it is killed."""

    def ready(self, home: Path) -> tuple[Plan, list[OpenRound], list[ToSite]]:
        """Returns a plan, and what a coordinator says in a run in which zurich answers no round after the first."""
        pytest.importorskip("torch")
        training = Averaging(rounds=3, local=Local(steps=2), asynchronous=Asynchronous(buffer=3))
        plan = compile_study(study(model=Network(hidden=(3,)), training=training, aggregation=Aggregation(dropouts=1)))
        recording = Recording(agents_of(plan)[ME])

        def faults(site: str, message: Any) -> bool:
            return site == ME and isinstance(message, MaskedUpdate) and message.round > 1

        played(plan, recording, faults=faults)
        heard = [message for message, _ in recording.heard]
        first = next(place for place, m in enumerate(heard) if isinstance(m, OpenRound) and m.round == 2)
        return plan, [m for m in heard if isinstance(m, OpenRound) and m.round > 1], heard[:first]

    def test_noted_becomes_a_contribution_once(self, home: Path) -> None:
        plan, rounds, before = self.ready(home)
        with Hospital(home, plan) as hospital:
            for message in before:
                say(hospital, message)

            def take(message: ToSite) -> Any:
                return hospital.agent.take(codec.encode(message))

            begun = take(rounds[0])
            assert [type(told([answer])).__name__ for answer in begun.answers] == ["Noted"]
            assert begun.work.train.asked.round == 2
            noted = take(rounds[1])
            assert [told([answer]).round for answer in noted.answers] == [3] and noted.work is None  # type: ignore[union-attr]
            # killed in the middle of training
            hospital.restart()
            assert take(rounds[0]) == replace(begun, work=None)
            again = take(rounds[1])
            assert again.answers == noted.answers and again.work.train.asked.round == 3
            assert take(rounds[1]).work is None
            # what was begun before the kill is wanted no longer
            assert hospital.agent.finish(begun.work, begun.work.done()).answers == []
            result = again.work.done()
            contributed = hospital.agent.finish(again.work, result).answers
            assert isinstance(told(contributed), MaskedUpdate)
            assert hospital.agent.finish(again.work, result).answers == []
            for _ in range(2):
                assert take(rounds[1]) == replace(again, answers=contributed, work=None)
                hospital.restart()
            # its work is kept, and goes into the next round without being done again
            later = take(rounds[2])
            assert isinstance(told(later.answers), MaskedUpdate) and later.work is None
            request, frozen = Request("run", "OpenRound", 4), Frozen(b"", {})
            with pytest.raises(SiteError, match="has an answer for round 4 already"):
                hospital.agent.journal.keep(plan.study_id, request, [contributed[0]], frozen)
            assert take(rounds[2]).answers == later.answers

    def test_a_run_with_a_kill_after_every_message_is_the_undisturbed_one(self, home: Path) -> None:
        plan, rounds, before = self.ready(home)
        expected = [agents_of(plan)[ME]]
        with Hospital(home, plan) as hospital:
            for message in (*before, *rounds):
                answers = expected[0].receive(codec.encode(message))
                for _ in range(2):
                    assert say(hospital, message) == answers
                    hospital.restart()
