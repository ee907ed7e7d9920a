"""Whatever the comparison claims of Towline, a test shows; and the test is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "comparison.md"


def rows() -> list[list[str]]:
    lines = DOCUMENT.read_text().splitlines() if DOCUMENT.is_file() else []
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return [cells for cells in table if cells[0] and not set(cells[0]) <= {"-"}]


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="needs the checkout")
def test_every_row_has_a_cell_for_each_library_and_a_test() -> None:
    assert len(rows()) > 30
    assert {len(cells) for cells in rows()} == {8}


@pytest.mark.parametrize("cells", rows(), ids=lambda cells: cells[0])
def test_the_test_that_shows_a_row_is_there(cells: list[str]) -> None:
    found = re.fullmatch(r"`(?P<path>tests/[\w/]+\.py)(::(?P<name>test_\w+))?`", cells[-1])
    assert found, cells[-1]
    text = (ROOT / found["path"]).read_text()
    assert found["name"] is None or re.search(rf"def {found['name']}\(", text), cells[-1]
