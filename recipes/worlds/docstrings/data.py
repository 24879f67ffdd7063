"""Signatures and docstrings of the running Python's standard library.

The only text that is on every machine with Python on it: the source of the standard library is
parsed with `ast`, never imported, so that reading it has no side effects and needs no network.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
import warnings
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

MAX_PROMPT_CHARS = 90
MAX_COMPLETION_CHARS = 80
MIN_COMPLETION_CHARS = 8

# Third-party packages are not the standard library. Test suites are skipped because some
# distributions leave them out, because they say little, and because they are most of the bytes.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return `name(a, b=..., *args)` of a function, without annotations, `self` and `cls`."""
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    first_default = len(positional) - len(args.defaults)
    parts = [a.arg + ("=..." if i >= first_default else "") for i, a in enumerate(positional)]
    # The receiver says nothing about what the function does, and compute is tiny.
    if parts and parts[0] in ("self", "cls"):
        parts = parts[1:]
    if args.vararg is not None:
        parts.append("*" + args.vararg.arg)
    elif args.kwonlyargs:
        parts.append("*")
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parts.append(arg.arg + ("=..." if default is not None else ""))
    if args.kwarg is not None:
        parts.append("**" + args.kwarg.arg)
    return f"{node.name}({', '.join(parts)})"


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the first line of a function's docstring, or an empty string."""
    docstring = ast.get_docstring(node, clean=True) or ""
    return docstring.strip().split("\n", 1)[0].strip()


def _parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file, or None where it does not parse."""
    try:
        with warnings.catch_warnings():
            # Invalid escapes in other people's string literals are none of the caller's business.
            warnings.simplefilter("ignore")
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def standard_library_files(root: Path | None = None) -> list[Path]:
    """List the Python files of the standard library.

    Args:
        root: folder to search; the running Python's standard library when None.

    Returns:
        The paths relative to `root`, sorted, without tests and third-party
        packages.

    Raises:
        FileNotFoundError: when there is no Python source below `root`.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    files = sorted(path for path in relative if _SKIPPED_FOLDERS.isdisjoint(path.parts))
    if not files:
        raise FileNotFoundError(f"no Python source below {root}: is the standard library zipped?")
    return files


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """In the order of `ast.walk`, without the expressions, which hold no function and are most of a tree."""
    todo: deque[ast.AST] = deque([tree])
    while todo:
        node = todo.popleft()
        todo.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case))
        )
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def extract_pairs(root: Path | None = None) -> tuple[list[dict[str, str]], int]:
    """Read every documented function of the standard library.

    Args:
        root: folder to search; the running Python's standard library when None.

    Returns:
        The rows, each with `module` (the file, as `a/b.py`), `signature`, `prompt` and
        `completion`, in the order of the sorted files and without duplicate pairs; and the
        number of files that did not parse.

    Raises:
        FileNotFoundError: when there is no Python source below `root`.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    unparsable = 0
    for path in standard_library_files(root):
        tree = _parse(root / path)
        if tree is None:
            unparsable += 1
            continue
        for node in _functions(tree):
            completion = _first_line(node)
            signature = _signature(node)
            prompt = format_prompt(signature)
            if not MIN_COMPLETION_CHARS <= len(completion) <= MAX_COMPLETION_CHARS:
                continue
            if len(prompt) > MAX_PROMPT_CHARS or not completion.isascii() or not prompt.isascii():
                continue
            if (prompt, completion) in seen:
                continue
            seen.add((prompt, completion))
            rows.append(
                {
                    "module": path.as_posix(),
                    "signature": signature,
                    "prompt": prompt,
                    "completion": completion,
                }
            )
    return rows, unparsable


@functools.cache  # seconds; who looks at the data before a run reads them once more in it
def _pairs_of_the_library() -> tuple[list[dict[str, str]], int]:
    return extract_pairs()


def format_prompt(signature: str) -> str:
    """Return the prompt of a signature: the head of the function and the opening quotes."""
    return f'def {signature}:\n    """'


def _is_test_module(module: str, test_percent: int) -> bool:
    # A cryptographic hash, because `hash` of a string changes with every process.
    return int(hashlib.sha256(module.encode()).hexdigest(), 16) % 100 < test_percent


def load_docstrings(*, root: Path | None = None, test_percent: int = 10) -> DatasetDict:
    """Return signatures and the first lines of their docstrings as a train and a test split.

    The split is by module, so that near copies inside one file stay on one side; a training row
    whose prompt also occurs in a test module is dropped, so that no prompt is in both.

    Args:
        root: folder to search; the running Python's standard library when None.
        test_percent: share of the modules that go to `test`, in percent.

    Returns:
        `train` and `test`, each with the string columns `prompt` (ends with the opening quotes),
        `completion` (one line, without closing quotes) and `signature`. The rows are
        the same for the same Python version, in the same order.

    Raises:
        ValueError: when `test_percent` is not in 1..99, or a split comes out empty.
        FileNotFoundError: when there is no Python source below `root`.
    """
    if not 1 <= test_percent <= 99:
        raise ValueError(f"test_percent must be in 1..99, got {test_percent}")
    rows, _ = _pairs_of_the_library() if root is None else extract_pairs(root)
    test = [row for row in rows if _is_test_module(row["module"], test_percent)]
    test_prompts = {row["prompt"] for row in test}
    train = [
        row for row in rows if not _is_test_module(row["module"], test_percent) and row["prompt"] not in test_prompts
    ]
    if not train or not test:
        raise ValueError(f"empty split: {len(train)} training rows, {len(test)} test rows")
    columns = ("prompt", "completion", "signature")
    return DatasetDict(
        {
            name: Dataset.from_dict({key: [row[key] for row in part] for key in columns})
            for name, part in (("train", train), ("test", test))
        }
    )
