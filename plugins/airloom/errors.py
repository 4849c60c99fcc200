"""Every error that Airloom raises on purpose.

    AirloomError
    ├── ConfigError          a pipeline YAML, a setting or a parameter is wrong
    ├── ContractError        a request, result or journal file does not follow the contract
    ├── NotFoundError        a tag, run, model, release or prediction that was named does not exist
    ├── ConflictError        somebody else holds or has written what was about to be written
    ├── ServiceError         an outside system refused, failed or is unreachable
    │   ├── AuthError        it refused the credentials
    │   ├── StorageFullError it has no room left
    │   └── UnavailableError it did not answer; trying again may help
    ├── StageFailedError     a stage ended without a result
    ├── BuildFailedError     a commit of a stage repo cannot be used: it does not compile, load or follow the rules
    ├── DataRejectedError    the data did not pass validation
    ├── RolledBackError      a deployment was undone; the earlier release answers
    └── PlatformError        the embedded platform cannot start, stop or be found

Each message says what was wrong, the value found, and what to do next.
"""

from __future__ import annotations


class AirloomError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what was wrong, with the value that was found.
        hint: what to do next; shown on a line of its own.
    """

    exit_code = 1
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  -> {self.hint}" if self.hint else self.message


class ConfigError(AirloomError):
    exit_code = 2


class ContractError(AirloomError):
    exit_code = 3


class NotFoundError(AirloomError):
    exit_code = 4


class ConflictError(AirloomError):
    exit_code = 5


class ServiceError(AirloomError):
    exit_code = 6


class AuthError(ServiceError):
    pass


class StorageFullError(ServiceError):
    pass


class UnavailableError(ServiceError):
    retryable = True


class StageFailedError(AirloomError):
    """A stage process or container ended without a usable result.

    Args:
        retryable: whether running it again may succeed (killed, lost, temporarily unavailable)
            or cannot (bad data, bad request, out of memory).
    """

    exit_code = 7

    def __init__(self, message: str, *, hint: str | None = None, retryable: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.retryable = retryable


class DataRejectedError(AirloomError):
    exit_code = 8


class RolledBackError(AirloomError):
    exit_code = 9


class PlatformError(AirloomError):
    exit_code = 10


class BuildFailedError(AirloomError):
    exit_code = 11
