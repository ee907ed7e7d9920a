"""Links in memory, within one process: for tests, and for two parts of one program.

A direction holds at most ``capacity`` bytes; a writer waits above it, as it would on a socket. Bytes are
bytes: what arrives keeps no boundary of what was written, and ``chunk`` cuts it smaller still, since
boundaries that happen to survive hide bugs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial, Side
from towline.stage import Driver
from towline.text import differing
from towline.transport import Listener, Transport
from towline.units import Bytes

__all__ = ["Memory", "MemoryDriver", "memory_drivers"]


class _Direction:
    """One direction: a bounded queue of bytes with one reader and one writer."""

    def __init__(self, capacity: int, chunk: int | None) -> None:
        self.capacity = capacity
        self.chunk = chunk
        self.parts: deque[bytes] = deque()
        self.size = 0
        self.ended = False  # the writer ended it
        self.end_seen = False  # and the reader knows
        self.deserted = False  # the reader closed: what comes goes nowhere
        self.broken = False  # either side aborted
        self.changed = anyio.Event()

    def notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    def put(self, data: bytes | bytearray | memoryview) -> int:
        """Take as much of ``data`` as there is room for, and say how much."""
        if self.deserted:
            return len(data)
        n = min(len(data), self.capacity - self.size)
        if n > 0:
            self.parts.append(bytes(data[:n]))
            self.size += n
            self.notify()
        return n

    def get(self) -> bytes:
        if self.chunk is None:
            data = b"".join(self.parts)
            self.parts.clear()
        else:
            data = self.parts.popleft()
            if len(data) > self.chunk:
                self.parts.appendleft(data[self.chunk :])
                data = data[: self.chunk]
        self.size -= len(data)
        self.notify()
        return data

    def abort(self) -> None:
        self.broken = True
        self._drop()

    def desert(self) -> None:
        self.deserted = True
        self._drop()

    def _drop(self) -> None:
        self.parts.clear()
        self.size = 0
        self.notify()


class MemoryDriver(Driver):
    """One end of a pair; see `memory_drivers`."""

    inline = True

    def __init__(self, incoming: _Direction, outgoing: _Direction) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._left = b""
        self._closed = False

    @property
    def unsent(self) -> bool:  # type: ignore[override]
        return bool(self._left)

    async def read(self) -> bytes:
        incoming = self._incoming
        await anyio.lowlevel.checkpoint()
        while True:
            if self._closed:
                raise LinkLost("the link was closed here")
            if incoming.broken:
                raise LinkLost("the link was reset")
            if incoming.parts:
                return incoming.get()
            if incoming.ended:
                incoming.end_seen = True
                return b""
            await incoming.changed.wait()

    async def write(self, data: bytes | bytearray) -> None:
        outgoing = self._outgoing
        view = memoryview(self._left + bytes(data))
        self._left = b""
        await anyio.lowlevel.checkpoint_if_cancelled()
        while True:
            self._check(outgoing)
            taken = outgoing.put(view)
            self.accepted += taken
            view = view[taken:]
            if not view:
                return
            await outgoing.changed.wait()

    def write_now(self, data: bytes | bytearray) -> None:
        self._check(self._outgoing)
        taken = 0 if self._left else self._outgoing.put(data)
        self.accepted += taken
        self._left += bytes(data[taken:])

    def _check(self, outgoing: _Direction) -> None:
        if outgoing.broken:
            raise LinkLost("the link was reset")
        if outgoing.ended:
            raise LinkLost("our direction was ended before")
        if outgoing.deserted and self._incoming.end_seen:
            raise LinkLost("the peer has closed the link")

    async def send_eof(self) -> None:
        self._outgoing.ended = True
        self._outgoing.notify()

    def abort(self) -> None:
        if not self._closed:  # what was written before a close arrives
            self._closed = True
            self._incoming.abort()
            self._outgoing.abort()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self.send_eof()
            # As a socket that lingers: what the peer still writes goes nowhere, and it learns that after our
            # last byte.
            self._incoming.desert()

    @property
    def description(self) -> str:
        return "memory"


def memory_drivers(*, capacity: int = 65536, chunk: int | None = None) -> tuple[MemoryDriver, MemoryDriver]:
    """Two joined ends.

    Args:
        capacity: bytes that each direction holds before a writer waits; 64 KiB, as a socket might.
        chunk: the most bytes that one read gives; None for all there are.
    """
    there, back = _Direction(capacity, chunk), _Direction(capacity, chunk)
    return MemoryDriver(back, there), MemoryDriver(there, back)


@dataclass(frozen=True, kw_only=True)
class Memory(Transport):
    """Transport for ``memory://name``. Two stacks reach each other when they share one `Memory` (the default
    one does).

    Two that are made alike are equal, although nothing gets from one to the other.

    Args:
        capacity: bytes that each direction of a link holds.
        chunk: the most bytes that one read gives; None for all there are.

    >>> Memory()
    Memory()
    """

    schemes: ClassVar[tuple[str, ...]] = ("memory",)

    capacity: Bytes = 65536
    chunk: Bytes | None = None

    _listeners: dict[str, _MemoryListener] = field(
        default_factory=dict[str, Any], init=False, repr=False, compare=False
    )

    __repr__ = differing

    async def __call__(self, dial: Dial, /) -> Link:
        await anyio.lowlevel.checkpoint()
        listener = self._listeners.get(dial.endpoint.name)
        if listener is None:
            raise ConnectFailed(f"nothing listens on {dial.endpoint}")
        ours, theirs = memory_drivers(capacity=self.capacity, chunk=self.chunk)
        listener.put(Link(theirs, side=Side.LISTENING, endpoint=dial.endpoint))
        return Link(ours, side=Side.DIALLING, endpoint=dial.endpoint)

    async def listen(self, endpoint: Endpoint) -> Listener:
        await anyio.lowlevel.checkpoint()
        if endpoint.scheme != "memory":
            raise EndpointError(f"Memory serves memory://name, not {endpoint}")
        if endpoint.name in self._listeners:
            raise ConnectFailed(f"{endpoint} is in use")
        listener = self._listeners[endpoint.name] = _MemoryListener(self._listeners, endpoint)
        return listener


class _MemoryListener(Listener):
    def __init__(self, listeners: dict[str, _MemoryListener], endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._listeners = listeners
        self._accepted: Callable[[Link], None] | None = None
        self._waiting: list[Link] = []
        self._closed = anyio.Event()

    def put(self, link: Link) -> None:
        if self._accepted is not None:
            self._accepted(link)
        else:
            self._waiting.append(link)

    async def serve(self, accepted: Callable[[Link], None]) -> None:
        self._accepted = accepted
        try:
            for link in self._waiting:
                accepted(link)
            self._waiting.clear()
            await self._closed.wait()
        finally:
            self._accepted = None

    async def aclose(self) -> None:
        if self._listeners.get(self.endpoint.name) is self:
            del self._listeners[self.endpoint.name]
        for link in self._waiting:
            link.abort(LinkLost("the listener was closed"))
        self._waiting.clear()
        self._closed.set()
        await anyio.lowlevel.checkpoint()
