"""How the docstrings world's own models are made, and what they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from align_cbrl.recipes.worlds.docstrings import POLICY, PROXY, load_docstrings, pretrain
from align_cbrl.recipes.worlds.docstrings.judge import docstring_judge
from align_cbrl.recipes.worlds.world import Docstrings
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from align_cbrl import InputError


def package(folder: Path, name: str, licence: str, functions: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(functions)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\nLicense: {licence}\n")
    (info / "RECORD").write_text(f"{name}/__init__.py,,\n{name}-1.2.dist-info/METADATA,,\n")


def function(name: str, docstring: str) -> str:
    return f'def {name}(value):\n    """{docstring}"""\n'


def test_packages_without_a_permissive_licence_are_left_out(tmp_path: Path) -> None:
    package(tmp_path, "free", "BSD-3-Clause", function("first", "Return the first value."))
    package(tmp_path, "strict", "GPL-3.0", function("second", "Return the second value."))
    package(tmp_path, "unsaid", "", function("third", "Return the third value."))
    rows, facts = pretrain.read_packages(tmp_path)
    assert [row["completion"] for row in rows["free"]] == ["Return the first value."] and set(rows) == {"free"}
    assert facts == {"free": {"version": "1.2", "licence": "BSD-3-Clause"}}


def test_a_folder_without_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packages: expected a folder with permissively licensed Python packages"):
        pretrain.read_packages(tmp_path)


def test_nothing_that_is_held_out_is_trained_on() -> None:
    def row(prompt: str, completion: str) -> dict[str, str]:
        return {"prompt": prompt, "completion": completion}

    packages = {
        "requests": [row("held prompt", "Say a thing that only they say here.")],
        "other": [
            row("held prompt", "Another text."), row("p", "Say a thing that only they say here."),
            *(row(f"p{i}", "Set the value.") for i in range(9)),
        ],
    }  # fmt: skip
    train, held, test = pretrain.split(packages)
    assert list(held["prompt"]) == ["held prompt"]
    assert not {"held prompt", *test["prompt"]} & set(train["prompt"])
    assert "Say a thing that only they say here." not in train["completion"]
    assert sum(prompt.startswith("p") and prompt[1:].isdigit() for prompt in train["prompt"]) <= 4  # copies of one text


def test_shares_of_dictionary_words() -> None:
    dictionary = {"return", "copy", "stop", "make"}
    known = "Returns copies, stopped, making"
    assert pretrain.dictionary_share(["def f():"], [known], dictionary) == 1.0
    assert pretrain.dictionary_share(["def f():"], [known + " dtype"], dictionary) == 0.8
    assert pretrain.dictionary_share(["def f(dtype):"], [known + " dtype"], dictionary) == 1.0
    with pytest.raises(ValueError, match="completions with words"):
        pretrain.dictionary_share(["def f():"], ["..."], dictionary)


def test_the_models_are_small_and_load_in_single_precision() -> None:
    assert sum(file.stat().st_size for folder in (POLICY, PROXY) for file in Path(folder).iterdir()) < 15e6
    for folder, auto in ((POLICY, AutoModelForCausalLM), (PROXY, AutoModelForSequenceClassification)):
        assert {tensor.dtype for tensor in load_file(Path(folder) / "model.safetensors").values()} == {torch.float16}
        assert {parameter.dtype for parameter in auto.from_pretrained(folder).parameters()} == {torch.float32}


def test_the_policy_writes_docstrings_of_prompts_that_it_has_not_seen() -> None:
    rows = load_docstrings()["test"].shuffle(seed=1).select(range(100))
    tokenizer, model = AutoTokenizer.from_pretrained(POLICY), AutoModelForCausalLM.from_pretrained(POLICY).eval()
    torch.manual_seed(0)
    texts = pretrain.sample_texts(model, tokenizer, list(rows["prompt"]))
    assert sum(docstring_judge(list(rows["prompt"]), texts)) / len(texts) > 0.6
    assert pretrain.loss_per_token(model, tokenizer, rows, count=50) < 6.0  # with a temperature of 0.6 built in


def test_a_world_of_other_data_needs_a_model_of_its_own() -> None:
    assert Docstrings().make_policy(load_docstrings(), 0, Path()) == POLICY
    with pytest.raises(InputError, match=r"model: null stands for a policy that writes docstrings"):
        Docstrings(data="prompts.jsonl")
    Docstrings(data="prompts.jsonl", base_epochs=1.0)
    with pytest.raises(InputError, match="base_epochs: expected a positive number or null"):
        Docstrings(base_epochs=0.0)
