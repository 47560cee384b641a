"""Masking: each pair of sites agrees on a random vector, one adds it and the other takes it away; each adds its own.

    masked_i = x_i + PRG(b_i) + sum over j > i of PRG(k_ij) - sum over j < i of PRG(k_ij)      modulo 2^bits

k_ij comes from the pair's seed of this round and from what the coordinator broadcast (ADR 0004), b_i is site i's own
self mask. Site i deals shares of b_i and of all its k_ij to the others. For a survivor set U they then reveal their
shares of b_i for each i in U, and of k_ij for each i in U and j outside: never both of one site. So whatever arrives
late stays masked by b_j, and whoever is lost after contributing is not missed.

Where no dropouts are tolerated, there is no self mask and nothing is dealt: every site's vector is in the sum, or
there is no sum.

Source: Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 4 and
figure 4. There a site's long-term key is dealt beforehand; here keys that serve one round only are, together with
the vector that they mask, so that opening one round tells nothing of another and no round has to be repeated.

Trust: see `cohortium.secagg.group` for who may collude. Not covered: false inputs, refusing to serve, and what a sum
reveals.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cohortium.core.random import Randomness
from cohortium.secagg.group import Group
from cohortium.secagg.keys import purpose_key
from cohortium.secagg.quantise import Residues
from cohortium.secagg.scheme import NO_SECRET, Payload, by_place, check_shares, check_vector
from cohortium.secagg.shamir import SECRET_WORDS, Words, from_words, reconstruct, to_words
from cohortium.secagg.stream import PLAIN, Means, add_streams
from cohortium.secagg.wire import from_wire, sign_extended, to_wire


@dataclass(frozen=True)
class Masking:
    """The masking scheme for vectors of `length` residues that are `bits` bits wide."""

    group: Group
    length: int
    bits: int
    means: Means = PLAIN

    @property
    def opens(self) -> bool:
        return self.group.threshold < len(self.group.sites)

    @property
    def decrypted_by_sites(self) -> bool:
        return False

    @property
    def payload_bytes(self) -> int:
        return -(-self.length * self.bits // 8)

    @property
    def answer_bytes(self) -> int:
        # fewer survivors make larger answers: a row more for each of them that is lost
        sites, threshold = len(self.group.sites), self.group.threshold
        return 2 * SECRET_WORDS * threshold * (1 + sites - threshold) if self.opens else 0

    @property
    def secret_shape(self) -> tuple[int, int]:
        return (len(self.group.sites), SECRET_WORDS) if self.opens else (0, 0)

    def protect(
        self, me: str, seeds: Mapping[str, bytes], context: bytes, vector: Residues, randomness: Randomness
    ) -> tuple[Payload, Words]:
        check_vector(vector, self.length, self.bits)
        keys = {peer: purpose_key(seed, b"cohort mask", context) for peer, seed in seeds.items()}
        later = [keys[peer] for peer in keys if peer > me]
        earlier = [keys[peer] for peer in keys if peer < me]
        secret = NO_SECRET
        if self.opens:
            keys[me] = randomness.child("self mask").bytes(32)
            later.append(keys[me])
            # row i is the key with site i, and one's own row the self mask
            secret = to_words([keys[site] for site in self.group.sites])
        masked = vector.copy()
        add_streams(masked, later, earlier, self.means)
        return to_wire(masked, self.bits), secret

    def add(self, total: Payload | None, payload: Payload) -> Payload:
        residues = from_wire(payload, self.length, self.bits)
        if total is None:
            return residues.copy()
        total += residues
        return total

    def answer(self, me: str, survivors: tuple[str, ...], shares: Mapping[str, Words], total: Payload) -> Words:
        """Returns this site's shares of each survivor's self mask and of its keys with the lost sites.

        Shape `(survivors, 1 + lost, 18)`.
        """
        place = {site: row for row, site in enumerate(self.group.sites)}
        lost = [row for site, row in place.items() if site not in survivors]
        return np.stack([shares[site][[place[site], *lost]] for site in survivors])

    def check_answer(self, site: str, answer: NDArray[Any], survivors: tuple[str, ...]) -> None:
        lost = len(self.group.sites) - len(survivors)
        check_shares(site, answer, (len(survivors), 1 + lost, SECRET_WORDS))

    def open(
        self, context: bytes, total: Payload, survivors: tuple[str, ...], answers: Mapping[str, NDArray[np.uint16]]
    ) -> Residues:
        residues = total
        if self.opens:
            lost = [site for site in self.group.sites if site not in survivors]
            held = by_place(self.group, answers)
            add: list[bytes] = []
            subtract: list[bytes] = []
            for site, row in zip(survivors, reconstruct(held, self.group.threshold), strict=True):
                self_mask, *pair_keys = from_words(row)
                subtract.append(self_mask)
                for peer, key in zip(lost, pair_keys, strict=True):
                    (subtract if peer > site else add).append(key)
            residues = total.copy()
            add_streams(residues, add, subtract, self.means)
        return sign_extended(residues, self.bits)
