"""The ONNX graph of a decoder."""
