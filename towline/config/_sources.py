"""Where a configuration is read from: a file, text, the environment; and where in it something stands."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from pydantic import ValidationError

from towline.errors import ConfigError, Fault

from ._kinds import without_keys
from ._shapes import is_list, is_table

__all__ = ["FORMATS", "PREFIX", "Document", "faults_of", "read_file", "read_text"]

Place: TypeAlias = tuple[str | int, ...]
"""Where something stands: the names of tables and options, and the numbers of entries of lists."""

PREFIX: Final = "TOWLINE"
"""What the names of variables begin with: ``TOWLINE__LAYERS__0__TTL`` is ``layers.0.ttl``."""

MAX_FILE: Final = 1 << 20
"""Bytes in a file. A longer one is no configuration, and a device has no end."""

MAX_LINES: Final = 2000
"""Lines of a file in which places are looked for: the search takes time as the square of them."""


@dataclass(frozen=True)
class Document:
    """What was read, before anything is made of it.

    Attributes:
        data: tables, lists and plain values.
        file: where it is from, for messages.
        folder: where relative paths in it start; None for where the program runs.
        line_of: the line on which a place stands.
        decided: places that something else decided, and what: a variable of the environment, or an option.
    """

    data: Mapping[str, Any]
    file: str | None = None
    folder: str | None = None
    line_of: Callable[[Place], int | None] = lambda place: None
    decided: Mapping[Place, str] = field(default_factory=dict[Place, str])

    def table(self, name: str) -> Document:
        """One table in it, for a file that holds other things too.

        Raises:
            ConfigError: if there is none.
        """
        data: Any = self.data
        path = tuple(name.split("."))
        for part in path:
            data = data.get(part) if is_table(data) else None
        if not is_table(data):
            raise ConfigError([Fault(f"there is no table [{name}]", file=self.file)])
        return Document(data, self.file, self.folder, lambda place: self.line_of((*path, *place)))

    def with_environ(self, environ: Mapping[str, str], prefix: str = PREFIX) -> Document:
        """The same with what the environment says instead.

        Raises:
            ConfigError: if a variable speaks of an entry of a list that is not there.
        """
        found: list[tuple[Place, Any, str]] = []
        for name in sorted(environ):
            if name.startswith(f"{prefix}__"):
                place = tuple(_part(part) for part in name.removeprefix(f"{prefix}__").split("__"))
                found.append((place, _from_variable(environ[name]), f"{name} in the environment"))
        return self.with_values(found)

    def with_values(self, values: Iterable[tuple[Place, Any, str]]) -> Document:
        """The same with other values at some places; with each, who says so.

        Raises:
            ConfigError: if such a place cannot be.
        """
        data, decided = _copied(self.data), dict(self.decided)
        faults: list[Fault] = []
        for place, value, who in values:
            try:
                _put(data, place, value)
            except ValueError as error:
                faults.append(Fault(str(error), file=who))
            decided[place] = who
        if faults:
            raise ConfigError(faults)
        return replace(self, data=data, decided=decided)

    def fault(self, place: Place, problem: str) -> Fault:
        """What is wrong at a place, with all that is known of where that is."""
        path = without_keys(".".join(map(str, place)))
        for decided, who in self.decided.items():
            if place[: len(decided)] == decided:
                rest = ".".join(map(str, place[len(decided) :]))
                return Fault(problem, without_keys(rest), file=who)
        while True:
            line = self.line_of(place)
            if line is not None or not place:
                return Fault(problem, path, file=self.file, line=line)
            place = place[:-1]  # what is missing is missing from something


def faults_of(error: ValidationError, document: Document) -> list[Fault]:
    """The faults that pydantic found, in the order of the file."""
    found = [
        document.fault(each["loc"], each["msg"])
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    return sorted(found, key=lambda fault: fault.line or 0)


# --- formats --------------------------------------------------------------------------------------------------------


def _toml(text: str) -> tuple[Any, Callable[[Place], int | None]]:
    return tomllib.loads(text), lambda place: _line_in_toml(text, place)


def _json(text: str) -> tuple[Any, Callable[[Place], int | None]]:
    return json.loads(text), lambda place: None


def _yaml(text: str) -> tuple[Any, Callable[[Place], int | None]]:
    try:
        import yaml
    except ImportError:
        raise ConfigError([Fault("to read YAML, install towline[yaml]")]) from None
    try:
        return yaml.safe_load(text), lambda place: None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = None if mark is None else mark.line + 1
        # Its text quotes the file, which may hold a key.
        raise _Unreadable(getattr(error, "problem", None) or "it is no YAML", line) from None


class _Unreadable(ValueError):
    def __init__(self, problem: str, line: int | None) -> None:
        super().__init__(problem)
        self.line = line


_Reader: TypeAlias = Callable[[str], tuple[Any, Callable[[Place], int | None]]]

FORMATS: Final[Mapping[str, _Reader]] = {"toml": _toml, "json": _json, "yaml": _yaml, "yml": _yaml}
"""By the ending of a file's name."""


def read_text(text: str, format: str, *, file: str | None = None, folder: str | None = None) -> Document:
    """Read a text of a format.

    Raises:
        ConfigError: if it is not in that format, or no table.
    """
    try:
        data, line_of = FORMATS[format](text)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError([_unreadable(error, text, format, file)]) from None
    if not is_table(data):
        raise ConfigError([Fault("expected a table", file=file)])
    return Document(data, file, folder, line_of)


def _unreadable(error: Exception, text: str, format: str, file: str | None) -> Fault:
    if isinstance(error, json.JSONDecodeError):
        return Fault(f"it is no JSON: {error.msg}", file=file, line=error.lineno)
    if isinstance(error, _Unreadable):
        return Fault(f"it is no YAML: {error}", file=file, line=error.line)
    if isinstance(error, tomllib.TOMLDecodeError):
        problem, _, place = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", place)
        return Fault(f"it is no TOML: {problem}", file=file, line=int(line[1]) if line else text.count("\n") + 1)
    return Fault(f"it is no {format.upper()}: {type(error).__name__}", file=file)


def read_file(path: str | os.PathLike[str]) -> Document:
    """Read a file of the format that its name ends in.

    Raises:
        ConfigError: if it cannot be read, or is not in that format.
    """
    file = os.fspath(path)
    format = file.rpartition(".")[2].lower()
    if format not in FORMATS:
        endings = ", ".join(f".{each}" for each in FORMATS)
        raise ConfigError([Fault(f"expected a name that ends in {endings}", file=file)])
    try:
        with Path(path).expanduser().open("rb") as opened:
            raw = opened.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError([Fault(f"cannot be read: {error.strerror}", file=file)]) from None
    if len(raw) > MAX_FILE:
        raise ConfigError([Fault(f"longer than {MAX_FILE:,} bytes; that is no configuration", file=file)])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault("is not a text in UTF-8", file=file, line=line)]) from None
    return read_text(text, format, file=file, folder=str(Path(path).expanduser().absolute().parent))


def _line_in_toml(text: str, place: Place) -> int | None:
    """The line on which something first is there.

    `tomllib` tells no lines, but it can be asked: the file is read up to each of its lines, until the place is in what
    was read. What cannot be read is the beginning of something that goes on.
    """
    lines = text.split("\n")
    begin = 0
    for end in range(1, min(len(lines), MAX_LINES) + 1):
        try:
            data: Any = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:
            continue
        if place and _has(data, place):
            return begin + 1
        begin = end
    return None


def _has(data: Any, place: Place) -> bool:
    for part in place:
        if is_table(data) and part in data:
            data = data[str(part)]
        elif is_list(data) and isinstance(part, int) and part < len(data):
            data = data[part]
        else:
            return False
    return True


# --- the environment ------------------------------------------------------------------------------------------------


def _part(text: str) -> str | int:
    return int(text) if text.isdecimal() and len(text) < 6 else text.lower()


def _from_variable(text: str) -> Any:
    """Text as it is, but for lists and tables, which are written as in TOML."""
    if text[:1] in ("[", "{"):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            pass  # it is no list then, and is refused as the text that it is
    return text


def _put(data: Any, place: Sequence[str | int], value: Any) -> None:
    for part, following in pairwise(place):
        data = _entered(data, part, [] if isinstance(following, int) else {})
    last = place[-1]
    _entered(data, last, None)
    data[last] = value


def _entered(data: Any, part: str | int, empty: Any) -> Any:
    """What is at a part of a place, made if there is nothing yet."""
    if isinstance(data, list):
        entries = cast("list[Any]", data)  # type: ignore[redundant-cast]  # pyright needs to be told
        if not isinstance(part, int):
            raise ValueError(f"there is a list, and {part!r} is no number of an entry")
        if part > len(entries):
            raise ValueError(f"there are only {len(entries)} entries, and {part} is counted from 0")
        if part == len(entries):
            entries.append(empty)
        if isinstance(entries[part], str) and empty == {}:
            entries[part] = {"kind": entries[part]}  # a kind alone, which now gets an option
        return entries[part]
    if not isinstance(data, dict):
        raise ValueError(f"there is no table that {part!r} could be in")
    table = cast("dict[str | int, Any]", data)
    if isinstance(table.get(part), str) and empty == {}:
        table[part] = {"kind": table[part]}
    if table.get(part) is None:
        table[part] = empty
    return table[part]


def _copied(data: Any) -> Any:
    if is_table(data):
        return {name: _copied(each) for name, each in data.items()}
    return [_copied(each) for each in data] if is_list(data) else data
