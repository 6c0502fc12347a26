"""From a compressed model to ONNX."""
