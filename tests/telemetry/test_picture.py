"""The picture of a trace in the docs is what its script draws."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "diagrams" / "trace.py"

if not SCRIPT.is_file():
    pytest.skip("needs the checkout", allow_module_level=True)


def test_the_picture_is_what_the_script_draws_every_time() -> None:
    script: dict[str, Any] = runpy.run_path(str(SCRIPT))
    drawn = {script["draw"](script["record"]()) for _ in range(3)}
    assert drawn == {SCRIPT.with_suffix(".svg").read_text()}


def test_the_picture_shows_a_call_two_reconnects_and_the_handler() -> None:
    root = ET.parse(SCRIPT.with_suffix(".svg")).getroot()
    texts = [str(each.text) for each in root.iter("{http://www.w3.org/2000/svg}text")]
    connections = [text for text in texts if text.startswith("towline.connection")]
    assert connections == [
        "towline.connection · #1 · established · LinkLost",
        "towline.connection · #2 · resumed · LinkLost",
        "towline.connection · #3 · resumed",
    ]
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == 2  # each linked to the one before
    start = texts.index("your client's own span")
    whole = start + 1
    assert texts[whole : whole + 4] == [
        "users.get · CLIENT",
        "users.get · CLIENT",
        "users.get · SERVER",
        "your handler's own span",
    ]
