"""Driver (a): any anyio stream of bytes that a user brings, under a Link.

It writes only in the writer's task (``inline`` is False): a stream has no way to try, and a caller cancelled
in mid-send would tear a record (D12). What it promises beyond that is what the stream below promises; anyio's
own TCP streams on asyncio, for one, buffer without limit until their first `receive` has had to wait, which
is why our own transports do not use them (D13).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
from anyio.abc import SocketAttribute

from towline.errors import LinkLost
from towline.stage import Driver

from ._poll import READ_SIZE, broken
from ._socket import RESET

__all__ = ["StreamDriver"]

T = TypeVar("T")

_CHUNK: Final = 65536
"""Bytes in one send: `accepted` can only count whole sends, and by it a writer that is stuck is told from a
slow one."""

_BROKEN: Final = (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError)

_background: set[Any] = set()  # asyncio forgets tasks that nobody holds


class StreamDriver(Driver):
    """Moves bytes over a stream, which it owns from now on.

    How `abort` ends the stream, which can only be closed by awaiting: it cancels what is reading or writing,
    and the last of these closes the stream on its way out. Where nothing is, a task in the background does.
    Either way, the peer of a TCP connection sees a reset, if the stream tells its socket.

    Args:
        stream: an ``anyio.abc.ByteStream``, or an ``ObjectStream[bytes]``, whose boundaries mean nothing
            here.
        linger: how long `aclose` waits for the peer to take our last bytes and end its own direction, in
            seconds. Some streams (anyio's TCP on asyncio) throw away what they have not sent yet when they
            are closed.
    """

    inline = False

    def __init__(self, stream: anyio.abc.ByteStream | anyio.abc.ObjectStream[bytes], *, linger: float = 1.0) -> None:
        self._stream = stream
        self._linger = linger
        self._pending: list[anyio.CancelScope] = []  # of what is being awaited on the stream
        self._aborted = False
        self._closing = False
        self._ended = False  # no more is written
        self._told = False  # the peer knows

    async def read(self) -> bytes:
        self._check()
        return await self._await(self._receive)

    async def write(self, data: bytes | bytearray) -> None:
        self._check()
        if self._ended:
            raise LinkLost("our direction was ended before")

        async def send() -> None:
            for at in range(0, len(data), _CHUNK):
                part = bytes(data) if len(data) <= _CHUNK else bytes(data[at : at + _CHUNK])
                await self._stream.send(part)
                self.accepted += len(part)

        await self._await(send)

    async def _receive(self) -> bytes:
        stream = self._stream
        while True:
            try:
                if isinstance(stream, anyio.abc.ByteReceiveStream):
                    data = await stream.receive(READ_SIZE)
                else:
                    data = await stream.receive()
            except anyio.EndOfStream:
                return b""
            if data:  # an empty object is not the end
                return data

    async def send_eof(self) -> None:
        self._check()
        if self._ended:
            await anyio.lowlevel.checkpoint()
            return
        self._ended = True

        await self._await(self._tell)

    async def _tell(self) -> None:
        with contextlib.suppress(NotImplementedError):  # TLS has no half-close
            await self._stream.send_eof()
            self._told = True

    # --- the end --------------------------------------------------------------------------------------------

    def abort(self) -> None:
        if self._aborted:
            return
        self._aborted = True
        self._set_option(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        if self._pending:
            for scope in self._pending:
                scope.cancel()
        elif not self._closing:
            _in_background(self._close)

    async def aclose(self) -> None:
        """Close after everything written: end our direction, then read on until the peer ends its own, then
        close.

        After ``linger`` seconds, or when cancelled, the stream is closed as it is.
        """
        if self._closing or self._aborted:
            await anyio.lowlevel.checkpoint()
            return
        for scope in self._pending:  # our own reader; it raises LinkLost
            scope.cancel()
        self._closing = True
        try:
            with contextlib.suppress(LinkLost):
                await self._await(self._end, timeout=self._linger)
            if not self._aborted:
                with anyio.move_on_after(self._linger), contextlib.suppress(*_BROKEN):
                    await self._stream.aclose()
        finally:
            await self._close()

    async def _end(self) -> None:
        while len(self._pending) > 1:
            await anyio.lowlevel.checkpoint()
        if not self._told:
            await self._tell()
        if not self._told:
            return  # so the peer will not end either: what aclose() of the stream does must be enough
        while await self._receive():
            pass

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
            # Whatever a foreign stream says about being closed: there is nobody to tell, and nothing to be
            # done.
            await anyio.aclose_forcefully(self._stream)

    # --- the rest -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._aborted or self._closing:
            raise LinkLost("the link was closed here")

    async def _await(self, operation: Callable[[], Awaitable[T]], *, timeout: float = math.inf) -> T:
        """Await something on the stream so that `abort` can end it.

        Raises:
            LinkLost: if it was ended, took longer than ``timeout``, or failed.
        """
        results: list[T] = []
        scope = anyio.CancelScope(deadline=anyio.current_time() + timeout)
        self._pending.append(scope)
        try:
            with scope:
                results.append(await operation())
        except _BROKEN as error:
            raise broken(error) from error
        finally:
            self._pending.remove(scope)
            if self._aborted and not self._pending:
                # The last one out closes, also when it is cancelled from outside as well: nobody comes after
                # it.
                await self._close()
        if self._aborted or not results:
            raise LinkLost("the link was closed here")
        return results[0]

    def _set_option(self, level: int, name: int, value: int | bytes) -> None:
        with contextlib.suppress(Exception):  # a foreign stream, perhaps closed already, may say anything here
            sock = self._stream.extra(SocketAttribute.raw_socket, None)
            if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
                sock.setsockopt(level, name, value)

    @property
    def description(self) -> str:
        return f"a stream of {type(self._stream).__name__}"

    def guard(self, timeout: float) -> None:
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            self._set_option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, round(timeout * 1000)))


def _in_background(close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run ``close`` in a task of its own, which anyio cannot start without a group to own it."""
    if "trio" in sys.modules:
        import trio.lowlevel  # an optional dependency

        if trio.lowlevel.in_trio_run():
            trio.lowlevel.spawn_system_task(close)
            return
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return  # no loop runs: nothing is left that the stream could be open for
    task = loop.create_task(close())
    _background.add(task)
    task.add_done_callback(_background.discard)
