"""The secure sum once more, from what its documentation says and in another way: plain integers, hmac and hashlib.

X25519 is RFC 7748's ladder, Ed25519 RFC 8032's text, BLAKE2b RFC 7693's and GCM NIST SP 800-38D's, all on Python
integers; HKDF is RFC 5869's text. Only SHA-2 and the AES-256 block function come from a library.
`python tests/secagg/reference.py` writes `tests/vectors/masking.json`.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

VECTORS = Path(__file__).parents[1] / "vectors/masking.json"
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
BASE_Y = 4 * pow(5, -1, P) % P
LOW_ORDER = (0).to_bytes(32, "little")
"""The point (0, 0) of RFC 7748's curve: every exchange with it gives zero."""
FIELD = 65521
WORDS = 18
SEGMENT = 1 << 20


# RFC 7748, section 5


def x25519(scalar: bytes, point: bytes) -> bytes:
    k = int.from_bytes(scalar, "little") & ~7 & ~(128 << 8 * 31) | (64 << 8 * 31)
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swap = 1, 0, u, 1, 0
    for bit in range(254, -1, -1):
        swap ^= (k >> bit) & 1
        if swap:
            x2, x3, z2, z3 = x3, x2, z3, z2
        swap = (k >> bit) & 1
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        aa, bb, da, cb = a * a % P, b * b % P, d * a % P, c * b % P
        e = aa - bb
        x3, z3 = (da + cb) ** 2 % P, u * (da - cb) ** 2 % P
        x2, z2 = aa * bb % P, e * (aa + 121665 * e) % P
    if swap:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P - 2, P) % P).to_bytes(32, "little")


def x25519_public(scalar: bytes) -> bytes:
    return x25519(scalar, (9).to_bytes(32, "little"))


# RFC 8032, section 5.1, points as (x, y)

Point = tuple[int, int]


def _even_x(y: int) -> int:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if x % 2 == 0 else P - x


def _plus(one: Point, other: Point) -> Point:
    (x1, y1), (x2, y2) = one, other
    product = D * x1 * x2 * y1 * y2 % P
    # one inverse serves both denominators, 1 + product and 1 - product
    inverse = pow(1 - product * product, -1, P)
    x = (x1 * y2 + x2 * y1) * (1 - product) * inverse % P
    return x, (y1 * y2 + x1 * x2) * (1 + product) * inverse % P


def _times(count: int, point: Point) -> Point:
    result = (0, 1)
    while count:
        if count & 1:
            result = _plus(result, point)
        point, count = _plus(point, point), count >> 1
    return result


BASE = (_even_x(BASE_Y), BASE_Y)


def _compress(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def _secret(seed: bytes) -> tuple[int, bytes]:
    digest = hashlib.sha512(seed).digest()
    return int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | (1 << 254), digest[32:]


@cache
def ed25519_public(seed: bytes) -> bytes:
    return _compress(_times(_secret(seed)[0], BASE))


def ed25519_sign(seed: bytes, message: bytes) -> bytes:
    scalar, prefix = _secret(seed)
    public = ed25519_public(seed)
    r = int.from_bytes(hashlib.sha512(prefix + message).digest(), "little") % ORDER
    commitment = _compress(_times(r, BASE))
    challenge = int.from_bytes(hashlib.sha512(commitment + public + message).digest(), "little")
    return commitment + ((r + challenge * scalar) % ORDER).to_bytes(32, "little")


# RFC 5869


def hkdf_extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt or bytes(32), secret, "sha256")


def hkdf_expand(key: bytes, info: bytes, length: int) -> bytes:
    output, block = b"", b""
    for index in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([index]), "sha256")
        output += block
    return output[:length]


# RFC 7693, with the personalisation of the BLAKE2 paper's parameter block

_WORD = (1 << 64) - 1
_START = (
    0x6A09E667F3BCC908,
    0xBB67AE8584CAA73B,
    0x3C6EF372FE94F82B,
    0xA54FF53A5F1D36F1,
    0x510E527FADE682D1,
    0x9B05688C2B3E6C1F,
    0x1F83D9ABFB41BD6B,
    0x5BE0CD19137E2179,
)
_ORDER = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
)
_LANES = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
_DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _turned(word: int, bits: int) -> int:
    return (word >> bits | word << (64 - bits)) & _WORD


def blake2b(data: bytes, size: int = 32, key: bytes = b"", person: bytes = b"") -> bytes:
    parameters = bytes([size, len(key), 1, 1]) + bytes(44) + person.ljust(16, b"\0")
    state = [word ^ int.from_bytes(parameters[8 * i : 8 * i + 8], "little") for i, word in enumerate(_START)]
    text = (key.ljust(128, b"\0") if key else b"") + data
    for start in range(0, max(len(text), 1), 128):
        block, last = text[start : start + 128].ljust(128, b"\0"), start + 128 >= len(text)
        words = [int.from_bytes(block[8 * i : 8 * i + 8], "little") for i in range(16)]
        v = [*state, *_START]
        v[12] ^= min(start + 128, len(text))
        v[14] ^= _WORD if last else 0
        for turn in range(12):
            order = iter(_ORDER[turn % 10])
            for a, b, c, d in _LANES + _DIAGONALS:
                for first, second in ((32, 24), (16, 63)):
                    v[a] = (v[a] + v[b] + words[next(order)]) & _WORD
                    v[d] = _turned(v[d] ^ v[a], first)
                    v[c] = (v[c] + v[d]) & _WORD
                    v[b] = _turned(v[b] ^ v[c], second)
        state = [word ^ v[i] ^ v[i + 8] for i, word in enumerate(state)]
    return b"".join(word.to_bytes(8, "little") for word in state)[:size]


# NIST SP 800-38D, sections 6.3 to 6.5 and 7.1


def aes256(key: bytes, blocks: bytes) -> bytes:
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)


def ghash(key: bytes, data: bytes) -> bytes:
    h, y = int.from_bytes(aes256(key, bytes(16)), "big"), 0
    for start in range(0, len(data), 16):
        x, y, v = y ^ int.from_bytes(data[start : start + 16], "big"), 0, h
        for bit in range(127, -1, -1):
            y ^= v if x >> bit & 1 else 0
            v = v >> 1 ^ (0xE1 << 120 if v & 1 else 0)
    return y.to_bytes(16, "big")


def counter_stream(key: bytes, nonce: bytes, length: int) -> bytes:
    """Returns the blocks nonce || 2, nonce || 3, ... encrypted: what GCM adds under a nonce of 12 bytes."""
    blocks = (nonce + (2 + index).to_bytes(4, "big") for index in range(-(-length // 16)))
    return aes256(key, b"".join(blocks))[:length]


def xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def gcm_seal(key: bytes, nonce: bytes, plain: bytes, data: bytes = b"") -> bytes:
    """Returns ciphertext and tag, for a nonce of 12 bytes."""
    secret = xor(counter_stream(key, nonce, len(plain)), plain)
    sizes = (8 * len(data)).to_bytes(8, "big") + (8 * len(secret)).to_bytes(8, "big")
    hashed = ghash(key, data + bytes(-len(data) % 16) + secret + bytes(-len(secret) % 16) + sizes)
    return secret + xor(aes256(key, nonce + (1).to_bytes(4, "big")), hashed)


# Keys of pairs, rounds and purposes


def framed(*parts: bytes) -> bytes:
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def signed_text(run: str, study: str, site: str, public: bytes) -> bytes:
    return framed(b"cohortium run key v1", run.encode(), study.encode(), site.encode(), public)


def pair_key(private: bytes, ends: Sequence[tuple[str, bytes]], own: str, run: str) -> bytes:
    """Returns the key of two sites, given both names and public keys and one's own private key."""
    (first, first_key), (second, second_key) = sorted(ends)
    peer = second_key if own == first else first_key
    info = framed(b"cohortium pair key v1", run.encode(), first.encode(), first_key, second.encode(), second_key)
    return hkdf_expand(hkdf_extract(b"", x25519(private, peer)), info, 32)


def round_seed(key: bytes, number: int) -> bytes:
    block, place = divmod(number, 16)
    return hkdf_expand(key, b"cohortium round seeds v1" + block.to_bytes(8, "big"), 512)[32 * place : 32 * place + 32]


def session_digest(run: str, study: str, threshold: int, publics: Mapping[str, bytes]) -> bytes:
    parts = [run.encode(), study.encode(), threshold.to_bytes(4, "big")]
    for name in sorted(publics):
        parts += [name.encode(), publics[name]]
    return blake2b(framed(*parts), person=b"cohort session")


def round_context(session: bytes, number: int, broadcast: bytes) -> bytes:
    return blake2b(session + number.to_bytes(8, "big") + broadcast, person=b"cohort round")


def mask_key(seed: bytes, context: bytes) -> bytes:
    return blake2b(context, key=seed, person=b"cohort mask")


def sealing_key(seed: bytes, context: bytes, sender: str) -> bytes:
    return blake2b(context + sender.encode(), key=seed, person=b"cohort share")


def survivors_digest(context: bytes, sites: Sequence[str]) -> bytes:
    return blake2b(framed(context, *(site.encode() for site in sites)), person=b"cohort survivors")


def endorsement(seed: bytes, digest: bytes, sender: str) -> bytes:
    return blake2b(digest + sender.encode(), key=seed, person=b"cohort endorse")


def survivors_signature(identity: bytes, context: bytes, sites: Sequence[str]) -> bytes:
    text = framed(b"cohortium survivors v1", context, *(site.encode() for site in sites))
    return ed25519_sign(identity, text)


def child(key: bytes, label: str) -> bytes:
    """Returns a key below another one in the tree of randomness."""
    return hkdf_expand(key, framed(b"child", b"s" + label.encode()), 32)


def drawn(key: bytes, count: int) -> bytes:
    return hkdf_expand(key, b"bytes", count)


# Masks and residues


def kind_bits(bits: int) -> int:
    """Returns the width of the machine's type for residues of `bits` bits."""
    return next(width for width in (16, 32, 64) if bits <= width)


def stream_bytes(key: bytes, length: int) -> bytes:
    """Returns a key's stream: segments of 1 MiB, each under its own number as nonce."""
    segments = range(-(-length // SEGMENT))
    whole = (counter_stream(key, i.to_bytes(12, "big"), min(SEGMENT, length - i * SEGMENT)) for i in segments)
    return b"".join(whole)


def stream(key: bytes, count: int, width: int) -> list[int]:
    """Returns the first residues of a key's stream, of 16, 32 or 64 bits."""
    size = width // 8
    output = stream_bytes(key, count * size)
    return [int.from_bytes(output[start : start + size], "little") for start in range(0, count * size, size)]


def masked(vector: Sequence[int], add: Sequence[bytes], subtract: Sequence[bytes], width: int) -> list[int]:
    result = list(vector)
    for sign, keys in ((1, add), (-1, subtract)):
        for key in keys:
            residues = stream(key, len(vector), width)
            result = [(entry + sign * residue) % 2**width for entry, residue in zip(result, residues, strict=True)]
    return result


def packed(residues: Sequence[int], bits: int) -> bytes:
    """Returns the low bits of each residue, the first residue in the lowest bits of the first byte."""
    number = sum((residue % 2**bits) << (bits * place) for place, residue in enumerate(residues))
    return number.to_bytes(-(-len(residues) * bits // 8), "little")


def unpacked(carried: bytes, bits: int, length: int) -> list[int]:
    number = int.from_bytes(carried, "little")
    return [number >> (bits * place) & (2**bits - 1) for place in range(length)]


def signed(residue: int, bits: int) -> int:
    """Returns the number between -2^(bits-1) and 2^(bits-1) that a residue stands for."""
    return (residue + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


# Shamir's sharing


def words_of(secret: bytes) -> list[int]:
    """Returns 32 bytes as 18 digits of 15 bits, the highest first; the last digit ends in 14 zero bits."""
    number = int.from_bytes(secret, "big") << (15 * WORDS - 256)
    return [number >> (15 * (WORDS - 1 - place)) & 0x7FFF for place in range(WORDS)]


def bytes_of(words: Sequence[int]) -> bytes:
    number = 0
    for word in words:
        number = number << 15 | word
    return (number >> (15 * WORDS - 256)).to_bytes(32, "big")


def uniform(key: bytes, count: int, prime: int = FIELD) -> list[int]:
    """Returns the 16-bit numbers of a key's stream below the largest multiple of the prime, modulo the prime."""
    limit, size = 65536 - 65536 % prime, 2 * count
    while True:
        output = stream_bytes(key, size)
        numbers = [int.from_bytes(output[start : start + 2], "little") for start in range(0, size, 2)]
        kept = [number % prime for number in numbers if number < limit]
        if len(kept) >= count:
            return kept[:count]
        size = 2 * size + 128


def value_at(coefficients: Sequence[int], point: int, prime: int = FIELD) -> int:
    """Returns a polynomial's value, its constant term first (Horner)."""
    result = 0
    for coefficient in reversed(coefficients):
        result = (result * point + coefficient) % prime
    return result


def shared(secret: Sequence[int], holders: int, threshold: int, key: bytes) -> list[list[int]]:
    """Returns each holder's numbers; `key` is that of the randomness for this sharing."""
    rest = uniform(drawn(key, 32), (threshold - 1) * len(secret))
    polynomials = [[word, *rest[place :: len(secret)]] for place, word in enumerate(secret)]
    return [[value_at(polynomial, holder + 1) for polynomial in polynomials] for holder in range(holders)]


def at_zero(shares: Mapping[int, int], prime: int = FIELD) -> int:
    """Returns the constant term of the polynomial through the holders' values (Lagrange); holder i is at i + 1."""
    total = 0
    for one, value in shares.items():
        above = below = 1
        for other in shares:
            if other != one:
                above, below = above * (other + 1) % prime, below * (other - one) % prime
        total += value * above * pow(below, -1, prime)
    return total % prime


# One round


def little(words: Sequence[int]) -> bytes:
    return b"".join(word.to_bytes(2, "little") for word in words)


class Round:
    """Everything that a round's sites compute, each from its own pair keys and randomness."""

    def __init__(
        self,
        keys: Mapping[str, Mapping[str, bytes]],
        threshold: int,
        number: int,
        bits: int,
        context: bytes,
        randomness: Mapping[str, bytes],
        plain: Mapping[str, Sequence[int]],
    ) -> None:
        self.names, self.threshold, self.bits, self.context = sorted(keys), threshold, bits, context
        self.opens = threshold < len(self.names)
        self.seeds = {one: {peer: round_seed(key, number) for peer, key in keys[one].items()} for one in keys}
        self.secrets = {name: self._secrets(name, randomness[name]) for name in self.names}
        self.values = {name: self._values(name, plain[name]) for name in self.names}
        self.shares = {name: self._shares(name, randomness[name]) for name in self.names} if self.opens else {}

    def _secrets(self, name: str, randomness: bytes) -> dict[str, bytes]:
        """Returns the mask keys with each site; one's own is the self mask."""
        keys = {peer: mask_key(seed, self.context) for peer, seed in self.seeds[name].items()}
        if self.opens:
            keys[name] = drawn(child(randomness, "self mask"), 32)
        return keys

    def _values(self, name: str, plain: Sequence[int]) -> list[int]:
        keys = self.secrets[name]
        add = [key for peer, key in keys.items() if peer >= name]
        subtract = [key for peer, key in keys.items() if peer < name]
        return [
            residue % 2**self.bits
            for residue in masked([x % 2**self.bits for x in plain], add, subtract, kind_bits(self.bits))
        ]

    def _shares(self, name: str, randomness: bytes) -> dict[str, list[int]]:
        secret = [word for peer in self.names for word in words_of(self.secrets[name][peer])]
        dealt = shared(secret, len(self.names), self.threshold, child(randomness, "shares"))
        return dict(zip(self.names, dealt, strict=True))

    def sealed(self, sender: str, receiver: str) -> bytes:
        key = sealing_key(self.seeds[sender][receiver], self.context, sender)
        return gcm_seal(key, bytes(12), little(self.shares[sender][receiver]))

    def tag(self, survivors: Sequence[str], sender: str, receiver: str) -> bytes:
        return endorsement(self.seeds[sender][receiver], survivors_digest(self.context, survivors), sender)

    def answer(self, survivors: Sequence[str], holder: str) -> list[list[list[int]]]:
        """Returns a site's shares of each survivor's self mask and of its keys with the lost sites."""
        lost = [name for name in self.names if name not in survivors]
        return [
            [self._row(self.shares[owner][holder], self.names.index(peer)) for peer in (owner, *lost)]
            for owner in survivors
        ]

    @staticmethod
    def _row(share: Sequence[int], place: int) -> list[int]:
        return list(share[WORDS * place : WORDS * place + WORDS])

    def opened(self, survivors: Sequence[str], answers: Mapping[str, list[list[list[int]]]]) -> list[int]:
        """Returns the sum as residues, from any `threshold` answers."""
        total = [sum(column) for column in zip(*(self.values[name] for name in survivors), strict=True)]
        if self.opens:
            lost = [name for name in self.names if name not in survivors]
            chosen = dict(list(answers.items())[-self.threshold :])
            for row, owner in enumerate(survivors):
                for column, peer in enumerate((owner, *lost)):
                    words = [
                        at_zero({self.names.index(site): found[row][column][word] for site, found in chosen.items()})
                        for word in range(WORDS)
                    ]
                    sign = -1 if peer >= owner else 1
                    residues = stream(bytes_of(words), len(total), kind_bits(self.bits))
                    total = [entry + sign * residue for entry, residue in zip(total, residues, strict=True)]
        return [entry % 2**self.bits for entry in total]


# The vectors


def _seed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


RUN, STUDY = "run-2024-7", "sha256:" + hashlib.sha256(b"a study").hexdigest()
NAMES = ["Cork", "aachen", "bergen", "delft-2", "essen"]
COORDINATOR = _seed("identity of the coordinator")
ROUNDS: list[tuple[int, int, int, str, int, list[str], list[str]]] = [
    # number, threshold, bits, broadcast, length, survivors, those of them that endorse and reveal
    (1, 3, 32, "", 1, NAMES, NAMES),
    (2, 3, 64, "model", 3, ["aachen", "bergen", "delft-2", "essen"], ["aachen", "bergen", "essen"]),
    (15, 3, 16, "model", 5, ["Cork", "bergen", "essen"], ["Cork", "bergen", "essen"]),
    (16, 4, 12, "model", 7, ["Cork", "aachen", "bergen", "delft-2"], ["Cork", "aachen", "bergen", "delft-2"]),
    (17, 3, 25, "other", 9, ["Cork", "aachen", "bergen", "delft-2"], ["Cork", "aachen", "delft-2"]),
    (40, 5, 50, "", 2, NAMES, []),
    (41, 5, 16, "all stay", 3, NAMES, []),
]


def vectors() -> dict[str, Any]:
    """Returns the run of five sites that `tests/vectors/masking.json` records."""
    identities = {name: _seed(f"identity of {name}") for name in NAMES}
    privates = {name: _seed(f"agreement of {name}") for name in NAMES}
    publics = {name: x25519_public(privates[name]) for name in NAMES}
    sites = {
        name: {
            "identity": identities[name].hex(),
            "pinned": ed25519_public(identities[name]).hex(),
            "private": privates[name].hex(),
            "public": publics[name].hex(),
            "signature": ed25519_sign(identities[name], signed_text(RUN, STUDY, name, publics[name])).hex(),
        }
        for name in NAMES
    }
    keys: dict[str, dict[str, bytes]] = {
        name: {
            peer: pair_key(privates[name], [(name, publics[name]), (peer, publics[peer])], name, RUN)
            for peer in NAMES
            if peer != name
        }
        for name in NAMES
    }
    pairs = [
        {
            "sites": [one, other],
            "key": keys[one][other].hex(),
            "seeds": {str(number): round_seed(keys[one][other], number).hex() for number in (1, 15, 16, 40)},
        }
        for one in NAMES
        for other in NAMES
        if one < other
    ]
    sessions = {threshold: session_digest(RUN, STUDY, threshold, publics) for threshold in (3, 4, 5)}
    rounds = {entry[0]: _round(keys, sessions, entry) for entry in ROUNDS}
    return {
        "run": RUN,
        "study_id": STUDY,
        "sites": sites,
        "coordinator": {"identity": COORDINATOR.hex(), "pinned": ed25519_public(COORDINATOR).hex()},
        "sessions": {str(threshold): session.hex() for threshold, session in sessions.items()},
        "pairs": pairs,
        "rounds": [recorded for _, recorded in rounds.values()],
        "key_sets": _bad_key_sets(sites),
        "orders": {"bad_replayed_round": [1, 2, 2], "bad_earlier_round": [3, 2], "bad_round_zero": [0]},
        "openings": _bad_openings(rounds[17][0], rounds[2][0]),
    }


def _plain(name: str, number: int, bits: int, length: int) -> list[int]:
    """Returns numbers of any sign, the first ones the extremes."""
    drawn = [int.from_bytes(_seed(f"{name} {number} {entry}"), "big") for entry in range(length)]
    return [signed(entry, bits) if place else 2 ** (bits - 1) - 1 for place, entry in enumerate(drawn)]


def _round(
    keys: dict[str, dict[str, bytes]],
    sessions: dict[int, bytes],
    entry: tuple[int, int, int, str, int, list[str], list[str]],
) -> tuple[Round, dict[str, Any]]:
    number, threshold, bits, broadcast, length, survivors, endorsers = entry
    context = round_context(sessions[threshold], number, broadcast.encode())
    randomness = {name: _seed(f"randomness of {name} in {number}") for name in NAMES}
    plain = {name: _plain(name, number, bits, length) for name in NAMES}
    made = Round(keys, threshold, number, bits, context, randomness, plain)
    sums = [sum(plain[name][place] for name in survivors) for place in range(length)]
    answers = {name: made.answer(survivors, name) for name in endorsers}
    assert made.opened(survivors, answers) == [total % 2**bits for total in sums]
    recorded: dict[str, Any] = {
        "round": number,
        "threshold": threshold,
        "bits": bits,
        "broadcast": broadcast,
        "context": context.hex(),
        "randomness": {name: key.hex() for name, key in randomness.items()},
        "plain": plain,
        "masks": {one: {peer: key.hex() for peer, key in made.secrets[one].items()} for one in NAMES},
        "payloads": {name: packed(values, bits).hex() for name, values in made.values.items()},
        "survivors": survivors,
        "sum": [signed(total, bits) for total in sums],
    }
    if not made.opens:
        return made, recorded
    return made, recorded | {
        "own_shares": {name: little(made.shares[name][name]).hex() for name in NAMES},
        "sealed": {one: {other: made.sealed(one, other).hex() for other in NAMES if other != one} for one in NAMES},
        "signature": survivors_signature(COORDINATOR, context, survivors).hex(),
        "tags": {
            one: {other: made.tag(survivors, one, other).hex() for other in survivors if other != one}
            for one in endorsers
        },
        "answers": {
            name: "".join(little(row).hex() for rows in answer for row in rows) for name, answer in answers.items()
        },
    }


def _bad_key_sets(sites: dict[str, Any]) -> dict[str, Any]:
    """Returns key sets that each site must refuse, as lists of announcements."""

    def entry(name: str, **changes: str) -> dict[str, str]:
        known = {key: sites.get(name, {}).get(key, "") for key in ("public", "signature")}
        return {"run": RUN, "site": name} | known | changes

    def resigned(name: str, public: bytes, in_run: str = RUN, of_study: str = STUDY, by: str = "") -> dict[str, str]:
        identity = bytes.fromhex(sites[by or name]["identity"])
        signature = ed25519_sign(identity, signed_text(in_run, of_study, name, public))
        return entry(name, public=public.hex(), signature=signature.hex())

    def with_last(last: dict[str, str]) -> list[dict[str, str]]:
        return [*good[:-1], last]

    good = [entry(name) for name in sites]
    *_, before, last = sites
    own = {name: bytes.fromhex(site["public"]) for name, site in sites.items()}
    forged = bytearray.fromhex(sites[last]["signature"])
    forged[40] ^= 1
    foreign = x25519_public(_seed("a key of the coordinator's"))
    return {
        "bad_signature": with_last(entry(last, signature=forged.hex())),
        "bad_swapped_key": with_last(entry(last, public=foreign.hex())),
        "bad_signed_by_another": with_last(resigned(last, foreign, by=before)),
        "bad_too_few": good[:2],
        "bad_missing_me": good[1:],
        "bad_extra_site": [*good, resigned("mallory", foreign, by=before)],
        "bad_listed_twice": [*good, good[-1]],
        "bad_out_of_order": [*good[:-2], good[-1], good[-2]],
        "bad_repeated_key": with_last(resigned(last, own[before])),
        "bad_low_order_point": with_last(resigned(last, LOW_ORDER)),
        "bad_short_key": with_last(resigned(last, own[last][:31])),
        "bad_wrong_run": with_last(resigned(last, own[last], in_run="run-2024-6")),
        "bad_wrong_study": with_last(resigned(last, own[last], of_study="sha256:" + bytes(32).hex())),
    }


def _bad_openings(made: Round, earlier: Round) -> dict[str, Any]:
    """Returns what 'aachen' must refuse in round 17, as the messages that it gets: only the last one is bad."""
    me, good = "aachen", ["Cork", "aachen", "bergen", "delft-2"]

    def survivors(sites: list[str], **changes: Any) -> dict[str, Any]:
        sealed = [made.sealed(name, me).hex() for name in sites if name in made.names and name != me]
        signature = survivors_signature(COORDINATOR, made.context, sites).hex()
        return {"round": 17, "sites": sites, "signature": signature, "sealed": sealed} | changes

    def endorsed(sites: list[str], **changes: Any) -> dict[str, Any]:
        tags = [made.tag(good, name, me).hex() for name in sites if name != me]
        return {"round": 17, "endorsers": sites, "tags": tags} | changes

    def flipped(text: str) -> str:
        changed = bytearray.fromhex(text)
        changed[len(changed) // 2] ^= 4
        return changed.hex()

    usual, peers = survivors(good), [name for name in good if name != me]
    shares, tags = usual["sealed"], endorsed(peers)["tags"]
    by_another = survivors_signature(_seed("another identity"), made.context, good).hex()
    seed = made.seeds["Cork"][me]
    no_share = little([FIELD, *made.shares["Cork"][me][1:]])
    sealed_no_share = gcm_seal(sealing_key(seed, made.context, "Cork"), bytes(12), no_share).hex()
    endorsed_again = survivors_digest(made.context, [*good, "essen"])
    bad_sets = {
        "bad_signature": survivors(good, signature=flipped(usual["signature"])),
        "bad_other_coordinator": survivors(good, signature=by_another),
        "bad_other_purpose": survivors(
            good, signature=ed25519_sign(COORDINATOR, framed(made.context, *(name.encode() for name in good))).hex()
        ),
        "bad_signed_for_another_set": survivors([*good, "essen"], signature=usual["signature"]),
        "bad_too_few": survivors(["Cork", "aachen"]),
        "bad_nobody": survivors([]),
        "bad_unknown_site": survivors([*good, "mallory"], sealed=[*shares, shares[0]]),
        "bad_out_of_order": survivors(["aachen", "Cork", "bergen", "delft-2"]),
        "bad_listed_twice": survivors(["Cork", "aachen", "bergen", "bergen", "delft-2"]),
        "bad_listed_me_twice": survivors(["Cork", "aachen", "aachen", "bergen"]),
        "bad_without_me": survivors(peers),
        "bad_missing_share": survivors(good, sealed=shares[:-1]),
        "bad_extra_share": survivors(good, sealed=[*shares, shares[0]]),
        "bad_no_shares": survivors(good, sealed=[]),
        "bad_altered_share": survivors(good, sealed=[shares[0], flipped(shares[1]), shares[2]]),
        "bad_reordered_shares": survivors(good, sealed=[shares[1], shares[0], shares[2]]),
        "bad_truncated_share": survivors(good, sealed=[*shares[:-1], shares[-1][:-2]]),
        "bad_share_for_another": survivors(good, sealed=[made.sealed("Cork", "bergen").hex(), *shares[1:]]),
        "bad_own_share_returned": survivors(good, sealed=[made.sealed(me, "Cork").hex(), *shares[1:]]),
        "bad_share_of_another_round": survivors(good, sealed=[earlier.sealed("Cork", me).hex(), *shares[1:]]),
        "bad_no_share": survivors(good, sealed=[sealed_no_share, *shares[1:]]),
        "bad_other_round": survivors(good, signature=survivors_signature(COORDINATOR, earlier.context, good).hex()),
        "bad_round_not_open": survivors(good, round=18),
    }
    bad_endorsements = {
        "bad_tag": endorsed(peers[:2], tags=[tags[0], flipped(tags[1])]),
        "bad_swapped_tags": endorsed(peers[:2], tags=[tags[1], tags[0]]),
        "bad_tag_for_another": endorsed(peers[:2], tags=[made.tag(good, "Cork", "bergen").hex(), tags[1]]),
        "bad_own_tag_returned": endorsed(peers[:2], tags=[made.tag(good, me, "Cork").hex(), tags[1]]),
        "bad_tag_of_another_set": endorsed(peers[:2], tags=[endorsement(seed, endorsed_again, "Cork").hex(), tags[1]]),
        "bad_tag_of_another_round": endorsed(peers[:2], tags=[earlier.tag(good, "Cork", me).hex(), tags[1]]),
        "bad_missing_tag": endorsed(peers, tags=tags[:-1]),
        "bad_too_few_endorsers": endorsed(peers[:1]),
        "bad_no_endorsers": endorsed([]),
        "bad_endorser_outside": endorsed([*peers, "essen"]),
        "bad_endorser_outside_for_one": endorsed(["Cork", "bergen", "essen"]),
        "bad_endorser_twice": endorsed(["Cork", "Cork", "bergen"]),
        "bad_endorser_me": endorsed(["Cork", me, "bergen"], tags=[tags[0], made.tag(good, me, "Cork").hex(), tags[1]]),
        "bad_endorsers_out_of_order": endorsed(["bergen", "Cork", "delft-2"]),
    }
    return {
        "site": me,
        "good": [usual, endorsed(peers)],
        **{name: [message] for name, message in bad_sets.items()},
        **{name: [usual, message] for name, message in bad_endorsements.items()},
        "bad_second_set": [usual, survivors([*good, "essen"])],
        "bad_smaller_second_set": [usual, survivors(["Cork", "aachen", "bergen"])],
        "bad_second_set_after_revealing": [usual, endorsed(peers), survivors(["Cork", "aachen", "bergen"])],
        "bad_same_set_again": [usual, usual],
        "bad_revealed_again": [usual, endorsed(peers), endorsed(peers)],
        "bad_endorsements_first": [endorsed(peers)],
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
