"""The privacy ledger in real files: it counts exactly, survives being killed, and shows what was changed."""

import json
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cohortium.adapters import ledger, ledger_file
from cohortium.adapters.ledger import SqliteLedger
from cohortium.adapters.ledger_file import Keeper
from cohortium.core.errors import ProtocolError, SiteError
from cohortium.core.events import Events, Gaussian, Repeated, Slack
from cohortium.privacy.calibrate import Budget
from cohortium.site import chain
from cohortium.site.budget import SITE, tariff

BUDGET = Budget(2.0, 1e-5)
IDENTITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
KEY = bytes(range(100, 132))
ROUND: Events = (Gaussian(12.0),)
PATIENTS = ["p-anna", "p-bert", "p-cleo", "p-dora", "p-emil", "p-fred"]


def clock() -> datetime:
    return datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)


KEEPER = Keeper(KEY, clock, IDENTITY.sign)


def signed(signature: bytes, digest: bytes) -> bool:
    try:
        IDENTITY.public_key().verify(signature, digest)
    except InvalidSignature:
        return False
    return True


def units(names: Sequence[str | bytes]) -> NDArray[Any]:
    return np.array(names, dtype=object)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "ledger.sqlite"
    ledger_file.create(file, KEEPER)
    return file


def opened(path: Path, **options: Any) -> SqliteLedger:
    return ledger.connect(path, KEEPER, BUDGET, **options)


@pytest.fixture
def book(path: Path) -> Iterator[SqliteLedger]:
    with opened(path) as one:
        yield one


def rounds_that_fit(events: Events = ROUND, budget: Budget = BUDGET) -> int:
    rules = tariff(budget)
    price, limit = rules.price(events), rules.limit
    assert limit is not None
    return limit.divergence // price.divergence


# what is counted


def test_a_patient_is_left_out_exactly_when_the_limit_would_be_passed(book: SqliteLedger) -> None:
    most = rounds_that_fit()
    assert most > 3
    both, one = units(PATIENTS[:2]), units(PATIENTS[1:2])
    book.charge("first", "s", 1, one, ROUND)
    assert book.affordable(both, (Repeated(most - 1, ROUND[0]),)).tolist() == [True, True]
    assert book.affordable(both, (Repeated(most, ROUND[0]),)).tolist() == [True, False]
    assert book.affordable(both, (Repeated(most + 1, ROUND[0]),)).tolist() == [False, False]
    paid = [book.charge("second", "s", number, both, ROUND).tolist() for number in range(1, most + 3)]
    assert paid == [[True, True]] * (most - 1) + [[True, False]] + [[False, False]] * 2
    book.verify(signed)


def test_slack_has_a_limit_of_its_own(book: SqliteLedger) -> None:
    events: Events = (Slack(BUDGET.delta / 10),)
    limit, price = book.tariff.limit, book.tariff.price(events)
    assert limit is not None and price.slack > 0
    most = limit.slack // price.slack
    paid = [book.charge("run", "s", number, units(["p"]), events).tolist() for number in range(most + 2)]
    assert paid == [[True]] * most + [[False]] * 2


def test_a_round_is_charged_once(path: Path, book: SqliteLedger) -> None:
    book.charge("run", "s", 1, units(PATIENTS), ROUND)
    with opened(path) as other:
        for again in (book, other):
            for study, who, events in (("s", PATIENTS, ROUND), ("t", PATIENTS[:1], (Gaussian(99.0),))):
                with pytest.raises(ProtocolError, match="round 1 was refused: this site was charged for it before"):
                    again.charge("run", study, 1, units(who), events)
        assert not other.holds("run", 2)
        assert other.charge("run", "s", 2, units(PATIENTS), ROUND).all()
        assert book.holds("run", 2)
        assert book.charge("another", "s", 1, units(PATIENTS), ROUND).all()
        assert book.head()[0] == 3


def test_a_round_that_nobody_can_pay_is_charged_once_too(book: SqliteLedger) -> None:
    beyond: Events = (Repeated(rounds_that_fit() + 1, ROUND[0]),)
    assert not book.charge("run", "s", 1, units(PATIENTS), beyond).any()
    with pytest.raises(ProtocolError):
        book.charge("run", "s", 1, units(PATIENTS), ROUND)
    assert not book.accounts().patients.any()


def test_nothing_is_written_by_asking(path: Path, book: SqliteLedger) -> None:
    head = book.head()
    book.affordable(units(PATIENTS), ROUND)
    assert book.head() == head


def test_a_patient_named_twice_is_refused(book: SqliteLedger) -> None:
    for ask in (book.affordable, lambda who, events: book.charge("run", "s", 1, who, events)):
        with pytest.raises(SiteError, match="names a patient twice") as caught:
            ask(units(["p-anna", "p-bert", "p-anna"]), ROUND)
        assert "anna" not in str(caught.value)


def test_nobody_at_all(book: SqliteLedger) -> None:
    assert book.affordable(units([]), ROUND).shape == (0,)
    assert book.charge("run", "s", 1, units([]), ROUND).shape == (0,)
    assert book.charge("run", "s", 2, units(PATIENTS), ROUND).all()
    assert book.affordable(units([]), ROUND).shape == (0,)


def test_identifiers_are_compared_as_they_are_written(book: SqliteLedger) -> None:
    beyond = rounds_that_fit()
    names = ["7", "007", "7 ", "ü", "u\u0308", "\ud800"]
    assert book.charge("run", "s", 1, units(["7"]), (Repeated(beyond, ROUND[0]),)).all()
    assert book.affordable(units(names), ROUND).tolist() == [False, True, True, True, True, True]
    assert book.affordable(np.array(names[:5]), ROUND).tolist() == [False, True, True, True, True]


def test_without_a_budget_everything_is_counted_and_nobody_refused(path: Path) -> None:
    with ledger.connect(path, KEEPER, None) as book:
        for number in range(3):
            assert book.charge("run", "s", number, units(PATIENTS), (Gaussian(0.1),)).all()
        assert (book.accounts().patients == [3 * book.tariff.price((Gaussian(0.1),)).divergence, 0]).all()
    with opened(path) as book:
        assert not book.affordable(units(PATIENTS), ROUND).any()


def test_a_price_beyond_counting_is_refused_and_written_nowhere(path: Path) -> None:
    with ledger.connect(path, KEEPER, None) as book:
        with pytest.raises((SiteError, ProtocolError)):
            book.charge("run", "s", 1, units(PATIENTS), (Repeated(10**6, Gaussian(1e-6)),))
        assert book.head()[0] == 0
        book.verify(signed)


def test_another_budget_prices_the_same_events_at_its_own_order(path: Path) -> None:
    with opened(path) as book:
        for number in range(3):
            book.charge("run", "s", number, units(PATIENTS), ROUND)
    for budget in (Budget(8.0, 1e-6), Budget(0.5, 1e-5), None):
        with ledger.connect(path, KEEPER, budget) as book:
            expected = tariff(budget).price(ROUND)
            assert (book.accounts().patients == [3 * expected.divergence, 3 * expected.slack]).all()


def test_the_site_is_a_unit_of_its_own(book: SqliteLedger) -> None:
    book.charge("run", "s", 1, units([SITE]), ROUND)
    book.charge("run", "s", 2, units(PATIENTS), ROUND)
    accounts = book.accounts()
    assert accounts.site == book.tariff.price(ROUND)
    assert len(accounts.patients) == len(PATIENTS)


@pytest.mark.parametrize("name", ["(site)", "\xff(site)", "\x00(site)", "\udcff(site)"])
def test_no_patient_shares_the_sites_account(book: SqliteLedger, name: str) -> None:
    book.charge("run", "s", 1, units([SITE]), ROUND)
    book.charge("run", "s", 2, units([name]), ROUND)
    book.charge("run", "s", 3, units([SITE, name]), ROUND)
    accounts, price = book.accounts(), book.tariff.price(ROUND).divergence
    assert (accounts.site.divergence, accounts.patients[:, 0].tolist()) == (2 * price, [2 * price])


def test_accounts_tell_what_studies_cost(book: SqliteLedger) -> None:
    price = book.tariff.price(ROUND).divergence
    for run, study, number, who in (("a", "s", 1, 6), ("a", "s", 2, 4), ("b", "t", 1, 2), ("c", "s", 1, 1)):
        book.charge(run, study, number, units(PATIENTS[:who]), ROUND)
    accounts = book.accounts()
    told = [(cost.study, cost.runs, cost.rounds, cost.most.divergence // price) for cost in accounts.studies]
    assert told == [("s", 2, 3, 3), ("t", 1, 1, 1)]
    assert sorted(accounts.patients[:, 0] // price) == [1, 1, 2, 2, 3, 4]
    assert {cost.first for cost in accounts.studies} == {"2031-05-06T07:08:09+00:00"}


PRICES: tuple[Events, ...] = ((Gaussian(12.0),), (Gaussian(3.0), Slack(1e-7)), (Repeated(3, Gaussian(20.0)),))
STEP = st.tuples(
    st.integers(0, 1), st.booleans(), st.permutations(PATIENTS), st.integers(0, 6), st.sampled_from(PRICES)
)


@settings(max_examples=25, deadline=None)
@given(steps=st.lists(STEP, max_size=25), reopen=st.integers(0, 24))
def test_spends_are_those_of_a_simple_model(steps: list[Any], reopen: int) -> None:
    rules = tariff(BUDGET)
    limit = rules.limit
    assert limit is not None
    spent = {name: [0, 0] for name in PATIENTS}
    charged = set()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        ledger_file.create(path, KEEPER)
        books = [opened(path), opened(path)]
        try:
            for number, (which, write, order, count, events) in enumerate(steps):
                if number == reopen:
                    books[which].close()
                    books[which] = opened(path)
                who, price = list(order[:count]), rules.price(events)
                after = {name: (spent[name][0] + price.divergence, spent[name][1] + price.slack) for name in who}
                can = [after[name][0] <= limit.divergence and after[name][1] <= limit.slack for name in who]
                if not write:
                    assert books[which].affordable(units(who), events).tolist() == can
                    continue
                assert books[which].charge("run", "s", number, units(who), events).tolist() == can
                for name, pays in zip(who, can, strict=True):
                    if pays:
                        spent[name] = list(after[name])
                        charged.add(name)
            expected = sorted(spent[name] for name in charged)
            for book in books:
                assert sorted(book.accounts().patients.tolist()) == expected
                book.verify(signed)
        finally:
            for book in books:
                book.close()


# killed, crowded, starved


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Runs `work` in a forked process with a pipe to write to; returns its id and the pipe's other end."""
    there, here = os.pipe()
    with warnings.catch_warnings():
        # the child starts no thread that it does not own
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.close(there)
            work(here)
        finally:
            os._exit(0)
    os.close(here)
    return child, there


def all_of(pipe: int) -> bytes:
    with os.fdopen(pipe, "rb") as file:
        return file.read()


def test_a_hundred_kills_lose_no_charge_of_what_was_released(path: Path) -> None:
    wide = Budget(500.0, 1e-5)
    chance = random.Random(20310506)
    price = tariff(wide).price(ROUND).divergence
    released = 0
    for kill in range(100):

        def charge_and_release(pipe: int, run: str = f"run-{kill}") -> None:
            with ledger.connect(path, KEEPER, wide) as book:
                os.write(pipe, b"\0")
                for number in range(10_000):
                    # another cohort in each round, so that cohorts are written too
                    who = [PATIENTS[0], *(name for bit, name in enumerate(PATIENTS[1:]) if number >> bit & 1)]
                    assert book.charge(run, "s", number, units(who), ROUND)[0]
                    os.write(pipe, b"x")

        child, pipe = in_child(charge_and_release)
        seen = sum(len(os.read(pipe, 1)) for _ in range(1 + chance.randrange(3)))
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rounds = seen - 1 + len(all_of(pipe))
        released += rounds
        with ledger.connect(path, KEEPER, wide) as book:
            book.verify(signed if kill % 10 == 9 else None)
            if rounds:
                with pytest.raises(ProtocolError):
                    book.charge(f"run-{kill}", "s", rounds - 1, units(PATIENTS), ROUND)
            # the first patient is in every round; a kill between charge and release may have cost one more each
            most = int(book.accounts().patients[:, 0].max(initial=0))
            assert released * price <= most <= (released + kill + 1) * price
    assert released > 100


def test_processes_and_threads_at_once_never_spend_more_than_there_is(path: Path) -> None:
    most, tries, threads = rounds_that_fit(), 12, 8
    lists = [units(PATIENTS), units(PATIENTS[:3]), units(PATIENTS[::-1]), units(PATIENTS[2:])]
    assert 2 * threads * tries // 4 > most

    def hammer(pipe: int, name: str) -> None:
        paid: list[str] = []
        with opened(path) as book:

            def one(thread: int) -> None:
                who = lists[thread % len(lists)]
                for number in range(tries):
                    answer = book.charge(f"{name}-{thread}", "s", number, who, ROUND)
                    paid.extend(who[answer].tolist())

            crew = [threading.Thread(target=one, args=(thread,)) for thread in range(threads)]
            for thread in crew:
                thread.start()
            for thread in crew:
                thread.join()
        with os.fdopen(pipe, "w") as file:
            json.dump({patient: paid.count(patient) for patient in PATIENTS}, file)

    children = [in_child(lambda pipe, name=name: hammer(pipe, name)) for name in ("left", "right")]
    counts = [json.loads(all_of(pipe)) for _, pipe in children]
    for child, _ in children:
        assert os.waitpid(child, 0)[1] == 0
    # not one round too many, and none too few: each patient was asked for more often than that
    assert [counts[0][name] + counts[1][name] for name in PATIENTS] == [most] * len(PATIENTS)
    with opened(path) as book:
        book.verify(signed)
        price = book.tariff.price(ROUND).divergence
        assert (book.accounts().patients[:, 0] == most * price).all()
        assert book.head()[0] == 2 * threads * tries


class Faulty:
    """A connection whose next commit fails, before or after the charge is on the disk."""

    def __init__(self, connection: sqlite3.Connection, persists: bool) -> None:
        self.connection, self.persists, self.fails = connection, persists, False

    def execute(self, statement: str, *arguments: Any) -> sqlite3.Cursor:
        if statement == "COMMIT" and self.fails:
            self.fails = False
            if self.persists:
                self.connection.execute(statement)
            raise sqlite3.OperationalError("disk I/O error")
        return self.connection.execute(statement, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


@pytest.mark.parametrize("persists", [False, True], ids=["and_does_not_write", "but_writes"])
def test_a_commit_that_fails(path: Path, persists: bool) -> None:
    connection: Any = Faulty(ledger_file.opened(path, 1.0), persists)
    with SqliteLedger(connection, str(path), KEEPER, BUDGET) as book:
        book.charge("run", "s", 1, units(PATIENTS), ROUND)
        connection.fails = True
        with pytest.raises(SiteError, match=r"cannot be read or written .*Nothing was released"):
            book.charge("run", "s", 2, units(PATIENTS), ROUND)
        assert book.head()[0] == 1 + persists
        if persists:
            with pytest.raises(ProtocolError):
                book.charge("run", "s", 2, units(PATIENTS), ROUND)
        else:
            assert book.charge("run", "s", 2, units(PATIENTS), ROUND).all()
        price = book.tariff.price(ROUND).divergence
        assert (book.accounts().patients[:, 0] == 2 * price).all()
        book.verify(signed)


def test_a_failure_in_the_middle_of_a_charge_writes_nothing(path: Path) -> None:
    def broken(_: bytes) -> bytes:
        raise RuntimeError("no signature today")

    with ledger.connect(path, Keeper(KEY, clock, broken), BUDGET) as book:
        with pytest.raises(RuntimeError):
            book.charge("run", "s", 1, units(PATIENTS), ROUND)
        assert book.head()[0] == 0
    with opened(path) as book:
        assert book.charge("run", "s", 1, units(PATIENTS), ROUND).all()
        book.verify(signed)


def test_a_full_disk(path: Path, book: SqliteLedger) -> None:
    pages = book._connection.execute("PRAGMA page_count").fetchone()[0]
    book._connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    many = units([f"p{number}" for number in range(5000)])
    with pytest.raises(SiteError, match=r"cannot grow: the disk is full\. Nothing was released") as caught:
        book.charge("run", "s", 1, many, ROUND)
    assert caught.value.public == "this site's privacy ledger cannot be used"
    assert book.head()[0] == 0
    book._connection.execute("PRAGMA max_page_count = 100000")
    assert book.charge("run", "s", 1, many, ROUND).all()


def test_a_ledger_that_somebody_else_keeps_locked(path: Path) -> None:
    with opened(path, seconds=0.05) as book, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SiteError, match="is busy: another process keeps it from being written"):
            book.charge("run", "s", 1, units(PATIENTS), ROUND)
        # reading waits for nobody
        assert book.affordable(units(PATIENTS), ROUND).all()
        other.execute("ROLLBACK")
        assert book.charge("run", "s", 1, units(PATIENTS), ROUND).all()


def test_a_ledger_that_cannot_be_written(path: Path) -> None:
    with ledger.reading(path, KEEPER, BUDGET) as book:
        with pytest.raises(SiteError, match="cannot be written: the file or its folder is read-only"):
            book.charge("run", "s", 1, units(PATIENTS), ROUND)
        assert book.affordable(units(PATIENTS), ROUND).all()


def test_a_closed_ledger_says_so_in_a_sentence(path: Path) -> None:
    book = opened(path)
    book.close()
    with pytest.raises(SiteError, match="cannot be read or written"):
        book.charge("run", "s", 1, units(PATIENTS), ROUND)


# what was changed is found

OTHERS = "kind, time, run, study, round, cohort, body, signature, hash"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET study = 'x' WHERE seq = 1",
        "DELETE FROM entries",
        "DELETE FROM entries WHERE seq = 2",
        "UPDATE cohorts SET members = x''",
        "DELETE FROM cohorts",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE seq = 1",
        f"INSERT OR REPLACE INTO entries SELECT 3, previous, {OTHERS} FROM entries WHERE seq = 2",
        f"INSERT OR REPLACE INTO entries SELECT 3, hash, {OTHERS} FROM entries WHERE seq = 2",
        "INSERT OR REPLACE INTO cohorts SELECT digest, x'' FROM cohorts",
        "INSERT OR REPLACE INTO cohorts (rowid, digest, members) VALUES (1, x'00', x'')",
    ],
)
def test_rows_cannot_be_changed(path: Path, book: SqliteLedger, statement: str) -> None:
    for number in (1, 2):
        book.charge("run", "s", number, units(PATIENTS), ROUND)
    with closing(sqlite3.connect(path)) as other, pytest.raises(sqlite3.IntegrityError):
        other.execute(statement)
    book.verify(signed)


SAME_ENTRY = "entry 2 is not as it was written"
TAMPERINGS = {
    "time": ("UPDATE entries SET time = '2020-01-01' WHERE seq = 2", SAME_ENTRY),
    "run": ("UPDATE entries SET run = 'other' WHERE seq = 2", SAME_ENTRY),
    "study": ("UPDATE entries SET study = 'other' WHERE seq = 2", SAME_ENTRY),
    "round": ("UPDATE entries SET round = 77 WHERE seq = 2", SAME_ENTRY),
    "kind": ("UPDATE entries SET kind = 'open' WHERE seq = 2", SAME_ENTRY),
    "type": ("UPDATE entries SET time = 5 WHERE seq = 2", SAME_ENTRY),
    "negative": ("UPDATE entries SET round = -1 WHERE seq = 2", SAME_ENTRY),
    "price": (
        "UPDATE entries SET body = CAST(replace(body, '\"divergence\":', '\"divergence\":0') AS BLOB) WHERE seq = 2",
        SAME_ENTRY,
    ),
    "events": ("UPDATE entries SET body = CAST(replace(body, '12', '99') AS BLOB) WHERE seq = 2", SAME_ENTRY),
    "cohort": ("UPDATE entries SET cohort = (SELECT cohort FROM entries WHERE seq = 1) WHERE seq = 2", SAME_ENTRY),
    "previous": ("UPDATE entries SET previous = hash WHERE seq = 2", SAME_ENTRY),
    "hash": ("UPDATE entries SET hash = previous WHERE seq = 2", SAME_ENTRY),
    "last_hash": ("UPDATE entries SET hash = previous WHERE seq = 3", "entry 3 is not as it was written"),
    "signature": ("UPDATE entries SET signature = x'00' WHERE seq = 2", "entry 2 does not carry the site's signature"),
    "middle": ("DELETE FROM entries WHERE seq = 2", SAME_ENTRY),
    "renumbered": (
        "DELETE FROM entries WHERE seq = 1; UPDATE entries SET seq = seq - 1 WHERE seq > 1",
        "entry 1 is not",
    ),
    "beginning": ("DELETE FROM entries WHERE seq = 0", "entry 0 is not as it was written"),
    "everything": ("DELETE FROM entries; DELETE FROM cohorts", "entry 0 is not as it was written"),
    "swapped": (
        "UPDATE entries SET seq = 9 WHERE seq = 2; UPDATE entries SET seq = 2 WHERE seq = 3; "
        "UPDATE entries SET seq = 3 WHERE seq = 9",
        SAME_ENTRY,
    ),
    "end": ("DELETE FROM entries WHERE seq = 3", "entry 3 is gone or another one"),
    "members": ("UPDATE cohorts SET members = substr(members, 17) WHERE rowid = 1", "the cohort of entry 1 is not"),
    "odd_members": ("UPDATE cohorts SET members = x'0102' WHERE rowid = 1", "the cohort of entry 1 is not"),
    "text_members": ("UPDATE cohorts SET members = 'x' WHERE rowid = 2", "the cohort of entry 2 is not"),
    "cohort_gone": ("DELETE FROM cohorts WHERE rowid = 2", "the cohort of entry 2 is not as it was written"),
    "cohort_added": ("INSERT INTO cohorts VALUES (x'01', x'')", "a cohort that no entry names"),
    "version": ("PRAGMA user_version = 2", "version 2, and this program reads version 1"),
    "other_kind": ("PRAGMA application_id = 5", "is no ledger"),
}


def restored_triggers(connection: sqlite3.Connection) -> list[str]:
    """Drops all triggers, and returns what makes them again, as a careful forger would."""
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for name, _ in rows:
        connection.execute(f"DROP TRIGGER {name}")
    return [sql for _, sql in rows]


@pytest.fixture
def used(path: Path) -> tuple[Path, tuple[int, bytes]]:
    with opened(path) as book:
        book.charge("run", "s", 1, units(PATIENTS[:4]), ROUND)
        book.charge("run", "s", 2, units(PATIENTS[2:]), ROUND)
        book.charge("run", "s", 3, units(PATIENTS[:4]), ROUND)
        return path, book.head()


@pytest.mark.parametrize("kind", TAMPERINGS)
def test_a_change_by_hand_is_found(used: tuple[Path, tuple[int, bytes]], kind: str) -> None:
    path, head = used
    statements, sentence = TAMPERINGS[kind]
    with closing(sqlite3.connect(path, isolation_level=None)) as forger:
        triggers = restored_triggers(forger)
        for statement in [*statements.split("; "), *triggers]:
            forger.execute(statement)
    with pytest.raises(SiteError, match=sentence) as caught:
        with opened(path) as book:
            book.verify(signed, head)
    assert str(path) in str(caught.value) and "Nothing was released" in str(caught.value)


def test_a_lost_trigger_or_another_table_is_found(used: tuple[Path, tuple[int, bytes]]) -> None:
    path, _ = used
    for statement in ("CREATE TABLE more (x)", "DROP TRIGGER entries_update"):
        copy = path.with_name(f"{statement[:4]}.sqlite")
        shutil.copy(path, copy)
        with closing(sqlite3.connect(copy)) as forger:
            forger.execute(statement)
        with pytest.raises(SiteError, match="its tables or the triggers"):
            opened(copy)


def test_a_change_while_it_is_open_is_found_by_the_next_charge(used: tuple[Path, tuple[int, bytes]]) -> None:
    path, _ = used
    with opened(path) as book, closing(sqlite3.connect(path, isolation_level=None)) as forger:
        restored_triggers(forger)
        forger.execute("DELETE FROM entries WHERE seq > 1")
        for _ in range(2):
            with pytest.raises(SiteError, match="entry 3 is not as it was written"):
                book.charge("run", "s", 9, units(PATIENTS), ROUND)


def test_a_chain_that_was_computed_anew_is_found_by_its_signatures(tmp_path: Path) -> None:
    path = tmp_path / "forged.sqlite"
    unsigned = Keeper(KEY, clock)
    ledger_file.create(path, unsigned)
    with ledger.connect(path, unsigned, BUDGET) as book:
        book.charge("run", "s", 1, units(PATIENTS), (Gaussian(1e5),))
        book.verify()
        with pytest.raises(SiteError, match="entry 0 does not carry the site's signature"):
            book.verify(signed)


def test_an_older_copy_is_found_by_whoever_remembers_a_later_head(path: Path) -> None:
    old = path.with_name("old.sqlite")
    with opened(path) as book:
        book.charge("run", "s", 1, units(PATIENTS), ROUND)
    shutil.copy(path, old)
    with opened(path) as book:
        early = book.head()
        book.charge("run", "s", 2, units(PATIENTS), ROUND)
        late = book.head()
        book.verify(signed, early)
    with opened(old) as book:
        # nothing in the file itself tells
        book.verify(signed, early)
        with pytest.raises(SiteError, match="an older copy or another file was put in its place"):
            book.verify(signed, late)
        book.charge("run", "other", 2, units(PATIENTS), ROUND)
        with pytest.raises(SiteError, match="entry 2 is gone or another one"):
            book.verify(signed, late)


def damaged(data: bytes, kind: str) -> bytes:
    page = 4096
    return {
        "empty": b"",
        "text": b"# a ledger\n" * 100,
        "header": b"x" + data[1:],
        "cut": data[: len(data) // 2],
        "short": data[:1000],
        "zeros": data[:page] + bytes(len(data) - page),
        "noise": data[: 2 * page] + random.Random(1).randbytes(len(data) - 2 * page),
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "text", "header", "cut", "short", "zeros", "noise"])
def test_a_damaged_file_is_a_sentence(used: tuple[Path, tuple[int, bytes]], kind: str) -> None:
    path, _ = used
    path.write_bytes(damaged(path.read_bytes(), kind))
    before = path.read_bytes()
    with pytest.raises(SiteError, match=r"ledger\.sqlite (is|was|cannot) [^\n]*Nothing was released\.$"):
        with opened(path) as book:
            book.verify(signed)
    with pytest.raises(SiteError), ledger.reading(path, KEEPER, BUDGET) as book:
        book.verify(signed)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    path.chmod(0o600)
    before = path.read_bytes()
    with pytest.raises(SiteError, match="is no ledger"):
        opened(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ledger.sqlite"]


# what the file tells, and to whom


def test_a_ledger_is_never_made_by_opening_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(SiteError, match=r"cannot be opened \(No such file or directory\): restore it"):
        opened(path)
    with pytest.raises(SiteError, match="cannot be opened"), ledger.reading(path, KEEPER, BUDGET):
        pass
    assert os.listdir(tmp_path) == []


def test_a_ledger_is_begun_once_and_whole(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(SiteError, match="is there already, and a ledger is never replaced"):
        ledger_file.create(path, KEEPER)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["ledger.sqlite"]
    with pytest.raises(SiteError, match="cannot be written"):
        ledger_file.create(path.parent / "nowhere" / "ledger.sqlite", KEEPER)


def test_another_key_is_refused(path: Path) -> None:
    with pytest.raises(SiteError, match="begun under another key"):
        ledger.connect(path, Keeper(bytes(32), clock), BUDGET)


def test_its_files_are_the_owners_alone(path: Path, book: SqliteLedger) -> None:
    old = os.umask(0)
    try:
        ledger_file.create(path.with_name("open.sqlite"), KEEPER)
        with opened(path.with_name("open.sqlite")) as other:
            for one in (book, other):
                one.charge("run", "s", 1, units(PATIENTS), ROUND)
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes == {f"{name}.sqlite{end}": 0o600 for name in ("ledger", "open") for end in ("", "-wal", "-shm")}


def test_a_ledger_that_others_may_write_is_refused(path: Path) -> None:
    path.chmod(0o620)
    with pytest.raises(SiteError, match="can be written by others than its owner"):
        opened(path)


def test_no_patient_and_no_key_is_in_the_file_or_in_what_is_shown(path: Path, book: SqliteLedger) -> None:
    told = [repr(book), repr(KEEPER)]
    for number in range(2):
        book.charge("run", "s", number, units(PATIENTS), ROUND)
    roll = book._roll(units(PATIENTS))
    told += [repr(roll), repr(book.accounts())]
    for broken in (PATIENTS * 2, PATIENTS):
        with pytest.raises((SiteError, ProtocolError)) as caught:
            book.charge("run", "s", 1, units(broken), ROUND)
        told.append(f"{caught.value!r} {caught.value.__cause__!r}")
    bytes_there = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for secret in (*(name.encode() for name in PATIENTS), KEY, KEY.hex().encode(), b"anna"):
        assert secret not in bytes_there
        assert secret not in "".join(told).encode()
    # what is there instead depends on the key
    assert roll.keys[0] in bytes_there


def test_pseudonyms_are_the_first_bytes_of_hmac_sha256(book: SqliteLedger) -> None:
    # RFC 4231, test case 2
    keeper = Keeper(b"Jefe", clock)
    with ledger.in_memory(keeper, None) as other:
        (known,) = other._pseudonyms(("what do ya want for nothing?",))
    assert known.hex() == "5bdcc146bf60754e6a042426089575c7"


def test_reading_touches_nothing(path: Path) -> None:
    def state() -> dict[str, tuple[bytes, int]]:
        return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.parent.iterdir()}

    with opened(path) as book:
        book.charge("run", "s", 1, units(PATIENTS), ROUND)
    before = state()
    assert list(before) == ["ledger.sqlite"]
    with ledger.reading(path, KEEPER, BUDGET) as book:
        book.verify(signed)
        assert len(book.accounts().patients) == len(PATIENTS)
    assert state() == before


def test_reading_beside_a_ledger_that_is_in_use(path: Path, book: SqliteLedger) -> None:
    book.charge("run", "s", 1, units(PATIENTS), ROUND)
    with ledger.reading(path, KEEPER, BUDGET) as other:
        assert other.head() == book.head()
        book.charge("run", "s", 2, units(PATIENTS), ROUND)
        assert other.head() == book.head()
        other.verify(signed)


def test_reading_while_somebody_opens_it_is_done_again(path: Path) -> None:
    with pytest.raises(SiteError, match="was written meanwhile: ask again"):
        with ledger.reading(path, KEEPER, BUDGET), opened(path) as book:
            book.charge("run", "s", 1, units(PATIENTS), ROUND)


def test_reading_what_a_kill_left(path: Path) -> None:
    def charge_and_die(pipe: int) -> None:
        book = opened(path)
        book.charge("run", "s", 1, units(PATIENTS), ROUND)
        os.kill(os.getpid(), signal.SIGKILL)

    child, pipe = in_child(charge_and_die)
    os.waitpid(child, 0)
    os.close(pipe)
    with ledger.reading(path, KEEPER, BUDGET) as book:
        assert book.head()[0] == 1
        book.verify(signed)


def test_in_memory_it_is_the_same_ledger() -> None:
    with ledger.in_memory(Keeper(KEY, clock), BUDGET) as book:
        paid = [book.charge("run", "s", number, units(["p"]), ROUND)[0] for number in range(rounds_that_fit() + 1)]
        assert paid == [True] * rounds_that_fit() + [False]
        book.verify()


def test_rows_do_not_grow_with_the_number_of_patients(path: Path) -> None:
    count = 100_000
    everybody = units([f"patient-{number}" for number in range(count)])
    many: Events = (Gaussian(40.0),)
    with opened(path) as book:
        assert book.affordable(everybody, (Repeated(40, many[0]),)).all()
        for number in range(40):
            assert book.charge("run", "s", number, everybody, many).all()
        rows = [
            book._connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("entries", "cohorts")
        ]
        assert rows == [41, 1]
        book.verify(signed)
    assert path.stat().st_size < count * chain.KEY_BYTES * 1.1


def test_a_commit_waits_for_the_disk(book: SqliteLedger) -> None:
    settings = [book._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]
