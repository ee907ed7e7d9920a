"""The Tls layer: certificates that are accepted, those that are not, and ends that are none."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
import trustme
from anyio.abc import ByteStream
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from towline.endpoint import Endpoint
from towline.errors import (
    ConnectionLost,
    HandshakeFailed,
    HandshakeRefused,
    HandshakeTimeout,
    KeyFileError,
    LinkLost,
    ProtocolViolation,
    StackError,
)
from towline.layers.encryption import Encryption, Psk
from towline.layers.tls import PeerCertificate, Tls, TlsClient, TlsServer, TlsStage
from towline.link import Link
from towline.scope import Scope
from towline.service import Side
from towline.stage import CLEAN
from towline.streams import LinkByteStream
from towline.testing import cancel_at_every_await, check_layer, check_stage
from towline.transports.memory import MemoryDriver, memory_drivers

ENDPOINT = Endpoint.parse("memory://here")
CA = trustme.CA()
OTHER_CA = trustme.CA()
NAME = "here.example"


# pyright: reportUnknownMemberType=false
# (trustme names a type of a package that is not there.)


def server_context(*, ca: trustme.CA = CA, ask: ssl.VerifyMode = ssl.CERT_NONE) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(NAME).configure_cert(context)
    context.verify_mode = ask
    CA.configure_trust(context)
    return context


def client_context(*, show: trustme.CA | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    CA.configure_trust(context)
    if show is not None:
        show.issue_cert("anna@laptop.example", common_name="anna").configure_cert(context)
    return context


SERVER_CONTEXT = server_context()
BOTH = Tls(client=client_context(), server=SERVER_CONTEXT, server_hostname=NAME)
MUTUAL = Tls(client=client_context(show=CA), server=server_context(ask=ssl.CERT_REQUIRED), server_hostname=NAME)


@dataclass
class Outcome:
    client: Link
    server: Link
    client_error: Exception | None = None
    server_error: Exception | None = None

    @property
    def is_live(self) -> bool:
        return self.client_error is self.server_error is None


@asynccontextmanager
async def opened() -> AsyncGenerator[Scope]:
    async with anyio.create_task_group() as tasks:
        scope = Scope(tasks, wire=("framing/1", "tls/1"))
        tasks.start_soon(scope.timers.run)
        yield scope
        tasks.cancel_scope.cancel()


def linked(scope: Scope, *, capacity: int = 65536, chunk: int | None = None) -> tuple[Link, Link]:
    ours, theirs = memory_drivers(capacity=capacity, chunk=chunk)
    links = Link(ours, side=Side.DIALLING, endpoint=ENDPOINT), Link(theirs, side=Side.LISTENING, endpoint=ENDPOINT)
    for link in links:
        link.bind(scope)
    return links


async def shake(
    client: Tls | Encryption, server: Tls | Encryption, scope: Scope, *, chunk: int | None = None
) -> Outcome:
    outcome = Outcome(*linked(scope, chunk=chunk))

    async def upgrade(layer: Tls | Encryption, link: Link) -> None:
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


# --- two ends that agree ---


@pytest.mark.parametrize("layer", [BOTH, MUTUAL], ids=["server certificate", "both certificates"])
async def test_it_keeps_the_contract_of_a_layer(layer: Tls) -> None:
    await check_layer(layer)


@pytest.mark.parametrize("chunk", [None, 1, 100])
async def test_data_travels_both_ways_and_ends_cleanly(chunk: int | None) -> None:
    async with opened() as scope:
        outcome = await shake(BOTH, BOTH, scope, chunk=chunk)
        assert outcome.is_live
        a, b = streams(outcome, scope)
        data = bytes(range(256)) * 300
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.send, data)
            tasks.start_soon(b.send, data)
            assert await receive_exactly(a, len(data)) == data
            assert await receive_exactly(b, len(data)) == data
        await a.aclose()
        with pytest.raises(anyio.EndOfStream):
            await b.receive()
        await b.aclose()


async def test_tls_1_2_works_too() -> None:
    old = client_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    async with opened() as scope:
        outcome = await shake(Tls(client=old, server_hostname=NAME), BOTH, scope)
        assert outcome.is_live
        a, b = streams(outcome, scope)
        await a.send(b"hello")
        assert await receive_exactly(b, 5) == b"hello"
        await b.aclose()
        with pytest.raises(anyio.EndOfStream):
            await a.receive()


async def test_each_end_learns_who_the_other_is() -> None:
    async with opened() as scope:
        outcome = await shake(MUTUAL, MUTUAL, scope)
    assert isinstance(outcome.server.peer_identity, PeerCertificate)
    assert outcome.server.peer_identity.names == ("anna@laptop.example",)
    assert outcome.server.principal is not None
    assert outcome.server.peer_identity.fingerprint == f"SHA256:{outcome.server.principal.hex()}"
    assert isinstance(outcome.client.peer_identity, PeerCertificate)
    assert outcome.client.peer_identity.names == (NAME,)
    assert outcome.client.exporter is outcome.server.exporter is None


async def test_a_certificate_with_no_more_than_a_common_name_gives_that() -> None:
    context = client_context()
    CA.issue_cert(common_name="anna").configure_cert(context)
    async with opened() as scope:
        outcome = await shake(Tls(client=context, server_hostname=NAME), MUTUAL, scope)
    assert outcome.server.peer_identity.names == ("anna",)
    assert repr(outcome.server.peer_identity).startswith("PeerCertificate('anna', 'SHA256:")


async def test_a_client_without_a_certificate_is_nobody() -> None:
    async with opened() as scope:
        outcome = await shake(BOTH, BOTH, scope)
    assert outcome.server.peer_identity is None
    assert outcome.server.principal is None


async def test_a_certificate_that_nobody_verified_is_no_identity() -> None:
    careless = client_context()
    careless.check_hostname = False
    careless.verify_mode = ssl.CERT_NONE
    async with opened() as scope:
        outcome = await shake(Tls(client=careless), BOTH, scope)
    assert outcome.is_live
    assert outcome.client.peer_identity is None
    assert outcome.client.principal is None


async def test_data_right_behind_the_handshake_is_not_lost() -> None:
    async with opened() as scope:
        client, server = linked(scope)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(BOTH.upgrade, server, Side.LISTENING)
            write, held = client.driver.write, list[bytes]()

            async def hold_back(data: bytes | bytearray) -> None:
                held.append(bytes(data))
                if len(held) == 1:
                    await write(data)

            client.driver.write = hold_back  # type: ignore[method-assign]
            await BOTH.upgrade(client, Side.DIALLING)
            await client.send([b"data right behind"])
            await write(b"".join(held[1:]))
        assert await server.receive_exactly(17) == b"data right behind"


# --- settings ---


def test_a_context_is_needed_and_for_the_right_side() -> None:
    with pytest.raises(StackError, match="Tls needs client="):
        Tls()
    with pytest.raises(ValueError, match="a context in client that is for the other side"):
        Tls(client=server_context())
    with pytest.raises(ValueError, match="a context in server that is for the other side"):
        Tls(server=client_context())
    with pytest.raises(ValueError, match="handshake_timeout is 0 s"):
        Tls(client=client_context(), handshake_timeout=0)


@pytest.mark.parametrize(
    ("layer", "side", "message"),
    [
        (Tls(server=server_context()), Side.DIALLING, "no context for the dialling side: give it client="),
        (Tls(client=client_context()), Side.LISTENING, "no context for the listening side: give it server="),
        (Tls(client=client_context()), Side.DIALLING, "memory://here has no host .*: give Tls a server_hostname"),
    ],
)
async def test_what_is_missing_is_said_when_it_is_needed(layer: Tls, side: Side, message: str) -> None:
    async with opened() as scope:
        with pytest.raises(StackError, match=message):
            await layer.upgrade(linked(scope)[0 if side.is_dialling else 1], side)


async def test_the_name_is_that_of_the_endpoint() -> None:
    async with opened() as scope:
        outcome = Outcome(*linked(scope))
        outcome.client.endpoint = Endpoint.parse(f"tcp://{NAME}:443")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(BOTH.upgrade, outcome.server, Side.LISTENING)
            await Tls(client=client_context()).upgrade(outcome.client, Side.DIALLING)
        assert outcome.client.peer_identity.names == (NAME,)


# --- two ends that do not agree ---


async def test_a_certificate_of_another_authority_fails_and_names_the_reason() -> None:
    async with opened() as scope:
        outcome = await shake(BOTH, Tls(server=server_context(ca=OTHER_CA)), scope)
    assert type(outcome.client_error) is HandshakeFailed
    assert "the certificate is not accepted: unable to get local issuer certificate" in str(outcome.client_error)
    assert not outcome.client_error.retryable
    assert type(outcome.server_error) is HandshakeFailed
    assert "alert unknown ca" in str(outcome.server_error)
    assert outcome.client._stages == outcome.server._stages == []


async def test_a_certificate_of_another_name_fails_and_names_the_reason() -> None:
    async with opened() as scope:
        outcome = await shake(Tls(client=client_context(), server_hostname="there.example"), BOTH, scope)
    assert "the certificate is not accepted: Hostname mismatch" in str(outcome.client_error)


@pytest.mark.parametrize("show", [None, OTHER_CA], ids=["none", "of another authority"])
async def test_a_client_certificate_that_is_not_accepted_is_a_refusal(show: trustme.CA | None) -> None:
    client = Tls(client=client_context(show=show), server_hostname=NAME)
    async with opened() as scope:
        outcome = await shake(client, MUTUAL, scope)
        assert type(outcome.server_error) is HandshakeFailed
        assert outcome.client_error is None  # it was done before the server looked at it
        with pytest.raises(HandshakeRefused, match=r"the server refused: .*alert"):
            await outcome.client.receive_exactly(1)


async def test_versions_that_do_not_meet_fail() -> None:
    old, new = client_context(), server_context()
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    new.minimum_version = ssl.TLSVersion.TLSv1_3
    async with opened() as scope:
        outcome = await shake(Tls(client=old, server_hostname=NAME), Tls(server=new), scope)
    assert type(outcome.client_error) is HandshakeFailed
    assert type(outcome.server_error) is HandshakeFailed


async def test_tls_on_one_end_and_encryption_on_the_other_fail_at_once() -> None:
    encryption = Encryption(psk=Psk(bytes(range(32))))
    async with opened() as scope:
        pairs: list[tuple[Tls | Encryption, Tls | Encryption]] = [(BOTH, encryption), (encryption, BOTH)]
        for client, server in pairs:
            start = anyio.current_time()
            outcome = await shake(client, server, scope)
            assert isinstance(outcome.client_error, HandshakeFailed)
            assert isinstance(outcome.server_error, HandshakeFailed)
            assert anyio.current_time() == start


@pytest.mark.parametrize("data", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", bytes(100)])
@pytest.mark.parametrize("side", [Side.DIALLING, Side.LISTENING])
async def test_what_is_no_tls_fails_at_once(data: bytes, side: Side) -> None:
    async with opened() as scope:
        client, server = linked(scope)
        link, other = (client, server) if side.is_dialling else (server, client)
        await other.driver.write(data)
        start = anyio.current_time()
        with pytest.raises(HandshakeFailed, match="the TLS handshake failed"):
            await BOTH.upgrade(link, side)
        assert anyio.current_time() == start


@pytest.mark.parametrize("side", [Side.DIALLING, Side.LISTENING])
async def test_a_peer_that_says_nothing_is_given_up_in_time(side: Side) -> None:
    async with opened() as scope:
        link = linked(scope)[0 if side.is_dialling else 1]
        start = anyio.current_time()
        with pytest.raises(HandshakeTimeout):
            await BOTH.upgrade(link, side)
        assert anyio.current_time() - start == pytest.approx(5)


@pytest.mark.parametrize("side", [Side.DIALLING, Side.LISTENING])
@pytest.mark.parametrize("ending", ["aclose", "abort"])
async def test_a_peer_that_goes_away_is_tried_again(side: Side, ending: str) -> None:
    async with opened() as scope:
        client, server = linked(scope)
        link, other = (client, server) if side.is_dialling else (server, client)
        if ending == "aclose":
            await other.driver.aclose()
        else:
            other.driver.abort()
        with pytest.raises(HandshakeFailed) as raised:
            await BOTH.upgrade(link, side)
        assert raised.value.ended
        assert raised.value.retryable


@pytest.mark.parametrize("mine", [0, 1], ids=["client", "server"])
async def test_a_handshake_may_be_cancelled_at_every_await(mine: int) -> None:
    async with opened() as scope:
        links: list[Link] = []

        async def quietly(link: Link) -> None:
            with contextlib.suppress(HandshakeFailed), link.closing_on_error():
                await MUTUAL.upgrade(link, link.side)

        async def both() -> None:
            links[:] = linked(scope, capacity=300)  # so small that writes wait too
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(quietly, links[1 - mine])
                await quietly(links[mine])

        async def check() -> None:
            link = links[mine]
            assert len(link._stages) == (not link.is_aborted)
            assert (link.principal is None) == link.is_aborted

        assert await cancel_at_every_await(both, check) > 10


# --- the stage ---


def stages(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> tuple[TlsStage, TlsStage]:
    """Two ends of one link, after their handshake."""
    context = client_context()
    context.maximum_version = version
    there, back, from_client, from_server = (ssl.MemoryBIO() for _ in range(4))
    client = context.wrap_bio(back, from_client, server_hostname=NAME)
    server = SERVER_CONTEXT.wrap_bio(there, from_server, server_side=True)
    for _ in range(3):
        for end in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
            there.write(from_client.read())
            back.write(from_server.read())
    return TlsStage(client, back, from_client), TlsStage(server, there, from_server)


versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


def sealed(stage: TlsStage, data: bytes) -> bytes:
    return b"".join(stage.outgoing([data], 0.0))


@versions
def test_it_keeps_the_contract_of_a_stage(version: ssl.TLSVersion) -> None:
    check_stage(lambda: stages(version), [b"hello", b" you"], [b"x"], bad=b"\x17\x03\x03\x00\x20" + bytes(32))


@versions
def test_a_long_flush_is_as_many_records_as_it_takes(version: ssl.TLSVersion) -> None:
    client, server = stages(version)
    data = bytes(range(256)) * 400
    assert b"".join(server.incoming([sealed(client, data)], 0.0)) == data


@versions
def test_an_end_without_close_notify_is_a_cut(version: ssl.TLSVersion) -> None:
    client, server = stages(version)
    assert server.incoming([sealed(client, b"hello")], 0.0) == [b"hello"]
    server.receive_eof(CLEAN)
    assert isinstance(server.ended, LinkLost)
    assert "without close_notify" in str(server.ended)


@versions
def test_an_end_with_close_notify_is_clean_and_what_follows_is_ignored(version: ssl.TLSVersion) -> None:
    client, server = stages(version)
    data = sealed(client, b"hello") + b"".join(client.close())
    assert server.incoming([data + b"anything"], 0.0) == [b"hello"]
    assert server.ended is CLEAN
    server.receive_eof(LinkLost("reset"))
    assert server.ended is CLEAN
    assert server.incoming([b"anything"], 0.0) == []


def test_an_error_of_the_transport_is_passed_on() -> None:
    _, server = stages()
    error = LinkLost("reset")
    server.receive_eof(error)
    assert server.ended is error
    assert server.close() == []
    with pytest.raises(LinkLost):
        server.outgoing([b"x"], 0.0)


def test_a_direction_is_closed_once_and_the_other_lives_on() -> None:
    client, server = stages()
    last = client.close()
    assert last
    assert client.close() == []
    assert client.outgoing([b"late"], 0.0) == []
    assert server.incoming(last, 0.0) == []
    assert server.ended is CLEAN
    assert client.incoming([sealed(server, b"the last words")], 0.0) == [b"the last words"]
    assert client.incoming(server.close(), 0.0) == []
    assert client.ended is CLEAN


@versions
def test_every_changed_byte_of_a_record_ends_the_link_and_good_ones_come_first(version: ssl.TLSVersion) -> None:
    size = len(sealed(stages(version)[0], b"second"))
    for place in range(size):
        client, server = stages(version)
        first, second = sealed(client, b"first"), bytearray(sealed(client, b"second"))
        second[place] ^= 1
        assert b"".join(server.incoming([first + second], 0.0)) == b"first"
        if server.ended is None:  # a length that became longer, and waits
            assert place in (3, 4)
            server.incoming([bytes(20_000)], 0.0)
        assert isinstance(server.ended, ProtocolViolation), place
        assert server.wants  # the alert: the other end shall know
        assert server.pending(0.0) != [b""]
        assert not server.wants


def test_what_cannot_be_sealed_ends_the_link() -> None:
    client, _ = stages()
    with contextlib.suppress(ssl.SSLError):
        client._tls.unwrap()  # behind its back
    with pytest.raises(ProtocolViolation, match="TLS failed: protocol is shutdown"):
        client.outgoing([b"x"], 0.0)


def alert_of(stage: TlsStage) -> bytes:
    """What ``stage`` says to a record that nobody sealed."""
    stage.incoming([b"\x17\x03\x03\x00\x20" + bytes(32)], 0.0)
    return b"".join(stage.pending(0.0))


def test_an_alert_in_place_of_the_first_data_is_a_refusal_for_a_client() -> None:
    client, server = stages()
    client.incoming([alert_of(server)], 0.0)
    assert type(client.ended) is HandshakeRefused


def test_an_alert_after_the_first_data_is_a_violation() -> None:
    client, server = stages()
    assert client.incoming([sealed(server, b"hello")], 0.0) == [b"hello"]
    client.incoming([alert_of(server)], 0.0)
    assert type(client.ended) is ProtocolViolation
    assert "alert" in str(client.ended)


def test_an_alert_is_never_a_refusal_for_a_server() -> None:
    client, server = stages()
    server.incoming([alert_of(client)], 0.0)
    assert type(server.ended) is ProtocolViolation


async def test_a_changed_byte_on_a_live_link_ends_it() -> None:
    async with opened() as scope:
        outcome = await shake(BOTH, BOTH, scope)
        a, b = streams(outcome, scope)
        await a.send(b"hello")
        assert await receive_exactly(b, 5) == b"hello"
        driver = outcome.client.driver
        assert isinstance(driver, MemoryDriver)
        await driver.write(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ConnectionLost) as raised:
            await b.receive()
        assert isinstance(raised.value.__cause__, LinkLost)
        assert isinstance(raised.value.__cause__.__cause__, ProtocolViolation)


# --- by files ---


@dataclass(frozen=True)
class Files:
    ca: Path
    certificate: Path
    key: Path
    both: Path


@pytest.fixture
def files(tmp_path: Path) -> Files:
    made = Files(*(tmp_path / name for name in ("ca.pem", "certificate.pem", "key.pem", "both.pem")))
    issued = CA.issue_cert(NAME)
    CA.cert_pem.write_to_path(made.ca)
    issued.cert_chain_pems[0].write_to_path(made.certificate)
    issued.private_key_pem.write_to_path(made.key)
    issued.private_key_and_cert_chain_pem.write_to_path(made.both)
    return made


@pytest.mark.parametrize("is_mutual", [False, True])
async def test_files_stand_for_the_contexts_made_of_them(files: Files, is_mutual: bool) -> None:
    def made() -> Tls:
        return Tls(
            client=TlsClient(ca=files.ca, certificate=files.both if is_mutual else None),
            server=TlsServer(certificate=files.certificate, key=files.key, client_ca=files.ca if is_mutual else None),
            server_hostname=NAME,
        )

    assert made() == made()
    assert hash(made()) == hash(made())
    async with opened() as scope:
        outcome = await shake(made(), made(), scope)
    assert isinstance(outcome.client.peer_identity, PeerCertificate)
    assert outcome.client.peer_identity.names == (NAME,)
    assert isinstance(outcome.server.peer_identity, PeerCertificate) is is_mutual


async def test_a_server_that_asks_for_certificates_refuses_who_has_none(files: Files) -> None:
    client = Tls(client=TlsClient(ca=files.ca), server_hostname=NAME)
    server = Tls(server=TlsServer(certificate=files.both, client_ca=files.ca))
    async with opened() as scope:
        outcome = await shake(client, server, scope)
    assert isinstance(outcome.server_error, HandshakeFailed)


@pytest.mark.parametrize(
    ("cls", "names", "message"),
    [
        (TlsClient, {"ca": "none.pem"}, "none.pem: cannot be read: No such file or directory"),
        (TlsClient, {"ca": "key.pem"}, "key.pem: holds no certificates in PEM"),
        (TlsClient, {"key": "key.pem"}, "key.pem: a key is of no use without its certificate"),
        (TlsClient, {"certificate": "certificate.pem"}, "certificate.pem: are no certificate and its private key"),
        (TlsServer, {"certificate": "none.pem"}, "none.pem: cannot be read"),
        (TlsServer, {"certificate": "certificate.pem", "key": "none.pem"}, "none.pem: cannot be read"),
        (TlsServer, {"certificate": "ca.pem", "key": "key.pem"}, "ca.pem and .*key.pem: are no certificate and"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(
    files: Files, cls: type[TlsClient] | type[TlsServer], names: dict[str, str], message: str
) -> None:
    made = cls(**{option: files.ca.with_name(name) for option, name in names.items()})
    with pytest.raises(KeyFileError, match=message):
        made.context()


def test_an_encrypted_private_key_does_not_ask_at_the_terminal(files: Files) -> None:
    key = load_pem_private_key(files.key.read_bytes(), None)
    assert isinstance(key, EllipticCurvePrivateKey)  # and can be written
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"never shown")))
    with pytest.raises(KeyFileError, match="the key is encrypted: give Tls an"):
        Tls(server=TlsServer(certificate=files.certificate, key=files.key))
