"""The failure bundle: a folder with all that a failed parity check rests on, from which it is replayed anywhere.

Nothing in it is code or a pickle: JSON, ONNX, and arrays as numpy's own format writes them. `bundle.json` is written
last, and the folder gets its name only once it is whole; every file's SHA-256 is in `bundle.json`, and its own as well.
"""

from pytest_trtcheck.bundle.reading import (
    BUNDLE_FILE,
    SCHEMA_VERSION,
    Bundle,
    changes,
    check_plugins,
    compare_with_recorded,
    is_bundle,
    read,
)
from pytest_trtcheck.bundle.spec_json import options_from_json, spec_from_json, spec_to_json
from pytest_trtcheck.bundle.writing import Bounds, Writer

__all__ = [
    "BUNDLE_FILE",
    "SCHEMA_VERSION",
    "Bounds",
    "Bundle",
    "Writer",
    "changes",
    "check_plugins",
    "compare_with_recorded",
    "is_bundle",
    "options_from_json",
    "read",
    "spec_from_json",
    "spec_to_json",
]
