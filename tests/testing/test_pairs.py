"""The joined pairs: drivers with some, no, or a full buffer, links, and anyio streams."""

from __future__ import annotations

import anyio
import pytest

from towline.errors import LinkLost
from towline.testing import (
    DriverPair,
    check_driver,
    clogged_driver_pair,
    link_pair,
    lockstep_driver_pair,
    memory_link_pair,
    memory_stream_pair,
    open_scope,
)
from towline.transports._stream import StreamDriver


@pytest.mark.smoke
async def test_a_lockstep_write_is_done_only_when_all_of_it_was_read() -> None:
    a, b = lockstep_driver_pair(chunk=2)
    done: list[str] = []

    async def write() -> None:
        await a.write(b"abc")
        done.append("written")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        await anyio.wait_all_tasks_blocked()
        assert done == []
        assert await b.read() == b"ab"
        await anyio.wait_all_tasks_blocked()
        assert done == []
        assert await b.read() == b"c"
    assert done == ["written"]
    assert a.accepted == 3


async def test_a_lockstep_writer_that_is_cancelled_takes_back_what_was_not_read() -> None:
    a, b = lockstep_driver_pair(chunk=2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.write, b"abcd")
        assert await b.read() == b"ab"
        tasks.cancel_scope.cancel()
    await a.send_eof()
    assert await b.read() == b""


async def test_two_writers_on_one_lockstep_driver_are_a_fault_of_the_test() -> None:
    a, b = lockstep_driver_pair()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.write, b"first")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(RuntimeError, match="two tasks write"):
            await a.write(b"second")
        assert await b.read() == b"first"


async def test_an_aborted_lockstep_driver_wakes_reader_and_writer_on_both_sides() -> None:
    a, b = lockstep_driver_pair()
    lost: list[str] = []

    async def expect_lost(what: str, driver: object) -> None:
        with pytest.raises(LinkLost):
            await (b.write(b"x") if what == "write" else b.read())
        lost.append(what)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(expect_lost, "write", b)
        tasks.start_soon(expect_lost, "read", b)
        await anyio.wait_all_tasks_blocked()
        a.abort()
    assert sorted(lost) == ["read", "write"]
    with pytest.raises(LinkLost):
        await a.write(b"x")


async def test_a_clogged_driver_takes_a_few_bytes_then_none_until_it_is_released() -> None:
    a, b = clogged_driver_pair(accepts=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.write, b"hello")
        assert await b.read() == b"hel"
        with anyio.move_on_after(3600) as waited:
            await b.read()
        assert waited.cancelled_caught
        assert a.accepted == 3
        a.release()
        assert await b.read() == b"lo"
    a.clog(1)
    a.write_now(b"xy")
    assert a.unsent


@pytest.mark.smoke
async def test_memory_streams_keep_the_drivers_contract_under_a_stream_driver() -> None:
    async def make_pair() -> DriverPair:
        a, b = memory_stream_pair()
        return StreamDriver(a, linger=5), StreamDriver(b, linger=5)

    await check_driver(make_pair)


async def test_a_memory_stream_raises_what_anyio_says() -> None:
    a, b = memory_stream_pair(capacity=4, chunk=3)
    await a.send(b"abcd")
    assert await b.receive(2) == b"ab"
    assert await b.receive() == b"c"
    assert await b.receive() == b"d"
    await a.send_eof()
    with pytest.raises(anyio.EndOfStream):
        await b.receive()
    with pytest.raises(anyio.ClosedResourceError):
        await a.send(b"x")
    async with anyio.create_task_group() as tasks:

        async def closed() -> None:
            with pytest.raises(anyio.ClosedResourceError):
                await a.receive()

        tasks.start_soon(closed)
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await a.receive()
        await a.aclose()
    with pytest.raises(anyio.BrokenResourceError):
        await b.send(b"nobody reads")
    with pytest.raises(anyio.ClosedResourceError):
        await a.receive()
    await b.aclose()


async def test_a_memory_stream_has_one_sender_at_a_time() -> None:
    a, b = memory_stream_pair(capacity=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.send, b"abc")
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await a.send(b"x")
        assert [await b.receive() for _ in range(3)] == [b"a", b"b", b"c"]


async def test_a_link_pair_negotiates_without_a_scope_and_is_pumped_only_with_one() -> None:
    a, b = memory_link_pair()
    await a.send([b"hello"])
    assert await b.receive_exactly(5) == b"hello"
    with pytest.raises(RuntimeError, match="not given to a stack"):
        _ = a.scope
    async with open_scope() as scope:
        c, d = link_pair(lockstep_driver_pair(), scope)
        assert c.scope is d.scope is scope


async def test_an_error_leaves_open_scope_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with open_scope():
            raise KeyError("as it is")
    with anyio.move_on_after(1) as outer:
        async with open_scope() as scope:
            scope.task_group.start_soon(anyio.sleep_forever)
            await anyio.sleep_forever()
    assert outer.cancelled_caught
