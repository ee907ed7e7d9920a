"""The Reconnect layer: one connection for all calls, made again when it is lost (scenarios N1-N8)."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.endpoint import Endpoint
from towline.errors import (
    CircuitOpen,
    ConnectFailed,
    ConnectionLost,
    HandshakeRefused,
    LossReason,
    MisuseError,
    ServiceClosed,
    SessionLost,
    UnknownHost,
)
from towline.hooks import Hooks, StateChanged
from towline.layers import CONNECTION_OVER, Balance, Buffer, ConnectionState, LoadShed, Reconnect, Retry, Timeout
from towline.layers.reconnect import TRANSITIONS
from towline.policies import Backoff, ConcurrencyBudget, StandardPolicy, TpsBudget
from towline.service import Dial, Wrapper, ready_now, refuses_now
from towline.testing import cancel_at_every_await


class Connection:
    """Answers with its own number, unless it is told what to raise; knows when it was entered and left."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.entered = self.left = 0
        self.error: Exception | None = None
        self.takes = 0.0
        self.leaving_takes = 0.0
        self.calls = 0

    async def __call__(self, request: str, /) -> int:
        self.calls += 1
        await anyio.sleep(self.takes)
        if self.error is not None:
            raise self.error
        return self.number

    async def __aenter__(self) -> Self:
        await anyio.lowlevel.checkpoint()
        self.entered += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            await anyio.sleep(self.leaving_takes)
        finally:
            self.left += 1


class Closing(Connection):
    """A connection that says when it is closed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.closed = anyio.Event()

    async def wait_closing(self) -> None:
        await self.closed.wait()


class Target:
    """What connects: with each of ``outcomes`` in turn, an error or None for a connection; then always."""

    def __init__(
        self,
        *outcomes: Exception | None,
        takes: float = 0.0,
        make: Callable[[int], Connection] = Connection,
    ) -> None:
        self.outcomes = list(outcomes)
        self.takes = takes
        self.make = make
        self.attempts: list[float] = []  # when each began
        self.cancelled = 0
        self.running = self.most_running = 0
        self.connections: list[Connection] = []

    async def __call__(self, target: object, /) -> Connection:
        self.attempts.append(anyio.current_time())
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await anyio.sleep(self.takes)
        except BaseException:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        outcome = self.outcomes.pop(0) if self.outcomes else None
        if outcome is not None:
            raise outcome
        self.connections.append(self.make(len(self.connections) + 1))
        return self.connections[-1]

    @property
    def gaps(self) -> list[float]:
        """Seconds from one attempt to the next."""
        return [round(after - before, 6) for before, after in pairwise(self.attempts)]


@dataclass
class Told(Hooks):
    changes: list[StateChanged] = field(default_factory=list[StateChanged])

    def on_state_change(self, event: StateChanged, /) -> None:
        self.changes.append(event)

    @property
    def states(self) -> list[str]:
        return [change.new for change in self.changes]


EXPONENTIAL = Backoff.exponential(initial=1, cap=8, jitter="none", first=None)
"""1, 2, 4, 8, 8 ... seconds"""

STEADY = Backoff.constant(1, jitter="none")
A_MINUTE = Backoff.constant(60, jitter="none")


def lost(*, sent: bool | None = True) -> ConnectionLost:
    error = ConnectionLost("the link broke")
    error.sent = sent
    return error


@asynccontextmanager
async def calls_of(service: Wrapper[str, int]) -> AsyncGenerator[Calls]:
    async with anyio.create_task_group() as tasks, service:
        yield Calls(service, tasks)


@dataclass
class Calls:
    """Calls in tasks of their own, and what came of each."""

    service: Wrapper[str, int]
    tasks: anyio.abc.TaskGroup
    answers: list[int] = field(default_factory=list[int])
    errors: list[Exception] = field(default_factory=list[Exception])
    scopes: list[anyio.CancelScope] = field(default_factory=list[anyio.CancelScope])

    async def start(self, count: int = 1) -> None:
        for _ in range(count):
            scope = anyio.CancelScope()
            self.scopes.append(scope)
            self.tasks.start_soon(self._call, scope)
        await wait_all_tasks_blocked()

    async def _call(self, scope: anyio.CancelScope) -> None:
        with scope:
            try:
                self.answers.append(await self.service("hello"))
            except Exception as error:
                self.errors.append(error)


# --- one connection after another -----------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_n1_after_a_loss_calls_go_to_a_new_connection() -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY)(target) as call:
        assert [await call("a"), await call("b")] == [1, 1]
        target.connections[0].error = lost()
        with pytest.raises(ConnectionLost):
            await call("c")
        assert [await call("d"), await call("e")] == [2, 2]
        assert [each.calls for each in target.connections] == [3, 2]


async def test_n1_of_a_connection_that_says_so_itself_the_loss_is_known_without_a_call() -> None:
    target = Target(make=Closing)
    async with Reconnect("db", backoff=STEADY)(target) as call:
        assert await call("a") == 1
        first = target.connections[0]
        assert isinstance(first, Closing)
        first.closed.set()
        await wait_all_tasks_blocked()
        assert call.state is ConnectionState.IDLE
        assert await call("b") == 2
        assert first.calls == 1


async def test_n1_also_through_layers_around_the_connection() -> None:
    target = Target(make=Closing)

    async def connect(name: str, /) -> Wrapper[str, int]:
        return Retry()(Timeout(60)(await target(name)))

    async with Reconnect("db", backoff=STEADY)(connect) as call:
        assert await call("a") == 1
        first = target.connections[0]
        assert isinstance(first, Closing)
        first.closed.set()
        await wait_all_tasks_blocked()
        assert await call("b") == 2


@pytest.mark.parametrize(
    "error",
    [
        ConnectionLost("cut"),
        ServiceClosed("closed"),
        SessionLost(LossReason.EXPIRED),
        ConnectionResetError(),
        BrokenPipeError(),
        EOFError(),
        anyio.EndOfStream(),
        anyio.IncompleteRead(),
        anyio.BrokenResourceError(),
        anyio.ClosedResourceError(),
        ExceptionGroup("both", [EOFError(), ConnectionResetError()]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_says_that_a_connection_is_over_by_default(error: Exception) -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY)(target) as call:
        await call("a")
        target.connections[0].error = error
        # Unless it was not sent, and waits; and that a connection is closed does not mean that this is.
        expected = ConnectionLost if isinstance(error, anyio.ClosedResourceError) else type(error)
        with anyio.move_on_after(0.5), pytest.raises(expected):
            await call("b")
        assert await call("c") == 2


@pytest.mark.parametrize(
    "error", [ValueError(), TimeoutError(), OSError(), ExceptionGroup("one", [EOFError(), ValueError()])]
)
async def test_other_errors_are_the_calls_own(error: Exception) -> None:
    target = Target()
    async with Reconnect("db")(target) as call:
        await call("a")
        target.connections[0].error = error
        with pytest.raises(type(error)) as raised:
            await call("b")
        assert raised.value is error
        target.connections[0].error = None
        assert await call("c") == 1


async def test_which_errors_say_so_can_be_said() -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY, on=KeyError)(target) as call:
        await call("a")
        for error, number in [(EOFError(), 1), (KeyError(), 2)]:
            target.connections[-1].error = error
            with pytest.raises(type(error)):
                await call("b")
            target.connections[0].error = None
            assert await call("c") == number


# --- attempts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [1, 2, 3, 6])
async def test_n2_the_pauses_follow_the_backoff_and_fifty_callers_share_each_attempt(failures: int) -> None:
    target = Target(*(ConnectionRefusedError() for _ in range(failures)), takes=0.25)
    async with calls_of(Reconnect("db", backoff=EXPONENTIAL)(target)) as calls:
        await calls.start(50)
        await anyio.sleep(60)
        assert calls.answers == [1] * 50
    assert target.most_running == 1
    assert target.gaps == [0.25 + pause for pause in [1, 2, 4, 8, 8, 8][:failures]]


async def test_the_first_attempt_waits_for_nothing() -> None:
    target = Target()
    began = anyio.current_time()
    async with Reconnect("db", backoff=A_MINUTE)(target) as call:
        assert await call("a") == 1
        assert anyio.current_time() == began


async def test_n3_a_connection_that_was_good_begins_the_backoff_anew() -> None:
    target = Target(*(ConnectionRefusedError() for _ in range(4)))
    async with Reconnect("db", backoff=EXPONENTIAL, healthy_after=5)(target) as call:
        assert await call("a") == 1
        await anyio.sleep(5)
        target.connections[0].error = lost(sent=False)
        began = anyio.current_time()
        assert await call("b") == 2
        assert anyio.current_time() - began == 1


@pytest.mark.parametrize("lasts", [0, 4.9])
async def test_n3_one_that_did_not_last_goes_on_in_it(lasts: float) -> None:
    target = Target()
    async with Reconnect("db", backoff=EXPONENTIAL, healthy_after=5)(target) as call:
        for pause in (0, 1, 2, 4, 8, 8):
            began = anyio.current_time()
            await call("a")
            assert anyio.current_time() - began == pytest.approx(pause)
            await anyio.sleep(lasts)
            target.connections[-1].error = lost()
            with pytest.raises(ConnectionLost):
                await call("b")


async def test_n3_one_that_never_answered_goes_on_in_it_however_long_it_lasted() -> None:
    def mute(number: int) -> Connection:
        connection = Connection(number)
        connection.takes, connection.error = 60, lost()
        return connection

    target = Target(make=mute)
    async with Reconnect("db", backoff=EXPONENTIAL, healthy_after=5)(target) as call:
        for _ in range(5):
            with pytest.raises(ConnectionLost):
                await call("a")
    assert target.gaps == [60 + pause for pause in (1, 2, 4, 8)]


async def test_n3_a_timeout_is_no_answer_and_an_error_of_the_application_is_one() -> None:
    for error, pause in [(TimeoutError(), 4), (ValueError(), 1)]:
        target = Target(ConnectionRefusedError(), ConnectionRefusedError())
        async with Reconnect("db", backoff=EXPONENTIAL, healthy_after=5)(target) as call:
            with anyio.move_on_after(4):
                await call("only there to connect")
            connection = target.connections[0]
            connection.has_answered = False  # type: ignore[attr-defined]
            assert call._connection is not None
            call._connection.has_answered = False
            connection.error = error
            with pytest.raises(type(error)):
                await call("a")
            await anyio.sleep(5)
            connection.error = lost(sent=False)
            began = anyio.current_time()
            await call("b")
            assert anyio.current_time() - began == pause


async def test_n3_one_that_nobody_called_is_good_when_it_lasted() -> None:
    target = Target(*(ConnectionRefusedError() for _ in range(4)), make=Closing)
    async with Reconnect("db", backoff=EXPONENTIAL, eager=True, healthy_after=5)(target):
        await anyio.sleep(100)
        first = target.connections[0]
        assert isinstance(first, Closing)
        at = anyio.current_time()
        first.closed.set()
        await anyio.sleep(100)
        assert target.attempts[-1] == at + 1


async def test_a_target_that_drops_what_it_accepts_is_not_asked_in_a_hot_loop() -> None:
    def dead(number: int) -> Connection:
        connection = Connection(number)
        connection.error = lost(sent=False)
        return connection

    target = Target(make=dead)
    async with Reconnect("db", backoff=EXPONENTIAL)(target) as call:
        with anyio.move_on_after(1000) as scope:
            await call("a")
        assert scope.cancelled_caught
    assert len(target.attempts) <= 1000 / 8 + 4


async def test_an_error_may_ask_for_a_longer_pause_but_for_none_without_end() -> None:
    errors = [ConnectFailed("later"), ConnectFailed("soon"), ConnectFailed("never")]
    for error, asked in zip(errors, (30, 0.1, math.inf), strict=True):
        error.retry_after = asked
    target = Target(*errors)
    async with Reconnect("db", backoff=EXPONENTIAL)(target) as call:
        assert await call("a") == 1
    assert target.gaps == [30, 2, 300]


# --- cancellation and closing -----------------------------------------------------------------------------------------


async def test_n4_a_caller_that_is_cancelled_takes_nothing_from_the_others() -> None:
    target = Target(takes=10)
    async with calls_of(Reconnect("db")(target)) as calls:
        await calls.start(3)
        calls.scopes[0].cancel()  # the one who began it
        await anyio.sleep(5)
        calls.scopes[1].cancel()
        await anyio.sleep(10)
        assert calls.answers == [1]
        assert (len(target.attempts), target.cancelled) == (1, 0)


async def test_n4_an_attempt_goes_on_when_all_callers_are_cancelled() -> None:
    target = Target(takes=10)
    async with Reconnect("db")(target) as call:
        with anyio.move_on_after(5):
            await call("a")
        await anyio.sleep(10)
        began = anyio.current_time()
        assert await call("b") == 1
        assert anyio.current_time() == began
    assert len(target.attempts) == 1


async def test_n4_but_no_other_attempt_begins_for_nobody() -> None:
    target = Target(ConnectionRefusedError())
    async with Reconnect("db", backoff=A_MINUTE)(target) as call:
        with anyio.move_on_after(5):
            await call("a")
        await anyio.sleep(1000)
        assert len(target.attempts) == 1
        assert call.state is ConnectionState.IDLE
        assert await call("b") == 1  # at once: the pause is over


async def test_n4_a_call_that_comes_in_the_pause_waits_for_the_rest_of_it_only() -> None:
    target = Target(ConnectionRefusedError())
    async with Reconnect("db", backoff=A_MINUTE)(target) as call:
        with anyio.move_on_after(5):
            await call("a")
        await anyio.sleep(15)
        began = anyio.current_time()
        assert await call("b") == 1
        assert anyio.current_time() - began == 40


@pytest.mark.parametrize("when", ["connecting", "in the pause", "entering"])
async def test_n5_leaving_it_ends_an_attempt_at_once_and_the_calls_that_wait(when: str) -> None:
    class Slow(Connection):
        async def __aenter__(self) -> Self:
            await anyio.sleep(100)
            return await super().__aenter__()

    outcomes = [ConnectionRefusedError()] if when == "in the pause" else []
    target = Target(*outcomes, takes=100 if when == "connecting" else 0, make=Slow)
    service: Wrapper[str, int] = Reconnect("db", backoff=A_MINUTE)(target)
    began = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        calls = Calls(service, tasks)
        async with service:
            await calls.start(5)
            await anyio.sleep(10)
        assert anyio.current_time() - began < 11
        await wait_all_tasks_blocked()
        assert [type(error) for error in calls.errors] == [ServiceClosed] * 5
        assert [getattr(error, "sent", None) for error in calls.errors] == [False] * 5
    assert not target.running


async def test_n5_a_connection_is_left_in_peace_and_may_take_its_time() -> None:
    target = Target()
    async with Reconnect("db")(target) as call:
        await call("a")
        target.connections[0].leaving_takes = 3
        began = anyio.current_time()
    assert anyio.current_time() - began == 3
    assert target.connections[0].left == 1


async def test_n5_one_that_was_lost_before_had_its_time() -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY)(target) as call:
        await call("a")
        target.connections[0].leaving_takes = math.inf
        target.connections[0].error = lost(sent=False)
        assert await call("b") == 2  # nor does the next one wait for it
    assert [each.left for each in target.connections] == [1, 1]


async def test_an_error_in_the_block_does_not_wait_for_a_connection_to_be_left() -> None:
    target = Target()
    began = anyio.current_time()

    async def use() -> None:
        async with Reconnect("db")(target) as call:
            await call("a")
            target.connections[0].leaving_takes = 1000
            raise KeyError

    with pytest.raises(KeyError):
        await use()
    assert anyio.current_time() == began
    assert target.connections[0].left == 1


async def test_it_takes_calls_only_while_it_is_entered_and_can_be_entered_again() -> None:
    target = Target(HandshakeRefused("no"))
    call = Reconnect("db", backoff=A_MINUTE)(target)
    with pytest.raises(ServiceClosed, match="async with"):
        await call("a")
    async with call:
        with pytest.raises(HandshakeRefused):
            await call("b")
    with pytest.raises(ServiceClosed):
        await call("c")
    async with call:
        assert await call("d") == 1  # nothing is left of what was before
        with pytest.raises(MisuseError, match="entered already"):
            await call.__aenter__()
    assert call.state is ConnectionState.CLOSED


async def test_what_connects_is_entered_too() -> None:
    class Connecting(Wrapper[str, Connection]):
        entered = left = 0

        async def __call__(self, target: str, /) -> Connection:
            connection: Connection = await self.inner(target)
            return connection

        @asynccontextmanager
        async def _running(self) -> AsyncGenerator[None]:
            Connecting.entered += 1
            yield
            Connecting.left += 1

    async with Reconnect("db")(Connecting(Target())) as call:
        assert await call("a") == 1
        assert (Connecting.entered, Connecting.left) == (1, 0)
    assert (Connecting.entered, Connecting.left) == (1, 1)


# --- what was under way ---------------------------------------------------------------------------------------------


async def test_n6_what_was_under_way_fails_once_and_is_not_sent_again() -> None:
    target = Target()
    async with calls_of(Reconnect("db", backoff=STEADY)(target)) as calls:
        await calls.start()
        first = target.connections[0]
        first.takes, first.error = 5, lost(sent=True)
        await calls.start(10)
        await anyio.sleep(60)
        assert calls.answers == [1]
        assert [getattr(error, "sent", None) for error in calls.errors] == [True] * 10
        assert len(target.connections) == 1  # and nobody wants another yet
        await calls.start()
        assert (calls.answers, len(calls.errors), first.calls) == ([1, 2], 10, 11)


async def test_n6_who_does_not_know_whether_it_was_sent_fails_too() -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY)(target) as call:
        await call("a")
        target.connections[0].error = lost(sent=None)
        with pytest.raises(ConnectionLost):
            await call("b")


async def test_n6_what_was_not_sent_goes_to_the_next_connection() -> None:
    target = Target()
    async with calls_of(Reconnect("db", backoff=STEADY)(target)) as calls:
        await calls.start()
        target.connections[0].error = lost(sent=False)
        await calls.start(10)
        await anyio.sleep(1)
        await wait_all_tasks_blocked()
        assert (calls.answers, calls.errors) == ([1] + [2] * 10, [])
        assert len(target.attempts) == 2


async def test_n6_as_often_as_the_budget_pays_for_it() -> None:
    target = Target()
    budget = TpsBudget(min_per_sec=0.3, ttl=10)  # three, once
    async with calls_of(Reconnect("db", backoff=STEADY, budget=budget)(target)) as calls:
        await calls.start()
        target.connections[0].error = lost(sent=False)
        await calls.start(10)
        await anyio.sleep(1)
        await wait_all_tasks_blocked()
        assert calls.answers == [1, 2, 2, 2]
        assert [getattr(error, "sent", None) for error in calls.errors] == [False] * 7


async def test_a_loss_that_is_heard_of_late_does_not_end_the_connection_after_it() -> None:
    target = Target(make=Closing)
    async with calls_of(Reconnect("db", backoff=STEADY)(target)) as calls:
        await calls.start()
        first = target.connections[0]
        assert isinstance(first, Closing)
        first.takes, first.error = 10, lost()
        await calls.start()
        first.closed.set()
        await anyio.sleep(1)
        await calls.start()
        await anyio.sleep(20)
        await calls.start()
        assert calls.answers == [1, 2, 2]
        assert len(calls.errors) == 1


# --- errors of connecting -------------------------------------------------------------------------------------------


async def test_n7_an_error_that_does_not_pass_is_raised_by_all_who_wait_each_one_of_its_own() -> None:
    refused = HandshakeRefused("the key is wrong")
    target = Target(refused, takes=1)
    async with calls_of(Reconnect("db", backoff=EXPONENTIAL)(target)) as calls:
        await calls.start(5)
        await anyio.sleep(1)
        await wait_all_tasks_blocked()
        assert len(target.attempts) == 1
        assert [type(error) for error in calls.errors] == [HandshakeRefused] * 5
        assert len({*map(id, calls.errors), id(refused)}) == 6
        assert [error.__cause__ for error in calls.errors] == [refused] * 5
        assert [getattr(error, "sent", None) for error in calls.errors] == [False] * 5
        assert str(calls.errors[0]) == "the key is wrong"


async def test_n7_until_the_pause_is_over_it_is_raised_at_once_and_then_a_call_tries_again() -> None:
    target = Target(*(HandshakeRefused("no") for _ in range(3)))
    async with Reconnect("db", backoff=EXPONENTIAL)(target) as call:
        began = anyio.current_time()
        for _ in range(100):  # a second of calls
            with pytest.raises(HandshakeRefused):
                await call("a")
            await anyio.sleep(0.07)
        assert [round(at - began, 1) for at in target.attempts] == [0, 1.1, 3.1]
        await anyio.sleep(4)
        assert await call("b") == 1


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (ConnectFailed("refused"), True),
        (ConnectionRefusedError(), True),
        (UnknownHost("no such name"), False),
        (HandshakeRefused("no"), False),
        (HandshakeRefused("no", ended=True), True),
        (ValueError(), False),
        (MisuseError("wrong"), False),
        (ExceptionGroup("all", [ConnectionRefusedError(), ConnectionRefusedError()]), False),
    ],
    ids=repr,
)
async def test_n7_which_errors_pass_they_say_themselves(error: Exception, passes: bool) -> None:
    target = Target(error)
    async with Reconnect("db", backoff=STEADY)(target) as call:
        if passes:
            assert await call("a") == 1
        else:
            with pytest.raises(type(error)):
                await call("a")


async def test_n7_which_errors_pass_can_be_said() -> None:
    target = Target(ValueError(), ConnectionRefusedError())
    async with Reconnect("db", backoff=STEADY, transient=ValueError)(target) as call:
        with pytest.raises(ConnectionRefusedError):
            await call("a")
    assert len(target.attempts) == 2


async def test_n7_a_name_that_did_resolve_will_do_so_again() -> None:
    target = Target(None, UnknownHost("no network"))
    async with Reconnect("db", backoff=STEADY)(target) as call:
        await call("a")
        target.connections[0].error = lost(sent=False)
        assert await call("b") == 2


async def test_a_backoff_that_ends_raises_the_last_error_and_begins_anew_after_its_last_pause() -> None:
    errors = [ConnectFailed(f"attempt {n}") for n in range(1, 7)]
    target = Target(*errors)
    async with Reconnect("db", backoff=EXPONENTIAL.take(2))(target) as call:
        for last in (3, 6):
            with pytest.raises(ConnectFailed, match=f"attempt {last}"):
                await call("a")
            with pytest.raises(ConnectFailed, match=f"attempt {last}"):
                await call("b")
            assert len(target.attempts) == last
            await anyio.sleep(2)
        assert await call("c") == 1
    assert target.gaps == [1, 2, 2, 1, 2, 2]


async def test_without_any_pause_there_is_one_attempt_for_each_call() -> None:
    target = Target(ConnectFailed("one"), ConnectFailed("two"))
    async with Reconnect("db", backoff=EXPONENTIAL.take(0))(target) as call:
        for text in ("one", "two"):
            with pytest.raises(ConnectFailed, match=text):
                await call("a")
        assert await call("b") == 1


async def test_n8_errors_of_connecting_cost_the_budget_of_a_retry_nothing() -> None:
    budget = TpsBudget(min_per_sec=1)
    full = budget.balance
    target = Target(*(ConnectFailed("refused") for _ in range(30)))
    policy = StandardPolicy(max_attempts=2, budget=budget, idempotent=True)
    service: Wrapper[str, int] = Retry(policy)(Reconnect("db", backoff=EXPONENTIAL)(target))
    async with service:
        assert await service("a") == 1
    assert budget.balance >= full
    assert len(target.attempts) == 31


async def test_n8_unless_it_is_told_to_fail_fast() -> None:
    budget = TpsBudget(min_per_sec=1)
    full = budget.balance
    target = Target(*(ConnectFailed("refused") for _ in range(30)))
    policy = StandardPolicy(Backoff.constant(2, jitter="none"), max_attempts=3, budget=budget, idempotent=True)
    service: Wrapper[str, int] = Retry(policy)(Reconnect("db", backoff=STEADY, fail_fast=True)(target))
    async with service:
        with pytest.raises(ConnectFailed):
            await service("a")
    assert budget.balance == full - 2
    assert len(target.attempts) == 3


async def test_failing_fast_waits_for_the_attempt_under_way_and_for_no_pause() -> None:
    target = Target(ConnectFailed("one"), ConnectFailed("two"), takes=3)
    async with Reconnect("db", backoff=Backoff.constant(10, jitter="none"), fail_fast=True)(target) as call:
        began = anyio.current_time()
        with pytest.raises(ConnectFailed, match="one"):
            await call("a")
        assert anyio.current_time() - began == 3
        assert refuses_now(call)
        with pytest.raises(ConnectFailed, match="one"):
            await call("b")
        assert anyio.current_time() - began == 3
        await anyio.sleep(100)
        assert len(target.attempts) == 1  # nobody asked for another
        assert not refuses_now(call)
        with pytest.raises(ConnectFailed, match="two"):
            await call("c")


async def test_failing_fast_does_not_fail_because_a_good_connection_was_lost() -> None:
    target = Target()
    async with Reconnect("db", backoff=STEADY, fail_fast=True)(target) as call:
        await call("a")
        await anyio.sleep(10)
        target.connections[0].error = lost(sent=False)
        assert await call("b") == 2
        target.connections[1].error = lost(sent=False)
        with pytest.raises(ConnectionLost) as raised:  # this one has not lasted
            await call("c")
        assert raised.value.sent is False


async def test_what_is_no_connection_is_refused_with_a_word_on_it() -> None:
    async def connect(target: str, /) -> Any:
        return "connected"

    async with Reconnect("db")(connect) as call:
        with pytest.raises(MisuseError, match="gave 'connected', where a connection is a service"):
            await call("a")


async def test_a_connection_that_fails_when_it_is_entered_is_a_failed_attempt() -> None:
    class Refusing(Connection):
        async def __aenter__(self) -> Self:
            if self.number < 3:
                raise ConnectionRefusedError
            return await super().__aenter__()

    target = Target(make=Refusing)
    async with Reconnect("db", backoff=EXPONENTIAL)(target) as call:
        assert await call("a") == 3
    assert target.gaps == [1, 2]


async def test_a_connection_that_fails_by_itself_is_lost_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Connection):
        async def wait_closing(self) -> None:
            await anyio.sleep(10)
            raise ZeroDivisionError

    target = Target(make=Failing)
    with caplog.at_level(logging.WARNING, logger="towline"):
        async with Reconnect("db", backoff=STEADY)(target) as call:
            await call("a")
            await anyio.sleep(10)
            await wait_all_tasks_blocked()
            assert await call("b") == 2
    assert "db: the connection failed: ZeroDivisionError()" in caplog.text


async def test_an_error_that_cannot_be_copied_is_the_cause_of_one_that_can() -> None:
    class Odd(Exception):
        def __new__(cls, *args: Any) -> Self:
            if args != (1, 2):
                raise TypeError
            return super().__new__(cls)

        def __init__(self, *args: Any) -> None:
            super().__init__("one and two")

    odd = Odd(1, 2)
    async with calls_of(Reconnect("db")(Target(odd, takes=1))) as calls:
        await calls.start(2)
        await anyio.sleep(1)
        await wait_all_tasks_blocked()
        assert [type(error) for error in calls.errors] == [ConnectFailed] * 2
        assert [error.__cause__ for error in calls.errors] == [odd] * 2
        assert [getattr(error, "sent", None) for error in calls.errors] == [False] * 2


async def test_an_error_that_makes_its_own_text_is_copied_as_it_is() -> None:
    class Cannot(Exception):
        def __init__(self, host: str) -> None:
            super().__init__(f"cannot reach {host}")

    cannot = Cannot("db")
    cannot.add_note("a note")
    async with Reconnect("db", backoff=A_MINUTE)(Target(cannot)) as call:
        for _ in range(3):
            with pytest.raises(Cannot) as raised:
                await call("a")
            assert str(raised.value) == "cannot reach db"
            assert raised.value.__notes__ == ["a note"]
            raised.value.add_note("of this caller")


# --- eager ----------------------------------------------------------------------------------------------------------


async def test_lazily_nothing_is_connected_before_a_call() -> None:
    target = Target()
    async with Reconnect("db")(target):
        await anyio.sleep(60)
        assert target.attempts == []


async def test_eagerly_it_connects_at_once_and_again_after_a_loss() -> None:
    target = Target(ConnectionRefusedError(), make=Closing)
    async with Reconnect("db", eager=True, backoff=STEADY)(target) as call:
        await anyio.sleep(60)
        assert len(target.attempts) == 2
        assert call.state is ConnectionState.CONNECTED
        first = target.connections[0]
        assert isinstance(first, Closing)
        first.closed.set()
        await anyio.sleep(60)
        assert len(target.attempts) == 3
        assert await call("a") == 2


async def test_eagerly_too_what_does_not_pass_is_tried_again_only_for_a_call() -> None:
    target = Target(HandshakeRefused("no"), HandshakeRefused("no"))
    async with Reconnect("db", eager=True, backoff=STEADY)(target) as call:
        await anyio.sleep(60)
        assert len(target.attempts) == 1
        with pytest.raises(HandshakeRefused):
            await call("a")
        await anyio.sleep(60)
        assert len(target.attempts) == 2
        assert await call("b") == 1


# --- hints, hooks, and what is kept ---------------------------------------------------------------------------------


async def test_the_hints_are_those_of_the_connection_or_of_what_a_call_would_meet() -> None:
    class Hinting(Connection):
        is_ready, refuses = True, False

        def ready_now(self) -> bool:
            return self.is_ready

        def refuses_now(self) -> bool:
            return self.refuses

        def load(self) -> float:
            return 42

    target = Target(ConnectionRefusedError(), takes=1, make=Hinting)
    async with calls_of(Reconnect("db", backoff=STEADY)(target)) as calls:
        service = calls.service
        assert ready_now(service)  # or nobody would ever dare to call it
        await calls.start(3)
        assert not ready_now(service)  # connecting
        assert service.load() == 3
        await anyio.sleep(1.5)
        assert not ready_now(service)  # in the pause
        assert not refuses_now(service)
        await anyio.sleep(2)
        assert calls.answers == [1, 1, 1]
        assert ready_now(service)
        assert service.load() == 42
        Hinting.is_ready, Hinting.refuses = False, True
        assert not ready_now(service)
        assert refuses_now(service)


async def test_a_load_shed_around_it_lets_the_call_through_that_connects() -> None:
    service: Wrapper[str, int] = LoadShed()(Reconnect("db")(Target()))
    async with service:
        assert await service("a") == 1


async def test_hooks_are_told_of_every_change() -> None:
    told = Told()
    target = Target(ConnectFailed("refused"), None, HandshakeRefused("no"))
    layer = Reconnect("db", backoff=STEADY, hooks=told, name="the database")
    async with layer(target) as call:
        await call("a")
        await anyio.sleep(10)
        target.connections[0].error = lost(sent=False)
        with pytest.raises(HandshakeRefused):
            await call("b")
        await wait_all_tasks_blocked()
        assert call.state is ConnectionState.IDLE
    assert told.states == [
        *("idle", "connecting", "idle", "waiting", "connecting", "connected"),
        *("idle", "waiting", "connecting", "idle", "closed"),
    ]
    assert {change.name for change in told.changes} == {"the database"}
    assert told.changes[2].reason == "an attempt failed: ConnectFailed('refused')"
    assert told.changes[6].reason == "the connection is lost: ConnectionLost('the link broke')"
    assert all(before.new == after.old for before, after in pairwise(told.changes))


async def test_every_step_of_the_table_happens_and_no_other() -> None:
    told = Told()

    def make(target: Target) -> Wrapper[str, int]:
        return Reconnect("db", backoff=A_MINUTE, hooks=told)(target)

    async with make(Target()):
        pass  # left while idle
    async with make(Target()) as call:
        await call("a")
    async with calls_of(make(Target(takes=100))) as calls:
        await calls.start()  # left while it connects
    async with calls_of(make(Target(ConnectFailed("refused")))) as calls:
        await calls.start()  # left in the pause
    async with calls_of(make(Target(ConnectFailed("refused"), None))) as calls:
        await calls.start()
        calls.scopes[0].cancel()  # nobody waits any more when the pause is over
        await anyio.sleep(100)
    target = Target(ConnectFailed("refused"), None)
    async with make(target) as call:
        await call("a")
        target.connections[0].error = lost()
        with pytest.raises(ConnectionLost):
            await call("b")
    happened = {(change.old, change.new) for change in told.changes}
    assert happened == {(old, new) for old, steps in TRANSITIONS.items() for new in steps}
    for change in told.changes:
        assert change.reason.startswith(TRANSITIONS[ConnectionState(change.old)][ConnectionState(change.new)])


async def test_early_failures_are_logged_quietly_and_the_one_that_callers_see_loudly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = Target(ConnectFailed("one"), ConnectFailed("two"), ConnectFailed("three"))
    with caplog.at_level(logging.INFO, logger="towline"):
        async with Reconnect("db", backoff=EXPONENTIAL.take(2))(target) as call:
            with pytest.raises(ConnectFailed):
                await call("a")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "db: connecting failed, pause 1 s: ConnectFailed('one')"),
        ("INFO", "db: connecting failed, pause 2 s: ConnectFailed('two')"),
        ("WARNING", "db: connecting failed, pause 2 s: ConnectFailed('three')"),
    ]


async def test_no_connection_is_kept_after_it_was_lost_nor_the_caller_of_an_error() -> None:
    class Held:
        pass

    target = Target()
    async with Reconnect("db", backoff=A_MINUTE)(target) as call:
        await call("a")
        target.connections[0].error = lost()

        async def caller() -> weakref.ref[Held]:
            held = Held()
            with pytest.raises(ConnectionLost):
                await call("b")
            return weakref.ref(held)

        gc.collect()
        held = await caller()
        connection = weakref.ref(target.connections[0])
        target.connections.clear()
        await wait_all_tasks_blocked()
        gc.collect()
        assert (connection(), held()) == (None, None)


async def test_one_layer_wraps_two_services_that_share_nothing() -> None:
    layer = Reconnect("db")
    one, two = Target(), Target(HandshakeRefused("no"))
    async with layer(one) as first, layer(two) as second:
        with pytest.raises(HandshakeRefused):
            await second("a")
        assert await first("b") == 1


async def test_a_dial_is_handed_on_as_it_is() -> None:
    seen: list[Dial] = []

    async def connect(dial: Dial, /) -> Connection:
        seen.append(dial)
        return Connection(1)

    dial = Dial(Endpoint.parse("tcp://db.example:7000"))
    async with Reconnect(dial)(connect) as call:
        await call("a")
    assert seen == [dial]


def test_it_shows_itself() -> None:
    layer = Reconnect("db", fail_fast=True)
    assert repr(layer) == "Reconnect(target='db', fail_fast=True)"
    assert repr(layer(Target())) == "<Reconnecting closed to db>"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"healthy_after": -1}, ValueError, "healthy_after is -1, where 0 or more is expected"),
        ({"healthy_after": math.nan}, ValueError, "healthy_after is nan"),
        ({"backoff": 3}, TypeError, "backoff is 3, where a Backoff is expected"),
        ({"on": int}, TypeError, "no class of exceptions"),
        ({"transient": (KeyError, BaseException)}, TypeError, "BaseException is no Exception"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Reconnect("db", **arguments)


# --- at every await -------------------------------------------------------------------------------------------------


async def test_cancelled_at_any_await_it_leaves_no_connection_behind() -> None:
    targets: list[Target] = []

    async def use() -> None:
        target = Target(ConnectionRefusedError(), takes=0.1)
        targets.append(target)
        async with Reconnect("db", backoff=STEADY)(target) as call:
            await call("a")
            target.connections[0].error = lost(sent=False)
            await call("b")

    await cancel_at_every_await(use)
    for target in targets:
        assert not target.running
        assert all(each.entered == each.left for each in target.connections)


@given(
    st.lists(st.sampled_from(["connect", "transient", "permanent"]), max_size=12),
    st.lists(
        st.tuples(st.sampled_from(["call", "cancel", "lose", "lose unsent", "sleep"]), st.integers(0, 9)), max_size=25
    ),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
async def test_whatever_happens_there_is_one_attempt_at_a_time_and_every_call_ends(
    outcomes: list[str], events: list[tuple[str, int]], takes: float, fail_fast: bool, eager: bool
) -> None:
    made = {"connect": None, "transient": ConnectFailed("transient"), "permanent": HandshakeRefused("permanent")}
    target = Target(*(made[outcome] for outcome in outcomes), takes=takes)
    layer = Reconnect("db", backoff=EXPONENTIAL, fail_fast=fail_fast, eager=eager)
    async with calls_of(layer(target)) as calls:
        for event, number in events:
            if event == "call":
                await calls.start()
            elif event == "cancel" and calls.scopes:
                calls.scopes[number % len(calls.scopes)].cancel()
            elif event.startswith("lose") and target.connections:
                target.connections[-1].error = lost(sent=event == "lose")
            elif event == "sleep":
                await anyio.sleep(number)
        await anyio.sleep(200)
        for connection in target.connections:
            connection.error = None
        await anyio.sleep(200)
    assert target.most_running <= 1
    cancelled = sum(scope.cancel_called for scope in calls.scopes)
    assert len(calls.scopes) - cancelled <= len(calls.answers) + len(calls.errors) <= len(calls.scopes)
    assert all(type(error) is not ServiceClosed for error in calls.errors)  # all had ended before the end
    assert all(each.entered == each.left == 1 for each in target.connections)
    assert all(gap >= 1 for gap in target.gaps)


# --- corners ----------------------------------------------------------------------------------------------------------


async def test_a_call_that_fails_unsent_after_the_close_raises_its_own_error_and_pays_nothing() -> None:
    target = Target()
    budget = TpsBudget()
    full = budget.balance
    service: Wrapper[str, int] = Reconnect("db", backoff=STEADY, budget=budget)(target)
    async with anyio.create_task_group() as tasks:
        calls = Calls(service, tasks)
        async with service:
            await calls.start()
            target.connections[0].takes, target.connections[0].error = 10, lost(sent=False)
            await calls.start()
        await anyio.sleep(20)
        assert [type(error) for error in calls.errors] == [ConnectionLost]
    assert budget.balance == full


async def test_a_call_that_is_refused_in_the_pause_gets_a_copy_of_its_own() -> None:
    refused = HandshakeRefused("no")
    async with calls_of(Reconnect("db", backoff=A_MINUTE)(Target(refused))) as calls:
        await calls.start(1)
        await calls.start(3)
        assert len({*map(id, calls.errors), id(refused)}) == 5
        assert [error.__cause__ for error in calls.errors] == [refused] * 4
        assert [getattr(error, "sent", None) for error in calls.errors] == [False] * 4


async def test_it_is_not_ready_in_the_pause_though_nobody_waits() -> None:
    target = Target(HandshakeRefused("no"))
    async with Reconnect("db", backoff=A_MINUTE)(target) as call:
        with pytest.raises(HandshakeRefused):
            await call("a")
        assert not ready_now(call)
        assert refuses_now(call)
        await anyio.sleep(60)
        assert ready_now(call)
        await call("b")
        target.connections[0].error = lost()
        with pytest.raises(ConnectionLost):
            await call("c")
        await wait_all_tasks_blocked()
        assert call.state is ConnectionState.IDLE
        assert not ready_now(call)
        assert not refuses_now(call)


def test_one_that_is_closed_is_ready() -> None:
    assert ready_now(Reconnect("db")(Target()))


async def test_the_traceback_of_an_error_that_is_kept_begins_outside_of_the_layer() -> None:
    async with Reconnect("db", backoff=A_MINUTE)(Target(HandshakeRefused("no"))) as call:
        with pytest.raises(HandshakeRefused) as raised:
            await call("a")
    cause = raised.value.__cause__
    assert cause is not None
    names: list[str] = []
    traceback = cause.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        assert not traceback.tb_frame.f_code.co_filename.endswith("layers/reconnect.py")
        traceback = traceback.tb_next
    assert names == ["__call__"]  # of Target: where it was raised


async def test_a_connection_that_comes_after_the_close_is_left_and_nobody_is_told_of_it() -> None:
    told = Told()
    target = Target()

    async def connect(name: str, /) -> Connection:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10)
        target.connections.append(Quick(1))
        return target.connections[-1]

    class Quick(Connection):
        async def __aenter__(self) -> Self:
            self.entered += 1
            return self

    async with Reconnect("db", eager=True, hooks=told)(connect):
        await anyio.sleep(1)
    assert told.states == ["idle", "connecting", "closed"]
    assert [each.entered - each.left for each in target.connections] == [0]


async def test_an_error_is_forgotten_once_there_is_a_connection() -> None:
    class Odd(ConnectFailed):
        pass

    target = Target(Odd("no"))
    async with Reconnect("db", backoff=STEADY)(target) as call:
        await call("a")
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Odd]


async def test_eagerly_a_good_connection_is_made_again_whatever_the_backoff() -> None:
    target = Target(make=Closing)
    async with Reconnect("db", eager=True, backoff=EXPONENTIAL.take(0), healthy_after=5)(target):
        await anyio.sleep(10)
        first = target.connections[0]
        assert isinstance(first, Closing)
        first.closed.set()
        await anyio.sleep(1)
        assert len(target.connections) == 2


async def test_entered_again_it_knows_nothing_of_what_was_before() -> None:
    target = Target(None, HandshakeRefused("no"), None, UnknownHost("no such name"))
    call = Reconnect("db", backoff=A_MINUTE, healthy_after=0)(target)
    async with call:
        await call("a")
        target.connections[0].error = lost()
        with pytest.raises(ConnectionLost):
            await call("b")
        with pytest.raises(HandshakeRefused):
            await call("c")
    began = anyio.current_time()
    async with call:
        assert await call("d") == 2
        assert anyio.current_time() == began
    async with call:
        with pytest.raises(UnknownHost):
            await call("e")


async def test_an_error_that_does_not_let_itself_be_written_on_is_raised_all_the_same() -> None:
    class Fixed(Exception):
        @property
        def sent(self) -> bool:
            return False

    async with Reconnect("db", backoff=A_MINUTE)(Target(Fixed("no"))) as call:
        with pytest.raises(Fixed):
            await call("a")


async def test_what_copies_to_something_else_is_not_taken_for_a_copy() -> None:
    class Odd(Exception):
        def __reduce__(self) -> Any:
            return ValueError, ("another",)

    odd = Odd("no")
    async with Reconnect("db", backoff=A_MINUTE)(Target(odd)) as call:
        with pytest.raises(Odd):
            await call("a")


def test_a_target_that_might_hold_a_password_is_not_shown() -> None:
    for target, shown in [
        ("postgres://me:secret@db", "str"),
        ("host=db password=secret", "str"),
        (("db", "secret"), "tuple"),
        (7000, "7000"),
        (Dial(Endpoint.parse("tcp://db:7000")), "tcp://db:7000"),
    ]:
        assert repr(Reconnect(target)(Target())) == f"<Reconnecting closed to {shown}>"


async def test_a_pause_that_is_over_between_two_readings_of_the_clock_ends_nothing() -> None:
    readings = iter(range(10**6))

    def clock() -> float:
        return float(next(readings))  # a second passes at every look

    target = Target(ConnectionRefusedError(), ConnectionRefusedError())
    async with Reconnect("db", backoff=Backoff.constant(1.5, jitter="none"), clock=clock)(target) as call:
        assert await call("a") == 1


class _TheEnd(BaseException):
    """As KeyboardInterrupt, which a test runner would take for its own."""


async def test_what_ends_a_program_in_what_connects_leaves_the_block_as_itself() -> None:
    async def connect(target: str, /) -> Connection:
        await anyio.sleep(1)
        raise _TheEnd

    async def use() -> None:
        async with Reconnect("db")(connect) as call:
            await call("a")

    with pytest.raises(_TheEnd):
        await use()


@pytest.mark.parametrize("where", ["connecting", "entering", "later"])
async def test_a_native_cancellation_that_nobody_asked_for_is_a_failure_and_ends_no_block(
    where: str, anyio_backend_name: str
) -> None:
    if anyio_backend_name == "trio":
        pytest.skip("asyncio alone cancels by itself")

    async def wait_for_a_future_that_is_cancelled() -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    class Cancelled(Connection):
        async def __aenter__(self) -> Self:
            if where == "entering" and self.number == 1:
                await wait_for_a_future_that_is_cancelled()
            return await super().__aenter__()

        async def wait_closing(self) -> None:
            await anyio.sleep(1)
            if where == "later" and self.number == 1:
                await wait_for_a_future_that_is_cancelled()
            await anyio.sleep_forever()

    target = Target(make=Cancelled)

    async def connect(name: str, /) -> Connection:
        if where == "connecting" and not target.attempts:
            target.attempts.append(0)
            await wait_for_a_future_that_is_cancelled()
        return await target(name)

    async with Reconnect("db", backoff=STEADY)(connect) as call:
        if where != "later":
            with pytest.raises(ConnectFailed, match="cancelled by itself"):
                await call("a")
            await anyio.sleep(2)
        await call("b")
        await anyio.sleep(2)
        assert await call("c") in (1, 2)
        if where == "later":
            assert len(target.connections) == 2


async def test_closed_in_the_step_in_which_it_connects_it_is_closed_for_good_and_the_connection_left_in_peace() -> None:
    class Quick(Connection):
        async def __call__(self, request: str, /) -> int:
            return self.number

        async def __aenter__(self) -> Self:
            self.entered += 1
            return self

    told = Told()
    target = Target(make=Quick)
    began = anyio.current_time()
    async with Reconnect("db", hooks=told, eager=True)(target) as call:
        await call("a")
        target.connections[0].leaving_takes = 3
    assert anyio.current_time() - began == 3
    assert told.states == ["idle", "connecting", "connected", "closed"]
    assert [(each.entered, each.left) for each in target.connections] == [(1, 1)]


async def test_closed_before_its_task_has_begun_it_never_connects() -> None:
    told = Told()
    target = Target()
    async with Reconnect("db", eager=True, hooks=told)(target):
        pass
    assert target.attempts == []
    assert told.states == ["idle", "closed"]


async def test_what_connects_may_turn_a_cancellation_into_an_error_and_closing_ends_all_the_same() -> None:
    async def connect(target: str, /) -> Connection:
        with suppress(BaseException):
            await anyio.sleep_forever()
        raise ConnectionResetError

    async with Reconnect("db", eager=True, backoff=Backoff.constant(0))(connect):
        await anyio.sleep(1)


async def test_n6_bystanders_of_a_connection_that_is_left_are_told_that_it_is_lost_and_retried() -> None:
    class Left(Connection):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.closed = anyio.Event()

        async def __call__(self, request: str, /) -> int:
            if self.number > 1:
                return self.number
            if request == "first":
                await anyio.sleep(1)
                raise anyio.EndOfStream
            await self.closed.wait()
            raise anyio.ClosedResourceError

        async def __aexit__(self, *ignored: object) -> None:
            self.closed.set()

    policy = StandardPolicy(on=CONNECTION_OVER, idempotent=True)
    service: Wrapper[str, int] = Retry(policy)(Reconnect("db", backoff=STEADY)(Target(make=Left)))
    answers: dict[str, int] = {}

    async def call(request: str) -> None:
        answers[request] = await service(request)

    async with service, anyio.create_task_group() as tasks:
        tasks.start_soon(call, "first")
        tasks.start_soon(call, "bystander")
    assert answers == {"first": 2, "bystander": 2}


@pytest.mark.parametrize("when", ["calling", "connecting"])
async def test_that_a_connection_is_closed_does_not_mean_to_a_balance_that_this_is(when: str) -> None:
    target = Target(ServiceClosed("closed") if when == "connecting" else None)
    layer = Reconnect("db", backoff=STEADY, fail_fast=True)
    async with Balance({"a": layer(target)}) as call:
        if when == "calling":
            await call("a")
            target.connections[0].error = ServiceClosed("closed")
        with pytest.raises(ConnectionLost):
            await call("b")
        assert list(call.endpoints) == ["a"]


async def test_n6_a_budget_that_counts_calls_gets_back_what_it_gave() -> None:
    budget = ConcurrencyBudget(0, at_least=3)
    target = Target()
    async with Reconnect("db", backoff=STEADY, budget=budget)(target) as call:
        await call("a")
        for _ in range(10):
            target.connections[-1].error = lost(sent=False)
            await call("b")
            await anyio.sleep(100)
        assert budget.balance == 3


async def test_n6_a_budget_pays_for_no_call_that_is_refused_then() -> None:
    budget = TpsBudget()
    full = budget.balance
    target = Target()
    async with Reconnect("db", backoff=A_MINUTE, budget=budget, fail_fast=True)(target) as call:
        await call("a")
        target.connections[0].error = lost(sent=False)
        with pytest.raises(ConnectionLost):
            await call("b")
    assert budget.balance == full


async def test_n7_a_timeout_around_connecting_is_waited_out() -> None:
    attempts = 0

    async def connect(port: int, /) -> Connection:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            await anyio.sleep_forever()
        return Connection(attempts)

    async with Reconnect(7000, backoff=STEADY)(Timeout(5)(connect)) as call:
        assert await call("a") == 4


async def test_without_any_pause_a_target_that_drops_what_it_accepts_fails_the_call() -> None:
    def dead(number: int) -> Connection:
        connection = Connection(number)
        connection.error = lost(sent=False)
        return connection

    target = Target(make=dead)
    async with Reconnect("db", backoff=EXPONENTIAL.take(0))(target) as call:
        with pytest.raises(ConnectionLost):
            await call("a")
    assert len(target.attempts) == 1


async def test_two_may_share_what_connects_and_its_layers_as_long_as_these_own_nothing() -> None:
    async def connect(name: str, /) -> Any:
        async def connection(request: str, /) -> str:
            return name

        return connection

    connector = Timeout(5)(Retry()(connect))
    async with Reconnect("a")(connector) as a, Reconnect("b")(connector) as b:
        assert [await a("x"), await b("x")] == ["a", "b"]


async def test_n3_a_call_that_was_turned_away_on_this_side_proves_nothing() -> None:
    async def turned_away(request: str, /) -> int:
        await anyio.sleep(6)
        raise CircuitOpen("not now") if len(began) % 2 else lost()

    began: list[float] = []

    async def connect(name: str, /) -> Any:
        return turned_away

    told = Told()
    async with Reconnect("db", backoff=EXPONENTIAL, hooks=told)(connect) as call:
        for _ in range(8):
            began.append(anyio.current_time())
            with pytest.raises((CircuitOpen, ConnectionLost)):
                await call("a")
    waits = [round(after - before) - 6 for before, after in pairwise(began)]
    assert [wait for wait in waits if wait] == [1, 2, 4]


async def test_an_error_that_cannot_show_itself_or_count_is_an_error_like_any_other() -> None:
    class Bad(OSError):
        def __repr__(self) -> str:
            raise ZeroDivisionError

        __str__ = __repr__

        @property
        def retry_after(self) -> float:
            raise ZeroDivisionError

    def transient(error: Exception) -> bool:
        raise ZeroDivisionError

    async with Reconnect("db", backoff=STEADY, hooks=Told())(Target(Bad())) as call:
        assert await call("a") == 1
    async with Reconnect("db", backoff=STEADY, transient=transient)(Target(ConnectFailed("no"))) as call:
        with pytest.raises(ConnectFailed):
            await call("a")


async def test_a_buffer_around_it_waits_for_the_connection_and_not_for_what_connects() -> None:
    class Connecting(Wrapper[str, Connection]):
        async def __call__(self, target: str, /) -> Connection:
            connection: Connection = await self.inner(target)
            return connection

        async def ready(self) -> None:
            raise AssertionError("this is what connects")

    service: Wrapper[str, int] = Buffer(10)(Reconnect("db", backoff=STEADY)(Connecting(Target(ConnectFailed("no")))))
    async with calls_of(service) as calls:
        await calls.start(5)
        await anyio.sleep(5)
        assert calls.answers == [1] * 5


async def test_a_connection_that_fails_to_tell_of_itself_is_not_lost_by_that(caplog: pytest.LogCaptureFixture) -> None:
    class Telling(Connection):
        async def events(self) -> AsyncGenerator[str]:
            yield "one"
            raise ZeroDivisionError

    target = Target(make=Telling)
    with caplog.at_level(logging.WARNING, logger="towline"):
        async with Reconnect("db")(target) as call:
            assert await call("a") == 1
            await wait_all_tasks_blocked()
            assert await call("b") == 1
            events = call.events()
        seen = [event async for event in events]
    assert "one" in seen
    assert [event.new for event in seen if isinstance(event, StateChanged)][-1] == "closed"
    assert "db: the connection tells no more of itself: ZeroDivisionError()" in caplog.text
