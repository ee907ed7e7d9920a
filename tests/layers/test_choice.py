"""Layers and services that may not be there, or of which there are two, or one for all."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, assert_type

import anyio
import pytest

from towline import Stack
from towline.errors import ConnectionLost, Elapsed, MisuseError, ServiceUnavailable
from towline.layers.choice import Either, Optional, Shared, identity, optional_layer
from towline.layers.map import map_request, map_response
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import Backoff, StandardPolicy
from towline.service import Layer, Service, Wrapper, load, ready_now, running
from towline.testing import cancel_at_every_await
from towline.testing._mock import mock_pair


async def echo(request: str, /) -> str:
    return request


def is_read(request: str) -> bool:
    return request.startswith("GET")


class Living(Wrapper[Any, Any]):
    """A service that tells when it is entered and left, and how it is doing."""

    def __init__(self, inner: Service[Any, Any], name: str, log: list[str], *, ready: bool = True, busy: float = 0):
        super().__init__(inner)
        self.name, self.log, self.ready, self.busy = name, log, ready, busy

    async def __call__(self, request: Any, /) -> Any:
        return f"{self.name}({await self.inner(request)})"

    def ready_now(self) -> bool:
        return self.ready and ready_now(self.inner)

    def load(self) -> float:
        return self.busy + load(self.inner)

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        self.log.append(f"{self.name} begins")
        yield
        self.log.append(f"{self.name} ends")


class LivingLayer:
    """Makes them."""

    def __init__(self, name: str, log: list[str], *, ready: bool = True, busy: float = 0) -> None:
        self.name, self.log, self.ready, self.busy = name, log, ready, busy

    def __call__(self, inner: Service[Any, Any], /) -> Wrapper[Any, Any]:
        return Living(inner, self.name, self.log, ready=self.ready, busy=self.busy)


# --- no layer ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_s3_identity_makes_of_a_service_the_service() -> None:
    service, handle = mock_pair(str, str)
    assert identity(service) is service
    assert await identity(echo)("hello") == "hello"
    assert await Stack(identity, Timeout(5), identity)(echo)("hello") == "hello"
    transparent: Layer = identity
    del transparent, handle


async def test_s5_an_optional_layer_that_is_none_is_identity() -> None:
    assert optional_layer(None)(echo) is echo
    assert optional_layer(None) is identity


async def test_s5_an_optional_layer_that_is_one_is_that_layer() -> None:
    layer = Timeout(0.5)
    assert optional_layer(layer) is layer

    async def slow(request: str, /) -> str:
        await anyio.sleep(1)
        return request

    def configured(seconds: float | None) -> Service[str, str]:
        return Stack.of(str, str).layer(optional_layer(None if seconds is None else Timeout(seconds)))(slow)

    assert await configured(None)("hello") == "hello"
    with pytest.raises(Elapsed):
        await configured(0.5)("hello")


async def test_s5_an_optional_layer_of_one_type_keeps_it() -> None:
    def shouting(inner: Service[str, str], /) -> Service[str, str]:
        return map_response(str.upper)(inner)

    upper = optional_layer(shouting)
    assert_type(upper(echo), Service[str, str])
    assert await upper(echo)("hello") == "HELLO"


# --- no service ----------------------------------------------------------------------------------------------------


async def test_an_optional_service_that_is_there_is_called() -> None:
    service, handle = mock_pair(str, str, allow=0)
    optional = Optional(service)
    assert_type(optional, Optional[str, str])
    assert not ready_now(optional)

    async def client() -> None:
        assert await optional("hello") == "world"

    async with anyio.create_task_group() as tasks, handle:
        tasks.start_soon(client)
        handle.allow(1)
        call = await handle.expect("hello")
        assert load(optional) == 1
        call.respond("world")


async def test_an_optional_service_that_is_not_there_is_unavailable_at_once_and_always_ready_for_that() -> None:
    absent: Optional[str, str] = Optional(None)
    with pytest.raises(ServiceUnavailable, match="there is no service here") as caught:
        await absent("hello")
    assert not caught.value.retryable
    assert caught.value.sent is False
    assert ready_now(absent)
    assert load(absent) == 0
    async with running(absent):
        pass
    assert repr(absent) == "<Optional around nothing>"
    assert repr(Optional(echo)) == "<Optional around echo>"


async def test_an_optional_service_lives_as_the_one_inside() -> None:
    log: list[str] = []
    async with running(Optional(Living(echo, "a", log))) as call:
        assert await call("x") == "a(x)"
    assert log == ["a begins", "a ends"]


# --- two layers ----------------------------------------------------------------------------------------------------


def named(name: str) -> Any:
    def around(response: str) -> str:
        return f"{name}({response})"

    return map_response(around)


async def test_requests_go_left_or_right_as_the_function_says() -> None:
    both = Either(is_read, named("left"), named("right"))(echo)
    assert await both("GET /") == "left(GET /)"
    assert await both("PUT /") == "right(PUT /)"
    one = Either(is_read, named("left"))(echo)
    assert await one("GET /") == "left(GET /)"
    assert await one("PUT /") == "PUT /"


async def test_reads_only_are_tried_again() -> None:
    calls: list[str] = []

    async def broken(request: str, /) -> str:
        calls.append(request)
        raise ConnectionLost("cut")

    policy = StandardPolicy(Backoff.constant(1), max_attempts=3)
    call = Either(is_read, Retry(policy))(broken)
    for request in ("GET /", "PUT /"):
        with pytest.raises(ConnectionLost):
            await call(request)
    assert calls == ["GET /"] * 3 + ["PUT /"]


async def test_what_the_function_raises_is_the_callers() -> None:
    service, handle = mock_pair(str, str)

    def wrong(request: str) -> bool:
        raise ValueError("neither")

    with pytest.raises(ValueError, match="neither"):
        await Either(wrong, Timeout(1))(service)("hello")
    assert handle.calls == 0


async def test_both_sides_and_the_service_inside_are_entered_once_each() -> None:
    log: list[str] = []
    either = Either(is_read, LivingLayer("left", log), LivingLayer("right", log))(Living(echo, "inner", log))
    async with running(either) as call:
        assert log == ["inner begins", "left begins", "right begins"]
        assert await call("GET /") == "left(inner(GET /))"
        assert await call("PUT /") == "right(inner(PUT /))"
    assert log[3:] == ["right ends", "left ends", "inner ends"]
    async with running(either):  # and again
        assert log[6:] == ["inner begins", "left begins", "right begins"]


@pytest.mark.parametrize(
    ("left", "right"), [("left", None), (None, "right"), (None, None)], ids=["no right", "identity left", "neither"]
)
async def test_a_side_without_a_layer_does_not_enter_the_service_again(left: str | None, right: str | None) -> None:
    log: list[str] = []
    left_layer = identity if left is None else LivingLayer(left, log)
    right_layer = None if right is None else LivingLayer(right, log)
    async with running(Either(is_read, left_layer, right_layer)(Living(echo, "inner", log))) as call:
        assert await call("GET /") == ("left(inner(GET /))" if left else "inner(GET /)")
        assert await call("PUT /") == ("right(inner(PUT /))" if right else "inner(PUT /)")
    assert log.count("inner begins") == log.count("inner ends") == 1


async def test_it_is_ready_when_both_sides_are_and_as_busy_as_the_busier() -> None:
    log: list[str] = []
    for left, right, ready in [(True, True, True), (True, False, False), (False, True, False)]:
        either = Either(is_read, LivingLayer("l", log, ready=left, busy=2), LivingLayer("r", log, ready=right, busy=5))(
            Living(echo, "inner", log, busy=1)
        )
        assert ready_now(either) is ready
        assert load(either) == 6
    for ready in (True, False):
        assert ready_now(Either(is_read, Timeout(1))(Living(echo, "inner", log, ready=ready))) is ready


async def test_cancelling_at_every_await_is_passed_on() -> None:
    async def slow(request: str, /) -> str:
        await anyio.sleep(1)
        return request

    either = Either(is_read, Timeout(5))(slow)

    async def once() -> None:
        await either("GET /")
        await either("PUT /")

    assert await cancel_at_every_await(once) == 2


async def test_one_either_wraps_many_services_and_is_a_value() -> None:
    layer = Either(is_read, Timeout(1), Timeout(2))
    assert_type(layer(echo), Wrapper[str, str])
    transparent: Layer = layer
    assert transparent == Either(is_read, Timeout(1), Timeout(2)) != Either(is_read, Timeout(1))
    assert not layer.client_only
    assert repr(layer(echo)) == "<Either <Bounded around echo> or <Bounded around echo>>"
    log: list[str] = []
    inner = Living(echo, "inner", log)
    assert (
        repr(Either(is_read, Timeout(1))(inner))
        == "<Either <Bounded around <Living around echo>> or <Living around echo>>"
    )

    async def shout(request: str, /) -> str:
        return request.upper()

    assert await layer(echo)("get") == "get"
    assert await layer(shout)("get") == "GET"


def test_an_either_of_what_cannot_be_called_is_refused() -> None:
    five: Any = 5
    with pytest.raises(TypeError, match=r"^when of Either is 5, which cannot be called$"):
        Either(five, Timeout(1))
    with pytest.raises(TypeError, match=r"^left of Either is 5, which cannot be called$"):
        Either(is_read, five)
    with pytest.raises(TypeError, match=r"^right of Either is 5, which cannot be called$"):
        Either(is_read, Timeout(1), five)


# --- one service for all -------------------------------------------------------------------------------------------


async def test_a_shared_service_answers_every_target_with_itself() -> None:
    service, handle = mock_pair(str, int, allow=0)
    make = Shared(service)
    as_maker: Service[str, Service[str, int]] = make
    assert await as_maker("tcp://one:1") is service
    assert await make(None) is service
    # It is the maker that is ready and idle, whatever the service is
    assert ready_now(make)
    assert load(make) == 0
    assert not ready_now(await make(None))
    assert repr(Shared(echo)) == "<Shared around echo>"
    del handle


async def test_a_shared_service_lives_as_long_as_its_maker_whoever_enters_it() -> None:
    log: list[str] = []
    inner = Living(echo, "inner", log, ready=False, busy=3)
    async with running(Shared(inner)) as make:
        for target in range(3):
            made = await make(target)
            async with running(made) as call:
                assert await call("hello") == "inner(hello)"
            assert made is await make(0)
            assert not ready_now(made)
            assert load(made) == 3
            assert repr(made) == repr(inner)
        with pytest.raises(MisuseError):
            await inner.__aenter__()
        assert log == ["inner begins"]
    assert log == ["inner begins", "inner ends"]


async def test_a_request_may_be_mapped_for_one_side_only() -> None:
    call = Either(is_read, map_request(str.lower))(echo)
    assert await call("GET /") == "get /"
    assert await call("PUT /") == "PUT /"
