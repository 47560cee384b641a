"""A consortium's database and Redis: those of its settings, or private ones in its folder."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cohortium.adapters.consortium_folder import Consortium


@asynccontextmanager
async def stores(consortium: Consortium) -> AsyncIterator[tuple[str, str]]:
    """Yields the URLs of a consortium's database and Redis: those of its settings, or the embedded ones, migrated."""
    from cohortium.adapters import embedded, migrations

    if consortium.database is not None and consortium.redis is not None:
        yield consortium.database, consortium.redis
        return
    async with embedded.embedded(consortium.folder) as own:
        if consortium.database is None:
            await asyncio.to_thread(migrations.migrate, own.owner_url)
        yield consortium.database or own.database_url, consortium.redis or own.redis_url
