"""How a byte travels: a Link is one live connection, and this is the only place where data moves.

A link is a `Driver` that moves bytes, the stages pushed on it (innermost first), and at last one `Top` on them. It has
two lives. While layers negotiate it is *pulled*: no task, the shell that negotiates reads and writes in its own. Then
`Link.run` *pumps* until the link dies: one reader, one writer, and the scope's timer.

    top.pull → stages, outermost first: outgoing → one write          (writer, or inline in the sender's task)
    one read → stages, innermost first: incoming → top.deliver        (reader)

Its laws:

1. Everything moves in batches. Nothing here is done once per frame.
2. The reader never awaits a write. Control replies are state in a stage, not a queue, so that a flood of pings costs
   one pong, and two full sides that replay at once cannot deadlock (D10).
3. A lone message is written in its sender's own task when the link is idle and the driver can try a write without
   waiting; that unparks the writer, which flushes the rest of the tick (D12). Otherwise only the writer writes: a
   sender that is cancelled in mid-write would tear a record.
4. What was good in a read is delivered before its error is acted upon (D11).
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel

from towline.errors import HandshakeFailed, LinkLost, ProtocolViolation, TowlineError
from towline.service import Side
from towline.stage import CLEAN, Batch, Driver, Ended, Note, Stage, Top, Units
from towline.waiter import Waiter, waiters

if TYPE_CHECKING:
    from towline.endpoint import Endpoint
    from towline.scope import Scope

__all__ = ["Link"]

logger = logging.getLogger(__name__)


class Link:
    """One live connection.

    Args:
        driver: what moves the bytes.
        side: which end this is.
        endpoint: the endpoint that was dialled, or that accepted.
        source: who is at the other end, for limits per source; "" where that is meaningless (Unix, pipe, memory).

    Attributes:
        peer_identity: who the peer has proved to be, or None.
        principal: the bytes that stand for the peer when a session is resumed: its static key, or None.
        handshake_hash: unique for this connection when a layer made it so, else None.
        exporter: ``(label, length) -> bytes``, keying material bound to this connection, or None.
        expires: when the keys of this connection are too old (monotonic seconds), or None.
        write_timeout: how long no byte may be accepted while some wait, in seconds; None for ever.
        rtt: the last measured round trip in seconds, or None.
    """

    def __init__(self, driver: Driver, *, side: Side, endpoint: Endpoint, source: str = "") -> None:
        self.driver = driver
        self.side = side
        self.endpoint = endpoint
        self.source = source
        self.peer_identity: Any = None
        self.principal: bytes | None = None
        self.handshake_hash: bytes | None = None
        self.exporter: Callable[[bytes, int], bytes] | None = None
        self.expires: float | None = None
        self.write_timeout: float | None = None
        self.rtt: float | None = None
        self.on_established: Callable[[], None] | None = None
        self.timer_at: float | None = None  # owned by Timers
        self._clock: Callable[[], float] = anyio.current_time
        self._scope: Scope | None = None
        self._stages: list[Stage] = []
        self._outward: list[Stage] = []  # the same, outermost first
        self.checks: list[Callable[[bytes], None]] = []  # of the stages that refuse something
        self._backlog: Units = []  # came through all stages in pull mode, and nobody took it yet
        self._ended: Ended = None
        self._top: Top | None = None
        self._new_waiter, self._wake_waiter = waiters()
        self.parked: Waiter | None = None  # exists only while the writer waits
        self._parking: anyio.Event | None = None  # somebody waits for the writer to park
        self._eof: anyio.Event | None = None  # our direction shall end; set when it has
        self._pumped = False  # the pump has ended
        self._reading: anyio.Event | None = None  # exists only while the reader is paused
        self._paused_at = 0.0  # since when it is; what stages were told of is not counted again
        self._cancel_scope: anyio.CancelScope | None = None
        self._error: Exception | None = None
        self._aborted = False
        self._finish_at: float | None = None  # finishing: the moment by which the last word must be out
        self._stalled_since: float | None = None  # when the current write last made progress
        self._stalled_at = 0  # driver.accepted at that moment

    def __repr__(self) -> str:
        stages = " > ".join(type(stage).__name__ for stage in self._outward)
        state = "aborted" if self._aborted else "running" if self._top is not None else "negotiating"
        return f"<Link {self.side.value} {self.endpoint} {state}{': ' + stages if stages else ''}>"

    def _log_fields(self, event: str) -> dict[str, object]:
        return {"event": event, "endpoint": str(self.endpoint), "side": self.side.value, "source": self.source}

    # --- what a layer does while it negotiates ---------------------------------------------------------------------

    @property
    def scope(self) -> Scope:
        """The scope that this link belongs to."""
        if self._scope is None:
            raise RuntimeError("this link was not given to a stack")
        return self._scope

    def bind(self, scope: Scope) -> None:
        """Make the link part of a scope: its clock, its timer."""
        self._scope = scope
        self._clock = scope.clock

    def push(self, stage: Stage) -> None:
        """Put a stage on top of those there are; it is fed at once with what was read too far."""
        self._stages.append(stage)
        self._outward.insert(0, stage)
        if type(stage).check is not Stage.check:
            self.checks.append(stage.check)
        self._backlog = stage.incoming(self._backlog, self._clock())
        if self._ended is None:
            self._ended = stage.ended
        else:
            stage.receive_eof(self._ended)
            self._ended = stage.ended

    def established(self) -> None:
        """Tell the stages, and the listener that counts strangers, that the peer has proved itself."""
        for stage in self._stages:
            stage.established()
        if self._stages and self._ended is None:
            self._backlog += self._through([], None, self._clock())  # what was held goes on
        if self.on_established is not None:
            self.on_established()

    async def send(self, units: Units) -> None:
        """Send units through the stages, while negotiating.

        Raises:
            LinkLost: if the link is broken.
        """
        data = self._outgoing(units, self._clock())
        if data:
            await self.driver.write(data)

    async def receive_exactly(self, n: int) -> bytes:
        """Exactly ``n`` bytes, while negotiating below Framing.

        Raises:
            LinkLost: if the link is broken.
            HandshakeFailed: if the peer ends before, with ``ended`` set.
        """
        buffer = b"".join(self._backlog)
        self._backlog = []
        while len(buffer) < n:
            try:
                await self._read_more()
            except BaseException:
                if buffer:
                    self._backlog.insert(0, buffer)
                raise
            buffer += b"".join(self._backlog)
            self._backlog = []
        if len(buffer) > n:
            self._backlog = [buffer[n:]]
        return buffer[:n]

    async def receive_some(self) -> bytes:
        """Whatever bytes come next, while negotiating below Framing. Raises as `receive_exactly` does."""
        while not self._backlog:
            await self._read_more()
        data = b"".join(self._backlog)
        self._backlog = []
        return data

    async def receive_note(self) -> Note:
        """The next control frame, while negotiating above Framing.

        Raises:
            ProtocolViolation: if a data frame comes first.
            LinkLost: if the link is broken.
            HandshakeFailed: if the peer ends before, with ``ended`` set.
        """
        while True:
            while self._backlog:
                batch: Batch = self._backlog[0]
                if batch.notes:
                    note, *rest = batch.notes
                    self._backlog[0] = Batch(rest, batch.frames)
                    return note
                if batch.frames:
                    raise ProtocolViolation("the peer sent data before its handshake was done")
                self._backlog.pop(0)
            await self._read_more()

    async def _read_more(self) -> None:
        if self._ended is not None:
            if isinstance(self._ended, Exception):
                raise self._ended
            raise HandshakeFailed("the other end closed the link during the handshake", ended=True)
        for stage in self._stages:
            if stage.held is not None:
                raise stage.held
        data = await self.driver.read()
        self._backlog += self._incoming(data, self._clock())
        if self._stages_want:
            await self.send([])

    @contextlib.contextmanager
    def closing_on_error(self) -> Generator[None]:
        """Abort the link when the block raises anything at all, cancellation included."""
        try:
            yield
        except BaseException:
            self.abort(LinkLost("its handshake did not succeed"))
            raise

    # --- through the stages ----------------------------------------------------------------------------------------

    def _outgoing(self, units: Units, now: float) -> bytes | bytearray:
        for stage in self._outward:
            if stage.wants:
                own = stage.pending(now)
                units = own + stage.outgoing(units, now) if units else own
            elif units:
                units = stage.outgoing(units, now)
        if not units:
            return b""
        data: bytes | bytearray = units[0] if len(units) == 1 else b"".join(units)
        return data

    def _incoming(self, data: bytes, now: float) -> Units:
        """Feed one read to the stages; sets ``_ended`` when this was the last."""
        return self._through([data], None, now) if data else self._through([], CLEAN, now)

    @property
    def _stages_want(self) -> bool:
        for stage in self._stages:  # noqa: SIM110 -- once for every read, and a generator takes longer than the rest
            if stage.wants:
                return True
        return False

    def _through(self, units: Units, ended: Ended, now: float) -> Units:
        for stage in self._stages:
            units = stage.incoming(units, now)
            if ended is not None and stage.ended is None:
                stage.receive_eof(ended)
            ended = stage.ended or ended
        self._ended = ended
        return units

    # --- the pump --------------------------------------------------------------------------------------------------

    async def run(self, top: Top) -> None:
        """Pump until the link ends. Returns after `finish`; anything else that ends it raises.

        Raises:
            LinkLost: if the link died or was aborted; a protocol error is its ``__cause__``.
        """
        self._top = top
        scope = self.scope
        try:
            if self._aborted:
                raise self._lost()
            async with anyio.create_task_group() as tasks:
                self._cancel_scope = tasks.cancel_scope
                tasks.start_soon(self._guarded, self._write_loop)
                tasks.start_soon(self._guarded, self._read_loop)
                scope.timers.update(self)
        finally:
            self._cancel_scope = None
            self._pumped = True
            for event in (self._parking, self._eof):
                if event is not None:
                    event.set()
            scope.timers.forget(self)
            with anyio.CancelScope(shield=True):
                if self._error is None and self._finish_at is not None:
                    await self.driver.aclose()
                else:
                    self.abort(LinkLost("it was cancelled"))
        if self._error is not None:
            raise self._lost()

    def _lost(self) -> LinkLost:
        error = self._error
        if isinstance(error, LinkLost):
            return error
        lost = LinkLost(f"the link was aborted: {error}")
        lost.__cause__ = error
        return lost

    async def _guarded(self, loop: Callable[[], Any]) -> None:
        try:
            await loop()
        except Exception as error:
            if not isinstance(error, TowlineError):
                logger.exception("%r: a stage failed", self, extra=self._log_fields("link.failed"))
            self.abort(error)

    async def _read_loop(self) -> None:
        top = self._top
        assert top is not None
        now = self._clock()
        if self._backlog:
            units, self._backlog = self._backlog, []
            top.deliver(units, now)
        self._after(now)
        while self._ended is None:
            if top.full:
                await self._pause_reading(top)
            await self.driver.read_each(self._take)
        if isinstance(self._ended, Exception):
            raise self._ended
        if self._finish_at is None and not top.receive_eof(self._ended):
            raise LinkLost("the peer closed the link")

    def _take(self, data: bytes) -> bool:
        """What one read has brought. False if there shall be no other for now."""
        top = self._top
        assert top is not None
        now = self._clock()
        units = self._incoming(data, now)
        if units:
            top.deliver(units, now)
        self._after(now)
        return self._ended is None and not top.full

    def _after(self, now: float) -> None:
        """What a read may have brought about: something to send, an earlier deadline."""
        top = self._top
        assert top is not None
        if top.wants or self._stages_want:
            self.wake()
        self.scope.timers.update(self)

    async def _pause_reading(self, top: Top) -> None:
        self._paused_at = self._clock()
        while top.full:
            self._reading = anyio.Event()
            await self._reading.wait()
        self._tell_paused(self._clock())

    def _tell_paused(self, now: float) -> None:
        for stage in self._stages:
            stage.paused(now - self._paused_at)
        self._paused_at = now

    def resume_reading(self) -> None:
        """The top has room again."""
        if self._reading is not None:
            self._reading.set()
            self._reading = None

    async def _write_loop(self) -> None:
        driver, top = self.driver, self._top
        assert top is not None
        has_written = False  # since others could last do anything
        while True:
            now = self._clock()
            if driver.unsent or (self._eof is not None and self._eof.is_set()):
                data: bytes | bytearray = b""  # what the peer does not take yet waits above, where it has a bound
            else:
                data = self._outgoing(top.pull(now), now)
            if data or driver.unsent:
                if has_written:
                    await anyio.lowlevel.checkpoint()
                has_written = True
                if driver.inline and not driver.unsent:
                    driver.write_now(data)
                    self.scope.timers.update(self)
                else:
                    await self._write(data)
            elif self._finish_at is not None:
                await self._say_last()
                if self._cancel_scope is not None:
                    self._cancel_scope.cancel()
                return
            elif self._eof is not None and not self._eof.is_set():
                if not await self._say_last():
                    await driver.send_eof()
                self._eof.set()
            else:
                self.scope.timers.update(self)  # a pull may also have moved a deadline, and given nothing
                self.parked = parked = self._new_waiter()
                if self._parking is not None:
                    self._parking.set()
                    self._parking = None
                await parked
                has_written = False

    async def _write(self, data: bytes | bytearray) -> None:
        self._stalled_since = self._clock()
        self._stalled_at = self.driver.accepted
        self.scope.timers.update(self)
        await self.driver.write(data)
        self._stalled_since = None

    async def _say_last(self) -> bool:
        """Send what each stage says last, outermost first, once; False if none of them has a last word."""
        if self._eof is not None and self._eof.is_set():
            return True
        units: Units = []
        for stage in self._outward:
            units = (stage.outgoing(units, self._clock()) if units else []) + stage.close()
        if units:
            await self._write(b"".join(units))
        return bool(units)

    async def send_eof(self) -> None:
        """End our direction after everything that waits, and go on reading. After it nothing is sent, no reply either.

        The innermost stage that can say so does, else the driver.
        """
        if self._eof is None:
            self._eof = anyio.Event()
            self._unpark()
        if self._pumped:
            self._eof.set()
        await self._eof.wait()

    async def wait_parked(self) -> None:
        """Wait until the writer has nothing left to do, or the pump has ended."""
        while self.parked is None and not self._pumped:
            if self._parking is None:
                self._parking = anyio.Event()
            await self._parking.wait()

    def _unpark(self) -> None:
        parked, self.parked = self.parked, None
        if parked is not None:
            self._wake_waiter(parked)

    def cork(self) -> None:
        """Several will send in this turn of the event loop: let the writer take all of it afterwards, rather than have
        the first of them write its own at once. Call it when they have been woken.
        """
        self._unpark()

    def wake(self) -> None:
        """Something waits to be sent. Harmless when the writer is busy: it looks again before it parks."""
        parked = self.parked
        if parked is None:
            return
        self.parked = None
        self._wake_waiter(parked)
        if not self.driver.inline or self._top is None or self._aborted or self._finish_at is not None or self._eof:
            return
        now = self._clock()
        try:
            data = self._outgoing(self._top.pull(now), now)
            if data:
                self.driver.write_now(data)
        except Exception as error:
            if not isinstance(error, TowlineError):
                logger.exception("%r: a stage failed", self, extra=self._log_fields("link.failed"))
            self.abort(error)

    def finish(self, timeout: float = 5.0) -> None:
        """End cleanly after everything that waits is written, within ``timeout`` seconds; else abort. Never waits."""
        if self._aborted or self._finish_at is not None:
            return
        self._finish_at = self._clock() + timeout
        if self._top is not None:
            self.scope.timers.update(self)
            self._unpark()

    @property
    def is_aborted(self) -> bool:
        return self._aborted

    def abort(self, error: Exception) -> None:
        """End at once: fences, never waits. The first error is the one that counts."""
        if self._aborted:
            return
        self._aborted = True
        if self._error is None:
            self._error = error
        self.driver.abort()
        if self._cancel_scope is not None:
            self._cancel_scope.cancel()

    async def aclose(self) -> None:
        """Close a link that is not being pumped, after the last write."""
        self._aborted = True
        await self.driver.aclose()

    # --- time ------------------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """The next moment at which something here wants to be told."""
        if self._top is None or self._aborted:
            return None
        first = math.inf
        for stage in self._stages:
            if (at := stage.deadline) is not None and at < first:
                first = at
        for at in (self._top.deadline, self._finish_at):
            if at is not None and at < first:
                first = at
        if self._stalled_since is not None and self.write_timeout is not None:
            first = min(first, self._stalled_since + self.write_timeout)
        return None if first == math.inf else first

    def on_time(self, now: float) -> None:
        """Called by the scope's timer when `deadline` has passed."""
        top = self._top
        assert top is not None
        try:
            if self._reading is not None:
                self._tell_paused(now)
            parts: list[Stage | Top] = [*self._stages, top]
            for part in parts:
                if part.deadline is not None and part.deadline <= now:
                    part.on_time(now)
            if self._finish_at is not None and self._finish_at <= now:
                raise LinkLost("the peer did not take the last bytes in time")
            self._check_stall(now)
        except Exception as error:
            if not isinstance(error, TowlineError):
                logger.exception("%r: a stage failed", self, extra=self._log_fields("link.failed"))
            self.abort(error)
            return
        if top.wants or self._stages_want:
            self.wake()

    def _check_stall(self, now: float) -> None:
        if self._stalled_since is None or self.write_timeout is None:
            return
        if self._stalled_since + self.write_timeout > now:
            return
        if self.driver.accepted == self._stalled_at:
            raise LinkLost(f"no byte was accepted for {self.write_timeout:g} s")
        self._stalled_since, self._stalled_at = now, self.driver.accepted
