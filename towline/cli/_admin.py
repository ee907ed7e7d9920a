"""The admin socket: a Unix socket over which the same user asks how a tunnel stands, and steers it.

It speaks our own `Rpc` over frames, with the service `Admin`. There is no `Resume`: a local socket is not cut, and when
the program is restarted, so are its sessions. The version is in the name of the service, so that another one is an
answer and not a riddle. Fields may be added to what it answers: who does not know them ignores them.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import anyio

from towline.endpoint import Endpoint
from towline.errors import CallFailed, ConnectFailed, ConnectionLost, EndpointError, LinkLost, StatusCode
from towline.layers.framing import Framing
from towline.layers.resume import ClientSession
from towline.layers.rpc import Rpc, client, router, service
from towline.stack import Stack
from towline.transports import Unix

from ._failure import FAILED, GAVE_UP, REFUSED, Failure
from ._status import Snapshot, Watch

__all__ = [
    "Admin",
    "DrainRequest",
    "Orders",
    "ReconnectRequest",
    "named_errors",
    "open_admin",
    "serve_admin",
    "socket_at",
]

ANSWER_TIMEOUT: Final = 5.0
"""Seconds for an answer that takes milliseconds: whoever is asked may be no towline at all, and say nothing."""

GOODBYE_TIMEOUT: Final = 1.0
"""Seconds for the last answers, when the program ends."""

MAX_WAITING: Final = 100
"""Calls that run, and as many that wait: people and their scripts, not a fleet."""


@dataclass(frozen=True, slots=True)
class ReconnectRequest:
    """Get new links now. `session` is one session's id; empty for all sessions."""

    session: str = ""


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """Accept nothing new, let connections finish for `timeout` seconds, cut off the rest, and end."""

    timeout: float = 30.0


@service(name="towline.admin.v1")
class Admin(Protocol):
    """What the admin socket answers."""

    async def snapshot(self) -> Snapshot:
        """How the tunnel stands now."""
        ...

    def follow(self) -> AsyncIterator[Snapshot]:
        """How it stands now, and then a few times a second."""
        ...

    async def reconnect(self, request: ReconnectRequest) -> int:
        """Give sessions a new link; answers how many. NOT_FOUND if there is no such session."""
        ...

    async def drain(self, request: DrainRequest) -> int:
        """End the program; answered when all connections are over, with how many were cut off."""
        ...


class Orders:
    """Where orders from the socket meet the loop that waits for signals."""

    def __init__(self) -> None:
        self.asked = anyio.Event()
        self.timeout = 0.0
        self._done = anyio.Event()
        self._cut_off = 0

    async def drain(self, timeout: float) -> int:
        """Ask for the end, and wait for it. Who asks later waits for the same one."""
        if not self.asked.is_set():
            self.timeout = timeout
            self.asked.set()
        await self._done.wait()
        return self._cut_off

    def drained(self, cut_off: int) -> None:
        """All connections are over."""
        self._cut_off = cut_off
        self._done.set()


class _Answers:
    """The service, for one end of a tunnel."""

    def __init__(self, watch: Watch, orders: Orders) -> None:
        self._watch = watch
        self._orders = orders

    async def snapshot(self) -> Snapshot:
        return self._watch.refresh()

    def follow(self) -> AsyncIterator[Snapshot]:
        return self._watch.follow()

    async def reconnect(self, request: ReconnectRequest) -> int:
        wanted = request.session
        sessions = self._watch.find(wanted) if wanted else self._watch.tunnel.carried
        if wanted and not sessions:
            raise CallFailed(StatusCode.NOT_FOUND, f"there is no session {wanted}")
        for session in sessions:
            if isinstance(session, ClientSession):
                session.reconnect()
            else:  # only its client can dial: it does so when its link is gone
                session.drop_link(LinkLost("the operator asked for a new one"))
        return len(sessions)

    async def drain(self, request: DrainRequest) -> int:
        if not 0 <= request.timeout < 1e9:
            raise CallFailed(StatusCode.INVALID_ARGUMENT, f"a timeout of {request.timeout:g} s")
        return await self._orders.drain(request.timeout)


def _stack(unix: Unix) -> Stack:
    return Stack(Rpc(max_running=MAX_WAITING, max_waiting=MAX_WAITING), Framing(), transports=(unix,))


def socket_at(option: str, text: str) -> Endpoint:
    """The endpoint of an admin socket, from a path, or from ``unix://`` and a path.

    Raises:
        Failure: if it is another kind of endpoint.

    >>> socket_at("SOCKET", "/run/towline/admin")
    Endpoint('unix:///run/towline/admin')
    """
    if "://" not in text:
        if not text or text.endswith("/"):
            raise Failure(f"{option}: {text!r} does not name a socket file")
        return Endpoint("unix", path=os.path.abspath(text))
    try:
        endpoint = Endpoint.parse(text)
    except EndpointError as error:
        raise Failure(f"{option}: {error}") from None
    if endpoint.scheme != "unix":
        raise Failure(f"{option}: {endpoint} is not the path of a Unix socket")
    return endpoint


@asynccontextmanager
async def serve_admin(endpoint: Endpoint, watch: Watch, orders: Orders) -> AsyncGenerator[None]:
    """Answer on a socket that only this user may use, until the block is left; then answer what is still open.

    Raises:
        ConnectFailed: if another program listens on it, or it cannot be bound.
        EndpointError: if anybody may replace files in its directory.
    """
    async with _stack(Unix()).serve(endpoint, router(Admin)(_Answers(watch, orders))) as server:
        try:
            yield
        finally:
            watch.close()
            with anyio.CancelScope(shield=True):
                await server.drain(GOODBYE_TIMEOUT)


@asynccontextmanager
async def open_admin(endpoint: Endpoint) -> AsyncGenerator[Admin]:
    """Connect to an admin socket. Raises as `Stack.connect`; in commands, within `named_errors`."""
    # Whoever else could listen there would be asked in its place, and told what to do.
    async with _stack(Unix(listener_uids=None)).connect(endpoint) as call:
        yield client(Admin, call)


@contextlib.contextmanager
def named_errors(endpoint: Endpoint) -> Generator[None]:
    """Within it, what goes wrong with an admin socket is a `Failure` that says what, with its exit code."""
    try:
        yield
    except ConnectFailed as error:
        code = getattr(error.__cause__, "errno", None)
        if code in (errno.EACCES, errno.EPERM) or isinstance(error.__cause__, PermissionError):
            raise Failure(f"{endpoint} belongs to another user: {error}", REFUSED) from error
        raise Failure(f"no towline answers there: {error}", GAVE_UP) from error
    except CallFailed as error:
        if error.code is StatusCode.UNIMPLEMENTED:
            raise Failure(f"{endpoint}: the towline there speaks another version of this protocol", REFUSED) from error
        if error.code is StatusCode.DEADLINE_EXCEEDED:
            raise Failure(f"{endpoint}: no answer yet; if it drains, it still does", FAILED) from error
        if error.code is StatusCode.NOT_FOUND:
            raise Failure(error.message, FAILED) from error
        raise Failure(f"{endpoint}: {error}", FAILED) from error
    except (ConnectionLost, TimeoutError) as error:
        why = "it does not answer" if isinstance(error, TimeoutError) else str(error)
        raise Failure(
            f"{endpoint} is not the admin socket of a towline, or does not let this user in: {why}", REFUSED
        ) from error
