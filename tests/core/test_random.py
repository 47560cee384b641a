"""The tree of keys: derived as RFC 5869 says, unambiguous, silent about its keys, the same in every process."""

import hmac
import os
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from hypothesis import given, settings
from hypothesis import strategies as st

from cohortium.core.random import Randomness

# RFC 5869, appendix A: input, salt, info, pseudorandom key, output
RFC5869 = [
    (
        "0b" * 22,
        "000102030405060708090a0b0c",
        "f0f1f2f3f4f5f6f7f8f9",
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
    ),
    (
        bytes(range(0x50)).hex(),
        bytes(range(0x60, 0xB0)).hex(),
        bytes(range(0xB0, 0x100)).hex(),
        "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
        "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
    ),
    (
        "0b" * 22,
        "",
        "",
        "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
    ),
]


def extract(secret: bytes) -> bytes:
    return hmac.digest(bytes(32), secret, "sha256")


def expand(key: bytes, info: bytes, length: int) -> bytes:
    output, block = b"", b""
    for index in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([index]), "sha256")
        output += block
    return output[:length]


@pytest.mark.parametrize(("secret", "salt", "info", "key", "output"), RFC5869)
def test_the_primitive_keeps_rfc_5869(secret: str, salt: str, info: str, key: str, output: str) -> None:
    length, context = len(output) // 2, bytes.fromhex(info)
    whole = HKDF(hashes.SHA256(), length, salt=bytes.fromhex(salt) or None, info=context)
    assert whole.derive(bytes.fromhex(secret)).hex() == output
    assert HKDFExpand(hashes.SHA256(), length, context).derive(bytes.fromhex(key)).hex() == output
    assert expand(bytes.fromhex(key), context, length).hex() == output


class TestDerivation:
    @pytest.mark.parametrize("seed", [0, 1, 255, 256, 2**64, 2**300 + 7])
    def test_of_a_seed(self, seed: int) -> None:
        secret = bytes.fromhex(f"{seed:x}".rjust(len(f"{seed:x}") + len(f"{seed:x}") % 2, "0")) if seed else b""
        assert Randomness.of_seed(seed).key == expand(extract(secret), b"cohortium seed v1", 32)

    def test_of_a_child(self) -> None:
        root = Randomness(bytes(range(32)))
        path = b"\0\0\0\5child" + b"\0\0\0\5ssite" + b"\0\0\0\3i12"
        assert root.child("site", 12).key == expand(root.key, path, 32)

    def test_of_bytes(self) -> None:
        root = Randomness(bytes(range(32)))
        assert root.bytes(8160) == expand(root.key, b"bytes", 8160)
        assert root.bytes(5) == root.bytes(64)[:5]
        with pytest.raises(ValueError, match="8160"):
            root.bytes(8161)

    def test_of_a_generator(self) -> None:
        root = Randomness(bytes(range(32)))
        seed = int(expand(root.key, b"bytes", 32).hex(), 16)
        reference = np.random.Generator(np.random.PCG64DXSM(seed))
        assert root.generator().random(5).tolist() == reference.random(5).tolist()
        assert root.generator().random() == root.generator().random()


class TestPaths:
    LABELS = st.lists(st.one_of(st.text(max_size=4), st.integers(-(2**40), 2**40)), max_size=4).map(tuple)

    @settings(max_examples=300, deadline=None)
    @given(LABELS, LABELS)
    def test_keys_are_equal_exactly_if_paths_are(
        self, one: tuple[str | int, ...], other: tuple[str | int, ...]
    ) -> None:
        root = Randomness.of_seed(3)
        assert (root.child(*one).key == root.child(*other).key) == (one == other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (("ab", "c"), ("a", "bc")),
            (("abc",), ("ab", "c")),
            ((1,), ("1",)),
            ((1, 2), (12,)),
            ((-1,), ("-1",)),
            (("",), ()),
            (("", ""), ("",)),
            (("a\0\0\0\2sb",), ("a", "b")),
            (("i1",), (1,)),
        ],
    )
    def test_look_alikes_differ(self, one: tuple[str | int, ...], other: tuple[str | int, ...]) -> None:
        root = Randomness.of_seed(3)
        assert root.child(*one).key != root.child(*other).key

    def test_a_child_is_neither_its_parent_nor_its_parents_bytes_nor_its_siblings_child(self) -> None:
        root = Randomness.of_seed(3)
        keys = [
            root.key,
            root.bytes(32),
            root.child("a").key,
            root.child("a").bytes(32),
            root.child("a", "b").key,
            root.child("a").child("b").key,
            root.child("b").child("a").key,
            Randomness.of_seed(4).child("a").key,
        ]
        assert len(set(keys)) == len(keys)

    def test_streams_of_siblings_are_not_correlated(self) -> None:
        root = Randomness.of_seed(3)
        streams = np.array([root.child("site", index).generator().standard_normal(4000) for index in range(8)])
        correlations = np.corrcoef(streams)[np.triu_indices(8, 1)]
        assert np.abs(correlations).max() < 5 / np.sqrt(4000)


def test_neither_repr_nor_an_error_shows_the_key() -> None:
    root = Randomness.of_seed(20240501)
    for text in (repr(root), str(root), f"{root}", repr({"randomness": root})):
        assert root.key.hex() not in text
        assert repr(root.key)[2:10] not in text
    with pytest.raises(ValueError, match="32 bytes") as refused:
        Randomness(b"secret" * 5)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_has_32_bytes(length: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Randomness(bytes(length))


def test_a_seed_is_not_negative() -> None:
    with pytest.raises(ValueError, match="from 0 up"):
        Randomness.of_seed(-1)


SHOW = """
from cohortium.core.random import Randomness
child = Randomness.of_seed(42).child("site", 3)
generator = child.generator()
print(child.key.hex(), *generator.integers(0, 2**32, 3), *generator.permutation(9), generator.normal().hex())
"""
GOLDEN = (
    "84b97261fcf48a2d864398693101ae335dc12d87ed0338e6ed90e7470df19a4a"
    " 1714125339 280185839 3416212651 8 0 1 6 7 2 3 4 5 -0x1.5659041be7b4bp-2"
)


@pytest.mark.parametrize("hash_seed", ["0", "12345"])
def test_another_process_draws_the_same(hash_seed: str) -> None:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed}
    run = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.split() == GOLDEN.split()


def test_the_golden_key_by_hand() -> None:
    root = expand(extract(b"\x2a"), b"cohortium seed v1", 32)
    path = b"\0\0\0\5child" + b"\0\0\0\5ssite" + b"\0\0\0\2i3"
    assert GOLDEN.split()[0] == expand(root, path, 32).hex()
