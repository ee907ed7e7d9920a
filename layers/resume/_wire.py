"""RSM/1 on the wire: every control frame that Resume speaks, as a value, to bytes and back.

Rule 1: a layout is written here and nowhere else. ``docs/protocol.md`` says the same in prose.
Rule 2: reading never trusts: a field that is short, long or out of range is a `ProtocolViolation`.

All integers are big-endian. Numbers of messages, credit and epochs are u64, absolute and cumulative, so a control frame
that is lost, repeated or late does no harm. HELLO, NEW_SESSION and RESUMED end in extensions, each a u8 type, a u16
length and that many bytes; one that is not known is passed over.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import ClassVar, Final, TypeVar

from towline.errors import ProtocolViolation

__all__ = [
    "VERSION",
    "Abort",
    "AbortCode",
    "Ack",
    "BatchHead",
    "Challenge",
    "Closed",
    "Fin",
    "GoAway",
    "Hello",
    "Message",
    "NewSession",
    "Proof",
    "Reject",
    "RejectCode",
    "Resumed",
    "Superseded",
    "Type",
    "decode",
]

MAGIC: Final = b"RSM"
VERSION: Final = 1
ID_SIZE: Final = 16
KEY_SIZE: Final = 32
MAC_SIZE: Final = 32


class Type(enum.IntEnum):
    """The first byte of a control frame. Heartbeat has 0x20 and 0x21."""

    HELLO = 0x01
    CHALLENGE = 0x02
    PROOF = 0x03
    NEW_SESSION = 0x04
    RESUMED = 0x05
    REJECT = 0x06
    BATCH = 0x10
    ACK = 0x11
    FIN = 0x12
    CLOSED = 0x13
    GOAWAY = 0x31
    SUPERSEDED = 0x32
    ABORT = 0x3F


class RejectCode(enum.IntEnum):
    """Why a server does not let a connection in."""

    UNSUPPORTED_VERSION = 1
    AUTH_FAILED = 2
    UNKNOWN_SESSION = 3
    SESSION_EXPIRED = 4
    SESSION_CLOSED = 5
    SESSION_ABORTED = 6
    SESSION_EVICTED = 7
    SESSION_REVOKED = 8
    STALE_EPOCH = 9
    STATE_MISMATCH = 10
    RETRY_LATER = 11
    LIMIT = 12


class AbortCode(enum.IntEnum):
    """Why a session is ended at once."""

    CANCELLED = 1
    INTERNAL = 2
    UNREAD = 3
    GOING_AWAY = 4
    STATE_MISMATCH = 5
    ACK_BEYOND_SENT = 6
    REVOKED = 7
    PROTOCOL = 8


_HELLO: Final = struct.Struct(f">3sBBIB{ID_SIZE}s{ID_SIZE}sQI")
_RESUME: Final = struct.Struct(f">{ID_SIZE}sQQQ")
_CHALLENGE: Final = struct.Struct(f">BI{ID_SIZE}s{ID_SIZE}s")
_NEW_SESSION: Final = struct.Struct(f">BI{ID_SIZE}s{ID_SIZE}s{KEY_SIZE}sIQI")
_RESUMED: Final = struct.Struct(">QQQIQI")
_REJECT: Final = struct.Struct(">BIBQ")
_BATCH: Final = struct.Struct(">BQQQB")
_ACK: Final = struct.Struct(">BQQB")
_FIN: Final = struct.Struct(">BQ")
_CLOSED: Final = struct.Struct(">BQ")
_GOAWAY: Final = struct.Struct(">BIB")
_ABORT: Final = struct.Struct(">BBBQ")

_FLAG_ACK_REQUEST: Final = 0x01


def _unpack(layout: struct.Struct, note: bytes, name: str, *, extensible: bool = False) -> tuple[bytes, ...]:
    """Read a body; the fields come back as they are in the struct."""
    body = note[1:]
    if len(body) != layout.size and not (extensible and len(body) > layout.size):
        raise ProtocolViolation(f"{name} has {len(body)} bytes, where {layout.size} are needed")
    return layout.unpack_from(body)


def _check_extensions(data: bytes, name: str) -> None:
    """Walk over the extensions; this version knows none, and passes over all."""
    position = 0
    while position < len(data):
        if len(data) - position < 3:
            raise ProtocolViolation(f"{name} ends inside an extension")
        position += 3 + int.from_bytes(data[position + 1 : position + 3], "big")
    if position > len(data):
        raise ProtocolViolation(f"{name} ends inside an extension")


@dataclass(frozen=True, slots=True)
class Hello:
    """Client: a new session, or this one again.

    The MAC is there when the connection gives a binding: it proves the session's secret in the first message (D20).
    """

    type: ClassVar[Type] = Type.HELLO

    instance: bytes
    nonce: bytes
    credit: int
    max_message: int
    session_id: bytes | None = None  # None: a new session
    epoch: int = 0
    recv: int = 0
    next: int = 1
    ver_min: int = VERSION
    ver_max: int = VERSION
    features: int = 0
    extensions: bytes = b""
    mac: bytes = b""

    def body(self) -> bytes:
        """All but the MAC: what the MAC protects."""
        resuming = self.session_id is not None
        mode = (1 if resuming else 0) | (2 if self.mac else 0)
        head = _HELLO.pack(
            MAGIC,
            self.ver_min,
            self.ver_max,
            self.features,
            mode,
            self.instance,
            self.nonce,
            self.credit,
            self.max_message,
        )
        tail = _RESUME.pack(self.session_id, self.epoch, self.recv, self.next) if self.session_id is not None else b""
        return bytes([self.type]) + head + tail + self.extensions

    def encode(self) -> bytes:
        return self.body() + self.mac

    @classmethod
    def decode(cls, note: bytes) -> Hello:
        if len(note) < 1 + _HELLO.size:
            raise ProtocolViolation(f"HELLO has {len(note)} bytes, where {1 + _HELLO.size} are needed at least")
        fields = _HELLO.unpack_from(note, 1)
        magic, ver_min, ver_max, features, mode, instance, nonce, credit, max_message = fields
        if magic != MAGIC:
            raise ProtocolViolation("HELLO of another protocol")
        if mode > 3:
            raise ProtocolViolation(f"HELLO has mode {mode}, where 0 to 3 are known")
        rest = note[1 + _HELLO.size :]
        mac = b""
        if mode & 2:
            if len(rest) < MAC_SIZE:
                raise ProtocolViolation("HELLO ends inside its proof")
            rest, mac = rest[:-MAC_SIZE], rest[-MAC_SIZE:]
        session_id, epoch, recv, next_ = None, 0, 0, 1
        if mode & 1:
            if len(rest) < _RESUME.size:
                raise ProtocolViolation("HELLO ends inside the state of its session")
            session_id, epoch, recv, next_ = _RESUME.unpack_from(rest)
            rest = rest[_RESUME.size :]
        _check_extensions(rest, "HELLO")
        return cls(
            instance=instance,
            nonce=nonce,
            credit=credit,
            max_message=max_message,
            session_id=session_id,
            epoch=epoch,
            recv=recv,
            next=next_,
            ver_min=ver_min,
            ver_max=ver_max,
            features=features,
            extensions=rest,
            mac=mac,
        )


@dataclass(frozen=True, slots=True)
class Challenge:
    """Server: prove that you hold the session's secret. Only where the connection gives no binding."""

    type: ClassVar[Type] = Type.CHALLENGE

    instance: bytes
    nonce: bytes
    version: int = VERSION
    features: int = 0

    def encode(self) -> bytes:
        return bytes([self.type]) + _CHALLENGE.pack(self.version, self.features, self.instance, self.nonce)

    @classmethod
    def decode(cls, note: bytes) -> Challenge:
        version, features, instance, nonce = _unpack(_CHALLENGE, note, "CHALLENGE")
        return cls(instance, nonce, version, features)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Proof:
    """Client: the answer to a challenge."""

    type: ClassVar[Type] = Type.PROOF

    mac: bytes

    def encode(self) -> bytes:
        return bytes([self.type]) + self.mac

    @classmethod
    def decode(cls, note: bytes) -> Proof:
        if len(note) != 1 + MAC_SIZE:
            raise ProtocolViolation(f"PROOF has {len(note) - 1} bytes, where {MAC_SIZE} are needed")
        return cls(note[1:])


@dataclass(frozen=True, slots=True)
class NewSession:
    """Server: the session you asked for, and the secret that resumes it."""

    type: ClassVar[Type] = Type.NEW_SESSION

    instance: bytes
    session_id: bytes
    key: bytes
    ttl_ms: int
    credit: int
    max_message: int
    version: int = VERSION
    features: int = 0
    extensions: bytes = b""

    def __repr__(self) -> str:  # the key is a secret
        return f"NewSession(ttl_ms={self.ttl_ms}, credit={self.credit}, max_message={self.max_message})"

    def encode(self) -> bytes:
        return (
            bytes([self.type])
            + _NEW_SESSION.pack(
                self.version,
                self.features,
                self.instance,
                self.session_id,
                self.key,
                self.ttl_ms,
                self.credit,
                self.max_message,
            )
            + self.extensions
        )

    @classmethod
    def decode(cls, note: bytes) -> NewSession:
        version, features, instance, session_id, key, ttl_ms, credit, max_message = _unpack(
            _NEW_SESSION, note, "NEW_SESSION", extensible=True
        )
        extensions = note[1 + _NEW_SESSION.size :]
        _check_extensions(extensions, "NEW_SESSION")
        return cls(
            instance=instance,
            session_id=session_id,
            key=key,
            ttl_ms=ttl_ms,  # type: ignore[arg-type]
            credit=credit,  # type: ignore[arg-type]
            max_message=max_message,  # type: ignore[arg-type]
            version=version,  # type: ignore[arg-type]
            features=features,  # type: ignore[arg-type]
            extensions=extensions,
        )


@dataclass(frozen=True, slots=True)
class Resumed:
    """Server: your session goes on; this is where I stand."""

    type: ClassVar[Type] = Type.RESUMED

    epoch: int
    recv: int
    next: int
    ttl_ms: int
    credit: int
    max_message: int
    mac: bytes = b""
    extensions: bytes = b""

    def body(self) -> bytes:
        """All but the MAC: what the MAC protects."""
        return (
            bytes([self.type])
            + _RESUMED.pack(self.epoch, self.recv, self.next, self.ttl_ms, self.credit, self.max_message)
            + self.extensions
        )

    def encode(self) -> bytes:
        return self.body() + self.mac

    @classmethod
    def decode(cls, note: bytes) -> Resumed:
        if len(note) < 1 + _RESUMED.size + MAC_SIZE:
            raise ProtocolViolation(
                f"RESUMED has {len(note)} bytes, where {1 + _RESUMED.size + MAC_SIZE} are needed at least"
            )
        epoch, recv, next_, ttl_ms, credit, max_message = _RESUMED.unpack_from(note, 1)
        extensions = note[1 + _RESUMED.size : -MAC_SIZE]
        _check_extensions(extensions, "RESUMED")
        return cls(epoch, recv, next_, ttl_ms, credit, max_message, note[-MAC_SIZE:], extensions)


@dataclass(frozen=True, slots=True)
class Reject:
    """Server: no. With the session's MAC when it speaks of a session whose secret was proved."""

    type: ClassVar[Type] = Type.REJECT

    code: RejectCode
    retry_after_ms: int = 0
    recv_final: int | None = None
    mac: bytes = b""

    def body(self) -> bytes:
        """All but the MAC: what the MAC protects."""
        flags = (1 if self.recv_final is not None else 0) | (2 if self.mac else 0)
        return bytes([self.type]) + _REJECT.pack(self.code, self.retry_after_ms, flags, self.recv_final or 0)

    def encode(self) -> bytes:
        return self.body() + self.mac

    @classmethod
    def decode(cls, note: bytes) -> Reject:
        if len(note) < 1 + _REJECT.size:
            raise ProtocolViolation(f"REJECT has {len(note)} bytes, where {1 + _REJECT.size} are needed")
        code, retry_after_ms, flags, recv_final = _REJECT.unpack_from(note, 1)
        mac = note[1 + _REJECT.size :]
        if len(mac) != (MAC_SIZE if flags & 2 else 0):
            raise ProtocolViolation(f"REJECT has a proof of {len(mac)} bytes")
        return cls(_code(RejectCode, code, "REJECT"), retry_after_ms, recv_final if flags & 1 else None, mac)


@dataclass(frozen=True, slots=True)
class BatchHead:
    """Either: the data frames that follow are numbered from ``first``. Carries an ack, since it travels anyway."""

    type: ClassVar[Type] = Type.BATCH

    first: int
    recv: int
    credit: int
    ack_request: bool = False

    def encode(self) -> bytes:
        return _BATCH.pack(self.type, self.first, self.recv, self.credit, _FLAG_ACK_REQUEST if self.ack_request else 0)

    @classmethod
    def decode(cls, note: bytes) -> BatchHead:
        if len(note) != _BATCH.size:
            raise ProtocolViolation(f"BATCH has {len(note)} bytes, where {_BATCH.size} are needed")
        _, first, recv, credit, flags = _BATCH.unpack(note)
        return cls(first, recv, credit, bool(flags & _FLAG_ACK_REQUEST))


@dataclass(frozen=True, slots=True)
class Ack:
    """Either: I have all up to ``recv``; you may send messages up to this much cost in all."""

    type: ClassVar[Type] = Type.ACK

    recv: int
    credit: int
    ack_request: bool = False

    def encode(self) -> bytes:
        return _ACK.pack(self.type, self.recv, self.credit, _FLAG_ACK_REQUEST if self.ack_request else 0)

    @classmethod
    def decode(cls, note: bytes) -> Ack:
        if len(note) != _ACK.size:
            raise ProtocolViolation(f"ACK has {len(note)} bytes, where {_ACK.size} are needed")
        _, recv, credit, flags = _ACK.unpack(note)
        return cls(recv, credit, bool(flags & _FLAG_ACK_REQUEST))


@dataclass(frozen=True, slots=True)
class Fin:
    """Either: nothing comes after the message before this number. It has a number itself, and is acked like one."""

    type: ClassVar[Type] = Type.FIN

    number: int

    def encode(self) -> bytes:
        return _FIN.pack(self.type, self.number)

    @classmethod
    def decode(cls, note: bytes) -> Fin:
        if len(note) != _FIN.size:
            raise ProtocolViolation(f"FIN has {len(note)} bytes, where {_FIN.size} are needed")
        return cls(_FIN.unpack(note)[1])


@dataclass(frozen=True, slots=True)
class Closed:
    """Server: both ends have everything; the session is over."""

    type: ClassVar[Type] = Type.CLOSED

    recv_final: int

    def encode(self) -> bytes:
        return _CLOSED.pack(self.type, self.recv_final)

    @classmethod
    def decode(cls, note: bytes) -> Closed:
        if len(note) != _CLOSED.size:
            raise ProtocolViolation(f"CLOSED has {len(note)} bytes, where {_CLOSED.size} are needed")
        return cls(_CLOSED.unpack(note)[1])


@dataclass(frozen=True, slots=True)
class GoAway:
    """Server: I shut down in so many milliseconds; finish, and start nothing new."""

    type: ClassVar[Type] = Type.GOAWAY

    deadline_ms: int
    final: bool = True

    def encode(self) -> bytes:
        return _GOAWAY.pack(self.type, self.deadline_ms, self.final)

    @classmethod
    def decode(cls, note: bytes) -> GoAway:
        if len(note) != _GOAWAY.size:
            raise ProtocolViolation(f"GOAWAY has {len(note)} bytes, where {_GOAWAY.size} are needed")
        _, deadline_ms, final = _GOAWAY.unpack(note)
        return cls(deadline_ms, bool(final))


@dataclass(frozen=True, slots=True)
class Superseded:
    """Server: another connection has taken this session over; made by this client instance."""

    type: ClassVar[Type] = Type.SUPERSEDED

    instance: bytes

    def encode(self) -> bytes:
        return bytes([self.type]) + self.instance

    @classmethod
    def decode(cls, note: bytes) -> Superseded:
        if len(note) != 1 + ID_SIZE:
            raise ProtocolViolation(f"SUPERSEDED has {len(note) - 1} bytes, where {ID_SIZE} are needed")
        return cls(note[1:])


@dataclass(frozen=True, slots=True)
class Abort:
    """Either: the session is over at once. ``consumed_upto``: what its application had read by then, if known."""

    type: ClassVar[Type] = Type.ABORT

    code: AbortCode
    consumed_upto: int | None = None

    def encode(self) -> bytes:
        known = self.consumed_upto is not None
        return _ABORT.pack(self.type, self.code, known, self.consumed_upto or 0)

    @classmethod
    def decode(cls, note: bytes) -> Abort:
        if len(note) != _ABORT.size:
            raise ProtocolViolation(f"ABORT has {len(note)} bytes, where {_ABORT.size} are needed")
        _, code, known, consumed = _ABORT.unpack(note)
        return cls(_code(AbortCode, code, "ABORT"), consumed if known else None)


Code = TypeVar("Code", bound=enum.IntEnum)


def _code(codes: type[Code], value: int, name: str) -> Code:
    try:
        return codes(value)
    except ValueError:
        raise ProtocolViolation(f"{name} has code {value}, which is not known") from None


Message = (
    Hello
    | Challenge
    | Proof
    | NewSession
    | Resumed
    | Reject
    | BatchHead
    | Ack
    | Fin
    | Closed
    | GoAway
    | Superseded
    | Abort
)

_CLASSES: Final[dict[int, type[Message]]] = {
    cls.type: cls
    for cls in (
        Hello,
        Challenge,
        Proof,
        NewSession,
        Resumed,
        Reject,
        BatchHead,
        Ack,
        Fin,
        Closed,
        GoAway,
        Superseded,
        Abort,
    )
}


def decode(note: bytes) -> Message:
    """Read a control frame.

    Raises:
        ProtocolViolation: if its type is not known here, or its body is malformed.

    >>> decode(Fin(7).encode())
    Fin(number=7)
    """
    cls = _CLASSES.get(note[0])
    if cls is None:
        raise ProtocolViolation(f"a control frame of unknown type 0x{note[0]:02x}")
    return cls.decode(note)
