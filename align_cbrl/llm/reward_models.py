"""Reward models: sequence classifiers that score prompt + completion."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from align_cbrl.checks import Count, checked
from align_cbrl.errors import InputError
from align_cbrl.identity import content_digest
from align_cbrl.llm.loading import loading, weight_names
from align_cbrl.llm.sampling import batches
from align_cbrl.runs.inputs import check_folder

HEADS = ("score", "classifier", "v_head")
"""What classifiers call their last layer: Llama, GPT-2 and Qwen "score", BERT "classifier"."""


@checked
class RewardModel:
    """A scalar sequence classifier as a trl-style reward function.

    The text scored is the prompt followed by the completion and, if the tokenizer has one, the end-of-sequence token,
    as trl's RewardTrainer formats plain-text pairs. Conversations, lists of messages, go through the tokenizer's chat
    template, whose text is tokenised as it stands.

    A model stored in half precision is computed with in single precision, as policies are: bfloat16 has three digits,
    and completions of one prompt differ in later ones.

    A text that is longer than the model can read loses its beginning, so that the prompt is cut before the completion.
    That is said in a warning, once for prompts and once for completions.

    Nothing that the folder holds is executed: custom code (`auto_map`) and pickles that name code are refused.

    Args:
        path: hub id or folder of any `AutoModelForSequenceClassification` with one label; or a folder with a peft
            adapter for one, which is merged into its base.
        batch_size: rows scored together.
        max_length: the most tokens that are read of a text.

    Attributes:
        max_length: the same, at most what the tokenizer and the model's positions allow; rotary ones too, beyond which
            a model was not trained.

    Raises:
        InputError: the folder does not load, holds no weights for the head (a causal language model) or another part,
            the model has several labels or room for no token, its tokenizer lacks a pad token, an adapter lies on
            lm_head, or a number is below 1.
    """

    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel

    def __init__(self, path: str | Path, batch_size: Count = 64, max_length: Count = 1024) -> None:
        self.path = str(path)
        self.batch_size = batch_size
        with loading("reward model", self.path):
            if (Path(path) / "adapter_config.json").is_file():
                self.tokenizer, self.model = _load_adapted(Path(path))
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
                self.model, missing = _load_classifier(self.path)
                _check_missing(self.path, missing)
        if self.model.config.num_labels != 1:
            raise InputError(
                f"reward model {self.path!r}: expected one label, the score, got {self.model.config.num_labels}"
            )
        _check_pad_token(self.path, self.tokenizer)
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.config.use_cache = False  # nothing is generated; keys and values would be kept in vain
        self.tokenizer.truncation_side = "left"
        self.max_length = min(max_length, self.tokenizer.model_max_length, _positions(self.model))
        if self.max_length <= self._special_tokens(True):
            raise InputError(
                f"reward model {self.path!r}: expected room for a text, got {self.max_length} tokens at most; look at "
                "max_length, at model_max_length in its tokenizer_config.json and at its positions in config.json"
            )
        self._said: set[str] = set()
        self.model.eval()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Scores of B completions, without gradients."""
        with torch.no_grad():
            return self.score(prompts, completions).tolist()

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Scores [B], differentiable in the model's parameters; at least single precision.

        Args:
            prompts: B texts, or B lists of messages.
            completions: the same.
            parameters: other values of some of `model`'s parameters, by name, to score at.

        Raises:
            InputError: a score that is NaN or infinite, conversations without a chat template, or no completions.
        """
        if len(completions) == 0 or len(prompts) != len(completions):
            raise InputError(
                f"reward model {self.path!r}: expected as many prompts as completions, at least one, got "
                f"{len(prompts)} and {len(completions)}"
            )
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        special = isinstance(prompts[0], str)  # a chat template writes its own special tokens
        pieces = batches(len(texts), self.batch_size)
        scores = torch.cat([
            self._score_batch(texts[piece], completions[piece], special, parameters) for piece in pieces
        ])  # fmt: skip
        if not (finite := torch.isfinite(scores)).all():
            i = int((~finite).nonzero()[0])
            raise InputError(
                f"reward model {self.path!r}: expected finite scores, got {scores[i].item()} for completion {i}: "
                f"{completions[i]!r}"
            )
        return scores

    @property
    def identity(self) -> str:
        """A digest of everything that a score depends on: weights, configuration, words, template and length.

        It is that of the weights as they are now; compare `align_cbrl.identity`.
        """
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        words = self.tokenizer.get_vocab() if core is None else json.loads(core.to_str())
        for moving in ("truncation", "padding"):  # of the last call
            words.pop(moving, None)
        texts = (words, self.tokenizer.eos_token, self.tokenizer.chat_template, self.max_length)
        return f"reward model {content_digest([self.model.state_dict(), config, texts])[:32]}"

    @property
    def head(self) -> nn.Module:
        """The last layer, from the hidden state of the text's end to the score."""
        module: nn.Module = getattr(self.model, self.head_name)
        return module

    @property
    def head_name(self) -> str:
        """What `model` calls its last layer. Raises InputError when it has none by a known name."""
        for name in HEADS:
            if isinstance(getattr(self.model, name, None), nn.Module):
                return name
        raise InputError(f"reward model {self.path!r}: no head named {', '.join(HEADS)}; train all parameters")

    def save_pretrained(self, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write model and tokenizer to a folder that `RewardModel` loads.

        Args:
            path: the folder.
            weights: what to write in place of the model's own state, such as that of its base without an adapter.
        """
        self.model.save_pretrained(path, state_dict=None if weights is None else dict(weights))
        self.tokenizer.save_pretrained(path)

    def _score_batch(
        self, texts: list[str], completions: Sequence[Any], special: bool, parameters: Mapping[str, Tensor] | None
    ) -> Tensor:
        encoded = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            add_special_tokens=special,
        )
        for i in (encoded["attention_mask"].sum(1) >= self.max_length).nonzero()[:, 0].tolist():
            self._say_what_is_cut(texts[i], completions[i], special)
        device = self.model.device
        inputs = {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}
        if parameters is None:
            output = self.model(**inputs)
        else:
            output = torch.func.functional_call(self.model, dict(parameters), kwargs=inputs)
        scores: Tensor = output.logits[:, 0]  # [b, 1] -> [b]
        return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores

    def _special_tokens(self, special: bool) -> int:
        return self.tokenizer.num_special_tokens_to_add() if special else 0

    def _say_what_is_cut(self, text: str, completion: Any, special: bool) -> None:
        """Warn, once for prompts and once for completions, where a text is longer than what is read of it."""
        if len(self._said) == 2:
            return
        room = self.max_length - self._special_tokens(special)
        words = completion if isinstance(completion, str) else " ".join(str(m.get("content", "")) for m in completion)
        whole, own = (self.tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"] for t in (text, words))
        what = "completions" if len(own) > room else "prompts" if len(whole) > room else None
        if what is not None and what not in self._said:
            self._said.add(what)
            warnings.warn(
                f"reward model {self.path!r}: reads {self.max_length} tokens of a text and got {len(whole)}, so that "
                f"{what} lose their beginning, here and later; shorten them, or use a model that reads more",
                stacklevel=2,
            )

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return f"{prompt}{completion}{self.tokenizer.eos_token or ''}"
        if isinstance(prompt, str) or isinstance(completion, str):
            raise InputError(
                f"reward model {self.path!r}: expected prompt and completion both as texts or both as lists of "
                f"messages, got {type(prompt).__name__} and {type(completion).__name__}"
            )
        if not self.tokenizer.chat_template:
            raise InputError(
                f"reward model {self.path!r}: the prompts are conversations, and its tokenizer has no chat template; "
                "set tokenizer.chat_template and save it beside the model, or use plain-text prompts"
            )
        return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))


def check_reward_model(path: str) -> str:
    """Look at a reward model without loading its weights: tokenizer, configuration, and the names of the weights.

    Args:
        path: folder or hub id.

    Returns:
        What it is, in words.

    Raises:
        InputError: what `RewardModel` would refuse of it, as far as that can be told, or a folder without weights.
    """
    check_folder("reward model", path)
    if (Path(path) / "adapter_config.json").is_file():
        import_peft()
        return f"{path}: an adapter"
    with loading("reward model", path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    names = weight_names(path)
    if names is not None and not any(part in HEADS for name in names for part in name.split(".")):
        _check_missing(path, [HEADS[0]])
    if config.num_labels != 1:
        raise InputError(f"reward model {path!r}: expected one label, the score, got {config.num_labels}")
    _check_pad_token(path, tokenizer)
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    return f"{path}: {kind}"


def import_peft() -> Any:
    """The package peft, which is optional. Raises InputError when it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise InputError("adapters need the package peft: pip install 'align-cbrl[peft]'") from error


def _load_classifier(path: str, **config: Any) -> tuple[PreTrainedModel, list[str]]:
    """The classifier in `path`, and the names of weights that it lacks: transformers draws those at random."""
    model, info = AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True, trust_remote_code=False, **config
    )
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model = model.float()  # a leader's small steps would be lost in half precision, and most of a score's digits
    return model, sorted(info["missing_keys"])


def _positions(model: PreTrainedModel) -> int:
    """The most tokens that a model reads: the size of its table of positions, or what rotary ones were made for."""
    count = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = count if isinstance(count, int) and count > 0 else sys.maxsize  # none, as T5, or -1, as XLNet
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            found = min(found, module.num_embeddings - module.padding_idx - 1)  # RoBERTa counts from behind the padding
    return found


def _check_pad_token(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None:
        raise InputError(
            f"reward model {path!r}: its tokenizer has no pad token, so batches would be scored wrongly; set "
            "tokenizer.pad_token and save it beside the model"
        )


def _check_missing(path: str, missing: list[str]) -> None:
    if heads := [name for name in missing if name.split(".")[0] in HEADS]:
        raise InputError(
            f"reward model {path!r}: holds no weights for the score head ({', '.join(heads)}), so it is a language "
            "model, not a reward model, and its scores would be random; train one with trl's RewardTrainer first"
        )
    if missing:
        raise InputError(f"reward model {path!r}: lacks the weights {', '.join(missing[:3])}, which would be random")


def _load_adapted(path: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Tokenizer and merged model of a folder with a peft adapter."""
    peft = import_peft()
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    targets = config.get("target_modules") or []
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise InputError(
            f"reward model {str(path)!r}: its adapter lies on lm_head, which a reward model does not have; it is an "
            "adapter of a language model"
        )
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise InputError(f"reward model {str(path)!r}: its adapter_config.json names no base_model_name_or_path")
    if config.get("megatron_config") is not None:  # peft would import whatever module stands beside it
        raise InputError(f"reward model {str(path)!r}: its adapter_config.json asks for megatron, which is refused")
    if (path / base).is_dir():  # beside the adapter, as this library saves it
        base = str(path / base)
    tokens = path if (path / "tokenizer_config.json").is_file() else base
    with loading("the base of an adapter,", base):
        tokenizer = AutoTokenizer.from_pretrained(str(tokens), trust_remote_code=False)
        model, missing = _load_classifier(base, num_labels=1)
    held = {name.split(".")[0] for name in config.get("modules_to_save") or []}
    _check_missing(str(path), [name for name in missing if name.split(".")[0] not in held])
    merged = peft.PeftModel.from_pretrained(model, str(path)).merge_and_unload()
    return tokenizer, merged
