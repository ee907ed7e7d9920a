"""Every example runs: the Python and shell blocks of the README and of ``docs/``, and the doctests of the package.

A block that is not to be run has a comment directly above it that says why: ``<!-- not run: needs a real host -->``.
Blocks of one document share their names, in order, so that a later one may go on from an earlier one. ``await`` may
stand at the top of a Python block.

The ``sh`` and ``console`` blocks of a document are one session of bash in an empty directory, with ``towline`` in its
path. Of a ``console`` block the lines after ``$`` are typed, and what they print must be what stands below them, where
``...`` stands for anything. Two more comments:

``<!-- needs: redis-server redis-cli -->``       run where these programs (of a Python block: modules) are installed
``<!-- newcomer: makes an environment -->``      run where `test_a_newcomer_gets_there` follows the page, and only there
"""

from __future__ import annotations

import ast
import codeop
import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping
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

NEWCOMERS_GUIDE = ROOT / "docs" / "guides" / "tunnel.md"

PYTHON = ("python", "py", "pycon")
SHELL = ("sh", "console")
DATA = ("", "text", "ini", "json", "toml", "yaml")

_FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*).*")
_MARK = re.compile(r"\s*<!-- (?P<kind>not run|needs|newcomer): (?P<text>\S.*) -->\s*")


class Block(NamedTuple):
    line: int
    code: str
    language: str = "python"
    mark: str = ""
    text: str = ""


def blocks(text: str, languages: tuple[str, ...] = PYTHON) -> Iterator[Block]:
    """The blocks of a document that are to be run, with the number of the line where each begins."""
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
        mark = _MARK.fullmatch(before)
        if fence["language"] in languages and not (mark and mark["kind"] == "not run"):
            indent = len(fence["indent"])
            code = "\n".join(line[indent:] for line in lines[start:end]) + "\n"
            yield Block(start, code, fence["language"], *((mark["kind"], mark["text"]) if mark else ()))
        position = end + 1


def _is_here(block: Block) -> bool:
    """Whether what a block needs is installed."""
    if block.mark == "newcomer":
        return False
    find = importlib.util.find_spec if block.language in PYTHON else shutil.which
    return block.mark != "needs" or all(find(name) for name in block.text.split())


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
            if not _is_here(block):
                continue
            with _bounded(20):
                run_block(block, str(document), names)


PASTED = [path for path in DOCUMENTS if re.search(r"\bin(to)?\s+`python( -m asyncio)?`(?! of)", path.read_text())]


@pytest.mark.parametrize("document", PASTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_block_can_be_pasted_where_its_document_says(document: Path) -> None:
    """Before Python 3.13 the prompt ends a function or a ``with`` at the first empty line."""
    for block in blocks(document.read_text()):
        compiler = codeop.CommandCompiler()
        compiler.compiler.flags |= ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        typed: list[str] = []
        for line in [*block.code.splitlines(), ""]:
            typed.append(line)
            if compiler("\n".join(typed), f"{document}, after line {block.line}") is not None:
                typed.clear()
        assert not any(line.strip() for line in typed)


@contextlib.contextmanager
def _bounded(seconds: float) -> Generator[None]:
    """An example that a reader would stop is not one. (pytest's own timeout ends what does not return at all.)"""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_of_another_kind_says_why_it_is_not_run(document: Path) -> None:
    lines = document.read_text().splitlines()
    is_open = False
    unknown: list[str] = []
    for number, line in enumerate(lines):
        fence = _FENCE.fullmatch(line)
        if fence is None:
            continue
        is_open = not is_open
        language = line.strip().removeprefix("```")
        if is_open and language not in (*PYTHON, *SHELL, *DATA) and not language.startswith("{"):
            before = next((each for each in reversed(lines[:number]) if each.strip()), "")
            mark = _MARK.fullmatch(before)
            if mark is None or mark["kind"] != "not run":
                unknown.append(f"line {number + 1}: {language}")
    assert unknown == []


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


# --- shell blocks -----------------------------------------------------------------------------------------------------


def shell_script(found: list[Block], printed: Path) -> tuple[str, list[str]]:
    """What to give to bash, and what each command of console blocks must print.

    Args:
        found: the blocks, in order.
        printed: the folder for what those commands print, each in a file of its own: what runs in the background prints
            whenever it likes.
    """
    lines: list[str] = []
    expected: list[str] = []
    for block in found:
        if block.language == "sh":
            lines.append(block.code)
            continue
        for command, output in _typed(block.code):
            file = shlex.quote(str(printed / str(len(expected))))
            lines.append(f"{{\n{command}\n}} > {file} 2>&1 || {{ cat {file}; exit 1; }}")
            expected.append(output)
    return "\n".join(lines), expected


def _typed(code: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what it prints."""
    parts = re.split(r"^\$ ", code, flags=re.MULTILINE)
    assert not parts[0], "a console block begins with `$ `"
    for part in parts[1:]:
        command, _, output = part.partition("\n")
        while command.endswith("\\"):
            more, _, output = output.partition("\n")
            command += f"\n{more}"
        yield command, output


def run_shell(found: list[Block], folder: Path, environment: Mapping[str, str], *, seconds: float) -> str:
    """Run the blocks as a reader would type them, end whatever they have started, and return what they printed."""
    printed = folder.with_name(f"{folder.name}-printed")
    printed.mkdir()
    script, expected = shell_script(found, printed)
    log = printed / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert code == 0, f"exit code {code}:\n{log.read_text()[-4000:]}"
    checker = doctest.OutputChecker()
    for number, want in enumerate(expected):
        got = (printed / str(number)).read_text()
        if not checker.check_output(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE):
            raise AssertionError(f"expected:\n{want}\ngot:\n{got}")
    return log.read_text()


SHELL_DOCUMENTS = [path for path in DOCUMENTS if any(_is_here(each) for each in blocks(path.read_text(), SHELL))]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
@pytest.mark.skipif(not SHELL_DOCUMENTS, reason="needs the checkout")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("document", SHELL_DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shell_block_of_a_document_runs(document: Path, tmp_path: Path) -> None:
    found = [each for each in blocks(document.read_text(), SHELL) if _is_here(each)]
    folder = tmp_path / "empty"
    folder.mkdir()
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    run_shell(found, folder, {**os.environ, "PATH": programs}, seconds=100)


def test_a_console_block_must_print_what_it_says(tmp_path: Path) -> None:
    def run(number: int, code: str, language: str = "console") -> None:
        folder = tmp_path / str(number)
        folder.mkdir()
        run_shell([Block(1, code, language)], folder, os.environ, seconds=20)

    run(1, "$ echo one \\\n  two\none two\n$ (sleep 60; echo late) & true\n$ date\n...\n")
    with pytest.raises(AssertionError, match="got:\none two"):
        run(2, "$ echo one two\nthree\n")
    with pytest.raises(AssertionError, match="got:\nmore"):
        run(3, "$ echo more\n")
    with pytest.raises(AssertionError, match="exit code 1"):
        run(4, "$ false\n$ true\n")
    with pytest.raises(AssertionError, match="exit code 1"):
        run(5, "true\nfalse\ntrue\n", "sh")


def test_shell_blocks_are_read_as_they_are_meant() -> None:
    text = """
<!-- needs: a-program-that-nobody-has -->
```sh
one
```

<!-- newcomer: installs -->
```sh
two
```

<!-- not run: it never ends -->
```sh
three
```

```console
$ echo four
four
```
"""
    found = list(blocks(text, SHELL))
    assert [(each.mark, each.language) for each in found] == [("needs", "sh"), ("newcomer", "sh"), ("", "console")]
    assert [_is_here(each) for each in found] == [False, False, True]


@pytest.mark.skipif("TOWLINE_NEWCOMER" not in os.environ, reason="installs from the network: set TOWLINE_NEWCOMER=1")
@pytest.mark.timeout(900)
def test_a_newcomer_gets_there(tmp_path: Path) -> None:
    """From a clone, on a machine that has never seen Towline, by nothing but what the page says."""
    home = tmp_path / "home"
    home.mkdir()
    clone = tmp_path / "towline"
    subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", str(ROOT), str(clone)], check=True)
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "http", "SSL", "NO_"))
    }
    own = str(Path(sys.prefix))  # what is installed here is not there
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if not each.startswith(own))
    found = [each for each in blocks(NEWCOMERS_GUIDE.read_text(), SHELL) if each.mark == "newcomer" or _is_here(each)]
    assert found[0].mark == "newcomer", "the page begins with what makes an environment"
    found.insert(1, Block(0, "echo installed after $SECONDS s\n", "sh"))
    found.append(Block(0, "echo there after $SECONDS s\n", "sh"))
    printed = run_shell(found, clone, {**kept, "HOME": str(home), "PATH": path}, seconds=800)
    print("newcomer:", ", ".join(re.findall(r"(?:installed|there) after \d+ s", printed)))


# --- docstrings -------------------------------------------------------------------------------------------------------


def module_names() -> list[str]:
    return ["towline", *(each.name for each in pkgutil.walk_packages(towline.__path__, "towline."))]


@pytest.mark.parametrize("name", module_names())
def test_the_examples_in_docstrings_run(name: str) -> None:
    module = importlib.import_module(name)
    report = io.StringIO()
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(example, out=report.write)
    assert report.getvalue() == ""
