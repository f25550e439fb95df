"""A model that the Triton Inference Server serves."""
