"""Every error that a user can meet.

One sentence each: the rule, the value received, the remedy. Entry points print the sentence without a
traceback and leave with ``exit_code``. Errors cross process borders (a Ray worker raises, the driver prints),
so each is made of its message alone and pickles as it is.
"""

from eqm_dist.redaction import redacted


class EqmDistError(Exception):
    """Base of all errors with a sentence for the user, in which the secrets of URLs are blotted out."""

    exit_code = 1

    def __init__(self, sentence: str = "") -> None:
        super().__init__(redacted(sentence))


class UserError(EqmDistError):
    """The user's input is wrong: exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """An option is unknown, has the wrong type, or contradicts another."""


class DataError(UserError):
    """A data set is missing, damaged, or not what the run expects."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or belongs to another run."""


class DamagedCheckpointError(CheckpointError):
    """A file of a checkpoint is missing, cannot be read, or is not what was written: an older one may do."""


class NonFiniteLossError(EqmDistError):
    """The loss became NaN or infinite; nothing after the last good checkpoint is kept."""


class StorageError(EqmDistError):
    """The machine could not read or write: a full disk, a lost mount, missing permissions."""


class TrackingError(EqmDistError):
    """The tracking server does not answer."""


class ForgottenError(TrackingError):
    """The tracking server answers, but what it is asked for was deleted there: asking again will not help."""


class BusyError(EqmDistError):
    """Another process works on the same thing; it will not be disturbed."""


class LaunchError(EqmDistError):
    """The cluster could not start or finish the run."""


class Terminated(KeyboardInterrupt):
    """The system asks the process to end (SIGTERM), as schedulers do some seconds before they kill it."""
