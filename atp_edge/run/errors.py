"""Errors that a caller tells from others."""


class NotProvenError(RuntimeError):
    """The exported model does not equal the PyTorch model."""


class TakenError(ValueError):
    """Another process works on the same folder."""
