"""call_all: the order of responses, the limits, errors in their place, and leaving early."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any, assert_type

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import ConnectionLost, MisuseError, ServiceClosed
from towline.layers.all_calls import CallAll, call_all
from towline.service import Service
from towline.testing import cancel_at_every_await, virtual_time_backend
from towline.testing._mock import MockHandle, mock_pair


class Counted:
    """Takes as many seconds as it is asked for, and counts who is in it."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended: list[float] = []
        self.running = 0
        self.peak = 0

    async def __call__(self, seconds: float, /) -> float:
        self.begun.append(seconds)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await anyio.sleep(seconds)
        finally:
            self.running -= 1
        self.ended.append(seconds)
        return seconds


class Pulled:
    """An endless stream of numbers that counts how many were pulled."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        while True:
            self.count += 1
            yield self.count

    async def __aiter__(self) -> AsyncGenerator[int]:
        for number in self.plain():
            await anyio.sleep(0.001)
            yield number

    def plain(self) -> Iterator[int]:
        return Pulled.__iter__(self)


class PulledPlain(Pulled):
    __aiter__ = None  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


async def echo(request: int, /) -> int:
    await checkpoint()
    return request


async def settle() -> None:
    for _ in range(20):
        await checkpoint()


async def answer(handle: MockHandle[int, str], *requests: int) -> None:
    for request in requests:
        (await handle.expect(request)).respond(f"answer {request}")


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_responses_come_in_the_order_of_the_requests() -> None:
    service = Counted()
    start = anyio.current_time()
    async with call_all(service, [3.0, 1.0, 2.0]) as responses:
        assert [response async for response in responses] == [3, 1, 2]
    assert service.ended == [1, 2, 3]
    assert anyio.current_time() - start == pytest.approx(3)


async def test_or_in_the_order_in_which_they_are_there() -> None:
    service = Counted()
    start = anyio.current_time()
    async with call_all(service, [3.0, 1.0, 2.0], ordered=False) as responses:
        seen: list[tuple[float, float]] = []
        async for response in responses:
            seen.append((response, round(anyio.current_time() - start, 6)))
    assert seen == [(1, 1), (2, 2), (3, 3)]


@pytest.mark.parametrize("ordered", [True, False])
async def test_calls_begin_in_the_order_of_the_requests(ordered: bool) -> None:
    requests = [0.5 - 0.01 * n for n in range(50)]
    service = Counted()
    async with call_all(service, requests, ordered=ordered, concurrency=50) as responses:
        received = [response async for response in responses]
    assert service.begun == requests
    assert received == (requests if ordered else sorted(requests))


@pytest.mark.parametrize("ordered", [True, False])
async def test_no_requests_are_no_responses(ordered: bool) -> None:
    async def never() -> AsyncGenerator[int]:
        for number in list[int]():
            yield number

    async with call_all(echo, (), ordered=ordered) as responses:
        assert [response async for response in responses] == []
    async with call_all(echo, never(), ordered=ordered) as responses:
        assert [response async for response in responses] == []
        with pytest.raises(StopAsyncIteration):
            await anext(responses)  # and it stays at an end


async def test_none_is_a_request_and_a_response_as_any_other() -> None:
    async def same(request: int | None, /) -> int | None:
        return request

    async with call_all(same, [1, None, 2]) as responses:
        assert [response async for response in responses] == [1, None, 2]


async def test_requests_may_come_over_time() -> None:
    async def slowly() -> AsyncIterator[int]:
        for number in range(3):
            await anyio.sleep(10)
            yield number

    start = anyio.current_time()
    async with call_all(echo, slowly()) as responses:
        times = [round(anyio.current_time() - start, 6) async for _ in responses]
    assert times == [10, 20, 30]


async def test_what_can_be_iterated_in_both_ways_is_iterated_asynchronously() -> None:
    requests = Pulled()
    start = anyio.current_time()
    async with call_all(echo, requests, concurrency=1) as responses:
        assert await anext(responses) == 1
    assert anyio.current_time() > start


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("concurrency", [1, 2, 10])
async def test_never_more_run_than_may_and_as_many_as_may_do(concurrency: int, ordered: bool) -> None:
    service = Counted()
    start = anyio.current_time()
    async with call_all(service, [1.0] * 40, ordered=ordered, concurrency=concurrency) as responses:
        assert len([response async for response in responses]) == 40
    assert service.peak == concurrency
    assert anyio.current_time() - start == pytest.approx(40 / concurrency)


async def test_ten_run_at_once_by_default() -> None:
    service = Counted()
    async with call_all(service, [1.0] * 25) as responses:
        assert len([response async for response in responses]) == 25
    assert service.peak == 10


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("make", [Pulled, PulledPlain])
async def test_who_takes_responses_slowly_makes_requests_be_pulled_as_slowly(
    ordered: bool, make: Callable[[], Pulled]
) -> None:
    requests = make()
    async with call_all(echo, requests, ordered=ordered, concurrency=3) as responses:
        for taken in range(20):
            await anyio.sleep(1)
            assert requests.count == taken + 3  # what is under way, or waits to be taken, and not one more
            await anext(responses)


async def test_a_slow_call_at_the_head_stops_the_others_when_all_room_is_used_up() -> None:
    service = Counted()
    async with call_all(service, [100.0, *[1.0] * 9], concurrency=3) as responses:
        await anyio.sleep(50)
        assert service.ended == [1, 1]
        assert service.begun == [100, 1, 1]
        assert [response async for response in responses] == [100, *[1] * 9]


async def test_while_no_request_is_there_nothing_is_asked_of_the_service() -> None:
    service, handle = mock_pair(int, str, allow=1)
    send, receive = anyio.create_memory_object_stream[int](1)
    received: list[str] = []

    async def client() -> None:
        async with call_all(service, receive) as responses:
            async for response in responses:
                received.append(response)

    async with receive, send, anyio.create_task_group() as tasks:
        tasks.start_soon(client)
        await settle()
        assert service.ready_now()  # the one call that is let in is still to be had
        await send.send(1)
        await answer(handle, 1)
        await settle()
        assert received == ["answer 1"]
        assert not service.ready_now()
        await send.send(2)
        await settle()
        assert (handle.calls, handle.waiting) == (1, 1)
        handle.allow(1)
        await answer(handle, 2)
        send.close()
    assert received == ["answer 1", "answer 2"]


async def test_the_last_request_is_not_kept_while_the_next_is_waited_for() -> None:
    class Request:
        pass

    references: list[weakref.ref[Request]] = []

    async def source() -> AsyncGenerator[Request]:
        for _ in range(2):
            request = Request()
            references.append(weakref.ref(request))
            yield request
            del request
            await anyio.sleep(10)

    async def take(request: Request, /) -> None:
        del request
        await checkpoint()

    async with call_all(take, source()) as responses:
        await anext(responses)
        await anyio.sleep(1)
        gc.collect()
        assert references[0]() is None


# --- errors --------------------------------------------------------------------------------------------------------


async def fail_odd(request: int, /) -> int:
    await anyio.sleep(1 / (request + 1))
    if request % 2:
        raise ConnectionLost(str(request))
    return request


async def test_an_error_is_raised_in_its_place_as_it_is() -> None:
    error = ConnectionLost("cut")

    async def fail_third(request: int, /) -> int:
        if request == 3:
            raise error
        await anyio.sleep(1)
        return request

    received: list[int] = []

    async def take_all() -> None:
        async with call_all(fail_third, [1, 2, 3, 4]) as responses:
            async for response in responses:
                received.append(response)

    with pytest.raises(ConnectionLost) as caught:
        await take_all()
    assert received == [1, 2]
    assert caught.value is error


async def test_one_may_ask_on_after_an_error() -> None:
    outcomes: list[int | str] = []
    async with call_all(fail_odd, range(5)) as responses:
        while True:
            try:
                outcomes.append(await anext(responses))
            except ConnectionLost as error:
                outcomes.append(str(error))
            except StopAsyncIteration:
                break
    assert outcomes == [0, "1", 2, "3", 4]


@pytest.mark.parametrize("ordered", [True, False])
async def test_errors_may_be_values_of_the_iteration(ordered: bool) -> None:
    async with call_all(fail_odd, range(5), ordered=ordered, return_errors=True) as responses:
        outcomes = [str(response) async for response in responses]
    assert outcomes == (["0", "1", "2", "3", "4"] if ordered else ["4", "3", "2", "1", "0"])


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("return_errors", [True, False])
async def test_an_error_of_the_requests_is_raised_when_all_before_it_are_answered(
    ordered: bool, return_errors: bool
) -> None:
    error = ValueError("no more")

    async def source() -> AsyncGenerator[float]:
        yield 3.0
        yield 1.0
        raise error

    async with call_all(Counted(), source(), ordered=ordered, return_errors=return_errors) as responses:
        received = [await anext(responses), await anext(responses)]
        with pytest.raises(ValueError, match="no more") as caught:
            await anext(responses)
        assert caught.value is error
        with pytest.raises(StopAsyncIteration):
            await anext(responses)
    assert received == ([3, 1] if ordered else [1, 3])


async def test_an_error_of_a_plain_iterable_is_the_same() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise ValueError("no more")

    async with call_all(echo, source()) as responses:
        assert await anext(responses) == 1
        with pytest.raises(ValueError, match="no more"):
            await anext(responses)
        with pytest.raises(StopAsyncIteration):
            await anext(responses)


async def test_a_call_cannot_end_the_iteration_as_if_all_were_done() -> None:
    async def take_from_nothing(request: AsyncIterator[int], /) -> int:
        return await anext(request)

    async def nothing() -> AsyncGenerator[int]:
        for number in list[int]():
            yield number

    async with call_all(take_from_nothing, [nothing()]) as responses:
        with pytest.raises(RuntimeError, match="a call raised StopAsyncIteration") as caught:
            await anext(responses)
        assert isinstance(caught.value.__cause__, StopAsyncIteration)


async def test_an_error_of_the_block_leaves_it_as_it_is() -> None:
    service = Counted()
    error = ValueError("in the block")

    async def fail_in_the_block() -> None:
        async with call_all(service, [1.0, 100.0]) as responses:
            await anext(responses)
            raise error

    with pytest.raises(ValueError, match="in the block") as caught:
        await fail_in_the_block()
    assert caught.value is error
    assert (service.begun, service.ended, service.running) == ([1, 100], [1], 0)


async def test_what_is_no_exception_leaves_the_block_as_it_is() -> None:
    class Stop(BaseException):
        pass

    with pytest.raises(Stop):
        async with call_all(echo, [1, 2, 3]):
            raise Stop


async def test_what_is_no_exception_in_a_call_ends_the_block() -> None:
    class Stop(BaseException):
        pass

    async def stop(request: int, /) -> int:
        await checkpoint()
        raise Stop

    with pytest.raises(BaseExceptionGroup) as caught:
        async with call_all(stop, [1]):
            await anyio.sleep_forever()
    assert [type(each) for each in caught.value.exceptions] == [Stop]


async def test_an_error_is_free_when_whoever_got_it_is_done() -> None:
    class Weak(Exception):
        pass

    references: list[weakref.ref[Exception]] = []

    async def fail(request: int, /) -> int:
        error = Weak()
        references.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    def source() -> Iterator[int]:
        yield 1
        error = Weak()
        references.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    gc.collect()
    gc.disable()
    try:
        for return_errors in (True, False):
            some: Any = call_all(fail, source(), return_errors=return_errors)
            async with some as responses:
                for _ in range(2):
                    with suppress(Weak):
                        await anext(responses)
                assert [reference() for reference in references] == [None, None]
            references.clear()
        async with call_all(fail, source()) as responses:
            await settle()
            assert None not in [reference() for reference in references]
        # Neither was taken; their frames go with the tasks, which are let go of at the next turn of the loop
        del responses
        await settle()
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# --- leaving, cancelling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [True, False])
async def test_leaving_early_cancels_what_runs_and_waits_for_its_end(ordered: bool) -> None:
    cleaned: list[int] = []

    async def tidy(request: int, /) -> int:
        if request == 0:
            return request
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(5)
            cleaned.append(request)
        return request

    start = anyio.current_time()
    before = {task.id for task in anyio.get_running_tasks()}
    async with call_all(tidy, range(100), ordered=ordered, concurrency=4) as responses:
        async for response in responses:
            assert response == 0
            await settle()
            break
    assert sorted(cleaned) == [1, 2, 3, 4]
    assert anyio.current_time() - start == pytest.approx(5)
    assert {task.id for task in anyio.get_running_tasks()} == before


async def test_leaving_early_ends_a_source_that_is_waiting() -> None:
    ended: list[bool] = []

    async def source() -> AsyncGenerator[int]:
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            ended.append(True)

    async with call_all(echo, source()) as responses:
        assert await anext(responses) == 1
        await settle()
    assert ended == [True]


async def test_cancelling_the_caller_cancels_the_calls() -> None:
    service = Counted()
    with anyio.move_on_after(5) as scope:
        async with call_all(service, [1.0, 100.0, 100.0]) as responses:
            async for _ in responses:
                pass
    assert scope.cancelled_caught
    assert (service.running, service.ended) == (0, [1])


@pytest.mark.parametrize("ordered", [True, False])
async def test_waiting_for_a_response_may_be_cancelled_and_loses_none(ordered: bool) -> None:
    received: list[float] = []
    async with call_all(Counted(), [5.0, 4.0, 3.0], ordered=ordered) as responses:
        while len(received) < 3:
            with anyio.move_on_after(0.7):
                received.append(await anext(responses))
    assert received == ([5, 4, 3] if ordered else [3, 4, 5])


@pytest.mark.parametrize("ordered", [True, False])
async def test_cancelling_at_every_await_leaves_no_call_running(ordered: bool) -> None:
    service = Counted()

    async def source() -> AsyncGenerator[float]:
        for number in range(4):
            await anyio.sleep(0.5)
            yield float(number)

    async def once() -> None:
        async with call_all(service, source(), ordered=ordered, concurrency=2) as responses:
            async for _ in responses:
                await anyio.sleep(0.1)

    async def nothing_runs() -> None:
        assert service.running == 0

    assert await cancel_at_every_await(once, nothing_runs) >= 4


async def test_whoever_still_waits_when_the_block_ends_is_at_the_end() -> None:
    async def wait(responses: CallAll[float]) -> None:
        with pytest.raises(StopAsyncIteration):
            await anext(responses)

    async with anyio.create_task_group() as tasks, call_all(Counted(), [100.0]) as responses:
        tasks.start_soon(wait, responses)
        await settle()


async def test_two_may_take_responses_each_gets_its_share() -> None:
    received: list[int] = []

    async def take(responses: CallAll[int]) -> None:
        async for response in responses:
            received.append(response)
            await anyio.sleep(1)

    async with call_all(echo, range(10)) as responses, anyio.create_task_group() as tasks:
        tasks.start_soon(take, responses)
        tasks.start_soon(take, responses)
    assert sorted(received) == list(range(10))


async def test_a_service_that_is_closed_fails_each_call() -> None:
    service, handle = mock_pair(int, str)
    handle.close()
    async with call_all(service, range(3), return_errors=True) as responses:
        outcomes = [type(outcome) async for outcome in responses]
    assert outcomes == [ServiceClosed] * 3


# --- use and misuse ------------------------------------------------------------------------------------------------


async def test_it_is_entered_before_it_is_iterated_over_and_only_once() -> None:
    responses = call_all(echo, [1])
    with pytest.raises(MisuseError, match=r"call_all is used as: async with call_all\(\.\.\.\) as responses"):
        await anext(responses)
    async with responses as same:
        assert same is responses
        with pytest.raises(MisuseError, match="call_all is used once"):
            await responses.__aenter__()
    with pytest.raises(MisuseError, match="call_all is used once"):
        await responses.__aenter__()
    with pytest.raises(StopAsyncIteration):
        await anext(responses)


@pytest.mark.parametrize("concurrency", [0, -1, math.nan])
def test_a_concurrency_that_makes_no_sense_is_refused_with_both_numbers(concurrency: int) -> None:
    with pytest.raises(ValueError, match=f"^concurrency is {concurrency}, where 1 or more is expected$"):
        call_all(echo, [1], concurrency=concurrency)


def test_requests_that_cannot_be_iterated_over_are_refused() -> None:
    five: Any = 5
    with pytest.raises(TypeError, match=r"^call_all takes the requests as an iterable, not 5$"):
        call_all(echo, five)


async def test_the_type_of_the_responses_is_that_of_the_service() -> None:
    async def source() -> AsyncGenerator[int]:
        yield 1

    service: Service[int, int] = echo
    assert_type(call_all(service, [1]), CallAll[int])
    assert_type(call_all(echo, source()), CallAll[int])
    assert_type(call_all(echo, source(), return_errors=True), CallAll[int | Exception])
    async with call_all(echo, [1]) as responses:
        async for response in responses:
            assert_type(response, int)
    call_all(echo, ["one"])  # type: ignore[misc]


# --- whatever the times --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(
    seconds=st.lists(st.integers(0, 5).map(float), max_size=20),
    gaps=st.lists(st.integers(0, 3), max_size=20),
    pause=st.integers(0, 3),
    concurrency=st.integers(1, 6),
    ordered=st.booleans(),
    backend=st.sampled_from(["asyncio", "trio"]),
)
def test_every_request_is_answered_once_within_the_limit_whatever_takes_how_long(
    seconds: list[float], gaps: list[int], pause: int, concurrency: int, ordered: bool, backend: str
) -> None:
    async def main() -> None:
        service = Counted()
        pulled = 0

        async def source() -> AsyncGenerator[float]:
            nonlocal pulled
            for number, each in enumerate(seconds):
                if number < len(gaps):
                    await anyio.sleep(gaps[number])
                pulled += 1
                yield each

        received: list[float] = []
        async with call_all(service, source(), ordered=ordered, concurrency=concurrency) as responses:
            async for response in responses:
                assert pulled - len(received) <= concurrency
                received.append(response)
                await anyio.sleep(pause)
        assert service.peak <= concurrency
        assert service.begun == seconds
        assert (received if ordered else sorted(received)) == (seconds if ordered else sorted(seconds))

    name, options = virtual_time_backend(backend)
    anyio.run(main, backend=name, backend_options=options)
