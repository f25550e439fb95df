"""Errors in the user's words.

Everything that can go wrong because of what the user gave us (a file, an argument, a machine) is raised as one of
these. The plugin prints them without a traceback. They pickle, because xdist workers send them to the controller.

Each has a code: one cause and one cure, which a section of docs/errors.md explains. The class has the code of its
usual cause; `code=` of what is raised names another.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import FrameType
    from typing import TypeGuard


Code = Literal[
    # What a check found.
    "outputs-differ",
    "outputs-not-finite",
    "precision-not-applied",
    "outputs-unstable",
    "score-dropped",
    "score-inconclusive",
    "budget-exceeded",
    "latency-inconclusive",
    "baseline-exceeded",
    "not-measured",
    "gpu-required",
    "evidence-required",
    # Arguments, options and tests.
    "argument-unknown",
    "argument-value",
    "argument-missing",
    "argument-conflict",
    "option-value",
    "marker-misplaced",
    "marker-unmatched",
    "output-unknown",
    "node-unknown",
    "search-impossible",
    "compared-with-itself",
    "configure-function",
    "benchmark-untimed",
    "user-code-failed",
    "user-code-result",
    "extension-failed",
    # Models.
    "model-unnamed",
    "model-missing",
    "model-kind",
    "model-damaged",
    "model-unsound",
    "model-weights",
    "model-size",
    "model-changed",
    "model-random",
    "model-refused",
    "model-signature",
    "model-unloadable",
    "module-failed",
    "export-failed",
    "export-inputs",
    "export-batch",
    "export-differs",
    "opset-conversion",
    "operator-library",
    "runtime-refused",
    "runtime-failed",
    "runtime-stopped",
    "out-of-memory",
    "too-many-files",
    "too-many-processes",
    "no-room",
    # Inputs.
    "input-names",
    "input-type",
    "input-shape",
    "input-values",
    "input-empty",
    "input-endless",
    "input-dimensions",
    "input-batch",
    "input-profile",
    "input-generated",
    "input-files",
    "kept-inputs",
    "labels-missing",
    "not-exercised",
    # Precision and calibration.
    "nothing-computed",
    "precision-carried",
    "precision-unsupported",
    "calibration-missing",
    "calibration-files",
    "calibration-fit",
    "calibration-values",
    "calibration-iterable",
    # References and outputs.
    "reference-fit",
    "reference-not-finite",
    "golden-unreadable",
    "golden-stale",
    "outputs-unpaired",
    "output-type",
    # Engines that others built.
    "engine-file",
    "engine-release",
    "engine-gpu",
    "engine-model",
    "engine-manifest",
    "engine-precision",
    "engine-weights",
    # Libraries, builds and GPUs.
    "library-missing",
    "library-broken",
    "build-failed",
    "build-option",
    "provider-failed",
    "gpu-unknown",
    "gpu-mismatch",
    "gpu-needed",
    "gpu-busy",
    "engine-failed",
    "engine-stopped",
    "cuda-broken",
    "timer-broken",
    # Servers, caches and files.
    "server-failed",
    "server-model",
    "triton-tensors",
    "cache-directory",
    "cache-unsafe",
    "cache-url",
    "report-unreadable",
    "report-version",
    "report-unwritable",
    "report-unsigned",
    "reports-unrelated",
    "baseline-file",
    "bundle-damaged",
    "bundle-model",
    "bundle-outputs",
    "bundle-code",
    "export-folder",
    "release-damaged",
    "unforeseen",
]
"""What can be wrong, by cause and cure. A code that was released keeps its name and its meaning."""
CODES: tuple[Code, ...] = get_args(Code)


@functools.cache
def address_of(code: str) -> str:
    """Where a code is explained: a path in the repository, or an address where the package knows one."""
    try:
        from importlib import metadata

        addresses = metadata.metadata("pytest-trtcheck").get_all("Project-URL") or []
    except (ImportError, OSError):  # not installed, or not readable any more: an error is told all the same
        addresses = []
    known = dict(each.split(", ", 1) for each in addresses)
    if "Documentation" in known:
        return f"{known['Documentation'].rstrip('/')}/errors.html#{code}"
    repository = f"{known['Repository'].rstrip('/')}/blob/HEAD/" if "Repository" in known else ""
    return f"{repository}docs/errors.md#{code}"


def explained_at(text: str, code: str | None) -> str:
    """A message, and where its code is explained."""
    return f"{text}\n  → see {address_of(code)}" if code else text


class CheckFailed(AssertionError):  # noqa: N818 - for `raises=`, where it stands beside CheckError
    """A check was made, and did not pass: a limit is exceeded, or a budget is not kept."""

    def __init__(self, message: str = "", code: Code | None = None) -> None:
        super().__init__(message)
        self.code = code

    def __str__(self) -> str:
        return explained_at(super().__str__(), self.code)


class CheckError(Exception):
    """What was wrong, where, and what to do, as one text that is fit to be shown as it is.

    A check that ends with one of these was not made. No plain `xfail` hides it, only one whose `raises=` names it.

    Parameters
    ----------
    message
        What was wrong, naming the test argument, tensor or file.
    hint
        What to do about it; printed behind the message.
    code
        Which cause it is; by default the usual one of the class.
    """

    usual_code: ClassVar[Code | None] = None

    def __init__(self, message: str, hint: str = "", *, code: Code | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self.code = code or self.usual_code

    @property
    def headline(self) -> str:
        """The first line of the message."""
        return first_line(self.message)

    @property
    def text(self) -> str:
        """Message and hint, for a text of which this is a part."""
        return f"{self.message}\n  → {self.hint}" if self.hint else self.message

    def __str__(self) -> str:
        return explained_at(self.text, self.code)

    def within(self, where: str) -> CheckError:
        """The same, with what it is about in front."""
        return type(self)(f"{where}: {self.message}", self.hint, code=self.code)


class ArgumentError(CheckError):
    """A marker argument, option or fixture value is unknown or ill-typed."""

    usual_code = "argument-value"


class ModelError(CheckError):
    """The model file cannot be read or does not fit what was asked of it."""

    usual_code: ClassVar[Code | None] = "model-unsound"


def closed(what: object, error: OSError) -> ModelError:
    """A model file that this account may not read, or not even look for."""
    where = f" ({os.fsdecode(error.filename)})" if isinstance(error.filename, (str, bytes)) else ""
    return ModelError(
        f"{what}: cannot be read: {error.strerror or error}{where}",
        "let this account read it and look into the folders on the way (ls -ld), or name another",
        code="model-missing",
    )


class NothingComputedError(ModelError):
    """No operator of the model would be computed in the precision asked for."""

    usual_code = "nothing-computed"


class InputError(CheckError):
    """Inputs do not fit the model: name, dtype, rank, size or values."""

    usual_code = "input-values"


class CalibrationError(CheckError):
    """Calibration data is missing, unreadable, or does not fit the model."""

    usual_code = "calibration-missing"


class MissingDependencyError(CheckError):
    """A library that this check needs is not installed; the hint names the extra to install."""

    usual_code = "library-missing"


class BuildError(CheckError):
    """TensorRT could not parse the model or build the engine; the message quotes all that it said."""

    usual_code = "build-failed"


class UnsupportedTargetError(CheckError):
    """The GPU or the TensorRT library cannot serve what was asked; known before building."""

    usual_code = "precision-unsupported"


class GpuError(CheckError):
    """The GPU asked for is unknown, is not the one present, or failed while running."""

    usual_code: ClassVar[Code | None] = "engine-failed"
    poisoned: bool = False
    """Whether CUDA cannot be used any more in this process; only a new process can go on."""


class ServerError(CheckError):
    """An inference server does not answer, is too slow, or does not serve the model that was asked for."""

    usual_code = "server-failed"


class CacheError(CheckError):
    """The cache directory cannot be used: not writable, full, or not ours."""

    usual_code = "cache-directory"


class CachePlaceError(CacheError):
    """The cache directory is ours, and its file system refuses or does not answer: another place can do instead."""


class ComparisonError(CheckError):
    """A metric could not be computed; never a pass."""

    usual_code = "outputs-unpaired"


class ReportError(CheckError):
    """A report or baseline file cannot be read or written."""

    usual_code = "report-unreadable"


class UnforeseenError(CheckError):
    """What no other class is for: an exception of another library, of the user's code, or of ours."""

    usual_code = "unforeseen"


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
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    frames = [(PureWindowsPath(each.filename), each.lineno) for each in traceback.extract_tb(error.__traceback__)]
    raised_in = frames[-1][0].name if frames else ""
    if (short := _ran_out(error, doing, raised_in)) is not None:
        return short
    if (own := _users_code(error)) is not None:
        return UnforeseenError(
            f"{doing}: {type(error).__name__}: {first_line(error)}",
            f"{own} raised it: correct it there, or give something else",
            code="user-code-failed",
        )
    if isinstance(error, OSError) and (unwritten := _unwritten(error, doing, raised_in)) is not None:
        return unwritten
    ours = [(path, line) for path, line in frames if __package__ in path.parts]
    places = dict.fromkeys(f"{path.name}:{line}" for path, line in (*ours[-1:], *frames[-1:]))
    return UnforeseenError(
        f"{doing}: {type(error).__name__}: {first_line(error)} ({', '.join(places)})",
        "where that is not code of yours, it is a bug of pytest-trtcheck: please report it, with the model and the "
        "traceback that --log-level=DEBUG shows",
    )


def _unwritten(error: OSError, doing: str, raised_in: str) -> CheckError | None:
    """What is said of a file that could not be made or written for want of room."""
    is_too_large = error.errno == errno.EFBIG and error.filename is None
    if not (raised_in == _MAKES_TEMPORARY or error.errno in FULL or is_too_large):
        return None
    what = "no temporary file can be made" if raised_in == _MAKES_TEMPORARY else "a file could not be written"
    where = f" ({error.filename})" if error.filename else ""
    helps = LARGER_FILES if is_too_large else "free some space there (or inodes: df -i)"
    return UnforeseenError(
        f"{doing}: {what}: {error.strerror or first_line(error)}{where}",
        f"{helps}, or name another folder: TMPDIR is the one for temporary files",
        code="no-room",
    )


LARGER_FILES = "raise the limit of a file's size (ulimit -f)"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says where there is no room."""
_MAKES_TEMPORARY = "tempfile.py"
"""It does nothing else: what it raises says that the folder for temporary files is gone, or takes nothing."""


def _ran_out(error: Exception, doing: str, raised_in: str) -> CheckError | None:
    """What is said where the process may have no more of something; None where that is not what happened."""
    if lacked_files(error):
        return UnforeseenError(f"{doing}: {error.strerror}{_most_files(error)}", _MORE_FILES, code="too-many-files")
    is_unstarted = isinstance(error, BlockingIOError) and raised_in == "subprocess.py"
    if is_unstarted or str(error) == "can't start new thread":
        return UnforeseenError(
            f"{doing}: no other process or thread could be started: {first_line(error)}",
            MORE_PROCESSES,
            code="too-many-processes",
        )
    if isinstance(error, OSError) and raised_in == "subprocess.py" and error.filename == sys.executable:
        return UnforeseenError(
            f"{doing}: Python could not be started in another process: {error.strerror} ({sys.executable})",
            "let it be there and run by this account: an environment that is made anew meanwhile has none",
            code="library-broken",
        )
    if isinstance(error, MemoryError) or lacked_memory(str(error)) == "certainly":
        return UnforeseenError(
            f"{doing}: out of memory{f' ({first_line(error)})' if str(error) else ''}",
            "give smaller inputs, batch= or shapes=, or the process more memory: fewer workers (-n), a higher limit of "
            "the container or shell (ulimit -v)",
            code="out-of-memory",
        )
    return None


MORE_PROCESSES = "raise the limit of processes (ulimit -u, or that of the container), or run fewer workers (-n)"
_MORE_FILES = "raise the limit (ulimit -n 4096) or run fewer workers; what leaks files shows in lsof -p PID"


def lacked_files(error: Exception) -> TypeGuard[OSError]:
    """Whether a file could not be opened because too many others are: that says nothing of the file."""
    return isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}


def _most_files(error: OSError) -> str:
    """What limits them, where it is the process and not the machine."""
    if sys.platform == "win32":
        return ""
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_known = error.errno == errno.EMFILE and most != resource.RLIM_INFINITY
    return f": this process may have {most} open" if is_known else ""


def _bound(frame: FrameType) -> object:
    """What the method of a frame is of, or its function's first argument; None where there is none."""
    names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
    return frame.f_locals.get(names[0]) if names else None


_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of libraries; the second is Debian's, of whichever Python."""


def _users_code(error: BaseException) -> str | None:
    """The user's own code that raised an error which reached us, by class, method and line; None where it is not so."""
    import traceback
    from pathlib import PureWindowsPath

    try:
        import sysconfig
    except OSError:  # too many open files: whose code it was is not found out, what went wrong is told all the same
        return None
    folders = (sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    not_theirs = ("<", *map(os.path.normcase, folders))
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        path = PureWindowsPath(file)
        if __package__ in path.parts:
            found = None
        elif not os.path.normcase(file).startswith(not_theirs) and _INSTALLED.isdisjoint(path.parts):
            bound = type(_bound(frame))
            owner = f"{bound.__name__}." if frame.f_code.co_name in vars(bound) else ""
            found = f"{owner}{frame.f_code.co_name} ({path.name}:{line})"
    return found


def given_as(error: BaseException, values: Mapping[str, object]) -> str | None:
    """Which of a user's objects raised an error, by the name that it was given as; None where none of them did."""
    import traceback

    # From the inside: the first argument of whoever read them may be another of the objects.
    for raising in reversed([_bound(frame) for frame, _ in traceback.walk_tb(error.__traceback__)]):
        for name, each in values.items():
            if raising is not None and each is raising:
                return name
    return None


# Texts, which `re` compiles when they are first needed: every pytest run loads this module.
_NO_MEMORY = (
    r"(?i)out[ _]?of[ _]?memory|bad.?alloc|(?:failed to|cannot) allocate|could not be allocated|ALLOC(?:ATION)?_FAILED|"
    r"cudaErrorMemoryAllocation|failed to map segment"
)
_PERHAPS_NO_MEMORY = (
    r"(?i)(?:cudnn|cublas)\w*[^\n]{0,80}?(?:INTERNAL_ERROR|NOT_INITIALIZED|EXECUTION_FAILED)|"
    r"(?:cudnn|cublas)(?:Lt)?Create\w*"
)


def lacked_memory(said: str) -> Literal["certainly", "perhaps"] | None:
    """Whether a library failed because memory ran out; cuDNN and cuBLAS call it an internal error, or say no more."""
    if re.search(_NO_MEMORY, said):
        return "certainly"
    return "perhaps" if re.search(_PERHAPS_NO_MEMORY, said) else None


_NO_THREAD = "can't start new thread|pthread_create failed|Resource temporarily unavailable"


def lacked_threads(said: str) -> bool:
    """Whether Python or a library failed because no other thread could be started."""
    return re.search(_NO_THREAD, said) is not None


_UNSAFE = (
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
    return (
        text if text.isprintable() else re.sub(_UNSAFE, lambda found: found[0].encode("unicode_escape").decode(), text)
    )


_LONGEST_LINE = 2_000


MISREAD = LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError
"""What goes wrong while a file is taken for what it does not hold."""


def first_line(said: object) -> str:
    """The first line of a message, as far as anybody reads it; of an error that says nothing, what it is."""
    try:
        lines = str(said).strip().splitlines()
    except Exception:  # an object of the user's that can't say what it is
        lines = []
    line = (lines or ["" if isinstance(said, str) else type(said).__name__])[0]
    return line if len(line) <= _LONGEST_LINE else f"{cut(line, _LONGEST_LINE)} …"


def cut(text: str, most: int) -> str:
    """The beginning of a text, in whole words where it has any."""
    return text if len(text) <= most else text[: most + 1].rpartition(" ")[0] or text[:most]


def listed(names: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """The first of `names`, and how many more there are: "a, b, c and 4 more"."""
    shown = list(names)
    more = len(shown) - most
    between = separator if "\n" in separator else " "
    return separator.join(shown[:most]) + (f"{between}and {more} more" if more > 0 else "")


def plural(count: int, noun: str, several: str = "") -> str:
    """A count and its noun.

    >>> plural(1, "check"), plural(3000, "check"), plural(2, "axis", "axes")
    ('1 check', '3,000 checks', '2 axes')
    """
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def own_text(value: Any) -> Any:
    """The text itself, of what is a text by a class of its own; anything else as it is.

    A member of an enum of texts, or a text of numpy's, is called by the text that it equals.
    """
    return str.__str__(value) if isinstance(value, str) else value


def kind_of(value: object) -> str:
    """What an object is, with its article.

    >>> kind_of([]), kind_of(3), kind_of(None)
    ('a list', 'an int', 'None')
    """
    name = type(value).__name__
    if value is None or isinstance(value, bytes):
        return "None" if value is None else name
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """A question naming the known word that is nearest, or nothing when none is near.

    >>> suggestion("INT8", ("fp16", "int8")), suggestion("T5", ("T4", "A100")), suggestion("nothing", ("fp16",))
    ("did you mean 'int8'?", "did you mean 'T4'?", '')
    """
    found = alike(word, {each.lower(): each for each in known}, most=1)
    return f"did you mean {found[0]!r}?" if found else ""


def alike(word: str, known: Mapping[str, str], most: int, cutoff: float = 0.6) -> list[str]:
    """The values of `known` whose keys, in lower case, are spelled nearly as `word` (1: just as it, for `difflib`)."""
    import difflib

    given = word.lower()
    near = difflib.get_close_matches(given, known, most, cutoff)
    # Of a word as short as "T5", one character is more than `difflib` lets differ.
    if len(given) > 1:
        near += [each for each in known if len(each) == len(given) and sum(map(str.__ne__, each, given)) == 1]
    return [known[each] for each in dict.fromkeys(near)][:most]


def name_of(function: object) -> str:
    """What messages call a function, or an object that can be called."""
    try:
        return str(getattr(function, "__name__", None) or type(function).__name__)
    except Exception:  # an object of the user's that can't say what it is called
        return "function"
