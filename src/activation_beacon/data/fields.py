"""What stands in a record: bytes made text, text made JSON, and the texts of its fields. Knows no files."""

import json
from typing import Any, Literal

from activation_beacon.data.data_files import BadRecord
from activation_beacon.errors import reason

BYTE_ORDER_MARK = "\ufeff"


def decoded(octets: bytes) -> str:
    """Bytes as text.

    Raises:
        BadRecord: if they are not UTF-8, or no text.
    """
    try:
        text = octets.decode("utf-8")
    except UnicodeDecodeError as error:
        detail = f"bytes that are not UTF-8 (0x{octets[error.start]:02x} at byte {error.start + 1})"
        raise BadRecord("not UTF-8", detail, error.start) from error
    if (zero := octets.find(0)) >= 0:
        raise BadRecord("binary", f"no text but a binary file, or UTF-16 (a NUL at byte {zero + 1})", zero)
    return text.removeprefix(BYTE_ORDER_MARK)


def parsed(octets: bytes, whole: Literal["line", "file"]) -> Any:
    """The JSON value that a line or a file holds.

    Raises:
        BadRecord: if it is not JSON.
    """
    text = decoded(octets)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if whole == "line" else f"line {error.lineno}, column {error.colno}"
        way_out = "; if each line is a record, call it .jsonl" if (whole, error.msg) == ("file", "Extra data") else ""
        detail = f"the {whole} is not JSON ({error.msg} at {place}){way_out}"
        raise BadRecord("broken JSON", detail, len(text[: error.pos].encode())) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord("broken JSON", f"the {whole} is not JSON that can be read ({reason(error)})") from error


def object_of(value: Any, whole: Literal["line", "file", "item"]) -> dict[str, Any]:
    """The value, which must be an object.

    Raises:
        BadRecord: if it is another.
    """
    if not isinstance(value, dict):
        raise BadRecord("no object", f"the {whole} is JSON but no object with fields (a {type(value).__name__})")
    return value


def field_of(fields: dict[str, Any], name: str, kind: type, called: str) -> Any:
    """A field of one type.

    Args:
        called: what its values are called in messages.

    Raises:
        BadRecord: if there is none, or it has another type.
    """
    if name not in fields:
        known = ", ".join(map(str, fields)) or "none"
        raise BadRecord("missing field", f'there is no field "{name}" (fields: {known})')
    value = fields[name]
    if not isinstance(value, kind):
        raise BadRecord("wrong type", f'the field "{name}" is no {called} but a {type(value).__name__}')
    return value


def text_of(fields: dict[str, Any], name: str, *, empty: str) -> str:
    """A field's text.

    Args:
        empty: what a record is counted under if the text is empty.

    Raises:
        BadRecord: if there is none.
    """
    text: str = field_of(fields, name, str, "text")
    if not text.strip():
        raise BadRecord(empty, f'the field "{name}" is empty')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord("not UTF-8", f'the field "{name}" holds half a character (a lone surrogate)') from error
    return text
