"""A site's keys and what it knows of its consortium, as files of the site's home.

identity.key      long-term Ed25519 key. Whoever has it is the site, until it is revoked
tls.pem           the key and certificate of the site's link, in one file, so that they change together
consortium.pem    the certificate of the consortium's authority
membership.yaml   name, addresses, the coordinator's key; written last: with it the site is enrolled
peers.json        the identities of the other sites
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field

from cohortium.adapters import private_files, settings
from cohortium.adapters.settings import Settings
from cohortium.core.errors import SiteError, StudyError
from cohortium.core.invitation import endpoint
from cohortium.site.enrolled import Credential, Enrolled
from cohortium.site.peers import Peer, Peers, Rule

IDENTITY, TLS, AUTHORITY = "identity.key", "tls.pem", "consortium.pem"
MEMBERSHIP, PEERS = "membership.yaml", "peers.json"
_MOST_KEY, _MOST_PEM, _MOST_PEERS = 4096, 1 << 15, 1 << 21
_KEY_END = b"-----END PRIVATE KEY-----\n"
_PUBLIC = "this site's home cannot be used"

_TEXT = """\
# This site's place in its consortium, from its enrolment. Only the file's owner may be able to write it (chmod 600).
site: {site}
consortium: {consortium}
coordinator: "{coordinator}"  # its public key, in hexadecimal
fleet: [{fleet}]  # where the agent attaches
enrolment: [{enrolment}]  # where it gets a certificate after being away for long
# From when on another site's identity counts: 'first-use' when the consortium first tells of it, or 'confirmed' when
# somebody has compared its fingerprint by telephone (cohortium site peers HOME --confirm NAME FINGERPRINT).
peers: {peers}
"""


class _Membership(Settings):
    site: str
    consortium: str
    coordinator: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    fleet: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    enrolment: Annotated[tuple[str, ...], Field(min_length=1, max_length=16)]
    peers: Rule = "first-use"


def request() -> tuple[bytes, bytes]:
    """Returns a new TLS key (PEM) and the PKCS#10 request (DER) for its certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    return pem_of(key), csr.public_bytes(serialization.Encoding.DER)


def pem_of(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    """Returns a private key as PEM, without a password: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def begin_identity(folder: Path) -> bool:
    """Makes the site's identity, unless there is one. Returns whether it did.

    Raises:
        SiteError: it cannot be written.
    """
    path = folder / IDENTITY
    try:
        private_files.create(path, pem_of(Ed25519PrivateKey.generate()))
    except FileExistsError:
        return False
    except OSError as error:
        raise _unusable(path, f"cannot be written ({error.strerror})") from None
    return True


def identity_of(folder: Path) -> Ed25519PrivateKey:
    """Returns the site's identity.

    Raises:
        SiteError: it is missing, no Ed25519 key, or can be read by others.
    """
    path = folder / IDENTITY
    try:
        key = serialization.load_pem_private_key(_secret(path, _MOST_KEY), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise _unusable(path, "is no Ed25519 key: restore it; another one would be another site to all others")
    return key


def save_credential(folder: Path, credential: Credential) -> None:
    """Replaces the site's TLS key and certificate, both at once.

    Raises:
        SiteError: they cannot be written; the ones before are still there.
    """
    _replace(folder / TLS, credential.key + credential.chain)


def load_credential(folder: Path) -> Credential:
    """Returns the site's TLS key and certificate.

    Raises:
        SiteError: they are missing, malformed, or can be read by others.
    """
    path = folder / TLS
    key, end, chain = _secret(path, _MOST_PEM).partition(_KEY_END)
    credential = Credential(key + end, chain)
    try:
        x509.load_pem_x509_certificate(chain)
        serialization.load_pem_private_key(credential.key, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise _unusable(path, "is no key with its certificate: restore it, or enrol again") from None
    return credential


def save_enrolled(folder: Path, enrolled: Enrolled) -> None:
    """Writes what makes the site a member; the membership last.

    Raises:
        SiteError: it cannot be written.
    """
    text = _TEXT.format(
        site=enrolled.site,
        consortium=enrolled.consortium,
        coordinator=enrolled.coordinator.hex(),
        fleet=", ".join(f'"{address}"' for address in enrolled.fleet),
        enrolment=", ".join(f'"{address}"' for address in enrolled.enrolment),
        peers=enrolled.peers,
    )
    _replace(folder / AUTHORITY, enrolled.authority)
    _replace(folder / MEMBERSHIP, text.encode())


def is_enrolled(folder: Path) -> bool:
    """Returns whether the folder's site is a member of a consortium."""
    return os.path.lexists(folder / MEMBERSHIP)


def load_enrolled(folder: Path) -> Enrolled:
    """Returns the site's place in its consortium.

    Raises:
        SiteError: it has none, or what is there cannot be relied on.
    """
    path = folder / MEMBERSHIP
    require_own(folder)
    if not is_enrolled(folder):
        raise _unusable(folder, f"is not enrolled in a consortium: cohortium site enrol TOKEN {folder}")
    try:
        told = settings.read(path, _Membership)
        for address in (*told.fleet, *told.enrolment):
            endpoint(address)
        mode, authority = private_files.read(folder / AUTHORITY, _MOST_PEM)
        if private_files.is_open(mode, 0o022):
            raise _unusable(folder / AUTHORITY, "can be written by others, who could pose as the consortium: chmod 600")
        x509.load_pem_x509_certificate(authority)
    except StudyError as error:
        raise SiteError(str(error), public=_PUBLIC) from None
    except OSError as error:
        raise _unusable(folder / AUTHORITY, f"cannot be read ({error.strerror}): restore it") from None
    except (ValueError, x509.InvalidVersion):
        raise _unusable(folder / AUTHORITY, "is no certificate: restore it") from None
    return Enrolled(
        site=told.site,
        consortium=told.consortium,
        enrolment=told.enrolment,
        fleet=told.fleet,
        authority=authority,
        coordinator=bytes.fromhex(told.coordinator),
        peers=told.peers,
    )


def load_peers(folder: Path) -> Peers:
    """Returns the other sites that this one has met; none before the first.

    Raises:
        SiteError: the file cannot be relied on: without its pins another site could be put in a known one's place.
    """
    path = folder / PEERS
    if not os.path.lexists(path):
        return {}
    data = _secret(path, _MOST_PEERS)
    try:
        return msgspec.json.decode(data, type=dict[str, Peer])
    except msgspec.MsgspecError:
        raise _unusable(path, "is damaged: restore it; without it other sites' identities are not known") from None


def change_peers(folder: Path, change: Callable[[Peers], Peers]) -> Peers:
    """Replaces the peers by what `change` makes of them, while nobody else does.

    Raises:
        SiteError: the file cannot be read or written. Whatever `change` raises, nothing is changed.
    """
    with _alone(folder):
        before = load_peers(folder)
        after = change(before)
        if after != before:
            _replace(folder / PEERS, msgspec.json.format(msgspec.json.encode(after), indent=2))
        return after


def require_own(folder: Path) -> None:
    """Checks that a folder is there and that only its owner can write it.

    Raises:
        SiteError: it is not so.
    """
    if not folder.is_dir():
        raise _unusable(folder, "is no folder: name a site's home")
    if private_files.is_open(folder.stat().st_mode, 0o022):
        raise _unusable(folder, "can be written by others, who could put other keys there: chmod 700 it, and look")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _secret(path: Path, most: int) -> bytes:
    try:
        mode, data = private_files.read(path, most)
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror}): restore it, or enrol the site") from None
    if private_files.is_open(mode, 0o077):
        raise _unusable(path, "can be read by others, who could take this site's place: chmod 600 it, and tell them")
    if len(data) > most:
        raise _unusable(path, f"is longer than {most} bytes: restore it")
    return data


def _replace(path: Path, data: bytes) -> None:
    try:
        private_files.replace(path, data)
    except OSError as error:
        raise _unusable(path, f"cannot be written ({error.strerror})") from None


def _unusable(path: Path, reason: str) -> SiteError:
    return SiteError(f"{path} {reason}", public=_PUBLIC)
