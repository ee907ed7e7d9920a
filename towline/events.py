"""What happens to something that lives long, as a stream of values that any number of people follow.

The log does not coalesce: a follower sees each event, however late it looks. It is bounded, since a follower may never
look; then it is told how many it missed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

import anyio

__all__ = ["EventLog", "Missed"]

E = TypeVar("E")


@dataclass(frozen=True, slots=True)
class Missed:
    """This follower was too slow: so many events are gone."""

    count: int


class EventLog(Generic[E]):
    """The last events, for any number of followers."""

    KEPT: Final = 256
    """A follower that is this many events behind has other worries."""

    def __init__(self) -> None:
        self._events: deque[E] = deque(maxlen=self.KEPT)
        self._count = 0
        self._changed: anyio.Event | None = None
        self._ended = False

    def add(self, event: E, *, is_last: bool = False) -> None:
        """Tell all followers."""
        self._events.append(event)
        self._count += 1
        self._ended = self._ended or is_last
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    def follow(self) -> AsyncIterator[E | Missed]:
        """All events from the first that is still here on; ends after the last."""
        return _Follower(self)


class _Follower(AsyncIterator[E | Missed]):
    """One who follows a log. No generator: one that is left by ``break`` would have to be closed."""

    def __init__(self, log: EventLog[E]) -> None:
        self._log = log
        self._position = 0

    async def __anext__(self) -> E | Missed:
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
