"""One end of a link that speaks RSM/1 by hand: for tests that send what no honest end would.

It stands directly on Framing, so the other end's stack must be ``Resume, …, Framing`` without an encryption. It has no
state but what it is told, answers pings, and checks nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import anyio
from anyio.abc import ObjectReceiveStream

from towline.endpoint import Endpoint
from towline.layers.framing import FramingStage
from towline.layers.heartbeat import PING, PONG
from towline.layers.resume._proof import client_proof, server_proof
from towline.layers.resume._wire import (
    Challenge,
    Hello,
    Message,
    NewSession,
    Proof,
    Reject,
    Resumed,
    decode,
)
from towline.link import Link
from towline.service import Dial
from towline.stage import Batch, Driver
from towline.transport import Transport

__all__ = ["RawPeer", "RawSession", "raw_listener"]


@dataclass
class RawSession:
    """What a client knows of its session."""

    id: bytes
    key: bytes
    epoch: int = 1
    instance: bytes = b"I" * 16
    recv: int = 0
    next: int = 1
    credit: int = 8 << 20
    max_message: int = 4 << 20


class RawPeer:
    """Sends and receives control frames as values, and data frames as bytes."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._stage = FramingStage(16 << 20)
        self._stage.established()
        self._waiting: deque[Message | bytes] = deque()

    @classmethod
    async def dial(cls, transport: Transport, endpoint: str) -> RawPeer:
        """Connect to a server."""
        return cls((await transport(Dial(Endpoint.parse(endpoint)))).driver)

    async def send(self, *notes: Message, frames: Sequence[bytes] = ()) -> None:
        """One write: control frames, then data frames."""
        await self.send_raw(b"".join(self._stage.outgoing([Batch([note.encode() for note in notes], frames)], 0.0)))

    async def send_raw(self, data: bytes) -> None:
        """These bytes, whatever they are."""
        await self.driver.write(data)

    async def receive(self) -> Message | bytes:
        """The next control frame, or the next data frame as bytes. Pings are answered and passed over.

        Raises:
            EndOfStream: if the other end ended its direction.
            LinkLost: if it cut the link.
        """
        while not self._waiting:
            data = await self.driver.read()
            if not data:
                raise anyio.EndOfStream
            for batch in self._stage.incoming([data], 0.0):
                for note in batch.notes:
                    if note[0] == PING:
                        pong = bytes([PONG]) + note[1:]
                        await self.send_raw(b"".join(self._stage.outgoing([Batch([pong])], 0.0)))
                    elif note[0] != PONG:
                        self._waiting.append(decode(note))
                self._waiting.extend(batch.frames)
        return self._waiting.popleft()

    async def receive_all(self) -> list[Message | bytes]:
        """All that arrives until the other end has nothing more to say, or has ended; in no time to speak of."""
        got: list[Message | bytes] = []
        with contextlib.suppress(anyio.EndOfStream), anyio.move_on_after(1e-6):
            while True:
                got.append(await self.receive())
        return got

    # --- as a client -----------------------------------------------------------------------------------------------

    async def new(self, *, instance: bytes = b"I" * 16, credit: int = 8 << 20) -> RawSession:
        """Ask for a new session. It is not confirmed: send an ACK to have its handler run."""
        await self.send(Hello(instance=instance, nonce=os.urandom(16), credit=credit, max_message=4 << 20))
        answer = await self.receive()
        assert isinstance(answer, NewSession), answer
        return RawSession(answer.session_id, answer.key, instance=instance, credit=credit)

    async def resume(self, session: RawSession, *, key: bytes | None = None) -> Resumed | Reject:
        """Ask to resume, with a proof by the session's key or another one, and return the answer."""
        hello = Hello(
            instance=session.instance,
            nonce=os.urandom(16),
            credit=session.credit,
            max_message=session.max_message,
            session_id=session.id,
            epoch=session.epoch,
            recv=session.recv,
            next=session.next,
        )
        await self.send(hello)
        challenge = await self.receive()
        assert isinstance(challenge, Challenge), challenge
        context = hello.nonce + challenge.nonce
        await self.send(Proof(client_proof(key or session.key, context, hello.body())))
        answer = await self.receive()
        assert isinstance(answer, Resumed | Reject), answer
        return answer

    # --- as a server -----------------------------------------------------------------------------------------------

    async def accept_new(
        self, *, ttl: float = 300.0, credit: int = 8 << 20, session: RawSession | None = None
    ) -> RawSession:
        """Answer a HELLO for a new session."""
        hello = await self.receive()
        assert isinstance(hello, Hello), hello
        assert hello.session_id is None
        session = session or RawSession(os.urandom(16), os.urandom(32))
        await self.send(NewSession(b"S" * 16, session.id, session.key, round(ttl * 1000), credit, 4 << 20))
        return session

    async def challenged(self, session: RawSession) -> tuple[Hello, bytes]:
        """Take a HELLO that resumes, challenge it, and check its proof. Gives the HELLO and the proof's context."""
        hello = await self.receive()
        assert isinstance(hello, Hello), hello
        assert hello.session_id == session.id
        challenge = Challenge(b"S" * 16, os.urandom(16))
        await self.send(challenge)
        proof = await self.receive()
        assert isinstance(proof, Proof), proof
        context = hello.nonce + challenge.nonce
        assert proof.mac == client_proof(session.key, context, hello.body())
        return hello, context

    async def accept_resume(self, session: RawSession, *, ttl: float = 300.0) -> Hello:
        """Let a client resume. ``session.recv`` and ``session.next`` are what this server says of itself."""
        hello, context = await self.challenged(session)
        answer = Resumed(
            hello.epoch, session.recv, session.next, round(ttl * 1000), session.credit, session.max_message
        )
        mac = server_proof(session.key, context, hello.body(), answer.body())
        await self.send(replace(answer, mac=mac))
        return hello


@asynccontextmanager
async def raw_listener(transport: Transport, endpoint: str) -> AsyncGenerator[ObjectReceiveStream[RawPeer]]:
    """Listen on an endpoint: gives a stream of the connections that clients make."""
    give, take = anyio.create_memory_object_stream[RawPeer](1000)

    def accepted(link: Link) -> None:
        give.send_nowait(RawPeer(link.driver))

    listener = await transport.listen(Endpoint.parse(endpoint))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, accepted)
        try:
            yield take
        finally:
            await listener.aclose()
            give.close()
            take.close()
            tasks.cancel_scope.cancel()
