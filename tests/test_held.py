"""Locks and temporary files end with their process, whatever ends it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import pytest

from pytest_trtcheck.baselines import files as baselines
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.export import folder as export
from pytest_trtcheck.record import held
from pytest_trtcheck.record.files import write_text

if TYPE_CHECKING:
    from tests.conftest import Suite

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")

HALF = """
import sys, time
from pathlib import Path
from pytest_trtcheck.record.held import HeldFolder, locked, replacing

folder = Path(sys.argv[1])
with HeldFolder("trtcheck-x-", folder) as inner, replacing(folder / "report.json") as half, locked(folder / "a.lock"):
    (Path(inner) / "engine").write_bytes(bytes(100))
    half.write_text("{")
    print("half", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_held_goes_with_the_next_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    (tmp_path / ".report.json.somebody.tmp").write_text("not ours")
    with subprocess.Popen([sys.executable, "-c", HALF, tmp_path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        before = set(tmp_path.iterdir())
        assert len(before) == 5
        held.remove_leftovers(tmp_path.iterdir())
        assert set(tmp_path.iterdir()) == before, "its process lives"
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "report.json").read_text() == "old"
    write_text(tmp_path / "report.json", "new")
    assert [path.name for path in tmp_path.glob("*.tmp")] == [".report.json.somebody.tmp"]
    held.remove_leftovers(tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", ".report.json.somebody.tmp"}
    assert (tmp_path / "report.json").read_text() == "new"


def test_what_was_left_goes_with_a_run_that_makes_nothing_itself(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run has built meanwhile what the killed one was at, so that the next finds all of it in the cache."""
    suite.write(test_x="@trt_parity('conv.onnx', batch=1)\ndef test_a(): ...\n")
    temporary, bundles = suite.path / "tmp", suite.path / "bundles"
    monkeypatch.setenv("TMPDIR", str(temporary))
    arguments = (f"--trt-cache-dir={suite.path / 'c'}", f"--trt-bundle={bundles}")
    temporary.mkdir()
    bundles.mkdir()
    suite.run_apart(*arguments).result.assert_outcomes(passed=1)
    left = [
        Path(mkdtemp(prefix=f"{prefix}{held._mark()}", dir=folder))
        for prefix, folder in (("trtcheck-build-", temporary), (".unfinished-", bundles))
    ]
    suite.run_apart(*arguments).result.assert_outcomes(passed=1)
    assert not [path for path in left if path.exists()]


def test_what_is_raised_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    with suppress(LookupError), held.replacing(tmp_path / "report.json") as half:
        half.write_text("{")
        raise LookupError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.json", "old")]


def test_a_folder_is_made_again_where_it_was_taken_for_a_leftover(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mkdtemp
    taken: list[str] = []

    def made_and_taken(prefix: str, dir: Path | None) -> str:
        name = made(prefix=prefix, dir=dir)
        if len(taken) < 3:
            taken.append(name)
            held.remove_leftovers([Path(name)])
            assert not Path(name).exists(), "nobody held it yet"
        return name

    monkeypatch.setattr(held, "mkdtemp", made_and_taken)
    with held.HeldFolder("x-", tmp_path) as folder:
        held.remove_leftovers(tmp_path.iterdir())
        assert len(taken) == 3
        assert [str(path) for path in tmp_path.iterdir()] == [folder]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["baselines", "export"])
def test_nobody_waits_for_ever_for_a_folder_of_results(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"baselines": baselines.locked, "export": export.alone}[where]
    monkeypatch.setattr(held, "LOCKED_S", 0.1)
    with alone(tmp_path), pytest.raises(ReportError, match=r"another process held .*lock for"), alone(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """filelock warns and locks in another way; what is left there goes after a day."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    for alone in (baselines.locked, export.alone):
        with alone(tmp_path):
            write_text(tmp_path / "x.json", "{}")
    folder = held.HeldFolder("x-", tmp_path)
    held.remove_leftovers(tmp_path.iterdir())
    assert Path(folder.name).is_dir()
    os.utime(folder.name, (time.time() - 90_000,) * 2)
    held.remove_leftovers(tmp_path.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    folder.cleanup()


def test_a_full_disk_is_told_with_what_helps(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="No space left on device") as caught:
        write_text("/dev/full", "text")
    assert "free some space" in caught.value.hint
    with pytest.raises(ReportError, match=r"cannot export to .* \(there\)") as caught, export.alone(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "from here", None, "there")
    assert "free some space" in caught.value.hint
