"""What TensorFlow computes, as ONNX: what Keras models and SavedModels have in common."""
