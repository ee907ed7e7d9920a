"""The names of what is measured, with their units: those that OpenTelemetry has made stable, and our own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from towline.endpoint import Endpoint
from towline.errors import CallFailed

__all__ = [
    "CURRENT",
    "NAME",
    "SCHEMA_URL",
    "Attributes",
    "Instruments",
    "error_type",
    "for_metrics",
    "where",
]

NAME: Final = "towline"
"""Who measures, and the value of ``rpc.system.name``."""

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.45.0"

CURRENT: Final = "towline-current"
"""Under this key a context of OpenTelemetry's has what it is the context of: a call, or the search for a link."""

Attributes: TypeAlias = dict[str, str | int | bool]

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""The buckets that the conventions ask for."""


class Instruments:
    """Everything that is measured."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        count = meter.create_counter

        def duration(name: str, description: str) -> Callable[..., None]:
            return meter.create_histogram(name, "s", description, explicit_bucket_boundaries_advisory=_SECONDS).record

        self.client_calls = duration("rpc.client.call.duration", "Calls that were made, with all their attempts.")
        self.server_calls = duration("rpc.server.call.duration", "Calls that were answered.")
        self.attempts = count(
            "towline.attempts", "{attempt}", "Attempts of calls and of dials, the first included."
        ).add
        self.retries = count("towline.retries", "{retry}", "Attempts that a policy has asked for.").add
        self.give_ups = count("towline.give_ups", "{give_up}", "Failures that a policy did not want to retry.").add
        self.cuts = count("towline.cuts", "{cut}", "Links that sessions have lost.").add
        self.resumes = count("towline.resumes", "{resume}", "Links over which sessions went on.").add
        self.replayed = count("towline.replayed.messages", "{message}", "Messages that were sent again.").add
        self.replayed_bytes = count("towline.replayed.size", "By", "Bytes of messages that were sent again.").add
        self.outages = duration("towline.outage.duration", "How long sessions were without a link.")
        self.round_trips = duration("towline.round_trip.duration", "Round trips that Heartbeat has measured.")
        self.handshake_failures = count("towline.handshake.failures", "{handshake}", "Handshakes that failed.").add

    def observe(self, sessions: Observed, buffers: Observed, credits: Observed, breakers: Observed) -> None:
        """What is looked at whenever somebody collects."""
        of = self._meter
        of.create_observable_up_down_counter("towline.sessions", [sessions], "{session}", "Sessions that live.")
        of.create_observable_gauge("towline.replay.buffer", [buffers], "By", "What is sent and not acknowledged.")
        of.create_observable_gauge("towline.replay.credit", [credits], "By", "What peers would take now.")
        of.create_observable_gauge("towline.breaker.state", [breakers], "{breaker}", "1 for the state it is in.")


Observed: TypeAlias = Callable[[CallbackOptions], Iterable[Observation]]


# --- what attributes say -------------------------------------------------------------------------------------------

_TRANSPORTS: Final[Mapping[str, str]] = {"tcp": "tcp", "unix": "unix", "pipe": "pipe", "stdio": "pipe", "exec": "pipe"}
"""What carries bytes, in the words of the conventions, which have none for memory."""


def where(endpoint: Endpoint) -> Attributes:
    """An endpoint, for a span.

    >>> where(Endpoint.parse("tcp://db.example:7000"))
    {'network.transport': 'tcp', 'server.address': 'db.example', 'server.port': 7000}
    """
    found: Attributes = {}
    if endpoint.scheme in _TRANSPORTS:
        found["network.transport"] = _TRANSPORTS[endpoint.scheme]
    address = endpoint.host or endpoint.path or endpoint.name
    if address:
        found["server.address"] = address
    if endpoint.port:
        found["server.port"] = endpoint.port
    return found


def for_metrics(attributes: Attributes) -> Attributes:
    """The same for a measurement: no paths.

    >>> for_metrics(where(Endpoint.parse("unix:///run/user/1000/db")))
    {'network.transport': 'unix'}
    """
    return {key: value for key, value in attributes.items() if "/" not in str(value)}


def error_type(error: BaseException) -> str:
    """What an error is called: by the class that a program can name, so not by one of a private module. What the other
    end answered is called by its status.

    >>> error_type(ConnectionResetError())
    'ConnectionResetError'
    """
    if isinstance(error, CallFailed):
        return error.code.name
    for kind in type(error).__mro__:
        if kind.__module__ == "builtins":
            return kind.__qualname__
        if not any(part.startswith("_") for part in kind.__module__.split(".")):
            return f"{kind.__module__}.{kind.__qualname__}"
    raise AssertionError("every class has a base among the builtins")
