"""Files of arrays: inputs, calibration data, recorded outputs, inputs that a search kept."""

from __future__ import annotations

import io
import json
import zipfile
from typing import TYPE_CHECKING, Any

import mutations  # type: ignore[import-not-found]
import numpy as np
from target import Found, Target, checked, command, seed, special  # type: ignore[import-not-found]

import models  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,)}",
    "{'descr': '%s', 'fortran_order': False, 'shape': (2, 4)}",
    "{'descr': [('a', '<f4', (%s,))], 'fortran_order': True, 'shape': (2,)}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (2, %s)}",
    "(" * 200 + "%s",
)
TYPES = ("<f2", "<f8", "<i8", "|b1", "|S3", "<U9", "<c8", "<M8[s]", "|V7", "|O", "<f99", "", ">f4", "<U99999999")


def npy(draw: Random) -> bytes:
    """A .npy file, mostly an array of [2, 4]; or one whose header is made by hand."""
    file = io.BytesIO()
    if draw.random() < 0.4:
        pattern = draw.choice(HEADERS)
        value = (
            draw.choice(TYPES)
            if "descr': '%s" in pattern
            else draw.choice((str(mutations.integer(draw)), "2, 4", "-1", ""))
        )
        header = (pattern % value).encode().ljust(118) + b"\n"
        version, size = draw.choice(((b"\x01\x00", 2), (b"\x02\x00", 4), (b"\x03\x00", 4), (b"\x09\x00", 2)))
        return b"\x93NUMPY" + version + len(header).to_bytes(size, "little") + header + bytes(32)
    array = np.arange(8).astype(draw.choice(("<f4", "<f4", "<f8", "<i4", "<f2", "|b1", "<c8", "<U3"))).reshape(2, 4)
    array = draw.choice((array, array, array.T, array[None], array[:, :0], np.repeat(array, 1000, 0)))
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def npz(draw: Random) -> bytes:
    """An .npz file of such arrays: under names that fit and do not, twice, compressed, with sizes that are not true."""
    file = io.BytesIO()
    method = draw.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(file, "w", method) as archive:
        for _ in range(draw.choice((0, 1, 1, 1, 2, 5))):
            name = draw.choice(
                ("x.npy", "x.npy", "x.npy", "y.npy", "x", "a/b.npy", draw.choice(mutations.TEXTS) + ".npy")
            )
            data = npy(draw) if draw.random() < 0.9 else bytes(draw.choice((1 << 20, 300 << 20)))
            try:
                archive.writestr(name.replace("\0", "0"), data)
            except (UnicodeEncodeError, ValueError):
                continue
    return file.getvalue()


def changed(data: bytes, draw: Random) -> bytes:
    return mutations.of_bytes(data, draw) if draw.random() < 0.5 else data


class Arrays(Target):  # type: ignore[misc]
    """.npy and .npz files wherever one may be named."""

    name, about = "arrays", ".npy and .npz files as inputs, calibration data, references, and as --inputs of `record`"

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        model = str(seed(draw, "onnx", "functions.onnx"))
        suffix = draw.choice((".npy", ".npz", ".npz"))
        path = folder / f"data{suffix}"
        if draw.random() < 0.03:
            special(path, draw)
        else:
            path.write_bytes(changed((npy if suffix == ".npy" else npz)(draw), draw))
        kind = draw.randrange(4)
        if kind == 0:
            return lambda: command("record", model, f"--inputs={path}", f"--output={folder / 'golden.npz'}")
        if kind == 1:
            return lambda: checked(model, folder, parsed=False, batch=(None,), reference=str(path))
        if kind == 2:
            given = draw.choice((str(path), str(folder / "*"), [str(path), str(path)]))
            return lambda: checked(
                model, folder, parsed=False, batch=(None,), precision=("int8+fp16",), calibration=given
            )
        return lambda: _read(path)


def _read(path: Path) -> Found:
    from pytest_trtcheck.model import npz as files

    try:
        files.load(path)
    except files.UNREADABLE as error:
        return Found("unreadable", str(error))
    return Found("read")


class Recorded(Target):  # type: ignore[misc]
    """Arrays with a description of their own: golden samples, and what a search kept."""

    name, about = "recorded", "golden .npz of `record` and inputs kept by a search: their index, digests and arrays"

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.golden = home / "golden.npz"
        self.model = models.seed(models._First(), "onnx", "functions.onnx")
        command("record", self.model, "--batch=2", f"--output={self.golden}")

    def case(self, draw: Random, folder: Path) -> Callable[[], Found]:
        from pytest_trtcheck.check import kept_inputs
        from pytest_trtcheck.check.checker import Request
        from pytest_trtcheck.model import onnx_model
        from pytest_trtcheck.spec import ParitySpec

        path, model = folder / "golden.npz", str(self.model)
        more: dict[str, Any] = {"reference": str(path)}
        if kept := draw.random() < 0.5:
            request = Request(
                "test_fuzz.py::test", model, (), parity=ParitySpec(precision=("fp16",)), search_folder=folder
            )
            loaded = onnx_model.load(self.model)
            path = kept_inputs.file_of(request, loaded) or path
            kept_inputs.write(path, [{"x": np.ones((2, 4), np.float32)}], loaded)
            more = {"search_folder": folder, "inputs": {"x": np.ones((2, 4), np.float32)}}
        else:
            path.write_bytes(self.golden.read_bytes())
        if draw.random() < 0.3:
            path.write_bytes(mutations.of_bytes(path.read_bytes(), draw))
        elif draw.random() < 0.05:
            special(path, draw)
        else:
            rewritten(path, draw)
        del kept
        return lambda: checked(model, folder, parsed=False, batch=(None,), **more)


def rewritten(path: Path, draw: Random) -> None:
    """The archive again, what describes it changed, or an array."""
    with zipfile.ZipFile(path) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if name.endswith(".json") and draw.random() < 0.8:
                archive.writestr(name, mutations.json_text(json.loads(data), draw))
            elif name.endswith(".npy") and draw.random() < 0.2:
                archive.writestr(name, changed(npy(draw), draw))
            else:
                archive.writestr(name, data)
