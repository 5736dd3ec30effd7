"""Errors that a caller tells from others: the command line gives each an exit code."""


class NotProvenError(RuntimeError):
    """The exported model does not equal the PyTorch model."""


class ConditionNotMetError(RuntimeError):
    """A condition that was asked for is not met by what was measured."""


class TakenError(ValueError):
    """Another process works on the same folder."""


class Stopped(BaseException):
    """A signal asked the process to end. Not an Exception: nothing but the entry point takes it."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
