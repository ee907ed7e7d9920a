"""Where a configuration is read from: a file, text, the environment; and where in it something stands."""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Final, TypeAlias, cast

from pydantic import ValidationError

from towline.errors import ConfigError, Fault
from towline.layers.encryption._files import expand
from towline.text import without_keys

from ._shapes import is_list, is_table

__all__ = ["FORMATS", "PREFIX", "Document", "faults_of", "read_file", "read_text"]

Place: TypeAlias = tuple[str | int, ...]
"""Where something stands: the names of tables and options, and the numbers of entries of lists."""

PREFIX: Final = "TOWLINE"
"""What the names of variables begin with: ``TOWLINE__LAYERS__0__TTL`` is ``layers.0.ttl``."""

MAX_FILE: Final = 1 << 20
"""Bytes in a file. A longer one is no configuration, and a device has no end."""

MAX_SEARCHED: Final = 8 << 20
"""Bytes that are read again, in all, to find on which lines of a file its faults are: about a second's worth."""

SOURCES: Final = ("file", "env")
"""Where a key may be, as a table with one of these."""


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
        for name in environ:
            if name.startswith(f"{prefix}__"):
                place = tuple(_part(part) for part in name.removeprefix(f"{prefix}__").split("__"))
                found.append((place, _from_variable(environ[name]), f"{without_keys(name)} in the environment"))
        # By number, so that the eleventh entry of a list comes after the tenth; and tables before what is in them.
        return self.with_values(sorted(found, key=lambda each: [(isinstance(part, str), part) for part in each[0]]))

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
                faults.append(Fault(without_keys(str(error)), file=who))
            decided[place] = who
        if faults:
            raise ConfigError(faults)
        return replace(self, data=data, decided=decided)

    def fault(self, place: Place, problem: str) -> Fault:
        """What is wrong at a place, with all that is known of where that is."""
        path = without_keys(".".join(map(str, place)))
        for decided, who in self.decided.items():
            if place[: len(decided)] == decided or decided[:-1] == place:
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
    return tomllib.loads(text), _TomlLines(text)


def _json(text: str) -> tuple[Any, Callable[[Place], int | None]]:
    return json.loads(text), lambda place: None


def _yaml(text: str) -> tuple[Any, Callable[[Place], int | None]]:
    try:
        import yaml
    except ImportError:
        raise ConfigError([Fault("to read YAML, install towline[yaml]")]) from None

    class Loader(yaml.SafeLoader):
        """Of YAML 1.2: ``on`` and ``yes`` are text, and so is what looks like a date."""

    guessed = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
    Loader.yaml_implicit_resolvers = {
        first: [each for each in resolvers if each[0] not in guessed]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    untyped: Any = Loader
    flags = re.compile("(?:true|True|TRUE|false|False|FALSE)$")
    untyped.add_implicit_resolver("tag:yaml.org,2002:bool", flags, list("tTfF"))
    unreadable: _Unreadable
    try:
        for event in yaml.parse(text, Loader):
            if isinstance(event, yaml.AliasEvent):  # a few of them can stand for more than fits a memory
                raise _Unreadable("an alias (*) is not understood here", None)
        return yaml.load(text, Loader), lambda place: None
    except _Unreadable as error:
        unreadable = error
    except Exception as error:  # of any kind: a value that is not what its tag says
        mark = getattr(error, "problem_mark", None)
        # Its own text may quote the file, which may hold a key.
        problem = getattr(error, "problem", None) if isinstance(error, yaml.MarkedYAMLError) else None
        unreadable = _Unreadable(problem or "a value is not what its tag says", None if mark is None else mark.line + 1)
    raise unreadable  # outside, so that it does not bring along what was quoted


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
    text = text.replace("\r\n", "\n")
    try:
        data, line_of = FORMATS[format](text)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        fault = _unreadable(error, text, format, file)
    else:
        if is_table(data):
            return Document(data, file, folder, line_of)
        fault = Fault("expected a table", file=file)
    raise ConfigError([replace(fault, problem=without_keys(fault.problem))])


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
        where = expand(path)
        # Whoever has a pipe of that name may never write to it.
        with open(
            os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb"
        ) as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise ConfigError([Fault("is not a file that holds something", file=file)])
            raw = opened.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ConfigError([Fault(f"cannot be read: {why}", file=file)]) from None
    if len(raw) > MAX_FILE:
        raise ConfigError([Fault(f"longer than {MAX_FILE:,} bytes; that is no configuration", file=file)])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([Fault("is not a text in UTF-8", file=file, line=line)]) from None
    return read_text(text, format, file=file, folder=str(where.absolute().parent))


class _TomlLines:
    """The line on which something first is there.

    `tomllib` tells no lines, but it can be asked what is in the first so many. What cannot be read is the beginning of
    something that goes on, so then a few lines fewer are asked for.
    """

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._read: dict[int, Any] = {0: {}}  # by how many lines; None where they end within something
        self._left = MAX_SEARCHED

    def __call__(self, place: Place) -> int | None:
        if not place:
            return None
        absent, there = 0, self._whole_up_to(len(self._lines))
        if there is None or not _has(self._read[there], place):
            return None
        while there - absent > 1:
            middle = self._whole_up_to((absent + there) // 2)
            if middle is None:
                return None
            if _has(self._read[middle], place):
                there = middle
            else:
                absent = (absent + there) // 2
        begin = self._whole_up_to(there - 1)
        return None if begin is None else begin + 1

    def _whole_up_to(self, count: int) -> int | None:
        """The most lines, so many at most, that can be read; None if too much was read already."""
        while self._at(count) is None:
            count -= 1
            if self._left <= 0:
                return None
        return count

    def _at(self, count: int) -> Any:
        if count not in self._read:
            text = "\n".join(self._lines[:count])
            self._left -= len(text)
            try:
                self._read[count] = tomllib.loads(text)
            except (tomllib.TOMLDecodeError, RecursionError):
                self._read[count] = None
        return self._read[count]


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
            [value] = tomllib.loads(f"value = {text}").values()
            return value
        except ValueError:
            pass  # it is no list then, and is refused as the text that it is
    return text


def _put(data: Any, place: Sequence[str | int], value: Any) -> None:
    for part, following in pairwise(place):
        data = _entered(data, part, [] if isinstance(following, int) else {})
    last = place[-1]
    if last in SOURCES and isinstance(data, dict) and {*data} <= {*SOURCES, "kind"}:
        data.clear()  # a key is in one place, so the other one goes
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
