"""A consortium's folder, on the coordinators' machines: settings, and the keys that make it the consortium.

consortium.yaml    settings
ca.key, ca.pem     the authority. Whoever has the key can give out certificates in any name
coordinator.key    long-term Ed25519 key. Whoever has it can sign survivor sets and introduce sites
operator.key/pem   a person's certificate, to steer runs with
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from cohortium.adapters import private_files, settings
from cohortium.adapters.credentials import pem_of, request
from cohortium.adapters.settings import Settings
from cohortium.coordinator.authority import PERSON_LIFETIME, Authority, Role, establish
from cohortium.core.errors import StudyError
from cohortium.core.fields import names
from cohortium.core.invitation import endpoint

SETTINGS, AUTHORITY_KEY, AUTHORITY, COORDINATOR = "consortium.yaml", "ca.key", "ca.pem", "coordinator.key"
OPERATOR = "operator"
_MOST_KEY, _MOST_PEM = 4096, 1 << 15

_TEXT = """\
# A consortium. Only the file's owner may be able to write it (chmod 600).
name: {name}
addresses: [{addresses}]   # where hospitals and people reach the coordinators, host:port; invitations carry them
enrolment: [{enrolment}]   # where hospitals enrol, host:port
listen:                    # where each coordinator listens on its own machine
  host: "{host}"
  fleet: {fleet_port}
  enrolment: {enrolment_port}
  health: "127.0.0.1:7402" # host:port of the health page and the figures; "" shows none
database: ""               # postgresql://USER@HOST/NAME; without one, a private PostgreSQL runs in this folder
redis: ""                  # redis://HOST:PORT/0; without one, a private server runs in this folder
hours:                     # how long certificates last; they are renewed by themselves
  site: 12
  server: 24
"""

_Address = Annotated[str, Field(max_length=260)]
_Addresses = Annotated[tuple[_Address, ...], Field(min_length=1, max_length=16)]


_Port = Annotated[int, Field(ge=1, le=65535)]


class _Listen(Settings):
    host: Annotated[str, Field(min_length=1, max_length=253)]
    fleet: _Port
    enrolment: _Port
    health: _Address = ""


class _Hours(Settings):
    site: Annotated[float, Field(ge=0.1, le=24 * 90)] = 12
    server: Annotated[float, Field(ge=0.1, le=24 * 90)] = 24


class _Consortium(Settings):
    name: str
    addresses: _Addresses
    enrolment: _Addresses
    listen: _Listen
    database: str = ""
    redis: str = ""
    hours: _Hours = _Hours()


@dataclass(frozen=True, kw_only=True)
class Consortium:
    """A consortium as its folder says.

    Attributes:
        folder: where it lies.
        name: its name.
        addresses: where sites and people reach coordinators, `host:port`.
        enrolment: where sites enrol, `host:port`.
        listen: the host that each coordinator listens at, the port of mutual TLS, and that of enrolment.
        health: `host:port` of its health page, or None.
        database, redis: URLs, or None for the embedded ones. They may hold passwords.
        authority: gives out certificates.
        identity: the coordinator's long-term key.
        site_lifetime, server_lifetime: of certificates.
    """

    folder: Path
    name: str
    addresses: tuple[str, ...]
    enrolment: tuple[str, ...]
    listen: tuple[str, int, int]
    health: str | None
    database: str | None = field(repr=False)
    redis: str | None = field(repr=False)
    authority: Authority = field(repr=False)
    identity: Ed25519PrivateKey = field(repr=False)
    site_lifetime: timedelta
    server_lifetime: timedelta

    @property
    def authority_pem(self) -> bytes:
        """The authority's certificate."""
        return _pem(self.authority.certificate)

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts that a coordinator's certificate must name."""
        return tuple(dict.fromkeys(endpoint(address)[0] for address in (*self.addresses, *self.enrolment)))


def create(
    folder: Path,
    name: str,
    addresses: Sequence[str],
    enrolment: Sequence[str],
    now: datetime,
    serial: Callable[[], int],
) -> list[Path]:
    """Begins a consortium: settings, an authority, the coordinator's key, and an operator. Returns what it wrote.

    Raises:
        StudyError: a name or address is wrong, the folder holds a consortium, can be read by others, or cannot be
            written.
    """
    names("consortium", [name])
    ports = [endpoint(address)[1] for address in (*addresses, *enrolment)]
    _require_none(folder)
    text = _TEXT.format(
        name=name,
        addresses=", ".join(f'"{address}"' for address in addresses),
        enrolment=", ".join(f'"{address}"' for address in enrolment),
        host="0.0.0.0" if _is_public(addresses) else "127.0.0.1",  # noqa: S104  sites come from elsewhere
        fleet_port=ports[0],
        enrolment_port=ports[len(addresses)],
    )
    authority = establish(name, ec.generate_private_key(ec.SECP256R1()), now, serial())
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_own(folder)
        # the settings last: a folder without them is no consortium
        written = [
            _put(folder / AUTHORITY_KEY, pem_of(authority.key)),
            _put(folder / AUTHORITY, _pem(authority.certificate)),
            _put(folder / COORDINATOR, pem_of(Ed25519PrivateKey.generate())),
            *grant(folder, authority, "operator", OPERATOR, now, serial()),
            _put(folder / SETTINGS, text.encode()),
        ]
    except OSError as error:
        raise StudyError(f"{folder} cannot be written ({error.strerror})") from None
    return written


def grant(folder: Path, authority: Authority, role: Role, name: str, now: datetime, serial: int) -> list[Path]:
    """Writes a key and a certificate for a person, `NAME.key` and `NAME.pem`. Returns their paths.

    Raises:
        StudyError: the name is wrong, or there are such files already.
        OSError: they cannot be written.
    """
    key, csr = request()
    certificate = authority.certify(csr, role, name, now, serial, PERSON_LIFETIME)
    return [_put(folder / f"{name}.key", key), _put(folder / f"{name}.pem", _pem(certificate))]


def load(folder: Path) -> Consortium:
    """Returns the consortium of a folder.

    Raises:
        StudyError: something is missing, malformed, or open to others.
    """
    if not folder.is_dir() or not (folder / SETTINGS).exists():
        raise StudyError(f"{folder} holds no consortium: begin one with cohortium consortium init {folder}")
    _require_own(folder)
    told = settings.read(folder / SETTINGS, _Consortium)
    names("consortium", [told.name])
    for address in (*told.addresses, *told.enrolment, *filter(None, [told.listen.health])):
        endpoint(address)
    key, identity = _key(folder / AUTHORITY_KEY), _key(folder / COORDINATOR)
    certificate = _certificate(folder / AUTHORITY)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise StudyError(f"{folder / AUTHORITY_KEY} is not the key of {AUTHORITY}: restore both")
    if not isinstance(identity, Ed25519PrivateKey):
        raise StudyError(f"{folder / COORDINATOR} is no Ed25519 key: restore it; every hospital has pinned it")
    return Consortium(
        folder=folder,
        name=told.name,
        addresses=told.addresses,
        enrolment=told.enrolment,
        listen=(told.listen.host, told.listen.fleet, told.listen.enrolment),
        health=told.listen.health or None,
        database=told.database or None,
        redis=told.redis or None,
        authority=Authority(key, certificate),
        identity=identity,
        site_lifetime=timedelta(hours=told.hours.site),
        server_lifetime=timedelta(hours=told.hours.server),
    )


def _require_none(folder: Path) -> None:
    for name in (SETTINGS, AUTHORITY_KEY, AUTHORITY, COORDINATOR, f"{OPERATOR}.key", f"{OPERATOR}.pem"):
        if (folder / name).is_symlink() or (folder / name).exists():
            raise StudyError(
                f"{folder / name} is there already: a consortium is begun once, because hospitals pin its keys; "
                "name another folder"
            )


def _require_own(folder: Path) -> None:
    if private_files.is_open(folder.stat().st_mode, 0o077):
        raise StudyError(f"{folder} can be read or written by others, and holds the consortium's keys: chmod 700 it")


def _put(path: Path, data: bytes) -> Path:
    try:
        private_files.create(path, data)
    except FileExistsError:
        raise StudyError(f"{path} is there already, and no key is ever replaced: name another folder") from None
    return path


def _key(path: Path) -> object:
    try:
        mode, data = private_files.read(path, _MOST_KEY)
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it") from None
    if private_files.is_open(mode, 0o077):
        raise StudyError(f"{path} can be read by others, who could take the consortium's place: chmod 600 it, and look")
    try:
        return serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise StudyError(f"{path} is no private key in PEM: restore it") from None


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(private_files.read(path, _MOST_PEM)[1])
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): restore it") from None
    except (ValueError, x509.InvalidVersion):
        raise StudyError(f"{path} is no certificate in PEM: restore it") from None


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _is_public(addresses: Sequence[str]) -> bool:
    return any(endpoint(address)[0] not in ("localhost", "127.0.0.1", "::1") for address in addresses)
