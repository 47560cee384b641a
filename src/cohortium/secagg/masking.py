"""Pairwise masking: each pair of sites agrees on a random vector, one adds it and the other takes it away.

    masked_i = x_i + sum over j > i of PRG(seed_ij) - sum over j < i of PRG(seed_ij)      modulo 2^bits

PRG(seed) is the AES-256-GCM keystream under the pair's seed of this round, and its nonce is a digest of what the
coordinator broadcast. So a coordinator that sends different models to different sites, to make all but one vector
predictable, opens nothing (the attack: Pasquini, Francati and Ateniese, "Eluding Secure Aggregation in Federated
Learning via Model Inconsistency", CCS 2022).

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4,
without its self masks: the sum opens only if every site of the run contributes.

Trust: whoever sees all messages and holds the secrets of c sites learns the sum over the other n - c sites, and that
is all, for n - c >= 2 and honest-but-curious or lying coordinators alike, given that identities are pinned and that
a site masks once in each round. Not covered: false inputs, refusing to serve, and what a sum reveals.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from msgspec.structs import replace

from cohortium.core.errors import ProtocolError
from cohortium.core.messages import Announcement
from cohortium.secagg.keys import pair_key
from cohortium.secagg.quantise import Bits, Residues

LEAST_SITES = 3
"""With two, each learns the other's vector from the sum."""

_ROUNDS_PER_BLOCK = 16
"""Seeds derived at a time. Each is its own stretch of HKDF output: knowing one tells nothing of the others."""
_CHUNK = 1 << 18
_TAG = 16
_ZEROS = bytes(_CHUNK)


class Masker(msgspec.Struct, frozen=True):
    """A site's half. `mask` returns a masked vector and the masker for the rounds after it.

    Attributes:
        keys: one key for each peer of this run, in the order of the peers' names.
        subtracted: the masks of this many peers, those whose names come earlier, are subtracted, the others added.
        last_round: the last round that was masked; a later one only is accepted.
        block, block_seeds: the stretch of rounds whose seeds are at hand, and those seeds, in one string for each peer.
    """

    bits: Bits
    keys: tuple[bytes, ...]
    subtracted: int
    last_round: int = 0
    block: int = -1
    block_seeds: tuple[bytes, ...] = ()

    def __repr__(self) -> str:
        # the rest is secret
        return f"Masker(bits={self.bits}, peers={len(self.keys)}, last_round={self.last_round})"

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
        blocks = self.block_seeds if block == self.block else tuple(_seed_block(key, block) for key in self.keys)
        nonce = broadcast_nonce(broadcast)
        seeds = [seeds[32 * place : 32 * (place + 1)] for seeds in blocks]
        masked = _masked(vector, seeds[: self.subtracted], seeds[self.subtracted :], nonce, self.bits)
        return masked, replace(self, last_round=round_number, block=block, block_seeds=blocks)


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


def broadcast_nonce(broadcast: bytes) -> bytes:
    """Returns the 32-byte nonce of a round's streams: BLAKE2b-256 of what the coordinator broadcast."""
    return hashlib.blake2b(broadcast, digest_size=32).digest()


def random_residues(seed: bytes, nonce: bytes, count: int, bits: Bits) -> Iterator[Residues]:
    """Yields `count` random residues in pieces: the AES-256-GCM keystream of a 32-byte seed under a 32-byte nonce.

    GCM hashes a nonce of this length with a key of its own, which only the holders of the seed know (NIST SP 800-38D,
    section 7.1), so two nonces give unrelated streams. A seed and a nonce give 64 GiB at most.
    """
    kind = _kind(bits)
    length = count * kind.itemsize
    encryptor = Cipher(algorithms.AES(seed), modes.GCM(nonce)).encryptor()
    stream = bytearray(_CHUNK + 15)
    zeros = memoryview(_ZEROS)
    for start in range(0, length, _CHUNK):
        piece = min(_CHUNK, length - start)
        encryptor.update_into(zeros[:piece], stream)
        yield np.frombuffer(stream, kind, piece // kind.itemsize)


def _masked(vector: Residues, subtract: Sequence[bytes], add: Sequence[bytes], nonce: bytes, bits: Bits) -> Residues:
    if vector.nbytes * (len(subtract) + len(add)) <= _CHUNK:
        return _masked_at_once(vector, subtract, add, nonce, bits)
    masked = vector.copy()
    for operation, seeds in ((np.subtract, subtract), (np.add, add)):
        for seed in seeds:
            start = 0
            for stream in random_residues(seed, nonce, len(vector), bits):
                part = masked[start : start + len(stream)]
                operation(part, stream, out=part)
                start += len(stream)
    return masked


def _masked_at_once(
    vector: Residues, subtract: Sequence[bytes], add: Sequence[bytes], nonce: bytes, bits: Bits
) -> Residues:
    """Does what `_masked` does for short vectors, where calls cost more than arithmetic: one sum for each sign."""
    zeros, kind = _ZEROS[: vector.nbytes], _kind(bits)
    streams = b"".join([AESGCM(seed).encrypt(nonce, zeros, None) for seed in (*subtract, *add)])
    rows = np.frombuffer(streams, np.uint8).reshape(-1, vector.nbytes + _TAG)[:, : vector.nbytes].view(kind)
    less, more = rows[: len(subtract)], rows[len(subtract) :]
    masked: Residues = vector + np.add.reduce(more, dtype=kind) - np.add.reduce(less, dtype=kind)
    return masked


def _kind(bits: Bits) -> "np.dtype[np.unsignedinteger[Any]]":
    return np.dtype(np.uint32 if bits == 32 else np.uint64)


def _seed_block(key: bytes, block: int) -> bytes:
    info = b"cohortium round seeds v1" + block.to_bytes(8, "big")
    return HKDFExpand(hashes.SHA256(), 32 * _ROUNDS_PER_BLOCK, info).derive(key)
