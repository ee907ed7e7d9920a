"""The mock pair: what comes in, what is let in, what is answered, and who gave up."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.errors import ConnectionLost, MisuseError, ServiceClosed
from towline.service import Service, load, ready_now
from towline.testing import cancel_at_every_await
from towline.testing._mock import MockHandle, MockService, mock_pair


class Client:
    """Calls a service from tasks of its own, and keeps what comes back under the request."""

    def __init__(self, service: Service[str, str]) -> None:
        self.service = service
        self.outcomes: dict[str, str | Exception] = {}

    async def call(self, request: str) -> None:
        try:
            self.outcomes[request] = await self.service(request)
        except Exception as error:
            self.outcomes[request] = error


async def settle() -> None:
    for _ in range(10):
        await anyio.lowlevel.checkpoint()


# --- requests and answers ------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_a_request_comes_out_and_its_answer_goes_back() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, "hello")
        call = await handle.next_request()
        assert call.request == "hello"
        assert not call.is_answered
        assert client.outcomes == {}
        call.respond("world")
        assert call.is_answered
    assert client.outcomes == {"hello": "world"}


async def test_none_is_a_request_and_an_answer_as_any_other() -> None:
    service, handle = mock_pair()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(service, None)
        (await handle.expect(None)).respond(None)


async def test_a_failed_call_raises_that_very_error() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    error = ConnectionLost("cut")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, "hello")
        (await handle.next_request()).fail(error)
    assert client.outcomes == {"hello": error}
    assert client.outcomes["hello"] is error


async def test_requests_come_out_in_order_and_are_answered_in_any_order() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(client.call, name)
            await settle()
        calls = [await handle.next_request() for _ in range(3)]
        assert [call.request for call in calls] == ["a", "b", "c"]
        for call in reversed(calls):
            call.respond(call.request.upper())
            await settle()
    assert list(client.outcomes) == ["c", "b", "a"]
    assert client.outcomes["a"] == "A"


async def test_a_call_waits_for_its_answer_as_long_as_it_takes() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, "hello")
        call = await handle.next_request()
        await anyio.sleep(3600)
        assert client.outcomes == {}
        call.respond("at last")
    assert client.outcomes == {"hello": "at last"}


async def test_a_request_that_is_waited_for_comes_when_it_is_made() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)

    async def later() -> None:
        await anyio.sleep(5)
        await client.call("hello")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(later)
        (await handle.expect("hello")).respond("world")
        assert anyio.current_time() >= 5
    assert client.outcomes == {"hello": "world"}


async def test_two_who_wait_for_a_request_get_one_each() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)

    async def serve() -> None:
        call = await handle.next_request()
        await anyio.sleep(1)
        call.respond(call.request.upper())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(serve)
        tasks.start_soon(serve)
        await settle()
        tasks.start_soon(client.call, "a")
        tasks.start_soon(client.call, "b")
    assert client.outcomes == {"a": "A", "b": "B"}


async def test_answering_twice_is_refused() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, "hello")
        call = await handle.next_request()
        call.respond("world")
        with pytest.raises(MisuseError, match="the request 'hello' was answered before"):
            call.respond("again")
        with pytest.raises(MisuseError):
            call.fail(OSError())
    assert client.outcomes == {"hello": "world"}


async def test_the_next_request_is_there_at_once_or_not_at_all() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        assert handle.next_request_nowait() is None
        tasks.start_soon(Client(service).call, "hello")
        await settle()
        call = handle.next_request_nowait()
        assert call is not None
        assert handle.next_request_nowait() is None
        call.respond("world")


async def test_expecting_another_request_names_both() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "hello")
        with pytest.raises(AssertionError, match=r"^the next request is 'hello', where 'goodbye' is expected$"):
            await handle.expect("goodbye")
        tasks.cancel_scope.cancel()


async def test_what_is_pending_can_be_seen_and_answered_without_being_taken() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(client.call, name)
            await settle()
        taken = await handle.next_request()
        assert [call.request for call in handle.pending] == ["a", "b", "c"]
        handle.pending[1].respond("B")
        assert [call.request for call in handle.pending] == ["a", "c"]
        (await handle.expect("c")).respond("C")
        assert list(handle.pending) == [taken]
        taken.respond("A")
        assert not handle.pending
        assert handle.calls == 3
    assert client.outcomes == {"a": "A", "b": "B", "c": "C"}


# --- what is let in ------------------------------------------------------------------------------------------------


async def test_by_default_any_number_of_calls_comes_in() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        for n in range(100):
            tasks.start_soon(Client(service).call, str(n))
        await settle()
        assert (handle.calls, handle.waiting) == (100, 0)
        assert service.ready_now()
        tasks.cancel_scope.cancel()


async def test_calls_beyond_the_number_wait_and_come_in_first_come_first_served() -> None:
    service, handle = mock_pair(str, str, allow=1)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        assert ready_now(service)
        for name in "abcd":
            tasks.start_soon(client.call, name)
            await settle()
        assert not ready_now(service)
        assert (handle.calls, handle.waiting, load(service)) == (1, 3, 4)
        (await handle.expect("a")).respond("A")
        await settle()
        assert handle.next_request_nowait() is None  # an answer makes no room: it is a number of calls
        assert not ready_now(service)
        handle.allow(2)
        assert not ready_now(service)  # both are for those that wait
        for name in "bc":
            (await handle.expect(name)).respond(name.upper())
        handle.allow(None)
        assert ready_now(service)
        (await handle.expect("d")).respond("D")
    assert client.outcomes == {"a": "A", "b": "B", "c": "C", "d": "D"}
    assert (handle.calls, handle.waiting, load(service)) == (4, 0, 0)


async def test_a_new_number_replaces_the_old_one() -> None:
    service, handle = mock_pair(str, str, allow=5)
    handle.allow(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "a")
        tasks.start_soon(Client(service).call, "b")
        await settle()
        assert (handle.calls, handle.waiting) == (1, 1)
        handle.allow(0)
        await settle()
        assert (handle.calls, handle.waiting) == (1, 1)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("make", [lambda: mock_pair(allow=-1), lambda: mock_pair()[1].allow(-1)])
def test_a_negative_number_of_calls_is_refused_with_both_numbers(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"^-1 calls are allowed, where 0 or more is expected$"):
        make()


async def test_a_call_that_gives_up_outside_never_comes_in_and_uses_up_nothing() -> None:
    service, handle = mock_pair(str, str, allow=0)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(1):
            await service("impatient")
        assert handle.waiting == 0
        tasks.start_soon(client.call, "patient")
        await settle()
        handle.allow(1)
        (await handle.expect("patient")).respond("yes")
    assert handle.calls == 1
    assert client.outcomes == {"patient": "yes"}


# --- failing before anything is seen -------------------------------------------------------------------------------


async def test_the_next_call_fails_without_being_seen() -> None:
    service, handle = mock_pair(str, str)
    first, second = OSError("first"), OSError("second")
    handle.fail_next(first)
    handle.fail_next(second)
    client = Client(service)
    for name in "ab":
        await client.call(name)
    assert list(client.outcomes.values()) == [first, second]
    assert handle.calls == 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.call, "c")
        (await handle.expect("c")).respond("C")
    assert client.outcomes["c"] == "C"


async def test_a_failure_to_come_makes_the_service_ready_since_nothing_waits_for_it() -> None:
    service, handle = mock_pair(str, str, allow=0)
    assert not service.ready_now()
    handle.fail_next(OSError("no"))
    assert service.ready_now()
    with pytest.raises(OSError, match="no"):
        await service("hello")
    assert not service.ready_now()


async def test_the_oldest_call_that_waits_outside_is_the_next() -> None:
    service, handle = mock_pair(str, str, allow=0)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        for name in "ab":
            tasks.start_soon(client.call, name)
            await settle()
        error = OSError("no")
        handle.fail_next(error)
        await settle()
        assert client.outcomes == {"a": error}
        assert (handle.calls, handle.waiting) == (0, 1)
        tasks.cancel_scope.cancel()


# --- the caller gives up -------------------------------------------------------------------------------------------


async def test_a_caller_that_gives_up_is_noticed() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "hello")
        call = await handle.next_request()
        assert not call.is_cancelled
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await call.cancelled()
            await call.cancelled()  # and stays so
        assert call.is_cancelled
        assert not call.is_answered
        assert not handle.pending
        call.respond("too late")  # goes nowhere
        assert call.is_answered


async def test_waiting_for_a_caller_to_give_up_that_gets_its_answer_is_an_error() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "hello")
        call = await handle.next_request()
        call.respond("world")
        with pytest.raises(AssertionError, match="the caller of 'hello' did not give up: it got its answer"):
            await call.cancelled()


async def test_a_call_that_nobody_took_before_its_caller_gave_up_comes_as_cancelled() -> None:
    service, handle = mock_pair(str, str)
    with anyio.move_on_after(1):
        await service("hello")
    assert (handle.calls, handle.pending) == (1, ())
    call = await handle.expect("hello")
    assert call.is_cancelled
    assert handle.next_request_nowait() is None


async def test_cancelling_at_every_await_leaves_nothing_pending() -> None:
    service, handle = mock_pair(str, str, allow=1)

    async def nothing_is_left() -> None:
        await settle()
        while handle.next_request_nowait() is not None:
            pass
        assert (handle.pending, handle.waiting) == ((), 0)
        handle.allow(1)

    async def exchange() -> None:
        async def answer() -> None:
            handle.allow(1)
            (await handle.next_request()).respond("world")

        async with anyio.create_task_group() as tasks:
            handle.allow(0)
            tasks.start_soon(answer)
            await service("hello")

    assert await cancel_at_every_await(exchange, nothing_is_left) >= 1


async def test_a_request_is_not_lost_with_the_one_who_waits_for_it() -> None:
    service, handle = mock_pair(str, str)
    taken: list[str] = []

    async def take() -> None:
        taken.append((await handle.next_request()).request)

    async with anyio.create_task_group() as callers:
        for name in "ab":
            callers.start_soon(Client(service).call, name)
            await settle()
        assert await cancel_at_every_await(take) == 1  # once it is cancelled, and once not
        assert taken == ["a"]
        assert (await handle.next_request()).request == "b"
        callers.cancel_scope.cancel()


# --- the end -------------------------------------------------------------------------------------------------------


async def test_closing_fails_what_waits_and_all_that_comes_later() -> None:
    service, handle = mock_pair(str, str, allow=2)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(client.call, name)
            await settle()
        taken = await handle.expect("a")
        handle.fail_next(OSError("for c"))
        await settle()
        tasks.start_soon(client.call, "d")
        await settle()
        handle.close()
        handle.close()
        await settle()
        assert isinstance(client.outcomes["b"], ServiceClosed)
        assert isinstance(client.outcomes["c"], OSError)
        assert isinstance(client.outcomes["d"], ServiceClosed)
        assert client.outcomes["b"] is not client.outcomes["d"]
        assert "a" not in client.outcomes
        taken.respond("A")
    assert client.outcomes["a"] == "A"
    handle.fail_next(OSError("not any more"))
    assert service.ready_now()  # to fail
    with pytest.raises(ServiceClosed, match="the mock is closed"):
        await service("e")
    with pytest.raises(ServiceClosed):
        await handle.next_request()
    with pytest.raises(ServiceClosed):
        await handle.expect("e")
    assert handle.next_request_nowait() is None


async def test_closing_after_a_call_was_answered_or_given_up_changes_nothing_for_it() -> None:
    service, handle = mock_pair(str, str)
    client = Client(service)
    async with anyio.create_task_group() as tasks:
        with anyio.move_on_after(1):
            await service("impatient")
        tasks.start_soon(client.call, "hello")
        await settle()
        handle.pending[0].respond("world")
        handle.close()
    assert client.outcomes == {"hello": "world"}


async def test_closing_wakes_whoever_waits_for_a_request() -> None:
    _, handle = mock_pair(str, str)

    async def wait() -> None:
        with pytest.raises(ServiceClosed):
            await handle.next_request()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await settle()
        handle.close()


async def test_failures_to_come_end_with_closing() -> None:
    service, handle = mock_pair(str, str)
    handle.fail_next(OSError("no"))
    handle.close()
    with pytest.raises(ServiceClosed):
        await service("hello")


async def test_at_the_end_of_the_block_all_must_be_answered() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks, handle as same:
        assert same is handle
        tasks.start_soon(Client(service).call, "hello")
        (await handle.next_request()).respond("world")
    with pytest.raises(ServiceClosed):
        await service("later")


@pytest.mark.parametrize("take", [True, False], ids=["taken", "not taken"])
async def test_what_is_unanswered_at_the_end_of_the_block_is_listed(take: bool) -> None:
    service, handle = mock_pair(str, str, allow=2)
    async with anyio.create_task_group() as tasks:
        for name in "abc":
            tasks.start_soon(Client(service).call, name)
            await settle()
        (await handle.expect("a")).respond("A")
        if take:
            await handle.expect("b")
        with pytest.raises(AssertionError, match=r"^2 unanswered: 'b', 'c'$"):
            async with handle:
                pass
        assert handle.waiting == 1  # nobody was woken by an error beside that one
        with pytest.raises(ServiceClosed):
            await service("later")
        tasks.cancel_scope.cancel()


async def test_an_error_in_the_block_is_not_hidden_by_what_it_left_unanswered() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "hello")
        await settle()
        with pytest.raises(ValueError, match="in the block"):
            async with handle:
                raise ValueError("in the block")
        with pytest.raises(ServiceClosed):
            await service("later")
        tasks.cancel_scope.cancel()


async def test_what_was_given_up_is_not_unanswered_not_even_when_that_has_just_happened() -> None:
    service, handle = mock_pair(str, str)
    async with anyio.create_task_group() as tasks, handle:
        for name in "abcdefgh":
            tasks.start_soon(Client(service).call, name)
        await settle()
        (await handle.next_request()).respond("A")
        tasks.cancel_scope.cancel()

    service, handle = mock_pair(str, str)
    async with handle, anyio.create_task_group() as tasks:
        tasks.start_soon(Client(service).call, "hello")
        await handle.next_request()
        tasks.cancel_scope.cancel()

    service, handle = mock_pair(str, str)
    scopes = [anyio.CancelScope() for _ in range(8)]

    async def client(scope: anyio.CancelScope) -> None:
        with scope:
            await service("hello")

    async with anyio.create_task_group() as tasks, handle:
        for scope in scopes:
            tasks.start_soon(client, scope)
        await settle()
        assert len(handle.pending) == 8
        for scope in scopes:
            scope.cancel()


# --- and as an object ----------------------------------------------------------------------------------------------


def test_it_can_be_made_outside_an_event_loop_and_used_inside() -> None:
    service, handle = mock_pair(int, int)

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(service, 1)
            (await handle.expect(1)).respond(2)

    for backend in ("asyncio", "trio"):
        anyio.run(main, backend=backend)


async def test_what_it_is_made_of_says_what_it_waits_for() -> None:
    service, handle = mock_pair(str, str, allow=1)
    assert repr(service) == "<MockService, 0 waiting>"
    async with anyio.create_task_group() as tasks:
        for name in "ab":
            tasks.start_soon(Client(service).call, name)
            await settle()
        assert repr(service) == "<MockService, 2 waiting>"
        assert repr(handle) == "<MockHandle, 1 pending, 1 waiting>"
        call = await handle.next_request()
        assert repr(call) == "<MockCall of 'a', pending>"
        call.respond("A")
        assert repr(call) == "<MockCall of 'a', answered>"
        handle.allow(1)
        call = await handle.next_request()
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await call.cancelled()
        assert repr(call) == "<MockCall of 'b', cancelled>"
    handle.close()
    assert repr(handle) == "<MockHandle, 0 pending, 0 waiting, closed>"


async def test_an_error_that_was_given_as_an_answer_is_free_when_its_caller_is_done() -> None:
    class Weak(Exception):
        pass

    service, handle = mock_pair(str, str)
    references: list[weakref.ref[Exception]] = []

    async def client() -> None:
        with suppress(Weak):
            await service("hello")

    gc.collect()
    gc.disable()
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client)
            call = await handle.next_request()
            error = Weak()
            references.append(weakref.ref(error))
            call.fail(error)
            del error
        assert references[0]() is None
    finally:
        gc.enable()


def typed() -> None:
    """Checked by the type checkers only."""
    service, handle = mock_pair(str, int)
    as_service: Service[str, int] = service
    exact: tuple[MockService[str, int], MockHandle[str, int]] = (service, handle)
    free: tuple[MockService[bytes, None], MockHandle[bytes, None]] = mock_pair()
    anything: Service[Any, Any] = free[0]
    del as_service, exact, anything
