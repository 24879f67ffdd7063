"""Reward models: how much of a text they read, in which precision they score, and what their folders may not do."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from align_cbrl import InputError, Rollouts
from align_cbrl.llm import Judge, LoRA, RewardMixture, RewardModel, RewardModelLeader, Shaped

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz "]
PAD, CLS, SEP = 0, 2, 3


def build(path: Path, family: str, *, reads: int | None = 1000, dtype: torch.dtype = torch.float64) -> Path:
    """A classifier with 16 positions and one letter a token; `reads` is what its tokenizer declares."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if family in ("bert", "roberta"):
        core.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        special["eos_token"] = "[SEP]"
    if reads is not None:
        special["model_max_length"] = reads
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path)
    common = {"vocab_size": len(WORDS), "num_labels": 1, "pad_token_id": PAD, "initializer_range": 0.5}
    layers = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = {
        "bert": lambda: BertConfig(max_position_embeddings=16, **layers, **common),
        "roberta": lambda: RobertaConfig(max_position_embeddings=17, **layers, **common),  # one for the padding
        "gpt2": lambda: GPT2Config(n_positions=16, n_embd=16, n_layer=1, n_head=2, **common),
        "llama": lambda: LlamaConfig(max_position_embeddings=16, **layers, **common),
    }[family]()
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).to(dtype).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
def test_a_text_is_cut_to_what_the_model_reads_from_its_beginning_on(family: str, tmp_path: Path) -> None:
    model = RewardModel(build(tmp_path, family))
    assert model.max_length == 16
    room = 14 if family in ("bert", "roberta") else 15  # [CLS] and [SEP], or the end of the sequence
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (whole,) = model(["q" * 3], ["abcd" * 2 + "e" * (room - 11)])
    text = "abcd" * 2 + "e" * (room - 11)
    with pytest.warns(
        UserWarning, match=rf"reads 16 tokens of a text and got {'2[0-9]'}, so that prompts lose their beg"
    ):
        assert model(["z" * 9 + "q" * 3], [text]) == [whole]  # of the prompt only the end is left
    with pytest.warns(UserWarning, match="so that completions lose their beginning, here and later; shorten"):
        assert model(["ab"], ["zz" + "qqq" + text]) == [whole]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once each
        scores = model(["z" * 9 + "q" * 3, "ab", "a"], [text, "zzqqq" + text, "b"])
    assert scores[:2] == pytest.approx([whole, whole]) and scores[2] != pytest.approx(whole)


def test_the_shortest_limit_counts(tmp_path: Path) -> None:
    assert RewardModel(build(tmp_path / "a", "bert", reads=7)).max_length == 7
    assert RewardModel(build(tmp_path / "b", "llama", reads=None), max_length=5).max_length == 5
    with pytest.raises(InputError, match=r"expected room for a text, got 2 tokens at most; .* model_max_length"):
        RewardModel(build(tmp_path / "c", "bert", reads=2))
    for wrong in ({"max_length": 0}, {"batch_size": 0}, {"batch_size": 2.5}):
        with pytest.raises(InputError, match=r"RewardModel\.(max_length|batch_size): expected a whole number"):
            RewardModel(tmp_path / "b", **wrong)
    term = RewardModel(tmp_path / "b", max_length=5)
    mixture = RewardMixture({"b": term})
    mixture.save_pretrained(tmp_path / "saved")
    again = RewardMixture.from_pretrained(tmp_path / "saved").terms["b"]
    assert isinstance(again, RewardModel) and again.identity == term.identity


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_scores_with_the_digits_of_single(dtype: torch.dtype, tmp_path: Path) -> None:
    half = build(tmp_path / "half", "llama", dtype=dtype)
    single = RewardModel(half)
    single.model.double().save_pretrained(tmp_path / "double")  # the same, rounded, weights
    single.tokenizer.save_pretrained(tmp_path / "double")
    prompts, texts = ["q"] * 48, [a + b for a in "abcdefgh" for b in "uvwxyz"]
    want = torch.tensor(RewardModel(tmp_path / "double")(prompts, texts))
    assert len(set(want.tolist())) == 48

    def scores(model: RewardModel) -> list[list[float]]:
        batch = Rollouts.bandit(
            contexts=torch.arange(4).repeat_interleave(12), steps={"prompt": prompts, "completion": texts}
        )
        leaders = [
            RewardModelLeader(RewardModel(half), "head"),
            RewardModelLeader(RewardModel(half), "lora", lora=LoRA(2)),
        ]
        shaped = Shaped(RewardModel(half), leaders[0])
        return [
            model(prompts, texts), Judge(model)(None, batch)[:, 0].tolist(), shaped.score(prompts, texts).tolist(),
            *(leader.score(prompts, texts).tolist() for leader in leaders),
        ]  # fmt: skip

    for found in scores(RewardModel(half)):
        assert len(set(found)) == 48
        torch.testing.assert_close(torch.tensor(found), want, rtol=1e-5, atol=1e-5)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_nothing_that_a_folder_holds_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched = tmp_path / "touched"

    def hostile(name: str, family: str = "llama") -> Path:
        folder = build(tmp_path / name, family)
        (folder / "evil.py").write_text(f"open({str(touched)!r}, 'w').close()\nclass Evil: pass\n")
        return folder

    def changed(file: Path, **entries: Any) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))

    coded = hostile("coded")
    changed(coded / "config.json", model_type="evil", auto_map={
        "AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"})  # fmt: skip
    words = hostile("words")
    changed(words / "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    pickled = hostile("pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(touched), protocol=2))
    zipped = hostile("zipped")
    (zipped / "model.safetensors").unlink()
    torch.save(Payload(touched), zipped / "pytorch_model.bin")
    adapted = hostile("adapted")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(hostile("plain")), "target_modules": ["q_proj"]}
    (adapted / "adapter_config.json").write_text(
        json.dumps({**adapter, "megatron_config": {"a": 1}, "megatron_core": "evil"})
    )
    monkeypatch.syspath_prepend(adapted)
    with pytest.raises(InputError, match="asks for megatron, which is refused"):
        RewardModel(adapted)
    for folder in (coded, words, pickled, zipped, adapted):
        with pytest.raises(InputError, match=rf"reward model '{folder}': "):
            RewardModel(folder)
        assert not touched.exists(), folder
    (adapted / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="names no base_model_name_or_path"):
        RewardModel(adapted)
    for name, content in (("model.safetensors", b"no tensors"), ("config.json", b"{")):
        folder = hostile(f"damaged {name}")
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=r"reward model '.*': (does not load|neither a hub id nor a folder)"):
            RewardModel(folder)
