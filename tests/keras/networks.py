"""Small Keras models, the same in every process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def filled(model: Any, seed: int = 1) -> Any:
    """The model with weights that are all of some size: Keras begins with biases of 0 and scales of 1."""
    random = np.random.default_rng(seed)
    for variable in model.variables:
        if str(variable.dtype).startswith("float"):
            array = random.normal(size=variable.shape) * 0.3
            is_scale = "gamma" in variable.path or "variance" in variable.path
            variable.assign(np.abs(array) + 0.5 if is_scale else array)
    return model


def cnn() -> Any:
    """Convolutions in NHWC, a depthwise and a grouped one, batch normalization behind them."""
    image = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="conv1")(image)
    x = layers.ReLU(6.0)(layers.BatchNormalization(name="norm1")(x))
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.Activation("gelu")(layers.BatchNormalization(name="norm2")(x))
    x = layers.Conv2D(8, 3, groups=2, name="grouped")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return filled(keras.Model(image, layers.Dense(5, activation="softmax", name="probs")(x), name="cnn"))


def several(name: str = "several") -> Any:
    """Two inputs of two types and two outputs, in dictionaries."""
    numbers, words = keras.Input((6,), name="numbers"), keras.Input((4,), dtype="int32", name="words")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8, name="embedding")(words))
    x = layers.Dense(16, activation="relu", name="hidden")(layers.Concatenate()([x, numbers]))
    outputs = {"score": layers.Dense(3, name="score")(x), "label": layers.Dense(3, name="label")(x)}
    return filled(keras.Model({"numbers": numbers, "words": words}, outputs, name=name))


def transformer(blocks: int = 2) -> Any:
    """Attention and layer normalization over sequences of any length."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    x = layers.Embedding(50, 16, name="embedding")(ids)
    for block in range(blocks):
        attended = layers.MultiHeadAttention(2, 8, name=f"attention{block}")(x, x)
        x = layers.LayerNormalization(epsilon=1e-6, name=f"first{block}")(layers.Add()([x, attended]))
        y = layers.Dense(16, name=f"down{block}")(layers.Dense(32, activation="gelu", name=f"up{block}")(x))
        x = layers.LayerNormalization(epsilon=1e-6, name=f"second{block}")(layers.Add()([x, y]))
    return filled(
        keras.Model(ids, layers.Dense(4, name="head")(layers.GlobalAveragePooling1D()(x)), name="transformer")
    )


def unnamed() -> Any:
    """What has no names but those that Keras counts through the process."""
    return filled(keras.Sequential([keras.Input((6,)), layers.Dense(4, activation="tanh"), layers.Dense(3)]))


def of_one(layer: Any, shape: tuple[int | None, ...]) -> Any:
    """A model of one layer."""
    x = keras.Input(shape, name="x")
    return filled(keras.Model(x, layer(x), name="one"))


@keras.saving.register_keras_serializable("tests")
class Doubled(layers.Layer):  # type: ignore[misc]
    """A layer of the user's own."""

    def call(self, x: Any) -> Any:
        return x * 2.0


class Subclassed(keras.Model):  # type: ignore[misc]
    """A model without inputs of its own; `factor` is in no weight and in no configuration."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__(name="subclassed")
        self.dense = layers.Dense(3, name="dense")
        self.factor = factor

    def call(self, inputs: Any) -> Any:
        return {"y": self.dense(inputs["a"]) * self.factor + inputs["b"]}


class Module(tf.Module):  # type: ignore[misc]
    """What is saved as a SavedModel: functions with names for what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable(np.random.default_rng(0).normal(size=(4, 3)).astype("float32"))

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="rows")])  # type: ignore[untyped-decorator]
    def score(self, rows: Any) -> Any:
        scores = rows @ self.weight
        return {"scores": scores, "best": tf.argmax(scores, axis=1)}

    @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float32, name="rows")])  # type: ignore[untyped-decorator]
    def embed(self, rows: Any) -> Any:
        return {"embedding": tf.nn.relu(rows)}


def saved_module(folder: Path, *names: str) -> Path:
    """A SavedModel with these functions of `Module` as signatures."""
    module = Module()
    tf.saved_model.save(module, str(folder), signatures={name: getattr(module, name) for name in names})
    return folder


MODELS: dict[str, Callable[[], Any]] = {
    "cnn": cnn,
    "several": several,
    "transformer": transformer,
    "unnamed": unnamed,
    "lstm": lambda: of_one(layers.Bidirectional(layers.LSTM(4), name="lstm"), (5, 3)),
    "gru": lambda: of_one(layers.GRU(4, return_sequences=True, name="gru"), (5, 3)),
    "constants": lambda: of_one(layers.Normalization(mean=[1.0, 2.0], variance=[3.0, 4.0]), (2,)),
    "celu": lambda: of_one(layers.Activation("celu"), (6,)),
    "groups": lambda: of_one(layers.GroupNormalization(2), (4, 4, 6)),
    "resized": lambda: of_one(layers.UpSampling2D(2, interpolation="bilinear"), (4, 4, 3)),
}
