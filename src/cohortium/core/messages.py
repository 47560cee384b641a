"""What the coordinator and a site say to each other. The same messages whatever carries them.

coordinator          site
OpenRun       -->                the study's canonical bytes; the site checks study, policy and cohort
              <--    Announcement    a key for this run, signed by the site's pinned identity
KeySet        -->                everybody's announcements; the site checks each signature
OpenRound     -->                what the algorithm broadcasts, and who is asked
              <--    MaskedUpdate    the site's statistics, quantised and masked, and what helps to unmask the sum
              <--    Noted           instead, of a site that is not asked in this round, or before, if it takes long
Survivors     -->                who is in the sum, signed; a site endorses one such set a round
              <--    Endorsement     a tag for each other survivor: "this is the set that I hold"
Endorsed      -->                the tags for this site; it goes on if enough of the others hold the same set
              <--    Reveal          what opens the sum over this set, and no other
CloseRun      -->
              <--    Refusal         instead of any answer: the public reason

Where a study tolerates no dropouts, masks cancel by themselves, and the four messages about survivors fall away.
"""

from typing import Annotated, Any, cast

import msgspec
import numpy as np

from cohortium.core import codec

Name = Annotated[str, msgspec.Meta(max_length=80)]
MOST_SITES = 1000
Round = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]
Sites = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MOST_SITES)]
Sealed = Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MOST_SITES)]
Tags = Annotated[
    tuple[Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)], ...], msgspec.Meta(max_length=MOST_SITES)
]
MOST_SEED = 2**63 - 1
Seed = Annotated[int, msgspec.Meta(ge=0, le=MOST_SEED)]
CONTROL_BYTES = 4096
"""More than any message takes whose size no study decides."""
MOST_MISSED = 8
"""Rounds that a site may have missed and still come back to a run."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Any message; `run` names the run that it belongs to."""

    run: Name


class OpenRun(Message, frozen=True):
    """Asks a site to take part. `study` holds canonical bytes.

    `seed` decides every site's training, and is public. So the run can be repeated; a study with noise gets none.
    """

    study: bytes
    seed: Seed | None = None


class Announcement(Message, frozen=True):
    """A site's X25519 public key (32 bytes) for one run, and its Ed25519 signature (64 bytes)."""

    site: Name
    public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class KeySet(Message, frozen=True):
    """The announcements of all sites of the run."""

    announcements: tuple[Announcement, ...]


class OpenRound(Message, frozen=True):
    """Opens a round, numbered from 1. `broadcast` holds the algorithm's broadcast in `codec` bytes.

    `missed` holds those of the rounds just before, if this site was lost in them. `selected` names the sites that
    contribute, in order; empty where all do. `summed` is an earlier round whose sum holds this site's contribution,
    where the site may not have heard so; 0 else.
    """

    round: Round
    broadcast: bytes
    missed: Annotated[tuple[bytes, ...], msgspec.Meta(max_length=MOST_MISSED)] = ()
    selected: Sites = ()
    summed: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 0


class MaskedUpdate(Message, frozen=True):
    """A site's contribution: numbers that look random without the other sites' ones.

    `sealed` holds, for each other site of the run in order, secret shares that only that site can open.
    """

    site: Name
    round: Round
    values: np.ndarray
    sealed: Sealed = ()


class Noted(Message, frozen=True):
    """A site's word that it has taken in a round's broadcast.

    It is not among those that contribute, or, where rounds are buffers, it is still at work.
    """

    site: Name
    round: Round


class Survivors(Message, frozen=True):
    """The sites in a round's sum, in order, signed by the coordinator (Ed25519, 64 bytes).

    `sealed` holds what each other survivor sealed for the receiver, in the same order.
    """

    round: Round
    sites: Sites
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
    sealed: Sealed = ()


class Endorsement(Message, frozen=True):
    """A site's word that it holds this survivor set: a tag (32 bytes) for each other survivor, in order."""

    site: Name
    round: Round
    tags: Tags


class Endorsed(Message, frozen=True):
    """The survivors that endorsed, without the receiver, and their tags for it.

    `total` holds the sum to be decrypted where sites decrypt it themselves, and is empty otherwise.
    """

    round: Round
    sites: Sites
    tags: Tags
    total: np.ndarray


class Reveal(Message, frozen=True):
    """A site's part in opening the sum over the survivors."""

    site: Name
    round: Round
    answer: np.ndarray


class Refusal(Message, frozen=True):
    """A site takes no part in a run, or only in one of its rounds no further.

    `reason` holds no count and no value; that a site refuses may itself say something. `round` is 0 for the whole run.
    """

    site: Name
    reason: Annotated[str, msgspec.Meta(max_length=1000)]
    round: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 0


class CloseRun(Message, frozen=True):
    """The run is over; the site forgets its keys."""

    outcome: Name


ToSite = OpenRun | KeySet | OpenRound | Survivors | Endorsed | CloseRun
FromSite = Announcement | MaskedUpdate | Noted | Endorsement | Reveal | Refusal


class _Kind(msgspec.Struct):
    type: str


def kind_of(data: bytes) -> str:
    """Returns the kind of a message of one's own, without reading the rest of it."""
    return msgspec.msgpack.decode(data, type=_Kind).type


def decode_to_site(data: codec.Data, limit: int = codec.MAX_MESSAGE_BYTES) -> ToSite:
    """Returns the coordinator's message of at most `limit` bytes, or raises a `ProtocolError`."""
    message: ToSite = codec.decode(data, cast(Any, ToSite), limit)
    return message


def decode_from_site(data: codec.Data, limit: int = codec.MAX_MESSAGE_BYTES) -> FromSite:
    """Returns the site's message of at most `limit` bytes, or raises a `ProtocolError`."""
    message: FromSite = codec.decode(data, cast(Any, FromSite), limit)
    return message
