"""Brings messages between the leaders of runs and the sites' streams, wherever in the cluster both are.

What is in this process is reached directly. For the rest there is one box on the bus for each coordinator, and two
keys that say where a site is attached and who leads a run. A message that cannot be delivered is dropped: its leader
says it again.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from cohortium.coordinator.ports import Bus, Unavailable
from cohortium.core.codec import Data

log = logging.getLogger("cohortium.fleet")
KNOWN_FOR = 10.0
"""Seconds that the bus remembers where a site is attached and who leads a run; renewed well before."""


class Outbox(Protocol):
    """A site's stream, as it is written to."""

    def send(self, run: str, data: bytes, answer_limit: int) -> None:
        """Queues a message; the site may answer the run with at most `answer_limit` bytes from now on."""

    def close(self, reason: str) -> None:
        """Ends the stream."""


@dataclass(frozen=True)
class Heard:
    """A site's message for a run."""

    site: str
    data: Data


@dataclass(frozen=True)
class Joined:
    """A site attached anew, somewhere."""

    site: str


News = Heard | Joined
Inbox = Callable[[News], None]


class Parcel(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What one coordinator sends another. `kind` is 'heard', 'tell' or 'joined'."""

    kind: str
    site: str
    run: str = ""
    data: bytes = b""
    limit: int = 0


class Presence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Where a site is attached, and since when (seconds since 1970)."""

    coordinator: str
    since: float
    version: str = ""


class Exchange:
    """One process's part of the exchange.

    Attributes:
        me: this coordinator's name.
        peers: the other coordinators that live, by name; the service keeps it current.
    """

    def __init__(self, me: str, bus: Bus, clock: Callable[[], float]) -> None:
        self.me, self.peers = me, frozenset[str]()
        self._bus, self._clock = bus, clock
        self._outboxes: dict[str, tuple[Outbox, Presence]] = {}
        self._inboxes: dict[str, Inbox] = {}

    @property
    def attached(self) -> Iterable[str]:
        """The sites whose streams end here."""
        return tuple(self._outboxes)

    async def attach(self, site: str, outbox: Outbox, version: str = "") -> None:
        """Takes a site's stream into use; an older one of the same site is closed."""
        older = self._outboxes.get(site)
        presence = Presence(self.me, self._clock(), version)
        self._outboxes[site] = outbox, presence
        if older is not None and older[0] is not outbox:
            older[0].close("the site attached anew")
        for inbox in list(self._inboxes.values()):
            inbox(Joined(site))
        try:
            await self._bus.keep(_where(site), msgspec.msgpack.encode(presence), KNOWN_FOR)
            for peer in self.peers:
                await self._bus.put(_box(peer), msgspec.msgpack.encode(Parcel("joined", site)))
        except Unavailable as error:
            log.warning("the bus is away", extra={"reason": str(error)})

    async def detach(self, site: str, outbox: Outbox) -> None:
        """Forgets a site's stream, if it is still the one in use."""
        current = self._outboxes.get(site)
        if current is None or current[0] is not outbox:
            return
        del self._outboxes[site]
        with suppress(Unavailable):  # it is forgotten by itself
            await self._bus.forget(_where(site))

    def close(self, site: str, reason: str) -> None:
        """Closes a site's stream, if it ends here."""
        if site in self._outboxes:
            self._outboxes[site][0].close(reason)

    async def heard(self, site: str, run: str, data: Data) -> None:
        """Brings a site's message to the run's leader."""
        inbox = self._inboxes.get(run)
        if inbox is not None:
            inbox(Heard(site, data))
            return
        try:
            leader = (await self._bus.look([_leads(run)])).get(_leads(run))
            if leader is not None and leader.decode() != self.me:
                await self._bus.put(
                    _box(leader.decode()), msgspec.msgpack.encode(Parcel("heard", site, run, bytes(data)))
                )
        except Unavailable as error:
            log.warning("a message was dropped: the bus is away", extra={"site": site, "reason": str(error)})

    async def lead(self, run: str, inbox: Inbox) -> None:
        """Has a run's messages brought to `inbox` from now on."""
        self._inboxes[run] = inbox
        with suppress(Unavailable):  # `refresh` says it again
            await self._bus.keep(_leads(run), self.me.encode(), KNOWN_FOR)

    def leave(self, run: str, inbox: Inbox) -> None:
        """Brings a run's messages to this inbox no longer."""
        if self._inboxes.get(run) == inbox:
            del self._inboxes[run]

    async def tell(self, site: str, run: str, data: bytes, limit: int) -> None:
        """Brings a leader's message to a site; it may answer the run with at most `limit` bytes."""
        current = self._outboxes.get(site)
        if current is not None:
            current[0].send(run, data, limit)
            return
        if not self.peers:
            return
        try:
            where = (await self._bus.look([_where(site)])).get(_where(site))
            if where is not None:
                peer = msgspec.msgpack.decode(where, type=Presence).coordinator
                if peer != self.me:
                    parcel = Parcel("tell", site, run, data, limit)
                    await self._bus.put(_box(peer), msgspec.msgpack.encode(parcel))
        except (Unavailable, msgspec.MsgspecError) as error:
            log.warning("a message was dropped: the bus is away", extra={"site": site, "reason": str(error)})

    async def refresh(self) -> None:
        """Tells the bus again who is attached here and what is led here."""
        for site, (_, presence) in list(self._outboxes.items()):
            await self._bus.keep(_where(site), msgspec.msgpack.encode(presence), KNOWN_FOR)
        for run in list(self._inboxes):
            await self._bus.keep(_leads(run), self.me.encode(), KNOWN_FOR)

    async def present(self, sites: Iterable[str]) -> dict[str, Presence]:
        """Returns where each of these sites is attached, of those that are."""
        here = {site: presence for site, (_, presence) in self._outboxes.items()}
        keys = {_where(site): site for site in sites if site not in here}
        found = await self._bus.look(list(keys)) if keys else {}
        return {keys[key]: told for key, value in found.items() if (told := _presence(value)) is not None} | here

    async def relay(self) -> None:
        """Delivers what other coordinators put into this one's box, for ever."""
        async for data in self._bus.take(_box(self.me)):
            try:
                parcel = msgspec.msgpack.decode(data, type=Parcel)
            except msgspec.MsgspecError:
                continue
            self._deliver(parcel)

    def _deliver(self, parcel: Parcel) -> None:
        match parcel.kind:
            case "heard" if parcel.run in self._inboxes:
                self._inboxes[parcel.run](Heard(parcel.site, parcel.data))
            case "tell" if parcel.site in self._outboxes:
                self._outboxes[parcel.site][0].send(parcel.run, parcel.data, parcel.limit)
            case "joined":
                for inbox in list(self._inboxes.values()):
                    inbox(Joined(parcel.site))


def _presence(value: bytes) -> Presence | None:
    try:
        return msgspec.msgpack.decode(value, type=Presence)
    except msgspec.MsgspecError:
        return None


def _box(coordinator: str) -> str:
    return f"coordinator:{coordinator}"


def _where(site: str) -> str:
    return f"site:{site}"


def _leads(run: str) -> str:
    return f"leader:{run}"
