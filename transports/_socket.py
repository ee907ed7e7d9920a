"""Driver (b) over a socket of our own, and the listener that accepts such sockets (D13)."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.link import Link
from towline.service import Side
from towline.transport import Listener

from ._poll import PollDriver, Waitable, reason

__all__ = ["RESET", "SocketDriver", "SocketListener", "connect_socket"]

logger = logging.getLogger(__name__)

ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting when the process or the system is out of descriptors or memory."""

RESET: Final = struct.pack("HH" if sys.platform == "win32" else "ii", 1, 0)
"""``struct linger``, on, 0 seconds: closing sends a reset."""

_GONE_NAMES: Final = (
    "ECONNABORTED ECONNRESET EPROTO EPERM ENETDOWN ENETUNREACH EHOSTDOWN EHOSTUNREACH ENOPROTOOPT "
    "EOPNOTSUPP ETIMEDOUT ENONET"
)
_GONE: Final = frozenset(getattr(errno, name, -1) for name in _GONE_NAMES.split())
"""What accept() says about a connection that died in the backlog: nothing is wrong with the listener."""


class SocketDriver(PollDriver):
    """Moves bytes over a connected stream socket, which it owns from now on.

    Args:
        sock: the socket; it is made non-blocking.
        linger: how long `aclose` waits for the peer, in seconds; see `PollDriver`.
    """

    def __init__(self, sock: socket.socket, *, linger: float = 1.0) -> None:
        sock.setblocking(False)
        handle = Waitable(sock, sock.close)
        super().__init__(handle, handle, linger=linger)
        self._sock = sock
        self._is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6)

    def _recv_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def _try_send(self, data: bytes | bytearray | memoryview) -> int:
        return self._sock.send(data)

    def _shutdown(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def _reset(self) -> None:
        if self._is_tcp:
            with contextlib.suppress(OSError):
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    @property
    def description(self) -> str:
        if not self._is_tcp:
            return "a Unix socket"
        try:
            host, port = self._sock.getpeername()[:2]
        except OSError:
            return "a TCP connection that is gone"
        return f"a TCP connection with {host} port {port}"

    def guard(self, timeout: float) -> None:
        """Set ``TCP_USER_TIMEOUT``, on TCP and where the system has it (Linux). The rest of D16 is
        Heartbeat's."""
        if self._is_tcp and hasattr(socket, "TCP_USER_TIMEOUT"):
            with contextlib.suppress(OSError):
                milliseconds = max(1, round(timeout * 1000))  # 0 would mean the system's default
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)


async def connect_socket(sock: socket.socket, address: Any) -> None:
    """Connect a non-blocking socket.

    Raises:
        BlockingIOError: if the kernel can neither connect nor start to (a Unix socket whose backlog is full).
        OSError: if the connection does not come to be.
    """
    try:
        sock.connect(address)
    except (BlockingIOError, InterruptedError) as error:
        if error.errno == errno.EAGAIN and sys.platform != "win32":
            raise
        await anyio.wait_writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code)) from None


class SocketListener(Listener):
    """Accepts raw sockets and makes links of them.

    Args:
        endpoint: what is really bound.
        sockets: the listening sockets, non-blocking; it owns them from now on.
        admit: called with every new socket and its peer's address; prepares the socket and returns the link's
            ``source``, or None to refuse it.
        linger: see `SocketDriver`.
        closed: called once, after the sockets were closed.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        sockets: Sequence[socket.socket],
        admit: Callable[[socket.socket, Any], str | None],
        *,
        linger: float = 1.0,
        closed: Callable[[], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self._sockets = [(sock, Waitable(sock, sock.close)) for sock in sockets]
        self._admit = admit
        self._linger = linger
        self._closed = closed
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.endpoint}>"

    async def serve(self, accepted: Callable[[Link], None]) -> None:
        if len(self._sockets) == 1:
            await self._accept_loop(*self._sockets[0], accepted)
            return
        async with anyio.create_task_group() as tasks:
            for sock, handle in self._sockets:
                tasks.start_soon(self._accept_loop, sock, handle, accepted)

    async def _accept_loop(self, sock: socket.socket, handle: Waitable, accepted: Callable[[Link], None]) -> None:
        complained = False
        while not handle.closed:
            try:
                new, address = sock.accept()
            except (BlockingIOError, InterruptedError):
                try:
                    await handle.wait(anyio.wait_readable)
                except anyio.ClosedResourceError:
                    return
                continue
            except OSError as error:
                if error.errno in _GONE:
                    await anyio.lowlevel.checkpoint()
                    continue
                # Out of descriptors or memory, most likely. Never the end of the loop: it passes when links
                # end.
                if not complained:
                    logger.error(
                        "%s cannot accept connections for now: %s",
                        self.endpoint,
                        reason(error),
                        extra={"event": "listener.stuck", "endpoint": str(self.endpoint), "reason": reason(error)},
                    )
                    complained = True
                await anyio.sleep(ACCEPT_PAUSE)
                continue
            complained = False
            link = self._link(new, address)
            if link is not None:
                accepted(link)
            await anyio.lowlevel.checkpoint()

    def _link(self, sock: socket.socket, address: Any) -> Link | None:
        try:
            sock.setblocking(False)
            source = self._admit(sock, address)
        except OSError:  # it is gone already
            source = None
        except BaseException:
            sock.close()
            raise
        if source is None:
            sock.close()
            return None
        driver = SocketDriver(sock, linger=self._linger)
        return Link(driver, side=Side.LISTENING, endpoint=self.endpoint, source=source)

    async def aclose(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            for _, handle in self._sockets:
                handle.close()
            if self._closed is not None:
                self._closed()
        await anyio.lowlevel.checkpoint()
