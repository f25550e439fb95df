"""The cache in one process: keys, entries, damage, eviction, listing. Several processes: test_cache_processes.py."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pytest_trtcheck.cache import (
    Cache,
    Entry,
    Key,
    StoredEntry,
    directory,
    hash_bytes,
    hash_file,
    hashing,
    manifest,
    scratch_folder,
)
from pytest_trtcheck.cache.key import describe_change
from pytest_trtcheck.cache.listing import stored_entry
from pytest_trtcheck.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT = bytes(range(256)) * 8


def key(subject: str = "net", kind: str = "engine", **parts: str) -> Key:
    return Key(kind, subject, {"precision": "fp16", **parts})


def writes(content: bytes = CONTENT, name: str = "engine.plan") -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return make


def never(directory: Path) -> None:
    raise AssertionError(f"made again: {directory}")


def files_below(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def directory_of(root: Path, wanted: Key) -> Path:
    return root / "v1" / "entries" / wanted.kind / wanted.digest


def unfinished(root: Path) -> list[Path]:
    return list((root / "v1" / "work").iterdir())


def let_rest(path: Path, hours: float) -> None:
    """Let the last use of an entry, or the start of unfinished work, be so long ago."""
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


precise_stamp = hashing.stamp


def coarse_stamp(file: Path | int) -> hashing.Stamp:
    """The file times of a file system that only knows whole seconds."""
    known = precise_stamp(file)
    return known._replace(mtime_ns=known.mtime_ns // 10**9 * 10**9, ctime_ns=known.ctime_ns // 10**9 * 10**9)


# Keys

texts = st.text(alphabet=st.sampled_from('a1:0,;="\\\n\x00é\ud800\udc00'), max_size=4)
parts = st.dictionaries(texts, texts, max_size=3)


@given(parts, parts, st.sampled_from(["engine", "lowered"]), st.sampled_from(["engine", "lowered"]))
@example({"a": "1:b1:c"}, {"a": "1", "b": "c"}, "engine", "engine")
@example({"a": "\ud800\udc00"}, {"a": "\U00010000"}, "engine", "engine")
def test_digests_are_equal_exactly_when_kind_and_parts_are(
    one: dict[str, str], other: dict[str, str], kind: str, other_kind: str
) -> None:
    same = (kind, one) == (other_kind, other)
    assert (Key(kind, "s", one).digest == Key(other_kind, "s", other).digest) is same


@given(parts, st.data())
def test_any_change_in_any_part_changes_the_digest(one: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*one, "a new one"]))
    changed = {**one, name: one.get(name, "") + data.draw(st.text(min_size=1))}
    assert Key("engine", "s", one).digest != Key("engine", "s", changed).digest


def test_neither_subject_nor_order_is_part_of_the_digest() -> None:
    assert Key("engine", "a", {"x": "1", "y": "2"}).digest == Key("engine", "b", {"y": "2", "x": "1"}).digest


def test_a_key_does_not_follow_the_mapping_it_was_made_from() -> None:
    given_parts = {"precision": "fp16"}
    made = Key("engine", "net", given_parts)
    given_parts["precision"] = "int8"
    assert made.parts == {"precision": "fp16"}
    assert made == key()
    assert hash(made) == hash(key())


@pytest.mark.parametrize("kind", ["", "../engine", "Engine", "a/b", "a b"])
def test_a_kind_is_an_identifier(kind: str) -> None:
    with pytest.raises(ValueError, match="kind"):
        Key(kind, "net", {})


def test_parts_are_strings() -> None:
    with pytest.raises(TypeError, match="batch"):
        Key("engine", "net", {"batch": 1})  # type: ignore[dict-item]


@given(st.text(), st.text())
@example("a" * 64, "a" * 63 + "b")
@example("x" * 100, "x" * 101)
def test_a_described_change_shows_a_difference(old: str, new: str) -> None:
    if old != new and "(none)" not in (old, new) and "''" not in (old, new):
        text = describe_change({"p": old}, {"p": new})
        before, after = text.removeprefix("p: ").rsplit(" → ", 1) if " → " not in old + new else ("", "different")
        assert before != after


# Making and taking


def test_the_first_call_makes_and_the_next_takes(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.get(key()) is None
    assert not (tmp_path / "c").exists()
    made = cache.get_or_make(key(), writes())
    assert not made.cached
    assert made.miss_reason == "first build of net (engine)"
    for taken in (cache.get_or_make(key(), never), cache.get(key()), Cache(tmp_path / "c").get(key())):
        assert taken is not None
        assert (taken.cached, taken.miss_reason, taken.path) == (True, None, made.path)
        assert taken.make_s == made.make_s > 0
        assert (taken.path / "engine.plan").read_bytes() == CONTENT


def test_an_entry_is_found_by_its_digest_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.find("engine", key().digest) is None
    assert not (tmp_path / "c").exists()
    made = cache.get_or_make(key(), writes())
    found = Cache(tmp_path / "c").find("engine", key().digest)
    assert found is not None
    assert (found.path, found.key, found.cached) == (made.path, made.key, True)
    assert cache.find("lowered", key().digest) is None
    assert cache.find("engine", key(batch="1").digest) is None
    (made.path / "engine.plan").write_bytes(CONTENT[:-1])
    assert cache.find("engine", key().digest) is None
    (made.path.parent / "manifest").write_bytes(b"spoiled")
    assert cache.find("engine", key().digest) is None


def test_folders_and_any_file_name_are_kept(tmp_path: Path) -> None:
    def make(directory: Path) -> None:
        (directory / "weights" / "empty").mkdir(parents=True)
        (directory / "weights" / "manifest").write_bytes(b"{}")
        (directory / "manifest").write_bytes(b"[]")
        Path(os.fsdecode(os.fsencode(directory) + b"/\xff")).write_bytes(b"no UTF-8")

    cache = Cache(tmp_path)
    path = cache.get_or_make(key(), make).path
    assert cache.get_or_make(key(), never).path == path
    (path / "weights" / "manifest").write_bytes(b"[]")
    assert cache.get(key()) is None


def test_a_renamed_subject_is_the_same_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key("net"), writes())
    assert cache.get_or_make(key("other"), never).cached


def test_what_make_raises_is_passed_on_and_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def fails(directory: Path) -> None:
        (directory / "half").write_bytes(CONTENT)
        raise LookupError("as it was")

    with pytest.raises(LookupError, match="as it was"):
        cache.get_or_make(key(), fails)
    assert files_below(tmp_path) == {"CACHEDIR.TAG", ".gitignore"}
    assert not unfinished(tmp_path)
    assert cache.get_or_make(key(), writes()).miss_reason == "first build of net (engine)"


def test_an_os_error_of_makes_own_is_passed_on_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no-such-model\.onnx"):
        Cache(tmp_path / "c").get_or_make(key(), lambda _: (tmp_path / "no-such-model.onnx").read_bytes())


def test_only_regular_files_are_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="link"):
        Cache(tmp_path).get_or_make(key(), lambda directory: (directory / "link").symlink_to("/"))


def test_one_make_may_ask_for_another_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def make(directory: Path) -> None:
        lowered = cache.get_or_make(key(kind="lowered"), writes(b"lowered"))
        (directory / "engine.plan").write_bytes((lowered.path / "engine.plan").read_bytes())

    assert (cache.get_or_make(key(), make).path / "engine.plan").read_bytes() == b"lowered"


def test_threads_share_one_make(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made: list[Path] = []
    entries: list[Entry] = []

    def make(directory: Path) -> None:
        made.append(directory)
        time.sleep(0.05)
        writes()(directory)

    threads = [threading.Thread(target=lambda: entries.append(cache.get_or_make(key(), make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert sorted(entry.cached for entry in entries) == [False, True, True, True]


def test_lock_files_and_work_do_not_pile_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10_000)
    for number in range(20):
        cache.get_or_make(key(number=str(number)), writes())
    assert not unfinished(tmp_path)


def test_work_that_nobody_holds_goes_after_a_day_and_lock_files_at_once(tmp_path: Path) -> None:
    Cache(tmp_path).get_or_make(key(), writes())
    work = tmp_path / "v1" / "work"
    for name in ("old", "new"):
        (work / f"{name}-work" / "entry" / "files").mkdir(parents=True)
        (work / f"{name}-work" / "entry" / "files" / "engine.plan").write_bytes(CONTENT)
        (work / f"{name}.lock").touch()
    for path in unfinished(tmp_path):
        let_rest(path, 25 if path.name.startswith("old") else 23)
    forget_weight(tmp_path)
    Cache(tmp_path).get_or_make(key(n="2"), writes())
    assert {path.name for path in unfinished(tmp_path)} == {"new-work"}


def test_the_lock_file_of_the_dead_is_no_leftover_while_it_is_held_again(tmp_path: Path) -> None:
    Cache(tmp_path).get_or_make(key(), writes())
    lock = tmp_path / "v1" / "work" / f"engine-{key(n='2').digest}.lock"
    lock.touch()
    let_rest(lock, 25)

    def make(directory: Path) -> None:
        Cache(tmp_path).get_or_make(key(n="3"), writes())
        assert lock.exists()

    Cache(tmp_path).get_or_make(key(n="2"), make)
    assert not unfinished(tmp_path)


def test_entries_can_be_read_by_those_who_may_read_the_cache(tmp_path: Path) -> None:
    path = Cache(tmp_path).get_or_make(key(), writes()).path
    (tmp_path / "by hand").mkdir()
    expected = (tmp_path / "by hand").stat().st_mode
    assert path.stat().st_mode == path.parent.stat().st_mode == path.parent.parent.stat().st_mode == expected


def test_the_cache_may_be_deleted_under_our_feet(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    entry = cache.get_or_make(key(), writes())
    shutil.rmtree(tmp_path / "c")
    assert cache.get(key()) is None
    entry.write_extra("jit", b"to nobody")
    assert not cache.get_or_make(key(), writes()).cached
    assert cache.get_or_make(key(), never).cached


def test_a_restored_cache_may_lack_empty_directories(tmp_path: Path) -> None:
    Cache(tmp_path).get_or_make(key(), writes())
    (tmp_path / "v1" / "work").rmdir()
    entry = Cache(tmp_path).get_or_make(key(), never)
    entry.write_extra("jit", b"compiled")
    assert entry.read_extra("jit") == b"compiled"


# Why it was made


def test_the_miss_reason_names_what_changed_from_the_nearest_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key(model="3fa9" * 16, tensorrt="10.8", gpu="T4"), writes())
    cache.get_or_make(key(model="77c1" * 16, tensorrt="11.4", gpu="T4"), writes())
    cache.get_or_make(key("another", model="77c1" * 16, tensorrt="11.5", gpu="T4"), writes())
    made = cache.get_or_make(key(model="77c1" * 16, tensorrt="11.5", gpu="A100"), writes())
    assert made.miss_reason == "gpu: T4 → A100; tensorrt: 11.4 → 11.5"
    made = cache.get_or_make(key(model="3fa8" * 16, tensorrt="10.8", gpu="T4"), writes())
    assert made.miss_reason == "model: 3fa93fa9 → 3fa83fa8"


def test_the_miss_reason_names_parts_that_come_and_go(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key(tf32="true"), writes())
    assert cache.get_or_make(key(plugin="a.so"), writes()).miss_reason == "plugin: (none) → a.so; tf32: true → (none)"


def test_other_kinds_and_other_subjects_give_no_reason(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key(kind="lowered"), writes())
    cache.get_or_make(key("other", model="1"), writes())
    assert cache.get_or_make(key(model="2"), writes()).miss_reason == "first build of net (engine)"


def test_long_values_are_cut_around_the_difference() -> None:
    old = "profile[" + "x" * 100 + "1" + "y" * 100
    text = describe_change({"shapes": old}, {"shapes": old.replace("1", "2")})
    assert text == f"shapes: …{'x' * 10}1{'y' * 29}… → …{'x' * 10}2{'y' * 29}…"


def test_many_changes_are_named_without_their_values() -> None:
    old = dict.fromkeys("abcdef", "1")
    assert describe_change(old, dict.fromkeys("abcdef", "2")) == "a: 1 → 2; b: 1 → 2; c: 1 → 2; d: 1 → 2; and e, f"


# Damage


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("files/engine.plan", lambda path: flip(path, 1000), "engine.plan does not match its checksum"),
    ("files/engine.plan", truncate, "engine.plan has 2,047 bytes instead of 2,048"),
    ("files/engine.plan", Path.unlink, "engine.plan is missing"),
    ("files/engine.plan", replace_by_folder, "engine.plan cannot be read: not a regular file"),
    ("files/engine.plan", replace_by_link, "not a regular file"),
    ("files", shutil.rmtree, "engine.plan is missing"),
    ("manifest", Path.unlink, "manifest is missing"),
    ("manifest", replace_by_folder, "manifest cannot be read: Is a directory"),
    ("manifest", truncate, "manifest does not match its checksum"),
    ("manifest", lambda path: path.write_bytes(b""), "manifest does not match its checksum"),
    ("manifest", lambda path: path.write_bytes(b"[1]"), "manifest does not match its checksum"),
    ("manifest", lambda path: path.write_text(path.read_text().replace("2048", "2049")), "manifest does not match"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE, ids=[f"{row[0]}-{row[2]}" for row in DAMAGE])
@pytest.mark.parametrize("same_process", [True, False])
def test_a_damaged_entry_is_made_again(
    tmp_path: Path, name: str, damage: Callable[[Path], object], reason: str, same_process: bool
) -> None:
    cache = Cache(tmp_path)
    entry = cache.get_or_make(key(), writes())
    damage(entry.path.parent / name)
    if not same_process:
        cache = Cache(tmp_path)
    assert cache.get(key()) is None
    again = cache.get_or_make(key(), writes())
    assert not again.cached
    assert again.miss_reason is not None
    assert again.miss_reason.startswith("the cached entry was damaged: ")
    assert reason in again.miss_reason
    assert (cache.get_or_make(key(), never).path / "engine.plan").read_bytes() == CONTENT
    assert not unfinished(tmp_path)


def test_what_is_replaced_is_deleted_once_the_other_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Cache(tmp_path, secret=b"1" * 16).get_or_make(key(), writes())
    was_there: list[bool] = []
    remove = shutil.rmtree

    def removing(path: Path, **more: Any) -> None:
        was_there.append(entry.path.is_dir())
        remove(path, **more)

    monkeypatch.setattr("pytest_trtcheck.record.held.shutil.rmtree", removing)
    again = Cache(tmp_path, secret=b"2" * 16).get_or_make(key(), writes())
    assert again.origin == "miss"
    assert again.miss_reason == "the cached entry was not used: manifest is not signed with the key of --trt-cache-key"
    assert was_there
    assert all(was_there)


def test_no_flipped_or_lost_byte_is_ever_served(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made = cache.get_or_make(key(), writes(b"content"))
    for damaged in (made.path / "engine.plan", made.path.parent / "manifest"):
        whole = damaged.read_bytes()
        for position in range(len(whole)):
            flipped = whole[position] ^ 1 << position % 8
            damaged.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
            assert cache.get(key()) is None
            damaged.write_bytes(whole[:position])
            assert cache.get(key()) is None
        damaged.write_bytes(whole)
        assert cache.get(key()) is not None


def test_an_entry_under_another_entrys_name_is_damaged(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    fp16, int8 = key(), key(precision="int8")
    path = cache.get_or_make(fp16, writes()).path
    shutil.copytree(path.parent, path.parent.parent / int8.digest)
    made = cache.get_or_make(int8, writes(b"int8"))
    assert made.miss_reason == "the cached entry was damaged: manifest belongs to another entry"


def test_damage_is_noticed_after_the_entry_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_NS", 10_000_000)
    cache = Cache(tmp_path)
    path = cache.get_or_make(key(), writes()).path / "engine.plan"
    time.sleep(0.05)
    assert cache.get(key()) is not None

    def must_not_read(path: Path) -> tuple[int, str]:
        raise AssertionError(f"read again: {path}")

    with monkeypatch.context() as patch:
        patch.setattr("pytest_trtcheck.cache.manifest.checksum", must_not_read)
        assert cache.get(key()) is not None
    status = path.stat()
    flip(path, 7)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert cache.get(key()) is None


def test_damage_right_after_the_check_is_noticed_where_file_times_are_coarse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("manifest", "store"):
        monkeypatch.setattr(f"pytest_trtcheck.cache.{module}.stamp", coarse_stamp)
    cache = Cache(tmp_path)
    path = cache.get_or_make(key(), writes()).path / "engine.plan"
    for position in range(10):
        assert cache.get(key()) is not None
        flip(path, position)
        assert cache.get(key()) is None
        flip(path, position)


# Extras


def test_extras_are_kept_beside_the_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry = cache.get_or_make(key(), writes())
    assert entry.read_extra("jit.cache") is None
    entry.write_extra("jit.cache", b"first")
    entry.write_extra("jit.cache", b"second")
    other = Cache(tmp_path).get_or_make(key(), never)
    assert other.read_extra("jit.cache") == b"second"
    assert {path.name for path in entry.path.iterdir()} == {"engine.plan"}


@pytest.mark.parametrize("damage", [truncate, lambda path: flip(path, 5), lambda path: path.write_bytes(b"")])
def test_a_damaged_extra_is_absent_and_does_no_harm(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    cache = Cache(tmp_path)
    entry = cache.get_or_make(key(), writes())
    entry.write_extra("jit.cache", b"compiled")
    damage(entry.path.parent / "extra" / "jit.cache")
    assert cache.get_or_make(key(), never).read_extra("jit.cache") is None
    entry.write_extra("jit.cache", b"again")
    assert entry.read_extra("jit.cache") == b"again"


def test_an_extra_that_is_not_understood_is_absent(tmp_path: Path) -> None:
    entry = Cache(tmp_path).get_or_make(key(), writes())
    entry.write_extra("a.json", b"[" * 100_000)
    assert entry.recall("a.json", json.loads) is None
    entry.write_extra("a.json", b"[1]")
    assert entry.recall("a.json", json.loads) == [1]
    assert entry.recall("b.json", json.loads) is None


@pytest.mark.parametrize("name", ["jit.cache", "sub/jit.cache", "link"])
@pytest.mark.parametrize("secret", [None, b"0123456789abcdef"])
def test_an_entry_with_a_file_that_nobody_stored_is_made_again(tmp_path: Path, name: str, secret: bytes | None) -> None:
    """A signed entry, too: what is looked for by its name, such as kernels that run, must have been stored there."""
    cache = Cache(tmp_path, secret=secret)
    path = cache.get_or_make(key(), writes()).path / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to(tmp_path)
    else:
        path.write_bytes(b"compiled by somebody else")
    for each in (cache, Cache(tmp_path, secret=secret)):
        assert each.get(key()) is None
    made = cache.get_or_make(key(), writes())
    assert f"{name} was not stored there" in str(made.miss_reason)
    assert not os.path.lexists(path)


@pytest.mark.parametrize("text", [f"{'9' * 400}\n1\n", "{now}\n" + "8" * 400, "x", "\0"])
def test_a_weight_that_is_none_is_looked_at_again(tmp_path: Path, text: str) -> None:
    cache = Cache(tmp_path, max_bytes=10**6)
    cache.get_or_make(key(), writes())
    (tmp_path / "v1/weight").write_text(text.format(now=int(time.time())))
    assert cache.get_or_make(key("other", precision="fp32"), writes()).origin == "miss"


@pytest.mark.parametrize("name", ["", "..", "../manifest", "/etc/passwd", ".hidden", "a/b"])
def test_an_extra_has_a_plain_name(tmp_path: Path, name: str) -> None:
    entry = Cache(tmp_path).get_or_make(key(), writes())
    with pytest.raises(ValueError, match="plain file name"):
        entry.write_extra(name, b"")


# The size limit


def forget_weight(root: Path) -> None:
    """As an hour later."""
    (root / "v1" / "weight").unlink()


def fill(cache: Cache, *names: str, size: int = 10_000) -> None:
    for name in names:
        cache.get_or_make(key(n=name), writes(bytes(size)))


def present(cache: Cache) -> set[str]:
    return {entry.parts["n"] for entry in cache.entries()}


def test_what_was_not_used_for_longest_is_evicted_first(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a", "b", "c")
    for age, name in enumerate(["a", "c", "b"]):  # "a" was used last
        let_rest(directory_of(tmp_path, key(n=name)), age + 2)
    cache = Cache(tmp_path, max_bytes=35_000)
    fill(cache, "d")
    assert present(cache) == {"a", "c", "d"}
    Cache(tmp_path).get_or_make(key(n="c"), never)
    fill(Cache(tmp_path, max_bytes=35_000), "e")
    assert present(cache) == {"c", "d", "e"}


def test_what_was_used_within_the_last_hour_stays(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a", "b", "c")
    let_rest(directory_of(tmp_path, key(n="a")), 0.9)
    let_rest(directory_of(tmp_path, key(n="b")), 1.1)
    let_rest(directory_of(tmp_path, key(n="c")), 30)
    assert Cache(tmp_path).get(key(n="c")) is not None
    cache = Cache(tmp_path, max_bytes=0)
    fill(cache, "d")
    assert present(cache) == {"a", "c", "d"}


def test_what_this_process_uses_stays(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a", "b")
    cache = Cache(tmp_path, max_bytes=0)
    used = cache.get_or_make(key(n="a"), never)
    fill(cache, "c")
    for name in "abc":
        let_rest(directory_of(tmp_path, key(n=name)), 30)
    fill(cache, "d")
    assert present(cache) == {"a", "c", "d"}
    assert (used.path / "engine.plan").exists()


def test_what_is_used_while_others_are_evicted_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the listing and the eviction another process looks "a" up."""
    fill(Cache(tmp_path), "a", "b")
    for name in "ab":
        let_rest(directory_of(tmp_path, key(n=name)), 30)

    def list_then_use(directory: Path) -> StoredEntry | None:
        found = stored_entry(directory)
        if directory.name == key(n="a").digest:
            Cache(tmp_path).get_or_make(key(n="a"), never)
        return found

    monkeypatch.setattr("pytest_trtcheck.cache.store.stored_entry", list_then_use)
    cache = Cache(tmp_path, max_bytes=0)
    fill(cache, "c")
    assert present(cache) == {"a", "c"}


def test_entries_are_looked_at_once_an_hour_and_where_what_was_added_exceeds_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[int] = []
    stored = Cache._stored

    def listing(cache: Cache) -> list[StoredEntry]:
        found = stored(cache)
        listed.append(len(found))
        return found

    monkeypatch.setattr(Cache, "_stored", listing)
    for name in "abcdefgh":  # each by a process of its own, as it were
        fill(Cache(tmp_path, max_bytes=23_000), name, size=4_000)
    assert listed == [1, 6, 7, 8]
    fill(Cache(tmp_path, max_bytes=1_000_000), *"ijk")
    assert listed == [1, 6, 7, 8]
    forget_weight(tmp_path)
    fill(Cache(tmp_path, max_bytes=1_000_000), *"lmn")
    assert listed == [1, 6, 7, 8, 12]


def test_another_limit_or_a_jit_cache_is_no_way_around_the_limit(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1_000_000)
    fill(cache, "a", "b")
    for name in "ab":
        let_rest(directory_of(tmp_path, key(n=name)), 2)
    fill(Cache(tmp_path, max_bytes=25_000), "c")
    assert len(present(cache)) == 2
    entry = cache.get(key(n="c"))
    assert entry is not None
    entry.write_extra("jit", bytes(1_000_000))
    let_rest(entry.path.parent, 2)
    fill(Cache(tmp_path, max_bytes=1_000_000), "d")
    assert present(cache) == {"d"}


def test_unfinished_work_counts(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a")
    let_rest(directory_of(tmp_path, key(n="a")), 2)
    work = tmp_path / "v1" / "work" / "tmp1"
    work.mkdir()
    (work / "engine.plan").write_bytes(bytes(100_000))
    forget_weight(tmp_path)
    cache = Cache(tmp_path, max_bytes=110_000)
    fill(cache, "b")
    assert present(cache) == {"b"}


def test_a_time_in_the_future_protects_nothing(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a", "b", "c")
    let_rest(directory_of(tmp_path, key(n="a")), -1000)
    for name in "bc":
        let_rest(directory_of(tmp_path, key(n=name)), 2)
    work = tmp_path / "v1" / "work" / "tmp1"
    work.mkdir()
    let_rest(work, -1000)
    forget_weight(tmp_path)
    cache = Cache(tmp_path, max_bytes=35_000)
    fill(cache, "d")
    assert present(cache) == {"b", "c", "d"}
    assert not unfinished(tmp_path)


def test_who_waits_for_another_says_so(tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    def slowly(folder: Path) -> None:
        begun.set()
        assert go.wait(30)
        writes()(folder)

    @contextmanager
    def noted(line: str) -> Iterator[None]:
        told.append(line)
        go.set()
        yield

    told: list[str] = []
    maker = threading.Thread(target=Cache(tmp_path).get_or_make, args=(key(), slowly))
    maker.start()
    assert begun.wait(30)
    waiter = Cache(tmp_path)
    waiter.during = noted
    assert waiter.get_or_make(key(), writes()).cached
    maker.join()
    assert told == ["waiting for another process that is building the engine of net in fp16"]


USER = """
import sys, time
from pathlib import Path
from pytest_trtcheck.cache import Cache
entry = Cache(sys.argv[1]).find("engine", sys.argv[2])
assert entry
print("used", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows refuses to remove what is open instead")
@pytest.mark.parametrize("how", ["evicted", "cleared"])
def test_what_another_process_uses_is_neither_evicted_nor_cleared(tmp_path: Path, how: str) -> None:
    fill(Cache(tmp_path), "a", "b")

    def remove() -> None:
        for name in "ab":
            if directory_of(tmp_path, key(n=name)).exists():
                let_rest(directory_of(tmp_path, key(n=name)), 30)
        if how == "cleared":
            Cache(tmp_path).clear()
        else:
            fill(Cache(tmp_path, max_bytes=0), "c")

    env = {**os.environ, "PYTHONPATH": str(Path(hashing.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", USER, str(tmp_path), key(n="a").digest], stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        remove()
        assert "a" in present(Cache(tmp_path))
        assert "b" not in present(Cache(tmp_path))
        process.kill()
    shutil.rmtree(directory_of(tmp_path, key(n="c")), ignore_errors=True)
    remove()
    assert "a" not in present(Cache(tmp_path))
    assert len(list((tmp_path / "v1" / "used").iterdir())) <= 1


KILLED = """
import os, signal, sys
from pytest_trtcheck.cache import Cache

def hook(event, given):
    name = os.readlink(f"/proc/self/fd/{given[0]}") if event == "fcntl.flock" else str(given[0])
    if event == sys.argv[3] and "/used/" in name and (event != "open" or given[2] & os.O_CREAT):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
assert Cache(sys.argv[1]).find("engine", sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("event", ["fcntl.flock", "os.remove"])
def test_a_process_that_is_killed_leaves_no_claim(tmp_path: Path, event: str) -> None:
    """Neither where it had not locked its list yet, nor where it was about to remove it."""
    fill(Cache(tmp_path), "a")
    env = {**os.environ, "PYTHONPATH": str(Path(hashing.__file__).parents[2])}
    found = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), key(n="a").digest, event], env=env, check=False
    )
    assert found.returncode == -signal.SIGKILL
    used = tmp_path / "v1" / "used"
    left = set(used.iterdir())
    assert left
    (tmp_path / "v1" / "work" / "engine-0.lock").touch()
    assert Cache(tmp_path).get(key(n="a")), "nothing is made"
    assert not left & set(used.iterdir())
    assert not unfinished(tmp_path)


def test_what_is_claimed_while_it_is_taken_away_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(Cache(tmp_path), "a")
    answers = iter([False, True])
    monkeypatch.setattr("pytest_trtcheck.cache.claims.Claims.is_claimed", lambda *_: next(answers))
    assert Cache(tmp_path).clear() == 0
    assert present(Cache(tmp_path)) == {"a"}


def test_a_new_cache_is_its_owners_alone(tmp_path: Path) -> None:
    fill(Cache(tmp_path / "above" / "cache"), "a")
    assert (tmp_path / "above" / "cache").stat().st_mode & 0o777 == 0o700


def test_damaged_entries_count_and_go(tmp_path: Path) -> None:
    fill(Cache(tmp_path), "a")
    directory = directory_of(tmp_path, key(n="a"))
    (directory / "manifest").unlink()
    let_rest(directory, 2)
    cache = Cache(tmp_path, max_bytes=15_000)
    fill(cache, "b")
    assert present(cache) == {"b"}


def test_extras_count(tmp_path: Path) -> None:
    first = Cache(tmp_path)
    fill(first, "a", "b")
    entry = first.get(key(n="b"))
    assert entry is not None
    entry.write_extra("jit", bytes(20_000))
    let_rest(entry.path.parent, 2)
    cache = Cache(tmp_path, max_bytes=35_000)
    fill(cache, "c")
    assert present(cache) == {"a", "c"}


# Listing and clearing


def test_entries_and_clear(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.entries() == []
    assert cache.clear() == 0
    assert not (tmp_path / "c").exists()
    cache.get_or_make(key("b"), writes())
    cache.get_or_make(key("a", n="1"), writes())
    cache.get_or_make(key("a", kind="lowered"), writes())
    assert [(entry.kind, entry.subject) for entry in cache.entries()] == [
        ("engine", "a"),
        ("engine", "b"),
        ("lowered", "a"),
    ]
    assert all(entry.bytes > len(CONTENT) and entry.last_used >= entry.created - 1 for entry in cache.entries())
    assert cache.clear() == 3
    assert cache.entries() == []
    assert cache.get(key("b")) is None
    assert not unfinished(tmp_path / "c")


def test_entries_in_a_lower_layer_of_overlayfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache in a container's image: the kernel renames its files, and refuses to rename its folders."""
    keys = [key(n=str(number)) for number in range(3)]
    for each in keys:
        Cache(tmp_path).get_or_make(each, writes())
    lower = {directory_of(tmp_path, each): directory_of(tmp_path, each).stat().st_ino for each in keys}
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self in lower and self.stat().st_ino == lower[self]:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    damaged, bare, _ = lower
    with (damaged / "files" / "engine.plan").open("ab") as file:
        file.write(b"!")
    (bare / "manifest").unlink()
    cache = Cache(tmp_path)
    assert [cache.get_or_make(each, writes()).origin for each in keys] == ["miss", "miss", "hit"]
    assert cache.problem is None
    assert not unfinished(tmp_path)
    assert Cache(tmp_path).clear() == 3
    assert not any(each.exists() for each in lower)


def test_clear_leaves_what_the_cache_did_not_put_there(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key(), writes())
    foreign = {"notes.txt", "v1/notes.txt", "v1/entries/notes.txt", "v1/entries/engine/notes.txt"}
    for name in foreign:
        (tmp_path / name).write_text("mine")
    assert cache.clear() == 1
    assert foreign <= files_below(tmp_path)
    assert cache.entries() == []


def test_the_root_says_what_it_is(tmp_path: Path) -> None:
    Cache(tmp_path / "deep" / "c").get_or_make(key(), writes())
    tag = (tmp_path / "deep" / "c" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    assert (tmp_path / "deep" / "c" / ".gitignore").read_text() == "*\n"


def test_the_table_fits_and_shows_what_a_person_looks_for(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=1 << 30)
    assert cache.describe() == f"trtcheck cache: {tmp_path}\nempty"
    engine = cache.get_or_make(
        key("resnet50", model="3fa9" * 16, gpu="NVIDIA T4", tf32="None", shapes="x" * 99), writes(bytes(3 << 20))
    )
    cache.get_or_make(key("a model with quite a long name that goes on and on", kind="calibration"), writes())
    damaged = cache.get_or_make(key("gone"), writes())
    (damaged.path.parent / "manifest").write_bytes(b"")
    let_rest(engine.path.parent, 73)
    for width in (60, 80, 100):
        text = cache.describe(width)
        lines = text.splitlines()[1:]
        assert max(map(len, lines)) <= width, text
        start = next(index for index, line in enumerate(lines) if line.startswith("resnet50 "))
        assert "3.0 MiB" in lines[start]
        assert lines[start].endswith("used 3 d ago")
        assert width < 80 or lines[start + 1].startswith("  engine: fp16, NVIDIA T4 ")
        assert "None" not in text
        assert "3fa9" not in text
        assert any(line.startswith("(damaged) ") for line in lines)
        assert any(line.startswith("a mod") and " on and on " in line for line in lines), text
        assert width < 80 or any(line.startswith("  calibrated ranges") for line in lines)
        assert lines[-1] == "3 entries, 3.0 MiB (limit 1.0 GiB)"


def test_the_largest_model_comes_first_and_its_entries_are_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.get_or_make(key("small.onnx", kind="reference"), writes())
    for number in range(3):
        cache.get_or_make(key("models/large.onnx", kind="reference", inputs=str(number)), writes(bytes(1 << 20)))
    cache.get_or_make(key("models/large.onnx in fp16", kind="blame"), writes())
    text = cache.describe(80)
    assert text.index("models/large.onnx ") < text.index("small.onnx ")
    assert re.search(r"^  reference outputs: fp16 +3 ×  ", text, re.MULTILINE)
    assert "  diagnosis" in text
    assert cache.models() == ["models/large.onnx", "small.onnx"]
    assert cache.clear("large.onnx") == 4
    assert cache.models() == ["small.onnx"]
    assert cache.clear("no*") == 0


# Hashes


def test_hashes_are_sha256(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT * 1000)
    assert hash_bytes(CONTENT) == hash_bytes(memoryview(CONTENT)) == hashlib.sha256(CONTENT).hexdigest()
    assert hash_file(path) == hash_file(str(path)) == hashlib.sha256(CONTENT * 1000).hexdigest()
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "missing")


def test_a_file_is_read_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_NS", 10_000_000)
    path = tmp_path / "model.onnx"
    path.write_bytes(CONTENT)
    time.sleep(0.05)
    before = hash_file(path)
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "sha256", lambda *_: pytest.fail("read again"))
        assert hash_file(path) == before
    status = path.stat()
    flip(path, 0)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert hash_file(path) != before


def test_a_file_that_keeps_changing_is_never_taken_for_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "stamp", coarse_stamp)
    path = tmp_path / "model.onnx"
    for number in range(30):
        content = b"%05d" % number
        with path.open("r+b" if number else "wb") as file:
            file.write(content)
        assert hash_file(path) == hashlib.sha256(content).hexdigest()


def test_nothing_heavy_is_imported_and_no_lock_is_taken_to_look_up(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    made = cache.get_or_make(key(), writes())
    code = f"""
import sys
from pytest_trtcheck.cache import Cache, Key
key = Key("engine", "net", {{"precision": "fp16"}})
entry = Cache({str(tmp_path)!r}, max_bytes=0).get_or_make(key, lambda _: 1 / 0)
assert entry.read_extra("jit") is None
print(entry.path, *({{"numpy", "onnx", "onnx_ir", "onnxruntime", "filelock", "hypothesis"}} & set(sys.modules)))
"""
    env = {**os.environ, "PYTHONPATH": str(Path(hashing.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == str(made.path)


def test_a_large_entry_is_read_once_and_again_when_anything_touched_it(tmp_path: Path) -> None:
    key = Key("engine", "m", {"a": "1"})
    content = bytes(2 << 20)
    entry = Cache(tmp_path / "cache").get_or_make(key, lambda folder: (folder / "plan").write_bytes(content))
    time.sleep(2.1)  # Younger files are not trusted to stay what they are.
    plan, verified = entry.path / "plan", entry.path.parent / "verified"
    assert not verified.exists()
    assert Cache(tmp_path / "cache").get(key) is not None
    assert verified.exists()
    assert Cache(tmp_path / "cache").get(key) is not None
    times = plan.stat().st_atime_ns, plan.stat().st_mtime_ns
    with plan.open("r+b") as file:
        file.write(b"x")
    os.utime(plan, ns=times)  # as a tool that keeps times does; ctime tells all the same
    assert Cache(tmp_path / "cache").get(key) is None
    again = Cache(tmp_path / "cache").get_or_make(key, lambda folder: (folder / "plan").write_bytes(content))
    assert "does not match its checksum" in (again.miss_reason or "")
    verified.parent.mkdir(exist_ok=True)
    verified.write_text("junk")
    assert Cache(tmp_path / "cache").get(key) is not None


# --- what may be remembered of a file --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed_s", "status_changed_s", "expected"),
    [
        (10.0, 10.0, True),
        (2.1, 2.1, True),
        (1.9, 10.0, False),
        # A file that was moved or copied here a moment ago, with the times of the old one: only its status is new.
        (10.0, 1.9, False),
        (-5.0, 10.0, False),
    ],
)
def test_only_what_was_left_alone_for_two_seconds_is_settled(
    changed_s: float, status_changed_s: float, expected: bool
) -> None:
    now = time.time_ns()
    times = [now - int(seconds * 1e9) for seconds in (changed_s, status_changed_s)]
    old = hashing.Stamp(1, 2, 3, now - 10**10, now - 10**10)
    found = hashing.Stamp(1, 2, 3, *times)
    assert hashing.settled(found) == expected
    assert hashing.settled(old, found) == hashing.settled(found, old) == expected


def test_a_file_that_changes_under_its_old_times_has_another_hash(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    first = hash_file(file)
    # Within the two seconds: as the times of the content are old, only those of the status tell.
    file.write_bytes(b"two")
    os.utime(file, (1, 1))
    assert hash_file(file) != first


def test_what_is_fresh_is_not_remembered_as_checked(tmp_path: Path) -> None:
    Cache(tmp_path / "cache", None).get_or_make(key(), writes(b"x" * (1 << 20)))
    assert Cache(tmp_path / "cache", None).get_or_make(key(), never).cached
    assert not list((tmp_path / "cache").rglob("verified"))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such permissions")
def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    fill(Cache(root), "a")

    def refusal() -> str:
        with pytest.raises(CacheError) as refused:
            Cache(root).get(key())
        return refused.value.message

    for mode in (0o707, 0o773):
        root.chmod(mode)
        assert f"{root} can be written by others (mode {mode:04o})" in refusal()
        assert Cache(root, trusts=True).get(key()) is None
        assert Cache(root, secret=b"s" * 32).get(key()) is None
    # Nobody gets to what lies inside of a folder that nobody else can enter.
    (root / "v1" / "entries").chmod(0o777)
    root.chmod(0o700)
    Cache(root).get(key())
    root.chmod(0o755)
    assert f"{root / 'v1' / 'entries'} can be written by others" in refusal()
    (root / "v1" / "entries").chmod(0o755)
    Cache(root).get(key())
    if os.geteuid() == 0:
        os.chown(root, -1, 65534)
        root.chmod(0o770)
        assert "can be written by others (mode 0770)" in refusal()
        os.chown(root, 65534, 0)
        assert f"{root} belongs to another account (uid 65534)" in refusal()


def signed(root: Path, secret: str = "a") -> Cache:
    return Cache(root, secret=secret.encode() * 32)


def test_signed_entries_are_used_and_no_others(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    made = signed(root).get_or_make(key(), writes(b"mine"))
    made.write_extra("kernels", b"mine")
    assert signed(root).get_or_make(key(), never).origin == "hit"
    assert signed(root).get_or_make(key(), never).read_extra("kernels") == b"mine"
    # Whoever has no key reads signed entries, as checksums hold for them too, but no code beside them.
    assert Cache(root).get_or_make(key(), never).read_extra("kernels") is None
    again = signed(root, "b").get_or_make(key(), writes(b"ours"))
    assert (again.origin, again.miss_reason) == (
        "miss",
        "the cached entry was not used: manifest is not signed with the key of --trt-cache-key",
    )
    assert again.read_extra("kernels") is None
    unsigned = Cache(tmp_path / "unsigned")
    unsigned.get_or_make(key(), writes(b"theirs"))
    assert signed(unsigned.root).get_or_make(key(), writes(b"ours")).origin == "miss"


def test_a_forged_entry_is_not_used_with_a_key(tmp_path: Path) -> None:
    """Whoever can write there writes checksums too, and what says that all was verified; only the key is not theirs."""
    root = tmp_path / "cache"
    large = b"x" * (1 << 20)
    entry = signed(root).get_or_make(key(), writes(large)).path.parent
    file = next((entry / "files").iterdir())
    file.write_bytes(b"y" * (1 << 20))
    found = manifest.read_manifest(entry)
    forged = replace(found, files=manifest.describe_files(entry / "files", hashed=True))
    manifest.write_manifest(entry, forged)
    for path in (file, entry / "manifest"):
        os.utime(path, (0, 0))
    manifest.remember_verified(entry, manifest.verify_files(entry, forged))
    assert Cache(root).get(key()) is not None
    assert signed(root).get(key()) is None
    # With its own manifest, what was changed is seen by what was signed.
    manifest.write_manifest(entry, found, b"a" * 32)
    assert signed(root).get(key()) is None
    file.write_bytes(large)
    assert signed(root).get(key()) is not None


def test_scratch_of_the_dead_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory.remove_scratch.cache_clear()
    ages = {"trtcheck-build-old": 25, "trtcheck-build-new": 23, "trtcheck-build-future": -1000, "x": 99}
    for name, hours in ages.items():
        (tmp_path / name / "inner").mkdir(parents=True)
        let_rest(tmp_path / name, hours)
    (tmp_path / "trtcheck-link").symlink_to(tmp_path / "x")
    with scratch_folder("build") as folder:
        assert Path(folder).name.startswith("trtcheck-build-")
    assert {path.name for path in tmp_path.iterdir()} == {"trtcheck-build-new", "trtcheck-link", "x"}
