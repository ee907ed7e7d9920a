"""Framing: any split of the bytes gives the same frames, and nothing large is waited for on a stranger's word."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import FrameTooLarge, LinkLost, MessageTooLarge, ProtocolViolation
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.framing import CONTROL, Framing, FramingStage
from towline.stage import CLEAN, Batch, Stage, Units
from towline.testing import check_layer, check_stage


def stage(limit: int = 1 << 20) -> FramingStage:
    made = FramingStage(limit)
    made.established()
    return made


def header(length: int, *, control: bool = False) -> bytes:
    return (length | (CONTROL if control else 0)).to_bytes(4, "big")


def flat(units: Units) -> list[tuple[str, bytes]]:
    return [
        item
        for batch in units
        for item in [*(("note", note) for note in batch.notes), *(("frame", frame) for frame in batch.frames)]
    ]


@pytest.mark.smoke
def test_a_stage_of_framing_keeps_the_contract() -> None:
    def make() -> tuple[Stage, Stage]:
        return stage(), stage()

    check_stage(
        make,
        [Batch([b"\x01"], [b"a", b"bc"])],
        [Batch([], [b""]), Batch([b"\x02x"], [])],
        bad=header(1 << 30),
    )
    check_stage(make, [Batch([b"n"], [b"x" * 300, b"y" * 300])], bad=header(0, control=True))


@pytest.mark.smoke
async def test_the_layer_works_on_both_ends_whatever_moves_its_bytes() -> None:
    await check_layer(Framing())
    await check_layer(Framing(), Encryption(psk=Psk.generate()))


def test_bytes_on_the_wire_are_a_length_and_a_bit_for_control() -> None:
    assert stage().outgoing([Batch([b"\x20", b"\x11\x22"], [b"hello", b""])], 0) == [
        b"\x80\x00\x00\x01\x20" + b"\x80\x00\x00\x02\x11\x22" + b"\x00\x00\x00\x05hello" + b"\x00\x00\x00\x00"
    ]
    assert stage().outgoing([Batch([], [b"same", b"size", b"too!"])], 0) == [
        b"\0\0\0\4same" + b"\0\0\0\4size" + b"\0\0\0\4too!"
    ]


ITEMS = st.lists(
    st.tuples(st.booleans(), st.binary(max_size=40)).filter(lambda item: not item[0] or item[1]), max_size=20
)


@given(ITEMS, st.data())
def test_any_batches_in_any_split_come_back_as_they_were(items: list[tuple[bool, bytes]], data: st.DataObject) -> None:
    batches = [Batch([body], []) if control else Batch([], [body]) for control, body in items]
    wire = b"".join(stage().outgoing(batches, 0)) if batches else b""
    splits = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    receiver = stage()
    got: list[tuple[str, bytes]] = []
    for start, stop in zip([0, *splits], [*splits, len(wire)], strict=True):
        got += flat(receiver.incoming([wire[start:stop]] if stop > start else [], 0))
    assert got == [("note" if control else "frame", body) for control, body in items]
    receiver.receive_eof(CLEAN)
    assert receiver.ended is CLEAN


@given(st.binary(max_size=200))
def test_no_bytes_raise_and_nothing_is_read_after_an_error(garbage: bytes) -> None:
    receiver = stage(4096)
    receiver.incoming([garbage], 0)
    if receiver.ended is not None:
        assert isinstance(receiver.ended, ProtocolViolation)
        assert receiver.incoming([header(1) + b"x"], 0) == []


def test_a_note_after_data_starts_a_new_batch_so_that_their_order_is_kept() -> None:
    wire = b"".join(stage().outgoing([Batch([b"n1"], [b"d1"]), Batch([b"n2", b"n3"], [b"d2", b"d3"])], 0))
    batches = stage().incoming([wire], 0)
    assert [(list(batch.notes), list(batch.frames)) for batch in batches] == [
        ([b"n1"], [b"d1"]),
        ([b"n2", b"n3"], [b"d2", b"d3"]),
    ]


@pytest.mark.parametrize("control", [False, True])
def test_a_frame_at_the_limit_is_taken_and_one_above_ends_the_link_at_its_header(control: bool) -> None:
    receiver = stage(4096)
    body = b"x" * 4096
    assert flat(receiver.incoming([header(4096, control=control) + body], 0)) == [
        ("note" if control else "frame", body)
    ]
    assert receiver.incoming([header(4097, control=control)], 0) == []
    assert isinstance(receiver.ended, FrameTooLarge)
    assert (receiver.ended.size, receiver.ended.limit) == (4097, 4096)


@pytest.mark.parametrize("length", [(1 << 31) - 1, 16 << 20 | 1, 1 << 30])
def test_case_06_a_length_above_the_limit_ends_the_link_and_allocates_nothing(length: int) -> None:
    receiver = stage(16 << 20)
    receiver.incoming([header(length)], 0)
    assert isinstance(receiver.ended, FrameTooLarge)
    assert receiver._have <= 4


def test_a_stranger_may_send_four_kibibytes_until_it_is_established() -> None:
    receiver = FramingStage(1 << 20)
    assert flat(receiver.incoming([header(4096) + b"x" * 4096], 0)) == [("frame", b"x" * 4096)]
    receiver.incoming([header(4097)], 0)
    assert isinstance(receiver.held, FrameTooLarge)
    assert receiver.ended is None
    receiver.established()
    assert receiver.held is None
    assert flat(receiver.incoming([b"y" * 4097], 0)) == [("frame", b"y" * 4097)]


def test_a_stranger_that_goes_on_beyond_its_limit_is_cut_off() -> None:
    receiver = FramingStage(1 << 20)
    receiver.incoming([header(4097)], 0)
    assert receiver.incoming([], 0) == []
    assert receiver.ended is None
    assert receiver.incoming([b"x"], 0) == []
    assert isinstance(receiver.ended, FrameTooLarge)


def test_what_was_held_of_a_stranger_is_decoded_without_another_read() -> None:
    receiver = FramingStage(1 << 20)
    assert flat(receiver.incoming([header(1) + b"a" + header(5000) + b"x" * 5000], 0)) == [("frame", b"a")]
    receiver.established()
    assert flat(receiver.incoming([], 0)) == [("frame", b"x" * 5000)]


def test_an_empty_control_frame_is_a_violation() -> None:
    receiver = stage()
    assert flat(receiver.incoming([header(1) + b"x" + header(0, control=True)], 0)) == [("frame", b"x")]
    assert isinstance(receiver.ended, ProtocolViolation)


def test_an_end_between_frames_is_clean_and_one_inside_is_a_lost_link() -> None:
    receiver = stage()
    receiver.incoming([header(2) + b"ab"], 0)
    receiver.receive_eof(CLEAN)
    assert receiver.ended is CLEAN
    for cut in (b"\0", header(2), header(2) + b"a"):
        receiver = stage()
        receiver.incoming([cut], 0)
        receiver.receive_eof(CLEAN)
        assert isinstance(receiver.ended, LinkLost)
        assert f"{len(cut)} bytes into it" in str(receiver.ended)


def test_an_error_from_below_is_passed_on() -> None:
    receiver = stage()
    error = LinkLost("cut")
    receiver.receive_eof(error)
    assert receiver.ended is error


def test_our_own_frame_above_the_limit_is_our_own_error() -> None:
    with pytest.raises(MessageTooLarge):
        stage(4096).outgoing([Batch([], [b"x" * 4097])], 0)
    with pytest.raises(MessageTooLarge):
        stage(4096).check(b"x" * 4097)
    stage(4096).check(b"x" * 4096)


@pytest.mark.parametrize("limit", [0, 4095, 1 << 31, -1])
def test_a_limit_that_cannot_work_is_refused_with_both_bounds(limit: int) -> None:
    with pytest.raises(ValueError, match=r"where 4,096 to 2,147,483,647 will do"):
        Framing(max_frame_size=limit)
    Framing(max_frame_size=4096)
    Framing(max_frame_size=(1 << 31) - 1)
