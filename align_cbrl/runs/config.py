"""Configurations: YAML files and `key.sub=value` overrides to typed, nested dataclasses, and back to a fingerprint."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

import yaml

from align_cbrl.errors import InputError

T = TypeVar("T")
Path_ = tuple[str, ...]  # where a value stands in a configuration: ("hpgd", "steps")

_LARGEST_FILE = 2**18  # characters
_LARGEST_INTEGER = 10**308  # that a float can be
_MOST_VALUES = 100_000
_DEEPEST = 40
_LONGEST_NUMBER = 400  # characters
_NAMED = re.compile(r"([A-Za-z_][\w.]*(?:\[\w+\])*): (.*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # YAML 1.1 reads 1e-3 as a string


@overload
def load_config(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T: ...
@overload
def load_config(cls: types.UnionType, path: Path | None, overrides: Sequence[str] = ()) -> Any: ...
def load_config(cls: Any, path: Path | None, overrides: Sequence[str] = ()) -> Any:
    """A `cls` from its defaults, then the YAML file at `path`, then `overrides`.

    Where an override names another of several dataclasses than the file does, what the file says of its own is left
    out: `judge.url=https://...` replaces a `judge: {function: ...}` of the file.

    Args:
        cls: a dataclass, or a union of dataclasses that a tag or a needed key tells apart; fields may be numbers,
            strings, booleans, paths, None-unions, literals, lists, tuples, dictionaries and such dataclasses.
        path: a YAML file holding a mapping, or None for the defaults.
        overrides: `key=value` or `key.sub=value`, the values read as YAML; list items are numbered
            from 0, as in `rewards.0.weight=1`.

    Raises:
        InputError: a file that is missing or is not a YAML mapping, a key that does not exist (the message lists the
            near ones), a missing key, a value of the wrong type, or one that the dataclass itself refuses.

    Example:
        >>> @dataclasses.dataclass
        ... class Config:
        ...     steps: int = 10
        ...     lr: float = 0.1
        >>> load_config(Config, None, ["lr=1e-3"])
        Config(steps=10, lr=0.001)
    """
    tree = {} if path is None else _read_mapping(path)
    sources = Sources(path, copy.deepcopy(tree))
    for override in overrides:
        sources.add(_apply(tree, override), override)
    return _Builder(sources).value(cls, tree, ())


class Sources:
    """Where the values of a configuration come from: its file, one of the overrides, or the defaults.

    Args:
        path: the YAML file, or None.
        in_file: what it holds.
    """

    def __init__(self, path: Path | None, in_file: Mapping[str, Any]) -> None:
        self._name = "defaults" if path is None else str(path)
        self._in_file = in_file
        self._overrides: dict[Path_, str] = {}

    @classmethod
    def read(cls, path: Path | None, overrides: Sequence[str] = ()) -> Sources:
        """The sources of what `load_config` makes of the same file and overrides.

        Example:
            >>> Sources.read(None, ["hpgd.steps=9"]).where("hpgd.steps")
            '--set hpgd.steps=9: hpgd.steps'
        """
        tree = {} if path is None else _read_mapping(path)
        sources = cls(path, copy.deepcopy(tree))
        for override in overrides:
            sources.add(_apply(tree, override), override)
        return sources

    def overridden(self, at: Path_) -> set[str]:
        """The names below `at` that overrides give values to."""
        return {str(keys[len(at)]) for keys in self._overrides if keys[: len(at)] == at != keys}

    def add(self, keys: Path_, override: str) -> None:
        """Note that the value at `keys` comes from this override."""
        self._overrides[keys] = f"--set {override}"

    def where(self, key: str) -> str:
        """A dotted key, and in front of it the file or the override that sets it, as errors begin.

        Example:
            >>> Sources(Path("my.yaml"), {"seeds": [0]}).where("world.model")
            'my.yaml: world.model (its default)'
        """
        at = tuple(key.split(".")) if key else ()
        told = self.of(at)
        default = at and told.startswith(f"{self._name}: ") and not _contains(self._in_file, at)
        return f"{told} (its default)" if default else told

    def of(self, at: Path_) -> str:
        """See `where`; the key in parts."""
        source, here = self._name, _contains(self._in_file, at)
        for keys, override in self._overrides.items():
            if at[: len(keys)] == keys or (at and at == keys[: len(at)] and not here):
                source = override
        return f"{source}: {'.'.join(at)}" if at else source


def named_in(message: str, owner: str = "") -> tuple[Path_, str]:
    """The key that an error's message begins with, in parts, and the rest of the message; no key where there is none.

    Args:
        message: of an `InputError`.
        owner: the class whose fields it may be about, which `checked` puts in front.

    Example:
        >>> named_in("Loop.steps: expected a whole number >= 1, got 0", "Loop")
        (('steps',), 'expected a whole number >= 1, got 0')
        >>> named_in("expected at least one")
        ((), 'expected at least one')
    """
    found = _NAMED.fullmatch(message)
    if found is None:
        return (), message
    name = found[1].removeprefix(f"{owner}.") if owner else found[1]
    return tuple(name.replace("[", ".").replace("]", "").split(".")), found[2]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists, numbers and strings, ready for JSON or YAML.

    Raises:
        InputError: when `config` is not an instance of a dataclass, or holds something that is not plain data.
    """
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise InputError(f"to_dict: expected an instance of a dataclass, got {config!r}")
    plain: dict[str, Any] = to_plain(config, ())
    return plain


def fingerprint(config: Any) -> str:
    """The SHA-256 of a configuration (a dataclass or a mapping): equal exactly when all values are equal.

    Example:
        >>> fingerprint({"steps": 1, "lr": 0.1}) == fingerprint({"lr": 0.1, "steps": 1})
        True
    """
    canonical = json.dumps(to_plain(config, ()), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def nearest(word: str, options: Collection[str]) -> str:
    """The end of an error message about an unknown `word`: what was probably meant, and what there is.

    Example:
        >>> nearest("setps", ["steps", "seed"])
        "did you mean 'steps'? There are: seed, steps"
    """
    if not options:
        return "there are none"
    names = sorted(options)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    there_are = f"here are: {', '.join(names)}" if len(names) <= 20 else f"here are {len(names)} names"
    if not close:
        return f"t{there_are}"
    return f"did you mean {' or '.join(map(repr, close))}? T{there_are}"


def near_path(path: str | Path) -> str:
    """The end of an error message about a path that does not exist: what lies there under a similar name, or nothing.

    Example:
        >>> near_path("nowhere/at/all")
        ''
    """
    wanted = Path(path).expanduser()
    try:
        beside = [entry.name for entry in wanted.parent.iterdir()] if not wanted.exists() else []
    except OSError:
        return ""
    close = difflib.get_close_matches(wanted.name, beside, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(str(Path(path).parent / name)) for name in close)}?" if close else ""


class _Builder:
    """Builds typed values out of a YAML tree; knows which file or override every value came from, for the errors."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources

    def dataclass(self, cls: type[T], tree: Any, at: Path_, default: Any) -> T:
        """A `cls`; fields that `tree` leaves out come from `default`, an instance of `cls`, where there is one."""
        if not isinstance(tree, Mapping):
            raise self._error(at, f"expected a mapping of {cls.__name__}'s fields, got {_describe(tree)}")
        fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
        hints = get_type_hints(cls)
        for key in tree:
            if key not in fields:
                deeper = _elsewhere(cls, str(key))
                hint = f"did you mean {' or '.join(deeper)}?" if deeper else nearest(str(key), fields)
                raise self._error((*at, str(key)), f"unknown key; {hint}")
        values: dict[str, Any] = {}
        for name, field in fields.items():
            fallback = getattr(default, name) if default is not None else default_of(field)
            if name in tree:
                values[name] = self.value(hints[name], tree[name], (*at, name), fallback)
            elif fallback is not dataclasses.MISSING:
                values[name] = fallback
            else:
                raise self._error((*at, name), f"is required: expected {type_name(hints[name])}")
        try:
            return cls(**values)
        except InputError as error:
            named, message = named_in(str(error), cls.__name__)
            named = named[1:] if at and named[:1] == at[-1:] else named  # the mapping itself, by its own name
            if named and named[0] not in fields:  # a subject, and no key
                raise self._error(at, str(error)) from error
            raise self._error((*at, *named), message) from error

    def value(self, hint: Any, given: Any, at: Path_, default: Any = dataclasses.MISSING) -> Any:
        """`given` as a value of the type `hint`."""
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any or isinstance(hint, TypeVar):
            return given
        if origin in (Union, types.UnionType):
            return self._union(hint, given, at, default)
        if origin is Literal:
            if given in arguments and type(given) in {type(a) for a in arguments}:
                return given
            options = [str(a) for a in arguments]
            advice = nearest(str(given), options)
            if isinstance(given, bool):  # YAML reads on, off, yes and no as these
                if (switch := "on" if given else "off") in arguments:
                    return switch
                advice = "put it in quotes to make it a string"
            raise self._error(at, f"expected {type_name(hint)}, got {_describe(given)}; {advice}")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return self.dataclass(hint, given, at, default if isinstance(default, hint) else None)
        container = origin or hint
        if container in (list, Sequence, tuple, set, frozenset):
            return self._sequence(hint, container, arguments, given, at)
        if container in (dict, Mapping):
            if not isinstance(given, Mapping):
                raise self._wrong(at, hint, given)
            key, item = arguments or (Any, Any)
            return {self.value(key, k, (*at, str(k))): self.value(item, v, (*at, str(k))) for k, v in given.items()}
        return self._scalar(hint, given, at)

    def _scalar(self, hint: Any, given: Any, at: Path_) -> Any:
        if hint is type(None) and given is None:
            return None
        if hint is float:
            number = None
            if isinstance(given, str) and len(given) <= _LONGEST_NUMBER and _NUMBER.fullmatch(given):
                number = float(given)
            elif isinstance(given, (int, float)) and not isinstance(given, bool):
                number = float(given) if abs(given) < _LARGEST_INTEGER else math.inf
            if number is not None and math.isfinite(number):
                return number
            if number is not None:
                raise self._error(at, f"expected a finite number, got {_describe(given)}")
        elif hint is int:
            if isinstance(given, int) and not isinstance(given, bool):
                return given
        elif hint is Path:
            if isinstance(given, str):
                return Path(given)
        elif isinstance(hint, type) and isinstance(given, hint):
            return given
        raise self._wrong(at, hint, given)

    def _sequence(self, hint: Any, container: Any, arguments: tuple[Any, ...], given: Any, at: Path_) -> Any:
        if not isinstance(given, (list, tuple)):
            raise self._wrong(at, hint, given)
        if container is tuple and arguments and arguments[-1] is not Ellipsis:
            if len(given) != len(arguments):
                raise self._wrong(at, hint, given)
            items = arguments
        else:
            items = (arguments[0] if arguments else Any,) * len(given)
        made = [self.value(item, v, (*at, str(i))) for i, (item, v) in enumerate(zip(items, given, strict=True))]
        return made if container in (list, Sequence) else container(made)

    def _union(self, hint: Any, given: Any, at: Path_, default: Any) -> Any:
        members = [m for m in get_args(hint) if m is not type(None)]
        if given is None and len(members) < len(get_args(hint)):
            return None
        if len(members) == 1:
            if not _is_simple(members[0]):
                return self.value(members[0], given, at, default)
        elif type(given) in members:  # 3 in an `int | float` stays an int, "a" in a `float | str` a string
            return given
        classes = [m for m in members if dataclasses.is_dataclass(m)]
        if isinstance(given, Mapping) and classes:  # its own message says more than that none fits
            if len(classes) > 1 and not tag(classes[0])[1]:
                given = self._of_one_variant(classes, given, at)
            chosen = classes[0] if len(classes) == 1 else self._variant(classes, given, at, default)
            return self.value(chosen, given, at, default)
        for member in members:
            try:
                return self.value(member, given, at, default)
            except InputError:
                continue
        raise self._wrong(at, hint, given)

    def _variant(self, classes: Sequence[Any], given: Mapping[Any, Any], at: Path_, default: Any) -> Any:
        """Which of several dataclasses a mapping stands for: by a tag, or by the key that only one of them needs."""
        tags = {name: cls for cls in classes for name in tag(cls)[1]}
        if tags:
            field = tag(classes[0])[0]
            name = given.get(field)
            if name is None:
                return next((cls for cls in classes if isinstance(default, cls)), classes[0])
            if name not in tags:
                raise self._error((*at, field), f"got {_describe(name)}; {nearest(str(name), tags)}")
            return tags[name]
        keys = {variant_key(cls): cls for cls in classes}
        fitting = [cls for key, cls in keys.items() if given.get(key) is not None]
        if not fitting and isinstance(default, tuple(classes)):
            return type(default)
        if len(fitting) != 1:
            raise self._error(at, f"expected exactly one of {', '.join(sorted(keys))}, got {sorted(map(str, given))}")
        return fitting[0]

    def _of_one_variant(self, classes: Sequence[Any], given: Mapping[Any, Any], at: Path_) -> Mapping[Any, Any]:
        """Without what a file says of another variant than the one that an override names, and without null names."""
        keys = {variant_key(cls) for cls in classes}
        named = {key for key in keys if given.get(key) is not None}
        overridden = self._sources.overridden(at)
        if len(chosen := named & overridden) == 1 and named > chosen:
            given = {key: value for key, value in given.items() if key in overridden}
        return {key: value for key, value in given.items() if key in named or key not in keys}

    def _wrong(self, at: Path_, hint: Any, given: Any) -> InputError:
        advice = ""
        if hint is str and isinstance(given, (bool, int, float)):
            advice = "; put it in quotes to make it a string"
        return self._error(at, f"expected {type_name(hint)}, got {_describe(given)}{advice}")

    def _error(self, at: Path_, message: str) -> InputError:
        return InputError(f"{self._sources.of(at)}: {message}")


def _contains(tree: Any, at: Path_) -> bool:
    for key in at:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_LARGEST_FILE + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the configuration: {_reason(error)}") from error
    tree = _parsed(str(path), "not valid YAML", text)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, got {_describe(tree)}")
    return tree


def _parsed(source: str, wrong: str, text: str) -> Any:
    """The tree of a YAML text; whatever is wrong with it is said in words, and soon."""
    if len(text) > _LARGEST_FILE:
        raise InputError(f"{source}: {wrong}: expected a configuration, got more than {_LARGEST_FILE:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{source}: {wrong}: {' '.join(str(error).split())[:300]}") from error
    except RecursionError:
        raise InputError(f"{source}: {wrong}: it is nested more than {_DEEPEST} deep") from None
    except (ValueError, OverflowError, TypeError) as error:  # a date with a 13th month, a number that is none
        raise InputError(f"{source}: {wrong}: {str(error)[:300]}") from error


class _Loader(yaml.SafeLoader):
    """Plain YAML that a configuration can be made of: a tree of moderate size, whose keys are texts and stand once."""

    _depth = 0

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            self._check(node, {}, set())
        return node

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > 2 * _DEEPEST:  # the scanner is slow where it is deep; aliases are counted later
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _check(self, node: Any, sizes: dict[int, int], inside: set[int]) -> int:
        """How many nodes there are below, aliases written out, as whoever reads the tree will see them."""
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in inside:
            raise _refused("it contains itself", node)
        if len(inside) > _DEEPEST:
            raise RecursionError
        inside.add(id(node))
        size = 1
        if isinstance(node, yaml.ScalarNode):
            number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
            if number and len(node.value) > _LONGEST_NUMBER:
                raise _refused(f"it is a number of {len(node.value):,} digits", node)
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise _refused("expected a key that is a text, got a list or a mapping", key)
                if key.value in seen and key.value != "<<":  # the standard loader would drop the first one silently
                    raise _refused(f"the key {key.value!r:.60} stands twice", key)
                seen.add(key.value)
                size += 1 + self._check(value, sizes, inside)
        else:
            size += sum(self._check(value, sizes, inside) for value in node.value)
        if size > _MOST_VALUES:
            raise _refused(f"its aliases stand for more than {_MOST_VALUES:,} values", node)
        inside.discard(id(node))
        sizes[id(node)] = size
        return size


def _refused(why: str, node: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, why, node.start_mark)


def tag(cls: Any) -> tuple[str, tuple[str, ...]]:
    """The first field of a dataclass and its values, if that is a literal: what tells it from others in a union."""
    first = dataclasses.fields(cls)[0].name
    hint = get_type_hints(cls)[first]
    return first, get_args(hint) if get_origin(hint) is Literal else ()


def variant_key(cls: Any) -> str:
    """The first key without which a dataclass cannot be built: what names it in a union without tags."""
    return next((f.name for f in dataclasses.fields(cls) if default_of(f) is dataclasses.MISSING), "")


def _elsewhere(cls: type, key: str) -> list[str]:
    """The dotted names of the fields of that name inside the fields of `cls`."""
    found = []
    for name, hint in get_type_hints(cls).items():
        optional = get_origin(hint) in (Union, types.UnionType)
        for part in get_args(hint) if optional else (hint,):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                inner = {f.name for f in dataclasses.fields(part)}
                found += [f"{name}.{key}"] if key in inner else [f"{name}.{rest}" for rest in _elsewhere(part, key)]
    return found


def _apply(tree: dict[str, Any], override: str) -> Path_:
    """Write one `key.sub=value` into `tree`; returns the key's path."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise InputError(f"--set {override}: expected key=value or key.sub=value, such as hpgd.steps=100")
    if len(keys) > _DEEPEST:
        raise InputError(f"--set {override:.60}...: it is nested more than {_DEEPEST} deep")
    value = _parsed(f"--set {override:.200}", "the value is not valid YAML", text)
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise InputError(
                    f"--set {override}: {'.'.join(keys[:depth])} is a list of {len(node)}; expected the number of an "
                    f"item from 0, got {key!r}"
                )
            position: Any = int(key)
        elif isinstance(node, dict):
            position = key
        else:
            raise InputError(f"--set {override}: {'.'.join(keys[:depth])} is {_describe(node)}, it has no {key!r}")
        if last:
            node[position] = value
        elif isinstance(node, dict) and node.get(position) is None:
            node[position] = {}
        node = node[position]
    return keys


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a field, made anew by its factory; `dataclasses.MISSING` where there is none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def to_plain(value: Any, at: Path_ = ()) -> Any:
    """A value as plain dictionaries, lists, numbers and strings; `at` is where it stands, for the error."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name), (*at, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, (*at, str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v, (*at, str(i))) for i, v in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(f"{'.'.join(at) or 'configuration'}: expected plain data, got {_describe(value)}")


def _is_simple(hint: Any) -> bool:
    return hint in (int, float, str, bool, Path)


def type_name(hint: Any) -> str:
    """A type as a user would say it."""
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
    if hint in words:
        return words[hint]
    if hint is Path:
        return "a path"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(type_name(a) for a in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if (origin or hint) in (list, Sequence, set, frozenset):
        return f"a list, each item {type_name(arguments[0])}" if arguments else "a list"
    if (origin or hint) is tuple:
        if arguments and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)} items: {', '.join(type_name(a) for a in arguments)}"
        return f"a list, each item {type_name(arguments[0])}" if arguments else "a list"
    if (origin or hint) in (dict, Mapping):
        return f"a mapping, each value {type_name(arguments[1])}" if arguments else "a mapping"
    if hint is Any:
        return "anything"
    name = getattr(hint, "__name__", str(hint))
    return f"a mapping of {name}'s fields" if dataclasses.is_dataclass(hint) else name


def _describe(value: Any) -> str:
    """A value as an error message shows it: what it is and, shortened, how it looks."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {int: "the integer", float: "the number", str: "the string", list: "the list", dict: "the mapping"}
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{kinds.get(type(value), type(value).__name__)} {text}"


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8 text"
