"""A content-addressed store of directories that many processes may use at once.

It knows nothing of models and engines: a `Key` says what a directory was made from, `Cache.get_or_make` returns the
directory, making it when it is not there. Whatever is wrong with the place itself is a `CacheError`.
"""

from __future__ import annotations

from pytest_trtcheck.cache.directory import format_bytes, scratch_folder, user_folder
from pytest_trtcheck.cache.hashing import (
    HashedFile,
    hash_bytes,
    hash_code,
    hash_file,
    hash_files,
    hashed,
    require_same,
    settled,
    stamp,
)
from pytest_trtcheck.cache.key import Key
from pytest_trtcheck.cache.listing import StoredEntry
from pytest_trtcheck.cache.store import Cache, Entry, Origin

__all__ = [
    "Cache",
    "Entry",
    "HashedFile",
    "Key",
    "Origin",
    "StoredEntry",
    "format_bytes",
    "hash_bytes",
    "hash_code",
    "hash_file",
    "hash_files",
    "hashed",
    "require_same",
    "scratch_folder",
    "settled",
    "stamp",
    "user_folder",
]
