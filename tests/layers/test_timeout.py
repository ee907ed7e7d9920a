"""The Timeout layer: its own bound, and nobody else's."""

from __future__ import annotations

import math

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import HandshakeTimeout, LinkLost
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import Backoff
from towline.service import Dial

DIAL = Dial(Endpoint.parse("tcp://localhost:7000"))


async def wait(seconds: float, /) -> str:
    await anyio.sleep(seconds)
    return "done"


@pytest.mark.smoke
async def test_what_takes_too_long_is_a_timeout_error() -> None:
    start = anyio.current_time()
    with pytest.raises(TimeoutError, match=r"^no response within 2.5 s$") as caught:
        await Timeout(2.5)(wait)(10)
    assert type(caught.value) is TimeoutError
    assert anyio.current_time() - start == pytest.approx(2.5)


async def test_a_connect_that_takes_too_long_is_a_handshake_timeout() -> None:
    async def mute(dial: Dial, /) -> None:
        await anyio.sleep_forever()

    with pytest.raises(HandshakeTimeout, match=r"^no connection within 10 s$"):
        await Timeout(10)(mute)(DIAL)


async def test_what_is_in_time_is_passed_on() -> None:
    assert await Timeout(10)(wait)(9) == "done"
    assert await Timeout(math.inf)(wait)(1e6) == "done"


async def test_a_response_that_comes_in_spite_of_the_deadline_wins() -> None:
    async def shielded(request: str, /) -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(20)
        return request

    assert await Timeout(10)(shielded)("hello") == "hello"


async def test_what_was_cancelled_has_cleaned_up_before_the_error_is_raised() -> None:
    events: list[str] = []

    async def tidy(request: str, /) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            events.append("cleaned up")

    with pytest.raises(TimeoutError):
        await Timeout(10)(tidy)("hello")
    assert events == ["cleaned up"]


@pytest.mark.parametrize("outer", [5, 10], ids=["earlier", "at the same moment"])
async def test_a_cancellation_from_outside_is_never_turned_into_a_timeout(outer: float) -> None:
    with anyio.CancelScope(deadline=anyio.current_time() + outer) as scope:
        await Timeout(10)(wait)(100)
    assert scope.cancelled_caught


async def test_cancelling_the_caller_is_not_a_timeout() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(Timeout(10)(wait), 100)
        await anyio.sleep(1)
        group.cancel_scope.cancel()


async def test_errors_from_inside_are_passed_on_themselves() -> None:
    for error in (TimeoutError("its own"), LinkLost("cut")):

        async def broken(request: str, /, error: Exception = error) -> None:
            await anyio.lowlevel.checkpoint()
            raise error

        with pytest.raises(type(error)) as caught:
            await Timeout(10)(broken)("hello")
        assert caught.value is error


async def test_inside_retry_it_bounds_each_attempt() -> None:
    start, attempts = anyio.current_time(), 0

    async def slow_at_first(dial: Dial, /) -> str:
        nonlocal attempts
        attempts += 1
        return await wait(100 if attempts < 3 else 1)

    connect = Retry(Backoff.constant(2, jitter="none"))(Timeout(5)(slow_at_first))
    assert await connect(DIAL) == "done"
    assert anyio.current_time() - start == pytest.approx(5 + 2 + 5 + 2 + 1)


async def test_outside_retry_it_bounds_the_whole() -> None:
    async def broken(dial: Dial, /) -> None:
        await anyio.sleep(3)
        raise LinkLost("cut")

    start = anyio.current_time()
    way_back = Dial(DIAL.endpoint, cause=LinkLost("cut"))
    with pytest.raises(HandshakeTimeout):
        await Timeout(60)(Retry(Backoff.constant(2))(broken))(way_back)
    assert anyio.current_time() - start == pytest.approx(60)


def test_timeouts_are_values_that_wrap_both_sides() -> None:
    assert Timeout(5) == Timeout(5.0)
    assert repr(Timeout(5)) == "Timeout(seconds=5)"
    assert not Timeout.client_only


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_timeout_that_makes_no_sense_is_refused_with_both_values(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"a timeout of {seconds} seconds, where more than 0"):
        Timeout(seconds)
