"""Messages one way, and round trips: the full stack beside plain ``websockets``, in one run.

    python tests/benchmarks/oneway.py [--rounds 5] [--seconds 0.5] [--sizes 64,1024,65536] [--json FILE]

Server and client are two processes on 127.0.0.1. The stack is ``Stack.resilient``: encrypted, resumable, with a
heartbeat; ``websockets`` is plain, without compression. The rounds are interleaved over the peers, since the speed of a
machine drifts: compare within one run, by the ratios. The receiver confirms count and bytes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio

from towline import Psk, Stack

BASE = "websockets"
PEERS = (BASE, "towline+asyncio", "towline+uvloop", "towline+trio")
STACK = Stack.resilient(psk=Psk(bytes(range(32))))
COUNT = struct.Struct(">cQ")


class Connection(Protocol):
    """What both peers offer: send, receive."""

    async def send(self, message: bytes, /) -> None: ...

    async def recv(self) -> bytes: ...


class Towline:
    """A session under the names that `Connection` has."""

    def __init__(self, session: Any) -> None:
        self.send: Callable[[bytes], Awaitable[None]] = session.send
        self.recv: Callable[[], Awaitable[bytes]] = session.receive


async def answer(connection: Any) -> None:
    """The server: swallow and confirm (``T``), or echo (``E``), as often as the first message says."""
    while True:
        kind, count = COUNT.unpack(await connection.recv())
        if kind == b"T":
            size = 0
            for _ in range(count):
                size += len(await connection.recv())
            await connection.send(struct.pack(">QQ", count, size))
        else:
            for _ in range(count):
                await connection.send(await connection.recv())


async def oneway(connection: Any, size: int, seconds: float) -> float:
    """Messages a second."""
    message = os.urandom(size)
    send = connection.send

    async def burst(count: int) -> float:
        began = time.perf_counter()
        await send(COUNT.pack(b"T", count))
        for _ in range(count):
            await send(message)
        confirmed = struct.unpack(">QQ", await connection.recv())
        assert confirmed == (count, count * size), confirmed
        return count / (time.perf_counter() - began)

    rate = await burst(max(8, min(2000, (4 << 20) // size)))
    return await burst(max(8, int(rate * seconds)))


async def round_trips(connection: Any, seconds: float) -> float:
    """The median round trip of 64 bytes, in microseconds."""
    message = os.urandom(64)
    count = int(3000 * seconds)
    await connection.send(COUNT.pack(b"E", count))
    taken: list[float] = []
    for _ in range(count):
        began = time.perf_counter()
        await connection.send(message)
        await connection.recv()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e6


async def measure(connection: Any, sizes: list[int], seconds: float) -> dict[str, float]:
    figures = {f"{size} B msg/s": await oneway(connection, size, seconds) for size in sizes}
    figures["round trip us"] = await round_trips(connection, seconds)
    return figures


# --- the two peers ---------------------------------------------------------------------------------------------------


async def serve_towline() -> None:
    async def handler(session: Any) -> None:
        await answer(Towline(session))

    async with STACK.serve("tcp://127.0.0.1:0", handler) as server:
        print(server.endpoint.port, flush=True)
        await anyio.sleep_forever()


async def measure_towline(port: int, sizes: list[int], seconds: float) -> dict[str, float]:
    async with STACK.connect(f"tcp://127.0.0.1:{port}") as session:
        return await measure(Towline(session), sizes, seconds)


async def serve_websockets() -> None:
    from websockets.asyncio.server import serve

    async with serve(answer, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.get_running_loop().create_future()


async def measure_websockets(port: int, sizes: list[int], seconds: float) -> dict[str, float]:
    from websockets.asyncio.client import connect

    async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:
        return await measure(connection, sizes, seconds)


def run(
    peer: str, towline: Callable[..., Awaitable[Any]], websockets: Callable[..., Awaitable[Any]], *args: Any
) -> Any:
    if peer == BASE:
        return anyio.run(websockets, *args, backend="asyncio")
    backend = peer.partition("+")[2]
    if backend == "uvloop":
        return anyio.run(towline, *args, backend="asyncio", backend_options={"use_uvloop": True})
    return anyio.run(towline, *args, backend=backend)


# --- the driver ------------------------------------------------------------------------------------------------------


def one_round(peer: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__]
    server = subprocess.Popen([*command, "--serve", peer], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        client = [
            *command,
            "--connect",
            peer,
            "--port",
            port,
            "--sizes",
            options.sizes,
            "--seconds",
            str(options.seconds),
        ]
        done = subprocess.run(client, capture_output=True, text=True, timeout=60, check=True)
        figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return figures
    finally:
        server.kill()
        server.wait()


def compare(options: argparse.Namespace) -> None:
    rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    for number in range(options.rounds):
        for peer in PEERS:
            rounds[peer].append(one_round(peer, options))
            print(f"round {number + 1}: {peer}", file=sys.stderr)
    names = list(rounds[BASE][0])
    report: dict[str, Any] = {}
    for peer in PEERS:
        for name in names:
            values = [figures[name] for figures in rounds[peer]]
            base = [figures[name] for figures in rounds[BASE]]
            ratios = [value / other for value, other in zip(values, base, strict=True)]
            report.setdefault(name, {})[peer] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "ratio": statistics.median(ratios),
                "ratio min": min(ratios),
                "ratio max": max(ratios),
            }
    for name, peers in report.items():
        print(f"\n{name}{'':30}median         min         max   x {BASE} (min-max)")
        for peer, row in peers.items():
            print(
                f"  {peer:20} {row['median']:20,.0f} {row['min']:11,.0f} {row['max']:11,.0f}   "
                f"{row['ratio']:.2f} ({row['ratio min']:.2f}-{row['ratio max']:.2f})"
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--sizes", default="64,1024,65536")
    parser.add_argument("--json", help="write all figures to this file, too")
    parser.add_argument("--serve", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--connect", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        run(options.serve, serve_towline, serve_websockets)
    elif options.connect:
        sizes = [int(size) for size in options.sizes.split(",")]
        figures = run(options.connect, measure_towline, measure_websockets, options.port, sizes, options.seconds)
        print(json.dumps(figures))
    else:
        compare(options)


if __name__ == "__main__":
    main()
