"""`TunnelConfig`: both ends of a tunnel, in one file."""

from __future__ import annotations

from ._kinds import Discreet
from ._known import PathText, PortText
from ._stack import StackConfig
from ._text import Duration, EndpointText

__all__ = ["ForwardConfig", "ListenConfig", "TunnelConfig"]


class ListenConfig(Discreet):
    """The far end of a tunnel.

    Attributes:
        to: the server program.
        endpoint: where it listens, if that is not where forwards connect to: all interfaces, say.
        admin: a Unix socket that shows how it stands, and takes orders.
        metrics: a port, or an address and a port, for health, a live page and metrics over HTTP.
    """

    to: EndpointText
    endpoint: EndpointText | None = None
    admin: PathText | None = None
    metrics: PortText | None = None


class ForwardConfig(Discreet):
    """The near end of a tunnel.

    Attributes:
        local: where programs connect.
        retry_for: how long a way back is looked for; by default as long as the sessions live (``ttl`` of `Resume`).
        admin: a Unix socket that shows how it stands, and takes orders.
        metrics: a port, or an address and a port, for health, a live page and metrics over HTTP.
    """

    local: EndpointText
    retry_for: Duration | None = None
    admin: PathText | None = None
    metrics: PortText | None = None


class TunnelConfig(StackConfig):
    """A stack, where its two ends meet, and what each end does: for ``towline listen``, ``forward`` and ``ping``.

    Attributes:
        endpoint: where forwards connect to.
        listen: what ``towline listen`` does.
        forward: what ``towline forward`` does.

    >>> config = TunnelConfig.from_toml('''
    ... endpoint = "tcp://db.example:7000"
    ... layers = ["resume", "heartbeat", "framing"]
    ... listen = { to = "tcp://127.0.0.1:5432", endpoint = "tcp://*:7000" }
    ... forward = { local = "tcp://127.0.0.1:5432" }
    ... ''')
    >>> config.listen.to
    Endpoint('tcp://127.0.0.1:5432')
    """

    listen: ListenConfig | None = None
    forward: ForwardConfig | None = None
