"""TCP: names, Happy Eyeballs, binding, accepting."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost, UnknownHost
from towline.link import Link
from towline.service import Dial
from towline.testing import check_transport
from towline.transports import _socket
from towline.transports.tcp import Address, Tcp, interleaved

pytestmark = pytest.mark.real_time

LOCAL = Endpoint.parse("tcp://127.0.0.1:0")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


HAS_IPV6 = has_ipv6()
needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no IPv6 loopback")


def resolving(*addresses: Address) -> Callable[[str, int], Awaitable[Sequence[Address]]]:
    async def resolve(host: str, port: int) -> Sequence[Address]:
        await anyio.lowlevel.checkpoint()
        return addresses

    return resolve


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Deaf:
    """A listener whose backlog is full, so that a connection attempt gets no answer at all."""

    def __enter__(self) -> Address:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=0)
        self._callers: list[socket.socket] = []
        for _ in range(4):
            caller = socket.socket()
            caller.setblocking(False)
            caller.connect_ex(self._listener.getsockname())
            self._callers.append(caller)
        return socket.AF_INET, self._listener.getsockname()

    def __exit__(self, *exc_info: object) -> None:
        for sock in (*self._callers, self._listener):
            sock.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts on Linux's backlog and /proc")


async def accept_one(transport: Tcp, endpoint: Endpoint = LOCAL) -> tuple[Link, Link]:
    listener = await transport.listen(endpoint)
    accepted: list[Link] = []
    ours = await transport(Dial(listener.endpoint))
    async with anyio.create_task_group() as tasks:

        def accept(link: Link) -> None:
            accepted.append(link)
            tasks.cancel_scope.cancel()

        tasks.start_soon(listener.serve, accept)
    await listener.aclose()
    return ours, accepted[0]


async def test_tcp_keeps_the_contract_of_a_transport() -> None:
    await check_transport(Tcp(), LOCAL)


@needs_ipv6
async def test_tcp_keeps_the_contract_over_ipv6() -> None:
    await check_transport(Tcp(), "tcp://[::1]:0")


# --- dialling -----------------------------------------------------------------------------------------------


async def test_a_refused_dial_names_the_endpoint_the_address_and_the_reason() -> None:
    endpoint = LOCAL.with_port(closed_port())
    with pytest.raises(
        ConnectFailed, match=rf"^{endpoint} cannot be reached: 127\.0\.0\.1 port \d+: connection refused$"
    ):
        await Tcp()(Dial(endpoint))


async def test_a_dial_that_fails_on_every_address_says_why_for_each() -> None:
    port = closed_port()
    tcp = Tcp(resolver=resolving((socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET, ("127.0.0.2", port))))
    with pytest.raises(ConnectFailed, match=r"127\.0\.0\.1 port .* refused; 127\.0\.0\.2 port .* refused"):
        await tcp(Dial(Endpoint.parse("tcp://two.example:1")))


@needs_linux
async def test_a_dial_without_an_answer_ends_after_connect_timeout() -> None:
    before = open_descriptors()
    with Deaf() as address:
        tcp = Tcp(connect_timeout=0.05, resolver=resolving(address))
        with pytest.raises(ConnectFailed, match=r"within 0\.05 s: 127\.0\.0\.1 port \d+: no answer"):
            await tcp(Dial(Endpoint.parse("tcp://deaf.example:1")))
    assert open_descriptors() == before


async def test_a_name_that_resolves_too_slowly_counts_as_not_reached() -> None:
    async def resolve(host: str, port: int) -> Sequence[Address]:
        await anyio.sleep_forever()
        raise AssertionError

    with pytest.raises(ConnectFailed, match="its name was not resolved in time"):
        await Tcp(connect_timeout=0.02, resolver=resolve)(Dial(Endpoint.parse("tcp://slow.example:1")))
    with pytest.raises(ConnectFailed, match=r"not resolved within 0\.02 s"):
        await Tcp(connect_timeout=0.02, resolver=resolve).listen(Endpoint.parse("tcp://slow.example:1"))


@pytest.mark.parametrize(("code", "retryable"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)])
async def test_a_name_that_does_not_resolve_is_an_unknown_host(code: int, retryable: bool) -> None:
    async def resolve(host: str, port: int) -> Sequence[Address]:
        raise socket.gaierror(code, "no luck")

    with pytest.raises(UnknownHost, match=r"'nowhere\.example' is not known: no luck") as caught:
        await Tcp(resolver=resolve)(Dial(Endpoint.parse("tcp://nowhere.example:1")))
    assert caught.value.retryable is retryable


async def test_a_name_that_can_be_no_name_is_an_unknown_host() -> None:
    with pytest.raises(UnknownHost):
        await Tcp()(Dial(Endpoint.parse(f"tcp://{'a' * 70}:1")))


async def test_a_name_without_addresses_is_an_unknown_host() -> None:
    with pytest.raises(UnknownHost, match="has no address"):
        await Tcp(resolver=resolving())(Dial(Endpoint.parse("tcp://empty.example:1")))


async def test_names_are_resolved_anew_for_every_dial() -> None:
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> Sequence[Address]:
        asked.append((host, port))
        return [(socket.AF_INET, ("127.0.0.1", closed_port()))]

    tcp = Tcp(resolver=resolve)
    for _ in range(2):
        with pytest.raises(ConnectFailed):
            await tcp(Dial(Endpoint.parse("tcp://moving.example:7")))
    assert asked == [("moving.example", 7)] * 2


@pytest.mark.parametrize("text", ["tcp://*:80", "tcp://127.0.0.1:0"])
async def test_what_can_only_be_listened_on_is_not_dialled(text: str) -> None:
    with pytest.raises(EndpointError, match="can be listened on"):
        await Tcp()(Dial(Endpoint.parse(text)))


@needs_linux
async def test_happy_eyeballs_goes_on_when_the_first_address_is_silent_and_leaves_nothing_open() -> None:
    plain = Tcp()
    listener = await plain.listen(LOCAL)
    with Deaf() as silent:
        before = open_descriptors()
        good: Address = (socket.AF_INET, ("127.0.0.1", listener.endpoint.port))
        tcp = Tcp(happy_eyeballs_delay=0.02, resolver=resolving(silent, good))
        link = await tcp(Dial(Endpoint.parse("tcp://two.example:1")))
        assert link.source == "127.0.0.1"
        assert open_descriptors() == before + 1
        link.abort(LinkLost("done"))
        assert open_descriptors() == before
    await listener.aclose()


async def test_happy_eyeballs_does_not_wait_for_the_delay_when_an_address_fails() -> None:
    plain = Tcp()
    listener = await plain.listen(LOCAL)
    bad: Address = (socket.AF_INET, ("127.0.0.1", closed_port()))
    good: Address = (socket.AF_INET, ("127.0.0.1", listener.endpoint.port))
    tcp = Tcp(happy_eyeballs_delay=1000, resolver=resolving(bad, bad, good))
    with anyio.fail_after(5):
        link = await tcp(Dial(Endpoint.parse("tcp://three.example:1")))
    link.abort(LinkLost("done"))
    await listener.aclose()


@needs_linux
async def test_of_two_addresses_that_connect_at_once_one_is_closed() -> None:
    listener = await Tcp().listen(LOCAL)
    good: Address = (socket.AF_INET, ("127.0.0.1", listener.endpoint.port))
    before = open_descriptors()
    for _ in range(20):
        link = await Tcp(happy_eyeballs_delay=0, resolver=resolving(good, good, good))(
            Dial(Endpoint.parse("tcp://three.example:1"))
        )
        assert open_descriptors() == before + 1
        link.abort(LinkLost("done"))
    await listener.aclose()


@needs_linux
@pytest.mark.parametrize("after", range(12))
async def test_a_dial_that_is_cancelled_anywhere_leaves_no_descriptor(after: int) -> None:
    listener = await Tcp().listen(LOCAL)
    good: Address = (socket.AF_INET, ("127.0.0.1", listener.endpoint.port))
    dialled: list[Link] = []
    with Deaf() as silent:
        before = open_descriptors()

        async def dial() -> None:
            tcp = Tcp(happy_eyeballs_delay=0, resolver=resolving(silent, good))
            dialled.append(await tcp(Dial(Endpoint.parse("tcp://two.example:1"))))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(dial)
            for _ in range(after):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        for link in dialled:
            link.abort(LinkLost("done"))
        assert open_descriptors() == before
    await listener.aclose()


def test_families_take_turns_and_the_first_stays_first() -> None:
    six, four = socket.AF_INET6, socket.AF_INET
    mixed: list[Address] = [(six, ("a",)), (six, ("b",)), (six, ("c",)), (four, ("d",)), (four, ("e",))]
    assert [where[0] for _, where in interleaved(mixed)] == ["a", "d", "b", "e", "c"]


async def test_a_connection_of_a_port_with_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()

    async def connect(sock: socket.socket, address: Any) -> None:
        sock.bind(address)  # what the kernel may choose for us
        await _socket.connect_socket(sock, address)

    monkeypatch.setattr("towline.transports.tcp.connect_socket", connect)
    with pytest.raises(ConnectFailed, match="connection refused"):
        await Tcp()(Dial(LOCAL.with_port(port)))


# --- options ------------------------------------------------------------------------------------------------


def option(link: Link, level: int, name: int) -> int:
    return int(link.driver._sock.getsockopt(level, name))  # type: ignore[attr-defined]


async def test_both_ends_have_their_options_and_never_a_user_timeout_unasked() -> None:
    ours, theirs = await accept_one(Tcp(keepalive=33))
    for link in (ours, theirs):
        assert option(link, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert option(link, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        if sys.platform == "linux":
            assert option(link, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
            assert option(link, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
            link.driver.guard(1.5)
            assert option(link, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500
        link.abort(LinkLost("done"))


async def test_options_can_be_switched_off() -> None:
    ours, theirs = await accept_one(Tcp(nodelay=False, keepalive=None))
    for link in (ours, theirs):
        assert not option(link, socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not option(link, socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        link.abort(LinkLost("done"))


async def test_the_source_of_a_link_is_the_address_of_its_peer() -> None:
    ours, theirs = await accept_one(Tcp())
    assert theirs.source == "127.0.0.1"
    ours.abort(LinkLost("done"))
    theirs.abort(LinkLost("done"))


# --- listening ----------------------------------------------------------------------------------------------


async def test_a_port_in_use_is_one_clear_line() -> None:
    listener = await Tcp().listen(LOCAL)
    with pytest.raises(ConnectFailed, match=rf"^{listener.endpoint} is in use$"):
        await Tcp().listen(listener.endpoint)
    await listener.aclose()


async def test_an_address_that_is_not_ours_cannot_be_bound() -> None:
    with pytest.raises(ConnectFailed, match=r"^tcp://192\.0\.2\.1:\d+ cannot be bound: "):
        await Tcp().listen(Endpoint.parse("tcp://192.0.2.1:0"))


@pytest.mark.parametrize("host", ["*", "0.0.0.0"])
async def test_every_interface_can_be_listened_on(host: str) -> None:
    ours, theirs = None, None
    listener = await Tcp().listen(Endpoint.parse(f"tcp://{host}:0"))
    assert listener.endpoint.host == host
    assert listener.endpoint.port != 0
    accepted: list[Link] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accepted.append)
        for target in ["127.0.0.1", *(["::1"] if HAS_IPV6 and host == "*" else [])]:
            ours = await Tcp()(Dial(Endpoint("tcp", target, listener.endpoint.port)))
            while not accepted:
                await anyio.lowlevel.checkpoint()
            theirs = accepted.pop()
            assert theirs.source == target
            ours.abort(LinkLost("done"))
            theirs.abort(LinkLost("done"))
        await listener.aclose()


async def test_a_name_with_several_addresses_is_bound_on_all_of_them_with_one_port() -> None:
    tcp = Tcp(resolver=resolving((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.2", 0))))
    listener = await tcp.listen(Endpoint.parse("tcp://two.example:0"))
    for host in ("127.0.0.1", "127.0.0.2"):
        link = await Tcp()(Dial(Endpoint("tcp", host, listener.endpoint.port)))
        link.abort(LinkLost("done"))
    await listener.aclose()


async def test_a_port_that_is_taken_on_another_address_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    tcp = Tcp(resolver=resolving((socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET, ("127.0.0.2", 0))))
    real, tries = Tcp._bind, 0

    def bind(self: Tcp, addresses: Sequence[Address]) -> list[socket.socket]:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise OSError(errno.EADDRINUSE, "taken")
        return real(self, addresses)

    monkeypatch.setattr(Tcp, "_bind", bind)
    listener = await tcp.listen(Endpoint.parse("tcp://two.example:0"))
    assert tries == 3
    await listener.aclose()


async def test_an_address_that_this_machine_lacks_is_skipped_beside_one_that_it_has() -> None:
    tcp = Tcp(resolver=resolving((socket.AF_INET, ("192.0.2.1", 0)), (socket.AF_INET, ("127.0.0.1", 0))))
    listener = await tcp.listen(Endpoint.parse("tcp://two.example:0"))
    link = await Tcp()(Dial(LOCAL.with_port(listener.endpoint.port)))
    link.abort(LinkLost("done"))
    await listener.aclose()


class Troubled:
    """A listening socket whose accept() fails with each of ``errors``, then works."""

    def __init__(self, sock: socket.socket, errors: list[int]) -> None:
        self._sock = sock
        self.errors = errors

    def accept(self) -> tuple[socket.socket, Any]:
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, errno.errorcode[code])
        return self._sock.accept()


@pytest.mark.parametrize(
    ("errors", "lines"),
    [
        ([errno.ECONNABORTED, errno.EPROTO, errno.ECONNABORTED], 0),
        ([errno.EMFILE, errno.EMFILE, errno.ENFILE], 1),
        ([errno.EINVAL], 1),
    ],
)
async def test_f46_accepting_goes_on_after_any_error(
    errors: list[int],
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_socket, "ACCEPT_PAUSE", 0.001)
    listener = await Tcp().listen(LOCAL)
    assert isinstance(listener, _socket.SocketListener)
    ((sock, handle),) = listener._sockets
    listener._sockets = [(Troubled(sock, list(errors)), handle)]  # type: ignore[list-item]
    ours = await Tcp()(Dial(listener.endpoint))
    accepted: list[Link] = []
    with caplog.at_level(logging.ERROR):
        async with anyio.create_task_group() as tasks:

            def accept(link: Link) -> None:
                accepted.append(link)
                tasks.cancel_scope.cancel()

            tasks.start_soon(listener.serve, accept)
    assert len(caplog.records) == lines
    for link in (ours, *accepted):
        link.abort(LinkLost("done"))
    await listener.aclose()


async def test_closing_the_listener_ends_serve_on_every_socket() -> None:
    listener = await Tcp().listen(Endpoint.parse("tcp://*:0"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, list[Link]().append)
        await anyio.wait_all_tasks_blocked()
        await listener.aclose()
        await listener.aclose()
