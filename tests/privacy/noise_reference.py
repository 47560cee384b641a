"""Noise shares as their specification says, with whole numbers and the error function's series; slow and plain.

Written from the docstring of `cohortium.privacy.gaussian`, which it does not import. Run as a script, it writes the
vectors.
"""

import json
from bisect import bisect_right
from fractions import Fraction
from functools import cache
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from cohortium.core.random import Randomness

VECTORS = Path(__file__).parents[1] / "vectors" / "noise.json"
CASES = (
    (5.0, 40, 0),
    (5.0, 16_390, 16_380),
    (6.625, 12, 0),
    (100.25, 12, 0),
    (1300.0, 16_388, 16_380),
    (3.5e11, 12, 0),
)
"""Deviation, number of draws, and the first that is kept."""
DIGITS = 440
"""Binary digits after the point: 128 to keep, 130 lost in a series of large terms, the rest to spare."""


def levels_and_base(deviation: float) -> tuple[int, int]:
    """Returns how many levels there are, and b in units of 2^-32."""
    square = Fraction(deviation) ** 2
    weights = [Fraction(256**level) for level in range(20)]
    levels = max([1] + [n for n in range(2, 20) if square / sum(weights[:n]) >= 80**2])
    wanted = square / sum(weights[:levels]) * 2**64
    low, high = 0, 2**64
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if middle**2 >= wanted else (middle + 1, high)
    return levels, low


@cache
def _one_over_root_two_pi() -> int:
    def arctangent_of_inverse(x: int) -> int:
        total, power, n = 0, (1 << (DIGITS + 20)) // x, 0
        while power:
            total += (-1) ** n * (power // (2 * n + 1))
            power //= x * x
            n += 1
        return total

    pi = 16 * arctangent_of_inverse(5) - 4 * arctangent_of_inverse(239)
    low, high = 0, 1 << DIGITS
    while low < high:
        middle = (low + high + 1) // 2
        # middle^2 * 2 pi <= 1
        low, high = (middle, high) if 2 * middle**2 * pi <= 1 << (3 * DIGITS + 20) else (low, middle - 1)
    return low


def upper_tail(x: Fraction) -> int:
    """Returns P(Z > x) for a standard normal Z, to the nearest multiple of 2^-128."""
    number, total, term, n = int(x * 2**DIGITS), 0, int(x * 2**DIGITS), 0
    square = number * number >> DIGITS
    while term:
        total += (-1) ** n * (term // (2 * n + 1))
        n += 1
        term = (term * square >> DIGITS) // (2 * n)
    tail = (1 << (DIGITS - 1)) - (total * _one_over_root_two_pi() >> DIGITS)
    return ((tail >> (DIGITS - 129)) + 1) >> 1


@cache
def cumulative(base: int) -> tuple[tuple[int, ...], int]:
    """Returns P(X <= k) * 2^128 for all k where it is neither 0 nor 2^128, and the first of these k."""
    tails: list[int] = []
    while tail := upper_tail(Fraction(2 * len(tails) + 1, 2) * 2**32 / base):
        tails.append(tail)
    return tuple(tails[::-1] + [2**128 - tail for tail in tails]), -len(tails)


def words(key: bytes, count: int) -> list[int]:
    """Returns little-endian words of 64 bits of AES-256's keystream, from encrypted counters."""
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    stream = b"".join(encryptor.update(block.to_bytes(16, "big")) for block in range(-(-count // 2)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") for i in range(count)]


def draws(deviation: float, count: int, key: bytes) -> list[int]:
    """Returns a site's share."""
    levels, base = levels_and_base(deviation)
    entries, first = cumulative(base)
    shares = []
    for segment in range(-(-count // 16384)):
        inside = min(16384, count - 16384 * segment)
        sums = [0] * inside
        for level in range(levels):
            below = Randomness(key).child(level, segment)
            high, low = words(below.child("high").key, inside), words(below.child("low").key, inside)
            for i in range(inside):
                # as many entries as do not exceed r
                sums[i] += 16**level * (first + bisect_right(entries, high[i] * 2**64 + low[i]))
        shares += sums
    return shares


def vectors() -> list[dict[str, object]]:
    """Returns the content of tests/vectors/noise.json."""
    cases = []
    for number, (deviation, count, start) in enumerate(CASES):
        key = bytes(range(number, number + 32))
        kept = draws(deviation, count, key)[start:]
        cases.append({"key": key.hex(), "deviation": deviation, "count": count, "from": start, "draws": kept})
    return cases


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
