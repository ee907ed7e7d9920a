"""Telemetry: what a call costs with it, beside the same call without, in one run.

    python tests/benchmarks/telemetry.py [--rounds 40] [--backend asyncio]

``again`` is the plain stack once more: how it differs from itself. ``unheard`` is the same as `Telemetry` instruments
it where no SDK listens; ``heard`` with OpenTelemetry's SDK, which samples all and exports nothing. Each has a server
process of its own; all clients are in this one, and take turns of some hundred calls, since the speed of a machine
drifts. Wall time is that of a call; CPU time is that of both ends, and does not notice who else is on the machine.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import anyio
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

from towline import Backoff, Encryption, Framing, Heartbeat, Psk, Request, Response, Resume, Retry, Rpc, Stack
from towline.layers.rpc import Peer
from towline.telemetry import Telemetry

Calls = Stack[Any, Peer, Any, Any]

STACK: Calls = Stack(
    Rpc(), Resume(), Retry(Backoff.exponential()), Heartbeat(), Framing(), Encryption(psk=Psk(bytes(range(32))))
)
BODY = os.urandom(64)
IN_FLIGHT = 100
TURNS = {"pipelined": (IN_FLIGHT, 2_000), "alone": (1, 200)}
"""For each figure how many calls are in flight, and how many a turn has."""


def heard() -> Calls:
    meters = MeterProvider([InMemoryMetricReader()])
    return Telemetry(tracer_provider=TracerProvider(), meter_provider=meters).instrument(STACK)


STACKS: dict[str, Callable[[], Calls]] = {
    "plain": lambda: STACK,
    "again": lambda: STACK,
    "unheard": lambda: Telemetry().instrument(STACK),
    "heard": heard,
}


async def serve(mode: str) -> None:
    async def answer(request: Request, /) -> Response:
        return Response(b"%f" % time.process_time() if request.method == "cpu" else request.payload)

    async with STACKS[mode]().serve("tcp://127.0.0.1:0", answer) as server:
        print(server.endpoint, flush=True)
        await anyio.sleep_forever()


async def turn(peer: Peer, in_flight: int, count: int) -> tuple[float, float]:
    """Make so many calls. Returns what each took in microseconds: of wall time, and of both ends' CPU time."""

    async def one(calls: int) -> None:
        for _ in range(calls):
            await peer(Request("echo", BODY))

    async def cpu() -> float:
        return float((await peer(Request("cpu"))).payload) + time.process_time()

    used, began = await cpu(), time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for _ in range(in_flight):
            tasks.start_soon(one, count // in_flight)
    took = time.perf_counter() - began
    used = await cpu() - used
    return took / count * 1e6, used / count * 1e6


async def compare(endpoints: dict[str, str], rounds: int) -> dict[tuple[str, str], dict[str, list[float]]]:
    found: dict[tuple[str, str], dict[str, list[float]]] = {
        (figure, clock): {mode: [] for mode in endpoints} for figure in TURNS for clock in ("wall", "CPU")
    }
    async with AsyncExitStack() as stack:
        peers = {
            mode: await stack.enter_async_context(STACKS[mode]().connect(endpoint))
            for mode, endpoint in endpoints.items()
        }
        modes = list(peers)
        for number in range(-2, rounds):  # the first two are not counted
            for mode in modes[number % len(modes) :] + modes[: number % len(modes)]:
                for figure, (in_flight, count) in TURNS.items():
                    wall, cpu = await turn(peers[mode], in_flight, count)
                    if number >= 0:
                        found[figure, "wall"][mode].append(wall)
                        found[figure, "CPU"][mode].append(cpu)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--backend", default="asyncio")
    parser.add_argument("--modes", default=",".join(STACKS))
    parser.add_argument("--serve")
    options = parser.parse_args()
    if options.serve:
        return anyio.run(serve, options.serve, backend=options.backend)
    servers: list[subprocess.Popen[str]] = []
    endpoints: dict[str, str] = {}
    try:
        for mode in options.modes.split(","):
            command = [sys.executable, __file__, "--serve", mode, "--backend", options.backend]
            servers.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert servers[-1].stdout is not None
            endpoints[mode] = servers[-1].stdout.readline().strip()
        report(anyio.run(compare, endpoints, options.rounds, backend=options.backend))
    finally:
        for server in servers:
            server.kill()
            server.wait()
    return None


def report(found: dict[tuple[str, str], dict[str, list[float]]]) -> None:
    for (figure, clock), measured in found.items():
        base = next(iter(measured))
        print(f"\n{figure}, {clock} time, us a call; times {base}: median (quartiles)")
        for mode, values in measured.items():
            ratios = [mine / theirs for mine, theirs in zip(values, measured[base], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(f"{mode:10}{statistics.median(values):9.2f}{middle:9.3f} ({low:.3f}-{high:.3f})")


if __name__ == "__main__":
    main()
