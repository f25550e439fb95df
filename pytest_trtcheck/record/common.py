"""What every record is made of: verdicts, and how records become JSON and are read again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, Literal, TypeVar

from pytest_trtcheck.errors import ReportError, first_line

T = TypeVar("T")


Verdict = Literal["pass", "fail", "error", "inconclusive", "not_measured"]


Evidence = Literal["engine", "provider", "server", "emulated"]
"""Where the compared outputs came from: a GPU ran TensorRT; a library ran the lowered model (ONNX Runtime's providers,
PyTorch); a server did; or the precision's arithmetic was computed on a CPU."""


GpuRan = bool | Literal["unknown"]


SCHEMA_VERSION = 1


TOOL = "pytest-trtcheck"


SEVERITY: tuple[Verdict, ...] = ("not_measured", "pass", "inconclusive", "fail", "error")
"""From what says least to what must be looked at first: the order in which verdicts combine."""


BASELINE = "baseline"
"""What the sources of limits begin with that a baseline sets, and the name of its entry among the budgets."""


_ABSENT = "absent"


def absent(default: Any = None, *, beside: str = "") -> Any:
    """A field whose key is left out while nothing is known of it; `beside`: unless that field is known."""
    return field(default=default, metadata={_ABSENT: beside})


def is_bad(verdict: Verdict) -> bool:
    """Whether somebody has to look: it is neither a pass nor left unmeasured."""
    return verdict not in {"pass", "not_measured"}


def combine(verdicts: list[Verdict]) -> Verdict:
    """The verdict of several: the most severe of them; `not_measured` where there is none."""
    return max(verdicts, key=SEVERITY.index, default="not_measured")


def jsonable(value: Any) -> Any:
    """`value` as JSON values: records as mappings, every non-finite float as a string, mapping keys as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if is_dataclass(value):
        return {name: jsonable(item) for name, item in _known(value)}
    return value


def _known(record: Any) -> Iterator[tuple[str, Any]]:
    for each in fields(record):
        value = getattr(record, each.name)
        beside = each.metadata.get(_ABSENT)
        if beside is None or value != each.default or (beside and getattr(record, beside) is not None):
            yield each.name, value


def typed(data: Any, kind: type[T]) -> T:
    """JSON values as a record. Keys that are not known here are passed over, those of later versions of the plugin.

    Raises
    ------
    ReportError
        Something is missing or of another kind; the message says where.
    """
    import msgspec

    try:
        # Not strict: "inf" is a number, where a number is wanted.
        return msgspec.convert(data, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ReportError(first_line(error)) from None
    except (UnicodeError, OverflowError, RecursionError) as error:  # a text that is no UTF-8, numbers of any length
        raise ReportError(f"it holds what no report does: {first_line(error)}") from None


def number(value: float | str | None) -> float | None:
    """A number as it stands in JSON ("inf" and "nan" are strings there) as a float again."""
    return None if value is None else float(value)
