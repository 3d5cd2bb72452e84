"""Everything that can go wrong, as OpenAI's clients expect to be told: a status and `{"error": {...}}`."""

from collections.abc import Mapping
from typing import Any

from activation_beacon.errors import (
    BeaconError,
    CapacityError,
    FileFormatError,
    MismatchError,
    StorageError,
    UnsupportedError,
)
from activation_beacon.server.jobs import BusyError, ClosedError, LateError

RETRY_AFTER_S = 2


class NotFoundError(BeaconError, LookupError):
    """A context, a response or a model that is not here."""


class QuotaError(BeaconError, OSError):
    """The folder of contexts is as full as it may be."""


# The first that fits counts.
STATUSES: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (NotFoundError, 404, "invalid_request_error", "not_found"),
    (BusyError, 429, "rate_limit_error", "queue_full"),
    (LateError, 504, "timeout_error", "timeout"),
    (ClosedError, 503, "server_error", "shutting_down"),
    (QuotaError, 507, "insufficient_storage_error", "folder_full"),
    (CapacityError, 400, "invalid_request_error", "context_length_exceeded"),
    (MismatchError, 409, "invalid_request_error", "context_of_another_model"),
    (FileFormatError, 422, "invalid_request_error", "context_damaged"),
    (UnsupportedError, 400, "invalid_request_error", "unsupported"),
    (StorageError, 507, "insufficient_storage_error", "storage"),
    (BeaconError, 400, "invalid_request_error", "invalid_value"),
)


def body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error; what of a request is quoted in it may hold anything."""
    message = message.encode("utf-8", "replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def described(error: Exception) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    """Status, body and headers for an error; what is our own mistake is not told in detail."""
    for kind, status, name, code in STATUSES:
        if isinstance(error, kind):
            headers = {"Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else {}
            return status, body(str(error), kind=name, code=code), headers
    text = "Something went wrong in the server. Its log has the details."
    return 500, body(text, kind="server_error", code="internal_error"), {}
