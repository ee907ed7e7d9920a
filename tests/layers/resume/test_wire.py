"""RSM/1 on the wire: bytes on file, every field there and back, and nothing malformed accepted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import ProtocolViolation
from towline.layers.heartbeat import PING, PONG
from towline.layers.resume._wire import (
    VERSION,
    Abort,
    AbortCode,
    Ack,
    BatchHead,
    Challenge,
    Closed,
    Fin,
    GoAway,
    Hello,
    Message,
    NewSession,
    Proof,
    Reject,
    RejectCode,
    Resumed,
    Superseded,
    Type,
    decode,
)

VECTORS = Path(__file__).parents[2] / "vectors" / "rsm1" / "frames.json"

INSTANCE: Final = bytes(range(16))
NONCE: Final = bytes(range(16, 32))
SESSION: Final = bytes(range(32, 48))
KEY: Final = bytes(range(64, 96))
MAC: Final = bytes(range(128, 160))
EXTENSION: Final = b"\x07\x00\x02hi" + b"\xff\x00\x00"

GOLDEN: Final[Mapping[str, Message]] = {
    "hello, a new session": Hello(INSTANCE, NONCE, 8 << 20, 4 << 20),
    "hello, a session again, with a proof": Hello(
        INSTANCE, NONCE, 8 << 20, 4 << 20, session_id=SESSION, epoch=2, recv=1000, next=2001, mac=MAC
    ),
    "hello, a session again, to be challenged": Hello(
        INSTANCE, NONCE, 1, 1, session_id=SESSION, epoch=(1 << 64) - 1, recv=0, next=1
    ),
    "hello, with extensions": Hello(INSTANCE, NONCE, 8 << 20, 4 << 20, extensions=EXTENSION),
    "challenge": Challenge(INSTANCE, NONCE),
    "proof": Proof(MAC),
    "new session": NewSession(INSTANCE, SESSION, KEY, 300_000, 8 << 20, 4 << 20),
    "new session, with extensions": NewSession(INSTANCE, SESSION, KEY, 1, 1, 1, extensions=EXTENSION),
    "resumed": Resumed(2, 1000, 2001, 300_000, 8 << 20, 4 << 20, MAC),
    "resumed, with extensions": Resumed(2, 1000, 2001, 300_000, 8 << 20, 4 << 20, MAC, EXTENSION),
    "reject, without a proof": Reject(RejectCode.UNKNOWN_SESSION),
    "reject, come back later": Reject(RejectCode.RETRY_LATER, 1000),
    "reject, with a proof": Reject(RejectCode.SESSION_EXPIRED, recv_final=1000, mac=MAC),
    "batch": BatchHead(1001, 2000, 8 << 20),
    "batch, with a request for an ack": BatchHead(1001, 2000, 8 << 20, ack_request=True),
    "ack": Ack(2000, 8 << 20),
    "ack, with a request for an ack": Ack(2000, 8 << 20, ack_request=True),
    "fin": Fin(2001),
    "closed": Closed(2001),
    "goaway": GoAway(30_000),
    "superseded": Superseded(INSTANCE),
    "abort, with what was consumed": Abort(AbortCode.UNREAD, 1999),
    "abort": Abort(AbortCode.CANCELLED),
}


def vectors() -> dict[str, str]:
    read: dict[str, str] = json.loads(VECTORS.read_text())
    return read


# --- bytes on file -------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("name", GOLDEN)
def test_every_control_frame_is_on_the_wire_as_the_file_says(name: str) -> None:
    assert GOLDEN[name].encode().hex() == vectors()[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_bytes_on_file_are_read_as_what_they_mean(name: str) -> None:
    assert decode(bytes.fromhex(vectors()[name])) == GOLDEN[name]


def test_every_type_of_frame_is_on_file_and_nothing_else() -> None:
    assert set(vectors()) == set(GOLDEN)
    assert {message.type for message in GOLDEN.values()} == set(Type)


# --- there and back ------------------------------------------------------------------------------------------------

U8, U32, U64 = st.integers(0, 255), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
ID, SECRET = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
EXTENSIONS = st.lists(st.tuples(U8, st.binary(max_size=20)), max_size=4).map(
    lambda items: b"".join(bytes([kind]) + len(body).to_bytes(2, "big") + body for kind, body in items)
)


def hello(session: tuple[bytes, int, int, int] | None, mac: bytes, **fields: object) -> Hello:
    made = Hello(mac=mac, **fields)  # type: ignore[arg-type]
    if session is None:
        return made
    session_id, epoch, recv, next_ = session
    return replace(made, session_id=session_id, epoch=epoch, recv=recv, next=next_)


MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(
        hello,
        st.none() | st.tuples(ID, U64, U64, U64),
        st.just(b"") | SECRET,
        instance=ID,
        nonce=ID,
        credit=U64,
        max_message=U32,
        ver_min=U8,
        ver_max=U8,
        features=U32,
        extensions=EXTENSIONS,
    ),
    st.builds(Challenge, ID, ID, U8, U32),
    st.builds(Proof, SECRET),
    st.builds(NewSession, ID, ID, SECRET, U32, U64, U32, U8, U32, EXTENSIONS),
    st.builds(Resumed, U64, U64, U64, U32, U64, U32, SECRET, EXTENSIONS),
    st.builds(Reject, st.sampled_from(RejectCode), U32, st.none() | U64, st.just(b"") | SECRET),
    st.builds(BatchHead, U64, U64, U64, st.booleans()),
    st.builds(Ack, U64, U64, st.booleans()),
    st.builds(Fin, U64),
    st.builds(Closed, U64),
    st.builds(GoAway, U32, st.booleans()),
    st.builds(Superseded, ID),
    st.builds(Abort, st.sampled_from(AbortCode), st.none() | U64),
)


@given(MESSAGES)
def test_what_is_written_is_read_as_the_same(message: Message) -> None:
    assert decode(message.encode()) == message


@given(st.binary(min_size=1, max_size=200) | MESSAGES.map(lambda message: message.encode()))
def test_any_bytes_are_a_message_or_a_violation(note: bytes) -> None:
    try:
        message = decode(note)
    except ProtocolViolation:
        return
    assert message.encode()[0] == note[0]


@given(MESSAGES, st.data())
def test_no_flipped_byte_is_anything_worse_than_another_message(message: Message, data: st.DataObject) -> None:
    note = bytearray(message.encode())
    note[data.draw(st.integers(0, len(note) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolViolation):
        decode(bytes(note))


# --- malformed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in GOLDEN if "extensions" not in name])
def test_every_truncation_is_a_violation(name: str) -> None:
    note = GOLDEN[name].encode()
    for size in range(1, len(note)):
        with pytest.raises(ProtocolViolation):
            decode(note[:size])


@pytest.mark.parametrize("name", [name for name, message in GOLDEN.items() if message.type is not Type.PROOF])
def test_every_extension_by_a_byte_or_two_is_a_violation(name: str) -> None:
    # Three bytes may be an extension of HELLO, NEW_SESSION and RESUMED; fewer are none.
    note = GOLDEN[name].encode()
    for extra in (b"\0", b"\xff\xff"):
        with pytest.raises(ProtocolViolation):
            decode(note + extra)


def test_a_proof_of_another_length_is_a_violation() -> None:
    for size in (0, 31, 33, 64):
        with pytest.raises(ProtocolViolation, match=f"PROOF has {size} bytes, where 32 are needed"):
            decode(bytes([Type.PROOF]) + bytes(size))


EXTENSIBLE: Final[dict[str, Callable[[bytes], Message]]] = {
    "hello": lambda extensions: Hello(INSTANCE, NONCE, 1, 1, extensions=extensions),
    "hello, again": lambda extensions: Hello(INSTANCE, NONCE, 1, 1, SESSION, 2, extensions=extensions, mac=MAC),
    "new session": lambda extensions: NewSession(INSTANCE, SESSION, KEY, 1, 1, 1, extensions=extensions),
    "resumed": lambda extensions: Resumed(1, 1, 1, 1, 1, 1, MAC, extensions),
}


@pytest.mark.parametrize("name", EXTENSIBLE)
def test_extensions_that_are_not_known_are_passed_over(name: str) -> None:
    for extensions in (b"\x01\x00\x00", b"\xfe\x00\x03abc\x01\x00\x00", bytes([9]) + b"\xff\xff" + bytes(65535)):
        message = EXTENSIBLE[name](extensions)
        assert decode(message.encode()) == message


@pytest.mark.parametrize("name", EXTENSIBLE)
@pytest.mark.parametrize("extensions", [b"\x01", b"\x01\x00", b"\x01\x00\x01", b"\x01\x00\x00\x02\x00\x09short"])
def test_an_extension_that_is_cut_short_is_a_violation(name: str, extensions: bytes) -> None:
    with pytest.raises(ProtocolViolation, match="ends inside an extension"):
        decode(EXTENSIBLE[name](extensions).encode())


@pytest.mark.parametrize(
    ("note", "complaint"),
    [
        (b"\x00", "unknown type 0x00"),
        (b"\x7f" + bytes(20), "unknown type 0x7f"),
        (bytes([PING]) + bytes(8), "unknown type 0x20"),
        (bytes([Type.HELLO]) + b"XXX" + bytes(80), "HELLO of another protocol"),
        (bytes([Type.HELLO]) + b"RSM\1\1\0\0\0\0\4" + bytes(44), "mode 4, where 0 to 3 are known"),
        (bytes([Type.REJECT, 0]) + bytes(13), "REJECT has code 0, which is not known"),
        (bytes([Type.ABORT, 99]) + bytes(9), "ABORT has code 99, which is not known"),
        (bytes([Type.FIN]) + bytes(7), "FIN has 8 bytes, where 9 are needed"),
    ],
)
def test_what_is_wrong_is_named_with_both_numbers(note: bytes, complaint: str) -> None:
    with pytest.raises(ProtocolViolation, match=complaint):
        decode(note)


# --- other promises ------------------------------------------------------------------------------------------------


def test_resume_and_heartbeat_speak_disjoint_types() -> None:
    assert not {PING, PONG} & set(Type)
    assert len(set(Type)) == len(Type.__members__)


def test_hello_of_a_stranger_fits_what_a_stranger_may_send() -> None:
    assert len(GOLDEN["hello, a session again, with a proof"].encode()) < 4096
    assert Hello(INSTANCE, NONCE, 1, 1).ver_max == VERSION == 1


def test_the_flag_that_says_there_is_a_proof_is_under_the_proof() -> None:
    with_proof = Hello(INSTANCE, NONCE, 1, 1, SESSION, 2, mac=MAC)
    assert with_proof.body() != replace(with_proof, mac=b"").body()
    assert with_proof.encode() == with_proof.body() + MAC


def test_no_repr_shows_the_secret_of_a_session() -> None:
    shown = repr(GOLDEN["new session"])
    assert KEY.hex() not in shown
    assert repr(KEY)[2:-1] not in shown
