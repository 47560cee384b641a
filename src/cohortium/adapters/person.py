"""A person's folder: their certificate and key, and the consortium that they belong to.

person.yaml           who they are, and where coordinators are reached
ca.pem                the consortium's authority; nobody else is believed to be a coordinator
certificate.pem/.key  whoever has both is that person, until the certificate ends
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from cohortium.adapters import private_files, settings
from cohortium.adapters.settings import Settings
from cohortium.core.errors import StudyError
from cohortium.core.invitation import endpoint

SETTINGS, AUTHORITY, CERTIFICATE, KEY = "person.yaml", "ca.pem", "certificate.pem", "certificate.key"
_MOST = 1 << 15
_TEXT = """\
# Who you are in a consortium, and where its coordinators are reached. Keep the folder to yourself.
consortium: {consortium}
name: {name}
addresses: [{addresses}]
"""


class _Person(Settings):
    consortium: str
    name: str
    addresses: Annotated[tuple[Annotated[str, Field(max_length=260)], ...], Field(min_length=1, max_length=16)]


@dataclass(frozen=True)
class Person:
    """What a person connects with: coordinators' addresses, and PEM of the authority, the certificate and its key."""

    addresses: tuple[str, ...]
    authority: bytes
    certificate: bytes
    key: bytes

    def __repr__(self) -> str:
        return f"Person(addresses={self.addresses!r})"


def create(folder: Path, consortium: str, name: str, person: Person) -> list[Path]:
    """Writes a new person's folder; returns its files.

    Raises:
        StudyError: there is a person in the folder already.
        OSError: it cannot be written.
    """
    listed = ", ".join(f'"{address}"' for address in person.addresses)
    files = {
        KEY: person.key,
        CERTIFICATE: person.certificate,
        AUTHORITY: person.authority,
        # last: a folder without it is nobody's
        SETTINGS: _TEXT.format(consortium=consortium, name=name, addresses=listed).encode(),
    }
    for path in (folder / file for file in files):
        if path.is_symlink() or path.exists():
            raise StudyError(f"{path} is there already, and no key is ever replaced: name another folder")
    for file, data in files.items():
        private_files.create(folder / file, data)
    return [folder / file for file in files]


def load(folder: Path) -> Person:
    """Returns the person of a folder.

    Raises:
        StudyError: something is missing, malformed, or open to others.
    """
    told = settings.read(folder / SETTINGS, _Person)
    for address in told.addresses:
        endpoint(address)
    return Person(
        told.addresses, read(folder / AUTHORITY), read(folder / CERTIFICATE), read(folder / KEY, private=True)
    )


def read(path: Path, *, private: bool = False) -> bytes:
    """Returns a file of a person's folder; a private one must be readable by its owner alone.

    Raises:
        StudyError: it cannot be read, or others can read it.
    """
    try:
        mode, data = private_files.read(path, _MOST)
    except OSError as error:
        raise StudyError(f"{path} cannot be read ({error.strerror}): name the folder with your certificate") from None
    if private and private_files.is_open(mode, 0o077):
        raise StudyError(f"{path} can be read by others, who could act in your name: chmod 600 it, and look")
    return data
