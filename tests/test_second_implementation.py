"""Another implementation of the client, from ``docs/protocol.md`` alone: plain sockets, plain bytes, nothing of ours.

It speaks encryption/1 (NNpsk0), framing/1, heartbeat/1, RSM/1 and RPC/1 with a server of this package. What it cannot
do by the page, the page does not say.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import struct
from collections.abc import Generator
from contextlib import closing, contextmanager
from typing import Any, Final, NamedTuple

import anyio.from_thread
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from towline import Encryption, Framing, Heartbeat, Psk, Request, Response, Resume, Router, Rpc, Stack
from towline.layers import Session

pytestmark = pytest.mark.real_time

KEY: Final = bytes(range(32))
PATIENCE: Final = 20.0


# --- encryption/1 ---------------------------------------------------------------------------------------------------


def hkdf(chaining_key: bytes, material: bytes, count: int) -> list[bytes]:
    temporary = hmac.digest(chaining_key, material, "sha256")
    outputs = [b""]
    for number in range(1, count + 1):
        outputs.append(hmac.digest(temporary, outputs[-1] + bytes([number]), "sha256"))
    return outputs[1:]


class Cipher:
    def __init__(self, key: bytes) -> None:
        self.aead, self.count = ChaCha20Poly1305(key), 0

    def nonce(self) -> bytes:
        self.count += 1
        return struct.pack("<4xQ", self.count - 1)

    def seal(self, data: bytes, associated: bytes) -> bytes:
        return self.aead.encrypt(self.nonce(), data, associated)

    def open(self, data: bytes, associated: bytes) -> bytes:
        return self.aead.decrypt(self.nonce(), data, associated)


class Wire:
    """One link: records outside, frames inside."""

    def __init__(self, port: int, layers: str) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        above = hashlib.sha256(layers.replace(" ", "\n").encode()).digest()[:8]
        preamble = b"\xd7TOWLINE" + struct.pack(">BBHHH", 1, 0, 1, 1, 48) + above
        name = b"Noise_NNpsk0_25519_ChaChaPoly_SHA256"
        self.hash = self.chaining = hashlib.sha256(name).digest()
        self.mix_hash(preamble + struct.pack(">Q", 1 << 16))
        # -> psk, e
        self.chaining, mixed, key = hkdf(self.chaining, KEY, 3)
        self.mix_hash(mixed)
        ours = X25519PrivateKey.generate()
        public = ours.public_key().public_bytes_raw()
        self.mix_hash(public)
        self.chaining, key = hkdf(self.chaining, public, 2)
        tag = Cipher(key).seal(b"", self.hash)
        self.mix_hash(tag)
        self.socket.sendall(preamble + public + tag)
        # <- e, ee
        (length,) = struct.unpack(">H", self.exactly(2))
        assert length == 48, "refused" if length == 0 else length
        theirs = self.exactly(32)
        self.mix_hash(theirs)
        self.chaining, key = hkdf(self.chaining, theirs, 2)
        self.chaining, key = hkdf(self.chaining, ours.exchange(X25519PublicKey.from_public_bytes(theirs)), 2)
        tag = self.exactly(16)
        assert Cipher(key).open(tag, self.hash) == b""
        self.mix_hash(tag)
        sends, receives, third = hkdf(self.chaining, b"", 3)
        self.sends, self.receives = Cipher(sends), Cipher(receives)
        # One block of HKDF-Expand is enough for 32 bytes.
        self.binding = hmac.digest(third, b"rsm1 binding" + self.hash + b"\x01", "sha256")
        self.bytes = b""
        self.record(b"\x01")

    def mix_hash(self, data: bytes) -> None:
        self.hash = hashlib.sha256(self.hash + data).digest()

    def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the link ended"
            data += more
        return data

    def record(self, plaintext: bytes) -> None:
        header = struct.pack(">H", len(plaintext) + 16)
        self.socket.sendall(header + self.sends.seal(plaintext, header))

    def send(self, *frames: bytes | tuple[bytes]) -> None:
        """Frames; a control frame as a tuple of one."""
        data = b""
        for frame in frames:
            content, bit = (frame[0], 1 << 31) if isinstance(frame, tuple) else (frame, 0)
            data += struct.pack(">I", len(content) | bit) + content
        self.record(b"\x01" + data)

    def receive(self) -> tuple[bool, bytes]:
        """The next frame, and whether it is a control frame. Answers pings on the way."""
        while True:
            is_control, frame = self.next()
            if not (is_control and frame[0] == 0x20):
                return is_control, frame
            self.send((b"\x21" + frame[1:],))

    def next(self) -> tuple[bool, bytes]:
        while True:
            if len(self.bytes) >= 4:
                (head,) = struct.unpack(">I", self.bytes[:4])
                length = head & ~(1 << 31)
                if len(self.bytes) >= 4 + length:
                    frame, self.bytes = self.bytes[4 : 4 + length], self.bytes[4 + length :]
                    return head >> 31 == 1, frame
            header = self.exactly(2)
            plaintext = self.receives.open(self.exactly(struct.unpack(">H", header)[0]), header)
            assert plaintext[0] == 1, "CLOSE"
            self.bytes += plaintext[1:]

    def close(self) -> None:
        self.socket.close()

    def cut(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


# --- RSM/1 ----------------------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What NEW_SESSION says."""

    session: bytes
    key: bytes


class Client:
    """A session: what it has sent and received, by number."""

    def __init__(self, port: int, layers: str) -> None:
        self.port, self.layers = port, layers
        self.instance = bytes(range(16))
        self.recv, self.sent, self.epoch, self.acked = 0, list[bytes](), 1, 0
        self.received: list[bytes] = []
        self.consumed = 0
        self.peer_fin = False
        self.closed: int | None = None
        self.wire = Wire(port, layers)
        self.wire.send((self.hello(mode=0),))
        is_control, answer = self.wire.receive()
        assert is_control
        assert answer[0] == 0x04
        _, _, _, session, key, *_ = struct.unpack(">BI16s16s32sIQI", answer[1:86])
        self.given = Given(session, key)
        self.acknowledge()

    @property
    def credit(self) -> int:
        return self.consumed + (1 << 20)

    def hello(self, *, mode: int) -> bytes:
        nonce = bytes(16)
        return b"\x01" + struct.pack(">3sBBIB16s16sQI", b"RSM", 1, 1, 0, mode, self.instance, nonce, self.credit, 65536)

    def acknowledge(self) -> None:
        self.wire.send((struct.pack(">BQQB", 0x11, self.recv, self.credit, 0),))

    def send(self, *messages: bytes) -> None:
        first = len(self.sent) + 1
        self.sent += messages
        head = struct.pack(">BQQQB", 0x10, first, self.recv, self.credit, 1)
        self.wire.send((head,), *messages)

    def resume(self) -> None:
        """On a new link: prove the session, check the server's proof, and send again what it has not."""
        self.epoch += 1
        self.wire = wire = Wire(self.port, self.layers)
        body = self.hello(mode=3) + struct.pack(
            ">16sQQQ", self.given.session, self.epoch, self.recv, len(self.sent) + 1
        )
        proof = hmac.digest(self.given.key, b"rsm1 c" + wire.binding + body, "sha256")
        wire.send((body + proof,))
        is_control, answer = wire.receive()
        assert is_control
        assert answer[0] == 0x05, answer.hex()
        said, mac = answer[:-32], answer[-32:]
        assert mac == hmac.digest(self.given.key, b"rsm1 s" + wire.binding + body + said, "sha256")
        epoch, recv, _, _, _, _ = struct.unpack(">QQQIQI", said[1:41])
        assert epoch == self.epoch
        self.acked = recv
        missing = self.sent[recv:]
        head = struct.pack(">BQQQB", 0x10, recv + 1, self.recv, self.credit, 0)
        wire.send((head,), *missing) if missing else self.acknowledge()

    def take(self, count: int) -> list[bytes]:
        """Receive until there are so many messages in all."""
        expected = 0
        while len(self.received) < count and self.closed is None:
            is_control, frame = self.wire.receive()
            if is_control:
                expected = self.control(frame) or expected
                continue
            if expected == self.recv + 1:
                self.recv += 1
                self.received.append(frame)
                self.consumed += len(frame) + 128
            expected += 1
        return self.received

    def control(self, frame: bytes) -> int | None:
        """Take a control frame; of a BATCH, the number of the data frame that comes next."""
        first: int | None
        if frame[0] == 0x10:
            _, first, recv, _, flags = struct.unpack(">BQQQB", frame)
        elif frame[0] == 0x11:
            (_, recv, _, flags), first = struct.unpack(">BQQB", frame), None
        elif frame[0] == 0x12:
            assert struct.unpack(">BQ", frame)[1] == self.recv + 1
            self.recv, self.peer_fin = self.recv + 1, True
            self.acknowledge()
            return None
        else:
            assert frame[0] == 0x13, frame.hex()
            self.closed = struct.unpack(">BQ", frame)[1]
            return None
        self.acked = max(self.acked, recv)
        if flags & 1:
            self.acknowledge()
        return first

    def close(self) -> None:
        self.wire.close()

    def end(self) -> None:
        """End our direction, and wait until the server says that all has arrived, both ways."""
        fin = len(self.sent) + 1
        self.wire.send((struct.pack(">BQ", 0x12, fin),))
        while self.closed is None:
            is_control, frame = self.wire.receive()
            assert is_control
            self.control(frame)
        assert self.closed == fin
        assert self.peer_fin


# --- with a server of this package ----------------------------------------------------------------------------------


@contextmanager
def serving(stack: Stack[Any, Any, Any, Any], handler: Any) -> Generator[int]:
    with (
        anyio.from_thread.start_blocking_portal() as portal,
        portal.wrap_async_context_manager(stack.serve("tcp://127.0.0.1:0", handler)) as server,
    ):
        yield server.endpoint.port


def encryption() -> Encryption:
    return Encryption(psk=Psk(KEY))


async def shout(session: Session) -> None:
    async for message in session:
        await session.send(message.upper())


def test_messages_survive_cuts() -> None:
    stack = Stack(Resume(), Heartbeat(interval=0.05, timeout=PATIENCE), Framing(), encryption())
    with serving(stack, shout) as port, closing(Client(port, "resume/1 heartbeat/1 framing/1")) as client:
        client.send(b"one", b"two")
        assert client.take(2) == [b"ONE", b"TWO"]
        for number in range(5):
            client.send(b"before the cut %d" % number)
            client.wire.cut()  # whether it arrived, nobody can know
            client.sent.append(b"while there is no link %d" % number)
            client.resume()
        messages = client.take(12)
        assert messages == [message.upper() for message in client.sent]
        client.end()


def test_a_wrong_proof_gets_the_one_refusal() -> None:
    stack = Stack(Resume(), Framing(), encryption())
    layers = "resume/1 framing/1"
    with (
        serving(stack, shout) as port,
        closing(Client(port, layers)) as client,
        closing(Wire(port, layers)) as stranger,
    ):
        client.send(b"one")
        assert client.take(1) == [b"ONE"]
        body = client.hello(mode=3) + struct.pack(">16sQQQ", client.given.session, 9, 0, 1)
        stranger.send((body + bytes(32),))
        is_control, answer = stranger.receive()
        assert is_control
        assert answer == struct.pack(">BBIBQ", 0x06, 3, 0, 0, 0)  # UNKNOWN_SESSION
        client.send(b"two")  # and the session has not noticed
        assert client.take(2) == [b"ONE", b"TWO"]
        client.end()


def test_calls() -> None:
    router = Router()

    @router.method("greet")
    async def greet(request: Request, /) -> Response:
        return Response(b"hello, " + request.payload, {"seen": request.metadata["trace"]})

    stack = Stack(Rpc(), Resume(), Framing(), encryption())
    with serving(stack, router) as port, closing(Client(port, "rpc/1 resume/1 framing/1")) as client:
        metadata = b"\x05\x00\x01trace7"
        call = struct.pack(">BIBIBH", 2, 1, 0, 5000, 5, len(metadata)) + b"greet" + metadata + b"you"
        unknown = struct.pack(">BIBIBH", 2, 3, 0, 0xFFFFFFFF, 6, 0) + b"nobody"
        client.send(b"\x01\x01", call)
        client.wire.cut()
        client.sent.append(unknown)
        client.resume()
        hello, *answers = client.take(3)
        assert hello == b"\x01\x01"
        reply = struct.pack(">BIBH", 3, 1, 0, 8) + b"\x04\x00\x01seen7" + b"hello, you"
        assert reply in answers
        answers.remove(reply)
        (error,) = answers
        kind, number, code, flags, _, text, _ = struct.unpack(">BIBBIHH", error[:15])
        assert (kind, number, code, flags) == (4, 3, 12, 8)  # UNIMPLEMENTED, and REFUSED
        assert len(error) == 15 + text
