"""Framing: bytes to frames, each with its length in front.

A header is a u32, big-endian: bit 31 says *control frame*, the other 31 bits are the length (D15). Application frames
carry no tag. The length is checked before anything is allocated or waited for.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from towline.errors import FrameTooLarge, LinkLost, MessageTooLarge, ProtocolViolation
from towline.link import Link
from towline.service import Kind, Side, Upgrade
from towline.stage import CLEAN, Batch, Ended, Stage, Units
from towline.streams import FrameStream
from towline.text import differing
from towline.units import Bytes

__all__ = ["CONTROL", "Framing", "FramingStage"]

HEADER: Final = struct.Struct(">I")
CONTROL: Final = 0x8000_0000
STRANGER_LIMIT: Final = 4096
"""The most a peer may send in one frame before a session knows it: its HELLO is far smaller."""


@dataclass(frozen=True, slots=True)
class Framing(Upgrade[FrameStream]):
    """Layer: turn bytes into frames.

    Needs bytes from the layer inside it; gives frames. Put it directly outside `Encryption`.

    Args:
        max_frame_size: the most bytes in one frame, 16 MiB. A peer that announces more is cut off before anything is
            allocated. Until a session above is attached the limit is 4 KiB, since only a HELLO may come.

    Raises:
        ValueError: for a limit that a length of 31 bits cannot hold, or that a HELLO does not fit.

    >>> Framing(max_frame_size=1 << 20)
    Framing(max_frame_size=1048576)
    """

    needs: ClassVar[tuple[Kind, ...]] = (Kind.BYTES,)
    gives: ClassVar[Kind] = Kind.FRAMES
    wire: ClassVar[str] = "framing/1"

    max_frame_size: Bytes = 16 << 20

    __repr__ = differing

    def __post_init__(self) -> None:
        if not STRANGER_LIMIT <= self.max_frame_size < CONTROL:
            raise ValueError(
                f"max_frame_size is {self.max_frame_size:,}, where {STRANGER_LIMIT:,} to {CONTROL - 1:,} will do"
            )

    async def upgrade(self, link: Link, side: Side) -> None:
        link.push(FramingStage(self.max_frame_size))


class FramingStage(Stage):
    """Batches to bytes and back. Any split of the bytes gives the same frames."""

    def __init__(self, max_frame_size: int) -> None:
        self.max_frame_size = max_frame_size
        self.limit = STRANGER_LIMIT
        self._parts: list[bytes] = []
        self._have = 0
        self._need: int = HEADER.size

    def established(self) -> None:
        self.limit = self.max_frame_size
        self.held = None

    def check(self, item: bytes) -> None:
        if len(item) > self.max_frame_size:
            raise MessageTooLarge(len(item), self.max_frame_size)

    def outgoing(self, units: Units, now: float) -> Units:
        pack = HEADER.pack
        out: list[bytes] = []
        batch: Batch
        for batch in units:
            for note in batch.notes:
                out.append(pack(len(note) | CONTROL))
                out.append(note)
            frames = batch.frames
            if not frames:
                continue
            sizes = set(map(len, frames))
            if (largest := max(sizes)) > self.max_frame_size:
                raise MessageTooLarge(largest, self.max_frame_size)
            if len(sizes) == 1:  # one size is common in bulk, and then one join does all
                header = pack(largest)
                out.append(header)
                out.append(header.join(frames))
            else:
                for frame in frames:
                    out.append(pack(len(frame)))
                    out.append(frame)
        return [b"".join(out)]

    def incoming(self, units: Units, now: float) -> Units:
        if units and self.held is not None:
            self.ended = self.held  # a stranger still, and it goes on
        for unit in units:
            self._parts.append(unit)
            self._have += len(unit)
        if self._have < self._need or self.ended is not None:
            return []
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        batches, position = self._split(data)
        rest = data[position:]
        self._parts = [rest] if rest else []
        self._have = len(rest)
        return batches

    def _split(self, data: bytes) -> tuple[Units, int]:
        unpack, limit, end = HEADER.unpack_from, self.limit, len(data)
        notes: list[bytes] = []
        frames: list[bytes] = []
        batches: Units = []
        position = 0
        self._need = HEADER.size
        while end - position >= 4:
            size: int = unpack(data, position)[0]
            start = position + 4
            if size <= limit:
                stop = start + size
                if stop > end:
                    self._need = 4 + size
                    break
                frames.append(data[start:stop])
            else:
                length = size & ~CONTROL
                if length > limit:
                    error = FrameTooLarge(length, limit)
                    if length <= self.max_frame_size:
                        self.held = error  # good, if the peer proves itself by what came before in this very read
                    else:
                        self.ended = error
                    break
                stop = start + length
                if stop > end:
                    self._need = 4 + length
                    break
                if frames:
                    batches.append(Batch(notes, frames))
                    notes, frames = [], []
                if start == stop:
                    self.ended = ProtocolViolation("an empty control frame")
                    break
                notes.append(data[start:stop])
            position = stop
        if notes or frames:
            batches.append(Batch(notes, frames))
        return batches, position

    def receive_eof(self, ended: Ended) -> None:
        if self.ended is not None:
            return
        if ended is CLEAN and self._have:
            self.ended = LinkLost(f"the link ended inside a frame, {self._have} bytes into it")
        else:
            self.ended = ended
