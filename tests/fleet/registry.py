"""The store of invitations and sites in memory, and a coordinator's two ports over real sockets."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cohortium.coordinator.authority import Authority, establish
from cohortium.coordinator.ports import SiteRow, Unavailable
from cohortium.core.errors import PolicyRefused, StudyError
from cohortium.core.invitation import Invitation, digest
from cohortium.engines.fleet.enrolment import (
    OPTIONS,
    EnrolmentService,
    MembershipService,
    Registrar,
    server_credentials,
)
from cohortium.engines.fleet.v1 import fleet_pb2_grpc as pb_grpc

SECRET = bytes(range(32))


@dataclass
class MemoryEnrolments:
    """Invitations, sites and certificates. With `away` the store cannot be reached."""

    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    away: bool = False
    rows: dict[str, SiteRow] = field(default_factory=dict)
    invitations: dict[str, tuple[bytes, datetime, bytes | None]] = field(default_factory=dict)
    certificates: list[tuple[str, int, datetime]] = field(default_factory=list)

    def _here(self) -> None:
        if self.away:
            raise Unavailable("the store is away")

    async def invite(self, name: str, digest: bytes, expires: datetime, by: str) -> None:
        self._here()
        if name in self.rows and self.rows[name].revoked is None:
            raise StudyError(f"site '{name}' is a member already")
        self.invitations[name] = (digest, expires, None)

    async def redeem(self, name: str, digest: bytes, identity: bytes, now: datetime) -> SiteRow:
        self._here()
        kept, expires, user = self.invitations.get(name, (b"", now, None))
        if kept != digest:
            raise PolicyRefused("there is no such invitation: ask for a new one")
        if expires <= now:
            raise PolicyRefused("the invitation has expired: ask for a new one")
        if user is not None and user != identity:
            raise PolicyRefused("the invitation was used by somebody else: tell the operator at once")
        self.invitations[name] = (digest, expires, identity)
        if user is None:
            self.rows[name] = SiteRow(name=name, identity=identity, enrolled=now)
        return self.rows[name]

    async def issued(self, name: str, serial: int, expires: datetime) -> None:
        self._here()
        self.certificates.append((name, serial, expires))

    async def site(self, name: str) -> SiteRow | None:
        self._here()
        return self.rows.get(name)

    async def sites(self) -> Sequence[SiteRow]:
        self._here()
        return list(self.rows.values())

    async def revoke(self, name: str, by: str) -> SiteRow:
        self._here()
        if name not in self.rows:
            raise StudyError(f"there is no site '{name}'")
        # an invitation that was used must not bring it back
        self.invitations.pop(name, None)
        self.rows[name] = replace(self.rows[name], revoked=self.clock())
        return self.rows[name]


@dataclass
class Registry:
    """A coordinator's authority, store and ports; `now` is its clock, and `rates` what the rate limit was asked."""

    store: MemoryEnrolments = field(default_factory=MemoryEnrolments)
    authority: Authority = field(
        default_factory=lambda: establish("heart", ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC), 1)
    )
    identity: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    lifetime: timedelta = timedelta(hours=12)
    allowed: int | None = None
    rates: list[str] = field(default_factory=list)
    enrolment: str = ""
    fleet: str = ""
    serials: int = 100

    async def allow(self, key: str, per_second: float, burst: int) -> bool:
        self.rates.append(key)
        return self.allowed is None or sum(1 for one in self.rates if one == key) <= self.allowed

    def serial(self) -> int:
        self.serials += 1
        return self.serials

    def certificate(self) -> tuple[bytes, bytes]:
        key = ec.generate_private_key(ec.SECP256R1())
        made = self.authority.serve(key.public_key(), ["localhost"], datetime.now(UTC), self.serial())
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return made.public_bytes(serialization.Encoding.PEM), private

    def pem(self) -> bytes:
        return self.authority.certificate.public_bytes(serialization.Encoding.PEM)

    async def invitation(self, site: str = "north", secret: bytes = SECRET, seconds: float = 600) -> Invitation:
        """Invites a site."""
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        await self.store.invite(site, digest(secret), expires, "test")
        return self.token(site=site, secret=secret, expires=int(expires.timestamp()))

    def token(self, **changes: Any) -> Invitation:
        """Returns an invitation to this coordinator, whatever its store says."""
        parts: dict[str, Any] = {
            "site": "north",
            "secret": SECRET,
            "expires": int(datetime.now(UTC).timestamp()) + 600,
            "enrolment": (self.enrolment,),
            "fleet": (self.fleet,),
            "authority": self.authority.certificate.public_bytes(serialization.Encoding.DER),
            "coordinator": self.identity.public_key().public_bytes_raw(),
            "consortium": "heart",
        }
        return Invitation(**(parts | changes))

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Registry"]:
        """Serves both ports of this machine's own address."""
        registrar = Registrar(
            store=self.store,
            authority=self.authority,
            identity=self.identity,
            addresses=(),
            clock=lambda: datetime.now(UTC),
            serial=self.serial,
            allow=self.allow,
            lifetime=self.lifetime,
        )
        stranger, mutual = grpc.aio.server(options=OPTIONS), grpc.aio.server(options=OPTIONS)
        pb_grpc.add_EnrolmentServicer_to_server(EnrolmentService(registrar), stranger)
        pb_grpc.add_MembershipServicer_to_server(MembershipService(registrar), mutual)
        one = server_credentials(self.certificate, self.pem(), mutual=False)
        two = server_credentials(self.certificate, self.pem(), mutual=True)
        self.enrolment = f"localhost:{stranger.add_secure_port('localhost:0', one)}"
        self.fleet = f"localhost:{mutual.add_secure_port('localhost:0', two)}"
        await stranger.start()
        await mutual.start()
        try:
            yield self
        finally:
            await stranger.stop(None)
            await mutual.stop(None)
