"""The files that baselines are kept in: one a GPU and test file, made to be reviewed.

    DIR/H200-sm90/tests/test_detector.py.json
    DIR/emulated/tests/test_detector.py.json

Keys are sorted and numbers rounded, so that recording a test again changes the lines of that test and no others.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_trtcheck.baselines.errors import ErrorBaseline
from pytest_trtcheck.baselines.latency import LatencyBaseline
from pytest_trtcheck.baselines.scores import ScoreBaseline
from pytest_trtcheck.errors import MISREAD, ReportError, first_line
from pytest_trtcheck.record import held
from pytest_trtcheck.record.files import read_bytes, room_or, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_trtcheck.record import GpuRecord

FORMAT = 2
MAX_BYTES = 64 << 20
"""A file that is larger is none of ours: that of a thousand checks of ten outputs has a tenth of it."""
_EXPANDED = 5
"""Levels of a file that get a line for each key: below, in a check's figures, a line holds a whole mapping."""
_LOCK = ".trtcheck-baselines.lock"

_RECORD_AGAIN = "restore the file, or delete it and record it again: --trt-update-baseline"


@dataclass(frozen=True, order=True)
class Place:
    """Where a check ran, as baselines tell it apart.

    Parameters
    ----------
    name
        A GPU's as the driver prints it; of what no GPU of this machine ran, the evidence: "emulated", "server", …
    compute_capability
        Of the GPU, as in "9.0"; empty where it is none.
    """

    name: str
    compute_capability: str = ""

    @classmethod
    def of(cls, gpu: GpuRecord | None, evidence: str | None) -> Place:
        """Where it ran."""
        if gpu is None:
            return cls(evidence or "unknown")
        return cls(gpu.name or "", gpu.compute_capability or "")

    @property
    def folder(self) -> str:
        """The folder of its baselines, such as "A100-SXM4-80GB-sm80"."""
        name = re.sub(r"[^A-Za-z0-9.]+", "-", self.name.removeprefix("NVIDIA ")).strip("-.")
        return f"{name or 'GPU'}-sm{self.compute_capability.replace('.', '')}" if self.compute_capability else name

    def __str__(self) -> str:
        """In words."""
        return f"{self.name} (compute capability {self.compute_capability})" if self.compute_capability else self.name


@dataclass(frozen=True, order=True)
class CheckKey:
    """A check as baselines tell it apart. The node id holds the batch, where a test has several."""

    place: Place
    nodeid: str
    precision: str
    backend: str
    evidence: str

    @property
    def label(self) -> str:
        """What stands in a file below the node id."""
        return f"{self.precision}, {self.backend}, {self.evidence}"

    @property
    def path(self) -> Path:
        """Where it stands, below the directory of all."""
        return Path(self.place.folder) / path_of(self.nodeid)


@dataclass(frozen=True)
class Entry:
    """What was recorded of one check, each for itself: what could not be trusted this time stays as it was."""

    latency: LatencyBaseline | None = None
    errors: ErrorBaseline | None = None
    score: ScoreBaseline | None = None

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        parts = {"errors": self.errors, "latency": self.latency, "score": self.score}
        return {name: part.to_json() for name, part in parts.items() if part is not None}

    @classmethod
    def from_json(cls, data: Any) -> Entry:
        """From what `to_json` gave.

        Raises
        ------
        ReportError, or one of `errors.MISREAD`
            It is something else.
        """
        if unknown := set(data) - {"errors", "latency", "score"}:
            raise ValueError(f"{min(unknown)!r} is no part of a baseline")
        latency, errors, score = data.get("latency"), data.get("errors"), data.get("score")
        return cls(
            None if latency is None else LatencyBaseline.from_json(latency),
            None if errors is None else ErrorBaseline.from_json(errors),
            None if score is None else ScoreBaseline.from_json(score),
        )


Tests = dict[str, dict[str, Entry]]
"""By node id, and by `CheckKey.label`."""


@dataclass(frozen=True)
class Baselines:
    """The baselines of a directory. A file is read when a check of it is made: a damaged one is their error."""

    root: Path
    _read: dict[Path, tuple[Place, Tests] | ReportError] = field(default_factory=dict, compare=False, repr=False)

    def find(self, key: CheckKey) -> Entry:
        """What was recorded of a check; an empty entry where nothing was.

        Raises
        ------
        ReportError
            Its file cannot be read, or is no file of baselines.
        """
        path = self.root / key.path
        if path not in self._read:
            try:
                self._read[path] = load(path, key.place)
            except ReportError as error:
                self._read[path] = error
        found = self._read[path]
        if isinstance(found, ReportError):
            raise found
        return found[1].get(key.nodeid, {}).get(key.label, Entry())


def opened(directory: str | os.PathLike[str], *, must_exist: bool = True) -> Baselines:
    """The baselines below a directory.

    Parameters
    ----------
    must_exist
        Whether a directory that is not there is an error: a mistyped name, unless baselines are yet to be recorded.

    Raises
    ------
    ReportError
        It is no directory.
    """
    root = Path(directory)
    try:
        is_wrong = not root.is_dir() and (must_exist or root.exists())
    except OSError as error:
        hint = "let this account read it" if isinstance(error, PermissionError) else "name another directory"
        raise ReportError(f"--trt-baseline={directory}: {error.strerror}", hint, code="baseline-file") from error
    if is_wrong:
        raise ReportError(
            f"--trt-baseline={directory}: there is no such directory",
            "name the directory with the baselines, or record them: --trt-update-baseline",
            code="baseline-file",
        )
    return Baselines(root)


def load(path: Path, place: Place) -> tuple[Place, Tests]:
    """One file, checked in whole; without tests where there is none.

    Raises
    ------
    ReportError
        It cannot be read, is no file of baselines, or is one of another place.
    """
    if not os.path.lexists(path):
        return place, {}
    document = _document(path)
    if isinstance(document, dict) and document.get("format") not in (None, FORMAT):
        raise ReportError(
            f"{path} has format {document['format']!r}; this version reads {FORMAT}",
            "use the version of pytest-trtcheck that wrote it, or delete it and record it again: --trt-update-baseline",
            code="baseline-file",
        )
    where = ""
    try:
        if document["format"] != FORMAT:
            raise ValueError("format is null")
        owner = Place(str(document["ran_on"]["name"]), str(document["ran_on"]["compute_capability"]))
        tests: Tests = {}
        for nodeid, entries in document["tests"].items():
            tests[nodeid] = {}
            for label, data in entries.items():
                where = f", {nodeid} in {label}"
                tests[nodeid][label] = Entry.from_json(data)
    except ReportError as error:
        raise ReportError(f"{path}{where}: {error.message}", _RECORD_AGAIN, code="baseline-file") from error
    except MISREAD as error:
        problem = f"{first_line(error)} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ReportError(
            f"{path}{where} is no file of baselines: {problem}", _RECORD_AGAIN, code="baseline-file"
        ) from error
    if owner != place:
        raise ReportError(
            f"{path} holds the baselines of {owner}, not of {place}",
            "move it into another directory",
            code="baseline-file",
        )
    return owner, tests


def _document(path: Path) -> Any:
    """The JSON in a file; whatever stands in it, reading it ends."""
    try:
        text = read_bytes(path, MAX_BYTES).decode()
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    except OSError as error:
        raise ReportError(
            f"cannot read the baselines in {path}: {error.strerror or error}", _RECORD_AGAIN, code="baseline-file"
        ) from error
    except RecursionError:
        raise ReportError(
            f"{path} is no file of baselines: it is nested too deeply", _RECORD_AGAIN, code="baseline-file"
        ) from None
    except ValueError as error:
        raise ReportError(f"{path} is no file of baselines: {error}", _RECORD_AGAIN, code="baseline-file") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What a merge by hand left in twice is not for us to choose from."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands in it twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no figure")


def write(path: Path, place: Place, tests: Tests) -> None:
    """Write one file, whole or not at all.

    Raises
    ------
    ReportError
        It cannot be written.
    """
    document = {
        "format": FORMAT,
        "ran_on": {"compute_capability": place.compute_capability, "name": place.name},
        "tests": {
            nodeid: {label: entry.to_json() for label, entry in entries.items()} for nodeid, entries in tests.items()
        },
    }
    write_text(path, _dump(document) + "\n", "the baselines in")


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """One run at a time updates a directory: two that read the same file and write it would lose one's baselines.

    Raises
    ------
    ReportError
        It cannot be written to.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with held.locked(root / _LOCK):
            yield
    except OSError as error:
        raise ReportError(
            f"cannot write the baselines in {root}: {error.strerror or error}",
            room_or(error, "name a directory that can be written to"),
            code="report-unwritable",
        ) from error


def path_of(nodeid: str) -> Path:
    """Where the baselines of a test stand, below the folder of the GPU: a path that cannot leave it."""
    parts = [part for part in nodeid.partition("::")[0].replace("\\", "/").split("/") if part not in {"", "."}]
    safe = [re.sub(r"[^\w.+@ -]", "_", "_up" if part == ".." else part) for part in parts]
    return Path(*safe[:-1], f"{safe[-1] if safe else 'tests'}.json")


def _dump(value: object, level: int = 0) -> str:
    if not isinstance(value, Mapping) or not value or level >= _EXPANDED + 1:
        return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    pad = "  " * (level + 1)
    lines = [f"{pad}{json.dumps(key, ensure_ascii=False)}: {_dump(value[key], level + 1)}" for key in sorted(value)]
    return "{\n" + ",\n".join(lines) + "\n" + "  " * level + "}"
