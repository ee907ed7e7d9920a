"""The Encryption layer: one Noise handshake per link, then records.

    client                                            server
    preamble, message 1        ------------------>    judged by size, version, suite, pattern, layers; then opened
                               <------------------    length, message 2         (or the refusal, and the end)
    its key is trusted?
    length, message 3   (XX)   ------------------>    its key is trusted?
    an empty record (NNpsk0)   ------------------>    the keys are confirmed

Either way a server's ``upgrade`` returns only when the client has shown that it has the keys of *this* connection,
so that a recorded first message, sent again, starts nothing. Fresh keys for every connection; nothing is resumed
here. Both ends have ``handshake_timeout`` seconds for all of it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, field
from typing import ClassVar, Final

import anyio

from towline.errors import HandshakeFailed, HandshakeRefused, HandshakeTimeout, LinkLost, StackError, TowlineError
from towline.hooks import Hooks, tell_handshake
from towline.link import Link
from towline.scope import Scope
from towline.service import Kind, Service, Side, Upgrade
from towline.streams import LinkByteStream
from towline.text import differing
from towline.units import Bytes, Seconds

from ._preamble import (
    MAGIC,
    PATTERNS,
    PREAMBLE_SIZE,
    REFUSAL,
    SUITES,
    VERSION,
    WIRE,
    Pattern,
    Preamble,
    hash_layers,
    layers_above,
    prologue,
)
from ._records import MAX_RECORD_SIZE, OVERHEAD, RecordStage
from .keys import Psk, StaticKeys
from .noise import HandshakeState
from .trust import KnownHosts, PeerIdentity

__all__ = ["Encryption"]

MAX_REKEY_AFTER: Final = 1 << 20
"""AES-GCM with full records is safe for 2**22 under one key."""

_LOOKS_LIKE: Final = {
    b"H": "an HTTP server",
    b"S": "an SSH server",
    b"\x15": "a TLS server",
    b"\x16": "a TLS server",
    MAGIC[:1]: "an echo of our own bytes",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Encryption(Upgrade[LinkByteStream]):
    """Layer: encrypt and authenticate everything on a link, with fresh keys for every connection.

    Needs bytes from the layer inside it, and gives bytes. Put it directly outside the transport, inside `Framing`.
    There is no plaintext mode and no choosing of ciphers on the wire: a client asks for ``suite``, a server takes
    what it allows, and nobody falls back to anything.

    Args:
        psk: the secret that both ends share (Noise NNpsk0).
        keys: or this end's key pair, and who is trusted (Noise XX; XXpsk3 if it holds a secret as well).
        suite: what this end asks for as a client: ``25519_ChaChaPoly_SHA256``, ``25519_AESGCM_SHA256`` or
            ``25519_XChaChaPoly_SHA256``.
        allowed_suites: what it takes beside ``suite`` as a server.
        rekey_after: records in each direction after which its key is replaced. Must be equal at both ends.
        max_age: seconds after which a session above should move to a new connection, and so to new keys; ``inf`` or
            None for never. Without `Resume` nothing acts on it.
        handshake_timeout: seconds for the whole handshake, whatever arrives in the meantime.
        max_record_size: the most data to put in one record. A flush is one record, so this is for tests.
        hooks: told of every handshake.

    Raises:
        StackError: unless exactly one of ``psk`` and ``keys`` is given.
        ValueError: for a suite that does not exist, or a number that makes no sense.

    >>> Encryption(psk=Psk(bytes(range(32)))).suite
    '25519_ChaChaPoly_SHA256'
    >>> Encryption()
    Traceback (most recent call last):
    ...
    towline.errors.StackError: Encryption needs psk=Psk.from_file(...) or keys=StaticKeys(...), and has neither
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.BYTES,)
    gives: ClassVar[Kind] = Kind.BYTES
    wire: ClassVar[str] = WIRE

    psk: Psk | None = None
    keys: StaticKeys | None = None
    suite: str = "25519_ChaChaPoly_SHA256"
    allowed_suites: tuple[str, ...] = ()
    rekey_after: int = 1 << 16
    max_age: Seconds | None = 3600.0
    handshake_timeout: Seconds = 5.0
    max_record_size: Bytes = MAX_RECORD_SIZE
    hooks: Hooks | None = field(default=None)

    __repr__ = differing

    def __post_init__(self) -> None:
        if (self.psk is None) == (self.keys is None):
            has = "neither" if self.psk is None else "both; for both at once: keys=StaticKeys(..., psk=...)"
            raise StackError(f"Encryption needs psk=Psk.from_file(...) or keys=StaticKeys(...), and has {has}")
        for name, suites in (("suite", (self.suite,)), ("allowed_suites", self.allowed_suites)):
            for suite in suites:
                if suite not in SUITES:
                    raise ValueError(f"{name} has {suite!r}, where {', '.join(SUITES)} will do")
        for name, value, most in (
            ("rekey_after", self.rekey_after, MAX_REKEY_AFTER),
            ("max_record_size", self.max_record_size, MAX_RECORD_SIZE),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"{name} is {value:,}, where 1 to {most:,} will do")
        for name, seconds in (("max_age", self.max_age), ("handshake_timeout", self.handshake_timeout)):
            if seconds is not None and not seconds > 0:
                raise ValueError(f"{name} is {seconds:g} s, where more than 0 is needed")

    @property
    def pattern(self) -> Pattern:
        """The handshake that the keys make."""
        if self.keys is None:
            return PATTERNS["NNpsk0"]
        return PATTERNS["XX" if self.keys.psk is None else "XXpsk3"]

    async def upgrade(self, link: Link, side: Side) -> None:
        """Do the handshake and put a ``RecordStage`` on ``link``.

        Raises:
            HandshakeRefused: as a client, if the server said no.
            HandshakeTimeout: if it took longer than ``handshake_timeout``.
            HandshakeFailed: if the other end is not who, or what, it should be; or went away, with ``ended`` set.
            KeyFileError: if it cannot be told whom to trust.
        """
        with tell_handshake(self.hooks, "Encryption", link):
            await self._upgrade(link, side)

    async def _upgrade(self, link: Link, side: Side) -> None:
        with anyio.move_on_after(self.handshake_timeout):
            try:
                await (self._dial(link) if side.is_dialling else self._accept(link))
            except LinkLost as error:
                raise HandshakeFailed(f"the link was lost during the handshake: {error}", ended=True) from error
            return
        raise HandshakeTimeout(f"the handshake was not complete after {self.handshake_timeout:g} s")

    def acceptor(self, inner: Service[Link, None], scope: Scope) -> Service[Link, None]:
        if self.keys is not None and isinstance(self.keys.trust, KnownHosts):
            raise StackError(
                "KnownHosts knows servers by their endpoint, and tells no client from another: "
                "give the listening side an AllowList"
            )
        # By name, since the class that ``slots=True`` makes is another one than ``super()`` means here.
        return Upgrade.acceptor(self, inner, scope)

    # --- the dialling side ---

    async def _dial(self, link: Link) -> None:
        pattern = self.pattern
        preamble = Preamble(
            SUITES[self.suite],
            pattern.number,
            pattern.first_message,
            hash_layers(layers_above(link.scope.wire)),
        ).pack()
        handshake = self._begin(self.suite, preamble, initiator=True)
        await link.send([preamble + handshake.write_message()])
        payload = handshake.read_message(await self._receive_reply(link, handshake))
        peer = None
        if not handshake.complete:
            # Before our own identity leaves: only who is trusted learns it.
            peer = await self._identify(link, handshake, payload)
            await link.send([_with_length(handshake.write_message())])
        stage = self._stage(handshake, refused=None if peer is None else self._refused(link))
        if peer is None:
            await link.send(stage.confirm())
        self._install(link, handshake, stage, peer)

    async def _receive_reply(self, link: Link, handshake: HandshakeState) -> bytes:
        expected = handshake.next_message_overhead
        header = b""
        while len(header) < 2:
            header += await link.receive_exactly(1)
            # What is no Towline server is found out at its first byte, and not by waiting for more.
            if not any(answer.startswith(header) for answer in (REFUSAL, expected.to_bytes(2))):
                what = _LOOKS_LIKE.get(header[:1], "something else")
                raise HandshakeFailed(
                    f"what answers at {link.endpoint} is not a Towline server with this encryption, but {what}"
                )
        if header == REFUSAL:
            raise self._refused(link)
        return await link.receive_exactly(expected)

    def _refused(self, link: Link) -> HandshakeRefused:
        above = ", ".join(layers_above(link.scope.wire)) or "none"
        key = "have another secret" if self.keys is None else "not trust our key"
        return HandshakeRefused(
            f"the server at {link.endpoint} refused, and does not say why: it may {key}, or want another suite "
            f"(here: {self.pattern.name}, {self.suite}), another rekey_after (here: {self.rekey_after:,}) or other "
            f"layers above Encryption (here: {above}); give both ends the same Stack, and look into the server's log"
        )

    # --- the listening side ---

    async def _accept(self, link: Link) -> None:
        preamble = await self._receive_preamble(link)
        # From here on the client is one of ours, so it may be told that it is refused; but not why (D9).
        try:
            handshake = self._judge(link, preamble)
            handshake.read_message(await link.receive_exactly(self.pattern.first_message))
            await link.send([_with_length(handshake.write_message())])
            peer = None if handshake.complete else await self._receive_identity(link, handshake)
            stage = self._stage(handshake)
            if peer is None:
                await self._confirm(link, stage)
        except TowlineError as error:
            if not isinstance(error, LinkLost) and not (isinstance(error, HandshakeFailed) and error.ended):
                await self._refuse(link)
            raise
        self._install(link, handshake, stage, peer)

    async def _receive_preamble(self, link: Link) -> bytes:
        # Byte by byte: whatever strays here is cut off at its first wrong byte, and gets no byte back.
        for wanted in MAGIC:
            (got,) = await link.receive_exactly(1)
            if got != wanted:
                raise HandshakeFailed(
                    f"what connects is not a Towline client with encryption: {got:#04x} came where {wanted:#04x} must"
                )
        return MAGIC + await link.receive_exactly(PREAMBLE_SIZE - len(MAGIC))

    def _judge(self, link: Link, data: bytes) -> HandshakeState:
        preamble = Preamble.parse(data)
        above = layers_above(link.scope.wire)
        pattern = self.pattern
        if (preamble.version, preamble.reserved) != (VERSION, 0):
            raise HandshakeFailed(
                f"the client speaks version {preamble.version} of this encryption, and here is version {VERSION}"
            )
        suite = next((name for name, number in SUITES.items() if number == preamble.suite), None)
        if suite is None or suite not in (self.suite, *self.allowed_suites):
            raise HandshakeFailed(
                f"the client asks for the suite {suite or preamble.suite}, and here "
                f"{' and '.join((self.suite, *self.allowed_suites))} will do"
            )
        if preamble.pattern != pattern.number:
            raise HandshakeFailed(
                f"the client has another kind of key: it asks for pattern {_pattern_name(preamble.pattern)}, and "
                f"here is {pattern.name}"
            )
        if preamble.layers != hash_layers(above):
            raise HandshakeFailed(f"the client stacks other layers above Encryption than {', '.join(above) or 'none'}")
        if preamble.message_length != pattern.first_message:
            raise HandshakeFailed(
                f"the client announced {preamble.message_length} bytes, where {pattern.first_message} must come"
            )
        return self._begin(suite, data, initiator=False)

    async def _receive_identity(self, link: Link, handshake: HandshakeState) -> PeerIdentity:
        expected = handshake.next_message_overhead
        length = int.from_bytes(await link.receive_exactly(2))
        if length != expected:
            raise HandshakeFailed(f"the client announced {length} bytes, where {expected} must come")
        payload = handshake.read_message(await link.receive_exactly(length))
        return await self._identify(link, handshake, payload)

    async def _confirm(self, link: Link, stage: RecordStage) -> None:
        stage.incoming([await link.receive_exactly(OVERHEAD)], 0.0)
        if not stage.is_confirmed:
            raise HandshakeFailed("the client did not confirm that it has the keys of this connection")

    @staticmethod
    async def _refuse(link: Link) -> None:
        # Closed, not aborted: a reset could overtake the refusal.
        with contextlib.suppress(TowlineError):
            await link.send([REFUSAL])
            await link.aclose()

    # --- both sides ---

    def _begin(self, suite: str, preamble: bytes, *, initiator: bool) -> HandshakeState:
        keys = self.keys
        psk = self.psk if keys is None else keys.psk
        return HandshakeState(
            f"Noise_{self.pattern.name}_{suite}",
            initiator,
            prologue(preamble, self.rekey_after),
            s=None if keys is None else keys.key.secret,
            psks=[] if psk is None else [psk.secret],
        )

    async def _identify(self, link: Link, handshake: HandshakeState, payload: bytes) -> PeerIdentity:
        assert self.keys is not None
        assert handshake.remote_static is not None
        try:
            return await self.keys.check(
                handshake.remote_static,
                endpoint=str(link.endpoint),
                handshake_hash=handshake.handshake_hash,
                payload=payload,
            )
        except TowlineError:
            raise
        except Exception as error:
            # Code that fails has not said yes.
            raise HandshakeFailed(f"whether to trust the peer could not be told: {type(error).__name__}") from error

    def _stage(self, handshake: HandshakeState, refused: HandshakeRefused | None = None) -> RecordStage:
        initiators, responders = handshake.split()
        send, receive = (initiators, responders) if handshake.initiator else (responders, initiators)
        return RecordStage(
            send,
            receive,
            rekey_after=self.rekey_after,
            max_record_size=self.max_record_size,
            refused=refused,
        )

    def _install(self, link: Link, handshake: HandshakeState, stage: RecordStage, peer: PeerIdentity | None) -> None:
        """All of it or nothing: there is no await in here, and none after it."""
        link.peer_identity = peer
        link.principal = None if peer is None else peer.public_key
        link.handshake_hash = handshake.handshake_hash
        link.exporter = handshake.exporter
        if self.max_age is not None and math.isfinite(self.max_age):
            link.expires = link.scope.clock() + self.max_age
        link.push(stage)


def _with_length(message: bytes) -> bytes:
    return len(message).to_bytes(2) + message


def _pattern_name(number: int) -> str:
    return next((name for name, pattern in PATTERNS.items() if pattern.number == number), str(number))
