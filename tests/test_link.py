"""The pump: how a byte travels, who waits for whom, and what ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from typing_extensions import override

from towline.endpoint import Endpoint
from towline.errors import FrameTooLarge, HandshakeFailed, LinkLost, MisuseError, ProtocolViolation
from towline.layers.framing import CONTROL, FramingStage
from towline.layers.heartbeat import PING, PONG, HeartbeatStage
from towline.link import Link
from towline.scope import Scope
from towline.service import Side
from towline.stage import CLEAN, Batch, Driver, Ended, Stage, Top, Units
from towline.streams import FrameStream
from towline.testing import (
    CloggedDriver,
    clogged_driver_pair,
    link_pair,
    lockstep_driver_pair,
    memory_link_pair,
    memory_stream_pair,
    open_scope,
)
from towline.transports._stream import StreamDriver


class ScriptedDriver(Driver):
    """Reads what it was given, and records every write by itself."""

    def __init__(self, *reads: bytes, inline: bool = True) -> None:
        self.inline = inline
        self.reads = deque(reads)
        self.written: list[bytes] = []
        self.events: list[str] = []
        self.aborted = False
        self.closed = False
        self.changed = anyio.Event()

    def feed(self, data: bytes) -> None:
        self.reads.append(data)
        self._notify()

    def _notify(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def read(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        while not self.reads and not self.aborted:
            await self.changed.wait()
        if self.aborted:
            raise LinkLost("aborted")
        return self.reads.popleft()

    async def write(self, data: bytes | bytearray) -> None:
        await anyio.lowlevel.checkpoint()
        self.written.append(bytes(data))
        self.accepted += len(data)

    def write_now(self, data: bytes | bytearray) -> None:
        self.written.append(bytes(data))
        self.accepted += len(data)
        self.events.append("write_now")

    def abort(self) -> None:
        self.aborted = True
        self._notify()

    async def aclose(self) -> None:
        self.closed = True
        await anyio.lowlevel.checkpoint()


class Recorder(Top):
    """Sends what is put into its outbox, one flush at a time; keeps what arrives."""

    def __init__(self) -> None:
        self.outbox: list[Units] = []
        self.inbox: list[Any] = []
        self.pulls = 0
        self.keep_after_eof = False
        self.eof: Ended = None

    def send(self, link: Link, *units: Any) -> None:
        self.outbox.append(list(units))
        self.wants = True
        link.wake()

    def pull(self, now: float) -> Units:
        self.pulls += 1
        self.wants = False
        units = [unit for flush in self.outbox for unit in flush]
        self.outbox.clear()
        return units

    def deliver(self, units: Units, now: float) -> None:
        for unit in units:
            if isinstance(unit, Batch):
                self.inbox += [*unit.notes, *unit.frames]
            else:
                self.inbox.append(unit)

    def receive_eof(self, ended: Ended) -> bool:
        self.eof = ended
        return self.keep_after_eof


def link_on(driver: Driver, scope: Scope | None = None, *stages: Stage) -> Link:
    link = Link(driver, side=Side.DIALLING, endpoint=Endpoint.parse("memory://test"))
    if scope is not None:
        link.bind(scope)
    for stage in stages:
        link.push(stage)
    return link


class Run:
    """A link that is being pumped in a task of its own, and how that ended."""

    def __init__(self) -> None:
        self.error: LinkLost | None = None
        self.done = anyio.Event()

    async def __call__(self, link: Link, top: Top) -> None:
        try:
            await link.run(top)
        except LinkLost as error:
            self.error = error
        finally:
            self.done.set()


@asynccontextmanager
async def running(link: Link, top: Top) -> AsyncGenerator[Run]:
    """Pump meanwhile, from the moment at which the writer has parked."""
    run = Run()
    link.scope.task_group.start_soon(run, link, top)
    await anyio.wait_all_tasks_blocked()
    yield run
    link.abort(LinkLost("the test is over"))
    await run.done.wait()


def frame(data: bytes, flag: int = 0) -> bytes:
    return (len(data) | flag).to_bytes(4, "big") + data


def note(data: bytes) -> bytes:
    return frame(data, CONTROL)


def ping(number: int) -> bytes:
    return note(bytes([PING]) + number.to_bytes(8, "big"))


# --- batches, and who writes -----------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_all_that_waits_goes_out_in_one_write() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        for n in range(5):
            top.outbox.append([b"%d" % n])
        async with running(link, top):
            assert driver.written == [b"01234"]


async def test_a_lone_message_is_written_in_its_senders_own_task_and_the_rest_of_the_tick_in_one_write() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        async with running(link, top):
            top.send(link, b"1")
            assert driver.written == [b"1"]  # nobody else has run
            top.send(link, b"2")
            top.send(link, b"3")
            assert driver.written == [b"1"]
            await anyio.wait_all_tasks_blocked()
            assert driver.written == [b"1", b"23"]
            assert driver.events == ["write_now", "write_now"]


async def test_only_the_writer_writes_where_a_driver_cannot_try() -> None:
    driver = ScriptedDriver(inline=False)
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        async with running(link, top):
            top.send(link, b"1")
            top.send(link, b"2")
            assert driver.written == []
            await anyio.wait_all_tasks_blocked()
            assert driver.written == [b"12"]


async def test_what_a_driver_could_not_place_is_written_before_what_comes_later() -> None:
    a, b = clogged_driver_pair(accepts=2)
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        async with running(link, top):
            top.send(link, b"abcd")
            assert a.unsent
            top.send(link, b"efgh")
            await anyio.wait_all_tasks_blocked()
            assert await b.read() == b"ab"
            a.release()
            got = b""
            while len(got) < 6:
                got += await b.read()
            assert got == b"cdefgh"


async def test_one_read_is_delivered_as_one_list() -> None:
    class Lists(Recorder):
        @override
        def deliver(self, units: Units, now: float) -> None:
            self.inbox.append(len(units))

    driver = ScriptedDriver()
    async with open_scope() as scope:
        stage = FramingStage(1 << 16)
        link, top = link_on(driver, scope, stage), Lists()
        async with running(link, top):
            driver.feed(b"".join(frame(b"%d" % n) for n in range(100)))
            await anyio.wait_all_tasks_blocked()
            assert top.inbox == [1]  # one Batch


async def test_wake_is_harmless_before_the_pump_runs_and_after_it_has_ended() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        top.send(link, b"early")
        async with running(link, top):
            assert driver.written == [b"early"]
        top.send(link, b"late")
        assert driver.written == [b"early"]


@pytest.mark.parametrize("inline", [True, False])
async def test_a_writer_that_always_has_something_lets_others_run(inline: bool) -> None:
    class Endless(Recorder):
        @override
        def pull(self, now: float) -> Units:
            self.pulls += 1
            return [b"x"]

    class Greedy(ScriptedDriver):
        @override
        async def write(self, data: bytes | bytearray) -> None:
            pass  # never suspends

    async with open_scope() as scope:
        link, top = link_on(Greedy(inline=inline), scope), Endless()
        run = Run()
        scope.task_group.start_soon(run, link, top)
        most = 0
        for _ in range(50):
            before = top.pulls
            await anyio.lowlevel.checkpoint()
            most = max(most, top.pulls - before)
        assert top.pulls > 10
        assert most <= 3  # in one turn of ours: the first write, one more, and the one that waits for its turn
        link.abort(LinkLost("enough"))
        await run.done.wait()


async def test_nothing_is_pulled_while_a_driver_holds_what_was_not_accepted() -> None:
    """So that what waits does so where it is counted, and acks and pongs are as fresh as they can be."""
    a, b = clogged_driver_pair(accepts=3)
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        async with running(link, top):
            link.cork()  # the writer itself does it
            top.send(link, b"first")
            await anyio.wait_all_tasks_blocked()
            assert a.accepted == 3
            top.send(link, b"second")
            await anyio.wait_all_tasks_blocked()
            assert top.outbox == [[b"second"]]
            a.release()
            got = b""
            while len(got) < 11:
                got += await b.read()
            assert got == b"firstsecond"


# --- the reader and the writer do not wait for each other ------------------------------------------------------------


async def test_the_reader_goes_on_while_the_writer_is_stuck() -> None:
    a, b = clogged_driver_pair(accepts=0)
    b.release()
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        async with running(link, top):
            top.send(link, b"stuck")
            for n in range(10):
                await b.write(b"%d" % n)
                await anyio.wait_all_tasks_blocked()
            assert b"".join(top.inbox) == b"0123456789"


@pytest.mark.smoke
async def test_a_flood_of_pings_costs_one_pong() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope, FramingStage(1 << 16), HeartbeatStage(5, 15, 0.0)), Recorder()
        async with running(link, top):
            driver.feed(b"".join(map(ping, range(1000))))
            await anyio.wait_all_tasks_blocked()
            pong = note(bytes([PONG]) + (999).to_bytes(8, "big"))
            assert driver.written == [pong]
            assert top.inbox == []


async def test_pings_that_come_while_the_writer_is_stuck_cost_one_pong_and_no_memory() -> None:
    a, b = clogged_driver_pair(accepts=0)
    b.release()
    async with open_scope() as scope:
        link, top = link_on(a, scope, FramingStage(1 << 16), HeartbeatStage(5, 15, anyio.current_time())), Recorder()
        async with running(link, top):
            for start in range(0, 50_000, 1000):
                await b.write(b"".join(map(ping, range(start, start + 1000))))
                await anyio.wait_all_tasks_blocked()
            a.release()
            got = b""
            with anyio.move_on_after(1):
                while True:
                    got += await b.read()
            # The pong that was stuck and the last. Time may have passed, and pongs do not count as sent: then one ping.
            pongs = [note(bytes([PONG]) + number.to_bytes(8, "big")) for number in (999, 49_999)]
            assert got.removesuffix(ping(1)) == b"".join(pongs)


async def test_two_full_sides_that_send_at_once_do_not_deadlock() -> None:
    async with open_scope() as scope:
        a, b = link_pair(lockstep_driver_pair(), scope)
        tops = Recorder(), Recorder()
        for top in tops:
            top.outbox = [[b"x" * 100_000] for _ in range(20)]
        async with running(a, tops[0]), running(b, tops[1]):
            await anyio.wait_all_tasks_blocked()
            assert [sum(map(len, top.inbox)) for top in tops] == [2_000_000, 2_000_000]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
async def test_what_was_good_in_a_read_is_delivered_before_its_error_counts() -> None:
    async with open_scope() as scope:
        driver = ScriptedDriver(frame(b"one") + frame(b"two") + b"\x7f\xff\xff\xff")
        link, top = link_on(driver, scope, FramingStage(1 << 16)), Recorder()
        with pytest.raises(LinkLost) as caught:
            await link.run(top)
        assert top.inbox == [b"one", b"two"]
        assert isinstance(caught.value.__cause__, FrameTooLarge)
        assert "2,147,483,647" in str(caught.value)
        assert driver.aborted


async def test_what_was_good_before_an_end_is_delivered_before_the_end() -> None:
    async with open_scope() as scope:
        link, top = link_on(ScriptedDriver(frame(b"one"), b""), scope, FramingStage(1 << 16)), Recorder()
        with pytest.raises(LinkLost, match="the peer closed the link"):
            await link.run(top)
        assert top.inbox == [b"one"]
        assert top.eof is CLEAN


async def test_a_link_that_ends_inside_a_frame_is_lost_and_not_ended() -> None:
    async with open_scope() as scope:
        link, top = link_on(ScriptedDriver(frame(b"one")[:-1], b""), scope, FramingStage(1 << 16)), Recorder()
        with pytest.raises(LinkLost, match="inside a frame, 6 bytes into it"):
            await link.run(top)
        assert top.eof is None


async def test_the_end_of_the_peers_direction_leaves_ours_when_the_top_says_so() -> None:
    driver = ScriptedDriver(b"")
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        top.keep_after_eof = True
        async with running(link, top) as run:
            assert top.eof is CLEAN
            top.send(link, b"still here")
            assert driver.written == [b"still here"]
            assert not run.done.is_set()


async def test_a_fault_in_a_stage_is_logged_and_ends_the_link(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Stage):
        @override
        def incoming(self, units: Units, now: float) -> Units:
            return [unit[1000] for unit in units]

    async with open_scope() as scope:
        link = link_on(ScriptedDriver(b"x"), scope, Faulty())
        with pytest.raises(LinkLost, match="the link was aborted: index out of range") as caught:
            await link.run(Recorder())
        assert isinstance(caught.value.__cause__, IndexError)
    assert "a stage failed" in caplog.text


@pytest.mark.parametrize("inline", [True, False])
async def test_a_fault_while_sending_ends_the_link_and_does_not_reach_the_sender(
    inline: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Faulty(Stage):
        @override
        def outgoing(self, units: Units, now: float) -> Units:
            raise ProtocolViolation("our own rules forbid it")

    async with open_scope() as scope:
        link, top = link_on(ScriptedDriver(inline=inline), scope, Faulty()), Recorder()
        async with running(link, top) as run:
            top.send(link, b"x")
            await run.done.wait()
            assert isinstance(run.error and run.error.__cause__, ProtocolViolation)
    assert caplog.records == []


async def test_a_fault_in_on_time_ends_the_link(caplog: pytest.LogCaptureFixture) -> None:
    class Faulty(Stage):
        deadline: float | None = None

        @override
        def on_time(self, now: float) -> None:
            raise ZeroDivisionError("a fault")

    stage = Faulty()
    stage.deadline = anyio.current_time() + 5
    async with open_scope() as scope:
        link = link_on(ScriptedDriver(), scope, stage)
        with pytest.raises(LinkLost, match="a fault"):
            await link.run(Recorder())
    assert "a stage failed" in caplog.text


# --- abort -----------------------------------------------------------------------------------------------------------


async def test_abort_is_done_when_it_returns_and_the_first_error_counts() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope), Recorder()
        async with running(link, top) as run:
            first = LinkLost("the first")
            link.abort(first)
            assert driver.aborted
            assert link.is_aborted
            link.abort(LinkLost("the second"))
            top.send(link, b"fenced")
            driver.feed(b"fenced")
            await run.done.wait()
            assert run.error is first
            assert driver.written == []
            assert top.inbox == []


async def test_an_error_that_is_no_lost_link_becomes_one_with_a_cause() -> None:
    async with open_scope() as scope:
        link = link_on(ScriptedDriver(), scope)
        violation = ProtocolViolation("a gap")
        async with running(link, Recorder()) as run:
            link.abort(violation)
            await run.done.wait()
            assert str(run.error) == "the link was aborted: a gap"
            assert run.error is not None
            assert run.error.__cause__ is violation


async def test_a_link_that_was_aborted_before_it_is_pumped_says_why() -> None:
    async with open_scope() as scope:
        link = link_on(ScriptedDriver(), scope)
        link.abort(LinkLost("too many strangers"))
        with pytest.raises(LinkLost, match="too many strangers"):
            await link.run(Recorder())


async def test_a_pump_that_is_cancelled_aborts_its_driver() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        with anyio.move_on_after(1) as cancelled:
            await link_on(driver, scope).run(Recorder())
        assert cancelled.cancelled_caught
        assert driver.aborted


async def test_a_link_that_negotiates_is_aborted_by_any_error_and_by_cancellation() -> None:
    for error in (ValueError("wrong"), HandshakeFailed("no")):
        driver = ScriptedDriver()
        with pytest.raises(type(error)), link_on(driver).closing_on_error():
            raise error
        assert driver.aborted
    driver = ScriptedDriver()
    with anyio.move_on_after(1), link_on(driver).closing_on_error():
        await anyio.sleep_forever()
    assert driver.aborted


# --- the last word ---------------------------------------------------------------------------------------------------


class SaysGoodbye(Stage):
    @override
    def close(self) -> Units:
        return [b"goodbye"]


@pytest.mark.smoke
async def test_finish_writes_what_waits_then_the_last_word_then_closes() -> None:
    driver = ScriptedDriver(inline=False)
    async with open_scope() as scope:
        link, top = link_on(driver, scope, SaysGoodbye()), Recorder()
        async with running(link, top) as run:
            top.send(link, b"message, ")
            link.finish()
            link.finish()
            await run.done.wait()
            assert run.error is None
            assert b"".join(driver.written) == b"message, goodbye"
            assert driver.closed
            assert not driver.aborted


async def test_the_last_words_of_inner_stages_carry_those_of_outer_ones() -> None:
    class Upper(Stage):
        @override
        def outgoing(self, units: Units, now: float) -> Units:
            return [unit.upper() for unit in units]

        @override
        def close(self) -> Units:
            return [b", over"]

    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope, Upper(), SaysGoodbye()), Recorder()
        async with running(link, top) as run:
            link.finish()
            await run.done.wait()
        assert driver.written == [b"GOODBYE, over"]


async def test_finish_before_the_pump_runs_is_not_forgotten() -> None:
    driver = ScriptedDriver()
    async with open_scope() as scope:
        link, top = link_on(driver, scope, SaysGoodbye()), Recorder()
        top.outbox.append([b"message, "])
        link.finish()
        await link.run(top)
        assert driver.written == [b"message, ", b"goodbye"]


async def test_a_peer_that_does_not_take_the_last_word_is_aborted_after_the_timeout() -> None:
    a, _ = clogged_driver_pair(accepts=3)
    async with open_scope() as scope:
        link, top = link_on(a, scope, SaysGoodbye()), Recorder()
        async with running(link, top) as run:
            start = anyio.current_time()
            link.finish(timeout=2)
            await run.done.wait()
            assert "last bytes" in str(run.error)
            assert anyio.current_time() - start == pytest.approx(2)


async def test_an_end_from_the_peer_does_not_spoil_our_own_last_word() -> None:
    a, b = clogged_driver_pair(accepts=0)
    async with open_scope() as scope:
        link, top = link_on(a, scope, SaysGoodbye()), Recorder()
        async with running(link, top) as run:
            link.finish()
            await b.send_eof()
            await anyio.wait_all_tasks_blocked()
            a.release()
            await run.done.wait()
            assert run.error is None


# --- a writer that is stuck ------------------------------------------------------------------------------------------


async def test_a_write_of_which_no_byte_is_accepted_for_the_timeout_ends_the_link() -> None:
    a, _ = clogged_driver_pair(accepts=3)
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        link.write_timeout = 10
        async with running(link, top) as run:
            await anyio.sleep(100)  # with nothing to write nothing is stuck
            start = anyio.current_time()
            top.send(link, b"hello")
            await run.done.wait()
            assert str(run.error) == "no byte was accepted for 10 s"
            assert anyio.current_time() - start == pytest.approx(10)


async def test_a_write_that_goes_on_slowly_is_left_alone() -> None:
    a, b = clogged_driver_pair(accepts=0)
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        link.write_timeout = 10
        async with running(link, top) as run:
            top.send(link, b"hello")
            got = b""
            while got != b"hello":
                await anyio.sleep(9)
                a.clog(1)
                a._outgoing.notify()
                got += await b.read()
            await anyio.sleep(100)
            assert not run.done.is_set()


async def test_without_a_bound_a_writer_may_wait_for_ever() -> None:
    a, _ = clogged_driver_pair(accepts=0)
    async with open_scope() as scope:
        link, top = link_on(a, scope), Recorder()
        async with running(link, top) as run:
            top.send(link, b"hello")
            await anyio.sleep(80_000)
            assert not run.done.is_set()


# --- deadlines -------------------------------------------------------------------------------------------------------


class Holding(Stage):
    """Keeps what is sent for a moment, for more to come."""

    deadline: float | None = None

    def __init__(self) -> None:
        self.held_units: Units = []

    @override
    def outgoing(self, units: Units, now: float) -> Units:
        self.held_units += units
        self.deadline = now + 3
        return []

    @override
    def on_time(self, now: float) -> None:
        self.deadline = None
        self.wants = True

    @override
    def pending(self, now: float) -> Units:
        self.wants = False
        units, self.held_units = self.held_units, []
        return units


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize("corked", [True, False])
async def test_a_stage_that_holds_what_is_sent_is_told_of_the_time(inline: bool, corked: bool) -> None:
    driver = ScriptedDriver(inline=inline)
    async with open_scope() as scope:
        link, top = link_on(driver, scope, Holding()), Recorder()
        async with running(link, top):
            if corked:
                link.cork()
            top.send(link, b"later")
            await anyio.sleep(2.9)
            assert driver.written == []
            await anyio.sleep(0.2)
            assert driver.written == [b"later"]


@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(
    "steps", ["w", "r", "wr", "rw", "pw", "wp", "wwwrr", "p", "stuck", "quiet w", "quiet p", "w quiet r", "corked"]
)
async def test_a_ping_goes_out_on_time_whatever_was_written_and_read_before(inline: bool, steps: str) -> None:
    a, b = clogged_driver_pair(accepts=0)
    a.release()
    b.release()
    a.inline = inline
    async with open_scope() as scope:
        sent_at = received_at = anyio.current_time()
        link, top = link_on(a, scope, FramingStage(1 << 16), HeartbeatStage(5, 15, sent_at)), Recorder()
        async with running(link, top):
            for step in [steps] if steps in ("stuck", "corked") else steps.replace("quiet", "q").replace(" ", ""):
                await anyio.sleep(4 if step == "q" else 0.25)
                if step == "r":
                    b.write_now(frame(b"hello"))
                elif step == "p":
                    b.write_now(ping(1))  # the pong does not count as sent
                elif step in ("w", "corked"):
                    if step == "corked":
                        link.cork()
                    top.send(link, Batch([], [b"hello"]))
                elif step == "stuck":
                    a.clog(3)
                    top.send(link, Batch([], [b"hello"]))
                    await anyio.sleep(1)
                    a.release()
                if step in ("r", "p"):
                    received_at = anyio.current_time()
                elif step != "q":
                    sent_at = anyio.current_time()
            await anyio.sleep(0.25)
            data = await b.read() if a.accepted else b""
            assert bytes([PING]) + bytes(7) not in data
            while bytes([PING]) + bytes(7) not in data:
                data = await b.read()
            assert anyio.current_time() == pytest.approx(min(sent_at, received_at) + 5)
            b.write_now(note(bytes([PONG]) + data[-8:]))
            received_at = anyio.current_time()
            await b.read()
            assert anyio.current_time() == pytest.approx(received_at + 5)  # and so does the next


# --- negotiating -----------------------------------------------------------------------------------------------------


async def test_bytes_that_were_read_too_far_are_not_lost() -> None:
    link = link_on(ScriptedDriver(b"abc", b"defgh"))
    assert await link.receive_exactly(2) == b"ab"
    assert await link.receive_exactly(0) == b""
    assert await link.receive_exactly(3) == b"cde"
    assert await link.receive_some() == b"fgh"


@pytest.mark.smoke
async def test_a_stage_that_is_pushed_gets_what_was_read_too_far() -> None:
    link = link_on(ScriptedDriver(b"hello" + note(b"n1") + note(b"n2") + frame(b"data")))
    assert await link.receive_exactly(5) == b"hello"
    link.push(FramingStage(1 << 16))
    assert await link.receive_note() == b"n1"
    assert await link.receive_note() == b"n2"
    async with open_scope() as scope:
        link.bind(scope)
        top = Recorder()
        async with running(link, top):
            assert top.inbox == [b"data"]


async def test_data_before_the_handshake_is_done_is_a_violation() -> None:
    link = link_on(ScriptedDriver(frame(b"data") + note(b"n1")), None, FramingStage(1 << 16))
    with pytest.raises(ProtocolViolation, match="data before"):
        await link.receive_note()


async def test_an_end_while_negotiating_says_that_the_other_end_closed() -> None:
    async def exactly(link: Link) -> bytes:
        return await link.receive_exactly(3)

    async def some(link: Link) -> bytes:
        await link.receive_exactly(2)
        return await link.receive_some()

    for receive in (exactly, some):
        with pytest.raises(HandshakeFailed, match="closed the link during") as caught:
            await receive(link_on(ScriptedDriver(b"ab", b"")))
        assert caught.value.ended
    with pytest.raises(HandshakeFailed):
        await link_on(ScriptedDriver(b""), None, FramingStage(1 << 16)).receive_note()


async def test_an_error_in_the_bytes_is_raised_to_who_negotiates_after_what_was_good() -> None:
    link = link_on(ScriptedDriver(note(b"good") + b"\xff\xff\xff\xff"), None, FramingStage(1 << 16))
    assert await link.receive_note() == b"good"
    with pytest.raises(FrameTooLarge):
        await link.receive_note()


@pytest.mark.parametrize("before", [b"", b"abc"])
async def test_receive_exactly_that_is_cancelled_loses_no_byte(before: bytes) -> None:
    driver = ScriptedDriver()
    link = link_on(driver)
    if before:
        driver.feed(before)
    with anyio.move_on_after(1):
        await link.receive_exactly(6)
    driver.feed(b"defghi")
    assert await link.receive_some() == (before or b"defghi")


async def test_bytes_of_a_read_survive_when_the_answer_to_it_is_cancelled() -> None:
    class Answers(Stage):
        @override
        def incoming(self, units: Units, now: float) -> Units:
            self.wants = bool(units)
            return units

        @override
        def pending(self, now: float) -> Units:
            self.wants = False
            return [b"an answer"]

    a, b = clogged_driver_pair(accepts=0)
    b.release()
    link = link_on(a, None, Answers())
    await b.write(b"abc")
    with anyio.move_on_after(1):
        await link.receive_exactly(6)
    await b.write(b"def")
    a.release()
    with anyio.fail_after(5):
        assert await link.receive_exactly(6) == b"abcdef"


async def test_a_stage_answers_while_others_negotiate() -> None:
    driver = ScriptedDriver(ping(7) + note(b"hello"))
    link = link_on(driver, None, FramingStage(1 << 16), HeartbeatStage(5, 15, 0.0))
    assert await link.receive_note() == b"hello"
    assert driver.written == [note(bytes([PONG]) + (7).to_bytes(8, "big"))]


# --- strangers -------------------------------------------------------------------------------------------------------


async def test_established_lifts_the_limits_for_strangers_and_tells_who_counts_them() -> None:
    told: list[str] = []
    big = frame(b"x" * 5000)
    driver = ScriptedDriver(note(b"hello"), big)
    async with open_scope() as scope:
        link, top = link_on(driver, scope, FramingStage(1 << 16)), Recorder()
        link.on_established = lambda: told.append("established")
        assert await link.receive_note() == b"hello"
        link.established()
        async with running(link, top):
            assert top.inbox == [b"x" * 5000]
    assert told == ["established"]


async def test_a_stranger_that_announces_too_much_is_cut_off_before_anything_is_waited_for() -> None:
    link = link_on(ScriptedDriver((4097 | CONTROL).to_bytes(4, "big")), None, FramingStage(1 << 16))
    with pytest.raises(FrameTooLarge, match=r"4,097 bytes, where 4,096"):
        await link.receive_note()


@pytest.mark.parametrize("rest", [5000, 200_000])
async def test_a_large_frame_that_comes_in_one_read_with_the_last_of_the_handshake_is_not_judged_by_its_limit(
    rest: int,
) -> None:
    # A server that resumes writes RESUMED and goes on with data at once: a slow client finds both in one read.
    data = note(b"resumed") + frame(b"x" * rest) + frame(b"y")
    async with open_scope() as scope:
        link, top = link_on(ScriptedDriver(data[:5100], data[5100:]), scope, FramingStage(1 << 20)), Recorder()
        assert await link.receive_note() == b"resumed"
        link.established()
        async with running(link, top):
            assert top.inbox == [b"x" * rest, b"y"]


async def test_a_large_frame_that_was_read_before_framing_was_pushed_is_not_judged_by_the_strangers_limit() -> None:
    async with open_scope() as scope:
        link, top = link_on(ScriptedDriver(b"hello" + frame(b"x" * 5000)), scope), Recorder()
        assert await link.receive_exactly(5) == b"hello"
        link.push(FramingStage(1 << 20))
        link.push(HeartbeatStage(5, 15, anyio.current_time()))
        link.established()
        async with running(link, top):
            assert top.inbox == [b"x" * 5000]


# --- a reader that pauses --------------------------------------------------------------------------------------------


async def test_a_full_top_pauses_the_reader_until_it_has_room() -> None:
    async with open_scope() as scope:
        a, b = memory_link_pair(scope)
        top = Recorder()
        async with running(a, top):
            top.full = True
            await b.driver.write(b"first")  # the read that was under way
            await anyio.wait_all_tasks_blocked()
            await b.driver.write(b"second")
            await anyio.wait_all_tasks_blocked()
            assert top.inbox == [b"first"]
            a.resume_reading()  # too soon: it is still full
            await anyio.wait_all_tasks_blocked()
            assert top.inbox == [b"first"]
            top.full = False
            a.resume_reading()
            await anyio.wait_all_tasks_blocked()
            assert top.inbox == [b"first", b"second"]


async def test_the_time_in_which_our_own_reader_paused_is_not_held_against_the_peer() -> None:
    async with open_scope() as scope:
        a, b = memory_link_pair(scope)
        a.push(FramingStage(1 << 16))
        a.push(HeartbeatStage(5, 15, anyio.current_time()))
        top = Recorder()
        async with running(a, top) as run:
            top.full = True
            await b.driver.write(frame(b"first"))
            await anyio.wait_all_tasks_blocked()
            await b.driver.write(frame(b"second"))
            await anyio.sleep(300)
            assert not run.done.is_set()
            top.full = False
            a.resume_reading()
            await anyio.wait_all_tasks_blocked()
            assert top.inbox == [b"first", b"second"]
            await anyio.sleep(16)  # and now the peer is really silent
            assert "nothing was received" in str(run.error)


# --- senders that are cancelled --------------------------------------------------------------------------------------


def _clogged(accepts: int) -> tuple[Driver, Driver, Callable[[], None]]:
    a, b = clogged_driver_pair(accepts)
    return a, b, a.release


def _clogged_stream(accepts: int) -> tuple[Driver, Driver, Callable[[], None]]:
    a, b = memory_stream_pair(capacity=max(1, accepts))
    return StreamDriver(a), StreamDriver(b), lambda: None


@pytest.mark.parametrize("make", [_clogged, _clogged_stream])
async def test_a_send_that_is_cancelled_was_not_sent_and_never_tears_a_record(
    make: Callable[[int], tuple[Driver, Driver, Callable[[], None]]],
) -> None:
    returned: list[bytes] = []
    async with open_scope() as scope:
        ours, theirs, release = make(10)
        link = link_on(ours, scope, FramingStage(1 << 20))
        stream = FrameStream(link)
        scope.task_group.start_soon(stream.run)
        for n in range(10):
            item = b"%d" % n * 40_000
            with anyio.move_on_after(1):
                await stream.send(item)
                returned.append(item)
        assert 3 <= len(returned) < 10
        release()
        expected = b"".join(map(frame, returned))
        got = b""
        while len(got) < len(expected):
            got += await theirs.read()
        assert got == expected
        link.abort(LinkLost("done"))


async def test_a_link_describes_itself_without_secrets() -> None:
    link = link_on(ScriptedDriver(), None, FramingStage(1 << 16), HeartbeatStage(5, 15, 0.0))
    assert repr(link) == "<Link dialling memory://test negotiating: HeartbeatStage > FramingStage>"
    link.abort(LinkLost("x"))
    assert "aborted" in repr(link)
    assert repr(CLEAN) == "CLEAN"
    assert repr(Batch([b"n"], [b"a", b"b"])) == "Batch(1 notes, 2 frames)"


async def test_a_driver_without_a_way_to_try_says_so() -> None:
    a, _ = lockstep_driver_pair()
    with pytest.raises(TypeError, match="LockstepDriver cannot write without waiting"):
        a.write_now(b"x")


async def test_a_message_above_the_limit_is_the_senders_error_and_no_end_of_the_link() -> None:
    async with open_scope() as scope:
        driver = ScriptedDriver()
        stream = FrameStream(link_on(driver, scope, FramingStage(4096)))
        scope.task_group.start_soon(stream.run)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(MisuseError):
            await stream.send(b"x" * 4097)
        await stream.send(b"small")
        assert driver.written == [frame(b"small")]


async def test_a_clogged_driver_is_a_memory_driver_with_a_description() -> None:
    a, _ = clogged_driver_pair()
    assert isinstance(a, CloggedDriver)
    assert a.description == "memory, clogged"
