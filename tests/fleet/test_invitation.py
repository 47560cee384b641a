"""An invitation's token: what goes in comes out, and what is mangled is refused in one sentence without its secret."""

import base64
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from cohortium.coordinator.authority import establish
from cohortium.core import codec
from cohortium.core.errors import CohortiumError, PolicyRefused
from cohortium.core.identity import fingerprint, same_fingerprint
from cohortium.core.invitation import (
    MAX_TOKEN_CHARACTERS,
    PREFIX,
    Invitation,
    InvitationError,
    digest,
    endpoint,
    issue,
    parse,
    require_current,
)

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
CERTIFICATE = establish("heart", ec.generate_private_key(ec.SECP256R1()), NOW, 1).certificate.public_bytes(Encoding.DER)
SECRET = bytes(range(32))
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,62}", fullmatch=True)
HOSTS = st.sampled_from(["fleet.example.org", "10.0.0.7", "[2001:db8::1]", "localhost", "a-b.c", "x" * 63 + ".org"])
ADDRESSES = st.lists(st.builds("{}:{}".format, HOSTS, st.integers(1, 65535)), min_size=1, max_size=16).map(tuple)


def invitation(**changes: object) -> Invitation:
    parts: dict[str, object] = {
        "site": "north",
        "secret": SECRET,
        "expires": int(NOW.timestamp()) + 60,
        "enrolment": ("fleet.example.org:7443",),
        "fleet": ("fleet.example.org:7444", "10.0.0.7:7444"),
        "authority": CERTIFICATE,
        "coordinator": b"c" * 32,
        "consortium": "heart",
    }
    return Invitation(**(parts | changes))  # type: ignore[arg-type]


def token_of(**changes: object) -> str:
    """Returns a token as somebody else might make one."""
    return PREFIX + base64.urlsafe_b64encode(codec.encode(invitation(**changes))).decode().rstrip("=")


TOKEN = token_of()


@given(NAMES, st.binary(min_size=32, max_size=32), st.integers(0, (1 << 40) - 1), ADDRESSES, ADDRESSES, NAMES)
def test_what_goes_in_comes_out(
    site: str, secret: bytes, expires: int, enrolment: tuple[str, ...], fleet: tuple[str, ...], consortium: str
) -> None:
    made = invitation(
        site=site, secret=secret, expires=expires, enrolment=enrolment, fleet=fleet, consortium=consortium
    )
    token = issue(made)
    assert "\n" not in token
    assert token.isascii()
    assert parse(token) == parse(f"  {token}\r\n") == made


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@given(st.data())
def test_a_mangled_token_is_refused_or_says_something_else(data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(TOKEN) - 1))
    character = data.draw(st.characters(exclude_characters=TOKEN[place]))
    mangled = TOKEN[:place] + character + TOKEN[place + 1 :]
    try:
        assert parse(mangled) != invitation() or mangled.strip() == TOKEN
    except InvitationError as error:
        assert TOKEN[40:60] not in str(error)


@given(st.integers(0, len(TOKEN) - 1))
def test_a_cut_token_is_refused(length: int) -> None:
    with pytest.raises(InvitationError, match="ask for a new one"):
        parse(TOKEN[:length])


@given(st.one_of(st.text(max_size=100), st.binary(max_size=200).map(lambda data: base64.b64encode(data).decode())))
def test_any_text_is_refused(text: str) -> None:
    for prefix in ("", PREFIX):
        with pytest.raises(InvitationError):
            parse(prefix + text)


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        ("", "begins with"),
        (TOKEN + "=", "damaged"),
        (TOKEN + "A", "damaged"),
        (TOKEN[:40] + "\n" + TOKEN[40:], "damaged"),
        (TOKEN[:40] + "!" + TOKEN[40:], "damaged"),
        (TOKEN.replace(".v1", ".v2").replace("-v1.", "-v2."), "begins with"),
        (PREFIX + "A" * MAX_TOKEN_CHARACTERS, "longer"),
        (token_of(site="no/th"), "not a valid name"),
        (token_of(site=""), "not a valid name"),
        (token_of(consortium="a\x1b[31m"), "not a valid name"),
        (token_of(secret=b"short"), "damaged"),
        (token_of(coordinator=b"short"), "damaged"),
        (token_of(enrolment=()), "damaged"),
        (token_of(fleet=("a:1",) * 17), "damaged"),
        (token_of(enrolment=("file:///etc/passwd",)), "host:port"),
        (token_of(authority=b"none"), "damaged"),
        (token_of(authority=bytes(3000)), "damaged"),
        (token_of(expires=-1), "damaged"),
    ],
)
def test_the_reason_is_said(token: str, reason: str) -> None:
    with pytest.raises(InvitationError, match=reason) as raised:
        parse(token)
    assert raised.value.exit_code == 2


def test_one_that_nobody_could_use_is_not_issued() -> None:
    with pytest.raises(CohortiumError):
        issue(invitation(fleet=("nowhere",)))


def test_an_expired_one_is_refused() -> None:
    require_current(invitation(), NOW)
    with pytest.raises(PolicyRefused, match="has expired: ask for a new one"):
        require_current(invitation(expires=int(NOW.timestamp())), NOW)


@pytest.mark.parametrize(
    "address",
    [
        *[
            "",
            ":",
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:b",
            "a:-1",
            "a: 1",
            "a:1\n",
            "a b:1",
            "2001:db8::1:1",
            "[a]:1",
        ],
        *["[127.0.0.1]:1", "-a:1", "a-:1", "a..b:1", "a/b:1", "unix:/x", "u@h:1", "x" * 64 + ":1", "a:123456", "a:١"],
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvitationError, match="host:port"):
        endpoint(address)


def test_addresses() -> None:
    assert endpoint("[::1]:7443") == ("::1", 7443)
    assert endpoint("127.0.0.1:1") == ("127.0.0.1", 1)
    assert endpoint("fleet.example.org:65535") == ("fleet.example.org", 65535)


def test_the_secret_is_not_shown() -> None:
    assert "secret" not in repr(invitation())
    assert digest(SECRET) != SECRET


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_fingerprints(one: bytes, other: bytes) -> None:
    told = fingerprint(one)
    assert same_fingerprint(told, one)
    assert same_fingerprint(told.lower().replace("-", " "), one)
    assert same_fingerprint(told, other) == (one == other)
    assert not same_fingerprint(told[:-1], one)
    assert not same_fingerprint("", one)
