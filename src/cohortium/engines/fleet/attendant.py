"""An agent at its link: it takes what coordinators ask, has the agent answer, and sends the answers.

Short work is done at once; what may take long is done on a thread, so that the link stays alive and other runs are
answered meanwhile. Messages of one run are dealt with in their order, one at a time.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Protocol

from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.core.messages import kind_of

log = logging.getLogger("cohortium.agent")
_SHORT = 0.02
"""Seconds of work on a run's last message below which the next one is dealt with at once."""
_SMALL = 1 << 16
"""Bytes of a message from which it is never dealt with at once."""
_MOST_KNOWN = 256


class Answers(Protocol):
    """What answers a site's messages: `cohortium.site.agent.Agent`. Calls of several threads are safe."""

    def receive(self, data: bytes) -> list[bytes]:
        """Returns the answers to a message.

        Raises:
            ProtocolError: it is none.
        """


class Carrier(Protocol):
    """What brings messages and takes answers: `cohortium.engines.fleet.link.Link`."""

    def messages(self) -> AsyncIterator[tuple[str, bytes]]:
        """Yields each message with the name of its run, until the link is closed."""

    async def send(self, run: str, data: bytes) -> None:
        """Sends an answer, if need be after the link is back."""


Answered = Callable[[str, str, float, bool], None]
"""Is told of each message that was dealt with: its run, what was answered, the seconds it took, and whether the site
refused."""
Prepare = Callable[[bytes], Awaitable[None]]
"""Prepares for the first message of a run that was not heard of before."""


@dataclass
class _Queue:
    """One run's messages that wait, and how long its last one took."""

    waiting: "asyncio.Queue[bytes]" = field(default_factory=asyncio.Queue)
    seconds: float = math.inf
    task: "asyncio.Task[None] | None" = None


class Attendant:
    """Serves an agent's runs.

    Args:
        clock: monotonic seconds.
        pool: a thread for what takes long.
        prepare: is awaited before the first message of a run.
        answered: is told of what was done.
    """

    def __init__(
        self,
        agent: Answers,
        link: Carrier,
        pool: Executor,
        clock: Callable[[], float],
        prepare: Prepare,
        answered: Answered = lambda run, kind, seconds, refused: None,
    ) -> None:
        self._agent, self._link, self._pool, self._clock = agent, link, pool, clock
        self._prepare, self._answered = prepare, answered
        self._runs: dict[str, _Queue] = {}

    async def serve(self) -> None:
        """Works until the link is closed."""
        try:
            async for run, data in self._link.messages():
                queue = self._runs.setdefault(run, _Queue())
                if self._idle and queue.seconds < _SHORT and len(data) < _SMALL:
                    await self._deal(run, queue, data, at_once=True)
                    continue
                queue.waiting.put_nowait(data)
                if queue.task is None:
                    queue.task = asyncio.create_task(self._work(run, queue))
                self._forget_some()
        finally:
            tasks = [queue.task for queue in self._runs.values() if queue.task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, run: str, queue: _Queue) -> None:
        try:
            while not queue.waiting.empty():
                await self._deal(run, queue, queue.waiting.get_nowait(), at_once=False)
        finally:
            queue.task = None

    async def _deal(self, run: str, queue: _Queue, data: bytes, *, at_once: bool) -> None:
        began = self._clock()
        try:
            if queue.seconds == math.inf:
                await self._prepared(data)
            if at_once:
                answers = self._agent.receive(data)
            else:
                answers = await asyncio.get_running_loop().run_in_executor(self._pool, self._agent.receive, data)
        except ProtocolError as error:
            log.warning("a coordinator's message was refused", extra={"run": run, "reason": str(error)})
            return
        queue.seconds = self._clock() - began
        for answer in answers:
            await self._link.send(run, answer)
        kinds = [kind_of(answer) for answer in answers]
        self._answered(run, kinds[0] if kinds else "none", queue.seconds, "Refusal" in kinds)

    async def _prepared(self, data: bytes) -> None:
        try:
            await self._prepare(data)
        except CohortiumError as error:
            log.warning("not all is ready for a run", extra={"reason": str(error)})

    @property
    def _idle(self) -> bool:
        """Whether nothing is being worked on: the agent does one thing at a time."""
        return all(queue.task is None for queue in self._runs.values())

    def _forget_some(self) -> None:
        idle = [run for run, queue in self._runs.items() if queue.task is None]
        for run in idle[: max(0, len(self._runs) - _MOST_KNOWN)]:
            del self._runs[run]
