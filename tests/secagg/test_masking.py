"""Masks that leave the survivors' sum and nothing else, bit for bit as an implementation of its own has them."""

import importlib.util
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from cohortium.core.errors import ProtocolError, Repeated
from cohortium.core.messages import Announcement, Endorsed, Endorsement, MaskedUpdate, Reveal, Survivors
from cohortium.core.random import Randomness
from cohortium.secagg.group import Group, tolerance
from cohortium.secagg.keys import Pairs, agree, purpose_key, round_context
from cohortium.secagg.masking import Masking
from cohortium.secagg.protocol import NO_TOTAL, Member, Tally
from cohortium.secagg.shamir import PRIME, reconstruct
from cohortium.secagg.stream import Means, add_streams, in_turn
from cohortium.secagg.wire import packed_length

WIDTHS = (12, 16, 25, 32, 64)
SEGMENT, BLOCK, AT_ONCE = 1 << 20, 1 << 17, 1 << 18
IDENTITY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def load_reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("masking_reference", Path(__file__).with_name("reference.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_reference()
VECTORS: dict[str, Any] = json.loads(reference.VECTORS.read_text(encoding="utf-8"))


def unsigned(bits: int) -> np.dtype[Any]:
    return np.dtype(f"<u{reference.kind_bits(bits) // 8}")


def plain_vector(length: int, bits: int, seed: int) -> np.ndarray:
    """Returns numbers of any sign that fit the width, as residues."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    kind = unsigned(bits)
    return np.random.default_rng(seed).integers(low, high, length, dtype=f"<i{kind.itemsize}").view(kind)


def plain_sum(vectors: Iterable[np.ndarray], bits: int) -> np.ndarray:
    """Returns the sum modulo 2^bits, as a two's complement number of the whole type."""
    vectors = list(vectors)
    total = np.add.reduce(vectors, dtype=vectors[0].dtype)
    spare = 8 * total.itemsize - bits
    scaled = total << total.dtype.type(spare)
    return (scaled.view(f"<i{total.itemsize}") >> spare).view(total.dtype)


def looks_uniform(values: np.ndarray, bits: int) -> bool:
    """Whether the low bits of many values are ones and zeros equally often, and no value is common."""
    entries = values.view(unsigned(bits)) & unsigned(bits).type(2**bits - 1)
    digits = np.unpackbits(np.ascontiguousarray(entries).view(np.uint8)).mean() * (8 * values.itemsize / bits)
    _, counts = np.unique(entries, return_counts=True)
    expected = len(values) / 2**bits
    return bool(abs(digits - 0.5) < 3 / math.sqrt(len(values) * bits) and counts.max() < 8 + 4 * expected)


# Groups of sites, whose keys are agreed once


@cache
def pool() -> tuple[tuple[str, ...], Mapping[frozenset[str], bytes]]:
    """Returns fifty sites and the key of each pair. What is agreed by two sites does not depend on the others."""
    names = tuple(sorted(f"{chr(97 + index * 7 % 26)}{index}" for index in range(50)))
    privates = {name: X25519PrivateKey.from_private_bytes(sha256(name.encode()).digest()) for name in names}
    entries = {
        name: Announcement("run", name, key.public_key().public_bytes_raw(), b"") for name, key in privates.items()
    }
    keys = {}
    for place, name in enumerate(names):
        pairs = agree(privates[name], entries[name], [entries[name], *(entries[peer] for peer in names[place + 1 :])])
        keys.update({frozenset({name, peer}): key for peer, key in zip(pairs.peers, pairs.keys, strict=True)})
    return names, keys


@cache
def federation(count: int, threshold: int) -> tuple[Member, ...]:
    names, keys = pool()
    group = Group(names[:count], threshold)
    public = IDENTITY.public_key().public_bytes_raw()
    session = sha256(f"{count} {threshold}".encode()).digest()
    return tuple(
        Member(
            "run",
            name,
            group,
            Pairs(group.peers(name), tuple(keys[frozenset({name, peer})] for peer in group.peers(name))),
            session,
            public,
        )
        for name in group.sites
    )


Protected = dict[str, tuple[MaskedUpdate, Member]]


def protect(
    members: Sequence[Member], bits: int, vectors: Sequence[np.ndarray], number: int = 1, means: Means | None = None
) -> Protected:
    scheme = Masking(members[0].group, len(vectors[0]), bits, means or Means())
    return {
        member.me: member.protect(number, b"model", scheme, vector, Randomness.of_seed(seed))
        for seed, (member, vector) in enumerate(zip(members, vectors, strict=True))
    }


def start(members: Sequence[Member], bits: int, length: int, number: int = 1, means: Means | None = None) -> Tally:
    scheme = Masking(members[0].group, length, bits, means or Means())
    return Tally("run", number, scheme, round_context(members[0].session, number, b"model"))


def contributed(tally: Tally, made: Protected, sites: Iterable[str]) -> Tally:
    for site in sites:
        tally = tally.contribute(made[site][0])
    return tally


def revealed(tally: Tally, made: Protected, endorsers: Iterable[str]) -> tuple[Tally, dict[str, Reveal]]:
    """Closes a tally, lets some survivors endorse, and returns what each of those would reveal."""
    tally, sets = tally.close(IDENTITY)
    later = {}
    for site in endorsers:
        endorsement, later[site] = made[site][1].endorse(sets[site])
        tally = tally.endorse(endorsement)
    return tally, {site: later[site].reveal(message)[0] for site, message in tally.endorsed().items()}


def opened(tally: Tally, reveals: Iterable[Reveal]) -> np.ndarray:
    for message in reveals:
        tally = tally.reveal(message)
    return tally.opened()


def subsets(sites: Sequence[str], least: int) -> list[tuple[str, ...]]:
    return [one for size in range(least, len(sites) + 1) for one in itertools.combinations(sites, size)]


SMALL = [(count, threshold) for count in range(3, 7) for threshold in range(3, count + 1) if 2 * threshold > count]


class TestSum:
    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize(("count", "threshold"), SMALL)
    def test_every_way_to_drop_out(self, count: int, threshold: int, bits: int) -> None:
        """Each set that contributes, each part of it that endorses, each part of that which answers."""
        members = federation(count, threshold)
        vectors = [plain_vector(5, bits, 100 * count + place) for place in range(count)]
        made, names = protect(members, bits, vectors), members[0].group.sites
        for survivors in subsets(names, threshold):
            expected = plain_sum([vectors[names.index(site)] for site in survivors], bits)
            tally = contributed(start(members, bits, 5), made, survivors)
            if threshold == count:
                assert np.array_equal(tally.opened(), expected)
                continue
            # larger groups' endorsers are all survivors, or one of the smallest sets
            some = subsets(survivors, threshold) if count < 6 else [survivors, survivors[-threshold:]]
            for endorsers in some:
                closed, reveals = revealed(tally, made, endorsers)
                for answering in subsets(endorsers, threshold):
                    assert np.array_equal(opened(closed, [reveals[site] for site in answering]), expected)

    @pytest.mark.parametrize(("count", "threshold"), SMALL)
    def test_fewer_than_the_threshold_open_nothing(self, count: int, threshold: int) -> None:
        members = federation(count, threshold)
        vectors = [plain_vector(5, 32, place) for place in range(count)]
        made, names = protect(members, 32, vectors), members[0].group.sites
        for survivors in [one for one in subsets(names, 0) if len(one) < threshold]:
            tally = contributed(start(members, 32, 5), made, survivors)
            with pytest.raises(ProtocolError, match=rf"{len(survivors)} sites contributed and it takes {threshold}"):
                tally.close(IDENTITY)
            with pytest.raises(ProtocolError, match="the sum stays closed"):
                tally.opened()
        if threshold == count:
            return
        tally, sets = contributed(start(members, 32, 5), made, names).close(IDENTITY)
        for site in names[: threshold - 1]:
            tally = tally.endorse(made[site][1].endorse(sets[site])[0])
        with pytest.raises(ProtocolError, match=f"{threshold - 1} sites endorsed, and it takes {threshold}"):
            tally.endorsed()
        closed, reveals = revealed(contributed(start(members, 32, 5), made, names), made, names)
        for answering in [one for one in subsets(names, 0) if len(one) < threshold]:
            with pytest.raises(ProtocolError, match=f"{len(answering)} sites answered, and it takes {threshold}"):
                opened(closed, [reveals[site] for site in answering])

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_any_group(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(3, 50), label="sites")
        most = min(count - 3, (count - 1) // 2)
        dropouts = data.draw(st.integers(0, most), label="dropouts")
        bits, number = data.draw(st.sampled_from(WIDTHS)), data.draw(st.integers(1, 10**9), label="round")
        length = data.draw(st.integers(0, 300), label="length")
        threshold = tolerance(count, dropouts).threshold
        members = federation(count, threshold)
        names = members[0].group.sites
        lost = data.draw(st.sets(st.sampled_from(names), max_size=dropouts), label="lost")
        survivors = [site for site in names if site not in lost]
        late = dropouts - len(lost)
        silent = data.draw(st.sets(st.sampled_from(survivors), max_size=late), label="silent")
        endorsers = [site for site in survivors if site not in silent]
        vectors = [plain_vector(length, bits, number % 1000 + place) for place in range(count)]
        made = protect(members, bits, vectors, number)
        # contributions and answers arrive in any order
        tally = contributed(start(members, bits, length, number), made, data.draw(st.permutations(survivors)))
        expected = plain_sum([vectors[names.index(site)] for site in survivors], bits)
        if not dropouts:
            assert np.array_equal(tally.opened(), expected)
            return
        closed, reveals = revealed(tally, made, endorsers)
        order = data.draw(st.permutations(endorsers))[: data.draw(st.integers(threshold, len(endorsers)))]
        assert np.array_equal(opened(closed, [reveals[site] for site in order]), expected)

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize("threshold", [3, 4, 5])
    def test_lengths_at_which_streams_are_cut(self, bits: int, threshold: int) -> None:
        members, size = federation(5, threshold), unsigned(bits).itemsize
        names = members[0].group.sites
        survivors = names[5 - threshold :]
        lengths = [0, 1, 2, 7, 8, 9]
        lengths += [
            places // size + more for places in (AT_ONCE // 5, AT_ONCE // 4, BLOCK, SEGMENT) for more in (-1, 0, 1)
        ]
        # residues that fill no whole bytes are packed so many at a time
        lengths += [(1 << 16) - 1, 1 << 16, (1 << 16) + 1]
        for length in lengths:
            vectors = [plain_vector(length, bits, place) for place in range(5)]
            made = protect(members, bits, vectors)
            assert all(len(update.values) == packed_length(length, bits) for update, _ in made.values())
            tally = contributed(start(members, bits, length), made, survivors)
            expected = plain_sum([vectors[names.index(site)] for site in survivors], bits)
            if threshold < 5:
                tally, reveals = revealed(tally, made, survivors)
                found = opened(tally, reveals.values())
            else:
                found = tally.opened()
            assert np.array_equal(found, expected), length

    def test_a_machines_means_change_nothing(self) -> None:
        members, length = federation(4, 3), SEGMENT // 2 + 3
        vectors = [plain_vector(length, 32, place) for place in range(4)]
        names = members[0].group.sites
        payloads, sums = set(), set()
        for means in (Means(), Means("gcm"), Means("gcm", in_turn, 3), Means("ctr", in_turn, 2)):
            made = protect(members, 32, vectors, means=means)
            payloads.add(tuple(sha256(update.values.tobytes()).digest() for update, _ in made.values()))
            tally, reveals = revealed(
                contributed(start(members, 32, length, means=means), made, names[1:]), made, names[1:]
            )
            sums.add(opened(tally, reveals.values()).tobytes())
        assert len(payloads) == 1
        assert sums == {plain_sum(vectors[1:], 32).tobytes()}

    @pytest.mark.parametrize("threshold", [3, 4])
    def test_what_is_given_stays_as_it_was(self, threshold: int) -> None:
        members = federation(4, threshold)
        for length in (5, AT_ONCE // 4 + 1):
            vectors = [plain_vector(length, 32, place) for place in range(4)]
            kept = [vector.copy() for vector in vectors]
            for vector in vectors:
                vector.flags.writeable = False
            made = protect(members, 32, vectors)
            sent = {site: update.values.tobytes() for site, (update, _) in made.items()}
            tally = contributed(start(members, 32, length), made, made)
            if threshold < 4:
                tally, reveals = revealed(tally, made, made)
                assert np.array_equal(opened(tally, reveals.values()), opened(tally, list(reveals.values())[1:]))
            else:
                tally.opened()
            assert all(np.array_equal(one, other) for one, other in zip(vectors, kept, strict=True))
            assert {site: update.values.tobytes() for site, (update, _) in made.items()} == sent


LENGTH = 4000


@cache
def of_zeros(count: int, threshold: int, bits: int) -> tuple[Protected, dict[str, np.ndarray], Tally]:
    """Returns a round in which every vector is zero: the contributions, as residues, and a fresh tally."""
    members = federation(count, threshold)
    made = protect(members, bits, [np.zeros(LENGTH, unsigned(bits))] * count)
    tally = start(members, bits, LENGTH)
    payloads = {site: tally.scheme.add(None, update.values) for site, (update, _) in made.items()}
    return made, payloads, tally


def mask_keys(site: str, made: Protected) -> dict[str, bytes]:
    """Returns a site's mask keys with its peers; without dropouts a member keeps no round open."""
    member = made[site][1]
    context = round_context(member.session, 1, b"model")
    return {
        peer: purpose_key(seed, b"cohort mask", context) for peer, seed in member.pairs.at(1).round_seeds(1).items()
    }


def total_of(vectors: Iterable[np.ndarray]) -> np.ndarray:
    vectors = list(vectors)
    return np.add.reduce(vectors, dtype=vectors[0].dtype)


class TestSecrecy:
    """All vectors are zero, so that whatever is not masked shows."""

    @pytest.mark.parametrize("bits", WIDTHS)
    @pytest.mark.parametrize(("count", "threshold"), [(4, 3), (4, 4), (5, 3)])
    def test_no_part_of_the_contributions_opens_anything(self, count: int, threshold: int, bits: int) -> None:
        _, payloads, _ = of_zeros(count, threshold, bits)
        for size in range(1, count + 1):
            for chosen in itertools.combinations(payloads, size):
                total = total_of(payloads[site] for site in chosen)
                if threshold == count == size:
                    assert not (total & total.dtype.type(2**bits - 1)).any()
                else:
                    assert looks_uniform(total, bits), chosen

    @pytest.mark.parametrize("threshold", [3, 4])
    def test_keys_of_all_pairs_but_one(self, threshold: int) -> None:
        """Streams of all pairs but one are taken away: the two sites of that pair stay masked."""
        made, payloads, _ = of_zeros(4, threshold, 32)
        names = list(made)
        for one, other in itertools.combinations(names, 2):
            for site in (one, other):
                left = payloads[site].copy()
                keys = {peer: key for peer, key in mask_keys(site, made).items() if peer not in (one, other)}
                self.unmask(left, site, keys)
                assert looks_uniform(left, 32)

    def test_all_pair_keys_leave_the_self_mask(self) -> None:
        made, payloads, _ = of_zeros(4, 3, 32)
        for site in made:
            left = payloads[site].copy()
            self.unmask(left, site, mask_keys(site, made))
            assert looks_uniform(left, 32)
            own = Randomness.of_seed(list(made).index(site)).child("self mask").bytes(32)
            add_streams(left, [], [own])
            assert not left.any()

    @staticmethod
    def unmask(vector: np.ndarray, site: str, keys: Mapping[str, bytes]) -> None:
        later = [key for peer, key in keys.items() if peer > site]
        add_streams(vector, [key for peer, key in keys.items() if peer < site], later)

    def test_what_opens_one_set_opens_no_other(self) -> None:
        """The answers for a set, used on every other sum that the coordinator could form."""
        made, payloads, fresh = of_zeros(5, 3, 32)
        names = list(made)
        for survivors in subsets(names, 3):
            tally, reveals = revealed(contributed(fresh, made, survivors), made, survivors)
            answers = {site: message.answer for site, message in reveals.items()}
            for chosen in subsets(names, 1):
                total = total_of(payloads[site] for site in chosen)
                found = tally.scheme.open(tally.context, total, survivors, answers)
                if chosen == survivors:
                    assert not found.any()
                else:
                    assert looks_uniform(found, 32), (survivors, chosen)

    def test_fewer_answers_give_other_keys(self) -> None:
        made, payloads, fresh = of_zeros(5, 3, 32)
        names = tuple(made)
        tally, reveals = revealed(contributed(fresh, made, names), made, names)
        too_few = Masking(Group(names, 3), LENGTH, 32)
        for pair in itertools.combinations(range(5), 2):
            held = {place: reveals[names[place]].answer for place in pair}
            guessed = reconstruct(held, 2)
            truth = reconstruct({place: reveals[names[place]].answer for place in range(3)}, 3)
            assert np.mean(guessed == truth) < 0.05
        with pytest.raises(ProtocolError, match="2 shares were given, and it takes 3"):
            too_few.open(tally.context, payloads[names[0]], names, {site: reveals[site].answer for site in names[:2]})

    @pytest.mark.parametrize(("count", "threshold"), [case for case in SMALL if case[0] > case[1]])
    def test_never_both_shares_of_one_peer(self, count: int, threshold: int) -> None:
        """Each row that a site holds is looked for in its answer: own rows of survivors, their keys with the lost."""
        members = federation(count, threshold)
        made = protect(members, 16, [plain_vector(3, 16, place) for place in range(count)])
        names = members[0].group.sites
        for survivors in subsets(names, threshold):
            tally, sets = contributed(start(members, 16, 3), made, survivors).close(IDENTITY)
            later = {}
            for site in survivors:
                endorsement, later[site] = made[site][1].endorse(sets[site])
                tally = tally.endorse(endorsement)
            messages = tally.endorsed()
            for site in survivors:
                held = {
                    (owner, peer): row.tobytes()
                    for owner, share in later[site].rounds[1].shares.items()
                    for peer, row in zip(names, share, strict=True)
                }
                assert len(set(held.values())) == len(held)
                answer = later[site].reveal(messages[site])[0].answer
                shown = {row.tobytes() for row in answer.reshape(-1, 18)}
                found = {place for place, row in held.items() if row in shown}
                self_masks = {owner for owner, peer in found if owner == peer}
                pairs = {frozenset(pair) for pair in found if pair[0] != pair[1]}
                assert self_masks == set(survivors)
                lost = set(names) - set(survivors)
                assert pairs == {frozenset({one, other}) for one in survivors for other in lost}
                # a peer's self mask is shown, or its keys with survivors are
                assert all((peer in self_masks) != (peer in lost) for peer in names)
                assert len(shown) == len(found) == len(survivors) * (1 + len(lost))

    def test_other_rounds_and_sites_have_other_masks(self) -> None:
        seen = set()
        zeros = np.zeros(8, np.uint64)
        for threshold in (3, 4):
            for seed, member in enumerate(federation(4, threshold)):
                scheme = Masking(member.group, 8, 64)
                for number in range(1, 40):
                    update, member = member.protect(number, b"model", scheme, zeros, Randomness.of_seed(seed))
                    seen.update(update.values.tolist())
        assert len(seen) == 2 * 4 * 39 * 8

    @pytest.mark.parametrize("threshold", [3, 4])
    def test_sites_with_different_broadcasts_have_nothing_in_common(self, threshold: int) -> None:
        made, payloads, fresh = of_zeros(4, threshold, 32)
        *others, last = federation(4, threshold)
        scheme = Masking(last.group, LENGTH, 32)
        update, _ = last.protect(1, b"modem", scheme, np.zeros(LENGTH, np.uint32), Randomness.of_seed(3))
        total = total_of([*(payloads[site.me] for site in others), update.values])
        assert looks_uniform(total, 32)
        if threshold == 4:
            return
        # and it cannot take its share in a sum over the others' context
        odd = {**made, last.me: (update, made[last.me][1])}
        _, sets = contributed(fresh, odd, odd).close(IDENTITY)
        with pytest.raises(ProtocolError, match=f"a share of site '{last.me}' was refused: it was altered"):
            made[others[0].me][1].endorse(sets[others[0].me])


class TestRefusals:
    @pytest.mark.parametrize("threshold", [3, 4])
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_a_vector_of_another_length_or_type(self, bits: int, threshold: int) -> None:
        member, kind = federation(4, threshold)[0], unsigned(bits)
        scheme = Masking(member.group, 5, bits)
        wrong: list[Any] = [
            np.zeros(4, kind),
            np.zeros(6, kind),
            np.zeros((5, 1), kind),
            np.zeros(5, f"<i{kind.itemsize}"),
        ]
        wrong += [np.zeros(5, other) for other in ("<u1", "<u2", "<u4", "<u8", "<f8") if np.dtype(other) != kind]
        for vector in wrong:
            with pytest.raises(ProtocolError, match="does not fit the study"):
                member.protect(1, b"model", scheme, vector, Randomness.of_seed(1))
        assert member.protect(1, b"model", scheme, np.zeros(5, kind), Randomness.of_seed(1))[1].last_round == 1

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_a_payload_of_another_length_or_type(self, bits: int) -> None:
        made = protect(federation(4, 3), bits, [plain_vector(5, bits, place) for place in range(4)])
        scheme = Masking(Group(tuple(made), 3), 5, bits)
        values = next(iter(made.values()))[0].values
        before = scheme.add(None, values)
        kept = before.copy()
        for wrong in (values[:-1], np.append(values, values[:1]), values.reshape(-1, 1), values.astype(np.float64)):
            for total in (None, before):
                with pytest.raises(ProtocolError, match="carries no such residues"):
                    scheme.add(total, wrong)
        assert np.array_equal(before, kept)

    def test_answers_that_are_none(self) -> None:
        made, _, fresh = of_zeros(4, 3, 32)
        survivors = tuple(made)[1:]
        tally, reveals = revealed(contributed(fresh, made, survivors), made, survivors)
        liar, answer = survivors[1], reveals[survivors[1]].answer
        assert answer.shape == (3, 2, 18)
        beyond = answer.copy()
        beyond[2, 1, 17] = PRIME
        for wrong in (
            beyond,
            answer[:-1],
            answer[:, :1],
            answer.reshape(-1),
            answer.astype(np.uint32),
            answer[..., :17],
        ):
            with pytest.raises(ProtocolError, match=f"the answer of site '{liar}' was refused: it holds no shares"):
                tally.scheme.check_answer(liar, wrong, survivors)
            with pytest.raises(ProtocolError, match=f"the answer of site '{liar}' was refused: it holds no shares"):
                structs.replace(tally, answers={}).reveal(structs.replace(reveals[liar], answer=wrong))

    def test_a_false_answer_is_noticed_if_one_is_to_spare(self) -> None:
        made, payloads, fresh = of_zeros(4, 3, 32)
        survivors = tuple(made)
        tally, reveals = revealed(contributed(fresh, made, survivors), made, survivors)
        answers = {site: message.answer for site, message in reveals.items()}
        total = total_of(payloads.values())
        for liar in survivors:
            false = answers[liar].copy()
            false[1, 0, 3] ^= 1
            with pytest.raises(ProtocolError, match="at least one site gave a false one"):
                tally.scheme.open(tally.context, total, survivors, {**answers, liar: false})


class TestScheme:
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_what_it_says_of_itself(self, bits: int) -> None:
        for threshold in (3, 4, 5):
            scheme = Masking(federation(5, threshold)[0].group, 11, bits)
            assert scheme.opens == (threshold < 5)
            assert not scheme.decrypted_by_sites
            assert scheme.secret_shape == ((5, 18) if threshold < 5 else (0, 0))
            assert scheme.payload_bytes == (11 * bits + 7) // 8
            update, _ = protect(federation(5, threshold), bits, [np.zeros(11, unsigned(bits))] * 5)["a0"]
            assert update.values.nbytes == scheme.payload_bytes
            assert [len(text) for text in update.sealed] == ([5 * 18 * 2 + 16] * 4 if threshold < 5 else [])

    def test_no_secret_is_shown(self) -> None:
        members = federation(4, 3)
        made = protect(members, 32, [plain_vector(4, 32, place) for place in range(4)])
        _, sets = contributed(start(members, 32, 4), made, made).close(IDENTITY)
        for site, (_, member) in made.items():
            _, later = member.endorse(sets[site])
            pending = later.rounds[1]
            secrets = [*member.pairs.keys, *pending.seeds.values(), *mask_keys(site, made).values()]
            secrets += [row.tobytes() for share in pending.shares.values() for row in share]
            assert len(secrets) == 3 + 3 + 3 + 4 * 4
            for shown in (member, later, later.pairs, pending, {"rounds": later.rounds}):
                text = repr(shown) + str(shown)
                for secret in secrets:
                    assert repr(secret)[2:14] not in text
                    assert secret.hex()[:12] not in text
                    assert str(list(secret[:4]))[1:-1] not in text


# The project's own vectors


ROUNDS = VECTORS["rounds"]
NAMES = list(VECTORS["sites"])


def by_round(entry: dict[str, Any]) -> str:
    return f"round-{entry['round']}"


@cache
def recorded_member(name: str, threshold: int) -> Member:
    entries = [
        Announcement(VECTORS["run"], site, bytes.fromhex(entry["public"]), bytes.fromhex(entry["signature"]))
        for site, entry in VECTORS["sites"].items()
    ]
    private = X25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["sites"][name]["private"]))
    pairs = agree(private, next(entry for entry in entries if entry.site == name), entries)
    return Member(
        VECTORS["run"],
        name,
        Group(tuple(NAMES), threshold),
        pairs,
        bytes.fromhex(VECTORS["sessions"][str(threshold)]),
        bytes.fromhex(VECTORS["coordinator"]["pinned"]),
    )


def recorded_protect(name: str, entry: dict[str, Any]) -> tuple[MaskedUpdate, Member]:
    kind, plain = unsigned(entry["bits"]), entry["plain"][name]
    vector = np.array(plain, f"<i{kind.itemsize}").view(kind)
    member = recorded_member(name, entry["threshold"])
    scheme = Masking(member.group, len(plain), entry["bits"])
    randomness = Randomness(bytes.fromhex(entry["randomness"][name]))
    return member.protect(entry["round"], entry["broadcast"].encode(), scheme, vector, randomness)


def recorded_tally(entry: dict[str, Any]) -> Tally:
    scheme = Masking(Group(tuple(NAMES), entry["threshold"]), len(entry["sum"]), entry["bits"])
    return Tally(VECTORS["run"], entry["round"], scheme, bytes.fromhex(entry["context"]))


COORDINATOR = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["coordinator"]["identity"]))
WITH_DROPOUTS = [entry for entry in ROUNDS if "signature" in entry]


class TestVectors:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("entry", ROUNDS, ids=by_round)
    def test_contributions(self, entry: dict[str, Any], name: str) -> None:
        update, later = recorded_protect(name, entry)
        assert (update.run, update.site, update.round) == (VECTORS["run"], name, entry["round"])
        assert update.values.tobytes().hex() == entry["payloads"][name]
        sealed = [text.hex() for text in update.sealed]
        assert sealed == list(entry.get("sealed", {}).get(name, {}).values())
        if sealed:
            pending = later.rounds[entry["round"]]
            assert pending.context.hex() == entry["context"]
            assert {site: words.astype("<u2").tobytes().hex() for site, words in pending.shares.items()} == {
                name: entry["own_shares"][name]
            }
        else:
            assert not later.rounds

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("entry", ROUNDS, ids=by_round)
    def test_mask_keys(self, entry: dict[str, Any], name: str) -> None:
        seeds = recorded_member(name, entry["threshold"]).pairs.at(entry["round"]).round_seeds(entry["round"])
        context = bytes.fromhex(entry["context"])
        keys = {peer: purpose_key(seed, b"cohort mask", context).hex() for peer, seed in seeds.items()}
        assert {peer: key for peer, key in entry["masks"][name].items() if peer != name} == keys

    @pytest.mark.parametrize("entry", WITH_DROPOUTS, ids=by_round)
    def test_opening(self, entry: dict[str, Any]) -> None:
        made = {name: recorded_protect(name, entry) for name in NAMES}
        tally = contributed(recorded_tally(entry), made, entry["survivors"])
        tally, sets = tally.close(COORDINATOR)
        assert list(sets) == entry["survivors"]
        later, endorsers = {}, list(entry["tags"])
        for name, message in sets.items():
            assert message.signature.hex() == entry["signature"]
            assert list(message.sites) == entry["survivors"]
            senders = [site for site in entry["survivors"] if site != name]
            assert [text.hex() for text in message.sealed] == [entry["sealed"][site][name] for site in senders]
        for name in endorsers:
            endorsement, later[name] = made[name][1].endorse(sets[name])
            assert [tag.hex() for tag in endorsement.tags] == list(entry["tags"][name].values())
            tally = tally.endorse(endorsement)
        for name, message in tally.endorsed().items():
            assert list(message.sites) == [site for site in endorsers if site != name]
            assert [tag.hex() for tag in message.tags] == [entry["tags"][site][name] for site in message.sites]
            reveal, done = later[name].reveal(message)
            assert reveal.answer.astype("<u2").tobytes().hex() == entry["answers"][name]
            assert not done.rounds[entry["round"]].shares
            assert not done.rounds[entry["round"]].seeds
            tally = tally.reveal(reveal)
        found = tally.opened()
        assert found.view(f"<i{found.itemsize}").tolist() == entry["sum"]

    @pytest.mark.parametrize("entry", [entry for entry in ROUNDS if "signature" not in entry], ids=by_round)
    def test_opening_where_all_must_stay(self, entry: dict[str, Any]) -> None:
        made = {name: recorded_protect(name, entry) for name in NAMES}
        found = contributed(recorded_tally(entry), made, NAMES).opened()
        assert found.view(f"<i{found.itemsize}").tolist() == entry["sum"]

    @pytest.mark.parametrize("bits", [12, 16, 32, 64])
    def test_a_vector_of_more_than_one_segment(self, bits: int) -> None:
        name, kind = "bergen", unsigned(bits)
        member = recorded_member(name, 3)
        vector = plain_vector(SEGMENT // kind.itemsize + 7, bits, 4)
        randomness = Randomness(bytes(range(32)))
        update, _ = member.protect(18, b"long", Masking(member.group, len(vector), bits), vector, randomness)
        context = reference.round_context(member.session, 18, b"long")
        keys = {
            peer: reference.mask_key(reference.round_seed(key, 18), context)
            for peer, key in zip(member.pairs.peers, member.pairs.keys, strict=True)
        }
        keys[name] = reference.drawn(reference.child(randomness.key, "self mask"), 32)
        add = [key for peer, key in keys.items() if peer >= name]
        masked = reference.masked(vector.tolist(), add, [keys["Cork"], keys["aachen"]], reference.kind_bits(bits))
        sent = update.values
        # the reference packs slowly: the ends, which are whole bytes, say where everything is
        assert sent[: 8 * bits // (8 * sent.itemsize)].tobytes() == reference.packed(masked[:8], bits)
        whole = len(masked) // 8 * 8 - 64
        assert sent[whole * bits // (8 * sent.itemsize) :].tobytes() == reference.packed(masked[whole:], bits)
        back = Masking(member.group, len(vector), bits).add(None, sent)
        assert back.tolist() == [residue % 2**bits for residue in masked]


OPENINGS = VECTORS["openings"]
BAD_OPENINGS = [name for name in OPENINGS if name.startswith("bad_")]
OUT_OF_ORDER = "it must list sites of the run in order, once each, this one too"
NOT_SIGNED = "the pinned coordinator did not sign it"
NOT_ALL_SHARES = "it must bring one share of each other survivor"
NOT_OTHERS = "they must be of other survivors, once each and in order"
FALSE_TAG = "endorsements of {} other sites are of the set that this site holds: below 2 of them"
ALTERED = "a share of site '{}' was refused: it was altered on its way"
REASONS = {
    "bad_signature": NOT_SIGNED,
    "bad_other_coordinator": NOT_SIGNED,
    "bad_other_purpose": NOT_SIGNED,
    "bad_signed_for_another_set": NOT_SIGNED,
    "bad_too_few": "a survivor set of 2 sites was refused: below 3",
    "bad_nobody": OUT_OF_ORDER,
    "bad_unknown_site": OUT_OF_ORDER,
    "bad_out_of_order": OUT_OF_ORDER,
    "bad_listed_twice": OUT_OF_ORDER,
    "bad_listed_me_twice": OUT_OF_ORDER,
    "bad_without_me": OUT_OF_ORDER,
    "bad_missing_share": NOT_ALL_SHARES,
    "bad_extra_share": NOT_ALL_SHARES,
    "bad_no_shares": NOT_ALL_SHARES,
    "bad_truncated_share": NOT_ALL_SHARES,
    "bad_altered_share": ALTERED.format("bergen"),
    "bad_reordered_shares": ALTERED.format("Cork"),
    "bad_share_for_another": ALTERED.format("Cork"),
    "bad_own_share_returned": ALTERED.format("Cork"),
    "bad_share_of_another_round": ALTERED.format("Cork"),
    "bad_no_share": "a share of site 'Cork' was refused: it is no share",
    "bad_other_round": NOT_SIGNED,
    "bad_round_not_open": "round 18 was refused: this site has nothing open in it",
    "bad_tag": FALSE_TAG.format(1),
    "bad_swapped_tags": FALSE_TAG.format(0),
    "bad_tag_for_another": FALSE_TAG.format(1),
    "bad_own_tag_returned": FALSE_TAG.format(1),
    "bad_tag_of_another_set": FALSE_TAG.format(1),
    "bad_tag_of_another_round": FALSE_TAG.format(1),
    "bad_missing_tag": NOT_OTHERS,
    "bad_too_few_endorsers": FALSE_TAG.format(1),
    "bad_no_endorsers": FALSE_TAG.format(0),
    "bad_endorser_outside": NOT_OTHERS,
    "bad_endorser_outside_for_one": NOT_OTHERS,
    "bad_endorser_twice": NOT_OTHERS,
    "bad_endorser_me": NOT_OTHERS,
    "bad_endorsers_out_of_order": NOT_OTHERS,
    "bad_second_set": "a second survivor set for round 17 was refused: one was endorsed",
    "bad_smaller_second_set": "a second survivor set for round 17 was refused: one was endorsed",
    "bad_second_set_after_revealing": "a second survivor set for round 17 was refused: one was endorsed",
    "bad_same_set_again": "the survivors of round 17 are endorsed already",
    "bad_revealed_again": "round 17 is revealed already",
    "bad_endorsements_first": NOT_OTHERS,
}


def state(member: Member) -> Any:
    """Returns all that a member holds, as values that compare."""
    rounds = {
        number: (
            pending.context,
            dict(pending.seeds),
            {site: words.tobytes() for site, words in pending.shares.items()},
            pending.survivors,
            pending.revealed,
        )
        for number, pending in member.rounds.items()
    }
    return member.me, member.pairs, member.session, member.coordinator, member.last_round, rounds


def told(member: Member, message: dict[str, Any]) -> tuple[Endorsement | Reveal, Member]:
    """Gives a member a message of the vectors: a survivor set, or endorsements."""
    if "signature" in message:
        sealed = tuple(bytes.fromhex(text) for text in message["sealed"])
        signature = bytes.fromhex(message["signature"])
        return member.endorse(Survivors(member.run, message["round"], tuple(message["sites"]), signature, sealed))
    tags = tuple(bytes.fromhex(tag) for tag in message["tags"])
    return member.reveal(Endorsed(member.run, message["round"], tuple(message["endorsers"]), tags, NO_TOTAL))


def two_rounds_open() -> Member:
    """Returns the vectors' site with rounds 2 and 17 open, so that one can be mistaken for the other."""
    member = recorded_member(OPENINGS["site"], 3)
    for entry in (entry for entry in ROUNDS if entry["round"] in (2, 17)):
        kind = unsigned(entry["bits"])
        vector = np.array(entry["plain"][member.me], f"<i{kind.itemsize}").view(kind)
        scheme = Masking(member.group, len(vector), entry["bits"])
        randomness = Randomness(bytes.fromhex(entry["randomness"][member.me]))
        _, member = member.protect(entry["round"], entry["broadcast"].encode(), scheme, vector, randomness)
    return member


class TestBadOpenings:
    ENTRY = next(entry for entry in ROUNDS if entry["round"] == 17)

    def test_the_good_one_is_accepted(self) -> None:
        site, (survivors, endorsed) = OPENINGS["site"], OPENINGS["good"]
        endorsement, member = told(two_rounds_open(), survivors)
        assert isinstance(endorsement, Endorsement)
        assert [tag.hex() for tag in endorsement.tags] == list(self.ENTRY["tags"][site].values())
        reveal, _ = told(member, endorsed)
        assert isinstance(reveal, Reveal)
        assert reveal.answer.astype("<u2").tobytes().hex() == self.ENTRY["answers"][site]

    @pytest.mark.parametrize("case", BAD_OPENINGS)
    def test_the_last_message_is_refused_and_changes_nothing(self, case: str) -> None:
        member = two_rounds_open()
        *before, bad = OPENINGS[case]
        for message in before:
            _, member = told(member, message)
        kept = state(member)
        again = case in ("bad_same_set_again", "bad_revealed_again")
        with pytest.raises(Repeated if again else ProtocolError) as refused:
            told(member, bad)
        assert REASONS[case] in str(refused.value)
        assert isinstance(refused.value, Repeated) == again
        assert state(member) == kept
        # what is good is still accepted, with the same answer
        for message in OPENINGS["good"][len(before) :]:
            _, member = told(member, message)
        assert member.rounds[17].revealed

    def test_every_kind_is_there(self) -> None:
        assert set(REASONS) == set(BAD_OPENINGS)
        asked = "signature other_coordinator too_few unknown_site out_of_order listed_twice without_me missing_share"
        asked += " altered_share reordered_shares truncated_share second_set other_round tag too_few_endorsers"
        assert {f"bad_{word}" for word in f"{asked} endorser_outside".split(" ")} <= set(BAD_OPENINGS)

    @pytest.mark.parametrize("case", list(VECTORS["orders"]))
    @pytest.mark.parametrize("threshold", [3, 5])
    def test_rounds_out_of_order(self, case: str, threshold: int) -> None:
        *before, last = VECTORS["orders"][case]
        member = recorded_member("aachen", threshold)
        scheme, vector = Masking(member.group, 3, 32), np.ones(3, np.uint32)
        for number in before:
            _, member = member.protect(number, b"", scheme, vector, Randomness.of_seed(1))
        kept = state(member)
        with pytest.raises(Repeated, match=f"round {last} was refused"):
            member.protect(last, b"other", scheme, vector, Randomness.of_seed(2))
        assert state(member) == kept
