"""The folder of a saved leader: reward.json, which names the leader's class, and a model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import align_cbrl
from align_cbrl.errors import InputError
from align_cbrl.llm.leaders.model_card import model_card
from align_cbrl.llm.leaders.trust import own_function

RECORD = "reward.json"
"""The file in which a saved leader's class and values are written down."""


def write_record(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    """Write reward.json.

    Args:
        folder: of the leader; it exists.
        name: of the leader's class, as `import_names.class_name` gives it.
        record: plain data from which the class makes the leader again.
    """
    text = json.dumps({"class": name, "version": align_cbrl.__version__, **record}, indent=2)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """What `write_record` wrote; folders of version 0.1 name the kind of leader under "kind" in place of its class.

    Raises:
        InputError: there is no reward.json, or it is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        raise InputError(f"load_leader: no {RECORD} in {folder}; expected a folder written by save_pretrained")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"load_leader: {file} is damaged ({error}); save the leader again") from error
    if not isinstance(record, dict) or not any(isinstance(record.get(key), str) for key in ("class", "kind")):
        raise InputError(f"load_leader: {file} is damaged: it names no class; save the leader again")
    return record


def write_card(folder: Path, leader: type, values: Mapping[str, Any]) -> None:
    """Write the model card README.md of a leader whose reward.json is written.

    Args:
        folder: of the leader.
        leader: its class.
        values: shown in a table, by name.
    """
    summary = " ".join((inspect.getdoc(leader) or "").split("\n\n")[0].split())
    imports = [name for file in sorted(folder.rglob(RECORD)) for name in _imports(json.loads(file.read_text("utf-8")))]
    card = model_card(leader.__name__, summary, values, list(dict.fromkeys(imports)), align_cbrl.__version__)
    card.save(folder / "README.md")


def _imports(record: Any) -> Iterator[str]:
    """What loading a record imports besides this library: the leader's class, and functions wherever they stand."""
    if not isinstance(record, Mapping):
        return
    for key in ("class", "function"):
        name = record.get(key)
        own = key == "class" and str(name).startswith("align_cbrl.llm.leaders.")
        if isinstance(name, str) and not own and (key == "class" or own_function(name) is None):
            yield name
    for value in record.values():
        yield from _imports(value)
