"""Two joined ends, with as much buffer between them as a test wants: some, none, or one that is full.

    memory_drivers          64 KiB each way, as a socket might have       (`towline.transports.memory`)
    lockstep_driver_pair    none: a write is done when it was read; finds the deadlocks that buffers hide
    clogged_driver_pair     a few bytes, then nothing until `CloggedDriver.release`; finds what never gives up

A `DriverPair` becomes a pair of links by `link_pair`; `open_scope` gives the scope that a pumped link needs.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
from anyio.abc import ByteStream

from towline.endpoint import Endpoint
from towline.errors import LinkLost
from towline.link import Link
from towline.scope import Scope
from towline.service import Side
from towline.stage import Driver
from towline.transports.memory import MemoryDriver, _Direction, memory_drivers

from ._transport import DriverPair

__all__ = [
    "CloggedDriver",
    "LockstepDriver",
    "clogged_driver_pair",
    "link_pair",
    "lockstep_driver_pair",
    "memory_link_pair",
    "memory_stream_pair",
    "open_scope",
]

_ENDPOINT = Endpoint("memory", name="pair")


@asynccontextmanager
async def open_scope(
    *,
    clock: Callable[[], float] = anyio.current_time,
    rng: random.Random | None = None,
    wire: tuple[str, ...] = (),
) -> AsyncGenerator[Scope]:
    """A scope as `Stack.open` makes one, with its timer running; leaving the block ends all that was started in it.

    An error of the block leaves it as it is, not as an ExceptionGroup.
    """
    caught: BaseException | None = None
    cancelled = anyio.get_cancelled_exc_class()
    async with anyio.create_task_group() as tasks:
        scope = Scope(tasks, clock, rng or random.Random(0), wire)
        tasks.start_soon(scope.timers.run)
        try:
            yield scope
        except cancelled:
            raise
        except BaseException as error:
            caught = error
        tasks.cancel_scope.cancel()
    if caught is not None:
        raise caught


def link_pair(drivers: DriverPair, scope: Scope | None = None) -> tuple[Link, Link]:
    """Two links on two joined drivers: the dialling end, and the listening one.

    Args:
        drivers: a pair from any of the functions here, or of your own.
        scope: what the links belong to. Without one they can negotiate, but not be pumped.
    """
    dialling = Link(drivers[0], side=Side.DIALLING, endpoint=_ENDPOINT)
    listening = Link(drivers[1], side=Side.LISTENING, endpoint=_ENDPOINT)
    if scope is not None:
        dialling.bind(scope)
        listening.bind(scope)
    return dialling, listening


def memory_link_pair(
    scope: Scope | None = None, *, capacity: int = 65536, chunk: int | None = None
) -> tuple[Link, Link]:
    """Two joined links in memory, the dialling end first.

    Args:
        scope: what the links belong to. Without one they can negotiate, but not be pumped.
        capacity: bytes that each direction holds before a writer waits.
        chunk: the most bytes that one read gives; None for all there are.
    """
    return link_pair(memory_drivers(capacity=capacity, chunk=chunk), scope)


# --- no buffer -------------------------------------------------------------------------------------------------


class _Handover:
    """One direction without a buffer: what a writer offers stays with the writer until it is read."""

    def __init__(self) -> None:
        self.offered = b""
        self.ended = False
        self.broken = False
        self._changed = anyio.Event()

    def notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self) -> None:
        await self._changed.wait()

    def check_writing(self) -> None:
        if self.broken:
            raise LinkLost("the link was reset")
        if self.ended:
            raise LinkLost("our direction was ended before")


class LockstepDriver(Driver):
    """One end of a pair without any buffer; see `lockstep_driver_pair`."""

    def __init__(self, incoming: _Handover, outgoing: _Handover, chunk: int | None) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._chunk = chunk

    async def read(self) -> bytes:
        incoming = self._incoming
        await anyio.lowlevel.checkpoint()
        while True:
            if incoming.broken:
                raise LinkLost("the link was reset")
            if incoming.offered:
                data = incoming.offered[: self._chunk]
                incoming.offered = incoming.offered[len(data) :]
                incoming.notify()
                return data
            if incoming.ended:
                return b""
            await incoming.wait()

    async def write(self, data: bytes | bytearray) -> None:
        outgoing = self._outgoing
        outgoing.check_writing()
        if outgoing.offered:
            raise RuntimeError("two tasks write to one driver at once")
        await anyio.lowlevel.checkpoint()
        outgoing.check_writing()
        if not data:
            return
        outgoing.offered = bytes(data)
        outgoing.notify()
        try:
            while outgoing.offered:
                left = len(outgoing.offered)
                await outgoing.wait()
                outgoing.check_writing()
                self.accepted += left - len(outgoing.offered)
        finally:
            outgoing.offered = b""  # a writer that was cancelled takes the rest back

    async def send_eof(self) -> None:
        self._outgoing.ended = True
        self._outgoing.notify()
        await anyio.lowlevel.checkpoint()

    def abort(self) -> None:
        for direction in (self._incoming, self._outgoing):
            direction.broken = True
            direction.notify()

    async def aclose(self) -> None:
        self._outgoing.ended = True
        self._outgoing.notify()
        await anyio.lowlevel.checkpoint()

    @property
    def description(self) -> str:
        return "memory, in lockstep"


def lockstep_driver_pair(*, chunk: int | None = None) -> tuple[LockstepDriver, LockstepDriver]:
    """Two joined drivers with no buffer at all: a write completes only when all of it was read.

    Whatever writes before it reads, on both sides at once, hangs here, and would hang over a network on a bad day.

    Args:
        chunk: the most bytes that one read gives; None for all that is offered.
    """
    there, back = _Handover(), _Handover()
    return LockstepDriver(back, there, chunk), LockstepDriver(there, back, chunk)


# --- a full buffer -----------------------------------------------------------------------------------------------


class _CloggedDirection(_Direction):
    """A direction that takes a number of bytes in all, and more only when it is released."""

    def __init__(self, accepts: int) -> None:
        super().__init__(capacity=65536, chunk=None)
        self.left: int | None = accepts  # None: released

    def put(self, data: bytes | bytearray | memoryview) -> int:
        if self.left is None:
            return super().put(data)
        taken = super().put(data[: self.left])
        self.left -= taken
        return taken


class CloggedDriver(MemoryDriver):
    """One end of a pair that stalls; see `clogged_driver_pair`."""

    _outgoing: _CloggedDirection

    def release(self) -> None:
        """Let what this end writes flow from now on."""
        self._outgoing.left = None
        self._outgoing.notify()

    def clog(self, accepts: int = 0) -> None:
        """Take ``accepts`` more bytes from this end, and then nothing until `release`."""
        self._outgoing.left = accepts

    @property
    def description(self) -> str:
        return "memory, clogged"


def clogged_driver_pair(accepts: int = 8) -> tuple[CloggedDriver, CloggedDriver]:
    """Two joined drivers, each of which accepts a few bytes and then stalls until its `CloggedDriver.release`.

    So does a peer whose process is stopped, or a network that swallows everything. Whatever writes to one must have a
    bound of its own in time.

    Args:
        accepts: bytes that each direction takes, in all, before it stalls.
    """
    there, back = _CloggedDirection(accepts), _CloggedDirection(accepts)
    return CloggedDriver(back, there), CloggedDriver(there, back)


# --- as anyio streams --------------------------------------------------------------------------------------------


class _MemoryStream(ByteStream):
    """A driver as an anyio stream of bytes, with exactly the errors that anyio's documentation promises."""

    def __init__(self, driver: _StreamDriverEnd) -> None:
        self._driver = driver
        self._rest = b""
        self._closed = False
        self._eof_sent = False
        self._receiving = False
        self._sending = False

    async def receive(self, max_bytes: int = 65536) -> bytes:
        await anyio.lowlevel.checkpoint()
        if self._closed:
            raise anyio.ClosedResourceError
        if self._receiving:
            raise anyio.BusyResourceError("receiving from")
        if not self._rest:
            self._receiving = True
            try:
                self._rest = await self._driver.read()
            except LinkLost as error:
                if self._closed:
                    raise anyio.ClosedResourceError from None
                raise anyio.BrokenResourceError from error
            finally:
                self._receiving = False
            if not self._rest:
                raise anyio.EndOfStream
        data, self._rest = self._rest[:max_bytes], self._rest[max_bytes:]
        return data

    async def send(self, item: bytes) -> None:
        await anyio.lowlevel.checkpoint()
        if self._closed or self._eof_sent:
            raise anyio.ClosedResourceError
        if self._sending:
            raise anyio.BusyResourceError("sending to")
        self._sending = True
        try:
            await self._driver.write(item)
        except LinkLost as error:
            raise anyio.BrokenResourceError from error
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        self._eof_sent = True
        await self._driver.send_eof()
        await anyio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self._driver.aclose()
            self._driver.end_reading()
        await anyio.lowlevel.checkpoint()


class _StreamDriverEnd(MemoryDriver):
    def end_reading(self) -> None:
        """What the peer still writes goes nowhere, and it is told, as a closed socket would."""
        self._incoming.abort()


def memory_stream_pair(*, capacity: int = 65536, chunk: int | None = None) -> tuple[ByteStream, ByteStream]:
    """Two joined ``anyio.abc.ByteStream``, for what takes a stream from outside.

    Args:
        capacity: bytes that each direction holds before a sender waits.
        chunk: the most bytes that one receive gives, whatever it asks for; None for no such limit.
    """
    there, back = _Direction(capacity, chunk), _Direction(capacity, chunk)
    return _MemoryStream(_StreamDriverEnd(back, there)), _MemoryStream(_StreamDriverEnd(there, back))
