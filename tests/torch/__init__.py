"""Tests with a real PyTorch (`tox -e torch`); elsewhere they are skipped."""
