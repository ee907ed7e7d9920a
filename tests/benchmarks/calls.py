"""Calls: the full stack with Rpc beside gRPC and a plain ``websockets`` echo, in one run.

    python tests/benchmarks/calls.py [--rounds 5] [--seconds 1] [--in-flight 100] [--json FILE]

Server and client are two processes on 127.0.0.1, a call carries 64 bytes there and back, and so many are in flight. The
stack is encrypted, resumable, with a heartbeat, and its handler runs on a standing worker. gRPC is its asyncio API with
generic bytes handlers (no protobuf), plain; ``websockets`` is plain, without compression, and matches echoes by a
number. The rounds are interleaved over the peers, since the speed of a machine drifts: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import os
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from towline import Backoff, Encryption, Framing, Heartbeat, Psk, Resume, Retry, Stack
from towline.layers.rpc import Request, Response, Rpc

BASE = "websockets"
PEERS = (BASE, "grpcio", "towline+asyncio", "towline+uvloop", "towline+trio")
STACK = Stack(
    Rpc(), Resume(), Retry(Backoff.exponential()), Heartbeat(), Framing(), Encryption(psk=Psk(bytes(range(32))))
)
BODY = os.urandom(64)

Call = Callable[[bytes], Awaitable[bytes]]


async def measure(call: Call, seconds: float, in_flight: int) -> dict[str, float]:
    taken: list[float] = []

    async def one(until: float) -> None:
        while (began := time.perf_counter()) < until:
            assert await call(BODY) == BODY
            taken.append(time.perf_counter() - began)

    async def run(length: float, tasks: int) -> float:
        taken.clear()
        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(tasks):
                group.start_soon(one, began + length)
        return len(taken) / (time.perf_counter() - began)

    await run(seconds / 5, in_flight)
    figures = {"calls/s": await run(seconds, in_flight)}
    await run(seconds / 2, 1)
    figures["one at a time us"] = statistics.median(taken) * 1e6
    return figures


# --- the peers --------------------------------------------------------------------------------------------------------


async def serve_towline() -> None:
    async def echo(request: Request, /) -> Response:
        return Response(request.payload)

    async with STACK.serve("tcp://127.0.0.1:0", echo) as server:
        print(server.endpoint.port, flush=True)
        await anyio.sleep_forever()


@asynccontextmanager
async def connect_towline(port: int) -> AsyncGenerator[Call]:
    async with STACK.connect(f"tcp://127.0.0.1:{port}") as peer:

        async def call(body: bytes) -> bytes:
            return (await peer(Request("echo", body))).payload

        yield call


async def serve_websockets() -> None:
    from websockets.asyncio.server import serve

    async def echo(connection: Any) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, compression=None, max_size=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await anyio.sleep_forever()


@asynccontextmanager
async def connect_websockets(port: int) -> AsyncGenerator[Call]:
    from websockets.asyncio.client import connect

    pending: dict[int, asyncio.Future[bytes]] = {}
    number = 0

    async with connect(f"ws://127.0.0.1:{port}", compression=None, max_size=None) as connection:

        async def receive() -> None:
            async for message in connection:
                assert isinstance(message, bytes)
                pending.pop(struct.unpack_from(">I", message)[0]).set_result(message[4:])

        async def call(body: bytes) -> bytes:
            nonlocal number
            number += 1
            future = pending[number] = asyncio.get_running_loop().create_future()
            await connection.send(struct.pack(">I", number) + body)
            answer: bytes = await future
            return answer

        reader = asyncio.create_task(receive())
        try:
            yield call
        finally:
            reader.cancel()


async def serve_grpcio() -> None:
    grpc: Any = importlib.import_module("grpc")

    async def echo(request: bytes, context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bench", {"echo": method})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@asynccontextmanager
async def connect_grpcio(port: int) -> AsyncGenerator[Call]:
    grpc: Any = importlib.import_module("grpc")

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        method = channel.unary_unary("/bench/echo")

        async def call(body: bytes) -> bytes:
            answer: bytes = await method(body)
            return answer

        yield call


SERVE: dict[str, Callable[[], Awaitable[None]]] = {
    "towline": serve_towline,
    "websockets": serve_websockets,
    "grpcio": serve_grpcio,
}
CONNECT: dict[str, Callable[[int], Any]] = {
    "towline": connect_towline,
    "websockets": connect_websockets,
    "grpcio": connect_grpcio,
}


# --- the run ----------------------------------------------------------------------------------------------------------


def loop_of(peer: str) -> tuple[str, dict[str, Any]]:
    loop = peer.partition("+")[2]
    return ("trio", {}) if loop == "trio" else ("asyncio", {"use_uvloop": loop == "uvloop"})


def one(peer: str, seconds: float, in_flight: int) -> dict[str, float]:
    """One round of one peer, in two new processes."""
    me = [sys.executable, __file__]
    server = subprocess.Popen([*me, "--serve", peer], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = server.stdout.readline().strip()
        command = [*me, "--client", peer, "--port", port, "--seconds", str(seconds), "--in-flight", str(in_flight)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
        figures: dict[str, float] = json.loads(done.stdout)
        return figures
    finally:
        server.kill()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--in-flight", type=int, default=100)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--json")
    parser.add_argument("--serve")
    parser.add_argument("--client")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.serve:
        backend, settings = loop_of(options.serve)
        return anyio.run(SERVE[options.serve.partition("+")[0]], backend=backend, backend_options=settings)
    if options.client:
        backend, settings = loop_of(options.client)

        async def client() -> dict[str, float]:
            async with CONNECT[options.client.partition("+")[0]](options.port) as call:
                return await measure(call, options.seconds, options.in_flight)

        print(json.dumps(anyio.run(client, backend=backend, backend_options=settings)))
        return None
    peers = [peer for peer in options.peers.split(",") if peer != "grpcio" or importlib.util.find_spec("grpc")]
    if len(peers) < len(options.peers.split(",")):
        print("grpcio is not installed, and left out", file=sys.stderr)
    rounds: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for number in range(options.rounds):
        for peer in peers:
            rounds[peer].append(one(peer, options.seconds, options.in_flight))
            print(f"round {number + 1}: {peer}: {rounds[peer][-1]}", file=sys.stderr)
    report(rounds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rounds, file, indent=1)
    return None


def report(rounds: dict[str, list[dict[str, float]]]) -> None:
    bases = [base for base in ("websockets", "grpcio") if base in rounds]
    for figure in next(iter(rounds.values()))[0]:
        print(f"\n{figure:24}" + "".join(f"{'times ' + base:>26}" for base in bases))
        for peer, measured in rounds.items():
            values = [each[figure] for each in measured]
            line = f"{peer:16}{statistics.median(values):8,.0f}"
            for base in bases:
                ratios = sorted(
                    mine[figure] / theirs[figure] for mine, theirs in zip(measured, rounds[base], strict=True)
                )
                line += f"{statistics.median(ratios):12.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})".rjust(26)
            print(line)


if __name__ == "__main__":
    main()
