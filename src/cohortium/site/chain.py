"""The ledger's entries as values: each holds the digest of the one before it, so none can be changed or left out.

Trust: whoever may write the ledger's file can replace all of it by a chain that holds, or by an older copy of itself.
The first is found where entries are signed, the second only by somebody who remembers a later head.
"""

import hashlib
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from cohortium.core.events import Events
from cohortium.core.signature import framed

START = bytes(32)
"""What the first entry has for the digest of the one before it."""
KEY_BYTES = 16
"""A unit's pseudonym: no two of a billion units share one, but for one chance in 10^20."""
KEYS = np.dtype(f"S{KEY_BYTES}")

Keys = NDArray[np.bytes_]
"""Units' pseudonyms, `(n,)` of 16 bytes each; in a cohort they rise strictly."""


class Opened(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a ledger begins with.

    Attributes:
        key: a digest that tells whether a key is the ledger's own.
    """

    key: str


class Charged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What each unit of an entry's cohort was charged, and for what.

    Attributes:
        order, divergence, slack: the price as it was counted then, at the Renyi order of the budget of that day
            (`cohortium.privacy.renyi`).
    """

    events: Events
    order: int
    divergence: int
    slack: int


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A line of the ledger: its number from 0, the digest of the one before, what happened and when, to which cohort.

    `body` is an `Opened` or a `Charged` as JSON, `cohort` the digest of the units' pseudonyms.
    """

    seq: int
    previous: bytes
    kind: Literal["open", "charge"]
    time: str
    run: str
    study: str
    round: int
    cohort: bytes
    body: bytes

    @property
    def digest(self) -> bytes:
        """The SHA-256 digest of everything in the entry."""
        texts = (str(self.seq), self.kind, self.time, self.run, self.study, str(self.round))
        parts = (self.previous, *(text.encode() for text in texts), self.cohort, self.body)
        return hashlib.sha256(framed(b"cohortium ledger entry 1", *parts)).digest()


def body(content: Opened | Charged) -> bytes:
    """Returns what happened as JSON, equal contents as equal bytes."""
    return msgspec.json.encode(content, order="deterministic")


def opened(entry: Entry) -> Opened:
    """Returns what a ledger's first entry says.

    Raises:
        msgspec.DecodeError: it says something else.
    """
    return msgspec.json.decode(entry.body, type=Opened)


def charged(entry: Entry) -> Charged:
    """Returns what a charge says.

    Raises:
        msgspec.DecodeError: it says something else, or names an event that this version does not know.
    """
    return msgspec.json.decode(entry.body, type=Charged)


def cohort_digest(keys: Keys) -> bytes:
    """Returns the SHA-256 digest of a cohort's pseudonyms, which rise strictly."""
    return hashlib.sha256(framed(b"cohortium ledger cohort 1", keys.tobytes())).digest()


def key_digest(key: bytes) -> str:
    """Returns a digest by which a key is recognised and from which it cannot be had."""
    return hashlib.sha256(framed(b"cohortium ledger key 1", key)).hexdigest()


def follows(entry: Entry, seq: int, previous: bytes) -> bool:
    """Returns whether an entry is number `seq` and holds the digest of the one before it."""
    return entry.seq == seq and entry.previous == previous and (entry.kind == "open") == (seq == 0)


def rising(keys: Keys) -> bool:
    """Returns whether each pseudonym is larger than the one before it."""
    return bool((keys[1:] > keys[:-1]).all())
