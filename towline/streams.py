"""What an application holds over one link, when no session stands between: a stream of bytes, frames or lines.

These end with their link. A stack with `Resume` gives a session instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import anyio
import anyio.lowlevel
from anyio import TypedAttributeSet, typed_attribute
from anyio.abc import ByteStream, ObjectStream

from towline.errors import BufferFull, ConnectionLost, LinkLost
from towline.link import Link
from towline.stage import Batch, Ended, Top, Units

__all__ = ["FrameStream", "LinkAttribute", "LinkByteStream"]

HIGH_WATER: Final = 128 << 10
"""Bytes that may wait to be written, and bytes that may wait to be received, before the side that adds waits."""

BEYOND: Final = 1 << 20
"""What `FrameStream.send_at_once` may let wait, in bytes."""

OVERHEAD: Final = 64
"""What an item counts beside its bytes, so that empty frames cannot grow a queue without bound."""


class LinkAttribute(TypedAttributeSet):
    """What can be asked of a stream or a session by ``extra(...)``."""

    peer_identity: Any = typed_attribute()
    epoch: int = typed_attribute()
    rtt: float | None = typed_attribute()
    handshake_hash: bytes | None = typed_attribute()


class _LinkStream(Top):
    """The half that both kinds share: queues on both sides, one error, and who waits."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self._outbox: list[bytes] = []
        self._outbox_size = 0
        self._number = 0  # of the last item that was sent
        self._inbox: deque[bytes] = deque()
        self._inbox_size = 0
        self._ended = False  # the peer ended its direction
        self._eof_sent = False
        self._closed = False
        self._error: Exception | None = None
        self._arrival: anyio.Event | None = None
        self._hand_over: Callable[[], None] | None = None  # what `receive_each` does with what arrives
        self._drained: anyio.Event | None = None
        self._done = anyio.Event()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.link!r}>"

    @property
    def wants(self) -> bool:  # type: ignore[override]
        return bool(self._outbox)

    @property
    def full(self) -> bool:  # type: ignore[override]
        return self._inbox_size > HIGH_WATER and not self._closed

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {
            LinkAttribute.peer_identity: lambda: self.link.peer_identity,
            LinkAttribute.rtt: lambda: self.link.rtt,
            LinkAttribute.handshake_hash: lambda: self.link.handshake_hash,
        }

    def _take_outbox(self) -> list[bytes]:
        items, self._outbox, self._outbox_size = self._outbox, [], 0
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        return items

    def _arrived(self, items: list[bytes]) -> None:
        if self._closed:
            return  # nobody can take it any more
        self._inbox.extend(items)
        self._inbox_size += sum(map(len, items)) + OVERHEAD * len(items)
        if self._hand_over is not None and items:
            self._hand_over()
        if self._arrival is not None and self._inbox:
            self._arrival.set()

    def receive_eof(self, ended: Ended) -> bool:
        self._ended = True
        if self._arrival is not None:
            self._arrival.set()
        return True

    async def run(self) -> None:
        """Pump the link until it ends, and keep the error for whoever uses the stream."""
        try:
            await self.link.run(self)
        except LinkLost as error:
            self._error = error
        finally:
            if self._error is None and not self._closed:
                self._error = LinkLost("the stream's scope was closed")
            self._done.set()
            for event in (self._arrival, self._drained):
                if event is not None:
                    event.set()
            self._drained = None

    async def _send(self, item: bytes) -> None:
        if self._outbox_size > HIGH_WATER:
            await self._wait_drained()
        self._check_sending()
        self._append(item)

    def _append(self, item: bytes) -> None:
        self._outbox.append(item)
        self._outbox_size += len(item) + OVERHEAD
        self._number += 1
        self.link.wake()

    def _check_sending(self) -> None:
        if self._closed or self._eof_sent:
            raise anyio.ClosedResourceError
        if self._error is not None:
            raise ConnectionLost(str(self._error)) from self._error

    async def _wait_drained(self) -> None:
        while self._outbox_size > HIGH_WATER and self._error is None and not self._closed:
            if self._drained is None:
                self._drained = anyio.Event()
            await self._drained.wait()

    async def flush(self) -> None:
        """Wait until all that was sent was handed to the transport.

        Raises:
            ConnectionLost: if the link is lost before that.
        """
        await anyio.lowlevel.checkpoint()
        while (self._outbox or self.link.parked is None) and self._error is None and not self._closed:
            if self._outbox:
                if self._drained is None:
                    self._drained = anyio.Event()
                await self._drained.wait()
            else:
                await self.link.wait_parked()
        if self._error is not None:
            self._check_sending()

    async def _wait_for_arrival(self, hand_over: Callable[[], None] | None = None) -> None:
        """Return when there is something to take: for the `receive_each` with this ``hand_over``, or for `receive`."""
        await anyio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise anyio.ClosedResourceError
            if self._hand_over is not hand_over:  # between two of its turns the other one does not wait for an arrival
                raise anyio.BusyResourceError("receiving from")
            if self._inbox:
                return
            if self._ended:
                raise anyio.EndOfStream
            if self._error is not None:
                raise ConnectionLost(str(self._error)) from self._error
            if self._arrival is not None:
                raise anyio.BusyResourceError("receiving from")
            self._arrival = anyio.Event()
            try:
                await self._arrival.wait()
            finally:
                self._arrival = None

    def _taken(self, size: int) -> None:
        self._inbox_size -= size
        if self._inbox_size <= HIGH_WATER:
            self.link.resume_reading()

    async def send_eof(self) -> None:
        """End our direction after everything sent; receiving goes on.

        Raises:
            ConnectionLost: if the link is lost.
        """
        if self._eof_sent:
            await anyio.lowlevel.checkpoint()
            return
        await self.flush()
        self._check_sending()
        self._eof_sent = True
        await self.link.send_eof()

    async def aclose(self) -> None:
        """Close after everything sent was written, for at most a few seconds. Idempotent."""
        if self._closed:
            await anyio.lowlevel.checkpoint()
            return
        self._closed = True
        self.link.finish()
        self.link.resume_reading()
        if self._arrival is not None:
            self._arrival.set()
        await anyio.lowlevel.checkpoint()

    async def wait_closed(self) -> None:
        """Wait until the link has taken the last word, or is lost."""
        await self._done.wait()

    def abort(self) -> None:
        """End at once; the peer sees a reset where the transport has one."""
        self._closed = True
        self.link.abort(LinkLost("it was aborted here"))


class LinkByteStream(_LinkStream, ByteStream):
    """A stream of bytes over one link, as anyio describes it."""

    async def send(self, item: bytes) -> None:
        """Send bytes; waits while 128 KiB wait to be written.

        Raises:
            ConnectionLost: if the link is lost.
            anyio.ClosedResourceError: after `send_eof` or `aclose`.
        """
        if item:
            await self._send(bytes(item))
        else:
            await anyio.lowlevel.checkpoint()

    async def receive(self, max_bytes: int = 65536) -> bytes:
        """Receive at least one byte and at most ``max_bytes``.

        Raises:
            anyio.EndOfStream: when the peer has ended its direction.
            ConnectionLost: if the link is lost.
        """
        if not self._inbox or self._closed:
            await self._wait_for_arrival()
        data = self._inbox.popleft()
        more = len(data) > max_bytes
        if more:
            self._inbox.appendleft(data[max_bytes:])
            data = data[:max_bytes]
        self._taken(len(data) + (0 if more else OVERHEAD))
        return data

    def pull(self, now: float) -> Units:
        return self._take_outbox()

    def deliver(self, units: Units, now: float) -> None:
        self._arrived(units)


class FrameStream(_LinkStream, ObjectStream[bytes]):
    """A stream of frames (or of lines) over one link. It ends with its link: for more, put `Resume` above."""

    async def send(self, item: bytes) -> None:
        """Send a frame; waits while 128 KiB wait to be written.

        Raises:
            MessageTooLarge: if it is above the limit of Framing or Lines; it was not sent.
            ConnectionLost: if the link is lost.
            anyio.ClosedResourceError: after `send_eof` or `aclose`.
        """
        item = bytes(item)
        for check in self.link.checks:
            check(item)
        await self._send(item)

    def cork(self) -> None:
        """Say that several tasks, which were just woken, are going to send: all of it then goes in one write."""
        self.link.cork()

    def try_send(self, item: bytes) -> int:
        """Send a frame if it need not wait. Raises nothing.

        Returns:
            The frame's number among those sent by this, counted from 1. 0 if it would have to wait, or may not be sent
            at all, and was not: `wait_to_send` then waits, or says why.
        """
        if self._outbox_size > HIGH_WATER or self._closed or self._eof_sent or self._error is not None:
            return 0
        self._append(item)
        return self._number

    async def wait_to_send(self, item: bytes) -> None:
        """Wait until `try_send` will send a frame as long as this one, if it is called before anything else.

        Raises:
            MessageTooLarge, ConnectionLost, anyio.ClosedResourceError: as `send`.
        """
        for check in self.link.checks:
            check(item)
        await anyio.lowlevel.checkpoint()
        await self._wait_drained()
        self._check_sending()

    def send_at_once(self, item: bytes) -> None:
        """Send a frame whatever waits, up to a megabyte: for a protocol above this that must answer in the step that
        receives, and so can never wait.

        Raises:
            BufferFull: if even that is used up. It was not sent.
            MessageTooLarge, ConnectionLost, anyio.ClosedResourceError: as `send`.
        """
        for check in self.link.checks:
            check(item)
        self._check_sending()
        if self._outbox_size > BEYOND:
            raise BufferFull(self._outbox_size, BEYOND)
        self._append(item)

    async def receive_each(self, take: Callable[[list[bytes]], None], turn: Callable[[int], int]) -> NoReturn:
        """Have what arrives given to ``take`` in the very step in which it arrives: for a protocol above this that only
        wakes others by it. Never returns: raises at the end as `receive` does.

        Args:
            take: called with frames, in order. It may neither wait nor raise, nor take long: it holds up the link.
            turn: given how many frames there are, how many to take in this turn of the event loop: at least one.
        """

        def hand_over() -> None:
            frames = [self._inbox.popleft() for _ in range(turn(len(self._inbox)))]
            self._taken(sum(map(len, frames)) + OVERHEAD * len(frames))
            take(frames)

        if self._hand_over is not None or self._arrival is not None:
            raise anyio.BusyResourceError("receiving from")
        self._hand_over = hand_over
        try:
            while True:
                # Of what came before this, or of more than went into one turn. It lets others run, whatever there is.
                await self._wait_for_arrival(hand_over)
                hand_over()
        finally:
            self._hand_over = None

    async def receive(self) -> bytes:
        """Receive the next frame.

        Raises:
            anyio.EndOfStream: when the peer has ended its direction.
            ConnectionLost: if the link is lost.
        """
        if not self._inbox or self._closed or self._hand_over is not None:
            await self._wait_for_arrival()
        frame = self._inbox.popleft()
        self._taken(len(frame) + OVERHEAD)
        return frame

    def pull(self, now: float) -> Units:
        frames = self._take_outbox()
        return [Batch(frames=frames)] if frames else []

    def deliver(self, units: Units, now: float) -> None:
        for batch in units:
            self._arrived(list(batch.frames))
