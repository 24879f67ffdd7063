"""A language model small enough to enumerate: 8 tokens, completions of at most 2, hence exact best responses."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.sampling import completion_log_probs
from align_cbrl.rollouts import Rollouts

VOCABULARY = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f"]
EOS = 1
LENGTH = 2
# At least two different tokens each: without a beginning token, Llama cannot tell "p" from "p p".
PROMPTS = ["a b", "c d e", "f a c", "b e"]


def build(path: Path, seed: int = 0) -> Path:
    """Save a 2-layer Llama with random weights and its tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="a")
    fast.padding_side = "left"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.0,
        pad_token_id=0,
        eos_token_id=EOS,
        bos_token_id=None,
        tie_word_embeddings=False,
        # Weights of the usual 0.02 would turn over within a few steps at the learning rates that suit this size.
        initializer_range=0.15,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    fast.save_pretrained(path)
    return path


def all_completions() -> list[list[int]]:
    """Every token sequence that generation can return: ended by <eos>, or cut at LENGTH."""
    others = [t for t in range(len(VOCABULARY)) if t != EOS]
    ended = [[*body, EOS] for n in range(LENGTH) for body in itertools.product(others, repeat=n)]
    return ended + [list(body) for body in itertools.product(others, repeat=LENGTH)]


@dataclasses.dataclass
class Enumeration:
    """All completions of all prompts, with a random linear reward r_x(y) = features(y) . x and utility u(y)."""

    completions: list[list[int]]
    features: Tensor  # [P, N, K]
    utility: Tensor  # [P, N]

    @classmethod
    def random(cls, seed: int, dimension: int = 5, spread: float = 1.0) -> Enumeration:
        generator = torch.Generator().manual_seed(seed)
        completions = all_completions()
        shape = (len(PROMPTS), len(completions))
        features = spread * torch.randn(*shape, dimension, generator=generator, dtype=torch.float64)
        return cls(completions, features, torch.randn(*shape, generator=generator, dtype=torch.float64))

    def log_probs(self, model: PreTrainedModel, tokenizer: Any) -> Tensor:
        """log p(y | prompt) of every completion: [P, N]."""
        rows = []
        for prompt in PROMPTS:
            encoded = tokenizer([prompt] * len(self.completions), return_tensors="pt")
            rows.append(completion_log_probs(model, encoded, self.completions))
        return torch.stack(rows)

    def best_response(self, log_prior: Tensor, x: Tensor, temperature: float) -> Tensor:
        """log pi*(y | prompt) [P, N], differentiable in x."""
        return torch.log_softmax(log_prior + self.features @ x / temperature, dim=-1)

    def index(self, prompts: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        place = {tuple(ids): i for i, ids in enumerate(self.completions)}
        return (
            torch.tensor([PROMPTS.index(p) for p in prompts]),
            torch.tensor([place[tuple(ids)] for ids in completion_ids]),
        )

    def judge(self, leader: Any, rollouts: Rollouts) -> Tensor:
        """u(y) [B, 1], a utility for `ExpectedUtility`."""
        return self.utility[self.index(rollouts.steps["prompt"], rollouts.steps["completion_ids"])][:, None]


class LinearLeader(LanguageLeader):
    """r_x(y) = features(y) . x over an enumeration."""

    def __init__(self, enumeration: Enumeration, x: Tensor) -> None:
        super().__init__()
        self.enumeration = enumeration
        self.x = nn.Parameter(x.clone())

    def score(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Tensor:
        return self.enumeration.features[self.enumeration.index(prompts, columns["completion_ids"])] @ self.x

    def record(self, path: Path) -> dict[str, Any]:
        raise AssertionError("not needed in tests")

    @classmethod
    def from_record(cls, path: Path, record: Any) -> LinearLeader:
        raise AssertionError("not needed in tests")


def prompt_dataset() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS})


def kl(log_p: Tensor, log_q: Tensor) -> float:
    """Mean over prompts of KL(p || q), in nats."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def length_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Words of each completion: a reward function that can be found again by its dotted path."""
    return [float(len(text.split())) for text in completions]
