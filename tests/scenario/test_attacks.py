"""A coordinator that lies, and sites that help it: each lie ends in a refusal that says why and shows nothing."""

import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace

from cohortium.coordinator.rounds import step
from cohortium.core import codec
from cohortium.core.errors import ProtocolError
from cohortium.core.messages import (
    MOST_MISSED,
    Announcement,
    CloseRun,
    Endorsed,
    Endorsement,
    KeySet,
    MaskedUpdate,
    OpenRound,
    Refusal,
    Reveal,
    Survivors,
    decode_from_site,
)
from cohortium.core.protection import Aggregation
from cohortium.core.random import Randomness
from cohortium.secagg import keys
from cohortium.secagg.group import tolerance
from cohortium.secagg.masking import Masking
from cohortium.secagg.protocol import NO_TOTAL
from cohortium.secagg.shamir import from_words, reconstruct
from cohortium.secagg.stream import PLAIN, add_streams

try:
    from cohortium.secagg.threshold import Threshold
except ImportError:
    Threshold = None  # type: ignore[assignment,misc]


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
staging = load_module("scenario_staging", HERE / "staging.py")
scene = load_module("secagg_ensemble", HERE.parent / "secagg" / "ensemble.py")
NAMES = staging.NAMES
needs_rlwe = pytest.mark.skipif(Threshold is None, reason="needs numba")


# What a refusal is


def at_agreement() -> Any:
    return staging.Consortium.of(staging.heart()).announce()


def at_round(number: int = 1) -> Any:
    """Returns a consortium whose sites have contributed to a round, and served the rounds before to the end."""
    cast = staging.Consortium.of(staging.heart()).agree()
    for earlier in range(1, number):
        cast.serve(earlier)
    return cast.ask(number)


def hidden(cast: Any, *sites: str) -> None:
    """What the sites sent is as far from what they have as chance would have it."""
    gaps = []
    for (number, site), update in cast.updates.items():
        if site in sites:
            plain = staging.plain_vector(cast.plan, cast.broadcasts[number], site)
            assert update.values.dtype == plain.dtype and update.values.shape == plain.shape
            gaps.append(np.abs((update.values - plain).view(np.int32).astype(float)) / 2**31)
    if gaps:
        together = np.concatenate(gaps)
        # a mask's distance from zero is uniform on 0..1
        assert abs(together.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(together))
        assert (together < 0.01).mean() < 0.15
        assert (together > 0).all()


def refuses(cast: Any, site: str, message: Any, words: str) -> None:
    """A site refuses for the reason given and for good, and says nothing else, then or later."""
    (said,) = cast.say(site, message)
    assert isinstance(said, Refusal), said
    assert words in said.reason, said.reason
    # numbers in it are the coordinator's own: rounds and sites
    assert {int(number) for number in re.findall(r"\d+", said.reason)} <= {*range(10), 27, 99}
    later: list[Any] = [message, cast.key_set()]
    for number in list(cast.broadcasts):
        later += [cast.survivors(site, NAMES, number), cast.round(number), cast.round(number + 1)]
    for one in later:
        assert [type(answer) for answer in cast.say(site, one)] == [Refusal]
    hidden(cast, site)


def refuses_the_round(cast: Any, site: str, message: Any, words: str) -> None:
    """A site refuses for the reason given, says nothing else, and stays in the run: another may be to blame."""
    for _ in range(2):
        (said,) = cast.say(site, message)
        assert isinstance(said, Refusal), said
        assert words in said.reason, said.reason
        assert said.round == message.round
        assert {int(number) for number in re.findall(r"\d+", said.reason)} <= set(range(10))
    hidden(cast, site)


def ignores(cast: Any, site: str, message: Any) -> None:
    assert cast.say(site, message) == []
    hidden(cast, site)


def forged_key(cast: Any, site: str, run: str | None = None) -> Announcement:
    """A key of the coordinator's own in a site's name."""
    return keys.announce(staging.STRANGER, X25519PrivateKey.generate(), run or cast.run, cast.plan.study_id, site)


class TestKeys:
    @pytest.mark.parametrize("swapped", NAMES)
    def test_swapped(self, swapped: str) -> None:
        cast = at_agreement()
        told = replace(
            cast.key_set(),
            announcements=tuple(
                forged_key(cast, one.site) if one.site == swapped else one for one in cast.key_set().announcements
            ),
        )
        for site in NAMES:
            refuses(cast, site, told, f"the key of site '{swapped}' is not signed by its pinned identity")

    def test_exchanged_between_two_sites(self) -> None:
        cast = at_agreement()
        one, two, *rest = cast.key_set().announcements
        told = KeySet(cast.run, (replace(one, site=two.site), replace(two, site=one.site), *rest))
        told = replace(told, announcements=tuple(sorted(told.announcements, key=lambda entry: entry.site)))
        refuses(cast, "zurich", told, "is not signed by its pinned identity")

    @pytest.mark.parametrize("place", ["beside", "instead"])
    def test_of_an_invented_site(self, place: str) -> None:
        cast = at_agreement()
        entries = cast.key_set().announcements
        told = (
            (*entries[:3], forged_key(cast, "yarrow"), entries[3])
            if place == "beside"
            else (
                *entries[1:3],
                forged_key(cast, "yarrow"),
                entries[3],
            )
        )
        refuses(cast, "zurich", KeySet(cast.run, told), "it must list sites of the study, once each and in order")

    def test_of_too_few_sites(self) -> None:
        cast = at_agreement()
        refuses(cast, "zurich", KeySet(cast.run, cast.key_set().announcements[2:]), "it holds 2 sites")

    def test_one_in_two_sites_names(self) -> None:
        cast = at_agreement()
        one, two, *rest = cast.key_set().announcements
        refuses(cast, "zurich", KeySet(cast.run, (one, replace(two, public_key=one.public_key), *rest)), "the same key")

    def test_of_an_earlier_run(self) -> None:
        cast = at_agreement()
        old = staging.Consortium.of(staging.heart(), "run-0", cast.agents).announce()
        mixed = (*old.key_set().announcements[:3], cast.announcements["zurich"])
        refuses(cast, "zurich", KeySet(cast.run, mixed), "is not signed by its pinned identity")

    def test_without_the_receivers_own(self) -> None:
        cast = at_agreement()
        refuses(cast, "zurich", KeySet(cast.run, cast.key_set().announcements[:3]), "it lacks the key that this site")

    def test_two_honest_looking_sets_have_nothing_in_common_that_adds_up(self) -> None:
        """Each of two sites is left out of what the other sees. All keys are genuine, so nobody can refuse."""
        cast = at_agreement()
        seen = {site: [name for name in NAMES if name != {"zurich": "budapest"}.get(site, "zurich")] for site in NAMES}
        for site in NAMES:
            entries = tuple(cast.announcements[name] for name in seen[site])
            assert cast.say(site, KeySet(cast.run, entries)) == []
        cast.ask(1)
        plain = {site: staging.plain_vector(cast.plan, cast.broadcasts[1], site) for site in NAMES}
        parts = [cast.updates[1, site] for site in ("cleveland", "long-beach", "zurich")]
        total = np.add.reduce([part.values for part in parts], dtype=np.uint32)
        expected = np.add.reduce([plain[part.site] for part in parts], dtype=np.uint32)
        gaps = np.abs((total - expected).view(np.int32).astype(float)) / 2**31
        assert abs(gaps.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(gaps))
        ignores(cast, "zurich", cast.survivors("zurich", NAMES))


class TestSurvivorSets:
    @pytest.mark.parametrize(
        ("chosen", "words"),
        {
            "a site twice": (("budapest", "budapest", "cleveland", "zurich"), "it must list sites of the run in order"),
            "the receiver twice": (
                ("budapest", "cleveland", "zurich", "zurich"),
                "it must list sites of the run in order",
            ),
            "out of order": (("cleveland", "budapest", "zurich"), "it must list sites of the run in order"),
            "an invented site": (("budapest", "cleveland", "yarrow", "zurich"), "it must list sites of the run"),
            "without the receiver": (("budapest", "cleveland", "long-beach"), "it must list sites of the run in order"),
            "empty": ((), "it must list sites of the run"),
            "everybody else is lost": (("zurich",), "a survivor set of 1 sites was refused: below 3"),
            "two": (("budapest", "zurich"), "a survivor set of 2 sites was refused: below 3"),
        }.values(),
        ids=lambda value: "-".join(value) if isinstance(value, tuple) else None,
    )
    def test_that_no_honest_coordinator_signs(self, chosen: tuple[str, ...], words: str) -> None:
        cast = at_round()
        refuses(cast, "zurich", cast.survivors("zurich", chosen), words)

    @pytest.mark.parametrize("how", ["stranger", "round", "run", "study", "purpose", "set", "broadcast", "zeros"])
    def test_with_a_forged_signature(self, how: str) -> None:
        cast = at_round(2)
        good = cast.survivors("zurich", NAMES, 2)
        parts = [site.encode() for site in NAMES]
        key, context = staging.COORDINATOR, cast.context(2)
        entries = tuple(cast.announcements.values())
        other_run = keys.session_digest("run-2", cast.plan.study_id, 3, entries)
        other_study = keys.session_digest(cast.run, "sha256:other", 3, entries)
        signatures = {
            "stranger": cast.signed(NAMES, 2, staging.STRANGER),
            "round": cast.signed(NAMES, 1),
            "run": staging.sign(key, staging.PURPOSE, keys.round_context(other_run, 2, cast.heard(2)), *parts),
            "study": staging.sign(key, staging.PURPOSE, keys.round_context(other_study, 2, cast.heard(2)), *parts),
            "purpose": cast.signed(NAMES, 2, purpose="cohortium run key v1"),
            "set": cast.signed(NAMES[1:], 2),
            "broadcast": staging.sign(key, staging.PURPOSE, keys.round_context(cast.session, 2, cast.heard(1)), *parts),
            "zeros": bytes(64),
        }
        assert staging.sign(key, staging.PURPOSE, context, *parts) == good.signature
        refuses(cast, "zurich", replace(good, signature=signatures[how]), "the pinned coordinator did not sign it")

    @pytest.mark.parametrize(
        ("how", "words"),
        [
            ("truncated", "one share of each other survivor"),
            ("left out", "one share of each other survivor"),
            ("too many", "one share of each other survivor"),
            ("none", "one share of each other survivor"),
            ("reordered", "a share of site 'budapest' was refused: it was altered"),
            ("altered", "a share of site 'cleveland' was refused: it was altered"),
            ("another receiver's", "a share of site 'cleveland' was refused: it was altered"),
            ("another round's", "a share of site 'cleveland' was refused: it was altered"),
            ("its own", "a share of site 'cleveland' was refused: it was altered"),
        ],
    )
    def test_with_shares_that_were_tampered_with(self, how: str, words: str) -> None:
        cast = at_round(2)
        good = cast.survivors("zurich", NAMES, 2)
        first, second, third = good.sealed
        changed = {
            "truncated": (first, second[:-1], third),
            "left out": (first, third),
            "too many": (first, second, third, third),
            "none": (),
            "reordered": (second, first, third),
            "altered": (first, second[:9] + bytes([second[9] ^ 1]) + second[10:], third),
            "another receiver's": (first, cast.survivors("budapest", NAMES, 2).sealed[0], third),
            "another round's": (first, cast.survivors("zurich", NAMES, 1).sealed[1], third),
            # what zurich itself dealt to cleveland: both ends know the pair's key
            "its own": (first, cast.survivors("cleveland", NAMES, 2).sealed[2], third),
        }
        refuse = refuses_the_round if "altered" in words else refuses
        refuse(cast, "zurich", replace(good, sealed=changed[how]), words)

    def test_a_second_one_for_a_site(self) -> None:
        for first, second in (NAMES, NAMES[1:]), (NAMES[1:], NAMES), (NAMES[1:], (NAMES[0], *NAMES[2:])):
            cast = at_round()
            assert isinstance(cast.say("zurich", cast.survivors("zurich", first))[0], Endorsement)
            refuses(cast, "zurich", cast.survivors("zurich", second), "a second survivor set for round 1 was refused")

    def test_a_second_one_after_the_reveal(self) -> None:
        cast = at_round()
        said = cast.endorse()
        assert isinstance(cast.say("zurich", cast.endorsed("zurich", said))[0], Reveal)
        refuses(cast, "zurich", cast.survivors("zurich", NAMES[1:]), "a second survivor set for round 1 was refused")

    def test_the_same_one_again_is_answered_once(self) -> None:
        cast = at_round()
        said = cast.endorse()
        ignores(cast, "zurich", cast.survivors("zurich"))
        assert isinstance(cast.say("zurich", cast.endorsed("zurich", said))[0], Reveal)
        ignores(cast, "zurich", cast.endorsed("zurich", said))
        ignores(cast, "zurich", cast.survivors("zurich"))

    def test_that_count_a_site_in_for_some_and_as_lost_for_others(self) -> None:
        """One message counts zurich as a survivor, another as lost: its self mask here, its pair keys there."""
        everybody, without = NAMES, NAMES[:3]
        for told in combinations(without, 1), combinations(without, 2):
            for hears in told:
                cast = at_round()
                said = cast.endorse([site for site in NAMES if site not in hears], everybody)
                less = cast.endorse(hears, without)
                larger = {site: cast.endorsed(site, said) for site in said}
                smaller = {site: cast.endorsed(site, less, without) for site in less}
                answers = {site: cast.say(site, message) for site, message in {**larger, **smaller}.items()}
                reveals = [site for site, (answer,) in answers.items() if isinstance(answer, Reveal)]
                # three endorsed the larger set only where one was told of the smaller one
                assert reveals == (list(said) if len(said) == 3 else [])
                for site in less:
                    (answer,) = answers[site]
                    assert isinstance(answer, Refusal)
                    assert "endorsements of" in answer.reason and "below 2 of them" in answer.reason
                hidden(cast, *NAMES)

    def test_before_the_site_contributed(self) -> None:
        cast = staging.Consortium.of(staging.heart()).agree().ask(1, NAMES[:3])
        refuses(cast, "zurich", cast.survivors("zurich", NAMES), "nothing open in it")


class TestEndorsements:
    @pytest.mark.parametrize("number", [1, 2])
    def test_a_reveal_asked_for_before_any_survivor_set(self, number: int) -> None:
        cast = at_round()
        others = NAMES[:3]
        asked = Endorsed(cast.run, number, others, (bytes(32),) * 3, NO_TOTAL)
        refuses(cast, "zurich", asked, "endorsements were refused" if number == 1 else "nothing open in it")

    @pytest.mark.parametrize("count", [0, 1])
    def test_too_few(self, count: int) -> None:
        cast = at_round()
        said = cast.endorse()
        good = cast.endorsed("zurich", said)
        asked = replace(good, sites=good.sites[:count], tags=good.tags[:count])
        refuses_the_round(cast, "zurich", asked, f"endorsements of {count} other sites are of the set")

    def test_forged(self) -> None:
        for tag in (bytes(32), bytes(range(32))):
            cast = at_round()
            said = cast.endorse()
            good = cast.endorsed("zurich", said)
            asked = replace(good, sites=good.sites[:2], tags=(good.tags[0], tag))
            refuses_the_round(cast, "zurich", asked, "endorsements of 1 other sites are of the set")
            # among enough that are true a false one counts for nothing
            asked = replace(good, tags=(good.tags[0], tag, good.tags[2]))
            assert isinstance(cast.say("zurich", asked)[0], Reveal)

    def test_of_another_set(self) -> None:
        """Zurich holds the set of all; the others endorsed another one, with it and without budapest."""
        cast = at_round()
        cast.endorse(["zurich"])
        said = cast.endorse(["cleveland", "long-beach"], NAMES[1:])
        asked = cast.endorsed("zurich", said, NAMES[1:])
        assert asked.sites == ("cleveland", "long-beach")
        refuses_the_round(cast, "zurich", asked, "endorsements of 0 other sites are of the set")

    def test_of_another_round(self) -> None:
        cast = at_round(1)
        said = cast.endorse()
        cast.broadcasts[2] = at_round(2).broadcasts[2]
        cast.ask(2)
        cast.endorse(["zurich"], number=2)
        asked = replace(cast.endorsed("zurich", said), round=2)
        refuses_the_round(cast, "zurich", asked, "endorsements of 0 other sites are of the set")

    def test_given_to_another_site(self) -> None:
        cast = at_round()
        said = cast.endorse()
        to_budapest, to_zurich = cast.endorsed("budapest", said), cast.endorsed("zurich", said)
        asked = replace(to_zurich, tags=(to_zurich.tags[0], *to_budapest.tags[:2]))
        refuses_the_round(cast, "zurich", asked, "endorsements of 1 other sites are of the set")

    def test_its_own_held_up_as_the_others(self) -> None:
        cast = at_round()
        (mine,) = cast.say("zurich", cast.survivors("zurich"))
        asked = Endorsed(cast.run, 1, NAMES[:3], mine.tags, NO_TOTAL)
        refuses_the_round(cast, "zurich", asked, "endorsements of 0 other sites are of the set")

    @pytest.mark.parametrize("how", ["twice", "with itself", "out of order", "of a lost site", "tags left out"])
    def test_that_do_not_name_other_survivors(self, how: str) -> None:
        cast = at_round()
        said = cast.endorse(NAMES[1:], NAMES[1:])
        good = cast.endorsed("zurich", said, NAMES[1:])
        one, two = good.tags
        sites, tags = {
            "twice": (("cleveland", "cleveland"), (one, one)),
            "with itself": (("cleveland", "zurich"), (one, two)),
            "out of order": (("long-beach", "cleveland"), (two, one)),
            "of a lost site": (("budapest", "cleveland"), (one, one)),
            "tags left out": (good.sites, (one,)),
        }[how]
        refuses(
            cast, "zurich", replace(good, sites=sites, tags=tags), "they must be of other survivors, once each and in"
        )

    def test_no_two_sets_get_a_quorum_however_the_sites_are_told_apart(self) -> None:
        """Four sites of which three are needed: whoever hears which of the sets, only one can be opened."""
        sets = [NAMES, *combinations(NAMES, 3)]
        for first, second in combinations(sets, 2):
            for mask in range(16):
                cast_sets = [second if mask >> place & 1 else first for place in range(4)]
                count = {chosen: cast_sets.count(chosen) for chosen in (first, second)}
                assert sum(number >= 3 for number in count.values()) <= 1


def spelled_otherwise(cast: Any, number: int = 1) -> bytes:
    """Returns a longer spelling of a broadcast, so that the vectors themselves are equal."""
    usual: bytes = cast.broadcasts[number]
    other = usual.replace(b"\xc4\x00", b"\xc5\x00\x00", 1)
    kind = cast.plan.algorithm.broadcast_type
    assert other != usual and codec.decode(other, kind) == codec.decode(usual, kind)
    return other


class TestRounds:
    def test_replayed(self) -> None:
        cast = at_round(2)
        for number in (1, 2):
            ignores(cast, "zurich", cast.round(number))
        # a late copy costs the site nothing
        assert isinstance(cast.say("zurich", cast.survivors("zurich", NAMES, 2))[0], Endorsement)

    @pytest.mark.parametrize(
        "rounds",
        [
            3,
            5,
        ],
    )
    def test_a_late_copy_of_an_old_rounds_messages_costs_the_site_nothing(self, rounds: int) -> None:
        cast = staging.Consortium.of(staging.heart()).agree()
        for number in range(1, rounds + 1):
            cast.serve(number)
        ignores(cast, "zurich", cast.survivors("zurich", NAMES, 1))
        assert len(cast.serve(rounds + 1).updates) == 4 * (rounds + 1)

    def test_asked_again_otherwise(self) -> None:
        """The same round with another broadcast: two vectors under one number would show their difference."""
        cast = at_round()
        ignores(cast, "zurich", replace(cast.round(1), broadcast=spelled_otherwise(cast)))

    def test_different_broadcasts_to_different_sites(self) -> None:
        """The odd one out stays masked; neither it nor the others take each other's shares."""
        cast = staging.Consortium.of(staging.heart()).agree().ask(1, NAMES[:3])
        other = spelled_otherwise(cast)
        (cast.updates[1, "zurich"],) = cast.say("zurich", replace(cast.round(1), broadcast=other))
        usual = cast.survivors("cleveland", NAMES)
        refuses_the_round(cast, "cleveland", usual, "a share of site 'zurich' was refused: it was altered")
        refuses(cast, "zurich", cast.survivors("zurich", NAMES), "the pinned coordinator did not sign it")

        cast = staging.Consortium.of(staging.heart()).agree().ask(1, NAMES[:3])
        (cast.updates[1, "zurich"],) = cast.say("zurich", replace(cast.round(1), broadcast=other))
        told = cast.survivors("zurich", NAMES)
        context = keys.round_context(cast.session, 1, keys.history(b"", other))
        signature = staging.sign(staging.COORDINATOR, staging.PURPOSE, context, *(site.encode() for site in NAMES))
        refuses_the_round(cast, "zurich", replace(told, signature=signature), "a share of site 'budapest' was refused")
        # the three that agree go on without it
        assert len(cast.endorse(NAMES[:3], NAMES[:3])) == 3

    @pytest.mark.parametrize("number", [3, 27, 99])
    def test_ahead(self, number: int) -> None:
        cast = at_round()
        ahead = OpenRound(cast.run, number, cast.broadcasts[1])
        refuses(cast, "zurich", ahead, "is out of order or beyond the study's rounds")

    def test_under_a_wrong_run_name(self) -> None:
        cast = at_round()
        for message in (
            replace(cast.round(2), run="run-2"),
            replace(cast.survivors("zurich"), run="run-2"),
            replace(cast.key_set(), run="run-2"),
        ):
            (said,) = cast.say("zurich", message)
            assert isinstance(said, Refusal)
            assert (said.run, said.reason) == ("run-2", "a message was refused: no such run is open at this site")
        # the run that is open is none the worse
        assert isinstance(cast.say("zurich", cast.survivors("zurich"))[0], Endorsement)

    def test_of_one_run_in_another(self) -> None:
        """Both are open at the same agents, on the same study and data, with the same broadcast."""
        one = staging.Consortium.of(staging.heart(), "run-1").agree()
        two = staging.Consortium.of(staging.heart(), "run-2", one.agents).agree()
        one.ask(1)
        two.ask(1)
        for site in NAMES:
            assert (one.updates[1, site].values != two.updates[1, site].values).mean() > 0.9
        stray = replace(one.survivors("zurich"), run="run-2")
        refuses(two, "zurich", stray, "the pinned coordinator did not sign it")
        said = one.endorse()
        two.endorse(NAMES[:3])
        stray_tags = replace(one.endorsed("budapest", said), run="run-2")
        refuses_the_round(two, "budapest", stray_tags, "endorsements of 0 other sites are of the set")

    def test_of_a_whole_earlier_run_again(self) -> None:
        """What was said in a run that is over is worth nothing in the next, under its own name or the next one's."""
        old = at_round(2)
        said = old.endorse(number=2)
        for site in NAMES:
            assert old.say(site, CloseRun(old.run, "finished")) == []
        messages = [old.key_set(), old.round(1), old.round(2), old.survivors("zurich", NAMES, 2)]
        messages.append(old.endorsed("zurich", said))
        (name_used,) = old.say("zurich", old.opening())
        assert isinstance(name_used, Refusal) and name_used.reason == "a run was refused: its name was used before"
        for message in messages:
            (answer,) = old.say("zurich", message)
            assert isinstance(answer, Refusal)
            assert answer.reason == "a message was refused: no such run is open at this site"
        for point, words in (
            (0, "is not signed by its pinned identity"),
            (3, "nothing open in it"),
            (4, "nothing open in it"),
        ):
            run = f"run-{point + 2}"
            new = staging.Consortium.of(staging.heart(), run, old.agents).announce()
            if point:
                assert new.say("zurich", new.key_set()) == []
            (answer,) = new.say("zurich", replace(messages[point], run=run))
            assert isinstance(answer, Refusal)
            assert words in answer.reason
        hidden(old, "zurich")

    def test_of_a_study_that_nobody_may_leave(self) -> None:
        """There is no message by which such a site could be made to unmask anything."""
        cast = staging.Consortium.of(staging.heart(Aggregation())).agree().ask(1)
        assert all(not update.sealed for update in cast.updates.values())
        ignores(cast, "zurich", Survivors(cast.run, 1, NAMES, cast.signed(NAMES)))
        ignores(cast, "cleveland", Endorsed(cast.run, 1, NAMES[:1], (bytes(32),), NO_TOTAL))
        refuses(cast, "zurich", Survivors(cast.run, 2, NAMES, cast.signed(NAMES)), "nothing open in it")


class TestMissedRounds:
    def second_phase(self) -> tuple[Any, bytes]:
        """Returns a consortium that agreed on keys, and the broadcast of its second round."""
        later = at_round(2)
        return staging.Consortium.of(staging.heart()).agree(), later.broadcasts[2]

    def test_that_were_are_made_up_for(self) -> None:
        cast, second = self.second_phase()
        first = cast.round(1).broadcast
        (said,) = cast.say("zurich", OpenRound(cast.run, 2, second, (first,)))
        assert isinstance(said, MaskedUpdate)

    def test_too_few(self) -> None:
        cast, second = self.second_phase()
        refuses(cast, "zurich", OpenRound(cast.run, 2, second), "round 2 was refused: it is out of order")

    def test_in_another_rounds_words(self) -> None:
        cast, second = self.second_phase()
        first = cast.round(1).broadcast
        for missed, words in (((second,), "skips the first phase"), ((first, first), "takes one round")):
            cast = staging.Consortium.of(staging.heart()).agree()
            refuses(cast, "zurich", OpenRound(cast.run, len(missed) + 1, second, missed), words)

    def test_in_words_that_are_none(self) -> None:
        cast, second = self.second_phase()
        refuses(cast, "zurich", OpenRound(cast.run, 2, second, (b"\xc1",)), "malformed")

    def test_too_many(self) -> None:
        cast, second = self.second_phase()
        first = cast.round(1).broadcast
        message = OpenRound(cast.run, MOST_MISSED + 2, second, (first,) * (MOST_MISSED + 1))
        with pytest.raises(ProtocolError, match="malformed"):
            cast.say("zurich", message)

    def test_beyond_the_studys_rounds(self) -> None:
        cast, second = self.second_phase()
        first = cast.round(1).broadcast
        refuses(cast, "zurich", OpenRound(cast.run, 27, second, (first,)), "beyond the study's rounds")

    def test_where_no_site_may_miss_any(self) -> None:
        cast = staging.Consortium.of(staging.heart(Aggregation())).agree()
        first = cast.round(1).broadcast
        for number, missed in ((2, (first,)), (1, (first,))):
            cast = staging.Consortium.of(staging.heart(Aggregation())).agree()
            message = OpenRound(cast.run, number, first, missed)
            refuses(cast, "zurich", message, "the study lets no site miss a round")

    def test_claimed_of_a_round_that_was_answered_change_nothing(self) -> None:
        """The site saw round 1 itself, so it does not take another's word for what was asked there."""
        plain, lied = at_round(1), at_round(1)
        later, second = self.second_phase()
        asked = OpenRound(plain.run, 2, second)
        (honest,) = plain.say("zurich", asked)
        (answer,) = lied.say("zurich", replace(asked, missed=(b"\xc1 nothing that was ever asked",)))
        assert isinstance(answer, MaskedUpdate)
        assert codec.encode(answer) == codec.encode(honest)
        assert later.run == plain.run


class TestImpersonation:
    """One site speaks in another's name; the transport knows who it is."""

    def pending(self, phase: str) -> tuple[Any, dict[str, Any]]:
        """Returns an honest run in some phase, and the sites' answers that it has not heard yet."""
        cast = staging.Consortium.of(staging.heart())
        lane = staging.Lane(cast.plan, cast.agents, cast.run)
        while lane.state.phase != phase or not isinstance(lane.queue[0][1], self.asks[phase]):
            lane.advance()
        answers = {}
        while lane.queue:
            site, message = lane.queue.popleft()
            (data,) = cast.agents[site].receive(codec.encode(message))
            answers[site] = decode_from_site(data)
        assert set(answers) == set(NAMES)
        return lane.state, answers

    asks = {"keys": object, "collect": OpenRound, "endorse": Survivors, "reveal": Endorsed}  # noqa: RUF012
    said = {"keys": Announcement, "collect": MaskedUpdate, "endorse": Endorsement, "reveal": Reveal}  # noqa: RUF012

    @pytest.mark.parametrize("phase", ["keys", "collect", "endorse", "reveal"])
    def test_is_refused_whatever_is_said(self, phase: str) -> None:
        state, answers = self.pending(phase)
        assert {type(answer) for answer in answers.values()} == {self.said[phase]}
        before = {name: getattr(state, name) for name in state.__struct_fields__}
        for victim, liar in combinations(NAMES, 2):
            for message in (
                answers[victim],
                replace(answers[liar], site=victim),
                Refusal(state.run, victim, "I leave"),
            ):
                with pytest.raises(ProtocolError, match="in another site's name"):
                    step(state, liar, message)
            with pytest.raises(ProtocolError, match="it is for another run or in another site's name"):
                step(state, victim, replace(answers[victim], run="run-2"))
            with pytest.raises(ProtocolError, match="in another site's name"):
                step(state, "mallory", replace(answers[liar], site="mallory"))
        assert all(getattr(state, name) is value for name, value in before.items())

    def test_a_site_that_repeats_anothers_endorsement_convinces_nobody(self) -> None:
        """Its tags are under the keys of pairs, so those of cleveland are false in budapest's name."""
        cast = at_round()
        said = cast.endorse()
        said["budapest"] = replace(said.pop("cleveland"), site="budapest")
        asked = cast.endorsed("zurich", said)
        assert asked.sites == ("budapest", "long-beach")
        refuses_the_round(cast, "zurich", asked, "endorsements of 1 other sites are of the set")

    def test_a_key_announced_in_anothers_name_reaches_nobody(self) -> None:
        cast = at_agreement()
        liar = cast.agents["budapest"].membership.identity
        mine = keys.announce(liar, X25519PrivateKey.generate(), cast.run, cast.plan.study_id, "cleveland")
        cast.announcements["cleveland"] = mine
        refuses(cast, "zurich", cast.key_set(), "the key of site 'cleveland' is not signed by its pinned identity")


# Corrupt sites beside the coordinator


def two_sets(
    play: Any, corrupt: Iterable[str], sides: tuple[Iterable[str], Iterable[str]], target: str
) -> dict[int, np.ndarray]:
    """Tries to open the sum over everybody and the sum without one site; returns those that opened, 0 and 1.

    The difference is that site's vector. Each honest site hears of the set of its side; corrupt ones speak for both.
    """
    corrupt = tuple(corrupt)
    opened = {}
    for which, side in enumerate(sides):
        chosen = play.cast.sites if which == 0 else play.cast.group.peers(target)
        said = {site: play.endorse(site, chosen) for site in side if site in chosen}
        answers = {}
        for site in corrupt:
            said[site], answers[site] = play.forked(site, chosen)
        for site in side:
            if site in chosen:
                try:
                    answers[site] = play.reveal(site, scene.answered(site, said, chosen))
                except ProtocolError as error:
                    assert "endorsements of" in str(error) and "the sum stays closed" in str(error)
        try:
            opened[which] = play.opened(chosen, answers.values())
        except ProtocolError as error:
            assert "the sum stays closed" in str(error)
    return opened


def stripped(play: Any, target: str, known: Mapping[str, bytes]) -> np.ndarray:
    """Returns a site's vector from its update and all its masks: the self mask under its own name, and the pairs'."""
    values = play.updates[target].values.copy()
    later = [key for site, key in known.items() if site >= target]
    earlier = [key for site, key in known.items() if site < target]
    add_streams(values, earlier, later, PLAIN)
    stripped_vector: np.ndarray = values
    return stripped_vector


SIZES = [(4, 1), (5, 1), (6, 2), (7, 2), (7, 3), (8, 3), (9, 4)]
KINDS = [Masking, pytest.param(Threshold, marks=needs_rlwe)]


@pytest.mark.parametrize(("count", "dropouts"), SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
class TestCollusion:
    """The best use of two survivor sets, at the bound and one site beyond it."""

    def play(self, kind: Any, count: int, dropouts: int) -> Any:
        return scene.Rehearsal.of(count, count - dropouts, kind, bits=32 if kind is Masking else 25)

    def test_at_the_bound_no_split_of_the_honest_opens_both(self, kind: Any, count: int, dropouts: int) -> None:
        bound = tolerance(count, dropouts).malicious
        play = self.play(kind, count, dropouts)
        corrupt, honest = play.cast.sites[:bound], play.cast.sites[bound:]
        fresh, target = dict(play.cast.members), honest[-1]
        sizes = range(1, len(honest)) if kind is Masking else [len(honest) // 2, count - dropouts - bound]
        for size in sizes:
            for side in list(combinations(honest, size))[:12]:
                play.cast.members = dict(fresh)
                rest = tuple(site for site in honest if site not in side)
                opened = two_sets(play, corrupt, (side, rest), target)
                assert len(opened) <= 1
                for which, total in opened.items():
                    chosen = play.cast.sites if which == 0 else play.cast.group.peers(target)
                    assert (total == scene.plain_sum(chosen, play.plain)).all()
                    # the sum holds the vectors of two honest sites or more
                    assert len(set(chosen) - set(corrupt)) >= 2

    def test_one_corrupt_site_more_would_suffice(self, kind: Any, count: int, dropouts: int) -> None:
        """So the bound cannot be stated any higher."""
        bound = tolerance(count, dropouts).malicious
        play = self.play(kind, count, dropouts)
        corrupt, honest = play.cast.sites[: bound + 1], play.cast.sites[bound + 1 :]
        target = honest[-1]
        assert len(honest) == 2 * dropouts
        opened = two_sets(play, corrupt, (honest[dropouts:], honest[:dropouts]), target)
        assert (opened[0] - opened[1] == play.plain[target]).all()


class TestCuriousSites:
    """With a coordinator that follows the protocol, it takes as many corrupt sites as open a secret."""

    def gathered(self, count: int, dropouts: int, more: int) -> tuple[Any, str, list[str]]:
        play = scene.Rehearsal.of(count, count - dropouts)
        corrupt = list(play.cast.sites[: tolerance(count, dropouts).curious + more])
        return play, play.cast.sites[-1], corrupt

    def known(self, play: Any, target: str, corrupt: list[str]) -> dict[str, bytes]:
        """Rebuilds a site's masks from the shares that it dealt to the corrupt sites."""
        held = {}
        for site in corrupt:
            message = play.cast.survivors(site, play.cast.sites, play.updates)
            _, later = play.cast.members[site].endorse(message)
            held[play.cast.sites.index(site)] = later.rounds[1].shares[target]
        threshold = play.cast.group.threshold
        return dict(zip(play.cast.sites, from_words(reconstruct(held, threshold)), strict=True))

    @pytest.mark.parametrize(("count", "dropouts"), [(5, 1), (7, 2), (7, 3)])
    def test_at_the_bound_they_rebuild_nothing(self, count: int, dropouts: int) -> None:
        play, target, corrupt = self.gathered(count, dropouts, 0)
        assert len(corrupt) < play.cast.group.threshold
        with pytest.raises(ProtocolError, match="shares were given, and it takes"):
            self.known(play, target, corrupt)
        # any guess at the one share that is missing gives another secret
        seen = set()
        _, later = play.cast.members[corrupt[0]].endorse(play.cast.survivors(corrupt[0], play.cast.sites, play.updates))
        share = later.rounds[1].shares[target]
        for guess in range(0, 65521, 6007):
            held = dict.fromkeys(range(play.cast.group.threshold - 1), share)
            held[count - 1] = np.full_like(share, guess)
            seen.add(reconstruct(held, play.cast.group.threshold).tobytes())
        assert len(seen) == len(range(0, 65521, 6007))

    # with five sites and one to lose, one more would leave a single honest site, which the sum itself shows
    @pytest.mark.parametrize(("count", "dropouts"), [(6, 2), (7, 2), (7, 3)])
    def test_one_more_rebuilds_a_sites_masks(self, count: int, dropouts: int) -> None:
        play, target, corrupt = self.gathered(count, dropouts, 1)
        assert (stripped(play, target, self.known(play, target, corrupt)) == play.plain[target]).all()


class TestLargerGroup:
    """Seven sites, three of which may be lost."""

    def test_no_two_sets_of_the_sites_are_both_revealed(self) -> None:
        play = scene.Rehearsal.of(7, 4)
        sites = play.cast.sites
        fresh = dict(play.cast.members)
        for first in combinations(sites, 4):
            play.cast.members = dict(fresh)
            second = tuple(site for site in sites if site not in first[:3])
            said = {site: play.endorse(site, first) for site in first}
            for site in first:
                play.reveal(site, scene.answered(site, said, first))
            late = [site for site in second if site not in first]
            others = {site: play.endorse(site, second) for site in late}
            for site in late:
                with pytest.raises(
                    ProtocolError, match="endorsements of 2 other sites are of the set that this site holds: below 3"
                ):
                    play.reveal(site, scene.answered(site, others, second))
            with pytest.raises(ProtocolError, match="a second survivor set"):
                play.endorse(first[3], second)

    def test_each_site_shows_one_kind_of_share_for_each_peer(self) -> None:
        play = scene.Rehearsal.of(7, 4)
        sites = play.cast.sites
        chosen = (sites[0], sites[2], sites[3], sites[5], sites[6])
        said = {site: play.endorse(site, chosen) for site in chosen}
        held = {site: play.cast.members[site].rounds[1].shares for site in chosen}
        lost = [place for place, site in enumerate(sites) if site not in chosen]
        for site in chosen:
            shown = play.reveal(site, scene.answered(site, said, chosen)).answer
            assert shown.shape == (len(chosen), 1 + len(lost), 18)
            for row, peer in enumerate(chosen):
                own = sites.index(peer)
                assert (shown[row, 0] == held[site][peer][own]).all()
                assert (shown[row, 1:] == held[site][peer][lost]).all()
                kept = {held[site][peer][place].tobytes() for place in range(7) if place not in (own, *lost)}
                assert not kept & {part.tobytes() for part in shown[row]}

    def test_a_late_update_stays_masked_when_its_pair_keys_are_open(self) -> None:
        """The coordinator has it all along; it calls the site lost and gets its pair keys, and not its self mask."""
        play = scene.Rehearsal.of(7, 4, length=2000)
        late, chosen = play.cast.sites[3], (*play.cast.sites[:3], *play.cast.sites[4:])
        said = {site: play.endorse(site, chosen) for site in chosen}
        reveals = [play.reveal(site, scene.answered(site, said, chosen)) for site in chosen]
        assert (play.opened(chosen, reveals) == scene.plain_sum(chosen, play.plain)).all()
        held = {play.cast.sites.index(one.site): one.answer for one in reveals}
        rows = [from_words(row) for row in reconstruct(held, 4)]
        pairs = {site: row[1] for site, row in zip(chosen, rows, strict=True)}
        bare = stripped(play, late, pairs) - play.plain[late]
        gaps = np.abs(bare.view(np.int32).astype(float)) / 2**31
        assert abs(gaps.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(gaps))
        assert (gaps < 0.01).mean() < 0.03


class TestPeersWeaknesses:
    def test_seeds_are_256_bits_wide_and_vary_in_all_of_them(self) -> None:
        """One framework folds its seeds to 32 bits, of which 28 vary: minutes of guessing open a vector."""
        member = scene.ensemble(3, 3).members["a0"]
        seeds = []
        for number in range(1, 257):
            seeds += list(member.pairs.at(number).round_seeds(number).values())
        bits = np.unpackbits(np.frombuffer(b"".join(seeds), np.uint8).reshape(len(seeds), 32), axis=1)
        assert len(set(seeds)) == len(seeds) == 512
        assert (np.abs(bits.mean(axis=0) - 0.5) < 0.15).all()
        key = bytes(range(32))
        streams = []
        for place in range(33):
            changed = bytes(byte ^ (1 if at == place else 0) for at, byte in enumerate(key))
            stream = np.zeros(500, np.uint32)
            add_streams(stream, [changed], [], PLAIN)
            streams.append(stream)
        for one, two in combinations(streams, 2):
            assert (one != two).mean() > 0.99

    def test_self_masks_are_as_wide(self) -> None:
        """The same holds of what a site adds for itself, as its peers could rebuild it."""
        masks = []
        for count, threshold in ((4, 3), (5, 3), (5, 4), (7, 4), (7, 5), (8, 5), (9, 5), (9, 6)):
            play = scene.Rehearsal.of(count, threshold)
            said = {site: play.endorse(site, play.cast.sites) for site in play.cast.sites}
            reveals = [play.reveal(site, scene.answered(site, said, play.cast.sites)) for site in said]
            held = {play.cast.sites.index(one.site): one.answer for one in reveals}
            masks += [from_words(row)[0] for row in reconstruct(held, threshold)]
        assert len(set(masks)) == len(masks) == 54
        values = np.frombuffer(b"".join(masks), np.uint8).reshape(54, 32)
        assert all(len(set(column)) > 35 for column in values.T.tolist())

    def test_survivor_and_dropout_lists_cannot_overlap(self) -> None:
        """One framework's site answers overlapping lists, and so shows both of a peer's shares.

        Here there is no list of dropouts: whoever is no survivor is lost.
        """
        cast = at_round()
        for lists in (("budapest", "cleveland", "zurich", "budapest"), ("budapest", "budapest", "zurich")):
            cast = at_round()
            refuses(cast, "zurich", cast.survivors("zurich", lists), "it must list sites of the run in order")
        assert set(Survivors.__struct_fields__) == {"run", "round", "sites", "signature", "sealed"}

    def test_the_coordinator_can_rebuild_no_key_that_lasts(self) -> None:
        """One framework's aggregator can rebuild every private key.

        Here what it rebuilds masks one round's vectors, and nothing else can be had from it.
        """
        play = scene.Rehearsal.of(5, 3)
        cast, chosen = play.cast, play.cast.sites[:3]
        members = dict(cast.members)
        lasting = {key for member in members.values() for key in (*member.pairs.keys, *member.pairs.seeds)}
        lasting |= {seed for member in members.values() for seed in member.rounds[1].seeds.values()}
        said = {site: play.endorse(site, chosen) for site in chosen}
        reveals = [play.reveal(site, scene.answered(site, said, chosen)) for site in chosen]
        held = {cast.sites.index(one.site): one.answer for one in reveals}
        rebuilt = [key for row in reconstruct(held, 3) for key in from_words(row)]
        assert len(set(rebuilt)) == 9
        assert not set(rebuilt) & lasting
        context = cast.context(1)
        once = {
            keys.purpose_key(members[one].rounds[1].seeds[two], b"cohort mask", context)
            for one in chosen
            for two in cast.sites[3:]
        }
        assert once < set(rebuilt)
        later = {
            keys.purpose_key(seed, b"cohort mask", cast.context(number, broadcast))
            for member in members.values()
            for number, broadcast in ((1, b"other"), (2, b"ask"))
            for seed in member.pairs.at(number).round_seeds(number).values()
        }
        assert not set(rebuilt) & later

    def test_each_element_has_a_mask_of_its_own(self) -> None:
        """One framework adds the same scalar to every element, so that differences stay."""
        play = scene.Rehearsal.of(4, 3, length=5000)
        for site, update in play.updates.items():
            mask = update.values - play.plain[site]
            assert len(set(mask.tolist())) > 4990
            assert len(set(np.diff(mask).tolist())) > 4990

    def test_masks_are_uniform_residues_and_no_floats(self) -> None:
        """One framework's masks are normal floats from one secret: they add noise of a known size, and no secrecy."""
        play = scene.Rehearsal.of(4, 3, length=50_000)
        masks = [update.values - play.plain[site] for site, update in play.updates.items()]
        for mask in masks:
            assert mask.dtype == np.uint32
            for shift in (0, 8, 16, 24):
                counts = np.bincount(mask >> shift & 255, minlength=256)
                expected = len(mask) / 256
                assert ((counts - expected) ** 2 / expected).sum() < 400  # chi squared with 255 degrees of freedom
        for one, two in combinations(masks, 2):
            related = np.corrcoef(one.astype(float), two.astype(float))[0, 1]
            assert abs(related) < 6 / np.sqrt(len(one))

    @needs_rlwe
    def test_no_site_holds_a_key_that_opens_anothers_encryption(self) -> None:
        """One framework gives every hospital the same homomorphic secret key."""
        from cohortium.secagg import rlwe

        cast = scene.ensemble(4, 3)
        scheme = Threshold(cast.group, 100, 25)
        plain = scene.vectors(cast.sites, 100, 25)
        context = cast.context(1)
        made = {
            (site, number): scheme.protect(site, {}, context, plain[site], Randomness.of_seed(3).child(site, number))
            for site in cast.sites
            for number in (1, 2)
        }
        secrets = {key: secret.astype(np.int64).reshape(-1) for key, (_, secret) in made.items()}
        for secret in secrets.values():
            secret[secret > 30000] -= 65521
        assert len({secret.tobytes() for secret in secrets.values()}) == len(made)
        for (site, number), (payload, _) in made.items():
            for other, secret in secrets.items():
                if other == (site, number):
                    assert (rlwe.decrypt(payload, secret, context, 100, 25) == plain[site]).all()
                else:
                    with pytest.raises(ProtocolError, match="the summed secret is not that of"):
                        rlwe.decrypt(payload, secret, context, 100, 25)

    def test_an_equivocating_server_is_caught_by_pinned_identities(self) -> None:
        """No framework of the field authenticates keys: its server sits in the middle of every pair, unseen.

        Here the coordinator shows each site keys of its own in the others' names, signed as well as it can.
        """
        for signer in (staging.STRANGER, staging.COORDINATOR, Ed25519PrivateKey.generate()):
            cast = at_agreement()
            middle = {
                site: keys.announce(signer, X25519PrivateKey.generate(), cast.run, cast.plan.study_id, site)
                for site in NAMES
            }
            for site in NAMES:
                shown = tuple(cast.announcements[one] if one == site else middle[one] for one in NAMES)
                refuses(cast, site, KeySet(cast.run, shown), "is not signed by its pinned identity")
