"""The privacy ledger in SQLite: appended to, never changed, and on the disk before anything is released.

A charge is one transaction that holds the write lock from the look at what was spent to the commit, so that threads
and processes charge one after the other; it is durable when it returns (write-ahead log, synchronous FULL). A cohort is
stored once as its units' pseudonyms, and an entry of the chain names it by its digest, so a round takes some hundred
bytes whatever the number of patients.

Trust: the file holds pseudonyms, studies, times and prices. Without the key nobody can be looked for in it; with the
key whoever knows an identifier can tell in which studies it was. Whoever may write the file can do what no file
prevents: delete it, put back an older copy, or, where entries are not signed, write another one that holds together. So
others should remember `head`, and `verify` compares.
"""

import hmac
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from cohortium.adapters import ledger_file
from cohortium.adapters.ledger_file import Keeper, speaking, unusable
from cohortium.adapters.ledger_log import MOST, Log
from cohortium.core.errors import ProtocolError, SiteError
from cohortium.core.events import Events
from cohortium.core.filter import Column
from cohortium.privacy.calibrate import Budget
from cohortium.privacy.renyi import Price
from cohortium.site import chain
from cohortium.site.budget import SITE, Accounts, Charge, Spent, can_pay, study_cost, tariff
from cohortium.site.chain import Charged, Entry, Keys

_ROLLS = 8
"""Lists of units whose spends are kept, the last ones used: some 100 MB each with 700,000 patients."""
_FREE = Price(0, 0)
_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""


@dataclass
class _Roll:
    """A list of units and what they have spent up to a place in the chain, in the order of their pseudonyms.

    Attributes:
        order: where each of them stands in the list, `(n,)`.
        position: how many charges are counted in `spent`.
    """

    order: NDArray[np.intp] = field(repr=False)
    keys: Keys = field(repr=False)
    digest: bytes
    spent: Spent = field(repr=False)
    position: int = 0

    def as_listed(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Returns a mask over the pseudonyms as one over the list."""
        listed = np.empty_like(mask)
        listed[self.order] = mask
        return listed

    def places(self, keys: Keys) -> NDArray[np.intp]:
        """Returns where a cohort's units stand among the pseudonyms, those of them that do."""
        if not len(self.keys):
            return np.arange(0)
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        places: NDArray[np.intp] = found[self.keys[found] == keys]
        return places


class SqliteLedger:
    """A site's ledger (`cohortium.site.ports.Ledger`) in a file, or in memory. Threads may share one.

    Use `connect`, `reading` or `in_memory`. A ledger must not be taken across a fork.
    """

    def __init__(self, connection: sqlite3.Connection, where: str, keeper: Keeper, budget: Budget | None) -> None:
        self._connection, self._where, self._keeper = connection, where, keeper
        self.tariff = tariff(budget)
        self._lock = RLock()
        self._rolls: OrderedDict[tuple[str | bytes, ...], _Roll] = OrderedDict()
        with speaking(where):
            self._log = Log(connection, where, keeper.key, self.tariff)

    def __enter__(self) -> "SqliteLedger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file. What was charged stays."""
        with self._lock:
            self._connection.close()

    def affordable(self, units: Column, events: Events) -> NDArray[np.bool_]:
        """Returns which units could pay for events now; writes nothing."""
        price = self.tariff.price(events)
        with self._lock, speaking(self._where):
            roll = self._roll(units)
            self._catch_up(roll)
            return roll.as_listed(can_pay(roll.spent, price, self.tariff.limit))

    def holds(self, run: str, round: int) -> bool:
        """Returns whether a round of a run was charged."""
        with self._lock, speaking(self._where):
            return self._log.holds(run, round)

    def charge(
        self, run: str, study: str, round: int, units: Column, events: Events, *, again: bool = False
    ) -> NDArray[np.bool_]:
        """Charges each unit that can pay for all of the events, durably, and returns which ones did."""
        price = self.tariff.price(events)
        with self._lock, speaking(self._where):
            roll = self._roll(units)
            # what may take long is done before others have to wait
            self._catch_up(roll)
            with ledger_file.writing(self._connection):
                self._catch_up(roll)
                if self._log.holds(run, round):
                    paid = self._paid(run, study, round, roll, events) if again else None
                    if paid is None:
                        raise ProtocolError(f"round {round} was refused: this site was charged for it before")
                    return roll.as_listed(paid)
                pays = can_pay(roll.spent, price, self.tariff.limit)
                self._require_countable(roll.spent[pays], price)
                keys = roll.keys[pays]
                cohort = roll.digest if pays.all() else chain.cohort_digest(keys)
                ledger_file.store(self._connection, cohort, keys)
                body = chain.body(Charged(events, self.tariff.order, price.divergence, price.slack))
                seq, previous = self._log.head
                entry = Entry(seq + 1, previous, "charge", "", run, study, round, cohort, body)
                ledger_file.append(self._connection, self._keeper, entry)
            return roll.as_listed(pays)

    def head(self) -> tuple[int, bytes]:
        """Returns the number and the digest of the last entry, for others to remember."""
        with self._lock, speaking(self._where):
            self._log.advance()
            return self._log.head

    def accounts(self) -> Accounts:
        """Returns what studies cost and what each patient spent, without telling whose it is."""
        with self._lock, speaking(self._where):
            self._log.advance()
            keys = self._pseudonyms(())
            for digest in self._log.charged():
                keys = np.union1d(keys, self._log.cohort(digest))
            roll = _Roll(np.arange(len(keys)), keys, b"", _nothing(keys))
            by_study: dict[str, list[tuple[bytes, Charge]]] = {}
            for cohort, charge in self._log.charges:
                by_study.setdefault(charge.study, []).append((cohort, charge))
            costs = []
            for study, charges in by_study.items():
                paid = self._added(_nothing(keys), roll, charges)
                most = Price(*paid.max(axis=0, initial=0).tolist())
                costs.append(study_cost(study, [charge for _, charge in charges], most))
            spent = self._added(roll.spent, roll, self._log.charges)
            is_site = keys == self._pseudonyms((SITE,))[0]
            site = Price(*spent[is_site].sum(axis=0).tolist())
            prices = frozenset(charge.price for _, charge in self._log.charges)
            return Accounts(self.tariff, tuple(costs), prices, spent[~is_site], site)

    def verify(
        self,
        signed: Callable[[bytes, bytes], bool] | None = None,
        remembered: tuple[int, bytes] | None = None,
    ) -> None:
        """Reads and computes the whole ledger again: tables, pages, chain, each cohort's digest, and signatures.

        Args:
            signed: tells of a signature and a digest whether the site signed it; None: signatures are passed over.
            remembered: a head that somebody kept; without one an older copy of the file is as good as the newest.

        Raises:
            SiteError: something is not as it was written; the sentence says what and where.
        """
        with self._lock, speaking(self._where):
            ledger_file.check(self._connection, self._where)
            ledger_file.check_pages(self._connection, self._where)
            Log(self._connection, self._where, self._keeper.key, self.tariff).verify(signed, remembered)

    def _paid(self, run: str, study: str, round: int, roll: _Roll, events: Events) -> NDArray[np.bool_] | None:
        """Returns who paid for a round that is charged, or None if that was for something else or to others."""
        entry = self._log.entry(run, round)
        if entry.study != study or chain.charged(entry).events != events:
            return None
        keys = self._log.cohort(entry.cohort)
        paid: NDArray[np.bool_] = np.isin(roll.keys, keys)
        return paid if int(paid.sum()) == len(keys) else None

    def _roll(self, units: Column) -> _Roll:
        """Returns a list of units, with what they have spent if it was looked up lately."""
        names = tuple(units.tolist())
        roll = self._rolls.pop(names, None) or self._new_roll(names)
        self._rolls[names] = roll
        while len(self._rolls) > _ROLLS:
            self._rolls.popitem(last=False)
        return roll

    def _new_roll(self, names: tuple[str | bytes, ...]) -> _Roll:
        hidden = self._pseudonyms(names)
        order = np.argsort(hidden, kind="stable")
        keys = hidden[order]
        if not chain.rising(keys):
            reason = "the cohort names a patient twice, who would be charged once"
            raise SiteError(f"{reason}. Nothing was released.", public=reason)
        return _Roll(order, keys, chain.cohort_digest(keys), _nothing(keys))

    def _catch_up(self, roll: _Roll) -> None:
        """Adds what was charged since the last time, here or elsewhere."""
        self._log.advance()
        roll.spent = self._added(roll.spent, roll, self._log.charges[roll.position :])
        roll.position = len(self._log.charges)

    def _added(self, spent: Spent, roll: _Roll, charges: Sequence[tuple[bytes, Charge]]) -> Spent:
        """Returns what a list of units has spent after more charges."""
        new: dict[bytes, Price] = {}
        for cohort, charge in charges:
            new[cohort] = new.get(cohort, _FREE) + charge.price
        # into a copy, so that a failure on the way leaves no half of it
        spent = spent.copy() if new else spent
        for cohort, price in new.items():
            places = slice(None) if cohort == roll.digest else roll.places(self._log.cohort(cohort))
            self._require_countable(spent[places], price)
            spent[places] += np.array([price.divergence, price.slack], dtype=np.int64)
        return spent

    def _require_countable(self, spent: Spent, price: Price) -> None:
        if int(spent.max(initial=0)) + max(price.divergence, price.slack) > MOST:
            raise unusable(self._where, "cannot count a price as high as this study's")

    def _pseudonyms(self, names: tuple[str | bytes, ...]) -> Keys:
        """Returns HMAC-SHA256 of each name under the key, its first bytes; the site's own is no text."""
        key, size = self._keeper.key, chain.KEY_BYTES
        messages = (name.encode("utf-8", "surrogatepass") if isinstance(name, str) else name for name in names)
        hidden = (hmac.digest(key, message, "sha256")[:size] for message in messages)
        return np.frombuffer(b"".join(hidden), dtype=chain.KEYS)


def connect(path: Path, keeper: Keeper, budget: Budget | None, seconds: float = _PATIENCE) -> SqliteLedger:
    """Opens a ledger that is there; it is never made by being opened, which would be a way to reset it.

    Args:
        path: the file.
        keeper: the key it was made with, the clock, and the site's signature.
        budget: what each unit may spend; None: everything is counted and nobody is refused.
        seconds: how long to wait for another process that writes.

    Raises:
        SiteError: it is missing, is no ledger, was changed, or has another key.
    """
    return _kept(ledger_file.opened(path, seconds), str(path), keeper, budget)


def in_memory(keeper: Keeper, budget: Budget | None) -> SqliteLedger:
    """Returns an empty ledger that is forgotten when it is closed: for simulations."""
    return _kept(ledger_file.in_memory(keeper), "the simulation's ledger", keeper, budget)


@contextmanager
def reading(path: Path, keeper: Keeper, budget: Budget | None) -> Iterator[SqliteLedger]:
    """Yields a ledger that cannot be charged, and touches neither its file nor the folder.

    Raises:
        SiteError: as for `connect`.
    """
    with ledger_file.opened_for_reading(path) as connection:
        yield SqliteLedger(connection, str(path), keeper, budget)


def _kept(connection: sqlite3.Connection, where: str, keeper: Keeper, budget: Budget | None) -> SqliteLedger:
    try:
        return SqliteLedger(connection, where, keeper, budget)
    except BaseException:
        connection.close()
        raise


def _nothing(keys: Keys) -> Spent:
    return np.zeros((len(keys), 2), dtype=np.int64)
