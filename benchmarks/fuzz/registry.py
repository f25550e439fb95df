"""The targets, by name."""

from __future__ import annotations

import arrays  # type: ignore[import-not-found]
import caches  # type: ignore[import-not-found]
import documents  # type: ignore[import-not-found]
import sessions  # type: ignore[import-not-found]

import models  # type: ignore[import-not-found]

_ALL = (
    *(models.Onnx, models.External, models.Engine, arrays.Arrays, arrays.Recorded),
    *(documents.Reports, documents.Evidence, documents.Baselines, documents.Bundles, documents.Exports),
    *(sessions.Markers, sessions.Options, caches.Cache, caches.Tamper),
)
TARGETS = {each.name: each for each in _ALL}
