"""Contract checkers for what a layer is made of: its stage, and the layer as a whole, on both ends.

In the spirit of ``trio.testing.check_two_way_stream``: a new layer is held to the same list as ours. A promise that is
broken is an ``AssertionError`` that names it; one that hangs is a ``TimeoutError``.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, TypeAlias

import anyio
import anyio.lowlevel

from towline.endpoint import Endpoint
from towline.errors import LinkLost, TowlineError
from towline.link import Link
from towline.service import Dial, Side, TwoSided
from towline.stage import CLEAN, Batch, Driver, Stage, Units
from towline.transport import Listener, Transport
from towline.transports._stream import StreamDriver
from towline.transports.memory import memory_drivers

from ._pairs import lockstep_driver_pair, memory_stream_pair
from ._transport import DriverPair

__all__ = ["StagePair", "check_layer", "check_stage"]

StagePair: TypeAlias = tuple[Stage, Stage]
"""Two stages, such that one reads what the other writes."""

_PATIENCE: Final = 32
"""How often a stage may have something of its own to say before it has said all."""

_TRIPLES: Final = 40
"""Bytes up to which every split in three is tried; above it, every split in two, and every size of part."""


# --- stages ------------------------------------------------------------------------------------------------------


def check_stage(make_pair: Callable[[], StagePair], *flushes: Units, bad: bytes | None = None) -> None:
    """Prove that a stage keeps the contract of `Stage`, in both directions.

    * Whatever one stage writes for the flushes, the other reads as the same units, however the bytes are split: in two
      at every byte, in parts of every size, and, where they are few, in three at every pair of bytes. (What is above
      bytes is split between units.)
    * ``incoming([])`` may come at any time, first of all when the stage is pushed, and changes nothing.
    * The units that were good are returned before `ended` counts: when the bytes end anywhere, and when ``bad`` follows
      in the same read.
    * `wants` ends: `pending` has soon said all. `on_time` at each deadline brings no deadline that has passed.
    * `close` can be called, and where it says something, the other end has ended cleanly by it.

    Args:
        make_pair: makes a new pair; called very often.
        flushes: what is sent, each item as one flush: a list of bytes, or of `Batch`. The other stage must give it on
            as it is, so it holds no control frame that this stage takes for itself.
        bad: bytes that no honest peer sends after the flushes; they must end the stage with an error.
    """
    for turned in (False, True):

        def make(turned: bool = turned) -> StagePair:
            first, second = make_pair()
            first.established()
            second.established()
            return (second, first) if turned else (first, second)

        _check_direction(make, flushes, bad)


def _check_direction(make: Callable[[], StagePair], flushes: Sequence[Units], bad: bytes | None) -> None:
    expected = _flat(list(itertools.chain.from_iterable(flushes)))
    sender, _ = make()
    wire = _write(sender, flushes)
    if all(isinstance(unit, bytes | bytearray | memoryview) for unit in wire):
        size = len(b"".join(wire))
        for split in _splits(size):
            _check_split(make, flushes, expected, split)
        for end in range(size):
            _check_cut(make, flushes, expected, end)
        if bad is not None:
            _check_bad(make, flushes, expected, bad)
    else:
        _check_units(make, flushes, expected)
    _check_own_units(make)
    _check_close(make, flushes, expected)


def _splits(size: int) -> Iterator[tuple[int, ...]]:
    yield ()
    for position in range(1, size):
        yield (position,)
    for part in range(1, min(size, 64)):
        yield tuple(range(part, size, part))
    if size <= _TRIPLES:
        yield from itertools.combinations(range(1, size), 2)


def _check_split(make: Callable[[], StagePair], flushes: Sequence[Units], expected: list[Any], split: Any) -> None:
    sender, receiver = make()
    data = b"".join(_write(sender, flushes))
    got = _flat(receiver.incoming([], 0.0))
    assert not got, f"an empty read gives {got!r}"
    for part in _parts(data, split):
        got += _flat(receiver.incoming([part], 0.0))
        again = receiver.incoming([], 0.0)
        assert not again, f"an empty read after {part!r} gives {again!r} once more"
    assert _joined(got) == _joined(expected), f"split at {split}: {got!r}, where {expected!r} was sent"
    assert receiver.ended is None, f"split at {split}: ended by {receiver.ended!r}"


def _check_cut(make: Callable[[], StagePair], flushes: Sequence[Units], expected: list[Any], end: int) -> None:
    sender, receiver = make()
    data = b"".join(_write(sender, flushes))[:end]
    got = _flat(receiver.incoming([data], 0.0)) if data else []
    got += _flat(receiver.incoming([], 0.0))
    if receiver.ended is None:
        receiver.receive_eof(CLEAN)
    assert receiver.ended is not None, f"the bytes ended after {end}, and the stage did not notice"
    _assert_prefix(got, expected, f"the bytes ended after {end}")


def _check_bad(make: Callable[[], StagePair], flushes: Sequence[Units], expected: list[Any], bad: bytes) -> None:
    sender, receiver = make()
    data = b"".join(_write(sender, flushes)) + bad
    try:
        got = _flat(receiver.incoming([data], 0.0))
    except Exception as error:
        raise AssertionError(f"{error!r} was raised, and what was good before it is lost: set `ended`") from error
    assert _joined(got) == _joined(expected), f"before bad bytes: {got!r}, where {expected!r} was sent"
    assert isinstance(receiver.ended, Exception), f"bad bytes ended it by {receiver.ended!r}, which is no error"
    late = receiver.incoming([data], 0.0)
    assert not late, f"after bad bytes it gave {late!r}"


def _check_units(make: Callable[[], StagePair], flushes: Sequence[Units], expected: list[Any]) -> None:
    sender, receiver = make()
    at_once = _flat(receiver.incoming(_write(sender, flushes), 0.0))
    assert at_once == expected, f"in one read: {at_once!r}, where {expected!r} was sent"
    sender, receiver = make()
    one_by_one: list[Any] = []
    for unit in _write(sender, flushes):
        one_by_one += _flat(receiver.incoming([], 0.0))
        one_by_one += _flat(receiver.incoming([unit], 0.0))
    assert one_by_one == expected, f"unit by unit: {one_by_one!r}, where {expected!r} was sent"
    receiver.receive_eof(CLEAN)
    assert receiver.ended is CLEAN, f"a clean end below became {receiver.ended!r}"
    _, receiver = make()
    error = LinkLost("cut")
    receiver.receive_eof(error)
    assert receiver.ended is error, f"an error below became {receiver.ended!r}"


def _check_own_units(make: Callable[[], StagePair]) -> None:
    for stage in make():
        now = 0.0
        _drain(stage, now)
        for _ in range(_PATIENCE):
            if stage.deadline is None:
                break
            now = max(now, stage.deadline)
            try:
                stage.on_time(now)
            except TowlineError:
                break  # it judged the peer dead, which is its right: nothing was ever received
            _drain(stage, now)
            assert stage.deadline is None or stage.deadline > now, f"at {now} its deadline is {stage.deadline} again"


def _drain(stage: Stage, now: float) -> Units:
    own: Units = []
    for _ in range(_PATIENCE):
        if not stage.wants:
            return own
        own += stage.pending(now)
    raise AssertionError(f"after {_PATIENCE} calls of pending() it wants more")


def _check_close(make: Callable[[], StagePair], flushes: Sequence[Units], expected: list[Any]) -> None:
    sender, receiver = make()
    wire = _write(sender, flushes)
    last = sender.close()
    if wire and not isinstance(wire[0], Batch):
        data = b"".join([*wire, *last])
        got = _flat(receiver.incoming([data], 0.0))
    else:
        got = _flat(receiver.incoming([*wire, *last], 0.0))
    assert _joined(got) == _joined(expected), f"before a close: {got!r}, where {expected!r} was sent"
    if last and receiver.ended is None:
        receiver.receive_eof(CLEAN)
    assert not last or receiver.ended is CLEAN, f"after a close the other end has ended by {receiver.ended!r}"


def _write(stage: Stage, flushes: Sequence[Units]) -> Units:
    wire: Units = _drain(stage, 0.0)
    for units in flushes:
        wire += stage.outgoing([_fresh(unit) for unit in units], 0.0)
    return wire


def _fresh(unit: Any) -> Any:
    return Batch(list(unit.notes), list(unit.frames)) if isinstance(unit, Batch) else unit


def _flat(units: Units) -> list[Any]:
    """Units as a list of ``("note", …)`` and ``("frame", …)``, or as bytes: their borders mean nothing."""
    flat: list[Any] = []
    for unit in units:
        if isinstance(unit, Batch):
            flat += [("note", bytes(note)) for note in unit.notes]
            flat += [("frame", bytes(frame)) for frame in unit.frames]
        else:
            flat.append(bytes(unit))
    return flat


def _joined(flat: list[Any]) -> Any:
    return flat if flat and isinstance(flat[0], tuple) else b"".join(flat)


def _assert_prefix(got: list[Any], expected: list[Any], when: str) -> None:
    got, whole = _joined(got), _joined(expected)
    assert not got or whole[: len(got)] == got, f"{when}: {got!r} is not how {whole!r} begins"


def _parts(data: bytes, split: Sequence[int]) -> list[bytes]:
    borders = [0, *split, len(data)]
    return [data[start:stop] for start, stop in itertools.pairwise(borders) if stop > start]


# --- layers ------------------------------------------------------------------------------------------------------

_MESSAGES: Final = (b"x", b"hello", b"y" * 1000, b"z" * 40_000, b"the last")


async def check_layer(
    layer: TwoSided,
    *inside: TwoSided,
    peer: Sequence[TwoSided] | None = None,
    messages: Sequence[bytes] = _MESSAGES,
    bound: float = 60.0,
) -> None:
    """Prove that a two-sided layer works on both ends, whatever moves its bytes. To be run in virtual time.

    Over drivers that buffer, that buffer nothing, that give one byte at a time, and over an anyio stream:

    * messages arrive as they were sent, from the side that dials and from the side that listens, one at a time and
      both ways at once;
    * when the dialling side ends its direction, the handler receives the end after the last message, its answer still
      arrives, and then the end;
    * a dial that is cancelled at any moment of its handshake leaves no open driver on either end;
    * a peer that never says a word is given up within ``bound`` seconds, on both ends, by the layer itself; a layer
      that waits for no word need not.

    Args:
        layer: the layer.
        inside: the layers that it needs below it, outermost first.
        peer: the layers of the listening end, where they are not equal to those of the dialling end (two keys).
        messages: what is sent; none is empty.
        bound: seconds.
    """
    ours = (layer, *inside)
    theirs = ours if peer is None else tuple(peer)
    for make_pair in (_memory, _lockstep, _in_single_bytes, _streams):
        small = make_pair is _in_single_bytes  # a large message in single bytes proves no more, and takes its time
        sent = [message for message in messages if len(message) <= 1000] if small else messages
        check = _Check(ours, theirs, sent, make_pair, bound)
        await check.run(check.round_trips)
        await check.run(check.both_ways_at_once)
        await check.run(check.ends)
    check = _Check(ours, theirs, messages, _memory, bound)
    await check.every_cancellation()
    await check.run(check.mute_listener)
    await check.run(check.mute_dialler)


def _memory() -> DriverPair:
    return memory_drivers()


def _lockstep() -> DriverPair:
    return lockstep_driver_pair()


def _in_single_bytes() -> DriverPair:
    return memory_drivers(chunk=1)


def _streams() -> DriverPair:
    a, b = memory_stream_pair()
    return StreamDriver(a, linger=0.1), StreamDriver(b, linger=0.1)


class _Watched(Driver):
    """A driver that remembers whether it was closed or aborted."""

    def __init__(self, inner: Driver) -> None:
        self._inner = inner
        self.inline = inner.inline
        self.is_open = True

    @property
    def accepted(self) -> int:  # type: ignore[override]
        return self._inner.accepted

    @property
    def unsent(self) -> bool:  # type: ignore[override]
        return self._inner.unsent

    async def read(self) -> bytes:
        return await self._inner.read()

    async def write(self, data: bytes | bytearray) -> None:
        await self._inner.write(data)

    def write_now(self, data: bytes | bytearray) -> None:
        self._inner.write_now(data)

    async def send_eof(self) -> None:
        await self._inner.send_eof()

    def abort(self) -> None:
        self.is_open = False
        self._inner.abort()

    async def aclose(self) -> None:
        self.is_open = False
        await self._inner.aclose()


class _PairTransport(Transport):
    """Dials by making a pair and handing one end to the listener; with nobody to hand it to, it stays mute."""

    schemes = ("memory",)

    def __init__(self, make_pair: Callable[[], DriverPair]) -> None:
        self._make_pair = make_pair
        self._listener: _PairListener | None = None
        self.is_deaf = False
        self.drivers: list[_Watched] = []

    async def __call__(self, dial: Dial, /) -> Link:
        await anyio.lowlevel.checkpoint()
        ours, theirs = self._make_pair()
        return Link(self._give(ours, theirs, dial.endpoint), side=Side.DIALLING, endpoint=dial.endpoint)

    def _give(self, ours: Driver, theirs: Driver, endpoint: Endpoint) -> Driver:
        watched = _Watched(ours)
        self.drivers.append(watched)
        if not self.is_deaf:
            self.drivers.append(self._ring(theirs, endpoint))
        return watched

    def _ring(self, theirs: Driver, endpoint: Endpoint) -> _Watched:
        assert self._listener is not None, "nobody listens"
        accepted = _Watched(theirs)
        self._listener.put(Link(accepted, side=Side.LISTENING, endpoint=endpoint))
        return accepted

    def ring_and_say_nothing(self) -> _Watched:
        """Connect to the listener, as a dialler that never says a word; gives the listener's end."""
        _, theirs = self._make_pair()
        return self._ring(theirs, Endpoint("memory", name="check"))

    async def listen(self, endpoint: Endpoint) -> Listener:
        self._listener = _PairListener(endpoint)
        return self._listener


class _PairListener(Listener):
    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._accepted: Callable[[Link], None] | None = None
        self._waiting: list[Link] = []

    def put(self, link: Link) -> None:
        if self._accepted is None:
            self._waiting.append(link)
        else:
            self._accepted(link)

    async def serve(self, accepted: Callable[[Link], None]) -> None:
        self._accepted = accepted
        try:
            while self._waiting:
                accepted(self._waiting.pop(0))
            await anyio.sleep_forever()
        finally:
            self._accepted = None

    async def aclose(self) -> None:
        self._accepted = None
        await anyio.lowlevel.checkpoint()


class _Check:
    """One stack on both ends, over one kind of driver."""

    def __init__(
        self,
        ours: Sequence[TwoSided],
        theirs: Sequence[TwoSided],
        messages: Sequence[bytes],
        make_pair: Callable[[], DriverPair],
        bound: float,
    ) -> None:
        # Not at the top: a stack imports every layer, and a layer's own tests must not need all others.
        from towline.stack import Stack

        self.transport = _PairTransport(make_pair)
        self.ours = Stack(*ours, transports=(self.transport,))
        self.theirs = Stack(*theirs, transports=(self.transport,))
        self.messages = messages
        self.bound = bound
        self.handled = 0
        self.what = make_pair.__name__.strip("_").replace("_", " ")

    async def run(self, promise: Callable[[], Awaitable[None]]) -> None:
        try:
            with anyio.move_on_after(600) as bound:
                await promise()
            if bound.cancelled_caught:
                name = promise.__name__.replace("_", " ")
                raise TimeoutError(f"{self.what}: {name}: no end within 600 s")
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
            raise error from group  # pyright: ignore[reportUnknownArgumentType]

    async def _joined(self, handler: Callable[[Any], Awaitable[None]], use: Callable[[Any], Awaitable[None]]) -> None:
        failures: list[BaseException] = []

        async def guarded(stream: Any) -> None:
            self.handled += 1
            try:
                await handler(stream)
            except Exception as error:
                failures.append(error)
                raise

        try:
            async with self.theirs.serve("memory://check", guarded), self.ours.connect("memory://check") as stream:
                await use(stream)
        except Exception as error:
            if not failures:
                raise
            raise failures[0] from error
        if failures:
            raise failures[0]

    async def round_trips(self) -> None:
        """One at a time; the listening side speaks first."""

        async def handler(stream: Any) -> None:
            await stream.send(b"welcome")
            for message in self.messages:
                await _expect(stream, message, f"{self.what}: at the handler")
                await stream.send(message)
            await _expect(stream, b"goodbye", f"{self.what}: at the handler")

        async def use(stream: Any) -> None:
            await _expect(stream, b"welcome", f"{self.what}: at the dialler")
            for message in self.messages:
                await stream.send(message)
                await _expect(stream, message, f"{self.what}: at the dialler")
            await stream.send(b"goodbye")
            await _expect_end(stream, f"{self.what}: when the handler has returned")

        await self._joined(handler, use)

    async def both_ways_at_once(self) -> None:
        """Both sides send before they receive; more than any buffer here holds."""
        sent = list(self.messages) * 5

        async def both(stream: Any) -> None:
            async with anyio.create_task_group() as tasks:

                async def send() -> None:
                    for message in sent:
                        await stream.send(message)

                tasks.start_soon(send)
                for message in sent:
                    await _expect(stream, message, f"{self.what}: both ways at once")

        done = anyio.Event()

        async def handler(stream: Any) -> None:
            await both(stream)
            await stream.send(b"done")
            await done.wait()

        async def use(stream: Any) -> None:
            await both(stream)
            await _expect(stream, b"done", self.what)
            done.set()
            await _expect_end(stream, self.what)

        await self._joined(handler, use)

    async def ends(self) -> None:
        """The dialling side ends its direction; the other one goes on."""

        async def handler(stream: Any) -> None:
            await _expect(stream, b"the last word", self.what)
            await _expect_end(stream, f"{self.what}: after send_eof")
            await stream.send(b"an answer")

        async def use(stream: Any) -> None:
            await stream.send(b"the last word")
            await stream.send_eof()
            await _expect(stream, b"an answer", f"{self.what}: after our end")
            await _expect_end(stream, f"{self.what}: after the handler's end")

        await self._joined(handler, use)

    async def every_cancellation(self) -> None:
        """Cancel a dial after one step, after two, … until it is through before that."""
        for steps in itertools.count():
            self.transport.drivers.clear()
            if await self._cancelled_after(steps):
                return
            assert steps < 10_000, "a handshake of ten thousand steps"

    async def _cancelled_after(self, steps: int) -> bool:
        connected = False

        async def wait(stream: Any) -> None:
            await stream.receive()

        async with self.theirs.open() as serving, self.ours.open() as dialling:
            await serving.serve("memory://check", wait)
            await anyio.lowlevel.checkpoint()

            async def connect() -> None:
                nonlocal connected
                stream = await dialling.connect("memory://check")
                connected = True
                stream.abort()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(connect)
                for _ in range(steps):
                    await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            with anyio.move_on_after(self.bound):
                while any(driver.is_open for driver in self.transport.drivers):  # noqa: ASYNC110 - it has no event
                    await anyio.sleep(0.01)
            still = [driver.is_open for driver in self.transport.drivers]
            assert not any(still), (
                f"cancelled after {steps} steps: open drivers are left (dialling, listening): {still}"
            )
        return connected

    async def mute_listener(self) -> None:
        """The other end never says a word."""
        self.transport.is_deaf = True
        start = anyio.current_time()
        async with self.ours.open() as opened:
            with anyio.move_on_after(self.bound + 1):
                try:
                    stream = await opened.connect("memory://check")
                except TowlineError:
                    assert not any(driver.is_open for driver in self.transport.drivers), "a mute peer's driver is open"
                else:
                    stream.abort()  # it waits for no word
            waited = anyio.current_time() - start
        assert waited <= self.bound, f"a listener that says nothing holds a dial for more than {self.bound:g} s"

    async def mute_dialler(self) -> None:
        """Somebody connects, and never says a word."""
        handled = anyio.Event()

        async def handler(stream: Any) -> None:
            handled.set()

        async with self.theirs.open() as opened:
            await opened.serve("memory://check", handler)
            await anyio.lowlevel.checkpoint()
            driver = self.transport.ring_and_say_nothing()
            with anyio.move_on_after(self.bound):
                while driver.is_open and not handled.is_set():  # noqa: ASYNC110 - it has no event
                    await anyio.sleep(0.01)
            assert not driver.is_open or handled.is_set(), f"a dialler that says nothing is kept for {self.bound:g} s"


async def _expect(stream: Any, message: bytes, where: str) -> None:
    if isinstance(stream, anyio.abc.ByteReceiveStream):
        got = b""
        while len(got) < len(message):
            got += await stream.receive(len(message) - len(got))
    else:
        got = await stream.receive()
    assert got == message, f"{where}: {_short(got)} arrived, where {_short(message)} was sent"


async def _expect_end(stream: Any, where: str) -> None:
    try:
        got = await stream.receive()
    except anyio.EndOfStream:
        return
    raise AssertionError(f"{where}: {_short(got)} arrived, where the end was expected")


def _short(data: bytes) -> str:
    return repr(data) if len(data) <= 20 else f"{data[:10]!r}... ({len(data)} bytes)"
