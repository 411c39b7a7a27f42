"""The error tree. Every message says what was wrong, where, and what to do."""

from __future__ import annotations


class TinsmithError(Exception):
    """Base of every error that Tinsmith raises on purpose."""


class InvalidInput(TinsmithError, ValueError):
    """An argument cannot be used; the run and the service are unchanged."""


class NotFound(TinsmithError, LookupError):
    """A run, checkpoint, model, environment or loss of that name does not exist."""


class Unavailable(TinsmithError):
    """The part that should answer is gone or cannot start here."""


class OutOfCapacity(TinsmithError):
    """The request is valid but can never fit in the memory or limits configured."""


class Busy(TinsmithError):
    """There is as much work under way as is let in, or a quota is used up for the moment.

    Attributes:
        retry_after_s: when it is worth trying again, in seconds from now.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class StorageFailure(TinsmithError):
    """A file could not be written: the disk is full, read-only or broken. Nothing is half-written."""


class CorruptLog(TinsmithError):
    """A run's log or snapshot is damaged where it was whole before; names the file and the place."""


class OperationCrashed(TinsmithError):
    """The process that did this operation died of it, again and again; names the operation."""


class OpCancelled(TinsmithError):
    """The operation was withdrawn with `Op.cancel()` before it started."""


class EnvironmentFailure(TinsmithError):
    """An environment raised, hung, ran out of memory or died; only its episode is lost."""


class RolloutFailure(TinsmithError):
    """So many episodes failed in a row that going on would only burn time."""
