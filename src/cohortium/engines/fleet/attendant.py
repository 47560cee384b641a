"""An agent at its link: it takes what coordinators ask, has the agent answer, and sends the answers.

Short work is done at once; what may take long is done on a thread, so that the link stays alive. Training has threads
of its own: other runs are answered meanwhile, and where rounds are buffers, so is the run itself. Messages of one run
are dealt with in their order, one at a time.

What waits is bounded. While much waits for the agent, no more is read from the link, until some of it is dealt with.
What waits for its run's own training could take hours, so nobody else waits for that: a run that has a share waiting is
not given more but what is small, and what is dropped is asked for again.
"""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from cohortium.core.codec import Data
from cohortium.core.errors import CohortiumError, ProtocolError
from cohortium.core.messages import MaskedUpdate, kind_of
from cohortium.site.agent import NOTHING, Taken, Work
from cohortium.site.session import Trained

log = logging.getLogger("cohortium.agent")
_SHORT = 0.02
"""Seconds of work on a run's last message below which the next one is dealt with at once."""
_SMALL = 1 << 16
"""Bytes of a message from which it is never dealt with at once."""
_MOST_KNOWN = 256
_MOST_WAITING = 32
"""Messages of one run that wait."""
_SHARE = 64 << 20
"""Bytes of one run that wait, from which on only small messages of it wait, too."""
_MOST_RUNS = 64
"""Runs whose messages wait for the agent; none is read beyond them."""
_MOST_BYTES = 256 << 20
"""Bytes that wait for the agent; none is read beyond them."""


class Answers(Protocol):
    """What answers a site's messages: `cohortium.site.agent.Agent`. Calls of several threads are safe."""

    def receive(self, data: Data) -> list[bytes]:
        """Returns the answers to a message, training at once if it asks for that.

        Raises:
            ProtocolError: it is none.
        """

    def take(self, data: Data) -> Taken:
        """Returns the answers to a message, and the training that it asks for.

        Raises:
            ProtocolError: it is none.
        """

    def finish(self, work: Work, result: Trained | Exception) -> Taken:
        """Returns the answers that follow from a training."""


class Carrier(Protocol):
    """What brings messages and takes answers: `cohortium.engines.fleet.link.Link`."""

    def messages(self) -> AsyncIterator[tuple[str, Data]]:
        """Yields each message with the name of its run, until the link is closed."""

    async def send(self, run: str, data: bytes) -> None:
        """Sends an answer, if need be after the link is back."""


Answered = Callable[[str, str, float, bool], None]
"""Is told of each message that was dealt with: its run, what was answered, the seconds it took, and whether the site
refused."""
Prepare = Callable[[Data], Awaitable[None]]
"""Prepares for the first message of a run that was not heard of before."""


@dataclass
class _Queue:
    """One run's messages that wait, how long its last one took, and its last two trainings.

    The last two, because a short phase says little about the one after it.

    Attributes:
        held: bytes that wait, with those of the message that is being dealt with.
        trains: whether its messages wait for its training, not for the agent.
    """

    waiting: "asyncio.Queue[Data]" = field(default_factory=asyncio.Queue)
    held: int = 0
    trains: bool = False
    seconds: float = math.inf
    trained: tuple[float, float] = (math.inf, math.inf)
    task: "asyncio.Task[None] | None" = None

    def takes(self, data: Data) -> bool:
        """Returns whether a message may wait. What is dropped is asked for again, so nobody loses by it."""
        return (self.held < _SHARE or len(data) < _SMALL) and self.waiting.qsize() < _MOST_WAITING


class Trainers(Executor):
    """Threads for training that nobody waits for when the process ends: what they would have said is asked for again.

    A training cannot be ended from outside, and may take hours.
    """

    def __init__(self, most: int) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for number in range(most):
            Thread(target=self._work, name=f"training_{number}", daemon=True).start()

    def submit(self, call: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """Returns what will hold the result of a call; one that is cancelled before its turn is passed over."""
        future: Future[Any] = Future()
        self._tasks.put((future, partial(call, *given, **named)))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 (it is whoever asked that deals with it)
                    future.set_exception(error)
            del future, call  # or a model would stay here until the next training


class Attendant:
    """Serves an agent's runs.

    Args:
        clock: monotonic seconds.
        pool: a thread for what takes long.
        trainers: threads for training, as `Trainers` has them.
        prepare: is awaited before the first message of a run.
        answered: is told of what was done.
    """

    def __init__(
        self,
        agent: Answers,
        link: Carrier,
        pool: Executor,
        trainers: Executor,
        clock: Callable[[], float],
        prepare: Prepare,
        answered: Answered = lambda run, kind, seconds, refused: None,
    ) -> None:
        self._agent, self._link, self._pool, self._trainers, self._clock = agent, link, pool, trainers, clock
        self._prepare, self._answered = prepare, answered
        self._runs: dict[str, _Queue] = {}
        self._apart: set[asyncio.Task[None]] = set()
        self._busy = 0
        self._room = asyncio.Event()

    async def serve(self) -> None:
        """Works until the link is closed."""
        try:
            async for run, data in self._link.messages():
                queue = self._runs.setdefault(run, _Queue())
                idle = not self._busy and queue.task is None
                if idle and queue.seconds < _SHORT and len(data) < _SMALL:
                    work = await self._deal(run, queue, data, at_once=True)
                    if work is not None:
                        queue.task = asyncio.create_task(self._work(run, queue, work))
                    continue
                if queue.takes(data):
                    queue.waiting.put_nowait(data)
                    queue.held += len(data)
                if queue.task is None:
                    queue.task = asyncio.create_task(self._work(run, queue))
                self._forget_some()
                del data
                while self._full():
                    self._room.clear()
                    await self._room.wait()
        finally:
            tasks = [*self._apart, *(queue.task for queue in self._runs.values() if queue.task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, run: str, queue: _Queue, work: Work | None = None) -> None:
        try:
            if work is not None:
                await self._train_first(run, queue, work)
            while not queue.waiting.empty():
                data = queue.waiting.get_nowait()
                try:
                    work = await self._deal(run, queue, data, at_once=False)
                finally:
                    queue.held -= len(data)
                    self._room.set()
                if work is not None:
                    del data
                    await self._train_first(run, queue, work)
        finally:
            queue.task = None
            self._room.set()

    async def _train_first(self, run: str, queue: _Queue, work: Work) -> None:
        """Trains before the run's next message."""
        queue.trains = True
        try:
            await self._train(run, queue, work)
        finally:
            queue.trains = False

    async def _deal(self, run: str, queue: _Queue, data: Data, *, at_once: bool) -> Work | None:
        """Answers a message; returns work that comes before the run's next message."""
        began = self._clock()
        if queue.seconds == math.inf:
            await self._prepared(data)
        taken = await self._taken(run, queue, data, at_once=at_once)
        if taken is None:
            return None
        queue.seconds = self._clock() - began
        if taken.work is None or taken.answers:
            await self._say(run, queue, taken.answers, queue.seconds)
        if taken.work is None or not taken.work.apart:
            return taken.work
        task = asyncio.create_task(self._train(run, queue, taken.work))
        self._apart.add(task)
        task.add_done_callback(self._apart.discard)
        return None

    async def _taken(self, run: str, queue: _Queue, data: Data, *, at_once: bool) -> Taken | None:
        try:
            if at_once and max(queue.trained) < _SHORT:
                return Taken(self._agent.receive(data))
            return self._agent.take(data) if at_once else await self._in_turn(self._agent.take, data)
        except ProtocolError as error:
            log.warning("a coordinator's message was refused", extra={"run": run, "reason": str(error)})
        except Exception as error:  # noqa: BLE001 (one run's failure must not end the others; its text may be private)
            _failed(run, error)
        return None

    async def _train(self, run: str, queue: _Queue, work: Work | None) -> None:
        loop = asyncio.get_running_loop()
        while work is not None:
            began, taken = self._clock(), NOTHING
            try:
                result = await loop.run_in_executor(self._trainers, work.done)
                taken = await self._in_turn(self._agent.finish, work, result)
            except Exception as error:  # noqa: BLE001 (as above)
                _failed(run, error)
            await self._say(run, queue, taken.answers, self._clock() - began)
            work = taken.work

    async def _in_turn(self, call: Callable[..., Taken], *given: Any) -> Taken:
        """Has the agent do something on its thread: its state is one."""
        self._busy += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *given)
        finally:
            self._busy -= 1

    async def _say(self, run: str, queue: _Queue, answers: list[bytes], seconds: float) -> None:
        for answer in answers:
            await self._link.send(run, answer)
        kinds = [kind_of(answer) for answer in answers]
        if MaskedUpdate.__name__ in kinds:
            queue.trained = queue.trained[1], seconds
        self._answered(run, kinds[0] if kinds else "none", seconds, "Refusal" in kinds)

    async def _prepared(self, data: Data) -> None:
        try:
            await self._prepare(data)
        except CohortiumError as error:
            log.warning("not all is ready for a run", extra={"reason": str(error)})

    def _full(self) -> bool:
        """Returns whether more waits for the agent than should. Its thread works that off, whatever trains."""
        waiting = [queue.held for queue in self._runs.values() if queue.task is not None and not queue.trains]
        return len(waiting) >= _MOST_RUNS or sum(waiting) >= _MOST_BYTES

    def _forget_some(self) -> None:
        idle = [run for run, queue in self._runs.items() if queue.task is None]
        for run in idle[: max(0, len(self._runs) - _MOST_KNOWN)]:
            del self._runs[run]


def _failed(run: str, error: Exception) -> None:
    reason = type(error).__name__
    log.error("a message could not be dealt with; it is asked again", extra={"run": run, "reason": reason})
