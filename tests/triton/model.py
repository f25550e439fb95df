"""A model of Triton's Python backend: ONNX Runtime on the file beside it. `fault` in its configuration spoils it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The name that the server looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called by the server, once."""
        config = json.loads(args["model_config"])
        self.fault = config["parameters"].get("fault", {}).get("string_value", "")
        self.asked = 0
        if self.fault == "broken":
            raise RuntimeError("the weights are gone")
        folder = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.dtypes = {each["name"]: pb_utils.triton_string_to_numpy(each["data_type"]) for each in config["output"]}
        self.types = {each.name: _TYPES[each.type] for each in self.session.get_inputs()}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Called by the server, with the requests of one batch."""
        inputs = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy().astype(dtype) for request in requests]
            for name, dtype in self.types.items()
        }
        rows = [len(array) for array in next(iter(inputs.values()))]
        fed = {name: np.concatenate(arrays) for name, arrays in inputs.items()}
        names = [each.name for each in self.session.get_outputs()]
        found = dict(zip(names, self.session.run(names, fed), strict=True))
        if self.fault == "refuses batches" and len(requests) > 1:
            raise RuntimeError("it was built for a batch of one")
        if self.fault == "swapped":
            first, second = names[:2]
            found[first], found[second] = found[second], found[first]
        self.asked += len(requests)
        if self.fault.startswith("spoils after ") and self.asked > int(self.fault.removeprefix("spoils after ")):
            found = {name: 1.1 * array for name, array in found.items()}
        if self.fault == "mixes the batch":
            found = {name: np.concatenate([array[:1]] * len(array)) for name, array in found.items()}
        if self.fault.startswith("sleeps "):
            time.sleep(float(self.fault.removeprefix("sleeps ")))
        ends = np.cumsum(rows)
        return [
            pb_utils.InferenceResponse(
                [
                    pb_utils.Tensor(name, array[end - count : end].astype(self.dtypes[name]))
                    for name, array in found.items()
                ]
            )
            for count, end in zip(rows, ends, strict=True)
        ]


_TYPES = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
