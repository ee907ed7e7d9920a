"""Durations, sizes and endpoints as text: what is read, what is written, and what is refused with which words."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from towline import Endpoint
from towline.config import (
    Duration,
    EndpointText,
    Size,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from towline.config._text import MAX_DURATION, MAX_SIZE


class Settings(BaseModel):
    timeout: Duration = 5.0
    buffer: Size = 64 << 10
    endpoint: EndpointText = Endpoint.parse("tcp://localhost:7000")
    patience: Duration | None = None


# --- durations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0s", 0.0),
        ("250ms", 0.25),
        ("5s", 5.0),
        ("1m30s", 90.0),
        ("2h", 7200.0),
        ("1.5h", 5400.0),
        ("1d2h3m4s5ms6us", 93_784.005006),
        ("100us", 0.0001),
        ("0.1s", 0.1),
        (" 5s ", 5.0),
        ("36500d", float(MAX_DURATION)),
    ],
)
@pytest.mark.smoke
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("seconds", [0, 5, 0.25, 1e-9, MAX_DURATION])
def test_a_number_is_a_duration_in_seconds(seconds: float) -> None:
    assert parse_duration(seconds) == seconds


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "s",
        "-1s",
        "+1s",
        "1h30",
        "1s1h",
        "1s 1ms",
        "1e5s",
        "5 s",
        "5S",
        "5sec",
        "1,5s",
        ".5s",
        "5.s",
        "∞",
        "٣s",
    ],
)
def test_what_only_looks_like_a_duration_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"expected a duration such as '250ms', '5s', '1m30s' or '2h', got"):
        parse_duration(value)


@pytest.mark.parametrize("value", [True, None, [5], {"seconds": 5}, b"5s", timedelta(seconds=5)])
def test_what_is_neither_text_nor_a_number_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match=r"expected a duration .*, or a number of seconds, got"):
        parse_duration(value)


@pytest.mark.parametrize(
    "value", [-1, -0.001, MAX_DURATION + 1, math.inf, -math.inf, math.nan, "36501d", "9" * 30 + "d"]
)
def test_a_duration_is_from_nothing_to_a_hundred_years(value: object) -> None:
    with pytest.raises(ValueError, match="from 0 s to a hundred years"):
        parse_duration(value)


def test_a_number_as_text_is_refused_with_what_was_meant() -> None:
    with pytest.raises(ValueError, match=r"got '1\.5': is it '1\.5s'\?$"):
        parse_duration("1.5")


def test_text_without_end_is_refused_at_once_and_not_shown_whole() -> None:
    for text in ("9" * 100_000 + "s", "1." + "0" * 100_000 + "s", "x" * 100_000):
        for parse in (parse_duration, parse_size):
            with pytest.raises(ValueError, match=r"expected") as raised:
                parse(text)
            assert len(str(raised.value)) < 250


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (0.000_1, "100us"),
        (0.1, "100ms"),
        (1.5, "1.5s"),
        (5, "5s"),
        (90, "1m30s"),
        (7200, "2h"),
        (86_400, "1d"),
        (90_061, "1d1h1m1s"),
        (1 / 3, "0.3333333333333333s"),
    ],
)
def test_a_duration_is_written_in_the_units_that_people_use(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@given(
    st.one_of(st.floats(0, MAX_DURATION), st.integers(0, MAX_DURATION), st.integers(0, 10**9).map(lambda n: n / 1e6))
)
def test_a_duration_comes_back_as_exactly_what_it_was(seconds: float) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("64KiB", 65_536),
        ("64 KiB", 65_536),
        ("64kB", 64_000),
        ("16MiB", 16 << 20),
        ("1.5MiB", 3 << 19),
        ("1GB", 10**9),
        ("2GiB", 2 << 30),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
    ],
)
@pytest.mark.smoke
def test_a_size_is_read(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(size) == size


@pytest.mark.parametrize(
    "value", ["", "KiB", "-1", "+1", "1e3", "1,024", "64x", "10ZB", "64  KiBs", "٣KiB", "0x10", "1_000"]
)
def test_what_only_looks_like_a_size_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"expected a size such as '64KiB', '16MiB' or '1GB', .*, got"):
        parse_size(value)


@pytest.mark.parametrize("value", [True, None, 1.0, 1.5, [1], b"64KiB"])
def test_what_is_neither_text_nor_a_whole_number_is_no_size(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(value)


@pytest.mark.parametrize("value", [-1, MAX_SIZE + 1, "8388608TiB"])
def test_a_size_fits_64_bits(value: object) -> None:
    with pytest.raises(ValueError, match="from 0 to 8 EiB"):
        parse_size(value)
    assert parse_size(MAX_SIZE) == MAX_SIZE


@pytest.mark.parametrize("value", ["1.5B", "0.1KiB", "0.0001kB"])
def test_half_a_byte_is_no_size(value: str) -> None:
    with pytest.raises(ValueError, match=r"which is no whole number of bytes$"):
        parse_size(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("64k", "'64KiB' (of 1,024 bytes) or '64kB' (of 1,000)?"),
        ("64KB", "'64KiB' (of 1,024 bytes) or '64kB' (of 1,000)?"),
        ("64 kib", "'64KiB' (of 1,024 bytes) or '64kB' (of 1,000)?"),
        ("2m", "'2MiB' (of 1,048,576 bytes) or '2MB' (of 1,000,000)?"),
        ("1.5G", "'1.5GiB' (of 1,073,741,824 bytes) or '1.5GB' (of 1,000,000,000)?"),
    ],
)
def test_a_unit_that_could_mean_two_things_is_refused_with_both(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got '{text}': is it {hint}") + "$"):
        parse_size(text)


def test_a_size_is_written_in_the_largest_unit_that_goes() -> None:
    sizes = (0, 1, 1000, 1024, 65_536, 16 << 20, (1 << 20) + 1024, 1 << 40, 5 << 50)
    assert list(map(format_size, sizes)) == [
        "0B",
        "1B",
        "1000B",
        "1KiB",
        "64KiB",
        "16MiB",
        "1025KiB",
        "1TiB",
        "5120TiB",
    ]


@given(st.one_of(st.integers(0, MAX_SIZE), st.builds(int.__lshift__, st.integers(0, 1023), st.integers(0, 53))))
def test_a_size_comes_back_as_what_it_was(size: int) -> None:
    assert parse_size(format_size(size)) == size


# --- in a model ------------------------------------------------------------------------------------------------------


def test_a_model_reads_text_and_holds_what_layers_take() -> None:
    settings = Settings.model_validate(
        {"timeout": "250ms", "buffer": "1MiB", "endpoint": "unix:///run/a b.sock", "patience": "2h"}
    )
    assert (settings.timeout, settings.buffer, settings.patience) == (0.25, 1 << 20, 7200.0)
    assert settings.endpoint == Endpoint.parse("unix:///run/a b.sock")
    assert settings.model_dump()["timeout"] == 0.25  # in Python it stays what it is


@pytest.mark.smoke
def test_what_a_model_writes_it_reads_again() -> None:
    settings = Settings(timeout=90.0, buffer=3 << 20, endpoint=Endpoint.parse("tcp://[::1]:7000"), patience=0.5)
    dumped = json.loads(settings.model_dump_json())
    assert dumped == {"timeout": "1m30s", "buffer": "3MiB", "endpoint": "tcp://[::1]:7000", "patience": "500ms"}
    assert Settings.model_validate(dumped) == settings
    assert Settings.model_validate_json(Settings().model_dump_json()) == Settings()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("timeout", "5", "got '5': is it '5s'?"),
        ("buffer", "64k", "got '64k': is it '64KiB'"),
        ("endpoint", "tcp://localhost", "'tcp://localhost' has no port: write tcp://localhost:PORT"),
        ("endpoint", "{timeout}", "'{timeout}' is not an endpoint"),
        ("endpoint", 7000, "expected an endpoint such as tcp://host:port"),
    ],
)
def test_an_error_of_a_model_says_what_was_expected_and_where(field: str, value: object, text: str) -> None:
    with pytest.raises(ValidationError) as raised:
        Settings.model_validate({field: value})
    (problem,) = raised.value.errors()
    assert problem["loc"] == (field,)
    assert text in problem["msg"]
    assert problem["type"] == {"timeout": "duration", "buffer": "size", "endpoint": "endpoint"}[field]


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_schema_says_what_is_read_and_written(mode: Any) -> None:
    properties = Settings.model_json_schema(mode=mode)["properties"]
    for name in ("timeout", "buffer", "endpoint"):
        assert properties[name]["description"].endswith(".")
        for example in properties[name]["examples"]:
            pattern = properties[name].get("pattern") or properties[name]["anyOf"][0]["pattern"]
            assert re.search(pattern, example)
            written = json.loads(Settings.model_validate({name: example}).model_dump_json())[name]
            assert re.search(pattern, written)
