"""Tests of one GPU stay in one process: some of them time what they run."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put this folder's tests into one group where processes share the tests."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("gpu"))
