"""Who is who in a run: signatures, keys of pairs, rounds and purposes, and every key set that a site must refuse."""

import importlib.util
import json
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.core.signature import framed, sign, verify
from cohortium.secagg.keys import (
    Pairs,
    agree,
    announce,
    check,
    pair_key,
    purpose_key,
    round_context,
    session_digest,
)


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
BAD_SETS = list(VECTORS["key_sets"])
REASONS = {
    "bad_too_few": "it holds 2 sites, and the study needs 3",
    "bad_extra_site": "it must list sites of the study, once each and in order",
    "bad_listed_twice": "it must list sites of the study, once each and in order",
    "bad_out_of_order": "it must list sites of the study, once each and in order",
    "bad_repeated_key": "two sites show the same key",
    "bad_missing_me": "it lacks the key that this site announced",
    "bad_low_order_point": "the key of site 'essen' is not a valid X25519 key",
    "bad_short_key": "the key of site 'essen' is not a valid X25519 key",
}
"""Any other set is refused for the signature of 'essen'."""
# a site can sign a worthless key, and a set may lack a site: those are met when keys are agreed
FOUND_WHEN_AGREEING = ["bad_missing_me"]


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


# RFC 5869, appendix A.1 to A.3: input, salt, info, output
RFC5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


@pytest.mark.parametrize(("secret", "salt", "info", "output"), RFC5869, ids=["A.1", "A.2", "A.3"])
def test_rfc_5869(secret: str, salt: str, info: str, output: str) -> None:
    length, expected = len(output) // 2, bytes.fromhex(output)
    extracted = reference.hkdf_extract(bytes.fromhex(salt), bytes.fromhex(secret))
    assert reference.hkdf_expand(extracted, bytes.fromhex(info), length) == expected
    assert HKDFExpand(hashes.SHA256(), length, bytes.fromhex(info)).derive(extracted) == expected
    whole = HKDF(hashes.SHA256(), length, salt=bytes.fromhex(salt) or None, info=bytes.fromhex(info))
    assert whole.derive(bytes.fromhex(secret)) == expected


class TestBlake2b:
    def test_rfc_7693_appendix_a(self) -> None:
        expected = (
            "ba80a53f981c4d0d6a2797b69f12f6e94c212f14685ac4b74b12bb6fdbffa2d1"
            "7d87c5392aab792dc252d5de4533cc9518d38aa8dbf1925ab92386edd4009923"
        )
        assert reference.blake2b(b"abc", 64).hex() == blake2b(b"abc").hexdigest() == expected

    def test_rfc_7693_appendix_e(self) -> None:
        """The RFC's self test: a hash over hashes of many lengths, with and without a key."""

        def sequence(length: int, seed: int) -> bytes:
            a, b, made = 0xDEAD4BAD * seed % 2**32, 1, bytearray()
            for _ in range(length):
                a, b = b, (a + b) % 2**32
                made.append(b >> 24)
            return bytes(made)

        ours, librarys = b"", b""
        for size in (20, 32, 48, 64):
            for length in (0, 3, 128, 129, 255, 1024):
                data, key = sequence(length, length), sequence(size, size)
                ours += reference.blake2b(data, size) + reference.blake2b(data, size, key)
                librarys += blake2b(data, digest_size=size).digest()
                librarys += blake2b(data, digest_size=size, key=key).digest()
        expected = "c23a7800d98123bd10f506c61e29da5603d763b8bbad2e737f5e765a7bccd475"
        assert reference.blake2b(ours, 32).hex() == blake2b(librarys, digest_size=32).hexdigest() == expected

    def test_official_keyed_answer(self) -> None:
        # the first entry of blake2b-kat.txt: nothing, hashed under the key 00 01 ... 3f
        expected = (
            "10ebb67700b1868efb4417987acf4690ae9d972fb7a590c2f02871799aaa4786"
            "b5e996e8f0f4eb981fc214b005f42d2ff4233499391653df7aefcbc13fc51568"
        )
        key = bytes(range(64))
        assert reference.blake2b(b"", 64, key).hex() == blake2b(b"", key=key).hexdigest() == expected

    @settings(max_examples=50, deadline=None)
    @given(
        st.binary(min_size=32, max_size=32),
        st.binary(max_size=16),
        st.binary(max_size=150),
        st.lists(st.binary(max_size=80), max_size=3),
    )
    def test_purpose_keys(self, seed: bytes, purpose: bytes, context: bytes, parts: list[bytes]) -> None:
        expected = reference.blake2b(context + b"".join(parts), 32, seed, purpose)
        assert purpose_key(seed, purpose, context, *parts) == expected


# The project's own vectors


def test_the_vectors_are_what_the_reference_gives() -> None:
    assert json.loads(json.dumps(reference.vectors())) == VECTORS


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


def pairs_of(name: str) -> Pairs:
    return agree(private(name), next(entry for entry in GOOD if entry.site == name), GOOD)


class TestRoundSeeds:
    @pytest.mark.parametrize("pair", VECTORS["pairs"], ids=lambda pair: "-".join(pair["sites"]))
    def test_are_the_references_at_both_ends(self, pair: dict[str, Any]) -> None:
        for own, peer in (pair["sites"], pair["sites"][::-1]):
            pairs = pairs_of(own)
            assert pairs.keys[pairs.peers.index(peer)].hex() == pair["key"]
            for number, seed in pair["seeds"].items():
                assert pairs.at(int(number)).round_seeds(int(number))[peer].hex() == seed

    @pytest.mark.parametrize("number", [1, 15, 16, 31, 32, 1_000_000_000])
    def test_of_any_round(self, number: int) -> None:
        pairs = pairs_of("essen")
        seeds = pairs.at(number).round_seeds(number)
        assert list(seeds) == sorted(set(NAMES) - {"essen"})
        for peer, key in zip(pairs.peers, pairs.keys, strict=True):
            assert seeds[peer] == reference.round_seed(key, number)

    def test_all_differ_and_do_not_depend_on_the_order_of_rounds(self) -> None:
        seen, pairs = {}, pairs_of("bergen")
        for number in range(1, 50):
            pairs = pairs.at(number)
            seen[number] = pairs.round_seeds(number)
        assert len({seed for seeds in seen.values() for seed in seeds.values()}) == 49 * 4
        for number in range(49, 0, -1):
            pairs = pairs.at(number)
            assert pairs.round_seeds(number) == seen[number]

    def test_their_own_announcement_must_be_among_them(self) -> None:
        with pytest.raises(ProtocolError, match="lacks the key that this site announced"):
            agree(private("aachen"), GOOD[1], [GOOD[0], *GOOD[2:]])
        other = announce(identity("aachen"), private("bergen"), RUN, STUDY, "aachen")
        with pytest.raises(ProtocolError, match="lacks the key that this site announced"):
            agree(private("aachen"), GOOD[1], [GOOD[0], other, *GOOD[2:]])

    def test_no_key_is_shown(self) -> None:
        pairs = pairs_of("aachen").at(1)
        secrets = [*pairs.keys, *pairs.round_seeds(1).values()]
        assert len(set(secrets)) == 8
        for text in (repr(pairs), str(pairs), f"{pairs}", repr({"pairs": pairs})):
            for secret in secrets:
                assert repr(secret)[2:14] not in text
                assert secret.hex()[:12] not in text


class TestDigests:
    @pytest.mark.parametrize("threshold", [3, 4, 5])
    def test_sessions_of_the_vectors(self, threshold: int) -> None:
        assert session_digest(RUN, STUDY, threshold, GOOD).hex() == VECTORS["sessions"][str(threshold)]

    @pytest.mark.parametrize("entry", VECTORS["rounds"], ids=lambda entry: f"round-{entry['round']}")
    def test_contexts_of_the_vectors(self, entry: dict[str, Any]) -> None:
        session = bytes.fromhex(VECTORS["sessions"][str(entry["threshold"])])
        found = round_context(session, entry["round"], entry["broadcast"].encode())
        assert found.hex() == entry["context"]

    def test_a_session_depends_on_all_that_the_sites_must_agree_on(self) -> None:
        moved = [Announcement(RUN, GOOD[0].site + GOOD[1].site[:1], GOOD[0].public_key, b""), *GOOD[1:]]
        other_key = [Announcement(RUN, GOOD[0].site, GOOD[1].public_key, b""), *GOOD[1:]]
        swapped = [
            Announcement(RUN, one.site, other.public_key, b"") for one, other in zip(GOOD, GOOD[::-1], strict=True)
        ]
        sessions = [
            session_digest(RUN, STUDY, 3, GOOD),
            session_digest(RUN + "0", STUDY, 3, GOOD),
            session_digest(RUN, STUDY + "0", 3, GOOD),
            session_digest(RUN + STUDY, "", 3, GOOD),
            session_digest(RUN, STUDY, 4, GOOD),
            session_digest(RUN, STUDY, 3, GOOD[1:]),
            session_digest(RUN, STUDY, 3, GOOD[:-1]),
            *(session_digest(RUN, STUDY, 3, entries) for entries in (moved, other_key, swapped)),
        ]
        assert len(set(sessions)) == len(sessions)

    def test_a_context_depends_on_session_round_and_broadcast(self) -> None:
        one, other = bytes(32), bytes(31) + b"\1"
        contexts = [
            round_context(one, 1, b""),
            round_context(other, 1, b""),
            round_context(one, 2, b""),
            round_context(one, 1, b"\0"),
            round_context(one, 256, b""),
        ]
        assert len(set(contexts)) == 5

    def test_purposes_do_not_share_keys(self) -> None:
        """The purposes that one seed serves, and that a sender's name cannot turn one into another."""
        seed, context = bytes(32), bytes(range(32))
        made = [purpose_key(seed, word, context) for word in (b"cohort mask", b"cohort share", b"cohort endorse")]
        made += [purpose_key(seed, b"cohort share", context, name) for name in (b"a", b"b")]
        assert len(set(made)) == 5


class TestCheck:
    @pytest.mark.parametrize("left_out", [[], [0], [4], [1, 3]], ids=str)
    def test_accepts_enough_sites_of_the_study(self, left_out: list[int]) -> None:
        kept = [entry for index, entry in enumerate(GOOD) if index not in left_out]
        check(kept, PINNED, RUN, STUDY, len(kept))
        with pytest.raises(ProtocolError, match=f"it holds {len(kept)} sites, and the study needs {len(kept) + 1}"):
            check(kept, PINNED, RUN, STUDY, len(kept) + 1)

    @pytest.mark.parametrize("case", BAD_SETS)
    def test_bad_sets_are_refused(self, case: str) -> None:
        announcements = [announcement(entry) for entry in VECTORS["key_sets"][case]]
        me = NAMES[0]
        reason = REASONS.get(case, "the key of site 'essen' is not signed by its pinned identity")
        with pytest.raises(ProtocolError, match=reason):
            check(announcements, PINNED, RUN, STUDY, 3)
            agree(private(me), GOOD[0], announcements)
        if case in FOUND_WHEN_AGREEING:
            check(announcements, PINNED, RUN, STUDY, 3)
        else:
            with pytest.raises(ProtocolError, match=reason):
                check(announcements, PINNED, RUN, STUDY, 3)

    def test_every_kind_of_bad_set_is_there(self) -> None:
        wanted = {"bad_signature", "bad_swapped_key", "bad_extra_site", "bad_wrong_run", "bad_wrong_study"}
        assert wanted <= set(BAD_SETS)
        assert {*REASONS, *FOUND_WHEN_AGREEING} <= set(BAD_SETS)

    @pytest.mark.parametrize(
        ("run", "study"),
        [("run", STUDY), (RUN, STUDY + "0"), (STUDY, RUN), (RUN + STUDY, "")],
        ids=["run", "study", "exchanged", "joined"],
    )
    def test_signatures_hold_for_one_run_and_one_study(self, run: str, study: str) -> None:
        with pytest.raises(ProtocolError, match="is not signed by its pinned identity"):
            check(GOOD, PINNED, run, study, 3)

    @pytest.mark.parametrize("index", range(5))
    def test_one_wrong_bit_anywhere(self, index: int) -> None:
        entry = GOOD[index]
        for field, size in (("public_key", 32), ("signature", 64)):
            for place in range(0, size, 7):
                changed = bytearray(getattr(entry, field))
                changed[place] ^= 16
                wrong = Announcement(**{**as_dict(entry), field: bytes(changed)})
                with pytest.raises(ProtocolError, match=f"'{entry.site}'"):
                    check([*GOOD[:index], wrong, *GOOD[index + 1 :]], PINNED, RUN, STUDY, 3)

    def test_swapped_names(self) -> None:
        one, other = GOOD[:2]
        swapped = [Announcement(RUN, one.site, other.public_key, other.signature)]
        swapped.append(Announcement(RUN, other.site, one.public_key, one.signature))
        with pytest.raises(ProtocolError, match="not signed"):
            check([*swapped, *GOOD[2:]], PINNED, RUN, STUDY, 3)

    def test_another_pinned_identity(self) -> None:
        with pytest.raises(ProtocolError, match="'Cork' is not signed by its pinned identity"):
            check(GOOD, PINNED | {"Cork": PINNED["aachen"]}, RUN, STUDY, 3)

    @pytest.mark.parametrize("length", [0, 63, 65])
    def test_a_signature_of_another_length(self, length: int) -> None:
        wrong = Announcement(RUN, GOOD[0].site, GOOD[0].public_key, bytes(length))
        with pytest.raises(ProtocolError, match="not signed"):
            check([wrong, *GOOD[1:]], PINNED, RUN, STUDY, 3)

    def test_nobody(self) -> None:
        with pytest.raises(ProtocolError, match="it holds 0 sites"):
            check([], PINNED, RUN, STUDY, 3)


def as_dict(entry: Announcement) -> dict[str, Any]:
    return {name: getattr(entry, name) for name in ("run", "site", "public_key", "signature")}
