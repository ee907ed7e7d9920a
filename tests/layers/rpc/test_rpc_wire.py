"""RPC/1 on the wire: the bytes of docs/protocol.md, every field there and back, and nothing malformed accepted."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import ProtocolViolation
from towline.layers.rpc._wire import (
    MAX_METADATA,
    MAX_METHOD,
    NO_LIMIT,
    NO_METADATA,
    VERSION,
    Flag,
    Metadata,
    Type,
    encode_call,
    encode_cancel,
    encode_credit,
    encode_data,
    encode_end,
    encode_error,
    encode_goaway,
    encode_hello,
    encode_metadata,
    encode_reply,
    read,
)

# --- frames ----------------------------------------------------------------------------------------------------------


class Hello(NamedTuple):
    version: int


class Call(NamedTuple):
    id: int
    flags: int
    deadline_ms: int
    method: str
    metadata: Metadata
    payload: bytes


class Reply(NamedTuple):
    id: int
    flags: int
    metadata: Metadata
    payload: bytes


class Error(NamedTuple):
    id: int
    code: int
    flags: int
    retry_after_ms: int
    message: str
    details: Metadata


class Data(NamedTuple):
    id: int
    flags: int
    payload: bytes


class End(NamedTuple):
    id: int


class Cancel(NamedTuple):
    id: int


class Credit(NamedTuple):
    id: int
    granted: int


class GoAway(NamedTuple):
    last_id: int


Frame: TypeAlias = Hello | Call | Reply | Error | Data | End | Cancel | Credit | GoAway

FRAME_TYPES: Final[Mapping[int, Callable[..., Frame]]] = {
    Type.HELLO: Hello,
    Type.CALL: Call,
    Type.REPLY: Reply,
    Type.ERROR: Error,
    Type.DATA: Data,
    Type.END: End,
    Type.CANCEL: Cancel,
    Type.CREDIT: Credit,
    Type.GOAWAY: GoAway,
}


def decode(frame: bytes) -> Frame | None:
    """What a frame says; None for one that may be passed over."""
    return read(frame, FRAME_TYPES)


# --- bytes by hand ---------------------------------------------------------------------------------------------------
# Nothing here calls an encoder: the bytes are those of the document. Text is in UTF-8 where it is more than ASCII.

USER: Final = b"\x04\x00\x03user\x00\xff\x07"  # the entry "user", of three bytes
EMPTY: Final = b"\x02\x00\x00\xc3\xa9"  # the entry "é", of none
METADATA: Final[Metadata] = {"user": b"\x00\xff\x07", "é": b""}

GOLDEN: Final[Mapping[str, tuple[bytes, Frame]]] = {
    "hello": (b"\x01\x01", Hello(1)),
    "call, the smallest": (
        b"\x02" + b"\x00\x00\x00\x01" + b"\x00" + b"\xff\xff\xff\xff" + b"\x01" + b"\x00\x00" + b"f",
        Call(1, 0, NO_LIMIT, "f", {}, b""),
    ),
    "call, with all there is": (
        struct.pack(">BIBIBH", 2, 0xFFFFFFFE, 1 | 2, 1500, 6, 15) + b"caf\xc3\xa9s" + USER + EMPTY + b"\x00payload",
        Call(0xFFFFFFFE, Flag.MORE | Flag.STREAM, 1500, "cafés", METADATA, b"\x00payload"),
    ),
    "call, a stream that ends at once": (
        struct.pack(">BIBIBH", 2, 7, 2 | 4, 0, 3, 0) + b"get" + b"x",
        Call(7, Flag.STREAM | Flag.END, 0, "get", {}, b"x"),
    ),
    "reply, the smallest": (b"\x03" + b"\x00\x00\x00\x01" + b"\x00" + b"\x00\x00", Reply(1, 0, {}, b"")),
    "reply, with all there is": (
        struct.pack(">BIBH", 3, 0x01020304, 1, 10) + USER + b"yes",
        Reply(0x01020304, Flag.MORE, {"user": b"\x00\xff\x07"}, b"yes"),
    ),
    "error, the smallest": (
        b"\x04" + b"\x00\x00\x00\x01" + b"\x05" + b"\x00" + b"\xff\xff\xff\xff" + b"\x00\x00" + b"\x00\x00",
        Error(1, 5, 0, NO_LIMIT, "", {}),
    ),
    "error, with all there is": (
        struct.pack(">BIBBIHH", 4, 3, 14, 8, 250, 8, 10) + b"d\xc3\xa9range" + USER,
        Error(3, 14, Flag.REFUSED, 250, "dérange", {"user": b"\x00\xff\x07"}),
    ),
    "data": (b"\x05" + b"\x00\x00\x00\x02" + b"\x00" + b"abc", Data(2, 0, b"abc")),
    "data, empty": (b"\x05" + b"\x00\x00\x00\x02" + b"\x04", Data(2, Flag.END, b"")),
    "data, of more": (b"\x05" + b"\x00\x01\x00\x00" + b"\x01" + b"\x00", Data(65536, Flag.MORE, b"\x00")),
    "end": (b"\x06" + b"\x00\x00\x00\x09", End(9)),
    "cancel": (b"\x07" + b"\x00\x00\x00\x0a", Cancel(10)),
    "credit": (b"\x08" + b"\x00\x00\x00\x0b" + b"\x00\x00\x00\x01\x00\x00\x00\x02", Credit(11, (1 << 32) + 2)),
    "goaway": (b"\x09" + b"\x00\x00\x00\x0c", GoAway(12)),
    "goaway, before any call": (b"\x09" + b"\x00\x00\x00\x00", GoAway(0)),
}


def encode(frame: Frame) -> bytes:
    match frame:
        case Hello():
            return encode_hello()
        case Call():
            metadata = encode_metadata(frame.metadata)
            return encode_call(frame.id, frame.flags, frame.deadline_ms, frame.method.encode(), metadata, frame.payload)
        case Reply():
            return encode_reply(frame.id, frame.flags, encode_metadata(frame.metadata), frame.payload)
        case Error():
            details = encode_metadata(frame.details)
            message = frame.message.encode()
            return encode_error(frame.id, frame.code, frame.flags, frame.retry_after_ms, message, details)
        case Data():
            return encode_data(frame.id, frame.flags, frame.payload)
        case End():
            return encode_end(frame.id)
        case Cancel():
            return encode_cancel(frame.id)
        case Credit():
            return encode_credit(frame.id, frame.granted)
        case GoAway():
            return encode_goaway(frame.last_id)


@pytest.mark.smoke
@pytest.mark.parametrize("name", GOLDEN)
def test_every_frame_is_on_the_wire_as_the_document_says(name: str) -> None:
    golden, frame = GOLDEN[name]
    assert encode(frame).hex() == golden.hex()


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_of_the_document_are_read_as_what_they_mean(name: str) -> None:
    golden, frame = GOLDEN[name]
    decoded = decode(golden)
    assert decoded == frame
    assert type(decoded) is type(frame)


def test_every_type_of_frame_has_its_bytes_here() -> None:
    assert {golden[0] for golden, _ in GOLDEN.values()} == set(Type) == set(range(1, 10))
    assert (Flag.MORE, Flag.STREAM, Flag.END, Flag.REFUSED) == (1, 2, 4, 8)
    assert (VERSION, NO_LIMIT, MAX_METHOD, MAX_METADATA) == (1, 2**32 - 1, 255, 65535)
    assert NO_METADATA == {}


def test_the_longest_that_lengths_can_say_goes_there_and_back() -> None:
    method, value = "m" * 255, b"v" * (MAX_METADATA - 3 - 255)
    call = Call(1, 0, 0, method, {"k" * 255: value}, b"p")
    assert decode(encode(call)) == call
    error = Error(1, 255, 255, 0, "t" * 65535, {"k" * 255: value})
    assert decode(encode(error)) == error


# --- there and back --------------------------------------------------------------------------------------------------

U8, U32, U64 = st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PAYLOADS = st.binary(max_size=40)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
METADATAS = st.dictionaries(KEYS, st.binary(max_size=20), max_size=4)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)

FRAMES: st.SearchStrategy[Frame] = st.one_of(
    st.just(Hello(VERSION)),
    st.builds(Call, U32, U8, U32, TEXTS, METADATAS, PAYLOADS),
    st.builds(Reply, U32, U8, METADATAS, PAYLOADS),
    st.builds(Error, U32, U8, U8, U32, TEXTS, METADATAS),
    st.builds(Data, U32, U8, PAYLOADS),
    st.builds(End, U32),
    st.builds(Cancel, U32),
    st.builds(Credit, U32, U64),
    st.builds(GoAway, U32),
)


@given(FRAMES)
def test_every_frame_comes_back_as_it_was(frame: Frame) -> None:
    decoded = decode(encode(frame))
    assert decoded == frame
    assert type(decoded) is type(frame)


@given(FRAMES, st.data())
def test_a_frame_cut_anywhere_is_a_violation_or_has_a_shorter_payload(frame: Frame, data: st.DataObject) -> None:
    encoded = encode(frame)
    at = data.draw(st.integers(0, len(encoded) - 1))
    check_cut(encoded, frame, at)


@pytest.mark.parametrize("name", GOLDEN)
def test_every_golden_frame_cut_at_every_byte_is_a_violation_or_has_a_shorter_payload(name: str) -> None:
    golden, frame = GOLDEN[name]
    for at in range(len(golden)):
        check_cut(golden, frame, at)


def check_cut(encoded: bytes, frame: Frame, at: int) -> None:
    payload = frame.payload if isinstance(frame, Call | Reply | Data) else b""
    missing = len(encoded) - at
    if missing <= len(payload):
        assert isinstance(frame, Call | Reply | Data)
        assert decode(encoded[:at]) == frame._replace(payload=payload[:-missing])
    else:
        with pytest.raises(ProtocolViolation):
            decode(encoded[:at])


@pytest.mark.parametrize("name", GOLDEN)
def test_a_frame_is_not_too_long_unless_it_has_a_payload(name: str) -> None:
    golden, frame = GOLDEN[name]
    if isinstance(frame, Call | Reply | Data):
        assert decode(golden + b"++") == frame._replace(payload=frame.payload + b"++")
    elif not isinstance(frame, Hello):
        with pytest.raises(ProtocolViolation, match=rf"{Type(golden[0]).name} frame of {len(golden) + 2} bytes, where"):
            decode(golden + b"++")


# --- what a peer must not send ---------------------------------------------------------------------------------------


@given(st.one_of(st.binary(max_size=60), st.tuples(U8, st.binary(max_size=60)).map(lambda it: bytes(it[:1]) + it[1])))
def test_random_bytes_are_read_or_are_a_violation(data: bytes) -> None:
    check_read(data)


def check_read(data: bytes) -> None:
    try:
        decoded = decode(data)
    except ProtocolViolation:
        return
    if decoded is None:
        assert data[0] >= 128
    elif not isinstance(decoded, Hello):
        assert decode(encode(decoded)) == decoded


@given(FRAMES, st.data())
def test_a_frame_with_a_byte_changed_is_read_or_is_a_violation(frame: Frame, data: st.DataObject) -> None:
    changed = bytearray(encode(frame))
    changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(U8)
    check_read(bytes(changed))


@pytest.mark.parametrize("kind", [0, *range(10, 128)])
def test_an_unknown_type_below_128_is_a_violation(kind: int) -> None:
    for rest in (b"", b"\x00\x00\x00\x01"):
        with pytest.raises(ProtocolViolation, match=f"unknown type {kind}$"):
            decode(bytes([kind]) + rest)


@pytest.mark.parametrize("kind", [*range(128, 256)])
def test_an_unknown_type_from_128_on_is_passed_over(kind: int) -> None:
    assert decode(bytes([kind])) is None
    assert decode(bytes([kind]) + b"anything at all") is None


ONLY_HELLO: Final[Mapping[int, Callable[..., Hello]]] = {Type.HELLO: Hello}


@pytest.mark.parametrize("name", GOLDEN)
def test_where_only_hello_is_taken_no_other_frame_that_is_known_is(name: str) -> None:
    golden, frame = GOLDEN[name]
    if isinstance(frame, Hello):
        assert read(golden, ONLY_HELLO) == frame
        return
    text = f"^{Type(golden[0]).name} where HELLO is expected: the peer speaks no RPC$"
    for refused in (golden, golden[:1]):  # what it says does not matter, nor whether that is malformed
        with pytest.raises(ProtocolViolation, match=text):
            read(refused, ONLY_HELLO)


def test_where_only_hello_is_taken_a_frame_that_is_not_known_is_as_anywhere() -> None:
    for kind in (0, *range(10, 128)):
        with pytest.raises(ProtocolViolation, match=f"^a frame of the unknown type {kind}$"):
            read(bytes([kind]) + b"rest", ONLY_HELLO)
    for kind in range(128, 256):
        assert read(bytes([kind]) + b"rest", ONLY_HELLO) is None
    with pytest.raises(ProtocolViolation, match=r"^an empty frame$"):
        read(b"", ONLY_HELLO)


def test_an_empty_frame_is_a_violation() -> None:
    with pytest.raises(ProtocolViolation, match="an empty frame"):
        decode(b"")


def test_hello_says_its_version_and_what_follows_is_passed_over() -> None:
    assert decode(b"\x01\x02more of a later version") == Hello(2)


HEADS: Final[Mapping[str, bytes]] = {
    "CALL": struct.pack(">BIBIBH", 2, 1, 0, 0, 1, 0)[:-2],
    "REPLY": struct.pack(">BIBH", 3, 1, 0, 0)[:-2],
    "ERROR": struct.pack(">BIBBIHH", 4, 1, 5, 0, 0, 0, 0)[:-2],
}
"""All before the length of the metadata."""

MALFORMED: Final[Mapping[str, bytes]] = {
    "no more than a length": b"\x01",
    "an entry without a value's length": b"\x01\x00",
    "a key that is empty": b"\x00\x00\x00",
    "an empty key with a value": b"\x00\x00\x01v",
    "a key beyond the end": b"\x02\x00\x00k",
    "a value beyond the end": b"\x01\x00\x02kv",
    "an entry, and half of another": b"\x01\x00\x01kv" + b"\x01",
    "an entry, and an empty key": b"\x01\x00\x01kv" + b"\x00\x00\x00",
    "an entry, and a value beyond the end": b"\x01\x00\x01kv" + b"\x01\xff\xffk",
    "a key that is no UTF-8": b"\x02\x00\x00\xc3\x28",
    "a key cut within a letter": b"\x01\x00\x01\xc3\xa9",
}


@pytest.mark.parametrize("frame", HEADS)
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_metadata_is_a_violation(frame: str, kind: str) -> None:
    metadata = MALFORMED[kind]
    method = b"f" if frame == "CALL" else b""
    # What follows must not be read as the rest of it.
    rest = b"" if frame == "ERROR" else b"payload, long enough"
    with pytest.raises(ProtocolViolation, match=r"metadata|too short|no UTF-8"):
        decode(HEADS[frame] + len(metadata).to_bytes(2, "big") + method + metadata + rest)


def test_of_a_key_that_comes_twice_the_last_value_counts() -> None:
    twice = b"\x01\x00\x01k1" + b"\x01\x00\x01k2"
    assert decode(HEADS["REPLY"] + b"\x00\x0a" + twice) == Reply(1, 0, {"k": b"2"}, b"")


BAD_TEXT: Final[Mapping[str, bytes]] = {
    "a method": struct.pack(">BIBIBH", 2, 1, 0, 0, 2, 0) + b"\xc3\x28",
    "a method of half a letter, whose other half is payload": struct.pack(">BIBIBH", 2, 1, 0, 0, 1, 0) + b"\xc3\xa9",
    "the text of an error": struct.pack(">BIBBIHH", 4, 1, 5, 0, 0, 1, 0) + b"\xff",
    "a surrogate": struct.pack(">BIBBIHH", 4, 1, 5, 0, 0, 3, 0) + b"\xed\xa0\x80",
}


@pytest.mark.parametrize("kind", BAD_TEXT)
def test_text_that_is_no_utf8_is_a_violation(kind: str) -> None:
    with pytest.raises(ProtocolViolation, match=r"(CALL|ERROR) frame with text that is no UTF-8"):
        decode(BAD_TEXT[kind])


TOO_SHORT: Final[Mapping[str, tuple[bytes, str]]] = {
    "a method beyond the end": (
        struct.pack(">BIBIBH", 2, 1, 0, 0, 2, 0) + b"f",
        r"CALL frame of 14 bytes, where its head alone announces 15",
    ),
    "metadata beyond the end": (
        struct.pack(">BIBIBH", 2, 1, 0, 0, 1, 9) + b"f" + b"\x01\x00\x01kv",
        r"CALL frame of 19 bytes, where its head alone announces 23",
    ),
    "a reply's metadata beyond the end": (
        struct.pack(">BIBH", 3, 1, 0, 6) + b"\x01\x00\x01kv",
        r"REPLY frame of 13 bytes, where its head alone announces 14",
    ),
    "an error's text beyond the end": (
        struct.pack(">BIBBIHH", 4, 1, 5, 0, 0, 2, 0) + b"t",
        r"ERROR frame of 16 bytes, where its head says 17",
    ),
    "an error's details beyond the end": (
        struct.pack(">BIBBIHH", 4, 1, 5, 0, 0, 1, 6) + b"t" + b"\x01\x00\x01kv",
        r"ERROR frame of 21 bytes, where its head says 22",
    ),
    "a head that is cut": (b"\x05\x00\x00\x00\x01", r"DATA frame of 5 bytes is too short"),
    "a hello without a version": (b"\x01", r"HELLO frame of 1 bytes is too short"),
    "an end without all of its number": (b"\x06\x00\x00\x01", r"END frame of 4 bytes, where 5 are expected"),
    "a credit without all of its number": (
        b"\x08\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00",
        r"CREDIT frame of 12 bytes, where 13 are expected",
    ),
}


@pytest.mark.parametrize("kind", TOO_SHORT)
def test_a_frame_that_is_too_short_says_how_much_was_expected(kind: str) -> None:
    frame, text = TOO_SHORT[kind]
    with pytest.raises(ProtocolViolation, match=text):
        decode(frame)


# --- what this side must not send ------------------------------------------------------------------------------------


def test_metadata_may_take_64_kib_and_no_more() -> None:
    most = MAX_METADATA - 3 - 1
    assert len(encode_metadata({"k": b"v" * most})) == MAX_METADATA
    with pytest.raises(ValueError, match=r"takes 65,536 bytes, where 65,535 are allowed"):
        encode_metadata({"k": b"v" * (most + 1)})
    with pytest.raises(ValueError, match=r"takes 65,536 bytes"):
        encode_metadata({"k": b"v" * 30_000, "l": b"v" * (most + 1 - 30_000 - 4)})
    with pytest.raises(ValueError, match=r"'k' has 65,536 bytes, where all of it may have 65,535"):
        encode_metadata({"k": b"v" * 65_536})


def test_a_metadata_key_has_1_to_255_bytes() -> None:
    assert encode_metadata({"k": b""}) == b"\x01\x00\x00k"
    assert encode_metadata({"k" * 255: b""}) == b"\xff\x00\x00" + b"k" * 255
    with pytest.raises(ValueError, match="a metadata key has 0 bytes"):
        encode_metadata({"": b"v"})
    with pytest.raises(ValueError, match=r"a metadata key has 256 bytes, where 1 to 255 are expected: 'é+'$"):
        encode_metadata({"é" * 128: b"v"})
    assert encode_metadata({}) == b""
