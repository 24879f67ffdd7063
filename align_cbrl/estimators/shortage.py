"""What there is to do when memory runs out."""

from __future__ import annotations

import torch


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is a GPU's shortage, or that of the CPU's allocator, which has no class of its own.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), out_of_memory(RuntimeError("no"))
        (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error).lower() for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def make_room() -> None:
    """Give a GPU's memory back that is left in pieces which do not fit."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
