"""conftest.py - in the test process: an ordinary user leaves out what only root can try."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """They are in the report of root's own; each case costs a comparison of before and after."""
    if os.geteuid() == 0:
        return
    of_root = [item for item in items if "root" in _required(item)]
    config.hook.pytest_deselected(items=of_root)
    items[:] = [item for item in items if item not in of_root]


def _required(item: pytest.Item) -> set[str]:
    return {facility for mark in item.iter_markers("requires") for facility in mark.args}
