"""Consortia and who belongs to them: folders, invitations, enrolment, certificates and peers."""

import asyncio
import getpass
import os
import secrets  # noqa: TID251  chosen here
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cohortium.adapters import consortium_folder, credentials, home, person, private_files
from cohortium.adapters.consortium_folder import Consortium
from cohortium.bootstrap.homes import create_home
from cohortium.bootstrap.stores import stores
from cohortium.coordinator.authority import PERSON_LIFETIME, SERIAL_BITS, Role
from cohortium.coordinator.ports import Enrolments, SiteRow
from cohortium.core import invitation as invitations
from cohortium.core.errors import PolicyRefused, SiteError, StudyError
from cohortium.core.identity import fingerprint
from cohortium.core.invitation import Invitation, InvitationError
from cohortium.engines.fleet import joining
from cohortium.engines.fleet.enrolment import Allow, Registrar
from cohortium.site import peers as rules
from cohortium.site.enrolled import Credential, Enrolled
from cohortium.site.peers import Met, Peers


def create_consortium(folder: str | Path, name: str, addresses: Sequence[str], enrolment: Sequence[str]) -> list[Path]:
    """Begins a consortium in a folder. Returns what it wrote.

    Raises:
        StudyError: a name or address is wrong, or the folder cannot be used.
    """
    return consortium_folder.create(Path(folder), name, addresses, enrolment, _now(), _serial)


def load_consortium(folder: str | Path) -> Consortium:
    """Returns the consortium of a folder.

    Raises:
        StudyError: something is missing, malformed, or open to others.
    """
    return consortium_folder.load(Path(folder))


def grant(consortium: Consortium, role: Role, name: str, folder: str | Path) -> list[Path]:
    """Writes a new person's folder: key, certificate, and where the consortium is. Returns its files.

    Raises:
        StudyError: the name is wrong, there are such files already, or they cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        key, csr = credentials.request()
        certificate = consortium.authority.certify(csr, role, name, _now(), _serial(), PERSON_LIFETIME)
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        one = person.Person(consortium.addresses, consortium.authority_pem, pem, key)
        return person.create(path, consortium.name, name, one)
    except OSError as error:
        raise StudyError(f"{path} cannot be written ({error.strerror})") from None


def server_certificate(consortium: Consortium) -> Callable[[], tuple[bytes, bytes]]:
    """Returns what gives a coordinator's certificate chain and key (PEM), new ones once a third of their life is left.

    They are kept in memory alone. It may be called from several threads at once.
    """
    made, latest = _now(), _serve(consortium)

    def fresh() -> tuple[bytes, bytes]:
        nonlocal made, latest
        # a clock that was ahead and went back leaves a certificate that is not valid yet
        if not made <= _now() < latest.due:
            made, latest = _now(), _serve(consortium)
        return latest.chain, latest.key

    return fresh


def registrar(consortium: Consortium, store: Enrolments, allow: Allow) -> Registrar:
    """Returns what gives sites their certificates, for `EnrolmentService` and `MembershipService`."""
    return Registrar(
        store=store,
        authority=consortium.authority,
        identity=consortium.identity,
        addresses=consortium.addresses,
        clock=_now,
        serial=_serial,
        allow=allow,
        lifetime=consortium.site_lifetime,
    )


@asynccontextmanager
async def enrolments(folder: str | Path) -> AsyncIterator[Enrolments]:
    """Yields the store of a consortium's sites: the database that its settings name, or the embedded one.

    Raises:
        StudyError: the folder holds no consortium, or no store can be had.
    """
    from cohortium.adapters import postgres
    from cohortium.adapters.postgres_enrolments import PostgresEnrolments

    async with stores(load_consortium(folder)) as (database_url, _), postgres.connected(database_url, most=2) as own:
        yield PostgresEnrolments(own)


async def invite(consortium: Consortium, store: Enrolments, site: str, days: float, by: str) -> str:
    """Returns a new invitation's token, which is kept nowhere; an older invitation of the site is void.

    Raises:
        StudyError: the name is not valid, or a site of that name is a member.
    """
    expires, secret = _now() + timedelta(days=days), secrets.token_bytes(32)
    made = Invitation(
        site=site,
        secret=secret,
        expires=int(expires.timestamp()),
        enrolment=consortium.enrolment,
        fleet=consortium.addresses,
        authority=consortium.authority.certificate.public_bytes(serialization.Encoding.DER),
        coordinator=consortium.identity.public_key().public_bytes_raw(),
        consortium=consortium.name,
    )
    token = invitations.issue(made)
    await store.invite(site, invitations.digest(secret), expires, by)
    return token


def invite_site(folder: str | Path, site: str, days: float) -> str:
    """Invites a site to the consortium of a folder, and returns the token.

    Raises:
        StudyError: the folder, the name or the store cannot be used, or a site of that name is a member.
    """

    async def invited() -> str:
        async with enrolments(folder) as store:
            return await invite(load_consortium(folder), store, site, days, _me())

    return asyncio.run(invited())


def revoke_site(folder: str | Path, site: str) -> SiteRow:
    """Revokes a site of the consortium of a folder at once.

    Raises:
        StudyError: the folder or the store cannot be used, or there is no such site.
    """

    async def revoked() -> SiteRow:
        async with enrolments(folder) as store:
            return await store.revoke(site, _me())

    return asyncio.run(revoked())


@dataclass(frozen=True)
class Enrolment:
    """What enrolling came to. `written` holds the files that are new."""

    enrolled: Enrolled
    fingerprint: str
    expires: datetime
    written: tuple[Path, ...]


def enrol_site(token: str, folder: str | Path) -> Enrolment:
    """Joins the consortium of an invitation; the keys are made here, and leave this folder never.

    After a lost answer, the same call goes on where it stopped. After a refusal nothing is left of it.

    Raises:
        InvitationError: the token is no invitation.
        PolicyRefused: it has expired, or somebody else used it.
        SiteError: the folder cannot be used, or belongs to another consortium.
        Unreachable: no coordinator answered.
    """
    invitation, path = invitations.parse(token), Path(folder)
    invitations.require_current(invitation, _now())
    begun = _is_home(path)
    enrolled = _place(invitation, path)
    made_folder, made_key = _begin(path)
    identity, (key, csr) = credentials.identity_of(path), credentials.request()
    try:
        joined = asyncio.run(joining.enrol(invitation, identity, csr, _now()))
    except PolicyRefused:
        # the coordinator knows nothing of this identity, and the next invitation may have another
        with suppress(OSError):
            if made_key:
                (path / credentials.IDENTITY).unlink()
            if made_folder:
                path.rmdir()
        raise
    written = [] if begun else create_home(path)
    credential = Credential(key, joined.chain)
    credentials.save_credential(path, credential)
    if not credentials.is_enrolled(path):
        credentials.save_enrolled(path, replace(enrolled, fleet=joined.fleet))
    files = (credentials.IDENTITY, credentials.TLS, credentials.AUTHORITY, credentials.MEMBERSHIP)
    told = fingerprint(identity.public_key().public_bytes_raw())
    return Enrolment(enrolled, told, credential.expires, (*written, *(path / name for name in files)))


async def renew_credential(folder: Path, credential: Credential) -> Credential:
    """Returns a new certificate for a site, for `joining.keep_renewed`; it is not stored.

    Raises:
        PolicyRefused: the site is no longer a member.
        CohortiumError: it cannot be had now.
    """
    enrolled, identity = credentials.load_enrolled(folder), credentials.identity_of(folder)
    return await joining.renew(enrolled, credential, identity, credentials.request(), _now())


async def keep_renewed(folder: Path, renewed: Callable[[Credential], None]) -> None:
    """Renews a site's certificate for ever, stores it, and tells `renewed`, so that the link attaches anew with it.

    Raises:
        PolicyRefused: the site is no longer a member.
        SiteError: the site's home cannot be used.
    """

    async def stored(credential: Credential) -> None:
        credentials.save_credential(folder, credential)
        renewed(credential)

    credential = credentials.load_credential(folder)
    await joining.keep_renewed(credential, partial(renew_credential, folder), stored, _now)


async def meet_peers(folder: Path) -> Met:
    """Asks the coordinator who the other sites are, and pins those that are new.

    Raises:
        PolicyRefused: the site is no longer a member, or another enrolled under its name.
        CohortiumError: no coordinator answers, or it cannot be believed.
    """
    enrolled, me = credentials.load_enrolled(folder), _me_of(folder)
    told = await joining.roster(enrolled, credentials.load_credential(folder))
    found: list[Met] = []

    def met(before: Peers) -> Peers:
        found.append(rules.meet(before, told, enrolled.coordinator, me, int(_now().timestamp())))
        return found[0].peers

    credentials.change_peers(folder, met)
    return found[0]


def pinned_identities(folder: str | Path) -> dict[str, bytes]:
    """Returns the identities that count at a site, for `Membership.pinned`.

    Raises:
        SiteError: the site's home cannot be used.
    """
    path = Path(folder)
    return rules.pinned(credentials.load_peers(path), credentials.load_enrolled(path).peers, _me_of(path))


def site_peers(folder: str | Path) -> tuple[Enrolled, str, Peers]:
    """Returns a site's place, its own fingerprint, and the sites that it has met.

    Raises:
        SiteError: the site's home cannot be used.
    """
    path = Path(folder)
    return credentials.load_enrolled(path), fingerprint(_me_of(path)[1]), credentials.load_peers(path)


def confirm_peer(folder: str | Path, name: str, told: str) -> None:
    """Records that somebody compared the fingerprint of a site.

    Raises:
        StudyError: no such site has been met.
        PolicyRefused: the fingerprint is none of that site's.
        SiteError: the site's home cannot be used.
    """
    path = Path(folder)
    credentials.load_enrolled(path)
    credentials.change_peers(path, lambda peers: rules.confirm(peers, name, told))


def read_token(path: str | Path) -> str:
    """Returns the text of a file that should hold an invitation.

    Raises:
        InvitationError: it cannot be read, or holds something longer, or no text.
    """
    try:
        with Path(path).open("rb") as file:
            return file.read(invitations.MAX_TOKEN_CHARACTERS + 2).decode("ascii")
    except (OSError, UnicodeDecodeError):
        raise InvitationError(f"{path} holds no invitation that can be read: ask for a new one") from None


def require_new(path: str | Path) -> None:
    """Checks that a file can be new: whoever asks for a secret should not lose it for a name that is taken.

    Raises:
        StudyError: there is such a file, or no folder for it.
    """
    if os.path.lexists(path) or not Path(path).absolute().parent.is_dir():
        raise StudyError(f"{path} is there already, or its folder is not: name a new file")


def write_secret(path: str | Path, data: bytes) -> None:
    """Writes a new file that only its owner can read.

    Raises:
        StudyError: there is such a file, or it cannot be written.
    """
    try:
        private_files.create(Path(path), data)
    except OSError as error:
        raise StudyError(f"{path} cannot be written ({error.strerror})") from None


def _begin(path: Path) -> tuple[bool, bool]:
    """Makes the folder and the identity, unless they are there. Returns which of them are new."""
    made = not path.exists()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, f"cannot be made ({error.strerror})") from None
    credentials.require_own(path)
    return made, credentials.begin_identity(path)


def _is_home(path: Path) -> bool:
    """Returns whether a folder is a site's home already; half a home is neither that nor a place for a new one."""
    ledger, key = (path / home.LEDGER).exists(), (path / home.KEY).exists()
    if ledger != key:
        raise _unusable(path, "holds a ledger without its key, or a key without its ledger: restore both first")
    return ledger


def _place(invitation: Invitation, path: Path) -> Enrolled:
    """Returns the place that an invitation offers, unless the folder's site has another one."""
    offered = Enrolled(
        site=invitation.site,
        consortium=invitation.consortium,
        enrolment=invitation.enrolment,
        fleet=invitation.fleet,
        authority=_pem(invitation.authority),
        coordinator=invitation.coordinator,
    )
    if not credentials.is_enrolled(path):
        return offered
    there = credentials.load_enrolled(path)
    if (there.site, there.authority, there.coordinator) != (offered.site, offered.authority, offered.coordinator):
        raise _unusable(
            path, f"belongs to site '{there.site}' of consortium '{there.consortium}' already: name another folder"
        )
    return there


def _serve(consortium: Consortium) -> Credential:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = consortium.authority.serve(
        key.public_key(), consortium.hosts, _now(), _serial(), consortium.server_lifetime
    )
    return Credential(credentials.pem_of(key), certificate.public_bytes(serialization.Encoding.PEM))


def _me_of(path: Path) -> tuple[str, bytes]:
    return credentials.load_enrolled(path).site, credentials.identity_of(path).public_key().public_bytes_raw()


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def _me() -> str:
    """Returns who invites and revokes, for the store: whoever is logged in on this machine."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "unknown"


def _serial() -> int:
    # never 0, which no certificate may have
    return secrets.randbits(SERIAL_BITS) or 1


def _now() -> datetime:
    return datetime.now(UTC)  # noqa: TID251  the clock is chosen here


def _unusable(path: Path, reason: str) -> SiteError:
    return SiteError(f"{path} {reason}", public="this site's home cannot be used")
