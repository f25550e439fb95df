"""ONNX Runtime's GPU providers as systems under test; one file each, what they share beside them."""
