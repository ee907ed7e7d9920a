"""What happens to a session, as values, and the log that people follow.

The log does not coalesce: a follower sees each event, however late it looks. It is bounded, since a follower may never
look; then it is told how many it missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

import anyio

__all__ = [
    "Attempt",
    "Closed",
    "Connected",
    "Detached",
    "Draining",
    "Event",
    "EventLog",
    "Lost",
    "Missed",
    "Resumed",
]


@dataclass(frozen=True, slots=True)
class Connected:
    """The session began."""


@dataclass(frozen=True, slots=True)
class Detached:
    """The link below is lost; the session is not."""

    reason: Exception


@dataclass(frozen=True, slots=True)
class Attempt:
    """The way back: attempt ``number``, counted from 1, starts in ``delay`` seconds, because of ``cause``."""

    number: int
    delay: float
    cause: Exception | None


@dataclass(frozen=True, slots=True)
class Resumed:
    """The session goes on over a new link, its ``epoch``-th; ``replayed`` messages are sent again."""

    epoch: int
    replayed: int


@dataclass(frozen=True, slots=True)
class Draining:
    """The peer shuts down in ``deadline`` seconds: finish, and start nothing new."""

    deadline: float


@dataclass(frozen=True, slots=True)
class Lost:
    """The session cannot go on."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Closed:
    """The session is over, and both ends have everything."""


@dataclass(frozen=True, slots=True)
class Missed:
    """This follower was too slow: so many events are gone."""

    count: int


Event = Connected | Detached | Attempt | Resumed | Draining | Lost | Closed | Missed


class EventLog:
    """The last events of one session, for any number of followers."""

    KEPT: Final = 256
    """A follower that is this many events behind has other worries."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque(maxlen=self.KEPT)
        self._count = 0
        self._changed: anyio.Event | None = None
        self._ended = False

    def add(self, event: Event) -> None:
        self._events.append(event)
        self._count += 1
        self._ended = self._ended or isinstance(event, Lost | Closed)
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def follow(self) -> AsyncIterator[Event]:
        """All events from the first that is still here on; ends after `Lost` or `Closed`."""
        return _Follower(self)


class _Follower(AsyncIterator[Event]):
    """One who follows a log. No generator: one that is left by ``break`` would have to be closed."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._position = 0

    async def __anext__(self) -> Event:
        log = self._log
        while True:
            first = log._count - len(log._events)
            if self._position < first:
                missed, self._position = first - self._position, first
                return Missed(missed)
            if self._position < log._count:
                self._position += 1
                return log._events[self._position - 1 - first]
            if log._ended:
                raise StopAsyncIteration
            if log._changed is None:
                log._changed = anyio.Event()
            await log._changed.wait()
