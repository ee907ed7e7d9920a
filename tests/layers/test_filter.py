"""The Filter layer: what it lets through, what it turns away, and what it says then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, assert_type

import anyio
import pytest

from towline.errors import CallRejected, Filtered, RateLimited
from towline.hooks import CallShed, Hooks
from towline.layers.filter import Filter
from towline.layers.retry import Retry, given_up
from towline.policies import Backoff
from towline.service import Layer, Wrapper, load, ready_now
from towline.testing import cancel_at_every_await
from towline.testing._mock import mock_pair


class Told(Hooks):
    def __init__(self) -> None:
        self.shed: list[CallShed] = []

    def on_shed(self, event: CallShed, /) -> None:
        self.shed.append(event)


async def echo(request: str, /) -> str:
    return request


def is_short(request: str) -> bool:
    return len(request) <= 5


async def is_short_after_all(request: str) -> bool:
    await anyio.sleep(1)
    return len(request) <= 5


async def only_short(request: str) -> bool:
    await anyio.sleep(1)
    raise RateLimited("too much text", 5.0)


either = pytest.mark.parametrize("accept", [is_short, is_short_after_all], ids=["sync", "async"])


@pytest.mark.smoke
@either
async def test_what_is_accepted_goes_through(accept: Callable[[str], bool | Awaitable[bool]]) -> None:
    service, handle = mock_pair(str, str)

    async def client() -> None:
        assert await Filter(accept)(service)("hello") == "world"

    async with anyio.create_task_group() as tasks, handle:
        tasks.start_soon(client)
        (await handle.expect("hello")).respond("world")


@either
async def test_what_is_not_accepted_is_filtered_and_the_service_never_sees_it(
    accept: Callable[[str], bool | Awaitable[bool]],
) -> None:
    service, handle = mock_pair(str, str)
    with pytest.raises(Filtered) as caught:
        await Filter(accept)(service)("my secret")
    assert handle.calls == 0
    # It says what it was, not what was in it
    assert str(caught.value) == "a request of type str is not let through"
    assert isinstance(caught.value, CallRejected)
    assert not caught.value.retryable
    assert caught.value.sent is False


@pytest.mark.parametrize("answer", [1, "yes", [0]])
async def test_what_is_true_will_do(answer: Any) -> None:
    assert await Filter(lambda request: answer)(echo)("hello") == "hello"


@pytest.mark.parametrize("answer", [0, "", None, []])
async def test_what_is_not_true_will_not(answer: Any) -> None:
    with pytest.raises(Filtered):
        await Filter(lambda request: answer)(echo)("hello")


async def test_a_filter_may_raise_an_error_of_its_own_which_goes_to_the_caller_as_it_is() -> None:
    service, handle = mock_pair(str, str)
    error = PermissionError("not you")

    def refuse(request: str) -> bool:
        raise error

    with pytest.raises(PermissionError) as caught:
        await Filter(refuse)(service)("hello")
    assert caught.value is error
    with pytest.raises(RateLimited):
        await Filter(only_short)(service)("hello")
    assert handle.calls == 0


async def test_an_error_of_the_service_is_none_of_the_filters() -> None:
    told = Told()

    async def broken(request: str, /) -> str:
        raise KeyError(request)

    with pytest.raises(KeyError):
        await Filter(is_short, hooks=told)(broken)("hello")
    assert told.shed == []


async def test_hooks_are_told_of_what_is_turned_away_and_of_nothing_else() -> None:
    told = Told()
    filtered = Filter(is_short, hooks=told)(echo)
    await filtered("hello")
    assert told.shed == []
    with pytest.raises(Filtered) as caught:
        await filtered("hello, world")
    with pytest.raises(RateLimited) as other:
        await Filter(only_short, hooks=told)(echo)("hello")
    assert told.shed == [CallShed("Filter", caught.value), CallShed("Filter", other.value)]


async def test_a_retry_further_out_does_not_try_again() -> None:
    service, handle = mock_pair(str, str)
    asked: list[str] = []

    def refuse(request: str) -> bool:
        asked.append(request)
        return False

    with pytest.raises(Filtered) as caught:
        await Retry(Backoff.constant(1))(Filter(refuse)(service))("hello")
    assert asked == ["hello"]
    assert handle.calls == 0
    assert given_up(caught.value) is None


async def test_cancelling_at_every_await_is_passed_on_and_told_to_nobody() -> None:
    told = Told()

    async def slow(request: str, /) -> str:
        await anyio.sleep(1)
        return request

    filtered = Filter(is_short_after_all, hooks=told)(slow)

    async def once() -> None:
        await filtered("hello")

    assert await cancel_at_every_await(once) == 2
    assert told.shed == []


def test_hints_are_those_of_the_service_inside() -> None:
    service, _ = mock_pair(str, str, allow=0)
    assert not ready_now(Filter(is_short)(service))
    assert load(Filter(is_short)(service)) == 0


async def test_one_filter_fits_many_services_of_any_type() -> None:
    async def length(request: bytes, /) -> int:
        return len(request)

    layer = Filter(lambda request: len(request) <= 5)
    assert_type(layer(echo), Wrapper[str, str])
    assert_type(layer(length), Wrapper[bytes, int])
    transparent: Layer = layer
    assert await transparent(echo)("hello") == "hello"
    assert await layer(length)(b"hello") == 5


def test_filters_are_values_for_both_sides() -> None:
    assert Filter(is_short) == Filter(is_short) != Filter(is_short_after_all)
    assert not Filter.client_only
    assert repr(Filter(is_short)(echo)) == "<Filtering around echo>"


def test_what_is_no_function_is_refused() -> None:
    accept: Any = True
    with pytest.raises(TypeError, match=r"^Filter takes a function, not True$"):
        Filter(accept)
