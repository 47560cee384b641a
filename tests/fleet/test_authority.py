"""The consortium's authority: what it signs, what it refuses to, and whom a certificate names."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from cohortium.coordinator import authority
from cohortium.coordinator.authority import establish, principal_of, verify_client
from cohortium.core.errors import ProtocolError, StudyError

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CA = establish("heart", ec.generate_private_key(ec.SECP256R1()), NOW, 1)
KEY = ec.generate_private_key(ec.SECP256R1())


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def request(key: object = KEY, **names: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(getattr(NameOID, kind), text) for kind, text in names.items()])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    algorithm = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)  # type: ignore[arg-type]


CSR = request()


def with_subjects(*subjects: x509.GeneralName) -> bytes:
    """Returns a certificate of the authority that says what its own code never would."""
    return pem(CA._signed(KEY.public_key(), subjects, ExtendedKeyUsageOID.CLIENT_AUTH, 7, (NOW, NOW)))


def uri(text: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(text)


def client(certificate: x509.Certificate, now: datetime) -> None:
    PolicyBuilder().store(Store([CA.certificate])).time(now).build_client_verifier().verify(certificate, [])


def server(certificate: x509.Certificate, host: x509.GeneralName, now: datetime = NOW) -> None:
    verifier = PolicyBuilder().store(Store([CA.certificate])).time(now).build_server_verifier(host)  # type: ignore[arg-type]
    verifier.verify(certificate, [])


class TestASitesCertificate:
    def test_it_is_a_clients_for_half_a_day(self) -> None:
        certificate = CA.certify(request(), "site", "north", NOW, 42)
        client(certificate, NOW)
        client(certificate, NOW + timedelta(hours=11, minutes=59))
        for wrong in (timedelta(hours=12, minutes=1), -timedelta(minutes=6)):
            with pytest.raises(VerificationError):
                client(certificate, NOW + wrong)
        with pytest.raises(VerificationError):
            server(certificate, x509.DNSName("north"))
        for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER):
            principal = principal_of(certificate.public_bytes(encoding))
            assert (principal.role, principal.name, principal.serial) == ("site", "north", 42)
            assert principal.not_after == NOW + timedelta(hours=12)

    def test_the_request_decides_nothing_but_the_key(self) -> None:
        builder = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "south")])
        )
        for extension in (
            x509.SubjectAlternativeName([uri("cohortium:operator:root"), x509.DNSName("fleet.example.org")]),
            x509.BasicConstraints(ca=True, path_length=None),
        ):
            builder = builder.add_extension(extension, critical=True)
        csr = builder.sign(KEY, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
        certificate = CA.certify(csr, "site", "north", NOW, 42)
        assert verify_client(pem(certificate), CA.certificate, NOW).name == "north"
        assert certificate.subject == x509.Name([])
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca

    def test_its_key_signs_no_further_certificates(self) -> None:
        own = CA.certify(request(), "site", "north", NOW, 42)
        child = authority.Authority(KEY, own).certify(request(), "site", "south", NOW, 43)
        with pytest.raises(VerificationError):
            PolicyBuilder().store(Store([CA.certificate])).time(NOW).build_client_verifier().verify(child, [own])
        with pytest.raises(ProtocolError, match="does not vouch"):
            verify_client(pem(child), CA.certificate, NOW)

    def test_another_authority_of_the_same_name_does_not_vouch(self) -> None:
        other = establish("heart", ec.generate_private_key(ec.SECP256R1()), NOW, 1)
        with pytest.raises(ProtocolError, match="does not vouch"):
            verify_client(pem(other.certify(request(), "site", "north", NOW, 42)), CA.certificate, NOW)

    def test_it_ends_with_the_authority(self) -> None:
        late = CA.certificate.not_valid_after_utc - timedelta(hours=1)
        certificate = CA.certify(request(), "site", "north", late, 42)
        assert certificate.not_valid_after_utc == CA.certificate.not_valid_after_utc


class TestRequestsRefused:
    @pytest.mark.parametrize(
        "key",
        [
            ec.generate_private_key(ec.SECP384R1()),
            rsa.generate_private_key(65537, 2048),
            Ed25519PrivateKey.generate(),
        ],
        ids=["P-384", "RSA", "Ed25519"],
    )
    def test_other_keys(self, key: object) -> None:
        with pytest.raises(ProtocolError, match="P-256"):
            CA.certify(request(key), "site", "north", NOW, 1)

    def test_a_signature_of_another_key(self) -> None:
        mine, other = request(), request(ec.generate_private_key(ec.SECP256R1()))
        theirs = x509.load_der_x509_csr(other).public_key()
        point = serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint
        swapped = mine.replace(KEY.public_key().public_bytes(*point), theirs.public_bytes(*point))
        assert swapped != mine
        with pytest.raises(ProtocolError, match="own key"):
            CA.certify(swapped, "site", "north", NOW, 1)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, data: bytes) -> None:
        with pytest.raises(ProtocolError):
            CA.certify(data, "site", "north", NOW, 1)

    @given(st.data())
    def test_a_mangled_request(self, data: st.DataObject) -> None:
        csr = bytearray(CSR)
        place = data.draw(st.integers(0, len(csr) - 1))
        csr[place] ^= data.draw(st.integers(1, 255))
        with pytest.raises(ProtocolError):
            CA.certify(bytes(csr), "site", "north", NOW, 1)

    def test_a_long_one(self) -> None:
        with pytest.raises(ProtocolError, match="longer"):
            CA.certify(request(COMMON_NAME="a" * 60) + bytes(5000), "site", "north", NOW, 1)

    @pytest.mark.parametrize("name", ["", "north:x", "north\n", "a/b", "ä", "a" * 64, "-a", "a b", "a\0"])
    def test_names(self, name: str) -> None:
        with pytest.raises(StudyError, match="not a valid name"):
            CA.certify(request(), "site", name, NOW, 1)


class TestWhomACertificateNames:
    @pytest.mark.parametrize("role", authority.ROLES)
    def test_each_role(self, role: authority.Role) -> None:
        principal = principal_of(pem(CA.certify(request(), role, "a.b-c_1", NOW, 9)))
        assert (principal.role, principal.name) == (role, "a.b-c_1")

    @pytest.mark.parametrize(
        "subjects",
        [
            [uri("cohortium:site:north"), uri("cohortium:site:south")],
            [uri("cohortium:site:north"), uri("cohortium:site:north")],
            [uri("cohortium:site:north"), x509.DNSName("north")],
            [uri("cohortium:site:north"), uri("https://example.org")],
            [uri("https:site:north")],
            [uri("cohortium:site:")],
            [uri("cohortium:root:north")],
            [uri("cohortium:Site:north")],
            [uri("COHORTIUM:site:north")],
            [uri("cohortium:site:north:operator")],
            [uri("cohortium:site:north\n")],
            [uri("cohortium:site:north ")],
            [uri("cohortium:site:no%72th")],
            [uri("cohortium:site:../north")],
            [uri("cohortium:site:" + "a" * 64)],
            [uri("xcohortium:site:north")],
            [x509.DNSName("cohortium:site:north")],
            [x509.RFC822Name("cohortium:site:north")],
        ],
        ids=str,
    )
    def test_tricks(self, subjects: list[x509.GeneralName]) -> None:
        with pytest.raises(ProtocolError, match="certificate was refused"):
            principal_of(with_subjects(*subjects))

    def test_the_authority_and_servers_are_nobody(self) -> None:
        served = CA.serve(KEY.public_key(), ["fleet.example.org"], NOW, 5)
        for certificate in (CA.certificate, served):
            with pytest.raises(ProtocolError, match="certificate was refused"):
                principal_of(pem(certificate))

    @given(st.binary(max_size=100))
    def test_any_bytes(self, data: bytes) -> None:
        for prefix in (b"", b"-----BEGIN CERTIFICATE-----\n"):
            with pytest.raises(ProtocolError):
                principal_of(prefix + data)

    def test_a_long_one(self) -> None:
        with pytest.raises(ProtocolError, match="longer"):
            principal_of(pem(CA.certify(request(), "site", "north", NOW, 1)) + bytes(9000))


class TestServers:
    def test_for_names_and_addresses(self) -> None:
        certificate = CA.serve(KEY.public_key(), ["fleet.example.org", "127.0.0.1", "::1", "127.0.0.1"], NOW, 5)
        server(certificate, x509.DNSName("fleet.example.org"))
        for ip in ("127.0.0.1", "::1"):
            server(certificate, authority._host(ip))
        with pytest.raises(VerificationError):
            server(certificate, x509.DNSName("other.example.org"))
        with pytest.raises(VerificationError):
            client(certificate, NOW)
        with pytest.raises(VerificationError):
            server(certificate, x509.DNSName("fleet.example.org"), NOW + timedelta(hours=25))


def test_no_secret_is_shown() -> None:
    assert "PrivateKey" not in repr(CA)
