"""Real servers for these tests: one private PostgreSQL and Valkey for each process that runs tests, and fresh names."""

import asyncio
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pytest

from cohortium.adapters.embedded import Stores, embedded
from cohortium.adapters.migrations import migrate

T = TypeVar("T")
_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="cohortium-stores-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stores(short_folder: Path) -> Iterator[Stores]:
    """Servers in a thread of their own, whose loop supervises them."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()

    def there(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(120)

    servers = embedded(short_folder / "shared")
    try:
        addresses = there(servers.__aenter__())
        migrate(addresses.owner_url)
        yield addresses
        there(servers.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def fresh() -> Callable[[str], str]:
    """Names that no other test uses."""
    return lambda word: f"{word}-{os.getpid()}-{next(_NUMBERS)}"
