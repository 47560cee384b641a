"""The consortium's certificate authority: who holds which name, in X.509. No clock and no serial of its own.

What an attacker gains who holds the authority's key: certificates in any name, so links and control of every run. It
cannot sign announcements in a site's name, because sites pin each other's Ed25519 identities, nor survivor sets.
"""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal, cast, get_args

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from cohortium.core.errors import ProtocolError
from cohortium.core.fields import names

Role = Literal["site", "operator", "researcher"]
ROLES: tuple[Role, ...] = get_args(Role)
SITE_LIFETIME = timedelta(hours=12)
SERVER_LIFETIME = timedelta(hours=24)
PERSON_LIFETIME = timedelta(days=90)
AUTHORITY_LIFETIME = timedelta(days=3650)
MAX_CSR_BYTES, MAX_CERTIFICATE_BYTES = 4096, 8192
SERIAL_BITS = 63
_EARLY = timedelta(minutes=5)
"""Certificates begin so much before now, because clocks differ."""
_SCHEME = "cohortium:"
_URI = re.compile(r"cohortium:(site|operator|researcher):([A-Za-z0-9][A-Za-z0-9_.\-]{0,62})", re.ASCII)


@dataclass(frozen=True)
class Principal:
    """Whom a certificate names. `serial` and `not_after` are the certificate's own; `issued` is when it was made."""

    role: Role
    name: str
    serial: int
    not_after: datetime
    issued: datetime


@dataclass(frozen=True)
class Authority:
    """The authority's key and its certificate."""

    key: ec.EllipticCurvePrivateKey = field(repr=False)
    certificate: x509.Certificate

    def certify(
        self, csr: bytes, role: Role, name: str, now: datetime, serial: int, lifetime: timedelta = SITE_LIFETIME
    ) -> x509.Certificate:
        """Returns a client certificate for the public key of a PKCS#10 request (DER); what else it says is ignored.

        Raises:
            ProtocolError: it is no request for a P-256 key, or its signature is not that key's.
            StudyError: the name is not a valid one.
        """
        names(role, [name])
        subject = x509.UniformResourceIdentifier(f"{_SCHEME}{role}:{name}")
        window = (now - _EARLY, now + lifetime)
        return self._signed(public_key_of(csr), [subject], ExtendedKeyUsageOID.CLIENT_AUTH, serial, window)

    def serve(
        self,
        public: ec.EllipticCurvePublicKey,
        hosts: Sequence[str],
        now: datetime,
        serial: int,
        lifetime: timedelta = SERVER_LIFETIME,
    ) -> x509.Certificate:
        """Returns a server certificate for hosts, names or IP addresses; no site can show it as its own."""
        subjects = [_host(host) for host in dict.fromkeys(hosts)]
        window = (now - _EARLY, now + lifetime)
        return self._signed(public, subjects, ExtendedKeyUsageOID.SERVER_AUTH, serial, window)

    def _signed(
        self,
        public: ec.EllipticCurvePublicKey,
        subjects: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        serial: int,
        window: tuple[datetime, datetime],
    ) -> x509.Certificate:
        begin, end = window
        return (
            x509.CertificateBuilder()
            # who it is stands in the alternative name alone, so that there is one place to look
            .subject_name(x509.Name([]))
            .issuer_name(self.certificate.subject)
            .public_key(public)
            .serial_number(serial)
            .not_valid_before(begin)
            .not_valid_after(min(end, self.certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName(subjects), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_issuer_id(self.key), critical=False)
            .sign(self.key, hashes.SHA256())
        )


def establish(
    name: str, key: ec.EllipticCurvePrivateKey, now: datetime, serial: int, lifetime: timedelta = AUTHORITY_LIFETIME
) -> Authority:
    """Returns a new authority, which signs itself and no authority below it."""
    names("consortium", [name])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


def public_key_of(csr: bytes) -> ec.EllipticCurvePublicKey:
    """Returns the P-256 key of a PKCS#10 request (DER) that it signs itself.

    Raises:
        ProtocolError: it is too long or none, its key is of another kind, or its signature is wrong.
    """
    if len(csr) > MAX_CSR_BYTES:
        raise ProtocolError(f"a certificate request was refused: it is longer than {MAX_CSR_BYTES} bytes")
    try:
        request = x509.load_der_x509_csr(csr)
        public, signed = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ProtocolError("a certificate request was refused: it is malformed") from error
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise ProtocolError("a certificate request was refused: its key must be of the curve P-256")
    if not signed:
        raise ProtocolError("a certificate request was refused: it is not signed by its own key")
    return public


def principal_of(certificate: bytes) -> Principal:
    """Returns whom a certificate names, PEM or DER. TLS has checked it; this only reads.

    Raises:
        ProtocolError: it does not name exactly one site or person of a consortium, and nothing else.
    """
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise ProtocolError(f"a certificate was refused: it is longer than {MAX_CERTIFICATE_BYTES} bytes")
    try:
        pem = certificate.lstrip().startswith(b"-----BEGIN")
        read = x509.load_pem_x509_certificate(certificate) if pem else x509.load_der_x509_certificate(certificate)
        subjects = list(read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except (ValueError, TypeError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.InvalidVersion) as error:
        raise ProtocolError("a certificate was refused: it names nobody of a consortium") from error
    # any second name would be one that this reader and another might choose between
    if len(subjects) != 1 or not isinstance(subjects[0], x509.UniformResourceIdentifier):
        raise ProtocolError("a certificate was refused: it must name exactly one site or person of a consortium")
    found = _URI.fullmatch(subjects[0].value)
    if not found:
        raise ProtocolError("a certificate was refused: it names nobody of a consortium")
    issued = read.not_valid_before_utc + _EARLY
    return Principal(cast(Role, found[1]), found[2], read.serial_number, read.not_valid_after_utc, issued)


def verify_client(certificate: bytes, authority: x509.Certificate, now: datetime) -> Principal:
    """Returns whom a certificate (PEM, first of a chain) names after checking all of it: a site does so on receipt.

    Raises:
        ProtocolError: the authority did not issue it, or not for a client, or it is not valid now.
    """
    principal = principal_of(certificate)
    try:
        verifier = PolicyBuilder().store(Store([authority])).time(now).build_client_verifier()
        verifier.verify(x509.load_pem_x509_certificate(certificate), [])
    except (VerificationError, ValueError, x509.InvalidVersion) as error:
        raise ProtocolError(
            "a certificate was refused: the consortium's authority does not vouch for it now; look whether this "
            "machine's clock is right"
        ) from error
    return principal


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_id(key: ec.EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
