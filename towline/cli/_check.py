"""``towline check``: what is wrong in a configuration, what it makes, and what would be better."""

from __future__ import annotations

import os
import sys

from towline.config import TunnelConfig, advise
from towline.config._sources import read_file

from ._failure import CLEAN, FAILED

__all__ = ["run_check"]


def run_check(file: str, table: str | None, *, strict: bool, environment: bool) -> int:
    """Check it, print, and return the exit code.

    Raises:
        ConfigError: if it is wrong.
    """
    document = read_file(file)
    if table is not None:
        document = document.table(table)
    if environment:
        document = document.with_environ(os.environ)
    config = TunnelConfig.from_document(document)
    stack = config.build()
    print(stack.describe())
    print(f"\nboth ends must have: {', '.join(stack.wire) or 'nothing'}")
    for name, endpoint in (
        ("endpoint", config.endpoint),
        ("listen.endpoint", config.listen and config.listen.endpoint),
        ("listen.to", config.listen and config.listen.to),
        ("forward.local", config.forward and config.forward.local),
    ):
        if endpoint is not None:
            print(f"{name}: {endpoint}")
    advice = advise(config)
    for each in advice:
        print(f"advice: {document.fault(each.place, each.text)}", file=sys.stderr)
    print(f"{file}: nothing is wrong{f'; see the advice ({len(advice)})' if advice else ''}")
    return FAILED if advice and strict else CLEAN
