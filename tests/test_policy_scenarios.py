"""Scenarios that no layer has to itself: what a recommended stack of them does as one, and what Tower's builder did."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline import (
    Backoff,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Elapsed,
    Framing,
    Hedge,
    LoadShed,
    RateLimit,
    Retry,
    Service,
    Stack,
    StandardPolicy,
    Timeout,
    running,
)
from towline.clock import Clock
from towline.hooks import AttemptEnded, GaveUp, HedgeStarted, Hooks, RetryScheduled
from towline.layers import map_request, map_response
from towline.policies import Answer, Attempt, FixedWindow, PolicySession, TpsBudget
from towline.testing import mock_pair

STEADY = Backoff.constant(0.1, jitter="none")


class Unlike(ConnectionError):
    """What only the services here raise."""


def recommended() -> tuple[object, ...]:
    """The layers around calls in the order that is recommended, outermost first, each with something to do."""
    return (
        Deadline(60),
        LoadShed(),
        ConcurrencyLimit(10),
        Retry(StandardPolicy(STEADY, on=Unlike, idempotent=True, max_attempts=2)),
        Hedge(0.01, on=Unlike),
        CircuitBreaker(),
        RateLimit(1000, per=1),
        Timeout(5),
    )


# --- Stack -----------------------------------------------------------------------------------------------------------


async def test_s1_towers_builder_service_with_all_its_layers() -> None:
    # Tower: buffer(5), concurrency limit 5, rate limit 5 in 5 s, retry, map_response, map_request
    service, handle = mock_pair(bool, str)

    def is_hello(request: str) -> bool:
        return request == "hello"

    def is_world(response: str) -> bool:
        return response == "world"

    stack = (
        Stack.of(str, bool)
        .layer(Buffer(5))
        .layer(ConcurrencyLimit(5))
        .layer(RateLimit(FixedWindow(5, per=5)))
        .layer(Retry())
        .layer(map_response(is_world))
        .layer(map_request(is_hello))
    )
    answers: list[bool] = []

    async def client(call: Service[str, bool]) -> None:
        answers.append(await call("hello"))

    async with running(stack(service)) as call, handle:
        start = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(client, call)
            for _ in range(5):
                (await handle.expect(True)).respond("world")
            assert anyio.current_time() == start
            (await handle.expect(True)).respond("else")
    assert answers == [True] * 5 + [False]
    assert anyio.current_time() - start == pytest.approx(5)


def test_s7_a_wrong_transport_is_rejected_by_type_checkers() -> None:
    # They find the comments here that hide nothing.
    Stack(Framing(), transports=("tcp",))  # type: ignore[arg-type]


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("is_reversed", [False, True], ids=["forwards", "backwards"])
async def test_s10_the_recommended_layers_in_other_orders_raise_the_same(turn: int, is_reversed: bool) -> None:
    error = Unlike("of the service itself")

    async def fails(request: int, /) -> int:
        await anyio.sleep(0.05)
        raise error

    async def hangs(request: int, /) -> int:
        await anyio.sleep_forever()
        return request

    layers = recommended()
    layers = layers[turn:] + layers[:turn]
    if is_reversed:
        layers = layers[::-1]
    with pytest.raises(Unlike) as caught:
        await Stack(*layers)(fails)(1)
    assert caught.value is error
    with pytest.raises(Elapsed):
        await Stack(*layers)(hangs)(1)


# --- Retry -----------------------------------------------------------------------------------------------------------


class Eager(PolicySession[Any, Any]):
    """Wants the first few outcomes again, and says which it was asked about."""

    def __init__(self) -> None:
        self.asked: list[object] = []
        self.ended = 0

    def session(self, request: object, /, *, clock: Clock, random: Random) -> Eager:
        return self

    def retry(self, attempt: Attempt[Any, Any], /) -> Answer:
        self.asked.append(attempt.error)
        return 0.0 if len(self.asked) < 5 else None

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_r11_what_ends_the_program_is_one_call_and_no_question_to_the_policy(kind: type[BaseException]) -> None:
    calls = 0

    async def interrupted(request: str, /) -> None:
        nonlocal calls
        calls += 1
        await anyio.lowlevel.checkpoint()
        raise kind

    policy = Eager()
    for attempt in (
        Retry(policy)(interrupted),
        Stack(Timeout(60), ConcurrencyLimit(1), Retry(policy), CircuitBreaker(), Timeout(5))(interrupted),
    ):
        calls = 0
        with pytest.raises(kind):
            await attempt("hello")
        assert calls == 1
    assert policy.asked == []
    assert policy.ended == 2


async def test_r18_every_hook_may_raise_and_the_caller_gets_the_last_error_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken(Hooks):
        def on_attempt(self, event: AttemptEnded, /) -> None:
            raise ZeroDivisionError

        def on_retry_scheduled(self, event: RetryScheduled, /) -> None:
            raise ZeroDivisionError

        def on_give_up(self, event: GaveUp, /) -> None:
            raise ZeroDivisionError

        def on_hedge(self, event: HedgeStarted, /) -> None:
            raise ZeroDivisionError

    errors: list[Unlike] = []

    async def fails(request: str, /) -> None:
        await anyio.sleep(0.05)
        errors.append(Unlike(len(errors)))
        raise errors[-1]

    hooks = Broken()
    retry = Retry(StandardPolicy(STEADY, on=Unlike, max_attempts=2), hooks=hooks)
    with pytest.raises(Unlike) as caught:
        await retry(Hedge(0.01, on=Unlike, hooks=hooks)(fails))("hello")
    assert caught.value is errors[-1]
    assert len(errors) == 4  # two attempts, each with one hedge
    assert len(caplog.records) == 6  # of each attempt a hedge and its end; one retry; giving up


@pytest.mark.parametrize("takes", [0.001, 0.05], ids=["before the hedge", "with a hedge beside it"])
async def test_r22_errors_that_went_through_the_recommended_stack_are_in_no_cycle(takes: float) -> None:
    raised: list[weakref.ref[Exception]] = []

    async def fails(request: str, /) -> None:
        await anyio.sleep(takes)
        error = Unlike(request)
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    call = Stack(*recommended())(fails)
    await anyio.lowlevel.checkpoint()
    gc.collect()
    gc.disable()
    try:
        with suppress(Unlike):
            await call("hello")
        await anyio.lowlevel.checkpoint()  # what ended in a task of its own is forgotten by the event loop
        assert len(raised) == 4
        assert [each() for each in raised] == [None] * 4
    finally:
        gc.enable()


async def test_r22_the_error_of_an_attempt_is_gone_before_the_wait_for_the_next_one() -> None:
    raised: list[weakref.ref[Exception]] = []
    alive: list[list[bool]] = []

    async def fails(request: str, /) -> None:
        error = Unlike(request)
        raised.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    async def sleep(seconds: float) -> None:
        alive.append([each() is not None for each in raised])
        await anyio.sleep(seconds)

    call = Retry(StandardPolicy(STEADY, on=Unlike), sleep=sleep)(fails)
    gc.collect()
    gc.disable()
    try:
        with suppress(Unlike):
            await call("hello")
        assert alive == [[False], [False, False]]
    finally:
        gc.enable()


# --- Budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("takes", [0.001, 0.05], ids=["hedges after failures", "hedges after the delay"])
async def test_g6_one_budget_for_retries_and_hedges_bounds_both_together(takes: float) -> None:
    # Without one they multiply: 2 attempts of 2 calls are 4,000 calls.
    calls = 0

    async def broken(request: int, /) -> None:
        nonlocal calls
        calls += 1
        await anyio.sleep(takes)
        raise Unlike(request)

    async def storm(call: Callable[[int], Any]) -> int:
        async def client(number: int) -> None:
            with pytest.raises(Unlike):
                await call(number)

        nonlocal calls
        calls = 0
        async with anyio.create_task_group() as tasks:
            for number in range(1000):
                tasks.start_soon(client, number)
        return calls

    def stack(budget: TpsBudget | None) -> Stack[Any, Any, Any, Any]:
        retry = Retry(StandardPolicy(STEADY, on=Unlike, max_attempts=2, budget=budget))
        return Stack(retry, Hedge(0.01, on=Unlike, budget=budget))

    assert await storm(stack(None)(broken)) == 4000
    assert await storm(stack(TpsBudget(ttl=60, min_per_sec=2))(broken)) == 1000 + 120
