"""The whole way: stacks with Encryption (and with Tls) over real sockets, and peers that are something else."""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import trustme
from anyio.abc import SocketAttribute, SocketStream

from towline.errors import ConnectionLost, HandshakeFailed, HandshakeRefused, LinkLost
from towline.layers.encryption import AllowList, Encryption, Psk, StaticKey, StaticKeys
from towline.layers.framing import Framing
from towline.layers.resume import Resume
from towline.layers.tls import Tls
from towline.service import TwoSided
from towline.stack import Stack

pytestmark = pytest.mark.real_time

# pyright: reportUnknownMemberType=false
# (trustme names a type of a package that is not there.)

ANYWHERE = "tcp://127.0.0.1:0"
PSK = Psk(bytes(range(100, 132)))
CLIENT_KEY = StaticKey(bytes(range(1, 33)))
SERVER_KEY = StaticKey(bytes(range(201, 233)))
with_psk = Encryption(psk=PSK)
CLIENT = Encryption(keys=StaticKeys(CLIENT_KEY, trust=AllowList([SERVER_KEY.public_key])))
SERVER = Encryption(keys=StaticKeys(SERVER_KEY, trust=AllowList([CLIENT_KEY.public_key])))
NOBODY = Encryption(keys=StaticKeys(SERVER_KEY, trust=AllowList()))


def tls() -> Tls:
    ca = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert("127.0.0.1").configure_cert(server)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ca.configure_trust(client)
    return Tls(client=client, server=server)


TLS = tls()

LAYERS: dict[str, tuple[TwoSided, TwoSided]] = {
    "NNpsk0": (with_psk, with_psk),
    "XX": (CLIENT, SERVER),
    "TLS": (TLS, TLS),
}
every_kind = pytest.mark.parametrize(("client", "server"), LAYERS.values(), ids=LAYERS)


async def echo(session: Any) -> None:
    async for message in session:
        await session.send(message)


@every_kind
@pytest.mark.parametrize("above", [(Framing(),), (Resume(), Framing())], ids=["frames", "messages"])
async def test_messages_go_there_and_back(client: TwoSided, server: TwoSided, above: tuple[TwoSided, ...]) -> None:
    messages = [bytes([i % 256]) * (i * 700) for i in range(1, 100)]
    async with (
        Stack(*above, server).serve(ANYWHERE, echo) as listening,
        Stack(*above, client).connect(listening.endpoint) as session,
        anyio.create_task_group() as tasks,
    ):

        async def send() -> None:
            for message in messages:
                await session.send(message)

        tasks.start_soon(send)
        for message in messages:
            assert await session.receive() == message


@every_kind
async def test_a_large_frame_may_come_right_behind_the_handshake(client: TwoSided, server: TwoSided) -> None:
    async with (
        Stack(Framing(), server).serve(ANYWHERE, echo) as listening,
        Stack(Framing(), client).connect(listening.endpoint) as stream,
    ):
        await stream.send(bytes(5000))
        assert await stream.receive() == bytes(5000)


@every_kind
async def test_a_stack_may_end_in_bytes(client: TwoSided, server: TwoSided) -> None:
    data = bytes(range(256)) * 4000
    async with (
        Stack(server).serve(ANYWHERE, echo) as listening,
        Stack(client).connect(listening.endpoint) as stream,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(stream.send, data)
        received = b""
        while len(received) < len(data):
            received += await stream.receive()
        assert received == data


async def test_a_wrong_secret_is_refused_in_words() -> None:
    async with Stack(Framing(), with_psk).serve(ANYWHERE, echo) as listening:
        with pytest.raises(HandshakeRefused, match="it may have another secret"):
            async with Stack(Framing(), Encryption(psk=Psk.generate())).connect(listening.endpoint):
                raise AssertionError


async def test_other_layers_above_are_refused_in_words() -> None:
    async with Stack(Resume(), Framing(), with_psk).serve(ANYWHERE, echo) as listening:
        with pytest.raises(HandshakeRefused, match=r"other layers above Encryption \(here: framing/1\)"):
            async with Stack(Framing(), with_psk).connect(listening.endpoint):
                raise AssertionError


async def test_a_key_that_is_not_on_the_list_is_refused_in_words_before_there_is_a_session() -> None:
    async with Stack(Resume(), Framing(), NOBODY).serve(ANYWHERE, echo) as listening:
        with pytest.raises(HandshakeRefused, match="it may not trust our key"):
            async with Stack(Resume(), Framing(), CLIENT).connect(listening.endpoint):
                raise AssertionError


async def test_a_key_that_is_not_on_the_list_is_refused_in_words_where_there_is_none() -> None:
    async with Stack(Framing(), NOBODY).serve(ANYWHERE, echo) as listening:
        with pytest.raises(ConnectionLost, match="it may not trust our key") as raised:
            async with Stack(Framing(), CLIENT).connect(listening.endpoint) as stream:
                await stream.receive()
        assert isinstance(raised.value.__cause__, LinkLost)
        assert isinstance(raised.value.__cause__.__cause__, HandshakeRefused)


@asynccontextmanager
async def stranger(answer: bytes | None) -> AsyncGenerator[str]:
    """A server that says ``answer``, or echoes if that is None."""

    async def handle(stream: SocketStream) -> None:
        async with stream:
            try:
                async for data in stream:
                    await stream.send(data if answer is None else answer)
            except anyio.BrokenResourceError:
                pass

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        yield f"tcp://127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


@every_kind
@pytest.mark.parametrize(
    "answer",
    [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\x00\x02\x02\x46"],
    ids=["echo", "HTTP", "SSH", "TLS alert"],
)
async def test_case_44_another_kind_of_server_is_found_out_at_once(
    client: TwoSided, server: TwoSided, answer: bytes | None
) -> None:
    async with stranger(answer) as endpoint:
        with anyio.fail_after(2), pytest.raises(HandshakeFailed) as raised:
            async with Stack(Framing(), client).connect(endpoint):
                raise AssertionError
        assert not raised.value.retryable


@pytest.mark.parametrize(
    "data",
    [b"G", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"SSH-2.0-x\r\n", bytes(1 << 20)],
    ids=["one byte", "HTTP", "TLS", "SSH", "zeros"],
)
async def test_case_43_another_kind_of_client_is_cut_off_without_a_word(data: bytes) -> None:
    async with Stack(Framing(), with_psk).serve(ANYWHERE, echo) as listening:
        port = listening.endpoint.port
        async with await anyio.connect_tcp("127.0.0.1", port) as stream:

            async def answer() -> bytes:
                await stream.send(data)
                return await stream.receive()

            with anyio.fail_after(2), pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await answer()
        async with Stack(Framing(), with_psk).connect(listening.endpoint) as session:
            await session.send(b"still there")
            assert await session.receive() == b"still there"
