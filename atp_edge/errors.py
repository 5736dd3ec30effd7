"""What the command line answers with an exit code of its own."""


class NotProvenError(RuntimeError):
    """The exported model does not equal the PyTorch model."""
