"""Windows named pipes. **Experimental**: tested by a stand-in for Windows, see `WinApi`, and not run there by
our CI.

One backend for asyncio and trio (D18): overlapped operations are started in the loop's thread, where most are
complete at once; one that is not is waited for in a worker thread and ended by ``CancelIoEx``. The threads
have limiters of their own, two tokens a link, so links can never use up the threads that the application
counts on.

A pipe is for the user who made it, on this machine only, and the server refuses to share a name that exists.
Still, a process that is quicker may take the name first: put Encryption above it, as over a network.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

import anyio
import anyio.lowlevel
import anyio.to_thread

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial, Side
from towline.stage import Driver
from towline.text import differing
from towline.transport import Listener, Transport
from towline.units import Seconds

from . import _winpipe as win
from ._winpipe import Operation, WinApi, describe

__all__ = ["Pipe", "PipeDriver"]

logger = logging.getLogger(__name__)

_CHUNK: Final = 65536
"""Bytes in one operation: `accepted` counts whole writes, and a pipe's own buffer is no larger."""

_BUSY_PAUSE: Final = 0.02  # seconds between two tries to connect while no instance waits for a client
_ACCEPT_PAUSE: Final = 0.1  # seconds without accepting when no new instance can be made


class _Handle:
    """A handle with overlapped operations on it, closed only when all of them are complete.

    Until then the system may write into their buffers.
    """

    def __init__(self, api: WinApi, handle: int) -> None:
        self.api = api
        self._handle = handle
        self._limiter = anyio.CapacityLimiter(2)  # one that reads, and one that writes
        self._pending = 0
        self.closed = False

    async def run(self, start: Callable[[int, Operation], int], operation: Operation) -> None:
        """Start an operation and wait until it is complete; its code and count say how. Complete also if
        cancelled."""
        if self.closed:
            operation.code = win.OPERATION_ABORTED
            return
        api, handle = self.api, self._handle
        operation.code = api.prepare(operation) or None
        if operation.code:
            return
        self._pending += 1
        try:
            code = start(handle, operation)
            if code == 0:
                operation.code, operation.n = api.result(handle, operation)  # which does not wait now
            elif code == win.IO_PENDING:
                await self._wait(operation)
            else:
                operation.code = code
        finally:
            api.release(operation)
            self._pending -= 1
            if self.closed and not self._pending:
                api.close_handle(handle)

    async def _wait(self, operation: Operation) -> None:
        done = anyio.Event()

        async def wait() -> None:
            with anyio.CancelScope(shield=True):  # the buffer is the system's until this returns
                operation.code, operation.n = await anyio.to_thread.run_sync(
                    self.api.result, self._handle, operation, limiter=self._limiter
                )
            done.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            try:
                await done.wait()
            except BaseException:
                self.api.cancel(self._handle, operation)
                raise

    def disconnect(self) -> None:
        if not self.closed:
            self.api.disconnect_named_pipe(self._handle)

    def close(self) -> None:
        """Close, at once or as soon as what is under way was cancelled. Idempotent, never waits."""
        if self.closed:
            return
        self.closed = True
        if self._pending:
            self.api.cancel(self._handle, None)
        else:
            self.api.close_handle(self._handle)


@functools.cache
def _windows() -> WinApi:
    return win.Kernel32()


class PipeDriver(Driver):
    """Moves bytes over a connected pipe, which it owns from now on.

    A pipe has no half-close: `send_eof` does nothing. The client of a server that aborts sees a broken link;
    the server of a client that aborts sees an end.

    Args:
        handle: the connected pipe.
        is_server: whether it is the server's end.
    """

    def __init__(self, handle: _Handle, *, is_server: bool) -> None:
        self._handle = handle
        self._is_server = is_server
        self._ready = b""  # read, but its reader was cancelled before it had it
        self._torn = False  # a write was cancelled in the middle, and nobody can say where

    async def read(self) -> bytes:
        self._check()
        if self._ready:
            await anyio.lowlevel.checkpoint()
            data, self._ready = self._ready, b""
            return data
        await anyio.lowlevel.checkpoint_if_cancelled()
        operation = Operation(bytearray(_CHUNK))
        try:
            await self._handle.run(self._handle.api.read_file, operation)
            if operation.code == 0:
                await anyio.lowlevel.checkpoint()  # it may well have come without waiting
        except BaseException:
            if operation.code == 0:
                self._ready = bytes(operation.buffer[: operation.n])
            raise
        self._check()
        if operation.code in (win.BROKEN_PIPE, win.HANDLE_EOF):
            return b""
        if operation.code:
            raise _lost(operation.code)
        return bytes(operation.buffer[: operation.n])

    async def write(self, data: bytes | bytearray) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check()
        if self._torn:
            raise LinkLost("an earlier write was cancelled in the middle")
        at = 0
        while at < len(data):
            operation = Operation(bytearray(data[at : at + _CHUNK]))
            self._torn = True
            await self._handle.run(self._handle.api.write_file, operation)
            self._torn = False
            self._check()
            if operation.code:
                raise _lost(operation.code)
            at += operation.n
            self.accepted += operation.n

    def abort(self) -> None:
        if self._is_server:
            self._handle.disconnect()
        self._handle.close()

    async def aclose(self) -> None:
        """Close. What was written stays readable for the peer, then it sees the end."""
        self._handle.close()
        await anyio.lowlevel.checkpoint()

    def _check(self) -> None:
        if self._handle.closed:
            raise LinkLost("the link was closed here")

    @property
    def description(self) -> str:
        return "a named pipe"


def _lost(code: int | None) -> LinkLost:
    return LinkLost(f"the link broke: {describe(code or 0)}")


@dataclass(frozen=True, kw_only=True)
class Pipe(Transport):
    r"""Transport for ``pipe://name``, which is ``\\.\pipe\name``. Windows only, and **experimental**.

    Args:
        connect_timeout: seconds that a dial tries while all instances of the pipe are busy.
        max_links: links that one listener has at a time, from 1 to 254; a dial beyond waits for one to end. Each link
            may hold two threads, so 64 are at most 128.
        api: the calls of Windows; a stand-in for tests.

    >>> Pipe()
    Pipe()
    """

    schemes: ClassVar[tuple[str, ...]] = ("pipe",)

    connect_timeout: Seconds = 10.0
    max_links: int = 64
    api: WinApi | None = None

    __repr__ = differing

    def __post_init__(self) -> None:
        if not 1 <= self.max_links <= 254:
            raise ValueError(f"max_links is {self.max_links}, where Windows takes 1 to 254")

    async def __call__(self, dial: Dial, /) -> Link:
        endpoint = dial.endpoint
        api, path = self._checked(endpoint)
        await anyio.lowlevel.checkpoint()
        handle, code = 0, win.PIPE_BUSY
        with anyio.move_on_after(self.connect_timeout):
            while True:
                handle, code = api.create_file(path)
                if code != win.PIPE_BUSY:
                    break
                await anyio.sleep(_BUSY_PAUSE)
        if code:
            within = f" within {self.connect_timeout:g} s" if code == win.PIPE_BUSY else ""
            raise ConnectFailed(f"{endpoint} cannot be reached{within}: {describe(code)}")
        driver = PipeDriver(_Handle(api, handle), is_server=False)
        return Link(driver, side=Side.DIALLING, endpoint=endpoint)

    async def listen(self, endpoint: Endpoint) -> Listener:
        api, path = self._checked(endpoint)
        await anyio.lowlevel.checkpoint()
        listener = _PipeListener(endpoint, api, path, self.max_links)
        code = listener.make_instance(first=True)
        if code in (win.ACCESS_DENIED, win.PIPE_BUSY):  # what it says to a first instance that is not the first
            raise ConnectFailed(f"{endpoint} is in use")
        if code:
            raise ConnectFailed(f"{endpoint} cannot be made: {describe(code)}")
        return listener

    def _checked(self, endpoint: Endpoint) -> tuple[WinApi, str]:
        if endpoint.scheme != "pipe":
            raise EndpointError(f"Pipe serves pipe://name, not {endpoint}")
        try:
            api = self.api or _windows()
        except OSError:
            raise EndpointError(
                f"{endpoint}: named pipes exist on Windows only; here, use unix:///path/to/socket"
            ) from None
        return api, rf"\\.\pipe\{endpoint.name}"


class _PipeListener(Listener):
    """One instance always waits for the next client; each becomes a link when one comes."""

    def __init__(self, endpoint: Endpoint, api: WinApi, path: str, max_links: int) -> None:
        self.endpoint = endpoint
        self._api = api
        self._path = path
        self._instances = max_links
        self._waiting: _Handle | None = None
        self._is_connected = False  # the one that waits has a client already
        self._closed = False
        self._complained = False

    def __repr__(self) -> str:
        return f"<the listener on {self.endpoint}>"

    def make_instance(self, *, first: bool) -> int:
        handle, code = self._api.create_named_pipe(self._path, first=first, instances=self._instances, size=_CHUNK)
        if not code:
            self._waiting = _Handle(self._api, handle)
            self._is_connected = False
        return code

    async def serve(self, accepted: Callable[[Link], None]) -> None:
        while not self._closed:
            waiting = self._waiting
            if waiting is None:
                await self._try_again(self.make_instance(first=False))
                continue
            code = 0 if self._is_connected else await self._connect(waiting)
            if self._closed:
                return
            if code == win.NO_DATA:  # a client came and went
                waiting.disconnect()
                await anyio.lowlevel.checkpoint()
            elif code:
                await self._try_again(code)
                # The name must never be free meanwhile: a client would find nobody, and somebody else could take it.
                if self._waiting is waiting and self.make_instance(first=False) == 0:
                    waiting.close()
            else:
                self._waiting = None
                self._complained = False
                self.make_instance(first=False)  # before the link is handed on: the next client finds one
                driver = PipeDriver(waiting, is_server=True)
                accepted(Link(driver, side=Side.LISTENING, endpoint=self.endpoint))
                await anyio.lowlevel.checkpoint()

    async def _connect(self, waiting: _Handle) -> int:
        operation = Operation(bytearray(1))
        try:
            await waiting.run(self._api.connect_named_pipe, operation)
        finally:
            if operation.code == win.PIPE_CONNECTED:  # it was there before we asked
                operation.code = 0
            self._is_connected = operation.code == 0
        return operation.code or 0

    async def _try_again(self, code: int) -> None:
        if code == 0:
            return
        if not self._complained:
            self._complained = True
            logger.error(
                "%s cannot accept links for now: %s",
                self.endpoint,
                describe(code),
                extra={"event": "listener.stuck", "endpoint": str(self.endpoint), "reason": describe(code)},
            )
        await anyio.sleep(_ACCEPT_PAUSE)

    async def aclose(self) -> None:
        self._closed = True
        if self._waiting is not None:
            self._waiting.close()
            self._waiting = None
        await anyio.lowlevel.checkpoint()
