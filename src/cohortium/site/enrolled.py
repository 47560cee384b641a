"""What a site keeps of its enrolment: whom it trusts, where to find it, and its short-lived certificate."""

from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from cryptography import x509

from cohortium.site.peers import Rule


@dataclass(frozen=True, kw_only=True)
class Enrolled:
    """A site's place in a consortium.

    Attributes:
        site: its name.
        consortium: the consortium's name, for people.
        enrolment: where certificates are had without one, `host:port`.
        fleet: where sites attach, `host:port`.
        authority: the consortium's CA certificate (PEM); nobody else is believed to be a coordinator.
        coordinator: the coordinator's Ed25519 public key (32 bytes).
        peers: from when on another site's identity counts.
    """

    site: str
    consortium: str
    enrolment: tuple[str, ...]
    fleet: tuple[str, ...]
    authority: bytes
    coordinator: bytes
    peers: Rule = "first-use"


@dataclass(frozen=True)
class Credential:
    """A TLS key and its certificate (PEM). Whoever holds them can take the site's link until they expire."""

    key: bytes
    chain: bytes

    def __repr__(self) -> str:
        return "Credential()"

    @cached_property
    def _certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate(self.chain)

    @property
    def expires(self) -> datetime:
        """When it ends."""
        return self._certificate.not_valid_after_utc

    @property
    def due(self) -> datetime:
        """When a third of its life is left: the time to renew it."""
        return self.expires - (self.expires - self._certificate.not_valid_before_utc) / 3
