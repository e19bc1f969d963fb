"""The one hierarchy of errors that a user is meant to read.

Every message is one line: what came, what was expected, what to do. The jobs print it as their
last line and exit with status 2, without a traceback; any other exception is a bug of ours.
"""

from pydantic import ValidationError


class VLVError(Exception):
    """Base of all errors that are the input's fault and not the program's.

    The message becomes one printable line, whatever a user's input brought into it.
    """

    def __init__(self, message: str) -> None:
        printable = "".join(c if c.isprintable() else " " for c in message)
        super().__init__(printable)


class ConfigError(VLVError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another one."""


class DataError(VLVError):
    """A dataset is missing, empty, or lacks a column that is needed."""


class ModelError(VLVError):
    """A pretrained part is missing or does not fit the parts that it is joined with."""


class CheckpointError(VLVError):
    """A checkpoint is missing, damaged, or of another shape than the model."""


class GateError(VLVError):
    """What a job made is worse than its settings allow, and is not published."""


class RunError(VLVError):
    """An output folder cannot be used: it holds another run, or a run that is still going."""


def one_line(problem: BaseException) -> str:
    """The first line of an exception, or pydantic's first finding, short enough to be read."""
    if isinstance(problem, ValidationError):
        finding = problem.errors()[0]
        return f"{'.'.join(map(str, finding['loc']))}: {finding['msg']}"
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= 300 else text[:297] + "..."
