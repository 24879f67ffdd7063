"""Reward models: sequence classifiers that score prompt + completion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from align_cbrl.errors import InputError, first_line
from align_cbrl.llm.completions import batches


class RewardModel:
    """A scalar sequence classifier as a trl-style reward function.

    The text scored is the prompt followed by the completion and, if the tokenizer has one, the end-of-sequence token,
    as trl's RewardTrainer formats plain-text pairs. Conversations go through the tokenizer's chat template.

    Args:
        path: hub id or folder of any `AutoModelForSequenceClassification` with one label.
        batch_size: rows scored together.
        max_length: in tokens; longer texts lose their beginning.

    Raises:
        InputError: the folder does not load, the model has several labels, or its tokenizer lacks a pad token.
    """

    def __init__(self, path: str | Path, batch_size: int = 64, max_length: int = 1024) -> None:
        self.path = str(path)
        self.batch_size = batch_size
        self.max_length = max_length
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path)
            self.model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"reward model {self.path!r}: neither a hub id nor a folder that loads ({first_line(error)})"
            ) from error
        if self.model.config.num_labels != 1:
            raise InputError(
                f"reward model {self.path!r}: expected one label, the score, got {self.model.config.num_labels}"
            )
        if self.tokenizer.pad_token_id is None:
            raise InputError(
                f"reward model {self.path!r}: its tokenizer has no pad token, so batches would be scored wrongly; set "
                "tokenizer.pad_token and save it beside the model"
            )
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.eval()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of B completions, without gradients."""
        with torch.no_grad():
            return self.score(prompts, completions).tolist()

    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> Tensor:
        """Scores [B], differentiable in the model's parameters."""
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        return torch.cat([self._score_batch(texts[piece]) for piece in batches(len(texts), self.batch_size)])

    @property
    def head(self) -> nn.Module:
        """The last layer, from the hidden state of the text's end to the score."""
        for name in ("score", "classifier", "v_head"):
            if isinstance(module := getattr(self.model, name, None), nn.Module):
                return module
        raise InputError(f"reward model {self.path!r}: no head named score, classifier or v_head; train all parameters")

    def save_pretrained(self, path: str | Path) -> None:
        """Write model and tokenizer to a folder that `RewardModel` loads."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def _score_batch(self, texts: list[str]) -> Tensor:
        encoded = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
        )
        device = self.model.device
        output = self.model(
            input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"].to(device)
        )
        return output.logits[:, 0]  # [b, 1] -> [b]

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return f"{prompt}{completion}{self.tokenizer.eos_token or ''}"
        return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
