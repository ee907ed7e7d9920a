"""What tests of telemetry share: an SDK that keeps everything in memory."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from towline.telemetry import Telemetry


class Recorder:
    """A `Telemetry`, and what it has told.

    Attributes:
        telemetry: instruments stacks.
        tracer: for spans of the test's own.
    """

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracer_provider = TracerProvider(shutdown_on_exit=False)
        self.tracer_provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meter_provider = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracer_provider.get_tracer("test")
        self.telemetry = Telemetry(tracer_provider=self.tracer_provider, meter_provider=self.meter_provider, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those that have ended, in the order of their beginnings."""
        return sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str, kind: str | None = None) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name and kind in (None, span.kind.name)]

    def forget(self) -> None:
        self._exporter.clear()

    def tree(self) -> list[str]:
        """All spans as lines, children indented below their parents: name, kind, and what went wrong."""
        spans = self.spans
        known = {span.context.span_id for span in spans if span.context is not None}
        lines: list[str] = []

        def add(span: ReadableSpan, depth: int) -> None:
            about = dict(span.attributes or {})
            words = [span.name, span.kind.name]
            words += [str(about[key]) for key in ("towline.side", "towline.layer", "error.type") if key in about]
            if "towline.resend_count" in about:
                words.append(f"#{about['towline.resend_count']}")
            lines.append("  " * depth + " ".join(words))
            assert span.context is not None
            for child in spans:
                if child.parent is not None and child.parent.span_id == span.context.span_id:
                    add(child, depth + 1)

        for span in spans:
            if span.parent is None or span.parent.span_id not in known:
                add(span, 0)
        return lines

    def metrics_data(self) -> Any:
        """Everything that was measured, as the SDK has it."""
        return self._reader.get_metrics_data()

    def metrics(self) -> dict[str, Any]:
        """Every metric by its name, as the SDK has it."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: metric
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def count(self, name: str, /, **about: object) -> float:
        """The sum of a metric, or the count of a histogram, where attributes (by the last word of theirs) are these."""
        metric: Any = self.metrics().get(name)
        points: list[Any] = [] if metric is None else [*metric.data.data_points]
        total = 0.0
        for point in points:
            found = {key.rpartition(".")[2]: value for key, value in dict(point.attributes).items()}
            if about.items() <= found.items():
                total += point.count if hasattr(point, "count") else point.value
        return total


@pytest.fixture
def recorder() -> Generator[Recorder]:
    made = Recorder()
    yield made
    made.tracer_provider.shutdown()
    made.meter_provider.shutdown()


@pytest.fixture
def trusting() -> Recorder:
    """One that takes baggage."""
    return Recorder(takes_baggage=True)
