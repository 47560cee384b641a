"""Stores that fail when told to: having written, or not."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Literal

from cohortium.coordinator.ports import Runs, Unavailable

Fault = Literal["none", "fails", "fails but persists"]


class FaultyRuns:
    """Runs whose writes take their faults from a plan, one after the other; when it ends, nothing fails any more.

    `fails` raises and writes nothing; `fails but persists` writes, and then raises as for a lost answer.
    """

    WRITES = ("beat", "claim", "save", "end", "mark", "release")

    def __init__(self, runs: Runs, plan: Iterator[Fault]) -> None:
        self._runs, self._plan = runs, plan
        self.met: list[tuple[str, Fault]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._runs, name)
        return self._faulty(name, method) if name in self.WRITES else method

    def _faulty(self, name: str, method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **named: Any) -> Any:
            fault = next(self._plan, "none")
            self.met.append((name, fault))
            if fault == "fails":
                raise Unavailable("a fault was asked for: nothing was written")
            result = await method(*args, **named)
            if fault == "fails but persists":
                raise Unavailable("a fault was asked for: it was written")
            return result

        return call
