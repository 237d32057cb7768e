"""What is wrong with a table, in words that name the field, its value and what would be right there."""

from __future__ import annotations

import re
import reprlib
from typing import Any, get_args, get_type_hints

import msgspec

_SHORT = reprlib.Repr()
_SHORT.maxstring = 80

_KINDS = {
    "float": "a number",
    "int": "a whole number",
    "str": "a text in quotes",
    "bool": "true or false",
    "object": "a table",
    "array": "an array",
}


def explained(text: str, table: dict[str, Any], kind: type[msgspec.Struct]) -> str:
    """Return the words of a msgspec.ValidationError as "machines[2].up_mbps must be a number, got 'fast'".

    Args:
        text: what msgspec said of `table`.
        table: what did not convert.
        kind: what it did not convert to.
    """
    at = re.search(r" - at `\$\.?([^`]*)`$", text)
    path = at[1] if at else ""
    said = text[: at.start()] if at else text
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", said, re.DOTALL):
        field, value = _joined(path, unknown[1][:100]), _value(table, path)
        inside = value.get(unknown[1]) if isinstance(value, dict) else value
        fields = ", ".join(get_type_hints(_kind_at(kind, path)))
        return f"{field} = {shown(inside)} is no field of a pool file; the fields there are {fields}"
    if missing := re.fullmatch(r"Object missing required field `(.*)`", said):
        return f"{_joined(path, missing[1])} is missing; add it (docs/pool-file.md has every field)"
    value = _value(table, path)
    found = shown(value)
    if "enum value" in said:
        return f"{path} must be one of {', '.join(get_args(_kind_at(kind, path)))}, got {found}"
    if expected := re.match(r"Expected `(\w+)[^`]*`(?: of length (\d+))?", said):
        if expected[1] == "array" and isinstance(value, dict):
            return f"{path} must be an array of tables; write [[{path}]] in double brackets above each, got {found}"
        length = f" of {expected[2]}" if expected[2] else ""
        if expected[1] in ("float", "int") and isinstance(value, str) and _number(value):
            return f"{path} must be {_KINDS[expected[1]]}, got {found}; leave the quotes out"
        return f"{path} must be {_KINDS.get(expected[1], expected[1])}{length}, got {found}"
    return f"{path or 'the top level'}: {said}, got {found}"


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _joined(path: str, field: str) -> str:
    return f"{path}.{field}" if path else field


def _value(table: Any, path: str) -> Any:
    """Return what a path such as "machines[2].up_mbps" leads to."""
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        table = table[name] if name else table[int(index)]
    return table


def _kind_at(kind: Any, path: str) -> Any:
    """Return the type that a path leads to, an optional one without its None."""
    for name, _ in re.findall(r"(\w+)|\[(\d+)\]", path):
        options = get_args(kind := get_type_hints(kind)[name]) if name else get_args(kind)
        if not name or type(None) in options:
            kind = options[0]
    return kind


def shown(value: object) -> str:
    """Return a value for a message, shortened."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to write out integers of more than 4300 digits
        return "a number of thousands of digits"
