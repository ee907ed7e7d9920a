"""What the simulations share: trio's order of tasks, which it shuffles, is the same in every run."""

from __future__ import annotations

import pytest
import trio._core._run as trio_run


@pytest.fixture(autouse=True)
def same_order_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio_run._r.seed(0)
