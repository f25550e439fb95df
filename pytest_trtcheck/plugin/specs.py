"""The hooks that a user's plugin or conftest.py may have for this one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_trtcheck.report import Report


def pytest_trtcheck_reports() -> Sequence[Report]:  # type: ignore[empty-body]
    """Reports to write beside our own."""
