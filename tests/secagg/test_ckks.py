"""CKKS under a single key: whole numbers come back exact, and nothing malformed is added or opened."""

from functools import cache

import numpy as np
import pytest

pytest.importorskip("tenseal", reason="the extra 'ckks' is not installed")

from cohortium.core import codec
from cohortium.core.errors import PolicyRefused, ProtocolError
from cohortium.core.random import Randomness
from cohortium.secagg.ckks import SingleKey, make_keys, payload_bytes
from cohortium.secagg.group import Group

GROUP = Group(("a", "b", "c", "d", "e"), 3)
RANDOMNESS = Randomness.of_seed(1)
SLOTS = 4096
"""Numbers in one encryption."""


@cache
def keys() -> tuple[bytes, bytes]:
    return make_keys()


def at_site(length: int, bits: int = 32) -> SingleKey:
    return SingleKey(GROUP, length, bits, keys()[0])


def at_coordinator(length: int, bits: int = 32) -> SingleKey:
    return SingleKey(GROUP, length, bits, keys()[1])


def encrypted(scheme: SingleKey, vector: np.ndarray) -> np.ndarray:
    payload, secret = scheme.protect("a", {}, bytes(32), vector, RANDOMNESS)
    assert secret.shape == scheme.secret_shape == (0, 0)
    return payload


def decrypted(length: int, payload: np.ndarray, bits: int = 32) -> np.ndarray:
    return at_site(length, bits).answer("a", GROUP.sites, {}, payload)


def vectors_of(length: int) -> list[np.ndarray]:
    """Returns five vectors: one of numbers up to 2^30 in size, four that leave every sum below 2^31."""
    rng = np.random.default_rng(length)
    first = rng.integers(-(2**30), 2**30 + 1, length, dtype="<i4")
    first[:2] = (2**30, -(2**30))[:length]
    return [first, *rng.integers(1 - 2**28, 2**28, (4, length), dtype="<i4")]


class TestSum:
    @pytest.mark.parametrize("length", [1, 4096, 4097, 10_000])
    def test_of_five_sites_is_exact(self, length: int) -> None:
        plain = vectors_of(length)
        coordinator, total = at_coordinator(length), None
        for vector in plain:
            payload = encrypted(at_site(length), vector.view("<u4"))
            assert payload.dtype == np.uint8
            assert payload.nbytes <= coordinator.payload_bytes
            total = coordinator.add(total, payload)
        assert total is not None
        found = decrypted(length, total)
        assert found.dtype == np.uint32
        assert found.view("<i4").tolist() == np.sum(plain, axis=0, dtype=np.int64).tolist()
        assert coordinator.open(bytes(32), total, GROUP.sites, dict.fromkeys("abc", found)) is found

    def test_the_largest_sum(self) -> None:
        """Five times the largest number whose sum fits, in every slot."""
        length, most = SLOTS + 1, (2**31 - 1) // 5
        for sign in (1, -1):
            vector = np.full(length, sign * most, "<i4").view("<u4")
            total = None
            for _ in range(5):
                total = at_coordinator(length).add(total, encrypted(at_site(length), vector))
            assert total is not None
            assert (decrypted(length, total).view("<i4") == sign * 5 * most).all()

    @pytest.mark.parametrize("bits", [12, 16, 25])
    def test_other_widths(self, bits: int) -> None:
        kind, most = ("<i2", 2 ** (bits - 1) // 5) if bits <= 16 else ("<i4", 2 ** (bits - 1) // 5)
        plain = [np.random.default_rng(seed).integers(-most, most, 9).astype(kind) for seed in range(5)]
        total = None
        for vector in plain:
            payload = encrypted(at_site(9, bits), vector.view(kind.replace("i", "u")))
            total = at_coordinator(9, bits).add(total, payload)
        assert total is not None
        found = decrypted(9, total, bits)
        assert found.view(kind).tolist() == np.sum(plain, axis=0).tolist()

    def test_one_vector_gives_a_new_encryption_each_time(self) -> None:
        vector = np.arange(3, dtype="<u4")
        one, other = encrypted(at_site(3), vector), encrypted(at_coordinator(3), vector)
        assert one.tobytes() != other.tobytes()
        assert decrypted(3, one).tolist() == decrypted(3, other).tolist() == [0, 1, 2]


class TestKeys:
    def test_the_public_key_decrypts_nothing(self) -> None:
        payload = encrypted(at_site(3), np.arange(3, dtype="<u4"))
        with pytest.raises((ValueError, RuntimeError, ProtocolError)):
            at_coordinator(3).answer("a", GROUP.sites, {}, payload)

    def test_the_public_key_holds_no_secret_one(self) -> None:
        secret, public = keys()
        import tenseal

        assert tenseal.context_from(secret).is_private()
        assert not tenseal.context_from(public).is_private()
        with pytest.raises(ValueError, match="the current context is public"):
            tenseal.context_from(public).secret_key()

    def test_another_consortiums_key_gives_no_sum(self) -> None:
        payload = encrypted(at_site(3), np.arange(3, dtype="<u4"))
        foreign = SingleKey(GROUP, 3, 32, make_keys()[0])
        with pytest.raises(ProtocolError, match="out of range"):
            foreign.answer("a", GROUP.sites, {}, payload)

    def test_a_site_without_a_key(self) -> None:
        bare = SingleKey(GROUP, 3, 32, b"")
        with pytest.raises(PolicyRefused, match="no CKKS key is installed here"):
            encrypted(bare, np.arange(3, dtype="<u4"))
        with pytest.raises(PolicyRefused, match="no CKKS key is installed here"):
            bare.answer("a", GROUP.sites, {}, encrypted(at_site(3), np.arange(3, dtype="<u4")))

    def test_no_key_is_shown(self) -> None:
        for key in keys():
            text = repr(SingleKey(GROUP, 3, 32, key))
            assert repr(key)[2:20] not in text
            assert len(text) < 300


class TestRefusals:
    @pytest.mark.parametrize(
        "vector",
        [np.zeros(2, "<u4"), np.zeros(4, "<u4"), np.zeros(3, "<i4"), np.zeros(3, "<u8"), np.zeros((3, 1), "<u4")],
        ids=["short", "long", "signed", "wide", "shape"],
    )
    def test_a_vector_that_does_not_fit(self, vector: np.ndarray) -> None:
        with pytest.raises(ProtocolError, match="does not fit the study"):
            encrypted(at_site(3), vector)

    @staticmethod
    def refuse(payload: np.ndarray, length: int = 3) -> None:
        good = encrypted(at_site(length), np.ones(length, "<u4"))
        for total in (None, good):
            with pytest.raises(ProtocolError):
                at_coordinator(length).add(total, payload)
        with pytest.raises(ProtocolError):
            decrypted(length, payload)

    @pytest.mark.parametrize("length", [0, 1, 2, 4, 4095, 4097])
    def test_another_length(self, length: int) -> None:
        self.refuse(encrypted(at_site(length), np.zeros(length, "<u4")))

    def test_another_length_in_the_last_part(self) -> None:
        self.refuse(encrypted(at_site(SLOTS + 2), np.zeros(SLOTS + 2, "<u4")), SLOTS + 1)

    @pytest.mark.parametrize("kept", [0, 1, 2, 10, 1000, -1, -1000])
    def test_truncated(self, kept: int) -> None:
        self.refuse(encrypted(at_site(3), np.zeros(3, "<u4"))[:kept])

    @pytest.mark.parametrize("kept", [0, 1, 2, 10, 1000, -1, -1000])
    def test_a_truncated_encryption(self, kept: int) -> None:
        (part,) = codec.decode(encrypted(at_site(3), np.zeros(3, "<u4")).tobytes(), list[bytes], 10**6)
        self.refuse(np.frombuffer(codec.encode([part[:kept]]), np.uint8))

    @pytest.mark.parametrize(
        "parts",
        [[], [b""], [b"\0"], [b"\xff" * 5000], [b"\0" * 400_001]],
        ids=["none", "empty", "zero", "ones", "huge"],
    )
    def test_what_is_no_encryption(self, parts: list[bytes]) -> None:
        self.refuse(np.frombuffer(codec.encode(parts), np.uint8))

    def test_a_part_twice(self) -> None:
        (part,) = codec.decode(encrypted(at_site(3), np.zeros(3, "<u4")).tobytes(), list[bytes], 10**6)
        self.refuse(np.frombuffer(codec.encode([part, part]), np.uint8))

    @pytest.mark.parametrize("kind", ["<u2", "<u4", "<i1", "<f8"])
    def test_another_type(self, kind: str) -> None:
        self.refuse(np.zeros(1000, kind))

    def test_another_shape(self) -> None:
        self.refuse(encrypted(at_site(3), np.zeros(3, "<u4")).reshape(-1, 1))
        self.refuse(np.array(7, np.uint8))

    def test_more_bytes_than_the_vector_takes(self) -> None:
        self.refuse(np.zeros(payload_bytes(3) + 1000, np.uint8))

    def test_a_sum_that_is_out_of_range(self) -> None:
        half = np.full(3, 2**30, "<i4").view("<u4")
        total = None
        for _ in range(2):
            total = at_coordinator(3).add(total, encrypted(at_site(3), half))
        assert total is not None
        with pytest.raises(ProtocolError, match="out of range"):
            decrypted(3, total)

    def test_sites_that_disagree(self) -> None:
        scheme, total = at_coordinator(3), np.empty(0, np.uint8)
        right, false = np.array([1, 2, 3], "<u4"), np.array([1, 2, 4], "<u4")
        assert scheme.open(bytes(32), total, GROUP.sites, {"a": right, "b": right, "c": right.copy()}) is right
        with pytest.raises(ProtocolError, match="at least one gave a false one"):
            scheme.open(bytes(32), total, GROUP.sites, {"a": right, "b": right, "c": false})

    @pytest.mark.parametrize(
        "answer", [np.zeros(4, "<u4"), np.zeros(3, "<f8"), np.zeros((3, 1), "<u4")], ids=["long", "float", "shape"]
    )
    def test_a_decrypted_sum_of_another_shape_or_type(self, answer: np.ndarray) -> None:
        with pytest.raises(ProtocolError, match="it has the wrong shape or type"):
            at_coordinator(3).check_answer("b", answer, GROUP.sites)
