"""Contract checkers: run one over a driver or a transport of yours, and it may carry a `Link`.

In the spirit of ``trio.testing.check_two_way_stream``: whatever moves bytes is held to the same list, so that
nothing above can tell one from another. A promise that is broken is an ``AssertionError`` that names it; one
that hangs is a ``TimeoutError``.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeAlias

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import ConnectFailed, EndpointError, LinkLost
from towline.link import Link
from towline.service import Dial, Side
from towline.stage import Driver
from towline.transport import Listener, Transport

__all__ = ["DriverPair", "check_driver", "check_transport"]

DriverPair: TypeAlias = tuple[Driver, Driver]
"""Two drivers, joined with each other."""

_BLOCK: Final = 65536
_SIZES: Final = (1, 0, 7, 65536, 1, 300_000, 2)  # of the writes in one direction
_PATTERN: Final = bytes(i * 7 % 251 for i in range(251 * 1200))  # a prime period: no block is like the next


async def check_driver(
    make_pair: Callable[[], Awaitable[DriverPair]],
    *,
    half_close: bool = True,
    bounded: bool = True,
    flood_limit: int = 32 * 1024 * 1024,
    stall: float = 0.02,
    timeout: float = 30.0,
) -> None:
    """Prove that a driver keeps the contract of `Driver`.

    Each promise is checked on a pair of its own, which must hold at least three small writes that nobody
    reads:

    * bytes arrive complete and in order, both ways at once, and ``accepted`` counts them; ``write(b"")`` sends
      nothing;
    * against a peer that does not read, writing stalls after a bounded number of bytes (D13), and goes on when
      it reads, without a lost byte;
    * what `write_now` could not place is sent before what is written later, and ``unsent`` says so;
    * a reader that is cancelled loses no byte; one that always finds something lets other tasks run;
    * so does `read_each`. It gives every byte, in order, until it is told to stop, and then no more; mixed with
      `read` too;
    * `read_each` gives an end once, as ``b""``, and then returns, whatever it is told;
    * it raises what it was given raised, and what comes after that is there for the next read;
    * an end is ``b""``, again and again, and leaves the other direction alone;
    * `aclose` delivers everything, although the peer has sent what nobody read; it and `abort` are idempotent;
    * `abort` wakes whatever reads or writes, by `LinkLost`, and so ends everything tried afterwards; the peer
      is told.

    Args:
        make_pair: makes a new pair; the checker closes both.
        half_close: whether one direction can be ended on its own.
        bounded: whether writing can stall. False only where a foreign stream buffers without limit.
        flood_limit: bytes after which a writer that has not stalled never will. 32 MiB: the kernels' own
            buffers for one connection stay well below.
        stall: seconds without an accepted byte that count as stalled.
        timeout: seconds for each check, in which no honest one hangs.
    """

    async def check(promise: Callable[[Driver, Driver], Awaitable[None]]) -> None:
        with anyio.fail_after(timeout):
            a, b = await make_pair()
            try:
                await promise(a, b)
            except BaseExceptionGroup as group:
                raise _first(group) from group
            finally:
                for driver in (a, b):
                    driver.abort()
                await anyio.lowlevel.cancel_shielded_checkpoint()

    await check(_carries_bytes_both_ways)
    if bounded:
        await check(_Flood(flood_limit, stall).by_write)
        await check(_Flood(flood_limit, stall).wakes_a_blocked_writer)
    if (await _probe(make_pair)).inline:
        await check(_Flood(flood_limit, stall).by_write_now)
    for reading in (_by_read, _by_read_each):
        await check(reading.cancelled_loses_nothing)
        await check(reading.lets_others_run)
    await check(_read_each_gives_every_byte)
    await check(_read_each_gives_an_end_once)
    await check(_read_each_raises_what_take_raised)
    if half_close:
        await check(_an_end_is_one_direction)
    await check(_aclose_delivers)
    for reading in (_by_read, _by_read_each):
        await check(reading.ends_by_our_own_aclose)
        await check(reading.ends_by_abort)
    await check(_abort_is_final)


async def check_transport(
    transport: Transport,
    endpoint: Endpoint | str,
    *,
    half_close: bool = True,
    bounded: bool = True,
    flood_limit: int = 32 * 1024 * 1024,
    stall: float = 0.02,
    timeout: float = 30.0,
) -> None:
    """Prove that a transport keeps the contracts of `Transport` and `Listener`, and its links that of
    `Driver`.

    * When `listen` has returned, a dial succeeds; the listener's endpoint is what was really bound.
    * A link knows which side it is, and its endpoint; links are independent of each other.
    * An endpoint in use is `ConnectFailed`, and so is one where nobody listens; a foreign scheme is
      `EndpointError`.
    * Closing a listener ends `serve`, leaves accepted links alone, frees the endpoint, and can be repeated.

    Args:
        transport: what to check.
        endpoint: where to listen; for TCP use port 0.
        half_close, bounded, flood_limit, stall, timeout: as in `check_driver`.
    """
    endpoint = Endpoint.parse(endpoint)
    assert endpoint.scheme in transport.schemes, f"{transport} does not claim {endpoint.scheme}://"
    try:
        with anyio.fail_after(timeout):
            await _check_listening(transport, endpoint)
        async with _dialled_pairs(transport, endpoint) as make_pair:
            await check_driver(
                make_pair,
                half_close=half_close,
                bounded=bounded,
                flood_limit=flood_limit,
                stall=stall,
                timeout=timeout,
            )
    except BaseExceptionGroup as group:
        raise _first(group) from group


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What really went wrong: a checker raises plain errors, whatever task found them."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return error  # pyright: ignore[reportUnknownVariableType]


# --- the promises of a driver ----------------------------------------------------------------------------


async def _probe(make_pair: Callable[[], Awaitable[DriverPair]]) -> Driver:
    a, b = await make_pair()
    a.abort()
    b.abort()
    await anyio.lowlevel.checkpoint()
    return a


async def _read_exactly(driver: Driver, n: int) -> bytes:
    data = b""
    while len(data) < n:
        more = await driver.read()
        assert more, f"the end came after {len(data)} bytes of {n}"
        data += more
    assert len(data) == n, f"{len(data)} bytes arrived where {n} were sent"
    return data


async def _read_to_the_end(driver: Driver) -> bytes:
    data = bytearray()
    while more := await driver.read():
        data += more
    return bytes(data)


def _same(got: bytes, sent: bytes, what: str) -> None:
    if got != sent:
        both = enumerate(zip(got, sent, strict=False))
        at = next((i for i, (x, y) in both if x != y), min(len(got), len(sent)))
        raise AssertionError(f"{what}: {len(got)} bytes of {len(sent)} arrived, and differ from byte {at}")


def _accepted(driver: Driver, n: int) -> None:
    assert driver.accepted == n, f"accepted is {driver.accepted} after {n} bytes were written"


async def _carries_bytes_both_ways(a: Driver, b: Driver) -> None:
    parts = [_PATTERN[i : i + n] for i, n in enumerate(_SIZES)]
    sent = b"".join(parts)

    async def write(driver: Driver) -> None:
        for part in parts:
            await driver.write(part)
        _accepted(driver, len(sent))
        assert not driver.unsent, "write returned, and something is unsent"

    async def read(driver: Driver) -> None:
        _same(await _read_exactly(driver, len(sent)), sent, "bytes in order")

    async with anyio.create_task_group() as tasks:
        for driver in (a, b):
            tasks.start_soon(write, driver)
            tasks.start_soon(read, driver)
    await a.write(bytearray(b"a bytearray"))
    _same(await _read_exactly(b, 11), b"a bytearray", "a bytearray")


def _block(at: int) -> bytes:
    """The block that starts ``at`` bytes into a flood: each is unlike its neighbours, so that a lost one
    shows."""
    shift = at // _BLOCK % 251
    return _PATTERN[shift : shift + _BLOCK]


def _blocks(n: int) -> bytes:
    return b"".join(_block(at) for at in range(0, n, _BLOCK))


class _Flood:
    """A writer against a peer that does not read yet."""

    def __init__(self, limit: int, stall: float) -> None:
        self.limit = limit
        self.stall = stall
        self.written = 0  # bytes of writes that have returned

    async def _write(self, driver: Driver) -> None:
        while self.written <= self.limit:
            await driver.write(_block(self.written))
            self.written += _BLOCK
            await anyio.lowlevel.checkpoint()
        raise AssertionError(f"{self.written} bytes were taken for a peer that reads none")

    async def _stalled(self, driver: Driver) -> None:
        seen = -1
        while seen != (seen := self.written + driver.accepted):  # noqa: ASYNC110 -- "nothing" has no event
            await anyio.sleep(self.stall)

    async def by_write(self, a: Driver, b: Driver) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._write, a)
            await self._stalled(a)
            n = self.written + 4 * _BLOCK  # reading must set it going again
            _same(await _read_at_least(b, n), _blocks(n), "a flood")
            tasks.cancel_scope.cancel()

    async def wakes_a_blocked_writer(self, a: Driver, b: Driver) -> None:
        lost: list[LinkLost] = []

        async def write() -> None:
            try:
                await self._write(a)
            except LinkLost as error:
                lost.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await self._stalled(a)
            a.abort()
        assert lost, "abort did not wake the blocked writer with LinkLost"

    async def by_write_now(self, a: Driver, b: Driver) -> None:
        taken = 0
        while not a.unsent:
            assert taken <= self.limit, f"write_now took {taken} bytes, and unsent is still False"
            a.write_now(_block(taken))
            taken += _BLOCK
        assert a.accepted < taken, "unsent is True, though everything was accepted"
        a.write_now(b"then this")
        sent = _blocks(taken) + b"then thisand this"
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(a.write, b"and this")
            _same(await _read_exactly(b, len(sent)), sent, "write_now, then write")
        assert not a.unsent, "write returned, and something is unsent"
        _accepted(a, len(sent))


async def _read_at_least(driver: Driver, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        more = await driver.read()
        assert more, f"the end came after {len(data)} bytes of {n}"
        data += more
    return bytes(data[:n])


_ReadTo: TypeAlias = Callable[[Driver, Callable[[bytes], bool]], Coroutine[Any, Any, None]]
"""Gives what comes to a function, once at least."""


class _Reading:
    """What is promised of `read` and of `read_each` alike."""

    def __init__(self, name: str, read: _ReadTo) -> None:
        self.name = name
        self.read = read

    async def cancelled_loses_nothing(self, a: Driver, b: Driver) -> None:
        sent = _PATTERN[:200]
        got = bytearray()

        def take(data: bytes) -> bool:
            got.extend(data)
            return True

        async def read_and_be_cancelled(after: int) -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.read, b, take)
                for _ in range(after):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()

        for i in range(len(sent)):
            if i % 2:  # cancelled while the bytes arrive
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(read_and_be_cancelled, i % 5)
                    await a.write(sent[i : i + 1])
            else:  # cancelled when they are there
                await a.write(sent[i : i + 1])
                await read_and_be_cancelled(i % 5)
            if i % 3 == 2:  # what is under way stays small
                while len(got) <= i:
                    got += await b.read()
        while len(got) < len(sent):
            got += await b.read()
        _same(bytes(got), sent, f"{self.name} that was cancelled")

    async def lets_others_run(self, a: Driver, b: Driver) -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            for _ in range(50):
                await a.write(b"x")
                await self.read(b, lambda _: False)
            tasks.cancel_scope.cancel()
        assert turns >= 25, f"in 50 times {self.name} another task had {turns} turns"

    async def _read_until_it_ends(self, driver: Driver, ended: list[bytes | LinkLost]) -> None:
        def take(data: bytes) -> bool:
            ended.append(data)
            return True

        try:
            await self.read(driver, take)
        except LinkLost as error:
            ended.append(error)

    async def ends_by_our_own_aclose(self, a: Driver, b: Driver) -> None:
        ended: list[bytes | LinkLost] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_until_it_ends, a, ended)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(a.aclose)
            assert await b.read() == b"", "the peer of a closed driver sees no end"
            await b.aclose()
        assert ended, f"aclose ended {self.name} without a word"
        assert isinstance(ended[0], LinkLost) or ended[0] == b"", f"a closed driver read {ended[0]!r}"

    async def ends_by_abort(self, a: Driver, b: Driver) -> None:
        ended: list[bytes | LinkLost] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_until_it_ends, a, ended)
            await anyio.wait_all_tasks_blocked()
            a.abort()
        first = ended[0] if ended else None
        assert isinstance(first, LinkLost), f"abort did not wake {self.name} with LinkLost"
        try:
            rest = await b.read()
        except LinkLost:
            pass
        else:
            assert rest == b"", f"the peer of an aborted driver read {rest!r}"


async def _read(driver: Driver, take: Callable[[bytes], bool]) -> None:
    take(await driver.read())


async def _read_each(driver: Driver, take: Callable[[bytes], bool]) -> None:
    await driver.read_each(take)


_by_read: Final = _Reading("read", _read)
_by_read_each: Final = _Reading("read_each", _read_each)


async def _read_each_gives_every_byte(a: Driver, b: Driver) -> None:
    parts = [_PATTERN[i : i + n] for i, n in enumerate(_SIZES)]
    sent = b"".join(parts)
    got = bytearray()
    left = 0  # reads until take says no

    def take(data: bytes) -> bool:
        nonlocal left
        left -= 1
        got.extend(data)
        return left > 0 and len(got) < len(sent)

    async def write() -> None:
        for part in parts:
            await a.write(part)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write)
        turn = 0
        while len(got) < len(sent):
            turn += 1
            if turn % 4 == 0:
                got += await b.read()
                continue
            left = turn % 4
            await b.read_each(take)
            assert left >= 0, "read_each goes on after take has said no"
            assert left == 0 or len(got) >= len(sent), "read_each returned before take has said no"
            for _ in range(turn % 3):
                await anyio.lowlevel.checkpoint()
            assert left >= 0 or len(got) >= len(sent), "read_each goes on after it has returned"
    _same(bytes(got), sent, "read_each, and read")


async def _read_each_gives_an_end_once(a: Driver, b: Driver) -> None:
    got: list[bytes] = []

    def take(data: bytes) -> bool:
        assert got[-1:] != [b""], "read_each gives an end twice"
        got.append(data)
        return True

    async with anyio.create_task_group() as tasks:
        await a.write(b"the last word")
        tasks.start_soon(a.aclose)
        await b.read_each(take)
        await b.aclose()
    assert got[-1:] == [b""], "read_each returned before the end"
    _same(b"".join(got), b"the last word", "before an end that read_each gives")


class _Refusal(BaseException):
    """Nobody else raises this."""


async def _read_each_raises_what_take_raised(a: Driver, b: Driver) -> None:
    sent = _PATTERN
    got = bytearray()
    refusal: _Refusal | None = None

    def take(data: bytes) -> bool:
        nonlocal refusal
        got.extend(data)
        refusal = _Refusal()
        raise refusal

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(a.write, sent)
        while len(got) < len(sent):
            raised: _Refusal | None = None
            try:
                await b.read_each(take)
            except _Refusal as error:
                raised = error
            assert raised is not None, "read_each did not raise what take raised"
            assert raised is refusal, "read_each raised an error of another time"
            if len(got) < len(sent):
                got += await b.read()
    _same(bytes(got), sent, "reads after take has raised")


async def _an_end_is_one_direction(a: Driver, b: Driver) -> None:
    await a.write(b"the last word")
    await a.send_eof()
    _same(await _read_to_the_end(b), b"the last word", "before an end")
    assert await b.read() == b"", "an end is not the end"
    await b.write(b"an answer")
    _same(await _read_exactly(a, 9), b"an answer", "the direction that was not ended")
    try:
        await a.write(b"more")
    except LinkLost:
        pass
    else:
        raise AssertionError("writing after send_eof is not LinkLost")
    await b.send_eof()
    assert await a.read() == b"", "the second direction did not end"


async def _aclose_delivers(a: Driver, b: Driver) -> None:
    await b.write(b"nobody reads this")
    sent = _PATTERN * 2
    got: list[bytes] = []

    async def read() -> None:
        got.append(await _read_to_the_end(b))
        await b.aclose()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await a.write(sent)
        await a.aclose()
    _same(got[0], sent, "what was written before aclose")
    await a.aclose()
    await b.aclose()
    a.abort()


async def _abort_is_final(a: Driver, b: Driver) -> None:
    await b.write(b"too late")
    a.abort()
    a.abort()

    async def write_now() -> None:
        if not a.inline:
            raise LinkLost("it has no write_now")
        a.write_now(b"x")

    for use in (a.read, lambda: a.write(b"x"), write_now):
        try:
            await use()
        except LinkLost:
            continue
        raise AssertionError("an aborted driver can still be used")
    await a.aclose()
    a.abort()


# --- the promises of a transport ----------------------------------------------------------------------------


@asynccontextmanager
async def _dialled_pairs(
    transport: Transport, endpoint: Endpoint
) -> AsyncGenerator[Callable[[], Awaitable[DriverPair]]]:
    """Serve on ``endpoint`` meanwhile, and give what makes pairs by dialling it."""
    listener = await transport.listen(endpoint)
    send, receive = anyio.create_memory_object_stream[Link](10)

    async def make_pair() -> DriverPair:
        link = await transport(Dial(listener.endpoint))
        return link.driver, (await receive.receive()).driver

    with send, receive:
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(listener.serve, send.send_nowait)
                yield make_pair
                tasks.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await listener.aclose()


async def _check_listening(transport: Transport, endpoint: Endpoint) -> None:
    foreign = Endpoint("nothing")
    for use in (lambda: transport(Dial(foreign)), lambda: transport.listen(foreign)):
        try:
            await use()
        except EndpointError:
            continue
        raise AssertionError(f"{transport} does not refuse {foreign}")

    listener = await transport.listen(endpoint)
    bound = listener.endpoint
    try:
        await _check_serving(transport, listener)
    finally:
        with anyio.CancelScope(shield=True):
            await listener.aclose()

    again = await transport.listen(bound)  # free again, at once
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(again.serve, _refuse)
        await anyio.wait_all_tasks_blocked()
        await again.aclose()  # ends serve
    await again.aclose()
    await _refused(transport, bound)


def _refuse(link: Link) -> None:
    link.abort(LinkLost("not wanted"))


async def _check_serving(transport: Transport, listener: Listener) -> None:
    bound = listener.endpoint
    serving = anyio.CancelScope()
    send, receive = anyio.create_memory_object_stream[Link](10)

    async def serve() -> None:
        with serving:
            await listener.serve(send.send_nowait)

    with send, receive:
        ours = await transport(Dial(bound))  # before anybody accepts
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve)
            theirs = await receive.receive()
            assert (ours.side, theirs.side) == (Side.DIALLING, Side.LISTENING), "the sides are mixed up"
            assert ours.endpoint == theirs.endpoint == bound, "a link does not know its endpoint"
            second = await transport(Dial(bound))
            (await receive.receive()).abort(LinkLost("one of two"))
            serving.cancel()  # accepts no more, which is nothing to those accepted
            await theirs.driver.write(b"still here")
            _same(await _read_exactly(ours.driver, 10), b"still here", "a link beside one that was aborted")
            second.abort(LinkLost("the other of two"))
            tasks.start_soon(ours.aclose)
            assert await theirs.driver.read() == b"", "a closed link does not end"
            await theirs.aclose()
    try:
        await transport.listen(bound)
    except ConnectFailed:
        return
    raise AssertionError(f"{bound} was bound twice")


async def _refused(transport: Transport, endpoint: Endpoint) -> None:
    try:
        await transport(Dial(endpoint))
    except ConnectFailed:
        return
    raise AssertionError(f"a dial to {endpoint} succeeds, though nobody listens")
