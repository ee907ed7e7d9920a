"""What driver (b) is made of: descriptors that do not block, and the loop's word on when they are ready.

Sockets and pipes both move their bytes here. Nothing is buffered above the kernel, except what `write_now`
could not place: so a peer that does not read stops us, and a peer that we do not read is stopped, by the
kernel's own windows. Three laws:

1. Whatever the operating system says is wrong leaves here as `LinkLost` (F46).
2. A descriptor is closed only when no task waits for it any more; see `Waitable`.
3. A clean close lingers: unread bytes at the moment of ``close()`` make the kernel send a reset, which
   destroys what the peer has not read yet.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from abc import abstractmethod
from asyncio import AbstractEventLoop, Future, SelectorEventLoop, get_running_loop
from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import Any, Final

import anyio
import anyio.lowlevel

from towline.errors import LinkLost
from towline.loop import is_asyncio, tell_anyio
from towline.stage import Driver

__all__ = ["READ_SIZE", "PollDriver", "Waitable", "broken", "reason"]

READ_SIZE: Final = 256 * 1024
"""The most that one read takes: four of the largest records, so that a busy link is decoded in batches."""


class _PerThread(threading.local):
    """One read buffer for all drivers of a thread: a read copies out what came before it suspends."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(READ_SIZE))


_per_thread = _PerThread()


def reason(error: BaseException) -> str:
    """What an error of the operating system says, in one phrase that starts in lower case."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:] if text[1:2].islower() else text


def broken(error: BaseException) -> LinkLost:
    """The `LinkLost` for an error of the operating system; raise it ``from error``."""
    return LinkLost(f"the link broke: {reason(error)}")


def _errors_that_end_calls(loop: AbstractEventLoop, fd: int) -> Callable[[], object] | None:
    """Tells whether ``fd`` is in an error, where such a one is not called for a second time; None elsewhere.

    That is how uvloop does it: a reset that comes right behind data would go unseen once the data was read.
    """
    if isinstance(loop, SelectorEventLoop) or not hasattr(select, "poll"):
        return None
    poller = select.poll()
    poller.register(fd, 0)  # errors are always told
    return partial(poller.poll, 0)


class Waitable:
    """Something with a descriptor that tasks wait for, and that is closed only when none of them waits any
    more.

    The delay is not politeness. anyio's asyncio backend looks a waiter up by the *number* of its descriptor,
    once more when the waiter wakes. Were the descriptor closed before that, a new socket could already have
    the same number and be waited for; the old waiter would remove the new one's registration, and that one
    would never wake.

    Args:
        target: the socket, or the descriptor's number.
        close: called once, when it is closed and nobody waits.
    """

    __slots__ = ("_close", "_loop", "_stop", "_target", "_waiting", "closed")

    def __init__(self, target: socket.socket | int, close: Callable[[], object]) -> None:
        self._target = target
        self._close = close
        self._waiting = 0
        self._stop: Callable[[], None] | None = None  # interrupts `each`
        self._loop: AbstractEventLoop | None = None  # that `each` is in
        self.closed = False

    async def wait(self, wait_for: Callable[[Any], Awaitable[None]]) -> None:
        """Wait with ``anyio.wait_readable`` or ``anyio.wait_writable``.

        Raises:
            anyio.ClosedResourceError: if it is closed, before or meanwhile, or `interrupt` was called.
            OSError: if the descriptor cannot be waited for.
        """
        if self.closed:
            raise anyio.ClosedResourceError
        self._waiting += 1
        try:
            await wait_for(self._target)
        finally:
            self._waiting -= 1
            if self.closed and not self._waiting:
                self._release()
        if self.closed:
            raise anyio.ClosedResourceError

    async def each(self, ready: Callable[[], bool]) -> bool:
        """Have asyncio's loop call ``ready`` whenever there is something to read, until that says no.

        It is called in a turn of the loop, outside of any task. `wait` would register the descriptor for each time
        anew, and wake a task.

        Returns:
            False if this loop cannot, or not with this descriptor; nothing was called.

        Raises:
            anyio.ClosedResourceError: as `wait`.
            BaseException: what ``ready`` raised.
        """
        if self.closed:
            raise anyio.ClosedResourceError
        if self._stop is not None:
            raise anyio.BusyResourceError("reading from")
        loop = get_running_loop()
        fd = self._target if isinstance(self._target, int) else self._target.fileno()
        done: Future[bool] = loop.create_future()  # False if it was interrupted
        raised: list[BaseException] = []
        is_registered = True
        has_error = _errors_that_end_calls(loop, fd)

        def unregister() -> None:
            nonlocal is_registered
            if is_registered and not loop.is_closed():
                loop.remove_reader(fd)
            is_registered = False  # and never again: the number may be another reader's from now on

        def stop(is_finished: bool = False) -> None:
            unregister()
            if not done.done():
                done.set_result(is_finished)

        def call() -> None:
            if done.done():  # our task was cancelled, and has not run since: nobody would get what is raised now
                return
            try:
                if self.closed:
                    stop()
                elif not ready():
                    stop(True)
                elif has_error is not None and has_error():
                    unregister()
                    loop.call_soon(call)
            except BaseException as error:  # the task raises it: a loop would log it, or end by it
                raised.append(error)
                stop(True)

        context = copy_context()
        context.run(tell_anyio)
        try:
            context.run(loop.add_reader, fd, call)
        except (NotImplementedError, OSError, ValueError):
            return False
        self._stop = stop
        self._loop = loop
        self._waiting += 1
        try:
            if not await done:
                raise anyio.ClosedResourceError
        finally:
            unregister()
            self._stop = self._loop = None
            self._waiting -= 1
            if self.closed and not self._waiting:
                self._release()
            if raised:  # counts before that it was closed, or cancelled: nobody else would tell
                raise raised.pop()
        return True

    async def interrupt(self) -> None:
        """Wake all who wait, with ``ClosedResourceError``, and return when they are gone."""
        while self._waiting and not self.closed:
            self._notify()
            await anyio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close now, or as soon as those who wait have been told. Idempotent, never waits."""
        if self.closed:
            return
        self.closed = True
        if not self._waiting:
            self._release()
            return
        try:
            self._notify()
        except anyio.NoEventLoopError:
            # Called from outside any task (a signal handler): a shutdown makes the socket ready, which wakes
            # them too.
            if self._loop is not None and self._stop is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._stop)
            if isinstance(self._target, socket.socket):
                with contextlib.suppress(OSError):
                    self._target.shutdown(socket.SHUT_RDWR)

    def _notify(self) -> None:
        anyio.notify_closing(self._target)
        if self._stop is not None:
            self._stop()

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # close() reports what went wrong with earlier writes: nobody to tell
            self._close()


class PollDriver(Driver):
    """Moves bytes through descriptors that do not block. A subclass says how to try.

    Args:
        reader: what is readable when something has come.
        writer: what is writable when there is room; may be the same.
        linger: how long `aclose` waits for the peer to take our last bytes and end its own direction, in
            seconds. One second is a slow round trip; a peer that is still alive has answered by then.
    """

    inline = True

    def __init__(self, reader: Waitable, writer: Waitable, *, linger: float = 1.0) -> None:
        self._reader = reader
        self._writer = writer
        self._linger = linger
        self._ready: bytes | None = None  # read, but its reader was cancelled before it had it
        self._queue: deque[memoryview] = deque()  # taken, but not accepted by the kernel yet
        self._ended = False
        self._closing = False

    @abstractmethod
    def _recv_into(self, buffer: memoryview) -> int:
        """Read what there is; 0 at the end. Raises ``BlockingIOError`` for nothing yet, ``OSError`` when
        broken."""

    @abstractmethod
    def _try_send(self, data: bytes | bytearray | memoryview) -> int:
        """Write what there is room for. Raises as `_recv_into` does."""

    @abstractmethod
    def _shutdown(self) -> None:
        """End our direction. Raises ``OSError`` when broken."""

    def _reset(self) -> None:
        """Before an abort closes: let the peer see a reset, where that exists."""

    # --- reading --------------------------------------------------------------------------------------------

    async def read(self) -> bytes:
        data = self._ready
        if data is None:
            self._check()
            data = self._receive()
        if data is None:
            while data is None:
                await self._wait(self._reader, anyio.wait_readable)
                data = self._receive()
            return data
        # There was no need to wait, so other tasks have had no turn since our caller's last read.
        self._ready = data
        await anyio.lowlevel.checkpoint()
        self._check()
        self._ready = None
        return data

    async def read_each(self, take: Callable[[bytes], bool]) -> None:
        if is_asyncio():
            self._check()
            data, self._ready = self._ready, None
            if data is not None and not (take(data) and data):
                return

            def ready() -> bool:
                data = self._receive()
                return data is None or (take(data) and data != b"")

            try:
                if await self._reader.each(ready):
                    return
            except anyio.ClosedResourceError:
                raise LinkLost("the link was closed here") from None
        await super().read_each(take)

    def _receive(self) -> bytes | None:
        """What the kernel has, or None for nothing yet."""
        buffer = _per_thread.view
        try:
            n = self._recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise broken(error) from error
        return bytes(buffer[:n])

    # --- writing --------------------------------------------------------------------------------------------

    async def write(self, data: bytes | bytearray) -> None:
        await anyio.lowlevel.checkpoint_if_cancelled()
        self._check_writable()
        if data:
            self._queue.append(memoryview(data))
        try:
            await self._drain()
        except LinkLost:
            self._queue.clear()
            raise
        except BaseException:
            # Cancelled in the middle: the caller's buffer is its own again, and the next write goes on from
            # here.
            self._queue = deque(memoryview(bytes(view)) for view in self._queue)
            raise
        finally:
            self.unsent = bool(self._queue)

    def write_now(self, data: bytes | bytearray) -> None:
        self._check_writable()
        if not data:
            return
        n = 0 if self._queue else self._send(data)
        if n < len(data):
            with memoryview(data) as view:
                self._queue.append(memoryview(bytes(view[n:])))
            self.unsent = True

    async def _drain(self) -> None:
        queue = self._queue
        while queue:
            view = queue[0]
            n = self._send(view)
            if n == len(view):
                queue.popleft()
                continue
            queue[0] = view[n:]
            await self._wait(self._writer, anyio.wait_writable)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        """Hand the kernel what it takes; 0 when that is nothing now."""
        try:
            n = self._try_send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise broken(error) from error
        self.accepted += n
        return n

    async def send_eof(self) -> None:
        if self._ended:
            await anyio.lowlevel.checkpoint()
            return
        await self.write(b"")
        self._end()

    def _end(self) -> None:
        try:
            self._shutdown()
        except OSError as error:
            raise broken(error) from error
        self._ended = True

    # --- the end --------------------------------------------------------------------------------------------

    def abort(self) -> None:
        if self._reader.closed:
            return
        self._queue.clear()
        self._reset()
        self._release()

    async def aclose(self) -> None:
        """Close after everything written: end our direction, then read on until the peer ends its own.

        What still arrives is thrown away; see law 3 above. After ``linger`` seconds, or when cancelled, the
        socket is closed as it is. If it had not even taken all our bytes by then, the peer sees a reset,
        never a clean end.
        """
        if self._closing or self._reader.closed:
            await anyio.lowlevel.checkpoint()
            return
        self._closing = True
        try:
            with anyio.move_on_after(self._linger), contextlib.suppress(LinkLost):
                await self._reader.interrupt()
                await self._writer.interrupt()
                await self._drain()
                if not self._ended:
                    self._end()
                await self._discard()
        finally:
            if self._queue:
                self.abort()
            self._release()

    def _release(self) -> None:
        self._reader.close()
        self._writer.close()

    async def _discard(self) -> None:
        while (data := self._receive()) != b"":
            if data is None:
                await self._wait(self._reader, anyio.wait_readable)
            else:
                await anyio.lowlevel.checkpoint()

    # --- the rest -------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._closing or self._reader.closed:
            raise LinkLost("the link was closed here")

    def _check_writable(self) -> None:
        self._check()
        if self._ended:
            raise LinkLost("our direction was ended before")

    async def _wait(self, handle: Waitable, wait_for: Callable[[Any], Awaitable[None]]) -> None:
        try:
            await handle.wait(wait_for)
        except anyio.ClosedResourceError:
            raise LinkLost("the link was closed here") from None
        except (OSError, ValueError, anyio.BrokenResourceError) as error:
            raise broken(error) from error
