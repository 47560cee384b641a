"""The secure sum as two state machines, without I/O, clock or randomness of their own. Schemes are interchangeable.

    site                                        coordinator
    Member.protect   --> MaskedUpdate     -->   Tally.contribute      until the round closes
                     <-- Survivors        <--   Tally.close           U, signed; at least t sites
    Member.endorse   --> Endorsement      -->   Tally.endorse
                     <-- Endorsed         <--   Tally.endorsed        to each of U, at least t endorsers
    Member.reveal    --> Reveal           -->   Tally.reveal
                                                Tally.opened          from at least t answers

A site protects once in a round, endorses one survivor set that holds itself and at least t sites, and reveals for
that set alone, once t sites (itself among them) have endorsed it to it. Endorsements are tags under the keys of
pairs, so the coordinator cannot make one for an honest pair.

Why two sets cannot both be opened. A site that reveals saw t endorsements of its set; of those, at least t - c are by
honest sites, and an honest site endorses one set a round. Two sets would take 2 (t - c) honest sites out of n - c, so
for c <= 2t - n - 1 all honest sites reveal for one set U. Fewer than t shares of any secret outside U are then ever
shown, and the sum over U holds at least t - c >= n - t + 1 honest sites.

Source: Bonawitz et al., CCS 2017, section 6.2 (the consistency check, there by signatures) and theorem 6.5.

Trust: see `cohortium.secagg.group`. What an attacker gains who holds a `Member`: that site's keys of this run, so
whatever it could have learnt by corrupting the site from the beginning of the run. A `Tally` holds no secret.
"""

from collections.abc import Mapping
from hashlib import blake2b
from hmac import compare_digest

import msgspec
import numpy as np
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from msgspec.structs import replace
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError, Repeated, RoundRefused
from cohortium.core.messages import Endorsed, Endorsement, MaskedUpdate, Reveal, Survivors
from cohortium.core.random import Randomness
from cohortium.core.signature import framed, sign, verify
from cohortium.secagg.group import Group
from cohortium.secagg.keys import Pairs, purpose_key, round_context
from cohortium.secagg.quantise import Residues
from cohortium.secagg.scheme import Payload, Scheme
from cohortium.secagg.shamir import PRIME, Words, share

_PURPOSE = "cohortium survivors v1"
_MOST_OPEN = 4
"""Rounds that a site keeps open at a time; a round that is opened later closes the oldest."""
_NONCE = bytes(12)
"""Every key that seals is used once."""
_TAG = 16
NO_TOTAL = np.empty(0, np.uint8)


class Pending(msgspec.Struct, frozen=True):
    """A round in which a site has contributed. `shares` are secret, and gone once it has revealed."""

    scheme: Scheme
    context: bytes
    seeds: Mapping[str, bytes]
    shares: Mapping[str, Words]
    survivors: tuple[str, ...] = ()
    revealed: bool = False

    def __repr__(self) -> str:
        return f"Pending(survivors={self.survivors!r}, revealed={self.revealed})"


class Member(msgspec.Struct, frozen=True):
    """A site's half of the secure sums of one run. Each method returns the message and the member after it.

    Attributes:
        run, me: the run's name and the site's.
        group: the sites that agreed on keys. A round's scheme may be for some of them.
        session: what stands for the run's key set (`keys.session_digest`).
        coordinator: the coordinator's pinned Ed25519 public key (32 bytes).
        last_round: the last round protected, or passed over; only later ones are.
        rounds: the latest of them, which may still be opened.
    """

    run: str
    me: str
    group: Group
    pairs: Pairs
    session: bytes
    coordinator: bytes
    last_round: int = 0
    rounds: Mapping[int, Pending] = msgspec.field(default_factory=dict)

    def protect(
        self, number: int, broadcast: bytes, scheme: Scheme, vector: Residues, randomness: Randomness
    ) -> "tuple[MaskedUpdate, Member]":
        """Returns the site's contribution to a round.

        Args:
            broadcast: what stands for all that the coordinator has broadcast (`keys.history`) and for the sites that
                it selects (`keys.among`). Where two sites heard other things, now or before, nothing adds up.
            scheme: that of the sites which sum in this round, this one among them.
            randomness: for this round alone.

        Raises:
            Repeated: the round is not later than the last one: two vectors under one mask would show their difference.
            ProtocolError: the vector does not fit the scheme.
        """
        if number <= self.last_round:
            raise Repeated(f"round {number} was refused: round {self.last_round} is already protected")
        pairs, context = self.pairs.at(number), round_context(self.session, number, broadcast)
        every = pairs.round_seeds(number)
        seeds = {peer: every[peer] for peer in scheme.group.peers(self.me)}
        values, secret = scheme.protect(self.me, seeds, context, vector, randomness)
        sealed, own = self._dealt(scheme, seeds, context, secret, randomness)
        rounds = dict(self.rounds)
        if scheme.opens:
            rounds[number] = Pending(scheme, context, seeds, own)
            for oldest in sorted(rounds)[:-_MOST_OPEN]:
                del rounds[oldest]
        later = replace(self, pairs=pairs, last_round=number, rounds=rounds)
        return MaskedUpdate(self.run, self.me, number, values, sealed), later

    def passed(self, number: int) -> "Member":
        """Returns the member that takes no part in a round, and in none before it any more."""
        return replace(self, last_round=max(number, self.last_round))

    def endorse(self, message: Survivors) -> "tuple[Endorsement, Member]":
        """Returns the site's endorsement of a survivor set.

        Raises:
            Repeated: it has endorsed this very set already.
            RoundRefused: a share does not open; whether its dealer or the coordinator spoiled it, nobody can tell.
            ProtocolError: it endorsed another one, did not contribute, or the set is too small, out of order, not
                signed by the pinned coordinator, or lacks this site.
        """
        pending, chosen = self._pending(message.round), message.sites
        group = pending.scheme.group
        if pending.survivors:
            if chosen == pending.survivors:
                raise Repeated(f"the survivors of round {message.round} are endorsed already")
            raise ProtocolError(f"a second survivor set for round {message.round} was refused: one was endorsed")
        if chosen != tuple(sorted(set(chosen) & set(group.sites))) or self.me not in chosen:
            raise ProtocolError(
                "a survivor set was refused: it must list sites of the run in order, once each, this one too"
            )
        if len(chosen) < group.threshold:
            raise ProtocolError(
                f"a survivor set of {len(chosen)} sites was refused: below {group.threshold} the sum stays closed"
            )
        try:
            public = Ed25519PublicKey.from_public_bytes(self.coordinator)
            verify(public, message.signature, _PURPOSE, *_signed_parts(pending.context, chosen))
        except (InvalidSignature, ValueError):
            raise ProtocolError("a survivor set was refused: the pinned coordinator did not sign it") from None
        others = tuple(site for site in chosen if site != self.me)
        shares = {**pending.shares, **self._opened(pending, others, message.sealed)}
        digest = _digest(pending.context, chosen)
        tags = tuple(_endorsement(pending.seeds[peer], digest, self.me) for peer in others)
        rounds = {**self.rounds, message.round: replace(pending, survivors=chosen, shares=shares)}
        return Endorsement(self.run, self.me, message.round, tags), replace(self, rounds=rounds)

    def reveal(self, message: Endorsed) -> "tuple[Reveal, Member]":
        """Returns the site's part in opening the sum over the set that it endorsed.

        Raises:
            Repeated: it has revealed already.
            RoundRefused: too few others endorsed the same set. A tag that is not of this set counts for nothing.
            ProtocolError: it endorsed no set, or the endorsers are none of it.
        """
        pending, endorsers = self._pending(message.round), message.sites
        threshold = pending.scheme.group.threshold
        if pending.revealed:
            raise Repeated(f"round {message.round} is revealed already")
        others = set(pending.survivors) - {self.me}
        if not others or endorsers != tuple(sorted(set(endorsers) & others)) or len(endorsers) != len(message.tags):
            raise ProtocolError("endorsements were refused: they must be of other survivors, once each and in order")
        digest = _digest(pending.context, pending.survivors)
        valid = [
            compare_digest(tag, _endorsement(pending.seeds[peer], digest, peer))
            for peer, tag in zip(endorsers, message.tags, strict=True)
        ]
        if sum(valid) + 1 < threshold:
            raise RoundRefused(
                f"endorsements of {sum(valid)} other sites are of the set that this site holds: below "
                f"{threshold - 1} of them the sum stays closed"
            )
        answer = pending.scheme.answer(self.me, pending.survivors, pending.shares, message.total)
        rounds = {**self.rounds, message.round: replace(pending, revealed=True, shares={}, seeds={})}
        return Reveal(self.run, self.me, message.round, answer), replace(self, rounds=rounds)

    def _pending(self, number: int) -> Pending:
        if number in self.rounds:
            return self.rounds[number]
        if number <= self.last_round:
            raise Repeated(f"round {number} is over at this site")
        raise ProtocolError(f"round {number} was refused: this site has nothing open in it")

    def _dealt(
        self, scheme: Scheme, seeds: Mapping[str, bytes], context: bytes, secret: Words, randomness: Randomness
    ) -> tuple[tuple[bytes, ...], dict[str, Words]]:
        """Returns the shares of this site's secret, sealed for each peer, and its own one."""
        if not secret.size:
            return (), {}
        group = scheme.group
        dealt = share(secret, len(group.sites), group.threshold, randomness.child("shares"))
        shares = dict(zip(group.sites, dealt, strict=True))
        sealed = tuple(
            AESGCM(_sealing_key(seeds[peer], context, self.me)).encrypt(_NONCE, shares[peer].tobytes(), None)
            for peer in group.peers(self.me)
        )
        return sealed, {self.me: shares[self.me]}

    def _opened(self, pending: Pending, senders: tuple[str, ...], sealed: tuple[bytes, ...]) -> dict[str, Words]:
        """Returns this site's shares of the senders' secrets."""
        shape = pending.scheme.secret_shape
        length = 2 * shape[0] * shape[1] + _TAG
        if not shape[0]:
            return {}
        if len(sealed) != len(senders) or any(len(text) != length for text in sealed):
            raise ProtocolError("a survivor set was refused: it must bring one share of each other survivor")
        shares = {}
        for sender, text in zip(senders, sealed, strict=True):
            try:
                plain = AESGCM(_sealing_key(pending.seeds[sender], pending.context, sender)).decrypt(_NONCE, text, None)
            except InvalidTag:
                raise RoundRefused(f"a share of site '{sender}' was refused: it was altered on its way") from None
            words = np.frombuffer(plain, "<u2").reshape(shape)
            if (words >= PRIME).any():
                raise RoundRefused(f"a share of site '{sender}' was refused: it is no share")
            shares[sender] = words
        return shares


class Tally(msgspec.Struct, frozen=True):
    """The coordinator's half of one round's secure sum. Each method returns the tally after it.

    Start one with `scheme` and `context`. `total` is the sum so far; adding to it uses it up, so a tally that was
    replaced is not to be used again.
    """

    run: str
    number: int
    scheme: Scheme
    context: bytes
    total: Payload | None = None
    sealed: Mapping[str, tuple[bytes, ...]] = msgspec.field(default_factory=dict)
    survivors: tuple[str, ...] = ()
    tags: Mapping[str, tuple[bytes, ...]] = msgspec.field(default_factory=dict)
    answers: Mapping[str, NDArray[np.uint16]] = msgspec.field(default_factory=dict)

    def contribute(self, message: MaskedUpdate) -> "Tally":
        """Returns the tally with a site's contribution.

        Raises:
            ProtocolError: it is late, comes twice, belongs to another round, or has the wrong shape.
        """
        self._refuse(message, self.sealed, bool(self.survivors))
        rows, columns = self.scheme.secret_shape
        peers = len(self.scheme.group.sites) - 1 if rows else 0
        if len(message.sealed) != peers or any(len(text) != 2 * rows * columns + _TAG for text in message.sealed):
            raise ProtocolError(f"an update of '{message.site}' was refused: it must bring a share for each other site")
        total = self.scheme.add(self.total, message.values)
        return replace(self, total=total, sealed={**self.sealed, message.site: message.sealed})

    def close(self, identity: Ed25519PrivateKey) -> "tuple[Tally, dict[str, Survivors]]":
        """Returns the tally with its survivors, and what to tell each of them.

        Raises:
            ProtocolError: fewer than the threshold contributed; the sum stays closed.
        """
        group = self.scheme.group
        chosen = tuple(site for site in group.sites if site in self.sealed)
        if len(chosen) < group.threshold:
            raise ProtocolError(f"{len(chosen)} sites contributed and it takes {group.threshold}: the sum stays closed")
        closed = replace(self, survivors=chosen)
        return closed, closed.told(identity)

    def told(self, identity: Ed25519PrivateKey) -> dict[str, Survivors]:
        """Returns what to tell each survivor of a tally that is closed, the same each time."""
        group, chosen = self.scheme.group, self.survivors
        signature = sign(identity, _PURPOSE, *_signed_parts(self.context, chosen))
        dealt = {site: dict(zip(group.peers(site), self.sealed[site], strict=False)) for site in chosen}
        messages = {}
        for site in chosen:
            sealed = tuple(dealt[sender][site] for sender in chosen if sender != site and dealt[sender])
            messages[site] = Survivors(self.run, self.number, chosen, signature, sealed)
        return messages

    def endorse(self, message: Endorsement) -> "Tally":
        """Returns the tally with a survivor's endorsement.

        Raises:
            ProtocolError: it is early, comes twice, belongs to another round, or is not by a survivor.
        """
        self._refuse(message, self.tags, message.site not in self.survivors)
        if len(message.tags) != len(self.survivors) - 1:
            raise ProtocolError(f"an endorsement of '{message.site}' was refused: it must hold a tag for each survivor")
        return replace(self, tags={**self.tags, message.site: message.tags})

    def endorsed(self) -> dict[str, Endorsed]:
        """Returns what to tell each survivor about the others' endorsements.

        Raises:
            ProtocolError: fewer than the threshold endorsed; the sum stays closed.
        """
        if len(self.tags) < self.scheme.group.threshold:
            raise ProtocolError(
                f"{len(self.tags)} sites endorsed, and it takes {self.scheme.group.threshold}: the sum stays closed"
            )
        total = self.total if self.scheme.decrypted_by_sites and self.total is not None else NO_TOTAL
        meant = {
            site: dict(zip((peer for peer in self.survivors if peer != site), tags, strict=True))
            for site, tags in self.tags.items()
        }
        messages = {}
        for site in self.tags:
            others = tuple(peer for peer in self.survivors if peer in self.tags and peer != site)
            tags = tuple(meant[peer][site] for peer in others)
            messages[site] = Endorsed(self.run, self.number, others, tags, total)
        return messages

    def reveal(self, message: Reveal) -> "Tally":
        """Returns the tally with a survivor's answer.

        Raises:
            ProtocolError: it is early, comes twice, belongs to another round, is not by an endorser, or has the wrong
                shape or type.
        """
        self._refuse(message, self.answers, message.site not in self.tags)
        self.scheme.check_answer(message.site, message.answer, self.survivors)
        return replace(self, answers={**self.answers, message.site: message.answer})

    def opened(self) -> Residues:
        """Returns the sum of the survivors' vectors.

        Raises:
            ProtocolError: fewer than the threshold contributed or answered, or the answers contradict each other.
        """
        threshold = self.scheme.group.threshold
        present = len(self.answers) if self.scheme.opens else len(self.sealed)
        if present < threshold or self.total is None:
            raise ProtocolError(f"{present} sites answered, and it takes {threshold}: the sum stays closed")
        return self.scheme.open(self.context, self.total, self.survivors, self.answers)

    def _refuse(
        self, message: MaskedUpdate | Endorsement | Reveal, seen: Mapping[str, object], out_of_turn: bool
    ) -> None:
        site = message.site
        if (message.run, message.round) != (self.run, self.number) or site not in self.scheme.group.sites:
            raise ProtocolError(f"a message of '{site}' was refused: it belongs to another round or run")
        if site in seen:
            raise Repeated(f"a message of '{site}' came twice")
        if out_of_turn:
            raise ProtocolError(f"a message of '{site}' was refused: it is out of turn")


def _signed_parts(context: bytes, sites: tuple[str, ...]) -> tuple[bytes, ...]:
    return (context, *(site.encode() for site in sites))


def _digest(context: bytes, sites: tuple[str, ...]) -> bytes:
    text = framed(*_signed_parts(context, sites))
    return blake2b(text, digest_size=32, person=b"cohort survivors").digest()


def _endorsement(seed: bytes, digest: bytes, sender: str) -> bytes:
    return purpose_key(seed, b"cohort endorse", digest, sender.encode())


def _sealing_key(seed: bytes, context: bytes, sender: str) -> bytes:
    return purpose_key(seed, b"cohort share", context, sender.encode())
