"""`@given` with `trt_check`: the examples of one test are one check, and share what runs them.

Shrinking runs a failing example hundreds of times, so that examples are judged and no more; once the minimal one is
known it is checked as any inputs are, with blame and bundle.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pytest_trtcheck.choices import GPU
from pytest_trtcheck.errors import ArgumentError, CheckError, CheckFailed, plural
from pytest_trtcheck.plugin import outcome, running_clocks
from pytest_trtcheck.record import SEVERITY, CheckRecord, is_bad

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pytest_trtcheck.check.checker import Checker
    from pytest_trtcheck.check.request import Request

OURS = (
    "trt_check",
    "trt_build",
    "trt_reference",
    "trt_engine",
    "trt_gpu",
    "trt_model",
    "trt_inputs",
    "trt_calibration",
)
"""Fixtures that hold nothing which an example could leave changed for the next one."""

_EXAMPLES: pytest.StashKey[Examples] = pytest.StashKey()


def of(item: pytest.Item) -> Examples | None:
    """Where the examples of a running test come together; None for a test that has none."""
    return item.stash.get(_EXAMPLES, None)


@dataclass
class _Group:
    """The examples of one check: of one model, precision, backend and reference, judged alike."""

    worst: CheckRecord
    count: int = 0
    blank: int = 0
    """Examples that nothing could be told by: Hypothesis begins with zeros."""
    failing: Request | None = None


@dataclass
class Examples:
    """What the examples of one test came to."""

    item: pytest.Function
    checker: Checker
    inconclusive: str
    groups: dict[tuple[Any, ...], _Group] = field(default_factory=dict)
    failed: _Group | None = None

    def check(self, request: Request) -> CheckRecord:
        """Judge one example, and fail or skip as its verdict says."""
        if request.parity.search is not None:
            raise ArgumentError(
                "search= in a test with @given: each example would be searched",
                "search in a test of its own: Hypothesis looks for inputs that fail, search= for the worst one",
                code="argument-conflict",
            )
        if request.parity.score is not None:
            raise ArgumentError(
                "score= in a test with @given: a score is of all samples together, and each example is a few",
                "score in a test of its own, on samples with labels",
                code="argument-conflict",
            )
        with running_clocks():
            record = self.checker.check(replace(request, search_folder=None))
        spec = request.parity
        asked = (repr(spec.tol), spec.metric.name, spec.keep_fp32, spec.exclude, spec.batch, repr(record.build_options))
        key = (record.model, record.precision, record.backend, record.reference, *asked)
        group = self.groups.setdefault(key, _Group(record))
        group.count += 1
        if record.code == "not-exercised":
            group.blank += 1
            return record
        if group.blank == group.count - 1:
            group.worst = record
        if is_bad(record.verdict):
            group.failing, self.failed = replace(request, inputs=_copied(request.inputs)), group
        # Of examples that fail the last one counts: Hypothesis ends with the minimal one.
        if is_bad(record.verdict) or _badness(record) > _badness(group.worst):
            group.worst = record
        outcome.conclude(record, inconclusive=self.inconclusive)
        return record

    def conclude(self, error: BaseException | None) -> None:
        """Attach a record for each group; where an example failed, raise what the minimal one comes to in full.

        Parameters
        ----------
        error
            What Hypothesis raised in the end.
        """
        ours = error is not None and any(isinstance(each, (CheckFailed, CheckError)) for each in _errors(error))
        failed = self.failed if ours else None
        for group in self.groups.values():
            record = group.worst
            if group is failed and group.failing is not None:
                again = outcome.made(self.item, replace(group.failing, search_folder=None))
                record = again if is_bad(again.verdict) else record
            what = "the minimal failing one" if is_bad(record.verdict) else "the worst"
            note = f"{plural(group.count, 'example')} by Hypothesis, this is {what} of them"
            blank = (f"{plural(group.blank, 'example')} of these exercised nothing",) if group.blank else ()
            group.worst = replace(record, examples=group.count, notes=(*record.notes, note, *blank))
            outcome.attach(self.item, group.worst)
        if failed is not None and error is not None:
            _raise(failed.worst, error, self.inconclusive)
        for group in self.groups.values() if error is None else ():
            if group.blank == group.count:
                outcome.conclude(group.worst, inconclusive=self.inconclusive)


def _badness(record: CheckRecord) -> tuple[int, float]:
    from pytest_trtcheck import compare

    parity = record.parity
    return SEVERITY.index(record.verdict), compare.usage(parity.outputs).usage if parity and parity.outputs else 0.0


def _copied(inputs: object) -> object:
    if isinstance(inputs, dict):
        copied = type(inputs)({name: np.array(array) for name, array in inputs.items()})
        vars(copied).update(getattr(inputs, "__dict__", {})) if hasattr(copied, "__dict__") else None
        return copied
    return np.array(inputs) if isinstance(inputs, np.ndarray) else inputs


def _errors(error: BaseException) -> Iterator[BaseException]:
    """An exception, and those of a group."""
    for each in getattr(error, "exceptions", (error,)):
        yield from _errors(each) if each is not error else (each,)


def _raise(record: CheckRecord, error: BaseException, inconclusive: str) -> None:
    """Fail as the record says, with the example as Hypothesis shows it."""
    try:
        outcome.conclude(record, inconclusive=inconclusive)
    except (CheckFailed, CheckError) as full:
        notes = [note for each in (error, *_errors(error)) for note in getattr(each, "__notes__", ())]
        # Which of our lines only failing examples ran explains nothing.
        shown = [note for note in notes if not note.lstrip().startswith(("Explanation:", "These lines"))]
        # An attribute of exceptions from Python 3.11 on; Hypothesis has it before.
        vars(full)["__notes__"] = list(dict.fromkeys(shown))
        raise full from None


@contextmanager
def gathered(item: pytest.Function) -> Iterator[None]:
    """Take the checks of a test with `@given` together until it ends."""
    from pytest_trtcheck.check.kept_open import KeptOpen
    from pytest_trtcheck.check.request import Allowance
    from pytest_trtcheck.plugin.session import session_of

    session = session_of(item.config)
    kept = KeptOpen()
    quick: Mapping[str, Any] = {"allowance": Allowance(0), "emulate_too": False, "rebuild": 1, "search": None}
    checker = replace(session.checker_for(outcome.parameters(item).get(GPU)), kept_open=kept, **quick)
    examples = item.stash[_EXAMPLES] = Examples(item, checker, session.get("trt_inconclusive"))
    try:
        with _suited(item):
            yield
    except BaseException as error:
        kept.close()
        examples.conclude(error)
        raise
    else:
        examples.conclude(None)
    finally:
        kept.close()
        del item.stash[_EXAMPLES]


@contextmanager
def _suited(item: pytest.Function) -> Iterator[None]:
    """Hypothesis's settings of the test as its checks need them, unless the user chose otherwise.

    Our fixtures may be shared by examples, so that the health check of function-scoped ones has nothing to say of them.
    And the time that an example takes says nothing: the first one builds the engine.
    """
    from hypothesis import HealthCheck, settings

    test = getattr(item.obj, "__func__", item.obj)
    name = "_hypothesis_internal_use_settings"
    given = getattr(test, name, None)
    if given is None:
        yield
        return
    allowed = set(given.suppress_health_check)
    if _function_scoped(item) <= set(OURS):
        allowed.add(HealthCheck.function_scoped_fixture)
    usual = getattr(settings.default, "deadline", None)
    deadline = None if given.deadline == usual else given.deadline
    setattr(test, name, settings(given, suppress_health_check=list(allowed), deadline=deadline))
    try:
        yield
    finally:
        setattr(test, name, given)


def _function_scoped(item: pytest.Function) -> set[str]:
    """The function-scoped fixtures that the test names."""
    named = set(inspect.signature(item.obj).parameters)
    found = item._fixtureinfo.name2fixturedefs
    return {name for name, defs in found.items() if name in named and defs[-1].scope == "function"}
