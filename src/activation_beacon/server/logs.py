"""Logs as JSON lines. What is logged are routes, numbers and ids; never what anybody wrote."""

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """One JSON object a record; a message that is an object itself becomes part of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        values = {"time": _utc(record.created), "level": record.levelname.lower(), "logger": record.name}
        message = record.getMessage()
        try:
            fields = json.loads(message)
        except ValueError:
            fields = None
        values |= fields if isinstance(fields, dict) else {"message": message}
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        return json.dumps(values)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds * 1000) % 1000:03d}Z"


def log_to_stderr() -> None:
    """Send this package's log, and uvicorn's errors, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("activation_beacon", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
