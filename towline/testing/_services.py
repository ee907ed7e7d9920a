"""The contract of a transparent layer, as a function: what every layer around a service must not break.

A layer may add waiting, attempts, limits and errors of its own. What it may not do is change the request, the response
or the error of a call that it has no business with, swallow a cancellation, leave a task or a permit behind, or mix up
two calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from towline.service import Service, load, ready_now, running

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
        self.hint = True

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
        return self.hint

    def load(self) -> float:
        return 42.0


# Any: a layer may be of any type that is called with a service, and this looks at nothing else.
async def check_transparent_layer(
    make_layer: Callable[[], Callable[[Service[Any, Any]], Service[Any, Any]]],
    *,
    calls: int = 20,
    forwards_ready_now: bool = True,
    forwards_load: bool = True,
) -> None:
    """Hold a layer against the contract of all transparent layers; to be run in virtual time, since it waits.

    Args:
        make_layer: makes the layer, with settings under which ``calls`` calls at once, of a millisecond each, all go
            through.
        calls: how many calls are made at once.
        forwards_ready_now: the layer adds nothing to the hint ``ready_now`` of the service inside.
        forwards_load: the same for ``load``.

    Raises:
        AssertionError: if the layer breaks the contract; the message says how.

    >>> from towline import Timeout
    >>> anyio.run(check_transparent_layer, lambda: Timeout(5))
    """
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

        answers = await _all(call, calls)
        assert answers == [("answer", number) for number in range(calls)], f"calls were mixed up: {answers}"

        await _check_cancellation(call, inside)
        assert not other.requests, "a call to one service went to another"

        assert not forwards_load or load(call) == 42.0, f"load() is {load(call)}, and that of the service inside is 42"
        if forwards_ready_now:
            assert ready_now(call), "ready_now() is False, and that of the service inside is True"
            inside.hint = False
            assert not ready_now(call), "ready_now() is True, and that of the service inside is False"

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


async def _all(call: Service[Any, Any], calls: int) -> list[Any]:
    answers: list[Any] = [None] * calls

    async def one(number: int) -> None:
        answers[number] = await call(number)

    async with anyio.create_task_group() as group:
        for number in range(calls):
            group.start_soon(one, number)
    return answers


async def _check_cancellation(call: Service[Any, Any], inside: _Service) -> None:
    seen, start = len(inside.requests), anyio.current_time()
    with anyio.move_on_after(0.0005) as scope:
        await call("hang")
    assert scope.cancelled_caught, "a cancelled call returned as if it had not been"
    took = anyio.current_time() - start
    assert took < 1, f"a cancelled call ended only after {took:g} s"
    with anyio.move_on_after(60):
        while inside.running:  # noqa: ASYNC110 -- whoever ends there need not tell
            await anyio.sleep(0.001)
    assert not inside.running, "the call inside goes on although its caller was cancelled"
    assert inside.cancelled == len(inside.requests) - seen, "the call inside was not told of the cancellation"
    with anyio.move_on_after(60):
        assert await call("after") == ("answer", "after")
        return
    raise AssertionError("no call goes through after one that was cancelled")
