"""Layers around any service: their order, their types, their lifetimes, and that they share nothing by accident."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import pytest

from towline import Backoff, Elapsed, Framing, Resume, Retry, Stack, StackError, StandardPolicy, Timeout
from towline.errors import MisuseError
from towline.layers import Balance, Buffer, Either
from towline.policies import TpsBudget
from towline.service import Service, Wrapper, load, ready_now, running
from towline.transports import Memory

STEADY = Backoff.constant(0.1, jitter="none")


def plus_two(inner: Service[int, int], /) -> Service[int, int]:
    async def call(request: int, /) -> int:
        return await inner(request) + 2

    return call


def times_two(inner: Service[int, int], /) -> Service[int, int]:
    async def call(request: int, /) -> int:
        return await inner(request) * 2

    return call


async def same(request: int, /) -> int:
    return request


class Traced:
    """A layer that writes down when a call passes it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name = name
        self.log = log

    def __call__(self, inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def call(request: Any, /) -> Any:
            self.log.append(f"{self.name} in")
            response = await inner(request)
            self.log.append(f"{self.name} out")
            return response

        return call

    def __repr__(self) -> str:
        return f"Traced({self.name!r})"


class Owner(Wrapper[Any, Any]):
    """A service that runs something of its own."""

    def __init__(self, inner: Service[Any, Any], name: str, log: list[str], *, fails: bool = False) -> None:
        super().__init__(inner)
        self.name, self.log, self.fails = name, log, fails

    async def __call__(self, request: Any, /) -> Any:
        return await self.inner(request)

    def _running(self) -> AbstractAsyncContextManager[object]:
        return self._run()

    @asynccontextmanager
    async def _run(self) -> AsyncGenerator[None]:
        if self.fails:
            raise RuntimeError("it cannot start")
        self.log.append(f"{self.name} starts")
        try:
            yield
        finally:
            self.log.append(f"{self.name} ends")


def owner(name: str, log: list[str]) -> Callable[[Service[Any, Any]], Owner]:
    def layer(inner: Service[Any, Any], /) -> Owner:
        return Owner(inner, name, log)

    return layer


# --- order -----------------------------------------------------------------------------------------------------------


async def test_s1_the_first_layer_sees_the_request_first_and_the_response_last() -> None:
    log: list[str] = []
    call = Stack(Traced("outer", log), Traced("inner", log))(same)
    assert await call(1) == 1
    assert log == ["outer in", "inner in", "inner out", "outer out"]


async def test_s2_functions_are_layers_and_their_order_matters() -> None:
    assert await Stack(times_two, plus_two)(same)(4) == 12
    assert await Stack(plus_two, times_two)(same)(4) == 10
    assert await Stack.of(int, int).layer(times_two).layer(plus_two)(same)(4) == 12


async def test_s3_a_stack_without_layers_is_the_service_itself() -> None:
    assert Stack.of(int, int)(same) is same


async def test_s4_one_layer_value_wraps_two_services_independently() -> None:
    calls: list[str] = []

    async def fails(request: str, /) -> str:
        calls.append(request)
        raise ConnectionError

    async def works(request: str, /) -> str:
        calls.append(request)
        return request.upper()

    retry = Retry(StandardPolicy(STEADY, on=ConnectionError))
    one, other = retry(fails), retry(works)
    assert await other("b") == "B"
    with pytest.raises(ConnectionError):
        await one("a")
    assert calls == ["b", "a", "a", "a"]


async def test_s6_a_layer_may_change_the_types_of_request_and_response() -> None:
    def codec(inner: Service[str, int], /) -> Service[bytes, float]:
        async def call(request: bytes, /) -> float:
            return await inner(request.decode()) / 2

        return call

    async def length(text: str, /) -> int:
        return len(text)

    stack = Stack.of(bytes, float).layer(Timeout(5)).layer(codec).layer(Retry())
    assert await stack(length)(b"four") == 2.0


def test_s8_a_stack_shows_its_layers_outermost_first() -> None:
    stack = Stack(Timeout(9), Retry(STEADY), Timeout(5))
    assert re.fullmatch(r"Stack\(Timeout\(seconds=9\), Retry\(.*\), Timeout\(seconds=5\)\)", repr(stack))


def test_a_wrapped_service_shows_what_is_around_what() -> None:
    assert repr(Timeout(5)(Retry()(same))) == "<Bounded around <Retrying around same>>"


async def test_s9_concurrent_calls_on_one_stack_share_no_state() -> None:
    attempts: dict[int, int] = {}

    async def third_time_lucky(request: int, /) -> int:
        attempts[request] = attempts.get(request, 0) + 1
        await anyio.sleep(request / 1000)
        if attempts[request] < 3:
            raise ConnectionError(request)
        return request * 10

    call = Stack(Timeout(60), Retry(StandardPolicy(STEADY, on=ConnectionError, budget=None)), Timeout(1))(
        third_time_lucky
    )
    answers: dict[int, int] = {}

    async def one(request: int) -> None:
        answers[request] = await call(request)

    async with anyio.create_task_group() as group:
        for request in range(100):
            group.start_soon(one, request)
    assert answers == {request: request * 10 for request in range(100)}
    assert set(attempts.values()) == {3}


async def test_s10_an_error_is_the_same_in_whatever_order_transparent_layers_stand() -> None:
    error = ConnectionError("the services own")

    async def fails(request: int, /) -> int:
        raise error

    async def hangs(request: int, /) -> int:
        await anyio.sleep_forever()
        return request

    layers = (Timeout(5), Retry(StandardPolicy(STEADY, max_attempts=2, on=ConnectionError)), Timeout(4))
    orders: list[tuple[object, ...]] = [layers, layers[::-1], (layers[1], layers[0], layers[2])]
    for order in orders:
        with pytest.raises(ConnectionError) as caught:
            await Stack(*order)(fails)(1)
        assert caught.value is error
        with pytest.raises(Elapsed):
            await Stack(*order)(hangs)(1)


async def test_a_stack_is_a_layer_itself() -> None:
    log: list[str] = []
    inside = Stack(Traced("b", log), Traced("c", log))
    assert await Stack(Traced("a", log), inside, Traced("d", log))(same)(1) == 1
    assert [each for each in log if each.endswith("in")] == ["a in", "b in", "c in", "d in"]


def test_a_stack_within_a_stack_is_its_layers() -> None:
    assert Stack(Timeout(9), Stack(Retry(), Stack(Timeout(5)))) == Stack(Timeout(9), Retry(), Timeout(5))
    with pytest.raises(StackError, match="put Framing between them"):
        Stack(Stack(Resume()))


def test_what_is_for_the_dialling_end_only_stays_so_within_other_layers() -> None:
    reads = Either(lambda request: True, Retry())
    assert reads.client_only
    assert not Either(lambda request: True, Timeout(5)).client_only
    shown = Stack(Stack(Retry()), reads, Timeout(5), Framing()).describe().splitlines()
    assert [line.rpartition("  ")[2] for line in shown[1:4]] == ["dialling end"] * 2 + [
        "dialling end, and around the handler"
    ]


def test_a_layer_that_needs_a_connection_is_refused_around_a_service() -> None:
    with pytest.raises(StackError, match="Resume needs a connection inside it: use connect or serve"):
        Stack(Timeout(5), Resume(), Framing())(same)


@pytest.mark.parametrize("service", [same, Balance([same]), Timeout(5)(same)], ids=["function", "Balance", "wrapped"])
def test_a_service_in_place_of_a_layer_is_refused(service: Service[int, int]) -> None:
    with pytest.raises(StackError, match="is a service, not a layer: call the stack of layers with it"):
        Stack(Timeout(1), service)


def test_a_layer_that_gives_no_service_is_refused() -> None:
    def forgetful(inner: Service[int, int], /) -> None:
        del inner  # and that is all

    with pytest.raises(StackError, match=r"forgetful.* gives None, where a layer gives a service"):
        Stack(forgetful)(same)


# --- lifetimes and hints -----------------------------------------------------------------------------------------


async def test_what_layers_own_runs_for_the_length_of_the_block_innermost_first() -> None:
    log: list[str] = []
    stack = Stack(owner("outer", log), Retry(), owner("inner", log))
    async with running(stack(same)) as call:
        assert log == ["inner starts", "outer starts"]
        assert await call(7) == 7
    assert log[2:] == ["outer ends", "inner ends"]


async def test_a_service_that_owns_nothing_can_be_entered_all_the_same() -> None:
    async with running(same) as call:
        assert call is same
    async with Retry()(same) as call:
        assert await call(1) == 1


async def test_entered_twice_is_misuse_and_one_after_the_other_is_fine() -> None:
    log: list[str] = []
    service = Owner(same, "it", log)
    async with service:
        with pytest.raises(MisuseError, match="is entered already"):
            async with service:
                pass
    async with service:
        pass
    assert log == ["it starts", "it ends"] * 2


async def test_what_cannot_start_ends_what_has_started() -> None:
    log: list[str] = []
    outer = Owner(Owner(same, "inner", log), "outer", log, fails=True)
    with pytest.raises(RuntimeError, match="it cannot start"):
        async with outer:
            pass
    assert log == ["inner starts", "inner ends"]


async def test_what_layers_own_runs_while_a_stack_is_open() -> None:
    log: list[str] = []

    stack = Stack(owner("outer", log), Resume(), Retry(), owner("inner", log), Framing(), transports=(Memory(),))

    async def handler(session: Any) -> None:
        await session.send(await session.receive())

    async with stack.open() as opened:
        assert log == ["inner starts", "outer starts"]
        await opened.serve("memory://here", handler)
        async with stack.connect("memory://here") as session:
            await session.send(b"hello")
            assert await session.receive() == b"hello"
    assert sorted(log[-2:]) == ["inner ends", "outer ends"]


async def same_forever(changes: list[int]) -> AsyncGenerator[Any]:
    await anyio.sleep_forever()
    yield changes


@pytest.mark.parametrize("kind", ["Buffer", "Balance", "Stack.open"])
async def test_an_error_in_the_block_survives_a_cancellation_around_it(kind: str) -> None:
    async def fail() -> None:
        with anyio.CancelScope() as scope:
            owners: dict[str, Any] = {
                "Buffer": Buffer(1)(same),
                "Balance": Balance(same_forever([])),
                "Stack.open": Stack(Framing()).open(),
            }
            async with owners[kind]:
                await anyio.sleep(1)
                scope.cancel()
                raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await fail()


def test_hints_reach_through_layers_and_are_absent_otherwise() -> None:
    class Busy:
        def ready_now(self) -> bool:
            return False

        def load(self) -> float:
            return 3.5

        async def __call__(self, request: int, /) -> int:
            return request

    call = Stack(Timeout(5), Retry(), Timeout(5))(Busy())
    assert (ready_now(call), load(call)) == (False, 3.5)
    assert (ready_now(same), load(same)) == (True, 0.0)


# --- storms ------------------------------------------------------------------------------------------------------


class Dead:
    """A service that always fails."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: object, /) -> None:
        self.calls += 1
        await anyio.sleep(0.001)
        raise ConnectionError("dead")


async def storm(call: Service[Any, Any], requests: int) -> None:
    async def one() -> None:
        with pytest.raises(ConnectionError):
            await call("request")

    async with anyio.create_task_group() as group:
        for _ in range(requests):
            group.start_soon(one)


def three_layers(**settings: Any) -> Stack[Any, Any, Any, Any]:
    return Stack(*(Retry(StandardPolicy(STEADY, on=ConnectionError, **settings)) for _ in range(3)))


async def test_storm_three_layers_of_retries_make_no_more_calls_than_one() -> None:
    dead = Dead()
    await storm(three_layers(max_attempts=4, budget=None)(dead), 100)
    assert dead.calls == 400  # not 100 * 4 ** 3 = 6,400


@pytest.mark.parametrize("attempts", [(2, 5, 5), (5, 2, 5), (5, 5, 2)])
async def test_storm_the_innermost_layer_that_retries_is_the_one_that_counts(attempts: tuple[int, ...]) -> None:
    dead = Dead()
    layers = [Retry(StandardPolicy(STEADY, on=ConnectionError, max_attempts=n, budget=None)) for n in attempts]
    await storm(Stack(*layers)(dead), 10)
    assert dead.calls == 10 * attempts[-1]


@pytest.mark.parametrize("reserve", [0, 7, 10])
async def test_storm_a_shared_budget_bounds_them_all_together(reserve: int) -> None:
    dead = Dead()
    budget = TpsBudget(min_per_sec=reserve)
    await storm(three_layers(budget=budget)(dead), 1000)
    assert dead.calls == 1000 + 10 * reserve


async def test_storm_a_shared_budget_bounds_layers_that_do_not_know_of_each_other() -> None:
    # What stands between two layers may hide the mark of the inner one, by raising an error of its own.
    def hiding(inner: Service[Any, Any], /) -> Service[Any, Any]:
        async def call(request: Any, /) -> Any:
            try:
                return await inner(request)
            except ConnectionError as error:
                raise ConnectionError("translated") from error

        return call

    dead = Dead()
    budget = TpsBudget(min_per_sec=5)
    retry = Retry(StandardPolicy(STEADY, on=ConnectionError, budget=budget))
    await storm(Stack(retry, hiding, retry, hiding, retry)(dead), 1000)
    assert dead.calls <= 1000 + 50
