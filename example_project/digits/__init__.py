"""A classifier of handwritten digits: trained with PyTorch, shipped as ONNX, served by TensorRT."""
