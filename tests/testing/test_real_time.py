"""A module that is marked real_time runs on the plain backends."""

from __future__ import annotations

import asyncio
import time

import anyio
import pytest

from towline.testing import VirtualTimeLoop

pytestmark = pytest.mark.real_time


async def test_the_clock_is_the_real_one(anyio_backend: tuple[str, dict[str, object]]) -> None:
    assert anyio_backend[1] == {}
    real = time.perf_counter()
    await anyio.sleep(0.02)
    assert time.perf_counter() - real >= 0.015
    if anyio_backend[0] == "asyncio":
        assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
