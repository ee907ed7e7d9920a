"""TCP: connects by Happy Eyeballs, accepts raw sockets, and serves both with our own driver (D13).

Names are resolved anew for every dial, so a way back follows a host that moved. Keepalive probes are the
kernel's, and slow; finding a dead link in seconds is Heartbeat's work, which also sets ``TCP_USER_TIMEOUT``:
set here, without knowing what the link is for, it would kill a healthy slow reader (D16).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, ClassVar, Final, TypeAlias

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, UnknownHost
from towline.link import Link
from towline.service import Dial, Side
from towline.text import differing
from towline.transport import Listener, Transport
from towline.units import Seconds

from ._poll import reason
from ._socket import SocketDriver, SocketListener, connect_socket

__all__ = ["Address", "Resolver", "Tcp", "resolve"]

Address: TypeAlias = tuple[int, tuple[Any, ...]]
"""An address family, and an address as sockets of it take one. (``Any``: sockets take text and numbers, by
family.)"""

Resolver: TypeAlias = Callable[[str, int], Awaitable[Sequence[Address]]]
"""Turns a host and a port into addresses, best first. Raises ``socket.gaierror`` for a name that does not
resolve."""

_PORT_TRIES: Final = 10  # for a port that must be free on several addresses at once


async def resolve(host: str, port: int) -> Sequence[Address]:
    """The default resolver: the system's, asked every time.

    Raises:
        socket.gaierror: if the name does not resolve.
        UnicodeError: if it cannot be the name of a host (a part of more than 63 characters).
    """
    try:
        # A literal needs no thread, and no resolver.
        found: Sequence[Any] = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        )
    except socket.gaierror:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys((int(family), tuple(address)) for family, *_, address in found))


@dataclass(frozen=True, kw_only=True)
class Tcp(Transport):
    """Transport for ``tcp://host:port``.

    To listen, the host may be ``*`` for every interface, IPv4 and IPv6; ``0.0.0.0`` or ``[::]`` is every
    interface of that one family. A name that has several addresses is bound on all of them, with one port.

    Args:
        connect_timeout: seconds for the whole dial, name and all addresses; 10, as every layer bounds its own
            part.
        happy_eyeballs_delay: seconds after which the next address is tried beside the last one; 0.25 is what
            RFC 8305 recommends.
        nodelay: switch Nagle's algorithm off. On, since we batch ourselves and a lone message should not
            wait.
        keepalive: seconds of silence after which the kernel starts to probe, None for never. 60 keeps the
            entry in most NAT boxes alive for stacks that have no Heartbeat.
        backlog: connections that the kernel holds until they are accepted; 1024 survives all clients of a
            busy server coming back at once.
        linger: seconds that a clean close waits for the peer, as ``SocketDriver`` says.
        resolver: turns a name into addresses.

    >>> Tcp(connect_timeout=3)
    Tcp(connect_timeout=3)
    """

    schemes: ClassVar[tuple[str, ...]] = ("tcp",)

    connect_timeout: Seconds = 10.0
    happy_eyeballs_delay: Seconds = 0.25
    nodelay: bool = True
    keepalive: Seconds | None = 60.0
    backlog: int = 1024
    linger: Seconds = 1.0
    resolver: Resolver = resolve

    __repr__ = differing

    # --- dialling -------------------------------------------------------------------------------------------

    async def __call__(self, dial: Dial, /) -> Link:
        endpoint = _checked(dial.endpoint)
        if endpoint.host == "*" or endpoint.port == 0:
            raise EndpointError(f"{endpoint} can be listened on, but not connected to")
        tried: dict[str, str] = {}  # every address, and what became of it
        sock: socket.socket | None = None
        with anyio.move_on_after(self.connect_timeout):
            addresses = await self._resolve(endpoint)
            sock = await self._race(interleaved(addresses), tried)
        if sock is None:
            within = "" if tried and "no answer" not in tried.values() else f" within {self.connect_timeout:g} s"
            reasons = "; ".join(f"{address}: {why}" for address, why in tried.items())
            raise ConnectFailed(
                f"{endpoint} cannot be reached{within}: {reasons or 'its name was not resolved in time'}"
            )
        driver = SocketDriver(sock, linger=self.linger)
        return Link(driver, side=Side.DIALLING, endpoint=endpoint, source=_source(sock))

    async def _resolve(self, endpoint: Endpoint) -> Sequence[Address]:
        try:
            addresses = await self.resolver(endpoint.host, endpoint.port)
        except (socket.gaierror, UnicodeError) as error:
            failed = UnknownHost(f"{endpoint}: the host {endpoint.host!r} is not known: {reason(error)}")
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                failed.retryable = True  # no answer from the name server: that says nothing about the name
            raise failed from error
        except OSError as error:
            raise ConnectFailed(f"{endpoint}: its name cannot be resolved: {reason(error)}") from error
        if not addresses:
            raise UnknownHost(f"{endpoint}: the host {endpoint.host!r} has no address")
        return addresses

    async def _race(self, addresses: Sequence[Address], tried: dict[str, str]) -> socket.socket | None:
        """Happy Eyeballs (RFC 8305, section 5): the first socket that connects, or None. No other is left
        open."""
        won: list[socket.socket] = []

        async def attempt(address: Address, failed: anyio.Event) -> None:
            sock = await self._attempt(address, tried)
            if sock is None:
                failed.set()
            elif won:
                sock.close()
            else:
                won.append(sock)
                tasks.cancel_scope.cancel()

        try:
            if len(addresses) == 1:
                return await self._attempt(addresses[0], tried)
            async with anyio.create_task_group() as tasks:
                for address in addresses:
                    failed = anyio.Event()
                    tasks.start_soon(attempt, address, failed)
                    with anyio.move_on_after(self.happy_eyeballs_delay):
                        await failed.wait()
        except BaseException:
            for sock in won:
                sock.close()
            raise
        return won[0] if won else None

    async def _attempt(self, address: Address, tried: dict[str, str]) -> socket.socket | None:
        family, where = address
        name = f"{where[0]} port {where[1]}"
        tried[name] = "no answer"
        await anyio.lowlevel.checkpoint()
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            tried[name] = reason(error)
            return None
        try:
            sock.setblocking(False)
            self._configure(sock)
            await connect_socket(sock, where)
            if sock.getsockname() == sock.getpeername():
                # The kernel gave us, as our own port, the very one that nobody listens on, and connected it
                # to itself.
                raise ConnectionRefusedError(errno.ECONNREFUSED, "connection refused")
        except OSError as error:
            sock.close()
            tried[name] = reason(error)
            return None
        except BaseException:
            sock.close()
            raise
        return sock

    def _configure(self, sock: socket.socket) -> None:
        if self.nodelay:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.keepalive is None:
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPALIVE"):  # the second is what macOS calls it
            option = getattr(socket, name, None)
            if option is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_TCP, option, max(1, round(self.keepalive)))
                break

    # --- listening ------------------------------------------------------------------------------------------

    async def listen(self, endpoint: Endpoint) -> Listener:
        _checked(endpoint)
        if endpoint.host == "*":
            every: Sequence[Address] = [
                (socket.AF_INET, ("0.0.0.0", endpoint.port)),
                (socket.AF_INET6, ("::", endpoint.port)),
            ]
            await anyio.lowlevel.checkpoint()
            return self._listen(endpoint, every)
        with anyio.move_on_after(self.connect_timeout):
            return self._listen(endpoint, await self._resolve(endpoint))
        raise ConnectFailed(f"{endpoint}: its name was not resolved within {self.connect_timeout:g} s")

    def _listen(self, endpoint: Endpoint, addresses: Sequence[Address]) -> Listener:
        tries = _PORT_TRIES if endpoint.port == 0 else 1
        while True:
            tries -= 1
            try:
                sockets = self._bind(addresses)
            except OSError as error:
                if tries and error.errno == errno.EADDRINUSE:
                    continue  # the port that was free on the first address is not on another
                why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound: {reason(error)}"
                raise ConnectFailed(f"{endpoint} {why}") from error
            port: int = sockets[0].getsockname()[1]
            return SocketListener(endpoint.with_port(port), sockets, self._admit, linger=self.linger)

    def adopt(self, sock: socket.socket) -> Listener:
        """Listen on a socket that is bound and listens already, and own it."""
        host, port = sock.getsockname()[:2]
        return SocketListener(Endpoint("tcp", host=host, port=port), [sock], self._admit, linger=self.linger)

    def _bind(self, addresses: Sequence[Address]) -> list[socket.socket]:
        """Listen on all addresses with one port; those that this system does not have are skipped."""
        sockets: list[socket.socket] = []
        missing: OSError | None = None
        port: int | None = None
        try:
            for family, where in addresses:
                try:
                    sock = socket.socket(family, socket.SOCK_STREAM)
                except OSError as error:
                    missing = error  # no IPv6 at all
                    continue
                sockets.append(sock)
                sock.setblocking(False)
                if sys.platform == "win32":
                    # There SO_REUSEADDR would let anybody else bind the same port.
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
                else:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    sock.bind(where if port is None else (where[0], port, *where[2:]))
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:
                        raise
                    missing = error
                    sockets.remove(sock)
                    sock.close()
                    continue
                sock.listen(self.backlog)
                port = sock.getsockname()[1]
            if not sockets:
                raise missing or OSError(errno.EADDRNOTAVAIL, "no address")
        except BaseException:
            for sock in sockets:
                sock.close()
            raise
        return sockets

    def _admit(self, sock: socket.socket, address: Any) -> str:
        self._configure(sock)
        return str(address[0])


def _checked(endpoint: Endpoint) -> Endpoint:
    if endpoint.scheme != "tcp":
        raise EndpointError(f"Tcp serves tcp://host:port, not {endpoint}")
    return endpoint


def _source(sock: socket.socket) -> str:
    try:
        return str(sock.getpeername()[0])
    except OSError:  # gone already; the first read says so
        return ""


def interleaved(addresses: Sequence[Address]) -> list[Address]:
    """The addresses with their families in turn, the first one's first (RFC 8305, section 4).

    >>> [where[0] for _, where in interleaved([(10, ("a6",)), (10, ("b6",)), (2, ("a4",))])]
    ['a6', 'a4', 'b6']
    """
    families: dict[int, list[Address]] = {}
    for address in addresses:
        families.setdefault(address[0], []).append(address)
    return [address for address in chain.from_iterable(zip_longest(*families.values())) if address is not None]
