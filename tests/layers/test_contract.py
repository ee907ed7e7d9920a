"""Every transparent layer keeps the contract of all of them, and none is forgotten here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from towline import Stack, layers
from towline.layers import (
    Balance,
    Buffer,
    CircuitBreaker,
    ConcurrencyLimit,
    Deadline,
    Either,
    Fallback,
    Filter,
    Hedge,
    LoadShed,
    Optional,
    RateLimit,
    Retry,
    Steer,
    Timeout,
    identity,
    map_error,
    map_request,
    map_response,
    optional_layer,
    then,
)
from towline.policies import NOT_CLONEABLE, BreakerPolicy, FixedWindow, Percentile, StandardPolicy
from towline.service import Service, TwoSided
from towline.testing import check_transparent_layer

Layer = Callable[[Service[Any, Any]], Service[Any, Any]]


def everything(request: object) -> bool:
    return True


async def everything_later(request: object) -> bool:
    return True


def unchanged(value: Any) -> Any:
    return value


def raised(error: Exception) -> Any:
    raise error


def not_cloneable(request: object) -> Any:
    return NOT_CLONEABLE


def everywhere(inner: Service[Any, Any]) -> Service[Any, Any]:
    return Either(everything, Retry(), Timeout(60))(inner)


LAYERS: dict[str, Layer] = {
    "Balance of one": lambda inner: Balance([inner]),
    "Buffer": Buffer(100),
    "CircuitBreaker": CircuitBreaker(),
    "CircuitBreaker, slow calls": CircuitBreaker(BreakerPolicy(slow_call=30.0)),
    "CircuitBreaker, count": CircuitBreaker(BreakerPolicy(count=20)),
    "ConcurrencyLimit": ConcurrencyLimit(100),
    "ConcurrencyLimit of one": ConcurrencyLimit(1),
    "Deadline": Deadline(),
    "Deadline of its own": Deadline(3600.0),
    "Either": everywhere,
    "Fallback": Fallback.value("fallback", on=ZeroDivisionError),
    "Filter": Filter(everything),
    "Filter, async": Filter(everything_later),
    "Hedge": Hedge(1000.0),
    "Hedge, on failures only": Hedge(float("inf")),
    "Hedge, percentile": Hedge(Percentile(0.95)),
    "LoadShed": LoadShed(),
    "Optional": Optional,
    "RateLimit": RateLimit(1000, per=1),
    "RateLimit, fixed window": RateLimit(FixedWindow(1000, per=1)),
    "RateLimit that is reached": RateLimit(1, per=0.01),
    "Retry": Retry(),
    "Retry, not cloneable": Retry(StandardPolicy(clone=not_cloneable)),
    "Stack": Stack(Timeout(60), ConcurrencyLimit(100), Retry(), CircuitBreaker(), Timeout(30)),
    "Steer": lambda inner: Steer([inner], lambda request, services: 0),
    "Timeout": Timeout(60),
    "identity": identity,
    "map_error": map_error(unchanged),
    "map_request": map_request(unchanged),
    "map_response": map_response(unchanged),
    "optional_layer": optional_layer(None),
    "then": then(unchanged, raised),
}

WITH_HINTS_OF_ITS_OWN = {"Balance of one", "Buffer", "LoadShed", "Optional", "RateLimit that is reached"}
"""What they say of themselves is in their own tests."""

NO_LAYERS = {
    "Peer",
    "Request",
    "Response",
    "Router",
    "Stream",
    "open_stream",
    "AllowList",
    "AttemptBlock",
    "ByKey",
    "Call",
    "CallAll",
    "Change",
    "ConnectionState",
    "GivenUp",
    "Insert",
    "KnownHosts",
    "Limiter",
    "Psk",
    "Reconnect",  # which is transparent neither to what connects nor to calls
    "Reconnecting",
    "Remove",
    "RequestLayer",
    "ResponseLayer",
    "Session",
    "Shared",
    "StaticKey",
    "StaticKeys",
    "attempts",
    "call_all",
    "given_up",
    "retryable",
    "speaks_of_target",
    "TlsClient",
    "TlsServer",
}


@pytest.mark.parametrize("name", LAYERS)
async def test_a_layer_keeps_the_contract_of_all_transparent_layers(name: str) -> None:
    await check_transparent_layer(
        lambda: LAYERS[name],
        forwards_ready_now=name not in WITH_HINTS_OF_ITS_OWN,
        forwards_load=name not in WITH_HINTS_OF_ITS_OWN,
    )


def test_no_layer_is_forgotten_here() -> None:
    public: set[str] = set()
    for name in layers.__all__:
        value = getattr(layers, name)
        if not (inspect.isclass(value) and issubclass(value, TwoSided)) and callable(value):
            public.add(name)
    held = {name.split(",")[0].split()[0] for name in LAYERS}
    assert public - NO_LAYERS == held - {"Stack"}
    assert public >= NO_LAYERS
