"""What a function or a model is, by its content: equal identities mean equal scores, so that they may be kept.

A score that was paid for may be used again, and a run continued, only where what scored is still the same. An identity
is therefore a digest of everything in a function that can be read: its bytecode and that of the functions and classes
of one's own that it refers to, the values of the globals, closures and defaults in them, the files of modules that it
imports, and name and version of everything that is installed. What cannot be read, such as a connection, has no
identity; it can be given one in an attribute `identity`.

What the function itself rebinds (`global` or `nonlocal` names that it assigns to) is its memory, and left out. Bytecode
differs between versions of Python, and so do identities.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from align_cbrl.checks import checked
from align_cbrl.errors import InputError, first_line


@checked
def identity_of(thing: Any) -> str | None:
    """The identity of a function, a model or another object: its name and a digest of its content; None without one.

    An object's own attribute `identity`, a text, is returned as it is.

    Example:
        >>> first, second = lambda completions: [0.0], lambda completions: [1.0]
        >>> identity_of(first) == identity_of(second)
        False
        >>> identity_of(row for row in ["a generator"]) is None
        True
    """
    try:
        return _identity(thing)
    except _UnreadableError:
        return None


def require_identity(name: str, thing: Any) -> str:
    """As `identity_of`, for what is kept across runs.

    Raises:
        InputError: it has no identity; the message says what in it cannot be read.
    """
    try:
        return _identity(thing)
    except _UnreadableError as reason:
        raise InputError(
            f"{name}: cannot be told from another one, since {reason}; give it an attribute `identity`, a text that "
            "changes whenever its scores do"
        ) from None


def content_digest(value: Any) -> str:
    """The SHA-256 of plain data and tensors, and of functions and objects inside.

    Raises:
        InputError: something in it cannot be read.

    Example:
        >>> content_digest({"a": torch.zeros(2)}) == content_digest({"a": torch.zeros(2, dtype=torch.float64)})
        False
    """
    try:
        return _Digest().of(value).hex()
    except _UnreadableError as reason:
        raise InputError(f"no digest: {reason}") from None


class _UnreadableError(Exception):
    """Why something has no identity."""


def _identity(thing: Any) -> str:
    if isinstance(own := getattr(thing, "identity", None), str):
        return own
    named = thing if hasattr(thing, "__qualname__") else getattr(thing, "func", type(thing))
    name = getattr(named, "__qualname__", type(thing).__qualname__)
    try:
        return f"{name} {_Digest().of(thing, root=True).hex()[:32]}"
    except RecursionError:
        raise _UnreadableError(f"{name} is nested too deeply") from None


class _Digest:
    """Digests of values, each a hash of its kind and of the digests of its parts."""

    def __init__(self) -> None:
        self._known: dict[int, bytes] = {}
        self._files: dict[Path, bytes] = {}
        self._alive: list[Any] = []  # an id is that of one object only while it lives

    def of(self, value: Any, *, root: bool = False) -> bytes:
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return _hashed(type(value).__name__, repr(value))
        if (known := self._known.get(id(value))) is not None:
            return known
        self._alive.append(value)
        self._known[id(value)] = _hashed("again", str(len(self._known)))  # where it contains itself
        found = self._known[id(value)] = self._content(value, root)
        return found

    def all(self, kind: str, values: Iterable[Any]) -> bytes:
        return _hashed(kind, *[self.of(value) for value in values])

    def _content(self, value: Any, root: bool) -> bytes:
        if isinstance(own := getattr(value, "identity", None), str) and not isinstance(value, type):
            return _hashed("identity", own)
        if isinstance(value, FunctionType):
            return self._function(value, root)
        if isinstance(value, CodeType):
            return self._code(value)
        if isinstance(value, ModuleType):
            return self._module(value.__name__)
        if isinstance(value, type):
            return self._class(value, root)
        if type(value) in (list, tuple):
            return self.all(type(value).__name__, value)
        if type(value) is dict:
            return self.all("dict", [part for item in value.items() for part in item])
        if type(value) in (set, frozenset):
            return _hashed("set", *sorted(self.of(part) for part in value))
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, (staticmethod, classmethod)):
            return self.all(type(value).__name__, [value.__func__])
        if isinstance(value, property):
            return self.all("property", [value.fget, value.fset])
        if isinstance(value, BuiltinFunctionType) and isinstance(value.__self__, ModuleType):
            return _hashed("builtin", value.__qualname__, self._module(value.__self__.__name__))
        if (wrapped := getattr(value, "__wrapped__", None)) is not None:  # as functools.lru_cache leaves it
            return self.all("wrapped", [type(value), wrapped])
        return self._object(value)

    def _function(self, function: FunctionType, root: bool) -> bytes:
        """Code, defaults and closure; and what its names mean, unless it is installed: then its version says so."""
        code, module = function.__code__, function.__globals__.get("__name__")
        written = _rebound(code)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        parts = [
            self._code(code),
            self.all("defaults", [function.__defaults__, function.__kwdefaults__, dict(vars(function))]),
            *(self._cell(cell) for name, cell in cells if name not in written),
        ]
        if not root and isinstance(module, str) and _release(module) is not None:
            return _hashed("function", *parts, self._module(module))
        for name in sorted(_globals_read(code) - written):
            if name in function.__globals__:
                parts.append(_hashed("global", name, self.of(function.__globals__[name])))
        package = function.__globals__.get("__package__") or ""
        return _hashed("function", *parts, *self._imported(code, package))

    def _cell(self, cell: Any) -> bytes:
        try:
            return self.of(cell.cell_contents)
        except ValueError:  # not assigned yet
            return _hashed("empty")

    def _code(self, code: CodeType) -> bytes:
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return self.all("code", [code.co_code, code.co_consts, names, counts])

    def _class(self, cls: type, root: bool) -> bytes:
        if not root and _release(cls.__module__) is not None:
            return _hashed("class", cls.__qualname__, self._module(cls.__module__))
        parts = [_hashed(name, self.of(value)) for name, value in vars(cls).items() if name not in _BOOKKEEPING]
        return _hashed("class", cls.__qualname__, *parts, self.all("bases", cls.__bases__))

    def _tensor(self, value: Tensor) -> bytes:
        plain = value.detach().cpu().contiguous()
        content = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
        return _hashed("tensor", str(value.dtype), repr(tuple(value.shape)), content)

    def _object(self, value: Any) -> bytes:
        """What pickle would write; nothing is pickled."""
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
            if isinstance(reduced, str):  # stands in its module under this name
                return _hashed("named", reduced, self._module(getattr(value, "__module__", None) or "builtins"))
            parts = [list(part) if isinstance(part, Iterator) else part for part in reduced]
        except _UnreadableError:
            raise
        except Exception as error:  # the class may be anybody's
            raise _UnreadableError(
                f"a {type(value).__qualname__} in it cannot be read ({first_line(error)})"
            ) from error
        return self.all("object", parts)

    def _module(self, name: str) -> bytes:
        """Name and version of an installed module; the file of another one, and what that imports."""
        if (release := _release(name)) is not None:
            return _hashed("module", name, release)
        module = sys.modules.get(name)
        if module is None or not (file := getattr(module, "__file__", None)):
            raise _UnreadableError(f"the module {name!r} has no source file")
        return self._file(Path(file), getattr(module, "__package__", None) or "")

    def _file(self, file: Path, package: str) -> bytes:
        if file not in self._files:
            self._files[file] = _hashed("again", file.name)
            source = file.read_bytes()
            imported = self._imported(compile(source, str(file), "exec"), package) if file.suffix == ".py" else []
            self._files[file] = _hashed("file", source, *imported)
        return self._files[file]

    def _imported(self, code: CodeType, package: str) -> list[bytes]:
        """The modules that code imports when it runs, whether they are loaded yet or not."""
        found: set[bytes] = set()
        for name, level, members in _import_statements(code):
            base = importlib.util.resolve_name("." * level + name, package) if level else name
            for candidate in (base, *(f"{base}.{member}" for member in members)):
                if (release := _release(base)) is not None:
                    found.add(_hashed("module", base, release))
                elif (file := _source_of(candidate)) is not None:  # wherever it lies: its name may come from its folder
                    found.add(self._file(file[0], file[1]))
        return sorted(found)


_BOOKKEEPING = frozenset(
    "__module__ __dict__ __weakref__ __doc__ __annotations__ __annotate__ __firstlineno__ __static_attributes__ "
    "__abstractmethods__ _abc_impl __dataclass_fields__ __dataclass_params__ __parameters__ __orig_bases__".split()
)
"""Attributes of classes that Python writes itself."""


def _hashed(kind: str, *parts: str | bytes) -> bytes:
    digest = hashlib.sha256()
    for part in (kind, *parts):
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Code and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _rebound(code: CodeType) -> set[str]:
    """Names that a function assigns to outside of itself."""
    steps = [step for part in _codes(code) for step in dis.get_instructions(part)]
    free = set(code.co_freevars)
    return {s.argval for s in steps if s.opname == "STORE_GLOBAL" or (s.opname == "STORE_DEREF" and s.argval in free)}


def _globals_read(code: CodeType) -> set[str]:
    steps = [step for part in _codes(code) for step in dis.get_instructions(part)]
    return {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}


def _import_statements(code: CodeType) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """Name, level and members of every import, also inside functions."""
    for part in _codes(code):
        steps = list(dis.get_instructions(part))
        for i, step in enumerate(steps):
            if step.opname == "IMPORT_NAME":
                level, members = steps[i - 2].argval, steps[i - 1].argval
                yield step.argval, level, tuple(name for name in members or () if name != "*")


def _source_of(name: str) -> tuple[Path, str] | None:
    """File and package of a module that is not installed; None where there is none, such as of a function."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception:  # its package may run, and raise anything
        return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return Path(spec.origin), spec.name if spec.submodule_search_locations else spec.parent or ""


@functools.cache
def _release(module: str) -> str | None:
    """The version of the distribution that a module is installed from, or Python's; None for a module of one's own."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in sys.builtin_module_names:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"
    loaded = sys.modules.get(top)
    origin = getattr(loaded, "__file__", None)
    if loaded is None:
        spec = importlib.util.find_spec(top)
        origin = None if spec is None else spec.origin
    if origin is None or not {"site-packages", "dist-packages"} & set(Path(origin).parts):
        return None
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        names = sorted(set(importlib.metadata.packages_distributions().get(top, ())))
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) or "of unknown version"
