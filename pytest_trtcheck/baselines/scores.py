"""Did a score fall since it was recorded, though it keeps its limit? Item by item, on the same samples."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping  # noqa: TC003 - msgspec reads the annotations
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pytest_trtcheck.baselines.errors import RISE_SHARE, changed, different_hashes, told
from pytest_trtcheck.compare.paired import CONFIDENCE, Drop, drop_of_aggregate, drop_of_means
from pytest_trtcheck.errors import plural
from pytest_trtcheck.latency.distribution import RECORD_AGAIN
from pytest_trtcheck.record import BaselineRecord, ItemsRecord, ScoreRecord, is_bad, jsonable, typed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_trtcheck.record import CheckRecord
    from pytest_trtcheck.spec import ScoreSpec

MAX_BYTES = 256 << 20
"""Items that are larger are not kept, and not read."""
_SAME = 1e-6
"""How far two scores of the reference may lie apart that are one, relative to the larger."""


@dataclass(frozen=True, kw_only=True)
class ScoreBaseline:
    """The score that was recorded of a check.

    Parameters
    ----------
    model, model_sha256, inputs_sha256, reference_sha256
        As those of `ErrorBaseline`.
    name, lower_is_better
        The score's.
    reference, value
        The score of the reference, by which it is known whether the labels are the same, and of what ran.
    items
        What ran scored on each sample.
    """

    model: str
    model_sha256: str | None
    inputs_sha256: str | None
    reference_sha256: str | None
    recorded: str
    made_with: Mapping[str, str]
    name: str
    lower_is_better: bool
    reference: float
    value: float
    items: ItemsRecord

    def to_json(self) -> dict[str, Any]:
        """As it stands in a file."""
        found: dict[str, Any] = jsonable(asdict(self))
        return found

    @classmethod
    def from_json(cls, data: Any) -> ScoreBaseline:
        """From what `to_json` gave.

        Raises
        ------
        ReportError, ValueError
            It is something else.
        """
        found = typed(data, cls)
        unpacked(found.items)
        if not math.isfinite(found.reference) or not math.isfinite(found.value):
            raise ValueError("a score is a finite number")
        return found


def packed(items: Any) -> ItemsRecord | None:
    """Items as they travel and are kept; None of what is no array of numbers."""
    if not isinstance(items, np.ndarray) or items.dtype.kind not in "fiub" or items.nbytes > MAX_BYTES:
        return None
    # Half the digits, of both sides: what a score says is not in its tenth digit.
    plain = np.ascontiguousarray(items, np.float32)
    return ItemsRecord(tuple(plain.shape), base64.b64encode(zlib.compress(plain.tobytes(), 9)).decode())


def unpacked(record: ItemsRecord) -> NDArray[np.float64]:
    """The items again.

    Raises
    ------
    ValueError
        They are none.
    """
    size = 4 * math.prod(record.shape)
    if not record.shape or min(record.shape) < 1 or size > MAX_BYTES:
        raise ValueError(f"items of shape {list(record.shape)}")
    try:
        inflate = zlib.decompressobj()
        data = inflate.decompress(base64.b64decode(record.data, validate=True), size + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"items cannot be read: {error}") from None
    if len(data) != size:
        raise ValueError(f"items of shape {list(record.shape)} have {plural(size, 'byte')}, and there are {len(data)}")
    found = np.frombuffer(data, np.float32).reshape(record.shape).astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError("items are finite numbers")
    return found


def differences(baseline: ScoreBaseline, record: CheckRecord, score: ScoreRecord) -> list[str]:
    """Why a score cannot be held against the one that was recorded."""
    found = different_hashes(baseline, record)
    if baseline.name != score.name or baseline.lower_is_better != score.lower_is_better:
        found.append(f"it was recorded of another score ({baseline.name} then, {score.name} now)")
    now, then = score.reference, baseline.reference
    if not found and (now is None or abs(now - then) > _SAME * max(abs(now), abs(then))):
        found.append(f"the reference itself scored {then:g} then, and {now} now: by other labels, or another score")
    return found


def judge(
    baseline: ScoreBaseline | None, record: CheckRecord, now: BaselineRecord, spec: ScoreSpec, *, updating: bool
) -> BaselineRecord:
    """What comes of holding a check's score against a baseline.

    Raises
    ------
    ComparisonError
        The aggregate failed on the recorded items.
    """
    score = record.score
    assert score is not None
    if score.items is None:
        return replace(now, text=f"{score.name} was not held against a baseline: its items are no array of numbers")
    if baseline is None:
        return replace(now, text="no baseline of this check's score: record one, --trt-update-baseline")
    other = changed(baseline, record, now.made_with)
    now = replace(now, recorded=baseline.recorded, builds=1, changed=tuple(other))
    if different := differences(baseline, record, score):
        text = f"the baseline of {baseline.recorded} is not comparable: {'; '.join(different)}"
        return replace(now, text=text if updating else f"{text}; {RECORD_AGAIN}")
    before, after = unpacked(baseline.items), unpacked(score.items)
    if before.shape != after.shape:
        text = f"the baseline of {baseline.recorded} has items of shape {before.shape}, and there are {after.shape} now"
        return replace(now, text=f"{text}; {RECORD_AGAIN}")
    drop = _drop(before, after, spec)
    since = f"since the baseline of {baseline.recorded}"
    if not (drop.lower > 0 and drop.drop > RISE_SHARE * spec.max_drop):
        return replace(now, verdict="pass", text=f"{score.name} did not fall {since}")
    accepted = ", accepted as the new baseline" if updating else ""
    moved = "rose" if spec.lower_is_better else "fell"
    between = f"{drop.lower:.3g} to {drop.upper:.3g} with {CONFIDENCE:.0%} confidence"
    text = (
        f"{score.name} {moved} from {drop.reference:.4g} to {drop.value:.4g} {since}{accepted}: a loss of "
        f"{drop.drop:.3g} ({between}, {plural(drop.samples, 'sample')}, {drop.changed:,} of which changed), though it "
        f"keeps max_drop={spec.max_drop:g} against the reference\n  {told(other)}"
    )
    return replace(now, verdict="pass" if updating else "fail", text=text)


def _drop(before: NDArray[np.float64], after: NDArray[np.float64], spec: ScoreSpec) -> Drop:
    if spec.aggregate is None:
        return drop_of_means(before, after, lower_is_better=spec.lower_is_better)
    return drop_of_aggregate(before, after, spec.aggregate, lower_is_better=spec.lower_is_better)


def applied(score: ScoreRecord, found: BaselineRecord) -> ScoreRecord:
    """A score, with what came of holding it against its baseline."""
    score = replace(score, baseline=found)
    if found.verdict != "fail" or is_bad(score.verdict):
        return score
    return replace(score, verdict="fail", reason=found.text)
