"""The coordinator's side of enrolment: certificates for sites that were invited, for as long as they are not revoked.

Enrolling takes an invitation's secret; every later certificate takes the site's Ed25519 identity, which the store
pinned at enrolment. So a stolen TLS key keeps a link for hours and renews nothing, and a request that is said again by
whoever overheard it gets a certificate for a key that only the site holds.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import IPv6Network
from typing import Any, TypeVar
from urllib.parse import unquote

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from cohortium.coordinator.authority import (
    MAX_CSR_BYTES,
    SITE_LIFETIME,
    Authority,
    Principal,
    principal_of,
    public_key_of,
)
from cohortium.coordinator.ports import Enrolments, SiteRow, Unavailable
from cohortium.core.errors import CohortiumError, PolicyRefused, ProtocolError, StudyError
from cohortium.core.fields import names
from cohortium.core.identity import IDENTITY_BYTES, check_joining, check_renewal, introduce
from cohortium.core.invitation import digest
from cohortium.core.messages import MOST_SITES
from cohortium.engines.fleet.v1 import fleet_pb2 as pb
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc

log = logging.getLogger("cohortium.enrolment")
OPTIONS = (("grpc.max_receive_message_length", 1 << 14), ("grpc.max_metadata_size", 1 << 14))
"""For the server of the enrolment port, which anybody can reach."""

Allow = Callable[[str, float, int], Awaitable[bool]]
"""Whether one more of a key is within a rate: key, how many per second, how many at once."""
Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")
_STRANGERS, _MEMBERS = (0.5, 20), (0.1, 10)
_EVERYBODY = (50.0, 200)


class TooOften(CohortiumError):
    """Somebody asks more often than anybody needs to."""


class NotKnown(PolicyRefused):
    """The connection has no certificate that counts."""


@dataclass(frozen=True, kw_only=True)
class Registrar:
    """What gives out certificates.

    Attributes:
        store: invitations and sites.
        authority: signs.
        identity: the coordinator's long-term key, which introduces sites to each other.
        addresses: where sites attach, `host:port`.
        clock: tells the time.
        serial: returns a new serial number.
        allow: the rate limit.
    """

    store: Enrolments
    authority: Authority
    identity: Ed25519PrivateKey = field(repr=False)
    addresses: tuple[str, ...]
    clock: Callable[[], datetime]
    serial: Callable[[], int]
    allow: Allow
    lifetime: timedelta = SITE_LIFETIME

    async def enrol(self, request: pb.EnrolRequest) -> pb.EnrolReply:
        """Enrols an invited site. Everything is checked before the invitation is used.

        Raises:
            ProtocolError, StudyError: the request is malformed, or not signed by the identity that it names.
            PolicyRefused: no such invitation, expired, or used by another identity.
            Unavailable: the store is away; asking again is safe.
        """
        names("site", [request.site])
        if len(request.secret) != 32 or len(request.identity) != IDENTITY_BYTES:
            raise ProtocolError("an enrolment was refused: its secret or its identity has the wrong length")
        public_key_of(request.csr)
        used = digest(request.secret)
        check_joining(request.identity, request.proof, used, request.site, request.csr)
        row = await self.store.redeem(request.site, used, request.identity, self.clock())
        if row.revoked is not None or row.identity != request.identity:
            raise _no_member(request.site)
        return pb.EnrolReply(
            chain=await self._certificate(request.site, request.csr),
            authorities=self._authorities(),
            coordinator_identity=self.identity.public_key().public_bytes_raw(),
            addresses=self.addresses,
        )

    async def renew(self, site: str, csr: bytes, proof: bytes) -> pb.RenewReply:
        """Returns a new certificate for a member whose identity signed the request.

        Raises:
            ProtocolError: the request is malformed.
            PolicyRefused: there is no such member, it is revoked, or its identity did not sign the request.
            Unavailable: the store is away.
        """
        names("site", [site])
        if len(csr) > MAX_CSR_BYTES:
            raise ProtocolError(f"a certificate request was refused: it is longer than {MAX_CSR_BYTES} bytes")
        row = await self.member(site)
        try:
            check_renewal(row.identity, proof, site, csr)
        except ProtocolError:
            raise _no_member(site) from None
        # only a member can use up a member's rate
        await self.limit(f"renew:{site}", _MEMBERS)
        chain = await self._certificate(site, csr)
        return pb.RenewReply(chain=chain, authorities=self._authorities(), addresses=self.addresses)

    async def roster(self, site: str) -> pb.RosterReply:
        """Returns the members, for one of them.

        Raises:
            PolicyRefused: there is no such member, or it is revoked.
            Unavailable: the store is away.
        """
        await self.member(site)
        await self.limit(f"roster:{site}", _MEMBERS)
        rows = [row for row in await self.store.sites() if row.revoked is None]
        reply = pb.RosterReply()
        for row in rows[:MOST_SITES]:
            told = introduce(self.identity, row.name, row.identity, int(row.enrolled.timestamp()))
            reply.sites.add(site=told.site, identity=told.identity, enrolled=told.enrolled, signature=told.signature)
        return reply

    async def member(self, site: str) -> SiteRow:
        """Returns a site that is a member now.

        Raises:
            PolicyRefused: it is none.
        """
        row = await self.store.site(site)
        if row is None or row.revoked is not None:
            raise _no_member(site)
        return row

    async def limit(self, key: str, rate: tuple[float, int]) -> None:
        """Checks a rate. While the bus is away nothing is limited: members must get their certificates.

        Raises:
            TooOften: it is used up.
        """
        try:
            allowed = await self.allow(key, *rate)
        except Unavailable:
            log.warning("the rate limit is away")
            return
        if not allowed:
            raise TooOften("too many requests: wait a minute and try again")

    async def _certificate(self, site: str, csr: bytes) -> bytes:
        certificate = self.authority.certify(csr, "site", site, self.clock(), self.serial(), self.lifetime)
        await self.store.issued(site, certificate.serial_number, certificate.not_valid_after_utc)
        log.info("a certificate was issued", extra={"site": site, "serial": certificate.serial_number})
        return certificate.public_bytes(Encoding.PEM)

    def _authorities(self) -> bytes:
        return self.authority.certificate.public_bytes(Encoding.PEM)


class EnrolmentService(pb_grpc.EnrolmentServicer):
    """Serves whoever reaches the port: invited sites, and members whose certificate has expired."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar

    async def Enrol(self, request: pb.EnrolRequest, context: Context) -> pb.EnrolReply:  # noqa: N802  gRPC's own name
        return await _answer(context, "enrol", request.site, lambda: self._strangers(context, request))

    async def Return(self, request: pb.ReturnRequest, context: Context) -> pb.RenewReply:  # noqa: N802
        async def returned() -> pb.RenewReply:
            await self._limit(context)
            return await self._registrar.renew(request.site, request.csr, request.proof)

        return await _answer(context, "return", request.site, returned)

    async def _strangers(self, context: Context, request: pb.EnrolRequest) -> pb.EnrolReply:
        await self._limit(context)
        return await self._registrar.enrol(request)

    async def _limit(self, context: Context) -> None:
        await self._registrar.limit(f"enrol:{network(_host(context))}", _STRANGERS)
        await self._registrar.limit("enrol", _EVERYBODY)


class MembershipService(pb_grpc.MembershipServicer):
    """Serves sites on the port of mutual TLS; the certificate of the connection says which site asks."""

    def __init__(self, registrar: Registrar) -> None:
        self._registrar = registrar

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewReply:  # noqa: N802
        async def renewed() -> pb.RenewReply:
            caller = self._site(context)
            return await self._registrar.renew(caller.name, request.csr, request.proof)

        return await _answer(context, "renew", "", renewed)

    async def Roster(self, request: pb.RosterRequest, context: Context) -> pb.RosterReply:  # noqa: N802
        async def told() -> pb.RosterReply:
            return await self._registrar.roster(self._site(context).name)

        return await _answer(context, "roster", "", told)

    def _site(self, context: Context) -> Principal:
        shown = next(iter(context.auth_context().get("x509_pem_cert", ())), None)
        if shown is None:
            raise NotKnown("the connection shows no certificate")
        principal = principal_of(shown)
        # TLS looks at the beginning of a connection, which may last for days
        if principal.role != "site" or principal.not_after <= self._registrar.clock():
            raise NotKnown("the connection's certificate is no site's, or has expired")
        return principal


def server_credentials(
    fresh: Callable[[], tuple[bytes, bytes]], authority: bytes, *, mutual: bool
) -> grpc.ServerCredentials:
    """Returns credentials whose certificate is asked for anew at each handshake.

    Args:
        fresh: returns the chain and the key (PEM); must be quick and never fail.
        authority: the authority's certificate (PEM), whose clients are let in.
        mutual: whether clients need a certificate.
    """

    def configured() -> Any:
        chain, key = fresh()
        return grpc.ssl_server_certificate_configuration([(key, chain)], authority if mutual else None)

    return grpc.dynamic_ssl_server_credentials(configured(), configured, mutual)


async def _answer(context: Context, kind: str, site: str, work: Callable[[], Awaitable[T]]) -> T:
    try:
        return await work()
    except Exception as error:  # noqa: BLE001  whatever went wrong, a stranger learns no more than that it did
        code, reason = _status(error)
    facts = {"kind": kind, "address": _host(context), "reason": reason, "status": code.name}
    # a name that a stranger chose goes into no log before it is known to be one
    log.warning("a request was refused", extra=facts | ({"site": site} if _is_name(site) else {}))
    await context.abort(code, reason)
    raise AssertionError("abort raises")


def _status(error: Exception) -> tuple[grpc.StatusCode, str]:
    match error:
        case NotKnown():
            return grpc.StatusCode.UNAUTHENTICATED, str(error)
        case PolicyRefused():
            return grpc.StatusCode.PERMISSION_DENIED, str(error)
        case TooOften():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
        case ProtocolError() | StudyError():
            return grpc.StatusCode.INVALID_ARGUMENT, str(error)
        case Unavailable():
            return grpc.StatusCode.UNAVAILABLE, "the consortium's store is away just now: try again"
    log.error("a request failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, "the coordinator failed: its operator sees why"


def _no_member(site: str) -> PolicyRefused:
    # one sentence for all reasons, because a stranger must not learn who is or was a member
    return PolicyRefused(
        f"site '{site}' is no member of this consortium under this identity: ask its operator for an invitation"
    )


def _is_name(site: str) -> bool:
    try:
        names("site", [site])
    except StudyError:
        return False
    return True


def network(host: str) -> str:
    """Returns what one stranger may have of a host's kind: an IPv4 address, or the IPv6 addresses of a whole link."""
    kind, _, address = unquote(host).partition(":")
    if kind != "ipv6":
        return host
    plain = address.strip("[]").partition("%")[0]
    try:
        return f"ipv6:{IPv6Network((plain, 64), strict=False)}"
    except ValueError:
        return host


def _host(context: Context) -> str:
    """Returns who connects, without the port: `ipv4:10.0.0.7`."""
    return str(context.peer()).rpartition(":")[0]
