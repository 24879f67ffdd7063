"""Checkpoints: tensors in safetensors, everything else in JSON, never pickle; whole or absent, never half written.

A checkpoint is a folder `step-00000010` with two files. `tensors.safetensors` holds the tensors; `manifest.json` the
step, the configuration's fingerprint, the state with references to the tensors, and the size and SHA-256 of both. The
folder is written under a temporary name and renamed when all is on the disk, so that a kill or a full disk at any
moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import struct
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from align_cbrl.distributed import is_main
from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs.config import fingerprint as fingerprint_of
from align_cbrl.runs.config import to_plain
from align_cbrl.runs.facts import differences_in_words
from align_cbrl.runs.files import in_words, put_in_place, sync_folder, write_synced
from align_cbrl.runs.secrets import redacted

_FORMAT = 1
_MANIFEST, _TENSORS = "manifest.json", "tensors.safetensors"
_STEP, _TEMPORARY, _REPLACED = "step-", ".writing-", ".replaced"
UNMOVED = f"{_STEP}{0:08d}"
"""The checkpoint of a run that stopped before its first step; one of another configuration is nothing to be kept."""


Identity = str | Mapping[str, Any]
"""Of what a run was configured with: its fingerprint, or the facts that it is the fingerprint of."""


def save_checkpoint(folder: Path, step: int, state: dict[Any, Any], *, fingerprint: Identity, keep: int = 2) -> Path:
    """Write `state` after `step` and remove all but the newest `keep` checkpoints.

    Checkpoints of a later step are removed too: they belong to a future that this run has left. In several processes
    rank 0 alone writes, and on the others nothing happens.

    Args:
        folder: where the run's checkpoints live; it is created.
        step: how many outer steps are done.
        state: nested dictionaries (keys: strings or integers), lists and tuples of tensors, integers, floats,
            booleans, strings and None, as `state_dict()` gives them.
        fingerprint: of the configuration (`align_cbrl.runs.config.fingerprint`), or the plain data that it is one of;
            of these a refusal can say which differ.
        keep: how many checkpoints to keep, at least 1.

    Returns:
        The new checkpoint's folder.

    Raises:
        InputError: something in `state` that a checkpoint cannot hold, a negative step, or `keep` below 1.
        CheckpointError: the disk is full or refuses; the previous checkpoint is still valid.
    """
    if step < 0 or keep < 1:
        raise InputError(f"save_checkpoint: expected step >= 0 and keep >= 1, got step={step} and keep={keep}")
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors, {})
    target = folder / f"{_STEP}{step:08d}"
    if not is_main():
        return target
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a run that was killed
            shutil.rmtree(leftover)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=folder))
        temporary.chmod(0o755)
        blob = safetensors.torch.save(tensors)
        text = _canonical(tree)
        manifest = {
            "format": _FORMAT,
            "step": step,
            "fingerprint": _mark(fingerprint),
            "facts": None if isinstance(fingerprint, str) else redacted(to_plain(fingerprint)),
            "tensors": {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()},
            "state_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "state": tree,
        }
        write_synced(temporary / _TENSORS, blob)
        write_synced(temporary / _MANIFEST, json.dumps(manifest, allow_nan=False).encode())
        sync_folder(temporary)
        if target.exists():  # a folder cannot be renamed onto another; until the new one is there, the old one counts
            shutil.rmtree(aside := target.with_name(target.name + _REPLACED), ignore_errors=True)
            target.rename(aside)
        put_in_place(temporary, target)
        for old in [c for c in _checkpoints(folder) if _step(c) > step or c.name.endswith(_REPLACED)]:
            shutil.rmtree(old)
        for old in _checkpoints(folder)[keep:]:
            shutil.rmtree(old)
    except OSError as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = [c for c in _checkpoints(folder) if _manifest(c) is not None]
        rest = f"the previous checkpoint, {previous[0]}, is still valid" if previous else "there is no earlier one"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder}: {in_words(error)}; {rest}. Make room, "
            "then continue with --resume"
        ) from error
    return target


def load_checkpoint(folder: Path, *, fingerprint: Identity) -> tuple[int, dict[Any, Any]] | None:
    """The newest valid checkpoint in `folder` as (step, state), its tensors on the CPU; None when there is none at all.

    A damaged checkpoint is passed over, with a warning, for the one before.

    Raises:
        CheckpointError: all checkpoints are damaged, or they belong to another configuration.
    """
    damaged: list[str] = []
    for checkpoint in _checkpoints(Path(folder)):
        try:
            manifest = _manifest(checkpoint)
            if manifest is not None and _step(checkpoint) == 0 and manifest["fingerprint"] != _mark(fingerprint):
                continue
            step, state = _read(checkpoint, fingerprint)
        except _DamagedError as error:
            damaged.append(f"{checkpoint} is damaged ({error})")
            continue
        if damaged:
            warnings.warn(f"{'; '.join(damaged)}; continuing from {checkpoint}", stacklevel=2)
        return step, state
    if damaged:
        raise CheckpointError(f"{'; '.join(damaged)}; no valid checkpoint is left: start again without --resume")
    return None


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint in `folder`, valid or not; 0 where there is none."""
    return max(map(_step, _checkpoints(folder)), default=0)


class _DamagedError(Exception):
    """A checkpoint that cannot be trusted, and why."""


def _mark(fingerprint: Identity) -> str:
    return fingerprint if isinstance(fingerprint, str) else fingerprint_of(fingerprint)


def _read(checkpoint: Path, fingerprint: Identity) -> tuple[int, dict[Any, Any]]:
    manifest = _manifest(checkpoint)
    if manifest is None:
        raise _DamagedError(f"{_MANIFEST} is missing or cut short")
    if manifest["format"] != _FORMAT:
        raise CheckpointError(
            f"{checkpoint} has format {manifest['format']}, this version reads {_FORMAT}: "
            "use the version of align-cbrl that wrote it, or start again in another --out"
        )
    if manifest["fingerprint"] != _mark(fingerprint):
        facts = manifest.get("facts")
        differing = f"{manifest['fingerprint'][:12]}, this one is {_mark(fingerprint)[:12]}"
        if facts is not None and not isinstance(fingerprint, str):
            words = differences_in_words(facts, redacted(to_plain(fingerprint)))
            differing = f"different: {words or 'a secret'}"
        raise CheckpointError(
            f"{checkpoint} belongs to another configuration ({differing}): resume with the configuration it was made "
            "with, or choose another --out, or start again without --resume"
        )
    expected = manifest["tensors"]
    try:
        blob = (checkpoint / _TENSORS).read_bytes()
    except OSError as error:
        raise _DamagedError(f"{_TENSORS}: {error.strerror}") from error
    if len(blob) != expected["bytes"]:
        raise _DamagedError(f"{_TENSORS} has {len(blob)} of {expected['bytes']} bytes")
    if hashlib.sha256(blob).hexdigest() != expected["sha256"]:
        raise _DamagedError(f"{_TENSORS} has another SHA-256 than when it was written")
    return manifest["step"], _decode(manifest["state"], safetensors.torch.load(blob), {})


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest, or None unless it is whole."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / _MANIFEST).read_bytes())
        whole = hashlib.sha256(_canonical(manifest["state"]).encode()).hexdigest() == manifest["state_sha256"]
        fields = all(name in manifest for name in ("format", "step", "fingerprint", "tensors"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole and fields else None


def _encode(value: Any, at: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    """`value` as JSON; lists stay lists, all else that JSON has no type for becomes an object with one tag."""
    if isinstance(value, Tensor):
        return _encode_tensor(value, at, tensors, seen)
    if isinstance(value, dict):
        for key in value:
            if type(key) not in (str, int):
                raise InputError(f"{at}: expected keys that are strings or integers, got {key!r}")
        return {"dict": [[k, _encode(v, f"{at}[{k!r}]", tensors, seen)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, f"{at}[{i}]", tensors, seen) for i, v in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, float):
        # JSON keeps every finite double exactly; the others, NaN's payload included, travel as their bits.
        return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise InputError(
        f"{at}: expected tensors, numbers, strings, booleans, None, or dictionaries and lists of these, "
        f"got {type(value).__name__}"
    )


def _encode_tensor(value: Tensor, at: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> dict[str, Any]:
    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise InputError(f"{at}: expected a dense tensor, got layout {value.layout} on {value.device}")
    tensor = value.detach()
    # The same memory under the same shape is one tensor (tied weights) and stays one. `seen` keeps no tensor alive:
    # `state` does that until the encoding is done.
    identity = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.is_conj())
    name = seen.get(identity) if tensor.numel() else None
    if name is None:
        name = str(len(tensors))
        seen[identity] = name
        dense = tensor.resolve_conj().resolve_neg()
        dense = torch.view_as_real(dense) if dense.is_complex() else dense  # safetensors knows complex64 at most
        tensors[name] = dense.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return {"complex" if value.is_complex() else "tensor": name}


def _decode(value: Any, tensors: dict[str, Tensor], made: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors, made) for v in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "dict":
        return {k: _decode(v, tensors, made) for k, v in content}
    if tag == "tuple":
        return tuple(_decode(v, tensors, made) for v in content)
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if content not in made:
        made[content] = torch.view_as_complex(tensors[content]) if tag == "complex" else tensors[content]
    return made[content]


def _canonical(tree: Any) -> str:
    return json.dumps(tree, allow_nan=False, separators=(",", ":"))


def _checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, newest first; one that is being replaced comes after the one that replaces it."""
    found = [c for c in folder.glob(f"{_STEP}*") if c.is_dir() and _number(c).isdecimal()]
    return sorted(found, key=lambda c: (-_step(c), c.name))


def _step(checkpoint: Path) -> int:
    return int(_number(checkpoint))


def _number(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix(_STEP).removesuffix(_REPLACED)
