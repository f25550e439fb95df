"""Calibration data: every form it may come in, how arrays become samples, and one clear error for all that is wrong."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest

from pytest_trtcheck.errors import CalibrationError
from pytest_trtcheck.model.onnx_model import TensorSpec
from pytest_trtcheck.precision.quantization.calibration_data import load
from pytest_trtcheck.spec import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tests.conftest import Suite

IMAGE = (TensorSpec("image", "float32", (1, 3, 4)),)
OPEN = (TensorSpec("image", "float32", ("batch", 3, 4)),)
TWO = (TensorSpec("ids", "int64", ("n", 5)), TensorSpec("mask", "int64", ("n", 5)))


def images(*shape: int) -> NDArray[np.float32]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def shapes(source: object, specs: tuple[TensorSpec, ...], *base_dirs: Path) -> list[dict[str, tuple[int, ...]]]:
    return [{name: array.shape for name, array in sample.items()} for sample in load(source, specs, base_dirs)]


# --- where it comes from ---------------------------------------------------------------------------------------------


def test_a_glob_is_looked_up_in_the_first_folder_that_has_a_match_and_sorted(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (second / "data").mkdir(parents=True)
    for number in (2, 0, 1):
        np.savez(second / "data" / f"{number}.npz", image=np.full((1, 3, 4), number, np.float32))
    samples = load("data/*.npz", IMAGE, [first, second])
    assert [float(sample["image"][0, 0, 0]) for sample in samples] == [0, 1, 2]
    assert [float(sample["image"][0, 0, 0]) for sample in samples] == [0, 1, 2], "samples are iterated again"
    assert samples.describe(1) == f"calibration sample 1 ({second / 'data' / '1.npz'})"
    assert len(list(load(str(second / "**" / "*.npz"), IMAGE))) == 3
    assert len(list(load([second / "data" / "0.npz", "data/2.npz"], IMAGE, [second]))) == 2


def test_a_model_of_one_input_takes_npy_and_unnamed_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", images(1, 3, 4))
    np.savez_compressed(tmp_path / "b.npz", images(2, 1, 3, 4))
    assert shapes(["a.npy", "b.npz"], IMAGE, tmp_path) == [{"image": (1, 3, 4)}] * 3
    assert shapes(images(1, 3, 4), IMAGE) == [{"image": (1, 3, 4)}]
    assert shapes([images(1, 3, 4)] * 2, IMAGE) == [{"image": (1, 3, 4)}] * 2


def test_a_large_npy_is_mapped_and_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "a.npy", images(2, 1, 3, 4))
    read = load("a.npy", IMAGE, [tmp_path]).digest()
    monkeypatch.setattr("pytest_trtcheck.precision.quantization.calibration_data._MMAP_BYTES", 0)
    mapped = load("a.npy", IMAGE, [tmp_path])
    assert mapped.digest() == read
    assert not any(isinstance(sample["image"], np.memmap) for sample in mapped)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows changes no file that is mapped")
def test_a_large_npy_that_is_cut_off_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading what is mapped would end the process."""
    monkeypatch.setattr("pytest_trtcheck.precision.quantization.calibration_data._MMAP_BYTES", 0)
    path = tmp_path / "a.npy"
    cuts: dict[str, Callable[[], object]] = {
        "was cut off while it was read": lambda: os.truncate(path, 200),
        "cannot be read any more: No such file": path.unlink,
    }
    for said, cut in cuts.items():
        np.save(path, images(4000, 3, 4))
        samples = iter(load("a.npy", IMAGE, [tmp_path]))
        assert (next(samples)["image"] == images(1, 3, 4)).all()
        cut()
        with pytest.raises(CalibrationError, match=said):
            list(samples)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_rows_of_a_large_npy_are_those_of_the_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: Literal["C", "F"]
) -> None:
    monkeypatch.setattr("pytest_trtcheck.precision.quantization.calibration_data._MMAP_BYTES", 0)
    for data, specs in ((images(5, 1, 3, 4), IMAGE), (images(5, 3, 4), IMAGE), (images(5, 3, 4), OPEN)):
        np.save(tmp_path / "a.npy", np.asarray(data.astype(">f8"), order=order))
        rows = np.concatenate([sample["image"] for sample in load("a.npy", specs, [tmp_path])])
        assert (rows == data.reshape(-1, 3, 4)).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
def test_what_is_there_and_is_no_file_is_told_as_that(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")  # as a shell's <(…)
    (tmp_path / "gone.npz").symlink_to("nowhere.npz")
    (tmp_path / "loop.npz").symlink_to("loop.npz")
    for name, what in (("pipe", "a pipe or a device"), ("gone", "a link that leads"), ("loop", "a link that leads")):
        with pytest.raises(CalibrationError, match=rf"{name}\.npz is {what}"):
            load(f"{name}.npz", IMAGE, [tmp_path])


def test_a_large_npy_is_read_where_the_file_system_maps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unmapped(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    np.save(tmp_path / "a.npy", images(2, 1, 3, 4))
    read = load("a.npy", IMAGE, [tmp_path]).digest()
    monkeypatch.setattr("pytest_trtcheck.precision.quantization.calibration_data._MMAP_BYTES", 0)
    monkeypatch.setattr(mmap, "mmap", unmapped)
    with pytest.raises(OSError, match="No such device"):
        np.load(tmp_path / "a.npy", mmap_mode="r")
    assert load("a.npy", IMAGE, [tmp_path]).digest() == read


def test_iterables_are_lazy_and_generators_are_kept() -> None:
    class Dataset:
        taken = 0

        def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
            for _ in range(1000):
                Dataset.taken += 1
                yield {"image": images(1, 3, 4)}

    samples = load(Calibration(Dataset(), max_samples=3), IMAGE)
    assert Dataset.taken == 0
    assert len(list(samples)) == len(list(samples)) == 3
    assert Dataset.taken <= 8

    generated = load((images(1, 3, 4) for _ in range(5)), IMAGE)
    assert len(list(generated)) == len(list(generated)) == 5


def test_at_most_max_samples_are_taken_across_files_and_stacks() -> None:
    assert len(list(load(Calibration([images(4, 1, 3, 4), images(4, 1, 3, 4)], max_samples=6), IMAGE))) == 6
    with pytest.raises(CalibrationError, match="max_samples=0"):
        load(Calibration([], max_samples=0), IMAGE)


# --- arrays to samples -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "specs", "expected"),
    [
        (images(7, 1, 3, 4), IMAGE, [(1, 3, 4)] * 7),
        (images(7, 3, 4), IMAGE, [(1, 3, 4)] * 7),
        (images(7, 3, 4), OPEN, [(7, 3, 4)]),
        (images(5, 7, 3, 4), OPEN, [(7, 3, 4)] * 5),
        (images(6, 3, 4), (TensorSpec("image", "float32", (2, 3, 4)),), [(2, 3, 4)] * 3),
        (images(6), (TensorSpec("image", "float32", ()),), [()] * 6),
        (images(6)[3], (TensorSpec("image", "float32", ()),), [()]),
        (images(2, 3, 9, 9), (TensorSpec("image", "float32", (1, 3, None, "w")),), [(1, 3, 9, 9)] * 2),
    ],
)
def test_stacks_and_batches_are_split_by_what_the_model_takes(
    array: NDArray[np.float32], specs: tuple[TensorSpec, ...], expected: list[tuple[int, ...]]
) -> None:
    samples = [sample["image"] for sample in load({"image": array}, specs)]
    assert [sample.shape for sample in samples] == expected
    assert all(sample.flags.c_contiguous for sample in samples)
    np.testing.assert_array_equal(np.concatenate([np.ravel(sample) for sample in samples]), np.ravel(array))


def test_the_inputs_of_an_item_are_split_in_step() -> None:
    ids = np.arange(30, dtype=np.int64).reshape(3, 2, 5)
    samples = list(load({"ids": ids, "mask": ids + 100}, TWO))
    assert len(samples) == 3
    for sample in samples:
        np.testing.assert_array_equal(sample["ids"] + 100, sample["mask"])
    with pytest.raises(CalibrationError, match="3 in 'ids', 1 in 'mask'"):
        list(load({"ids": ids, "mask": ids[0]}, TWO))


def test_types_are_converted_only_where_no_value_changes() -> None:
    sample = next(iter(load(images(1, 3, 4).astype(np.float64), IMAGE)))
    assert sample["image"].dtype == np.float32
    assert next(iter(load(images(1, 3, 4).astype(np.float16), IMAGE)))["image"].dtype == np.float32
    assert next(iter(load(images(1, 3, 4).astype(">f4"), IMAGE)))["image"].dtype.isnative
    ids = np.arange(5, dtype=np.int32)[None]
    assert next(iter(load({"ids": ids, "mask": ids.astype(np.uint8)}, TWO)))["mask"].dtype == np.int64


def test_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=images(2, 1, 3, 4))
    np.savez_compressed(tmp_path / "b.npz", image=images(2, 1, 3, 4))
    plain = load("a.npz", IMAGE, [tmp_path]).digest()
    assert plain == load("b.npz", IMAGE, [tmp_path]).digest() == load(images(2, 1, 3, 4), IMAGE).digest()
    changed = images(2, 1, 3, 4)
    changed[1, 0, 2, 3] += 1e-3
    others = [changed, images(3, 1, 3, 4), images(2, 1, 3, 4)[::-1], images(1, 1, 3, 4)]
    digests = {load(other, IMAGE).digest() for other in others}
    assert len(digests) == len(others)
    assert plain not in digests
    renamed = (TensorSpec("picture", "float32", (1, 3, 4)),)
    assert load(images(2, 1, 3, 4), renamed).digest() != plain


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "specs", "message"),
    [
        ({"image": images(1, 3, 5)}, IMAGE, r"item|data: input 'image': expected shape \[1, 3, 4\], got \[1, 3, 5\]"),
        ({"image": images(3, 4)}, IMAGE, r"expected shape \[1, 3, 4\], got \[3, 4\]"),
        ({"image": images(5, 3, 4)}, (TensorSpec("image", "float32", (2, 3, 4)),), "multiple of 2 rows"),
        ({"image": images(0, 1, 3, 4)}, IMAGE, r"is empty, shape \[0, 1, 3, 4\]"),
        ({"image": images(1, 3, 4).astype(np.uint8)}, IMAGE, "expected float32, got uint8, and integer data"),
        ({"image": images(1, 3, 4).astype(np.float64) / 3}, IMAGE, "got float64, and some values would change"),
        ({"image": np.full((1, 3, 4), np.nan, np.float32)}, IMAGE, "NaN in 12 of 12 elements"),
        ({"image": np.array([[1], [2, 3]], dtype=object)}, IMAGE, "Python objects"),
        ({"image": [[1.0]]}, IMAGE, "expected an array, got a list"),
        (
            {"imgae": images(1, 3, 4)},
            IMAGE,
            r"missing 'image'; it has 'imgae'\n.*expected 'image' \(float32, \[1, 3, 4\]",
        ),
        ({"image": images(1, 3, 4), "label": images(1)}, IMAGE, "no input 'label'"),
        (images(1, 5), TWO, "model of 2 inputs"),
        ([({"image": images(1, 3, 4)}, 3)], IMAGE, r"calibration\[0\]: .*expected an array, got a tuple"),
        (3, IMAGE, "expected files or input mappings, got an int"),
        (b"data", IMAGE, "got bytes"),
        ([], IMAGE, "no samples"),
        (iter(()), IMAGE, "no samples"),
        ({"ids": np.full((1, 5), -1), "mask": np.full((1, 5), 2**63, np.uint64)}, TWO, "'mask': .*would change"),
    ],
)
def test_data_that_does_not_fit_is_named(source: object, specs: tuple[TensorSpec, ...], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        list(load(source, specs))


def test_the_one_bad_row_of_a_stack_is_named(tmp_path: Path) -> None:
    stack = images(4, 1, 3, 4)
    stack[2, 0, 1, 1] = np.nan
    np.savez(tmp_path / "stack.npz", image=stack)
    with pytest.raises(CalibrationError, match=r"stack\.npz, row 2: input 'image': NaN in 1 of 12 elements"):
        list(load("stack.npz", IMAGE, [tmp_path]))


def test_files_that_are_not_there_or_no_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match=r"no file matches 'data/\*\.npz'\n.*looked up in"):
        load("data/*.npz", IMAGE, [tmp_path])
    with pytest.raises(CalibrationError, match="no file matches"):
        load(tmp_path / "missing.npz", IMAGE)
    with pytest.raises(CalibrationError, match=r"notes\.txt is neither \.npz nor \.npy"):
        load("*.txt", IMAGE, [tmp_path])
    with pytest.raises(CalibrationError, match="is a folder"):
        load("empty", IMAGE, [tmp_path])


def test_damaged_and_pickled_files_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", images(64, 1, 3, 4))
    np.savez_compressed(tmp_path / "whole.npz", image=np.random.default_rng(0).random((64, 1, 3, 4), np.float32))
    for name in ("whole.npy", "whole.npz"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / f"cut_{name}").write_bytes(content[: len(content) // 2])
        (tmp_path / f"void_{name}").write_bytes(b"")
    broken = bytearray((tmp_path / "whole.npz").read_bytes())
    broken[300:400] = bytes(100)
    (tmp_path / "broken.npz").write_bytes(broken)
    (tmp_path / "text.npy").write_text("1 2 3")
    for name in ("cut_whole.npy", "cut_whole.npz", "void_whole.npy", "void_whole.npz", "broken.npz", "text.npy"):
        with pytest.raises(CalibrationError, match=rf"{name}: not a readable numpy file"):
            list(load(name, IMAGE, [tmp_path]))
    np.save(tmp_path / "objects.npy", np.array([{"image": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", image=np.array([{}], dtype=object))
    for name in ("objects.npy", "objects.npz"):
        with pytest.raises(CalibrationError, match=rf"{name}: holds pickled objects"):
            list(load(name, IMAGE, [tmp_path]))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_generator_of_two_checks_is_not_read_on_by_the_second(suite: Suite, wrapped: bool) -> None:
    suite.write(
        test_it=f"""
from pytest_trtcheck import Calibration

DATA = ({{"image": np.full((1, 3, 16, 16), float(index), np.float32)}} for index in range(40))
if {wrapped}:
    DATA = Calibration(DATA, max_samples=3, method="minmax")

@trt_parity("conv.onnx", batch=1, precision=["int8", "int8+fp16"], calibration=DATA, tol=1e-9)
def test_it(): ...
"""
    )
    run = suite.run()
    assert run.check("[int8]")["calibration"]["samples"] == (3 if wrapped else 40)
    assert run.check("[int8]")["verdict"] == "fail"
    assert "looked at again" not in run.said  # by the diagnosis
    assert run.check("[int8+fp16]")["code"] == "calibration-files"
    assert "a generator that was read already gives no more: give a list" in run.said
