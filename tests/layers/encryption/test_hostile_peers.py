"""What comes from the other end of the wire when that is not one of ours, or somebody stands in between."""

from __future__ import annotations

import random
import ssl
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from towline.endpoint import Endpoint
from towline.errors import ConnectionLost, HandshakeFailed, HandshakeRefused, HandshakeTimeout
from towline.layers.encryption import AllowList, Encryption, Psk, StaticKey, StaticKeys
from towline.layers.encryption._preamble import MAGIC, PATTERNS, PREAMBLE_SIZE, REFUSAL, Preamble, hash_layers, prologue
from towline.layers.encryption.noise import HandshakeState
from towline.layers.framing import Framing, FramingStage
from towline.link import Link
from towline.scope import Scope
from towline.server import Server
from towline.service import Dial, Service, Side
from towline.stage import Batch, Driver
from towline.streams import FrameStream
from towline.transports.memory import Memory, memory_drivers

WIRE = ("framing/1", "encryption/1")
ENDPOINT = Endpoint.parse("memory://here")
PSK = Psk(bytes(range(100, 132)))
CLIENT_KEY = StaticKey(bytes(range(1, 33)))
SERVER_KEY = StaticKey(bytes(range(201, 233)))

with_psk = Encryption(psk=PSK)
CLIENT = Encryption(keys=StaticKeys(CLIENT_KEY, trust=AllowList([SERVER_KEY.public_key])))
SERVER = Encryption(keys=StaticKeys(SERVER_KEY, trust=AllowList([CLIENT_KEY.public_key])))
both_ends = pytest.mark.parametrize(
    ("client", "server"), [(with_psk, with_psk), (CLIENT, SERVER)], ids=["NNpsk0", "XX"]
)

# Points of small order on curve 25519, its twist, and their non-canonical twins: what they share with anybody is zero.
LOW_ORDER = [
    bytes.fromhex(text)
    for text in (
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
    )
]

STRAYS = {
    "HTTP GET": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "HTTP POST": b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    "PROXY": b"\r\n\r\n\0\r\nQUIT\n",
    "a frame": b"\0\0\0\x05hello",
    "zeros": bytes(64),
    "ones": b"\xff" * 64,
}


@asynccontextmanager
async def opened() -> AsyncGenerator[Scope]:
    async with anyio.create_task_group() as tasks:
        scope = Scope(tasks, wire=WIRE)
        tasks.start_soon(scope.timers.run)
        yield scope
        tasks.cancel_scope.cancel()


class Attacked:
    """One end of ours, being upgraded, and the bare wire in the hand of the test.

    Attributes:
        wire: the other end.
        error: what the upgrade raised.
        live: whether it succeeded.
    """

    def __init__(self, layer: Encryption, side: Side, scope: Scope) -> None:
        ours, self.wire = memory_drivers()
        self.layer = layer
        self.link = Link(ours, side=side, endpoint=ENDPOINT)
        self.link.bind(scope)
        self.error: Exception | None = None
        self.live = False
        self.ended_at = 0.0
        self.started_at = anyio.current_time()
        scope.task_group.start_soon(self._run)

    async def _run(self) -> None:
        try:
            with self.link.closing_on_error():
                await self.layer.upgrade(self.link, self.link.side)
            self.live = True
        except Exception as error:
            self.error = error
        self.ended_at = anyio.current_time()

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at

    @property
    def at_once(self) -> bool:
        """Whether no time has passed; waiting for all tasks may take some."""
        return self.seconds < 1

    async def read(self) -> bytes:
        await anyio.wait_all_tasks_blocked()
        return await self.wire.read()

    async def answer(self) -> bytes:
        """What our end has written, however it ended after that."""
        await anyio.wait_all_tasks_blocked()
        return b"".join(self.wire._incoming.parts)

    async def write(self, data: bytes) -> None:
        if data and not self.wire._outgoing.broken:
            # As much as there is room for, as a peer that does not care would.
            self.wire._outgoing.put(data)
        await anyio.wait_all_tasks_blocked()

    def assert_failed(self) -> HandshakeFailed:
        assert isinstance(self.error, HandshakeFailed)
        assert self.link._stages == []
        assert self.link.exporter is None
        assert self.link.is_aborted
        return self.error


def preamble(layer: Encryption, **changes: int) -> bytes:
    values: dict[str, int] = {
        "suite": 1,
        "pattern": layer.pattern.number,
        "message_length": layer.pattern.first_message,
    } | changes
    return Preamble(**values, layers=hash_layers(WIRE[:-1])).pack()


def noise(layer: Encryption, data: bytes, *, initiator: bool, e: bytes | None = None) -> HandshakeState:
    """The handshake as a peer in possession of the keys would do it, in our hand."""
    keys = layer.keys
    return HandshakeState(
        f"Noise_{layer.pattern.name}_25519_ChaChaPoly_SHA256",
        initiator,
        prologue(data, layer.rekey_after),
        s=None if keys is None else keys.key.secret,
        e=e,
        psks=[] if layer.psk is None else [layer.psk.secret],
    )


def with_length(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


# --- keys that are none ---


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
async def test_case_17_a_low_order_ephemeral_key_fails_at_the_server(point: bytes) -> None:
    data = preamble(SERVER)
    async with opened() as scope:
        server = Attacked(SERVER, Side.LISTENING, scope)
        await server.write(data + point)
        assert await server.answer() == REFUSAL
        server.assert_failed()


@pytest.mark.parametrize("point", LOW_ORDER, ids=lambda point: point.hex()[:8])
@pytest.mark.parametrize("layer", [with_psk, CLIENT], ids=["NNpsk0", "XX"])
async def test_case_17_a_low_order_ephemeral_key_fails_at_the_client(point: bytes, layer: Encryption) -> None:
    async with opened() as scope:
        client = Attacked(layer, Side.DIALLING, scope)
        await client.read()
        await client.write(with_length(point + bytes(16 if layer is with_psk else 64)))
        client.assert_failed()


async def test_case_17_a_low_order_static_key_fails_at_the_client() -> None:
    """A server that knows the protocol, and whose static key is a point of small order."""

    class Zero:
        public_key = bytes(32)

        def exchange(self, public_key: bytes, /) -> bytes:
            return bytes(32)

    async with opened() as scope:
        client = Attacked(CLIENT, Side.DIALLING, scope)
        sent = await client.read()
        responder = noise(SERVER, sent[:PREAMBLE_SIZE], initiator=False)
        responder._s = Zero()
        responder.read_message(sent[PREAMBLE_SIZE:])
        await client.write(with_length(responder.write_message()))
        assert type(client.assert_failed()) is HandshakeFailed


# --- replays ---


@both_ends
async def test_case_18_a_first_message_sent_again_starts_nothing(client: Encryption, server: Encryption) -> None:
    handled: list[Link] = []

    async def handler(link: Link, /) -> None:
        handled.append(link)

    async with opened() as scope:
        honest = Attacked(client, Side.DIALLING, scope)
        recorded = await honest.read()
        replayed = Attacked(server, Side.LISTENING, scope)
        await replayed.write(recorded)
        answer = await replayed.answer()
        assert len(answer) > 2  # it answers once,
        await anyio.sleep(6)
        assert not replayed.live  # and then waits in vain for a proof that this is no replay
        assert type(replayed.assert_failed()) is HandshakeTimeout
        assert replayed.seconds == pytest.approx(5)

        link, wire = memory_drivers()
        bound = Link(link, side=Side.LISTENING, endpoint=ENDPOINT)
        bound.bind(scope)
        wire._outgoing.put(recorded)
        with pytest.raises(HandshakeTimeout):
            await server.acceptor(handler, scope)(bound)
    assert handled == []


@both_ends
async def test_case_18_a_whole_recorded_conversation_starts_nothing(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        first, second = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
        recorded = await first.read()
        await second.write(recorded)
        await first.write(await second.read())
        last = await first.read()
        await second.write(last)
        assert first.live
        assert second.live

        again = Attacked(server, Side.LISTENING, scope)
        await again.write(recorded + last)
        again.assert_failed()


@both_ends
async def test_case_19_an_answer_to_an_earlier_handshake_is_refused(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        first, honest = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
        await honest.write(await first.read())
        answer = await honest.read()
        second = Attacked(client, Side.DIALLING, scope)
        await second.read()
        await second.write(answer)
        assert type(second.assert_failed()) is HandshakeFailed


# --- sizes ---


@both_ends
async def test_case_20_a_first_message_that_is_too_short_waits_and_fails(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        recorded = await Attacked(client, Side.DIALLING, scope).read()
        attempts = [Attacked(server, Side.LISTENING, scope) for _ in range(len(recorded))]
        for length, attempt in enumerate(attempts):
            await attempt.write(recorded[:length])
        await anyio.sleep(6)
        for attempt in attempts:
            assert type(attempt.assert_failed()) is HandshakeTimeout
            assert attempt.seconds == pytest.approx(5)


@both_ends
async def test_case_20_a_first_message_that_is_cut_off_ends_the_handshake_at_once(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        recorded = await Attacked(client, Side.DIALLING, scope).read()
        for length in range(len(recorded)):
            attempt = Attacked(server, Side.LISTENING, scope)
            await attempt.write(recorded[:length])
            await attempt.wire.send_eof()
            await anyio.wait_all_tasks_blocked()
            assert attempt.assert_failed().ended
            assert attempt.at_once
            assert await attempt.answer() == b""


@pytest.mark.parametrize("change", [-1, 1, -16, 16])
@both_ends
async def test_case_20_a_first_message_of_another_size_is_refused_before_it_is_there(
    client: Encryption, server: Encryption, change: int
) -> None:
    length = server.pattern.first_message + change
    async with opened() as scope:
        attempt = Attacked(server, Side.LISTENING, scope)
        await attempt.write(preamble(server, message_length=length))
        assert await attempt.answer() == REFUSAL
        assert f"announced {length} bytes" in str(attempt.assert_failed())


@pytest.mark.parametrize("change", [-1, 1])
@both_ends
async def test_case_20_an_answer_of_another_size_is_refused_before_it_is_there(
    client: Encryption, server: Encryption, change: int
) -> None:
    async with opened() as scope:
        attempt, honest = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
        await honest.write(await attempt.read())
        answer = await honest.read()
        await attempt.write((len(answer) - 2 + change).to_bytes(2))
        assert "not a Towline server with this encryption" in str(attempt.assert_failed())


@both_ends
async def test_case_20_an_answer_that_is_cut_off_ends_the_handshake_at_once(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        for length in range(98 if client is CLIENT else 50):
            attempt, honest = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
            await honest.write(await attempt.read())
            answer = await honest.read()
            await attempt.write(answer[:length])
            await attempt.wire.send_eof()
            await anyio.wait_all_tasks_blocked()
            assert attempt.assert_failed().ended
            assert attempt.at_once


@pytest.mark.parametrize("length", [0, 63, 65, 4097, 65535])
async def test_case_20_and_45_a_last_message_of_another_size_is_refused_before_it_is_there(length: int) -> None:
    async with opened() as scope:
        attempt, honest = Attacked(SERVER, Side.LISTENING, scope), Attacked(CLIENT, Side.DIALLING, scope)
        await attempt.write(await honest.read())
        await attempt.read()
        await attempt.write(length.to_bytes(2))
        assert await attempt.answer() == REFUSAL
        assert f"announced {length} bytes, where 64 must come" in str(attempt.assert_failed())


@pytest.mark.parametrize("length", [4097, 65535])
@both_ends
async def test_case_45_an_oversize_first_message_is_refused_before_any_cryptography(
    client: Encryption, server: Encryption, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: object, **kwargs: object) -> HandshakeState:
        raise AssertionError("cryptography was begun")

    monkeypatch.setattr(Encryption, "_begin", forbidden)
    async with opened() as scope:
        attempt = Attacked(server, Side.LISTENING, scope)
        await attempt.write(preamble(server, message_length=length) + bytes(length))
        assert await attempt.answer() == REFUSAL
        assert f"announced {length} bytes" in str(attempt.assert_failed())


@pytest.mark.parametrize("length", [4097, 65535])
@both_ends
async def test_case_45_an_oversize_answer_is_refused(client: Encryption, server: Encryption, length: int) -> None:
    async with opened() as scope:
        attempt = Attacked(client, Side.DIALLING, scope)
        await attempt.read()
        await attempt.write(with_length(bytes(length)))
        attempt.assert_failed()
        assert attempt.at_once


@pytest.mark.parametrize(
    "record",
    [b"\0\x11" + bytes(17), b"\0\x12" + bytes(18), b"\0\x10" + bytes(17), b"\xff\xff" + bytes(17), REFUSAL + bytes(17)],
)
async def test_a_secret_that_is_not_confirmed_starts_nothing(record: bytes) -> None:
    async with opened() as scope:
        attempt, honest = Attacked(with_psk, Side.LISTENING, scope), Attacked(with_psk, Side.DIALLING, scope)
        await attempt.write(await honest.read())
        await attempt.read()
        await attempt.write(record)
        assert await attempt.answer() == REFUSAL
        assert "did not confirm" in str(attempt.assert_failed())


# --- somebody in between ---


@both_ends
@pytest.mark.parametrize("direction", ["to the server", "to the client"])
async def test_case_21_a_man_in_the_middle_cannot_put_in_a_key_of_his_own(
    client: Encryption, server: Encryption, direction: str
) -> None:
    his = StaticKey.generate().public_key
    async with opened() as scope:
        a, b = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
        first = await a.read()
        if direction == "to the server":
            first = first[:PREAMBLE_SIZE] + his + first[PREAMBLE_SIZE + 32 :]
        await b.write(first)
        answer = await b.answer()
        if direction == "to the client":
            answer = answer[:2] + his + answer[34:]
        await a.write(answer)
        assert isinstance(a.assert_failed(), HandshakeFailed)
        a.wire.abort()
        b.wire.abort()
        await anyio.wait_all_tasks_blocked()
        b.assert_failed()


@both_ends
async def test_case_21_no_byte_of_a_handshake_can_be_changed(client: Encryption, server: Encryption) -> None:
    """Every byte of every message, one at a time. Whatever comes of it, no server goes live, or no data passes."""
    async with opened() as scope:
        for step in range(3):
            place = 0
            while await tampered(client, server, scope, step, place):
                place += 1
            assert place >= 19


async def tampered(client: Encryption, server: Encryption, scope: Scope, step: int, place: int) -> bool:
    done = False

    def edited(now: int, data: bytes) -> bytes:
        nonlocal done
        if now != step or place >= len(data):
            return data
        done = True
        return data[:place] + bytes([data[place] ^ 0x40]) + data[place + 1 :]

    a, b = Attacked(client, Side.DIALLING, scope), Attacked(server, Side.LISTENING, scope)
    await b.write(edited(0, await a.read()))
    await a.write(edited(1, await b.answer()))
    await b.write(edited(2, await a.answer()))
    await anyio.wait_all_tasks_blocked()
    assert b.live is not done
    a.wire.abort()
    b.wire.abort()
    await anyio.wait_all_tasks_blocked()
    return done


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), None], ids=[*PATTERNS, "unknown"])
async def test_case_22_another_pattern_on_the_way_is_refused(pattern: object) -> None:
    number = 77 if pattern is None else PATTERNS[getattr(pattern, "name", "")].number
    async with opened() as scope:
        a, b = Attacked(CLIENT, Side.DIALLING, scope), Attacked(SERVER, Side.LISTENING, scope)
        first = await a.read()
        await b.write(first[:12] + number.to_bytes(2) + first[14:])
        answer = await b.answer()
        if pattern is PATTERNS["XX"]:
            assert len(answer) == 98
        else:
            await a.write(answer)
            assert type(a.assert_failed()) is HandshakeRefused
            assert await a.answer() == b""  # it said nothing more
            b.assert_failed()


# --- one end without encryption ---


@both_ends
async def test_case_23_a_client_without_encryption_gets_nothing_from_a_server_with_it(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        b = Attacked(server, Side.LISTENING, scope)
        plain = Link(b.wire, side=Side.DIALLING, endpoint=ENDPOINT)
        plain.bind(scope)
        await Framing().upgrade(plain, Side.DIALLING)
        stream = FrameStream(plain)
        scope.task_group.start_soon(stream.run)
        await stream.send(b"an early word")
        with pytest.raises(ConnectionLost):
            await stream.receive()
        assert "not a Towline client with encryption" in str(b.assert_failed())
        assert b.at_once


@both_ends
async def test_case_23_a_client_with_encryption_says_nothing_to_a_server_without_it(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        a = Attacked(client, Side.DIALLING, scope)
        plain = Link(a.wire, side=Side.LISTENING, endpoint=ENDPOINT)
        plain.bind(scope)
        await Framing().upgrade(plain, Side.LISTENING)
        stream = FrameStream(plain)
        scope.task_group.start_soon(stream.run)
        with pytest.raises(ConnectionLost):
            await stream.receive()
        await anyio.wait_all_tasks_blocked()
        assert a.assert_failed().ended
        assert a.at_once


@both_ends
async def test_case_23_a_server_without_encryption_that_speaks_first_is_found_out(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        a = Attacked(client, Side.DIALLING, scope)
        await a.write(b"".join(FramingStage(4096).outgoing([Batch(frames=[b"welcome"])], 0.0)))
        a.assert_failed()


# --- slow, many, silent ---


@asynccontextmanager
async def served(
    layer: Encryption,
    handler: Service[Link, None],
    scope: Scope,
    *,
    max_pending: int = 256,
) -> AsyncGenerator[tuple[Server, Memory]]:
    memory = Memory()
    server = Server(
        await memory.listen(ENDPOINT),
        layer.acceptor(handler, scope),
        scope,
        max_pending=max_pending,
    )
    scope.task_group.start_soon(server.run)
    await anyio.wait_all_tasks_blocked()
    try:
        yield server, memory
    finally:
        await server.aclose()


async def greet(link: Link, /) -> None:
    link.established()
    await link.send([b"hello"])
    await link.aclose()  # or the server aborts it when this returns, and the word is lost


async def dialled(memory: Memory, layer: Encryption, scope: Scope) -> bytes:
    async def dial(request: Dial, /) -> Link:
        link = await memory(request)
        link.bind(scope)
        return link

    link = await layer.connector(dial, scope)(Dial(ENDPOINT))
    data = await link.receive_exactly(5)
    await link.aclose()
    return data


async def drip(driver: Driver, data: bytes) -> float:
    """Write a byte a second until it is refused; how long that took."""
    start = anyio.current_time()
    for i in range(len(data)):
        try:
            await driver.write(data[i : i + 1])
        except ConnectionLost:
            break
        await anyio.sleep(1)
    return anyio.current_time() - start


@both_ends
async def test_case_38_two_hundred_slow_clients_are_cut_off_in_time(client: Encryption, server: Encryption) -> None:
    lasted: list[float] = []
    data = preamble(server) + bytes(48)

    async def slow(driver: Driver) -> None:
        lasted.append(await drip(driver, data))

    async with opened() as scope, served(server, greet, scope) as (listening, memory):
        tasks_before = len(anyio.get_running_tasks())
        async with anyio.create_task_group() as tasks:
            for _ in range(200):
                tasks.start_soon(slow, (await memory(Dial(ENDPOINT))).driver)
            await anyio.sleep(2)
            assert await dialled(memory, client, scope) == b"hello"  # an honest one gets in
        assert len(lasted) == 200
        assert max(lasted) <= 6  # cut at 5 s, noticed at the next byte
        assert min(lasted) >= 5
        await anyio.wait_all_tasks_blocked()
        assert len(listening._strangers) == 0
        assert len(anyio.get_running_tasks()) == tasks_before


@both_ends
async def test_case_39_a_flood_of_half_open_connections_leaves_room(client: Encryption, server: Encryption) -> None:
    async with opened() as scope, served(server, greet, scope, max_pending=20) as (listening, memory):
        silent = [(await memory(Dial(ENDPOINT))).driver for _ in range(70)]
        await anyio.wait_all_tasks_blocked()
        assert len(listening._strangers) == 20
        for driver in silent[:50]:  # those that waited longest went, at once
            with pytest.raises(ConnectionLost):
                await driver.read()
        assert await dialled(memory, client, scope) == b"hello"
        await anyio.sleep(6)
        assert len(listening._strangers) == 0


@both_ends
async def test_case_40_a_thousand_that_say_nothing_leave_nothing_behind(client: Encryption, server: Encryption) -> None:
    async with opened() as scope, served(server, greet, scope) as (listening, memory):
        before = len(anyio.get_running_tasks())
        for i in range(1000):
            driver = (await memory(Dial(ENDPOINT))).driver
            if i % 2:
                await driver.aclose()
        await anyio.sleep(6)
        assert len(listening._links) == len(listening._strangers) == 0
        assert len(anyio.get_running_tasks()) == before
        assert await dialled(memory, client, scope) == b"hello"


@both_ends
async def test_case_38_a_server_that_drips_its_answer_is_given_up_in_time(
    client: Encryption, server: Encryption
) -> None:
    async with opened() as scope:
        a = Attacked(client, Side.DIALLING, scope)
        await a.read()
        answer = with_length(bytes(96 if client is CLIENT else 48))
        await drip(a.wire, answer)
        assert type(a.assert_failed()) is HandshakeTimeout
        assert a.seconds == pytest.approx(5)
        assert a.error is not None
        assert a.error.retryable  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


# --- what strays here ---


@pytest.mark.parametrize("seed", range(10))
@both_ends
async def test_case_41_garbage_is_cut_off_at_its_first_wrong_byte(
    client: Encryption, server: Encryption, seed: int
) -> None:
    async with opened() as scope:
        for number in range(seed * 100, seed * 100 + 100):
            rng = random.Random(number)
            good = rng.choice((0, 0, 1, 4, 7))
            wrong = rng.choice([byte for byte in range(256) if byte != MAGIC[good]])
            size = rng.choice((0, 0, 15, 15, 40_000))
            b = Attacked(server, Side.LISTENING, scope)
            await b.write(MAGIC[:good] + bytes([wrong]) + rng.randbytes(size))
            error = b.assert_failed()
            assert f"{wrong:#04x} came where {MAGIC[good]:#04x} must" in str(error)
            assert await b.answer() == b""
            assert b.at_once


@both_ends
async def test_case_41_a_mebibyte_of_garbage_is_not_read_to_the_end(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        b = Attacked(server, Side.LISTENING, scope)
        with pytest.raises(ConnectionLost):
            await b.wire.write(random.Random(1).randbytes(1 << 20))
        await anyio.wait_all_tasks_blocked()
        b.assert_failed()


@both_ends
async def test_case_41_garbage_behind_a_good_preamble_is_refused(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        for seed in range(100):
            b = Attacked(server, Side.LISTENING, scope)
            await b.write(preamble(server) + random.Random(seed).randbytes(server.pattern.first_message))
            if server is with_psk:
                assert await b.answer() == REFUSAL
            else:  # 32 random bytes are a public key like any other; it goes no further than one answer
                assert len(await b.answer()) == 98
                b.wire.abort()
                await anyio.wait_all_tasks_blocked()
            b.assert_failed()


def client_hello() -> bytes:
    context = ssl.create_default_context()
    outgoing = ssl.MemoryBIO()
    tls = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="example.org")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


async def test_case_42_a_tls_client_is_cut_off_at_its_first_byte() -> None:
    async with opened() as scope:
        b = Attacked(with_psk, Side.LISTENING, scope)
        hello = client_hello()
        await b.write(hello[:1])
        assert "0x16 came where 0xd7 must" in str(b.assert_failed())
        assert await b.answer() == b""
        b = Attacked(with_psk, Side.LISTENING, scope)
        await b.write(hello)
        b.assert_failed()


@pytest.mark.parametrize("data", STRAYS.values(), ids=STRAYS)
async def test_case_43_what_is_no_client_of_ours_is_cut_off_at_its_first_byte(data: bytes) -> None:
    async with opened() as scope:
        for size in (1, len(data)):
            b = Attacked(with_psk, Side.LISTENING, scope)
            await b.write(data[:size])
            b.assert_failed()
            assert await b.answer() == b""
            assert b.at_once


def tls_answer(data: bytes) -> bytes:
    """What a real TLS server says to ``data``."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(data)
    with pytest.raises(ssl.SSLError):
        tls.do_handshake()
    return outgoing.read()


ANSWERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "HTTP": (lambda _: b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n", "an HTTP server"),
    "SSH": (lambda _: b"SSH-2.0-OpenSSH_9.6\r\n", "an SSH server"),
    "TLS alert": (lambda _: b"\x15\x03\x01\x00\x02\x02\x46", "a TLS server"),
    "echo": (lambda data: data, "an echo of our own bytes"),
    "SMTP": (lambda _: b"220 mail.example.org ESMTP\r\n", "something else"),
    "a small frame": (lambda _: b"\0\0\0\x05hello", "refused"),
    "another length": (lambda _: b"\0\x11" + bytes(17), "something else"),
}


@pytest.mark.parametrize(("answer", "said"), ANSWERS.values(), ids=ANSWERS)
@both_ends
async def test_case_44_what_is_no_server_of_ours_is_found_out_at_once(
    client: Encryption, server: Encryption, answer: Callable[[bytes], bytes], said: str
) -> None:
    async with opened() as scope:
        a = Attacked(client, Side.DIALLING, scope)
        sent = await a.read()
        await a.write(answer(sent))
        assert said in str(a.assert_failed())
        assert a.at_once  # it does not wait for more
        assert not a.assert_failed().retryable


async def test_case_44_a_real_tls_server_does_not_keep_a_client_waiting() -> None:
    async with opened() as scope:
        a = Attacked(with_psk, Side.DIALLING, scope)
        answer = tls_answer(await a.read())
        await a.write(answer)
        await a.wire.aclose()
        await anyio.wait_all_tasks_blocked()
        a.assert_failed()
        assert a.at_once


@pytest.mark.parametrize("ending", ["aclose", "abort"])
@both_ends
async def test_a_server_that_goes_away_without_a_word_is_tried_again(
    client: Encryption, server: Encryption, ending: str
) -> None:
    async with opened() as scope:
        a = Attacked(client, Side.DIALLING, scope)
        await a.read()
        if ending == "aclose":
            await a.wire.aclose()
        else:
            a.wire.abort()
        await anyio.wait_all_tasks_blocked()
        error = a.assert_failed()
        assert error.ended
        assert error.retryable


async def test_all_refusals_are_the_same_bytes_and_the_same_end() -> None:
    """Nobody who knocks learns which of his keys, names or numbers was wrong (D9)."""
    good = preamble(SERVER)
    stranger = Encryption(keys=StaticKeys(StaticKey.generate(), trust=AllowList([SERVER_KEY.public_key])))
    async with opened() as scope:
        refusals: list[bytes] = []
        for data in (
            preamble(SERVER, version=2),
            preamble(SERVER, suite=2),
            preamble(SERVER, pattern=1),
            preamble(SERVER, message_length=33),
            good[:-1] + b"\0",
            good + bytes(32),
        ):
            b = Attacked(SERVER, Side.LISTENING, scope)
            await b.write(data)
            refusals.append(await b.answer())
            assert b.wire._incoming.ended
            b.assert_failed()
        a, b = Attacked(stranger, Side.DIALLING, scope), Attacked(SERVER, Side.LISTENING, scope)
        await b.write(await a.read())
        await a.write(await b.read())
        await b.write(await a.read())
        refusals.append(await b.answer())
        assert b.wire._incoming.ended
    assert refusals == [REFUSAL] * 7


@both_ends
async def test_the_right_handshake_in_the_hand_of_the_test_succeeds(client: Encryption, server: Encryption) -> None:
    """So that the cases above fail for the reason they name, and for no other."""
    async with opened() as scope:
        b = Attacked(server, Side.LISTENING, scope)
        data = preamble(server)
        state = noise(client, data, initiator=True)
        await b.write(data + state.write_message())
        answer = await b.read()
        state.read_message(answer[2:])
        if not state.complete:
            await b.write(with_length(state.write_message()))
        else:
            header = b"\0\x11"
            await b.write(header + state.split()[0].encrypt_with_ad(header, b"\x01"))
        assert b.live
