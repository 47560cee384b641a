"""What a secure sum needs of its arithmetic: protect a vector, add protected vectors, open the sum over the survivors.

Who may ask for what, and when, is `cohortium.secagg.protocol`'s; a scheme is values and arithmetic, for one run's
group and one round's length.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cohortium.core.errors import ProtocolError
from cohortium.core.random import Randomness
from cohortium.secagg.group import Group
from cohortium.secagg.quantise import Residues, residue_kind
from cohortium.secagg.shamir import PRIME, Words

Payload = NDArray[Any]
"""A protected vector, or a sum of such, as it travels."""
NO_SECRET: Words = np.empty((0, 0), np.uint16)
"""Where nothing is dealt."""


class Scheme(Protocol):
    """One way to protect vectors of a given length whose sums are `bits` bits wide.

    Attributes:
        group: the sites of the run.
        length: how many residues a vector has.
        bits: how wide their sums are.
        secret_shape: the shape of the secret that each site shares in a round; `(0, 0)` if there is none.
        opens: whether the survivors must help to open a sum. Otherwise it is open once every site has contributed.
        decrypted_by_sites: whether they need the sum itself for that.
        payload_bytes: the most bytes that a protected vector takes.
        answer_bytes: the most bytes that a site reveals to open a sum.
    """

    @property
    def group(self) -> Group: ...

    @property
    def length(self) -> int: ...

    @property
    def bits(self) -> int: ...

    @property
    def secret_shape(self) -> tuple[int, int]: ...

    @property
    def opens(self) -> bool: ...

    @property
    def decrypted_by_sites(self) -> bool: ...

    @property
    def payload_bytes(self) -> int: ...

    @property
    def answer_bytes(self) -> int: ...

    def protect(
        self, me: str, seeds: Mapping[str, bytes], context: bytes, vector: Residues, randomness: Randomness
    ) -> tuple[Payload, Words]:
        """Returns a site's protected vector, and the secret that it shares with the others.

        Args:
            seeds: the round's 32-byte seed with each peer.
            context: 32 public bytes that stand for run, key set, round and broadcast.
            randomness: for this round alone.

        Raises:
            ProtocolError: the vector has another length or type than the scheme's.
        """

    def add(self, total: Payload | None, payload: Payload) -> Payload:
        """Returns the sum of a total and one more payload; the total given is used up.

        Raises:
            ProtocolError: the payload has the wrong shape or type, or holds what no site can have sent.
        """

    def answer(self, me: str, survivors: tuple[str, ...], shares: Mapping[str, Words], total: Payload) -> NDArray[Any]:
        """Returns what a site reveals to open the sum over the survivors.

        Args:
            shares: this site's share of each survivor's secret.
            total: the sum, if sites decrypt it; else empty.
        """

    def check_answer(self, site: str, answer: NDArray[Any], survivors: tuple[str, ...]) -> None:
        """Checks that a site's answer has the shape and type of one.

        Raises:
            ProtocolError: it has not.
        """

    def open(
        self, context: bytes, total: Payload, survivors: tuple[str, ...], answers: Mapping[str, NDArray[Any]]
    ) -> Residues:
        """Returns the sum of the survivors' vectors, from at least `threshold` answers where `opens`.

        Raises:
            ProtocolError: the answers, each of them checked, contradict each other.
        """


def check_vector(vector: Residues, length: int, bits: int) -> None:
    """Raises a `ProtocolError` if a vector is not of the length and type that a scheme protects."""
    if vector.shape != (length,) or vector.dtype != residue_kind(bits):
        raise ProtocolError(f"a vector of shape {vector.shape} and type {vector.dtype} does not fit the study")


def check_shares(site: str, answer: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raises a `ProtocolError` if an array holds no shares of this shape."""
    if answer.shape != shape or answer.dtype != np.uint16 or (answer >= PRIME).any():
        raise ProtocolError(f"the answer of site '{site}' was refused: it holds no shares of this round's secrets")


def by_place(group: Group, answers: Mapping[str, Words]) -> dict[int, Words]:
    """Returns the answers by their sites' places in the group."""
    return {place: answers[site] for place, site in enumerate(group.sites) if site in answers}
