"""The test collected from a failure bundle: its replay."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.errors import CheckError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pytest_trtcheck.bundle import Bundle
    from pytest_trtcheck.check.request import Known


def collector(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The collector for a bundle that is named on the command line; None for one that a walk merely came by."""
    if not parent.session.isinitpath(file_path):
        return None
    from pytest_trtcheck import bundle

    if not bundle.is_bundle(file_path):
        return None
    file: BundleFile = BundleFile.from_parent(parent, path=file_path)
    return file


class BundleFile(pytest.File):
    """One bundle: one test."""

    def collect(self) -> Iterable[pytest.Item]:
        """The replay."""
        item: BundleItem = BundleItem.from_parent(self, name="replay")
        return [item]


class BundleItem(pytest.Item):
    """The check that failed, made again with what the bundle holds."""

    def runtest(self) -> None:
        """Check as the test did that failed, and say what came out otherwise than recorded."""
        from pytest_trtcheck import backends, bundle
        from pytest_trtcheck.check.request import Request
        from pytest_trtcheck.plugin.running import refuse, run
        from pytest_trtcheck.plugin.session import session_of

        session = session_of(self.config)
        try:
            loaded = bundle.read(self.path)
            if session.detection.gpu is not None and not backends.load(session.get("trt_backend")).is_emulation:
                bundle.check_plugins(loaded)
        except CheckError as error:
            refuse(self, error)
            raise
        spec = loaded.spec
        spec = replace(spec, reference=loaded.recorded_reference())
        if session.get("trt_backend") != backends.AUTO:
            spec = replace(spec, backend=None)

        def watch(known: Known) -> tuple[str, ...]:
            return _notes(loaded, known, session.circumstances(known.running.name))

        run(
            self,
            Request(
                nodeid=self.nodeid,
                model=loaded.model,
                folders=(),
                parity=spec,
                inputs=list(loaded.cases),
                inputs_source="given",
                options=loaded.options,
                lowered=loaded.lowered,
                watch=watch,
            ),
        )

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test stands."""
        return self.path, None, f"{self.path.parent.name}::{self.name}"


def _notes(loaded: Bundle, known: Known, environment: Mapping[str, object]) -> tuple[str, ...]:
    from pytest_trtcheck import bundle

    return (
        f"replay of {loaded.nodeid}",
        *bundle.compare_with_recorded(loaded, known),
        *bundle.changes(loaded.about["environment"], environment),
    )
