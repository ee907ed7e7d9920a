"""Towline as a peer of the benchmark's driver: the full stack, encrypted, resumable and with a heartbeat.

The driver runs it with ``--plugin``, in the same run as the peers that it is compared with, server and client as two
processes. What it measures, and how to run it, is in ``tests/benchmarks/README.md``.
"""

from __future__ import annotations

import importlib
from typing import Any

import anyio

from towline import ConnectionLost, Psk, Stack

peers: Any = importlib.import_module("peers")  # the driver's own module
KEY = Psk(bytes(range(32)))


class Connection:
    """What the driver wants of a connection: send, recv, close."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.send = session.send

    async def recv(self) -> bytes:
        try:
            message: bytes = await self.session.receive()
        except (anyio.EndOfStream, ConnectionLost, anyio.ClosedResourceError):
            raise peers.EOF from None
        return message

    async def flush(self) -> None:
        await self.session.flush(acked=False)

    async def close(self) -> None:
        self.session.abort()


class Towline(peers.Generic):  # type: ignore[misc]
    def __init__(self, loop: str) -> None:
        self.loop = loop
        self.stack = Stack.resilient(psk=KEY)
        self._opened: Any = None

    async def serve(self) -> None:
        async def handler(session: Any) -> None:
            await peers.session(Connection(session))

        async with self.stack.serve("tcp://127.0.0.1:0", handler) as server:
            self.ready(str(server.endpoint))
            await anyio.sleep_forever()

    async def _client(self, mode: str, addr: str, o: Any) -> Any:
        async with self.stack.open() as self._opened:
            return await getattr(self, mode if mode != "connect" else "connect_")(addr, o)

    async def connect(self, addr: str) -> Connection:
        return Connection(await self._opened.connect(addr))


for backend in ("asyncio", "uvloop", "trio"):
    peers.register(f"towline+{backend}", Towline(f"anyio-{backend}"))
