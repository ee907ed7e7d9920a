"""Steer: the request says which service answers it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towline.errors import MisuseError, ServiceClosed
from towline.layers.buffer import Buffer
from towline.layers.limit import ConcurrencyLimit, Limiter
from towline.layers.steer import Steer
from towline.service import Service, Wrapper, load, ready_now, running
from towline.testing import cancel_at_every_await


class Named:
    """A service that answers with its name, and gives the hints it is told to."""

    def __init__(self, name: str, *, is_ready: bool = True, load: float = 0.0) -> None:
        self.name = name
        self.is_ready = is_ready
        self._load = load

    def ready_now(self) -> bool:
        return self.is_ready

    def load(self) -> float:
        return self._load

    async def __call__(self, request: int, /) -> str:
        await anyio.lowlevel.checkpoint()
        return f"{self.name} {request}"

    def __repr__(self) -> str:
        return f"Named({self.name!r})"


class Owner(Wrapper[int, str]):
    """A service that must be entered, and tells when it is."""

    def __init__(self, name: str, events: list[str], *, fails: bool = False) -> None:
        super().__init__(Named(name))
        self.name, self.events, self.fails = name, events, fails

    def _running(self) -> AbstractAsyncContextManager[object]:
        return self._held()

    @asynccontextmanager
    async def _held(self) -> AsyncGenerator[None]:
        if self.fails:
            raise OSError(self.name)
        self.events.append(f"{self.name} entered")
        try:
            yield
        finally:
            self.events.append(f"{self.name} left")

    async def __call__(self, request: int, /) -> str:
        response: str = await self.inner(request)
        return response


def by_remainder(request: int, services: Sequence[Service[int, str]]) -> int:
    return request % len(services)


@pytest.mark.smoke
async def test_pick_correctly() -> None:
    call = Steer([Named("a"), Named("b"), Named("c")], by_remainder)
    assert [await call(n) for n in range(5)] == ["a 0", "b 1", "c 2", "a 3", "b 4"]


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
@settings(deadline=None, max_examples=50)
async def test_every_request_is_answered_by_the_service_that_was_picked(requests: list[int], count: int) -> None:
    call = Steer([Named(str(n)) for n in range(count)], by_remainder)
    assert [await call(n) for n in requests] == [f"{n % count} {n}" for n in requests]


async def test_pick_is_given_the_request_and_the_services() -> None:
    asked: list[object] = []
    services = [Named("a"), Named("b")]

    def pick(request: int, services: Sequence[Service[int, str]]) -> int:
        asked.append((request, services))
        return 1

    call = Steer(services, pick)
    assert await call(7) == "b 7"
    assert asked == [(7, tuple(services))]
    services.clear()
    assert await call(8) == "b 8"


@pytest.mark.parametrize("index", [-1, 2, math.nan, 0.5, None, "0"])
async def test_an_index_of_no_service_is_misuse(index: object) -> None:
    def pick(request: int, services: Sequence[Service[int, str]]) -> int:
        return index  # type: ignore[return-value]  # pyright: ignore[reportReturnType]

    with pytest.raises(MisuseError, match=rf"^pick chose {index!r}, where 0 to 1 is expected$") as caught:
        await Steer([Named("a"), Named("b")], pick)(1)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


async def test_what_pick_raises_and_what_a_service_raises_the_caller_gets_as_it_is() -> None:
    error = IndexError("mine")

    def pick(request: int, services: Sequence[Service[int, str]]) -> int:
        if request == 0:
            raise error
        return 0

    async def service(request: int, /) -> str:
        raise error

    call = Steer([service], pick)
    for request in (0, 1):
        with pytest.raises(IndexError) as caught:
            await call(request)
        assert caught.value is error


async def test_pending_all_ready_it_is_ready_when_all_of_them_are() -> None:
    a, b = Named("a", is_ready=False), Named("b", is_ready=False)
    call = Steer([a, b], by_remainder)
    assert not ready_now(call)
    a.is_ready = True
    assert not ready_now(call)
    b.is_ready = True
    assert ready_now(call)


async def test_a_call_waits_for_the_service_that_was_picked_and_for_no_other() -> None:
    busy = Limiter(0)
    call = Steer([ConcurrencyLimit(busy)(Named("a")), Named("b")], by_remainder)
    assert not ready_now(call)
    assert await call(1) == "b 1"
    with anyio.move_on_after(1):
        await call(0)
        pytest.fail("there was no slot")
    assert busy.waiting == 0


def test_the_load_is_that_of_the_busiest() -> None:
    assert load(Steer([Named("a", load=1), Named("b", load=3), Named("c", load=2)], by_remainder)) == 3


async def test_to_enter_it_enters_all_and_to_leave_it_leaves_them_the_last_first() -> None:
    events: list[str] = []
    call = Steer([Owner("a", events), Named("b"), Owner("c", events)], by_remainder)
    for _ in range(2):
        events.clear()
        async with running(call):
            assert events == ["a entered", "c entered"]
            assert await call(2) == "c 2"
            with pytest.raises(MisuseError, match=r"^<Steer between .*> is entered already$"):
                await call.__aenter__()
        assert events == ["a entered", "c entered", "c left", "a left"]


async def test_a_service_that_cannot_be_entered_leaves_those_before_it() -> None:
    events: list[str] = []
    call = Steer([Owner("a", events), Owner("b", events, fails=True)], by_remainder)
    with pytest.raises(OSError, match=r"^b$"):
        await call.__aenter__()
    assert events == ["a entered", "a left"]


async def test_a_buffer_in_each_keeps_one_that_is_busy_from_speaking_for_the_others() -> None:
    layer = Buffer(1)
    call = Steer([layer(Named("a", is_ready=False)), layer(Named("b"))], by_remainder)
    with pytest.raises(ServiceClosed):
        await call(1)
    async with call:
        assert ready_now(call)
        assert await call(1) == "b 1"


async def test_it_may_be_cancelled_at_every_await() -> None:
    events: list[str] = []

    async def block() -> None:
        events.clear()
        async with Steer([Owner("a", events), Buffer(1)(Named("b"))], by_remainder) as call:
            assert await call(0) == "a 0"
            assert await call(1) == "b 1"

    async def check() -> None:
        assert events in ([], ["a entered", "a left"])

    assert await cancel_at_every_await(block, check) >= 2


def test_it_has_at_least_one_service() -> None:
    with pytest.raises(ValueError, match=r"^Steer got 0 services, where 1 or more is expected$"):
        Steer([], by_remainder)


def test_it_says_between_what_it_steers() -> None:
    async def named(request: int, /) -> str:
        return ""

    assert repr(Steer([named, Named("a")], by_remainder)) == "<Steer between named, Named('a')>"


def test_types_are_those_of_the_services() -> None:
    service: Callable[[int], Awaitable[str]] = Steer([Named("a"), Named("b")], by_remainder)
    assert callable(service)
