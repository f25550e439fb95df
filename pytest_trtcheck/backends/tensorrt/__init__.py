"""TensorRT and TensorRT-RTX: engines built in a process apart, kept in the cache, run on the GPU."""
