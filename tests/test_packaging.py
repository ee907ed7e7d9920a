"""The folder tree and the import package agree, and the wheel has everything."""

from __future__ import annotations

import ast
import itertools
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MAPPED = ("layers", "policies", "transports")

if not (ROOT / "towline" / "__init__.py").is_file():
    pytest.skip("needs the checkout", allow_module_level=True)


def config() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def setuptools() -> dict[str, Any]:
    section: dict[str, Any] = config()["tool"]["setuptools"]
    return section


def declared_packages() -> set[str]:
    return set(setuptools()["packages"])


def packages_on_disk() -> set[str]:
    found: set[str] = set()
    for folder in ("towline", *MAPPED):
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if parts[0] != "towline":
                found.add(".".join(("towline", *parts)))
            elif len(parts) == 1 or parts[1] not in MAPPED:  # not through a link
                found.add(".".join(parts))
    return found


def folder_of(package: str) -> Path:
    """Where setuptools finds a package, by its own rule: the longest prefix in package-dir, then the name."""
    mapped = setuptools()["package-dir"]
    parts = package.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in mapped:
            return ROOT.joinpath(mapped[prefix], *parts[length:])
    return ROOT.joinpath(*parts)


def wheel_content() -> set[str]:
    """The files that the wheel must have, by their names in it."""
    files = {
        "/".join([*package.split("."), module.name])
        for package in declared_packages()
        for module in folder_of(package).glob("*.py")
    }
    data = setuptools()["package-data"]
    return files | {"/".join([*package.split("."), name]) for package, names in data.items() for name in names}


def test_every_folder_with_code_is_in_the_wheel() -> None:
    assert declared_packages() == packages_on_disk()


def test_every_folder_imports_under_the_package_name() -> None:
    for name in declared_packages():
        assert import_module(name).__name__ == name


def test_no_mapped_folder_is_imported_under_its_bare_name() -> None:
    assert not {*MAPPED} & sys.modules.keys()


def test_every_module_on_disk_is_in_the_wheel() -> None:
    modules = {
        "/".join((() if path.relative_to(ROOT).parts[0] == "towline" else ("towline",)) + path.relative_to(ROOT).parts)
        for folder in ("towline", *MAPPED)
        for path in (ROOT / folder).rglob("*.py")
        if not (folder == "towline" and path.relative_to(ROOT).parts[1] in MAPPED)
    }
    assert modules == {name for name in wheel_content() if name.endswith(".py")}


def test_types_are_for_others_too() -> None:
    assert "towline/py.typed" in wheel_content()
    assert (ROOT / "towline" / "py.typed").is_file()


def test_every_other_file_in_a_package_is_declared() -> None:
    # What is no module is in the wheel only if pyproject.toml says so, and its absence shows only there.
    for package in declared_packages():
        for path in folder_of(package).iterdir():
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert "/".join([*package.split("."), path.name]) in wheel_content(), path


def test_a_wheel_that_was_built_has_what_it_must_have() -> None:
    wheels = sorted((ROOT / "dist").glob("towline-*.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels or wheels[-1].stat().st_mtime < max(folder_of(p).stat().st_mtime for p in declared_packages()):
        pytest.skip("no wheel of this state in dist/: python -m build")
    names = {name for name in zipfile.ZipFile(wheels[-1]).namelist() if ".dist-info/" not in name}
    assert names == wheel_content()


def test_the_links_for_type_checkers_point_at_the_folders() -> None:
    for folder in MAPPED:
        link = ROOT / "towline" / folder
        if link.is_symlink():  # a checkout without links works as well, but for type checkers
            assert link.resolve() == ROOT / folder


def test_what_is_imported_is_a_declared_dependency() -> None:
    declared = {
        name.split(";")[0].split(">")[0].split("=")[0].split("<")[0].strip().lower().replace("_", "-")
        for name in [
            *config()["project"]["dependencies"],
            *itertools.chain.from_iterable(config()["project"]["optional-dependencies"].values()),
        ]
    }
    imported: set[str] = set()
    for package in declared_packages():
        for module in folder_of(package).glob("*.py"):
            imported |= top_level_imports(module)
    foreign = {name for name in imported if name not in {*sys.stdlib_module_names, "towline", "_typeshed"}}
    others = {"opentelemetry", "pydantic-core", "sniffio", "yaml"}  # imported by another name than they are installed
    assert {name.replace("_", "-") for name in foreign} <= declared | others
    assert "opentelemetry-api" in declared


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names
