"""Calls and streams over real sockets and a link that is cut all the time: each once, each its own, all in order.

One process holds both ends and the proxy between them. ``TOWLINE_FULL=1`` makes it a hundred thousand calls and a
gibibyte each way; without, a fifth and an eighth of that.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from typing import Any

import anyio
import pytest

from towline import Backoff, Heartbeat, Request, Response, Router, Rpc, Stack, open_stream
from towline.layers import Encryption, Framing, Peer, Psk, Resume, Retry
from towline.testing import ChaosProxy

pytestmark = pytest.mark.real_time

FULL = os.environ.get("TOWLINE_FULL") == "1"
CALLS = 100_000 if FULL else 20_000
STREAM = (1 << 30) if FULL else 128 << 20
PIECE = os.urandom(256 << 10)

STACK: Stack[Any, Peer, Any, Any] = Stack(
    Rpc(window=1 << 20),
    Resume(),
    Retry(Backoff.constant(0.01)),
    Heartbeat(interval=0.2, timeout=1.0),
    Framing(),
    Encryption(psk=Psk(bytes(range(32)))),
)


def pieces() -> int:
    return STREAM // len(PIECE)


def expected_hash() -> str:
    digest = hashlib.sha256()
    for n in range(pieces()):
        digest.update(n.to_bytes(8, "big") + PIECE)
    return digest.hexdigest()


class Service:
    """What is served, and how often each call was carried out."""

    def __init__(self) -> None:
        self.runs: Counter[int] = Counter()
        self.router = Router({"count": self.count, "upload": self.upload, "download": self.download})

    async def count(self, request: Request, /) -> Response:
        self.runs[int(request.payload)] += 1
        return Response(b"answer to " + request.payload)

    async def upload(self, request: Request, /) -> Response:
        assert request.stream is not None
        digest = hashlib.sha256()
        async for message in request.stream:
            digest.update(message)
        return Response(digest.hexdigest().encode())

    async def download(self, request: Request, /) -> Response:
        assert request.stream is not None
        for n in range(pieces()):
            await request.stream.send(n.to_bytes(8, "big") + PIECE)
        return Response()


@pytest.mark.timeout(600)
async def test_over_a_link_that_is_cut_all_the_time_every_call_runs_once_and_every_stream_arrives_whole() -> None:
    service = Service()
    hashes: dict[str, str] = {}
    wrong: list[bytes] = []
    async with (
        STACK.serve("tcp://127.0.0.1:0", service.router) as server,
        ChaosProxy(server.endpoint, seed=1, cut_every=0.2) as proxy,
        STACK.connect(proxy.endpoint) as call,
    ):
        numbers = iter(range(CALLS))

        async def calls() -> None:
            for n in numbers:
                body = b"%d" % n
                answer = (await call(Request("count", body))).payload
                if answer != b"answer to " + body:
                    wrong.append(answer)

        async def upload() -> None:
            async with open_stream(call, Request("upload")) as stream:
                for n in range(pieces()):
                    await stream.send(n.to_bytes(8, "big") + PIECE)
                await stream.send_eof()
                hashes["upload"] = (await stream.response()).payload.decode()

        async def download() -> None:
            digest = hashlib.sha256()
            async with open_stream(call, Request("download")) as stream:
                async for message in stream:
                    digest.update(message)
            hashes["download"] = digest.hexdigest()

        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(calls)
            tasks.start_soon(upload)
            tasks.start_soon(download)
        cuts = proxy.cuts
        proxy.is_calm = True
    assert wrong == []
    assert len(service.runs) == CALLS
    assert set(service.runs.values()) == {1}
    expected = expected_hash()
    assert hashes == {"upload": expected, "download": expected}
    assert cuts >= 3
