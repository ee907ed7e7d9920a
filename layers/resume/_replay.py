"""The replay buffer: what was sent and not acknowledged, and what waits to be sent, as one list.

The write cursor walks it. A replay is the cursor moved back; there is no second queue, no phase and no blob (D14).
Messages are kept as plaintext references and sealed again under each connection's own keys.

    base          cursor            next
     │ acked ◄──── │ sent, unacked   │ waits
     ▼             ▼                 ▼
    [ m m m m m m m m m m m m m m m m ]
"""

from __future__ import annotations

from typing import Final

from towline.errors import ProtocolViolation

__all__ = ["OVERHEAD", "ReplayBuffer", "cost"]

OVERHEAD: Final = 128
"""What a message costs beside its bytes: about what CPython keeps for a small ``bytes`` and its slot."""


def cost(message: bytes) -> int:
    """What a message counts for, in the buffer and in credit alike.

    >>> cost(b"hello")
    133
    """
    return len(message) + OVERHEAD


class ReplayBuffer:
    """Messages by number, from the first unacknowledged one on.

    Attributes:
        messages: what is here, oldest first. Who appends one adds its cost.
        base: the number of the oldest message here; all below are acknowledged.
        cursor: the number of the next message to hand to the link.
        sent_upto: the highest number ever handed to a link.
        cost: what is here, in bytes of cost.
        sent_cost: the cost of messages 1..sent_upto: what was spent of the peer's credit. A replay spends none again.
    """

    __slots__ = ("base", "cost", "cursor", "messages", "sent_cost", "sent_upto")

    def __init__(self, base: int = 1) -> None:
        self.messages: list[bytes] = []
        self.base = base
        self.cursor = base
        self.sent_upto = base - 1
        self.cost = 0
        self.sent_cost = 0

    @property
    def next(self) -> int:
        """The number that the next message gets."""
        return self.base + len(self.messages)

    @property
    def unsent(self) -> bool:
        """Whether messages wait at the cursor."""
        return self.cursor - self.base < len(self.messages)

    def extend(self, messages: list[bytes]) -> None:
        self.messages += messages
        self.cost += sum(map(len, messages)) + OVERHEAD * len(messages)

    def take(self, size: int, credit: int) -> list[bytes]:
        """Move the cursor over the next messages and return them.

        Args:
            size: about how many bytes make a flush: the message that crosses it is the last.
            credit: the absolute cost that the peer has granted.
        """
        start = self.cursor - self.base
        chunk = self.messages[start : start + max(1, size // 64)]
        if sum(map(len, chunk)) > size:
            total = 0
            for count, message in enumerate(chunk, 1):
                total += len(message)
                if total >= size:
                    del chunk[count:]
                    break
        # Only messages never sent before spend credit.
        new = self.cursor + len(chunk) - 1 - self.sent_upto
        if new > 0:
            fresh = chunk[-new:]
            price = sum(map(len, fresh)) + OVERHEAD * new
            while new and self.sent_cost + price > credit:
                price -= len(chunk.pop()) + OVERHEAD
                new -= 1
            self.sent_cost += price
            self.sent_upto += new
        self.cursor += len(chunk)
        return chunk

    def acknowledge(self, number: int) -> int:
        """Forget all messages up to ``number`` and say how much cost that freed.

        Raises:
            ProtocolViolation: if it was never sent.
        """
        if number > self.sent_upto:
            raise ProtocolViolation(f"the peer acknowledged message {number}, where {self.sent_upto} were sent")
        count = number - self.base + 1
        if count <= 0:
            return 0
        freed = sum(map(len, self.messages[:count])) + OVERHEAD * count
        del self.messages[:count]
        self.base += count
        self.cost -= freed
        if self.cursor < self.base:
            self.cursor = self.base
        return freed

    def rewind(self, number: int) -> int:
        """Send again from ``number`` on; says how many messages that are."""
        replayed = max(0, self.sent_upto - number + 1)
        self.cursor = min(max(number, self.base), self.next)
        return replayed

    def unacked(self) -> list[bytes]:
        """All that the peer has not acknowledged, oldest first."""
        return list(self.messages)
