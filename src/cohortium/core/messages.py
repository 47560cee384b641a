"""What the coordinator and a site say to each other. The same messages whatever carries them.

coordinator          site
OpenRun       -->                the study's canonical bytes; the site checks study, policy and cohort
              <--    Announcement    a key for this run, signed by the site's pinned identity
KeySet        -->                everybody's announcements; the site checks each signature
OpenRound     -->                what the algorithm broadcasts
              <--    MaskedUpdate    the site's statistics, quantised and masked
CloseRun      -->
              <--    Refusal         instead of any answer: the public reason
"""

from typing import Annotated, Any, cast

import msgspec
import numpy as np

from cohortium.core import codec

Name = Annotated[str, msgspec.Meta(max_length=80)]
CONTROL_BYTES = 4096
"""More than any message takes whose size no study decides."""


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Any message; `run` names the run that it belongs to."""

    run: Name


class OpenRun(Message, frozen=True):
    """Asks a site to take part. `study` holds canonical bytes."""

    study: bytes


class Announcement(Message, frozen=True):
    """A site's X25519 public key (32 bytes) for one run, and its Ed25519 signature (64 bytes)."""

    site: Name
    public_key: Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class KeySet(Message, frozen=True):
    """The announcements of all sites of the run."""

    announcements: tuple[Announcement, ...]


class OpenRound(Message, frozen=True):
    """Opens a round, numbered from 1. `broadcast` holds the algorithm's broadcast in `codec` bytes."""

    round: int
    broadcast: bytes


class MaskedUpdate(Message, frozen=True):
    """A site's contribution: residues modulo 2^32 or 2^64 that look random without the other sites' ones."""

    site: Name
    round: int
    values: np.ndarray


class Refusal(Message, frozen=True):
    """A site takes no part. `reason` holds no count and no value; that a site refuses may itself say something."""

    site: Name
    reason: Annotated[str, msgspec.Meta(max_length=1000)]


class CloseRun(Message, frozen=True):
    """The run is over; the site forgets its keys."""

    outcome: Name


ToSite = OpenRun | KeySet | OpenRound | CloseRun
FromSite = Announcement | MaskedUpdate | Refusal


def decode_to_site(data: bytes, limit: int = codec.MAX_MESSAGE_BYTES) -> ToSite:
    """Returns the coordinator's message of at most `limit` bytes, or raises a `ProtocolError`."""
    message: ToSite = codec.decode(data, cast(Any, ToSite), limit)
    return message


def decode_from_site(data: bytes, limit: int = codec.MAX_MESSAGE_BYTES) -> FromSite:
    """Returns the site's message of at most `limit` bytes, or raises a `ProtocolError`."""
    message: FromSite = codec.decode(data, cast(Any, FromSite), limit)
    return message
