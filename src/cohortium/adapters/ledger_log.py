"""The ledger as it is read: what is in the file is believed only where the chain and the digests hold.

Entries are read once, also those that other threads and processes append, and each must follow the one before. A
cohort's pseudonyms are read where they are needed, and must have the digest that the entry names.
"""

import hmac
import sqlite3
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import numpy as np

from cohortium.adapters import ledger_file
from cohortium.adapters.ledger_file import changed, unusable
from cohortium.site import chain
from cohortium.site.budget import Charge, Tariff
from cohortium.site.chain import Entry, Keys

MOST = 2**62
"""No price is larger, and no sum of them, so that none leaves the range of 64 bits."""
_COHORTS = 4
"""Cohorts that are kept, the last ones used: 11 MB each with 700,000 patients."""
_ANSWERED = "SELECT 1 FROM entries WHERE kind = 'charge' AND run = ? AND round = ?"


class Log:
    """A ledger's entries, up to the last one that was read.

    Attributes:
        head: the number and the digest of the last entry.
        charges: each charge, oldest first, with the digest of its cohort.
    """

    def __init__(self, connection: sqlite3.Connection, where: str, key: bytes, tariff: Tariff) -> None:
        self._connection, self._where, self._tariff = connection, where, tariff
        self._cohorts: OrderedDict[bytes, Keys] = OrderedDict()
        self._require_own(key)
        self.head = -1, chain.START
        self.charges: list[tuple[bytes, Charge]] = []
        self.advance()

    def advance(self) -> None:
        """Reads the entries that were appended since the last time, here or elsewhere.

        Raises:
            SiteError: one does not follow, or the last one that was read is gone.
        """
        seq, digest = self.head
        if seq >= 0 and self._digest_of(seq) != digest:
            raise changed(self._where, seq)
        for *row, stored in self._connection.execute(f"{ledger_file.ENTRIES} WHERE seq > ? ORDER BY seq", (seq,)):
            entry = self._entry(row, seq + 1)
            if not chain.follows(entry, seq + 1, digest) or stored != entry.digest:
                raise changed(self._where, seq + 1)
            if entry.kind == "charge":
                self.charges.append((entry.cohort, self._charge(entry)))
            seq, digest = self.head = entry.seq, entry.digest

    def holds(self, run: str, round: int) -> bool:
        """Returns whether a round of a run was charged."""
        return self._connection.execute(_ANSWERED, (run, round)).fetchone() is not None

    def entry(self, run: str, round: int) -> Entry:
        """Returns the entry of a round that was charged.

        Raises:
            SiteError: it is not as it was written.
        """
        where = " WHERE kind = 'charge' AND run = ? AND round = ?"
        *row, stored = self._connection.execute(ledger_file.ENTRIES + where, (run, round)).fetchone()
        entry = self._entry(row, self.head[0])
        if stored != entry.digest:
            raise changed(self._where, entry.seq)
        return entry

    def charged(self) -> dict[bytes, None]:
        """Returns the cohorts that were charged, in the order of their first charge."""
        return dict.fromkeys(cohort for cohort, _ in self.charges)

    def cohort(self, digest: bytes) -> Keys:
        """Returns a cohort's pseudonyms.

        Raises:
            SiteError: they are not those that were charged.
        """
        keys = self._cohorts.pop(digest, None)
        if keys is None:
            row = self._connection.execute("SELECT members FROM cohorts WHERE digest = ?", (digest,)).fetchone()
            keys = self._keys(row[0] if row else None, digest)
        self._cohorts[digest] = keys
        while len(self._cohorts) > _COHORTS:
            self._cohorts.popitem(last=False)
        return keys

    def verify(self, signed: Callable[[bytes, bytes], bool] | None, remembered: tuple[int, bytes] | None) -> None:
        """Checks each cohort, and signatures and a remembered head where they are given.

        Raises:
            SiteError: something is not as it was written.
        """
        known = self.charged()
        for digest in known:
            self.cohort(digest)
        for (digest,) in self._connection.execute("SELECT digest FROM cohorts").fetchall():
            if digest not in known:
                raise unusable(self._where, "was changed: it holds a cohort that no entry names")
        rows = self._connection.execute("SELECT seq, signature, hash FROM entries ORDER BY seq") if signed else ()
        for seq, signature, digest in rows:
            assert signed is not None
            if not isinstance(signature, bytes) or not signed(signature, digest):
                raise unusable(self._where, f"was changed: entry {seq} does not carry the site's signature")
        if remembered and self._digest_of(remembered[0]) != remembered[1]:
            raise unusable(
                self._where,
                f"is not the ledger that was seen before: entry {remembered[0]} is gone or another one; an older copy "
                "or another file was put in its place",
            )

    def _require_own(self, key: bytes) -> None:
        row = self._connection.execute(f"{ledger_file.ENTRIES} WHERE seq = 0").fetchone()
        try:
            opened = chain.opened(self._entry(row[:-1] if row else None, 0))
        except msgspec.DecodeError:
            raise changed(self._where, 0) from None
        if not hmac.compare_digest(opened.key, chain.key_digest(key)):
            raise unusable(
                self._where, "was begun under another key, so that everybody in it would be new: restore its own key"
            )

    def _digest_of(self, seq: int) -> bytes | None:
        row = self._connection.execute("SELECT hash FROM entries WHERE seq = ?", (seq,)).fetchone()
        return row[0] if row else None

    def _entry(self, row: object, seq: int) -> Entry:
        try:
            return msgspec.convert(row, type=Entry)
        except msgspec.ValidationError:
            raise changed(self._where, seq) from None

    def _charge(self, entry: Entry) -> Charge:
        try:
            content = chain.charged(entry)
        except msgspec.DecodeError:
            raise unusable(
                self._where, f"charges in entry {entry.seq} for what this version does not know: update it"
            ) from None
        price = self._tariff.price_of(content)
        if not 0 <= price.divergence <= MOST or not 0 <= price.slack <= MOST:
            raise changed(self._where, entry.seq)
        return Charge(entry.time, entry.run, entry.study, entry.round, price)

    def _keys(self, data: object, digest: bytes) -> Keys:
        if isinstance(data, bytes) and len(data) % chain.KEY_BYTES == 0:
            keys = np.frombuffer(data, dtype=chain.KEYS)
            if chain.cohort_digest(keys) == digest and chain.rising(keys):
                return keys
        # the first entry is no charge
        seq = 1 + [cohort for cohort, _ in self.charges].index(digest)
        raise unusable(
            self._where,
            f"was changed: the cohort of entry {seq} is not as it was written; restore the newest copy that holds",
        )
