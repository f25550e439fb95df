"""The documentation's blocks, executed: CONTRIBUTING.md says by which convention they are written."""
