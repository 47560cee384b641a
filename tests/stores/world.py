"""All stores over one database and one bus, full or cleared, and waiting for what must become true."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import psycopg

from cohortium.adapters import bus, postgres
from cohortium.adapters.bus import RedisBus
from cohortium.adapters.embedded import Stores
from cohortium.adapters.postgres import Database
from cohortium.adapters.postgres_desk import PostgresDesk
from cohortium.adapters.postgres_enrolments import PostgresEnrolments
from cohortium.adapters.postgres_runs import PostgresRuns

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All stores, over one pool."""

    runs: PostgresRuns
    desk: PostgresDesk
    enrolments: PostgresEnrolments
    database: Database
    bus: RedisBus


@asynccontextmanager
async def world(stores: Stores) -> AsyncGenerator[World, None]:
    async with (
        postgres.connected(stores.database_url) as database,
        postgres.connected(stores.database_url, most=1) as heart,
        bus.connected(stores.redis_url) as messages,
    ):
        runs = PostgresRuns(database, heart)
        yield World(runs, PostgresDesk(database), PostgresEnrolments(database), database, messages)


async def until(condition: Callable[[], Awaitable[T]], seconds: float = 30.0) -> T:
    """Returns the first thing that is true."""
    async with asyncio.timeout(seconds):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found


@asynccontextmanager
async def cleared(stores: Stores) -> AsyncGenerator[World, None]:
    """Yields the stores with nothing in them."""
    with psycopg.connect(stores.owner_url, autocommit=True) as owner:
        tables = owner.execute(
            "SELECT format('cohortium.%I', tablename) FROM pg_tables "
            "WHERE schemaname = 'cohortium' AND tablename <> 'alembic_version'"
        ).fetchall()
        owner.execute("TRUNCATE " + ", ".join(name for (name,) in tables))
    async with world(stores) as all_of_them:
        yield all_of_them
