"""What arrives is given to a function in the step in which it arrives, in turns: over a session, and over frames."""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from towline import ConnectionLost, Framing, Resume, SessionLost, Stack
from towline.layers.resume import Session
from towline.streams import HIGH_WATER, FrameStream

names = itertools.count()
SMALL = Resume(buffer=100_000, window=100_000, max_message=50_000)

pytestmark = pytest.mark.parametrize("layers", [(SMALL, Framing()), (Framing(),)], ids=["session", "frames"])


@asynccontextmanager
async def ends(*layers: Any) -> AsyncGenerator[tuple[Any, Any]]:
    """Both ends of a connection, of which neither receives anything by itself."""
    stack = Stack(*layers)
    came = anyio.Event()
    held: list[Any] = []

    async def hold(end: Any) -> None:
        held.append(end)
        came.set()
        await anyio.sleep_forever()

    async with stack.serve(f"memory://each-{next(names)}", hold) as server, stack.open() as opened:
        ours = await opened.connect(server.endpoint)
        await ours.send(b"first")
        await came.wait()
        assert await held[0].receive() == b"first"
        with anyio.fail_after(600):
            yield ours, held[0]


def everything(count: int) -> int:
    return count


def one(count: int) -> int:
    return 1


def half(count: int) -> int:
    return -(-count // 2)


def numbered(count: int, size: int = 1000) -> list[bytes]:
    return [b"%05d" % n + bytes(size - 5) for n in range(count)]


def send_together(end: Any, messages: list[bytes]) -> None:
    """As one write, which arrives as one read."""
    end.cork()
    for message in messages:
        assert end.try_send(message)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 -- what happens in the streams themselves sets no event of ours
        await anyio.sleep(0.1)


class Taker:
    """Takes what arrives, in a task that may be cancelled, and keeps what it was."""

    def __init__(
        self,
        end: Any,
        turn: Callable[[int], int] = everything,
        then: Callable[[list[bytes]], None] = lambda _: None,
    ) -> None:
        self.batches: list[list[bytes]] = []
        self.by: list[int] = []  # in which task each batch was taken
        self.task = 0
        self.scope = anyio.CancelScope()
        self.error: Exception | None = None
        self._end = end
        self._turn = turn
        self._then = then

    @property
    def taken(self) -> list[bytes]:
        return [message for batch in self.batches for message in batch]

    def _take(self, messages: list[bytes]) -> None:
        self.batches.append(messages)
        self.by.append(anyio.get_current_task().id)
        self._then(messages)

    async def run(self) -> None:
        self.task = anyio.get_current_task().id
        with self.scope:
            try:
                await self._end.receive_each(self._take, self._turn)
            except Exception as error:
                self.error = error


# --- when it is taken ------------------------------------------------------------------------------------------------


async def test_it_is_taken_where_it_arrives_and_the_task_that_waits_is_not_woken(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        for n in range(3):
            await ours.send(b"%d" % n)
            await wait_all_tasks_blocked()
        assert taker.batches == [[b"0"], [b"1"], [b"2"]]
        assert taker.task not in taker.by
        taker.scope.cancel()


async def test_what_had_arrived_before_it_began_comes_first(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        for n in range(3):
            await ours.send(b"%d" % n)
        await wait_all_tasks_blocked()
        taker = Taker(theirs)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        assert taker.batches == [[b"0", b"1", b"2"]]
        assert taker.by == [taker.task]
        await ours.send(b"3")
        await wait_all_tasks_blocked()
        assert taker.taken == [b"0", b"1", b"2", b"3"]
        taker.scope.cancel()


async def test_what_is_too_much_for_one_turn_is_taken_in_the_next_ones_with_nothing_more_to_arrive(
    layers: tuple[Any, ...],
) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, half)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(20, 10))
        await wait_all_tasks_blocked()
        assert taker.taken == numbered(20, 10)
        assert [len(batch) for batch in taker.batches] == [10, 5, 3, 1, 1]
        assert taker.by[0] != taker.task
        assert {*taker.by[1:]} == {taker.task}
        taker.scope.cancel()


@pytest.mark.parametrize("turn", [one, half, everything])
async def test_the_order_is_kept_whoever_takes_it_while_more_and_more_arrives(
    layers: tuple[Any, ...], turn: Callable[[int], int]
) -> None:
    messages = numbered(2000, 700)  # many windows
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, turn)
        tasks.start_soon(taker.run)
        for start in range(0, len(messages), 7):
            for message in messages[start : start + 7]:
                await ours.send(message)
            if start % 5 == 0:
                await anyio.lowlevel.checkpoint()
        await until(lambda: len(taker.taken) == len(messages))
        assert taker.taken == messages
        if isinstance(theirs, Session):
            assert (theirs.core.inbox_cost, theirs.core.consumed_upto) == (0, len(messages) + 1)
        else:
            assert theirs._inbox_size == 0
        taker.scope.cancel()


async def test_others_run_between_two_turns_however_much_waits(layers: tuple[Any, ...]) -> None:
    ran = 0

    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        send_together(ours, numbered(300, 10))
        await wait_all_tasks_blocked()
        seen: list[int] = []
        taker = Taker(theirs, one, lambda _: seen.append(ran))

        async def others() -> None:
            nonlocal ran
            while len(seen) < 300:
                await anyio.lowlevel.checkpoint()
                ran += 1

        tasks.start_soon(taker.run)
        tasks.start_soon(others)
        while len(seen) < 300:
            await anyio.lowlevel.checkpoint()
        # In any two turns: two tasks that both are ready run in either order, on trio.
        assert all(before < after for before, after in zip(seen, seen[2:], strict=False))
        assert taker.taken == numbered(300, 10)
        taker.scope.cancel()


# --- back-pressure ---------------------------------------------------------------------------------------------------


async def test_the_sender_waits_while_nobody_takes_and_goes_on_when_somebody_does(layers: tuple[Any, ...]) -> None:
    sent = 0

    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:

        async def send() -> None:
            nonlocal sent
            for message in numbered(1000):
                await ours.send(message)
                sent += 1

        tasks.start_soon(send)
        await anyio.sleep(10)
        assert 90 < sent < 900
        if isinstance(theirs, FrameStream):
            assert HIGH_WATER < theirs._inbox_size < 3 * HIGH_WATER
        taker = Taker(theirs, one)
        tasks.start_soon(taker.run)
        await until(lambda: sent == len(taker.taken) == 1000)
        assert taker.taken == numbered(1000)
        taker.scope.cancel()


# --- cancelled, and once more ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(1, 6))
async def test_cancelled_it_has_taken_each_message_or_has_left_it(layers: tuple[Any, ...], turns: int) -> None:
    """In the step of its turns, whichever that is: by what takes, as if a handler had cancelled it all."""
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:

        def cancel(_: list[bytes]) -> None:
            if len(first.batches) == turns:
                first.scope.cancel()

        first = Taker(theirs, one, cancel)
        tasks.start_soon(first.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(10, 10))
        await wait_all_tasks_blocked()
        assert len(first.taken) == turns
        second = Taker(theirs, half, lambda _: second.scope.cancel())
        tasks.start_soon(second.run)
        await wait_all_tasks_blocked()
        rest = [await theirs.receive() for _ in range(10 - len(first.taken) - len(second.taken))]
        assert first.taken + second.taken + rest == numbered(10, 10)
        third = Taker(theirs)
        tasks.start_soon(third.run)
        await wait_all_tasks_blocked()
        await ours.send(b"last")
        await wait_all_tasks_blocked()
        assert (first.taken + second.taken + rest, third.taken) == (numbered(10, 10), [b"last"])
        third.scope.cancel()


async def test_cancelled_while_it_waits_it_takes_nothing_more(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        taker.scope.cancel()
        await wait_all_tasks_blocked()
        await ours.send(b"x")
        await wait_all_tasks_blocked()
        assert await theirs.receive() == b"x"
        assert not taker.batches


# --- no two at once --------------------------------------------------------------------------------------------------


def ways_to_receive(end: Any) -> list[Callable[[], Any]]:
    def each() -> Any:
        return end.receive_each(fail, everything)

    def fail(messages: list[bytes]) -> None:
        raise AssertionError(f"{len(messages)} messages were taken by the wrong one")

    ways = [end.receive, each]
    return [*ways, end.receive_many] if isinstance(end, Session) else ways


async def test_who_else_receives_meanwhile_is_told_so_and_the_first_goes_on(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        for receive in ways_to_receive(theirs):
            with pytest.raises(anyio.BusyResourceError):
                await receive()
        await ours.send(b"x")
        await wait_all_tasks_blocked()
        assert taker.taken == [b"x"]
        taker.scope.cancel()


async def test_nor_does_anybody_get_what_waits_for_its_next_turn(layers: tuple[Any, ...]) -> None:
    """In every step of the loop between its turns, and when the last of it has just been taken."""
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, one)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(30, 10))
        while len(taker.taken) < 30:
            for receive in ways_to_receive(theirs):
                with pytest.raises(anyio.BusyResourceError):
                    await receive()
            await anyio.lowlevel.checkpoint()
        assert (taker.taken, taker.error) == (numbered(30, 10), None)
        await ours.send(b"x")
        await wait_all_tasks_blocked()
        assert taker.taken[-1] == b"x"
        taker.scope.cancel()


async def test_while_another_receives_it_is_told_so_and_takes_nothing_from_it(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        received: list[bytes] = []

        async def receive() -> None:
            received.append(await theirs.receive())

        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        taker = Taker(theirs)
        await ours.send(b"x")  # which arrives while the second begins
        await taker.run()
        assert isinstance(taker.error, anyio.BusyResourceError)
        await wait_all_tasks_blocked()
        assert (received, taker.taken) == ([b"x"], [])


# --- at the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", [one, everything])
async def test_the_end_comes_after_all_that_came_before_it(layers: tuple[Any, ...], turn: Callable[[int], int]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, turn)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(10, 10))
        await ours.send_eof()
        await wait_all_tasks_blocked()
        assert taker.taken == numbered(10, 10)
        assert isinstance(taker.error, anyio.EndOfStream)


@pytest.mark.parametrize("turn", [one, everything])
async def test_so_does_a_loss(layers: tuple[Any, ...], turn: Callable[[int], int]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, turn)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(10, 10))
        while not taker.taken:
            await anyio.lowlevel.checkpoint()
        ours.abort()
        await anyio.sleep(5)
        assert taker.taken == numbered(10, 10)
        assert isinstance(taker.error, ConnectionLost)


@pytest.mark.parametrize("turns", [1, 2, 3])
async def test_what_takes_may_abort_and_is_called_no_more(layers: tuple[Any, ...], turns: int) -> None:
    """In the pump's step, or in that of a later turn."""
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:

        def abort(_: list[bytes]) -> None:
            if len(taker.batches) == turns:
                theirs.abort()

        taker = Taker(theirs, one, abort)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        send_together(ours, numbered(10, 10))
        with pytest.raises(ConnectionLost):
            await ours.receive()
        await theirs.wait_closed()
        await wait_all_tasks_blocked()
        assert taker.taken == numbered(turns, 10)
        assert isinstance(taker.error, anyio.ClosedResourceError)


async def test_what_takes_may_send_in_the_same_step(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:

        def echo(messages: list[bytes]) -> None:
            for message in messages:
                if not theirs.try_send(message):
                    theirs.send_at_once(message)

        echoing, taker = Taker(theirs, half, echo), Taker(ours, half)
        tasks.start_soon(echoing.run)
        tasks.start_soon(taker.run)
        for message in numbered(500):
            await ours.send(message)
        await until(lambda: len(taker.taken) == 500)
        assert taker.taken == echoing.taken == numbered(500)
        echoing.scope.cancel()
        taker.scope.cancel()


@pytest.mark.parametrize("turn", [one, everything])
async def test_closed_here_it_takes_nothing_more_and_is_told(
    layers: tuple[Any, ...], turn: Callable[[int], int]
) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, turn)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        await ours.send(b"x")
        await wait_all_tasks_blocked()
        tasks.start_soon(theirs.aclose)
        await anyio.lowlevel.checkpoint()
        while not theirs._closing if isinstance(theirs, Session) else not theirs._closed:
            await anyio.lowlevel.checkpoint()
        ours.try_send(b"too late")
        await anyio.sleep(30)
        assert taker.taken == [b"x"]
        assert isinstance(taker.error, anyio.ClosedResourceError)
        for receive in ways_to_receive(theirs):
            with pytest.raises(anyio.ClosedResourceError):
                await receive()


async def test_nor_does_it_take_what_comes_before_it_is_told(layers: tuple[Any, ...]) -> None:
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs)
        tasks.start_soon(taker.run)
        await wait_all_tasks_blocked()
        # The first thing that closing does; the rest would wake it.
        setattr(theirs, "_closing" if isinstance(theirs, Session) else "_closed", True)
        await ours.send(b"too late")
        await wait_all_tasks_blocked()
        theirs.abort()
        await anyio.sleep(5)
        assert not taker.taken
        assert isinstance(taker.error, anyio.ClosedResourceError)


async def test_over_a_session_it_goes_on_over_the_next_link_with_each_message_once(layers: tuple[Any, ...]) -> None:
    if len(layers) == 1:
        return  # a stream of frames ends with its link
    messages = numbered(3000)
    async with ends(*layers) as (ours, theirs), anyio.create_task_group() as tasks:
        taker = Taker(theirs, half)
        tasks.start_soon(taker.run)

        async def cut() -> None:
            while len(taker.taken) < len(messages):
                await anyio.sleep(0.2)
                if ours.attachment is not None:
                    ours.attachment.link.driver.abort()

        async def send() -> None:
            for n, message in enumerate(messages):
                await ours.send(message)
                if n % 200 == 0:
                    await anyio.sleep(0.1)

        tasks.start_soon(cut)
        tasks.start_soon(send)
        await until(lambda: len(taker.taken) == len(messages))
        assert taker.taken == messages
        assert ours.statistics.resumes > 3
        theirs.abort()
        with pytest.raises(SessionLost):
            await ours.receive()
        assert isinstance(taker.error, anyio.ClosedResourceError)
