"""An invitation: one line of text with which a hospital joins a consortium, handed over by somebody it knows.

It is the root of a site's trust: the authority's certificate, which proves who answers, and the coordinator's key,
which signs survivor sets, come with it and not over the network. Its secret enrols one site, once. What an attacker
gains who reads it before it is used: the site's place, and the hospital finds the invitation used; that is why the
identity's fingerprint is compared by telephone. Afterwards it gives nothing.
"""

import base64
import hashlib
import ipaddress
import re
from datetime import datetime
from typing import Annotated

import msgspec
from cryptography import x509

from cohortium.core import codec
from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError
from cohortium.core.fields import names

PREFIX = "cohortium-invitation-v1."
MAX_TOKEN_CHARACTERS = 8192
_MOST_ADDRESSES = 16
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_AGAIN = "copy it again, whole and on one line, or ask for a new one"

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Addresses = Annotated[
    tuple[Annotated[str, msgspec.Meta(max_length=260)], ...], msgspec.Meta(min_length=1, max_length=_MOST_ADDRESSES)
]


class InvitationError(CohortiumError):
    """What should be an invitation, or what goes into one, is malformed."""

    exit_code = 2


class Invitation(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What an invitation says.

    Attributes:
        site: the name under which the hospital joins.
        secret: 32 bytes; the store keeps only their digest.
        expires: in Unix seconds.
        enrolment: where to enrol, `host:port`.
        fleet: where sites attach, `host:port`.
        authority: the consortium's CA certificate (DER).
        coordinator: the coordinator's Ed25519 public key.
        consortium: its name, for people.
    """

    site: Annotated[str, msgspec.Meta(max_length=63)]
    secret: Key
    expires: Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
    enrolment: Addresses
    fleet: Addresses
    authority: Annotated[bytes, msgspec.Meta(max_length=2048)]
    coordinator: Key
    consortium: Annotated[str, msgspec.Meta(max_length=63)]

    def __repr__(self) -> str:
        # the secret enrols
        return f"Invitation(site={self.site!r}, consortium={self.consortium!r})"


def digest(secret: bytes) -> bytes:
    """Returns what the store keeps of a secret."""
    return hashlib.sha256(secret).digest()


def issue(invitation: Invitation) -> str:
    """Returns the invitation as a token.

    Raises:
        CohortiumError: it says what no invitation says, a wrong name or address, or it is too long.
    """
    text = PREFIX + base64.urlsafe_b64encode(codec.encode(invitation)).decode().rstrip("=")
    parse(text)
    return text


def parse(token: str) -> Invitation:
    """Returns what a token says; blanks around it do not matter.

    Raises:
        InvitationError: it is no token, or not a whole one; the message never repeats it.
    """
    text = token.strip()
    if len(text) > MAX_TOKEN_CHARACTERS:
        raise InvitationError(f"the invitation is longer than {MAX_TOKEN_CHARACTERS} characters: {_AGAIN}")
    if not text.startswith(PREFIX):
        raise InvitationError(f"this is no invitation, which begins with '{PREFIX}': {_AGAIN}")
    try:
        body = text.removeprefix(PREFIX)
        data = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
        invitation = codec.decode(data, Invitation)
        # one invitation has one spelling; a decoder passes over characters that do not belong
        if base64.urlsafe_b64encode(codec.encode(invitation)).decode().rstrip("=") != body:
            raise ValueError
        x509.load_der_x509_certificate(invitation.authority)
    except (ProtocolError, ValueError, x509.InvalidVersion):
        raise InvitationError(f"the invitation is damaged: {_AGAIN}") from None
    try:
        names("site", [invitation.site])
        names("consortium", [invitation.consortium])
        for address in (*invitation.enrolment, *invitation.fleet):
            endpoint(address)
    except CohortiumError as error:
        raise InvitationError(f"the invitation is not usable, {error}: ask for a new one") from None
    return invitation


def require_current(invitation: Invitation, now: datetime) -> None:
    """Checks that an invitation has not expired.

    Raises:
        PolicyRefused: it has.
    """
    if now.timestamp() >= invitation.expires:
        raise PolicyRefused(f"the invitation of site '{invitation.site}' has expired: ask for a new one")


def endpoint(address: str) -> tuple[str, int]:
    """Returns host and port of `host:port`; an IPv6 address stands in brackets.

    Raises:
        InvitationError: it is neither a host's name nor an IP address, or has no port between 1 and 65535.
    """
    host, colon, port = address.rpartition(":")
    inner = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    sound = colon and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 1 << 16
    if not sound or not (_is_ip(inner, host) or (inner == host and len(host) <= 253 and _HOST.fullmatch(host))):
        raise InvitationError(f"'{address[:80]}' is no address: write it as host:port")
    return inner, int(port)


def _is_ip(inner: str, host: str) -> bool:
    try:
        return (ipaddress.ip_address(inner).version == 6) == (inner != host)
    except ValueError:
        return False
