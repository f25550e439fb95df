"""Errors in the user's words.

Everything that can go wrong because of what the user gave us (a file, an argument, a machine) is raised as one of
these. The plugin prints them without a traceback. They pickle, because xdist workers send them to the controller.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable


class CheckFailed(AssertionError):  # noqa: N818 - for `raises=`, where it stands beside CheckError
    """A check was made, and did not pass: a limit is exceeded, or a budget is not kept."""


class CheckError(Exception):
    """What was wrong, where, and what to do, as one text that is fit to be shown as it is.

    A check that ends with one of these was not made. No plain `xfail` hides it, only one whose `raises=` names it.

    Parameters
    ----------
    message
        What was wrong, naming the test argument, tensor or file.
    hint
        What to do about it; printed behind the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return first_line(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message


class ArgumentError(CheckError):
    """A marker argument, option or fixture value is unknown or ill-typed."""


class ModelError(CheckError):
    """The model file cannot be read or does not fit what was asked of it."""


class NothingComputedError(ModelError):
    """No operator of the model would be computed in the precision asked for."""


class InputError(CheckError):
    """Inputs do not fit the model: name, dtype, rank, size or values."""


class CalibrationError(CheckError):
    """Calibration data is missing, unreadable, or does not fit the model."""


class MissingDependencyError(CheckError):
    """A library that this check needs is not installed; the hint names the extra to install."""


class BuildError(CheckError):
    """TensorRT could not parse the model or build the engine; the message quotes all that it said."""


class UnsupportedTargetError(CheckError):
    """The GPU or the TensorRT library cannot serve what was asked; known before building."""


class GpuError(CheckError):
    """The GPU asked for is unknown, is not the one present, or failed while running."""

    poisoned: bool = False
    """Whether CUDA cannot be used any more in this process; only a new process can go on."""


class ServerError(CheckError):
    """An inference server does not answer, is too slow, or does not serve the model that was asked for."""


class CacheError(CheckError):
    """The cache directory cannot be used: not writable, full, or not ours."""


class CachePlaceError(CacheError):
    """The cache directory is ours, and its file system refuses or does not answer: another place can do instead."""


class ComparisonError(CheckError):
    """A metric could not be computed; never a pass."""


class ReportError(CheckError):
    """A report or baseline file cannot be read or written."""


class UnforeseenError(CheckError):
    """What no other class is for: an exception of another library, of the user's code, or of ours."""


def unforeseen(error: Exception, doing: str) -> CheckError:
    """An exception that is none of ours, in words; the traceback goes to the log.

    Parameters
    ----------
    doing
        What could not be done, with the file or test in it.
    """
    import logging
    import traceback
    from pathlib import PureWindowsPath

    if isinstance(error, CheckError):
        return error
    logging.getLogger(__package__).debug("%s", doing, exc_info=error)
    if isinstance(error, MemoryError):
        return UnforeseenError(
            f"{doing}: out of memory{f' ({error})' if str(error) else ''}", "give smaller inputs, batch= or shapes="
        )
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    frames = [(PureWindowsPath(each.filename), each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    ours = [(path, line) for path, line in frames if __package__ in path.parts]
    places = dict.fromkeys(f"{path.name}:{line}" for path, line in (*ours[-1:], *frames[-1:]))
    return UnforeseenError(
        f"{doing}: {type(error).__name__}: {first_line(error)} ({', '.join(places)})",
        "where that is not code of yours, it is a bug of pytest-trtcheck: please report it, with the model and the "
        "traceback that --log-level=DEBUG shows",
    )


_NO_MEMORY = re.compile(
    r"(?i)out[ _]?of[ _]?memory|bad.?alloc|failed to allocate|could not be allocated|ALLOC(?:ATION)?_FAILED|"
    r"cudaErrorMemoryAllocation"
)
_PERHAPS_NO_MEMORY = re.compile(
    r"(?i)(?:cudnn|cublas)\w*[^\n]{0,80}?(?:INTERNAL_ERROR|NOT_INITIALIZED|EXECUTION_FAILED)|(?:cudnn|cublas)(?:Lt)?Create\w*"
)


def lacked_memory(said: str) -> Literal["certainly", "perhaps"] | None:
    """Whether a library failed because memory ran out; cuDNN and cuBLAS call it an internal error, or say no more."""
    if _NO_MEMORY.search(said):
        return "certainly"
    return "perhaps" if _PERHAPS_NO_MEMORY.search(said) else None


_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)
_LONGEST = 200_000


def visible(text: str) -> str:
    r"""`text` as a terminal or a page may show it, whoever wrote it: nothing in it commands or hides.

    Control characters but line breaks and tabs, marks that turn the direction of writing, invisible ones, and bytes of
    a file name that are no UTF-8 are escaped as Python does. The middle of what nobody can read to its end is left out.

    >>> print(visible("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    """
    if len(text) > _LONGEST:
        half = _LONGEST // 2
        text = f"{text[:half]} … {len(text) - 2 * half:,} characters … {text[-half:]}"
    return text if text.isprintable() else _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_line(said: object) -> str:
    """The first line of a message; of an error that says nothing, what it is."""
    return (str(said).strip().splitlines() or ["" if isinstance(said, str) else type(said).__name__])[0]


def listed(names: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """The first of `names`, and how many more there are: "a, b, c and 4 more"."""
    shown = list(names)
    more = len(shown) - most
    between = separator if "\n" in separator else " "
    return separator.join(shown[:most]) + (f"{between}and {more} more" if more > 0 else "")


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "check"), plural(3, "check")
    ('1 check', '3 checks')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def suggestion(word: str, known: Iterable[str]) -> str:
    """A question naming the known word that is nearest, or nothing when none is near."""
    import difflib

    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def name_of(function: object) -> str:
    """What messages call a function, or an object that can be called."""
    return str(getattr(function, "__name__", None) or type(function).__name__)
