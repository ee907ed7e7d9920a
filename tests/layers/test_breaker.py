"""The circuit breaker as a layer: scenarios C1 to C11 around real calls, on both event loops in virtual time."""

from __future__ import annotations

import gc
import time
import weakref
from dataclasses import dataclass, field
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import (
    BufferFull,
    CircuitOpen,
    ConnectFailed,
    DeadlineExceeded,
    Elapsed,
    LinkLost,
    MisuseError,
    Overloaded,
    RateLimited,
    ServiceClosed,
    ServiceUnavailable,
)
from towline.hooks import CallShed, GaveUp, Hooks, StateChanged
from towline.layers.breaker import CircuitBreaker, speaks_of_target
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import Backoff, StandardPolicy
from towline.policies.breaker import Breaker, BreakerCounts, BreakerPolicy, BreakerState
from towline.service import Dial, Service, Wrapper, load, ready_now
from towline.testing import MockClock, cancel_at_every_await

CLOSED, OPEN = BreakerState.CLOSED, BreakerState.OPEN
HALF_OPEN, ISOLATED = BreakerState.HALF_OPEN, BreakerState.ISOLATED

BREAKS = Backoff.exponential(initial=5, factor=2, cap=300, first=None, jitter="none")
AT_ONCE = BreakerPolicy(consecutive=1, break_for=BREAKS)
"""Opens at the first failure, for 5 s, 10 s, 20 s and so on."""


@dataclass
class Target:
    """A service that fails while it is told to, and takes as long as it is told to."""

    error: Exception | None = None
    seconds: float = 0.0
    calls: int = 0
    under_way: int = 0
    most: int = 0

    async def __call__(self, request: str, /) -> str:
        self.calls += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await anyio.sleep(self.seconds)
            if self.error is not None:
                raise self.error
            return request.upper()
        finally:
            self.under_way -= 1


@dataclass
class Recorded(Hooks):
    changes: list[StateChanged] = field(default_factory=list[StateChanged])
    shed: list[CallShed] = field(default_factory=list[CallShed])
    gave_up: list[GaveUp] = field(default_factory=list[GaveUp])

    def on_state_change(self, event: StateChanged, /) -> None:
        self.changes.append(event)

    def on_shed(self, event: CallShed, /) -> None:
        self.shed.append(event)

    def on_give_up(self, event: GaveUp, /) -> None:
        self.gave_up.append(event)

    @property
    def steps(self) -> list[tuple[str, str]]:
        return [(change.old, change.new) for change in self.changes]


async def failing(service: Service[str, str], times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(ConnectionResetError):
            await service("hello")


# --- C1 and C2


@pytest.mark.smoke
async def test_c1_opens_at_the_ratio_only_with_min_calls() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(BreakerPolicy(failure_ratio=0.5, min_calls=10))(target)
    await failing(guarded, 9)
    assert guarded.breaker.state is CLOSED
    await failing(guarded)
    assert guarded.breaker.state is OPEN
    assert target.calls == 10


async def test_c2_an_open_one_rejects_at_once_without_calling_and_says_when_to_come_back() -> None:
    target = Target(ConnectionResetError(), seconds=1)
    guarded = CircuitBreaker(AT_ONCE, name="db")(target)
    await failing(guarded)
    await anyio.sleep(1.5)
    began = anyio.current_time()
    with pytest.raises(CircuitOpen) as caught:
        await guarded("hello")
    assert anyio.current_time() == began
    assert target.calls == 1
    assert caught.value.retry_after == pytest.approx(3.5)
    assert str(caught.value) == "circuit 'db' is open (failures in a row: 1, limit: 1); next try in 3.5 s"
    assert caught.value.retryable is False
    assert caught.value.sent is False


async def test_c2_every_caller_gets_an_error_of_its_own() -> None:
    guarded = CircuitBreaker(AT_ONCE)(Target(ConnectionResetError()))
    await failing(guarded)
    errors: list[CircuitOpen] = []
    for _ in range(3):
        with pytest.raises(CircuitOpen) as caught:
            await guarded("hello")
        errors.append(caught.value)
    assert len({id(error) for error in errors}) == 3
    assert all(error.__cause__ is None and error.__context__ is None for error in errors)


async def test_c2_who_waits_for_retry_after_is_let_through() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    await anyio.sleep(0.1)
    await failing(guarded)
    await anyio.sleep(0.7)
    with pytest.raises(CircuitOpen) as caught:
        await guarded("hello")
    target.error = None
    assert caught.value.retry_after is not None
    await anyio.sleep(caught.value.retry_after)
    assert await guarded("hello") == "HELLO"


async def test_what_is_passed_through_is_the_response_and_the_error_itself() -> None:
    error = ConnectionResetError()
    target = Target()
    guarded = CircuitBreaker()(target)
    assert await guarded("hello") == "HELLO"
    target.error = error
    with pytest.raises(ConnectionResetError) as caught:
        await guarded("hello")
    assert caught.value is error


async def test_it_guards_connecting_too() -> None:
    async def refuse(dial: Dial, /) -> None:
        raise ConnectFailed("refused")

    guarded = CircuitBreaker(AT_ONCE)(refuse)
    with pytest.raises(ConnectFailed):
        await guarded(Dial(Endpoint.parse("tcp://localhost:7000")))
    with pytest.raises(CircuitOpen, match=r"^circuit 'refuse' is open"):
        await guarded(Dial(Endpoint.parse("tcp://localhost:7000")))


# --- C3 and C4


@pytest.mark.parametrize("most", [1, 3])
async def test_c3_after_the_break_exactly_half_open_max_calls_are_made_and_all_others_rejected(most: int) -> None:
    # Polly#216: what waited for the break must not fall upon the target all at once.
    target = Target(ConnectionResetError())
    policy = BreakerPolicy(consecutive=1, break_for=BREAKS, half_open_max=most, half_open_successes=most)
    guarded = CircuitBreaker(policy)(target)
    await failing(guarded)
    await anyio.sleep(5)
    target.error, target.seconds, target.calls = None, 2.0, 0
    outcomes: list[object] = []

    async def call() -> None:
        try:
            outcomes.append(await guarded("hello"))
        except CircuitOpen as error:
            outcomes.append(error.retry_after)

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(call)
        await anyio.sleep(1)
        assert (target.calls, target.most) == (most, most)
        assert outcomes == [None] * (100 - most)
        assert guarded.breaker.state is HALF_OPEN
    assert outcomes.count("HELLO") == most
    assert guarded.breaker.state is CLOSED


async def test_c3_a_stampede_on_a_target_that_is_still_down_is_one_call_per_break() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    await failing(guarded)
    for seconds in (5, 10, 20, 40):
        await anyio.sleep(seconds)
        target.calls = 0
        outcomes: list[type[Exception]] = []

        async def call(outcomes: list[type[Exception]] = outcomes) -> None:
            try:
                await guarded("hello")
            except Exception as error:
                outcomes.append(type(error))

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(call)
        assert target.calls == 1
        assert sorted(each.__name__ for each in outcomes) == ["CircuitOpen"] * 49 + ["ConnectionResetError"]
        assert guarded.breaker.retry_after == pytest.approx(2 * seconds)


async def test_c4_a_success_closes_and_clears_and_a_failure_opens_for_longer() -> None:
    target = Target(ConnectionResetError())
    hooks = Recorded()
    guarded = CircuitBreaker(BreakerPolicy(min_calls=2, break_for=BREAKS), hooks=hooks)(target)
    await failing(guarded, 2)
    assert guarded.breaker.retry_after == pytest.approx(5)
    await anyio.sleep(5)
    await failing(guarded)
    assert guarded.breaker.retry_after == pytest.approx(10)
    await anyio.sleep(10)
    target.error = None
    await guarded("hello")
    assert guarded.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)
    target.error = ConnectionResetError()
    await failing(guarded)
    assert guarded.breaker.state is CLOSED
    await failing(guarded)
    assert guarded.breaker.retry_after == pytest.approx(5)
    assert hooks.steps == [
        ("closed", "open"),
        ("open", "half_open"),
        ("half_open", "open"),
        ("open", "half_open"),
        ("half_open", "closed"),
        ("closed", "open"),
    ]


# --- C5: cancellation


async def test_c5_a_probe_that_is_cancelled_at_any_await_frees_its_place() -> None:
    clock = MockClock()
    target = Target(ConnectionResetError())

    async def slow(request: str, /) -> str:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        return await target(request)

    guarded = CircuitBreaker(AT_ONCE, clock=clock)(slow)

    async def probe() -> None:
        guarded.breaker.close()
        target.error = ConnectionResetError()
        await failing(guarded)
        clock.advance(5)
        target.error = None
        await guarded("hello")

    async def check() -> None:
        assert guarded.breaker.counts.probes == 0
        assert guarded.breaker.ready_now() or guarded.breaker.state is OPEN

    assert await cancel_at_every_await(probe, check) >= 8


async def test_c5_after_a_cancelled_probe_the_next_call_is_the_probe() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    await failing(guarded)
    await anyio.sleep(5)
    target.error, target.seconds = None, 3600
    with anyio.move_on_after(1):
        await guarded("hello")
    assert guarded.breaker.state is HALF_OPEN
    assert guarded.breaker.counts.probes == 0
    target.seconds = 0
    assert await guarded("hello") == "HELLO"
    assert guarded.breaker.state is CLOSED


async def test_c5_a_probe_with_an_error_that_is_no_failure_frees_its_place() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    await failing(guarded)
    await anyio.sleep(5)
    target.error = MisuseError("wrong call")
    for _ in range(3):
        with pytest.raises(MisuseError):
            await guarded("hello")
        assert guarded.breaker.state is HALF_OPEN
        assert guarded.breaker.counts.probes == 0


@pytest.mark.parametrize("where", ["is_failure", "is_failure_result"])
async def test_c5_a_predicate_that_raises_frees_the_place_of_its_probe(where: str) -> None:
    def broken(outcome: object) -> bool:
        raise ZeroDivisionError

    target = Target(ConnectionResetError())
    breaker = Breaker(AT_ONCE, random=Random())
    await failing(CircuitBreaker(breaker)(target))
    await anyio.sleep(5)
    if where == "is_failure_result":
        target.error = None
    predicate: dict[str, Any] = {where: broken}  # Any: either takes it
    with pytest.raises(ZeroDivisionError):
        await CircuitBreaker(breaker, **predicate)(target)("hello")
    assert breaker.state is HALF_OPEN
    assert breaker.counts.probes == 0


async def test_c5_a_call_that_is_dropped_frees_its_place() -> None:
    guarded = CircuitBreaker(AT_ONCE)(Target(ConnectionResetError()))
    await failing(guarded)
    await anyio.sleep(5)
    probe = guarded("hello")
    probe.send(None)
    assert guarded.breaker.counts.probes == 1
    probe.close()
    assert guarded.breaker.counts.probes == 0


# --- C6: late results


@pytest.mark.parametrize("error", [None, ConnectionResetError()])
async def test_c6_a_late_result_from_before_it_opened_is_passed_on_and_changes_nothing(error: Exception | None) -> None:
    hooks = Recorded()
    target = Target(ConnectionResetError())
    late = Target(error, seconds=4)
    later = Target(error, seconds=6)

    async def route(request: str, /) -> str:
        return await {"late": late, "later": later}.get(request, target)(request)

    guarded = CircuitBreaker(AT_ONCE, hooks=hooks)(route)
    outcomes: list[object] = []

    async def call(request: str) -> None:
        try:
            outcomes.append(await guarded(request))
        except Exception as raised:
            outcomes.append(raised)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call, "late")
        tasks.start_soon(call, "later")
        await anyio.lowlevel.checkpoint()
        await failing(guarded)
        await anyio.sleep(4.5)
        assert len(outcomes) == 1
        assert guarded.breaker.state is OPEN
        assert guarded.breaker.retry_after == pytest.approx(0.5)
        await anyio.sleep(0.5)
        target.error, target.seconds = None, 2
        tasks.start_soon(call, "probe")
        await anyio.sleep(1.5)
        assert len(outcomes) == 2
        assert guarded.breaker.state is HALF_OPEN
        assert guarded.breaker.counts.probes == 1
    assert guarded.breaker.state is CLOSED
    assert hooks.steps == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]
    if error is None:
        assert outcomes == ["LATE", "LATER", "PROBE"]
    else:
        assert outcomes == [error, error, "PROBE"]


# --- C7


async def test_c7_the_window_forgets() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(BreakerPolicy(min_calls=10, window=30))(target)
    await failing(guarded, 9)
    await anyio.sleep(30)
    await failing(guarded, 9)
    assert guarded.breaker.state is CLOSED
    await failing(guarded)
    assert guarded.breaker.state is OPEN


async def test_c7_time_is_that_of_the_event_loop_and_not_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def wall_clock() -> float:
        raise AssertionError("nobody needs to know what day it is")

    monkeypatch.setattr(time, "time", wall_clock)
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    await failing(guarded)
    target.error = None
    await anyio.sleep(4.99)
    assert guarded.breaker.state is OPEN
    await anyio.sleep(0.01)
    assert await guarded("hello") == "HELLO"


async def test_c7_a_window_of_calls() -> None:
    target = Target()
    guarded = CircuitBreaker(BreakerPolicy(count=4, min_calls=4))(target)
    for _ in range(10):
        await guarded("hello")
    target.error = ConnectionResetError()
    await failing(guarded)
    assert guarded.breaker.state is CLOSED
    await failing(guarded)
    assert guarded.breaker.state is OPEN


# --- C8: what counts


NO_FAILURES: list[Exception] = [
    MisuseError("wrong call"),
    BufferFull(1, 1),
    Overloaded("full"),
    RateLimited("too many", 1.0),
    CircuitOpen("further inside"),
    ServiceUnavailable("nothing there"),
    ServiceClosed("closed"),
    anyio.ClosedResourceError(),
    DeadlineExceeded(1.0, sent=False),
    ExceptionGroup("both", [MisuseError("wrong call"), ServiceClosed("closed")]),
]
FAILURES: list[Exception] = [
    ConnectionResetError(),
    LinkLost("cut"),
    ConnectFailed("refused"),
    Elapsed(1.0),
    DeadlineExceeded(1.0),
    TimeoutError(),
    ValueError("what the target answered made no sense"),
    ExceptionGroup("one", [MisuseError("wrong call"), ExceptionGroup("inner", [LinkLost("cut")])]),
]


@pytest.mark.parametrize("error", NO_FAILURES, ids=repr)
async def test_c8_an_error_that_arose_on_this_side_is_no_failure(error: Exception) -> None:
    guarded = CircuitBreaker(AT_ONCE)(Target(error))
    for _ in range(20):
        with pytest.raises(type(error)) as caught:
            await guarded("hello")
        assert caught.value is error
    assert guarded.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)


@pytest.mark.parametrize("error", FAILURES, ids=repr)
async def test_c8_every_other_error_is_a_failure(error: Exception) -> None:
    guarded = CircuitBreaker(AT_ONCE)(Target(error))
    with pytest.raises(type(error)):
        await guarded("hello")
    assert guarded.breaker.state is OPEN


def is_connection_error(error: Exception) -> bool:
    assert not isinstance(error, ExceptionGroup)  # it is asked for each leaf
    return isinstance(error, ConnectionError)


@pytest.mark.parametrize("is_failure", [ConnectionError, (ConnectionError, EOFError), is_connection_error])
async def test_c8_only_the_errors_that_is_failure_names_are_counted(is_failure: Any) -> None:
    target = Target(LookupError("no such thing, says the target"))
    guarded = CircuitBreaker(AT_ONCE, is_failure=is_failure)(target)
    for _ in range(20):
        with pytest.raises(LookupError):
            await guarded("hello")
    assert guarded.breaker.counts.calls == 0
    target.error = ExceptionGroup("one", [LookupError(), ConnectionResetError()])
    with pytest.raises(ExceptionGroup):
        await guarded("hello")
    assert guarded.breaker.state is OPEN


async def test_c8_cancelled_calls_are_not_counted() -> None:
    # The mistake of breakers that catch BaseException: a client that hangs up trips them.
    guarded = CircuitBreaker(AT_ONCE)(Target(seconds=10))
    for _ in range(20):
        with anyio.move_on_after(1) as scope:
            await guarded("hello")
        assert scope.cancelled_caught
    assert guarded.breaker.state is CLOSED
    assert guarded.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
async def test_c8_what_ends_the_program_is_not_counted(ending: type[BaseException]) -> None:
    async def end(request: str, /) -> str:
        raise ending

    guarded = CircuitBreaker(AT_ONCE)(end)
    with pytest.raises(ending):
        await guarded("hello")
    assert guarded.breaker.counts == BreakerCounts(0, 0, 0, 0, 0)


def test_c8_the_default_can_be_asked() -> None:
    assert speaks_of_target(ConnectionResetError())
    assert not speaks_of_target(MisuseError("wrong call"))


async def test_c8_a_timeout_inside_makes_calls_that_hang_failures() -> None:
    guarded = CircuitBreaker(AT_ONCE)(Timeout(1.0)(Target(seconds=3600)))
    with pytest.raises(Elapsed):
        await guarded("hello")
    assert guarded.breaker.state is OPEN


async def test_c8_a_response_may_be_a_failure_and_is_passed_on_all_the_same() -> None:
    async def answer(status: int, /) -> int:
        return status

    policy = BreakerPolicy(min_calls=2, break_for=BREAKS)
    guarded = CircuitBreaker(policy, is_failure_result=lambda status: status >= 500)(answer)
    assert await guarded(500) == 500
    assert await guarded(404) == 404
    assert guarded.breaker.counts == BreakerCounts(calls=2, failures=1, slow=0, consecutive=0, probes=0)
    assert await guarded(503) == 503
    assert guarded.breaker.state is OPEN


async def test_c8_what_is_failure_result_answers_is_taken_for_true_or_false() -> None:
    async def answer(text: str, /) -> str:
        return text

    def why_bad(response: str) -> Any:  # Any: it should be a bool, and is none
        return {"bad": "because"}.get(response)

    guarded = CircuitBreaker(BreakerPolicy(), is_failure_result=why_bad)(answer)
    await guarded("good")
    await guarded("bad")
    assert guarded.breaker.counts[:2] == (2, 1)


# --- C9: by hand


async def test_c9_a_shared_breaker_is_controlled_by_hand() -> None:
    hooks = Recorded()
    breaker = Breaker(BreakerPolicy(), name="db", random=Random())
    target = Target()
    guarded = CircuitBreaker(breaker, hooks=hooks)(target)
    assert guarded.breaker is breaker
    breaker.isolate("maintenance")
    with pytest.raises(CircuitOpen, match=r"^circuit 'db' is isolated \(maintenance\)$") as caught:
        await guarded("hello")
    assert caught.value.retry_after is None
    await anyio.sleep(80_000)
    with pytest.raises(CircuitOpen):
        await guarded("hello")
    assert target.calls == 0
    breaker.close()
    assert await guarded("hello") == "HELLO"
    assert hooks.changes == [
        StateChanged("db", "closed", "isolated", "maintenance"),
        StateChanged("db", "isolated", "closed", "by hand"),
    ]


async def test_c9_services_that_share_a_breaker_share_its_state_and_their_hooks_are_told_once() -> None:
    hooks, others = Recorded(), Recorded()
    breaker = Breaker(AT_ONCE, name="db", random=Random())
    layer = CircuitBreaker(breaker, hooks=hooks)
    broken, sound = layer(Target(ConnectionResetError())), layer(Target())
    CircuitBreaker(breaker, hooks=others)(Target())
    await failing(broken)
    with pytest.raises(CircuitOpen):
        await sound("hello")
    assert hooks.changes == others.changes == [StateChanged("db", "closed", "open", "failures in a row: 1, limit: 1")]
    assert len(hooks.shed) == 1
    assert others.shed == []


async def test_c9_hooks_that_are_equal_but_not_the_same_are_both_told() -> None:
    breaker = Breaker(AT_ONCE, random=Random())
    hooks, twin = Recorded(), Recorded()
    assert hooks == twin
    for each in (hooks, twin):
        CircuitBreaker(breaker, hooks=each)(Target())
    breaker.isolate()
    assert hooks.steps == twin.steps == [("closed", "isolated")]


async def test_one_layer_value_gives_every_service_a_breaker_of_its_own() -> None:
    hooks = Recorded()
    layer = CircuitBreaker(AT_ONCE, hooks=hooks)
    broken, sound = layer(Target(ConnectionResetError())), layer(Target())
    await failing(broken)
    assert await sound("hello") == "HELLO"
    assert (broken.breaker.state, sound.breaker.state) == (OPEN, CLOSED)
    assert len(hooks.changes) == 1


# --- C10: under Retry


async def test_c10_retry_stops_when_it_opens() -> None:
    hooks = Recorded()
    target = Target(LinkLost("cut"))
    policy = StandardPolicy(Backoff.constant(1, jitter="none"), max_attempts=10)
    breaker = BreakerPolicy(consecutive=3, break_for=BREAKS)
    guarded = CircuitBreaker(breaker, name="db", hooks=hooks)(target)
    began = anyio.current_time()
    with pytest.raises(CircuitOpen):
        await Retry(policy, hooks=hooks)(guarded)("hello")
    assert target.calls == 3
    assert anyio.current_time() - began == pytest.approx(3)
    assert hooks.changes == [StateChanged("db", "closed", "open", "failures in a row: 3, limit: 3")]
    assert [event.layer for event in hooks.shed] == ["CircuitBreaker"]
    assert [(event.attempts, event.reason) for event in hooks.gave_up] == [(4, "breaker")]
    assert hooks.gave_up[0].error is hooks.shed[0].error

    with pytest.raises(CircuitOpen):  # and from then on at once
        await Retry(policy, hooks=hooks)(guarded)("hello")
    assert target.calls == 3
    assert anyio.current_time() - began == pytest.approx(3)
    assert len(hooks.changes) == 1


async def test_c10_with_wait_when_open_retry_waits_for_the_next_try() -> None:
    hooks = Recorded()
    target = Target(LinkLost("cut"))
    policy = StandardPolicy(
        Backoff.constant(1, jitter="none"), max_attempts=10, on=(LinkLost, CircuitOpen), wait_when_open=True
    )
    guarded = CircuitBreaker(BreakerPolicy(consecutive=3, break_for=BREAKS), hooks=hooks)(target)
    outcomes: list[str] = []

    async def call() -> None:
        outcomes.append(await Retry(policy)(guarded)("hello"))

    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await anyio.sleep(4)  # failed at 0, 1 and 2; turned away at 3, to come back at 7
        assert target.calls == 3
        target.error = None
    assert outcomes == ["HELLO"]
    assert target.calls == 4
    assert anyio.current_time() - began == pytest.approx(7)
    assert hooks.steps == [("closed", "open"), ("open", "half_open"), ("half_open", "closed")]


async def test_c10_around_retry_it_would_see_three_failures_as_one() -> None:
    target = Target(LinkLost("cut"))
    retrying = Retry(StandardPolicy(Backoff.constant(0, jitter="none"), budget=None))
    outside = CircuitBreaker(BreakerPolicy(consecutive=3))(retrying(target))
    for _ in range(2):
        with pytest.raises(LinkLost):
            await outside("hello")
    assert target.calls == 6
    assert outside.breaker.state is CLOSED


async def test_c10_hooks_that_raise_harm_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hooks):
        def on_state_change(self, event: StateChanged, /) -> None:
            raise ZeroDivisionError

        def on_shed(self, event: CallShed, /) -> None:
            raise ZeroDivisionError

    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE, hooks=Broken())(target)
    await failing(guarded)
    with pytest.raises(CircuitOpen):
        await guarded("hello")
    await anyio.sleep(5)
    target.error = None
    assert await guarded("hello") == "HELLO"
    assert len(caplog.records) == 4


# --- C11: recovery


async def test_c11_constant_traffic_still_recovers() -> None:
    # spring-retry#99: a clock that starts anew with every call that is turned away never lets one through.
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    began = anyio.current_time()
    await failing(guarded)
    target.error = None
    rejected = 0
    while True:
        await anyio.sleep(0.125)
        try:
            await guarded("hello")
            break
        except CircuitOpen:
            rejected += 1
    assert rejected == 39
    assert anyio.current_time() - began == pytest.approx(5)
    assert guarded.breaker.state is CLOSED


# --- slow calls


async def test_slow_calls_open_it_though_they_succeed() -> None:
    target = Target(seconds=2.5)
    guarded = CircuitBreaker(BreakerPolicy(slow_call=2, slow_ratio=0.5, min_calls=4, break_for=BREAKS))(target)
    await guarded("hello")
    target.seconds = 1
    await guarded("hello")
    await guarded("hello")
    target.seconds = 2.5
    assert guarded.breaker.state is CLOSED
    assert await guarded("hello") == "HELLO"
    assert guarded.breaker.state is OPEN
    await anyio.sleep(5)
    assert await guarded("hello") == "HELLO"  # still slow
    assert guarded.breaker.retry_after == pytest.approx(10)


# --- the layer


async def test_ready_now_is_false_while_calls_would_be_turned_away() -> None:
    target = Target(ConnectionResetError())
    guarded = CircuitBreaker(AT_ONCE)(target)
    assert ready_now(guarded)
    await failing(guarded)
    assert not ready_now(guarded)
    await anyio.sleep(5)
    assert ready_now(guarded)
    target.error, target.seconds = None, 10
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(guarded, "hello")
        await anyio.sleep(1)
        assert not ready_now(guarded)  # the probe is under way
    assert ready_now(guarded)
    guarded.breaker.isolate()
    assert not ready_now(guarded)


async def test_ready_now_and_load_are_those_of_the_service_inside_too() -> None:
    class Busy(Wrapper[str, str]):
        async def __call__(self, request: str, /) -> str:
            return request

        def ready_now(self) -> bool:
            return False

        def load(self) -> float:
            return 7.0

    guarded = CircuitBreaker()(Busy(Target()))
    assert not ready_now(guarded)
    assert load(guarded) == 7.0


def test_it_is_named_after_the_function_inside_unless_it_is_told_otherwise() -> None:
    async def lookup(request: str, /) -> str:
        return request

    assert CircuitBreaker()(lookup).breaker.name == "lookup"
    assert CircuitBreaker(name="db")(lookup).breaker.name == "db"
    assert CircuitBreaker(name="")(lookup).breaker.name == ""
    assert CircuitBreaker()(Target()).breaker.name == ""


def test_the_clock_and_the_generator_that_it_is_given_are_used() -> None:
    clock = MockClock(100)
    layer = CircuitBreaker(
        BreakerPolicy(consecutive=1, break_for=Backoff.constant(100, jitter="full")), clock=clock, random=Random(7)
    )
    breaker = layer(Target()).breaker
    call = breaker.admit()
    assert call is not None
    breaker.end(call, True)
    assert breaker.retry_after == pytest.approx(100 * Random(7).random())
    clock.advance(100)
    assert breaker.state is HALF_OPEN


async def test_a_function_that_is_not_async_is_not_guarded_silently() -> None:
    def sync(request: str, /) -> str:
        return request

    with pytest.raises(TypeError):
        await CircuitBreaker()(sync)("hello")  # type: ignore[arg-type]  # pyright: ignore


@pytest.mark.parametrize("policy", [None, 5, Backoff.constant(1), CircuitBreaker()])
def test_what_is_neither_a_policy_nor_a_breaker_is_refused(policy: Any) -> None:
    with pytest.raises(TypeError, match=r"^CircuitBreaker takes a BreakerPolicy or a Breaker, not "):
        CircuitBreaker(policy)


def test_a_name_for_a_breaker_that_has_one_is_refused() -> None:
    breaker = Breaker(BreakerPolicy(), name="db", random=Random())
    with pytest.raises(ValueError, match=r"^name is 'cache', but the breaker is called 'db' already$"):
        CircuitBreaker(breaker, name="cache")


@pytest.mark.parametrize("is_failure", [5, KeyboardInterrupt, (OSError, 5), (OSError, BaseException)])
def test_what_names_no_errors_is_refused(is_failure: Any) -> None:
    with pytest.raises(TypeError):
        CircuitBreaker(is_failure=is_failure)


def test_layers_are_values() -> None:
    assert CircuitBreaker(AT_ONCE, name="db") == CircuitBreaker(AT_ONCE, name="db") != CircuitBreaker(AT_ONCE)
    assert "policy=BreakerPolicy(" in repr(CircuitBreaker(AT_ONCE))
    assert CircuitBreaker.client_only
    with pytest.raises(AttributeError):
        CircuitBreaker().name = "db"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_its_repr_names_what_is_inside() -> None:
    async def lookup(request: str, /) -> str:
        return request

    assert repr(CircuitBreaker()(lookup)) == "<Guarded around lookup>"


async def test_nothing_keeps_an_error_alive() -> None:
    target = Target(seconds=0)

    async def fail(request: str, /) -> str:
        raise LinkLost("cut")

    guarded = CircuitBreaker(AT_ONCE, hooks=Hooks())(fail)
    gone: list[weakref.ref[Exception]] = []
    gc.disable()
    try:
        for _ in range(2):  # a failure, then a rejection
            try:
                await guarded("hello")
            except (LinkLost, CircuitOpen) as error:
                gone.append(weakref.ref(error))
        assert [each() for each in gone] == [None, None]
    finally:
        gc.enable()
    assert target.calls == 0
