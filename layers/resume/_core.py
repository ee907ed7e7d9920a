"""The rules of RSM/1 for one session, one side: which numbers move, when, and what must be said about it.

Both ends run this same code; what only a client or a server does is in their shells. No I/O, no clock, no randomness:
frames and ``now`` come in, frames go out. Three laws hold everything together:

1. ``recv`` grows only in the step that puts the message into the inbox.
2. Every number on the wire is absolute and cumulative, so that nothing depends on a control frame arriving once.
3. A replay is the cursor moved back (`attach`); after it, the ordinary flow runs in both directions at once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

from towline.errors import MessageTooLarge, ProtocolViolation
from towline.stage import Batch

from ._replay import OVERHEAD, ReplayBuffer
from ._wire import Ack, BatchHead, Fin

__all__ = ["FLUSH_SIZE", "AckBeyondSent", "Core", "Limits", "StateMismatch"]

FLUSH_SIZE: Final = 61_000
"""Bytes of messages in a flush: with their headers, one record of the encryption below."""

ACK_COST: Final = 256 << 10
ACK_DELAY: Final = 0.2


class AckBeyondSent(ProtocolViolation):
    """The peer acknowledged what was never sent: its state is not ours, and the session cannot go on."""


class StateMismatch(ProtocolViolation):
    """The peer comes back with less, or more, than it had: the session cannot go on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one side holds at most, in bytes of cost."""

    buffer: int
    window: int
    max_message: int


class Core:
    """The numbers of one session, seen from one side.

    Attributes:
        replay: what was sent and not acknowledged, and what waits.
        inbox: what arrived and the application has not taken.
        recv: the number of the last message in order; the FIN counts as one.
        fin: the number of our FIN, once the application has ended its direction.
        peer_fin: the number of the peer's FIN, once it has arrived.
        wants: whether `pull` has something that did not exist before.
        peer_credit: what the peer takes in all, in bytes of cost, as far as it has told us.
        progress: whether `recv` or the acknowledged number has grown since `attach`.
    """

    def __init__(self, limits: Limits, *, first: int = 1) -> None:
        self.limits = limits
        self.replay = ReplayBuffer(first)
        self.inbox: deque[bytes] = deque()
        self.recv = first - 1
        self.fin: int | None = None
        self.fin_acked = False
        self.peer_fin: int | None = None
        self.wants = False
        self.progress = False
        self.duplicates = 0
        self.peer_max_message = limits.max_message
        self.consumed_cost = 0  # cost of all that the application has taken
        self.granted = limits.window  # the highest credit that we have told the peer
        self._first = first
        self._received_cost = 0
        self.peer_credit = 0
        self._fin_handed = False  # our FIN was handed to some link: only then may it be acknowledged
        self._fin_due = False
        self._ack_due = False
        self._ack_request = False
        self._unacked_cost = 0  # received since our last ack
        self._ack_at: float | None = None
        self._expected: int | None = None  # the number of the next data frame on this connection

    # --- what the application does ---------------------------------------------------------------------------------

    @property
    def max_message(self) -> int:
        """The most bytes that a message may have here: what both sides can hold."""
        return min(self.limits.max_message, self.peer_max_message)

    def check_size(self, message: bytes) -> None:
        if len(message) > self.max_message:
            raise MessageTooLarge(len(message), self.max_message)

    @property
    def room(self) -> int:
        """What the replay buffer still takes, in bytes of cost."""
        return self.limits.buffer - self.replay.cost

    def has_room(self, cost: int) -> bool:
        return cost <= self.room

    @property
    def sent_bytes(self) -> int:
        """The lengths of all messages that were ever handed to a link, each counted once."""
        replay = self.replay
        return replay.sent_cost - OVERHEAD * (replay.sent_upto - self._first + 1)

    @property
    def received_bytes(self) -> int:
        """The lengths of all messages that arrived, each counted once."""
        count = self.recv - self._first + (1 if self.peer_fin is None else 0)
        return self._received_cost - OVERHEAD * count

    def end(self) -> None:
        """No more messages: the FIN takes the next number."""
        if self.fin is None:
            self.fin = self.replay.next
            self._fin_due = True
            self.wants = True

    def consumed(self, cost: int) -> None:
        """The application took messages of this cost; tell the peer when that frees a quarter of the window."""
        self.consumed_cost += cost
        if self.consumed_cost + self.limits.window - self.granted >= self.limits.window // 4:
            self._ack_due = self.wants = True

    def request_ack(self) -> None:
        """Ask the peer to acknowledge at once."""
        self._ack_request = self._ack_due = self.wants = True

    @property
    def acked(self) -> int:
        """The number of the last message, or FIN, that the peer has acknowledged."""
        if self.fin is not None and self.fin_acked:
            return self.fin
        return self.replay.base - 1

    @property
    def next(self) -> int:
        """The number after everything that exists in our direction so far, the FIN included."""
        return self.replay.next if self.fin is None else self.fin + 1

    @property
    def is_complete(self) -> bool:
        """Both directions have ended and everything in them has arrived."""
        return self.fin_acked and self.peer_fin is not None

    @property
    def inbox_cost(self) -> int:
        """What the inbox holds, in bytes of cost."""
        return self._received_cost - self.consumed_cost

    @property
    def consumed_upto(self) -> int:
        """The number of the last message that the application has taken."""
        return self.recv - len(self.inbox) - (1 if self.peer_fin is not None else 0)

    # --- a connection comes and goes -------------------------------------------------------------------------------

    @property
    def credit(self) -> int:
        """What the peer may send in all, in cost."""
        return self.consumed_cost + self.limits.window

    def start(self, credit: int, max_message: int) -> None:
        """A new session: the peer's first word about its limits."""
        self.peer_credit = credit
        self.peer_max_message = max_message
        self.granted = self.credit
        self._expected = None
        self._ack_due = self.wants = True  # at once: it confirms the session (D22)

    def check_peer(self, recv: int, next_: int) -> None:
        """See whether the peer's state goes with ours, before anything is changed.

        Raises:
            StateMismatch: if the peer has forgotten what it acknowledged, has what was never sent, or never sent what
                we have.
        """
        highest = self.fin if self.fin is not None and self._fin_handed else self.replay.sent_upto
        if not self.acked <= recv <= highest:
            raise StateMismatch(
                f"the peer has received up to {recv}, where it acknowledged {self.acked} and {highest} were sent"
            )
        if next_ <= self.recv:
            raise StateMismatch(f"the peer's next message is {next_}, where {self.recv} were received")

    def attach(self, recv: int, credit: int, max_message: int) -> int:
        """A connection resumes the session: trim by what the peer has, and move the cursor to the rest.

        Returns:
            How many messages are sent again.
        """
        self.acknowledge(recv, credit)
        self.peer_max_message = max_message
        self.progress = False
        self._expected = None
        self._fin_due = self.fin is not None and not self.fin_acked
        # At once: the application may have taken messages since our last word about credit was composed, and a peer
        # that believes its credit used up would wait for ever.
        self._ack_due = self.wants = True
        self._ack_at = None
        self._unacked_cost = 0
        self.granted = self.credit
        return self.rewind(recv)

    def rewind(self, recv: int) -> int:
        """Send again all that comes after ``recv``, wherever in a batch that is."""
        return self.replay.rewind(recv + 1)

    # --- what is sent ----------------------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        return self._ack_at

    def on_time(self, now: float) -> None:
        if self._ack_at is not None and self._ack_at <= now:
            self._ack_due = self.wants = True
            self._ack_at = None

    def pull(self) -> list[Batch]:
        """The next flush: acks first, then data, then a FIN when all data before it has gone."""
        self.wants = False
        batches: list[Batch] = []
        replay = self.replay
        if replay.cursor - replay.base < len(replay.messages):
            frames = replay.take(FLUSH_SIZE, self.peer_credit)
            if frames:
                request = self._ack_request or replay.cost * 2 > self.limits.buffer
                head = BatchHead(replay.cursor - len(frames), self.recv, self.credit, request)
                batches.append(Batch([head.encode()], frames))
                self._acked()
        if self._ack_due:
            batches.append(Batch([Ack(self.recv, self.credit, self._ack_request).encode()]))
            self._acked()
        if self._fin_due and not replay.unsent and self.fin is not None:
            self._fin_due = False
            self._fin_handed = True
            batches.append(Batch([Fin(self.fin).encode()]))
        return batches

    def _acked(self) -> None:
        self.granted = self.credit
        self._ack_due = self._ack_request = False
        self._ack_at = None
        self._unacked_cost = 0

    # --- what arrives ----------------------------------------------------------------------------------------------

    def receive_head(self, head: BatchHead) -> None:
        """The data frames that follow are numbered from here."""
        if head.first > self.recv + 1:
            raise ProtocolViolation(f"a gap: the peer goes on with message {head.first}, where {self.recv + 1} is next")
        self._expected = head.first
        self.acknowledge(head.recv, head.credit)
        if head.ack_request:
            self._ack_due = self.wants = True

    def receive_ack(self, ack: Ack) -> None:
        self.acknowledge(ack.recv, ack.credit)
        if ack.ack_request:
            self._ack_due = self.wants = True

    def receive_frames(self, frames: list[bytes], now: float) -> None:
        """Put what is new into the inbox; what was here before is dropped and counted."""
        expected = self._expected
        if expected is None:
            raise ProtocolViolation("data without a number")
        self._expected = expected + len(frames)
        frames = self.drop_seen(frames, expected)
        if not frames:
            return
        if self.peer_fin is not None:
            raise ProtocolViolation("data after the end of the peer's direction")
        largest = max(map(len, frames))
        if largest > self.limits.max_message:
            raise ProtocolViolation(f"a message of {largest:,} bytes, where {self.limits.max_message:,} were agreed")
        cost = sum(map(len, frames)) + OVERHEAD * len(frames)
        if self._received_cost + cost > self.granted:
            raise ProtocolViolation(
                f"the peer has sent {self._received_cost + cost:,} bytes of cost, where {self.granted:,} were granted"
            )
        self._received_cost += cost
        self.inbox.extend(frames)
        self.recv += len(frames)
        self.progress = True
        self._unacked_cost += cost
        if self._unacked_cost >= ACK_COST:
            self._ack_due = self.wants = True
        elif self._ack_at is None:
            self._ack_at = now + ACK_DELAY

    def drop_seen(self, frames: list[bytes], first: int) -> list[bytes]:
        """What a replay brings twice: the whole of a batch, or its beginning."""
        seen = self.recv - first + 1
        if seen <= 0:
            return frames
        self.duplicates += min(seen, len(frames))
        return frames[seen:]

    def receive_fin(self, fin: Fin) -> None:
        if fin.number <= self.recv:
            if fin.number != self.peer_fin:
                raise ProtocolViolation(f"a FIN numbered {fin.number}, where {self.recv} were received")
        elif fin.number == self.recv + 1:
            self.recv = self.peer_fin = fin.number
            self.progress = True
        else:
            raise ProtocolViolation(f"a gap: a FIN numbered {fin.number}, where {self.recv + 1} is next")
        self._ack_due = self.wants = True

    def acknowledge(self, recv: int, credit: int) -> None:
        """The peer has everything up to ``recv``, and takes this much cost in all. Older news is ignored."""
        if credit > self.peer_credit:
            self.peer_credit = credit
            self.wants = self.wants or self.replay.unsent
        if recv <= self.acked:
            return
        fin = self.fin
        if fin is not None and recv == fin and self._fin_handed:
            self.fin_acked = True
            recv -= 1
        elif recv > self.replay.sent_upto:
            raise AckBeyondSent(f"the peer acknowledged {recv}, where {self.replay.sent_upto} were sent")
        self.trim(recv)
        self.progress = True

    def trim(self, number: int) -> None:
        """Forget what the peer has."""
        self.replay.acknowledge(number)
