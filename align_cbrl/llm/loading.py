"""What is said when a model does not load, and what can be told of one before it is loaded."""

from __future__ import annotations

import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open

from align_cbrl.errors import InputError
from align_cbrl.runs.config import near_path

_NO_SUCH_MODEL = (HFValidationError, RepositoryNotFoundError)
_NOT_REACHED = (LocalEntryNotFoundError, OfflineModeIsEnabled)
_LOADERS_RAISE = (
    *(OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError, StrictDataclassError),
    pickle.UnpicklingError,  # a pickle of something other than tensors, which torch does not run
)


@contextlib.contextmanager
def loading(what: str, path: str) -> Iterator[None]:
    """Errors of other libraries that load a model, as InputErrors with their own message.

    Args:
        what: is loaded, as in "reward model", for the message.
        path: folder or hub id.

    Raises:
        InputError: the loader raised. Only where nothing was found does the message say so.

    Example:
        >>> with loading("model", "no such model"):
        ...     raise ValueError("model type `frob` is unknown")
        Traceback (most recent call last):
        align_cbrl.errors.InputError: model 'no such model': does not load, ValueError: model type `frob` is unknown
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except _LOADERS_RAISE as error:
        message = " ".join(str(error).split())[:500]
        causes = _causes(error)
        if Path(path).exists() or any(isinstance(cause, GatedRepoError) for cause in causes):
            reason = f"does not load, {type(error).__name__}: {message}"
        elif any(isinstance(cause, _NO_SUCH_MODEL) for cause in causes):
            reason = f"neither a hub id nor a folder that loads ({message})"
        elif any(isinstance(cause, _NOT_REACHED) for cause in causes):
            reason = f"there is no such folder, and of the hub there is neither a copy here nor an answer ({message})"
        else:
            reason = f"does not load, {type(error).__name__}: {message}"
        raise InputError(f"{what} {path!r}: {reason}{near_path(path)}") from error


def weight_names(path: str) -> list[str] | None:
    """The names of the weights that a folder holds, without loading them; None where that cannot be told.

    Raises:
        InputError: a folder without weights, or with a damaged index or header.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    tensors = sorted(folder.glob("*.safetensors"))
    if not tensors:
        if any(folder.glob("*.bin")):
            return None
        raise InputError(f"model {path!r}: the folder holds no weights (*.safetensors); save the model there")
    with loading("model", path):
        names: list[str] = []
        for index in folder.glob("*.safetensors.index.json"):
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if missing := sorted(files - {file.name for file in tensors}):
                raise InputError(f"model {path!r}: {index.name} names {missing[0]}, which is missing; copy it there")
        for file in tensors:
            with safe_open(file, framework="pt") as held:
                names += held.keys()
    return names


def stored_bytes(path: str) -> int:
    """Bytes of a folder's weights, in single precision; 0 of what is no folder.

    Example:
        >>> stored_bytes("someone/on-the-hub")
        0
    """
    folder = Path(path)
    size = sum(file.stat().st_size for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind))
    try:
        kind = str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("dtype"))
    except (OSError, ValueError):
        return size
    return 2 * size if kind.endswith("16") else size


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
