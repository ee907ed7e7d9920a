"""The layers made from functions: what they change, what they leave alone, and the types they say."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, suppress
from typing import Any, assert_type

import anyio
import pytest

from towline.errors import ConnectionLost
from towline.layers.map import RequestLayer, ResponseLayer, map_error, map_request, map_response, then
from towline.layers.timeout import Timeout
from towline.service import Layer, Service, Wrapper, load, ready_now, running
from towline.testing import cancel_at_every_await
from towline.testing._mock import mock_pair


async def echo(request: int, /) -> int:
    return request


async def broken(request: str, /) -> str:
    raise KeyError(request)


class Busy(Wrapper[int, int]):
    """A service with hints of its own, and a lifetime."""

    entered = False

    def __init__(self) -> None:
        super().__init__(echo)

    async def __call__(self, request: int, /) -> int:
        response: int = await self.inner(request)
        return response

    def ready_now(self) -> bool:
        return False

    def load(self) -> float:
        return 7.0

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        self.entered = True
        yield


def add_two(number: int) -> int:
    return number + 2


def twice(number: int) -> int:
    return number * 2


def same(error: Exception) -> Exception:
    return error


EACH: list[Any] = [map_request(add_two), map_response(add_two), map_error(same), then(add_two, lambda error: 0)]
names = pytest.mark.parametrize("layer", EACH, ids=["map_request", "map_response", "map_error", "then"])

# --- requests and responses ----------------------------------------------------------------------------------------


async def test_s2_two_layers_of_responses_apply_the_inner_one_first() -> None:
    assert await map_response(twice)(map_response(add_two)(echo))(4) == 12
    assert await map_response(add_two)(map_response(twice)(echo))(4) == 10


async def test_s2_two_layers_of_requests_apply_the_outer_one_first() -> None:
    assert await map_request(twice)(map_request(add_two)(echo))(4) == 10
    assert await map_request(add_two)(map_request(twice)(echo))(4) == 12


async def test_s2_a_plain_function_is_a_layer() -> None:
    def plus_two(inner: Service[int, int], /) -> Service[int, int]:
        async def call(request: int, /) -> int:
            return await inner(request) + 2

        return call

    assert await map_response(twice)(plus_two(echo))(4) == 12
    assert await plus_two(map_response(twice)(echo))(4) == 10


@pytest.mark.smoke
async def test_s6_the_types_of_request_and_response_may_change_on_the_way() -> None:
    service, handle = mock_pair(bool, str)

    def is_hello(request: str) -> bool:
        return request == "hello"

    def is_world(response: str) -> bool:
        return response == "world"

    call = map_request(is_hello)(map_response(is_world)(service))

    async def client() -> None:
        assert await call("hello") is True

    async with anyio.create_task_group() as tasks, handle:
        tasks.start_soon(client)
        (await handle.expect(True)).respond("world")


async def test_s6_the_changed_types_are_inferred() -> None:
    def to_int(text: str) -> int:
        return int(text)

    async def to_int_slowly(text: str) -> int:
        await anyio.sleep(1)
        return int(text)

    def to_bytes(number: int) -> bytes:
        return bytes([number])

    async def to_bytes_slowly(number: int) -> bytes:
        await anyio.sleep(1)
        return bytes([number])

    def empty(error: Exception) -> bytes:
        return b""

    async def empty_slowly(error: Exception) -> bytes:
        return b""

    assert_type(map_request(to_int), RequestLayer[str, int])
    assert_type(map_request(to_int_slowly), RequestLayer[str, int])
    assert_type(map_response(to_bytes), ResponseLayer[int, bytes])
    assert_type(map_response(to_bytes_slowly), ResponseLayer[int, bytes])
    assert_type(map_request(to_int)(echo), Wrapper[str, int])
    assert_type(map_response(to_bytes)(echo), Wrapper[int, bytes])
    assert_type(map_error(same)(echo), Wrapper[int, int])
    assert_type(then(to_bytes, empty)(echo), Wrapper[int, bytes])
    assert_type(then(to_bytes, empty_slowly)(echo), Wrapper[int, bytes])
    assert_type(then(to_bytes_slowly, empty)(echo), Wrapper[int, bytes])
    assert_type(then(to_bytes_slowly, empty_slowly)(echo), Wrapper[int, bytes])
    transparent: Layer = map_error(same)
    as_callable: Callable[[Service[int, int]], Service[str, int]] = map_request(to_int)
    also: Callable[[Service[int, int]], Service[int, bytes]] = map_response(to_bytes)
    del transparent, as_callable, also
    map_request(to_int)(broken)  # type: ignore[arg-type]
    map_response(to_bytes)(broken)  # type: ignore[arg-type]

    assert await map_request(to_int)(echo)("7") == 7
    assert await map_request(to_int_slowly)(echo)("7") == 7
    assert await map_response(to_bytes)(echo)(7) == b"\x07"
    assert await map_response(to_bytes_slowly)(echo)(7) == b"\x07"


async def test_whatever_can_be_awaited_is_awaited() -> None:
    async def slowly(number: int) -> int:
        await anyio.sleep(1)
        return number + 1

    class Slowly:
        async def __call__(self, number: int) -> int:
            return await slowly(number)

    def at_second_hand(number: int) -> Awaitable[int]:
        return slowly(number)

    async def recover(error: Exception) -> int:
        return 0

    functions: list[Callable[[int], Awaitable[int]]]
    functions = [slowly, Slowly(), functools.partial(slowly), at_second_hand]
    for function in functions:
        assert await map_request(function)(echo)(1) == 2
        assert await map_response(function)(echo)(1) == 2
        assert await then(function, recover)(echo)(1) == 2


async def test_a_class_of_what_can_be_awaited_is_a_response_like_any_other() -> None:
    class Awaited:
        def __await__(self) -> Generator[None, None, None]:
            raise AssertionError
            yield

    def to_class(response: int) -> Any:
        return Awaited

    assert await map_response(to_class)(echo)(1) is Awaited


async def test_none_is_mapped_like_anything_else() -> None:
    async def nothing(request: None, /) -> None:
        return None

    def one(value: None) -> int:
        return 1

    def none(value: int) -> None:
        return None

    assert await map_request(none)(map_response(one)(nothing))(5) == 1


async def test_what_a_function_raises_is_the_callers_and_nothing_is_called_for_a_bad_request() -> None:
    service, handle = mock_pair(int, int)

    def refuse(value: int) -> int:
        raise ValueError("no")

    async def refuse_slowly(value: int) -> int:
        await anyio.sleep(1)
        raise ValueError("no")

    functions: list[Callable[[int], Any]] = [refuse, refuse_slowly]
    for function in functions:
        with pytest.raises(ValueError, match="no"):
            await map_request(function)(service)(1)
        with pytest.raises(ValueError, match="no"):
            await map_response(function)(echo)(1)
    assert handle.calls == 0


async def test_an_error_from_inside_passes_by_a_function_for_responses() -> None:
    error = ConnectionLost("cut")

    async def cut(request: int, /) -> int:
        raise error

    with pytest.raises(ConnectionLost) as caught:
        await map_response(add_two)(map_request(add_two)(cut))(1)
    assert caught.value is error


# --- errors --------------------------------------------------------------------------------------------------------


async def test_a_mapped_error_has_the_old_one_as_its_cause() -> None:
    old = KeyError("old")
    new = LookupError("new")

    async def fail(request: int, /) -> int:
        raise old

    def change(error: Exception) -> Exception:
        assert error is old
        return new

    with pytest.raises(LookupError) as caught:
        await map_error(change)(fail)(1)
    assert caught.value is new
    assert new.__cause__ is old


async def test_an_error_that_stays_is_raised_as_it_is() -> None:
    with pytest.raises(KeyError) as caught:
        await map_error(same)(broken)("hello")
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


async def test_a_response_passes_by_a_function_for_errors() -> None:
    def never(error: Exception) -> Exception:
        raise AssertionError

    assert await map_error(never)(echo)(5) == 5


async def test_an_error_of_the_function_for_errors_is_raised_in_the_context_of_the_first() -> None:
    def wrong(error: Exception) -> Exception:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as caught:
        await map_error(wrong)(broken)("hello")
    assert isinstance(caught.value.__context__, KeyError)


# --- both ----------------------------------------------------------------------------------------------------------


async def test_then_makes_a_response_of_either_outcome() -> None:
    async def recover(error: Exception) -> str:
        await anyio.sleep(1)
        return f"but {error!r}"

    assert await then(str.upper, recover)(broken)("hello") == "but KeyError('hello')"
    assert await then(str.upper, lambda error: "no")(broken)("hello") == "no"
    assert await then(hex, recover)(echo)(16) == "0x10"


async def test_then_calls_only_one_of_its_functions() -> None:
    async def fail(response: int) -> int:
        raise ValueError("after a response")

    def never(error: Exception) -> int:
        raise AssertionError

    with pytest.raises(ValueError, match="after a response"):
        await then(fail, never)(echo)(1)


async def test_then_may_raise_another_error_in_the_context_of_the_first() -> None:
    def sync(error: Exception) -> str:
        raise LookupError from error

    async def not_sync(error: Exception) -> str:
        await anyio.sleep(1)
        raise LookupError

    for function in (sync, not_sync):
        with pytest.raises(LookupError) as caught:
            await then(str.upper, function)(broken)("hello")
        assert isinstance(caught.value.__context__, KeyError)


# --- cancellation, memory ------------------------------------------------------------------------------------------


async def test_cancellation_is_no_error_and_no_outcome() -> None:
    def never(value: object) -> Any:
        raise AssertionError

    async def forever(request: int, /) -> int:
        await anyio.sleep_forever()
        return 0

    for call in (map_error(never)(forever), map_response(never)(forever), then(never, never)(forever)):
        with anyio.move_on_after(1) as scope:
            await call(1)
        assert scope.cancelled_caught


async def test_cancelling_at_every_await_is_passed_on() -> None:
    async def slowly(value: int) -> int:
        await anyio.sleep(1)
        return value

    async def recover(error: Exception) -> int:
        await anyio.sleep(1)
        return 0

    async def fail(request: int, /) -> int:
        await anyio.sleep(1)
        raise ConnectionLost("cut")

    call = map_request(slowly)(map_response(slowly)(then(slowly, recover)(map_error(same)(fail))))

    async def once() -> None:
        assert await call(1) == 0

    assert await cancel_at_every_await(once) == 4


@pytest.mark.parametrize("layer", [map_error(same), map_error(lambda error: OSError()), then(hex, same)])
async def test_an_error_is_free_when_the_caller_is_done_with_it(layer: Any) -> None:
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

    call = layer(fail)
    gc.collect()
    gc.disable()
    try:
        with suppress(Weak, OSError):
            await call(1)
        assert references[0]() is None
    finally:
        gc.enable()


# --- as layers -----------------------------------------------------------------------------------------------------


@names
def test_hints_are_those_of_the_service_inside(layer: Any) -> None:
    assert not ready_now(layer(Busy()))
    assert load(layer(Busy())) == 7
    assert ready_now(layer(echo))


@names
async def test_lifetimes_are_those_of_the_service_inside(layer: Any) -> None:
    inner = Busy()
    async with running(layer(inner)):
        assert inner.entered


@names
async def test_one_layer_wraps_many_services(layer: Any) -> None:
    async def ten(request: int, /) -> int:
        return 10 * request

    first, second = layer(echo), layer(ten)
    assert await first(1) != await second(1)


@names
def test_a_layer_is_a_value_for_both_sides(layer: Any) -> None:
    assert layer == layer
    assert hash(layer) == hash(layer)
    assert not layer.client_only


def test_equal_functions_make_equal_layers() -> None:
    assert map_request(add_two) == map_request(add_two) != map_request(twice)
    assert map_response(add_two) == map_response(add_two) != map_response(twice)
    assert map_error(same) == map_error(same)
    assert then(add_two, same) == then(add_two, same) != then(twice, same)


def test_a_layer_says_what_it_was_made_from() -> None:
    assert repr(map_request(add_two)) == "map_request(add_two)"
    assert repr(map_response(hex)) == "map_response(hex)"
    assert repr(map_error(same)) == "map_error(same)"
    assert repr(then(add_two, same)) == "then(add_two, same)"
    assert repr(map_request(functools.partial(int, base=8))) == "map_request(functools.partial(<class 'int'>, base=8))"
    assert repr(map_request(add_two)(echo)) == "<MappedRequest around echo>"
    assert repr(map_response(add_two)(Timeout(5)(echo))) == "<MappedResponse around <Bounded around echo>>"
    assert repr(map_error(same)(echo)) == "<MappedError around echo>"
    assert repr(then(add_two, same)(echo)) == "<MappedOutcome around echo>"


def then_same(function: Any) -> object:
    return then(function, same)


def hex_then(function: Any) -> object:
    return then(hex, function)


MAKERS: list[Callable[[Any], object]] = [map_request, map_response, map_error, then_same, hex_then]


@pytest.mark.parametrize("make", MAKERS)
def test_what_is_no_function_is_refused(make: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"^(map_\w+|then) takes a function, not 5$"):
        make(5)
