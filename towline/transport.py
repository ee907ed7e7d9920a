"""What touches the outside world: a Transport connects and listens, and makes a `Link` of what it gets.

A transport is a ``Service[Dial, Link]`` that can also ``listen``. It negotiates nothing and knows no layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from towline.endpoint import Endpoint
from towline.link import Link
from towline.service import Dial

__all__ = ["Listener", "Transport"]


class Transport(ABC):
    """Connects to and listens on the endpoints of one scheme (or of a few that belong together)."""

    schemes: ClassVar[tuple[str, ...]]

    @abstractmethod
    async def __call__(self, dial: Dial, /) -> Link:
        """Connect to ``dial.endpoint``.

        Raises:
            ConnectFailed: if it cannot be reached; `UnknownHost` if its name does not resolve.
            EndpointError: if this transport cannot serve the endpoint at all.
        """

    @abstractmethod
    async def listen(self, endpoint: Endpoint) -> Listener:
        """Start to listen; when this returns, a dial succeeds.

        Raises:
            ConnectFailed: if the endpoint cannot be bound: in use, no permission, no such interface.
            EndpointError: if this transport cannot listen on the endpoint at all.
        """


class Listener(ABC):
    """Accepts links on one endpoint.

    Attributes:
        endpoint: what is really bound: with the port that the system chose, where 0 was asked for.
    """

    endpoint: Endpoint

    @abstractmethod
    async def serve(self, accepted: Callable[[Link], None]) -> None:
        """Call ``accepted`` with every new link, until cancelled or closed. It must not block, and does not raise."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stop listening and leave nothing behind (a socket file). Links that were accepted live on. Idempotent."""
