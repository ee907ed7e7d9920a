"""The diagrams of the documentation are what the tables in the code say now."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "diagrams"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")


def test_drawing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FOLDER / "draw.py"), str(tmp_path)], check=True, timeout=50)
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in FOLDER.glob("*.svg")}
    del kept["trace.svg"]  # of what happened, not of a table: tests/telemetry/test_picture.py
    assert drawn, "nothing was drawn"
    assert drawn.keys() == kept.keys()
    for name, content in drawn.items():
        assert content == kept[name], f"{name} is not what the code says: python docs/diagrams/draw.py"


def test_a_diagram_says_in_words_what_it_shows() -> None:
    for path in FOLDER.glob("*.svg"):
        root = ElementTree.parse(path).getroot()
        texts = [element.text for element in root if element.tag.endswith(("title", "desc"))]
        assert len(texts) == 2, path.name
        assert all(texts), path.name
