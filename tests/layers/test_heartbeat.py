"""Heartbeat: a dead link is found in time, a live one is left alone, and our own stalls are nobody else's fault."""

from __future__ import annotations

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from towline.errors import ConnectionLost, LinkLost, ProtocolViolation
from towline.layers.encryption import Encryption
from towline.layers.encryption.keys import Psk
from towline.layers.framing import Framing
from towline.layers.heartbeat import PING, PONG, Heartbeat, HeartbeatStage
from towline.stack import Stack
from towline.stage import CLEAN, Batch, Units
from towline.streams import LinkAttribute
from towline.testing import Chaos, Cut, check_layer, check_stage
from towline.transports import Memory


def ping(number: int) -> bytes:
    return bytes([PING]) + number.to_bytes(8, "big")


def pong(number: int) -> bytes:
    return bytes([PONG]) + number.to_bytes(8, "big")


def notes(units: Units) -> list[bytes]:
    return [note for batch in units for note in batch.notes]


class Watch:
    """A stage with a clock and a timer: what it says, and when."""

    def __init__(self, interval: float = 5, timeout: float = 15) -> None:
        self.now = 0.0
        self.rtt: list[float] = []
        self.stage = HeartbeatStage(interval, timeout, 0.0, self.rtt.append)
        self.said: list[tuple[float, bytes]] = []

    def until(self, now: float) -> None:
        """Let time pass; the timer is exact, and the writer writes at once."""
        while self.stage.deadline is not None and self.stage.deadline <= now:
            self.now = max(self.now, self.stage.deadline)
            self.stage.on_time(self.now)
            self.flush()
        self.now = now

    def flush(self) -> None:
        while self.stage.wants:
            self.said += [(self.now, note) for note in notes(self.stage.pending(self.now))]

    def receive(self, *received: bytes) -> list[bytes]:
        got = notes(self.stage.incoming([Batch(list(received), [])] if received else [], self.now))
        self.flush()
        return got

    def send(self) -> None:
        self.stage.outgoing([Batch([], [b"data"])], self.now)


@pytest.mark.smoke
def test_a_stage_of_heartbeat_keeps_the_contract() -> None:
    check_stage(
        lambda: (HeartbeatStage(5, 15, 0.0), HeartbeatStage(5, 15, 0.0)),
        [Batch([b"\x10others"], [b"a", b""])],
        [Batch([], [b"b"]), Batch([b"\x11"], [b"c"])],
    )


@pytest.mark.smoke
async def test_the_layer_works_on_both_ends_whatever_moves_its_bytes() -> None:
    await check_layer(Heartbeat(), Framing())
    await check_layer(Heartbeat(), Framing(), Encryption(psk=Psk.generate()))


# --- when it pings ---------------------------------------------------------------------------------------------------


def test_a_ping_goes_out_when_nothing_was_sent_for_the_interval() -> None:
    watch = Watch()
    for second in range(1, 31):
        watch.until(second)
        watch.receive()  # bytes keep coming; we say nothing
    assert [at for at, _ in watch.said] == [5, 10, 15, 20, 25, 30]
    assert [note for _, note in watch.said] == [ping(n) for n in range(1, 7)]


def test_a_ping_goes_out_when_nothing_was_received_for_the_interval_although_we_send() -> None:
    watch = Watch()
    for second in range(1, 13):
        watch.until(second)
        watch.send()
    assert [at for at, _ in watch.said] == [5, 10]


def test_a_link_that_is_busy_both_ways_carries_no_ping() -> None:
    watch = Watch()
    for second in range(1, 1000):
        watch.until(second)
        watch.send()
        watch.receive()
    assert watch.said == []


def test_at_most_one_ping_in_an_interval() -> None:
    watch = Watch()
    watch.until(14.9)
    assert [at for at, _ in watch.said] == [5, 10]


def test_a_ping_that_could_not_be_written_is_not_due_twice() -> None:
    stage = HeartbeatStage(5, 15, 0.0)
    stage.on_time(5.0)
    assert stage.wants
    assert stage.deadline == 15.0  # the writer is stuck; only death is left to wait for
    stage.on_time(14.0)
    assert notes(stage.pending(14.5)) == [ping(1)]
    assert not stage.wants


# --- what it answers -------------------------------------------------------------------------------------------------


def test_a_ping_is_answered_at_once_with_its_own_number() -> None:
    watch = Watch()
    watch.now = 1.0
    assert watch.receive(ping(77)) == []
    assert watch.said == [(1.0, pong(77))]


def test_who_only_answers_still_measures() -> None:
    watch = Watch(interval=5)
    for second in range(1, 12):  # the other end pings more often than we would
        watch.until(second)
        watch.receive(ping(second))
    pings = [(when, note) for when, note in watch.said if note[0] == PING]
    assert pings == [(5, ping(1)), (10, ping(2))]


def test_many_pings_between_two_flushes_get_one_pong_for_the_last() -> None:
    stage = HeartbeatStage(5, 15, 0.0)
    for number in range(1000):
        stage.incoming([Batch([ping(number)], [])], 0.0)
    assert notes(stage.pending(0.0)) == [pong(999)]
    assert not stage.wants


def test_other_notes_and_data_pass_in_their_order() -> None:
    stage = HeartbeatStage(5, 15, 0.0)
    (batch,) = stage.incoming([Batch([b"\x10a", ping(1), b"\x11b"], [b"data"]), Batch([ping(2)], [])], 0.0)
    assert (batch.notes, batch.frames) == ([b"\x10a", b"\x11b"], [b"data"])


@pytest.mark.parametrize("bad", [ping(1)[:-1], pong(1) + b"x", bytes([PING])])
def test_a_malformed_heartbeat_is_a_violation_after_what_was_good(bad: bytes) -> None:
    stage = HeartbeatStage(5, 15, 0.0)
    got = stage.incoming([Batch([], [b"good"]), Batch([b"\x10", bad], [b"late"])], 0.0)
    assert [frame for batch in got for frame in batch.frames] == [b"good"]
    assert isinstance(stage.ended, ProtocolViolation)
    assert f"{len(bad)} bytes" in str(stage.ended)


# --- the round trip --------------------------------------------------------------------------------------------------


def test_the_matching_pong_measures_the_round_trip() -> None:
    watch = Watch()
    watch.until(5)
    watch.until(5.25)
    watch.receive(pong(1))
    assert watch.rtt == [0.25]


def test_a_pong_for_another_ping_or_for_none_measures_nothing() -> None:
    watch = Watch()
    watch.receive(pong(0))
    watch.receive(pong(1))
    watch.until(5.1)
    watch.receive(pong(2))
    watch.receive(pong(1))
    watch.receive(pong(1))
    assert watch.rtt == [pytest.approx(0.1)]


async def test_a_stream_knows_its_round_trip() -> None:
    ours = Stack(Heartbeat(interval=1, timeout=3), Framing(), transports=(Memory(),))
    async with ours.serve("memory://here", lambda stream: stream.receive()), ours.connect("memory://here") as stream:
        assert stream.extra(LinkAttribute.rtt) is None
        await anyio.sleep(2)
        assert stream.extra(LinkAttribute.rtt) == 0
        await stream.send(b"done")


# --- when it gives up ------------------------------------------------------------------------------------------------


def test_f30_a_peer_that_vanishes_from_an_idle_link_is_dead_after_the_timeout() -> None:
    watch = Watch()
    watch.receive()
    with pytest.raises(LinkLost, match="nothing was received for 15 s"):
        watch.until(100)
    assert watch.now == 15


def test_f31_writes_that_seem_to_succeed_keep_no_dead_peer_alive() -> None:
    watch = Watch()

    def write_all_the_time() -> None:
        for tenth in range(1000):
            watch.until(tenth / 10)
            watch.send()

    with pytest.raises(LinkLost):
        write_all_the_time()
    assert watch.now == 15


def test_any_bytes_prove_that_the_peer_lives_an_unfinished_frame_too() -> None:
    watch = Watch()
    for second in range(0, 1000, 14):
        watch.until(second)
        watch.receive()
    watch.until(994 + 14.9)


def test_a_link_is_new_for_as_long_as_any_other() -> None:
    with pytest.raises(LinkLost):
        Watch().until(15)
    Watch().until(14.999)


@given(st.lists(st.floats(0.01, 14.9), max_size=40))
def test_a_peer_that_is_heard_within_each_timeout_is_never_given_up(gaps: list[float]) -> None:
    watch = Watch()
    for gap in gaps:
        watch.until(watch.now + gap)
        watch.receive()
    for (before, _), (after, _) in zip(watch.said, watch.said[1:], strict=False):
        assert after - before >= 5 - 1e-6


# --- our own stalls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [20.01, 35, 8 * 3600.0])
def test_f32_f34_after_a_stall_of_our_own_the_peer_gets_one_fresh_deadline(late: float) -> None:
    # A laptop that slept, a loop that was blocked: the timer comes late, and the peer's answer may lie unread.
    watch = Watch()
    watch.now = late
    watch.stage.on_time(late)
    watch.flush()
    assert notes([Batch([note for _, note in watch.said], [])]) == [ping(1)]
    watch.now = late + 0.1
    watch.receive(pong(1))
    watch.until(late + 14)


@pytest.mark.parametrize("late", [20.01, 8 * 3600.0])
def test_f32_a_peer_that_died_during_our_stall_is_found_within_one_interval(late: float) -> None:
    watch = Watch()
    watch.now = late
    watch.stage.on_time(late)
    watch.flush()
    with pytest.raises(LinkLost):
        watch.until(late + 5)


def test_a_timer_that_is_a_little_late_is_no_stall() -> None:
    stage = HeartbeatStage(5, 15, 0.0)
    with pytest.raises(LinkLost, match=r"nothing was received for 18 s"):
        stage.on_time(18.0)


def test_f33_a_wall_clock_that_steps_is_not_looked_at() -> None:
    from towline.layers import heartbeat

    assert not hasattr(heartbeat, "time")
    assert not hasattr(heartbeat, "datetime")


def test_f35_a_peer_that_is_stopped_for_ten_seconds_stays_and_one_for_a_minute_does_not() -> None:
    watch = Watch()
    watch.until(10)
    watch.receive()
    with pytest.raises(LinkLost):
        watch.until(70)
    assert watch.now == 25


def test_the_time_in_which_we_did_not_read_is_not_held_against_the_peer() -> None:
    watch = Watch()
    watch.until(10)
    watch.stage.paused(10)
    watch.now = 10
    watch.until(24.9)
    with pytest.raises(LinkLost):
        watch.until(25)


# --- the end of a direction ------------------------------------------------------------------------------------------


def test_after_the_peers_end_silence_says_nothing_and_we_go_on_saying_that_we_live() -> None:
    watch = Watch()
    watch.stage.receive_eof(CLEAN)
    watch.until(100)
    assert [at for at, _ in watch.said] == [5.0 * n for n in range(1, 21)]


async def test_a_link_that_swallows_everything_is_found_dead_on_both_sides() -> None:
    chaos = Chaos(Memory(), cuts=[Cut(seconds=100, how="blackhole")])
    ours = Stack(Heartbeat(), Framing(), transports=(chaos,))
    lost_at: list[float] = []

    async def wait(stream: object) -> None:
        try:
            await stream.receive()  # type: ignore[attr-defined]
        except ConnectionLost:
            lost_at.append(anyio.current_time() - start)
            raise

    async with ours.serve("memory://here", wait), ours.open() as opened:
        start = anyio.current_time()
        stream = await opened.connect("memory://here")
        with pytest.raises(ConnectionLost):
            await stream.receive()
        assert anyio.current_time() - start <= 116
        await anyio.sleep(20)
    assert len(lost_at) == 1
    assert 100 <= lost_at[0] <= 121


async def test_an_idle_link_lives_for_hours() -> None:
    ours = Stack(Heartbeat(), Framing(), transports=(Memory(),))

    async def echo(stream: object) -> None:
        async for item in stream:  # type: ignore[attr-defined]
            await stream.send(item)  # type: ignore[attr-defined]

    async with ours.serve("memory://here", echo), ours.connect("memory://here") as stream:
        await anyio.sleep(3 * 3600)
        await stream.send(b"still there?")
        assert await stream.receive() == b"still there?"


@pytest.mark.parametrize(("interval", "timeout"), [(0, 1), (5, 5), (15, 5), (-1, 5), (float("nan"), 5)])
def test_an_interval_that_does_not_fit_the_timeout_is_refused(interval: float, timeout: float) -> None:
    with pytest.raises(ValueError, match="0 < interval < timeout"):
        Heartbeat(interval=interval, timeout=timeout)
