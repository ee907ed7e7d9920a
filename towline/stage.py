"""What a link is made of: the units that move, the stages that turn them, the driver below and the top above.

These are contracts; `towline.link` is where they move. A layer's stage is a plain object without await, I/O or clock,
so it is tested without an event loop.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

__all__ = ["CLEAN", "Batch", "Driver", "Ended", "Note", "Stage", "Top", "Units"]

Note: TypeAlias = bytes
"""A control frame: its first byte is its type. Heartbeat and Resume speak disjoint types."""


class Batch:
    """A unit above Framing: control frames, then data frames. A note that follows data starts a new Batch."""

    __slots__ = ("frames", "notes")

    def __init__(self, notes: Sequence[Note] = (), frames: Sequence[bytes] = ()) -> None:
        self.notes: Sequence[Note] = notes
        self.frames: Sequence[bytes] = frames

    def __repr__(self) -> str:
        return f"Batch({len(self.notes)} notes, {len(self.frames)} frames)"


class _Clean:
    """The peer ended on purpose, and the end is as trustworthy as the layers below can make it."""

    def __repr__(self) -> str:
        return "CLEAN"


CLEAN: Final = _Clean()

Ended: TypeAlias = _Clean | Exception | None
"""How what a stage reads has ended: not yet, cleanly, or by an error."""

Units: TypeAlias = list[Any]
"""What stages move: ``list[bytes]`` below Framing, ``list[Batch]`` above it."""


class Stage:
    """What a layer leaves behind on a link: a plain object, no await, no I/O, no clock.

    Raising from any method aborts the link. Every default does nothing, so a stage writes only what it changes.
    """

    wants: bool = False
    """Has units of its own to send (see `pending`), though nobody else may have."""

    deadline: float | None = None
    """When `on_time` wants to be called; None for never."""

    ended: Ended = None
    """Set together with the last good units of a read; whatever comes after is not looked at."""

    held: Exception | None = None
    """What was read goes beyond what a stranger may send. It counts unless `established` comes before the next read:
    then the stage is fed once more, with nothing, and goes on."""

    def check(self, item: bytes) -> None:
        """Refuse what the application wants to send, before it is sent. Only where an item is one frame or line.

        Raises:
            MisuseError: if it can never be sent.
        """

    def outgoing(self, units: Units, now: float) -> Units:
        """Turn units from the stage outside into units for the stage inside."""
        return units

    def incoming(self, units: Units, now: float) -> Units:
        """Turn units from the stage inside into units for the stage outside.

        Called once when pushed, with what was read too far, and on every read, also when nothing came through.
        """
        return units

    def pending(self, now: float) -> Units:
        """Take this stage's own units, in the form that the stage inside takes. Called while `wants`."""
        return []

    def on_time(self, now: float) -> None:
        """The deadline has passed."""

    def receive_eof(self, ended: Ended) -> None:
        """What lies inside has ended, as ``ended`` says. Set ``self.ended`` if this stage knows better."""
        self.ended = ended

    def close(self) -> Units:
        """The last units that this stage sends, in the form that the stage inside takes."""
        return []

    def established(self) -> None:
        """The peer is who it should be: limits for strangers may be lifted."""

    def paused(self, seconds: float) -> None:
        """Our own side did not read for so long; the peer's silence in that time means nothing."""


class Driver(ABC):
    """Moves bytes. Errors of the outside world leave it as `LinkLost`."""

    inline: bool = False
    """Whether `write_now` can take data without waiting."""

    accepted: int = 0
    """Bytes that the other side of this driver has accepted so far; a writer that is stuck shows by it."""

    unsent: bool = False
    """Whether `write_now` took data that is not accepted yet; ``await write(b"")`` waits for it."""

    @abstractmethod
    async def read(self) -> bytes:
        """Whatever has arrived, or wait for something; ``b""`` when the peer ended its direction.

        Raises:
            LinkLost: if the link is broken.
        """

    async def read_each(self, take: Callable[[bytes], bool]) -> None:
        """Give each read to ``take``, until that says no, or the peer has ended its direction: the last is ``b""``.

        What ``take`` is called with may be read outside of the caller's task, where that saves the way into it.
        Cancelled, nothing is lost: what was read was given.

        Raises:
            LinkLost: if the link is broken.
            Exception: what ``take`` raised.
        """
        while take(data := await self.read()) and data:
            pass

    @abstractmethod
    async def write(self, data: bytes | bytearray) -> None:
        """Send what `write_now` left over and then all of ``data``. Only one caller at a time.

        Raises:
            LinkLost: if the link is broken.
        """

    def write_now(self, data: bytes | bytearray) -> None:
        """Send ``data`` without waiting, keeping what is not accepted yet. Only where `inline` is True.

        Raises:
            LinkLost: if the link is broken.
        """
        raise TypeError(f"{type(self).__name__} cannot write without waiting")

    async def send_eof(self) -> None:  # noqa: B027 - doing nothing is right for most
        """End our direction, where the transport has half-close; elsewhere this does nothing (a pipe has none)."""

    @abstractmethod
    def abort(self) -> None:
        """End at once, without waiting, so that anything that reads or writes here raises `LinkLost`. Idempotent.

        Where the transport can, the peer sees a reset, not a clean end.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close after everything written; the peer sees a clean end. Idempotent."""

    @property
    def description(self) -> str:
        """What this is, for a log line: no secret in it."""
        return type(self).__name__

    def guard(self, timeout: float) -> None:  # noqa: B027 - doing nothing is right for most
        """Let the kernel give up on unacknowledged data after ``timeout`` seconds, where it can."""


class Top(ABC):
    """What sits on the stages: a session, or a plain stream."""

    wants: bool = False
    deadline: float | None = None

    full: bool = False
    """No room for more: the reader pauses until `Link.resume_reading`."""

    @abstractmethod
    def pull(self, now: float) -> Units:
        """The next units to send, a flush's worth; an empty list when nothing waits."""

    @abstractmethod
    def deliver(self, units: Units, now: float) -> None:
        """Take what arrived. Raising aborts the link."""

    def on_time(self, now: float) -> None:  # noqa: B027 - doing nothing is right for most
        """The deadline has passed."""

    def receive_eof(self, ended: Ended) -> bool:
        """The peer's direction has ended. True keeps the link for our own direction; False ends it."""
        return False
