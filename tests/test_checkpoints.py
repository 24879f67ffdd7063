"""Checkpoints: bit-exact, atomic, and honest about damage."""

from __future__ import annotations

import errno
import json
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from align_cbrl.errors import CheckpointError, InputError
from align_cbrl.runs import checkpoints
from align_cbrl.runs.checkpoints import load_checkpoint, save_checkpoint

FINGERPRINT = "f" * 64


def save(folder: Path, step: int, state: dict[Any, Any] | None = None, keep: int = 2) -> Path:
    return save_checkpoint(
        folder, step, state or {"x": torch.full((8,), float(step))}, fingerprint=FINGERPRINT, keep=keep
    )


def load(folder: Path) -> tuple[int, dict[Any, Any]]:
    found = load_checkpoint(folder, fingerprint=FINGERPRINT)
    assert found is not None
    return found


def assert_same(left: Any, right: Any) -> None:
    """Equal in every bit and every type."""
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        left, right = (t.resolve_conj() for t in (left, right))
        left, right = (torch.view_as_real(t) if t.is_complex() else t for t in (left, right))
        assert torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (left, right)))
    elif isinstance(left, dict):
        assert list(left) == list(right) and [type(k) for k in left] == [type(k) for k in right]
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, float):
        assert struct.pack(">d", left) == struct.pack(">d", right)
    else:
        assert left == right


def test_a_resumed_adam_takes_the_same_steps_to_the_last_bit(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2, dtype=torch.float64)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    def step(model: torch.nn.Linear, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        model(torch.arange(3.0, dtype=torch.float64)).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    save(tmp_path, 3, state)
    number, loaded = load(tmp_path)
    assert number == 3
    assert_same(loaded, state)
    again, resumed = make()
    again.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for pair in ((model, optimizer), (again, resumed)):
        step(*pair)
    assert torch.equal(model.weight, again.weight) and torch.equal(model.bias, again.bias)


def test_every_value_comes_back_to_the_bit(tmp_path: Path) -> None:
    odd_nan = struct.unpack(">d", bytes.fromhex("7ff8000000000123"))[0]
    state = {
        "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, odd_nan, 1.7976931348623157e308],
        "others": (True, False, None, 0, -1, 2**200, "", "ä\n\u2028\ud800", [], {}, ()),
        3: {-1: "negative key", "3": "a string, not the integer"},
        "dict": {"dict": [1], "tensor": "0"},
    }
    save(tmp_path, 0, state)
    assert_same(load(tmp_path)[1], state)


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.bool, torch.complex64, torch.complex128),
    ],
)
def test_every_dtype_survives(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 2], [3, 4, 5]]).to(dtype)
    state = {"whole": tensor, "zero_dimensional": tensor[1, 1].clone(), "empty": tensor[:0]}
    save(tmp_path, 0, state)
    assert_same(load(tmp_path)[1], state)


def test_views_tied_and_transposed_tensors_survive(tmp_path: Path) -> None:
    base = torch.randn(4, 5, dtype=torch.complex128)
    weight = torch.nn.Parameter(torch.randn(4, 3))
    state = {
        "views": [base, base[1:], base.T, base[:, ::2], base.conj(), base.conj().imag, base.expand(2, 4, 5)],
        "tied": (weight, weight),
    }
    save(tmp_path, 0, state)
    loaded = load(tmp_path)[1]
    for kept, original in zip(loaded["views"], state["views"], strict=True):
        assert torch.equal(kept, original)
    first, second = loaded["tied"]
    assert torch.equal(first, weight.detach()) and first is second


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\]: expected tensors, numbers, .* got object"),
        ({"a": {1.5: 0}}, r"state\['a'\]: expected keys that are strings or integers, got 1\.5"),
        ({"a": {True: 0}}, r"expected keys that are strings or integers, got True"),
        ({"a": torch.eye(2).to_sparse()}, r"state\['a'\]: expected a dense tensor, got layout torch\.sparse_coo"),
        ({"a": torch.empty(2, device="meta")}, r"expected a dense tensor"),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path, value: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        save(tmp_path, 0, value)
    assert not list(tmp_path.iterdir())


def test_steps_and_keep_are_checked(tmp_path: Path) -> None:
    for step, keep in ((-1, 1), (0, 0)):
        with pytest.raises(InputError, match=r"expected step >= 0 and keep >= 1"):
            save(tmp_path, step, keep=keep)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        path = save(tmp_path, step, keep=3)
    assert path == tmp_path / "step-00000011"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000010", "step-00000011"]
    assert load(tmp_path)[0] == 11


def test_saving_an_earlier_step_leaves_the_abandoned_future_behind(tmp_path: Path) -> None:
    for step in (10, 20, 15):
        save(tmp_path, step)
    assert load(tmp_path)[0] == 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1, {"x": 1})
    save(tmp_path, 1, {"x": 2})
    assert load(tmp_path) == (1, {"x": 2})


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "nothing", fingerprint=FINGERPRINT) is None
    assert load_checkpoint(tmp_path, fingerprint=FINGERPRINT) is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "manifest.json"])
def test_a_full_disk_leaves_the_previous_checkpoint_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    save(tmp_path, 1)
    write = checkpoints.write_synced

    def full(path: Path, data: bytes) -> None:
        if path.name == file:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(
        CheckpointError, match=r"step 2 .*the disk is full; the previous .*step-00000001, is still valid"
    ):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert load(tmp_path)[0] == 1


def test_a_full_disk_at_the_first_checkpoint_says_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_synced", full)
    with pytest.raises(CheckpointError, match=r"the disk is full; there is no earlier one"):
        save(tmp_path, 1)
    assert load_checkpoint(tmp_path, fingerprint=FINGERPRINT) is None


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint of step 1"):
        save(tmp_path / "file" / "checkpoints", 1)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def remove(path: Path) -> None:
    path.unlink()


def change_state(path: Path) -> None:
    manifest = json.loads(path.read_text())
    manifest["state"] = {"dict": []}
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("tensors.safetensors", truncate, r"tensors\.safetensors has \d+ of \d+ bytes"),
        ("tensors.safetensors", flip, r"another SHA-256"),
        ("tensors.safetensors", remove, r"No such file"),
        ("manifest.json", truncate, r"manifest\.json is missing or cut short"),
        ("manifest.json", change_state, r"manifest\.json is missing or cut short"),
        ("manifest.json", remove, r"manifest\.json is missing or cut short"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, file: str, damage: Any, message: str
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2) / file)
    with pytest.warns(UserWarning, match=rf"step-00000002 is damaged .*{message}.*continuing from .*step-00000001"):
        assert load(tmp_path)[0] == 1
    damage(tmp_path / "step-00000001" / file)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint is left"):
        load(tmp_path)


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"belongs to another configuration .*another --out.* without --resume"):
        load_checkpoint(tmp_path, fingerprint="e" * 64)


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"has format 99, this version reads 1"):
        load(tmp_path)


def test_the_leftovers_of_a_kill_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".writing-abc"
    leftover.mkdir()
    (leftover / "tensors.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(tmp_path)[0] == 1
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_the_files_are_plain_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "tensors.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 1 and manifest["fingerprint"] == FINGERPRINT
