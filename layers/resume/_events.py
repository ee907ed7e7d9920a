"""What happens to a session, as values."""

from __future__ import annotations

from dataclasses import dataclass

from towline.events import Missed

__all__ = [
    "Attempt",
    "Closed",
    "Connected",
    "Detached",
    "Draining",
    "Event",
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


Event = Connected | Detached | Attempt | Resumed | Draining | Lost | Closed | Missed
