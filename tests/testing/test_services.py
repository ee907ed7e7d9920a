"""The checker of transparent layers: it passes what keeps the contract, and says what breaks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline import Retry, Stack, Timeout
from towline.service import Service, Wrapper
from towline.testing import check_transparent_layer

Layer = Callable[[Service[Any, Any]], Service[Any, Any]]


def same(inner: Service[Any, Any], /) -> Service[Any, Any]:
    return inner


class Changed(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        return "something else" if await self.inner(request) else None


class Asked(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        await self.inner(str(request))
        return ("answer", request)


class Grouped(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        async with anyio.create_task_group():
            return await self.inner(request)


class Repeated(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        try:
            return await self.inner(request)
        except Exception:
            return await self.inner(request)


class Mixed(Wrapper[Any, Any]):
    answer: Any = None

    async def __call__(self, request: Any, /) -> Any:
        self.answer = await self.inner(request)
        await anyio.sleep(0.001)
        return self.answer


class Swallowing(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        try:
            return await self.inner(request)
        except anyio.get_cancelled_exc_class():
            return None


class Detached(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        with anyio.CancelScope(shield=request == "hang"):
            with anyio.move_on_after(30):
                return await self.inner(request)
        await anyio.lowlevel.checkpoint()


class Leaking(Wrapper[Any, Any]):
    permits = 20

    async def __call__(self, request: Any, /) -> Any:
        if self.permits == 0:
            await anyio.sleep_forever()
        self.permits -= 1
        try:
            response = await self.inner(request)
        except Exception:
            self.permits += 1
            raise
        self.permits += 1
        return response


class LosesOnErrors(Leaking):
    async def __call__(self, request: Any, /) -> Any:
        if self.permits == 0:
            await anyio.sleep_forever()
        self.permits -= 1
        response = await self.inner(request)
        self.permits += 1
        return response


class SingleFlight(Wrapper[Any, Any]):
    """Calls with the same request share one call, which is lost if the first of them is cancelled."""

    def __init__(self, inner: Service[Any, Any]) -> None:
        super().__init__(inner)
        self.flights: dict[Any, tuple[anyio.Event, list[Any]]] = {}

    async def __call__(self, request: Any, /) -> Any:
        if request in self.flights:
            event, answer = self.flights[request]
            await event.wait()
            return answer[0]
        event, answer = self.flights[request] = anyio.Event(), []
        answer.append(await self.inner(request))
        event.set()
        del self.flights[request]
        return answer[0]


class Deaf(Wrapper[Any, Any]):
    async def __call__(self, request: Any, /) -> Any:
        return await self.inner(request)

    def ready_now(self) -> bool:
        return True


class Weightless(Deaf):
    def ready_now(self) -> bool:
        return self.inner.ready_now()  # type: ignore[attr-defined, no-any-return]

    def load(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    "layer",
    [same, Retry(), Timeout(60), Stack(Timeout(60), Retry())],
    ids=["function", "Retry", "Timeout", "Stack"],
)
async def test_a_layer_that_keeps_the_contract_passes(layer: Layer) -> None:
    await check_transparent_layer(lambda: layer)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (Changed, "the response is 'something else'"),
        (Asked, "was asked something else"),
        (Grouped, "and the layer raised ExceptionGroup"),
        (Repeated, "was made 2 times"),
        (Mixed, "calls were mixed up"),
        (Swallowing, "returned as if it had not been"),
        (Detached, "ended only after 30 s"),
        (Leaking, "no call goes through after one that was cancelled"),
        (LosesOnErrors, "no end after 600 s"),
        (SingleFlight, "no end after 600 s"),
        (Deaf, r"ready_now\(\) is True"),
        (Weightless, r"load\(\) is 0.0"),
    ],
)
async def test_a_layer_that_breaks_the_contract_is_told_how(layer: Layer, complaint: str) -> None:
    with pytest.raises(AssertionError, match=complaint):
        await check_transparent_layer(lambda: layer)


async def test_a_layer_with_hints_of_its_own_can_say_so() -> None:
    await check_transparent_layer(lambda: Deaf, forwards_ready_now=False)
