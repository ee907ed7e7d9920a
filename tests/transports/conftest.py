"""Transports use real sockets and pipes, so these tests run in real time; and on uvloop too, where it is installed."""

from __future__ import annotations

import importlib.util

import pytest

BACKENDS: dict[str, tuple[str, dict[str, object]]] = {"asyncio": ("asyncio", {}), "trio": ("trio", {})}
if importlib.util.find_spec("uvloop") is not None:
    BACKENDS["uvloop"] = ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="module", params=list(BACKENDS))
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    return BACKENDS[str(request.param)]
