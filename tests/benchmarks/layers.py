"""What a layer adds to a call that succeeds, beside the primitive that it needs and beside what others ask for it.

    python tests/benchmarks/layers.py [--rounds 15] [--calls 20000] [--backend asyncio] [--json FILE]

A call goes to a service that returns its request. Each round times every row in turn, since the speed of a machine
drifts: compare within one run. A row's ``added`` is the median over the rounds of its time less that of the bare call
in the same round, with the least and the most beside it; ``beyond`` is what is added beyond the primitive.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import anyio

from towline import (
    Balance,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Fallback,
    Filter,
    Hedge,
    LoadShed,
    RateLimit,
    Reconnect,
    Retry,
    Service,
    Stack,
    StandardPolicy,
    Steer,
    Timeout,
    retryable,
    running,
)
from towline.layers import Either, map_error, map_request, map_response
from towline.policies import BreakerPolicy, FixedWindow, PeakEwma, Percentile

Call = Service[int, int]


async def bare(request: int, /) -> int:
    return request


async def connect(target: int, /) -> Call:
    return bare


async def clock(request: int, /) -> int:
    anyio.current_time()
    return await bare(request)


async def scope(request: int, /) -> int:
    with anyio.move_on_after(60):
        return await bare(request)
    raise AssertionError


async def deadline(request: int, /) -> int:
    """What any layer pays that must know the caller's deadline before it sets one of its own."""
    began = anyio.current_time()
    left = min(60, anyio.current_effective_deadline() - began)
    with anyio.CancelScope(deadline=began + left):
        return await bare(request)
    raise AssertionError


class Semaphore:
    def __init__(self) -> None:
        self.semaphore = anyio.Semaphore(100, fast_acquire=True)

    async def __call__(self, request: int, /) -> int:
        async with self.semaphore:
            return await bare(request)


async def task(request: int, /) -> int:
    """What any layer pays that runs the call in a task of its own."""
    answer = 0

    async def run() -> None:
        nonlocal answer
        answer = await bare(request)

    async with anyio.create_task_group() as group:
        group.start_soon(run)
    return answer


async def race(request: int, /) -> int:
    """What any layer pays that has a task wait beside the call, and end when it is over."""
    answer = 0
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.sleep, 60)
        answer = await bare(request)
        group.cancel_scope.cancel()
    return answer


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], Call]
    primitive: str = ""
    peer: bool = False


def unchanged(value: Any) -> Any:
    return value


def everything(request: object) -> bool:
    return True


ROWS = [
    Row("a plain async wrapper", lambda: _wrapped()),
    Row("Retry", lambda: Retry()(bare)),
    Row("Retry, no budget", lambda: Retry(StandardPolicy(budget=None))(bare)),
    Row("CircuitBreaker", lambda: CircuitBreaker()(bare)),
    Row("CircuitBreaker, by count", lambda: CircuitBreaker(BreakerPolicy(count=100))(bare)),
    Row("CircuitBreaker, slow calls", lambda: CircuitBreaker(BreakerPolicy(slow_call=1.0))(bare), "clock (primitive)"),
    Row("LoadShed", lambda: LoadShed()(bare)),
    Row("Deadline that only checks", lambda: Deadline()(bare)),
    Row("Filter", lambda: Filter(everything)(bare)),
    Row("Fallback", lambda: Fallback.value(0, on=OSError)(bare)),
    Row("Either", lambda: Either(everything, LoadShed())(bare)),
    Row("map_request", lambda: map_request(unchanged)(bare)),
    Row("map_response", lambda: map_response(unchanged)(bare)),
    Row("map_error", lambda: map_error(unchanged)(bare)),
    Row("Steer", lambda: Steer([bare, bare], lambda request, services: 0)),
    Row("@retryable", lambda: retryable(on=OSError)(bare)),
    Row("clock (primitive)", lambda: clock),
    Row("scope (primitive)", lambda: scope),
    Row("Timeout", lambda: Timeout(60)(bare), "scope (primitive)"),
    Row("deadline (primitive)", lambda: deadline),
    Row("Deadline of its own", lambda: Deadline(60)(bare), "deadline (primitive)"),
    Row("semaphore (primitive)", lambda: Semaphore()),
    Row("ConcurrencyLimit", lambda: ConcurrencyLimit(100)(bare), "semaphore (primitive)"),
    Row("RateLimit", lambda: RateLimit(10**9, per=1)(bare), "semaphore (primitive)"),
    Row("RateLimit, fixed window", lambda: RateLimit(FixedWindow(10**9, per=1))(bare), "semaphore (primitive)"),
    Row("Balance", lambda: Balance([bare, bare]), "semaphore (primitive)"),
    Row("Balance, peak-EWMA", lambda: Balance([bare, bare], load=PeakEwma()), "semaphore (primitive)"),
    Row("Reconnect", lambda: Reconnect(0)(connect)),
    Row("task (primitive)", lambda: task),
    Row("race (primitive)", lambda: race),
    Row("Hedge", lambda: Hedge(60.0)(bare), "race (primitive)"),
    Row("Hedge, percentile", lambda: Hedge(Percentile(0.95))(bare), "race (primitive)"),
    Row("Buffer", lambda: Buffer(100)(bare), "task (primitive)"),
    Row(
        "six layers",
        lambda: Stack(
            Timeout(60), ConcurrencyLimit(100), Retry(), CircuitBreaker(), RateLimit(10**9, per=1), Timeout(30)
        )(bare),
    ),
]


def _wrapped() -> Call:
    async def call(request: int, /) -> int:
        return await bare(request)

    return call


def peers() -> list[Row]:
    """What others ask for the same; those that are not installed are left out."""
    rows: list[Row] = []
    try:
        import tenacity

        decorated: Call = tenacity.retry(
            stop=tenacity.stop_after_attempt(3), retry=tenacity.retry_if_exception_type(OSError)
        )(bare)
        rows.append(Row("tenacity", lambda: decorated, peer=True))
    except ImportError:
        pass
    try:
        import stamina

        stubborn: Call = stamina.retry(on=OSError, attempts=3)(bare)
        rows.append(Row("stamina", lambda: stubborn, peer=True))
    except ImportError:
        pass
    try:
        import pybreaker

        breaker = pybreaker.CircuitBreaker()

        # Its call_async is for Tornado; its synchronous call protects an async function only if it is awaited inside.
        async def broken(request: int, /) -> int:
            with breaker.calling():
                return await bare(request)

        rows.append(Row("pybreaker", lambda: broken, peer=True))
    except ImportError:
        pass
    return rows


async def timed(call: Call, calls: int) -> float:
    """Nanoseconds for one call."""
    began = time.perf_counter_ns()
    for _ in range(calls):
        await call(1)
    return (time.perf_counter_ns() - began) / calls


async def measure(rounds: int, calls: int) -> dict[str, list[float]]:
    rows = [*ROWS, *peers()]
    times: dict[str, list[float]] = {"bare": [], **{row.name: [] for row in rows}}
    async with AsyncExitStack() as entered:
        services: dict[str, Call] = {row.name: await entered.enter_async_context(running(row.make())) for row in rows}
        for service in services.values():
            await timed(service, max(calls // 20, 1))  # warm
        for _ in range(rounds):
            times["bare"].append(await timed(bare, calls))
            for row in rows:
                # a row that costs a task is given fewer calls, so that a round stays short
                few = calls // 10 if {row.name, row.primitive} & {"task (primitive)", "race (primitive)"} else calls
                times[row.name].append(await timed(services[row.name], few))
    return times


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.0f} ({min(values):.0f}-{max(values):.0f})"


def report(times: dict[str, list[float]]) -> None:
    print(f"bare call: {spread(times['bare'])} ns\n")
    print(f"{'ns a call':28} {'added':>24} {'beyond its primitive':>26}")
    for row in [*ROWS, *peers()]:
        added = [mine - base for mine, base in zip(times[row.name], times["bare"], strict=True)]
        beyond = ""
        if row.primitive:
            pairs = zip(times[row.name], times[row.primitive], strict=True)
            beyond = spread([mine - base for mine, base in pairs])
        print(f"{row.name:28} {spread(added):>24} {beyond:>26}")


def main() -> None:
    parser = argparse.ArgumentParser(description="What a layer adds to a call that succeeds.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20_000, help="in each round")
    parser.add_argument("--backend", default="asyncio", choices=["asyncio", "trio"])
    parser.add_argument("--json", help="also write all times to this file")
    options = parser.parse_args()
    times = anyio.run(measure, options.rounds, options.calls, backend=options.backend)
    print(f"Python {sys.version.split()[0]}, {options.backend}, {options.rounds} rounds of {options.calls:,} calls")
    report(times)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(times, file)


if __name__ == "__main__":
    main()
