"""Everything public is on one page of the API reference, and nothing else is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

PAGES = Path(__file__).parents[1] / "docs" / "api"
if not PAGES.is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)

DOORS = [
    "towline",
    "towline.config",
    "towline.errors",
    "towline.hooks",
    "towline.layers",
    "towline.layers.encryption",
    "towline.layers.resume",
    "towline.layers.rpc",
    "towline.link",
    "towline.policies",
    "towline.service",
    "towline.stage",
    "towline.streams",
    "towline.telemetry",
    "towline.testing",
    "towline.transport",
    "towline.transports",
    "towline.tunnel",
]
"""Where people import from."""

_DIRECTIVE = re.compile(
    r"^\.\. (?:py:)?(?P<kind>\w+):: (?P<name>[\w.]+)\n(?P<options>(?: +:.*\n)*)", flags=re.MULTILINE
)


def on_page(path: Path) -> Iterator[tuple[str, str]]:
    """What a page documents, as pairs of a module and a name in it."""
    module = ""
    for directive in _DIRECTIVE.finditer(path.read_text()):
        name = directive["name"]
        if directive["kind"] == "currentmodule":
            module = name
        elif directive["kind"] == "automodule":
            left_out = re.search(r":exclude-members: (.*)", directive["options"])
            names = set(import_module(name).__all__) - set(re.split(r",\s*", left_out[1]) if left_out else ())
            yield from ((name, each) for each in sorted(names))
        else:
            yield module, name


DOCUMENTED = [pair for path in sorted(PAGES.glob("*.rst")) for pair in on_page(path)]


def key(name: str, value: Any) -> tuple[str, int]:
    """The same thing may be had from several doors; a name alone may be two things (an event and a layer's, say)."""
    return name, id(value)


def test_what_is_on_a_page_is_there() -> None:
    for module, name in DOCUMENTED:
        assert hasattr(import_module(module), name), f"{module} has no {name}"


@pytest.mark.parametrize("door", DOORS)
def test_everything_public_is_on_a_page(door: str) -> None:
    module = import_module(door)
    found = {key(name, getattr(import_module(at), name)) for at, name in DOCUMENTED}
    missing = [name for name in module.__all__ if key(name, getattr(module, name)) not in found]
    assert missing == [], f"put these on a page in docs/api/: {missing}"


def test_nothing_is_on_two_pages() -> None:
    counted = Counter(key(name, getattr(import_module(at), name)) for at, name in DOCUMENTED)
    assert [name for (name, _), count in counted.items() if count > 1] == []
