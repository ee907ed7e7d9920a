"""The Timeout layer: its own bound, and nobody else's."""

from __future__ import annotations

import math
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import Elapsed, HandshakeTimeout, LinkLost
from towline.layers.retry import Retry, given_up
from towline.layers.timeout import Timeout
from towline.policies import Backoff, GiveUp, StandardPolicy
from towline.service import Dial, Wrapper, load, ready_now
from towline.testing import cancel_at_every_await

DIAL = Dial(Endpoint.parse("tcp://localhost:7000"))
IDEMPOTENT = StandardPolicy(Backoff.constant(0.05, jitter="none"), on=Elapsed, idempotent=True)


async def wait(seconds: float, /) -> str:
    await anyio.sleep(seconds)
    return "done"


class Slow:
    """A service that takes the given times in turn, the last of them for ever; it notes when each call began."""

    def __init__(self, *times: float) -> None:
        self.times = times
        self.began: list[float] = []

    async def __call__(self, request: object, /) -> str:
        self.began.append(round(anyio.current_time(), 6))
        await anyio.sleep(self.times[min(len(self.began), len(self.times)) - 1])
        return "done"

    def began_after(self, start: float) -> list[float]:
        return [round(each - start, 6) for each in self.began]


# --- its own bound ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_what_takes_too_long_has_elapsed_which_is_a_timeout_error() -> None:
    start = anyio.current_time()
    with pytest.raises(TimeoutError, match=r"^no response within 2.5 s$") as caught:
        await Timeout(2.5)(wait)(10)
    assert type(caught.value) is Elapsed
    assert caught.value.seconds == 2.5
    assert caught.value.sent is True
    assert not caught.value.retryable
    assert caught.value.__cause__ is None
    assert anyio.current_time() - start == pytest.approx(2.5)


async def test_a_connect_that_takes_too_long_is_a_handshake_timeout() -> None:
    async def mute(dial: Dial, /) -> None:
        await anyio.sleep_forever()

    with pytest.raises(HandshakeTimeout, match=r"^no connection within 10 s$") as caught:
        await Timeout(10)(mute)(DIAL)
    assert caught.value.retryable


async def test_what_is_in_time_is_passed_on() -> None:
    assert await Timeout(10)(wait)(9) == "done"
    assert await Timeout(math.inf)(wait)(1e6) == "done"


async def test_t1_a_response_that_is_ready_at_the_deadline_wins() -> None:
    async def ready_after(seconds: float, /) -> str:
        # What a call does to its end once it is past its last await. The shield stands for the await that no timer
        # came before: by the clock, the deadline has come when this returns.
        with anyio.CancelScope(shield=True):
            await anyio.sleep(seconds)
        return "done"

    for seconds in (9.999, 10, 20):
        start = anyio.current_time()
        assert await Timeout(10)(ready_after)(seconds) == "done"
        assert anyio.current_time() - start == pytest.approx(seconds)
    with pytest.raises(Elapsed):
        await Timeout(10)(wait)(10.001)


async def test_t1_an_error_that_is_ready_at_the_deadline_wins_as_a_response_does() -> None:
    async def fails(request: str, /) -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10)
        raise LinkLost("cut")

    with pytest.raises(LinkLost):
        await Timeout(10)(fails)("hello")


async def test_t2_what_was_cancelled_has_cleaned_up_before_the_error_is_raised() -> None:
    events: list[str] = []

    async def tidy(request: str, /) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            events.append("cleaned up")

    start = anyio.current_time()
    with pytest.raises(Elapsed):
        await Timeout(10)(tidy)("hello")
    assert events == ["cleaned up"]
    assert anyio.current_time() - start == pytest.approx(11)


async def test_t2_an_error_of_cleaning_up_is_passed_on_instead() -> None:
    async def untidy(request: str, /) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Timeout(10)(untidy)("hello")


# --- and nobody else's -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [5, 10], ids=["earlier", "at the same moment"])
async def test_t3_when_an_outer_scope_ends_first_that_is_a_cancellation_and_not_elapsed(outer: float) -> None:
    with anyio.CancelScope(deadline=anyio.current_time() + outer) as scope:
        await Timeout(10)(wait)(100)
    assert scope.cancelled_caught


async def test_t3_an_outer_fail_after_that_ends_first_raises_its_own_error() -> None:
    with pytest.raises(TimeoutError) as caught:
        with anyio.fail_after(5):
            await Timeout(10)(wait)(100)
    assert not isinstance(caught.value, Elapsed)


async def test_t3_an_outer_scope_that_ends_later_changes_nothing() -> None:
    with anyio.CancelScope(deadline=anyio.current_time() + 10.001) as scope, pytest.raises(Elapsed):
        await Timeout(10)(wait)(100)
    assert not scope.cancelled_caught


async def test_t3_of_two_timeouts_the_shorter_one_raises_wherever_it_stands() -> None:
    for outer, inner in ((5, 10), (10, 5)):
        with pytest.raises(Elapsed, match="no response within 5 s"):
            await Timeout(outer)(Timeout(inner)(wait))(100)


async def test_t3_cancelling_the_caller_is_not_a_timeout() -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(Timeout(10)(wait), 100)
        await anyio.sleep(1)
        group.cancel_scope.cancel()


async def test_t6_a_timeout_error_from_inside_is_not_turned_into_elapsed() -> None:
    for error in (TimeoutError("its own"), Elapsed(3), LinkLost("cut")):

        async def broken(request: str, /, error: Exception = error) -> None:
            await anyio.lowlevel.checkpoint()
            raise error

        with pytest.raises(type(error)) as caught:
            await Timeout(10)(broken)("hello")
        assert caught.value is error
        assert type(caught.value) is type(error)


async def test_t6_nor_is_one_that_comes_in_answer_to_the_cancellation() -> None:
    async def inner(request: str, /) -> None:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            raise TimeoutError("its own") from None

    with pytest.raises(TimeoutError, match="its own") as caught:
        await Timeout(10)(inner)("hello")
    assert type(caught.value) is TimeoutError


# --- beside Retry ----------------------------------------------------------------------------------------------------


async def test_t4_inside_retry_it_bounds_each_attempt() -> None:
    start = anyio.current_time()
    slow = Slow(100)
    with pytest.raises(Elapsed, match=r"no response within 0.1 s") as caught:
        await Retry(IDEMPOTENT)(Timeout(0.1)(slow))("hello")
    # 3 attempts of 0.1 s, and two delays between them
    assert slow.began_after(start) == [0, 0.15, 0.3]
    assert anyio.current_time() - start == pytest.approx(0.4)
    mark = given_up(caught.value)
    assert mark is not None
    assert (mark.attempts, mark.reason) == (3, GiveUp.ATTEMPTS)


async def test_t4_an_attempt_that_is_in_time_ends_it() -> None:
    start = anyio.current_time()
    slow = Slow(100, 100, 0.05)
    assert await Retry(IDEMPOTENT)(Timeout(0.1)(slow))("hello") == "done"
    assert anyio.current_time() - start == pytest.approx(0.1 + 0.05 + 0.1 + 0.05 + 0.05)


async def test_t4_outside_retry_it_bounds_them_all_and_the_waits_between() -> None:
    start = anyio.current_time()
    slow = Slow(100)
    policy = StandardPolicy(Backoff.constant(0.05, jitter="none"), on=Elapsed, idempotent=True, max_attempts=10)
    with pytest.raises(Elapsed, match=r"no response within 0.4 s"):
        await Timeout(0.4)(Retry(policy)(Timeout(0.1)(slow)))("hello")
    assert slow.began_after(start) == [0, 0.15, 0.3]
    assert anyio.current_time() - start == pytest.approx(0.4)


async def test_t4_no_retry_is_begun_that_a_timeout_outside_leaves_no_time_for() -> None:
    start = anyio.current_time()
    slow = Slow(100)
    policy = StandardPolicy(Backoff.constant(5, jitter="none"), on=Elapsed, idempotent=True)
    with pytest.raises(Elapsed, match=r"no response within 0.1 s") as caught:
        await Timeout(1)(Retry(policy)(Timeout(0.1)(slow)))("hello")
    mark = given_up(caught.value)
    assert mark is not None
    assert mark.reason is GiveUp.DEADLINE
    assert anyio.current_time() - start == pytest.approx(0.1)


def is_read(request: object) -> bool:
    return request == "read"


@pytest.mark.parametrize("idempotent", [None, False, is_read], ids=["unknown", "no", "not this one"])
async def test_t4_a_call_that_timed_out_is_not_repeated_unless_it_may_be_carried_out_twice(
    idempotent: bool | Callable[[object], bool] | None,
) -> None:
    policy = StandardPolicy(Backoff.constant(0), on=Elapsed, idempotent=idempotent)
    slow = Slow(100, 0)
    with pytest.raises(Elapsed) as caught:
        await Retry(policy)(Timeout(0.1)(slow))("write")
    assert caught.value.sent
    assert given_up(caught.value) is None
    assert len(slow.began) == 1


async def test_t4_a_call_that_timed_out_is_repeated_if_the_policy_says_that_this_one_may() -> None:
    policy = StandardPolicy(Backoff.constant(0), on=Elapsed, idempotent=is_read)
    assert await Retry(policy)(Timeout(0.1)(Slow(100, 0)))("read") == "done"


async def test_t4_a_call_that_timed_out_is_repeated_only_if_it_is_asked_for() -> None:
    for policy in (StandardPolicy(idempotent=True), StandardPolicy(on=LinkLost, idempotent=True)):
        slow = Slow(100)
        with pytest.raises(Elapsed):
            await Retry(policy)(Timeout(0.1)(slow))("hello")
        assert len(slow.began) == 1


async def test_inside_retry_it_bounds_each_attempt_to_connect() -> None:
    start, attempts = anyio.current_time(), 0

    async def slow_at_first(dial: Dial, /) -> str:
        nonlocal attempts
        attempts += 1
        return await wait(100 if attempts < 3 else 1)

    connect = Retry(Backoff.constant(2, jitter="none"))(Timeout(5)(slow_at_first))
    assert await connect(DIAL) == "done"
    assert anyio.current_time() - start == pytest.approx(5 + 2 + 5 + 2 + 1)


async def test_outside_retry_it_bounds_the_whole_of_connecting() -> None:
    async def broken(dial: Dial, /) -> None:
        await anyio.sleep(3)
        raise LinkLost("cut")

    start = anyio.current_time()
    way_back = Dial(DIAL.endpoint, cause=LinkLost("cut"))
    with pytest.raises(HandshakeTimeout):
        await Timeout(60)(Retry(Backoff.constant(2))(broken))(way_back)
    assert anyio.current_time() - start == pytest.approx(60)


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_it_can_be_cancelled_at_every_await() -> None:
    service = Timeout(10)(wait)
    assert await cancel_at_every_await(lambda: service(1)) == 1


async def test_without_a_bound_no_scope_is_opened() -> None:
    async def time_left(request: str, /) -> float:
        return anyio.current_effective_deadline() - anyio.current_time()

    assert await Timeout(math.inf)(time_left)("hello") == math.inf
    assert await Timeout(3)(time_left)("hello") == pytest.approx(3)


async def test_one_timeout_around_two_services_and_many_calls_at_once_keep_apart() -> None:
    timeout = Timeout(2)
    answers: list[str] = []

    async def caller(service: Wrapper[float, str], seconds: float) -> None:
        try:
            answers.append(await service(seconds))
        except Elapsed:
            answers.append("elapsed")

    async with anyio.create_task_group() as group:
        for service in (timeout(wait), timeout(wait)):
            for seconds in (1, 3, 1.5):
                group.start_soon(caller, service, seconds)
    assert sorted(answers) == ["done"] * 4 + ["elapsed"] * 2


def test_hints_are_those_of_the_service_inside() -> None:
    class Hinting(Wrapper[int, int]):
        async def __call__(self, request: int, /) -> int:
            return request

        def ready_now(self) -> bool:
            return False

        def load(self) -> float:
            return 7.0

    async def plain(request: int, /) -> int:
        return request

    service = Timeout(5)(Hinting(plain))
    assert (ready_now(service), load(service)) == (False, 7.0)
    assert (ready_now(Timeout(5)(plain)), load(Timeout(5)(plain))) == (True, 0.0)
    assert repr(Timeout(5)(plain)) == "<Bounded around plain>"


def test_timeouts_are_values_that_wrap_both_sides() -> None:
    assert Timeout(5) == Timeout(5.0)
    assert repr(Timeout(5)) == "Timeout(seconds=5)"
    assert not Timeout.client_only


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_timeout_that_makes_no_sense_is_refused_with_both_values(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"a timeout of {seconds} seconds, where more than 0"):
        Timeout(seconds)
