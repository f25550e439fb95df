"""What is checked: a marked test function, a test of an .onnx file without test code, the replay of a bundle."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

from pytest_trtcheck.check import arguments, stacked
from pytest_trtcheck.choices import BACKEND, BATCH, MARKERS, PRECISION, PRECISIONS
from pytest_trtcheck.errors import ArgumentError, CheckError, kind_of, listed, unforeseen
from pytest_trtcheck.plugin import marks, outcome
from pytest_trtcheck.plugin import options as settings
from pytest_trtcheck.spec import LatencySpec, ParitySpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pytest_trtcheck.check.request import Known

# --- a marked test ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marked:
    """What the markers of a test ask for. `error` is set when they can't be understood; then the rest is empty.

    Parameters
    ----------
    parity
        The spec of `trt_parity`; where that marker is missing, one that names what to run for `trt_latency`.
    latency
        The marks `trt_latency` that stand in one place, with their specs.
    judge_parity
        Whether `trt_parity` is there at all.
    params
        By the parameter that a list of it becomes: the list, where it holds a `pytest.param`.
    """

    parity: ParitySpec
    latency: tuple[tuple[pytest.Mark, LatencySpec], ...] = ()
    judge_parity: bool = True
    error: CheckError | None = None
    params: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def selected(self, item: pytest.Item) -> ParitySpec:
        """The spec with the one precision and batch of this test among those that the marker lists."""
        given = outcome.parameters(item)
        return replace(
            self.parity,
            precision=(given.get(PRECISION, self.parity.precision[0]),),
            batch=(given.get(BATCH, self.parity.batch[0]),),
        )

    def prepare(self, item: pytest.Item) -> None:
        """See that `item` can be checked, before it is run.

        Raises
        ------
        CheckError
            It can't.
        """
        problem = self.problem(item)
        if problem is not None:
            outcome.refuse(item, problem)
        assert isinstance(item, pytest.Function)
        # A marker that was added when all was collected has its fixtures asked for here.
        item.fixturenames.extend(name for name in marks.OVERRIDABLE if name not in item.fixturenames)

    def problem(self, item: pytest.Item) -> CheckError | None:
        """Why `item` can't be checked; None when it can."""
        if self.error is not None:
            return self.error
        instead = (
            "mark a function, or a method of a class that is not derived from unittest.TestCase; or call the fixture "
            "trt_check in one"
        )
        refused = f"trt markers don't work on {item.name!r}"
        if not isinstance(item, pytest.Function) or isinstance(item, FileItem):
            return ArgumentError(
                f"{refused} ({type(item).__name__}): only test functions are run", instead, code="marker-misplaced"
            )
        unittest = sys.modules.get("unittest")
        if item.cls is not None and unittest is not None and issubclass(item.cls, unittest.TestCase):
            return ArgumentError(
                f"{refused}: unittest runs the methods of {item.cls.__name__} by itself",
                instead,
                code="marker-misplaced",
            )
        if (unfed := _why_not_fed(item)) is not None:
            return unfed
        several = {PRECISION: self.parity.precision, BATCH: self.parity.batch, BACKEND: self.parity.backends}
        for name, values in several.items():
            if len(values) > 1 and name not in outcome.parameters(item):
                return ArgumentError(
                    f"trt_parity: lists {', '.join(map(str, values))}, and came too late to make a test of each",
                    "a marker that a hook or pytest.param adds takes one precision, one batch and one backend",
                    code="marker-misplaced",
                )
        return self._why_all_alike(item) or self._why_not_timed(item)

    def _why_all_alike(self, item: pytest.Item) -> CheckError | None:
        """Why the tests of what `item` is parametrized by would all check the same; None where they don't."""
        for name, own in {"trt_model": self.parity.model, "trt_calibration": self.parity.calibration}.items():
            if own is not None and name in outcome.parameters(item):
                argument = name.removeprefix("trt_")
                return ArgumentError(
                    f"{item.name}: there is a test for each {name}, and all would take the marker's {argument}",
                    f"leave {argument} out of the marker, or {name} out of the parameters",
                    code="argument-conflict",
                )
        named, precision = outcome.parameters(item).get("precision"), self.selected(item).precision[0]
        is_known = self.parity.engine is None or self.parity.states_precision
        is_another = isinstance(named, str) and named in PRECISIONS and named != precision
        if is_known and is_another and not _is_taken(item, "precision"):
            return ArgumentError(
                f"{item.name}: is called by the parameter precision={named}, and would be checked in {precision}",
                "list the precisions in the marker, trt_parity(precision=[…]); or give the parameter another name",
                code="argument-conflict",
            )
        return None

    def _why_not_timed(self, item: pytest.Item) -> CheckError | None:
        """Why `trt_latency` can't judge `item`, or does nothing anywhere; None where neither is so."""
        for mark, spec in self.latency:
            if spec.precision and self.parity.engine is not None and not self.parity.states_precision:
                return ArgumentError(
                    f"{stacked.shown(spec)} beside engine=, whose precision is read from the engine",
                    "state it, trt_parity(precision=…), or leave precision= out of trt_latency",
                    code="argument-missing",
                )
            reached = _reached(item, mark) if spec.limited_to else None
            if reached and not any(_may_fit(spec, each) for each in reached):
                there = [stacked.checked(*each) for each in reached if each]
                return ArgumentError(
                    f"{stacked.shown(spec)} fits no test that it marks",
                    f"they are checked in {listed(there)}: name one of these, or take the mark away",
                    code="marker-unmatched",
                )
        try:
            found = self.timed_by(item)
        except ArgumentError as error:
            return error
        if self.judge_parity or any(found.values()):
            return None
        return ArgumentError(
            f"{item.name}: {listed(stacked.shown(spec) for _, spec in self.latency)} does not fit it, and nothing else "
            "is asked for",
            "mark it with trt_parity(precision=…, batch=…) too, or take it out of the reach of the mark",
            code="marker-unmatched",
        )

    def timed_by(self, item: pytest.Item) -> dict[str, Any]:
        """Of a `Request`, what says by which of the marks the test is judged.

        Raises
        ------
        ArgumentError
            Several fit it equally.
        """
        parity = self.selected(item)
        precision, batch = parity.precision[0], parity.batch[0]
        stack = [spec for _, spec in self.latency if spec.fits(precision, batch)]
        if batch is not None or not any(spec.batch for spec in stack):
            return {"latency": stacked.judging(stack, precision, batch)}
        # Whoever else may fit a mark takes the blame from this test.
        due = [
            spec
            for mark, spec in self.latency
            if spec in stack
            and sum(count for each, count in (_reached(item, mark) or {}).items() if _may_fit(spec, each)) == 1
        ]
        return {"latency_for": functools.partial(stacked.judging_inputs, stack=stack, due=due, precision=precision)}


_Selected: TypeAlias = "tuple[str, int | None] | None"
_REACHED: pytest.StashKey[dict[tuple[int, str], Counter[_Selected] | None]] = pytest.StashKey()


def _reached(item: pytest.Item, mark: pytest.Mark) -> Counter[_Selected] | None:
    """How many of the tests that a mark reaches are checked in which precision and batch; None: not all are known.

    Worked out once for all tests of a function: they may be many, each with the question.
    """
    assert item.parent is not None
    known = item.parent.stash.setdefault(_REACHED, {})
    key = id(mark), marks.name_of(item)
    if key not in known:
        tests = marks.tests_of(item, mark)
        known[key] = None if tests is None else Counter(map(_selected, tests))
    return known[key]


def _selected(item: pytest.Item) -> _Selected:
    """The precision and batch that a marked test is checked in; None where it can't be."""
    found = marked(item)
    if found is None or found.error is not None:
        return None
    parity = found.selected(item)
    return parity.precision[0], parity.batch[0]


def _may_fit(spec: LatencySpec, selected: _Selected) -> bool:
    """Whether a mark may judge a test: of one that can't be checked, or whose batch its inputs tell, nobody knows."""
    return selected is None or spec.fits(*selected)


def _why_not_fed(item: pytest.Function) -> ArgumentError | None:
    """Why nothing comes of what the test returns; None where it does."""
    if inspect.isgeneratorfunction(item.obj) or inspect.isasyncgenfunction(item.obj):
        return ArgumentError(
            f"{item.name}: a test that yields cannot be checked", "return the inputs", code="marker-misplaced"
        )
    if getattr(item.obj, "is_hypothesis_test", False):
        return ArgumentError(
            f"trt markers don't work on {item.name!r}: @given runs it many times, and what it returns is not fed",
            "take the marker away, and call the fixture trt_check in the test",
            code="marker-misplaced",
        )
    return None


_MARKED: pytest.StashKey[tuple[list[pytest.Mark], Marked]] = pytest.StashKey()


def marked(item: pytest.Item) -> Marked | None:
    """What `item` is marked with; None for a test that has neither marker. Worked out once for the same marks."""
    found = [mark for name in MARKERS for mark in marks.closest(item, name)]
    if not found:
        return None
    known = item.stash.get(_MARKED, None)
    if known is None or known[0] != found:
        known = item.stash[_MARKED] = (found, _from_marks(found, item.config))
    return known[1]


_PARAMETER = type(pytest.param())
_LISTS = {"precision": PRECISION, "batch": BATCH, "backend": BACKEND}


def _plain(arguments_given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The arguments of a mark with the bare values in their lists; and the lists with a `pytest.param` in them."""
    plain, wrapped = dict(arguments_given), {}
    for name in _LISTS:
        value = plain.get(name)
        written = list(value) if isinstance(value, (list, tuple)) and type(value) is not _PARAMETER else [value]
        if any(isinstance(each, _PARAMETER) for each in written):
            plain[name] = [
                each.values[0] if isinstance(each, _PARAMETER) and len(each.values) == 1 else each for each in written
            ]
            wrapped[name] = written
    return plain, wrapped


def _from_marks(found: list[pytest.Mark], config: pytest.Config) -> Marked:
    parity: list[ParitySpec] = []
    latency: list[tuple[pytest.Mark, LatencySpec]] = []
    params: dict[str, list[Any]] = {}
    try:
        for mark in found:
            plain, wrapped = _plain(mark.kwargs) if mark.name == "trt_parity" else (mark.kwargs, {})
            spec = arguments.from_marker(mark.name, mark.args, plain)
            if isinstance(spec, ParitySpec):
                parity.append(spec)
                read = {"precision": spec.precision, "batch": spec.batch, "backend": spec.backends}
                for name, given in wrapped.items():
                    # By the names that are known of what may be written in several ways.
                    params[_LISTS[name]] = [
                        pytest.param(value, marks=each.marks, id=each.id) if isinstance(each, _PARAMETER) else value
                        for value, each in zip(read[name], given, strict=True)
                    ]
            else:
                _check_gpu_keys(config, spec)
                latency.append((mark, spec))
        limits = [(set(spec.batch), set(spec.precision)) for _, spec in latency]
        if len(parity) > 1 or any(each in limits[:index] for index, each in enumerate(limits)):
            instead = "limit each to a batch= or precision= of its own, or put the budgets into one"
            raise ArgumentError(
                f"{'trt_parity' if len(parity) > 1 else 'trt_latency'}: given twice for one test",
                "write two tests, or list the precisions" if len(parity) > 1 else instead,
                code="marker-misplaced",
            )
    except Exception as error:
        return Marked(ParitySpec(), error=unforeseen(error, found[-1].name))
    return Marked(parity[0] if parity else ParitySpec(), tuple(latency), judge_parity=bool(parity), params=params)


def _check_gpu_keys(config: pytest.Config, latency: LatencySpec) -> None:
    from pytest_trtcheck import gpu
    from pytest_trtcheck.plugin.session import extra_gpus

    for name, budget in {**latency.budgets(), **latency.speedups()}.items():
        if isinstance(budget, dict):
            try:
                gpu.check_budget_keys(budget, extra_gpus(config))
            except CheckError as error:
                raise error.within(f"trt_latency: {name}") from None


class _Body:
    """The code of a marked test, wrapped to keep what it returns: plugins that run coroutines drop that."""

    def __init__(self, test: Callable[..., Any]) -> None:
        self.checked = False
        self.returned: list[object] = []

        @functools.wraps(test)
        def called(*args: object, **kwargs: object) -> None:
            self.returned.append(test(*args, **kwargs))

        @functools.wraps(test)
        async def awaited(*args: object, **kwargs: object) -> None:
            self.returned.append(await test(*args, **kwargs))

        self.wrapped: Callable[..., Any] = awaited if inspect.iscoroutinefunction(test) else called


_BODY: pytest.StashKey[_Body] = pytest.StashKey()


@contextmanager
def watched(item: pytest.Function) -> Iterator[None]:
    """Keep what the body of a marked test returns, however the body is run, and see that the check was made."""
    test = item.obj
    body = item.stash[_BODY] = _Body(test)
    item.obj = body.wrapped
    try:
        yield
    finally:
        item.obj = test
    if not body.checked:
        outcome.refuse(item, _not_run(item))


def _not_run(item: pytest.Item) -> ArgumentError:
    return ArgumentError(
        f"{item.name} is marked and was not checked: what ran it, {kind_of(item)}, never called the function",
        "call the fixture trt_check in it instead",
        code="marker-misplaced",
    )


def _returned(item: pytest.Function, *, may_stream: bool) -> object:
    """What the body of a marked test returned; marks it as checked.

    Parameters
    ----------
    may_stream
        Whether it may give its cases one at a time: a score takes more of them than memory holds.

    Raises
    ------
    ArgumentError
        The marker came too late, the body was never run, or it gave something that is still to be run.
    """
    body = item.stash.get(_BODY, None)
    if body is None or "trt_model" not in item.funcargs:
        raise ArgumentError(
            f"{item.name}: a trt marker was added while the test was running",
            "add it while tests are collected: in pytest_collection_modifyitems or before",
            code="marker-misplaced",
        )
    body.checked = True
    if not body.returned:
        raise _not_run(item)
    value = body.returned[-1]
    if inspect.isgenerator(value) and may_stream:
        return value
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        if hasattr(value, "close"):
            value.close()
        raise ArgumentError(
            f"{item.name} returned {kind_of(value)}, which nothing has run: its inputs are not known",
            "return the inputs themselves; mark an async def for the plugin that runs it (pytest-asyncio, anyio)",
            code="marker-misplaced",
        )
    return value


def run_marked(item: pytest.Function, found: Marked) -> None:
    """Check what the markers of `item` ask for, with what the test returned as inputs."""
    fixture = item.funcargs.get
    try:
        inputs, source = _returned(item, may_stream=found.parity.score is not None), "returned"
    except CheckError as error:
        outcome.refuse(item, error)
    if inputs is None:
        inputs, source = fixture("trt_inputs"), "trt_inputs"
        if idle := _idle_parameters(item, found.parity):
            outcome.refuse(
                item,
                ArgumentError(
                    f"{item.name}: there is a test for each {listed(idle, separator=' and ')}, and all would be "
                    "checked alike: the test returns nothing, and the marker does not take it",
                    "list what is to be checked in the marker, or make what is returned of the parameter",
                    code="argument-conflict",
                ),
            )
    elif "trt_inputs" in outcome.parameters(item) and not _asks_for_inputs(item):
        outcome.refuse(
            item,
            ArgumentError(
                f"{item.name}: there is a test for each trt_inputs, and all would be fed what the test returns",
                "return nothing, or make what is returned of the argument trt_inputs",
                code="argument-conflict",
            ),
        )
    # A fixture may have added a mark since the test was looked at.
    if (problem := found.problem(item)) is not None:
        outcome.refuse(item, problem)
    parity = found.selected(item)
    try:
        request = outcome.request_for(
            item,
            parity.model if parity.model is not None else fixture("trt_model"),
            parity,
            fixture,
            judge_parity=found.judge_parity,
            **found.timed_by(item),
            inputs=inputs,
            inputs_source=source,
            batches=found.parity.batch,
        )
    except Exception as error:
        outcome.refuse(item, unforeseen(error, item.name))
    outcome.run(item, request)


def _asks_for_inputs(item: pytest.Function) -> bool:
    """Whether the test or a fixture of it takes `trt_inputs`, and may make of it what is returned."""
    return _is_taken(item, "trt_inputs") or not {"trt_inputs", "request"}.isdisjoint(item._fixtureinfo.argnames)


def _idle_parameters(item: pytest.Function, spec: ParitySpec) -> list[str]:
    """What a test is parametrized by that is called like an argument of its marker, and that nothing can take."""
    known = item._fixtureinfo.name2fixturedefs
    # What a hook or pytest.param marked knows the parameters, and so may a fixture that is given or asks for the test.
    written = [each for holder in (item.obj, item.cls, item.module) if holder for each in marks.ours(holder)]
    asking = any("request" in known[name][-1].argnames for name in marks.OVERRIDABLE if known.get(name))
    if asking or not any(mark is each for mark in marks.closest(item, "trt_parity") for each in written):
        return []
    return [
        name
        for name in inspect.signature(arguments.trt_parity).parameters
        if name in outcome.parameters(item)
        and name != "precision"  # see `_why_all_alike`
        and all(each.func.__module__.startswith("_pytest.") for each in known.get(name, ()))  # pytest's own, of none
        and not _is_taken(item, name)
        # A function that makes the model may draw its weights.
        and (name != "seed" or isinstance(spec.model, (str, os.PathLike)))
    ]


def _is_taken(item: pytest.Item, argument: str) -> bool:
    """Whether a fixture of the test takes another one, or a parameter, by this name."""
    known = getattr(item, "_fixtureinfo", None)
    definitions = known.name2fixturedefs.values() if known else ()
    return any(argument in each.argnames for found in definitions for each in found)


# --- tests collected from files --------------------------------------------------------------------------------------

_CAME_BY: pytest.StashKey[set[Path]] = pytest.StashKey()
"""On the session: the files that are named and that pytest looked at."""


def named_files(config: pytest.Config) -> list[Path]:
    """The models and bundles that the command line names."""
    folder = config.invocation_params.dir
    found = (folder / each.partition("::")[0] for each in config.args)
    # Not resolved: pytest collects a link by its own name.
    return [Path(os.path.normpath(each)) for each in found if each.suffix == ".onnx" or each.name == "bundle.json"]


def add_left_out(session: pytest.Session, items: list[pytest.Item]) -> None:
    """Add a test that fails for each file that is named and that pytest never came by.

    From 9.0 on it drops what lies in a folder that is named as well; and walking there, it passes over a `build`.
    """
    folders = {Path(os.path.normpath(session.config.invocation_params.dir / each)) for each in session.config.args}
    came_by = session.stash.get(_CAME_BY, set())
    for path in named_files(session.config):
        if path not in came_by and path.is_file() and not folders.isdisjoint(path.parents):
            nodeid = f"{_from_root(path, session.config)}::{path.stem}"
            items.append(LeftOut.from_parent(session, name=path.stem, path=path, nodeid=nodeid))


def _from_root(path: Path, config: pytest.Config) -> str:
    return (path.relative_to(config.rootpath) if path.is_relative_to(config.rootpath) else path).as_posix()


def file_collector(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """The collector for a model or bundle that is asked for; None for a file that a walk merely came by."""
    named = parent.session.isinitpath(file_path) or file_path in named_files(parent.config)
    if named:
        parent.session.stash.setdefault(_CAME_BY, set()).add(file_path)
    file: pytest.File | None = None
    if file_path.suffix == ".onnx":
        from pytest_trtcheck.plugin.model_files import OnnxFile

        path = _from_root(file_path, parent.config)
        globs = settings.value(parent.config, "trt_collect")
        if named or any(settings.is_collected(path, glob) for glob in globs):
            file = OnnxFile.from_parent(parent, path=file_path)
    elif named:
        from pytest_trtcheck import bundle

        if bundle.is_bundle(file_path):
            file = BundleFile.from_parent(parent, path=file_path)
    return file


class BundleFile(pytest.File):
    """One bundle: one test."""

    def collect(self) -> Iterable[pytest.Item]:
        """The replay."""
        item: BundleItem = BundleItem.from_parent(self, name="replay")
        yield item


class FileItem(pytest.Item):
    """The test of a file without code."""

    is_check = True

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where the test stands."""
        return self.path, None, self.nodeid


class LeftOut(FileItem):
    """What stands in for a file that is named and was not collected."""

    def runtest(self) -> None:
        """Say so: the run would pass without it."""
        outcome.refuse(
            self,
            ArgumentError(
                f"{self.path}: was not collected: pytest drops a file beside a folder that holds it, and does not "
                "look there, either (norecursedirs)",
                "name it in a run of its own, or without that folder",
                code="option-value",
            ),
        )


class BundleItem(FileItem):
    """The check that failed, made again with what the bundle holds."""

    def runtest(self) -> None:
        """Check as the test did that failed, and say what came out otherwise than recorded."""
        from pytest_trtcheck import backends, bundle
        from pytest_trtcheck.check.request import Request
        from pytest_trtcheck.plugin.session import session_of

        session = session_of(self.config)
        backend, *others = session.get("trt_backend")
        try:
            if others:
                raise ArgumentError(
                    "--trt-backend: a bundle is replayed by one system",
                    f"--trt-backend={backend}",
                    code="argument-conflict",
                )
            if len(session.requested_gpus) > 1:
                raise ArgumentError("--trt-gpu: a bundle is replayed for one GPU", "name one", code="argument-conflict")
            loaded = bundle.read(self.path)
            if session.detection.gpu is not None and not backends.load(backend).is_emulation:
                bundle.check_plugins(loaded)
            parity = replace(loaded.spec, reference=loaded.recorded_reference())
        except Exception as error:
            outcome.refuse(self, unforeseen(error, str(self.path)))
        if backend != backends.AUTO:
            parity = replace(parity, backend=None)
        elif loaded.record.server is not None:
            parity = replace(parity, backend=loaded.record.backend)

        def watch(known: Known) -> tuple[str, ...]:
            return (
                f"replay of {loaded.nodeid}",
                *bundle.compare_with_recorded(loaded, known),
                *bundle.changes(loaded.about["environment"], session.circumstances(known.running.name)),
            )

        outcome.run(
            self,
            Request(
                nodeid=self.nodeid,
                model=loaded.model,
                folders=(),
                parity=parity,
                inputs=list(loaded.cases),
                inputs_source="given",
                options=loaded.options,
                # What a server computes from is not ours: another system gets the model lowered here.
                lowered=None if loaded.record.server else loaded.lowered,
                watch=watch,
            ),
        )
