"""Pairwise masking: each pair of sites agrees on a random vector, one adds it and the other takes it away.

    masked_i = x_i + sum over j > i of PRG(seed_ij) - sum over j < i of PRG(seed_ij)      modulo 2^bits

PRG(seed) is AES-256 in counter mode, keyed by the pair's seed of this round and by a digest of what the coordinator
broadcast. So a coordinator that sends different models to different sites, to make all but one vector predictable
(Pasquini, Francati and Ateniese, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", CCS 2022),
opens nothing.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4,
without its self masks: the sum opens only if every site of the run contributes.

Trust: whoever sees all messages and holds the secrets of c sites learns the sum over the other n - c sites, and that
is all, for n - c >= 2 and honest-but-curious or lying coordinators alike, given that identities are pinned and that
a site masks once in each round. Not covered: false inputs, refusing to serve, and what a sum reveals.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.secagg.keys import pair_key
from cohortium.secagg.quantise import Bits, Residues

LEAST_SITES = 3
"""With two, each learns the other's vector from the sum."""

_ROUNDS_PER_BLOCK = 16
"""Seeds derived at a time. Each is its own stretch of HKDF output: knowing one tells nothing of the others."""
_CHUNK = 1 << 18
_ZEROS = bytes(_CHUNK)
_COUNTER = bytes(15) + b"\x02"


@dataclass(frozen=True)
class Masker:
    """A site's half. `mask` returns a masked vector and the masker for the rounds after it.

    Attributes:
        keys: one key for each peer of this run, in the order of the peers' names.
        subtracted: the masks of this many peers, those whose names come earlier, are subtracted, the others added.
        last_round: the last round that was masked; a later one only is accepted.
    """

    bits: Bits
    keys: tuple[bytes, ...] = field(repr=False)
    subtracted: int
    last_round: int = 0
    _block: int = -1
    _blocks: tuple[bytes, ...] = field(default=(), repr=False)

    def mask(self, round_number: int, broadcast: bytes, vector: Residues) -> "tuple[Residues, Masker]":
        """Returns the masked vector, same shape and type, and the next masker.

        Args:
            broadcast: what the coordinator sent for this round. The masks depend on it: if two sites were sent
                different bytes, theirs do not cancel, and the sum is noise.

        Raises:
            ProtocolError: the round is not later than the last one: masking twice with one seed would reveal the
                difference of two vectors.
        """
        if round_number <= self.last_round:
            raise ProtocolError(f"round {round_number} was refused: round {self.last_round} is already masked")
        block, place = divmod(round_number, _ROUNDS_PER_BLOCK)
        blocks = self._blocks if block == self._block else tuple(_seed_block(key, block) for key in self.keys)
        digest = hashlib.blake2b(broadcast, digest_size=32).digest()
        seeds = [stream_key(seeds[32 * place : 32 * (place + 1)], digest) for seeds in blocks]
        masked = _masked(vector, seeds[: self.subtracted], seeds[self.subtracted :], self.bits)
        return masked, replace(self, last_round=round_number, _block=block, _blocks=blocks)


def masker(private: X25519PrivateKey, mine: Announcement, announcements: Sequence[Announcement], bits: Bits) -> Masker:
    """Returns the masker of one run, from the site's own secret and all announcements, already checked.

    Raises:
        ProtocolError: fewer than three sites, a malformed key, or one's own announcement is not among them.
    """
    if mine not in announcements:
        raise ProtocolError("the key set was refused: it lacks the key that this site announced")
    if len(announcements) < LEAST_SITES:
        raise ProtocolError(f"a secure sum over {len(announcements)} sites was refused: it takes {LEAST_SITES}")
    peers = sorted((peer for peer in announcements if peer.site != mine.site), key=lambda peer: peer.site)
    keys = tuple(pair_key(private, mine, peer) for peer in peers)
    return Masker(bits, keys, sum(peer.site < mine.site for peer in peers))


def stream_key(seed: bytes, digest: bytes) -> bytes:
    """Returns the AES-256 key of a pair's stream for one round and one broadcast.

    Source: NIST SP 800-56C rev. 2, one-step key derivation with SHA-256: counter 1, the secret, the public part.
    """
    return hashlib.sha256(b"\x00\x00\x00\x01" + seed + digest).digest()


def random_residues(key: bytes, count: int, bits: Bits) -> Iterator[Residues]:
    """Yields `count` random residues of a 32-byte key, in pieces: AES-256-CTR from counter block 0^12 || 00000002."""
    kind = _kind(bits)
    length = count * kind.itemsize
    if length <= _CHUNK:
        yield np.frombuffer(_short_stream(key, length), kind)
        return
    encryptor = Cipher(algorithms.AES(key), modes.CTR(_COUNTER)).encryptor()
    stream = bytearray(_CHUNK)
    zeros = memoryview(_ZEROS)
    for start in range(0, length, _CHUNK):
        piece = min(_CHUNK, length - start)
        encryptor.update_into(zeros[:piece], stream)
        yield np.frombuffer(stream, kind, piece // kind.itemsize)


def _masked(vector: Residues, subtract: Sequence[bytes], add: Sequence[bytes], bits: Bits) -> Residues:
    if vector.nbytes * (len(subtract) + len(add)) <= _CHUNK:
        # for short vectors the calls cost more than the arithmetic: sum all streams of a sign at once
        kind = _kind(bits)
        streams = b"".join([_short_stream(key, vector.nbytes) for key in (*subtract, *add)])
        rows = np.frombuffer(streams, kind).reshape(len(subtract) + len(add), len(vector))
        less, more = rows[: len(subtract)], rows[len(subtract) :]
        masked: Residues = vector + more.sum(axis=0, dtype=kind) - less.sum(axis=0, dtype=kind)
        return masked
    masked = vector.copy()
    for operation, keys in ((np.subtract, subtract), (np.add, add)):
        for key in keys:
            start = 0
            for stream in random_residues(key, len(vector), bits):
                part = masked[start : start + len(stream)]
                operation(part, stream, out=part)
                start += len(stream)
    return masked


def _short_stream(key: bytes, length: int) -> bytes:
    # GCM under a zero nonce encrypts with exactly this counter sequence, in one call without set-up
    return AESGCM(key).encrypt(_COUNTER[:12], _ZEROS[:length], None)[:length]


def _kind(bits: Bits) -> "np.dtype[np.unsignedinteger[Any]]":
    return np.dtype(np.uint32 if bits == 32 else np.uint64)


def _seed_block(key: bytes, block: int) -> bytes:
    info = b"cohortium round seeds v1" + block.to_bytes(8, "big")
    return HKDFExpand(hashes.SHA256(), 32 * _ROUNDS_PER_BLOCK, info).derive(key)
