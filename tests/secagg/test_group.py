"""How many sites may leave or collude: the table of the documentation, and every other case by counting."""

import itertools
import re

import pytest

from cohortium.core.errors import StudyError
from cohortium.secagg.group import Group, Tolerance, tolerance

ALL = [(sites, dropouts) for sites in range(3, 51) for dropouts in range(sites + 1)]


def bearable(sites: int, dropouts: int) -> bool:
    """Whether so many may be lost: three stay, and any two sets of the others' size share more than nobody."""
    left = sites - dropouts
    return left >= 3 and 2 * left > sites


ACCEPTED = [case for case in ALL if bearable(*case)]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site{index:03}" for index in range(count))


class TestTolerance:
    @pytest.mark.parametrize(
        ("sites", "dropouts", "expected"),
        [
            (3, 0, Tolerance(3, 3, 1, 1)),
            (4, 0, Tolerance(4, 4, 2, 2)),
            (4, 1, Tolerance(4, 3, 2, 1)),
            (5, 1, Tolerance(5, 4, 3, 2)),
            (5, 2, Tolerance(5, 3, 2, 0)),
            (15, 3, Tolerance(15, 12, 11, 8)),
            (15, 7, Tolerance(15, 8, 7, 0)),
            (50, 10, Tolerance(50, 40, 39, 29)),
        ],
    )
    def test_table(self, sites: int, dropouts: int, expected: Tolerance) -> None:
        assert tolerance(sites, dropouts) == expected

    def test_every_case_of_up_to_fifty_sites(self) -> None:
        for sites, dropouts in ALL:
            if bearable(sites, dropouts):
                found = tolerance(sites, dropouts)
                assert (found.sites, found.threshold) == (sites, sites - dropouts)
                assert 0 <= found.malicious <= found.curious <= min(found.threshold - 1, sites - 2)
                assert Group(names(sites), found.threshold).threshold == found.threshold
            else:
                with pytest.raises(StudyError, match=rf"aggregation\.dropouts is {dropouts}: of {sites} sites at most"):
                    tolerance(sites, dropouts)

    def test_the_bounds_are_the_largest(self) -> None:
        """Counted anew: what a liar needs to have two sets endorsed, and what shares open a secret."""
        for sites, dropouts in ACCEPTED:
            found = tolerance(sites, dropouts)
            for colluding in range(sites - 1):
                honest, needed = sites - colluding, found.threshold - colluding
                # an honest site endorses one set; colluders endorse any
                two_sets = 2 * max(needed, 0) <= honest
                assert (colluding <= found.malicious) == (not two_sets)
                assert (colluding <= found.curious) == (colluding < found.threshold)

    def test_at_most_is_what_the_message_says(self) -> None:
        for sites in range(3, 51):
            with pytest.raises(StudyError) as refused:
                tolerance(sites, sites)
            said = re.search(r"of (\d+) sites at most (\d+) may be lost", str(refused.value))
            assert said is not None
            assert int(said[1]) == sites
            assert int(said[2]) == max(dropouts for count, dropouts in ACCEPTED if count == sites)

    def test_three_sites_tolerate_no_loss(self) -> None:
        assert tolerance(3, 0).threshold == 3
        with pytest.raises(StudyError, match=r"of 3 sites at most 0 may be lost, because 3 must stay.*include more"):
            tolerance(3, 1)

    @pytest.mark.parametrize("sites", [2, 1, 0])
    def test_too_few_sites(self, sites: int) -> None:
        said = rf"a secure sum over {sites} sites was refused: with fewer than 3, each learns .*; include more sites$"
        with pytest.raises(StudyError, match=said):
            tolerance(sites, 0)

    @pytest.mark.parametrize("dropouts", [-1, -50])
    def test_fewer_than_nobody_lost(self, dropouts: int) -> None:
        with pytest.raises(StudyError, match=f"dropouts is {dropouts}"):
            tolerance(5, dropouts)

    def test_two_sets_of_the_threshold_always_meet(self) -> None:
        """By drawing them, for groups small enough: with the largest bound, an honest site would be in both."""
        for sites, dropouts in [case for case in ACCEPTED if case[0] <= 7]:
            found = tolerance(sites, dropouts)
            honest = set(range(found.malicious, sites))
            sets = [set(one) for one in itertools.combinations(range(sites), found.threshold)]
            for one, other in itertools.combinations_with_replacement(sets, 2):
                assert one & other & honest


class TestGroup:
    def test_peers_are_the_others_in_order(self) -> None:
        group = Group(("Cork", "aachen", "bergen", "évora"), 3)
        assert group.peers("bergen") == ("Cork", "aachen", "évora")
        assert group.peers("Cork") == ("aachen", "bergen", "évora")

    @pytest.mark.parametrize(
        "sites",
        [("b", "a", "c"), ("a", "a", "b"), ("a", "b", "c", "c"), ("a", "b", "C"), ("c", "b", "a")],
        ids="-".join,
    )
    def test_out_of_order_or_twice(self, sites: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="a group lists its sites once each, in order"):
            Group(sites, 3)

    def test_thresholds(self) -> None:
        possible = {(sites, sites - dropouts) for sites, dropouts in ACCEPTED}
        for sites in range(51):
            for threshold in range(-1, sites + 2):
                if (sites, threshold) in possible:
                    assert Group(names(sites), threshold).sites == names(sites)
                else:
                    with pytest.raises(ValueError, match=f"a threshold of {threshold} does not protect {sites} sites"):
                        Group(names(sites), threshold)
