"""A certificate authority, a gateway and what stands behind it, for tests with real sockets."""

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cohortium.engines.fleet.enrolment import server_credentials
from cohortium.engines.fleet.gateway import Gateway, Limits, server
from cohortium.engines.fleet.link import Link, Patience

HOUR = timedelta(hours=1)
QUICK = Patience(first=0.02, most=0.2, greeting=5)


class Authority:
    """Issues certificates as the consortium's authority does."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "authority")])
        self._certificate = self._issue(self._key.public_key(), [], None, HOUR, authority=True)
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM)

    def _issue(self, public, names, usage, lasts, authority=False) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(self._name if authority else x509.Name([]))
            .issuer_name(self._name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * HOUR)
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(authority, None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        if usage:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def issue(self, names, usage=ExtendedKeyUsageOID.CLIENT_AUTH, lasts=HOUR) -> tuple[bytes, bytes, bytes]:
        """Returns PEM: the authority, a chain and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        chain = self._issue(key.public_key(), names, usage, lasts).public_bytes(serialization.Encoding.PEM)
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return self.pem, chain, key.private_bytes(*form)

    def person(self, name: str, role: str = "site", lasts=HOUR) -> tuple[bytes, bytes, bytes]:
        """Returns a client's certificate."""
        return self.issue([x509.UniformResourceIdentifier(f"cohortium:{role}:{name}")], lasts=lasts)

    def host(self) -> tuple[bytes, bytes, bytes]:
        """Returns a coordinator's certificate."""
        names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        return self.issue(names, ExtendedKeyUsageOID.SERVER_AUTH)


class Exchange:
    """Keeps what it hears, and says again to whoever attaches what is outstanding, as leaders do."""

    def __init__(self) -> None:
        self.outboxes: dict = {}
        self.heard_of: list[tuple[str, str, bytes]] = []
        self.outstanding: dict[str, tuple[str, bytes, int]] = {}
        self.attached = 0
        self.changed = asyncio.Event()

    async def attach(self, site, outbox, version="") -> None:
        self.outboxes[site] = outbox
        self.attached += 1
        if site in self.outstanding:
            outbox.send(*self.outstanding[site])
        self.changed.set()

    async def detach(self, site, outbox) -> None:
        if self.outboxes.get(site) is outbox:
            del self.outboxes[site]
        self.changed.set()

    async def heard(self, site, run, data) -> None:
        self.heard_of.append((site, run, data))
        self.changed.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 10) -> None:
        """Waits until something here is so."""
        async with asyncio.timeout(seconds):
            while not condition():
                self.changed.clear()
                # what is not told by `changed` is looked at now and then
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.05):
                        await self.changed.wait()


class Coordinator:
    """A served gateway."""

    def __init__(self, authority: Authority, **options) -> None:
        self.refused: dict[str, str] = {}
        self.ahead = timedelta()
        self.exchange = options.pop("exchange", None) or Exchange()
        self.authority, self.files = authority, authority.host()
        self.gateway = Gateway(
            self.exchange,
            lambda site, serial, until: self.refused.get(site),
            "c1",
            "1.0",
            lambda: datetime.now(UTC) + self.ahead,
            Limits(**options),
        )
        self.server: grpc.aio.Server | None = None

    async def serve(self, port: int = 0) -> str:
        """Returns the address."""
        self.server = server([self.gateway.handler()])
        secured = server_credentials(lambda: self.files[1:], self.authority.pem, mutual=True)
        port = self.server.add_secure_port(f"127.0.0.1:{port}", secured)
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def stop(self, grace: float | None = None) -> None:
        self.gateway.stop()
        await self.server.stop(grace)


@contextlib.asynccontextmanager
async def coordinator(authority: Authority, **options) -> AsyncIterator[tuple[Coordinator, str]]:
    one = Coordinator(authority, **options)
    address = await one.serve()
    try:
        yield one, address
    finally:
        await one.stop(0.5)


@contextlib.asynccontextmanager
async def link(files, *addresses: str, patience: Patience = QUICK) -> AsyncIterator[Link]:
    one = Link(addresses, files if callable(files) else lambda: files, lambda: 0.5, lambda: 0.0, "2.0", patience)
    one.start()
    try:
        yield one
    finally:
        await one.detach()
