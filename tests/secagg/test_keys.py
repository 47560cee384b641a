"""Who is who in a run: signatures, pair keys, and every key set that a site must refuse."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.core.signature import framed, sign, verify
from cohortium.secagg.keys import announce, check, pair_key
from cohortium.secagg.masking import masker


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
VECTORS: dict[str, Any] = json.loads(reference.VECTORS.read_text(encoding="utf-8"))
RUN, STUDY, SITES = VECTORS["run"], VECTORS["study_id"], VECTORS["sites"]
PINNED = {name: bytes.fromhex(site["pinned"]) for name, site in SITES.items()}
NAMES = list(SITES)


def identity(name: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(SITES[name]["identity"]))


def private(name: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(SITES[name]["private"]))


def announcement(entry: dict[str, str]) -> Announcement:
    public, signature = bytes.fromhex(entry["public"]), bytes.fromhex(entry["signature"])
    return Announcement(entry["run"], entry["site"], public, signature)


GOOD = [announcement({"run": RUN, "site": name, **site}) for name, site in SITES.items()]
BAD_SETS = [name for name, value in VECTORS.items() if name.startswith("bad_") and isinstance(value[0], dict)]
# one of good standing who knows the low-order point or a malformed key can sign it: those are met at the exchange
FOUND_AT_THE_EXCHANGE = {"bad_low_order_point", "bad_short_key"}


# The primitives, and the reference's own

RFC7748 = [
    (
        "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
        "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
        "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
    ),
    (
        "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
        "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
        "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
    ),
    (
        "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
        "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    ),
]
RFC8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46b"
        "d25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c"
        "387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc659"
        "4a7c15e9716ed28dc027beceea1ec40a",
    ),
]


@pytest.mark.parametrize(("scalar", "point", "result"), RFC7748)
def test_rfc_7748(scalar: str, point: str, result: str) -> None:
    key = X25519PrivateKey.from_private_bytes(bytes.fromhex(scalar))
    assert key.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(point))).hex() == result
    assert reference.x25519(bytes.fromhex(scalar), bytes.fromhex(point)).hex() == result


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC8032)
def test_rfc_8032(secret: str, public: str, message: str, signature: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert key.public_key().public_bytes_raw().hex() == public
    assert key.sign(bytes.fromhex(message)).hex() == signature
    assert reference.ed25519_public(bytes.fromhex(secret)).hex() == public
    assert reference.ed25519_sign(bytes.fromhex(secret), bytes.fromhex(message)).hex() == signature


class TestSignatures:
    KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

    def test_of_framed_parts(self) -> None:
        assert framed() == b""
        assert framed(b"ab", b"") == b"\0\0\0\2ab\0\0\0\0"
        expected = reference.ed25519_sign(bytes(range(32)), b"\0\0\0\3why\0\0\0\1a\0\0\0\2bc")
        assert sign(self.KEY, "why", b"a", b"bc") == expected

    @pytest.mark.parametrize(
        ("purpose", "parts"),
        [
            ("why", (b"ab", b"c")),
            ("why", (b"abc",)),
            ("why", (b"a", b"bc", b"")),
            ("why", (b"bc", b"a")),
            ("whya", (b"", b"bc")),
            ("wh", (b"y", b"a", b"bc")),
            ("what", (b"a", b"bc")),
        ],
    )
    def test_serve_one_purpose_and_one_list_of_parts(self, purpose: str, parts: tuple[bytes, ...]) -> None:
        signature = sign(self.KEY, "why", b"a", b"bc")
        verify(self.KEY.public_key(), signature, "why", b"a", b"bc")
        with pytest.raises(InvalidSignature):
            verify(self.KEY.public_key(), signature, purpose, *parts)

    def test_are_one_persons(self) -> None:
        signature = sign(self.KEY, "why", b"a")
        with pytest.raises(InvalidSignature):
            verify(Ed25519PublicKey.from_public_bytes(PINNED["Cork"]), signature, "why", b"a")


# The project's own vectors


def test_the_vectors_are_what_the_reference_gives() -> None:
    assert reference.vectors() == VECTORS


@pytest.mark.parametrize("name", NAMES)
def test_announcements(name: str) -> None:
    site = SITES[name]
    made = announce(identity(name), private(name), RUN, STUDY, name)
    assert (made.run, made.site, made.public_key.hex()) == (RUN, name, site["public"])
    assert made.signature.hex() == site["signature"]
    assert identity(name).public_key().public_bytes_raw().hex() == site["pinned"]


@pytest.mark.parametrize("pair", VECTORS["pairs"], ids=lambda pair: "-".join(pair["sites"]))
def test_pair_keys_agree_at_both_ends(pair: dict[str, Any]) -> None:
    one, other = (next(entry for entry in GOOD if entry.site == name) for name in pair["sites"])
    assert pair_key(private(one.site), one, other).hex() == pair["key"]
    assert pair_key(private(other.site), other, one).hex() == pair["key"]


def test_pair_keys_depend_on_run_names_and_keys() -> None:
    one, other = GOOD[:2]
    usual = pair_key(private(one.site), one, other)
    changed = [
        pair_key(private(one.site), replace_run(one, "other"), replace_run(other, "other")),
        pair_key(private(one.site), one, Announcement(RUN, "bergan", other.public_key, b"")),
        pair_key(private(one.site), Announcement(RUN, "aaachen", one.public_key, b""), other),
        pair_key(private(one.site), one, Announcement(RUN, other.site, GOOD[2].public_key, b"")),
        pair_key(private(one.site), Announcement(RUN, one.site, GOOD[2].public_key, b""), other),
    ]
    assert len({usual, *changed}) == 6


def replace_run(entry: Announcement, run: str) -> Announcement:
    return Announcement(run, entry.site, entry.public_key, entry.signature)


class TestCheck:
    @pytest.mark.parametrize("order", list(itertools.permutations(range(4)))[::5])
    def test_accepts_the_sites_of_the_study_in_any_order(self, order: tuple[int, ...]) -> None:
        check([GOOD[index] for index in order], PINNED, RUN, STUDY)

    @pytest.mark.parametrize("case", BAD_SETS)
    def test_bad_sets_are_refused(self, case: str) -> None:
        announcements = [announcement(entry) for entry in VECTORS[case]]
        with pytest.raises(ProtocolError):
            check(announcements, PINNED, RUN, STUDY)
            masker(private(NAMES[0]), GOOD[0], announcements, 32)
        if case not in FOUND_AT_THE_EXCHANGE:
            with pytest.raises(ProtocolError):
                check(announcements, PINNED, RUN, STUDY)

    @pytest.mark.parametrize("case", sorted(FOUND_AT_THE_EXCHANGE))
    def test_a_worthless_key_is_refused_although_it_is_signed(self, case: str) -> None:
        *_, worthless = (announcement(entry) for entry in VECTORS[case])
        check([*GOOD[:-1], worthless], PINNED, RUN, STUDY)
        with pytest.raises(ProtocolError, match=f"'{worthless.site}' is not a valid X25519 key"):
            pair_key(private(NAMES[0]), GOOD[0], worthless)

    def test_every_kind_of_bad_set_is_there(self) -> None:
        wanted = "signature swapped_key missing_site extra_site repeated_key low_order_point wrong_run wrong_study"
        assert {f"bad_{word}" for word in f"{wanted} two_sites".split()} <= set(BAD_SETS)

    @pytest.mark.parametrize(("run", "study"), [("run", STUDY), (RUN, STUDY + "0"), (STUDY, RUN), (RUN + STUDY, "")])
    def test_signatures_hold_for_one_run_and_one_study(self, run: str, study: str) -> None:
        with pytest.raises(ProtocolError, match="is not signed by its pinned identity"):
            check(GOOD, PINNED, run, study)

    @pytest.mark.parametrize("index", range(4))
    def test_one_wrong_bit_anywhere(self, index: int) -> None:
        entry = GOOD[index]
        for field, size in (("public_key", 32), ("signature", 64)):
            for place in range(0, size, 7):
                changed = bytearray(getattr(entry, field))
                changed[place] ^= 16
                wrong = Announcement(**{**as_dict(entry), field: bytes(changed)})
                with pytest.raises(ProtocolError, match=f"'{entry.site}'"):
                    check([*GOOD[:index], wrong, *GOOD[index + 1 :]], PINNED, RUN, STUDY)

    def test_swapped_names(self) -> None:
        one, other = GOOD[:2]
        swapped = [Announcement(RUN, other.site, one.public_key, one.signature)]
        swapped.append(Announcement(RUN, one.site, other.public_key, other.signature))
        with pytest.raises(ProtocolError, match="not signed"):
            check([*swapped, *GOOD[2:]], PINNED, RUN, STUDY)

    def test_another_pinned_identity(self) -> None:
        with pytest.raises(ProtocolError, match="'Cork' is not signed by its pinned identity"):
            check(GOOD, PINNED | {"Cork": PINNED["aachen"]}, RUN, STUDY)

    @pytest.mark.parametrize("length", [0, 63, 65])
    def test_a_signature_of_another_length(self, length: int) -> None:
        wrong = Announcement(RUN, GOOD[0].site, GOOD[0].public_key, bytes(length))
        with pytest.raises(ProtocolError, match="not signed"):
            check([wrong, *GOOD[1:]], PINNED, RUN, STUDY)

    def test_nobody(self) -> None:
        with pytest.raises(ProtocolError):
            check([], PINNED, RUN, STUDY)


def as_dict(entry: Announcement) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("run", "site", "public_key", "signature")}


class TestMasker:
    def test_own_announcement_must_be_among_them(self) -> None:
        with pytest.raises(ProtocolError, match="lacks the key that this site announced"):
            masker(private("aachen"), GOOD[0], GOOD[1:], 32)
        other = announce(identity("aachen"), private("bergen"), RUN, STUDY, "aachen")
        with pytest.raises(ProtocolError, match="lacks the key that this site announced"):
            masker(private("aachen"), GOOD[0], [other, *GOOD[1:]], 32)

    @pytest.mark.parametrize("sites", [1, 2])
    def test_fewer_than_three_sites(self, sites: int) -> None:
        pinned = dict(list(PINNED.items())[:sites])
        check(GOOD[:sites], pinned, RUN, STUDY)
        with pytest.raises(ProtocolError, match=f"over {sites} sites was refused: it takes 3"):
            masker(private("aachen"), GOOD[0], GOOD[:sites], 32)

    def test_neither_masker_nor_its_successor_shows_a_key(self) -> None:
        made = masker(private("aachen"), GOOD[0], GOOD, 32)
        _, later = made.mask(1, b"", np.zeros(1, dtype=np.uint32))
        assert len(set(made.keys)) == 3
        for key in made.keys:
            for secret in (key, reference.round_seed(key, 1)):
                for text in (repr(made), str(later), repr({"masker": later})):
                    assert repr(secret)[2:14] not in text
                    assert secret.hex()[:12] not in text
