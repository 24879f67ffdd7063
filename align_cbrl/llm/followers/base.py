"""What followers that are language models share: a policy, its prompts, and its tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from align_cbrl.checks import Count, checked
from align_cbrl.distributed import initialize
from align_cbrl.errors import InputError
from align_cbrl.estimators.sampler_evidence import SamplerEvidence
from align_cbrl.llm.followers.adapters import without_dropout
from align_cbrl.llm.leaders.base import LanguageLeader
from align_cbrl.llm.loading import loading, weight_names
from align_cbrl.llm.prompts import check_count, check_prompts, positions_of, prompt_ids
from align_cbrl.llm.sampling import Completions, add_position_ids, sample_completions
from align_cbrl.problem import Follower, Leader, check_temperature
from align_cbrl.runs.inputs import check_folder

_TEMPLATE_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters


@checked
class LanguageFollower(Follower):
    """A causal language model that answers prompts; contexts are rows of its prompt dataset.

    Args:
        model: hub id or folder of the reference policy, which is also where training starts.
        prompts: dataset with a "prompt" column, of texts or of conversations (lists of messages, which go through the
            tokenizer's chat template); other columns reach rewards and judges.
        temperature: lambda > 0, the price of a nat of divergence from the reference, in units of reward. A leader that
            sets it, by `Leader.follower_temperature`, has the last word.
        max_completion_length: in tokens; the cut completion is the action.
        chat_template_kwargs: further arguments of the chat template, such as `{"enable_thinking": False}`.

    Raises:
        InputError: a model that does not load, a trainer's checkpoint or an adapter given as the model, a tokenizer
            that has no end-of-sequence token or more tokens than the model, prompts that `check` refuses,
            conversations without a chat template, a temperature that is not positive.
    """

    temperature: float
    discount: float = 0.0  # one step: nothing follows a completion

    def __init__(
        self,
        model: str | Path,
        prompts: Dataset,
        temperature: float,
        *,
        max_completion_length: Count = 64,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        initialize()  # before anything of accelerate's, which would decide alone how many processes there are
        check_temperature("temperature", temperature)
        check_prompts(prompts, 1)
        self.model_path = str(model)
        self.prompts = prompts
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        if taken := set(self.chat_template_kwargs) & set(_TEMPLATE_ARGUMENTS):
            raise InputError(
                f"chat_template_kwargs: expected arguments of the template itself, such as enable_thinking, got "
                f"{sorted(taken)}, which say how it is applied; leave them out, or change the tokenizer's own template"
            )
        check_base_model(self.model_path)
        with loading("model", self.model_path):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.model_path, padding_side="left"
            )
            config = AutoConfig.from_pretrained(self.model_path)
        check_tokenizer(self.model_path, self.tokenizer, config)
        self._positions = positions_of(config)
        self.check(prompts)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Dropout has no place in a policy whose log-probabilities are compared. float32 whatever the checkpoint's type:
        # a policy trained in lower precision would not settle.
        self._evidence = SamplerEvidence()
        self._load_settings: dict[str, Any] = without_dropout(config)

    def check(self, prompts: Dataset) -> None:
        """Look at every row of prompts that the policy is to answer: its own, or others to be measured on.

        Raises:
            InputError: a row that is no prompt, that the chat template refuses, that makes no token, or that leaves too
                few of the model's positions for a completion, named with the number of such rows; or a column whose
                name is reserved, see `align_cbrl.llm.prompts`.
        """
        check_prompts(prompts, 1)
        prompt_ids(
            self.tokenizer, prompts["prompt"][:], self.chat_template_kwargs,
            positions=self._positions, max_completion_length=self.max_completion_length,
        )  # fmt: skip

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` distinct rows of the prompts, uniformly. Raises InputError when there are fewer."""
        check_count(self.prompts, count)
        return torch.randperm(len(self.prompts), generator=generator)[:count]

    def answers(
        self,
        policy: PreTrainedModel,
        prior: PreTrainedModel | None,
        prompts: Dataset,
        context: Sequence[int],
        group_size: int,
        seed: int,
        batch_size: int = 256,
        evidence: SamplerEvidence | None = None,
    ) -> Completions:
        """Completions of any prompts, asked and cut as the follower's own are; what a policy is measured on.

        Args:
            policy: the model sampled from.
            prior: the reference model; None when it is the policy.
            prompts: a dataset with a "prompt" column.
            context: rows of `prompts` to answer.
            group_size: completions of each.
            seed: of the sampling.
            batch_size: rows generated together.
            evidence: is shown a part of the completions.
        """
        return sample_completions(
            policy,
            prior,
            self.tokenizer,
            prompts,
            context,
            group_size,
            self.max_completion_length,
            seed,
            batch_size,
            self.chat_template_kwargs,
            evidence,
        )

    def sampler_evidence(self) -> dict[str, float]:
        """See `Follower.sampler_evidence`; of the policy's samples, in training and for the leader."""
        return self._evidence.by_alternative()

    def _load(self) -> PreTrainedModel:
        with loading("model", self.model_path):
            model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32, **self._load_settings)
        add_position_ids(model)
        return model


def check_policy(path: str) -> str:
    """Look at a policy without loading its weights: tokenizer, configuration, and that there are weights.

    Args:
        path: folder or hub id.

    Returns:
        What it is, in words.

    Raises:
        InputError: what a `LanguageFollower` would refuse of it, or a folder without weights.
    """
    check_folder("model", path)
    check_base_model(path)
    with loading("model", path):
        tokenizer, config = AutoTokenizer.from_pretrained(path), AutoConfig.from_pretrained(path)
    check_tokenizer(path, tokenizer, config)
    weight_names(path)
    kind = (getattr(config, "architectures", None) or [config.model_type])[0]
    return f"{path}: {kind}, {len(tokenizer):,} tokens"


def check_base_model(path: str) -> None:
    """Refuse folders that would silently become another reference policy than is meant.

    Raises:
        InputError: a checkpoint of a trainer, an adapter, or a hub id that cannot be looked up.
    """
    folder = Path(path)
    if (folder / "trainer_state.json").is_file():
        raise InputError(
            f"model {path!r}: is a checkpoint of a run in training (it has a trainer_state.json), which would become "
            "the reference policy; pass the model that the run started from and let the follower continue from its own "
            "checkpoint, or, if this policy is to be the reference, copy it elsewhere with save_pretrained"
        )
    with loading("model", path):  # as transformers, which would load an adapter with the model, also of a hub id
        adapter = find_adapter_config_file(path)
    if adapter is not None:
        raise InputError(
            f"model {path!r}: is an adapter (it has an adapter_config.json), and the reference would be its base model "
            "without it; merge it first: peft.AutoPeftModelForCausalLM.from_pretrained(path).merge_and_unload()"
            ".save_pretrained(...), or pass the base model and peft_config="
        )


def check_tokenizer(path: str, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Refuse a tokenizer that does not belong to the model.

    Raises:
        InputError: no end-of-sequence token, or token ids that the model has no row for.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {path!r}: its tokenizer has no end-of-sequence token; set eos_token")
    largest, size = max(tokenizer.get_vocab().values()), config.get_text_config().vocab_size
    if largest >= size:
        raise InputError(
            f"model {path!r}: its tokenizer makes token ids up to {largest}, and the model has {size} tokens; they do "
            "not belong together: save the model's own tokenizer beside it, or call model.resize_token_embeddings"
        )


def language_leader(leader: Leader) -> LanguageLeader:
    """The leader as a `LanguageLeader`. Raises InputError when it is none."""
    if not isinstance(leader, LanguageLeader):
        raise InputError(
            f"leader: expected a LanguageLeader, which scores prompts and completions, got {type(leader).__name__}"
        )
    return leader
