"""What a tunnel counts, as OpenTelemetry instruments, and as the text that Prometheus reads.

The one provider of this program is made here, with a registry of its own. Whatever else makes instruments by
OpenTelemetry's API is in the same text once it is the global one. Needs the extra ``metrics``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from ._status import Snapshot, Watch

__all__ = ["INSTALL", "Metrics", "is_installed"]

INSTALL: Final = "metrics need the extra 'metrics': pip install 'towline[cli,metrics]'"

_MODULES: Final = ("opentelemetry.sdk", "opentelemetry.exporter", "prometheus_client")

Observed = Callable[[Snapshot], Iterable[Observation]]


def is_installed() -> bool:
    """Whether the extra is there."""
    try:
        return all(find_spec(name) is not None for name in (*_MODULES, "opentelemetry.exporter.prometheus"))
    except ModuleNotFoundError:  # no opentelemetry.exporter to look in
        return False


def _one(value: Callable[[Snapshot], float]) -> Observed:
    return lambda snapshot: [Observation(value(snapshot))]


def _by_state(snapshot: Snapshot) -> list[Observation]:
    return [
        Observation(snapshot.attached, {"state": "attached"}),
        Observation(snapshot.detached, {"state": "detached"}),
    ]


def _by_direction(snapshot: Snapshot) -> list[Observation]:
    return [
        Observation(snapshot.sent, {"direction": "sent"}),
        Observation(snapshot.received, {"direction": "received"}),
    ]


# Sums over sessions, and no session's id for an attribute: each would be a series of its own, for ever.
_GAUGES: Final[tuple[tuple[str, str, str, Observed], ...]] = (
    ("towline.tunnel.sessions", "{session}", "Sessions that carry a connection now.", _by_state),
    (
        "towline.tunnel.waiting",
        "{connection}",
        "Connections of programs that have no session yet.",
        _one(lambda snapshot: snapshot.waiting),
    ),
    (
        "towline.tunnel.buffered",
        "By",
        "What is in all replay buffers, in bytes of cost.",
        _one(lambda snapshot: sum(each.buffered for each in snapshot.sessions)),
    ),
    (
        "towline.tunnel.buffered.share",
        "1",
        "How full the fullest replay buffer is.",
        _one(lambda snapshot: max((each.buffered / each.buffer for each in snapshot.sessions), default=0.0)),
    ),
    (
        "towline.tunnel.round_trip.longest",
        "s",
        "The longest of the last round trips.",
        _one(lambda snapshot: max((each.rtt for each in snapshot.sessions if each.rtt is not None), default=0.0)),
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
    ("towline.tunnel.cuts", "{cut}", "Links that sessions have lost.", _one(lambda snapshot: snapshot.cuts)),
    (
        "towline.tunnel.resumes",
        "{resume}",
        "Sessions that went on over a new link.",
        _one(lambda snapshot: snapshot.resumes),
    ),
    (
        "towline.tunnel.replayed",
        "{message}",
        "Messages that were sent again.",
        _one(lambda snapshot: snapshot.replayed),
    ),
    ("towline.tunnel.traffic", "By", "Bytes of messages, each counted once.", _by_direction),
)


def add_instruments(meter: Meter, watch: Watch) -> None:
    """Observe a tunnel whenever somebody reads. (To be given to telemetry, once that counts sessions itself.)"""

    def observing(observed: Observed) -> list[Callable[[CallbackOptions], Iterable[Observation]]]:
        return [lambda options: observed(watch.snapshot)]

    for name, unit, description, observed in _GAUGES:
        meter.create_observable_gauge(name, observing(observed), unit, description)
    for name, unit, description, observed in _COUNTERS:
        meter.create_observable_counter(name, observing(observed), unit, description)


class Metrics:
    """A provider of meters, and what it has measured as text for Prometheus.

    Attributes:
        content_type: of that text.
    """

    def __init__(self, watch: Watch) -> None:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry

        self.content_type = CONTENT_TYPE_PLAIN_0_0_4
        self._registry = CollectorRegistry()
        reader = PrometheusMetricReader(registry=self._registry, scope_info_enabled=False)
        resource = Resource.create({SERVICE_NAME: "towline", SERVICE_VERSION: watch.snapshot.version})
        self._provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        add_instruments(self._provider.get_meter("towline.cli"), watch)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        self._provider.shutdown()

    def make_global(self) -> None:
        """Make this the provider of the whole process: a program does, once."""
        from opentelemetry import metrics

        metrics.set_meter_provider(self._provider)

    def text(self) -> bytes:
        """What is measured now."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry)
