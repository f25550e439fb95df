"""What holds for a whole pytest session: the settings, the cache, the GPU that is judged."""

from __future__ import annotations

import codecs
import errno
import functools
import itertools
import os
import re
import shutil
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_trtcheck import __version__, backends, gpu
from pytest_trtcheck.cache import Cache, user_folder
from pytest_trtcheck.errors import ArgumentError, CheckError, CheckFailed, GpuError, listed, plural, suggestion, visible
from pytest_trtcheck.plugin import options as settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_trtcheck.backends.base import Backend, Machine
    from pytest_trtcheck.baselines import Baselines
    from pytest_trtcheck.bundle import Writer
    from pytest_trtcheck.cache.remote import Tally
    from pytest_trtcheck.check.checker import Checker
    from pytest_trtcheck.check.evidence import EvidenceReport
    from pytest_trtcheck.gpu.device import Detection
    from pytest_trtcheck.gpu.spread import Place
    from pytest_trtcheck.record import Environment

_NO_REPORTS = frozenset({".py", ".onnx", ".pt2", ".keras", ".npz", ".npy", ".toml", ".ini", ".cfg"})
"""What no report is called."""
_SHORTEST_KEY = 16
"""Bytes: a secret that nobody guesses, of 128 bits."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_SESSION: pytest.StashKey[Session] = pytest.StashKey()


def session_of(config: pytest.Config) -> Session:
    """The session's settings and stores, made at first use."""
    if _SESSION not in config.stash:
        config.stash[_SESSION] = Session.make(config)
    return config.stash[_SESSION]


def begin(config: pytest.Config) -> None:
    """Refuse options that are wrong or that this version can't serve; then make room for what this run will report."""
    with _usage_errors():
        if not hasattr(config, "workerinput") and not config.option.collectonly:
            session_of(config).remove_earlier_reports()
        Session.check_options(config)
        if settings.value(config, "trt_cache_clear") and not hasattr(config, "workerinput"):
            session_of(config).clear_cache()


def show_cache(config: pytest.Config) -> int | None:
    """Serve `--trt-cache-show`; None where it is turned off."""
    with _usage_errors():
        if settings.value(config, "trt_cache_show"):
            print(visible(Session.make(config).cache_shown()))
            return 0
    return None


@contextmanager
def _usage_errors() -> Iterator[None]:
    """What the user got wrong on the command line or in the ini file is shown without a traceback."""
    try:
        yield
    except OSError as error:  # a path that the system refuses: too long, or through a link to itself
        raise pytest.UsageError(visible(f"{error.strerror or error}: {str(error.filename)[:200]!r}")) from error
    except (CheckError, CheckFailed) as error:
        raise pytest.UsageError(visible(str(error))) from error


def shared_cache(config: pytest.Config, *, waits: bool) -> Tally | None:
    """What came of the shared cache in this process, once what is being written is there; None where none was used."""
    session = config.stash.get(_SESSION, None)
    return session.cache.remote.finish(waits=waits) if session is not None and session.cache.remote else None


def extra_gpus(config: pytest.Config) -> tuple[gpu.GpuModel, ...]:
    """The GPUs that the ini key `trt_gpus` adds."""
    return gpu.parse_extra_gpus(settings.value(config, "trt_gpus"))


def worker_number(config: pytest.Config) -> int | None:
    """The number of this pytest-xdist worker; None of a process that is none."""
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return None
    digits = re.search(r"\d+$", worker["workerid"])
    return int(digits[0]) if digits else 0


@dataclass(frozen=True)
class Session:
    """Settings resolved and stores opened.

    Parameters
    ----------
    requested_gpus
        The GPUs that `--trt-gpu` names, by their names there.
    begun_without
        Where this run will report and nothing was as it began.
    """

    config: pytest.Config
    cache: Cache
    requested_gpus: Mapping[str, gpu.GpuModel]
    begun_without: set[Path] = field(default_factory=set)

    @classmethod
    def make(cls, config: pytest.Config) -> Session:
        """Resolve the options and open the cache.

        Raises
        ------
        ArgumentError, GpuError, CacheError
            An option's value cannot be used.
        """
        return cls(
            config=config,
            cache=cls._cache(config),
            requested_gpus=_asked_for(settings.value(config, "trt_gpu"), extra_gpus(config)),
        )

    @property
    def requested(self) -> gpu.GpuModel | None:
        """The one GPU that `--trt-gpu` names; None where it names none, or several."""
        return next(iter(self.requested_gpus.values())) if len(self.requested_gpus) == 1 else None

    @classmethod
    def _cache(cls, config: pytest.Config) -> Cache:
        secret, trusts = _secret(config, "trt_cache_key"), settings.value(config, "trt_cache_unsigned")
        remote = None
        if url := settings.value(config, "trt_cache"):
            from pytest_trtcheck.cache.remote import Address, Remote

            remote = Remote(Address.parse(url, config.invocation_params.dir), secret, trusts=trusts)
            remote.require_trust()
        size = settings.value(config, "trt_cache_size")
        return Cache(cls._cache_dir(config), size, secret=secret, trusts=trusts, remote=remote)

    @classmethod
    def _cache_dir(cls, config: pytest.Config) -> Path:
        given = settings.value(config, "trt_cache_dir")
        if given:
            return settings.path(config, given)
        return user_folder()

    @classmethod
    def check_options(cls, config: pytest.Config) -> None:
        """Every option is of its kind, and none asks for what this version cannot do."""
        values = {option.name: settings.value(config, option.name) for option in settings.OPTIONS}
        extra = extra_gpus(config)
        if values["trt_gpu"]:
            _asked_for(values["trt_gpu"], extra)
            if len(values["trt_gpu"]) > 1 and values["trt_export"]:
                raise ArgumentError(
                    "--trt-export: --trt-gpu names several GPUs", "export for one at a time", code="argument-conflict"
                )
            _ = session_of(config).detection
        elif worker_number(config) is not None and settings.any_named(config):
            # Whoever names one wants checks: before the test modules are imported, which may initialize CUDA.
            _ = session_of(config).place
        if values["trt_triton_url"]:
            from pytest_trtcheck.backends.triton.address import Address

            Address.parse(values["trt_triton_url"])
        _ = session_of(config).evidence, session_of(config).evidence_key
        session_of(config).cache.require_private()
        if values["trt_cache_model"] and not (values["trt_cache_clear"] or values["trt_cache_show"]):
            raise ArgumentError(
                "--trt-cache-model: is neither shown nor cleared", "add --trt-cache-show or --trt-cache-clear"
            )
        if values["trt_update_baseline"] and not values["trt_baseline"]:
            raise ArgumentError(
                "--trt-update-baseline: no directory to write to is named",
                "name it: --trt-baseline=DIR",
                code="argument-missing",
            )
        if not hasattr(config, "workerinput"):
            settings.refuse_repeated_flags(config)
            session_of(config).check_feasible(values)
            if any(map(config.getoption, settings.OF_MODELS)):
                from pytest_trtcheck.plugin import model_files

                model_files.check_options(config, values)
        if values["trt_baseline"]:
            _ = session_of(config).baselines

    def cache_shown(self) -> str:
        """What `--trt-cache-show` prints; `--trt-cache-clear` beside it comes before."""
        removed = ""
        if self.get("trt_cache_clear"):
            removed = f"removed {plural(self.clear_cache(), 'entry').replace('entrys', 'entries')}\n"
        width = shutil.get_terminal_size().columns
        return removed + self.cache.describe(width, None if removed else self._cache_model())

    def clear_cache(self) -> int:
        """Empty the cache, or remove what it has of one model; how many entries went."""
        return self.cache.clear(self._cache_model())

    def _cache_model(self) -> str | None:
        """The model that `--trt-cache-model` names.

        Raises
        ------
        ArgumentError
            The cache has nothing of it.
        """
        named: str | None = self.get("trt_cache_model")
        if not named:
            return None
        from pytest_trtcheck.cache.listing import is_of

        entries = self.cache.entries()
        if not any(is_of(entry, named) for entry in entries):
            models = self.cache.models()
            names = [*models, *(model.rpartition("/")[2] for model in models)]
            raise ArgumentError(
                f"--trt-cache-model={named}: nothing of it is in the cache",
                suggestion(named, names) or f"it holds {listed(models)}" if models else "it is empty",
            )
        return named

    def check_feasible(self, values: Mapping[str, Any]) -> None:
        """What was asked for can be done here: else it is an error before the first test, and no pass without it.

        Raises
        ------
        MissingDependencyError, ArgumentError, ReportError
            A library is missing, no engine can be built for the GPU that is named, or a file can't be written.
        """
        self._check_outputs(values)
        refusals = []
        for name in values["trt_backend"]:
            try:
                self._check_backend(name, values)
            except CheckError as error:
                refusals.append(error)
        # Of several, what one can't do is a row in the table of all.
        if len(refusals) == len(values["trt_backend"]):
            raise refusals[0]

    def _check_backend(self, name: str, values: Mapping[str, Any]) -> None:
        wanted = values["trt_gpu"]
        needs = [*["--trt-build-only"] * values["trt_build_only"], *["--trt-rebuild"] * (values["trt_rebuild"] > 1)]
        if not needs and (name == backends.EMULATED or (name == backends.AUTO and not wanted)):
            return
        backend = backends.load(name)
        backend.require()
        if backend.is_server:
            backend.find(self.machine)
        if not needs and (not wanted or not backend.builds):
            return
        judges = values["trt_build_only"] and not wanted and self.detection.gpu is None and backend.builds
        for each in wanted or (None,):
            machine = self.machine_for(each)
            system = backend.find(machine)
            if not system.builds and not (judges and values["trt_rebuild"] == 1):
                option = needs[0] if needs else f"--trt-gpu={','.join(wanted)}"
                raise ArgumentError(
                    f"{option}: {system.no_engine}", _hint(machine.requested, name, backend), code="gpu-needed"
                )

    def _check_outputs(self, values: Mapping[str, Any]) -> None:
        from pytest_trtcheck.record.files import check_writable, resolved

        files: dict[Path, str] = {}
        for report in settings.reports(self.config):
            if report.option is None or not (given := settings.value(self.config, report.option)):
                continue
            flag, path = settings.flag(report.option), self._path(given)
            if (why_not := self._stays(path)) is not None:
                raise ArgumentError(f"{flag}={given}: {why_not}", "name another file", code="argument-conflict")
            check_writable(path, flag)
            other = files.setdefault(resolved(path), flag)
            if other != flag:
                raise ArgumentError(
                    f"{other} and {flag} both name {given}", "give each a file of its own", code="argument-conflict"
                )
            if hasattr(report.writer, "require"):
                report.writer.require()
        folders = ["trt_bundle", "trt_export"] + ["trt_baseline"] * values["trt_update_baseline"]
        if values["trt_cache_dir"]:
            where = self._path(values["trt_cache_dir"])
            check_writable(where, settings.flag("trt_cache_dir"), is_folder=True, is_optional=True)
        for name in folders:
            if values[name]:
                check_writable(self._path(values[name]), settings.flag(name), is_folder=True)

    def remove_earlier_reports(self) -> None:
        """Remove what an earlier run left where this one will report: if it is cut off, that is not what it found."""
        from pytest_trtcheck.record.files import ANSWER_S, answers, is_stream, resolved

        for report in settings.reports(self.config):
            if report.option is not None and (given := settings.value(self.config, report.option)):
                path = self._path(given)
                if not answers(path, ANSWER_S):
                    return  # an error in a moment
                with suppress(OSError):  # so is this
                    if self._stays(path) is None and path.is_file() and not is_stream(path):
                        resolved(path).unlink()
                    if not path.exists():
                        self.begun_without.add(path)

    def _stays(self, path: Path) -> str | None:
        """Why no report takes the place of what is there: an option reads it, or it is a test or a model, as where the
        name of the report was forgotten (`pytest --trt-report test_it.py`).
        """
        from pytest_trtcheck.record.files import resolved

        for option in ("trt_require_evidence", "trt_evidence_key", "trt_cache_key"):
            if (named := self.get(option)) and resolved(self._path(named)) == resolved(path):
                return f"{settings.flag(option)} names it too"
        return "it is there, and is no report" if path.suffix.lower() in _NO_REPORTS and path.is_file() else None

    def written_meanwhile(self, path: Path) -> bool:
        """Whether another run wrote a report there since this one began."""
        return path in self.begun_without and path.is_file()

    def _path(self, given: str) -> Path:
        return settings.path(self.config, given)

    def get(self, name: str) -> Any:
        """The value of one option."""
        return settings.value(self.config, name)

    def bundle_writer(self, nodeid: str) -> Writer | None:
        """What writes the bundle of a failing check; None when no bundles are asked for."""
        shown = self.get("trt_bundle")
        if not shown:
            return None
        from pytest_trtcheck.bundle import Writer

        return Writer(self._path(shown), shown, nodeid)

    def environment(self, backend: str | None) -> Environment:
        """Versions and GPU; `backend` names the TensorRT module that was used."""
        from pytest_trtcheck.record import GpuRecord
        from pytest_trtcheck.report import json_report

        found = self.detection.gpu
        return json_report.environment(
            requested_gpu=", ".join(self.requested_gpus) or None,
            gpu=None if found is None else GpuRecord(**found.environment()),
            driver=None if found is None else found.driver,
            tensorrt_module=backends.tensorrt_module(backend),
        )

    def circumstances(self, backend: str | None) -> dict[str, Any]:
        """All that the outcome of a check depends on beside what the check names: for its failure bundle."""
        from pytest_trtcheck.record import jsonable

        chosen = {name: self.get(name) for name in ("trt_reference", "trt_bitwise")}
        return {"pytest_trtcheck": __version__, **jsonable(self.environment(backend)), **chosen}

    @functools.cached_property
    def place(self) -> Place:
        """Where among several GPUs this process runs; from now on, all that it starts runs there.

        What is set before pytest-xdist starts its workers would hold for them all, so the process that starts them
        keeps its environment.
        """
        from pytest_trtcheck.gpu import spread

        found = spread.place(worker_number(self.config), self.requested, extra_gpus(self.config))
        if found.visible is not None and not self.config.pluginmanager.hasplugin("dsession"):
            os.environ[_VISIBLE] = found.visible
        return found

    @functools.cached_property
    def detection(self) -> Detection:
        """The GPU in this machine that this process uses, or why there is none.

        Raises
        ------
        GpuError
            `--trt-gpu` names another GPU than the one that is there, and not to build for it alone.
        """
        from pytest_trtcheck.gpu import device

        visible = self.place.visible
        environ = os.environ if visible is None else {**os.environ, _VISIBLE: visible}
        found = device.detect(extra_gpus(self.config), environ)
        if found.gpu is None or self.get("trt_build_only"):
            return found
        if len(self.requested_gpus) > 1:
            raise GpuError(
                f"--trt-gpu names {listed(list(self.requested_gpus))}, and in this machine is {found.gpu.description}: "
                "what is checked runs on it",
                "name that one or none; --trt-build-only builds for several",
                code="gpu-mismatch",
            )
        if self.requested is not None:
            device.require_match(self.requested, found.gpu, extra_gpus(self.config))
        return found

    def settle_strategies(self) -> None:
        """Tell `strategies.inputs` where models are looked up and kept."""
        from pytest_trtcheck.strategies import Place, settle

        settle(Place(self.cache, self.config.rootpath))

    @property
    def baseline_dir(self) -> Path | None:
        """Where `--trt-baseline` keeps baselines."""
        given = self.get("trt_baseline")
        return self._path(given) if given else None

    @functools.cached_property
    def baselines(self) -> Baselines | None:
        """What `--trt-baseline` names; None without it.

        Raises
        ------
        ReportError
            The directory is not there.
        """
        if self.baseline_dir is None:
            return None
        from pytest_trtcheck import baselines

        return baselines.opened(self.baseline_dir, must_exist=not self.get("trt_update_baseline"))

    @functools.cached_property
    def evidence_key(self) -> bytes | None:
        """What `--trt-evidence-key` names: the content of a file, else the value of an environment variable.

        Raises
        ------
        ArgumentError
            It is neither, or too short to be a secret.
        """
        return _secret(self.config, "trt_evidence_key")

    @functools.cached_property
    def evidence(self) -> EvidenceReport | None:
        """What `--trt-require-evidence` names, read and verified.

        Raises
        ------
        ReportError, ArgumentError
            It is no report, or not signed with the key; or no GPU is named that the checks are for.
        """
        named = self.get("trt_require_evidence")
        if not named:
            return None
        from pytest_trtcheck.check.evidence import EvidenceReport
        from pytest_trtcheck.report import json_report

        if not self.requested_gpus and self.detection.gpu is None:
            raise ArgumentError(
                "--trt-require-evidence: no GPU is named", "name it: --trt-gpu=T4", code="argument-missing"
            )
        run = json_report.read(self._path(named), self.evidence_key)
        return EvidenceReport(named, run, signed=self.evidence_key is not None)

    @functools.cached_property
    def machine(self) -> Machine:
        """What systems under test find; where several GPUs are named, those of tests that are for none of them."""
        return self.machine_for(next(iter(self.requested_gpus)) if len(self.requested_gpus) == 1 else None)

    def machine_for(self, name: str | None) -> Machine:
        """The machine for one of the GPUs that `--trt-gpu` names: what is only built for another has no GPU there."""
        from pytest_trtcheck.backends.base import Machine
        from pytest_trtcheck.gpu.device import is_named

        requested, found = self.requested_gpus[name] if name else None, self.detection.gpu
        return Machine(
            requested,
            found if found is None or requested is None or is_named(requested, found) else None,
            self.detection.reason or Machine.no_gpu,
            self.place.note,
            self.get("trt_triton_url"),
            tuple(self.get("trt_triton_models")),
        )

    def checker_for(self, gpu_name: str | None) -> Checker:
        """The checker of a test that is for one of several GPUs; of any other, the one there is."""
        if gpu_name is None:
            return self.checker
        if gpu_name not in self._checkers:
            self._checkers[gpu_name] = replace(self.checker, machine=self.machine_for(gpu_name))
        return self._checkers[gpu_name]

    @functools.cached_property
    def _checkers(self) -> dict[str, Checker]:
        return {}

    @functools.cached_property
    def _started(self) -> list[bool]:
        return []

    def start_gpu(self, backend: str | None) -> None:
        """Beside what is imported for the first check, get ready what it needs of the GPU.

        That is what builds, where no engine was built yet: what it builds runs there first. Else it is the GPU's
        context in this process.

        Parameters
        ----------
        backend
            What that check names; None: the session's.
        """
        if self._started:
            return
        self._started.append(True)
        if self.machine.detected is None or self.get("trt_build_only"):
            return
        system = backends.load(backend or self.get("trt_backend")[0])
        # ONNX Runtime's providers and PyTorch make theirs themselves.
        if system.evidence != "engine":
            return
        if self.cache.has("engine"):
            threading.Thread(target=system.start, name="trtcheck-start").start()
        else:
            system.expect_build()

    @functools.cached_property
    def checker(self) -> Checker:
        """What makes and judges: it imports the heavy libraries."""
        from pytest_trtcheck.check.checker import Checker
        from pytest_trtcheck.check.request import Allowance
        from pytest_trtcheck.model import ort_runner
        from pytest_trtcheck.plugin.summary import COLLECTOR

        settings.unknown_variables(self.config)
        settings.refuse_misspelled_keys(self.config)
        ort_runner.settle(ort_runner.Limits(self.get("trt_memory_limit"), self.get("trt_time_limit")))
        reports = settings.reports(self.config)
        collector = self.config.pluginmanager.getplugin(COLLECTOR)
        progress: Callable[[str], None] = lambda _: None  # noqa: E731 - of fixtures outside a run of tests
        if collector is not None:
            progress = collector.progress
            self.cache.during = collector.progress.during
        return Checker(
            cache=self.cache,
            backend=self.get("trt_backend")[0] if len(self.get("trt_backend")) == 1 else backends.AUTO,
            reference_provider=self.get("trt_reference"),
            machine=self.machine,
            extra_gpus=extra_gpus(self.config),
            graphs=self.get("trt_report_graph"),
            bitwise=self.get("trt_bitwise"),
            require_gpu=self.get("trt_require_gpu"),
            evidence=self.evidence,
            build_only=self.get("trt_build_only"),
            time_layers=self.get("trt_layers"),
            rebuild=self.get("trt_rebuild"),
            search=self.get("trt_search"),
            baselines=self.baselines,
            update_baselines=self.get("trt_update_baseline"),
            emulate_too=any(each.option and settings.value(self.config, each.option) for each in reports),
            allowance=Allowance(self.get("trt_diagnose")),
            progress=progress,
        )


def _plain(secret: bytes) -> bytes:
    """A secret as other machines have it, in a variable or a file: PowerShell writes UTF-16 with a mark before it."""
    if secret.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        with suppress(UnicodeDecodeError):
            secret = secret.decode("utf-16").encode()
    return secret.removeprefix(codecs.BOM_UTF8).strip()


def _secret(config: pytest.Config, option: str) -> bytes | None:
    """What an option names: the content of a file, else the value of an environment variable.

    Raises
    ------
    ArgumentError
        It is neither, or too short to be a secret.
    """
    named = settings.value(config, option)
    if not named:
        return None
    given, path = f"{settings.flag(option)}={named}", settings.path(config, named)
    try:
        key = _plain(path.read_bytes() if path.is_file() else os.fsencode(os.environ.get(named, "")))
    except OSError as error:
        given = _without_secret(given, named) if error.errno == errno.ENAMETOOLONG else given
        raise ArgumentError(f"{given}: cannot be read: {error.strerror}", code="option-value") from error
    if len(key) < _SHORTEST_KEY:
        found, hint = f"holds {plural(len(key), 'byte')}", ""
        if not key:
            given, hint = _without_secret(given, named), "; the secret itself is not given there"
            found = "is neither a file nor an environment variable that is set"
        raise ArgumentError(
            f"{given}: {found}",
            f"name one that holds a secret of {_SHORTEST_KEY} bytes or more{hint}",
            code="option-value",
        )
    return key


def _without_secret(given: str, named: str) -> str:
    """What was given for the name of a secret, unless it may be the secret itself: a log is no place for it."""
    is_a_name = len(named) < _SHORTEST_KEY or re.fullmatch(r"[A-Z_]+|[^\n]{,200}\.[a-z]{1,6}", named)
    return given if is_a_name else given.replace(named, "…")


def _asked_for(names: Sequence[str], extra: Sequence[gpu.GpuModel]) -> dict[str, gpu.GpuModel]:
    """The GPUs that `--trt-gpu` names, by name.

    Raises
    ------
    ArgumentError
        Two names mean the same.
    """
    found = {name: _known(name, extra) for name in names}
    for first, second in itertools.combinations(found, 2):
        if found[first] == found[second]:
            raise ArgumentError(
                f"--trt-gpu: {first!r} and {second!r} name the same GPU",
                "leave one of them out",
                code="argument-conflict",
            )
    return found


def _known(name: str, extra: Sequence[gpu.GpuModel]) -> gpu.GpuModel:
    """A GPU by name; where none is known by that name, the error tells the one that is there."""
    try:
        return gpu.find_gpu(name, extra)
    except GpuError as error:
        from pytest_trtcheck.gpu import device

        here = device.detect(extra).gpu
        if here is None:
            raise
        raise GpuError(
            error.message,
            f"in this machine is {here.description}: {device.how_to_ask(here, extra)}; for a GPU elsewhere: "
            f"{error.hint}",
            code=error.code,
        ) from None


def _hint(requested: gpu.GpuModel | None, name: str, backend: type[Backend]) -> str:
    """What to do where no engine can be built."""
    if not backend.builds:
        return f"take another --trt-backend: {name} builds no engine"
    if requested is None:
        return "name the GPU: --trt-gpu=A100"
    if requested.compute_capability is None:
        return "name a product, such as --trt-gpu=A100"
    return (
        'pip install "pytest-trtcheck[rtx]" builds engines without a GPU; '
        "--trt-backend=onnxruntime asks for emulated checks alone"
    )
