"""Sockets that were handed over: accepted on as if we had bound them, and left as they were found."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import anyio
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError
from towline.link import Link
from towline.service import Dial
from towline.transport import Listener
from towline.transports import Fd, Tcp, Unix

pytestmark = [
    pytest.mark.real_time,
    pytest.mark.skipif(sys.platform == "win32", reason="descriptors of sockets are not files there"),
]


def handed_over(sock: socket.socket) -> Endpoint:
    """As another process would have it: our own object does not own the descriptor any more."""
    return Endpoint.parse(f"fd://{sock.detach()}")


async def exchange(listener: Listener, dial: Tcp | Unix) -> Link:
    accepted: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accepted.append)
        with anyio.fail_after(20):
            link = await dial(Dial(listener.endpoint))
            await link.driver.write(b"hello")
            while not accepted:  # noqa: ASYNC110 -- it is told by a call
                await anyio.sleep(0.01)
            assert await accepted[0].driver.read() == b"hello"
        link.driver.abort()
        accepted[0].driver.abort()
        tasks.cancel_scope.cancel()
    return accepted[0]


async def test_tcp() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    bound = sock.getsockname()
    listener = await Fd().listen(handed_over(sock))
    assert listener.endpoint == Endpoint("tcp", host="127.0.0.1", port=bound[1])
    assert (await exchange(listener, Tcp())).source == "127.0.0.1"
    await listener.aclose()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound)


async def test_unix_and_its_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    listener = await Fd().listen(handed_over(sock))
    assert listener.endpoint == Endpoint("unix", path=str(path))
    assert (await exchange(listener, Unix())).source == ""
    await listener.aclose()
    assert path.exists()


async def test_unix_is_still_only_for_who_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "socket"))
    sock.listen()
    listener = await Fd(unix=Unix(allow_uids=[4242])).listen(handed_over(sock))
    accepted: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accepted.append)
        with anyio.fail_after(20):
            link = await Unix()(Dial(listener.endpoint))
            assert await link.driver.read() == b""
        link.driver.abort()
        tasks.cancel_scope.cancel()
    assert accepted == []
    await listener.aclose()


async def test_children_do_not_inherit_it() -> None:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.set_inheritable(True)
    number = sock.fileno()
    listener = await Fd().listen(handed_over(sock))
    assert not os.get_inheritable(number)
    await listener.aclose()


@pytest.mark.parametrize("what", ["not listening", "datagrams"])
async def test_another_socket_is_refused_and_left_alone(what: str) -> None:
    kind = socket.SOCK_STREAM if what == "not listening" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as sock:
        with pytest.raises(ConnectFailed, match="it is not a listening TCP or Unix socket"):
            await Fd().listen(Endpoint.parse(f"fd://{sock.fileno()}"))
        os.fstat(sock.fileno())  # still open


async def test_what_is_not_open_is_refused() -> None:
    with socket.socket() as sock:
        number = sock.fileno()
    with pytest.raises(ConnectFailed, match=f"fd://{number} cannot be used: it is not open here"):
        await Fd().listen(Endpoint.parse(f"fd://{number}"))


async def test_it_only_listens() -> None:
    with pytest.raises(EndpointError, match="can be listened on, but not connected to"):
        await Fd()(Dial(Endpoint.parse("fd://3")))
    with pytest.raises(EndpointError, match="Fd serves fd://NUMBER"):
        await Fd().listen(Endpoint.parse("tcp://127.0.0.1:1"))


@pytest.mark.parametrize("text", ["fd://", "fd://x", "fd://-1", "fd://03", "fd://3/", "fd://9999999999"])
def test_an_endpoint_is_a_number(text: str) -> None:
    with pytest.raises(EndpointError):
        Endpoint.parse(text)
    assert str(Endpoint.parse("fd://3")) == "fd://3"
