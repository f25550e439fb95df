"""A Keras classifier of real digits, whose INT8 loses what its calibration data does not show."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Suite

pytest.importorskip("sklearn", reason="only tests need scikit-learn")

TESTS = """
import warnings
from sklearn.datasets import load_digits
from pytest_trtcheck import SOURCE, Case

X, Y = load_digits(return_X_y=True)
X = (X / 16).astype("float32")

def classifier():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras
    hidden = np.random.default_rng(0).normal(size=(64, 200)).astype("float32") / 3
    features = np.maximum(X[:800] @ hidden, 0)
    head = np.linalg.lstsq(features, np.eye(10)[Y[:800]], rcond=1e-3)[0].astype("float32")
    image = keras.Input((64,), name="image")
    x = keras.layers.Dense(200, activation="relu", use_bias=False, name="hidden")(image)
    model = keras.Model(image, keras.layers.Dense(10, use_bias=False, name="logits")(x))
    model.set_weights([hidden, head])
    return model

def top1(outputs, case):
    (logits,) = outputs.values()
    return logits.argmax(axis=1) == case.labels

def loader():
    return ((X[i : i + 50], Y[i : i + 50]) for i in range(800, len(X), 50))

GOOD = [X[i : i + 100] for i in range(0, 800, 100)]
DARK = [X[:100] * 0.3]

@trt_parity(classifier, precision="int8", calibration=GOOD, reference=SOURCE, score=top1, max_drop=0.03)
def test_calibrated(): return loader()

@trt_parity(classifier, precision="int8", calibration=DARK, score=top1, max_drop=0.005)
def test_calibrated_in_the_dark(): return loader()
"""


def test_int8_is_judged_by_what_it_gets_right(suite: Suite) -> None:
    suite.write(test_digits=TESTS)
    run = suite.run_apart()
    run.result.assert_outcomes(passed=1, failed=1)
    sound, dark = run.check("test_calibrated")["score"], run.check("test_calibrated_in_the_dark")["score"]
    assert sound["reference"] > 0.9
    assert sound["samples"] == dark["samples"] == 997
    assert dark["verdict"] == "fail"
    assert 0.01 < dark["drop"] < 0.5
    assert dark["worst"]
