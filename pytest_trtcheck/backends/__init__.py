"""The systems that run or build models, one file each."""
