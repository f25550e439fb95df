"""The failure bundle: written when parity fails, replayed anywhere, and never believed when damaged."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import zipfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from pytest_trtcheck import bundle, compare
from pytest_trtcheck.cache import Cache
from pytest_trtcheck.check import arguments as markers
from pytest_trtcheck.check.request import Known, Request
from pytest_trtcheck.choices import BACKENDS
from pytest_trtcheck.errors import ArgumentError, GpuError, ModelError, ReportError
from pytest_trtcheck.metrics import METRICS
from pytest_trtcheck.model import onnx_model
from pytest_trtcheck.model.npz import ArrayWriter, read_arrays
from pytest_trtcheck.model.sources import open_model
from pytest_trtcheck.precision.lowering import lower
from pytest_trtcheck.precision.reference import Reference
from pytest_trtcheck.record import CheckRecord, ParityRecord
from pytest_trtcheck.record.files import file_name
from pytest_trtcheck.spec import PRECISIONS, BuildOptions, ParitySpec, ShapeRange, Tolerance
from tests import onnx_models

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import Run, Suite

ENVIRONMENT = {"numpy": "2.0.0", "gpu": None, "tensorrt": {"module": "tensorrt", "version": "10.8"}}

# --- the spec as JSON ------------------------------------------------------------------------------------------------

NUMBERS = st.floats(0, 1e300) | st.integers(0, 10**6)
NAMES = st.text(min_size=1, max_size=8)
TOLERANCES = st.builds(
    Tolerance, max=st.none() | NUMBERS, snr_db=st.none() | st.floats(-100, 100), mismatches=st.floats(0, 1)
).filter(lambda each: bool(each.limits or each.mismatches))
ONE_TOL = NUMBERS | TOLERANCES
SHAPES = st.lists(st.integers(0, 2**40), max_size=3)


@st.composite
def shape_ranges(draw: st.DrawFn) -> list[list[int]]:
    sizes = draw(st.lists(st.tuples(*[st.integers(0, 99)] * 3).map(sorted), max_size=3))
    return [[size[which] for size in sizes] for which in range(3)]


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "precision": st.lists(st.sampled_from(PRECISIONS), min_size=1, unique=True),
        "tol": st.none() | ONE_TOL | st.dictionaries(NAMES, ONE_TOL, min_size=1, max_size=4),
        "metric": st.sampled_from(list(METRICS)),
        "batch": st.none() | st.lists(st.integers(1, 2**40), min_size=1, unique=True),
        "shapes": st.dictionaries(NAMES, SHAPES | shape_ranges()),
        "keep_fp32": st.lists(NAMES),
        "seed": st.integers(0, 2**70),
        "backend": st.none() | st.sampled_from(sorted(BACKENDS)),
    },
)


@given(ARGUMENTS)
def test_a_spec_survives_json(arguments: dict[str, Any]) -> None:
    tol = arguments.get("tol")
    if all(isinstance(each, Tolerance) and each.limits for each in (tol.values() if isinstance(tol, dict) else [tol])):
        arguments.pop("metric", None)  # is refused beside these
    spec = markers.from_marker("trt_parity", (), arguments)
    text = json.dumps(bundle.spec_to_json(spec), allow_nan=False)
    read = bundle.spec_from_json(json.loads(text))
    assert read == spec
    # A mapping's order decides which glob wins; equality of tuples covers it, and this says so.
    if isinstance(spec.tol, tuple):
        assert isinstance(read.tol, tuple)
        assert [glob for glob, _ in read.tol] == [glob for glob, _ in spec.tol]


def test_numpy_scalars_in_a_tolerance_become_plain_numbers() -> None:
    limit: Any = np.float32(0.25)
    data = bundle.spec_to_json(ParitySpec(tol=(("a*", Tolerance(max=limit)), ("*", 0.5))))
    assert json.loads(json.dumps(data))["tol"] == [["a*", {"max": 0.25, "mismatches": 0.0}], ["*", 0.5]]


@pytest.mark.parametrize(
    "wrong", [{"tol": -1}, {"precision": "fp61"}, {"tolerance": 1}, {"shapes": {"x": [[1], [0], [2]]}}]
)
def test_a_spec_that_was_tampered_with_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        bundle.spec_from_json(wrong)


def test_build_options_survive_json_and_unknown_ones_are_refused() -> None:
    from dataclasses import asdict

    options = BuildOptions(workspace_mib=7, plugins=("a.so",), hardware_compatible="ampere_plus")
    assert bundle.options_from_json(json.loads(json.dumps(asdict(options)))) == options
    with pytest.raises(ArgumentError, match="unknown build options: speed"):
        bundle.options_from_json({"speed": 11})


# --- arrays ----------------------------------------------------------------------------------------------------------

ARRAYS: dict[str, NDArray[Any]] = {
    "f32/with:odd name.npy": np.array([[1.5, -np.inf], [np.nan, 0]], np.float32),
    "f32/with:odd name": np.arange(3.0),
    "#0": np.array(7, np.int64),
    "nul\0name": np.array([True, False]),
    "bf16": np.array([1.5, -2, np.inf], ml_dtypes.bfloat16),
    "fp8": np.array([[0.5], [448]], ml_dtypes.float8_e4m3fn),
    "int4": np.array([-8, 7], ml_dtypes.int4),
    "bf16 scalar": np.array(3, ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "strings": np.array([["a", "b\0"], ["", "é\ud800"]], dtype=object),
    "bytes": np.array([b"\xff\0", "text"], dtype=object),
    "fixed strings": np.array(["abc", "d"]),
    "fixed bytes": np.array([b"abc", b"d"]),
    "strided": np.arange(12.0, dtype=np.float32).reshape(3, 4).T[::2],
    "bf16 strided": np.arange(12.0).astype(ml_dtypes.bfloat16).reshape(3, 4).T[::2],
    "big-endian": np.array([1, 2], ">i4"),
}


def test_arrays_of_every_dtype_come_back_as_they_were(tmp_path: Path) -> None:
    writer = ArrayWriter(tmp_path / "a.npz")
    writer.add(0, ARRAYS)
    writer.add(1, {"#0": np.array([5])})
    writer.close()
    index = json.loads(json.dumps(writer.index))
    read = read_arrays(tmp_path / "a.npz", index, 0)
    assert list(read) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype, name
        assert read[name].shape == array.shape, name
        if array.dtype.kind == "O":
            assert read[name].tolist() == array.tolist()
        else:
            assert read[name].tobytes() == array.tobytes(), name
    assert read_arrays(tmp_path / "a.npz", index, 1)["#0"].tolist() == [5]
    assert read_arrays(tmp_path / "a.npz", index, 2) == {}


def test_numpy_itself_opens_the_arrays(tmp_path: Path) -> None:
    writer = ArrayWriter(tmp_path / "a.npz")
    writer.add(0, {"images": np.arange(4.0), "strings": np.array(["a"], dtype=object)})
    writer.close()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["0/images"].tolist() == [0, 1, 2, 3]
        assert json.loads(file["0/strings"].tobytes()) == ["a"]


# --- writing and reading, without pytest around it -------------------------------------------------------------------


class Scaled:
    """The reference's outputs with those of some cases scaled: the planted fault."""

    def __init__(self, reference: Reference, factors: Mapping[float, float]) -> None:
        self._reference = reference
        self._factors = factors
        self.runs = 0

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.runs += 1
        factor = self._factors.get(float(inputs["x"].reshape(-1)[0]), 1.0)
        return {name: array * np.float32(factor) for name, array in self._reference(inputs).items()}

    def close(self) -> None: ...


class Planted:
    """A check of gemm_net whose case k begins with the value k + 1, and fails where `factors` says so."""

    def __init__(self, folder: Path, factors: Mapping[float, float], cases: int, path: Path | None = None) -> None:
        self.folder = folder / "bundles"
        cache = Cache(folder / "cache", None)
        path = path or onnx_models.save(onnx_models.gemm_net(), folder / "m.onnx")
        self.model = open_model(path, (), cache)
        self.lowered = lower(self.model, "fp16", cache)
        self.reference = Reference(self.model, cache)
        self.runner = Scaled(self.reference, factors)
        self.cases = [{"x": np.full((2, 4), index + 1, np.float32)} for index in range(cases)]
        self.spec = ParitySpec(tol=1e-2)
        limits = compare.resolve_limits(1e-2, "max", "fp16", ["y"])
        measured = [compare.measure_all(self.runner(each), self.reference(each), limits)["y"] for each in self.cases]
        self.record = compare.summarize([compare.judge(compare.merge(measured), limits["y"])], "max")

    def judged(self, record: ParityRecord | None = None, options: BuildOptions | None = None) -> Known:
        request = Request("t.py::t", self.model, (), self.spec, options=options)
        job = Known(request, self.model, self.lowered, self.cases, self.reference)
        checked = CheckRecord("t.py::t", self.model.label, "fail", parity=record or self.record)
        return replace(job, runner=self.runner, record=checked)

    def check_record(self) -> CheckRecord:
        return CheckRecord(
            "t.py::t",
            self.model.label,
            self.record.verdict,
            evidence="emulated",
            parity=self.record,
            message="it failed",
            duration_s=1,
        )

    def write(self, bounds: bundle.Bounds | None = None, nodeid: str = "t.py::t") -> tuple[CheckRecord, list[str]]:
        writer = bundle.Writer(self.folder, "shown dir", nodeid, bounds)
        notes = writer.keep(self.judged())
        return writer.finish(self.check_record(), ENVIRONMENT), list(notes)

    def read(self, name: str = "t.py-t") -> bundle.Bundle:
        return bundle.read(self.folder / name / bundle.BUNDLE_FILE)


def test_failing_cases_are_kept_the_worst_first(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {2: 1.1, 4: 2.0, 5: 1.5}, cases=6)
    record, notes = planted.write()
    assert record.message is not None
    assert record.message.endswith("replay it on any machine: pytest 'shown dir/t.py-t/bundle.json'")
    assert notes == []
    read = planted.read()
    assert [float(case["x"][0, 0]) for case in read.cases] == [4, 2, 5]
    assert read.about["cases"] == {"kept": [3, 1, 4], "of": 6, "passed": 3, "left_out": 0}
    for index, factor in enumerate([2.0, 1.1, 1.5]):
        expected = read.arrays("reference.npz", index)["y"]
        np.testing.assert_array_equal(expected, planted.reference(read.cases[index])["y"])
        np.testing.assert_array_equal(read.arrays("outputs.npz", index)["y"], expected * np.float32(factor))
    assert read.model.sha256 == planted.model.sha256
    assert read.model.label == planted.model.label
    assert read.lowered.path.read_bytes() == planted.lowered.path.read_bytes()
    assert read.spec == planted.spec


def test_a_check_that_passes_leaves_nothing(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {}, cases=1)
    record, notes = planted.write()
    assert (record, notes) == (planted.check_record(), [])
    assert not planted.folder.exists()


def test_what_is_beyond_the_bounds_is_left_out_and_said(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 1.5, 2: 3.0, 3: 1.2}, cases=3)
    # A case takes 2·4·4 bytes of inputs and 2·2·3·4 of outputs and reference.
    _, notes = planted.write(bundle.Bounds(array_bytes=160))
    assert notes == ["failure bundle: 2 of 3 cases are in it, the worst one first"]
    assert planted.read().about["cases"]["kept"] == [1, 0]
    _, notes = planted.write(bundle.Bounds(cases=1), "few")
    assert planted.read("few").about["cases"] == {"kept": [1], "of": 3, "passed": 0, "left_out": 2}
    _, notes = planted.write(bundle.Bounds(array_bytes=40), "tiny")
    assert "outputs are not in it" in notes[0]
    read = planted.read("tiny")
    assert [float(case["x"][0, 0]) for case in read.cases] == [2]
    assert read.arrays("outputs.npz", 0) == {}
    assert "holds no outputs" in bundle.compare_with_recorded(read, planted.judged())[0]


def test_a_model_that_is_too_large_is_named_by_its_path(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    _, notes = planted.write(bundle.Bounds(model_bytes=10))
    assert str(planted.model.path) in notes[0]
    assert str(planted.lowered.path) in notes[1]
    assert not list(planted.folder.rglob("*.onnx"))
    assert planted.read().model.path == planted.model.path
    onnx_models.save(onnx_models.conv_net(), planted.model.path)
    with pytest.raises(ModelError, match="is not the model that was recorded"):
        planted.read()
    planted.model.path.unlink()
    with pytest.raises(ModelError, match="which is missing"):
        planted.read()


def test_a_model_exported_again_does_not_change_the_bundle(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.write()
    with planted.model.path.open("r+b") as file:
        file.write(b"overwritten in place")
    assert planted.read().model.sha256 == planted.model.sha256
    assert not any(path.is_symlink() for path in planted.folder.rglob("*"))


def test_a_model_changed_during_the_check_makes_no_bundle(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    onnx_models.save(onnx_models.conv_net(), planted.model.path)
    writer = bundle.Writer(planted.folder, "bundles", "t.py::t")
    with pytest.raises(ReportError, match="was changed on disk"):
        writer.keep(planted.judged())
    assert list(planted.folder.iterdir()) == []


def test_the_same_failure_again_is_one_bundle_and_another_one_is_another(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    first, _ = planted.write()
    again, _ = planted.write()
    assert first.message == again.message
    assert [path.name for path in planted.folder.iterdir()] == ["t.py-t"]
    planted.runner = Scaled(planted.reference, {1: 2.5})
    other, _ = planted.write()
    assert other.message is not None
    assert "t.py-t-2/bundle.json" in other.message
    (planted.folder / "t.py-t" / "inputs.npz").write_bytes(b"damaged")
    planted.runner = Scaled(planted.reference, {1: 2.0})
    third, _ = planted.write()
    assert third.message is not None
    assert "t.py-t-3/bundle.json" in third.message


@pytest.mark.parametrize("blocker", ["file", "folder"])
def test_a_bundle_never_replaces_what_is_there(tmp_path: Path, blocker: str) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    theirs = planted.folder / "t.py-t"
    theirs.parent.mkdir()
    if blocker == "folder":
        theirs.mkdir()
        theirs /= "notes.txt"
    theirs.write_text("mine")
    record, _ = planted.write()
    assert record.message is not None
    assert "t.py-t-2/bundle.json" in record.message
    assert theirs.read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.folder.write_text("a file")
    writer = bundle.Writer(planted.folder, "bundles", "t.py::t")
    with pytest.raises(ReportError, match="no failure bundle was written to bundles"):
        writer.keep(planted.judged())
    assert writer.finish(planted.check_record(), ENVIRONMENT) == planted.check_record()


def test_a_full_disk_at_the_end_is_a_note(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    writer = bundle.Writer(planted.folder, "bundles", "t.py::t")
    writer.keep(planted.judged())
    shutil.rmtree(planted.folder)
    record = writer.finish(planted.check_record(), ENVIRONMENT)
    assert record.message == "it failed"
    assert "no failure bundle was written to bundles" in record.notes[0]


def test_a_runner_that_breaks_the_second_time_is_said_and_a_broken_cuda_passed_on(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)

    class Broken(Scaled):
        error: Exception = GpuError("it broke")

        def __call__(self, _: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            raise self.error

    broken = planted.runner = Broken(planted.reference, {})
    writer = bundle.Writer(planted.folder, "bundles", "t.py::t")
    with pytest.raises(ReportError, match="bundles: it broke"):
        writer.keep(planted.judged())
    poisoned = GpuError("CUDA is gone")
    poisoned.poisoned = True
    broken.error = poisoned
    with pytest.raises(GpuError, match="CUDA is gone"):
        writer.keep(planted.judged())
    assert list(planted.folder.iterdir()) == []


def names_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "name", ["bundle.json", "inputs.npz", "outputs.npz", "reference.npz", "model/model.onnx", "lowered/model.onnx"]
)
def test_damage_of_any_kind_to_any_file_is_refused(tmp_path: Path, name: str) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.write()
    folder = planted.folder / "t.py-t"
    assert name in names_of(folder)
    whole = (folder / name).read_bytes()
    flipped = bytearray(whole)
    position = whole.index(b'"max"') + 1 if name == "bundle.json" else len(whole) // 2
    flipped[position] ^= 1
    for content in (bytes(flipped), whole[:-7], b""):
        (folder / name).unlink()
        (folder / name).write_bytes(content)
        with pytest.raises(ReportError, match=r"damaged|not a failure bundle") as caught:
            planted.read()
        assert name.rpartition("/")[2] in str(caught.value)
    (folder / name).unlink()
    with pytest.raises(ReportError, match=r"missing|cannot be read"):
        planted.read()


def resigned(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change bundle.json as one would who knows how it is signed."""
    from pytest_trtcheck.bundle.reading import signed

    about = json.loads((folder / "bundle.json").read_text())
    change(about)
    del about["sha256"]
    (folder / "bundle.json").write_text(json.dumps(signed(about)))


def test_a_bundle_of_another_version_or_shape_is_refused(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.write()
    folder = planted.folder / "t.py-t"
    before = (folder / "bundle.json").read_text()
    for change, match in {
        "schema_version": (lambda about: about.update(schema_version=99), "schema_version 99"),
        "spec": (lambda about: about.pop("spec"), "not understood: KeyError"),
        "files": (lambda about: about.update(files=[]), "not understood"),
        "out": (lambda about: about["files"].update({"../x": {"sha256": "", "bytes": 0}}), "leads out of the bundle"),
        "tool": (lambda about: about.update(tool="webpack"), "not a failure bundle"),
    }.values():
        (folder / "bundle.json").write_text(before)
        resigned(folder, change)
        with pytest.raises(ReportError, match=match):
            planted.read()


def test_what_a_bundle_calls_its_lowered_model_names_nothing_in_the_cache(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.write()
    resigned(planted.folder / "t.py-t", lambda about: about["lowered"].update(key="f" * 64))
    assert planted.read().lowered.key == onnx_model.load(planted.lowered.path).sha256


def test_a_pickle_in_the_arrays_is_never_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("0/x.npy", buffer.getvalue())
    index = [{"case": 0, "name": "x", "entry": "0/x", "dtype": "<f4", "shape": [1]}]
    with pytest.raises(ValueError, match="allow_pickle"):
        read_arrays(tmp_path / "a.npz", index, 0)


def test_a_replay_says_what_came_out_otherwise(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    planted.write()
    read = planted.read()
    assert bundle.compare_with_recorded(read, planted.judged()) == ("the outputs are the recorded ones, bit for bit",)
    planted.runner = Scaled(planted.reference, {1: 2.5})
    notes = bundle.compare_with_recorded(read, planted.judged(ParityRecord("pass", "max", 1e-2, 0.001)))
    # 2.5 r against the recorded 2 r: a quarter of the largest value.
    assert notes[0] == "the outputs differ from the recorded ones: 'y' by up to 0.25 (of the largest value)"
    assert notes[1] == "recorded: fail, max 1; this replay: pass, max 0.001"


def test_differing_versions_and_gpus_are_listed() -> None:
    now = {"numpy": "2.1.0", "gpu": {"name": "T4", "uuid": "GPU-1"}, "tensorrt": None}
    assert bundle.changes(ENVIRONMENT, now) == (
        "recorded → this replay: TensorRT tensorrt 10.8 → none, NumPy 2.0.0 → 2.1.0, GPU none → T4",
    )
    other_card = {"gpu": {"name": "T4", "uuid": "GPU-2"}}
    assert bundle.changes({"gpu": {"name": "T4", "uuid": "GPU-1"}}, other_card) == ()


def test_names_of_folders_are_fit_for_any_file_system() -> None:
    assert file_name("tests/test_a.py::test_b[fp16-batch1]") == "tests-test_a.py-test_b-fp16-batch1"
    assert file_name("../..::[é]") == "check"
    long = [file_name(f"test_a.py::{'x' * 300}[{index}]") for index in range(2)]
    assert long[0] != long[1]
    assert max(map(len, long)) <= 100


def test_plugin_libraries_are_asked_for_by_content(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"first library")
    writer = bundle.Writer(planted.folder, "bundles", "t.py::t")
    writer.keep(planted.judged(options=BuildOptions(plugins=(str(library),))))
    writer.finish(planted.check_record(), ENVIRONMENT)
    read = planted.read()
    bundle.check_plugins(read)
    library.write_bytes(b"another library")
    with pytest.raises(ModelError, match="was built with the plugin library"):
        bundle.check_plugins(read)
    assert b"first library" not in b"".join(path.read_bytes() for path in planted.folder.rglob("*") if path.is_file())


def external(folder: Path, name: str, location: str) -> Path:
    """gemm_net with its weights in `location`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / location).parent.mkdir(exist_ok=True)
    onnx.save(
        onnx_models.gemm_net(),
        folder / name,
        save_as_external_data=True,
        location=location,
        size_threshold=0,
    )
    return folder / name


@pytest.mark.parametrize("location", ["model.onnx.data", "weights/w.bin", "model.onnx", "bundle.json"])
def test_external_data_of_any_name_is_in_the_bundle(tmp_path: Path, location: str) -> None:
    path = external(tmp_path / "source", "net.onnx", location)
    planted = Planted(tmp_path, {1: 2.0}, cases=1, path=path)
    planted.write()
    shutil.rmtree(tmp_path / "source")
    shutil.move(planted.folder, tmp_path / "elsewhere")
    read = bundle.read(tmp_path / "elsewhere" / "t.py-t" / "bundle.json")
    assert read.model.sha256 == planted.model.sha256
    x = np.ones((2, 4), np.float32)
    proto = onnx_models.gemm_net()
    w, b = (onnx.numpy_helper.to_array(each) for each in proto.graph.initializer)
    got = Reference(read.model, Cache(tmp_path / "other", None))({"x": x})["y"]
    np.testing.assert_allclose(got, x @ w + b, rtol=1e-5)


# --- as users meet it ------------------------------------------------------------------------------------------------

CHECKS = """
@trt_parity("conv.onnx", tol={"logits": Tolerance(max=1e-7, cosine=1e-12)}, batch=2)
def test_fp16(): ...

@trt_parity("conv.onnx", precision="int8", tol=1e-7, calibration="calibration/*.npz")
def test_int8():
    rng = np.random.default_rng(3)
    return [{"image": rng.random((rows, 3, 16, 16), np.float32)} for rows in (1, 4)]

@trt_parity("external/net.onnx", precision="bf16", tol=1e-9, keep_fp32=[])
def test_external(): ...

@trt_parity("conv.onnx", batch=1)
def test_pass(): ...

def test_by_hand(trt_check):
    for tol in (1e-7, 1e-8):
        with pytest.raises(CheckFailed):
            trt_check("gemm.onnx", tol=tol)
"""


@pytest.fixture
def failing(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> Suite:
    # Saying why a check failed takes most of the time, and only one test looks at it.
    monkeypatch.setenv("TRTCHECK_DIAGNOSE", "0")
    external(suite.path / "external", "net.onnx", "net.data")
    (suite.path / "calibration").mkdir()
    rng = np.random.default_rng(1)
    np.savez(suite.path / "calibration" / "a.npz", image=rng.random((8, 3, 16, 16), np.float32))
    return suite.write(test_checks=CHECKS)


def commands(text: str) -> list[str]:
    return re.findall(r"replay it on any machine: pytest (.*)", text)


def test_a_failing_check_is_replayed_elsewhere_and_fails_the_same_way(
    failing: Suite, run_everywhere: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = run_everywhere("--trt-bundle=out dir")
    run.result.assert_outcomes(passed=2, failed=3)
    messages = {each["nodeid"].rpartition("::")[2]: each["message"] for each in run.checks if each["message"]}
    names = ["fp16", "int8", "external"]
    for name in names:
        (command,) = commands(messages[f"test_{name}"])
        assert shlex.split(command) == [f"out dir/test_checks.py-test_{name}/bundle.json"]
        assert messages[f"test_{name}"].endswith(command)
    assert sorted(path.name for path in (failing.path / "out dir").iterdir()) == [
        "test_checks.py-test_by_hand",
        "test_checks.py-test_by_hand-2",
        *sorted(f"test_checks.py-test_{name}" for name in names),
    ]

    # Another machine: no models, no calibration data, no cache.
    shutil.move(failing.path / "out dir", failing.path / "moved")
    for gone in ("conv.onnx", "gemm.onnx", "test_checks.py"):
        (failing.path / gone).unlink()
    for gone in ("external", "calibration"):
        shutil.rmtree(failing.path / gone)
    monkeypatch.setenv("TRTCHECK_CACHE_DIR", str(tmp_path / "other-cache"))
    paths = [f"moved/test_checks.py-test_{name}/bundle.json" for name in names]
    replay = run_everywhere("--trt-bundle=again", *paths)
    replay.result.assert_outcomes(failed=3)
    for name, path in zip(names, paths, strict=True):
        (before,) = [each for each in run.checks if each["nodeid"].endswith(f"test_{name}")]
        (now,) = [each for each in replay.checks if each["nodeid"] == f"{path}::replay"]
        for key in ("worst", "metric", "tol", "verdict"):
            assert now["parity"][key] == before["parity"][key], (name, key)
        for key in ("model", "model_sha256", "precision", "evidence", "verdict"):
            assert now[key] == before[key], (name, key)
        assert f"replay of {before['nodeid']}" in now["notes"]
        assert "the outputs are the recorded ones, bit for bit" in now["notes"]
        assert not any(note.startswith("recorded →") for note in now["notes"]), now["notes"]
    assert commands(replay.text) == []
    assert not (failing.path / "again").exists()


def test_a_diagnosis_is_in_the_bundle_and_in_the_replay_without_calibration_data(
    failing: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRTCHECK_DIAGNOSE")
    failing.run("--trt-bundle=out", "-k", "int8").result.assert_outcomes(failed=1)
    path = failing.path / "out" / "test_checks.py-test_int8" / "bundle.json"
    recorded = json.loads(path.read_text())["record"]["parity"]["blame"]
    shutil.rmtree(failing.path / "calibration")
    run = failing.run(str(path), f"--trt-cache-dir={failing.path / 'other-cache'}")
    (record,) = run.checks
    assert record["verdict"] == "fail"
    for key in ("step", "tensor", "keep_fp32"):
        assert record["parity"]["blame"][key] == recorded[key], key
    # All that is quantized fails such a limit: there is no list of nodes to keep, and nodes that lose it there are.
    note = "the calibration data was not looked at again: a failure bundle holds its ranges alone"
    assert note in record["parity"]["blame"]["notes"]
    assert recorded["contributions"]
    assert recorded["calibration"]["samples"]


def test_each_bundle_is_collected_when_named_alone(failing: Suite) -> None:
    failing.run("--trt-bundle=out", "-k", "fp16")
    path = "out/test_checks.py-test_fp16/bundle.json"
    assert failing.run("out").result.parseoutcomes() == {}
    html = failing.path / "report.html"
    failing.run(path, f"--trt-html={html}").result.assert_outcomes(failed=1)
    assert "replay of test_checks.py::test_fp16" in html.read_text(encoding="utf-8")
    # Somebody else's file of that name is left to them.
    (failing.path / "bundle.json").write_text('{"name": "webpack"}')
    assert failing.run("bundle.json").result.ret == pytest.ExitCode.USAGE_ERROR


def test_a_changed_byte_is_refused_in_a_replay(failing: Suite, run_everywhere: Callable[..., Run]) -> None:
    failing.run("--trt-bundle=out", "-k", "fp16")
    folder = failing.path / "out" / "test_checks.py-test_fp16"
    content = bytearray((folder / "reference.npz").read_bytes())
    content[-30] ^= 1
    (folder / "reference.npz").write_bytes(content)
    (folder / "model" / "model.onnx").write_bytes(b"cut off")
    run = run_everywhere(f"{folder}/bundle.json")
    run.result.assert_outcomes(failed=1)
    assert "reference.npz: its content was changed" in run.text
    assert "model/model.onnx: has 7 bytes" in run.text
    assert "Traceback" not in run.text
    assert run.checks[0]["verdict"] == "error"
    (folder / "bundle.json").write_text("{")
    assert "the bundle is damaged: not whole JSON" in run_everywhere(f"{folder}/bundle.json").text


def test_a_bundle_that_cannot_be_written_hides_no_failure(failing: Suite) -> None:
    failing.write(conftest='def pytest_runtest_setup():\n    open("taken", "w").close()\n')
    run = failing.run("--trt-bundle=taken", "-k", "fp16")
    run.result.assert_outcomes(failed=1)
    record = run.check("test_fp16")
    assert record["verdict"] == "fail"
    assert any("no failure bundle was written to taken" in note for note in record["notes"])
    assert commands(run.text) == []


def test_a_replay_on_inputs_that_pass_now_passes(failing: Suite) -> None:
    failing.run("--trt-bundle=out", "-k", "fp16")
    folder = failing.path / "out" / "test_checks.py-test_fp16"
    resigned(folder, lambda about: about["spec"].update(tol=0.1))
    run = failing.run(f"{folder}/bundle.json")
    run.result.assert_outcomes(passed=1)
    assert any(note.startswith("recorded: fail, ") for note in run.checks[0]["notes"])


def test_the_ini_key_names_the_folder_too(failing: Suite) -> None:
    (failing.path / "pytest.ini").write_text("[pytest]\ntrt_bundle = kept\n")
    run = failing.run("-k", "fp16")
    assert commands(run.text) == ["kept/test_checks.py-test_fp16/bundle.json"]
    assert (failing.path / "kept" / "test_checks.py-test_fp16" / "bundle.json").exists()


def test_a_replay_compiles_the_lowered_model_for_the_gpu_named(failing: Suite) -> None:
    pytest.importorskip("tensorrt_rtx")
    failing.run("--trt-bundle=out", "-k", "int8")
    path = "out/test_checks.py-test_int8/bundle.json"
    run = failing.run(path, "--trt-gpu=A100")
    (record,) = run.checks
    assert record["compiled_for"] == "A100"
    assert record["engine"]["bytes"] > 0
    assert any("requested GPU none → A100" in note for note in record["notes"])
    # The engine is built for the shapes that the recorded one was built for.
    span = bundle.read(failing.path / path).spec.shapes["image"]
    assert span == ShapeRange((1, 3, 16, 16), (1, 3, 16, 16), (4, 3, 16, 16))


def test_bundles_of_models_with_their_own_precision_hold_one_model(suite: Suite) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="half", to=TensorProto.FLOAT16),
        helper.make_node("Sin", ["h"], ["s"], name="sin"),
        helper.make_node("Cast", ["s"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    onnx_models.save(onnx_models.elementwise(nodes, 8), suite.path / "half.onnx")
    suite.write(test_half='@trt_parity("half.onnx", tol=1e-9)\ndef test_half(): ...\n')
    suite.run("--trt-bundle=out").result.assert_outcomes(failed=1)
    folder = suite.path / "out" / "test_half.py-test_half"
    assert [name for name in names_of(folder) if name.endswith(".onnx")] == ["model/model.onnx"]
    (suite.path / "half.onnx").unlink()
    run = suite.run(f"{folder}/bundle.json")
    run.result.assert_outcomes(failed=1)
    assert "the outputs are the recorded ones, bit for bit" in run.checks[0]["notes"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no user ids on this system")
def test_everyone_may_read_a_bundle_whom_the_umask_lets(tmp_path: Path) -> None:
    planted = Planted(tmp_path, {1: 2.0}, cases=1)
    before = os.umask(0o022)
    try:
        planted.write()
    finally:
        os.umask(before)
    assert (planted.folder / "t.py-t").stat().st_mode & 0o777 == 0o755
