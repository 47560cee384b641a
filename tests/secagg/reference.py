"""The secure sum once more, from what its documentation says and in another way: plain integers, hmac and hashlib.

X25519 is RFC 7748's ladder, Ed25519 is RFC 8032's text and GHASH is NIST SP 800-38D's, all on Python integers; HKDF is
RFC 5869's text. Only the AES-256 block function comes from a library. `python tests/secagg/reference.py` writes
`tests/vectors/masking.json`.
"""

import hashlib
import hmac
import json
from collections.abc import Sequence
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
    x = (x1 * y2 + x2 * y1) * pow(1 + product, -1, P) % P
    return x, (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P


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


def gcm_keystream(key: bytes, nonce: bytes, length: int) -> bytes:
    """Returns what GCM adds to a plaintext, for nonces of any length but 12 bytes."""
    padded = nonce + bytes(-len(nonce) % 16)
    first = ghash(key, padded + bytes(8) + (8 * len(nonce)).to_bytes(8, "big"))
    start, blocks = int.from_bytes(first[12:], "big"), -(-length // 16)
    counters = (first[:12] + ((start + 1 + index) % 2**32).to_bytes(4, "big") for index in range(blocks))
    return aes256(key, b"".join(counters))[:length]


# The protocol


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


def stream(seed: bytes, broadcast: bytes, count: int, bits: int) -> list[int]:
    """Returns the residues of a pair's stream under the nonce that a broadcast gives."""
    nonce, width = hashlib.blake2b(broadcast, digest_size=32).digest(), bits // 8
    output = gcm_keystream(seed, nonce, count * width)
    return [int.from_bytes(output[start : start + width], "little") for start in range(0, count * width, width)]


def masked(
    vector: Sequence[int], own: str, keys: dict[str, bytes], number: int, broadcast: bytes, bits: int
) -> list[int]:
    """Returns a site's masked vector, given its key with each peer."""
    result = list(vector)
    for peer, key in keys.items():
        sign = 1 if own < peer else -1
        residues = stream(round_seed(key, number), broadcast, len(vector), bits)
        result = [(entry + sign * residue) % 2**bits for entry, residue in zip(result, residues, strict=True)]
    return result


# The vectors


def _seed(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def vectors() -> dict[str, Any]:
    """Returns the run of four sites that `tests/vectors/masking.json` records."""
    run, study = "run-2024-7", "sha256:" + hashlib.sha256(b"a study").hexdigest()
    names = ["aachen", "bergen", "Cork", "delft-2"]
    identities = {name: _seed(f"identity of {name}") for name in names}
    privates = {name: _seed(f"agreement of {name}") for name in names}
    publics = {name: x25519_public(privates[name]) for name in names}
    sites = {
        name: {
            "identity": identities[name].hex(),
            "pinned": ed25519_public(identities[name]).hex(),
            "private": privates[name].hex(),
            "public": publics[name].hex(),
            "signature": ed25519_sign(identities[name], signed_text(run, study, name, publics[name])).hex(),
        }
        for name in names
    }
    keys: dict[str, dict[str, bytes]] = {
        name: {
            peer: pair_key(privates[name], [(name, publics[name]), (peer, publics[peer])], name, run)
            for peer in names
            if peer != name
        }
        for name in names
    }
    pairs = [
        {
            "sites": [one, other],
            "key": keys[one][other].hex(),
            "seeds": {str(number): round_seed(keys[one][other], number).hex() for number in (1, 15, 16, 40)},
        }
        for one in names
        for other in names
        if one < other
    ]
    rounds = []
    for number, bits, broadcast, length in [
        (1, 32, b"", 1),
        (2, 64, b"model", 3),
        (16, 32, b"model", 5),
        (40, 64, b"", 2),
    ]:
        plain = {
            name: [int.from_bytes(_seed(f"{name} {number} {entry}")[: bits // 8], "big") for entry in range(length)]
            for name in names
        }
        rounds.append(
            {
                "round": number,
                "bits": bits,
                "broadcast": broadcast.hex(),
                "plain": plain,
                "masked": {name: masked(plain[name], name, keys[name], number, broadcast, bits) for name in names},
                "sum": [sum(plain[name][entry] for name in names) % 2**bits for entry in range(length)],
            }
        )
    return {"run": run, "study_id": study, "sites": sites, "pairs": pairs, "rounds": rounds, **_bad(run, study, sites)}


def _bad(run: str, study: str, sites: dict[str, Any]) -> dict[str, Any]:
    """Returns key sets that each site must refuse, as lists of announcements, and a bad order of rounds."""

    def entry(name: str, **changes: str) -> dict[str, str]:
        known = {key: sites.get(name, {}).get(key, "") for key in ("public", "signature")}
        return {"run": run, "site": name} | known | changes

    def resigned(name: str, public: bytes, in_run: str = run, of_study: str = study, by: str = "") -> dict[str, str]:
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
        "bad_missing_site": good[:-1],
        "bad_extra_site": [*good, resigned("mallory", foreign, by=before)],
        "bad_listed_twice": [*good, good[-1]],
        "bad_repeated_key": with_last(resigned(last, own[before])),
        "bad_low_order_point": with_last(resigned(last, LOW_ORDER)),
        "bad_short_key": with_last(resigned(last, own[last][:31])),
        "bad_wrong_run": with_last(resigned(last, own[last], in_run="run-2024-6")),
        "bad_wrong_study": with_last(resigned(last, own[last], of_study="sha256:" + bytes(32).hex())),
        "bad_two_sites": good[:2],
        "bad_replayed_round": [1, 2, 2],
        "bad_earlier_round": [3, 2],
        "bad_round_zero": [0],
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(vectors(), indent=1) + "\n", encoding="utf-8")
