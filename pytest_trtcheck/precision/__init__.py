"""Lowering a model to a precision, calibrating it, and emulating the result."""
