"""What a call asks and what it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ._wire import NO_METADATA

if TYPE_CHECKING:
    from towline.service import Service

    from ._stream import Stream

__all__ = ["Request", "Response"]

SHOWN: Final = 40
"""So many bytes of a payload are shown."""


@dataclass(slots=True, repr=False)
class Request:
    """A call: to which method, with what.

    Taken for immutable: make another by `dataclasses.replace`. (It is not frozen, since one is made for each call, and
    that would take three times as long.)

    Attributes:
        method: its name.
        payload: its argument, up to the other end's ``max_message``.
        metadata: what travels beside it: text to bytes, at most 64 KiB in all. Traces, deadlines, who asks.
        is_stream: whether messages follow, in both directions: see `open_stream`.
        stream: on the side that is called, these messages.
        peer: on the side that is called, the caller: a service that calls it back over the same connection.

    >>> Request("get", b"user:7")
    Request('get', b'user:7')
    """

    method: str
    payload: bytes = b""
    metadata: Mapping[str, bytes] = field(default_factory=lambda: NO_METADATA)
    is_stream: bool = field(default=False, kw_only=True)
    stream: Stream | None = field(default=None, kw_only=True, compare=False)
    peer: Service[Request, Response] | None = field(default=None, kw_only=True, compare=False)

    def __repr__(self) -> str:
        more = _more(self.metadata) + ", is_stream=True" * self.is_stream
        return f"Request({self.method!r}, {_shown(self.payload)}{more})"


@dataclass(slots=True, repr=False)
class Response:
    """What a call was answered.

    Attributes:
        payload: the answer.
        metadata: what travels beside it: text to bytes.
        stream: where the request had ``is_stream``: the messages. Its `Stream.response` is the answer at its end.

    >>> Response(b"x" * 1000)
    Response(<1,000 bytes: b'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx'...>)
    """

    payload: bytes = b""
    metadata: Mapping[str, bytes] = field(default_factory=lambda: NO_METADATA)
    stream: Stream | None = field(default=None, kw_only=True, compare=False)

    def __repr__(self) -> str:
        return f"Response({_shown(self.payload)}{_more(self.metadata)})"


def _shown(payload: bytes) -> str:
    return repr(payload) if len(payload) <= SHOWN else f"<{len(payload):,} bytes: {payload[:SHOWN]!r}...>"


def _more(metadata: Mapping[str, bytes]) -> str:
    # Only the keys: a value may be a secret.
    return f", metadata=<{', '.join(metadata)}>" if metadata else ""
