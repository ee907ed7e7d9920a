"""The public door: complete, sorted, and every name in it says what it is."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import FunctionType, ModuleType
from typing import Any

import pytest

import towline

DOORS = [
    "towline",
    "towline.layers",
    "towline.layers.encryption",
    "towline.layers.resume",
    "towline.layers.rpc",
    "towline.policies",
    "towline.testing",
    "towline.transports",
]
MODULES = [
    "towline.clock",
    "towline.endpoint",
    "towline.errors",
    "towline.events",
    "towline.hooks",
    "towline.link",
    "towline.stage",
    "towline.scope",
    "towline.server",
    "towline.service",
    "towline.stack",
    "towline.streams",
    "towline.text",
    "towline.timer",
    "towline.transport",
    "towline.waiter",
    "towline.layers.attempt_loop",
    "towline.layers.by_key",
    "towline.layers.balance",
    "towline.layers.breaker",
    "towline.layers.buffer",
    "towline.layers.all_calls",
    "towline.layers.choice",
    "towline.layers.deadline",
    "towline.layers.fallback",
    "towline.layers.filter",
    "towline.layers.framing",
    "towline.layers.heartbeat",
    "towline.layers.hedge",
    "towline.layers.limit",
    "towline.layers.lines",
    "towline.layers.map",
    "towline.layers.reconnect",
    "towline.layers.retry",
    "towline.layers.decorator",
    "towline.layers.shed",
    "towline.layers.steer",
    "towline.layers.timeout",
    "towline.policies.backoff",
    "towline.policies.breaker",
    "towline.policies.budget",
    "towline.policies.classify",
    "towline.policies.failover",
    "towline.policies.hedge",
    "towline.policies.jitter",
    "towline.policies.load",
    "towline.policies.rate",
    "towline.policies.retry",
    "towline.policies.standard",
]


def exported(name: str) -> list[tuple[str, Any]]:
    module = import_module(name)
    return [(each, getattr(module, each)) for each in module.__all__]


@pytest.mark.smoke
@pytest.mark.parametrize("name", DOORS)
def test_all_is_sorted_and_complete(name: str) -> None:
    module = import_module(name)
    names: list[str] = module.__all__
    assert len(set(names)) == len(names)
    assert sorted(names, key=_as_ruff_sorts) == names
    assert all(hasattr(module, each) for each in names)


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_what_the_top_level_imports_is_what_it_exports() -> None:
    public = {
        name
        for name, value in vars(towline).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and name != "annotations"
    }
    assert public == set(towline.__all__)


@pytest.mark.parametrize("door", ["towline.layers", "towline.policies", "towline.transports"])
def test_what_people_need_most_is_at_the_top_level(door: str) -> None:
    for name in towline.__all__:
        if name in import_module(door).__all__:
            assert getattr(towline, name) is getattr(import_module(door), name)


def test_every_error_that_can_be_raised_at_an_application_is_at_the_top_level() -> None:
    errors = set(import_module("towline.errors").__all__)
    assert errors - set(towline.__all__) <= {"NonceExhausted"}  # only ever the cause of a LinkLost


@pytest.mark.parametrize("name", [*DOORS, *MODULES])
def test_every_public_name_says_what_it_is(name: str) -> None:
    assert import_module(name).__doc__
    for each, value in exported(name):
        if inspect.isclass(value) or isinstance(value, FunctionType):
            doc = value.__doc__
            assert doc, f"{name}.{each} has no docstring"
            assert not doc.startswith(f"{each}("), f"{name}.{each} has the docstring that dataclasses make"


@pytest.mark.parametrize("name", DOORS)
def test_every_public_method_says_what_it_does(name: str) -> None:
    silent: list[str] = []
    for each, value in exported(name):
        if not inspect.isclass(value) or not value.__module__.startswith("towline"):
            continue
        for attribute, member in vars(value).items():
            if attribute.startswith("_"):
                continue
            inner = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(inner, FunctionType) and not inspect.getdoc(getattr(value, attribute)):
                silent.append(f"{each}.{attribute}")
    assert silent == []
