"""RPC/1 on the wire: one frame is one message of the layer inside. See "RPC/1" in ``docs/protocol.md``.

Only bytes and their meaning: what may come when is the core's business. Integers are big-endian.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias, TypeVar

from towline.errors import ProtocolViolation

__all__ = [
    "MAX_METADATA",
    "MAX_METHOD",
    "NO_LIMIT",
    "NO_METADATA",
    "VERSION",
    "Flag",
    "Metadata",
    "Type",
    "encode_call",
    "encode_cancel",
    "encode_credit",
    "encode_data",
    "encode_end",
    "encode_error",
    "encode_goaway",
    "encode_hello",
    "encode_metadata",
    "encode_reply",
    "read",
]

T = TypeVar("T")

VERSION: Final = 1

NO_LIMIT: Final = 0xFFFFFFFF
"""Where a number of milliseconds is expected: there is none."""

MAX_METHOD: Final = 255
"""The most bytes in the name of a method."""

MAX_METADATA: Final = 0xFFFF
"""The most bytes that metadata takes, encoded."""

Metadata: TypeAlias = Mapping[str, bytes]

NO_METADATA: Final[Metadata] = {}


class Type(enum.IntEnum):
    """The first byte of a frame."""

    HELLO = 1
    CALL = 2
    REPLY = 3
    ERROR = 4
    DATA = 5
    END = 6
    CANCEL = 7
    CREDIT = 8
    GOAWAY = 9


class Flag:
    """What else is to be known of a frame. Plain numbers: an enum's ``&`` takes longer than all the rest of a frame."""

    MORE: Final = 1
    """The message is not whole: a DATA frame of the same call goes on with it."""

    STREAM: Final = 2
    """Of CALL: messages follow in both directions until the reply."""

    END: Final = 4
    """The caller sends no message after this one."""

    REFUSED: Final = 8
    """Of ERROR: the call has not begun, and will not."""


_HELLO: Final = struct.Struct(">BB")
_CALL: Final = struct.Struct(">BIBIBH")
_REPLY: Final = struct.Struct(">BIBH")
_ERROR: Final = struct.Struct(">BIBBIHH")
_DATA: Final = struct.Struct(">BIB")
_ID: Final = struct.Struct(">BI")
_CREDIT: Final = struct.Struct(">BIQ")
_KEY: Final = struct.Struct(">BH")

# What every call needs, at hand: to look up the attribute of a class costs as much as to pack a head.
_CALL_TYPE: Final = int(Type.CALL)
_REPLY_TYPE: Final = int(Type.REPLY)
_CALL_SIZE: Final = _CALL.size
_REPLY_SIZE: Final = _REPLY.size


# --- encoding -------------------------------------------------------------------------------------------------------


def encode_hello() -> bytes:
    return _HELLO.pack(Type.HELLO, VERSION)


def encode_call(id: int, flags: int, deadline_ms: int, method: bytes, metadata: bytes, payload: bytes) -> bytes:
    return _CALL.pack(_CALL_TYPE, id, flags, deadline_ms, len(method), len(metadata)) + method + metadata + payload


def encode_reply(id: int, flags: int, metadata: bytes, payload: bytes) -> bytes:
    return _REPLY.pack(_REPLY_TYPE, id, flags, len(metadata)) + metadata + payload


def encode_error(id: int, code: int, flags: int, retry_after_ms: int, message: bytes, details: bytes) -> bytes:
    return _ERROR.pack(Type.ERROR, id, code, flags, retry_after_ms, len(message), len(details)) + message + details


def encode_data(id: int, flags: int, payload: bytes) -> bytes:
    return _DATA.pack(Type.DATA, id, flags) + payload


def encode_end(id: int) -> bytes:
    return _ID.pack(Type.END, id)


def encode_cancel(id: int) -> bytes:
    return _ID.pack(Type.CANCEL, id)


def encode_credit(id: int, granted: int) -> bytes:
    return _CREDIT.pack(Type.CREDIT, id, granted)


def encode_goaway(last_id: int) -> bytes:
    return _ID.pack(Type.GOAWAY, last_id)


def encode_metadata(metadata: Metadata) -> bytes:
    """Metadata as it travels: for each entry the lengths, the key in UTF-8, the value.

    Raises:
        ValueError: if a key is empty or too long, or all of it is.

    >>> encode_metadata({"a": b"bc"})
    b'\\x01\\x00\\x02abc'
    """
    parts: list[bytes] = []
    for key, value in metadata.items():
        name = key.encode()
        if not 1 <= len(name) <= 255:
            raise ValueError(f"a metadata key has {len(name)} bytes, where 1 to 255 are expected: {key[:50]!r}")
        if len(value) > MAX_METADATA:
            raise ValueError(
                f"the metadata {key!r} has {len(value):,} bytes, where all of it may have {MAX_METADATA:,}"
            )
        parts += (_KEY.pack(len(name), len(value)), name, value)
    encoded = b"".join(parts)
    if len(encoded) > MAX_METADATA:
        raise ValueError(f"the metadata takes {len(encoded):,} bytes, where {MAX_METADATA:,} are allowed")
    return encoded


# --- decoding -------------------------------------------------------------------------------------------------------


def read(frame: bytes, into: Mapping[int, Callable[..., T]]) -> T | None:
    """Read a frame, and give what it says to what takes frames of its type.

    Args:
        frame: the frame.
        into: by `Type`, what takes the fields, in their order on the wire: ``(version)`` of HELLO; ``(id, flags,
            deadline_ms, method, metadata, payload)`` of CALL; ``(id, flags, metadata, payload)`` of REPLY; ``(id, code,
            flags, retry_after_ms, message, details)`` of ERROR; ``(id, flags, payload)`` of DATA; ``(id)`` of END,
            CANCEL and, with the last one that was taken, GOAWAY; ``(id, granted)`` of CREDIT.

    Returns:
        What that returned; None for a frame of a type that a later version may have, and that may be passed over.

    Raises:
        ProtocolViolation: if it is malformed, or of an unknown type below 128, or nothing takes those of its type yet.
    """
    kind = frame[0] if frame else 0
    take = into.get(kind)
    if take is None:
        _check_unknown(frame, kind)
        return None
    reader: Callable[[bytes, Callable[..., T]], T] = _READERS[kind]
    try:
        return reader(frame, take)
    except struct.error as error:
        raise ProtocolViolation(f"a {Type(kind).name} frame of {len(frame)} bytes is too short") from error
    except UnicodeDecodeError as error:
        raise ProtocolViolation(f"a {Type(kind).name} frame with text that is no UTF-8") from error


def _check_unknown(frame: bytes, kind: int) -> None:
    if not frame:
        raise ProtocolViolation("an empty frame")
    if kind in _READERS:
        raise ProtocolViolation(f"{Type(kind).name} where HELLO is expected: the peer speaks no RPC")
    if kind < 128:
        raise ProtocolViolation(f"a frame of the unknown type {kind}")


def _read_hello(frame: bytes, take: Callable[..., T]) -> T:
    return take(_HELLO.unpack_from(frame)[1])


def _read_call(frame: bytes, take: Callable[..., T]) -> T:
    _, id, flags, deadline_ms, method_length, metadata_length = _CALL.unpack_from(frame)
    start = _CALL_SIZE + method_length
    end = start + metadata_length
    if end > len(frame):
        raise ProtocolViolation(f"a CALL frame of {len(frame)} bytes, where its head alone announces {end}")
    metadata = _read_metadata(frame[start:end]) if metadata_length else NO_METADATA
    return take(id, flags, deadline_ms, frame[_CALL_SIZE:start].decode(), metadata, frame[end:])


def _read_reply(frame: bytes, take: Callable[..., T]) -> T:
    _, id, flags, metadata_length = _REPLY.unpack_from(frame)
    end = _REPLY_SIZE + metadata_length
    if end > len(frame):
        raise ProtocolViolation(f"a REPLY frame of {len(frame)} bytes, where its head alone announces {end}")
    metadata = _read_metadata(frame[_REPLY_SIZE:end]) if metadata_length else NO_METADATA
    return take(id, flags, metadata, frame[end:])


def _read_error(frame: bytes, take: Callable[..., T]) -> T:
    _, id, code, flags, retry_after_ms, message_length, details_length = _ERROR.unpack_from(frame)
    start = _ERROR.size + message_length
    if start + details_length != len(frame):
        raise ProtocolViolation(f"an ERROR frame of {len(frame)} bytes, where its head says {start + details_length}")
    details = _read_metadata(frame[start:]) if details_length else NO_METADATA
    return take(id, code, flags, retry_after_ms, frame[_ERROR.size : start].decode(), details)


def _read_data(frame: bytes, take: Callable[..., T]) -> T:
    _, id, flags = _DATA.unpack_from(frame)
    return take(id, flags, frame[_DATA.size :])


def _read_id(frame: bytes, take: Callable[..., T]) -> T:
    if len(frame) != _ID.size:
        raise ProtocolViolation(f"a {Type(frame[0]).name} frame of {len(frame)} bytes, where {_ID.size} are expected")
    return take(_ID.unpack(frame)[1])


def _read_credit(frame: bytes, take: Callable[..., T]) -> T:
    if len(frame) != _CREDIT.size:
        raise ProtocolViolation(f"a CREDIT frame of {len(frame)} bytes, where {_CREDIT.size} are expected")
    _, id, granted = _CREDIT.unpack(frame)
    return take(id, granted)


_READERS: Final[Mapping[int, Callable[[bytes, Callable[..., Any]], Any]]] = {
    Type.HELLO: _read_hello,
    Type.CALL: _read_call,
    Type.REPLY: _read_reply,
    Type.ERROR: _read_error,
    Type.DATA: _read_data,
    Type.END: _read_id,
    Type.CANCEL: _read_id,
    Type.CREDIT: _read_credit,
    Type.GOAWAY: _read_id,
}


def _read_metadata(data: bytes) -> Metadata:
    metadata: dict[str, bytes] = {}
    position = 0
    while position < len(data):
        key_length, value_length = _KEY.unpack_from(data, position)
        start = position + _KEY.size + key_length
        position = start + value_length
        if position > len(data) or not key_length:
            raise ProtocolViolation("malformed metadata")
        metadata[data[start - key_length : start].decode()] = data[start:position]
    return metadata
