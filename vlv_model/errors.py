"""Errors that a user can fix, in one hierarchy.

Every message is one line: what came, what was expected, what to do. The jobs print it as their
last line and exit with status 2, without a traceback. Any other exception is a bug in the program.
"""

from pydantic import ValidationError


class VLVError(Exception):
    """Base of all errors that the input causes, not the program.

    Unprintable characters in the message, such as line breaks from user input, become spaces.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(printable)


class ConfigError(VLVError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another one."""


class DataError(VLVError):
    """A dataset is missing, empty, or lacks a required column."""


class ModelError(VLVError):
    """A pretrained part is missing or does not fit the other parts."""


class CheckpointError(VLVError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class GateError(VLVError):
    """A job's output fails the quality limits in its settings and is not published."""


class RunError(VLVError):
    """An output folder cannot be used: it holds another run, or a run that is still active."""


def one_line(problem: BaseException) -> str:
    """An exception as one line of at most 300 characters; of pydantic's errors, the first."""
    if isinstance(problem, ValidationError):
        finding = problem.errors()[0]
        return f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}"
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
