"""A site's side of enrolment: join by an invitation, renew certificates in time, ask who the other sites are."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, TypeVar, cast

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from cohortium.coordinator.authority import public_key_of, verify_client
from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError
from cohortium.core.identity import Introduction, prove_joining, prove_renewal
from cohortium.core.invitation import Invitation, digest, endpoint, require_current
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc
from cohortium.site.enrolled import Credential, Enrolled

log = logging.getLogger("cohortium.site.enrolment")
_PATIENCE = 15.0
"""Seconds that one call may take at one coordinator."""
_OPTIONS = (("grpc.max_receive_message_length", 1 << 18), ("grpc.enable_retries", 0))
_MOST_REASON = 500
_FIRST_PAUSE, _LONGEST_PAUSE, _LOOK = 5.0, 600.0, 60.0
T = TypeVar("T")


class Unreachable(CohortiumError):
    """No coordinator answered. Whether the request was performed is not known; asking again is safe."""


class NoCertificate(PolicyRefused):
    """The coordinator takes this site's certificate for none; its identity may still get another one."""


@dataclass(frozen=True)
class Joined:
    """What enrolment gave: the certificate (PEM), and where sites attach."""

    chain: bytes
    fleet: tuple[str, ...]


async def enrol(invitation: Invitation, identity: Ed25519PrivateKey, csr: bytes, now: datetime) -> Joined:
    """Joins a consortium. After a lost answer the same call again, with the same identity, gets the same place.

    Raises:
        PolicyRefused: the invitation has expired, is not known, or somebody else used it.
        Unreachable: nobody who belongs to the invitation's consortium answered.
        ProtocolError: the answer is not what a coordinator of that consortium gives.
    """
    require_current(invitation, now)
    authority = x509.load_der_x509_certificate(invitation.authority)
    request = pb.EnrolRequest(
        site=invitation.site,
        secret=invitation.secret,
        csr=csr,
        identity=identity.public_key().public_bytes_raw(),
        proof=prove_joining(identity, digest(invitation.secret), invitation.site, csr),
    )
    trusted = grpc.ssl_channel_credentials(authority.public_bytes(Encoding.PEM))
    reply: pb.EnrolReply = await _ask(
        invitation.enrolment, trusted, lambda channel: pb_grpc.EnrolmentStub(channel).Enrol(request, timeout=_PATIENCE)
    )
    if reply.coordinator_identity != invitation.coordinator:
        raise ProtocolError("the enrolment was refused: the coordinator has another key than the invitation says")
    _check(reply.chain, authority, invitation.site, csr, now)
    return Joined(bytes(reply.chain), _addresses(reply.addresses) or invitation.fleet)


async def renew(
    enrolled: Enrolled, credential: Credential, identity: Ed25519PrivateKey, request: tuple[bytes, bytes], now: datetime
) -> Credential:
    """Returns a new certificate: over the old one while it lasts, and by the identity alone after that.

    Args:
        request: a new TLS key (PEM) and the PKCS#10 request (DER) that it signed.

    Raises:
        PolicyRefused: the site is no longer a member.
        Unreachable: no coordinator answered.
        ProtocolError: the answer is not what a coordinator of the consortium gives.
    """
    key, csr = request
    proof = prove_renewal(identity, enrolled.site, csr)
    reply = await _over_old(enrolled, credential, pb.RenewRequest(csr=csr, proof=proof), now)
    if reply is None:
        trusted = grpc.ssl_channel_credentials(enrolled.authority)
        again = pb.ReturnRequest(site=enrolled.site, csr=csr, proof=proof)
        reply = await _ask(
            enrolled.enrolment, trusted, lambda channel: pb_grpc.EnrolmentStub(channel).Return(again, timeout=_PATIENCE)
        )
    _check(reply.chain, x509.load_pem_x509_certificate(enrolled.authority), enrolled.site, csr, now)
    return Credential(key, bytes(reply.chain))


async def roster(enrolled: Enrolled, credential: Credential) -> list[Introduction]:
    """Returns what the coordinator says of the sites; `cohortium.site.peers.meet` decides what is believed.

    Raises:
        PolicyRefused: the site is no longer a member.
        Unreachable: no coordinator answered.
    """
    reply: pb.RosterReply = await _ask(
        enrolled.fleet,
        _mutual(enrolled, credential),
        lambda channel: pb_grpc.MembershipStub(channel).Roster(pb.RosterRequest(), timeout=_PATIENCE),
    )
    return [Introduction(one.site, bytes(one.identity), one.enrolled, bytes(one.signature)) for one in reply.sites]


async def keep_renewed(
    credential: Credential,
    renewal: Callable[[Credential], Awaitable[Credential]],
    renewed: Callable[[Credential], Awaitable[None]],
    clock: Callable[[], datetime],
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Renews a certificate whenever a third of its life is left, for ever; cancel it to stop.

    Failures are tried again, at first after seconds and at most every ten minutes.

    Args:
        renewal: gets a new certificate (`renew`).
        renewed: stores it and has the link use it; told before the old one ends, if the coordinator can be reached.

    Raises:
        PolicyRefused: the site is no longer a member.
    """
    at, pause = credential.due, _FIRST_PAUSE
    while True:
        # the clock is looked at again and again, because a machine may have slept
        while (left := (at - clock()).total_seconds()) > 0:
            await sleep(min(left, _LOOK))
        try:
            fresh = await renewal(credential)
            await renewed(fresh)
        except PolicyRefused:
            raise
        except CohortiumError as error:
            log.warning("the certificate could not be renewed", extra={"reason": str(error), "seconds": pause})
            at, pause = clock() + timedelta(seconds=pause), min(2 * pause, _LONGEST_PAUSE)
        else:
            credential, at, pause = fresh, fresh.due, _FIRST_PAUSE


async def _over_old(
    enrolled: Enrolled, credential: Credential, request: pb.RenewRequest, now: datetime
) -> pb.RenewReply | None:
    """Returns the answer to a request over the old certificate, or None where that no longer helps."""
    if credential.expires <= now:
        return None
    try:
        return await _ask(
            enrolled.fleet,
            _mutual(enrolled, credential),
            lambda channel: pb_grpc.MembershipStub(channel).Renew(request, timeout=_PATIENCE),
        )
    except (NoCertificate, Unreachable):
        # this machine's clock may be wrong, or only the other port be open
        return None


def _mutual(enrolled: Enrolled, credential: Credential) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(enrolled.authority, credential.key, credential.chain)


async def _ask(
    addresses: Sequence[str], trusted: grpc.ChannelCredentials, call: Callable[[grpc.aio.Channel], Awaitable[T]]
) -> T:
    """Returns what the first coordinator that is there answers."""
    stranger = False
    for address in addresses:
        async with grpc.aio.secure_channel(address, trusted, options=_OPTIONS) as channel:
            try:
                return await call(channel)
            except grpc.RpcError as error:
                code, details = cast(Any, error).code(), str(cast(Any, error).details())[:_MOST_REASON]
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            raise _error(code, details)
        stranger = stranger or "CERTIFICATE_VERIFY_FAILED" in details
    where = ", ".join(addresses)
    if stranger:
        raise Unreachable(
            f"whoever answers at {where} is no coordinator of this consortium: ask for a new invitation, and look "
            "whether this machine's clock is right"
        )
    raise Unreachable(f"no coordinator answers at {where}: is one running, and does the firewall let this machine out?")


def _error(code: grpc.StatusCode, details: str) -> CohortiumError:
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return NoCertificate(details)
    if code is grpc.StatusCode.PERMISSION_DENIED:
        return PolicyRefused(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Unreachable(details)
    return ProtocolError(f"the coordinator refused the request: {details}")


def _check(chain: bytes, authority: x509.Certificate, site: str, csr: bytes, now: datetime) -> None:
    principal = verify_client(chain, authority, now)
    key = x509.load_pem_x509_certificate(chain).public_key()
    if (principal.role, principal.name) != ("site", site) or key != public_key_of(csr):
        raise ProtocolError("a certificate was refused: it is not for this site and its key")


def _addresses(told: Sequence[str]) -> tuple[str, ...]:
    for address in told[:16]:
        endpoint(address)
    return tuple(told[:16])
