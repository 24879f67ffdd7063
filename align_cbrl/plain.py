"""Values of a user's data as JSON holds them: in files, in the keys of caches, in the numbers of groups."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any


def type_in_brackets(value: Any) -> str:
    """Stands for a value of which nothing can be kept, such as the decoder of a film."""
    return f"<{type(value).__name__}>"


def plain(value: Any, other: Callable[[Any], Any] = type_in_brackets) -> Any:
    """A value of any type, made of what JSON knows.

    Dates and times become ISO texts, bytes and images digests of their content, arrays and tensors nested lists,
    durations, decimals, identifiers and paths texts.

    Args:
        value: whatever a column of data may hold, nested in lists and dictionaries.
        other: what becomes of a value of another type; by default its type's name.

    Example:
        >>> import datetime
        >>> plain({"day": datetime.date(2024, 5, 17), "picture": b"..."})
        {'day': '2024-05-17', 'picture': 'sha256 ab5df625bc76dbd4e163bed2dd888df8'}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(name): plain(item, other) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, other) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item, other) for item in value), key=repr)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name), other) for field in dataclasses.fields(value)}
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"sha256 {hashlib.sha256(value).hexdigest()[:32]}"
    if all(hasattr(value, name) for name in ("tobytes", "mode", "size")):  # an image of Pillow's
        return f"image {value.mode} {value.size} {plain(value.tobytes())}"
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return plain(value.tolist(), other)
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if type(value).__module__.partition(".")[0] in _PRINTED:
        return str(value)
    return other(value)


_PRINTED = {"datetime", "decimal", "fractions", "ipaddress", "pathlib", "pandas", "uuid"}
"""Modules of values that print as what they are."""
