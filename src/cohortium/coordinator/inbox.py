"""What waits for a run's leader. Nobody can fill it: of each site only a few messages wait, and the rest is dropped.

A site that keeps to the rules has one or two on their way, and whatever is dropped is asked for again.
"""

import asyncio
from collections import Counter
from dataclasses import dataclass

from cohortium.coordinator.exchange import Heard, Joined, News
from cohortium.coordinator.ports import Wish

LARGE = 1 << 18
"""Bytes of a message from which it is worked on beside the event loop."""
_MOST, _MOST_LARGE = 16, 2
"""Messages of one site that wait at most."""


@dataclass(frozen=True)
class Wished:
    """Somebody wants a run to go on, to pause, or to end."""

    wish: Wish


@dataclass(frozen=True)
class Revoked:
    """A site is no longer a member of the consortium."""

    site: str


@dataclass(frozen=True)
class Stored:
    """A write that went on beside the run has ended, well or not."""


Item = News | Wished | Revoked | Stored


class Inbox(asyncio.Queue[Item]):
    """A queue without a length, but for what sites put into it."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = Counter[tuple[str, str]]()

    def put_nowait(self, item: Item) -> None:
        """Puts an item in, or drops it if too much of its site waits already."""
        kind, most = _share(item)
        if kind is not None:
            if self._counts[kind] >= most:
                return
            self._counts[kind] += 1
        super().put_nowait(item)

    def _get(self) -> Item:
        item = super()._get()
        kind, _ = _share(item)
        if kind is not None:
            self._counts[kind] -= 1
            if not self._counts[kind]:
                del self._counts[kind]
        return item


def _share(item: Item) -> tuple[tuple[str, str] | None, int]:
    """Returns what an item counts as, and how many of these may wait."""
    match item:
        case Heard(site, data) if len(data) > LARGE:
            return (site, "large"), _MOST_LARGE
        case Heard(site):
            return (site, "small"), _MOST
        case Joined(site):
            return (site, "joined"), 1
    return None, 0
