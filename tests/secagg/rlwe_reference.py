"""Additive encryption in the ring once more, from what its documentation says and in another way: plain integers.

Ring elements are lists of 4096 coefficients modulo q, multiplied as two large integers; the public factor is found from
its values by Lagrange's formula for roots of unity, term by term. Only the AES-256 block function comes from a library.
`python tests/secagg/rlwe_reference.py` writes `tests/vectors/rlwe.json`.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from operator import mul
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

VECTORS = Path(__file__).parents[1] / "vectors/rlwe.json"
RING = 4096
PRIMES = (1073692673, 1073668097)
Q = PRIMES[0] * PRIMES[1]
DELTA = Q // 2**50
PLACES = [16 * (place // 16) + place // 4 % 4 + 4 * (place % 4) for place in range(RING)]
"""PLACES[i] is the power of X that stands at place i of a ciphertext."""


def counter_mode(key: bytes, start: int, length: int) -> bytes:
    """Returns `length` bytes of AES-256 in counter mode from byte `start`, a multiple of 16, on."""
    blocks = range(start // 16, (start + length + 15) // 16)
    counters = b"".join(block.to_bytes(16, "big") for block in blocks)
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(counters)[:length]


def words(stream: bytes, width: int) -> list[int]:
    return [int.from_bytes(stream[at : at + width], "little") for at in range(0, len(stream), width)]


# The public factor


def residues(context: bytes, chunk: int) -> list[list[int]]:
    """Returns a's 4096 residues modulo each prime, as they come from the stream."""
    key = hashlib.blake2b(context, digest_size=32, person=b"cohortium rlwe a").digest()
    size = 4 * (2 * RING + 64)
    stream = [word % 2**30 for word in words(counter_mode(key, chunk * size, size), 4)]
    spare = iter(stream[2 * RING :])

    def in_range(word: int, prime: int) -> int:
        while word >= prime:
            word = next(spare)
        return word

    return [
        [in_range(word, prime) for word in stream[index * RING : (index + 1) * RING]]
        for index, prime in enumerate(PRIMES)
    ]


def eta(prime: int) -> int:
    """Returns the first power of 2, 3, 4 ... whose order modulo the prime is 2048."""
    roots = (pow(base, (prime - 1) // 2048, prime) for base in range(2, 100))
    return next(root for root in roots if pow(root, 1024, prime) == prime - 1)


def coefficients(values: Sequence[int], prime: int) -> list[int]:
    """Returns the 4096 coefficients modulo one prime of what is given by its remainders modulo X^4 - r."""
    powers = [1]
    for _ in range(2047):
        powers.append(powers[-1] * eta(prime) % prime)
    exponents = []
    for leaf in range(1024):
        quarter, k = divmod(leaf, 256)
        reversed_bits = int(f"{4 * k + quarter:010b}"[::-1], 2)
        exponents.append(2 * reversed_bits + 1)
    inverse = pow(1024, -1, prime)
    result = [0] * RING
    for power in range(1024):
        row = [powers[-exponent * power % 2048] for exponent in exponents]
        for i in range(4):
            result[4 * power + i] = sum(map(mul, values[1024 * i : 1024 * (i + 1)], row)) * inverse % prime
    return result


@cache
def public(context: bytes, chunk: int) -> list[int]:
    """Returns a's coefficients modulo q."""
    one, two = (coefficients(part, prime) for part, prime in zip(residues(context, chunk), PRIMES, strict=True))
    return [from_residues(first, second) for first, second in zip(one, two, strict=True)]


def from_residues(first: int, second: int) -> int:
    return (first + PRIMES[0] * ((second - first) * pow(PRIMES[0], -1, PRIMES[1]) % PRIMES[1])) % Q


def product(a: Sequence[int], s: Sequence[int]) -> list[int]:
    """Returns a * s modulo X^4096 + 1 and q: one product of two integers whose digits never meet (Kronecker)."""

    def joined(digits: Iterable[int]) -> int:
        return int.from_bytes(b"".join(digit.to_bytes(12, "little") for digit in digits), "little")

    def digits(whole: int) -> list[int]:
        return words(whole.to_bytes(12 * 2 * RING, "little"), 12)

    plus, minus = (digits(joined(a) * joined(max(sign * entry, 0) for entry in s)) for sign in (1, -1))
    long = [one - other for one, other in zip(plus, minus, strict=True)]
    return [(low - high) % Q for low, high in zip(long[:RING], long[RING:], strict=True)]


# Secrets, errors and messages


def small(coins: int) -> int:
    """Returns a secret's or an error's entry: X + 2 Y less the mean."""
    return (coins % 2**24).bit_count() + 2 * (coins >> 24).bit_count() - 52


def secret(key: bytes) -> list[int]:
    return [small(coins) for coins in words(counter_mode(key, 0, 8 * RING), 8)]


def message(vector: Sequence[int], bits: int, chunk: int) -> list[int]:
    """Returns a chunk's 4096 packed messages, in the order of places, from signed values."""
    slots = 50 // bits
    begin = chunk * slots * RING
    parts = [vector[begin + slot * RING : begin + (slot + 1) * RING] for slot in range(slots)]
    return [
        sum(part[place] << bits * slot for slot, part in enumerate(parts) if place < len(part)) for place in range(RING)
    ]


def encrypt(key: bytes, error_key: bytes, context: bytes, vector: Sequence[int], bits: int) -> list[list[list[int]]]:
    return list(_encrypted(secret(key), error_key, context, vector, bits))


def _encrypted(
    s: Sequence[int], error_key: bytes, context: bytes, vector: Sequence[int], bits: int
) -> Iterator[list[list[int]]]:
    for chunk in range(-(-len(vector) // (50 // bits * RING))):
        masks = product(public(context, chunk), s)
        errors = words(counter_mode(error_key, chunk * 8 * RING, 8 * RING), 8)
        plain = zip(message(vector, bits, chunk), errors, strict=True)
        whole = [masks[PLACES[i]] + DELTA * m + small(e) for i, (m, e) in enumerate(plain)]
        yield [[entry % prime for entry in whole] for prime in PRIMES]


def decrypt(
    total: Sequence[Sequence[Sequence[int]]], key: Sequence[int], context: bytes, length: int, bits: int
) -> tuple[list[int], int]:
    """Returns the signed sums, and the largest magnitude of the noise."""
    result = [0] * length
    noise = 0
    for chunk, (first, second) in enumerate(total):
        masks = product(public(context, chunk), key)
        for place in range(RING):
            rest = (from_residues(first[place], second[place]) - masks[PLACES[place]]) % Q
            # the middle of what packed numbers of this width can be
            middle = -sum(DELTA << bits * slot for slot in range(50 // bits)) // 2
            rest -= (rest - middle + Q // 2) // Q * Q
            packed = (rest + DELTA // 2) // DELTA
            noise = max(noise, abs(rest - DELTA * packed))
            for slot in range(50 // bits):
                value = (packed + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
                packed = (packed - value) >> bits
                at = (chunk * (50 // bits) + slot) * RING + place
                if at < length:
                    result[at] = value
    return result, noise


# The vectors


def _seed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def digest(numbers: Sequence[int], width: int = 4) -> str:
    """Returns the SHA-256 of the numbers, two's complement and little-endian."""
    return hashlib.sha256(b"".join((n % 256**width).to_bytes(width, "little") for n in numbers)).hexdigest()


def values(name: str, length: int, bits: int) -> list[int]:
    """Returns signed numbers of which fifty sites' add up to less than `bits` bits."""
    span = 2**bits // 50
    return [int.from_bytes(_seed(f"{name} {entry}")[:8], "big") % span - span // 2 for entry in range(length)]


def hkdf_child(key: bytes, *labels: str) -> bytes:
    """Returns the 32 bytes of `Randomness(key).child(*labels)`: HKDF-Expand twice, one block each (RFC 5869)."""
    parts = [b"child", *(b"s" + label.encode() for label in labels)]
    path = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    child = hmac.digest(key, path + b"\x01", "sha256")
    return hmac.digest(child, b"bytes\x01", "sha256")


def vectors() -> dict[str, Any]:
    """Returns what `tests/vectors/rlwe.json` records."""
    cases = [
        _case("two slots", bits=25, length=4097, sites=["aachen", "bergen"]),
        _case("four slots, two chunks", bits=12, length=4 * RING + 2, sites=["cork"]),
    ]
    return {"cases": cases, **_bad()}


def _case(name: str, bits: int, length: int, sites: list[str]) -> dict[str, Any]:
    context = _seed(f"context of {name}")
    chunks = range(-(-length // (50 // bits * RING)))
    randomness = {site: _seed(f"{name} {site}") for site in sites}
    keys = {site: hkdf_child(key, "secret") for site, key in randomness.items()}
    errors = {site: hkdf_child(key, "error") for site, key in randomness.items()}
    plain = {site: values(site, length, bits) for site in sites}
    ciphertexts = {site: encrypt(keys[site], errors[site], context, plain[site], bits) for site in sites}
    total = [
        [
            [sum(ciphertexts[site][chunk][index][place] for site in sites) % prime for place in range(RING)]
            for index, prime in enumerate(PRIMES)
        ]
        for chunk in chunks
    ]
    summed_key = [sum(parts) for parts in zip(*(secret(keys[site]) for site in sites), strict=True)]
    opened, noise = decrypt(total, summed_key, context, length, bits)
    assert opened == [sum(parts) for parts in zip(*plain.values(), strict=True)]
    return {
        "name": name,
        "bits": bits,
        "length": length,
        "context": context.hex(),
        "public_start": [[part[:3] for part in residues(context, chunk)] for chunk in chunks],
        "sites": {
            site: {
                "randomness": randomness[site].hex(),
                "secret_start": secret(keys[site])[:8],
                "secret_sha256": digest(secret(keys[site]), 2),
                "plain_start": plain[site][:4],
                "plain_sha256": digest(plain[site], 8),
                "ciphertext_start": [[part[:3] for part in chunk] for chunk in ciphertexts[site]],
                "ciphertext_sha256": [
                    digest([entry for part in chunk for entry in part]) for chunk in ciphertexts[site]
                ],
            }
            for site in sites
        },
        "sum_start": opened[:4],
        "sum_sha256": digest(opened, 8),
        "noise": noise,
    }


def _bad() -> dict[str, Any]:
    """Returns inputs that must be refused: `[bits, value]`, or `[prime, residue]`, or a context."""
    return {
        "bad_bits": [0, 51, -1, 64],
        "bad_value_too_wide": [[12, 2**11], [12, -(2**11) - 1], [25, 2**24], [25, -(2**24) - 1], [50, 2**49], [1, 1]],
        "bad_residue": [
            [index, value] for index, prime in enumerate(PRIMES) for value in (prime, prime + 1, 2**32 - 1)
        ],
        "bad_context": ["", bytes(31).hex(), bytes(33).hex()],
        "bad_secret_entry": [53, -53, 2**15 - 1, -(2**15)],
        "bad_summed_secret_entry": [2601, -2601, 2**40, -(2**63)],
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
