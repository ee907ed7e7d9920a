r"""Lines: bytes to lines of text, for protocols that people type.

It gives lines only to an application: the layers above Framing speak control frames beside data, and a line has no
room for them (D29).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from towline.errors import FrameTooLarge, LinkLost, MessageTooLarge, MisuseError
from towline.link import Link
from towline.service import Kind, Side, Upgrade
from towline.stage import CLEAN, Batch, Ended, Stage, Units
from towline.streams import FrameStream
from towline.text import differing
from towline.units import Bytes

__all__ = ["Lines", "LinesStage"]


@dataclass(frozen=True, slots=True)
class Lines(Upgrade[FrameStream]):
    r"""Layer: turn bytes into lines, as bytes without their line ending.

    Needs bytes from the layer inside it; gives lines. What is sent ends with ``\n``; what is received may end with
    ``\n`` or ``\r\n``.

    Args:
        max_line_size: the most bytes in a line, 64 KiB. A peer that sends more without an end of line is cut off.

    Raises:
        ValueError: for a limit below 1.

    >>> Lines()
    Lines()
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.BYTES,)
    gives: ClassVar[Kind] = Kind.LINES
    wire: ClassVar[str] = "lines/1"

    max_line_size: Bytes = 65536

    __repr__ = differing

    def __post_init__(self) -> None:
        if self.max_line_size < 1:
            raise ValueError(f"max_line_size is {self.max_line_size}, where at least 1 is needed")

    async def upgrade(self, link: Link, side: Side) -> None:
        link.push(LinesStage(self.max_line_size))


class LinesStage(Stage):
    """Lines to bytes and back; a line is a frame of a Batch without notes."""

    def __init__(self, max_line_size: int) -> None:
        self.max_line_size = max_line_size
        self._rest = b""
        self._scanned = 0  # bytes of the rest that hold no end of line

    def check(self, item: bytes) -> None:
        if b"\n" in item:
            raise MisuseError("a line that is sent must not hold a line break")
        if len(item) > self.max_line_size:
            raise MessageTooLarge(len(item), self.max_line_size)

    def outgoing(self, units: Units, now: float) -> Units:
        lines: list[bytes] = [line for batch in units for line in batch.frames]
        return [b"\n".join(lines) + b"\n"] if lines else []

    def incoming(self, units: Units, now: float) -> Units:
        if not units or self.ended is not None:
            return []
        data = b"".join((self._rest, *units))
        end = data.rfind(b"\n", self._scanned) + 1
        self._rest = data[end:]
        self._scanned = len(self._rest)
        lines = data[:end].split(b"\n")[:-1]
        good: list[bytes] = []
        for line in lines:
            if len(line) > self.max_line_size + 1:
                self.ended = FrameTooLarge(len(line), self.max_line_size)
                break
            good.append(line.removesuffix(b"\r"))
        if self.ended is None and len(self._rest) > self.max_line_size + 1:
            self.ended = FrameTooLarge(len(self._rest), self.max_line_size)
        return [Batch(frames=good)] if good else []

    def receive_eof(self, ended: Ended) -> None:
        if self.ended is not None:
            return
        if ended is CLEAN and self._rest:
            self.ended = LinkLost(f"the link ended inside a line, {len(self._rest)} bytes into it")
        else:
            self.ended = ended
