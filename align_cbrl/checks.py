"""What enters a public constructor is looked at there, once: is it of the declared type, finite, and in range?"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

from align_cbrl.errors import InputError

_T = TypeVar("_T", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, for `typing.Annotated`; both ends belong to it unless they are `open`."""

    low: float = -math.inf
    high: float = math.inf
    open: str = ""  # "low", "high" or "low high"

    def __contains__(self, value: float) -> bool:
        """Whether it lies inside; a NaN does not."""
        above = value > self.low if "low" in self.open else value >= self.low
        return above and (value < self.high if "high" in self.open else value <= self.high)

    def __str__(self) -> str:
        ends = [f"{'>' if 'low' in self.open else '>='} {self.low:g}"] if self.low > -math.inf else []
        return " and ".join(ends + ([f"{'<' if 'high' in self.open else '<='} {self.high:g}"] * (self.high < math.inf)))


Count = Annotated[int, Range(1)]
"""A whole number of at least 1."""

Several = Annotated[int, Range(2)]
"""A whole number of at least 2."""

Whole = Annotated[int, Range(0)]
"""A whole number of at least 0."""

Positive = Annotated[float, Range(0, open="low")]
"""A finite number above 0."""

NonNegative = Annotated[float, Range(0)]
"""A finite number of at least 0."""

Probability = Annotated[float, Range(0, 1)]
"""A number from 0 to 1."""

Discount = Annotated[float, Range(0, 1, open="high")]
"""A number from 0 to below 1."""

_DATA = (type(None), numbers.Number, collections.abc.Collection, Path, type, types.FunctionType)

# Beyond it, torch's integers and seeds end.
_LARGEST = 2**63


def checked(target: _T) -> _T:
    """Have a class or function refuse arguments that are not what their annotations declare.

    Numbers must be finite, whole where declared int, and inside a `Range` given by `Annotated`; containers are looked
    through; what no annotation can say is left to the constructor itself.

    Args:
        target: a class, of which `__init__` is checked, or a function.

    Raises:
        InputError: from the call: the argument, what was expected, what came.

    Example:
        >>> @checked
        ... def draw(count: Count, scale: Positive = 1.0) -> int:
        ...     return count
        >>> draw(3)
        3
        >>> draw(0)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: count: expected a whole number >= 1, got 0
    """
    if isinstance(target, type):
        constructor = inspect.getattr_static(target, "__init__")
        target.__init__ = _checked_function(constructor, target)  # type: ignore[misc]  # of a class, not an instance
        return target
    return typing.cast(_T, _checked_function(target))


def _checked_function(function: Callable[..., Any], owner: type | None = None) -> Callable[..., Any]:
    signature = inspect.signature(function)
    # A dataclass takes fields of classes in other modules, too; their annotations use names from there.
    declared = owner if owner is not None and dataclasses.is_dataclass(owner) else function

    @functools.cache
    def hints() -> dict[str, Any]:  # at the first call: a class may name others that come later in its file
        return typing.get_type_hints(declared, include_extras=True)

    @functools.wraps(function)
    def checking(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)  # a wrong name is Python's own TypeError, which says it
        prefix = "" if owner is None else f"{type(args[0]).__name__}."
        for name, value in bound.arguments.items():
            if name not in hints():
                continue
            kind = signature.parameters[name].kind
            given = {name: value}
            if kind is inspect.Parameter.VAR_KEYWORD:
                given = value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                given = {f"{name}[{i}]": item for i, item in enumerate(value)}
            for label, item in given.items():
                check(f"{prefix}{label}", item, hints()[name])
        return function(*args, **kwargs)

    return checking


def check(name: str, value: Any, hint: Any) -> None:
    """Raise `InputError` unless `value` is what the annotation `hint` declares.

    Example:
        >>> check("slip", 1.5, Probability)
        Traceback (most recent call last):
        align_cbrl.errors.InputError: slip: expected a finite number >= 0 and <= 1, got 1.5
        >>> check("shape", (2, "3"), tuple[int, ...])
        Traceback (most recent call last):
        align_cbrl.errors.InputError: shape[1]: expected a whole number, got '3', a str
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Range)]
        if not _fits(value, arguments[0]) or any(value not in extra for extra in ranges):
            _refuse(name, value, hint)
    elif origin in (Union, types.UnionType):
        _check_union(name, value, hint, arguments)
    elif origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            _refuse(name, value, hint)
    elif origin in (tuple, list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable):
        _check_sequence(name, value, hint, origin, arguments)
    elif origin in (dict, collections.abc.Mapping):
        if not isinstance(value, origin):
            _refuse(name, value, hint)
        for key, item in value.items():
            shown = f"{key!r:.40}" if isinstance(key, _DATA) else f"a {type(key).__name__}"  # a model is long to write
            check(f"{name}: key {shown}", key, arguments[0])
            check(f"{name}[{shown}]", item, arguments[1])
    elif not _fits(value, origin or hint):
        _refuse(name, value, hint)


def _check_union(name: str, value: Any, hint: Any, choices: tuple[Any, ...]) -> None:
    failures = []
    # What it may be comes first: a refusal writes the value out, and a law of transitions takes long to be written.
    for choice in sorted(choices, key=lambda choice: not _fits(value, _bare(choice))):
        try:
            check(name, value, choice)
        except InputError as error:
            failures.append((choice, error))
        else:
            return
    # Of the right kind, but out of range or wrong inside: that says more than the list of what is taken.
    close = [error for choice, error in failures if _fits(value, _bare(choice))]
    if len(close) == 1 or (close and len(failures) == 2 and type(None) in choices):
        raise close[0]
    _refuse(name, value, hint)


def _check_sequence(name: str, value: Any, hint: Any, origin: Any, arguments: tuple[Any, ...]) -> None:
    # A text is a sequence of texts to Python, and a mistake to everybody else.
    if not isinstance(value, origin) or isinstance(value, (str, bytes)):
        _refuse(name, value, hint)
    if origin is collections.abc.Iterable:  # may be read only once
        return
    if origin is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            _refuse(name, value, hint)
        each = list(arguments)
    elif _all_plain(value, arguments[0]):
        return
    else:
        each = [arguments[0]] * len(value)
    for i, (item, of_item) in enumerate(zip(value, each, strict=True)):
        check(f"{name}[{i}]", item, of_item)


def _all_plain(values: Any, kind: Any) -> bool:
    """Whether all of them are certainly of a kind, without a look at each in turn: a batch holds 100,000 tokens."""
    if kind is Any:
        return True
    kinds = set(map(type, values))
    return kinds <= {kind} and (kind is str or (kind is int and (not kinds or max(map(abs, values)) < _LARGEST)))


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a plain kind: a class, None, Any, or something that cannot be checked."""
    if kind is None or kind is type(None):
        return value is None
    if kind in (int, float) and isinstance(value, bool):  # a whole number to Python, and a mistake to everybody else
        return False
    if kind is int:
        return isinstance(value, numbers.Integral) and -_LARGEST <= int(value) < _LARGEST
    if kind is float:
        return isinstance(value, numbers.Real) and _is_finite(value)
    if kind is collections.abc.Callable:
        return callable(value)
    if not isinstance(kind, type) or kind in (Any, object):  # type variables and special forms, too
        return True
    if getattr(kind, "_is_protocol", False):
        return callable(value) if "__call__" in vars(kind) else True
    if _is_a(value, "Module"):  # also one that is wrapped, by an adapter or for several processes
        return any(isinstance(module, kind) for module in value.modules())
    if inspect.isabstract(kind) and not (isinstance(value, _DATA) or _is_a(value, "Tensor")):
        # Who fulfils a contract need not inherit from it; what has nothing of it does not fulfil it.
        names = {*dir(kind), *(name for base in kind.__mro__ for name in inspect.get_annotations(base))}
        return isinstance(value, kind) or any(hasattr(value, name) for name in names if not name.startswith("_"))
    return isinstance(value, kind)


def _is_a(value: Any, kind: Literal["Tensor", "Module"]) -> bool:
    """Whether a value is a tensor or a module; nothing is where torch has not been imported, and this does not."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor if kind == "Tensor" else torch.nn.Module)


def _is_finite(value: Any) -> bool:
    if isinstance(value, numbers.Integral):  # torch takes no larger whole number for a float either
        return -_LARGEST <= int(value) < _LARGEST
    return math.isfinite(value)


def _bare(hint: Any) -> Any:
    while typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    return typing.get_origin(hint) or hint


def _refuse(name: str, value: Any, hint: Any) -> typing.NoReturn:
    # A number out of range speaks for itself, and so does None; of anything else the kind is the news.
    plain = value is None or isinstance(value, numbers.Number)
    kind = "" if plain else f", a {type(value).__name__}"
    raise InputError(f"{name}: expected {_described(hint)}, got {_brief(value)}{kind}")


def _brief(value: Any) -> str:
    if _is_a(value, "Tensor"):
        return f"one of shape {list(value.shape)}"
    try:
        return f"{value!r:.60}"
    except Exception:  # a whole number of many thousand digits, or a foreign object whose repr raises
        return "something that cannot be printed"


def _described(hint: Any) -> str:
    """An annotation in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        ranges = [str(extra) for extra in arguments[1:] if isinstance(extra, Range)]
        return " ".join([_described(arguments[0]), *ranges])
    if origin in (Union, types.UnionType):
        return " or ".join(_described(choice) for choice in arguments)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in arguments)
    if origin in (dict, collections.abc.Mapping):
        return f"a mapping from {_described(arguments[0])} to {_described(arguments[1])}"
    if origin is tuple and Ellipsis not in arguments:
        return f"a tuple of ({', '.join(_described(item) for item in arguments)})"
    if origin in (tuple, list, set, frozenset, collections.abc.Sequence, collections.abc.Iterable):
        return f"a {origin.__name__.lower()}, each item {_described(arguments[0])}"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a finite number",
        bool: "True or False",
        str: "a text",
        None: "None",
    }
    words |= {type(None): "None", collections.abc.Callable: "a function"}
    kind = origin or hint
    if isinstance(kind, type) and kind.__module__ == "torch" and kind.__name__ == "Tensor":
        return "a tensor"
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"
