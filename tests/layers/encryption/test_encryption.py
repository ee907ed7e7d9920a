"""The Encryption layer between two honest ends, and between two that do not agree."""

from __future__ import annotations

import base64
import contextlib
import copy
import logging
import math
import pickle
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteStream

from towline.endpoint import Endpoint
from towline.errors import (
    ConnectionLost,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    KeyFileError,
    ProtocolViolation,
    StackError,
)
from towline.layers.encryption import (
    AllowList,
    Encryption,
    KnownHosts,
    PeerIdentity,
    Psk,
    StaticKey,
    StaticKeys,
    _ciphers,
    _dh,
)
from towline.layers.encryption._preamble import PATTERNS, SUITES
from towline.layers.encryption._records import RecordStage
from towline.layers.encryption.keys import Trust
from towline.layers.encryption.noise import MAX_NONCE, HandshakeState
from towline.link import Link
from towline.scope import Scope
from towline.service import Dial, Side
from towline.stage import Driver
from towline.streams import LinkByteStream
from towline.testing import cancel_at_every_await, check_layer
from towline.transports.memory import Memory, MemoryDriver, memory_drivers

WIRE = ("resume/1", "framing/1", "encryption/1")
ENDPOINT = Endpoint.parse("memory://here")
PSK = Psk(bytes(range(100, 132)))
CLIENT_KEY = StaticKey(bytes(range(1, 33)))
SERVER_KEY = StaticKey(bytes(range(201, 233)))
REFUSED = "the server at memory://here refused, and does not say why"

with_psk = Encryption(psk=PSK)


def with_keys(
    key: StaticKey, trusted: StaticKey | Trust, *, psk: Psk | None = None, rekey_after: int = 1 << 16
) -> Encryption:
    trust = trusted if isinstance(trusted, Trust) else AllowList([trusted.public_key])
    return Encryption(keys=StaticKeys(key, trust=trust, psk=psk), rekey_after=rekey_after)


CLIENT, SERVER = with_keys(CLIENT_KEY, SERVER_KEY), with_keys(SERVER_KEY, CLIENT_KEY)

PAIRS = {
    "NNpsk0": (with_psk, with_psk),
    "XX": (CLIENT, SERVER),
    "XXpsk3": (with_keys(CLIENT_KEY, SERVER_KEY, psk=PSK), with_keys(SERVER_KEY, CLIENT_KEY, psk=PSK)),
}
both_ends = pytest.mark.parametrize(("client", "server"), PAIRS.values(), ids=PAIRS)


@dataclass
class Outcome:
    """What a handshake came to: both links, and what each end raised."""

    client: Link
    server: Link
    client_error: Exception | None = None
    server_error: Exception | None = None

    @property
    def is_live(self) -> bool:
        return self.client_error is self.server_error is None


class Tampering(Driver):
    """Passes writes through ``edit``, which is given the number of the write and its bytes."""

    def __init__(self, inner: Driver, edit: Callable[[int, bytes], bytes]) -> None:
        self._inner = inner
        self._edit = edit
        self.written: list[bytes] = []

    async def read(self) -> bytes:
        return await self._inner.read()

    async def write(self, data: bytes | bytearray) -> None:
        self.written.append(bytes(data))
        await self._inner.write(self._edit(len(self.written) - 1, bytes(data)))

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    def abort(self) -> None:
        self._inner.abort()

    async def aclose(self) -> None:
        await self._inner.aclose()


@asynccontextmanager
async def opened(wire: tuple[str, ...] = WIRE) -> AsyncGenerator[Scope]:
    async with anyio.create_task_group() as tasks:
        scope = Scope(tasks, wire=wire)
        tasks.start_soon(scope.timers.run)
        yield scope
        tasks.cancel_scope.cancel()


async def shake(
    client: Encryption,
    server: Encryption,
    scope: Scope,
    *,
    server_scope: Scope | None = None,
    chunk: int | None = None,
    edit_client: Callable[[int, bytes], bytes] | None = None,
    edit_server: Callable[[int, bytes], bytes] | None = None,
) -> Outcome:
    """One handshake between two ends in memory, perhaps with somebody in between."""
    drivers: list[Driver] = list(memory_drivers(chunk=chunk))
    for i, edit in enumerate((edit_client, edit_server)):
        if edit is not None:
            drivers[i] = Tampering(drivers[i], edit)
    outcome = Outcome(
        Link(drivers[0], side=Side.DIALLING, endpoint=ENDPOINT),
        Link(drivers[1], side=Side.LISTENING, endpoint=ENDPOINT),
    )
    outcome.client.bind(scope)
    outcome.server.bind(server_scope or scope)

    async def upgrade(layer: Encryption, link: Link) -> None:
        try:
            with link.closing_on_error():
                await layer.upgrade(link, link.side)
        except Exception as error:
            if link is outcome.client:
                outcome.client_error = error
            else:
                outcome.server_error = error

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upgrade, client, outcome.client)
        tasks.start_soon(upgrade, server, outcome.server)
    return outcome


def streams(outcome: Outcome, scope: Scope) -> tuple[LinkByteStream, LinkByteStream]:
    pair = LinkByteStream(outcome.client), LinkByteStream(outcome.server)
    for stream in pair:
        scope.task_group.start_soon(stream.run)
    return pair


async def receive_exactly(stream: ByteStream, n: int) -> bytes:
    data = b""
    while len(data) < n:
        data += await stream.receive()
    return data


def assert_unlit(link: Link) -> None:
    """No key was installed, not even by half."""
    assert link._stages == []
    assert (link.peer_identity, link.principal, link.handshake_hash, link.exporter, link.expires) == (None,) * 5


# --- two ends that agree ---


@both_ends
async def test_both_ends_come_to_the_same_secrets(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        outcome = await shake(client, server, scope)
    assert outcome.is_live
    assert outcome.client.handshake_hash == outcome.server.handshake_hash
    assert outcome.client.exporter is not None
    assert outcome.server.exporter is not None
    secret = outcome.client.exporter(b"label", 32)
    assert secret == outcome.server.exporter(b"label", 32)
    assert secret != outcome.client.exporter(b"other", 32)
    assert [type(stage) for stage in outcome.client._stages] == [RecordStage]


@pytest.mark.parametrize("suite", SUITES)
@both_ends
async def test_data_travels_both_ways_and_ends_cleanly(client: Encryption, server: Encryption, suite: str) -> None:
    async with opened() as scope:
        outcome = await shake(with_suite(client, suite), with_suite(server, suite), scope, chunk=1000)
        assert outcome.is_live
        a, b = streams(outcome, scope)
        data = bytes(range(256)) * 1000
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.send, data)
            tasks.start_soon(b.send, data)
            assert await receive_exactly(a, len(data)) == data
            assert await receive_exactly(b, len(data)) == data
        await a.aclose()
        with pytest.raises(anyio.EndOfStream):
            await b.receive()
        await b.aclose()


def with_suite(layer: Encryption, suite: str, allowed: tuple[str, ...] = ()) -> Encryption:
    return Encryption(psk=layer.psk, keys=layer.keys, suite=suite, allowed_suites=allowed)


async def test_each_connection_has_keys_of_its_own() -> None:
    async with opened() as scope:
        outcomes = [await shake(with_psk, with_psk, scope) for _ in range(5)]
    assert len({outcome.client.handshake_hash for outcome in outcomes}) == 5


async def test_each_end_learns_who_the_other_is() -> None:
    server = with_keys(SERVER_KEY, AllowList([CLIENT_KEY.public_line("anna's laptop")]))
    async with opened() as scope:
        outcome = await shake(CLIENT, server, scope)
    assert outcome.server.peer_identity == PeerIdentity(CLIENT_KEY.public_key, "anna's laptop")
    assert outcome.server.principal == CLIENT_KEY.public_key
    assert outcome.client.peer_identity == PeerIdentity(SERVER_KEY.public_key)
    assert outcome.client.principal == SERVER_KEY.public_key


async def test_a_shared_secret_says_nothing_about_who_it_is() -> None:
    async with opened() as scope:
        outcome = await shake(with_psk, with_psk, scope)
    assert outcome.server.peer_identity is None
    assert outcome.server.principal is None


@pytest.mark.parametrize(("max_age", "expires"), [(3600.0, 3600.0), (10, 10), (math.inf, None), (None, None)])
async def test_keys_are_too_old_after_max_age(max_age: float | None, expires: float | None) -> None:
    layer = Encryption(psk=PSK, max_age=max_age)
    async with opened() as scope:
        now = scope.clock()
        outcome = await shake(layer, layer, scope)
    assert outcome.client.expires == (None if expires is None else now + expires)


async def test_it_is_a_layer_over_a_transport() -> None:
    memory, received = Memory(chunk=5), list[bytes]()

    async def handler(link: Link, /) -> None:
        received.append(await link.receive_exactly(5))

    async with opened() as scope:
        listener = await memory.listen(ENDPOINT)
        accept = with_psk.acceptor(handler, scope)

        def accepted(link: Link) -> None:
            link.bind(scope)
            scope.task_group.start_soon(accept, link)

        async def dial(request: Dial, /) -> Link:
            link = await memory(request)
            link.bind(scope)
            return link

        scope.task_group.start_soon(listener.serve, accepted)
        await anyio.wait_all_tasks_blocked()
        link = await with_psk.connector(dial, scope)(Dial(ENDPOINT))
        await link.send([b"hello"])
        await anyio.wait_all_tasks_blocked()
        await listener.aclose()
    assert received == [b"hello"]


@both_ends
async def test_it_keeps_the_contract_of_a_layer(client: Encryption, server: Encryption) -> None:
    await check_layer(client, peer=[server])


# --- settings ---


def test_exactly_one_kind_of_key_is_needed() -> None:
    with pytest.raises(StackError, match=r"needs psk=.* or keys=.*, and has neither"):
        Encryption()
    with pytest.raises(StackError, match=r"has both; for both at once: keys=StaticKeys\(..., psk=...\)"):
        Encryption(psk=PSK, keys=CLIENT.keys)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "25519_AESGCM_MD5"}, "suite has '25519_AESGCM_MD5', where 25519_ChaChaPoly_SHA256"),
        ({"allowed_suites": ("none",)}, "allowed_suites has 'none'"),
        ({"rekey_after": 0}, "rekey_after is 0, where 1 to 1,048,576 will do"),
        ({"max_record_size": 65519}, "max_record_size is 65,519, where 1 to 65,518 will do"),
        ({"handshake_timeout": 0.0}, "handshake_timeout is 0 s, where more than 0 is needed"),
        ({"max_age": math.nan}, "max_age is nan s"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encryption(psk=PSK, **settings)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_layers_with_equal_settings_are_equal() -> None:
    assert Encryption(psk=PSK) == Encryption(psk=Psk(PSK.secret))
    assert Encryption(psk=PSK) != Encryption(psk=PSK, rekey_after=10)
    assert Encryption(psk=PSK) != Encryption(psk=Psk.generate())
    assert hash(Encryption(psk=PSK)) == hash(Encryption(psk=Psk(PSK.secret)))


@pytest.mark.parametrize("name", PATTERNS)
def test_first_messages_have_the_size_that_noise_says(name: str) -> None:
    psks = [PSK.secret] if "psk" in name else []
    s = CLIENT_KEY.secret if name.startswith("XX") else None
    state = HandshakeState(f"Noise_{name}_25519_ChaChaPoly_SHA256", True, s=s, psks=psks)
    assert state.next_message_overhead == PATTERNS[name].first_message


# --- two ends that do not agree ---


async def refused(client: Encryption, server: Encryption, reason: str, *, wire: tuple[str, ...] = WIRE) -> Outcome:
    """Both ends fail: the server for ``reason``, the client because it was told no, and no more than that."""
    async with opened() as scope, opened(wire) as server_scope:
        outcome = await shake(client, server, scope, server_scope=server_scope)
    assert isinstance(outcome.server_error, HandshakeFailed)
    assert reason in str(outcome.server_error)
    assert type(outcome.client_error) is HandshakeRefused
    assert REFUSED in str(outcome.client_error)
    assert not outcome.client_error.retryable
    assert not outcome.client_error.ended
    for link in (outcome.client, outcome.server):
        assert_unlit(link)
        assert link.is_aborted
    return outcome


class CountingDH:
    """X25519 that counts its key exchanges."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = _dh.DH_FUNCTIONS["25519"]
        self.exchanged = 0

        def counted(pair: _dh.KeyPair) -> _dh.KeyPair:
            counter = self

            class Counted:
                public_key = pair.public_key

                def exchange(self, public_key: bytes, /) -> bytes:
                    counter.exchanged += 1
                    return pair.exchange(public_key)

            return Counted()

        function = _dh.DHFunction(
            "25519", 32, 32, lambda: counted(real.generate()), lambda private: counted(real.load(private))
        )
        monkeypatch.setitem(_dh.DH_FUNCTIONS, "25519", function)


async def test_case_12_a_wrong_psk_fails_before_any_key_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = CountingDH(monkeypatch)
    await refused(with_psk, Encryption(psk=Psk.generate()), "the handshake failed: the other end has another key")
    assert counting.exchanged == 0


async def test_case_13_other_layers_above_are_refused_and_named_by_the_server() -> None:
    await refused(
        with_psk,
        with_psk,
        "the client stacks other layers above Encryption than heartbeat/1, framing/1",
        wire=("heartbeat/1", "framing/1", "encryption/1"),
    )


async def test_case_13_layers_below_are_not_compared() -> None:
    async with opened() as scope, opened((*WIRE, "below/1")) as server_scope:
        assert (await shake(with_psk, with_psk, scope, server_scope=server_scope)).is_live


@pytest.mark.parametrize("place", range(8, 24))
@both_ends
async def test_case_13_every_byte_of_the_preamble_counts(client: Encryption, server: Encryption, place: int) -> None:
    def edit(number: int, data: bytes) -> bytes:
        return data if number else data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    async with opened() as scope:
        outcome = await shake(client, server, scope, edit_client=edit)
    assert isinstance(outcome.client_error, HandshakeRefused)
    assert isinstance(outcome.server_error, HandshakeFailed)


async def test_case_14_a_client_that_the_server_does_not_know_is_refused() -> None:
    server = with_keys(SERVER_KEY, AllowList())
    async with opened() as scope:
        outcome = await shake(CLIENT, server, scope)
        assert isinstance(outcome.server_error, HandshakeFailed)
        assert "is not on the allow-list" in str(outcome.server_error)
        assert_unlit(outcome.server)
        # The client had said its last word before; what it reads first is the refusal.
        assert outcome.client_error is None
        with pytest.raises(HandshakeRefused, match=REFUSED):
            await outcome.client.receive_exactly(1)


async def test_case_14_the_same_through_a_stream() -> None:
    async with opened() as scope:
        outcome = await shake(CLIENT, with_keys(SERVER_KEY, AllowList()), scope)
        stream, _ = streams(outcome, scope)
        with pytest.raises(ConnectionLost, match=REFUSED):
            await stream.receive()


async def test_case_14_a_server_that_the_client_does_not_know_never_learns_who_the_client_is() -> None:
    sent: list[bytes] = []

    def record(number: int, data: bytes) -> bytes:
        sent.append(data)
        return data

    async with opened() as scope:
        outcome = await shake(with_keys(CLIENT_KEY, AllowList()), SERVER, scope, edit_client=record)
    assert isinstance(outcome.client_error, HandshakeFailed)
    assert "is not on the allow-list" in str(outcome.client_error)
    assert len(sent) == 1  # the first message; never the third
    assert isinstance(outcome.server_error, HandshakeFailed)
    assert_unlit(outcome.client)


async def test_case_15_a_first_key_is_kept_and_another_one_later_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "known_hosts"
    client = with_keys(CLIENT_KEY, KnownHosts(path, allow_first_use=True))
    async with opened() as scope:
        assert (await shake(client, SERVER, scope)).is_live
        text = path.read_text()
        assert (await shake(client, SERVER, scope)).is_live
        other = StaticKey.generate()
        outcome = await shake(client, with_keys(other, CLIENT_KEY), scope)
    assert type(outcome.client_error) is HandshakeFailed
    assert SERVER_KEY.fingerprint in str(outcome.client_error)
    assert other.fingerprint in str(outcome.client_error)
    assert path.read_text() == text


async def never(key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
    await anyio.sleep_forever()
    raise AssertionError


async def fails(key: bytes, handshake_hash: bytes, payload: bytes) -> PeerIdentity | None:
    raise LookupError("the database is away")


class Broken(Trust):
    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        raise LookupError("the database is away")


class Unreadable(Broken):
    async def check(self, peer_key: bytes, *, endpoint: str, handshake_hash: bytes, payload: bytes) -> PeerIdentity:
        raise KeyFileError("the file is away")


def asking(key: StaticKey, callback: Callable[[bytes, bytes, bytes], Awaitable[PeerIdentity | None]]) -> Encryption:
    return Encryption(keys=StaticKeys(key, trust=callback), handshake_timeout=2)


async def test_case_16_a_trust_callback_that_never_returns_ends_at_the_deadline() -> None:
    async with opened() as scope:
        start = anyio.current_time()
        outcome = await shake(CLIENT, asking(SERVER_KEY, never), scope)
        assert type(outcome.server_error) is HandshakeTimeout
        assert anyio.current_time() - start == pytest.approx(2)
        assert_unlit(outcome.server)
        outcome = await shake(asking(CLIENT_KEY, never), SERVER, scope)
        assert type(outcome.client_error) is HandshakeTimeout
        assert outcome.client_error.retryable
        assert_unlit(outcome.client)


async def test_case_16_a_trust_callback_that_raises_refuses() -> None:
    async with opened() as scope:
        outcome = await shake(CLIENT, asking(SERVER_KEY, fails), scope)
        assert type(outcome.server_error) is HandshakeFailed
        with pytest.raises(HandshakeRefused):
            await outcome.client.receive_exactly(1)
        outcome = await shake(CLIENT, with_keys(SERVER_KEY, Broken()), scope)
        assert type(outcome.server_error) is HandshakeFailed
        assert isinstance(outcome.server_error.__cause__, LookupError)
        outcome = await shake(with_keys(CLIENT_KEY, Broken()), SERVER, scope)
        assert type(outcome.client_error) is HandshakeFailed
        assert_unlit(outcome.client)


async def test_a_list_that_cannot_be_read_is_a_local_error_and_a_refusal() -> None:
    async with opened() as scope:
        outcome = await shake(CLIENT, with_keys(SERVER_KEY, Unreadable()), scope)
        assert type(outcome.server_error) is KeyFileError
        with pytest.raises(HandshakeRefused):
            await outcome.client.receive_exactly(1)


@pytest.mark.parametrize("suite", [1, 2, 3, 4, 0])
async def test_case_22_another_suite_on_the_way_fails_and_is_not_tried_again(suite: int) -> None:
    """Somebody changes the suite to another that the server allows too: the prologue finds it out."""
    server = with_suite(with_psk, "25519_XChaChaPoly_SHA256", tuple(SUITES))
    client = with_suite(with_psk, "25519_XChaChaPoly_SHA256")
    writes: list[int] = []

    def edit(number: int, data: bytes) -> bytes:
        writes.append(number)
        return data[:10] + suite.to_bytes(2) + data[12:] if number == 0 else data

    async with opened() as scope:
        outcome = await shake(client, server, scope, edit_client=edit)
    if suite == SUITES["25519_XChaChaPoly_SHA256"]:
        assert outcome.is_live
    else:
        assert isinstance(outcome.client_error, HandshakeRefused)
        assert writes == [0]


async def test_case_24_a_suite_that_the_server_does_not_allow_is_refused() -> None:
    outcome = await refused(
        with_suite(with_psk, "25519_AESGCM_SHA256"),
        with_psk,
        "the client asks for the suite 25519_AESGCM_SHA256, and here 25519_ChaChaPoly_SHA256 will do",
    )
    assert "another suite (here: NNpsk0, 25519_AESGCM_SHA256)" in str(outcome.client_error)


async def test_a_server_may_allow_several_suites() -> None:
    server = with_suite(with_psk, "25519_ChaChaPoly_SHA256", ("25519_AESGCM_SHA256",))
    async with opened() as scope:
        for suite, live in zip(SUITES, (True, True, False), strict=True):
            assert (await shake(with_suite(with_psk, suite), server, scope)).is_live is live


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, 2, "the client speaks version 2 of this encryption, and here is version 1"),
        (9, 1, "the client speaks version 1"),
        (11, 9, "the client asks for the suite 9"),
        (13, 2, "it asks for pattern XX, and here is NNpsk0"),
        (13, 9, "it asks for pattern 9, and here is NNpsk0"),
        (15, 49, "the client announced 49 bytes, where 48 must come"),
        (14, 255, "the client announced 65328 bytes, where 48 must come"),
        (16, 0, "the client stacks other layers above Encryption than resume/1, framing/1"),
    ],
)
async def test_case_25_every_cause_has_its_own_error_at_the_server_and_one_for_the_client(
    place: int, value: int, reason: str
) -> None:
    def edit(number: int, data: bytes) -> bytes:
        return data[:place] + bytes([value]) + data[place + 1 :]

    async with opened() as scope:
        outcome = await shake(with_psk, with_psk, scope, edit_client=edit)
    assert type(outcome.server_error) is HandshakeFailed
    assert reason in str(outcome.server_error)
    assert type(outcome.client_error) is HandshakeRefused


async def test_a_client_with_a_secret_and_a_server_with_keys_say_so() -> None:
    await refused(with_psk, SERVER, "it asks for pattern NNpsk0, and here is XX")
    await refused(PAIRS["XXpsk3"][0], SERVER, "it asks for pattern XXpsk3, and here is XX")


async def test_a_wrong_secret_on_top_of_right_keys_is_refused() -> None:
    async with opened() as scope:
        server = with_keys(SERVER_KEY, CLIENT_KEY, psk=Psk.generate())
        outcome = await shake(PAIRS["XXpsk3"][0], server, scope)
        assert isinstance(outcome.server_error, HandshakeFailed)
        with pytest.raises(HandshakeRefused):
            await outcome.client.receive_exactly(1)


async def test_case_28_another_number_of_records_until_the_rekey_is_refused() -> None:
    await refused(Encryption(psk=PSK, rekey_after=100), with_psk, "the handshake failed")
    async with opened() as scope:
        outcome = await shake(with_keys(CLIENT_KEY, SERVER_KEY, rekey_after=100), SERVER, scope)
    assert isinstance(outcome.client_error, HandshakeFailed)
    assert isinstance(outcome.server_error, HandshakeFailed)


# --- how bytes arrive, and cancellation ---


def in_memory(side: Side, scope: Scope) -> tuple[Link, MemoryDriver]:
    """A link, and the bare other end of it."""
    ours, theirs = memory_drivers()
    link = Link(ours, side=side, endpoint=ENDPOINT)
    link.bind(scope)
    return link, theirs


@both_ends
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 23, 24, 25, 47, 71, 73])
async def test_case_46_handshakes_may_arrive_in_any_pieces(client: Encryption, server: Encryption, chunk: int) -> None:
    async with opened() as scope:
        outcome = await shake(client, server, scope, chunk=chunk)
        assert outcome.is_live
        a, b = streams(outcome, scope)
        await a.send(b"hello")
        assert await receive_exactly(b, 5) == b"hello"


@both_ends
async def test_case_46_every_place_to_split_works_and_data_right_behind_is_not_lost(
    client: Encryption, server: Encryption
) -> None:
    """The client's last words and its first data come in one segment, cut in two at every place."""
    async with opened() as scope:
        size = await last_words_then_data(client, server, scope, 0)
        for place in range(1, size + 1):
            await last_words_then_data(client, server, scope, place)


async def last_words_then_data(client: Encryption, server: Encryption, scope: Scope, place: int) -> int:
    held: list[bytes] = []
    segment = b""
    ours, theirs = memory_drivers()
    a, b = Link(ours, side=Side.DIALLING, endpoint=ENDPOINT), Link(theirs, side=Side.LISTENING, endpoint=ENDPOINT)
    ours_write = ours.write

    async def hold_back(data: bytes | bytearray) -> None:
        held.append(bytes(data))
        if len(held) == 1:
            await ours_write(data)

    ours.write = hold_back  # type: ignore[method-assign]
    a.bind(scope)
    b.bind(scope)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.upgrade, b, Side.LISTENING)
        await client.upgrade(a, Side.DIALLING)
        await a.send([b"data right behind"])
        segment += b"".join(held[1:])
        await ours_write(segment[:place])
        await anyio.wait_all_tasks_blocked()
        await ours_write(segment[place:])
    assert await b.receive_exactly(17) == b"data right behind"
    return len(segment)


@both_ends
@pytest.mark.parametrize(("mine", "other"), [(0, 1), (1, 0)], ids=["client", "server"])
async def test_case_47_a_handshake_may_be_cancelled_at_every_await(
    client: Encryption, server: Encryption, mine: int, other: int
) -> None:
    layers = client, server
    links: list[Link] = []

    async with opened() as scope:

        async def both() -> None:
            ours, theirs = memory_drivers(capacity=5)  # so small that writes wait too
            links[:] = (
                Link(ours, side=Side.DIALLING, endpoint=ENDPOINT),
                Link(theirs, side=Side.LISTENING, endpoint=ENDPOINT),
            )

            async def quietly(index: int) -> None:
                link = links[index]
                # The other end is cancelled too, and what it does about that may be seen here first.
                with contextlib.suppress(HandshakeFailed), link.closing_on_error():
                    await layers[index].upgrade(link, link.side)

            for link in links:
                link.bind(scope)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(quietly, other)
                await quietly(mine)

        async def check() -> None:
            link = links[mine]
            if link.is_aborted:
                assert_unlit(link)
            else:
                assert link.exporter is not None
                assert len(link._stages) == 1

        assert await cancel_at_every_await(both, check) > 20


# --- secrets ---


@both_ends
async def test_case_48_no_secret_is_in_a_log_a_repr_or_an_error(
    client: Encryption, server: Encryption, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = Psk.generate()
    secrets = [PSK.secret, wrong.secret, CLIENT_KEY.secret, SERVER_KEY.secret]
    texts: list[str] = []
    stranger = StaticKey.generate()
    failing = [
        (client, Encryption(psk=wrong)),
        (with_keys(stranger, SERVER_KEY, psk=PSK), server),
        (client, with_keys(stranger, CLIENT_KEY, psk=wrong)),
        (with_suite(client, "25519_AESGCM_SHA256"), server),
    ]
    async with opened() as scope:
        outcomes = [await shake(client, server, scope)]
        assert outcomes[0].client.exporter is not None
        secrets.append(outcomes[0].client.exporter(b"rsm1 binding", 32))
        outcomes += [await shake(*pair, scope) for pair in failing]
    for outcome in outcomes:
        texts += [repr(outcome.client), repr(outcome.server), repr(outcome.client._stages)]
        for error in (outcome.client_error, outcome.server_error):
            if error is not None:
                texts += ["".join(traceback.format_exception(error)), repr(error), str(error.args)]
    texts += [repr(layer) for pair in (*failing, (client, server)) for layer in pair]
    texts.append(caplog.text)
    everything = "\n".join(texts)
    for secret in secrets:
        forms = (secret.hex(), base64.b64encode(secret).decode().rstrip("="), repr(secret)[2:-1], str(list(secret)))
        for form in forms:
            assert form not in everything


@both_ends
async def test_case_48_nothing_with_a_key_can_be_pickled_or_copied(client: Encryption, server: Encryption) -> None:
    async with opened() as scope:
        outcome = await shake(client, server, scope)
    (stage,) = outcome.client._stages
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(stage)
    with pytest.raises(TypeError):
        pickle.dumps(client)


async def test_case_50_no_nonce_is_used_twice_under_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    real = _ciphers.CIPHERS["ChaChaPoly"]
    rekeying = real.pack_nonce(MAX_NONCE)
    sealed: list[tuple[bytes, bytes]] = []

    class Recording:
        def __init__(self, key: bytes) -> None:
            self._key = key
            aead = real.new(key)
            self.decrypt, self.encrypt_into, self._encrypt = aead.decrypt, aead.encrypt_into, aead.encrypt

        def encrypt(
            self, nonce: _ciphers.Buffer, data: _ciphers.Buffer, associated_data: _ciphers.Buffer | None, /
        ) -> bytes:
            if bytes(nonce) != rekeying:  # both ends compute that, and neither sends it
                sealed.append((self._key, bytes(nonce)))
            return self._encrypt(nonce, data, associated_data)

    function = _ciphers.CipherFunction("ChaChaPoly", Recording, real.pack_nonce)
    monkeypatch.setitem(_ciphers.CIPHERS, "ChaChaPoly", function)
    layer = Encryption(psk=PSK, rekey_after=3)
    async with opened() as scope:
        for _ in range(50):
            outcome = await shake(layer, layer, scope)
            a, b = streams(outcome, scope)
            for i in range(8):
                await a.send(bytes(64))
                await b.send(bytes(i))
                await receive_exactly(b, 64)
            await a.aclose()
            await b.aclose()
    assert len(sealed) > 50 * 18
    assert len(set(sealed)) == len(sealed)


@both_ends
async def test_case_01_a_flipped_bit_on_a_live_link_ends_it(client: Encryption, server: Encryption) -> None:
    handshake_writes = 2

    def edit(number: int, data: bytes) -> bytes:
        return data if number < handshake_writes else data[:-1] + bytes([data[-1] ^ 1])

    async with opened() as scope:
        outcome = await shake(client, server, scope, edit_client=edit)
        assert outcome.is_live
        a, b = streams(outcome, scope)
        await a.send(b"hello")
        with pytest.raises(ConnectionLost) as raised:
            await b.receive()
        assert isinstance(raised.value.__cause__, Exception)
        assert isinstance(raised.value.__cause__.__cause__, ProtocolViolation)
        assert outcome.server.is_aborted


def test_known_hosts_are_refused_where_clients_are_to_be_told_apart(tmp_path: Path) -> None:
    trust = KnownHosts(tmp_path / "known", allow_first_use=True)
    layer = Encryption(keys=StaticKeys(StaticKey.generate(), trust=trust))

    async def handler(link: Link, /) -> None:
        raise AssertionError(link)

    async def both_sides() -> None:
        async with anyio.create_task_group() as tasks:
            with pytest.raises(StackError, match="AllowList"):
                layer.acceptor(handler, Scope(tasks))

    anyio.run(both_sides)
