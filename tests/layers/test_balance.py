"""Balance: the choice of an endpoint, and endpoints that come and go."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random
from typing import Literal

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import CallRejected, CircuitOpen, MisuseError, Overloaded, ServiceClosed, ServiceUnavailable
from towline.hooks import CallShed, Hooks
from towline.layers.balance import Balance, Change, Insert, Remove
from towline.layers.breaker import CircuitBreaker
from towline.layers.buffer import Buffer
from towline.layers.limit import ConcurrencyLimit
from towline.policies.load import PeakEwma
from towline.service import Service, Wrapper, load, ready_now, refuses_now, running
from towline.testing import cancel_at_every_await


class Endpoint:
    """A service that answers with its name; a call to it waits while it is not ready."""

    def __init__(self, name: str, *, is_ready: bool = True, load: float = 0.0, seconds: float = 0.0) -> None:
        self.name = name
        self.seconds = seconds
        self.calls = 0
        self.begun = 0
        self.failure: Exception | None = None
        self._load = load
        self._ready = anyio.Event()
        self.set_ready(is_ready)

    def set_ready(self, is_ready: bool) -> None:
        if not is_ready:
            self._ready = anyio.Event()
        else:
            self._ready.set()

    def ready_now(self) -> bool:
        return self._ready.is_set()

    def load(self) -> float:
        return self._load

    async def __call__(self, request: int, /) -> str:
        self.calls += 1
        while not self._ready.is_set():
            await self._ready.wait()
        self.begun += 1
        await anyio.sleep(self.seconds)
        if self.failure is not None:
            raise self.failure
        return f"{self.name} {request}"


class Owner(Wrapper[int, str]):
    """An endpoint that owns a task, so it must be entered, and left in the task that entered it."""

    def __init__(self, name: str, *, seconds: float = 0.0, entering: float = 0.0) -> None:
        super().__init__(Endpoint(name, seconds=seconds))
        self.events: list[str] = []
        self.entering = entering
        self.failure: Exception | None = None
        self.crash = anyio.Event()

    def _running(self) -> AbstractAsyncContextManager[object]:
        return self._held()

    @asynccontextmanager
    async def _held(self) -> AsyncGenerator[None]:
        if self.entering:
            await anyio.sleep(self.entering)
        if self.failure is not None:
            raise self.failure
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._work)
            self.events.append("entered")
            try:
                yield
            finally:
                self.events.append("left")
                tasks.cancel_scope.cancel()

    async def _work(self) -> None:
        await self.crash.wait()
        raise OSError("the task of the endpoint")

    @property
    def is_entered(self) -> bool:
        return self.events[-1:] == ["entered"]

    async def __call__(self, request: int, /) -> str:
        if not self.is_entered:
            raise ServiceClosed("not entered")
        response: str = await self.inner(request)
        if not self.is_entered:
            assert self.crash.is_set(), "it was left before its last call was over"
            raise ServiceClosed("its task has failed")
        return response


class Discovery:
    """A stream of changes that a test writes to."""

    def __init__(self) -> None:
        self._send, self.changes = anyio.create_memory_object_stream[Change[int, str]](math.inf)

    async def tell(self, *changes: Change[int, str]) -> None:
        for change in changes:
            self._send.send_nowait(change)
        await wait_all_tasks_blocked()

    async def end(self) -> None:
        self._send.close()
        await wait_all_tasks_blocked()

    def close(self) -> None:
        self._send.close()
        self.changes.close()


@pytest.fixture
def discovery() -> Iterator[Discovery]:
    found = Discovery()
    yield found
    found.close()


@asynccontextmanager
async def started(call: Callable[[int], Awaitable[str]], *requests: int) -> AsyncGenerator[dict[int, object]]:
    """Calls in tasks of their own, and what comes of them."""
    outcomes: dict[int, object] = {}

    async def one(request: int) -> None:
        try:
            outcomes[request] = await call(request)
        except Exception as error:
            outcomes[request] = error

    async with anyio.create_task_group() as tasks:
        for request in requests:
            tasks.start_soon(one, request)
        await wait_all_tasks_blocked()
        yield outcomes


# --- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_an_endpoint_answers() -> None:
    assert await Balance([Endpoint("a")])(1) == "a 1"


async def test_p2_of_two_endpoints_with_loads_1_and_100_always_the_first() -> None:
    light, heavy = Endpoint("light", load=1), Endpoint("heavy", load=100)
    for endpoints in ([light, heavy], [heavy, light]):
        call = Balance(endpoints, load=load)
        for n in range(200):
            await call(n)
    assert (light.calls, heavy.calls) == (400, 0)


async def test_p2_the_lower_load_of_two_different_ones_wins() -> None:
    # Of three, any two are as likely: the lightest is in two pairs of three, and the heaviest wins none.
    endpoints = [Endpoint(str(n), load=n) for n in range(3)]
    call = Balance(endpoints, load=load, random=Random(2))
    for n in range(3000):
        await call(n)
    assert endpoints[0].calls == pytest.approx(2000, rel=0.05)
    assert endpoints[1].calls == pytest.approx(1000, rel=0.1)
    assert endpoints[2].calls == 0


async def test_p2_where_loads_are_equal_all_get_as_many_calls() -> None:
    endpoints = [Endpoint(str(n)) for n in range(5)]
    call = Balance(endpoints, random=Random(3))
    for n in range(5000):
        await call(n)
    for endpoint in endpoints:
        assert endpoint.calls == pytest.approx(1000, rel=0.1)


async def test_p2_of_equal_loads_the_first_that_was_drawn_wins() -> None:
    class First(Random):
        def random(self) -> float:
            return 0.0  # draws 0 and 0: Floyd's way makes 1 and 0 of them

    a, b = Endpoint("a", load=7), Endpoint("b", load=7)
    assert await Balance([a, b], load=load, random=First())(1) == "b 1"


async def test_calls_under_way_are_the_load() -> None:
    slow, other = Endpoint("slow", seconds=1000), Endpoint("other")
    call = Balance([slow, other])
    async with started(call, 1, 2):
        assert (slow.calls, other.calls) == (1, 1)
        for n in range(50):
            assert await call(n) == f"other {n}"
        assert load(call) == 0.5


async def test_two_choices_keep_queues_nearly_as_short_as_looking_at_all() -> None:
    endpoints = [Endpoint(str(n), seconds=1) for n in range(20)]
    call = Balance(endpoints, random=Random(4))
    async with started(call, *range(200)):
        # 10 each would be perfect; one choice alone gives more than 17 at the fullest.
        assert max(endpoint.calls for endpoint in endpoints) <= 13
        assert min(endpoint.calls for endpoint in endpoints) >= 7


async def test_a_call_is_counted_until_it_is_over_however_it_ends() -> None:
    endpoint = Endpoint("a", seconds=1)
    call = Balance([endpoint])
    assert load(call) == 0
    async with started(call, 1, 2):
        assert load(call) == 2
    assert load(call) == 0
    endpoint.failure = ValueError()
    async with started(call, 1):
        assert load(call) == 1
    assert load(call) == 0
    with anyio.move_on_after(0.5):
        await call(1)
    assert load(call) == 0


# --- by round trips -------------------------------------------------------------------------------------------------


async def test_p1_the_load_is_the_peak_of_round_trips_times_the_calls_and_decays() -> None:
    endpoint = Endpoint("a", seconds=0.2)
    call = Balance([endpoint], load=PeakEwma(default_rtt=0.02, decay=1))
    assert load(call) == pytest.approx(0.02)
    start = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        await anyio.sleep_until(start + 0.1)
        tasks.start_soon(call, 1)
        await anyio.sleep_until(start + 0.2)
        tasks.start_soon(call, 2)
        await anyio.sleep_until(start + 0.3001)
        assert load(call) == pytest.approx(0.4, rel=0.001)
        await anyio.sleep_until(start + 0.4001)
        assert load(call) == pytest.approx(0.2, rel=0.001)
    await anyio.sleep(1)
    assert load(call) < 0.1
    await anyio.sleep(10)
    assert load(call) < 0.0001


async def test_a_slow_endpoint_is_left_alone_and_is_tried_again_later() -> None:
    slow, fast = Endpoint("slow", seconds=1), Endpoint("fast", seconds=0.01)
    call = Balance([slow, fast], load=PeakEwma(default_rtt=0.001))
    for n in range(20):
        await call(n)
    assert slow.calls == 1
    slow.seconds = 0.01
    await anyio.sleep(100)
    for n in range(20):
        await call(n)
    assert slow.calls > 3


async def test_an_endpoint_that_turns_calls_away_does_not_look_fast() -> None:
    busy, slow = Endpoint("busy"), Endpoint("slow", seconds=0.5)
    busy.failure = Overloaded("no")
    call = Balance([busy, slow], load=PeakEwma(default_rtt=0.6, decay=1e6))
    refused = 0
    for n in range(100):
        try:
            await call(n)
        except CallRejected:
            refused += 1
    assert refused <= busy.calls < 100
    loads = call.load()
    assert loads == pytest.approx(0.6, rel=0.01)  # both are about where they were


async def test_an_answer_that_is_an_error_counts_as_one_and_a_cancelled_call_does_not() -> None:
    endpoint = Endpoint("a", seconds=1)
    call = Balance([endpoint], load=PeakEwma(default_rtt=5, decay=1))
    with anyio.move_on_after(0.5):
        await call(1)
    assert load(call) == pytest.approx(5 * math.exp(-0.5), rel=0.001)
    endpoint.failure = ValueError()
    before = load(call)
    with pytest.raises(ValueError, match=r"^$"):
        await call(1)
    weight = math.exp(-1.5)
    assert load(call) == pytest.approx(1 + (5 - 1) * weight, rel=0.001)
    assert load(call) < before
    before = load(call)
    endpoint.failure = Overloaded("turned away here")
    with pytest.raises(Overloaded):
        await call(1)
    assert load(call) == pytest.approx(max(before * math.exp(-1), 1), rel=0.001)
    endpoint.seconds = 1000
    with anyio.move_on_after(10):
        await call(1)
    assert load(call) == pytest.approx(10, rel=0.001)  # it would have taken longer than that


async def test_the_clock_is_read_only_for_round_trips() -> None:
    def clock() -> float:
        raise AssertionError("nobody needs the time")

    call = Balance([Endpoint("a"), Endpoint("b")], clock=clock)
    await call(1)
    assert load(call) == 0
    times = iter(range(100))
    call = Balance([Endpoint("a")], load=PeakEwma(default_rtt=0, decay=1), clock=lambda: next(times))
    await call(1)
    assert 0 < load(call) < 1


# --- readiness ------------------------------------------------------------------------------------------------------


async def test_only_endpoints_that_are_ready_are_looked_at_if_there_are_any() -> None:
    endpoints = [Endpoint(str(n), is_ready=n in (3, 7), load=0 if n not in (3, 7) else 10) for n in range(10)]
    call = Balance(endpoints, load=load, random=Random(5))
    for n in range(500):
        await call(n)
    assert [endpoint.calls for endpoint in endpoints if not endpoint.ready_now()] == [0] * 8
    assert endpoints[3].calls == pytest.approx(250, rel=0.2)
    endpoints[3].set_ready(False)
    assert await call(1) == "7 1"


async def test_where_none_is_ready_the_call_waits_at_the_one_with_the_lower_load() -> None:
    a, b = Endpoint("a", is_ready=False, load=2), Endpoint("b", is_ready=False, load=1)
    call = Balance([a, b], load=load)
    assert not ready_now(call)
    async with started(call, 1) as outcomes:
        assert (a.calls, b.calls) == (0, 1)
        assert not outcomes
        a.set_ready(True)
        assert ready_now(call)
        b.set_ready(True)
    assert outcomes == {1: "b 1"}


async def test_limits_of_endpoints_add_up() -> None:
    inner = [Endpoint(str(n), seconds=1) for n in range(3)]
    call = Balance([ConcurrencyLimit(2)(endpoint) for endpoint in inner])
    async with started(call, *range(6)):
        assert [endpoint.begun for endpoint in inner] == [2, 2, 2]
        assert not ready_now(call)


async def test_p3_of_two_equal_loads_only_the_ready_one_is_used_and_the_failed_one_dropped() -> None:
    # Tower's test of two endpoints with equal loads
    a, b = Endpoint("a"), Endpoint("b")
    call = Balance({"a": a, "b": b}, load=load, is_dead=ConnectionError)
    b.set_ready(False)
    assert [await call(n) for n in range(3)] == ["a 0", "a 1", "a 2"]
    a.set_ready(False)
    b.set_ready(True)
    assert await call(3) == "b 3"
    a.set_ready(True)
    b.set_ready(False)
    a.failure = ConnectionError("gone")
    with pytest.raises(ConnectionError, match=r"^gone$"):
        await call(4)
    assert [*call.endpoints] == ["b"]
    b.set_ready(True)
    assert await call(5) == "b 5"


# --- endpoints come and go ------------------------------------------------------------------------------------------


async def test_p3_a_failed_endpoint_is_dropped_and_the_call_raises(discovery: Discovery) -> None:
    only = Endpoint("a")
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("a", only))
        assert await call(1) == "a 1"
        only.failure = error = ServiceClosed("gone")
        with pytest.raises(ServiceClosed) as caught:
            await call(2)
        assert caught.value is error
        assert call.endpoints == {}
        async with started(call, 3) as outcomes:
            assert not outcomes
            only.failure = None
            await discovery.tell(Insert("a", only))
        assert outcomes == {3: "a 3"}


async def test_p3_what_an_endpoint_was_never_asked_goes_to_another_one() -> None:
    endpoints = [Endpoint(name) for name in "abcd"]
    call = Balance(endpoints)
    for closed in endpoints[:3]:
        closed.failure = ServiceClosed("gone")
    assert [await call(n) for n in range(50)] == [f"d {n}" for n in range(50)]
    endpoints[3].failure = last = ServiceClosed("the last one")
    with pytest.raises(ServiceClosed) as caught:
        await call(50)
    assert caught.value is last
    with pytest.raises(ServiceUnavailable):
        await call(51)


async def test_p3_what_may_have_been_carried_out_goes_nowhere_else() -> None:
    a, b = Endpoint("a"), Endpoint("b")
    call = Balance([a, b], is_dead=ConnectionError)
    a.failure = b.failure = ConnectionError("in the middle of it")
    with pytest.raises(ConnectionError):
        await call(1)
    assert len(call.endpoints) == 1


async def test_a_call_waits_at_a_busy_endpoint_rather_than_be_refused_by_an_open_breaker() -> None:
    dead = CircuitBreaker()(Endpoint("dead"))
    dead.breaker.isolate()
    busy = ConcurrencyLimit(1)(Endpoint("busy", seconds=1))
    call = Balance({"dead": dead, "busy": busy})
    async with started(call, *range(6)) as outcomes:
        await anyio.sleep(60)
    assert outcomes == {n: f"busy {n}" for n in range(6)}
    assert not refuses_now(call)
    with pytest.raises(CircuitOpen):
        await Balance([dead, dead])(1)
    assert refuses_now(Balance([dead]))


async def test_p3_the_same_key_may_be_removed_and_inserted(discovery: Discovery) -> None:
    a, b = Endpoint("a"), Endpoint("b")
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", a), Remove("key"), Insert("key", b))
        assert call.endpoints == {"key": b}
        await discovery.tell(Insert("key", a))
        assert call.endpoints == {"key": a}
        await discovery.tell(Remove("key"), Remove("key"), Remove("never seen"))
        assert call.endpoints == {}
        await discovery.tell(Insert("key", a))
        assert await call(1) == "a 1"


async def test_p3_what_is_inserted_again_as_it_is_stays_as_it_is(discovery: Discovery) -> None:
    a, b = Endpoint("a", seconds=1), Owner("b", entering=1)
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", a))
        async with started(call, 1):
            await discovery.tell(Insert("key", a))
            assert load(call) == 1
            await discovery.tell(Insert("key", b))
            await discovery.tell(Insert("key", a))  # before b could take its place
            await anyio.sleep(2)
            assert call.endpoints == {"key": a}
            assert b.events == []


async def test_which_errors_drop_an_endpoint_can_be_said() -> None:
    a, b = Endpoint("a"), Endpoint("b")
    call = Balance([a, b], is_dead=lambda error: str(error) == "dead")
    for failure in (ValueError("only ill"), ServiceClosed("gone")):
        a.failure = b.failure = failure
        with pytest.raises(type(failure)):
            await call(1)
    assert len(call.endpoints) == 2
    a.failure = b.failure = ValueError("dead")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^dead$"):
            await call(1)
    with pytest.raises(ServiceUnavailable, match=r"^there are no endpoints$"):
        await call(1)


async def test_a_removed_endpoint_finishes_what_it_has(discovery: Discovery) -> None:
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("a", Endpoint("a", seconds=1)))
        async with started(call, 1) as outcomes:
            await discovery.tell(Remove("a"))
            assert call.endpoints == {}
        assert outcomes == {1: "a 1"}


async def test_p4_an_empty_balance_waits_and_can_be_cancelled(discovery: Discovery) -> None:
    async with Balance(discovery.changes) as call:
        assert not ready_now(call)
        assert load(call) == math.inf
        start = anyio.current_time()
        with anyio.move_on_after(5) as scope:
            await call(1)
        assert scope.cancelled_caught
        assert anyio.current_time() - start == pytest.approx(5)
        async with started(call, 2, 3) as outcomes:
            assert not outcomes
            await discovery.tell(Insert("a", Endpoint("a")))
        assert outcomes == {2: "a 2", 3: "a 3"}


async def test_p4_an_empty_balance_fails_if_that_is_asked_for(discovery: Discovery) -> None:
    class Told(Hooks):
        def __init__(self) -> None:
            self.events: list[CallShed] = []

        def on_shed(self, event: CallShed, /) -> None:
            self.events.append(event)

    told = Told()
    async with Balance(discovery.changes, on_empty="fail", hooks=told) as call:
        with pytest.raises(ServiceUnavailable, match=r"^there are no endpoints$") as caught:
            await call(1)
        assert told.events == [CallShed("Balance", caught.value)]
        await discovery.tell(Insert("a", Endpoint("a")))
        assert await call(2) == "a 2"
    assert len(told.events) == 1


async def test_the_end_of_discovery_is_fine_and_nobody_waits_for_what_cannot_come(discovery: Discovery) -> None:
    a = Endpoint("a")
    async with Balance(discovery.changes) as call, started(call, 1) as outcomes:
        await discovery.end()
        assert type(outcomes[1]) is ServiceUnavailable
    again = Discovery()
    async with Balance(again.changes) as call:
        await again.tell(Insert("a", a))
        await again.end()
        assert await call(2) == "a 2"
        a.failure = ServiceClosed()
        with pytest.raises(ServiceClosed):
            await call(3)
        with pytest.raises(ServiceUnavailable) as caught:
            await call(4)
        assert caught.value.__cause__ is None
    again.close()


async def test_an_error_of_discovery_is_logged_and_leaves_the_endpoints(caplog: pytest.LogCaptureFixture) -> None:
    a = Endpoint("a")
    cause = OSError("no such zone")

    async def changes() -> AsyncIterator[Change[int, str]]:
        yield Insert("a", a)
        await anyio.sleep(1)
        raise cause

    with caplog.at_level(logging.WARNING):
        async with Balance(changes()) as call:
            await anyio.sleep(2)
            assert await call(1) == "a 1"
            a.failure = ServiceClosed()
            with pytest.raises(ServiceClosed):
                await call(2)
            errors: list[ServiceUnavailable] = []
            for n in range(2):
                with pytest.raises(ServiceUnavailable) as caught:
                    await call(n)
                errors.append(caught.value)
            assert [error.__cause__ for error in errors] == [cause, cause]
            assert errors[0] is not errors[1]
            assert cause.__traceback__ is None
    assert [record.getMessage() for record in caplog.records] == [
        "no more changes of endpoints come, as discovery failed: OSError('no such zone')"
    ]


async def test_an_error_of_discovery_ends_the_wait_of_all_who_wait(caplog: pytest.LogCaptureFixture) -> None:
    async def changes() -> AsyncIterator[Change[int, str]]:
        await anyio.sleep(1)
        raise OSError("no such zone")
        yield Remove("unreachable")

    async with Balance(changes()) as call, started(call, 1, 2) as outcomes:
        await anyio.sleep(2)
        one, other = outcomes[1], outcomes[2]
        assert isinstance(one, ServiceUnavailable)
        assert isinstance(other, ServiceUnavailable)
        assert one is not other
        assert one.__cause__ is other.__cause__
        assert str(one.__cause__) == "no such zone"


async def test_a_generator_that_discovers_is_closed_with_the_balance() -> None:
    closed = False

    async def changes() -> AsyncIterator[Change[int, str]]:
        nonlocal closed
        try:
            yield Insert("a", Endpoint("a"))
            await anyio.sleep_forever()
        finally:
            closed = True

    async with Balance(changes()) as call:
        assert await call(1) == "a 1"
        assert not closed
    assert closed


async def test_what_is_no_change_ends_discovery_and_closes_its_generator(caplog: pytest.LogCaptureFixture) -> None:
    closed = False

    async def changes() -> AsyncIterator[Change[int, str]]:
        nonlocal closed
        try:
            yield Insert("a", Endpoint("a"))
            yield "nonsense"  # type: ignore[misc]  # pyright: ignore[reportReturnType]
        finally:
            closed = True

    async with Balance(changes()) as call:
        await anyio.sleep(1)
        assert closed
        assert await call(1) == "a 1"
    assert [record.getMessage() for record in caplog.records] == [
        "no more changes of endpoints come, as discovery failed: "
        "TypeError(\"'nonsense' is neither an Insert nor a Remove\")"
    ]


# --- endpoints that own something -----------------------------------------------------------------------------------


async def test_endpoints_are_entered_and_left_in_any_order(discovery: Discovery) -> None:
    owners = {name: Owner(name) for name in "abcd"}
    async with Balance(discovery.changes) as call:
        await discovery.tell(*(Insert(name, owner) for name, owner in owners.items()))
        assert all(owner.is_entered for owner in owners.values())
        await discovery.tell(Remove("b"), Remove("a"))
        assert [owners[name].events for name in "abcd"] == [["entered", "left"]] * 2 + [["entered"]] * 2
        assert {await call(n) for n in range(50)} <= {f"{name} {n}" for name in "cd" for n in range(50)}
    assert all(owner.events == ["entered", "left"] for owner in owners.values())


async def test_a_removed_endpoint_is_left_when_its_last_call_is_over(discovery: Discovery) -> None:
    owner = Owner("a", seconds=10)
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("a", owner))
        async with started(call, 1) as outcomes:
            await anyio.sleep(5)
            async with started(call, 2) as later:
                await discovery.tell(Remove("a"))
                await anyio.sleep(7)
                assert outcomes == {1: "a 1"}
                assert owner.is_entered
            assert later == {2: "a 2"}
            await wait_all_tasks_blocked()
            assert owner.events == ["entered", "left"]


async def test_a_new_endpoint_takes_the_place_of_the_old_when_it_is_entered(discovery: Discovery) -> None:
    old, new = Owner("old"), Owner("new", entering=10)
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", old))
        await discovery.tell(Insert("key", new))
        assert await call(1) == "old 1"
        assert old.is_entered
        await anyio.sleep(11)
        assert await call(2) == "new 2"
        assert old.events == ["entered", "left"]


async def test_one_that_is_removed_while_it_is_entered_gets_no_call(discovery: Discovery) -> None:
    slow, other = Owner("slow", entering=10), Owner("other", entering=10)
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", slow), Remove("key"))
        await anyio.sleep(20)
        assert slow.events == []
        await discovery.tell(Insert("key", slow))
        await discovery.tell(Insert("key", other))
        async with started(call, 1) as outcomes:
            pass
        assert outcomes == {1: "other 1"}
        assert slow.events == []
        quick = Owner("quick")  # entered at its first step: no await at which it could be cancelled
        await discovery.tell(Insert("quick", quick), Remove("quick"))
        assert [*call.endpoints] == ["key"]
        assert not quick.is_entered


async def test_the_same_service_may_be_inserted_again_and_is_entered_after_it_was_left(discovery: Discovery) -> None:
    owner = Owner("a", seconds=5)
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", owner), Insert("key", owner))
        assert owner.events == ["entered"]
        async with started(call, 1, 2) as outcomes:
            await discovery.tell(Remove("key"), Insert("key", owner), Remove("key"), Insert("key", owner))
            assert owner.events == ["entered"]
            assert await call(3) == "a 3"
        assert outcomes == {1: "a 1", 2: "a 2"}
        assert owner.events == ["entered", "left", "entered"]


async def test_an_endpoint_that_cannot_be_entered_is_logged_and_left_out(
    discovery: Discovery, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = Owner("bad"), Owner("good")
    bad.failure = OSError("no")
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("key", good))
        await discovery.tell(Insert("key", bad))
        assert await call(1) == "good 1"
        await discovery.tell(Remove("key"), Insert("key", bad))
        assert call.endpoints == {}
    assert {record.getMessage() for record in caplog.records} == {
        "the endpoint 'key' is dropped, as it failed: OSError('no')"
    }


async def test_nobody_waits_for_an_endpoint_that_could_not_be_entered_if_no_other_can_come() -> None:
    bad = Owner("bad", entering=1)
    bad.failure = OSError("no")

    async def changes() -> AsyncIterator[Change[int, str]]:
        yield Insert("bad", bad)

    async with Balance(changes()) as call:
        await anyio.sleep(0.5)
        start = anyio.current_time()
        with pytest.raises(ServiceUnavailable):
            await call(1)
        assert anyio.current_time() - start == pytest.approx(0.5, abs=0.2)


async def test_an_endpoint_whose_task_fails_is_dropped_and_harms_no_other(
    discovery: Discovery, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = Owner("a"), Owner("b")
    async with Balance(discovery.changes) as call:
        await discovery.tell(Insert("a", a), Insert("b", b))
        a.crash.set()
        await anyio.sleep(1)
        assert [*call.endpoints] == ["b"]
        assert await call(1) == "b 1"
    assert len(caplog.records) == 1


# --- open and closed ------------------------------------------------------------------------------------------------


async def test_with_discovery_a_call_outside_of_the_block_is_one_to_a_closed_service(discovery: Discovery) -> None:
    balance = Balance(discovery.changes)
    message = r"^this Balance is closed: it takes calls within its 'async with' block$"
    with pytest.raises(ServiceClosed, match=message):
        await balance(1)
    assert ready_now(balance)  # a call does not wait
    async with running(balance) as call:
        await discovery.tell(Insert("a", Endpoint("a")))
        assert await call(1) == "a 1"
        with pytest.raises(MisuseError, match=r"^<Balance between 'a'> is entered already$"):
            await balance.__aenter__()
    with pytest.raises(ServiceClosed, match=message):
        await balance(1)


async def test_who_waits_for_an_endpoint_when_the_block_ends_fails(discovery: Discovery) -> None:
    balance = Balance(discovery.changes)
    failed = anyio.Event()

    async def call() -> None:
        with pytest.raises(ServiceClosed):
            await balance(1)
        failed.set()

    async with anyio.create_task_group() as tasks, balance:
        tasks.start_soon(call)
        await wait_all_tasks_blocked()
        assert not failed.is_set()
    assert failed.is_set()


async def test_a_fixed_set_enters_its_services_and_need_not_be_entered_without_any() -> None:
    a, b = Owner("a"), Owner("b")
    plain = Balance({"x": Endpoint("x")})
    assert await plain(1) == "x 1"
    async with plain:
        assert await plain(2) == "x 2"
    assert await plain(3) == "x 3"
    balance = Balance([a, b])
    for _ in range(2):
        a.events.clear()
        b.events.clear()
        async with balance as call:
            assert a.is_entered
            assert b.is_entered
            assert await call(1) in ("a 1", "b 1")
        assert a.events == b.events == ["entered", "left"]


async def test_a_fixed_set_that_was_used_too_early_is_complete_once_it_is_entered() -> None:
    layer = Buffer(1)
    balance = Balance([layer(Endpoint("a")), layer(Endpoint("b"))])
    with pytest.raises(ServiceClosed):
        await balance(1)  # of both
    with pytest.raises(ServiceUnavailable):
        await balance(1)
    async with balance as call:
        assert len(call.endpoints) == 2
        assert await call(1) in ("a 1", "b 1")


async def test_a_service_of_a_fixed_set_that_cannot_be_entered_fails_the_block_and_leaves_the_others() -> None:
    good, bad = Owner("good"), Owner("bad")
    bad.failure = OSError("no")
    balance = Balance([good, bad])
    with pytest.raises(OSError, match=r"^no$") as caught:
        await balance.__aenter__()
    assert caught.value is bad.failure
    assert good.events == ["entered", "left"]
    bad.failure = None
    async with balance as call:
        assert len(call.endpoints) == 2


async def test_leaving_waits_for_the_calls_at_services_that_were_entered() -> None:
    owner = Owner("a", seconds=10)
    balance = Balance([owner])
    outcomes: list[str] = []

    async def call() -> None:
        outcomes.append(await balance(1))

    async with anyio.create_task_group() as tasks:
        async with balance:
            tasks.start_soon(call)
            await wait_all_tasks_blocked()
            assert not outcomes
        assert outcomes == ["a 1"]
    assert owner.events == ["entered", "left"]


@pytest.mark.parametrize("raised", [ValueError("mine"), ExceptionGroup("both", [ValueError()]), KeyboardInterrupt()])
async def test_an_error_in_the_block_leaves_it_as_it_is(raised: BaseException, discovery: Discovery) -> None:
    owner = Owner("a")
    with pytest.raises(type(raised)) as caught:  # noqa: PT012 -- the block is what is tested
        async with Balance(discovery.changes):
            await discovery.tell(Insert("a", owner))
            raise raised
    assert caught.value is raised
    assert owner.events == ["entered", "left"]


# --- cancellation at every await ------------------------------------------------------------------------------------


async def test_it_may_be_cancelled_at_every_await_and_leaves_nothing_behind() -> None:
    a, b = Owner("a", seconds=1), Owner("b", entering=1)

    async def changes() -> AsyncIterator[Change[int, str]]:
        yield Insert("a", a)
        await anyio.sleep(1)
        yield Insert("b", b)
        yield Remove("a")
        await anyio.sleep_forever()

    async def block() -> None:
        async with Balance(changes(), load=PeakEwma()) as call:
            assert await call(1) == "a 1"
            await anyio.sleep(2)
            assert await call(2) == "b 2"

    async def check() -> None:
        assert not a.is_entered
        assert not b.is_entered

    assert await cancel_at_every_await(block, check) >= 4


async def test_a_fixed_set_may_be_cancelled_at_every_await() -> None:
    a, b = Owner("a", entering=1), Owner("b", entering=1)
    balance = Balance([a, b])

    async def block() -> None:
        async with balance as call:
            assert len(call.endpoints) == 2
            await call(1)

    async def check() -> None:
        assert not a.is_entered
        assert not b.is_entered
        assert load(balance) == 0

    assert await cancel_at_every_await(block, check) >= 3


async def test_a_call_may_be_cancelled_at_every_await(discovery: Discovery) -> None:
    async with Balance(discovery.changes) as call:
        endpoint = Endpoint("a", seconds=1)

        async def wait_and_call() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(discovery.tell, Insert("a", endpoint))
                assert await call(1) == "a 1"

        async def check() -> None:
            await discovery.tell(Insert("a", endpoint))
            assert load(call) == 0
            assert await call(1) == "a 1"
            await discovery.tell(Remove("a"))

        assert await cancel_at_every_await(wait_and_call, check) >= 2


# --- any order of events --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_stress_a_call_never_begins_where_none_is_ready_and_never_waits_where_one_is(seed: int) -> None:
    # Tower's stress test: whatever is inserted, removed, fails or becomes ready
    random = Random(seed)
    known: dict[int, Endpoint] = {}
    waiting: list[Endpoint] = []
    found = Discovery()
    outcomes: list[str] = []
    async with anyio.create_task_group() as tasks, Balance(found.changes, random=random) as call:

        async def one() -> None:
            outcomes.append(await call(0))

        for step in range(2000):
            key = random.randrange(8)
            kind = random.choice(["insert", "remove", "ready", "busy", "busy", "call", "call", "call"])
            if kind == "insert":
                known[key] = Endpoint(str(step), is_ready=random.random() < 0.5)
                found._send.send_nowait(Insert(key, known[key]))
            elif kind == "remove" and key in known:
                waiting.append(known.pop(key))
                found._send.send_nowait(Remove(key))
            elif kind == "ready" and key in known:
                known[key].set_ready(True)
            elif kind == "busy" and key in known and known[key].ready_now():
                known[key].set_ready(False)
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            if kind == "call" and known:
                ready = {id(each) for each in known.values() if each.ready_now()}
                before = {id(each): (each.calls, each.begun) for each in known.values()}
                tasks.start_soon(one)
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                changed = [each for each in known.values() if (each.calls, each.begun) != before[id(each)]]
                assert len(changed) == 1
                assert (id(changed[0]) in ready) is bool(ready)
                begun = changed[0].begun - before[id(changed[0])][1]
                assert begun == (1 if ready else 0)
            assert call.endpoints == known
            assert ready_now(call) is any(each.ready_now() for each in known.values())
        assert len(outcomes) > 300
        tasks.cancel_scope.cancel()
    found.close()


Step = tuple[Literal["insert", "remove", "kill", "call", "cancel", "wait"], int]


@given(st.lists(st.tuples(st.sampled_from(["insert", "remove", "kill", "call", "cancel", "wait"]), st.integers(0, 5))))
@settings(deadline=None, max_examples=150)
async def test_every_caller_gets_its_own_answer_and_every_endpoint_is_left(steps: list[Step]) -> None:
    found = Discovery()
    owners: list[Owner] = []
    current: dict[int, Owner] = {}
    scopes: list[anyio.CancelScope] = []
    outcomes: dict[int, str] = {}
    lost: set[int] = set()

    async def one(request: int, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                outcomes[request] = await call(request)
            except ServiceClosed:
                lost.add(request)

    call = Balance(found.changes, load=PeakEwma())
    try:
        async with call, anyio.create_task_group() as tasks:
            for kind, n in steps:
                if kind == "insert":
                    current[n] = Owner(str(n), seconds=n / 2, entering=n / 4)
                    owners.append(current[n])
                    await found.tell(Insert(n, current[n]))
                elif kind == "remove":
                    await found.tell(Remove(n))
                elif kind == "kill" and n in current and current[n].is_entered:
                    current[n].crash.set()
                elif kind == "call":
                    scopes.append(anyio.CancelScope())
                    tasks.start_soon(one, len(scopes) - 1, scopes[-1])
                elif kind == "cancel" and n < len(scopes):
                    scopes[n].cancel()
                else:
                    await anyio.sleep(n / 4)
                await anyio.lowlevel.checkpoint()
            owners.append(Owner("last"))
            await found.tell(Insert("last", owners[-1]))
    finally:
        found.close()
    for number, scope in enumerate(scopes):
        if number in outcomes:
            assert outcomes[number].endswith(f" {number}")
        elif number in lost:
            assert any(owner.crash.is_set() for owner in owners)
        else:
            assert scope.cancel_called
    assert not any(owner.is_entered for owner in owners)


# --- the class itself -----------------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^5 is no mapping, no sequence and no async iterable of changes$"):
        Balance(5)  # type: ignore[arg-type]  # pyright: ignore
    expected = r", where 'pending' is expected, or a PeakEwma, or a function$"
    with pytest.raises(ValueError, match=r"^load is 'ewma'" + expected):
        Balance([], load="ewma")  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(TypeError, match=r"^load is 1" + expected):
        Balance([], load=1)  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(ValueError, match=r"^on_empty is 'raise', where 'wait' or 'fail' is expected$"):
        Balance([], on_empty="raise")  # type: ignore[arg-type]  # pyright: ignore
    with pytest.raises(TypeError, match=r"^KeyboardInterrupt is no Exception"):
        Balance([], is_dead=KeyboardInterrupt)  # type: ignore[arg-type]  # pyright: ignore


async def test_a_set_of_none_is_no_mistake_and_a_call_to_it_is_rejected() -> None:
    call: Balance[int, str] = Balance([])
    assert repr(call) == "<Balance between no endpoints>"
    with pytest.raises(ServiceUnavailable):
        await call(1)


async def test_it_says_between_what_it_balances() -> None:
    assert repr(Balance({"a": Endpoint("a"), 7: Endpoint("b")})) == "<Balance between 'a', 7>"
    assert Insert("a", 1) == Insert("a", 1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert repr(Remove("a")) == "Remove(key='a')"


async def test_types_are_those_of_the_endpoints() -> None:
    fixed: Service[int, str] = Balance([Endpoint("a"), Endpoint("b")])
    assert await fixed(1) in ("a 1", "b 1")

    async def changes() -> AsyncIterator[Insert[int, str] | Remove]:
        yield Insert("a", Endpoint("a"))

    discovered: Service[int, str] = Balance(changes())
    async with running(discovered):
        assert await discovered(1) == "a 1"


async def test_balances_share_no_state() -> None:
    endpoint = Endpoint("a", seconds=1)
    one, other = Balance([endpoint]), Balance([endpoint])
    async with started(one, 1):
        assert (load(one), load(other)) == (1, 0)
