"""One connection that is made again when it is lost: `Reconnect`, a layer between calls and connecting.

Inside it is a service that answers a target with a connection; outside, a service for calls. It has two halves. A call
goes to the connection that there is, or waits for one. A task makes connections, one at a time, and nobody else does:
so all who wait share one attempt, and a caller that is cancelled takes nothing from the others.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Final, Generic, TypeVar

import anyio
from anyio.abc import TaskGroup

from towline.chance import SystemRandom
from towline.clock import Clock, now
from towline.endpoint import Endpoint
from towline.errors import ClosedHere, ConnectFailed, ConnectionLost, MisuseError, ServiceClosed
from towline.events import EventLog
from towline.hooks import Hooks, StateChanged, tell
from towline.policies import Backoff, Budget, Errors, is_transient, matcher
from towline.policies.standard import retry_after
from towline.scope import is_cancelled, plain_task_group
from towline.service import Dial, Service, Wrapper, load, offered, ready_now, refuses_now, running
from towline.text import differing
from towline.units import Seconds

from ._raised import copy_of, trim

__all__ = ["CONNECTION_OVER", "ConnectionState", "Reconnect", "Reconnecting"]

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")

logger = logging.getLogger(__name__)

CONNECTION_OVER: Final[tuple[type[Exception], ...]] = (
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    anyio.EndOfStream,
    anyio.IncompleteRead,
    ConnectionError,
    EOFError,
)
"""The errors that say a connection is of no more use: Towline's `ConnectionLost` and `ServiceClosed`, anyio's, and
Python's own. To drop a good connection costs one more attempt; to keep a dead one, all the calls to come."""

LONGEST_ASKED: Final = 300.0
"""The longest pause, in seconds, that an error may ask for (``retry_after``): as long as a detached session lives."""


class ConnectionState(enum.StrEnum):
    """What a `Reconnecting` service has, or is about to have."""

    CLOSED = "closed"
    """It is not entered."""

    IDLE = "idle"
    """There is no connection, and none is on its way."""

    CONNECTING = "connecting"
    """An attempt is under way."""

    CONNECTED = "connected"
    """There is a connection."""

    WAITING = "waiting"
    """The next attempt begins when the pause before it is over."""


_LEFT: Final = "it was left"
_WANTED: Final = "a connection is wanted"

TRANSITIONS: Final[Mapping[ConnectionState, Mapping[ConnectionState, str]]] = {
    ConnectionState.CLOSED: {ConnectionState.IDLE: "it was entered"},
    ConnectionState.IDLE: {
        ConnectionState.CONNECTING: _WANTED,
        ConnectionState.WAITING: "the pause before the next attempt",
        ConnectionState.CLOSED: _LEFT,
    },
    ConnectionState.CONNECTING: {
        ConnectionState.CONNECTED: "an attempt succeeded",
        ConnectionState.IDLE: "an attempt failed",
        ConnectionState.CLOSED: _LEFT,
    },
    ConnectionState.CONNECTED: {
        ConnectionState.IDLE: "the connection is lost",
        ConnectionState.CLOSED: _LEFT,
    },
    ConnectionState.WAITING: {
        ConnectionState.CONNECTING: _WANTED,
        ConnectionState.IDLE: "nobody wants a connection",
        ConnectionState.CLOSED: _LEFT,
    },
}
"""Every step there is, with the reason that hooks and followers are told."""


@dataclass(frozen=True, slots=True)
class Reconnect(Generic[T]):
    """Layer: send calls over one connection, and make another when it is lost.

    Inside it stands what connects: a service that answers ``target`` with a connection, which is a service itself. A
    connection that can be entered (`towline.service.running`) is entered before it gets calls, and left when it is
    lost, or when this is. Outside, it is a service for calls, used in ``async with``. For the dialling side only. Put
    Retry around it to repeat calls that failed. Leaving it waits until the connection has been left, and cancels that
    if the block ends by an error; neither what connects nor entering a connection may call this service.

    A call goes out over the connection that there is. If there is none it waits for one, with all others that do: they
    share one attempt, and when one of them is cancelled the attempt goes on. How long a caller waits is up to the
    caller: put a Timeout around this.

    A connection is lost when a call over it raises what ``on`` names, or when its ``wait_closing`` returns, if it has
    such a method: to be lost is to take no further calls. From that moment they go to the next one. What was under way
    over the old one fails as that one says (but one that says it is closed fails it by a `ConnectionLost`, as this
    service is not), and nothing is repeated that may have been carried out. A call that was *not sent* (``error.sent``
    is False) has not failed yet: it waits for the next connection, as if it had just come. A call that is cancelled, or
    never ends, loses no connection: one that is of no use after that has to say so itself.

    When an attempt to connect fails, it depends on the error. One that ``transient`` names is waited out: after a pause
    comes the next attempt, and the calls go on waiting. Any other (a wrong key, say), and the last one where the
    backoff has an end, is raised by every call that waits, and until the pause after it is over by every call that
    comes; then a call is another attempt. With ``fail_fast`` that is so for each of them. Every call raises a copy of
    its own, with ``sent`` False; the original is its ``__cause__``.

    The pauses are the backoff's, or longer ones that an error asks for (``retry_after``). The backoff begins anew only
    after a connection that has proved to be good: it lasted ``healthy_after`` seconds, and has answered if it was
    called. So a target that takes connections and drops them is asked no faster than one that refuses them.

    Attributes:
        target: what to connect to, as the service inside expects it.
        backoff: the pauses, one before each attempt but the very first. The default has no end.
        on: the errors of a call that say its connection is of no more use, as `Errors`.
        transient: the errors of connecting that are waited out, as `Errors`; None for those that say they are
            retryable, for an OSError that does not say, for a timeout, and, once there has been a connection, for an
            unknown host.
        fail_fast: whether a call raises the error when an attempt fails, rather than wait for the next one.
        eager: whether to connect when this is entered, and again whenever a connection is lost, rather than when a call
            needs it. An error that is not waited out ends that, until there is a call; so does a backoff that ends.
        healthy_after: how long a good connection lasts at least, in seconds. The default is longer than it takes most
            servers that are overloaded, or start up, to drop what they have just accepted.
        budget: pays for each time that a call which was not sent goes to another connection; give the one that Retry
            has, to count both. None for no limit. Attempts to connect are never paid for.
        name: what hooks and the log call it; the default is the target, or only its type if it might hold a password.
        clock: gives the time in seconds.
        random: for jitter. The default draws from the operating system, so it is safe after a fork.
        hooks: told of every change of `Reconnecting.state`.

    Raises:
        ValueError: if ``healthy_after`` is negative or not a number.
        TypeError: if ``on`` or ``transient`` names no class of exceptions, or ``backoff`` is none.

    >>> async def connect(server: str, /):
    ...     async def connection(request: str, /) -> str:
    ...         return f"{server} has received {request}"
    ...     return connection
    >>> async def main() -> str:
    ...     async with Reconnect("the server")(connect) as call:
    ...         return await call("a request")
    >>> anyio.run(main)
    'the server has received a request'
    """

    client_only: ClassVar[bool] = True

    target: T
    backoff: Backoff = field(default_factory=Backoff.exponential, kw_only=True)
    on: Errors = field(default=CONNECTION_OVER, kw_only=True)
    transient: Errors | None = field(default=None, kw_only=True)
    fail_fast: bool = field(default=False, kw_only=True)
    eager: bool = field(default=False, kw_only=True)
    healthy_after: Seconds = field(default=5.0, kw_only=True)
    budget: Budget | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)
    clock: Clock = field(default=now, kw_only=True)
    random: Random = field(default_factory=SystemRandom, kw_only=True, compare=False, repr=False)
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not isinstance(self.backoff, Backoff):  # pyright: ignore[reportUnnecessaryIsInstance] -- 3, say
            raise TypeError(f"backoff is {self.backoff!r}, where a Backoff is expected")
        if not self.healthy_after >= 0:  # NaN is not
            raise ValueError(f"healthy_after is {self.healthy_after}, where 0 or more is expected")
        matcher(self.on)
        if self.transient is not None:
            matcher(self.transient)

    def __call__(self, inner: Service[T, Service[Q, R]], /) -> Reconnecting[Q, R]:
        return Reconnecting(inner, self)


class Reconnecting(Wrapper[Q, R]):
    """A service over a connection that is made again when it is lost. `Reconnect` makes it."""

    __slots__ = (
        "_again_at",
        "_connection",
        "_connections",
        "_delays",
        "_error",
        "_flight",
        "_has_connected",
        "_has_given_up",
        "_is_over",
        "_is_transient",
        "_last_delay",
        "_layer",
        "_log",
        "_state",
        "_tasks",
        "_wake",
        "_working",
    )

    _working: anyio.CancelScope  # these three from entering on, since they need an event loop
    _wake: anyio.Event
    _tasks: TaskGroup

    def __init__(self, inner: Service[Any, Service[Q, R]], layer: Reconnect[Any]) -> None:
        super().__init__(inner)
        self._layer = layer
        self._is_over = matcher(layer.on)
        self._is_transient = self._may_pass if layer.transient is None else matcher(layer.transient)
        self._state = ConnectionState.CLOSED
        self._log: EventLog[Any] = EventLog()  # Any: what connections tell, they know
        self._connection: _Connection[Q, R] | None = None  # the one that calls go to
        self._connections: set[_Connection[Q, R]] = set()  # that one, and those that are lost and not left yet
        self._flight: _Flight | None = None  # what calls wait for that find no connection
        self._has_connected = False
        self._forget()

    def _forget(self) -> None:
        """Begin anew, as if nothing had failed yet."""
        self._delays: Iterator[float] | None = None
        self._last_delay = 0.0
        self._error: Exception | None = None  # why the latest attempt came to nothing
        self._again_at = -math.inf  # no attempt begins before this
        self._has_given_up = False  # nor after it, until a call wants one

    # --- calls ------------------------------------------------------------------------------------------------------

    async def __call__(self, request: Q, /) -> R:
        """Send a call over the connection, once there is one.

        Raises:
            ServiceClosed: if this is not entered, or is left while the call waits.
        """
        budget = self._layer.budget
        if budget is None or not budget.counts_calls:
            return await self._send(request, budget)
        budget.enter()
        try:
            return await self._send(request, budget)
        finally:
            budget.leave()

    async def _send(self, request: Q, budget: Budget | None) -> R:
        holds = False  # a place in a budget that counts calls
        try:
            while True:
                connection = self._connection
                if connection is None:
                    await self._wait_for_connection()
                    continue  # it may be lost already
                connection.was_called = True
                try:
                    response = await connection.service(request)
                except Exception as error:
                    if not self._is_over(error):
                        connection.has_answered |= _is_answer(error)
                        raise
                    self._lose(connection, error)
                    if holds and budget is not None:
                        budget.release()
                        holds = False
                    if getattr(error, "sent", None) is not False or not self._may_send_again(budget):
                        if isinstance(error, ClosedHere):
                            raise _closed_there(error) from error
                        raise
                    holds = budget is not None and budget.counts_calls
                else:
                    connection.has_answered = True
                    return response
        finally:
            if holds and budget is not None:
                budget.release()

    def _may_send_again(self, budget: Budget | None) -> bool:
        """Whether a call that was not sent waits for another connection. The budget is asked last."""
        if self._state is ConnectionState.CLOSED or self._has_given_up or self._refusal() is not None:
            return False
        return budget is None or budget.withdraw()

    async def _wait_for_connection(self) -> None:
        if self._state is ConnectionState.CLOSED:
            raise _closed()
        refusal = self._refusal()
        if refusal is not None:
            raise _for_one(refusal)
        flight = self._flight
        if flight is None:
            flight = self._flight = _Flight()
        flight.callers += 1
        self._wake.set()
        try:
            await flight.has_landed.wait()
        finally:
            flight.callers -= 1
        if flight.error is not None:
            raise _for_one(flight.error)
        if flight.is_closed:
            raise _closed()
        if self._connection is None and self._has_given_up and self._error is not None:
            raise _for_one(self._error)  # it came, and was lost before this call got to it, once too often

    def _refusal(self) -> Exception | None:
        """What a call that finds no connection is told at once; None if it waits."""
        return self._error if (self._has_given_up or self._layer.fail_fast) and self._is_pausing() else None

    # --- hints ------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ConnectionState:
        """What there is now."""
        return self._state

    def events(self) -> AsyncIterator[Any]:
        """What happens, as an async iterator, for a log or a screen: each change of `state` (a `StateChanged`) and, in
        between, what the connections tell (those that have a method ``events``, as a `Session` has). It begins with the
        last that are still known, and ends when this is left. A follower that is too slow is told how many it
        `Missed`.
        """
        return self._log.follow()

    def ready_now(self) -> bool:
        """Whether the connection is ready. A call that would be the first to want one is, too: it makes it."""
        if self._connection is not None:
            return ready_now(self._connection.service)
        return self._state in (ConnectionState.IDLE, ConnectionState.CLOSED) and not self._is_pausing()

    def refuses_now(self) -> bool:
        """Whether the connection refuses, or there is none and a call is told so at once."""
        if self._connection is not None:
            return refuses_now(self._connection.service)
        return self._refusal() is not None

    async def ready(self) -> None:
        """Wait until there is a connection that is ready, as far as it says so, or a call would be refused."""
        if self._connection is None:
            with suppress(Exception):  # a call will be told
                await self._wait_for_connection()
        if self._connection is not None:
            is_ready = offered(self._connection.service, "ready")
            if is_ready is not None:
                await is_ready()

    def load(self) -> float:
        """The load of the connection, or how many calls wait for one."""
        if self._connection is not None:
            return load(self._connection.service)
        return 0 if self._flight is None else self._flight.callers

    def _is_pausing(self) -> bool:
        return self._again_at > -math.inf and self._layer.clock() < self._again_at

    # --- connecting -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        with self._working:
            while self._state is not ConnectionState.CLOSED:
                if not self._is_wanted():
                    if self._connection is None:
                        self._change(ConnectionState.IDLE)
                    self._wake = anyio.Event()
                    await self._wake.wait()
                elif self._is_pausing():
                    self._change(ConnectionState.WAITING)
                    await anyio.sleep(self._left())
                else:
                    self._change(ConnectionState.CONNECTING)
                    await self._connect()

    def _is_wanted(self) -> bool:
        if self._connection is not None:
            return False
        return (self._flight is not None and self._flight.callers > 0) or (self._layer.eager and not self._has_given_up)

    async def _connect(self) -> None:
        try:
            service: Service[Q, R] = await self.inner(self._layer.target)
            if not callable(service):
                raise MisuseError(f"{self.inner!r} gave {service!r}, where a connection is a service")
        except Exception as error:
            trim(error, __file__)
            self._failed(error)
            return
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._failed(_cancelled_elsewhere(error))
            return
        # Nothing is awaited from here to the start of the task, which leaves the connection whatever comes.
        connection = _Connection(service)
        self._connections.add(connection)
        if self._state is ConnectionState.CLOSED:
            connection.holding.cancel()
        self._tasks.start_soon(self._hold, connection)
        await connection.is_settled.wait()

    async def _hold(self, connection: _Connection[Q, R]) -> None:
        """Keep a connection entered: in a task of its own, since the next one need not wait until this one is left."""
        try:
            with connection.holding:
                async with running(connection.service):
                    self._take(connection)
                    events = offered(connection.service, "events")
                    if events is not None:
                        self._tasks.start_soon(self._follow, connection, events())
                    with connection.lasting:
                        await (offered(connection.service, "wait_closing") or anyio.sleep_forever)()
                    self._lose(connection, None)
        except Exception as error:
            self._broke(connection, error)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._broke(connection, _cancelled_elsewhere(error))
        finally:
            self._connections.discard(connection)
            connection.is_settled.set()
            connection.telling.cancel()

    async def _follow(self, connection: _Connection[Q, R], events: AsyncIterator[Any]) -> None:
        """Pass on what a connection tells, until it is left. That it fails to tell is no loss of the connection."""
        try:
            with connection.telling:
                async for event in events:
                    self._log.add(event)
        except Exception as error:
            logger.warning(
                "%s: the connection tells no more of itself: %s",
                self._name,
                _text(error),
                exc_info=error,
                extra=self._log_fields("reconnect.events_failed", error),
            )

    def _take(self, connection: _Connection[Q, R]) -> None:
        """A connection is entered."""
        connection.is_settled.set()
        if self._state is ConnectionState.CLOSED:  # meanwhile
            connection.lasting.cancel()
            return
        connection.began = self._layer.clock()
        self._connection = connection
        self._has_connected = True
        self._error = None
        self._change(ConnectionState.CONNECTED)
        self._land(None)

    def _broke(self, connection: _Connection[Q, R], error: Exception) -> None:
        """A connection has failed by itself: when it was entered, later, or when it was left."""
        if connection.is_settled.is_set():
            logger.warning(
                "%s: the connection failed: %r",
                self._name,
                error,
                exc_info=error,
                extra=self._log_fields("reconnect.connection_failed", error),
            )
            self._lose(connection, error)
        else:
            self._failed(error)
        error.__traceback__ = None  # which holds the connection

    def _land(self, error: Exception | None, *, is_closed: bool = False) -> None:
        flight, self._flight = self._flight, None
        if flight is not None:
            flight.error, flight.is_closed = error, is_closed
            flight.has_landed.set()

    def _log_fields(self, event: str, error: Exception) -> dict[str, object]:
        return {"event": event, "target": self._name, "reason": _text(error)}

    # --- failures ---------------------------------------------------------------------------------------------------

    def _may_pass(self, error: Exception) -> bool:
        # Where names do not resolve there is often no network. On a first attempt it is more often a wrong name.
        if self._has_connected and isinstance(error, ConnectFailed):
            return True
        return is_transient(error) or isinstance(error, TimeoutError)  # of a Timeout around connecting, say

    def _failed(self, error: Exception) -> None:
        """An attempt has failed."""
        if self._state is ConnectionState.CLOSED:
            return
        if isinstance(error, ClosedHere):
            error = _closed_there(error)
        self._pause(error)
        self._error = error
        try:
            self._has_given_up |= not self._is_transient(error)
        except Exception:
            logger.exception(
                "%s: `transient` raised, which counts as no",
                self._name,
                extra=self._log_fields("reconnect.transient_raised", error),
            )
            self._has_given_up = True
        given_up = self._has_given_up
        logger.log(
            logging.WARNING if given_up else logging.INFO,
            "%s: connecting failed, pause %.3g s: %s",
            self._name,
            self._left(),
            _text(error),
            exc_info=error if given_up else None,
            extra={
                **self._log_fields("reconnect.gave_up" if given_up else "reconnect.attempt_failed", error),
                "pause": self._left(),
            },
        )
        self._change(ConnectionState.IDLE, error)
        if given_up or self._layer.fail_fast:
            self._land(error)

    def _lose(self, connection: _Connection[Q, R], error: Exception | None) -> None:
        """A connection is lost: from now on it gets no calls."""
        connection.lasting.cancel()
        if self._connection is not connection:
            return
        self._connection = None
        if isinstance(error, ClosedHere):
            error = _closed_there(error)
        elif error is not None:
            error = copy_of(error)  # which has no traceback: that would hold whoever made the call
        error = error or ConnectionLost("the connection was closed")
        lasted = self._layer.clock() - connection.began
        if lasted >= self._layer.healthy_after and (connection.has_answered or not connection.was_called):
            self._forget()
            self._pause(error)
            self._has_given_up = False
        else:
            self._pause(error)
            self._error = error
        logger.info(
            "%s: lost after %.3g s, pause %.3g s: %s",
            self._name,
            lasted,
            self._left(),
            _text(error),
            extra={**self._log_fields("reconnect.lost", error), "lasted": lasted, "pause": self._left()},
        )
        self._change(ConnectionState.IDLE, error)
        self._wake.set()

    def _pause(self, error: Exception) -> None:
        """Find out how long it is to the next attempt, and whether that is only made for a call."""
        if self._delays is None:
            self._delays = self._layer.backoff.delays(self._layer.random)
        delay = next(self._delays, None)
        self._has_given_up = delay is None
        if delay is None:
            self._delays = None
        else:
            self._last_delay = delay
        asked = 0.0
        with suppress(Exception):  # it is computed, and that fails
            asked = min(retry_after(error) or 0.0, LONGEST_ASKED)
        self._again_at = self._layer.clock() + max(self._last_delay, asked)

    def _left(self) -> float:
        return max(0.0, self._again_at - self._layer.clock())

    @property
    def _name(self) -> str:
        return self._layer.name or _shown(self._layer.target)

    def _change(self, state: ConnectionState, error: Exception | None = None) -> None:
        old, self._state = self._state, state
        if old is state:
            return
        reason = TRANSITIONS[old][state]
        event = StateChanged(self._name, old, state, reason if error is None else f"{reason}: {_text(error)}")
        self._log.add(event, is_last=state is ConnectionState.CLOSED)
        if self._layer.hooks is not None:
            tell(self._layer.hooks.on_state_change, event)

    # --- open and closed --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        async with plain_task_group() as tasks:
            self._forget()
            self._has_connected = False
            self._working = anyio.CancelScope()
            self._wake = anyio.Event()
            self._tasks = tasks
            self._log = EventLog()
            self._change(ConnectionState.IDLE)
            tasks.start_soon(self._work)
            try:
                yield
            finally:
                self._shut()

    def _shut(self) -> None:
        if self._state is ConnectionState.CLOSED:
            return
        self._change(ConnectionState.CLOSED)
        self._working.cancel()
        current, self._connection = self._connection, None
        if current is not None:
            current.lasting.cancel()  # and is left in peace
        for each in self._connections:
            if each is not current:
                each.holding.cancel()  # it had its time
        self._land(None, is_closed=True)
        self._forget()

    def __repr__(self) -> str:
        return f"<Reconnecting {self._state} to {self._name}>"


class _Connection(Generic[Q, R]):
    """What is known of one connection."""

    __slots__ = ("began", "has_answered", "holding", "is_settled", "lasting", "service", "telling", "was_called")

    def __init__(self, service: Service[Q, R]) -> None:
        self.service = service
        self.began = 0.0
        self.was_called = False
        self.has_answered = False
        self.is_settled = anyio.Event()  # it was entered, or will not be
        self.lasting = anyio.CancelScope()  # until it is lost
        self.telling = anyio.CancelScope()  # its events are followed
        self.holding = anyio.CancelScope()  # until it is left


class _Flight:
    """What all calls wait for that find no connection. It lands once: with a connection, with an error, or closed."""

    __slots__ = ("callers", "error", "has_landed", "is_closed")

    def __init__(self) -> None:
        self.callers = 0
        self.has_landed = anyio.Event()
        self.error: Exception | None = None
        self.is_closed = False


def _for_one(error: Exception) -> Exception:
    """The error for one of the calls that waited for an attempt."""
    one = copy_of(error)
    if one is None:
        one = ConnectFailed(f"connecting failed: {_text(error)}")
        one.retryable = is_transient(error)
    one.__cause__ = error
    with suppress(Exception):  # it does not like to be written on
        one.sent = False  # type: ignore[attr-defined]  # of this call, whatever the original says of another
    return one


def _closed_there(error: Exception) -> ConnectionLost:
    """A connection, or what connects, says that it is closed. That must not be taken for this service's own end."""
    lost = ConnectionLost(f"the connection is closed: {_text(error)}")
    lost.sent = getattr(error, "sent", None)
    return lost


def _cancelled_elsewhere(error: BaseException) -> ConnectFailed:
    """For a native cancellation of asyncio's that nobody here has asked for, such as that of a future within."""
    failed = ConnectFailed("it was cancelled by itself")
    failed.retryable = False  # it is a mistake, and its cause says where
    failed.__cause__ = error.with_traceback(None)
    return failed


def _shown(target: object) -> str:
    """A target for a log: only its type, if it might hold a password, as a data source name does."""
    if isinstance(target, Dial):
        return str(target.endpoint)
    text = str(target) if isinstance(target, (str, int, Endpoint)) else "@"
    return type(target).__name__ if any(sign in text for sign in "@=?") else text


def _is_answer(error: Exception) -> bool:
    """Whether an error shows that the other end lives: not one that was made on this side."""
    return getattr(error, "sent", None) is not False and not isinstance(error, TimeoutError)


def _text(error: Exception) -> str:
    try:
        return repr(error)
    except Exception:
        return type(error).__name__


def _closed() -> ServiceClosed:
    return ServiceClosed("this Reconnect is closed: it takes calls within its 'async with' block")
