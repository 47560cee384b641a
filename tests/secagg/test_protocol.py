"""The secure sum under lost, late, repeated and forged messages: exact over its survivors, or closed."""

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from cohortium.core.errors import ProtocolError, Repeated
from cohortium.core.messages import Endorsed, Endorsement, MaskedUpdate, Reveal, Survivors
from cohortium.core.random import Randomness
from cohortium.secagg.group import Group, tolerance
from cohortium.secagg.masking import Masking
from cohortium.secagg.protocol import NO_TOTAL, Member, Tally

try:
    from cohortium.secagg.threshold import Threshold
except ImportError:
    Threshold = None  # type: ignore[assignment,misc]


def load_ensemble() -> ModuleType:
    spec = importlib.util.spec_from_file_location("secagg_ensemble", Path(__file__).with_name("ensemble.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


scene = load_ensemble()
needs_rlwe = pytest.mark.skipif(Threshold is None, reason="needs numba")
LENGTH = 11
KINDS = ("masking-12", "masking-16", "masking-32", "masking-64")
SUITES = [*KINDS, pytest.param("rlwe-25", marks=needs_rlwe)]
RUNS = ("one", "two")
STEPS = ("upload", "survivors", "endorsement", "endorsed", "reveal")
LIES = (
    "another's signature",
    "another run's signature",
    "another round's signature",
    "a site twice",
    "out of order",
    "an invented site",
    "without the receiver",
    "a share left out",
    "shares cut",
    "shares exchanged",
    "a share altered",
)
WORDINGS = (b"ask", b"ask otherwise")


def scheme_of(kind: str, group: Group, length: int = LENGTH) -> Any:
    name, bits = kind.split("-")
    return Masking(group, length, int(bits)) if name == "masking" else Threshold(group, length, int(bits))


def bits_of(kind: str) -> int:
    return int(kind.split("-")[1])


def state_of(member: Member) -> tuple[Any, ...]:
    """Returns everything in a member that a message could change."""
    return member.last_round, tuple(
        (number, one.survivors, one.revealed, tuple(one.seeds.items()), tuple((s, w.tobytes()) for s, w in shares))
        for number, one in sorted(member.rounds.items())
        for shares in [sorted(one.shares.items())]
    )


def tally_state(tally: Tally) -> tuple[Any, ...]:
    total = None if tally.total is None else tally.total.tobytes()
    answers = tuple((site, answer.tobytes()) for site, answer in tally.answers.items())
    return total, tuple(tally.sealed.items()), tally.survivors, tuple(tally.tags.items()), answers


def there(sites: Iterable[str], lost: Mapping[str, str], step: str) -> list[str]:
    """Returns the sites whose message of a step arrives, where each of some is lost from one step on."""
    return [site for site in sites if site not in lost or STEPS.index(lost[site]) > STEPS.index(step)]


def flipped(text: bytes) -> bytes:
    return bytes([text[0] ^ 1]) + text[1:]


@dataclass(frozen=True)
class Told:
    """A survivor set on its way to a site; `genuine` if an honest coordinator could have sent it to that site."""

    message: Survivors
    to: str
    wording: bytes
    genuine: bool


class SecureSums(RuleBasedStateMachine):
    """Two runs of the same sites, a network that keeps no order, and a coordinator that also lies.

    Corrupt sites, as many as the bound allows, share what they know and speak for any set; honest ones follow the
    protocol. The coordinator has an honest `Tally` for each round beside its lies.
    """

    kinds: tuple[str, ...] = KINDS

    @initialize(data=st.data())
    def found(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(3, 8), "sites")
        threshold = data.draw(st.integers(max(3, count // 2 + 1), count), "threshold")
        self.kind = data.draw(st.sampled_from(self.kinds), "scheme")
        self.casts = {run: scene.ensemble(count, threshold, run) for run in RUNS}
        group = self.casts["one"].group
        self.scheme = scheme_of(self.kind, group)
        self.threshold, self.sites = threshold, group.sites
        most = max(0, tolerance(count, count - threshold).malicious)
        self.corrupt = frozenset(data.draw(st.permutations(self.sites), "corrupt")[:most])
        self.honest = [site for site in self.sites if site not in self.corrupt]
        self.latest = dict.fromkeys(RUNS, 0)
        self.uploads: dict[tuple[str, int], dict[str, tuple[bytes, MaskedUpdate]]] = defaultdict(dict)
        self.after: dict[tuple[str, int, str], Member] = {}
        self.tallies: dict[tuple[str, int], Tally] = {}
        self.mixed: set[tuple[str, int]] = set()
        self.told: list[Told] = []
        self.spoken: dict[tuple[str, int, tuple[str, ...]], dict[str, Endorsement]] = defaultdict(dict)
        self.reveals: dict[tuple[str, int, tuple[str, ...]], dict[str, Reveal]] = defaultdict(dict)
        self.chosen: dict[tuple[str, int, str], tuple[str, ...]] = {}
        self.revealed: set[tuple[str, int, str]] = set()
        self.unchecked: set[Any] = set()
        for run in RUNS:
            self.ask_everybody(run)

    # What honest sites are asked

    @rule(run=st.sampled_from(RUNS))
    def ask_everybody(self, run: str) -> None:
        self.open_round(run, dict.fromkeys(self.sites, WORDINGS[0]))

    @rule(data=st.data(), run=st.sampled_from(RUNS))
    def ask_some(self, data: st.DataObject, run: str) -> None:
        """A new round, in which some sites are not reached, and some are asked another thing."""
        reached = data.draw(st.sets(st.sampled_from(self.sites), min_size=1), "reached")
        wordings = st.sampled_from([WORDINGS[0]] * 4 + [WORDINGS[1]])
        self.open_round(run, {site: data.draw(wordings) for site in sorted(reached)})

    @rule(data=st.data(), wording=st.sampled_from(WORDINGS))
    def ask_again(self, data: st.DataObject, wording: bytes) -> None:
        run, number, site = data.draw(st.sampled_from(sorted(self.after)))
        member = self.casts[run].members[site]
        before = state_of(member)
        with pytest.raises(Repeated):
            member.protect(number, wording, self.scheme, self.plain(run, number + 1, site), Randomness.of_seed(number))
        assert state_of(member) == before

    # The honest coordinator

    @rule(data=st.data(), stray=st.booleans())
    def bring_update(self, data: st.DataObject, stray: bool) -> None:
        """An update arrives at its round's tally or at another one, at any time and any number of times."""
        run, number, site = data.draw(st.sampled_from(sorted(self.after)))
        at = data.draw(st.sampled_from(sorted(self.tallies))) if stray else (run, number)
        self.contribute(at, (run, number), site)

    @rule(data=st.data())
    def bring_updates(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(self.tallies)))
        for site in self.uploads[at]:
            self.contribute(at, at, site)

    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(self.tallies)))
        tally = self.tallies[at]
        if tally.survivors or not self.scheme.opens:
            return
        if len(tally.sealed) < self.threshold:
            with pytest.raises(ProtocolError, match="the sum stays closed"):
                tally.close(scene.COORDINATOR)
            return
        self.tallies[at], messages = tally.close(scene.COORDINATOR)
        for site, message in messages.items():
            self.told.append(Told(message, site, WORDINGS[0], self.could_be_honest(at, message.sites, WORDINGS[0])))

    @precondition(lambda self: self.spoken)
    @rule(data=st.data(), stray=st.booleans())
    def bring_endorsement(self, data: st.DataObject, stray: bool) -> None:
        run, number, chosen = data.draw(st.sampled_from(sorted(self.spoken)))
        at = data.draw(st.sampled_from(sorted(self.tallies))) if stray else (run, number)
        for site, message in self.spoken[run, number, chosen].items():
            tally = self.tallies[at]
            if at[0] != run or (at == (run, number) and tally.survivors != chosen):
                continue  # who carries the messages knows runs apart; of one round, an honest coordinator has one set
            due = at == (run, number) and site not in tally.tags
            self.tallies[at] = self.give(tally, tally.endorse, message, due)

    @precondition(lambda self: self.reveals)
    @rule(data=st.data(), stray=st.booleans())
    def bring_reveal(self, data: st.DataObject, stray: bool) -> None:
        run, number, chosen = data.draw(st.sampled_from(sorted(self.reveals)))
        at = data.draw(st.sampled_from(sorted(self.tallies))) if stray else (run, number)
        for site, message in self.reveals[run, number, chosen].items():
            tally = self.tallies[at]
            if at[0] != run or (at == (run, number) and tally.survivors != chosen):
                continue
            due = at == (run, number) and site in tally.tags and site not in tally.answers
            self.tallies[at] = self.give(tally, tally.reveal, message, due)
            self.unchecked.add(at)

    @precondition(lambda self: any(len(tally.tags) for tally in self.tallies.values()))
    @rule(data=st.data())
    def pass_endorsements_on(self, data: st.DataObject) -> None:
        at = data.draw(st.sampled_from(sorted(key for key, tally in self.tallies.items() if tally.tags)))
        tally = self.tallies[at]
        if len(tally.tags) < self.threshold:
            with pytest.raises(ProtocolError, match="the sum stays closed"):
                tally.endorsed()
            return
        for site, message in tally.endorsed().items():
            self.hear_endorsed(at, site, message, True)

    @rule(data=st.data(), run=st.sampled_from(RUNS))
    def serve_a_round(self, data: st.DataObject, run: str) -> None:
        """A round from its opening to its sum, in which as many sites are lost as may be, or one more."""
        most = len(self.sites) - self.threshold
        lost = data.draw(st.permutations(self.sites), "lost")[: data.draw(st.integers(0, most + 1))]
        steps = {site: data.draw(st.sampled_from(STEPS)) for site in lost}
        self.ask_everybody(run)
        at = run, self.latest[run]
        for site in there(self.sites, steps, "upload"):
            self.contribute(at, at, site)
        if self.scheme.opens and len(self.tallies[at].sealed) >= self.threshold:
            self.open_with_losses(at, steps)

    def open_with_losses(self, at: tuple[str, int], steps: Mapping[str, str]) -> None:
        self.tallies[at], messages = self.tallies[at].close(scene.COORDINATOR)
        chosen = tuple(messages)
        for site in there(chosen, steps, "survivors"):
            self.hear_survivors(Told(messages[site], site, WORDINGS[0], True), at[0], site)
        for site in there(self.spoken[*at, chosen], steps, "endorsement"):
            self.tallies[at] = self.tallies[at].endorse(self.spoken[*at, chosen][site])
        if len(self.tallies[at].tags) < self.threshold:
            return
        messages = self.tallies[at].endorsed()
        for site in there(messages, steps, "endorsed"):
            self.hear_endorsed(at, site, messages[site], True)
        for site in there(self.reveals[*at, chosen], steps, "reveal"):
            if site in messages:
                self.tallies[at] = self.tallies[at].reveal(self.reveals[*at, chosen][site])
        self.unchecked.add(at)

    # The lying one

    @rule(data=st.data(), change=st.sampled_from(["", *LIES]), plain=st.booleans(), at_once=st.booleans())
    def invent_survivors(self, data: st.DataObject, change: str, plain: bool, at_once: bool) -> None:
        """A survivor set of any sites, signed anew, or changed in one of many ways, to one of them or to all."""
        run, number, _ = data.draw(st.sampled_from(sorted(self.after)))
        wording = data.draw(st.sampled_from([WORDINGS[0]] * 3 + [WORDINGS[1]]))
        chosen = tuple(sorted(data.draw(st.sets(st.sampled_from(self.sites), min_size=1), "set")))
        for to in chosen:
            told = self.lie(run, number, wording, chosen, to, "" if plain else change)
            self.told.append(told)
            if at_once:
                self.hear_survivors(told, run, to)

    @precondition(lambda self: self.told)
    @rule(data=st.data(), astray=st.integers(0, 5))
    def tell(self, data: st.DataObject, astray: int) -> None:
        """A survivor set arrives, at times at another site or in another run than it was meant for."""
        told = data.draw(st.sampled_from(self.told))
        run, to = told.message.run, told.to
        if astray == 0:
            to = data.draw(st.sampled_from(self.sites))
        if astray == 1:
            run = data.draw(st.sampled_from(RUNS))
        self.hear_survivors(told, run, to)

    @precondition(lambda self: self.chosen)
    @rule(data=st.data(), change=st.sampled_from(["", "", "few", "other", "bit", "order", "twice", "me", "none"]))
    def claim_endorsements(self, data: st.DataObject, change: str) -> None:
        """A site hears of as many endorsements of its set as the coordinator and its friends can put together."""
        run, number, to = data.draw(st.sampled_from(sorted(self.chosen)))
        chosen = self.chosen[run, number, to]
        self.corrupt_speak(run, number, chosen)
        message = scene.answered(to, self.spoken[run, number, chosen], chosen)
        pairs = list(zip(message.sites, message.tags, strict=True))
        if change == "few":
            pairs = pairs[: self.threshold - 2]
        elif change == "other":
            # tags of the same sites for another set, or for another round
            others = [
                (key, site)
                for key in sorted(self.spoken)
                if key != (run, number, chosen)
                for site in self.spoken[key]
                if to in key[2] and site != to
            ]
            wrong = {
                site: self.spoken[key][site].tags[[name for name in key[2] if name != site].index(to)]
                for key, site in others
            }
            pairs = [(site, wrong.get(site, bytes(32))) for site, _ in pairs]
        elif change == "bit" and pairs:
            place = data.draw(st.integers(0, len(pairs) - 1))
            site, tag = pairs[place]
            pairs[place] = site, tag[:31] + bytes([tag[31] ^ 1])
        elif change == "order":
            pairs = pairs[::-1]
        elif change == "twice":
            pairs = [pair for pair in pairs for _ in range(2)]
        elif change == "me":
            pairs = sorted([*pairs, (to, bytes(32))])
        elif change == "none":
            pairs = []
        names, tags = [site for site, _ in pairs], [tag for _, tag in pairs]
        genuine = pairs == list(zip(message.sites, message.tags, strict=True))
        self.hear_endorsed((run, number), to, Endorsed(run, number, tuple(names), tuple(tags), NO_TOTAL), genuine)

    @precondition(lambda self: self.scheme.opens)
    @rule(data=st.data())
    def play_two_sets(self, data: st.DataObject) -> None:
        """The whole attack at once: one set to some honest sites and another one to the rest, to the very end."""
        run, number = data.draw(st.sampled_from(sorted(self.tallies)))
        pool = [site for site in self.sites if self.uploads[run, number].get(site, (b"", 0))[0] == WORDINGS[0]]
        if len(pool) < self.threshold:
            return
        sets = [
            tuple(sorted(data.draw(st.permutations(pool))[: data.draw(st.integers(self.threshold, len(pool)))]))
            for _ in range(2)
        ]
        apart = data.draw(st.sampled_from([(0,), (0, 0, 1), (0, 1)]), "who hears of which")
        for site in data.draw(st.permutations(self.honest)):
            chosen = sets[data.draw(st.sampled_from(apart))]
            if site in chosen:
                self.hear_survivors(self.lie(run, number, WORDINGS[0], chosen, site), run, site)
        for chosen in sets:
            self.corrupt_speak(run, number, chosen)
            for site in self.honest:
                if self.chosen.get((run, number, site)) == chosen:
                    message = scene.answered(site, self.spoken[run, number, chosen], chosen)
                    self.hear_endorsed((run, number), site, message, True)

    # What must hold

    @invariant()
    def no_site_is_unmasked_alone(self) -> None:
        """Counts the shares that honest sites revealed, with those that corrupt sites hold anyway."""
        held = len(self.corrupt)
        for run, number in self.uploads:
            answers = [
                (set(chosen), site)
                for (one, other, chosen), answers in self.reveals.items()
                if (one, other) == (run, number)
                for site in answers
                if site not in self.corrupt
            ]
            for site in self.honest:
                own = sum(site in chosen for chosen, _ in answers) + held
                if own >= self.threshold:
                    assert not all(
                        self.pair_known(answers, held, site, peer) for peer in self.honest if peer != site
                    ), f"{site} stands alone"
            reached = [
                chosen
                for (one, other, chosen), said in self.reveals.items()
                if (one, other) == (run, number) and len(set(said) - self.corrupt) + held >= self.threshold
                if set(said) - self.corrupt
            ]
            assert len(reached) <= 1

    @invariant()
    def what_opens_is_the_sum_over_the_survivors(self) -> None:
        for key in self.unchecked:
            if len(key) == 2:
                self.check_tally(key)
            else:
                self.check_opened(*key)
        self.unchecked.clear()

    # The parts

    def open_round(self, run: str, wordings: Mapping[str, bytes]) -> None:
        self.latest[run] += 1
        number = self.latest[run]
        for site, wording in wordings.items():
            update = self.casts[run].protect(site, self.scheme, self.plain(run, number, site), number, wording)
            self.uploads[run, number][site] = wording, update
            self.after[run, number, site] = self.casts[run].members[site]
        self.tallies[run, number] = self.casts[run].tally(self.scheme, number, WORDINGS[0])

    def plain(self, run: str, number: int, site: str) -> np.ndarray:
        seed = [RUNS.index(run), number, self.sites.index(site)]
        drawn: np.ndarray = scene.vectors([site], LENGTH, bits_of(self.kind), seed)[site]
        return drawn

    def sum_of(self, run: str, number: int, chosen: tuple[str, ...]) -> np.ndarray:
        plain = {site: self.plain(run, number, site) for site in chosen}
        return scene.plain_sum(chosen, plain)  # type: ignore[no-any-return]

    def could_be_honest(self, at: tuple[str, int], chosen: tuple[str, ...], wording: bytes) -> bool:
        return len(chosen) >= self.threshold and all(
            self.uploads[at].get(site, (b"", None))[0] == wording for site in chosen
        )

    def lie(self, run: str, number: int, wording: bytes, chosen: tuple[str, ...], to: str, change: str = "") -> Told:
        cast = self.casts[run]
        updates = {site: update for site, (_, update) in self.uploads[run, number].items()}
        good = cast.survivors(to, chosen, updates, number, wording)
        genuine = not change and self.could_be_honest((run, number), chosen, wording)
        other = self.casts[RUNS[run == RUNS[0]]]
        sealed = good.sealed

        def anew(named: Any, number: int = number, cast: Any = cast, signer: Any = scene.COORDINATOR) -> Any:
            return cast.survivors(to, named, updates if cast.run == run else {}, number, wording, signer)

        changed = {
            "another's signature": lambda: anew(chosen, signer=scene.STRANGER),
            "another run's signature": lambda: replace(good, signature=anew(chosen, cast=other).signature),
            "another round's signature": lambda: replace(good, signature=anew(chosen, number + 1).signature),
            "a site twice": lambda: anew(sorted([*chosen, to])),
            "out of order": lambda: anew((*chosen[1:], chosen[0])) if len(chosen) > 1 else anew(()),
            "an invented site": lambda: anew((*chosen, "zzz")),
            "without the receiver": lambda: anew([site for site in chosen if site != to]),
            "a share left out": lambda: replace(good, sealed=sealed[1:] if sealed else (b"x",)),
            "shares cut": lambda: replace(good, sealed=tuple(text[:-1] for text in sealed) or (b"",)),
            "shares exchanged": lambda: replace(good, sealed=sealed[::-1] if len(sealed) > 1 else (b"x",)),
            "a share altered": lambda: replace(good, sealed=(flipped(sealed[0]), *sealed[1:]) if sealed else (b"",)),
        }
        if change:
            good = changed[change]()
        return Told(good, to, wording, genuine)

    def contribute(self, at: tuple[str, int], source: tuple[str, int], site: str) -> None:
        wording, update = self.uploads[source][site]
        if at[0] != source[0]:
            return  # who carries the messages knows runs apart
        tally = self.tallies[at]
        due = at == source and site not in tally.sealed and not tally.survivors
        self.tallies[at] = self.give(tally, tally.contribute, update, due)
        if due and wording != WORDINGS[0]:
            self.mixed.add(at)
        if not self.scheme.opens:
            self.unchecked.add(at)

    def give(self, tally: Tally, method: Any, message: Any, due: bool) -> Tally:
        before = None if due else tally_state(tally)
        try:
            later: Tally = method(message)
        except ProtocolError:
            assert not due
            assert tally_state(tally) == before
            return tally
        assert due
        return later

    def hear_survivors(self, told: Told, run: str, to: str) -> None:
        message = told.message
        key = (run, message.round, to)
        known = key in self.after and self.uploads[run, message.round][to][0] == told.wording
        genuine = told.genuine and to == told.to and run == message.run and known and self.scheme.opens
        if to in self.corrupt:
            if genuine:
                self.corrupt_speak(run, message.round, message.sites)
            return
        member = self.casts[run].members[to]
        due = genuine and key not in self.chosen and message.round in member.rounds
        before = state_of(member)
        try:
            endorsement, later = member.endorse(message)
        except Repeated:
            # the very set that it endorsed, or a round that it no longer holds
            assert self.chosen.get(key) == message.sites or message.round not in member.rounds
            assert not due
            assert state_of(member) == before
        except ProtocolError:
            assert not due
            assert state_of(member) == before
        else:
            assert due
            self.casts[run].members[to] = later
            self.chosen[key] = message.sites
            self.spoken[run, message.round, message.sites][to] = endorsement

    def corrupt_speak(self, run: str, number: int, chosen: tuple[str, ...]) -> None:
        """Corrupt sites endorse a set and reveal for it, whatever they did before."""
        updates = {site: update for site, (_, update) in self.uploads[run, number].items()}
        wording = self.uploads[run, number][chosen[0]][0]
        for site in self.corrupt & set(chosen):
            member = self.after[run, number, site]
            endorsement, later = member.endorse(self.casts[run].survivors(site, chosen, updates, number, wording))
            answer = self.scheme.answer(site, chosen, later.rounds[number].shares, NO_TOTAL)
            self.spoken[run, number, chosen][site] = endorsement
            self.reveals[run, number, chosen][site] = Reveal(run, site, number, answer)

    def hear_endorsed(self, at: tuple[str, int], to: str, message: Endorsed, genuine: bool) -> None:
        (run, number), key = at, (*at, to)
        if to in self.corrupt:
            return
        member = self.casts[run].members[to]
        before = state_of(member)
        # false tags count for nothing, so a few of them do no harm
        said = self.spoken[run, number, self.chosen[key]] if key in self.chosen else {}
        true = scene.answered(to, said, self.chosen[key]) if key in self.chosen else message
        valid = set(zip(true.sites, true.tags, strict=True)) & set(zip(message.sites, message.tags, strict=False))
        orderly = list(message.sites) == sorted(set(message.sites)) and len(message.sites) == len(message.tags)
        named = set(message.sites) <= set(self.chosen.get(key, ())) - {to}
        enough = len(valid) + 1 >= self.threshold and orderly and named
        due = enough and key in self.chosen and key not in self.revealed and number in member.rounds
        try:
            reveal, later = member.reveal(message)
        except Repeated:
            assert key in self.revealed or number not in member.rounds
            assert state_of(member) == before
        except ProtocolError:
            assert not due
            assert state_of(member) == before
        else:
            assert due
            assert key not in self.revealed
            self.casts[run].members[to] = later
            self.revealed.add(key)
            chosen = self.chosen[key]
            self.reveals[run, number, chosen][to] = reveal
            self.unchecked.add((run, number, chosen))

    def pair_known(self, answers: list[tuple[set[str], str]], held: int, site: str, peer: str) -> bool:
        """Whether the mask of a pair is open: both ends dealt shares of it, each of its own."""
        one = sum(site in chosen and peer not in chosen for chosen, _ in answers)
        other = sum(peer in chosen and site not in chosen for chosen, _ in answers)
        return max(one, other) + held >= self.threshold

    def check_tally(self, at: tuple[str, int]) -> None:
        tally = self.tallies[at]
        present = len(tally.answers) if self.scheme.opens else len(tally.sealed)
        if present < self.threshold:
            with pytest.raises(ProtocolError, match="the sum stays closed"):
                tally.opened()
            return
        expected = self.sum_of(*at, tally.survivors if self.scheme.opens else self.sites)
        if at in self.mixed:
            assert (tally.opened() != expected).any()
            return
        event("an honest sum was opened")
        assert (tally.opened() == expected).all()

    def check_opened(self, run: str, number: int, chosen: tuple[str, ...]) -> None:
        """The attacker opens what it can, over the set that it made its own."""
        answers = {site: reveal.answer for site, reveal in self.reveals[run, number, chosen].items()}
        tally = self.casts[run].tally(self.scheme, number, self.uploads[run, number][chosen[0]][0])
        for site in chosen:
            tally = tally.contribute(self.uploads[run, number][site][1])
        tally = replace(tally, survivors=chosen, answers=answers)
        if len(answers) < self.threshold:
            with pytest.raises(ProtocolError, match="the sum stays closed"):
                tally.opened()
            return
        event("a sum was opened over a set of the liar's choice")
        assert (tally.opened() == self.sum_of(run, number, chosen)).all()


if Threshold is not None:

    class EncryptedSums(SecureSums):
        kinds = ("rlwe-25",)

    TestEncryptedSums = EncryptedSums.TestCase
    TestEncryptedSums.settings = settings(
        max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
    )


TestSecureSums = SecureSums.TestCase
TestSecureSums.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


# Every way to lose sites


def lossy_round(cast: Any, scheme: Any, plain: Mapping[str, np.ndarray], lost: Mapping[str, str], number: int) -> Tally:
    """Returns the tally of a round in which each of some sites is lost from one step on."""

    tally = cast.tally(scheme, number)
    updates = {site: cast.protect(site, scheme, plain[site], number) for site in cast.sites}
    for site in there(cast.sites, lost, "upload"):
        tally = tally.contribute(updates[site])
    if not scheme.opens:
        return tally
    tally, messages = tally.close(scene.COORDINATOR)
    said = {}
    for site in there(messages, lost, "survivors"):
        said[site], cast.members[site] = cast.members[site].endorse(messages[site])
    for site in there(said, lost, "endorsement"):
        tally = tally.endorse(said[site])
    told, answers = tally.endorsed(), {}
    for site in there(told, lost, "endorsed"):
        answers[site], cast.members[site] = cast.members[site].reveal(told[site])
    for site in there(answers, lost, "reveal"):
        tally = tally.reveal(answers[site])
    return tally


def summed(cast: Any, plain: Mapping[str, np.ndarray], lost: Mapping[str, str]) -> np.ndarray:
    total: np.ndarray = scene.plain_sum([site for site in cast.sites if lost.get(site) != "upload"], plain)
    return total


def losses(sites: tuple[str, ...], most: int) -> Iterator[dict[str, str]]:
    """Yields every way to lose at most `most` sites, each of them at any step."""
    for gone in chain.from_iterable(combinations(sites, size) for size in range(most + 1)):
        for steps in product(STEPS, repeat=len(gone)):
            yield dict(zip(gone, steps, strict=True))


@pytest.mark.parametrize("kind", SUITES)
@pytest.mark.parametrize(("count", "threshold"), [(3, 3), (4, 3), (4, 4), (5, 3), (5, 4), (5, 5)])
def test_whoever_is_lost_the_sum_is_that_of_the_survivors(kind: str, count: int, threshold: int) -> None:
    cast = scene.ensemble(count, threshold)
    scheme = scheme_of(kind, cast.group)
    for number, lost in enumerate(losses(cast.sites, count - threshold), start=1):
        if number % 3 and kind not in ("masking-32", "rlwe-25"):
            continue
        if number % 8 and count == 5 and kind == "rlwe-25":
            continue
        plain = scene.vectors(cast.sites, LENGTH, bits_of(kind), number)
        tally = lossy_round(cast, scheme, plain, lost, number)
        assert (tally.opened() == summed(cast, plain, lost)).all(), lost


@pytest.mark.parametrize("kind", ["masking-12", "masking-32", pytest.param("rlwe-25", marks=needs_rlwe)])
@pytest.mark.parametrize(("count", "dropouts"), [(15, 3), (50, 10)])
def test_many_sites_of_which_as_many_as_allowed_are_lost(kind: str, count: int, dropouts: int) -> None:
    cast = scene.ensemble(count, count - dropouts)
    scheme = scheme_of(kind, cast.group)
    drawn = np.random.default_rng(count)
    for number in range(1, 4 if count == 15 else 2):
        gone = drawn.permutation(count)[:dropouts]
        lost = {cast.sites[place]: STEPS[drawn.integers(len(STEPS))] for place in gone}
        plain = scene.vectors(cast.sites, LENGTH, bits_of(kind), number)
        assert (lossy_round(cast, scheme, plain, lost, number).opened() == summed(cast, plain, lost)).all()


class TestBelowTheThreshold:
    @pytest.mark.parametrize("kind", SUITES)
    @pytest.mark.parametrize("step", STEPS)
    def test_nothing_opens(self, kind: str, step: str) -> None:
        cast = scene.ensemble(5, 4)
        scheme = scheme_of(kind, cast.group)
        plain = scene.vectors(cast.sites, LENGTH, bits_of(kind))
        lost = dict.fromkeys(cast.sites[1:3], step)
        word = {"upload": "contributed", "survivors": "endorsed", "endorsement": "endorsed"}.get(step, "answered")
        with pytest.raises(ProtocolError, match=rf"3 sites {word},? and it takes 4: the sum stays closed"):
            lossy_round(cast, scheme, plain, lost, 1).opened()
        assert not [site for site in cast.sites if step == "upload" and cast.members[site].rounds[1].survivors]
        if step in ("upload", "survivors", "endorsement"):
            assert not any(cast.members[site].rounds[1].revealed for site in cast.sites)

    @pytest.mark.parametrize("kind", SUITES)
    def test_the_shares_that_came_do_not_make_a_secret(self, kind: str) -> None:
        cast = scene.ensemble(5, 4)
        scheme = scheme_of(kind, cast.group)
        plain = scene.vectors(cast.sites, LENGTH, bits_of(kind))
        tally = lossy_round(cast, scheme, plain, {cast.sites[0]: "reveal", cast.sites[4]: "endorsed"}, 1)
        lenient = Group(cast.sites, 3)
        forced = replace(tally, scheme=scheme_of(kind, lenient))
        try:
            opened = forced.opened()
        except ProtocolError:
            return
        assert (opened != summed(cast, plain, {})).any()

    def test_sites_that_do_not_open_a_round_need_everybody(self) -> None:
        cast = scene.ensemble(4, 4)
        scheme = scheme_of("masking-32", cast.group)
        plain = scene.vectors(cast.sites, LENGTH, 32)
        tally = lossy_round(cast, scheme, plain, {cast.sites[2]: "upload"}, 1)
        with pytest.raises(ProtocolError, match=r"3 sites answered,? and it takes 4: the sum stays closed"):
            tally.opened()
        assert (tally.total != summed(cast, plain, {cast.sites[2]: "upload"})).all()

    def test_another_run_has_entirely_different_keys(self) -> None:
        one, two = scene.ensemble(5, 4, "one"), scene.ensemble(5, 4, "two")
        drawn: list[bytes] = []
        for cast in (one, two):
            drawn += [entry.public_key for entry in cast.announcements]
            drawn += [key for site in cast.sites[:1] for key in cast.members[site].pairs.keys]
            scheme = scheme_of("masking-32", cast.group)
            for site in cast.sites:
                update = cast.protect(site, scheme, np.zeros(LENGTH, np.uint32))
                drawn += [update.values.tobytes(), *update.sealed]
            drawn += list(cast.members[cast.sites[0]].rounds[1].seeds.values())
            drawn += [cast.session, cast.context()]
        assert len(set(drawn)) == len(drawn)


# Whatever is sent


NAMES = st.one_of(st.sampled_from(scene.ensemble(5, 4).sites), st.text(max_size=6))
TAGS = st.one_of(st.binary(min_size=32, max_size=32), st.binary(max_size=40))
NUMBERS = st.one_of(st.integers(-1, 3), st.integers())
ARRAYS = st.one_of(
    st.builds(
        lambda shape, kind: np.ones(shape, kind),
        st.lists(st.sampled_from([0, 1, 2, 4, 5, LENGTH, 18]), max_size=4),
        st.sampled_from(["f8", "f4", "u1", "u2", "u4", "u8", "i8", "?"]),
    ),
    st.binary(max_size=64).map(lambda data: np.frombuffer(data, np.uint8)),
    st.just(np.full((5, 1, 18), 65535, np.uint16)),
)
FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def kept(words: st.SearchStrategy[Any], genuine: Any) -> st.SearchStrategy[Any]:
    """Draws the genuine field half of the time, so that one wrong field is seen behind right ones."""
    return st.one_of(st.just(genuine), words)


def staged(kind: str = "masking-32") -> tuple[Any, Any, Tally, dict[str, Survivors]]:
    """Returns a round of five sites of which four are needed, closed over all of them."""
    cast = scene.ensemble(5, 4)
    scheme = scheme_of(kind, cast.group)
    plain = scene.vectors(cast.sites, LENGTH, bits_of(kind))
    tally = cast.tally(scheme)
    for site in cast.sites:
        tally = tally.contribute(cast.protect(site, scheme, plain[site]))
    tally, messages = tally.close(scene.COORDINATOR)
    return cast, scheme, tally, messages


class TestWhateverIsSent:
    @FUZZ
    @given(data=st.data())
    def test_as_survivors(self, data: st.DataObject) -> None:
        cast, _, _, messages = staged()
        site = cast.sites[0]
        good = messages[site]
        sent = Survivors(
            data.draw(kept(st.text(max_size=5), good.run)),
            data.draw(kept(NUMBERS, good.round)),
            data.draw(kept(st.lists(NAMES, max_size=7).map(tuple), good.sites)),
            data.draw(kept(st.binary(max_size=70), good.signature)),
            data.draw(kept(st.lists(st.binary(max_size=300), max_size=6).map(tuple), good.sealed)),
        )
        member = cast.members[site]
        before = state_of(member)
        try:
            member.endorse(sent)
        except ProtocolError:
            assert state_of(member) == before
        else:
            assert replace(sent, run=good.run) == good

    @FUZZ
    @given(data=st.data())
    def test_as_endorsed(self, data: st.DataObject) -> None:
        cast, _, tally, messages = staged()
        for site, message in messages.items():
            endorsement, cast.members[site] = cast.members[site].endorse(message)
            tally = tally.endorse(endorsement)
        site, good = next(iter(tally.endorsed().items()))
        sent = Endorsed(
            data.draw(kept(st.text(max_size=5), good.run)),
            data.draw(kept(NUMBERS, good.round)),
            data.draw(kept(st.lists(NAMES, max_size=7).map(tuple), good.sites)),
            data.draw(kept(st.lists(TAGS, max_size=6).map(tuple), good.tags)),
            data.draw(kept(ARRAYS, good.total)),
        )
        member = cast.members[site]
        before = state_of(member)
        try:
            member.reveal(sent)
        except ProtocolError:
            assert state_of(member) == before
        else:
            assert (sent.round, sent.sites, sent.tags) == (good.round, good.sites, good.tags)

    @FUZZ
    @given(data=st.data())
    @pytest.mark.parametrize("kind", ["masking-12", "masking-32", pytest.param("rlwe-25", marks=needs_rlwe)])
    def test_as_an_update(self, kind: str, data: st.DataObject) -> None:
        cast = scene.ensemble(5, 4)
        scheme = scheme_of(kind, cast.group)
        plain = scene.vectors(cast.sites, LENGTH, bits_of(kind))
        first, second = cast.sites[:2]
        tally = cast.tally(scheme).contribute(cast.protect(first, scheme, plain[first]))
        good = cast.protect(second, scheme, plain[second])
        sent = MaskedUpdate(
            good.run,
            data.draw(kept(NAMES, good.site)),
            data.draw(kept(NUMBERS, good.round)),
            data.draw(kept(ARRAYS, good.values)),
            data.draw(kept(st.lists(st.binary(max_size=300), max_size=6).map(tuple), good.sealed)),
        )
        before = tally_state(tally)
        try:
            later = tally.contribute(sent)
        except ProtocolError:
            assert tally_state(tally) == before
        else:
            # a name is the carrier's matter; shape and type are the tally's
            assert sent.values.shape == good.values.shape and sent.values.dtype == good.values.dtype
            assert later.sealed.keys() == {first, sent.site} <= set(cast.sites)

    @FUZZ
    @given(data=st.data())
    def test_as_an_endorsement(self, data: st.DataObject) -> None:
        cast, _, tally, _ = staged()
        sent = Endorsement(
            cast.run,
            data.draw(kept(NAMES, cast.sites[0])),
            data.draw(kept(NUMBERS, 1)),
            data.draw(st.lists(TAGS, max_size=6).map(tuple)),
        )
        before = tally_state(tally)
        try:
            later = tally.endorse(sent)
        except ProtocolError:
            assert tally_state(tally) == before
        else:
            assert len(later.tags[sent.site]) == 4

    @FUZZ
    @given(data=st.data())
    @pytest.mark.parametrize("kind", ["masking-32", pytest.param("rlwe-25", marks=needs_rlwe)])
    def test_as_a_reveal(self, kind: str, data: st.DataObject) -> None:
        """A malformed answer is found when the sum is opened; the error names the site."""
        cast, _, tally, messages = staged(kind)
        for site, message in messages.items():
            endorsement, cast.members[site] = cast.members[site].endorse(message)
            tally = tally.endorse(endorsement)
        reveals = {site: cast.members[site].reveal(message)[0] for site, message in tally.endorsed().items()}
        liar = cast.sites[0]
        sent = Reveal(
            cast.run, data.draw(kept(NAMES, liar)), data.draw(kept(NUMBERS, 1)), data.draw(kept(ARRAYS, b"true"))
        )
        if isinstance(sent.answer, bytes):
            sent = replace(sent, answer=reveals[liar].answer)
        for site in cast.sites:
            if site != sent.site:
                tally = tally.reveal(reveals[site])
        before = tally_state(tally)
        try:
            later = tally.reveal(sent)
        except ProtocolError:
            assert tally_state(tally) == before
            return
        honest = sent.answer is reveals[liar].answer and sent.site == liar
        try:
            later.opened()
        except ProtocolError:
            assert not honest
        else:
            assert honest


@pytest.mark.parametrize("kind", ["masking-32", pytest.param("rlwe-25", marks=needs_rlwe)])
def test_a_false_answer_spoils_the_sum_aloud_where_more_answer_than_needed(kind: str) -> None:
    cast, _, tally, messages = staged(kind)
    for site, message in messages.items():
        endorsement, cast.members[site] = cast.members[site].endorse(message)
        tally = tally.endorse(endorsement)
    for site, message in tally.endorsed().items():
        reveal, _ = cast.members[site].reveal(message)
        if site == cast.sites[-1]:
            reveal = replace(reveal, answer=(reveal.answer + np.uint16(1)) % np.uint16(65521))
        tally = tally.reveal(reveal)
    with pytest.raises(ProtocolError, match="the shares do not belong together"):
        tally.opened()


def test_a_tally_refuses_a_message_of_another_run() -> None:
    one, two = scene.ensemble(4, 3, "one"), scene.ensemble(4, 3, "two")
    scheme = scheme_of("masking-32", one.group)
    stray = two.protect(two.sites[0], scheme, np.zeros(LENGTH, np.uint32))
    with pytest.raises(ProtocolError, match="another round or run"):
        one.tally(scheme).contribute(stray)


class TestMember:
    def test_keeps_only_the_latest_rounds_open(self) -> None:
        cast = scene.ensemble(4, 3)
        scheme = scheme_of("masking-32", cast.group)
        updates = {
            number: {site: cast.protect(site, scheme, np.zeros(LENGTH, np.uint32), number) for site in cast.sites}
            for number in range(1, 7)
        }
        site = cast.sites[1]
        assert sorted(cast.members[site].rounds) == [3, 4, 5, 6]
        with pytest.raises(ProtocolError, match="round 2 is over at this site"):
            cast.members[site].endorse(cast.survivors(site, cast.sites, updates[2], 2))
        for number in (6, 3, 5):  # those that are open may be opened in any order
            endorsement, _ = cast.members[site].endorse(cast.survivors(site, cast.sites, updates[number], number))
            assert endorsement.round == number

    def test_has_nothing_left_of_a_round_that_it_revealed(self) -> None:
        cast, _, tally, messages = staged()
        for site, message in messages.items():
            endorsement, cast.members[site] = cast.members[site].endorse(message)
            tally = tally.endorse(endorsement)
        for site, message in tally.endorsed().items():
            assert cast.members[site].rounds[1].shares and cast.members[site].rounds[1].seeds
            _, later = cast.members[site].reveal(message)
            assert not later.rounds[1].shares and not later.rounds[1].seeds
            with pytest.raises(Repeated, match="is revealed already"):
                later.reveal(message)
            with pytest.raises(Repeated, match="are endorsed already"):
                later.endorse(messages[site])

    def test_shows_no_secret(self) -> None:
        cast, _, _, messages = staged()
        site = cast.sites[2]
        _, member = cast.members[site].endorse(messages[site])
        text = repr(member) + repr(member.rounds) + repr(member.pairs)
        secrets = [*member.pairs.keys, *member.pairs.seeds, *member.rounds[1].seeds.values()]
        for secret in secrets:
            assert secret.hex() not in text
            assert repr(secret)[2:14] not in text
        assert "array" not in text
