"""Detections of two models, matched by where they lie, whatever their order and number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.compare.measurement import Fault, Measurement, NonFinite
from pytest_trtcheck.errors import ComparisonError, listed, plural
from pytest_trtcheck.metrics import Score

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pytest_trtcheck.compare.limits import Limit
    from pytest_trtcheck.metrics import Detections

    Outputs = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class JointOutputs:
    """The outputs of both sides by name, as the `of` of a metric gets them that is of several together."""

    actual: Outputs
    reference: Outputs

    def unmatched(self, asked: Detections) -> Score:
        """The share of detections without a partner on the other side; its note says how many of how many."""
        try:
            alone, count = self.counts(asked)
        except ValueError as error:
            return Score(None, str(error))
        note = f"{alone} of {count} detections on both sides have no partner"
        return Score(alone / count if count else 0.0, note, compared=count)

    def counts(self, asked: Detections) -> tuple[int, int]:
        """How many detections have no partner, of how many on both sides; a ValueError where they can't be read."""
        sides = [_read(outputs, asked) for outputs in (self.actual, self.reference)]
        if len(sides[0]) != len(sides[1]):
            raise ValueError(f"there are {plural(len(sides[0]), 'image')} where the reference has {len(sides[1])}")
        found = [_alone(actual, reference, asked) for actual, reference in zip(*sides, strict=True)]
        return sum(each[0] for each in found), sum(each[1] for each in found)


def measure_joint(
    name: str, actual: Outputs, reference: Outputs, limits: Sequence[Limit], expected_dtype: Any = None
) -> Measurement:
    """One output that is judged together with others: by what the metrics of its limits find in all of them.

    Raises
    ------
    ComparisonError
        An output that a metric is of is missing.
    """
    joined = JointOutputs(actual, reference)
    wanted = np.dtype(expected_dtype or reference[name].dtype)
    found = actual[name].dtype
    faults = () if found == wanted else (Fault("dtype", f"dtype {found} where {wanted} is expected"),)
    names = list(dict.fromkeys(other for limit in limits for other in limit.metric.joins))
    if missing := [other for other in names if other not in reference]:
        raise ComparisonError(
            f"there is no output {listed(map(repr, missing))}",
            f"there are {', '.join(reference)}",
            code="output-unknown",
        )
    bad = [sum(_nonfinite(outputs[other]) for other in names) for outputs in (actual, reference)]
    scores = {limit.metric.name: limit.metric.score(joined) for limit in limits}
    is_empty = all(score.compared == 0 for score in scores.values())
    return Measurement(
        name=name,
        dtype=str(found),
        shape=actual[name].shape,
        # Without any element on either side there may still be a verdict: that neither found anything.
        size=max(actual[name].size, reference[name].size, 1),
        kind="float",
        faults=faults,
        scores=scores,
        nonfinite=NonFinite(different=bad[0], nan_actual=bad[0]) if bad[0] and not bad[1] else NonFinite(),
        uncompared="neither side detects anything" if is_empty else "",
    )


def _nonfinite(array: NDArray[Any]) -> int:
    is_float = array.dtype.kind in "fV"
    return int(np.count_nonzero(~np.isfinite(array.astype(np.float64)))) if is_float else 0


_Found = tuple["NDArray[np.float64]", "NDArray[np.float64]", "NDArray[np.float64]"]
"""Boxes as corners [n, 4], scores [n] and classes [n] of one image."""


def _read(outputs: Outputs, asked: Detections) -> list[_Found]:
    """The detections of every image, those aside that neither count nor may be a partner."""
    boxes, scores, classes = _of_columns(outputs, asked) if asked.scores is None else _of_outputs(outputs, asked)
    if boxes.ndim == 2:
        boxes, scores, classes = boxes[None], scores[None], classes[None]
    counts = np.full(len(boxes), boxes.shape[1])
    if asked.count is not None:
        counts = np.asarray(outputs[asked.count]).reshape(-1).astype(np.int64)
        if len(counts) != len(boxes):
            raise ValueError(
                f"output {asked.count!r} has {plural(len(counts), 'count')} of {plural(len(boxes), 'image')}"
            )
        if wrong := [int(each) for each in counts if not 0 <= each <= boxes.shape[1]]:
            # As a slice, it would take others than those that count.
            raise ValueError(f"output {asked.count!r} says {wrong[0]} of {plural(boxes.shape[1], 'detection')}")
    found = []
    for image, count in enumerate(counts):
        # Beyond the count there is whatever was there; a partner may lie a little below the threshold.
        kept = scores[image][:count] >= asked.score_threshold - asked.score_tol
        of_image = [each[image][:count][kept] for each in (boxes, scores, classes)]
        found.append((_corners(of_image[0], asked.format), of_image[1], of_image[2]))
    return found


def _of_columns(outputs: Outputs, asked: Detections) -> _Found:
    """Boxes, scores and classes of an output that holds all of them."""
    array, least = np.asarray(outputs[asked.boxes], np.float64), max(asked.columns) + 1
    if array.ndim not in {2, 3} or array.shape[-1] < least:
        raise ValueError(
            f"output {asked.boxes!r} is {list(array.shape)}: expected [images, detections, {least} or more] with box, "
            "score and class as columns=, or other outputs named as scores= and classes="
        )
    box, (scores, *classes) = asked.columns[:4], (array[..., column] for column in asked.columns[4:])
    boxes = np.stack([array[..., column] for column in box], axis=-1)
    return boxes, scores, classes[0] if classes else np.zeros_like(scores)


def _of_outputs(outputs: Outputs, asked: Detections) -> _Found:
    """Boxes, scores and classes of outputs of their own."""
    boxes, scores = (np.asarray(outputs[str(name)], np.float64) for name in (asked.boxes, asked.scores))
    if boxes.ndim not in {2, 3} or boxes.shape[-1] != 4:
        raise ValueError(f"output {asked.boxes!r} is {list(boxes.shape)}: expected [images, detections, 4]")
    classes = np.zeros(boxes.shape[:-1])
    if scores.ndim == boxes.ndim and scores.shape[-1]:
        classes, scores = scores.argmax(axis=-1).astype(np.float64), scores.max(axis=-1)
    if asked.classes is not None:
        classes = np.asarray(outputs[asked.classes], np.float64)
        classes = classes.reshape(scores.shape) if classes.size == scores.size else classes
    for what, each in ((asked.scores, scores), (asked.classes, classes)):
        if each.shape != boxes.shape[:-1]:
            raise ValueError(f"output {what!r} has {list(each.shape)} beside boxes of {list(boxes.shape)}")
    return boxes, scores, classes


def _corners(boxes: NDArray[np.float64], form: str) -> NDArray[np.float64]:
    first, second = boxes[:, :2], boxes[:, 2:]
    if form == "xywh":
        return np.concatenate([first, first + second], axis=1)
    if form == "cxcywh":
        return np.concatenate([first - second / 2, first + second / 2], axis=1)
    return boxes


def _alone(actual: _Found, reference: _Found, asked: Detections) -> tuple[int, int]:
    """How many detections of one image have no partner, and how many there are on both sides."""
    fits = _overlaps(actual[0], reference[0])
    fits[actual[2][:, None] != reference[2][None]] = -1
    fits[~(np.abs(actual[1][:, None] - reference[1][None]) <= asked.score_tol)] = -1
    free = [np.ones(len(side[1]), bool) for side in (actual, reference)]
    for each in np.argsort(-actual[1], kind="stable") if len(reference[1]) else ():
        best = int(np.argmax(np.where(free[1], fits[each], -1)))
        if free[1][best] and fits[each, best] >= asked.iou:
            free[0][each] = free[1][best] = False
    counts = [side[1] >= asked.score_threshold for side in (actual, reference)]
    alone = sum(int(np.count_nonzero(mask & count)) for mask, count in zip(free, counts, strict=True))
    return alone, sum(int(np.count_nonzero(count)) for count in counts)


def _overlaps(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """Intersection over union of each with each; of boxes without an area, 1 where they are the same."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(axis=2)
    areas = [np.clip(each[:, 2:] - each[:, :2], 0, None).prod(axis=1) for each in (boxes, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    same = (boxes[:, None] == others[None]).all(axis=2)
    with np.errstate(all="ignore"):
        found: NDArray[np.float64] = np.where(same, 1.0, np.where(union > 0, shared / union, 0.0))
    return found
