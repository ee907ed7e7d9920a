"""The Fallback layer: which errors it answers, with what, and what is left of them if it fails too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, assert_type

import anyio
import pytest

from towline.errors import CircuitOpen, ConnectionLost, Elapsed, MisuseError, ServiceClosed
from towline.layers.fallback import Fallback
from towline.layers.timeout import Timeout
from towline.policies.classify import Errors
from towline.service import Service, Wrapper, load, ready_now, running
from towline.testing import cancel_at_every_await
from towline.testing._mock import mock_pair


async def echo(request: str, /) -> str:
    return request


async def broken(request: str, /) -> str:
    raise ConnectionLost(request)


def apologise(request: str, error: Exception) -> str:
    return f"no {request}: {error}"


async def apologise_later(request: str, error: Exception) -> str:
    await anyio.sleep(1)
    return apologise(request, error)


class Cache(Wrapper[str, str]):
    """A service with a lifetime."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.lives: list[str] = []

    async def __call__(self, request: str, /) -> str:
        if self.lives != ["begun"]:
            raise ServiceClosed("the cache is not entered")
        return f"cached {request}"

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        self.lives.append("begun")
        yield
        self.lives.append("ended")


@pytest.mark.smoke
async def test_a_value_answers_where_the_service_fails() -> None:
    layer = Fallback.value("nothing", on=ConnectionLost)
    assert await layer(broken)("hello") == "nothing"
    assert await layer(echo)("hello") == "hello"


async def test_none_is_a_value() -> None:
    assert await Fallback.value(None, on=ConnectionLost)(broken)("hello") is None


async def test_a_function_answers_knowing_the_request_and_the_error() -> None:
    assert await Fallback.call(apologise, on=ConnectionLost)(broken)("milk") == "no milk: milk"
    assert await Fallback.call(apologise_later, on=ConnectionLost)(broken)("milk") == "no milk: milk"
    assert await Fallback.call(lambda request, error: request * 2, on=ConnectionLost)(broken)("ab") == "abab"


async def test_another_service_answers_the_same_request() -> None:
    first, of_first = mock_pair(str, str)
    second, of_second = mock_pair(str, str)
    call = Fallback.service(second, on=ConnectionLost)(first)
    answers: list[str] = []

    async def client() -> None:
        answers.append(await call("hello"))

    async with anyio.create_task_group() as tasks, of_first, of_second:
        tasks.start_soon(client)
        (await of_first.expect("hello")).fail(ConnectionLost("cut"))
        (await of_second.expect("hello")).respond("world")
    assert answers == ["world"]


async def test_the_types_of_both_answers_are_inferred() -> None:
    assert_type(Fallback.value(None, on=OSError), Fallback[None])
    assert_type(Fallback.value(None, on=OSError)(echo), Wrapper[str, str | None])
    assert_type(Fallback.value("", on=OSError)(echo), Wrapper[str, str])
    assert_type(Fallback.call(apologise, on=OSError)(echo), Wrapper[str, str])
    assert_type(Fallback.call(apologise_later, on=OSError)(echo), Wrapper[str, str])
    assert_type(Fallback.service(echo, on=OSError)(echo), Wrapper[str, str])


async def test_only_the_errors_that_are_named_are_answered() -> None:
    async def fail(request: Exception, /) -> str:
        raise request

    call = Fallback.value("nothing", on=(ConnectionLost, CircuitOpen))(fail)
    for error in (ConnectionLost("cut"), CircuitOpen("open")):
        assert await call(error) == "nothing"
    for other in (ValueError("mine"), Elapsed(5)):
        with pytest.raises(type(other)) as caught:
            await call(other)
        assert caught.value is other
        assert caught.value.__context__ is None


async def test_a_group_is_answered_if_all_of_it_is_named() -> None:
    async def fail(request: Exception, /) -> str:
        raise request

    call = Fallback.value("nothing", on=lambda error: isinstance(error, ConnectionLost))(fail)
    assert await call(ExceptionGroup("two", [ConnectionLost("a"), ConnectionLost("b")])) == "nothing"
    with pytest.raises(ExceptionGroup):
        await call(ExceptionGroup("two", [ConnectionLost("a"), ValueError("b")]))


async def test_if_the_fallback_fails_too_its_error_has_the_first_as_context() -> None:
    first = ConnectionLost("cut")
    second = KeyError("not in the cache")

    async def fail(request: str, /) -> str:
        raise first

    async def fail_too(request: str, /) -> str:
        await anyio.sleep(1)
        raise second

    def raise_second(request: str, error: Exception) -> str:
        raise second

    for layer in (Fallback.service(fail_too, on=Exception), Fallback.call(raise_second, on=Exception)):
        with pytest.raises(KeyError) as caught:
            await layer(fail)("hello")
        assert caught.value is second
        assert second.__context__ is first
        second.__context__ = None


async def test_a_fallback_may_raise_the_first_error_again() -> None:
    def give_up(request: str, error: Exception) -> str:
        raise error

    with pytest.raises(ConnectionLost) as caught:
        await Fallback.call(give_up, on=ConnectionLost)(broken)("hello")
    assert caught.value.__context__ is None


async def test_a_cancellation_is_never_answered() -> None:
    async def forever(request: str, /) -> str:
        await anyio.sleep_forever()
        return request

    def anything(error: Exception) -> bool:
        return True

    kinds: list[Errors] = [Exception, anything]
    for on in kinds:
        with anyio.move_on_after(1) as scope:
            await Fallback.value("nothing", on=on)(forever)("hello")
        assert scope.cancelled_caught
    assert await Fallback.value("late", on=Elapsed)(Timeout(1)(forever))("hello") == "late"


async def test_cancelling_at_every_await_is_passed_on() -> None:
    async def fail(request: str, /) -> str:
        await anyio.sleep(1)
        raise ConnectionLost("cut")

    call = Fallback.call(apologise_later, on=ConnectionLost)(fail)

    async def once() -> None:
        await call("hello")

    assert await cancel_at_every_await(once) == 2


async def test_an_error_that_was_answered_is_free_even_where_it_was_part_of_the_answer() -> None:
    class Weak(Exception):
        pass

    references: list[weakref.ref[Exception]] = []

    async def fail(request: str, /) -> str:
        error = Weak()
        references.append(weakref.ref(error))
        try:
            raise error
        finally:
            del error

    def as_value(request: str, error: Exception) -> Exception:
        return error

    calls: list[Service[str, Any]] = [
        Fallback.value("nothing", on=Weak)(fail),
        Fallback.call(as_value, on=Weak)(fail),
        Fallback.service(echo, on=Weak)(fail),
    ]
    gc.collect()
    gc.disable()
    try:
        for call in calls:
            await call("hello")
            assert references.pop()() is None
    finally:
        gc.enable()


async def test_the_other_service_lives_as_long_as_the_one_it_stands_in_for() -> None:
    cache = Cache()
    call = Fallback.service(cache, on=ConnectionLost)(broken)
    with pytest.raises(ServiceClosed):
        await call("hello")
    async with running(call):
        assert cache.lives == ["begun"]
        assert await call("hello") == "cached hello"
    assert cache.lives == ["begun", "ended"]


async def test_another_service_cannot_be_entered_twice_at_once() -> None:
    layer = Fallback.service(Cache(), on=ConnectionLost)
    async with running(layer(broken)):
        with pytest.raises(MisuseError, match="is entered already"):
            async with running(layer(broken)):
                pass


async def test_values_and_functions_have_no_lifetime_and_fit_many_services() -> None:
    layer = Fallback.call(apologise, on=ConnectionLost)
    async with running(layer(broken)) as first, running(layer(echo)) as second:
        assert await first("milk") == "no milk: milk"
        assert await second("milk") == "milk"


def test_hints_are_those_of_the_service_inside() -> None:
    service, _ = mock_pair(str, str, allow=0)
    assert not ready_now(Fallback.value("", on=OSError)(service))
    assert load(Fallback.value("", on=OSError)(service)) == 0


def test_fallbacks_are_values_for_both_sides() -> None:
    assert Fallback.value(1, on=OSError) == Fallback.value(1, on=OSError) != Fallback.value(2, on=OSError)
    assert Fallback.value(1, on=OSError) != Fallback.value(1, on=ValueError)
    assert Fallback.call(apologise, on=OSError) == Fallback.call(apologise, on=OSError)
    assert Fallback.service(echo, on=OSError) == Fallback.service(echo, on=OSError)
    assert hash(Fallback.value(1, on=OSError)) == hash(Fallback.value(1, on=OSError))
    assert not Fallback.client_only


def test_a_fallback_says_what_it_answers_with() -> None:
    assert repr(Fallback.value(None, on=OSError)) == "Fallback.value(None, on=OSError)"
    assert repr(Fallback.call(apologise, on=(OSError, EOFError))) == "Fallback.call(apologise, on=(OSError, EOFError))"
    assert repr(Fallback.service(echo, on=OSError)) == "Fallback.service(echo, on=OSError)"
    assert repr(Fallback.service(Timeout(5)(echo), on=OSError)) == "Fallback.service(<Bounded around echo>, on=OSError)"
    assert repr(Fallback.value(None, on=OSError)(echo)) == "<FallingBack around echo>"


def test_what_makes_no_sense_is_refused() -> None:
    five: Any = 5
    cancelled: Any = KeyboardInterrupt
    with pytest.raises(TypeError, match=r"^Fallback.call takes a function of the request and the error, not 5$"):
        Fallback.call(five, on=OSError)
    with pytest.raises(TypeError, match=r"^Fallback.service takes a service, not 5$"):
        Fallback.service(five, on=OSError)
    with pytest.raises(TypeError, match="no class of exceptions, and no function"):
        Fallback.value(1, on=five)
    with pytest.raises(TypeError, match="KeyboardInterrupt is no Exception"):
        Fallback.value(1, on=cancelled)
    errors: Any = Fallback.value
    with pytest.raises(TypeError, match="on"):
        errors(1)  # for which errors must be said
