"""A plugin for runs that pages show: what takes long on a busy machine is not said meanwhile."""

from __future__ import annotations


def pytest_configure() -> None:
    from pytest_trtcheck.plugin import progress

    progress.LOG_PACE_S = float("inf")
