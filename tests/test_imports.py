"""Imports point one way, and what decides does no I/O."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest

import towline

PACKAGE = Path(towline.__file__).parent

CONTRACTS = {
    "towline.chance",
    "towline.clock",
    "towline.endpoint",
    "towline.errors",
    "towline.events",
    "towline.hooks",
    "towline.link",
    "towline.loop",
    "towline.stage",
    "towline.scope",
    "towline.service",
    "towline.streams",
    "towline.text",
    "towline.timer",
    "towline.transport",
    "towline.units",
    "towline.waiter",
}
"""What everything may build on; it builds on nothing of ours but itself."""

ASSEMBLY = {"towline", "towline._host", "towline.server", "towline.stack"}

IMPURE = {
    "anyio",
    "asyncio",
    "logging",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "socket",
    "ssl",
    "subprocess",
    "threading",
    "time",
    "trio",
}


@dataclass(frozen=True)
class Import:
    target: str
    typing_only: bool
    in_function: bool


def modules() -> dict[str, Path]:
    """Every module by its name under ``towline``; the links lead to the folders beside it."""
    found: dict[str, Path] = {}
    for path in sorted(PACKAGE.rglob("*.py")) + [
        path for folder in ("layers", "policies", "transports") for path in sorted((PACKAGE / folder).rglob("*.py"))
    ]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(("towline", *(part for part in parts if part != "__init__")))
        found[name] = path
    return found


MODULES = modules()


def imports_of(name: str) -> set[Import]:
    """What a module imports: as modules of ours where a name is one, else as it says."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[Import] = set()

    def visit(node: ast.AST, typing_only: bool, in_function: bool) -> None:
        match node:
            case ast.Import():
                for alias in node.names:
                    found.add(Import(alias.name, typing_only, in_function))
            case ast.ImportFrom():
                base = node.module or ""
                if node.level:
                    parent = package.split(".")
                    parent = parent[: len(parent) - node.level + 1]
                    base = ".".join([*parent, base] if base else parent)
                for alias in node.names:
                    member = f"{base}.{alias.name}"
                    found.add(Import(member if member in MODULES else base, typing_only, in_function))
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for statement in node.body:
                    visit(statement, True, in_function)
                for statement in node.orelse:
                    visit(statement, typing_only, in_function)
                return
            case _:
                pass
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, typing_only, inside)

    visit(ast.parse(path.read_text()), False, False)
    return found


def ours(name: str, *, at_run_time: bool = True) -> set[str]:
    return {
        each.target
        for each in imports_of(name)
        if (each.target == "towline" or each.target.startswith("towline.")) and not (at_run_time and each.typing_only)
    }


def within(target: str, *packages: str) -> bool:
    return any(target == package or target.startswith(package + ".") for package in packages)


def in_package(package: str) -> list[str]:
    return [name for name in MODULES if within(name, package)]


def test_the_modules_are_found() -> None:
    assert {"towline.link", "towline.layers.resume._core", "towline.policies.backoff", "towline.transports.tcp"} <= set(
        MODULES
    )


@pytest.mark.parametrize("name", in_package("towline.policies"))
def test_policies_import_plain_contracts_and_errors_only(name: str) -> None:
    plain = tuple(f"towline.{name}" for name in ("clock", "endpoint", "errors", "hooks", "service", "text", "units"))
    for target in ours(name):
        assert within(target, "towline.policies", *plain), target


@pytest.mark.parametrize("name", in_package("towline.layers"))
def test_layers_import_policies_and_contracts_only(name: str) -> None:
    for target in ours(name):
        assert within(target, "towline.layers", "towline.policies", *CONTRACTS), target


@pytest.mark.parametrize("name", in_package("towline.transports"))
def test_transports_import_contracts_only(name: str) -> None:
    for target in ours(name):
        assert within(target, "towline.transports", *CONTRACTS), target


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_contracts_import_each_other_only(name: str) -> None:
    for target in ours(name):
        assert target in CONTRACTS, target


@pytest.mark.parametrize("name", sorted(ASSEMBLY))
def test_the_assembly_imports_no_program(name: str) -> None:
    for target in ours(name):
        assert not within(target, "towline.cli", "towline.tunnel", "towline.testing"), target


@pytest.mark.parametrize("name", [name for name in MODULES if not within(name, "towline.cli", "towline.__main__")])
def test_nothing_but_the_program_imports_the_program(name: str) -> None:
    for target in ours(name, at_run_time=False):
        assert not within(target, "towline.cli"), target
        assert name == "towline.tunnel" or not within(target, "towline.tunnel"), target


PURE = [
    name
    for name in MODULES
    if name.rpartition(".")[2] in ("_core", "_state", "_wire", "_replay") or within(name, "towline.policies")
]


@pytest.mark.parametrize("name", PURE)
def test_cores_and_policies_do_no_io_and_read_no_clock(name: str) -> None:
    for each in imports_of(name):
        assert each.typing_only or each.target.split(".")[0] not in IMPURE, each.target


def test_only_telemetry_knows_opentelemetry() -> None:
    users = {name for name in MODULES for each in imports_of(name) if each.target.startswith("opentelemetry")}
    assert users
    own = "towline.cli._metrics"  # a program's own provider
    assert all(within(name, "towline.telemetry", own) for name in users)


@pytest.mark.parametrize(
    "name", [name for name in MODULES if not within(name, "towline.telemetry", "towline.cli._metrics")]
)
def test_nothing_needs_telemetry(name: str) -> None:
    for target in ours(name, at_run_time=False):
        assert not within(target, "towline.telemetry"), target


@pytest.mark.parametrize(
    "name", [name for name in MODULES if name.split(".")[1:2] in (["layers"], ["policies"], ["transports"])]
)
def test_across_folders_imports_are_absolute(name: str) -> None:
    # A type checker that resolves links takes each of these folders for a root.
    depth = len(name.split(".")) - (1 if MODULES[name].name != "__init__.py" else 0) - 1
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= depth, ast.unparse(node)


def test_importing_the_package_starts_nothing_and_needs_no_backend() -> None:
    for name in ("towline", *sorted(CONTRACTS)):
        for each in imports_of(name):
            assert each.in_function or each.typing_only or each.target.split(".")[0] not in ("trio", "uvloop"), name
