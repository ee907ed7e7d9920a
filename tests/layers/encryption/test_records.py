"""Records: whatever is done to the bytes on their way, only what was sealed comes out, in order, and then an end."""

from __future__ import annotations

import gc
import os
import struct
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import HandshakeRefused, LinkLost, MisuseError, NonceExhausted, ProtocolViolation
from towline.layers.encryption import _cipher_state
from towline.layers.encryption._ciphers import CIPHERS
from towline.layers.encryption._records import CLOSE, DATA, MAX_RECORD_SIZE, OVERHEAD, RecordStage
from towline.layers.encryption.noise import MAX_NONCE, CipherState
from towline.stage import CLEAN, Ended
from towline.testing import check_stage

KEYS = bytes(range(32)), bytes(range(32, 64))
VIOLATION = "^a record is not what the other end sealed: the link was tampered with, or damaged$"


def cipher(key: bytes) -> CipherState:
    return CipherState(CIPHERS["ChaChaPoly"], key)


def stages(
    *,
    keys: tuple[bytes, bytes] = KEYS,
    rekey_after: int = 1 << 16,
    max_record_size: int = MAX_RECORD_SIZE,
    refused: HandshakeRefused | None = None,
) -> tuple[RecordStage, RecordStage]:
    """Two ends of one link, both at the beginning."""
    there, back = keys

    def stage(send: bytes, receive: bytes) -> RecordStage:
        return RecordStage(
            cipher(send),
            cipher(receive),
            rekey_after=rekey_after,
            max_record_size=max_record_size,
            refused=refused,
        )

    return stage(there, back), stage(back, there)


def sealed(stage: RecordStage, *messages: bytes) -> list[bytes]:
    """A record for each message."""
    return [b"".join(stage.outgoing([message], 0.0)) for message in messages]


def opened(stage: RecordStage, data: bytes) -> bytes:
    return b"".join(stage.incoming([data], 0.0))


def craft(key: bytes, plaintext: bytes) -> bytes:
    """The first record under ``key``, with anything at all inside."""
    header = struct.pack(">H", len(plaintext) + 16)
    return header + cipher(key).encrypt_with_ad(header, plaintext)


def is_violation(ended: Ended) -> bool:
    return type(ended) is ProtocolViolation and str(ended) == VIOLATION[1:-1]


# --- what comes out is what went in ---


def test_data_comes_out_as_it_went_in() -> None:
    client, server = stages()
    assert opened(server, *sealed(client, b"hello")) == b"hello"
    assert opened(client, *sealed(server, b"and back")) == b"and back"
    assert client.ended is server.ended is None


def test_a_flush_is_one_record() -> None:
    client, server = stages()
    record = b"".join(client.outgoing([b"one", b"two", b"three"], 0.0))
    assert len(record) == 11 + OVERHEAD
    assert server.incoming([record], 0.0) == [b"onetwothree"]


def test_a_flush_that_is_too_long_for_one_record_becomes_several() -> None:
    client, server = stages()
    data = os.urandom(3 * MAX_RECORD_SIZE + 1)
    records = b"".join(client.outgoing([data[:5], data[5:]], 0.0))
    assert len(records) == len(data) + 4 * OVERHEAD
    assert records[:2] == b"\xff\xff"
    assert opened(server, records) == data


@pytest.mark.parametrize("size", [4096, 4097, 8192])
def test_records_can_be_made_smaller_and_the_other_end_takes_any_size(size: int) -> None:
    client, _ = stages(max_record_size=4096)
    _, server = stages()
    records = b"".join(client.outgoing([bytes(size)], 0.0))
    assert [len(data) for data in server.incoming([records], 0.0)] == (
        [4096] * (size // 4096) + [size % 4096] * (size % 4096 > 0)
    )


def test_a_record_without_data_is_taken_and_gives_nothing() -> None:
    client, server = stages()
    assert not server.is_confirmed
    assert server.incoming([b"".join(client.confirm())], 0.0) == []
    assert server.is_confirmed
    assert server.ended is None


@given(
    messages=st.lists(st.binary(min_size=1, max_size=300), max_size=12),
    cuts=st.lists(st.integers(0, 4000)),
    rekey_after=st.integers(1, 5),
    size=st.integers(1, 400),
)
def test_any_split_of_the_bytes_gives_the_same_data(
    messages: list[bytes], cuts: list[int], rekey_after: int, size: int
) -> None:
    client, server = stages(rekey_after=rekey_after, max_record_size=size)
    stream = b"".join(sealed(client, *messages)) + b"".join(client.close())
    places = sorted({cut for cut in cuts if cut < len(stream)} | {0, len(stream)})
    received = b""
    for start, stop in pairwise(places):
        assert server.ended is None
        received += opened(server, stream[start:stop])
    assert received == b"".join(messages)
    assert server.ended is CLEAN


@given(
    messages=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5),
    place=st.integers(0, 10_000),
    mask=st.integers(1, 255),
    chunk=st.integers(1, 200),
)
def test_no_corruption_ever_delivers_wrong_bytes(messages: list[bytes], place: int, mask: int, chunk: int) -> None:
    client, server = stages(rekey_after=2)
    stream = bytearray(b"".join([*sealed(client, *messages), *client.close()]))
    place %= len(stream)
    stream[place] ^= mask
    received = b""
    for start in range(0, len(stream), chunk):
        received += opened(server, bytes(stream[start : start + chunk]))
    server.receive_eof(CLEAN)
    assert b"".join(messages).startswith(received)
    # All data may be good, if it was the close record that was hit; but then the end is not.
    assert isinstance(server.ended, ProtocolViolation | LinkLost)


def test_a_record_that_comes_byte_by_byte_is_read_once() -> None:
    client, server = stages()
    data = os.urandom(MAX_RECORD_SIZE)
    (record,) = sealed(client, data)
    received = [opened(server, record[i : i + 1]) for i in range(len(record))]
    assert received[-1] == data
    assert not any(received[:-1])


def test_it_keeps_the_contract_of_a_stage() -> None:
    check_stage(stages, [b"hello", b" you"], [b"x"], [b"y" * 30], bad=b"\0\0")


# --- security cases ---


def test_case_01_every_flipped_bit_ends_the_link() -> None:
    for bit in range((64 + OVERHEAD) * 8):
        client, server = stages()
        first, second, third = sealed(client, b"good", bytes(range(64)), b"after")
        bad = bytearray(second)
        bad[bit // 8] ^= 1 << bit % 8
        assert server.incoming([first + bad + third], 0.0) == [b"good"], bit
        if server.ended is None:  # a length that became longer: it waits for more, and more does not help
            assert bit < 16
            assert opened(server, bytes(65536)) == b""
        assert is_violation(server.ended), bit
        assert opened(server, third) == b""


def test_case_02_an_end_inside_a_record_is_never_clean() -> None:
    (record,) = sealed(stages()[0], b"hello")
    for length in range(1, len(record)):
        _, server = stages()
        assert opened(server, record[:length]) == b""
        server.receive_eof(CLEAN)
        assert isinstance(server.ended, LinkLost), length


def test_case_03_an_end_without_a_close_record_is_a_cut() -> None:
    client, server = stages()
    assert opened(server, *sealed(client, b"hello")) == b"hello"
    server.receive_eof(CLEAN)
    assert isinstance(server.ended, LinkLost)
    assert "without its close record" in str(server.ended)


def test_case_03_an_end_with_a_close_record_is_clean() -> None:
    client, server = stages()
    records = b"".join([*sealed(client, b"hello"), *client.close()])
    assert opened(server, records) == b"hello"
    assert server.ended is CLEAN
    server.receive_eof(LinkLost("a reset behind it changes nothing"))
    assert server.ended is CLEAN


def test_an_error_of_the_transport_is_passed_on() -> None:
    _, server = stages()
    error = LinkLost("reset")
    server.receive_eof(error)
    assert server.ended is error


def test_case_04_nothing_after_the_close_record_is_delivered() -> None:
    client, server = stages()
    after = sealed(client, b"before")
    after += client.close()
    other, _ = stages()
    other.outgoing([b"before"], 0.0)
    sealed(other, b"close")
    after += sealed(other, b"after")  # what the sender's key would seal next, if it went on
    assert opened(server, b"".join(after)) == b"before"
    assert server.ended is CLEAN
    assert opened(server, b"anything") == b""
    assert server.ended is CLEAN


@pytest.mark.parametrize("forged", [CLOSE, b"\0\x11" + CLOSE + bytes(16), b"\0\1" + CLOSE, bytes(19)])
def test_case_05_a_forged_close_record_is_no_end(forged: bytes) -> None:
    _, server = stages()
    opened(server, forged)
    server.receive_eof(CLEAN)
    assert isinstance(server.ended, ProtocolViolation | LinkLost)


@pytest.mark.parametrize("length", [0, 1, 15, 16])
def test_case_07_a_length_below_a_type_and_a_tag_ends_the_link_at_once(length: int) -> None:
    _, server = stages()
    assert opened(server, struct.pack(">H", length)) == b""
    assert is_violation(server.ended)


@pytest.mark.parametrize(
    ("order", "good"),
    [((0, 0), 1), ((0, 1, 0), 2), ((1, 0), 0), ((0, 2, 1), 1), ((1,), 0), ((0, 2), 1)],
    ids=["replayed", "replayed later", "swapped", "swapped later", "dropped", "dropped later"],
)
def test_case_08_a_record_out_of_its_order_ends_the_link(order: Iterable[int], good: int) -> None:
    client, server = stages()
    records = sealed(client, b"a", b"b", b"c")
    assert len(server.incoming([b"".join(records[i] for i in order)], 0.0)) == good
    assert is_violation(server.ended)


def test_case_09_a_record_sent_back_to_its_sender_ends_the_link() -> None:
    client, _ = stages()
    assert opened(client, *sealed(client, b"hello")) == b""
    assert is_violation(client.ended)


def test_case_10_a_record_of_another_connection_ends_the_link() -> None:
    other, _ = stages(keys=(os.urandom(32), os.urandom(32)))
    _, server = stages()
    assert opened(server, *sealed(other, b"hello")) == b""
    assert is_violation(server.ended)


@pytest.mark.parametrize("plaintext", [b"\0", b"\3", b"\xff data", CLOSE + b"x", b"\0" * 100])
def test_case_11_an_unknown_type_ends_the_link(plaintext: bytes) -> None:
    _, server = stages()
    assert opened(server, craft(KEYS[0], plaintext)) == b""
    assert is_violation(server.ended)


def test_case_11_a_plaintext_without_a_type_ends_the_link() -> None:
    _, server = stages()
    assert opened(server, craft(KEYS[0], b"")) == b""
    assert is_violation(server.ended)


def test_case_11_what_is_crafted_right_is_taken() -> None:
    _, server = stages()
    assert opened(server, craft(KEYS[0], DATA + b"x")) == b"x"


def test_case_26_a_counter_never_wraps() -> None:
    send, receive = cipher(KEYS[0]), cipher(KEYS[0])
    send.nonce = receive.nonce = MAX_NONCE - 1
    client = RecordStage(send, cipher(KEYS[1]), rekey_after=1 << 16)
    server = RecordStage(cipher(KEYS[1]), receive, rekey_after=1 << 16)
    assert opened(server, *sealed(client, b"the last one")) == b"the last one"
    with pytest.raises(NonceExhausted):
        client.outgoing([b"one too many"], 0.0)
    assert send.nonce == MAX_NONCE
    assert opened(server, b"\0\x11" + bytes(17)) == b""
    assert isinstance(server.ended, NonceExhausted)


def test_case_26_of_a_flush_that_does_not_fit_nothing_leaves() -> None:
    send = cipher(KEYS[0])
    send.nonce = MAX_NONCE - 1
    client = RecordStage(send, cipher(KEYS[1]), rekey_after=1 << 16, max_record_size=4096)
    with pytest.raises(NonceExhausted):
        client.outgoing([bytes(8192)], 0.0)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 9])
@pytest.mark.parametrize("direction", ["client to server", "server to client", "both"])
def test_case_27_keys_change_after_n_records_in_each_direction(count: int, direction: str) -> None:
    client, server = stages(rekey_after=4)
    messages = [bytes([i]) * 9 for i in range(count)]
    if direction == "both":  # crossing: each end sends before it has read
        there, back = sealed(client, *messages), sealed(server, *messages[:-1])
        assert server.incoming(there, 0.0) == messages
        assert client.incoming(back, 0.0) == messages[:-1]
    else:
        sender, receiver = (client, server) if direction == "client to server" else (server, client)
        for message in messages:
            assert opened(receiver, *sealed(sender, message)) == message
    assert client.ended is server.ended is None


def test_case_27_the_old_key_is_refused_after_the_boundary() -> None:
    old = cipher(KEYS[0])
    old.nonce = 4
    client, server = stages(rekey_after=4)
    records = sealed(client, *[b"x"] * 5)
    header = struct.pack(">H", 18)
    assert header + old.encrypt_with_ad(header, DATA + b"x") != records[4]
    old.nonce = 4
    assert server.incoming([*records[:4], header + old.encrypt_with_ad(header, DATA + b"x")], 0.0) == [b"x"] * 4
    assert is_violation(server.ended)


def test_case_27_the_close_record_counts_too() -> None:
    for count in range(1, 9):
        client, server = stages(rekey_after=4)
        records = sealed(client, *[b"x"] * count) + client.close()
        assert server.incoming([b"".join(records)], 0.0) == [b"x"] * count
        assert server.ended is CLEAN


def test_case_28_two_ends_that_count_differently_part_at_the_first_boundary() -> None:
    # The handshake sees to it that this does not happen; see test_encryption.
    client, _ = stages(rekey_after=4)
    _, server = stages(rekey_after=5)
    assert server.incoming(sealed(client, *[b"x"] * 5), 0.0) == [b"x"] * 4
    assert is_violation(server.ended)


def test_case_50_no_two_of_many_records_are_alike() -> None:
    client, server = stages(rekey_after=1 << 10)
    seen: set[bytes] = set()
    for _ in range(100):
        records = sealed(client, *[bytes(47)] * 1000)
        assert len(server.incoming(records, 0.0)) == 1000
        seen.update(record[2:] for record in records)
    assert len(seen) == 100_000


def test_case_51_a_forked_child_can_neither_seal_nor_open(monkeypatch: pytest.MonkeyPatch) -> None:
    client, server = stages()
    (record,) = sealed(client, b"x")
    monkeypatch.setattr(_cipher_state, "_process", _cipher_state.this_process() + 1)  # what a fork does
    with pytest.raises(MisuseError):
        client.outgoing([b"x"], 0.0)
    with pytest.raises(MisuseError):
        server.incoming([record], 0.0)


def test_case_52_of_a_bad_record_nothing_can_be_had() -> None:
    client, server = stages()
    first, second, third = sealed(client, b"good", b"a secret plaintext", b"after")
    bad = second[:-1] + bytes([second[-1] ^ 1])
    assert server.incoming([first + bad + third], 0.0) == [b"good"]
    assert is_violation(server.ended)
    states = [held for held in gc.get_referents(server, vars(server)) if isinstance(held, CipherState)]
    assert states == []  # the keys are let go
    assert not any(isinstance(held, bytes) and held for held in gc.get_referents(vars(server)))
    assert vars(server)["_parts"] == []
    with pytest.raises(ProtocolViolation, match=VIOLATION):
        server.outgoing([b"x"], 0.0)
    assert server.close() == []


def test_the_error_of_a_link_holds_no_key() -> None:
    send, receive = cipher(KEYS[0]), cipher(KEYS[0])
    receive.nonce = MAX_NONCE
    server = RecordStage(send, receive, rekey_after=4)
    opened(server, b"\0\x11" + bytes(17))
    assert isinstance(server.ended, NonceExhausted)
    assert server.ended.__traceback__ is None  # its frames would have held the cipher state
    assert server.ended.__context__ is None


# --- ends and refusals ---


def test_what_was_good_in_a_read_is_delivered_before_its_error() -> None:
    client, server = stages()
    good = sealed(client, *[bytes([i]) for i in range(50)])
    assert len(server.incoming([b"".join(good) + b"\0\0"], 0.0)) == 50
    assert is_violation(server.ended)


def test_a_direction_is_closed_once_and_nothing_is_sealed_after_it() -> None:
    client, server = stages()
    assert client.close()
    assert client.close() == []
    assert client.outgoing([b"late"], 0.0) == []
    assert opened(client, *sealed(server, b"the other direction lives on")) != b""


def test_a_closed_peer_can_still_be_sent_to() -> None:
    client, server = stages()
    opened(server, b"".join(client.close()))
    assert server.ended is CLEAN
    assert opened(client, *sealed(server, b"the last words")) == b"the last words"
    assert opened(client, b"".join(server.close())) == b""
    assert client.ended is CLEAN


def test_a_refusal_in_place_of_the_first_record_says_so() -> None:
    refused = HandshakeRefused("refused")
    client, _ = stages(refused=refused)
    assert opened(client, b"\0") == b""
    assert opened(client, b"\0") == b""
    assert client.ended is refused


def test_a_refusal_after_the_first_record_is_a_violation() -> None:
    client, server = stages(refused=HandshakeRefused("refused"))
    assert opened(client, sealed(server, b"hello")[0] + b"\0\0") == b"hello"
    assert is_violation(client.ended)
