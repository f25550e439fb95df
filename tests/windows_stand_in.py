"""What Windows refuses and POSIX allows, refused here: `pytest -p tests.windows_stand_in` runs any test so.

For code of the package alone, `sys.platform` is "win32", and `os` and `signal` lack what they lack there. For the whole
process, a file that is open or mapped is neither renamed nor deleted, nor a folder with one in it; a name that exists
is no target of a rename; and nothing is made whose name Windows does not take.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = "pytest_trtcheck"
POSIX_ALONE = {
    "os": re.compile(
        r"killpg|fork|forkpty|[gs]et(pgid|pgrp|sid|uid|gid|euid|egid|resuid|groups|priority)|getloadavg|sched_\w+|wait"
        r"[34]|waitid|W[A-Z]+|mkfifo|mknod|O_(NONBLOCK|CLOEXEC|DIRECTORY|NOFOLLOW|SYNC)|statvfs|fstatvfs|uname|sysconf|"
        r"l?chown|lchmod|fchown|nice|pread|pwrite|posix_\w+|register_at_fork|memfd_create|confstr|pathconf|ttyname|EX_\w+"
    ),
    "signal": re.compile(
        r"SIG(KILL|ALRM|HUP|QUIT|USR[12]|CHLD|CONT|STOP|TSTP|PIPE|BUS|TRAP)|alarm|setitimer|pthread_\w+|sig\w*wait\w*|pause"
    ),
}
_ILLEGAL = re.compile(r'[<>:"|?*\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)
_LONGEST_NAME = 255
_frame = sys._getframe


class _OfWindows(ModuleType):
    """A module that lacks some names for the package."""

    def __getattribute__(self, name: str) -> Any:
        if _frame(1).f_globals.get("__name__", "").startswith(PACKAGE):
            own = ModuleType.__getattribute__(self, "__name__")
            if own == "sys" and name == "platform":
                return "win32"
            if own in POSIX_ALONE and POSIX_ALONE[own].fullmatch(name):
                raise AttributeError(f"module {own!r} has no attribute {name!r} on Windows")
        return ModuleType.__getattribute__(self, name)


def held(path: Path) -> str | None:
    """The file at or below `path` that this process has open or mapped; None where there is none."""
    root = os.path.realpath(path.parent) + "/" + path.name
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found.append(str(link.readlink()))
    with Path("/proc/self/maps").open(encoding="utf-8") as maps:
        found += [line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count("/")]
    return next((each for each in found if each == root or each.startswith(root + "/")), None)


def _refuse(path: Any, doing: str) -> None:
    if (file := held(Path(os.fsdecode(path)))) is not None:
        raise PermissionError(errno.EACCES, f"Windows would not {doing}: it is in use ({file})", os.fsdecode(path))


def _in_use(function: Callable[..., Any], doing: str) -> Callable[..., Any]:
    def checked(path: Any, *rest: Any, **named: Any) -> Any:
        if str(path).endswith(".lock"):
            return function(path, *rest, **named)  # On Windows filelock deletes it itself, once it has let go of it.
        # With `dir_fd` a name is relative to an open folder, as shutil.rmtree's are, which holds that folder open.
        if not named.get("dir_fd"):
            _refuse(path, doing)
            if doing.startswith("rename") and rest:
                target = os.fsdecode(rest[0])
                if os.path.lexists(target) and (doing == "rename" or Path(target).is_dir()):
                    raise FileExistsError(errno.EEXIST, "Windows would not rename to what exists", target)
                if doing != "rename":
                    _refuse(target, "replace")
        return function(path, *rest, **named)

    return checked


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        path, _, flags = arguments
        made = isinstance(path, (str, bytes)) and bool(flags & os.O_CREAT)
    else:
        path = arguments[0] if arguments else None
        made = event == "os.mkdir"
    if not made:
        return
    name = Path(os.fsdecode(path)).name
    if _ILLEGAL.search(name) or len(name) > _LONGEST_NAME:
        raise OSError(errno.EINVAL, "Windows would not take this name", name)


def pytest_configure() -> None:
    """Be Windows from now on."""
    for module in (os, signal, sys):
        module.__class__ = _OfWindows
    for name, doing in {"rename": "rename", "replace": "rename over", "unlink": "delete", "remove": "delete"}.items():
        setattr(os, name, _in_use(getattr(os, name), doing))
    sys.addaudithook(_audit)
