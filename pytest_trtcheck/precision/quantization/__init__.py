"""INT8 and FP8: where Q/DQ goes, the ranges of activations, and Q/DQ as arithmetic."""
