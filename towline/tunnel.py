"""A tunnel: any program's TCP or Unix connections, carried by sessions that survive the link between two machines.

    program ──tcp──► forward ══one session per connection, over a link that may be cut══► listen ──tcp──► server program

What a program does with its connection is carried through, both ways (D31):

- The end of a direction (``shutdown(SHUT_WR)``) is the session's end of that direction; the other one goes on.
- A reset is an abort of the session, and an aborted or lost session is a reset. It never ends a connection *cleanly*: a
  program that sees the end of a stream may believe that it has everything. Unix sockets have no reset, so there the
  program sees the end after all; the log says so.
- Back-pressure: whoever does not read makes the other end's program wait, through bounded buffers: one read here, the
  session's replay buffer and window there.

    async with listen(stack, "tcp://0.0.0.0:7000", to="tcp://127.0.0.1:6379"): ...       # on one machine
    async with forward(stack, "tcp://127.0.0.1:6380", via="tcp://there:7000"): ...       # on the other

Nothing here knows the protocol: this is an application of sessions, like any other. A program that ended its own
direction, and then goes away, is noticed when the next byte is written to it, as by any relay.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Final

import anyio

from towline.endpoint import Endpoint
from towline.errors import EndpointError, LinkLost, LossReason, SessionLost, StackError, TowlineError
from towline.layers.resume import (
    AbortCode,
    ClientSession,
    Closed,
    Detached,
    Lost,
    Resume,
    Resumed,
    ServerSession,
    Session,
)
from towline.link import Link
from towline.server import Server
from towline.service import Dial
from towline.stack import OpenStack, Stack
from towline.stage import Driver
from towline.transport import Listener, Transport
from towline.transports import Fd, Tcp, Unix

__all__ = ["Entrance", "Exit", "Totals", "check", "forward", "listen"]

logger = logging.getLogger(__name__)

TAKEN_AT_ONCE: Final = 16
"""Messages that are taken from a session before they are written: 4 MiB at most, since a read here is 256 KiB."""

MAX_CONNECTIONS: Final = 1_000
"""Local connections at once: as many as a server takes sessions of one client by default."""

GOODBYE_TIMEOUT: Final = 1.0
"""How long aborted sessions may take to tell the other end, when a tunnel ends."""

_LOCAL: Final[tuple[Transport, ...]] = (Tcp(), Unix(), Fd())


@dataclass(slots=True)
class Totals:
    """What the sessions of one end of a tunnel have done in all, those that are over included. None of it ever sinks.

    Attributes:
        sessions: how many there were.
        cuts: how often they lost a link.
        resumes: how often they went on over a new one.
        replayed: messages that were sent again.
        sent: bytes that went out, each counted once.
        received: bytes that arrived.
    """

    sessions: int = 0
    cuts: int = 0
    resumes: int = 0
    replayed: int = 0
    sent: int = 0
    received: int = 0

    def add(self, session: Session) -> None:
        """Count a session as it stands."""
        statistics = session.statistics
        self.sessions += 1
        self.cuts += statistics.cuts
        self.resumes += statistics.resumes
        self.replayed += statistics.replayed
        self.sent += session.sent_bytes
        self.received += session.received_bytes


class _End:
    """What both ends of a tunnel show of themselves.

    Attributes:
        endpoint: what is really bound.
        is_draining: nothing new is accepted any more.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.is_draining = False
        self._carried: dict[Session, None] = {}  # in the order in which they began
        self._over = Totals()

    @property
    def carried(self) -> Sequence[Session]:
        """The sessions that carry a connection here, attached or not, oldest first."""
        return [*self._carried]

    @property
    def totals(self) -> Totals:
        """What all sessions have done that carry a connection here, or have carried one."""
        totals = copy.copy(self._over)
        for session in self._carried:
            totals.add(session)
        return totals

    @contextmanager
    def _carrying(self, session: Session) -> Generator[None]:
        self._carried[session] = None
        try:
            yield
        finally:
            del self._carried[session]  # in one step with the next, so that the totals never sink
            self._over.add(session)


class _Relay:
    """One local connection and its session, until both are over.

    Args:
        session: the session.
        driver: the local connection.
        name: what the log calls it.
        retry_for: how long the session may be detached, in seconds; None for as long as its own rules say.
    """

    def __init__(self, session: Session, driver: Driver, name: str, *, retry_for: float | None = None) -> None:
        self.session = session
        self.driver = driver
        self.name = name
        self._retry_for = retry_for
        self._error: Exception | None = None
        self._fields = {"session": session.short_id, "connection": name}

    async def run(self) -> None:
        """Carry both directions. Raises nothing but cancellation; what went wrong is logged and carried on."""
        try:
            async with anyio.create_task_group() as tasks:
                stop = tasks.cancel_scope.cancel
                if self._retry_for is not None:
                    tasks.start_soon(self._guarded, self._give_up, stop)
                tasks.start_soon(self._guarded, self._both, stop)
            if self._error is None:
                await self.driver.aclose()
        finally:
            # Whatever happened: nothing is left open, and nothing ends cleanly that did not end so above.
            self.session.abort()
            self.driver.abort()

    async def _both(self) -> None:
        async with anyio.create_task_group() as tasks:
            stop = tasks.cancel_scope.cancel
            tasks.start_soon(self._guarded, self._outward, stop, False)
            tasks.start_soon(self._guarded, self._inward, stop, False)
        if self._error is None:
            await self.session.aclose()

    async def _guarded(
        self, part: Callable[[], Awaitable[None]], stop: Callable[[], None], stop_after: bool = True
    ) -> None:
        """Run a part; its error ends the other parts, and no ExceptionGroup leaves here."""
        try:
            await part()
        except Exception as error:
            self._failed(error)
            stop()
        else:
            if stop_after:
                stop()

    async def _outward(self) -> None:
        """From the program into the session."""
        session, driver = self.session, self.driver
        limit = session.max_message
        while data := await driver.read():
            if len(data) <= limit:
                await session.send(data)
            else:
                for start in range(0, len(data), limit):
                    await session.send(data[start : start + limit])
        await session.send_eof()

    async def _inward(self) -> None:
        """From the session to the program."""
        session, driver = self.session, self.driver
        while True:
            try:
                messages = await session.receive_many(TAKEN_AT_ONCE)
            except anyio.EndOfStream:
                break
            await driver.write(messages[0] if len(messages) == 1 else b"".join(messages))
        await driver.send_eof()

    async def _give_up(self) -> None:
        """Raise when the session was detached for too long."""
        over = (Resumed, Lost, Closed)
        events = self.session.events()
        async for event in events:
            if not isinstance(event, Detached):
                continue
            with anyio.move_on_after(self._retry_for) as patience:
                async for later in events:
                    if isinstance(later, over):
                        break
            if patience.cancelled_caught:
                raise _GaveUp(f"no way back was found within {self._retry_for:g} s: {event.reason}")
        await anyio.sleep_forever()  # it is over, and the others say how

    def _failed(self, error: Exception) -> None:
        if self._error is not None:
            return
        self._error = error
        fields = {**self._fields, "reason": str(error)}
        match error:
            case LinkLost():  # the local connection's: a session has its own error
                logger.info(
                    "%s: the program's connection is gone, so its session is aborted: %s",
                    self.name,
                    error,
                    extra={"event": "connection.gone", **fields},
                )
            case SessionLost(reason=LossReason.UNREAD, unacked=()):  # as after a ping: nothing was under way
                logger.info("%s: the other end has left", self.name, extra={"event": "connection.left", **fields})
            case SessionLost() | TowlineError() | _GaveUp():
                logger.warning(
                    "%s: %s: %s", self.name, _how(self.driver), error, extra={"event": "connection.lost", **fields}
                )
            case anyio.ClosedResourceError():
                logger.info("%s: cut off", self.name, extra={"event": "connection.cut_off", **fields})
            case _:
                logger.error(
                    "%s: failed", self.name, exc_info=error, extra={"event": "connection.failed", **self._fields}
                )


class _GaveUp(Exception):
    """The session was detached for longer than its user wants to wait."""


def _how(driver: Driver) -> str:
    """What the program sees of a lost session."""
    if driver.description.startswith("a TCP"):
        return "the program's connection is reset"
    return f"{driver.description} has no reset, so the program sees the end of its stream"


# --- where sessions come out ---------------------------------------------------------------------------------------


class Exit(_End):
    """The far end of a tunnel: each session becomes one connection to the target. From `listen`.

    Attributes:
        endpoint: what is really bound: forward to this.
        to: the target.
    """

    def __init__(self, to: Endpoint, transport: Transport) -> None:
        super().__init__(to)  # until bound
        self.to = to
        self._transport = transport
        self._server: Server | None = None

    def __repr__(self) -> str:
        return f"<Exit {self.endpoint} to {self.to} sessions={len(self.sessions)}>"

    def bound(self, server: Server) -> None:
        self._server = server
        self.endpoint = server.endpoint

    @property
    def sessions(self) -> Sequence[ServerSession]:
        """The sessions that live here, attached or not."""
        return self._server.sessions if self._server is not None else []

    async def handle(self, session: Session) -> None:
        """Serve one session: the handler of the stack."""
        with self._carrying(session):  # also while the target has not answered yet
            await self._serve(session)

    async def _serve(self, session: Session) -> None:
        try:
            link = await self._transport(Dial(self.to))
        except (TowlineError, OSError) as error:
            logger.warning(
                "a session is aborted, since its target cannot be reached: %s",
                error,
                extra={
                    "event": "target.unreachable",
                    "session": session.short_id,
                    "endpoint": str(self.to),
                    "reason": str(error),
                },
            )
            session.abort(AbortCode.INTERNAL)
            return
        logger.info(
            "a session is connected to %s",
            self.to,
            extra={"event": "target.connected", "session": session.short_id, "endpoint": str(self.to)},
        )
        await _Relay(session, link.driver, f"session to {self.to}").run()

    def revoke(self, public_keys: Collection[bytes]) -> int:
        """End the sessions of clients whose keys are no longer accepted.

        Returns:
            How many there were.
        """
        count = 0
        for session in self.sessions:
            identity = session.peer_identity
            if identity is not None and identity.public_key in public_keys:
                logger.warning(
                    "the session of %r is ended: its key is no longer accepted",
                    identity,
                    extra={"event": "session.revoked", "session": session.short_id, "peer": repr(identity)},
                )
                session.revoke()
                count += 1
        return count

    async def drain(self, timeout: float = 30.0) -> int:
        """Accept nothing more, let connections finish for ``timeout`` seconds, and cut off the rest.

        Returns:
            How many were cut off.
        """
        self.is_draining = True
        return 0 if self._server is None else await self._server.drain(timeout)


@asynccontextmanager
async def listen(
    stack: Stack,
    endpoint: str | Endpoint,
    to: str | Endpoint,
    *,
    transports: Sequence[Transport] = _LOCAL,
) -> AsyncGenerator[Exit]:
    """Listen with a stack, and connect every session to a target. Leaving the block ends everything at once.

    A session whose target cannot be reached is aborted, which resets the program's connection at the other end. The
    target is connected to as soon as a session begins, since in many protocols the server speaks first.

    Args:
        stack: what both ends agreed on, with a `Resume`.
        endpoint: where to listen.
        to: the target: ``tcp://`` or ``unix://``.
        transports: what connects to it.

    Raises:
        StackError: if the stack gives no sessions.
        EndpointError: if an endpoint cannot be read, or there is no transport for it.
        ConnectFailed: if ``endpoint`` cannot be bound.
    """
    _check_resume(stack)
    target = _dialled(to)
    exit_ = Exit(target, _transport(transports, target))
    async with stack.serve(endpoint, exit_.handle) as server:
        exit_.bound(server)
        yield exit_


# --- where programs connect ----------------------------------------------------------------------------------------


class _Connection:
    """A program's connection at the entrance, with its session once there is one."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.scope = anyio.CancelScope()
        self.session: ClientSession | None = None


class Entrance(_End):
    """The near end of a tunnel: each connection that a program makes here becomes one session. From `forward`.

    Attributes:
        endpoint: what is really bound: let programs connect to this.
        via: the far end.
    """

    def __init__(
        self,
        opened: OpenStack,
        listener: Listener,
        via: Endpoint,
        *,
        max_connections: int,
        retry_for: float | None,
    ) -> None:
        super().__init__(listener.endpoint)
        self.via = via
        self._opened = opened
        self._listener = listener
        self._max_connections = max_connections
        self._retry_for = retry_for
        self._connections: set[_Connection] = set()
        self._emptied: anyio.Event | None = None
        self._is_full = False

    def __repr__(self) -> str:
        return f"<Entrance {self.endpoint} via {self.via} connections={len(self._connections)}>"

    @property
    def sessions(self) -> Sequence[ClientSession]:
        """The sessions of the connections that live here."""
        return [each.session for each in self._connections if each.session is not None]

    @property
    def connections(self) -> int:
        """How many connections of programs live here, those without a session yet included."""
        return len(self._connections)

    async def run(self) -> None:
        """Accept until cancelled or drained."""
        await self._listener.serve(self._accepted)

    def _accepted(self, link: Link) -> None:
        if len(self._connections) >= self._max_connections:
            if not self._is_full:
                logger.warning(
                    "%s: more than %d connections: those above are reset",
                    self.endpoint,
                    len(self._connections),
                    extra={"event": "entrance.full", "endpoint": str(self.endpoint), "limit": self._max_connections},
                )
            self._is_full = True
            link.driver.abort()
            return
        self._is_full = False
        connection = _Connection(link.driver)
        self._connections.add(connection)
        self._opened.scope.task_group.start_soon(self._serve, connection)

    async def _serve(self, connection: _Connection) -> None:
        try:
            with connection.scope:
                await self._carry(connection)
        finally:
            connection.driver.abort()
            self._connections.remove(connection)
            if not self._connections and self._emptied is not None:
                self._emptied.set()

    async def _carry(self, connection: _Connection) -> None:
        driver = connection.driver
        fields = {"endpoint": str(self.endpoint), "via": str(self.via)}
        try:
            connection.session = session = await self._opened.connect(self.via)
        except (TowlineError, OSError) as error:
            logger.warning(
                "%s: no session for a connection: %s: %s",
                self.endpoint,
                _how(driver),
                error,
                extra={"event": "connection.refused", "reason": str(error), **fields},
            )
            return
        except Exception:
            logger.exception(
                "%s: no session for a connection", self.endpoint, extra={"event": "connection.failed", **fields}
            )
            return
        logger.info(
            "%s: a connection has its session via %s",
            self.endpoint,
            self.via,
            extra={"event": "connection.carried", "session": session.short_id, **fields},
        )
        with self._carrying(session):
            await _Relay(session, driver, str(self.endpoint), retry_for=self._retry_for).run()

    def reconnect(self) -> int:
        """Get a new link for every session now; what is attached is served by the old one until then.

        Returns:
            How many sessions there are.
        """
        sessions = self.sessions
        for session in sessions:
            session.reconnect()
        return len(sessions)

    async def drain(self, timeout: float = 30.0) -> int:
        """Accept nothing more, let connections finish for ``timeout`` seconds, and cut off the rest.

        Returns:
            How many were cut off.
        """
        self.is_draining = True
        await self._listener.aclose()
        with anyio.move_on_after(timeout):
            await self._wait_emptied()
        return await self.aclose()

    async def aclose(self) -> int:
        """Accept nothing more, cut off every connection now, and tell the other end. Idempotent.

        Returns:
            How many were cut off.
        """
        await self._listener.aclose()
        cut_off, sessions = len(self._connections), self.sessions
        for connection in self._connections:
            connection.scope.cancel()
        if cut_off:
            logger.warning(
                "%s: connections that were cut off: %d",
                self.endpoint,
                cut_off,
                extra={"event": "entrance.cut_off", "endpoint": str(self.endpoint), "count": cut_off},
            )
            with anyio.move_on_after(GOODBYE_TIMEOUT):
                await self._wait_emptied()
                for session in sessions:
                    await session.wait_closed()
        return cut_off

    async def _wait_emptied(self) -> None:
        while self._connections:
            self._emptied = anyio.Event()
            await self._emptied.wait()


@asynccontextmanager
async def forward(
    stack: Stack,
    local: str | Endpoint,
    via: str | Endpoint,
    *,
    transports: Sequence[Transport] = _LOCAL,
    max_connections: int = MAX_CONNECTIONS,
    retry_for: float | None = None,
) -> AsyncGenerator[Entrance]:
    """Listen for programs, and carry each of their connections by a session of its own. Leaving the block cuts off all.

    A connection whose session cannot be opened is reset, with one line in the log; the next one tries anew.

    Args:
        stack: what both ends agreed on, with a `Resume`.
        local: where programs connect: ``tcp://`` or ``unix://``.
        via: where the far end listens.
        transports: what listens on ``local``.
        max_connections: connections at once, 1 000; those above are reset.
        retry_for: how long a session may look for its way back before its connection is reset, in seconds. None: as
            long as the far end keeps it, and 15 s.

    Raises:
        StackError: if the stack gives no sessions.
        EndpointError: if an endpoint cannot be read, or there is no transport for it.
        ConnectFailed: if ``local`` cannot be bound.
    """
    _check_resume(stack)
    there = _dialled(via)
    stack.transport(there)
    here = Endpoint.parse(local)
    listener = await _transport(transports, here).listen(here)
    try:
        async with stack.open() as opened:
            entrance = Entrance(opened, listener, there, max_connections=max_connections, retry_for=retry_for)
            opened.scope.task_group.start_soon(entrance.run)
            try:
                yield entrance
            finally:
                with anyio.CancelScope(shield=True):
                    await entrance.aclose()
    finally:
        with anyio.CancelScope(shield=True):
            await listener.aclose()


# --- the way, without a session ------------------------------------------------------------------------------------


async def check(stack: Stack, via: str | Endpoint) -> None:
    """Go through every layer to the far end, be let in, and leave, in one attempt. No target is connected to.

    Args:
        stack: what both ends agreed on, with a `Resume`.
        via: where the far end listens.

    Raises:
        HandshakeFailed, ConnectFailed: as `Stack.connect`; whether it may be otherwise later, its ``retryable`` says.
    """
    _check_resume(stack)
    async with stack.open() as opened:
        await opened.probe(_dialled(via))


def _check_resume(stack: Stack) -> None:
    if not any(isinstance(layer, Resume) for layer in stack):
        raise StackError("a tunnel carries sessions, and this stack has none: put Resume into it")


def _dialled(endpoint: str | Endpoint) -> Endpoint:
    parsed = Endpoint.parse(endpoint)
    if parsed.scheme == "fd" or (parsed.scheme == "tcp" and (parsed.host == "*" or parsed.port == 0)):
        raise EndpointError(f"{parsed} can be listened on, but not connected to")
    return parsed


def _transport(transports: Sequence[Transport], endpoint: Endpoint) -> Transport:
    for transport in transports:
        if endpoint.scheme in transport.schemes:
            return transport
    known = ", ".join(f"{scheme}://" for each in transports for scheme in each.schemes)
    raise EndpointError(f"a program's connections cannot be on {endpoint}: they are on one of {known}")
