"""What is said when a model does not load: that there is none, or what the one that there is lacks."""

from __future__ import annotations

import contextlib
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
from safetensors import SafetensorError

from align_cbrl.errors import InputError

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
        raise InputError(f"{what} {path!r}: {reason}") from error


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
