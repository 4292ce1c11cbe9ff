"""Checks lines of JSONL files and their fields; errors name the field as the file does."""

import json
from typing import Any

from diagnostics.support.errors import UserError

MAX_NAME_LENGTH = 200


def wrong(field: str, reason: str) -> UserError:
    """Return the error that names the field."""
    return UserError(f'field "{field}": {reason}')


def parse_object(line: str) -> dict[str, Any]:
    """Return the JSON object of a line; raise UserError where it is none."""
    try:
        record = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists a thousand deep
        raise UserError(f"not valid JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"must be a JSON object, not {kind(record)}")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; raise UserError for a name that comes twice, of which JSON would take the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise wrong(twice.encode(errors="backslashreplace").decode()[:60], "is given twice")
    return record


def _refuse_constant(name: str) -> Any:
    raise UserError(f"not valid JSON ({name} is no JSON number)")


def check_text(field: str, value: Any) -> None:
    """Raise UserError unless the value is text that can be encoded."""
    if not isinstance(value, str):
        raise wrong(field, f"must be text, not {kind(value)}")
    if not value:
        raise wrong(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(field, "holds half of a surrogate pair, which is not text") from None


def check_name(field: str, value: Any) -> None:
    """Raise UserError unless the value is a text short enough to be a name."""
    check_text(field, value)
    if len(value) > MAX_NAME_LENGTH:
        raise wrong(field, f"has {len(value)} characters; at most {MAX_NAME_LENGTH} are allowed")


def kind(value: Any) -> str:
    """Name the kind of a JSON value."""
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else names.get(type(value), type(value).__name__)
