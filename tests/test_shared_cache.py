"""A cache that machines share: a folder, a web server, and a real S3 server, with faults in between."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck.cache import Cache, Entry, Key
from pytest_trtcheck.cache import remote as module
from pytest_trtcheck.cache.remote import Address, Listing, Remote, Tally
from pytest_trtcheck.errors import ArgumentError, CheckError
from tests.faulty_proxy import FaultyProxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Run, Suite

fsspec = pytest.importorskip("fsspec", reason='needs pip install "pytest-trtcheck[remote]"')

KEY = Key("engine", "net", {"precision": "fp16"})
SECRET = b"a secret of the fleet's own"
CONTENT = bytes(range(256)) * 400
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="modes and paths of POSIX")


def make(folder: Path, content: bytes = CONTENT) -> None:
    (folder / "inner").mkdir()
    (folder / "engine.plan").write_bytes(content)
    (folder / "inner" / "empty").write_bytes(b"")


def nothing(folder: Path) -> None:
    pass


def fail(folder: Path) -> None:
    raise RuntimeError


def never(folder: Path) -> None:
    raise AssertionError("made again")


def remote(url: str, secret: bytes | None = SECRET, **options: Any) -> Remote:
    return Remote(Address.parse(url, Path.cwd()), secret, **options)


class Machine:
    """One that has a local cache of its own."""

    def __init__(self, root: Path, url: str, secret: bytes | None = SECRET, **options: Any) -> None:
        self.remote = remote(url, secret, **options)
        self.cache = Cache(root, 10**9, secret=secret, remote=self.remote)

    def get(self, making: Callable[[Path], None] = make, key: Key = KEY) -> Entry:
        return self.cache.get_or_make(key, making, shared=True)

    def run(self, making: Callable[[Path], None] = make, *, is_proved: bool = True) -> Entry:
        """A check that passes, or fails."""
        self.cache.watch()
        entry = self.get(making)
        self.cache.share(lambda _: is_proved)
        self.remote.finish()
        return entry

    @property
    def troubles(self) -> str:
        return "\n".join(self.remote.tally.troubles)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_S", 1.5)
    monkeypatch.setattr(module, "WORTH_S", 0.0)
    monkeypatch.setattr(module, "_WRITING_S", 4.0)


def stored(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.is_file())


def the_file(place: Path, size: int = len(CONTENT)) -> Path:
    (found,) = (path for path in stored(place) if path.stat().st_size == size)
    return found


# --- one machine gives, another takes ---


def test_what_one_machine_proved_another_reads(tmp_path: Path, place: Path) -> None:
    first, second = Machine(tmp_path / "a", str(place)), Machine(tmp_path / "b", f"file://{place}")
    assert first.run().origin == "miss"
    assert (first.remote.tally.written, first.troubles) == (1, "")
    found = second.run(never)
    assert (found.origin, found.cached, found.miss_reason) == ("remote", True, None)
    assert (found.path / "engine.plan").read_bytes() == CONTENT
    assert (found.path / "inner" / "empty").read_bytes() == b""
    assert second.get(never).origin == "hit"
    assert (second.remote.tally.read, second.remote.tally.written, second.troubles) == (1, 0, "")
    # It is an entry like any other, from here on without the shared one.
    assert Cache(tmp_path / "b", secret=SECRET).get(KEY) is not None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    place = tmp_path / os.fsdecode(b"shared-\xff")
    place.mkdir(mode=0o700)
    assert Machine(tmp_path / "a", str(place)).run().origin == "miss"
    assert Machine(tmp_path / "b", str(place)).run(never).origin == "remote"


def test_what_did_not_prove_itself_is_not_written(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "a", str(place))
    machine.run(is_proved=False)
    # Nor what was asked for before, or could not be made, or is made in no time.
    machine.cache.watch()
    with pytest.raises(RuntimeError):
        machine.get(fail, Key("engine", "broken", {}))
    monkeypatch.setattr(module, "WORTH_S", 0.5)
    machine.get(nothing, Key("engine", "cheap", {}))
    machine.cache.share(lambda _: True)
    machine.remote.finish()
    assert stored(place) == []
    monkeypatch.setattr(module, "WORTH_S", 0.0)
    # One that was here before there was a shared cache is written once it is used and proved.
    assert Machine(tmp_path / "a", str(place)).run(never).origin == "hit"
    assert len(stored(place)) == 3


def test_it_is_written_once(tmp_path: Path, place: Path) -> None:
    Machine(tmp_path / "a", str(place)).run()
    before = {path: path.stat().st_mtime_ns for path in stored(place)}
    again = Machine(tmp_path / "a", str(place))
    again.run(never)
    other = Machine(tmp_path / "b", str(place))
    other.remote.fetch = lambda *_: None  # type: ignore[method-assign] # it had asked before the first had written
    other.run(partial(make, content=b"another build"))
    assert {path: path.stat().st_mtime_ns for path in stored(place)} == before
    assert again.remote.tally.written == other.remote.tally.written == 0


def test_two_writers_at_once_leave_a_whole_entry(tmp_path: Path, place: Path) -> None:
    machines = [Machine(tmp_path / str(n), str(place)) for n in range(4)]
    threads = [
        threading.Thread(target=each.run, args=[partial(make, content=bytes([n]) * 10_000)])
        for n, each in enumerate(machines)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reader = Machine(tmp_path / "reader", str(place))
    assert reader.run(never).origin == "remote"
    assert not [path for path in stored(place) if ".part-" in path.name]


def test_a_listing_is_written_last(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path / "a", str(place))
    monkeypatch.setattr(Remote, "_put", broken_after(1, Remote._put))
    machine.run()
    assert "OSError: the network is gone" in machine.troubles
    assert not [path for path in stored(place) if path.name == "listing"]
    monkeypatch.undo()
    assert Machine(tmp_path / "b", str(place)).run().origin == "miss"


def broken_after(count: int, put: Callable[..., None]) -> Callable[..., None]:
    done: list[int] = []

    def wrapped(*args: Any) -> None:
        if len(done) == count:
            raise OSError("the network is gone")
        done.append(1)
        put(*args)

    return wrapped


# --- what is there is not what it should be ---


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "content": (lambda place: flip(the_file(place)), "engine.plan is not what its listing says"),
    "shorter": (lambda place: os.truncate(the_file(place), 10), "engine.plan is not what its listing says"),
    "larger": (lambda place: os.truncate(the_file(place), 10**6), "a file is larger than its listing says"),
    "missing": (lambda place: the_file(place).unlink(), "files of it are missing"),
    "empty listing": (lambda place: os.truncate(next(place.rglob("listing")), 0), "instead of its listing"),
    "huge listing": (lambda place: os.truncate(next(place.rglob("listing")), 10**9), "larger than its listing says"),
    "listing": (lambda place: flip(next(place.rglob("listing"))), "not signed with the key"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_made_here_and_mended_there(tmp_path: Path, place: Path, damage: str) -> None:
    Machine(tmp_path / "a", str(place)).run()
    spoil, words = DAMAGES[damage]
    spoil(place)
    second = Machine(tmp_path / "b", str(place))
    entry = second.run()
    assert entry.origin == "miss"
    assert (entry.path / "engine.plan").read_bytes() == CONTENT
    assert words in second.troubles
    assert Machine(tmp_path / "c", str(place)).run(never).origin == "remote"


def rewrite(place: Path, **changes: Any) -> None:
    """As whoever can write there can do."""
    listing = next(place.rglob("listing"))
    found = json.loads(listing.read_bytes().partition(b"\n")[2])
    listing.write_bytes(Listing(**{**found, **changes}).packed(None))


@pytest.mark.parametrize(
    "name", ["../../escaped", "/escaped", "a/../../escaped", "", ".", "a//b", "a\\..\\b", "C:x", "a\0b", "x."]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, place: Path, name: str) -> None:
    Machine(tmp_path / "a", str(place), None).run()
    source = the_file(place)
    rewrite(place, files={name: (len(CONTENT), source.name)})
    second = Machine(tmp_path / "b", str(place), None)
    assert second.run().origin == "miss"
    assert "names what is no file of an entry" in second.troubles
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": {"precision": "int8"}}, "belongs to another entry"),
        ({"make_s": "long"}, "cannot be read"),
        ({"files": {"engine.plan": (10**18, "0" * 64)}}, "larger than trt_cache_size"),
        ({"files": {"engine.plan": (-1, "0" * 64)}}, "no file of an entry"),
    ],
)
def test_listings_that_lie_are_refused(tmp_path: Path, place: Path, changes: dict[str, Any], words: str) -> None:
    Machine(tmp_path / "a", str(place), None).run()
    rewrite(place, **changes)
    second = Machine(tmp_path / "b", str(place), None)
    assert second.run().origin == "miss"
    assert words in second.troubles


def test_what_the_key_did_not_sign_is_not_used(tmp_path: Path, place: Path) -> None:
    Machine(tmp_path / "a", str(place), None).run()
    for secret in (SECRET, b"another secret of 24 byte"):
        machine = Machine(tmp_path / secret.decode(), str(place), secret)
        assert machine.run().origin == "miss"
        assert "not signed with the key of --trt-cache-key: net (engine)" in machine.troubles
        assert SECRET.decode() not in machine.troubles


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_folder_that_others_can_write_to_needs_a_key(tmp_path: Path, place: Path, mode: int) -> None:
    Machine(tmp_path / "a", str(place), None).run()
    place.chmod(mode)
    refused = Machine(tmp_path / "b", str(place), None)
    assert refused.run().origin == "miss"
    assert f"{place} can be written by others" in refused.troubles
    assert "--trt-cache-key" in refused.troubles
    assert Machine(tmp_path / "c", str(place), None, trusts=True).run(never).origin == "remote"


def test_where_nobody_can_tell_who_writes_a_key_is_needed() -> None:
    with pytest.raises(ArgumentError, match="nothing tells who can write there"):
        remote("https://example.org/cache", None).require_trust()
    remote("https://example.org/cache").require_trust()
    remote("https://example.org/cache", None, trusts=True).require_trust()


# --- addresses ---


def test_addresses_are_shown_without_what_is_secret() -> None:
    address = Address.parse("https://ann:pa%24sword@example.org/cache/?token=abc123&v=456789#x", Path())
    assert address.shown == "https://example.org/cache"
    said = "cannot reach https://ann:pa$sword@example.org/cache/v1?token=abc123&v=456789 (abc123, pa%24sword)"
    assert address.without_secrets(said) == "cannot reach https://***@example.org/cache/v1?*** (***, ***)"
    # A library writes what it was given in another way.
    quoted = Address.parse("https://ann:sw@rd:x@example.org/cache", Path.cwd())
    assert quoted.without_secrets("url='https://ann:sw%40rd%3Ax@example.org/x'") == "url='https://***@example.org/x'"
    for secret in ("ann:", "sword", "abc123", "456789"):
        assert secret not in address.without_secrets(said)
        assert secret not in repr(address)


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("FILE:///mnt/cache", "/mnt/cache"),
        ("file://localhost/mnt/cache", "/mnt/cache"),
        ("file://localhosts/cache", "/here/localhosts/cache"),
        ("HTTP://host/Folder", "http://host/Folder"),
    ],
)
def test_schemes_are_known_however_they_are_written(url: str, base: str) -> None:
    assert Path(Address.parse(url, Path("/here")).base).as_posix() == Path(base).as_posix()


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("simplecache::s3://bucket", "several URLs in one"),
        ("nothing://bucket", "fsspec knows no nothing://"),
        ("https://", "no bucket, host or folder is named"),
        ("https://[fe80/cache", "Invalid IPv6 URL"),
    ],
)
def test_wrong_addresses_are_named(url: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Address.parse(url, Path())


@pytest.mark.parametrize(
    ("lacks", "url", "extra"), [("fsspec", "/mnt/x", "remote"), ("s3fs", "s3://b", "s3"), ("fsspec", "s3://b", "s3")]
)
def test_what_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, lacks: str, url: str, extra: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == lacks else object())
    with pytest.raises(CheckError, match=lacks) as refused:
        Address.parse(url, Path())
    assert refused.value.hint == f'pip install "pytest-trtcheck[{extra}]"'


# --- a place that is not there, or does not answer ---


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a", str(tmp_path / "unmounted" / "cache"))
    assert machine.run().origin == "miss"
    assert "is no folder" in machine.troubles
    assert not (tmp_path / "unmounted").exists()


def test_a_full_place_is_told(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Remote, "_put", full)
    machine = Machine(tmp_path / "a", str(place))
    machine.run()
    assert machine.remote.tally.lines("/x") == [
        "warning: shared cache /x: not written: OSError: [Errno 28] No space left on device"
    ]


@pytest.fixture
def web(place: Path) -> Iterator[FaultyProxy]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(place)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    proxy = FaultyProxy(server.server_address[1])
    yield proxy
    proxy.close()
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_web_is_read_and_never_written(tmp_path: Path, place: Path, web: FaultyProxy) -> None:
    pytest.importorskip("aiohttp")
    url = f"http://127.0.0.1:{web.port}/?token=t0ken"
    empty = Machine(tmp_path / "a", url)
    assert empty.run().origin == "miss"
    assert (stored(place), empty.troubles) == ([], "")
    Machine(tmp_path / "b", str(place)).run()
    reader = Machine(tmp_path / "c", url)
    assert reader.run(never).origin == "remote"
    assert reader.troubles == ""
    assert "read only" in reader.remote.describe()


def test_what_the_web_logs_holds_no_secret(tmp_path: Path, web: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("aiohttp")
    caplog.set_level("DEBUG")
    Machine(tmp_path / "a", f"http://ann:pa%24sword@127.0.0.1:{web.port}/?token=t0ken").run()
    assert f"http://***@127.0.0.1:{web.port}/v1/" in caplog.text
    assert not any(secret in caplog.text for secret in ("ann", "sword", "t0ken"))


def test_a_web_server_that_gives_a_page_for_everything_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")

    class Login(http.server.SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "13")
            self.end_headers()
            self.wfile.write(b"<html>please!")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Login) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        reader = Machine(tmp_path / "a", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            for number in range(6):
                assert reader.get(key=Key("engine", f"net{number}", {"model": str(number)})).origin == "miss"
        finally:
            server.shutdown()
            thread.join()
    troubles = reader.remote.tally.troubles
    assert len(troubles) == 4, troubles
    assert "left alone from here on: it gives something else in the place of every listing" in troubles


def test_the_web_is_asked_for_files_as_they_are(tmp_path: Path, place: Path) -> None:
    pytest.importorskip("aiohttp")

    class Packing(http.server.SimpleHTTPRequestHandler):
        """Packs what may be packed: random bytes become more by that, an empty file 20."""

        def do_GET(self) -> None:
            content = Path(place, self.path.lstrip("/")).read_bytes()
            packs = "gzip" in self.headers.get("Accept-Encoding", "")
            content = gzip.compress(content) if packs else content
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if packs:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    Machine(tmp_path / "a", str(place)).run()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Packing) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
        thread.start()
        reader = Machine(tmp_path / "b", f"http://127.0.0.1:{server.server_address[1]}")
        try:
            assert reader.run(never).origin == "remote", reader.troubles
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", "left alone from here on: no answer within 1.5 s"),
        ("slow", "longer to read than to make"),
        ("reset", "reading: "),
        ("gone", "reading: "),
        ("500", "500"),
        ("403", "403"),
        ("corrupt", "is not what its listing says"),
    ],
)
def test_faults_on_the_way_cost_little_and_harm_nothing(
    tmp_path: Path, web: FaultyProxy, fault: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    place = tmp_path / "shared"
    monkeypatch.setattr(module, "_LEAST_S", 1.0)
    if fault == "slow":
        monkeypatch.setattr(module, "ANSWER_S", 5.0)
    Machine(tmp_path / "a", str(place)).run()
    web.fault = fault
    reader = Machine(tmp_path / "b", f"http://127.0.0.1:{web.port}")
    start = time.perf_counter()
    entry = reader.run()
    assert entry.origin == "miss"
    assert (entry.path / "engine.plan").read_bytes() == CONTENT
    assert time.perf_counter() - start < 8
    assert words in reader.troubles


def test_what_broke_once_is_tried_again(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(tmp_path / "a", str(place)).run()
    copy, calls = Remote._copy, []

    def flaky(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionResetError
        copy(*args)

    monkeypatch.setattr(Remote, "_copy", flaky)
    reader = Machine(tmp_path / "b", str(place))
    assert reader.run(never).origin == "remote"
    assert reader.troubles == ""


def test_what_fails_again_and_again_is_left_alone(tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def broken(*_: object) -> None:
        asked.append(1)
        raise ConnectionResetError("by peer")

    monkeypatch.setattr(Remote, "_copy", broken)
    machine = Machine(tmp_path / "a", str(place))
    for number in range(10):
        machine.get(nothing, Key("engine", str(number), {"n": str(number)}))
    assert len(asked) == 6  # three entries, each tried twice
    assert "3 errors in a row, the last reading: ConnectionResetError: by peer" in machine.troubles


def test_a_slow_place_is_left_alone_before_it_costs_more_than_it_saves(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.3)

    asked = []

    def slow(*_: object) -> None:
        asked.append(1)
        time.sleep(0.1)
        raise FileNotFoundError

    monkeypatch.setattr(Remote, "_copy", slow)
    machine = Machine(tmp_path / "a", str(place))
    for number in range(20):
        machine.get(nothing, Key("engine", str(number), {"n": str(number)}))
    assert len(asked) <= 4
    assert "more than it saved" in machine.troubles


def test_what_is_made_in_no_time_is_asked_for_once(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WORTH_S", 0.5)
    machine = Machine(tmp_path / "a", str(place))
    asked = []
    real = machine.remote._listing

    def listing(key: Key, over: threading.Event) -> Listing:
        asked.append(key)
        return real(key, over)

    monkeypatch.setattr(machine.remote, "_listing", listing)
    for number in range(5):
        machine.get(nothing, Key("reference", "net", {"n": str(number)}))
    assert len(asked) == 1


def test_tallies_of_several_processes_are_one() -> None:
    one, two = Tally(read=1, saved_s=2.0), Tally(read=2, written=1, saved_s=3.0)
    one.trouble("no answer")
    two.trouble("no answer", 2)
    assert Tally.of([vars(one), vars(two)]).lines("s3://b") == [
        "shared cache s3://b: 3 read (which saved 5 s), 1 written",
        "warning: shared cache s3://b: no answer (3 times)",
    ]


# --- in a run of pytest ---

TESTS = """
@trt_parity("conv.onnx", batch=1)
def test_good(): ...

@trt_parity("gemm.onnx", tol=1e-9)
def test_bad(): ...
"""
GPU = "--trt-gpu=RTX 4090"


@pytest.fixture
def project(suite: Suite) -> Suite:
    """Where what takes no time to make is worth sharing too."""
    (suite.path / "secret").write_text("s" * 32)
    (suite.path / "shared").mkdir()
    suite.write(test_shared=TESTS)
    (suite.path / "conftest.py").write_text("from pytest_trtcheck.cache import remote\nremote.WORTH_S = 0.0\n")
    return suite


def options(cache: str, *more: str) -> tuple[str, ...]:
    return GPU, f"--trt-cache-dir={cache}", "--trt-cache=shared", "--trt-cache-key=secret", "--trt-diagnose=0", *more


def test_a_run_gives_what_passed_to_another_machine(project: Suite, run_everywhere: Callable[..., Run]) -> None:
    first = run_everywhere(*options("a"))
    assert [first.check(name)["engine"]["cache"] for name in ("good", "bad")] == ["miss", "miss"]
    assert "0 read" in first.text
    assert {path.parts[-3] for path in (project.path / "shared").rglob("listing")} >= {"engine", "lowered", "reference"}
    second = run_everywhere(*options("b"))
    good, bad = (second.check(name) for name in ("good", "bad"))
    # What failed proved nothing: it is built on each machine.
    assert (good["engine"]["cache"], good["engine"]["cached"], bad["engine"]["cache"]) == ("remote", True, "miss")
    assert good["verdict"] == "pass"
    assert "warning" not in second.text
    third = run_everywhere(*options("b"))
    assert [third.check(name)["engine"]["cache"] for name in ("good", "bad")] == ["hit", "hit"]


def test_a_place_that_is_not_there_is_a_warning(project: Suite) -> None:
    (project.path / "shared").rmdir()
    run = project.run(*options("a", "-k", "good"))
    run.result.assert_outcomes(passed=1)
    assert run.text.count("left alone from here on") == 1
    assert run.result.ret == 0


def test_what_is_wrong_with_the_options_is_told_first(project: Suite) -> None:
    unsigned = project.run("--trt-cache=https://ann:pa5sword@example.org/x?token=abc")
    assert unsigned.result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--trt-cache=https://example.org/x: an engine is code" in unsigned.text
    assert "pa5sword" not in unsigned.text
    short = project.run("--trt-cache=shared", "--trt-cache-key=nothing")
    assert "--trt-cache-key=nothing: is neither a file nor an environment variable that is set" in short.text


def test_the_list_says_which_cache_is_shared(project: Suite) -> None:
    shown = project.run(*options("a", "--trt-cache-show"))
    assert f"shared cache: {project.path / 'shared'} (signed; not listed here)" in shown.text


def test_the_option_alone_loads_nothing(project: Suite) -> None:
    (project.path / "conftest.py").unlink()
    project.write(test_shared="def test_plain(): ...")
    code = (
        "import sys, pytest; status = pytest.main(['-q', '--trt-cache=shared', '--trt-cache-key=secret']); "
        "print('loaded:', sorted({'fsspec', 's3fs'} & set(sys.modules)), int(status))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=project.path)
    assert "loaded: [] 0" in done.stdout, done.stdout + done.stderr


# --- a real S3 server ---


@pytest.fixture(scope="module")
def s3_server() -> Iterator[int]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto", reason="needs moto[server]: tox -e s3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(300):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    yield port
    server.kill()
    server.wait()


@pytest.fixture
def s3(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy before the server, which has an empty bucket."""
    monkeypatch.setattr(module, "ANSWER_S", 10.0)
    for name, value in {"ACCESS_KEY_ID": "id", "SECRET_ACCESS_KEY": "s3cret", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    here = f"http://127.0.0.1:{s3_server}"
    urllib.request.urlopen(urllib.request.Request(f"{here}/moto-api/reset", method="POST")).close()
    urllib.request.urlopen(urllib.request.Request(f"{here}/bucket", method="PUT", data=b"")).close()
    proxy = FaultyProxy(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
    yield proxy
    proxy.close()


def test_s3_gives_what_another_machine_wrote(tmp_path: Path, s3: FaultyProxy) -> None:
    writer = Machine(tmp_path / "a", "s3://bucket/a folder")
    assert writer.run().origin == "miss"
    assert (writer.remote.tally.written, writer.troubles) == (1, "")
    reader = Machine(tmp_path / "b", "s3://bucket/a folder")
    assert reader.run(never).origin == "remote"
    assert reader.troubles == ""


@pytest.mark.parametrize("fault", ["hang", "slow", "reset", "gone", "500", "403", "404", "corrupt"])
def test_s3_with_faults_is_a_warning_and_no_more(
    tmp_path: Path, s3: FaultyProxy, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAST_S", 1.0)
    writer = Machine(tmp_path / "a", "s3://bucket")
    writer.run()
    assert (writer.remote.tally.written, writer.troubles) == (1, "")
    monkeypatch.setattr(module, "_LEAVING_S", (3.0, 3.0))
    if fault in {"hang", "gone"}:
        monkeypatch.setattr(module, "ANSWER_S", 3.0)
    s3.fault = fault
    reader = Machine(tmp_path / "b", "s3://bucket")
    start = time.perf_counter()
    entry = reader.run()
    assert entry.origin == "miss"
    assert (entry.path / "engine.plan").read_bytes() == CONTENT
    assert time.perf_counter() - start < 20
    if fault != "404":
        assert reader.troubles
    assert "s3cret" not in reader.troubles


def test_s3_that_goes_away_while_it_is_written_to(tmp_path: Path, s3: FaultyProxy) -> None:
    machine = Machine(tmp_path / "a", "s3://bucket")

    def making(folder: Path) -> None:
        make(folder)
        s3.fault = "gone"

    machine.run(making)
    assert "not written: " in machine.troubles
    s3.fault = ""
    assert Machine(tmp_path / "b", "s3://bucket").run().origin == "miss"


def test_no_bucket_is_told(tmp_path: Path, s3: FaultyProxy) -> None:
    machine = Machine(tmp_path / "a", "s3://nothing-of-ours")
    assert machine.run().origin == "miss"
    assert "not written: " in machine.troubles
    misnamed = Machine(tmp_path / "b", "s3://no bucket")
    assert misnamed.run().origin == "miss"
    assert 'Parameter validation failed: Invalid bucket name "no bucket"' in misnamed.troubles
