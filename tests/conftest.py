"""What all tests share: every async test runs on asyncio and on trio, in virtual time.

``anyio.sleep(3600)`` returns at once, and ``anyio.current_time()`` has moved by an hour. A module whose tests
use real sockets, threads or programs opts out, as a whole, with one line below its imports::

    pytestmark = pytest.mark.real_time

It then runs on the plain backends. (The backend is chosen once per module, since hypothesis refuses fixtures
that are made anew for each test; so the mark on a single test would do nothing, and is an error.)
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import TypeAlias

import pytest

from towline.testing import virtual_time_backend


@pytest.fixture(scope="module", params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, object]]:
    name = str(request.param)
    module: pytest.Module = request.node  # pyright: ignore[reportUnknownMemberType] -- untyped in pytest
    if module.get_closest_marker("real_time") is not None:
        return name, {}
    return virtual_time_backend(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        module = item.getparent(pytest.Module)
        if item.get_closest_marker("real_time") and module and not module.get_closest_marker("real_time"):
            raise pytest.UsageError(
                f"{item.nodeid}: real_time marks whole modules: put it in pytestmark, or move the test"
            )


# --- leaks ---

Found: TypeAlias = Callable[[list[bytes], bytes], list[bytes]]


@pytest.fixture(name="found", scope="session")
def find_leaks() -> Found:
    """Looks for secrets in what was said: raw, in hexadecimal, in base64, as Python shows them; a part is enough."""

    def forms(secret: bytes) -> list[bytes]:
        standard, url = base64.b64encode(secret), base64.urlsafe_b64encode(secret)
        hexadecimal, shown = secret.hex().encode(), repr(secret)[2:-1].encode()
        texts = [secret, hexadecimal, hexadecimal.upper(), standard, url, shown]
        return [part for text in texts for part in (text[:16], text[-18:-2])]

    def found(secrets: list[bytes], said: bytes) -> list[bytes]:
        return [form for secret in secrets for form in forms(secret) if form in said]

    return found
