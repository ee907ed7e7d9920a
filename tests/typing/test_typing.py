"""The files beside this one are only type-checked; here a type checker reads them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.real_time

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = [path for path in sorted(HERE.glob("*.py")) if not path.name.startswith("test_")]


def mypy(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout")
@pytest.mark.timeout(300)  # the first run reads everything that is imported
def test_s7_what_must_type_check_does_and_what_must_not_does_not() -> None:
    ran = mypy(*FILES)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the checkout")
@pytest.mark.timeout(300)
def test_s7_every_ignore_hides_a_real_error(tmp_path: Path) -> None:
    refused = 0
    for path in FILES:
        text = path.read_text()
        refused += len(re.findall(r"# type: ignore\[", text))
        (tmp_path / path.name).write_text(re.sub(r"  # type: ignore\[.*", "", text))
    ran = mypy("--hide-error-context", "--no-pretty", *sorted(tmp_path.glob("*.py")))
    assert len(set(re.findall(r"^(.*?:\d+): error:", ran.stdout, re.MULTILINE))) == refused > 0
