"""Models that are made once: a folder for each, found again by what it depends on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from align_cbrl.runs.config import fingerprint
from align_cbrl.runs.files import put_in_place, sync_tree, write_whole
from align_cbrl.runs.lock import in_turn
from align_cbrl.runs.secrets import redacted

from ..stages import announce


def cached(cache: Path, name: str, facts: Mapping[str, Any], build: Callable[[Path], object]) -> Path:
    """The folder of something that takes long to make; made first if the cache does not hold it.

    The folder's name carries a fingerprint of `facts`. What was interrupted leaves a folder ending in .partial, from
    which `build` may continue. stage.json inside says what it was made from, and how long that took. Where two runs
    need the same, one makes it and the other waits. A line says what takes so long (`align_cbrl.recipes.stages`).
    """
    folder = cache / f"{name}-{fingerprint(facts)[:12]}"
    if folder.is_dir():
        return folder
    with being_made(folder):
        if folder.is_dir():
            return folder
        partial = folder.with_name(folder.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        announce(f"making {folder}, once for all runs beside this one")
        began = time.perf_counter()
        build(partial)
        made = {"facts": dict(facts), "seconds": time.perf_counter() - began}
        write_whole(partial / "stage.json", json.dumps(redacted(made), indent=2, default=str))
        shutil.rmtree(partial / "checkpoints", ignore_errors=True)  # the finished model has replaced them
        sync_tree(partial)
        put_in_place(partial, folder)
    return folder


def being_made(folder: Path) -> AbstractContextManager[None]:
    """Hold what will be this folder of the cache; another run that needs it waits, and finds it."""
    return in_turn(folder.with_name(f".{folder.name}.lock"))
