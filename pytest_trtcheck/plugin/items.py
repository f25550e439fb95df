"""Tests collected from an .onnx file, without test code."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.spec import ParitySpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from pytest_trtcheck.spec import Precision


def collector(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The collector for a file that is asked for; None for one that a walk merely came by."""
    globs = settings.value(parent.config, "trt_collect")
    try:
        relative = file_path.relative_to(parent.config.rootpath).as_posix()
    except ValueError:
        relative = file_path.as_posix()
    if parent.session.isinitpath(file_path) or any(fnmatch(relative, glob) for glob in globs):
        file: OnnxFile = OnnxFile.from_parent(parent, path=file_path)
        return file
    return None


class OnnxFile(pytest.File):
    """One model file: a test a precision."""

    def collect(self) -> Iterable[pytest.Item]:
        """The tests, named after their precisions."""
        return self._items()

    def _items(self) -> Iterator[pytest.Item]:
        for precision in settings.value(self.config, "trt_precision"):
            item: OnnxItem = OnnxItem.from_parent(self, name=precision, precision=precision)
            yield item


class OnnxItem(pytest.Item):
    """The parity of one model in one precision, on generated inputs."""

    def __init__(self, *, precision: Precision, **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]
        self._precision = precision

    def runtest(self) -> None:
        """Check the model as a marked test that returns nothing would."""
        from pytest_trtcheck.check.request import Request
        from pytest_trtcheck.plugin.running import folders, run

        run(
            self,
            Request(
                nodeid=self.nodeid,
                model=str(self.path),
                folders=folders(self),
                parity=ParitySpec(precision=(self._precision,)),
                default_batch=1,
            ),
        )

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test stands."""
        return self.path, None, f"{self.path.name}::{self.name}"
