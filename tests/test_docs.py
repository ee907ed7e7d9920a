"""Every example runs: the Python blocks of the README and of ``docs/``, and the doctests of the package.

A block that is not to be run has a comment directly above it that says why: ``<!-- not run: needs a real host -->``.
Blocks of one document share their names, in order, so that a later one may go on from an earlier one. ``await`` may
stand at the top of a block.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import pytest

import towline

pytestmark = pytest.mark.real_time

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.is_file()
]

_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*).*")
_NOT_RUN = re.compile(r"\s*<!-- not run: \S.* -->\s*")


class Block(NamedTuple):
    line: int
    code: str


def blocks(text: str) -> Iterator[Block]:
    """The Python blocks of a document that are to be run, with the number of the line where each begins."""
    lines = text.splitlines()
    position = 0
    while position < len(lines):
        fence = _FENCE.fullmatch(lines[position])
        if fence is None:
            position += 1
            continue
        start = position + 1
        end = start
        while end < len(lines) and lines[end].strip() != "```":
            end += 1
        assert end < len(lines), f"line {start}: a block that does not end"
        before = next((line for line in reversed(lines[:position]) if line.strip()), "")
        if fence["language"] in ("python", "py", "pycon") and not _NOT_RUN.fullmatch(before):
            indent = len(fence["indent"])
            yield Block(start, "\n".join(line[indent:] for line in lines[start:end]) + "\n")
        position = end + 1


def run_block(block: Block, name: str, names: dict[str, Any]) -> None:
    if re.search(r"^\s*>>>", block.code, re.MULTILINE):
        example = doctest.DocTestParser().get_doctest(block.code, names, name, name, block.line)
        report = io.StringIO()
        failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=report.write, clear_globs=False)
        assert not failed, report.getvalue()
        names.update(example.globs)
        return
    code = compile(
        "\n" * block.line + block.code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
    )
    if inspect.CO_COROUTINE & code.co_flags:

        async def run() -> None:
            await eval(code, names)

        anyio.run(run)
    else:
        exec(code, names)


@pytest.mark.skipif(not DOCUMENTS, reason="needs the checkout")
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_python_block_of_a_document_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks(document.read_text()):
            with _bounded(20):
                run_block(block, str(document), names)


@contextlib.contextmanager
def _bounded(seconds: float) -> Generator[None]:
    """An example that a reader would stop is not one. (pytest's own timeout ends what does not return at all.)"""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


def test_a_document_is_read_as_it_is_meant() -> None:
    text = """
# A title

```python
x = 1
```

```sh
not python
```

<!-- not run: it needs a host -->
```python
raise AssertionError
```

* in a list:

  ```python
  x += 1
  ```

```pycon
>>> x
2
```

```python
import anyio
await anyio.sleep(0)
y = x
```
"""
    found = list(blocks(text))
    assert [block.line for block in found] == [4, 19, 23, 28]
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        run_block(block, "a document", names)
    assert names["y"] == 2


def module_names() -> list[str]:
    return ["towline", *(each.name for each in pkgutil.walk_packages(towline.__path__, "towline."))]


@pytest.mark.parametrize("name", module_names())
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    report = io.StringIO()
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=report.write)
    assert report.getvalue() == ""
