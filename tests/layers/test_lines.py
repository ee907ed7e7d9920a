"""Lines: text protocols, line by line, with a bound on what a line may be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import FrameTooLarge, LinkLost, MessageTooLarge, MisuseError
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.lines import Lines, LinesStage
from towline.stage import CLEAN, Batch, Units
from towline.testing import check_layer, check_stage


def lines(units: Units) -> list[bytes]:
    return [line for batch in units for line in batch.frames]


@pytest.mark.smoke
def test_a_stage_of_lines_keeps_the_contract() -> None:
    def make() -> tuple[LinesStage, LinesStage]:
        return LinesStage(64), LinesStage(64)

    check_stage(make, [Batch([], [b"one", b"", b"three"])], [Batch([], [b"four"])], bad=b"x" * 66)


@pytest.mark.smoke
async def test_the_layer_works_on_both_ends_whatever_moves_its_bytes() -> None:
    await check_layer(Lines())
    await check_layer(Lines(), Encryption(psk=Psk.generate()))


@given(st.lists(st.binary(max_size=30).filter(lambda line: b"\n" not in line and not line.endswith(b"\r"))), st.data())
def test_any_lines_in_any_split_come_back_as_they_were(sent: list[bytes], data: st.DataObject) -> None:
    wire = b"".join(LinesStage(64).outgoing([Batch([], sent)], 0)) if sent else b""
    receiver, got = LinesStage(64), list[bytes]()
    splits = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    for start, stop in zip([0, *splits], [*splits, len(wire)], strict=True):
        got += lines(receiver.incoming([wire[start:stop]], 0))
    assert got == sent
    assert receiver.ended is None


def test_a_line_may_end_as_people_end_it() -> None:
    assert lines(LinesStage(64).incoming([b"one\r\ntwo\nthree\r", b"\nfo", b"ur\n"], 0)) == [
        b"one",
        b"two",
        b"three",
        b"four",
    ]


def test_a_line_at_the_limit_is_taken_and_one_above_ends_the_link_after_what_was_good() -> None:
    receiver = LinesStage(5)
    assert lines(receiver.incoming([b"12345\n12345\r\n"], 0)) == [b"12345", b"12345"]
    assert lines(receiver.incoming([b"good\n1234567\nmore\n"], 0)) == [b"good"]
    assert isinstance(receiver.ended, FrameTooLarge)
    assert receiver.incoming([b"late\n"], 0) == []


def test_a_line_without_an_end_is_cut_off_before_it_fills_memory() -> None:
    receiver = LinesStage(1000)
    received = 0
    while receiver.ended is None:
        assert receiver.incoming([b"x" * 100], 0) == []
        received += 100
        assert received < 2000
    assert isinstance(receiver.ended, FrameTooLarge)


def test_a_long_line_in_small_parts_is_scanned_once() -> None:
    receiver = LinesStage(1 << 20)
    for _ in range(1000):
        receiver.incoming([b"x" * 100], 0)
        assert receiver._scanned == len(receiver._rest)
    assert lines(receiver.incoming([b"\n"], 0)) == [b"x" * 100_000]


def test_an_end_inside_a_line_is_a_lost_link() -> None:
    receiver = LinesStage(64)
    receiver.incoming([b"whole\nhal"], 0)
    receiver.receive_eof(CLEAN)
    assert isinstance(receiver.ended, LinkLost)
    assert "3 bytes into it" in str(receiver.ended)


def test_what_cannot_be_a_line_is_not_sent() -> None:
    stage = LinesStage(5)
    with pytest.raises(MisuseError, match="line break"):
        stage.check(b"a\nb")
    with pytest.raises(MessageTooLarge):
        stage.check(b"123456")
    stage.check(b"12345")
    assert stage.outgoing([], 0) == []


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="max_line_size is 0, where at least 1 is needed"):
        Lines(max_line_size=0)
