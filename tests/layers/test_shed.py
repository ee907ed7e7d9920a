"""LoadShed: nobody waits for room."""

from __future__ import annotations

import gc
import weakref

import anyio
import pytest

from towline.errors import CircuitOpen, LinkLost, Overloaded
from towline.hooks import CallShed, Hooks
from towline.layers.breaker import CircuitBreaker
from towline.layers.choice import Optional
from towline.layers.limit import ConcurrencyLimit, RateLimit
from towline.layers.shed import LoadShed
from towline.layers.timeout import Timeout
from towline.policies.rate import FixedWindow
from towline.service import Wrapper, load, ready_now, refuses_now
from towline.stack import Stack
from towline.testing import cancel_at_every_await


async def same(request: int, /) -> int:
    return request


async def slow(request: int, /) -> int:
    await anyio.sleep(10)
    return request


class Mock(Wrapper[int, int]):
    """A service that is as ready as it is told to be."""

    def __init__(self) -> None:
        super().__init__(same)
        self.is_ready = True
        self.asked = 0
        self.requests: list[int] = []

    async def __call__(self, request: int, /) -> int:
        self.requests.append(request)
        return request + 1

    def ready_now(self) -> bool:
        self.asked += 1
        return self.is_ready

    def load(self) -> float:
        return 42.0


# --- Tower's tests ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_l5_what_is_ready_is_called() -> None:
    mock = Mock()
    call = LoadShed()(mock)
    assert await call(1) == 2
    assert (mock.requests, mock.asked) == ([1], 1)


@pytest.mark.smoke
async def test_l5_what_is_not_ready_is_not_called_and_the_caller_knows_at_once() -> None:
    mock = Mock()
    mock.is_ready = False
    call = LoadShed()(mock)
    start = anyio.current_time()
    with pytest.raises(Overloaded, match=r"^no room for another call: it would have to wait$") as caught:
        await call(1)
    assert anyio.current_time() == start
    assert mock.requests == []
    assert caught.value.retryable
    assert caught.value.sent is False
    mock.is_ready = True
    assert await call(1) == 2, "readiness counts once"


async def test_l5_a_shedding_service_is_always_ready() -> None:
    mock = Mock()
    call = LoadShed()(mock)
    mock.is_ready = False
    assert ready_now(call)
    assert mock.asked == 0
    assert load(call) == 42.0
    with pytest.raises(Overloaded):
        await LoadShed()(call)(1)


# --- around limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", [None, Timeout(100)], ids=["next to it", "with a timeout between"])
async def test_l5_of_a_hundred_calls_at_once_exactly_as_many_get_in_as_there_are_slots(between: Timeout | None) -> None:
    limited = ConcurrencyLimit(10)(slow)
    call = LoadShed()(limited if between is None else between(limited))
    start = anyio.current_time()
    answers: list[tuple[object, float]] = []

    async def client(number: int) -> None:
        try:
            answer: object = await call(number)
        except Overloaded:
            answer = Overloaded
        answers.append((answer, anyio.current_time() - start))

    async with anyio.create_task_group() as group:
        for number in range(100):
            group.start_soon(client, number)
    assert answers.count((Overloaded, 0)) == 90
    assert sum(at == 10 for _, at in answers) == 10
    assert await call(1) == 1


async def test_l5_around_a_rate_calls_that_come_too_early_are_turned_away() -> None:
    call = LoadShed()(RateLimit(FixedWindow(3, per=1))(same))
    for _ in range(3):
        assert [await call(n) for n in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(Overloaded):
                await call(1)
        await anyio.sleep(1)


async def test_l5_whoever_waits_in_the_queue_inside_is_not_overtaken() -> None:
    limited = ConcurrencyLimit(1)(slow)
    call = LoadShed()(limited)
    async with anyio.create_task_group() as group:
        group.start_soon(limited, 1)
        await anyio.sleep(1)
        group.start_soon(limited, 2)
        await anyio.sleep(9)
        with pytest.raises(Overloaded):
            await call(3)


async def test_around_what_limits_nothing_it_does_nothing() -> None:
    call = LoadShed()(same)
    assert await call(1) == 1


async def test_errors_from_inside_are_passed_on_themselves() -> None:
    error = LinkLost("cut")

    async def broken(request: int, /) -> int:
        raise error

    with pytest.raises(LinkLost) as caught:
        await LoadShed()(broken)(1)
    assert caught.value is error


async def test_a_call_that_is_cancelled_anywhere_leaves_nothing_behind() -> None:
    limited = ConcurrencyLimit(1)(slow)
    call = LoadShed()(limited)

    async def one() -> None:
        await call(1)

    async def check() -> None:
        assert ready_now(limited)

    assert await cancel_at_every_await(one, check) == 1


# --- telling, and as a value -----------------------------------------------------------------------------------------


async def test_hooks_are_told_of_every_call_that_is_turned_away() -> None:
    events: list[CallShed] = []

    class Told(Hooks):
        def on_shed(self, event: CallShed, /) -> None:
            events.append(event)

    mock = Mock()
    call = LoadShed(hooks=Told())(mock)
    await call(1)
    assert events == []
    mock.is_ready = False
    with pytest.raises(Overloaded) as caught:
        await call(1)
    assert [(event.layer, event.error) for event in events] == [("LoadShed", caught.value)]


async def test_every_caller_gets_an_error_of_its_own_that_is_freed_with_the_call() -> None:
    mock = Mock()
    mock.is_ready = False
    call = LoadShed()(mock)
    gc.collect()
    gc.disable()
    try:
        left: list[weakref.ref[Overloaded]] = []
        for _ in range(2):
            try:
                await call(1)
            except Overloaded as error:
                left.append(weakref.ref(error))
        assert [each() for each in left] == [None, None]
    finally:
        gc.enable()


async def test_what_refuses_says_itself_why() -> None:
    async def echo(request: str, /) -> str:
        return request

    broken = CircuitBreaker()(echo)
    broken.breaker.isolate()
    shedding = LoadShed()(broken)
    with pytest.raises(CircuitOpen):
        await shedding("hello")
    assert refuses_now(shedding)
    assert ready_now(shedding)


async def test_it_refuses_where_what_is_inside_refuses_although_that_is_ready() -> None:
    for refusing in (Optional[str, str](None), LoadShed()(ConcurrencyLimit(0)(Optional[str, str](None)))):
        assert ready_now(refusing)
        assert refuses_now(LoadShed()(refusing))


def test_a_shed_is_a_value_that_wraps_both_sides() -> None:
    assert LoadShed() == LoadShed()
    assert repr(LoadShed()) == "LoadShed()"
    assert repr(LoadShed()(same)) == "<Shedding around same>"
    assert not LoadShed.client_only
    assert Stack(LoadShed(), ConcurrencyLimit(1)) == Stack(LoadShed(), ConcurrencyLimit(1))


async def test_one_layer_value_wraps_two_services_by_themselves() -> None:
    layer = LoadShed()
    one, other = Mock(), Mock()
    one.is_ready = False
    with pytest.raises(Overloaded):
        await layer(one)(1)
    assert await layer(other)(1) == 2
