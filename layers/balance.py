"""One service made of many that are alike: `Balance` spreads calls over endpoints that come and go.

The choice is the power of two choices (`towline.policies.load`). This file knows which endpoints there are, which of
them could begin at once, and what is under way at each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from random import Random
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeAlias, TypeVar

import anyio
from anyio.abc import TaskGroup, TaskStatus

from towline.clock import Clock, now
from towline.errors import MisuseError, ServiceClosed, ServiceUnavailable
from towline.hooks import CallShed, Hooks, tell
from towline.policies.classify import Errors, matcher
from towline.policies.load import PeakEwma, RoundTrips, two_of
from towline.scope import plain_task_group
from towline.service import Service, running

__all__ = ["Balance", "Change", "Insert", "Remove"]

Q = TypeVar("Q")
R = TypeVar("R")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Insert(Generic[Q, R]):
    """There is an endpoint, or a new one in the place of the old.

    Attributes:
        key: what it is known by.
        service: what to call. If it can be entered (as what a layer makes can), the balance does so, and leaves it when
            it is removed.
    """

    key: Hashable
    service: Service[Q, R]


@dataclass(frozen=True, slots=True)
class Remove:
    """An endpoint is no more. It gets no new calls; those under way go on.

    Attributes:
        key: what it is known by. One that is not known is no error.
    """

    key: Hashable


Change: TypeAlias = Insert[Q, R] | Remove
"""What discovery tells a `Balance`."""


class Balance(Generic[Q, R]):
    """A service that lets one of many endpoints answer: of two taken at random, the one with the lower load.

    Only endpoints that are ready (`towline.service.ready_now`) are looked at, if there are any. If all are busy the
    call waits at one of them, and only if all refuse (`towline.service.refuses_now`: their circuit breakers are open,
    say) it is refused. Between equal loads chance decides.

    What it is given:

    * A mapping or a sequence of services (which are known by their indexes): a set that does not change. To enter the
      balance is needed only where the services own tasks, and then enters and leaves them.
    * An async iterable of `Insert` and `Remove`, such as a stream or an async generator that watches DNS. A task reads
      it, so the balance is used in ``async with`` (or within `towline.service.running`); outside of it a call raises
      `ServiceClosed`. When it ends, the endpoints stay as they are. When it raises, so they do: it is better to know of
      no changes than to fail calls that could be answered. The error is logged, and once there are no endpoints it is
      the ``__cause__`` of what a call raises.

    An endpoint that is inserted is entered, in a task of its own, before it gets calls; one that fails in this is
    logged and left out. One that is inserted under a known key takes the old one's place as soon as it is entered. One
    that is removed finishes the calls that it has, and then is left. Leaving the balance removes them all, and so waits
    for the calls at those that were entered, unless the block ends by an error or is cancelled.

    An endpoint whose call raises what ``is_dead`` names is dropped, as if it were removed, and comes back if it is
    inserted again (of a fixed set: when the balance is entered anew). If the error says that the request was not sent,
    as `ServiceClosed` does, another endpoint gets it; else, and if there is no other, the caller gets the error. What
    is only slow or fails now and then is not dropped: put a CircuitBreaker around each endpoint, which says that it is
    not ready while it is open; and Retry around the balance, so that another attempt may go elsewhere.

    Without endpoints a call waits until there is one, for as long as discovery may bring one. If it cannot, since the
    set is fixed or the stream is over, or if ``on_empty`` is ``"fail"``, it raises `ServiceUnavailable`.

    Args:
        endpoints: the endpoints, or the stream of changes.
        load: what is compared. ``"pending"``: the calls under way from here; a good measure for calls that cost much
            the same. A `PeakEwma`: also how long they take, which finds a slow endpoint sooner, and turns from it. A
            function of the endpoint's service: for what it says itself (`towline.service.load`).
        on_empty: what becomes of a call when there are no endpoints: ``"wait"`` or ``"fail"``.
        is_dead: the errors after which an endpoint gets no more calls, as `Errors`.
        random: for the choice. The default is seeded by the operating system on first use, so after any fork.
        clock: gives the time in seconds. It is read only for a `PeakEwma`.
        hooks: told of every call that is turned away for want of endpoints.

    Raises:
        ValueError: if ``load`` or ``on_empty`` is a word that is not known.
        TypeError: if ``endpoints``, ``load`` or ``is_dead`` is nothing of the above.

    >>> async def first(request: str, /) -> str:
    ...     return f"{request} from the first"
    >>> async def second(request: str, /) -> str:
    ...     return f"{request} from the second"
    >>> anyio.run(Balance([first, second]), "hello") in ("hello from the first", "hello from the second")
    True
    >>> async def discovered():
    ...     yield Insert("a", first)
    ...     yield Insert("b", second)
    ...     yield Remove("a")
    >>> async def main() -> str:
    ...     async with Balance(discovered()) as call:
    ...         await anyio.sleep(0.001)
    ...         return await call("hello")
    >>> anyio.run(main)
    'hello from the second'
    """

    __slots__ = (
        "_arrival",
        "_by_key",
        "_cause",
        "_changes",
        "_clock",
        "_discovery",
        "_entering",
        "_ewma",
        "_exit",
        "_given",
        "_held",
        "_hooks",
        "_is_dead",
        "_is_open",
        "_list",
        "_measure",
        "_random",
        "_waits",
    )

    def __init__(
        self,
        endpoints: Mapping[Any, Service[Q, R]]  # Any: a mapping is invariant in its keys
        | Sequence[Service[Q, R]]
        | AsyncIterable[Change[Q, R]],
        *,
        load: Literal["pending"] | PeakEwma | Callable[[Service[Q, R]], float] = "pending",
        on_empty: Literal["wait", "fail"] = "wait",
        is_dead: Errors = ServiceClosed,
        random: Random | None = None,
        clock: Clock = now,
        hooks: Hooks | None = None,
    ) -> None:
        self._given: list[tuple[Hashable, Service[Q, R]]] | None = None
        self._changes: AsyncIterable[Change[Q, R]] | None = None
        if isinstance(endpoints, Mapping):
            self._given = list(endpoints.items())
        elif isinstance(endpoints, Sequence):
            self._given = list(enumerate(endpoints))
        elif hasattr(endpoints, "__aiter__"):
            self._changes = endpoints
        else:
            raise TypeError(f"{endpoints!r} is no mapping, no sequence and no async iterable of changes")
        if isinstance(load, str) and load != "pending":
            raise ValueError(f"load is {load!r}, where 'pending' is expected, or a PeakEwma, or a function")
        if not isinstance(load, (str, PeakEwma)) and not callable(load):
            raise TypeError(f"load is {load!r}, where 'pending' is expected, or a PeakEwma, or a function")
        if on_empty not in ("wait", "fail"):
            raise ValueError(f"on_empty is {on_empty!r}, where 'wait' or 'fail' is expected")
        self._ewma = load if isinstance(load, PeakEwma) else None
        self._measure = load if callable(load) else None
        self._waits = on_empty == "wait"
        self._is_dead = matcher(is_dead)
        # SystemRandom, as elsewhere, would cost more than the whole rest of a call.
        self._random = random
        self._clock = clock
        self._hooks = hooks
        self._by_key: dict[Hashable, _Endpoint[Q, R]] = {}
        self._list: list[_Endpoint[Q, R]] = []  # the same, to draw from
        self._entering: dict[Hashable, _Endpoint[Q, R]] = {}
        self._held: dict[tuple[Hashable, int], _Keep] = {}  # what is entered, by its key and the id of its service
        self._discovery: anyio.CancelScope | None = None  # while the stream of changes is read
        self._arrival: anyio.Event | None = None  # somebody waits for an endpoint
        self._cause: Exception | None = None  # what ended the stream of changes
        self._exit: AbstractAsyncContextManager[None] | None = None
        self._is_open = False
        self._reset()

    # --- calls ------------------------------------------------------------------------------------------------------

    async def __call__(self, request: Q, /) -> R:
        """Let an endpoint answer.

        Raises:
            ServiceUnavailable: if there are no endpoints, and none is waited for.
            ServiceClosed: if it needs to be entered, and is not.
        """
        ewma = self._ewma
        while True:
            began = 0.0 if ewma is None else self._clock()
            endpoint = self._choose(began)
            if endpoint is None:
                await self._wait_for_arrival()
                continue
            # Nothing is awaited from the choice to the call, so that the next one who chooses knows of this one.
            endpoint.pending += 1
            trips = None
            if ewma is not None:
                trips = endpoint.trips or self._trips_of(endpoint, ewma, began)
                trips.begin()
            was_answered = False
            try:
                response = await endpoint.service(request)
                was_answered = True
                return response
            except Exception as error:
                # An error is an answer, too, but not one that was made on this side.
                was_sent = getattr(error, "sent", None) is not False
                was_answered = was_sent
                if not self._is_dead(error):
                    raise
                self._retire(endpoint)
                if was_sent or not self._list:
                    raise
                # It was dead already, and nobody else has seen the request: as if it had not been chosen.
            finally:
                endpoint.pending -= 1
                if trips is not None:
                    at = self._clock()
                    trips.end(at - began, at, answered=was_answered)
                if endpoint.is_retired:
                    endpoint.leave_when_idle()

    def _choose(self, at: float) -> _Endpoint[Q, R] | None:
        endpoints = self._list
        if len(endpoints) < 2:
            return endpoints[0] if endpoints else None
        one, other = self._two_of(endpoints)
        if not (one.ready_now() and other.ready_now()):
            # If both are ready they are as good a choice as two of those that are ready. Else look for these.
            ready = [each for each in endpoints if each.ready_now()]
            endpoints = ready or [each for each in endpoints if not each.refuses_now()] or endpoints
            if len(endpoints) == 1:
                return endpoints[0]
            one, other = self._two_of(endpoints)
        if self._ewma is None and self._measure is None:
            return one if one.pending <= other.pending else other
        return one if self._load_of(one, at) <= self._load_of(other, at) else other

    def _two_of(self, endpoints: Sequence[_Endpoint[Q, R]]) -> tuple[_Endpoint[Q, R], _Endpoint[Q, R]]:
        if self._random is None:
            self._random = Random()
        one, other = two_of(len(endpoints), self._random)
        return endpoints[one], endpoints[other]

    def _load_of(self, endpoint: _Endpoint[Q, R], at: float) -> float:
        if self._ewma is not None:
            return (endpoint.trips or self._trips_of(endpoint, self._ewma, at)).load(at)
        return endpoint.pending if self._measure is None else self._measure(endpoint.service)

    def _trips_of(self, endpoint: _Endpoint[Q, R], ewma: PeakEwma, at: float) -> RoundTrips:
        if endpoint.trips is None:
            endpoint.trips = ewma.round_trips(at)
        return endpoint.trips

    async def _wait_for_arrival(self) -> None:
        if not self._is_open:
            raise ServiceClosed("this Balance is closed: it takes calls within its 'async with' block")
        if not self._waits or (self._discovery is None and not self._entering):
            raise self._unavailable()
        if self._arrival is None:
            self._arrival = anyio.Event()
        await self._arrival.wait()

    def _unavailable(self) -> ServiceUnavailable:
        error = ServiceUnavailable("there are no endpoints")
        error.__cause__ = self._cause
        if self._hooks is not None:
            tell(self._hooks.on_shed, CallShed("Balance", error))
        return error

    # --- hints ------------------------------------------------------------------------------------------------------

    @property
    def endpoints(self) -> dict[Hashable, Service[Q, R]]:
        """The endpoints that get calls now, by their keys; a copy."""
        return {endpoint.key: endpoint.service for endpoint in self._list}

    def ready_now(self) -> bool:
        """Whether an endpoint is ready. One that is closed is ready too: whoever calls it learns at once that it is."""
        return any(endpoint.ready_now() for endpoint in self._list) or not self._is_open

    def refuses_now(self) -> bool:
        """Whether all endpoints would turn a call away, or there are none and none is waited for. A hint."""
        if not self._list:
            return not self._waits
        return all(endpoint.refuses_now() for endpoint in self._list)

    def load(self) -> float:
        """The load of an endpoint, on average; infinite if there are none. A hint."""
        at = 0.0 if self._ewma is None else self._clock()
        loads = [self._load_of(endpoint, at) for endpoint in self._list]
        return sum(loads) / len(loads) if loads else math.inf

    # --- endpoints come and go --------------------------------------------------------------------------------------

    def _insert(self, key: Hashable, service: Service[Q, R], tasks: TaskGroup) -> None:
        if (entering := self._entering.get(key)) is not None:
            if entering.service is service:
                return
            del self._entering[key]
            entering.cancel()
        known = self._by_key.get(key)
        if known is not None and known.service is service:
            return  # and keeps what is known of it
        endpoint = _Endpoint(key, service)
        if hasattr(service, "__aenter__"):
            endpoint.keep = _Keep()
            self._entering[key] = endpoint
            tasks.start_soon(self._hold, endpoint)
        else:
            self._activate(endpoint)

    def _remove(self, key: Hashable) -> None:
        if (entering := self._entering.pop(key, None)) is not None:
            entering.cancel()
        if (endpoint := self._by_key.get(key)) is not None:
            self._retire(endpoint)

    def _activate(self, endpoint: _Endpoint[Q, R]) -> None:
        self._entering.pop(endpoint.key, None)
        if (replaced := self._by_key.get(endpoint.key)) is not None:
            self._retire(replaced)
        self._by_key[endpoint.key] = endpoint
        self._list.append(endpoint)
        self._tell_arrival()

    def _retire(self, endpoint: _Endpoint[Q, R]) -> None:
        if not endpoint.is_retired and self._by_key.get(endpoint.key) is endpoint:
            del self._by_key[endpoint.key]
            self._list.remove(endpoint)
        endpoint.is_retired = True
        endpoint.leave_when_idle()

    def _tell_arrival(self) -> None:
        """Let those who wait for an endpoint look again: there is one, or there will be none."""
        if self._arrival is not None:
            self._arrival.set()
            self._arrival = None

    async def _hold(
        self, endpoint: _Endpoint[Q, R], *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED
    ) -> None:
        """Keep an endpoint's service entered, in a task of its own, since endpoints come and go in any order."""
        key, keep = endpoint.key, endpoint.keep
        assert keep is not None
        this = key, id(endpoint.service)
        was_entered = False
        try:
            with keep.scope:
                while (before := self._held.get(this)) is not None:
                    await before.left.wait()  # removed, and inserted again before its last call was over
                self._held[this] = keep
                async with running(endpoint.service):
                    if not keep.scope.cancel_called:  # or it was removed meanwhile
                        was_entered = True
                        self._activate(endpoint)
                        task_status.started()
                        await keep.over.wait()
        except Exception as error:
            if not was_entered and task_status is not anyio.TASK_STATUS_IGNORED:
                raise
            logger.warning(
                "the endpoint %r is dropped, as it failed: %r",
                key,
                error,
                exc_info=error,
                extra={"event": "balance.endpoint_dropped", "endpoint": str(key)},
            )
        finally:
            if self._entering.get(key) is endpoint:
                del self._entering[key]
            if self._held.get(this) is keep:
                del self._held[this]
            self._retire(endpoint)
            keep.left.set()
            self._tell_arrival()

    async def _discover(self, changes: AsyncIterable[Change[Q, R]], tasks: TaskGroup, scope: anyio.CancelScope) -> None:
        try:
            with scope:
                stream = aiter(changes)
                try:
                    async for change in stream:
                        if isinstance(change, Insert):
                            self._insert(change.key, change.service, tasks)
                        elif isinstance(change, Remove):  # pyright: ignore[reportUnnecessaryIsInstance]
                            self._remove(change.key)
                        else:
                            raise TypeError(f"{change!r} is neither an Insert nor a Remove")
                finally:
                    if isinstance(stream, AsyncGenerator):
                        await stream.aclose()
        except Exception as error:
            logger.warning(
                "no more changes of endpoints come, as discovery failed: %r",
                error,
                exc_info=error,
                extra={"event": "balance.discovery_failed"},
            )
            self._cause = error.with_traceback(None)  # which holds this frame, which holds the service
        finally:
            self._discovery = None
            self._tell_arrival()

    # --- open and closed --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        try:
            async with plain_task_group() as tasks:
                try:
                    await self._open(tasks)
                    yield
                finally:
                    self._shut()
        finally:
            self._reset()

    async def _open(self, tasks: TaskGroup) -> None:
        self._cause = None
        if self._changes is not None:
            self._is_open = True
            self._discovery = anyio.CancelScope()
            tasks.start_soon(self._discover, self._changes, tasks, self._discovery)
            return
        # Made anew, since some may have been dropped that failed only because they were not entered.
        endpoints = [_Endpoint(key, service) for key, service in self._given or ()]
        self._by_key.clear()
        self._list.clear()
        for endpoint in endpoints:
            self._entering[endpoint.key] = endpoint
        for endpoint in endpoints:
            if hasattr(endpoint.service, "__aenter__"):
                endpoint.keep = _Keep()
                await tasks.start(self._hold, endpoint)
            else:
                self._activate(endpoint)

    def _shut(self) -> None:
        self._is_open = False
        if self._discovery is not None:
            self._discovery.cancel()
        for endpoint in [*self._entering.values()]:
            endpoint.cancel()
        for endpoint in [*self._list]:
            self._retire(endpoint)
        self._tell_arrival()

    def _reset(self) -> None:
        """As it was made: the services of a fixed set are there to be called, and of a stream nothing is known."""
        self._by_key.clear()
        self._list.clear()
        self._entering.clear()
        self._discovery = None
        self._is_open = self._given is not None
        for key, service in self._given or ():
            self._activate(_Endpoint(key, service))

    async def __aenter__(self) -> Self:
        """Enter the services of a fixed set, or begin to read the stream of changes.

        Raises:
            MisuseError: if it is entered already.
        """
        if self._exit is not None:
            raise MisuseError(f"{self!r} is entered already")
        self._exit = self._running()
        try:
            await self._exit.__aenter__()
        except BaseException:
            self._exit = None
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Remove all endpoints, and wait for the calls at those that were entered, unless there was an error."""
        assert self._exit is not None
        try:
            return await self._exit.__aexit__(kind, error, traceback)
        finally:
            self._exit = None

    def __repr__(self) -> str:
        return f"<Balance between {', '.join(map(repr, self._by_key)) or 'no endpoints'}>"


class _Endpoint(Generic[Q, R]):
    """What a balance knows of one endpoint."""

    __slots__ = ("_is_ready", "_refuses", "is_retired", "keep", "key", "pending", "service", "trips")

    def __init__(self, key: Hashable, service: Service[Q, R]) -> None:
        self.key = key
        self.service = service
        self.pending = 0
        self.is_retired = False
        self.trips: RoundTrips | None = None  # from the first look at it on, if round trips are measured at all
        self.keep: _Keep | None = None
        self._is_ready: Callable[[], bool] | None = getattr(service, "ready_now", None)
        self._refuses: Callable[[], bool] | None = getattr(service, "refuses_now", None)

    def ready_now(self) -> bool:
        return (self._is_ready is None or self._is_ready()) and not self.refuses_now()

    def refuses_now(self) -> bool:
        return self._refuses is not None and self._refuses()

    def cancel(self) -> None:
        """It is no longer wanted, and is not entered yet."""
        if self.keep is not None:
            self.keep.scope.cancel()

    def leave_when_idle(self) -> None:
        if self.keep is not None and self.is_retired and not self.pending:
            self.keep.over.set()


class _Keep:
    """What the task that holds a service entered is told, and tells."""

    __slots__ = ("left", "over", "scope")

    def __init__(self) -> None:
        self.scope = anyio.CancelScope()  # cancelled if it is removed before it was entered
        self.over = anyio.Event()  # it is removed, and nothing is under way
        self.left = anyio.Event()
