"""One link's hold on a session, with the fence: what an older link still brings is dropped, and replay covers it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from towline.link import Link
from towline.stage import Batch, Ended, Top, Units

if TYPE_CHECKING:
    from ._life import Life

__all__ = ["Attachment"]

RENEWAL_INTERVAL: Final = 60.0
"""A link whose keys are too old is replaced; when no new one is to be had, it is tried again after so many seconds."""


class Attachment(Top):
    """One link's hold on a session. Fenced as soon as it is not the session's attachment any more."""

    def __init__(self, session: Life, link: Link) -> None:
        self.session = session
        self.link = link
        self.goodbye: bytes | None = None  # a fenced attachment's last word

    @property
    def is_current(self) -> bool:
        return self.session.attachment is self

    @property
    def is_live(self) -> bool:
        """Whether what this link brings still means something."""
        return self.session.attachment is self and not self.session.state.is_over

    @property
    def wants(self) -> bool:  # type: ignore[override]
        if self.goodbye is not None:
            return True
        return self.is_current and (self.session.core.wants or bool(self.session.controls))

    @property
    def deadline(self) -> float | None:  # type: ignore[override]
        if not self.is_current:
            return None
        ack_at, expires = self.session.core.deadline, self.link.expires
        if ack_at is None or expires is None:
            return ack_at if expires is None else expires
        return min(ack_at, expires)

    def on_time(self, now: float) -> None:
        self.session.core.on_time(now)
        if self.link.expires is not None and self.link.expires <= now:
            self.link.expires = now + RENEWAL_INTERVAL
            self.session.key_expired()

    def pull(self, now: float) -> Units:
        if self.goodbye is not None:
            note, self.goodbye = self.goodbye, None
            return [Batch([note])]
        if not self.is_current:
            return []
        return self.session.pulled(self)

    def deliver(self, units: Units, now: float) -> None:
        for batch in units:
            for note in batch.notes:
                if not self.is_live:
                    return
                self.session.receive_note(note)
            if batch.frames and self.is_live:
                self.session.core.receive_frames(batch.frames, now)
        if self.is_live:
            self.session.received()

    def receive_eof(self, ended: Ended) -> bool:
        return False  # the end of a link is not the end of a session: it is detached
