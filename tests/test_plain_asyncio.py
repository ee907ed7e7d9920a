"""Whatever event loop an application has started by itself: ``asyncio.run``, and nothing of anyio around it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest

from towline import (
    Backoff,
    Balance,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Hedge,
    LoadShed,
    RateLimit,
    Request,
    Response,
    Resume,
    Retry,
    Rpc,
    Service,
    Stack,
    StandardPolicy,
    Timeout,
    attempts,
    call_all,
    retryable,
    running,
)
from towline.layers import Framing, Heartbeat
from towline.policies import BreakerPolicy, Percentile
from towline.streams import LinkAttribute
from towline.transports import Memory, Tcp

pytestmark = pytest.mark.real_time

Main = Callable[[], Coroutine[Any, Any, None]]

STEADY = Backoff.constant(0.001, jitter="none")


def run_plainly(main: Main) -> None:
    asyncio.run(asyncio.wait_for(main(), 20))


def run_eagerly(main: Main) -> None:
    with asyncio.Runner() as runner:
        runner.get_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined, unused-ignore]
        runner.run(asyncio.wait_for(main(), 20))


def run_on_uvloop(main: Main) -> None:
    uvloop = pytest.importorskip("uvloop")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 20))


RUNNERS: list[Callable[[Main], None]] = [run_plainly, run_on_uvloop]
if sys.version_info >= (3, 12):
    RUNNERS.append(run_eagerly)


def balance(inner: Service[int, int], /) -> Service[int, int]:
    return Balance([inner])


class Flaky:
    """Every third call fails, and every fifth is slow."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: int, /) -> int:
        self.calls += 1
        number = self.calls
        await asyncio.sleep(0.05 if number % 5 == 0 else 0.001)
        if number % 3 == 0:
            raise ConnectionResetError(number)
        return request


@pytest.mark.parametrize("run", RUNNERS)
def test_every_layer_works(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        flaky = Flaky()
        stack = Stack(
            Deadline(10),
            Buffer(100),
            LoadShed(),
            ConcurrencyLimit(50),
            Retry(StandardPolicy(STEADY, on=ConnectionError, max_attempts=20, budget=None)),
            Hedge(0.005, on=(), budget=None),
            balance,
            CircuitBreaker(BreakerPolicy(failure_ratio=1.0)),
            RateLimit(100_000, per=1),
            Timeout(5),
        )
        async with running(stack(flaky)) as call:
            answers = await asyncio.gather(*(call(number) for number in range(50)))
        assert answers == list(range(50))
        assert flaky.calls > 50

    run(main)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("delay", [0.005, Percentile(0.5, min_points=1, window=0.01)], ids=["fixed", "learnt"])
def test_a_hedge_that_time_starts_is_started(run: Callable[[Main], None], delay: float | Percentile) -> None:
    async def main() -> None:
        calls = 0

        async def slow_at_first(request: str, /) -> str:
            nonlocal calls
            calls += 1
            await asyncio.sleep(10 if request == "slow" and calls == before + 1 else 0.002)
            return request

        call = Hedge(delay, budget=None)(slow_at_first)
        before = 0
        for _ in range(10):
            await call("quick")
        before = calls
        assert await call("slow") == "slow"
        assert calls == before + 2

    run(main)


@pytest.mark.parametrize("run", RUNNERS)
def test_functions_blocks_and_many_calls_work(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        flaky = Flaky()

        @retryable(on=ConnectionError, backoff=STEADY, max_attempts=20, budget=None)
        async def fetch(number: int) -> int:
            return await flaky(number)

        assert await asyncio.gather(*(fetch(number) for number in range(20))) == list(range(20))
        async for attempt in attempts(StandardPolicy(STEADY, on=ConnectionError, max_attempts=20)):
            with attempt:
                attempt.result = await flaky(1)
        steady: Service[int, int] = fetch
        async with call_all(steady, range(20)) as answers:
            assert [answer async for answer in answers] == list(range(20))

    run(main)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("endpoint", ["memory://here", "tcp://127.0.0.1:0"])
def test_sessions_work(run: Callable[[Main], None], endpoint: str) -> None:
    stack = Stack(Resume(), Retry(STEADY), Heartbeat(0.05, 5), Framing(), transports=(Memory(), Tcp()))

    async def echo(session: Any) -> None:
        async for message in session:
            await session.send(message)

    async def main() -> None:
        async with stack.serve(endpoint, echo) as server, stack.connect(server.endpoint) as session:
            await session.send(b"hello")
            with anyio.fail_after(5):
                assert await session.receive() == b"hello"
                while session.extra(LinkAttribute.rtt) is None:  # noqa: ASYNC110 -- it has no event
                    await asyncio.sleep(0.01)
                await session.send(b"and again")
                assert await session.receive() == b"and again"
            assert session.statistics.resumes == 0

    run(main)


@pytest.mark.parametrize("run", RUNNERS)
@pytest.mark.parametrize("below", [(Resume(), Framing()), (Framing(),)], ids=["sessions", "frames"])
def test_calls_over_sockets_work(run: Callable[[Main], None], below: tuple[Any, ...]) -> None:
    """What they bring is taken in a turn of the loop that is no task's: handlers are started there, and cancelled."""
    stack = Stack(Rpc(), *below)
    cancelled = 0

    async def handler(request: Request, /) -> Response:
        nonlocal cancelled
        if request.method == "wait":
            try:
                await asyncio.sleep(60)
            except BaseException:
                cancelled += 1
                raise
        await asyncio.sleep(0.001)
        return Response(request.payload)

    async def main() -> None:
        async with stack.serve("tcp://127.0.0.1:0", handler) as server, stack.connect(server.endpoint) as call:
            waits = [asyncio.ensure_future(call(Request("wait"))) for _ in range(20)]
            answers = await asyncio.gather(*(call(Request("echo", b"%d" % n)) for n in range(200)))
            assert [answer.payload for answer in answers] == [b"%d" % n for n in range(200)]
            for wait in waits:
                wait.cancel()
            with anyio.fail_after(10):
                while cancelled < 20:  # noqa: ASYNC110 -- at the other end of a socket
                    await asyncio.sleep(0.001)
            assert (await call(Request("echo", b"x"))).payload == b"x"

    run(main)
