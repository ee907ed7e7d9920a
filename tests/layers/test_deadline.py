"""The Deadline layer: what is left of the caller's time goes with the call, from hop to hop."""

from __future__ import annotations

import asyncio
import math
import re
from dataclasses import dataclass, field, replace

import anyio
import anyio.lowlevel
import pytest
import trio.lowlevel
import trio.testing

from towline.errors import DeadlineExceeded, Elapsed, LinkLost
from towline.layers.deadline import Deadline
from towline.layers.retry import Retry
from towline.layers.timeout import Timeout
from towline.policies import Backoff, StandardPolicy
from towline.service import Service, Wrapper, load, ready_now
from towline.testing import VirtualTimeLoop, cancel_at_every_await


@dataclass(frozen=True)
class Get:
    """A request that can say how many seconds are left."""

    key: str
    left: float | None = None


def attach(request: Get, left: float) -> Get:
    return replace(request, left=left)


def of(request: Get) -> float | None:
    return request.left


CALLING = Deadline(attach=attach)
SERVING = Deadline(of=of)


@dataclass
class Recorded:
    """A service that takes a while, and records what it was asked and whether it was cancelled."""

    takes: float = 0.0
    requests: list[Get] = field(default_factory=list[Get])
    log: list[str] = field(default_factory=list[str])

    async def __call__(self, request: Get, /) -> str:
        self.requests.append(request)
        try:
            await anyio.sleep(self.takes)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.5)
            self.log.append("cleaned up")
            raise
        return f"{request.key} after {self.takes:g} s"

    @property
    def told(self) -> list[float | None]:
        return [None if each.left is None else round(each.left, 6) for each in self.requests]


def work(seconds: float) -> None:
    """Let time pass as work does that never awaits: no timer is served meanwhile."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        clock = trio.lowlevel.current_clock()
        assert isinstance(clock, trio.testing.MockClock)
        clock.jump(seconds)
    else:
        assert isinstance(loop, VirtualTimeLoop)
        loop._jumping.now += seconds


# --- T5: from hop to hop ---------------------------------------------------------------------------------------------


def over_the_network(inner: Service[Get, str], there: float, told: list[float | None]) -> Service[Get, str]:
    """What is at the other end of a network: no scope reaches it, and nothing but the request, some time later."""

    async def call(request: Get, /) -> str:
        await anyio.sleep(there)
        told.append(request.left)
        response = ""
        with anyio.CancelScope(shield=True):
            response = await inner(request)
        return response

    return call


@pytest.mark.smoke
async def test_t5_the_deadline_in_the_metadata_decreases_with_every_hop() -> None:
    told: list[float | None] = []
    scopes: list[float] = []

    async def database(request: Get, /) -> str:
        scopes.append(anyio.current_effective_deadline() - anyio.current_time())
        await anyio.sleep(0.5)
        return f"value of {request.key}"

    def service(inner: Service[Get, str], takes: float) -> Service[Get, str]:
        onward = CALLING(inner)

        async def handler(request: Get, /) -> str:
            scopes.append(anyio.current_effective_deadline() - anyio.current_time())
            await anyio.sleep(takes)
            return await onward(Get(request.key))

        return SERVING(handler)

    third = over_the_network(SERVING(database), 0.25, told)
    second = over_the_network(service(third, takes=2), 0.25, told)
    first = over_the_network(service(second, takes=1), 0.25, told)
    assert await Deadline(10, attach=attach)(first)(Get("a")) == "value of a"
    # Each hop has lost what the handlers before it took; the ways there are nothing that either end could know.
    assert told == pytest.approx([10, 9, 7])
    assert scopes == pytest.approx([10, 9, 7])


async def test_t5_no_hop_outlives_what_it_was_told() -> None:
    deep = Recorded(takes=100)
    told: list[float | None] = []

    async def handler(request: Get, /) -> str:
        await anyio.sleep(3)
        return await CALLING(over_the_network(SERVING(deep), 0, told))(request)

    start = anyio.current_time()
    with pytest.raises(DeadlineExceeded, match="the deadline has passed after 7 s"):
        await Deadline(10, attach=attach)(over_the_network(SERVING(handler), 0, told))(Get("a"))
    assert told == [10, pytest.approx(7)]
    assert deep.log == ["cleaned up"]
    assert anyio.current_time() - start == pytest.approx(10.5)


async def test_t5_what_the_callers_own_scope_leaves_is_told() -> None:
    inner = Recorded()
    with anyio.fail_after(10):
        await CALLING(inner)(Get("a"))
        await anyio.sleep(4)
        await CALLING(inner)(Get("b"))
        with anyio.move_on_after(2):
            await CALLING(inner)(Get("c"))
        await Deadline(1, attach=attach)(inner)(Get("d"))
        await Deadline(1000, attach=attach)(inner)(Get("e"))
    assert inner.told == [10, 6, 2, 1, 6]


async def test_t5_the_least_of_the_three_bounds_is_told() -> None:
    inner = Recorded()
    for told, seconds, callers in [(1.0, 2.0, 3.0), (2.0, 1.0, 3.0), (3.0, 2.0, 1.0), (1.0, 3.0, 2.0)]:
        with anyio.move_on_after(callers):
            await Deadline(seconds, attach=attach, of=of)(inner)(Get("a", told))
    assert inner.told == [1, 1, 1, 1]


async def test_t5_inside_retry_each_attempt_is_told_what_is_left_for_it() -> None:
    async def failing(request: Get, /) -> str:
        told.append(request.left)
        await anyio.sleep(1)
        raise LinkLost("cut")

    told: list[float | None] = []
    policy = StandardPolicy(Backoff.constant(2, jitter="none"), max_attempts=10)
    start = anyio.current_time()
    with pytest.raises(LinkLost):
        await Deadline(8)(Retry(policy)(CALLING(failing)))(Get("a"))
    assert told == pytest.approx([8, 5, 2])
    assert anyio.current_time() - start == pytest.approx(7)  # and no wait that the deadline would have cut short


async def test_where_there_is_no_deadline_nothing_is_told() -> None:
    inner = Recorded()
    await CALLING(inner)(Get("a"))
    await Deadline(math.inf, attach=attach, of=of)(inner)(Get("b"))
    await Deadline(attach=attach, of=of)(inner)(Get("c", math.inf))
    await Deadline()(inner)(Get("d"))
    assert inner.requests == [Get("a"), Get("b"), Get("c", math.inf), Get("d")]


async def test_without_attach_the_request_goes_on_as_it_is() -> None:
    inner = Recorded()
    request = Get("a", 5.0)
    await Deadline(3, of=of)(inner)(request)
    assert inner.requests[0] is request


# --- what is held to it ----------------------------------------------------------------------------------------------


def shown(layer: Deadline) -> str:
    return re.sub(r"<function (\w+) at \w+>", r"\1", repr(layer))


@pytest.mark.parametrize(
    ("layer", "request_"),
    [
        (Deadline(5), Get("a")),
        (SERVING, Get("a", 5)),
        (Deadline(6, of=of), Get("a", 5)),
        (Deadline(5, of=of), Get("a", 6)),
    ],
    ids=["seconds", "of", "of is less", "seconds are less"],
)
async def test_when_its_own_bound_passes_the_call_is_cancelled_and_the_deadline_is_exceeded(
    layer: Deadline, request_: Get
) -> None:
    inner = Recorded(takes=100)
    start = anyio.current_time()
    with pytest.raises(DeadlineExceeded, match=r"^the deadline has passed after 5 s$") as caught:
        await layer(inner)(request_)
    assert caught.value.sent is True
    assert caught.value.seconds == 5
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, Elapsed)
    assert isinstance(caught.value, TimeoutError)
    assert inner.log == ["cleaned up"]
    assert anyio.current_time() - start == pytest.approx(5.5)


@pytest.mark.parametrize("callers", [3, 5], ids=["earlier", "at the same moment"])
@pytest.mark.parametrize("layer", [Deadline(5), Deadline(5, attach=attach), CALLING, SERVING], ids=shown)
async def test_when_the_callers_scope_passes_first_a_cancellation_stays_one(layer: Deadline, callers: float) -> None:
    inner = Recorded(takes=100)
    with anyio.move_on_after(callers) as scope:
        await layer(inner)(Get("a", 5))
    assert scope.cancelled_caught
    assert inner.log == ["cleaned up"]


async def test_cancelling_the_caller_is_no_deadline() -> None:
    inner = Recorded(takes=100)
    async with anyio.create_task_group() as group:
        group.start_soon(Deadline(5)(inner), Get("a"))
        await anyio.sleep(1)
        group.cancel_scope.cancel()
    assert inner.log == ["cleaned up"]


async def test_a_response_at_the_deadline_wins() -> None:
    async def shielded(request: Get, /) -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(5)
        return "in time"

    async def busy(request: Get, /) -> str:
        await anyio.lowlevel.checkpoint()
        work(5)
        return "in time"

    assert await Deadline(5)(shielded)(Get("a")) == "in time"
    assert await Deadline(5)(busy)(Get("a")) == "in time"
    assert await Deadline(5)(Recorded(takes=4.999))(Get("a")) == "a after 4.999 s"


async def test_errors_from_inside_are_passed_on_themselves() -> None:
    for error in (TimeoutError("its own"), Elapsed(1), DeadlineExceeded(1), LinkLost("cut")):

        async def broken(request: Get, /, error: Exception = error) -> None:
            await anyio.lowlevel.checkpoint()
            raise error

        for layer in (Deadline(5), CALLING):
            with pytest.raises(type(error)) as caught:
                await layer(broken)(Get("a"))
            assert caught.value is error


# --- what is not begun -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, -0.0, -1.5, -math.inf, math.nan])
@pytest.mark.parametrize("layer", [SERVING, Deadline(5, of=of), Deadline(5, attach=attach, of=of)], ids=shown)
async def test_a_request_that_has_no_time_left_is_not_begun(layer: Deadline, left: float) -> None:
    inner = Recorded()
    with pytest.raises(
        DeadlineExceeded, match=rf"^not begun: the deadline had passed, with {left:g} s left$"
    ) as caught:
        await layer(inner)(Get("a", left))
    assert caught.value.sent is False
    assert inner.requests == []


@pytest.mark.parametrize("layer", [CALLING, Deadline(5), Deadline(5, attach=attach, of=of)], ids=shown)
@pytest.mark.parametrize("how", ["busy", "past", "cancelled"])
async def test_when_the_callers_scope_has_ended_nothing_is_begun_and_the_cancellation_comes(
    layer: Deadline, how: str
) -> None:
    inner = Recorded()
    service = layer(inner)
    with anyio.CancelScope(deadline=anyio.current_time() + (-1 if how == "past" else 2)) as scope:
        if how == "busy":
            work(2)
        elif how == "cancelled":
            scope.cancel()
        await service(Get("a"))
    assert scope.cancelled_caught
    assert inner.requests == []


async def test_a_scope_whose_end_is_put_off_at_the_last_moment_gives_an_error_and_no_hang() -> None:
    inner = Recorded()

    async def put_off() -> None:
        scope.deadline = math.inf

    async with anyio.create_task_group() as group:
        with anyio.CancelScope(deadline=anyio.current_time() + 2) as scope:
            group.start_soon(put_off)
            work(3)
            # On trio the cancellation is quicker, and passes through this.
            with pytest.raises(DeadlineExceeded, match="not begun: the deadline had passed, with -1 s left"):
                await CALLING(inner)(Get("a"))
    assert inner.requests == []


async def test_an_error_of_attach_or_of_is_the_callers() -> None:
    def broken(*_: object) -> Get:
        raise ZeroDivisionError

    inner = Recorded()
    with pytest.raises(ZeroDivisionError):
        await Deadline(5, attach=broken)(inner)(Get("a"))
    with pytest.raises(ZeroDivisionError):
        await Deadline(5, of=broken)(inner)(Get("a"))  # type: ignore[arg-type]
    assert inner.requests == []


# --- the rest --------------------------------------------------------------------------------------------------------


async def test_a_scope_is_opened_only_for_a_bound_of_its_own_that_comes_first() -> None:
    async def inner(request: Get, /) -> float:
        return anyio.current_effective_deadline() - anyio.current_time()

    assert await CALLING(inner)(Get("a")) == math.inf
    assert await SERVING(inner)(Get("a")) == math.inf
    assert await SERVING(inner)(Get("a", 5)) == pytest.approx(5)
    with anyio.move_on_after(3):
        assert await Deadline(5)(inner)(Get("a")) == pytest.approx(3)
        assert await Deadline(2)(inner)(Get("a")) == pytest.approx(2)


async def test_the_response_comes_at_the_cost_of_no_checkpoint() -> None:
    async def at_once(request: Get, /) -> str:
        return "at once"

    for layer in (Deadline(5), CALLING, SERVING, Deadline()):
        coroutine = layer(at_once)(Get("a", 5))
        with pytest.raises(StopIteration, match="at once"):
            coroutine.send(None)


async def test_it_can_be_cancelled_at_every_await() -> None:
    inner = Recorded(takes=1)
    service = Deadline(5, attach=attach)(inner)
    assert await cancel_at_every_await(lambda: service(Get("a"))) == 1
    assert len(inner.requests) == 2
    assert inner.log == ["cleaned up"]


async def test_a_timeout_inside_raises_its_own_error_first() -> None:
    inner = Recorded(takes=100)
    with pytest.raises(Elapsed, match="no response within 1 s") as caught:
        await Deadline(5)(Timeout(1)(inner))(Get("a"))
    assert not isinstance(caught.value, DeadlineExceeded)


async def test_one_layer_around_two_services_and_many_calls_at_once_keep_apart() -> None:
    answers: list[str] = []
    slow, quick = Recorded(takes=3), Recorded(takes=1)
    services: list[Wrapper[Get, str]] = [SERVING(slow), SERVING(quick)]

    async def caller(service: Wrapper[Get, str], left: float) -> None:
        try:
            answers.append(await service(Get("a", left)))
        except DeadlineExceeded as error:
            answers.append(str(error))

    async with anyio.create_task_group() as group:
        for service in services:
            for left in (2, 4):
                group.start_soon(caller, service, left)
    assert sorted(answers) == [
        "a after 1 s",
        "a after 1 s",
        "a after 3 s",
        "the deadline has passed after 2 s",
    ]


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

    service = Deadline(5)(Hinting(plain))
    assert (ready_now(service), load(service)) == (False, 7.0)
    assert repr(Deadline(5)(plain)) == "<Held around plain>"


def test_deadlines_are_values_for_both_sides() -> None:
    assert Deadline(5) == Deadline(5.0)
    assert Deadline(5, of=of) != Deadline(5)
    assert repr(Deadline(5)) == "Deadline(seconds=5)"
    assert not Deadline.client_only


@pytest.mark.parametrize("seconds", [0, -1, math.nan])
def test_a_deadline_that_makes_no_sense_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"seconds is {seconds}, where a number above 0 is expected"):
        Deadline(seconds)
