"""Unit tests run beside those of several processes, which one pytest worker has to itself."""

from __future__ import annotations

from pathlib import Path

import pytest

UNIT = Path(__file__).parent / "unit"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(UNIT):
            item.add_marker(pytest.mark.xdist_group("ranks"))
