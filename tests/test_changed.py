"""A file that is replaced after it was hashed: its check is an error that says so, and nothing is kept by that hash."""

from __future__ import annotations

import hashlib
import os
import sys
import time
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from pytest_trtcheck import compare
from pytest_trtcheck.cache import Cache, Key, hashing
from pytest_trtcheck.check.checker import Checker, Request
from pytest_trtcheck.check.steps import asked, engine
from pytest_trtcheck.errors import CheckError, ModelError
from pytest_trtcheck.export import typed
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.kept_outputs import KeptOutputs
from pytest_trtcheck.precision.quantization import calibration_data
from pytest_trtcheck.record import LoweredRecord
from pytest_trtcheck.spec import ParitySpec
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from pytest_trtcheck.record import CheckRecord
    from tests.conftest import Suite

    Change = Callable[[Path, bytes], None]


def by_rename(path: Path, content: bytes) -> None:
    """As who publishes a model does; with the times of the old one, as `cp -p` or an archive has them."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    new = path.with_name("new")
    new.write_bytes(content)
    os.utime(new, ns=times)
    new.replace(path)


def in_place(path: Path, content: bytes) -> None:
    """As `cp` over it does; of the same size, and with its times put back."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    assert path.stat().st_size == len(content)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=times)


CHANGES = {"by_rename": by_rename, "in_place": in_place}


@pytest.fixture(params=list(CHANGES))
def change(request: pytest.FixtureRequest) -> Change:
    return CHANGES[request.param]


@pytest.fixture(params=["settled", "just_written"])
def age(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files whose times may be trusted, and files that were written a moment ago."""
    if request.param == "settled":
        monkeypatch.setattr(hashing, "_SETTLED_NS", 0)


def net(scale: float) -> onnx.ModelProto:
    proto = onnx_models.gemm_net()
    for weight in proto.graph.initializer:
        if weight.raw_data:
            weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(scale)).tobytes()
    return proto


class Place:
    """A folder with a model, what it is to become, and a hook by which that happens at a known point."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, external: bool = False) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        self.model = folder / "model.onnx"
        name = "weights.bin"
        self.file = folder / name if external else self.model
        contents = []
        for scale in (3.0, 1.0):
            self.file.unlink(missing_ok=True)
            onnx.save(net(scale), self.model, save_as_external_data=external, location=name, size_threshold=0)
            contents.append(self.file.read_bytes())
        self.other, self.own = contents
        time.sleep(0.02)  # longer than a tick of the file system's clock

    def check(self, cache: str, precision: Any = "fp16", inputs: object = None, **spec: Any) -> CheckRecord:
        request = Request(
            "test", str(self.model), (self.folder,), ParitySpec(precision=(precision,), **spec.pop("parity", {})),
            inputs=inputs, **spec,
        )  # fmt: skip
        return Checker(Cache(self.folder / cache), backend="onnxruntime").check(request)

    def behind(self, place: object, name: str, act: Callable[[], None], *, before: bool = False) -> None:
        """Let something happen once a function has returned, or before it begins; once."""
        function, left = getattr(place, name), [act]

        def hooked(*arguments: Any, **named: Any) -> Any:
            if before and left:
                left.pop()()
            found = function(*arguments, **named)
            if left:
                left.pop()()
            return found

        self._monkeypatch.setattr(place, name, hooked)

    def kept(self, cache: str) -> dict[str, str]:
        """What a cache holds, by kind, key and file."""
        entries = self.folder / cache / "v1" / "entries"
        files = (file for file in entries.glob("*/*/files/**/*") if file.is_file())
        return {str(file.relative_to(entries)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def require_sound(self, cache: str, clean: str) -> None:
        """See that a cache holds nothing else under the keys that it has in common with one that is right."""
        found, right = self.kept(cache), self.kept(clean)
        assert right
        assert {name: each for name, each in found.items() if right.get(name, each) != each} == {}


def require_told(record: CheckRecord, file: Path) -> None:
    assert (record.verdict, record.code) == ("error", "model-changed"), record.message
    assert f"{file}: was changed on disk during the check" in str(record.message)


def test_equal_times_prove_nothing_of_a_file_that_was_just_written(tmp_path: Path) -> None:
    """The clocks of file systems are coarse: two writes within one of their ticks leave one time."""
    file = tmp_path / "file"
    file.write_bytes(b"own")
    found = hashing.hashed(file)
    assert found.is_same
    file.write_bytes(b"two")
    assert not found._replace(stamp=hashing.stamp(file)).is_same


@pytest.mark.usefixtures("age")
@pytest.mark.parametrize("external", [False, True], ids=["one_file", "external"])
def test_a_model_that_is_replaced_behind_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, external: bool
) -> None:
    place = Place(tmp_path, monkeypatch, external=external)
    assert place.check("clean").verdict == "pass"
    place.behind(asked, "model_of", lambda: change(place.file, place.other))
    require_told(place.check("cache"), place.file)
    place.require_sound("cache", "clean")
    in_place(place.file, place.own)
    assert place.check("cache").verdict == "pass"
    place.require_sound("cache", "clean")


@pytest.mark.parametrize(
    ("module", "step"), [(compare, "measure_all"), (onnx_model, "_parse")], ids=["compared", "parsed"]
)
def test_a_model_that_is_replaced_while_it_is_read_or_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change, module: ModuleType, step: str
) -> None:
    """Between its graph and its hash, too: what is remembered of one content is not that of another."""
    place = Place(tmp_path, monkeypatch)
    place.behind(module, step, lambda: change(place.file, place.other))
    require_told(place.check("cache"), place.file)


@pytest.mark.usefixtures("age")
def test_a_reference_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    place = Place(tmp_path, monkeypatch)
    original = onnx_models.save(net(1.001), tmp_path / "original.onnx")
    time.sleep(0.02)
    parity = {"reference": "original.onnx"}
    assert place.check("clean", parity=parity).verdict == "pass"
    place.behind(asked, "reference_given", lambda: change(original, place.other))
    require_told(place.check("cache", parity=parity), original)
    place.require_sound("cache", "clean")


@pytest.mark.usefixtures("age")
def test_calibration_data_that_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    place = Place(tmp_path, monkeypatch)
    spec = onnx_model.load(place.model).inputs[0]
    size = [each if isinstance(each, int) else 1 for each in spec.shape]
    file, data = tmp_path / "samples.npy", np.random.default_rng(0).normal(size=[4, *size]).astype(np.float32)
    np.save(tmp_path / "other.npy", data * 50)
    np.save(file, data)
    time.sleep(0.02)
    assert place.check("clean", "int8", calibration=str(file)).verdict == "pass"
    place.behind(calibration_data, "digest_of", lambda: change(file, (tmp_path / "other.npy").read_bytes()))
    require_told(place.check("cache", "int8", calibration=str(file)), file)
    place.require_sound("cache", "clean")
    np.save(file, data)
    assert place.check("cache", "int8", calibration=str(file)).verdict == "pass"
    place.require_sound("cache", "clean")


def test_inputs_in_a_file_that_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    spec = onnx_model.load(place.model).inputs[0]
    file, size = tmp_path / "inputs.npy", [each if isinstance(each, int) else 2 for each in spec.shape]
    np.save(file, np.ones(size, np.float32))

    def inputs() -> dict[str, Any]:
        return {spec.name: np.load(file, mmap_mode="r")}

    assert place.check("clean", inputs=inputs()).verdict == "pass"
    for where, name in ((KeptOutputs, "computed"), (asked, "prepared")):
        np.save(file, np.ones(size, np.float32))
        given = inputs()
        place.behind(where, name, lambda: np.load(file, mmap_mode="r+").__setitem__(..., 7))
        record = place.check("cache", inputs=given)
        assert (record.verdict, record.code) == ("error", "model-changed"), record.message
        assert f"the inputs were changed during the check ({file})" in str(record.message)
        place.require_sound("cache", "clean")


def test_a_reference_outside_of_checks_is_of_its_model_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    checker = Checker(Cache(tmp_path / "cache"), backend="onnxruntime")
    model = onnx_model.load(place.model)
    case = {
        each.name: np.ones([d if isinstance(d, int) else 1 for d in each.shape], np.float32) for each in model.inputs
    }
    before = checker.reference("model.onnx", (tmp_path,))
    by_rename(place.file, place.other)
    checker.check(Request("test", str(place.model), (tmp_path,), ParitySpec()))  # of another content by now
    with pytest.raises(CheckError, match=r"model\.onnx: was changed"):
        before(case)
    other = checker.reference("model.onnx", (tmp_path,))(case)
    in_place(place.file, place.own)
    own = checker.reference("model.onnx", (tmp_path,))(case)
    assert all(np.array_equal(own[name], before(case)[name]) for name in own)
    assert any(not np.array_equal(own[name], other[name]) for name in own)


def test_a_typed_file_that_is_replaced_as_it_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path, monkeypatch)
    record = place.check("cache", "tf32", parity={"tol": 1.0})
    assert record.lowered is not None
    assert record.lowered.path == str(place.model)
    found = typed.TypedModel(LoweredRecord("key", "tf32", str(place.model)), onnx_model.load(place.model), [record])
    by_rename(place.file, place.other)
    (tmp_path / "staged").mkdir()
    with pytest.raises(CheckError, match="differs from the one that was checked"):
        typed.stage(tmp_path / "typed", found, None, tmp_path / "staged")


def test_the_same_bytes_again_are_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker of a run exports one model by a rename; a backup links it, and somebody changes who may read it."""
    place = Place(tmp_path, monkeypatch)

    def again() -> None:
        by_rename(place.file, place.own)
        place.file.chmod(0o640)
        (tmp_path / "backup").hardlink_to(place.file)

    place.behind(asked, "model_of", again)
    assert place.check("cache").verdict == "pass"
    monkeypatch.setattr(hashing, "_SETTLED_NS", 0)
    for cache in ("cache", "cache", "other"):  # hashed here, known to the cache, and known to this process
        (tmp_path / "backup").unlink()
        place.behind(asked, "model_of", again)
        hashing._hashes.clear()
        assert place.check(cache).verdict == "pass"
    place.require_sound("other", "cache")


@pytest.mark.usefixtures("age")
def test_a_file_that_is_written_to_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever read it meanwhile saw parts of it, or the other one."""
    place = Place(tmp_path, monkeypatch)

    def there_and_back() -> None:
        for content in (place.other, place.own):
            time.sleep(0.02)
            place.file.write_bytes(content)

    place.behind(asked, "model_of", there_and_back)
    require_told(place.check("cache"), place.file)


def test_a_link_that_leads_elsewhere_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is behind it then is not remembered as what was behind it before."""
    place = Place(tmp_path, monkeypatch)
    monkeypatch.setattr(hashing, "_SETTLED_NS", 0)
    (tmp_path / "other.onnx").write_bytes(place.other)
    (tmp_path / "own.onnx").write_bytes(place.own)
    expected = onnx_model.load(tmp_path / "own.onnx").sha256

    def lead(name: str) -> None:
        (tmp_path / "link").symlink_to(name)
        (tmp_path / "link").replace(place.file)

    lead("own.onnx")
    place.behind(onnx_model, "load", lambda: lead("other.onnx"), before=True)
    require_told(place.check("cache"), place.file)
    lead("own.onnx")
    assert place.check("cache").model_sha256 == expected


def test_a_file_that_is_replaced_while_another_thread_works_for_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is computed beside the build of an engine."""
    file, cache = tmp_path / "file", Cache(tmp_path / "cache")
    file.write_bytes(b"own")

    def make(folder: Path) -> None:
        by_rename(file, b"two")
        (folder / "made").write_bytes(b"of two")

    def reference(_: object) -> None:
        with pytest.raises(ModelError) as raised:
            cache.get_or_make(Key("reference", "m", {}), make)
        told.append(raised.value)

    told: list[ModelError] = []
    gpu: Any = types.SimpleNamespace(gpu=object(), start=lambda: None)
    request: Any = types.SimpleNamespace(judges_outputs=True)
    known: Any = types.SimpleNamespace(system=gpu, reference=reference, request=request, cases=[None])
    monkeypatch.setattr(engine, "_computes_alone", lambda *_: True)
    with cache.resting_on(hashing.hashed(file)), engine._getting_ready(Checker(cache), known):
        pass
    assert [each.code for each in told] == ["model-changed"]


THREADS = """
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from pytest_trtcheck.check.steps import asked

prepared, begun, ended = asked.prepared, threading.Barrier(2), threading.Event()

def both(checker, request, *rest):
    begun.wait(60)
    if request.parity.seed:
        assert ended.wait(60)
    return prepared(checker, request, *rest)

def test_two_threads(trt_check, monkeypatch):
    monkeypatch.setattr(asked, "prepared", both)
    told = []

    def check(seed):
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder, "m.onnx")
                path.write_bytes(Path("model.onnx").read_bytes())
                trt_check(path, seed=seed)
        except BaseException as error:
            told.append(error)
        if not seed:
            ended.set()

    threads = [threading.Thread(target=check, args=[seed]) for seed in (0, 1)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert told == []
"""


def test_a_thread_is_not_held_to_the_files_of_another(suite: Suite) -> None:
    onnx_models.save(net(1.0), suite.path / "model.onnx")
    suite.write(test_it=THREADS)
    run = suite.run_apart()
    assert [each["verdict"] for each in run.report["checks"]] == ["pass", "pass"], run.text


FULL = """
import os
import resource
from pathlib import Path
from pytest_trtcheck.check.steps import asked

def full():
    used = os.dup(0)  # the lowest that is free
    os.close(used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

@pytest.fixture(autouse=True)
def restored():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)

@trt_parity("model.onnx")
def test_first(): ...

def behind(name, place):
    function = getattr(place, name)
    def hooked(*arguments, **named):
        full()
        return function(*arguments, **named)
    return hooked

@pytest.mark.parametrize("name", ["model_of", "prepared"])
def test_early(name, trt_check, monkeypatch):
    monkeypatch.setattr(asked, name, behind(name, asked))
    trt_check("model.onnx", seed=1)

def test_late(trt_check, monkeypatch):
    def measured(*arguments):
        full()
        raise CheckError("whatever", code="input-values")
    monkeypatch.setattr(asked, "prepared", measured)
    trt_check("model.onnx", seed=2)

@trt_parity("model.onnx")
def test_after(): ...
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the open files")
def test_too_many_open_files_are_no_change(suite: Suite) -> None:
    onnx_models.save(net(1.0), suite.path / "model.onnx")
    suite.write(test_it=FULL)
    run = suite.run_apart()
    found = [each.get("code") for each in run.report["checks"] if each["verdict"] == "error"]
    assert sorted(found) == ["input-values", "too-many-files", "too-many-files"], run.text
    run.result.assert_outcomes(passed=2, failed=3)


def test_the_next_run_is_right(suite: Suite) -> None:
    """As users see it: a deployment that replaces the model while it is checked."""
    onnx_models.save(net(1.0), suite.path / "model.onnx")
    onnx_models.save(net(3.0), suite.path / "other.onnx")
    suite.write(
        conftest="""
        import os
        from pytest_trtcheck.check.steps import asked

        prepared = asked.prepared

        def replaced(*arguments):
            if os.path.exists("other.onnx"):
                os.replace("other.onnx", "model.onnx")
            return prepared(*arguments)

        asked.prepared = replaced
        """.replace("\n        ", "\n"),
        test_it='@trt_parity("model.onnx")\ndef test_model(): ...\n',
    )
    run = suite.run_apart("-n2")
    assert [each["verdict"] for each in run.report["checks"]] == ["error"]
    assert "model.onnx: was changed on disk during the check" in run.said
    onnx_models.save(net(1.0), suite.path / "model.onnx")
    assert [each["verdict"] for each in suite.run_apart("-n2").report["checks"]] == ["pass"]
