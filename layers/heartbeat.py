"""Heartbeat: find out that a link is dead, which TCP tells nobody for a quarter of an hour.

It only ever aborts a connection; it decides nothing about a session. Both sides ping, each for itself, since each must
know. Ping and pong are control frames, so they travel inside the encryption and are never sequenced or replayed.

    PING  0x20, u64 id        PONG  0x21, u64 id of the ping it answers
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Final

from towline.errors import LinkLost, ProtocolViolation
from towline.hooks import Hooks, RoundTripMeasured, tell
from towline.link import Link
from towline.service import Kind, Side, Upgrade
from towline.stage import Batch, Stage, Units
from towline.streams import FrameStream
from towline.text import differing
from towline.units import Seconds

__all__ = ["PING", "PONG", "Heartbeat", "HeartbeatStage"]

PING: Final = 0x20
PONG: Final = 0x21
_NOTE: Final = struct.Struct(">BQ")


@dataclass(frozen=True, slots=True)
class Heartbeat(Upgrade[FrameStream]):
    """Layer: end a connection that has gone silent, and measure its round trip.

    Needs frames from the layer inside it, and passes them on. Put it directly outside `Framing`, inside `Resume`.

    Args:
        interval: seconds after which a ping goes out when nothing was sent, or nothing received. 5 s keeps the state
            of usual NATs and firewalls alive. A pong does not count as sent, so that both ends measure.
        timeout: seconds of silence after which the peer counts as dead, 15 s: three pings. Also the time for which no
            byte may be accepted while some wait to be written.
        hooks: told of every round trip that is measured.

    Raises:
        ValueError: unless 0 < interval < timeout.

    >>> Heartbeat(interval=1, timeout=3)
    Heartbeat(interval=1, timeout=3)
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.FRAMES,)
    gives: ClassVar[Kind] = Kind.FRAMES
    wire: ClassVar[str] = "heartbeat/1"

    interval: Seconds = 5.0
    timeout: Seconds = 15.0
    hooks: Hooks | None = field(default=None, kw_only=True)

    __repr__ = differing

    def __post_init__(self) -> None:
        if not 0 < self.interval < self.timeout:
            raise ValueError(
                f"interval is {self.interval:g} s and timeout {self.timeout:g} s, where 0 < interval < timeout is right"
            )

    async def upgrade(self, link: Link, side: Side) -> None:
        def measured(seconds: float) -> None:
            link.rtt = seconds
            if self.hooks is not None:
                tell(self.hooks.on_round_trip, RoundTripMeasured(link, seconds))

        link.write_timeout = self.timeout
        link.driver.guard(self.timeout)
        link.push(HeartbeatStage(self.interval, self.timeout, link.scope.clock(), measured))


class HeartbeatStage(Stage):
    """The rules of liveness for one connection."""

    def __init__(
        self, interval: float, timeout: float, now: float, measured: Callable[[float], None] | None = None
    ) -> None:
        self.interval = interval
        self.timeout = timeout
        self._measured = measured
        self._sent_at = now
        self._received_at = now
        self._pinged_at: float | None = None  # the ping that waits for its pong
        self._ping_id = 0
        self._ping_due = False
        self._pong_due: int | None = None  # state, not a queue: a flood of pings gets one pong (D10)

    @property
    def wants(self) -> bool:  # type: ignore[override]
        return self._ping_due or self._pong_due is not None

    @property
    def deadline(self) -> float | None:  # type: ignore[override]
        if self.ended is not None:  # nothing can come any more, so silence says nothing
            return None if self._ping_due else self._sent_at + self.interval
        if self._ping_due:  # the writer is stuck; only death is left to wait for
            return self._received_at + self.timeout
        idle_at = min(self._sent_at, self._received_at) + self.interval
        if self._pinged_at is not None:
            idle_at = max(idle_at, self._pinged_at + self.interval)
        return min(idle_at, self._received_at + self.timeout)

    def outgoing(self, units: Units, now: float) -> Units:
        self._sent_at = now
        return units

    def incoming(self, units: Units, now: float) -> Units:
        # Called on every read: any bytes prove that the peer lives, a frame that is still incomplete too.
        self._received_at = now
        for number, batch in enumerate(units):
            if batch.notes:
                try:
                    batch.notes = [note for note in batch.notes if not self._take(note, now)]
                except ProtocolViolation as error:
                    self.ended = error
                    units = units[:number]
                    break
        return [batch for batch in units if batch.notes or batch.frames]

    def _take(self, note: bytes, now: float) -> bool:
        if note[0] not in (PING, PONG):
            return False
        if len(note) != _NOTE.size:
            raise ProtocolViolation(f"a heartbeat of {len(note)} bytes, where it has {_NOTE.size}")
        ping_id: int = _NOTE.unpack(note)[1]
        if note[0] == PING:
            self._pong_due = ping_id
        elif ping_id == self._ping_id and self._pinged_at is not None:
            if self._measured is not None:
                self._measured(now - self._pinged_at)
            self._pinged_at = None
        return True

    def pending(self, now: float) -> Units:
        notes: list[bytes] = []
        if self._pong_due is not None:
            notes.append(_NOTE.pack(PONG, self._pong_due))
            self._pong_due = None
        if self._ping_due:
            self._ping_due = False
            self._ping_id += 1
            self._pinged_at = now
            notes.append(_NOTE.pack(PING, self._ping_id))
            # Not for a pong: an end that only ever answers would never measure its own round trip.
            self._sent_at = now
        return [Batch(notes)] if notes else []

    def on_time(self, now: float) -> None:
        dead_at = self._received_at + self.timeout
        if now >= dead_at and self.ended is None:
            if now - dead_at <= self.interval:
                raise LinkLost(f"nothing was received for {now - self._received_at:.3g} s")
            # We were late ourselves: a suspended machine, a blocked loop. The peer's answer may be waiting
            # unread, so it gets one fresh deadline.
            self._received_at = now - self.timeout + self.interval
        self._ping_due = True

    def paused(self, seconds: float) -> None:
        self._received_at += seconds
