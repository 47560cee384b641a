"""Enrolment in PostgreSQL: an invitation is used once, a revoked site stays out, and a lost answer does no harm."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from cohortium.adapters.embedded import Stores
from cohortium.core.errors import PolicyRefused, StudyError

from .world import cleared

NOW = datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)
DIGEST, OTHER = bytes(range(32)), bytes(32)
ALICE, MALLORY = b"a" * 32, b"m" * 32


def test_enrol_and_revoke(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            desk = here.enrolments
            await desk.invite("zurich", OTHER, LATER, "olga")
            await desk.invite("zurich", DIGEST, LATER, "olga")
            for digest, identity, now in ((OTHER, ALICE, NOW), (DIGEST, ALICE, LATER)):
                with pytest.raises(PolicyRefused):
                    await desk.redeem("zurich", digest, identity, now)
            with pytest.raises(PolicyRefused):
                await desk.redeem("nobody", DIGEST, ALICE, NOW)
            site = await desk.redeem("zurich", DIGEST, ALICE, NOW)
            assert (site.name, site.identity, site.enrolled, site.revoked) == ("zurich", ALICE, NOW, None)
            assert await desk.redeem("zurich", DIGEST, ALICE, NOW + timedelta(minutes=1)) == site
            with pytest.raises(PolicyRefused):
                await desk.redeem("zurich", DIGEST, MALLORY, NOW)
            with pytest.raises(StudyError, match="enrolled"):
                await desk.invite("zurich", OTHER, LATER, "olga")
            await desk.issued("zurich", 2**159, LATER)
            await desk.issued("zurich", 2**159, LATER)
            assert await desk.sites() == await here.runs.sites() == [site]
            revoked = await desk.revoke("zurich", "olga")
            assert revoked.revoked is not None
            assert await desk.revoke("zurich", "olga") == revoked == await desk.site("zurich")
            with pytest.raises(PolicyRefused):
                await desk.redeem("zurich", DIGEST, ALICE, NOW)
            with pytest.raises(StudyError, match="no site"):
                await desk.revoke("nobody", "olga")
            # back under another identity, by a new invitation alone
            await desk.invite("zurich", OTHER, LATER, "olga")
            back = await desk.redeem("zurich", OTHER, MALLORY, NOW)
            assert (back.identity, back.revoked) == (MALLORY, None)

    asyncio.run(scenario())


def test_one_of_many_who_redeem_at_once(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await here.enrolments.invite("basel", DIGEST, LATER, "olga")
            calls = [here.enrolments.redeem("basel", DIGEST, bytes([n]) * 32, NOW) for n in range(8)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert sum(isinstance(answer, PolicyRefused) for answer in answers) == 7
            (site,) = await here.enrolments.sites()
            assert site in answers

    asyncio.run(scenario())


def test_a_revocation_is_news(stores: Stores) -> None:
    async def scenario() -> None:
        async with cleared(stores) as here:
            await here.enrolments.invite("basel", DIGEST, LATER, "olga")
            await here.enrolments.redeem("basel", DIGEST, ALICE, NOW)
            news = here.runs.news()
            assert {await anext(news), await anext(news)} == {"runs", "sites"}
            await here.enrolments.revoke("basel", "olga")
            assert await anext(news) == "sites"
            await news.aclose()

    asyncio.run(scenario())
