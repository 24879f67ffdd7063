"""A model that does not load: what is not there is told from what is there and broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import enumerable_lm as lm
import pytest
import tiny_models
import torch

from align_cbrl import InputError
from align_cbrl.llm import RewardModel, RLOOFollower, TiltedFollower
from align_cbrl.llm.loading import loading


def edited(file: str, **changes: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **changes}))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "config": (lambda folder: (folder / "config.json").write_text("{oops"), "OSError: .* not a valid JSON"),
    "kind": (edited("config.json", model_type="frob"), "ValueError: .*frob"),
    "size": (edited("config.json", hidden_size="x"), "hidden_size"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "KeyError: 'added_tokens'"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "OSError: .*no file named model"),
    "weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"xx"), "SafetensorError: "),
    "shape": (edited("config.json", intermediate_size=48), "RuntimeError: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_model_that_is_there_says_what_is_wrong_with_it(tmp_path: Path, name: str) -> None:
    break_it, reason = BROKEN[name]
    break_it(tiny_models.build(tmp_path / "model", "llama"))
    for follower, options in ((TiltedFollower, {}), (RLOOFollower, {"prompts_per_step": 4})):
        with pytest.raises(InputError, match=rf"model '.*/model': does not load, .*{reason}") as raised:
            made: Any = follower(tmp_path / "model", lm.prompt_dataset(), 1.0, max_completion_length=2, **options)
            made._load() if follower is TiltedFollower else made.policy
        assert "neither a hub id" not in str(raised.value)


@pytest.mark.parametrize("path", ["/there/is/nothing here", "not a hub id", "a/b/c"])
def test_a_model_that_is_not_there_is_called_so(path: str) -> None:
    with pytest.raises(InputError, match=f"model '{path}': neither a hub id nor a folder that loads"):
        TiltedFollower(path, lm.prompt_dataset(), 1.0)
    with pytest.raises(InputError, match=f"reward model '{path}': neither a hub id nor a folder that loads"):
        RewardModel(path)


def test_a_hub_that_is_not_reached_is_not_called_a_wrong_id() -> None:
    with pytest.raises(InputError, match="no such folder, and of the hub there is neither a copy here nor an answer"):
        TiltedFollower("somebody/something", lm.prompt_dataset(), 1.0)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(torch.OutOfMemoryError), loading("model", "m"):
        raise torch.OutOfMemoryError("no memory left")
    with pytest.raises(InputError, match=r"^mine$"), loading("model", "m"):
        raise InputError("mine")
    with (
        pytest.raises(InputError, match=r"model 'm': does not load, PermissionError: .*not yours"),
        loading("model", "m"),
    ):
        raise PermissionError("not yours")
