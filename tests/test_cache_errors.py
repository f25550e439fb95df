"""Directories that cannot be a cache: each gives one clear CacheError, with the real operating system refusing."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import pytest_trtcheck
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import CacheError, ReportError
from pytest_trtcheck.record.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Suite

KEY = Key("engine", "net", {"precision": "fp16"})


def small(directory: Path) -> None:
    (directory / "engine.plan").write_bytes(b"plan")


def refused(cache: Cache, make: Callable[[Path], object] = small) -> CacheError:
    with pytest.raises(CacheError) as caught:
        cache.get_or_make(KEY, make)
    assert str(cache.root) in caught.value.message
    assert "--trt-cache-dir" in caught.value.hint
    return caught.value


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_is_no_cache_directory(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("not ours")
    cache = Cache(tmp_path / "file" / below)
    error = refused(cache)
    assert "cannot be used: reading net (engine) failed: Not a directory" in error.message
    assert (tmp_path / "file").read_text() == "not ours"
    for ask in (lambda: cache.get(KEY), cache.entries, cache.describe, cache.clear):
        with pytest.raises(CacheError, match="Not a directory"):
            ask()


def test_somebody_elses_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "v1" / "entries" / "engine" / KEY.digest).mkdir(parents=True)
    (tmp_path / "video.mp4").write_text("mine too")
    cache = Cache(tmp_path)
    error = refused(cache)
    assert "is not a cache of pytest-trtcheck: it holds 'thesis.tex' and 1 more" in error.message
    for ask in (cache.clear, cache.entries, cache.describe):
        with pytest.raises(CacheError, match=r"thesis\.tex"):
            ask()
    assert {path.name for path in tmp_path.rglob("*")} == {
        "thesis.tex",
        "video.mp4",
        "v1",
        "entries",
        "engine",
        KEY.digest,
    }


def test_another_tools_cache_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55\n# by another tool\n")
    (tmp_path / "data").mkdir()
    assert "it holds 'data'" in refused(Cache(tmp_path)).message
    assert "another tool" in (tmp_path / "CACHEDIR.TAG").read_text()


@pytest.mark.parametrize("name", ["lost+found", ".gitignore", ".gitkeep", ".DS_Store"])
def test_a_fresh_disk_or_checkout_is_free(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("as it was")
    cache = Cache(tmp_path)
    cache.get_or_make(KEY, small)
    assert cache.clear() == 1
    assert (tmp_path / name).read_text() == "as it was"


def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert "cannot be written" in refused(Cache(tmp_path)).message
    assert "cannot be written" in refused(Cache(tmp_path / "c")).message


CLOSED = """
import os, sys
from pathlib import Path
from pytest_trtcheck.baselines import files as baselines
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import CheckError
from pytest_trtcheck.model.input_files import matching
from pytest_trtcheck.model.sources import Opening
from pytest_trtcheck.record.files import check_writable

def made(cache):
    return cache.get_or_make(Key("engine", "net", {}), lambda folder: (folder / "plan").write_bytes(b""))

made(Cache(sys.argv[2]))  # as root: another account may not be able to import
if os.geteuid() == 0:
    os.setuid(54321)
closed = Path(sys.argv[1])
cache = Cache(closed / "c")
cache.require_private()
entry = made(cache)
assert not entry.path.is_relative_to(closed) and "Permission denied" in cache.problem
check_writable(closed / "c", "--trt-cache-dir", is_folder=True, is_optional=True)
for ask in (
    lambda: check_writable(closed / "r.json", "--trt-report"),
    lambda: Opening((closed,), cache).path("net.onnx"),
    lambda: matching("--trt-inputs", str(closed / "*.npz"), closed),
    lambda: baselines.opened(closed / "b"),
):
    try:
        ask()
    except CheckError as error:
        assert "Permission denied" in error.message and error.hint, error
    else:
        raise AssertionError(ask)
"""


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs accounts")
def test_what_lies_below_a_closed_folder(tmp_path: Path) -> None:
    """As for a container's account whose HOME is root's."""
    (tmp_path / "closed").mkdir(mode=0)
    env = {**os.environ, "PYTHONPATH": str(Path(next(iter(pytest_trtcheck.__path__))).parent)}
    command = [sys.executable, "-c", CLOSED, str(tmp_path / "closed"), str(tmp_path / "open")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=60, cwd="/")
    (tmp_path / "closed").chmod(0o700)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: a write that the operating system really refuses, without any privilege."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_write_that_fails_in_make_is_a_cache_error_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    error = refused(cache, lambda directory: (directory / "engine.plan").write_bytes(bytes(100_000)))
    assert error.message.count("storing net (engine) failed: File too large") == 2, "in a temporary directory too"
    assert "ulimit -f" in error.hint
    with pytest.raises(ReportError, match=r"r\.json: File too large") as large:
        write_text(tmp_path / "r.json", "x" * 100_000)
    assert "ulimit -f" in large.value.hint
    assert not any((tmp_path / "v1" / "work").iterdir())
    assert cache.get(KEY) is None
    assert not cache.get_or_make(KEY, small).cached


@pytest.mark.usefixtures("small_files")
def test_an_extra_that_cannot_be_written_keeps_the_old_one(tmp_path: Path) -> None:
    entry = Cache(tmp_path).get_or_make(KEY, small)
    entry.write_extra("jit", b"old")
    entry.write_extra("jit", bytes(100_000))
    assert entry.read_extra("jit") == b"old"
    assert not any((tmp_path / "v1" / "work").iterdir())


def on_a_small_disk(tmp_path: Path, code: str) -> None:
    """Run `code` with `disk`, an empty 1 MiB file system of its own, in a mount namespace of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    mount = f"mount -t tmpfs -o size=1m,mode=0755 tmpfs '{disk}'"
    probe = [*prefix, "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run(probe, check=False, capture_output=True).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    preamble = f"""
import os, pathlib, subprocess
import numpy as np
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import CacheError, ReportError
from pytest_trtcheck.record.files import write_text

disk = pathlib.Path({str(disk)!r})
KEY = Key("engine", "net", {{}})
OTHER = Key("engine", "other", {{"n": "2"}})

def small(directory):
    (directory / "engine.plan").write_bytes(b"plan")

def message(ask):
    try:
        ask()
    except CacheError as error:
        assert str(disk) in error.message and "--trt-cache-dir" in error.hint, error
        return error.message
    raise AssertionError("no error")
"""
    env = {**os.environ, "PYTHONPATH": str(Path(next(iter(pytest_trtcheck.__path__))).parent)}
    command = [*prefix, "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, preamble + code]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_full_disk(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
cache = Cache(disk / "c")
cache.get_or_make(KEY, small)
for write in (
    lambda directory: (directory / "engine.plan").write_bytes(bytes(2_000_000)),
    lambda directory: np.save(directory / "engine.npy", np.zeros(2_000_000)),   # an OSError without errno
    lambda directory: [(directory / f"{n:04}").write_bytes(bytes(4096)) for n in range(1000)],
):
    cache = Cache(disk / "c")
    entry = cache.get_or_make(OTHER, write)
    assert not entry.path.is_relative_to(disk) and any(entry.path.iterdir()), entry
    assert "is full (" in cache.problem and "storing other (engine) failed" in cache.problem, cache.problem
    assert not any((disk / "c/v1/work").iterdir())
    assert cache.get(OTHER).path == cache.find("engine", OTHER.digest).path == entry.path
    assert cache.get_or_make(OTHER, lambda _: 1 / 0).cached
    assert Cache(disk / "c").get(OTHER) is None
cache = Cache(disk / "c")
assert not cache.get_or_make(OTHER, small).cached
assert cache.problem is None

# With not a byte left: what is there is served, what is not says why.
with (disk / "filler").open("wb", buffering=0) as file:
    try:
        while file.write(bytes(512)):
            pass
    except OSError:
        pass
assert cache.get_or_make(KEY, lambda _: 1 / 0).cached
assert Cache(disk / "c").get_or_make(KEY, lambda _: 1 / 0).cached
third = Key("engine", "third", {"n": "3"})
entry = cache.get(KEY)
entry.write_extra("jit", bytes(5000))
assert "storing jit" in cache.problem and entry.read_extra("jit") is None
assert not cache.get_or_make(third, small).path.is_relative_to(disk)
other = Cache(disk / "d")
other.get_or_make(KEY, small)
assert "is full" in other.problem
# Nor is there room for temporary files: then it is an error that names both.
import tempfile
tempfile.tempdir = str(disk)
text = message(lambda: Cache(disk / "c").get_or_make(third, small))
assert "is full" in text and "temporary directory" in text, text
tempfile.tempdir = None
# And clearing helps.
(disk / "filler").unlink()
cache = Cache(disk / "c")
assert cache.clear() == 2
cache.get_or_make(third, small)
assert cache.problem is None
""",
    )


def test_a_full_folder_for_temporary_files_is_not_the_cache_that_is_full(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        f"""
import errno, tempfile
from pytest_trtcheck.cache.directory import scratch_folder
tempfile.tempdir = str(disk)
cache = Cache({str(tmp_path / "cache")!r})

def write(folder, size):
    with (folder / "f").open("wb") as file:
        file.write(bytes(size))

for fill in (lambda folder: write(folder, 2_000_000), lambda folder: np.save(folder / "x.npy", np.zeros(2_000_000))):
    def make(directory):
        with scratch_folder("trial") as folder:
            fill(pathlib.Path(folder))
    try:
        cache.get_or_make(OTHER, make)
    except OSError as error:
        assert error.errno == errno.ENOSPC and error.filename.startswith(str(disk)), error
    else:
        raise AssertionError("no error")
assert cache.problem is None
assert cache.get_or_make(OTHER, small).path.is_relative_to(cache.root)
""",
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_arrays_that_cannot_be_written_say_why(tmp_path: Path) -> None:
    """numpy's own error has no errno: under a quota, or a limit of a file's size, it was a bug to report."""
    code = f"""
import errno, pathlib, resource
import numpy as np
from pytest_trtcheck.cache import Cache, Key
from pytest_trtcheck.errors import CacheError, unforeseen
from pytest_trtcheck.model.arrays import load_arrays, save_arrays

folder = pathlib.Path({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
arrays = {{"x": np.arange(60_000, dtype=np.float32)}}
try:
    save_arrays(folder, arrays)
except OSError as error:
    told = unforeseen(error, "x.onnx")
    assert (told.code, "ulimit -f" in told.hint, error.errno) == ("no-room", True, errno.EFBIG), told
else:
    raise AssertionError("no error")
try:
    Cache(folder / "cache").get_or_make(Key("kept", "net", {{}}), lambda into: save_arrays(into, arrays))
except CacheError as error:
    assert "File too large" in error.message, error
else:
    raise AssertionError("no error")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save_arrays(folder, arrays)
assert (load_arrays(folder)["x"] == arrays["x"]).all()
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_read_only_disk_serves_what_it_has(tmp_path: Path) -> None:
    on_a_small_disk(
        tmp_path,
        """
Cache(disk).get_or_make(KEY, small)
subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
cache = Cache(disk, max_bytes=0)
entry = cache.get_or_make(KEY, lambda _: 1 / 0)
assert (entry.path / "engine.plan").read_bytes() == b"plan"
assert "1 entry" in cache.describe()
entry.write_extra("jit", b"")
assert "storing jit of net" in cache.problem
assert not cache.get_or_make(OTHER, small).cached
text = cache.problem
assert "cannot be written: storing other (engine) failed: Read-only file system" in text, text
assert cache.get_or_make(OTHER, lambda _: 1 / 0).cached and cache.get_or_make(KEY, lambda _: 1 / 0).cached
assert "cannot be written" in message(cache.clear)
new = Cache(disk / "new")
new.get_or_make(KEY, small)
assert "Read-only file system" in new.problem
""",
    )


def test_a_file_system_that_never_answers(tmp_path: Path) -> None:
    """A FUSE file system whose server reads no request, as a network's whose server is gone: `open` has no end."""
    on_a_small_disk(
        tmp_path,
        """
import ctypes, time
import pytest_trtcheck.cache.directory as directory
from pytest_trtcheck.errors import ReportError
from pytest_trtcheck.record import files

try:
    descriptor = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={descriptor},rootmode=40000,user_id=0,group_id=0".encode()
    assert not ctypes.CDLL(None).mount(b"hangs", os.fsencode(disk), b"fuse", 0, options)
except (OSError, AssertionError):
    raise SystemExit(0)  # there is no FUSE here
directory.ANSWER_S = files.ANSWER_S = 0.3
cache = Cache(disk / "c")
entry = cache.get_or_make(KEY, small)
assert (entry.path / "engine.plan").read_bytes() == b"plan" and not entry.path.is_relative_to(disk)
assert "does not answer: its file system took more than 0.3 s" in cache.problem
start = time.monotonic()
assert all(cache.get_or_make(KEY, lambda _: 1 / 0).cached for _ in range(20))
assert time.monotonic() - start < 0.3, "it is asked once"
cache.require_private()
assert not Cache(disk / "c").has("engine") and not Cache(disk / "c").remembers("engine", "net")
for write in (lambda: files.write_text(disk / "r.json", ""), lambda: files.check_writable(disk / "r", "--trt-report")):
    try:
        write()
    except ReportError as error:
        assert "did not answer within 0.3 s" in error.message, error
    else:
        raise AssertionError("no error")
""",
    )


def test_a_quick_look_asks_no_file_system_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(KEY, small)
    assert cache.has("engine")
    assert cache.remembers("engine", KEY.subject)
    monkeypatch.setattr("pytest_trtcheck.cache.directory.answers", lambda *_: False)
    other = Cache(tmp_path)
    assert not other.has("engine")
    assert not other.remembers("engine", KEY.subject)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has locks of its own")
@pytest.mark.filterwarnings("error")
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """filelock warns of it and locks in another way; no warning becomes an error of a check."""
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    cache = Cache(tmp_path)
    assert not cache.get_or_make(KEY, small).cached
    assert Cache(tmp_path).get_or_make(KEY, small).cached
    assert Cache(tmp_path).clear() == 1
    assert not list((tmp_path / "v1" / "work").iterdir())
    assert not list((tmp_path / "v1" / "used").iterdir())


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_trtcheck.record.held.LOCKED_S", 0.1)

    def make_again(_: Path) -> None:
        Cache(tmp_path).get_or_make(KEY, small)

    with pytest.raises(CacheError, match=r"storing net \(engine\) failed: another process held .*\.lock for"):
        Cache(tmp_path).get_or_make(KEY, make_again)


EMPTIED = """
import shutil
from pytest_trtcheck.cache import store

make = store.Cache._make

def emptied(self, key, maker, damage):
    def made(folder):
        if key.kind == "lowered":
            shutil.rmtree(self.root)
        return maker(folder)
    return make(self, key, made, damage)

store.Cache._make = emptied
"""


def test_a_cache_that_is_removed_while_it_is_used_is_said_to_be_that(suite: Suite) -> None:
    suite.write(test_x="@trt_parity('conv.onnx', batch=1)\ndef test_a(): ...\n")
    (suite.path / "conftest.py").write_text(EMPTIED)
    run = suite.run_apart(f"--trt-cache-dir={suite.path / 'c'}")
    (check,) = run.checks
    assert (check["verdict"], check["code"]) == ("error", "cache-directory"), run.text
    assert "was emptied or removed while it was used" in check["message"]
