"""The contract of a transparent layer, as a function: what every layer around a service must not break.

A layer may add waiting, attempts, limits and errors of its own. What it may not do is change the request, the response
or the error of a call that it has no business with, swallow a cancellation, leave a task or a permit behind, or mix up
two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from towline.service import Service, load, ready_now, refuses_now, running

from ._cancel import cancel_at_every_await

__all__ = ["check_transparent_layer"]


class Unwanted(Exception):
    """An error that no layer has any business with."""


class _Service:
    """The service inside: answers what it was asked to, and remembers who asked."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.running = 0
        self.cancelled = 0
        self.is_ready = True
        self.refuses = False

    async def __call__(self, request: Any, /) -> Any:
        self.requests.append(request)
        self.running += 1
        try:
            if request == "hang":
                await anyio.sleep_forever()
            await anyio.sleep(0.001)
            if isinstance(request, Exception):
                raise request
            return ("answer", request)
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    def ready_now(self) -> bool:
        return self.is_ready

    def refuses_now(self) -> bool:
        return self.refuses

    def load(self) -> float:
        return 42.0


# Any: a layer may be of any type that is called with a service, and this looks at nothing else.
async def check_transparent_layer(
    make_layer: Callable[[], Callable[[Service[Any, Any]], Service[Any, Any]]],
    *,
    calls: int = 20,
    limit: float = 600.0,
    forwards_ready_now: bool = True,
    forwards_load: bool = True,
) -> None:
    """Hold a layer against the contract of all transparent layers; to be run in virtual time, since it waits.

    Args:
        make_layer: makes the layer, with settings under which ``calls`` calls at once, of a millisecond each, all go
            through, also if every third call fails.
        calls: how many calls are made at once, and how many fail and are cancelled: more than the layer has permits,
            or one that it loses now and then is not missed.
        limit: seconds after which a check that does not come to an end is a layer that hangs.
        forwards_ready_now: the layer adds nothing to the hints ``ready_now`` and ``refuses_now`` of the service inside.
        forwards_load: the same for ``load``.

    Raises:
        AssertionError: if the layer breaks the contract; the message says how.

    >>> from towline import Timeout
    >>> anyio.run(check_transparent_layer, lambda: Timeout(5))
    """
    with anyio.move_on_after(limit) as scope:
        await _check(make_layer, calls, forwards_ready_now, forwards_load)
    assert not scope.cancelled_caught, f"no end after {limit:g} s: a call waits for something that never comes"


async def _check(
    make_layer: Callable[[], Callable[[Service[Any, Any]], Service[Any, Any]]],
    calls: int,
    forwards_ready_now: bool,
    forwards_load: bool,
) -> None:
    layer = make_layer()
    inside, other = _Service(), _Service()
    async with running(layer(inside)) as call, running(layer(other)):
        request = object()
        response = await call(request)
        assert response == ("answer", request), f"the response is {response!r}"
        assert inside.requests[0] is request, "the service inside was asked something else"

        error = Unwanted("of the service inside")
        caught = await _caught(call, error)
        assert caught is error, f"the service raised {error!r}, and the layer raised {caught!r}"
        assert inside.requests[1:] == [error], (
            f"a call that nobody asked to repeat was made {len(inside.requests) - 1} times"
        )

        await _check_all(call, calls)
        for number in range(calls + 1):  # a permit that is lost with each error is missed in the end
            await _caught(call, Unwanted(number))
            await call(number)
            await call(number)
        await _check_all(call, calls)
        for _ in range(calls + 1):
            await _check_cancellation(call, inside)
        await _check_all(call, calls)
        await _check_the_same_request(call)
        assert not other.requests, "a call to one service went to another"

        assert not forwards_load or load(call) == 42.0, f"load() is {load(call)}, and that of the service inside is 42"
        if forwards_ready_now:
            assert ready_now(call), "ready_now() is False, and that of the service inside is True"
            inside.is_ready = False
            assert not ready_now(call), "ready_now() is True, and that of the service inside is False"
            assert not refuses_now(call), "refuses_now() is True, and that of the service inside is False"
            inside.refuses = True
            assert refuses_now(call), "refuses_now() is False, and that of the service inside is True"

    await cancel_at_every_await(lambda: _once(make_layer()(_Service())))


async def _once(service: Service[Any, Any]) -> None:
    async with running(service) as call:
        await call("request")


async def _caught(call: Service[Any, Any], request: Exception) -> BaseException | None:
    try:
        await call(request)
    except (Exception, BaseExceptionGroup) as error:
        return error
    return None


async def _check_all(call: Service[Any, Any], calls: int) -> None:
    answers: list[Any] = [None] * calls

    async def one(number: int) -> None:
        answers[number] = await call(number)

    async with anyio.create_task_group() as group:
        for number in range(calls):
            group.start_soon(one, number)
    assert answers == [("answer", number) for number in range(calls)], f"calls were mixed up: {answers}"


async def _check_the_same_request(call: Service[Any, Any]) -> None:
    answers: list[Any] = []

    async def one() -> None:
        answers.append(await call("the same"))

    async with anyio.create_task_group() as group:
        group.start_soon(one)
        with anyio.move_on_after(0.0005):
            await call("the same")
    assert answers == [("answer", "the same")], f"with a call that is cancelled beside it, another gets {answers}"


async def _check_cancellation(call: Service[Any, Any], inside: _Service) -> None:
    seen, told, start = len(inside.requests), inside.cancelled, anyio.current_time()
    with anyio.move_on_after(0.0005) as scope:
        await call("hang")
    assert scope.cancelled_caught, "a cancelled call returned as if it had not been"
    took = anyio.current_time() - start
    assert took < 1, f"a cancelled call ended only after {took:g} s"
    with anyio.move_on_after(60):
        while inside.running:  # noqa: ASYNC110 -- whoever ends there need not tell
            await anyio.sleep(0.001)
    assert not inside.running, "the call inside goes on although its caller was cancelled"
    assert inside.cancelled - told == len(inside.requests) - seen, "the call inside was not told of the cancellation"
    with anyio.move_on_after(60):
        assert await call("after") == ("answer", "after")
        return
    raise AssertionError("no call goes through after one that was cancelled")
