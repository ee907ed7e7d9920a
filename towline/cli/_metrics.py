"""What is measured, as the text that Prometheus reads: all that `towline.telemetry` tells of the stack, and what only a
tunnel knows.

The program's provider is made here, with a registry of its own. Needs the extra ``metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Final

from opentelemetry.metrics import CallbackOptions, Observation

from towline.stack import Stack
from towline.telemetry import Telemetry

from ._status import Snapshot, Watch

__all__ = ["INSTALL", "Metrics", "is_installed"]

INSTALL: Final = "metrics need the extra 'metrics': pip install 'towline[cli,metrics]'"

_MODULES: Final = ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus_client")

Observed = Callable[[Watch], Iterable[Observation]]


def is_installed() -> bool:
    """Whether the extra is there."""
    try:
        return all(find_spec(name) is not None for name in (*_MODULES, "opentelemetry.exporter.prometheus"))
    except ModuleNotFoundError:  # no opentelemetry.exporter to look in
        return False


def _one(value: Callable[[Snapshot], float]) -> Observed:
    return lambda watch: [Observation(value(watch.snapshot))]


def _fullest(watch: Watch) -> list[Observation]:
    shares = (each.buffered / each.core.limits.buffer for each in watch.tunnel.carried)
    return [Observation(max(shares, default=0.0))]


def _by_direction(watch: Watch) -> list[Observation]:
    snapshot = watch.snapshot
    return [
        Observation(snapshot.sent, {"direction": "sent"}),
        Observation(snapshot.received, {"direction": "received"}),
    ]


# Sums over sessions, and no session's id for an attribute: each would be a series of its own, for ever.
_GAUGES: Final[tuple[tuple[str, str, str, Observed], ...]] = (
    (
        "towline.tunnel.waiting",
        "{connection}",
        "Connections of programs that have no session yet.",
        _one(lambda snapshot: snapshot.waiting),
    ),
    (
        "towline.tunnel.buffered.share",
        "1",
        "How full the fullest replay buffer is.",
        _fullest,
    ),
    ("towline.tunnel.draining", "1", "1 while nothing new is accepted.", _one(lambda snapshot: snapshot.is_draining)),
)

_COUNTERS: Final[tuple[tuple[str, str, str, Observed], ...]] = (
    (
        "towline.tunnel.sessions.begun",
        "{session}",
        "Sessions that there ever were.",
        _one(lambda snapshot: snapshot.sessions_begun),
    ),
    ("towline.tunnel.traffic", "By", "Bytes of messages, each counted once.", _by_direction),
)


class Metrics:
    """A provider of meters, and what it has measured as text for Prometheus.

    Attributes:
        content_type: of that text.
    """

    def __init__(self) -> None:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry

        self.content_type = CONTENT_TYPE_PLAIN_0_0_4
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)
        resource = Resource.create({SERVICE_NAME: "towline", SERVICE_VERSION: version("towline")})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._provider.shutdown()

    def instrument(self, stack: Stack) -> Stack:
        """The stack, measured. Its spans go to whatever tracing this process was started with, if any."""
        return Telemetry(meter_provider=self._provider).instrument(stack)

    def observe(self, watch: Watch) -> None:
        """Measure a tunnel, whenever somebody reads."""
        meter = self._provider.get_meter("towline.cli")

        def observing(observed: Observed) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
            return [lambda options: observed(watch)]

        for name, unit, description, observed in _GAUGES:
            meter.create_observable_gauge(name, observing(observed), unit, description)
        for name, unit, description, observed in _COUNTERS:
            meter.create_observable_counter(name, observing(observed), unit, description)

    def text(self) -> bytes:
        """What is measured now."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
