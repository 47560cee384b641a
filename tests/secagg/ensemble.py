"""Sites and a coordinator of made-up secure sums, and a coordinator's lies, for tests."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from cohortium.core.messages import Announcement, Endorsed, Endorsement, MaskedUpdate, Reveal, Survivors
from cohortium.core.random import Randomness
from cohortium.core.signature import sign
from cohortium.secagg import keys
from cohortium.secagg.group import Group
from cohortium.secagg.masking import Masking
from cohortium.secagg.protocol import NO_TOTAL, Member, Tally
from cohortium.secagg.quantise import residue_kind

STUDY = "sha256:made-up"
PURPOSE = "cohortium survivors v1"
COORDINATOR = Ed25519PrivateKey.from_private_bytes(Randomness.of_seed(99).bytes(32))
STRANGER = Ed25519PrivateKey.from_private_bytes(Randomness.of_seed(98).bytes(32))


@dataclass
class Ensemble:
    """The members of a run, which move on as they are asked; the first ones stay in `fresh`."""

    run: str
    group: Group
    session: bytes
    announcements: tuple[Announcement, ...]
    fresh: Mapping[str, Member]
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def sites(self) -> tuple[str, ...]:
        return self.group.sites

    def context(self, number: int = 1, broadcast: bytes = b"ask") -> bytes:
        return keys.round_context(self.session, number, broadcast)

    def protect(
        self, site: str, scheme: Any, vector: np.ndarray, number: int = 1, broadcast: bytes = b"ask"
    ) -> MaskedUpdate:
        randomness = Randomness.of_seed(7).child(self.run, repr(self.group), site, number, broadcast.hex())
        update, self.members[site] = self.members[site].protect(number, broadcast, scheme, vector, randomness)
        return update

    def tally(self, scheme: Any, number: int = 1, broadcast: bytes = b"ask") -> Tally:
        return Tally(self.run, number, scheme, self.context(number, broadcast))

    def survivors(
        self,
        to: str,
        chosen: Iterable[str],
        updates: Mapping[str, MaskedUpdate],
        number: int = 1,
        broadcast: bytes = b"ask",
        signer: Ed25519PrivateKey = COORDINATOR,
    ) -> Survivors:
        """Returns what a coordinator may tell a site about any set of sites, in any order."""
        chosen = tuple(chosen)
        signature = sign(signer, PURPOSE, self.context(number, broadcast), *(site.encode() for site in chosen))
        sealed = []
        for sender in chosen:
            dealt = updates[sender].sealed if sender in updates else ()
            if sender != to and dealt:
                sealed.append(dealt[self.group.peers(sender).index(to)])
        return Survivors(self.run, number, chosen, signature, tuple(sealed))


@lru_cache(maxsize=64)
def _founded(count: int, threshold: int, run: str) -> Ensemble:
    root = Randomness.of_seed(count)
    names = sorted(f"{chr(97 + (index * 7) % 26)}{index}" for index in range(count))
    identities = {name: Ed25519PrivateKey.from_private_bytes(root.child("id", name).bytes(32)) for name in names}
    privates = {name: X25519PrivateKey.from_private_bytes(root.child(run, name).bytes(32)) for name in names}
    entries = tuple(keys.announce(identities[name], privates[name], run, STUDY, name) for name in names)
    pinned = {name: identity.public_key().public_bytes_raw() for name, identity in identities.items()}
    keys.check(entries, pinned, run, STUDY, threshold)
    group, session = Group(tuple(names), threshold), keys.session_digest(run, STUDY, threshold, entries)
    known = COORDINATOR.public_key().public_bytes_raw()
    fresh = {
        mine.site: Member(run, mine.site, group, keys.agree(privates[mine.site], mine, entries), session, known)
        for mine in entries
    }
    return Ensemble(run, group, session, entries, fresh)


def ensemble(count: int, threshold: int, run: str = "run") -> Ensemble:
    """Returns a run whose sites have agreed on keys and have done nothing else. The names are not in order of size."""
    founded = _founded(count, threshold, run)
    return Ensemble(
        run, founded.group, founded.session, founded.announcements, founded.fresh, members=dict(founded.fresh)
    )


def vectors(sites: Iterable[str], length: int, bits: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Returns small numbers of both signs, whose sums fit into their bits."""
    drawn = np.random.default_rng(seed)
    most = max(1, (1 << (bits - 1)) // 128 - 1)
    kind = residue_kind(bits)
    return {site: drawn.integers(-most, most + 1, length).astype(np.int64).astype(kind) for site in sites}


def plain_sum(chosen: Iterable[str], plain: Mapping[str, np.ndarray]) -> np.ndarray:
    parts = [plain[site] for site in chosen]
    total: np.ndarray = np.add.reduce(parts, dtype=parts[0].dtype)  # numpy would widen small integers
    return total


def answered(to: str, endorsements: Mapping[str, Endorsement], chosen: tuple[str, ...]) -> Endorsed:
    """Returns what a site is told of the others' endorsements of one set, whose tags are in that set's order."""
    others = tuple(site for site in sorted(endorsements) if site != to)
    tags = tuple(endorsements[site].tags[[name for name in chosen if name != site].index(to)] for site in others)
    one = next(iter(endorsements.values()))
    return Endorsed(one.run, one.round, others, tags, NO_TOTAL)


@dataclass
class Rehearsal:
    """A masked round of an ensemble in which every site has contributed, and what its coordinator then learns."""

    cast: Ensemble
    scheme: Any
    plain: Mapping[str, np.ndarray]
    updates: dict[str, MaskedUpdate]
    number: int = 1

    @staticmethod
    def of(count: int, threshold: int, kind: Any = Masking, length: int = 64, bits: int = 32) -> "Rehearsal":
        cast = ensemble(count, threshold)
        scheme = kind(cast.group, length, bits)
        plain = vectors(cast.sites, length, bits)
        return Rehearsal(cast, scheme, plain, {site: cast.protect(site, scheme, plain[site]) for site in cast.sites})

    def endorse(self, site: str, chosen: Iterable[str]) -> Endorsement:
        message = self.cast.survivors(site, chosen, self.updates, self.number)
        endorsement, self.cast.members[site] = self.cast.members[site].endorse(message)
        return endorsement

    def forked(self, site: str, chosen: Iterable[str]) -> tuple[Endorsement, Reveal]:
        """Returns what a corrupt site says of a set: it keeps to no rule, and forgets what it said of another."""
        chosen = tuple(chosen)
        member = self.cast.members[site]
        endorsement, later = member.endorse(self.cast.survivors(site, chosen, self.updates, self.number))
        answer = self.scheme.answer(site, chosen, later.rounds[self.number].shares, NO_TOTAL)
        return endorsement, Reveal(self.cast.run, site, self.number, answer)

    def reveal(self, site: str, message: Endorsed) -> Reveal:
        answer, self.cast.members[site] = self.cast.members[site].reveal(message)
        return answer

    def opened(self, chosen: Iterable[str], reveals: Iterable[Reveal]) -> np.ndarray:
        """Opens the sum over a set from the sites' answers, as a coordinator would."""
        chosen = tuple(chosen)
        tally = self.cast.tally(self.scheme, self.number)
        for site in chosen:
            tally = tally.contribute(self.updates[site])
        tally, _ = tally.close(COORDINATOR)
        for reveal in reveals:
            tally = _answered(tally, reveal)
        return tally.opened()


def _answered(tally: Tally, reveal: Reveal) -> Tally:
    from msgspec.structs import replace

    return replace(tally, answers={**tally.answers, reveal.site: reveal.answer})
