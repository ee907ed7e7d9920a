"""ChaosProxy, over real sockets: it carries what it gets, and cuts it as it says."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial
from towline.stage import Driver
from towline.testing import ChaosProxy
from towline.transports import Tcp, Unix

pytestmark = pytest.mark.real_time

TCP = "tcp://127.0.0.1:0"


@pytest.fixture(params=["tcp", "unix"])
def target_at(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return TCP if request.param == "tcp" else f"unix://{tmp_path}/target"


async def dial(endpoint: Endpoint) -> Driver:
    return (await (Unix() if endpoint.scheme == "unix" else Tcp())(Dial(endpoint))).driver


class Server:
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.drivers: list[Driver] = []

    async def connection(self, number: int = 0) -> Driver:
        with anyio.fail_after(10):
            while len(self.drivers) <= number:  # noqa: ASYNC110 -- a list has no event
                await anyio.sleep(0.005)
        return self.drivers[number]


@asynccontextmanager
async def open_server(endpoint: str) -> AsyncGenerator[Server]:
    parsed = Endpoint.parse(endpoint)
    listener = await (Unix() if parsed.scheme == "unix" else Tcp()).listen(parsed)
    server = Server(listener.endpoint)

    def accepted(link: Link) -> None:
        server.drivers.append(link.driver)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accepted)
        try:
            yield server
        finally:
            for driver in server.drivers:
                driver.abort()
            await listener.aclose()
            tasks.cancel_scope.cancel()


async def read_all(driver: Driver) -> bytes:
    data = bytearray()
    with anyio.fail_after(10):
        while part := await driver.read():
            data += part
    return bytes(data)


async def test_bytes_and_ends_are_carried_both_ways(target_at: str) -> None:
    content = random.Random(1).randbytes(2_000_000)
    async with open_server(target_at) as server, ChaosProxy(server.endpoint) as proxy:
        near = await dial(proxy.endpoint)
        far = await server.connection()
        for source, sink in ((near, far), (far, near)):
            async with anyio.create_task_group() as tasks:

                async def send(source: Driver = source) -> None:
                    await source.write(content)
                    await source.send_eof()

                tasks.start_soon(send)
                assert await read_all(sink) == content
        await near.aclose()
        assert proxy.cuts == 0


async def test_a_reset_of_one_side_is_a_reset_of_the_other() -> None:
    async with open_server(TCP) as server, ChaosProxy(server.endpoint) as proxy:
        near = await dial(proxy.endpoint)
        far = await server.connection()
        await near.write(b"x")
        assert await far.read() == b"x"
        near.abort()
        with anyio.fail_after(10), pytest.raises(LinkLost):
            await read_all(far)
        assert proxy.cuts == 0, "nobody here cut it"


async def send_for_ever(driver: Driver, content: bytes) -> None:
    try:
        while True:
            await driver.write(content)
            await anyio.sleep(0.002)
    except LinkLost:
        pass


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_cut_leaves_a_prefix_and_then_the_end(how: str) -> None:
    content = random.Random(2).randbytes(10_007)
    async with (
        open_server(TCP) as server,
        ChaosProxy(server.endpoint, seed=3, cut_every=0.1, how=(how,)) as proxy,  # type: ignore[arg-type]
        anyio.create_task_group() as tasks,
    ):
        near = await dial(proxy.endpoint)
        far = await server.connection()
        tasks.start_soon(send_for_ever, near, content)
        data = bytearray()
        ended = ""
        with anyio.fail_after(10):
            try:
                while part := await far.read():
                    data += part
                ended = "close"
            except LinkLost:
                ended = "reset"
        assert ended == how
        assert proxy.cuts == 1
        copies = len(data) // len(content) + 1
        assert (content * copies).startswith(bytes(data))
        near.abort()


async def test_a_black_hole_takes_everything_and_tells_nobody() -> None:
    async with open_server(TCP) as server, ChaosProxy(server.endpoint) as proxy, anyio.create_task_group() as tasks:
        near = await dial(proxy.endpoint)
        far = await server.connection()
        await near.write(b"before")
        assert await far.read() == b"before"
        assert proxy.cut_now("blackhole") == 1
        assert proxy.live == 0
        tasks.start_soon(send_for_ever, near, bytes(100_000))
        await far.write(b"nobody hears this")
        for side in (near, far):
            with anyio.move_on_after(0.2) as silence:
                await side.read()
            assert silence.cancelled_caught
        with anyio.fail_after(10):
            while near.accepted < 1_000_000:  # noqa: ASYNC110 -- it does not even stop its sender
                await anyio.sleep(0.01)
        near.abort()  # the side that connected gives up: so does the proxy
        with anyio.fail_after(10), pytest.raises(LinkLost):
            await read_all(far)


async def test_the_ways_come_in_turn_and_are_counted() -> None:
    async with open_server(TCP) as server, ChaosProxy(server.endpoint, seed=1, cut_every=0.05) as proxy:
        ends: list[str] = []
        for _ in range(6):
            near = await dial(proxy.endpoint)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(send_for_ever, near, bytes(1_000))
                with anyio.move_on_after(0.5) as silence:
                    try:
                        assert await near.read() == b""
                        ends.append("close")
                    except LinkLost:
                        ends.append("reset")
                if silence.cancelled_caught:
                    ends.append("blackhole")
                near.abort()
        assert ends == ["reset", "close", "blackhole"] * 2
        assert proxy.cuts == 6
        assert proxy.connections == 6


async def test_a_connection_that_carries_nothing_is_cut_too() -> None:
    async with (
        open_server(TCP) as server,
        ChaosProxy(server.endpoint, cut_every=0.05, how=("close",)) as proxy,
    ):
        near = await dial(proxy.endpoint)
        assert await read_all(near) == b""
        await near.aclose()
        assert proxy.cuts == 1


async def test_a_calm_proxy_cuts_nothing() -> None:
    async with open_server(TCP) as server, ChaosProxy(server.endpoint, cut_every=0.02) as proxy:
        proxy.is_calm = True
        near = await dial(proxy.endpoint)
        far = await server.connection()
        for _ in range(10):
            await near.write(b"x")
            assert await far.read() == b"x"
            await anyio.sleep(0.02)
        near.abort()
        assert proxy.cuts == 0


async def test_a_closed_proxy_resets_what_connects() -> None:
    async with open_server(TCP) as server, ChaosProxy(server.endpoint) as proxy:
        proxy.is_open = False
        with contextlib.suppress(ConnectFailed):  # it may be reset before we know that we are connected
            near = await dial(proxy.endpoint)
            with anyio.fail_after(10), pytest.raises(LinkLost):
                await read_all(near)
            near.abort()
        assert not server.drivers


async def test_without_its_target_it_resets_what_connects() -> None:
    async with open_server(TCP) as server:
        pass
    async with ChaosProxy(server.endpoint) as proxy:
        near = await dial(proxy.endpoint)
        with anyio.fail_after(10), pytest.raises(LinkLost):
            await read_all(near)
        near.abort()


async def test_an_error_in_the_block_leaves_as_it_is() -> None:
    async with open_server(TCP) as server:
        with pytest.raises(KeyError):  # and not an ExceptionGroup
            async with ChaosProxy(server.endpoint):
                raise KeyError


async def test_it_carries_sockets_only() -> None:
    with pytest.raises(EndpointError, match="carries tcp:// and unix://"):
        ChaosProxy("memory://x")
