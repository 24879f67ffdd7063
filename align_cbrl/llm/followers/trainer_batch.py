"""A trl trainer's batch of completions as rollouts, with log-probabilities where they are needed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from align_cbrl.distributed import own_rows
from align_cbrl.errors import InputError
from align_cbrl.llm.followers.adapters import WithoutAdapter
from align_cbrl.llm.loading import loading
from align_cbrl.llm.logs import completion_rollouts
from align_cbrl.llm.prompts import prompt_ids
from align_cbrl.llm.sampling import batches, completion_log_probs, pad_left
from align_cbrl.llm.scoring import OF_TRL
from align_cbrl.rollouts import Rollouts


def trainer_rollouts(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    num_generations: int,
    log_probs: tuple[Tensor, Tensor] | None = None,
) -> Rollouts:
    """What trl hands to a reward function on this process, as rollouts of one step.

    Groups are trl's: `num_generations` rows in a row, over all processes. Contexts are the prompts, by a hash that is
    the same in every process and run.

    Args:
        prompts: as trl passes them.
        completions: likewise.
        columns: likewise; trl's own objects among them are left out.
        num_generations: completions of a prompt.
        log_probs: of the completions under policy and reference, [B] each.

    Example:
        >>> rollouts = trainer_rollouts(["a", "a", "b", "b"], ["c", "d", "e", "f"], {"trainer_state": None}, 2)
        >>> rollouts.group[:, 0].tolist(), sorted(rollouts.steps)
        ([0, 0, 1, 1], ['completion', 'prompt'])
    """
    rows = torch.arange(len(prompts)) + own_rows(len(prompts)).start
    data = {name: values for name, values in columns.items() if name not in OF_TRL}
    return completion_rollouts(prompts, completions, data, rows // num_generations, log_probs)


class Reference:
    """The frozen reference of a policy in training, and log-probabilities under both.

    Of a peft model it is the policy without its adapter, at no memory. Otherwise it is a copy of the policy as it is
    when `freeze` is called, or the model that is named: as much memory again as the policy's weights.

    Args:
        path: hub id or folder of the reference; None: the policy that training starts from.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else str(path)
        self._frozen: Any = None

    @property
    def is_there(self) -> bool:
        """Whether `freeze` has been called."""
        return self._frozen is not None

    def freeze(self, policy: PreTrainedModel) -> None:
        """Keep the policy as it is, or load the model that is named.

        Raises:
            InputError: a model that does not load, or a policy of which this process holds a part only.
        """
        if self.path is not None:
            with loading("reference", self.path):
                frozen = AutoModelForCausalLM.from_pretrained(self.path, dtype=policy.dtype)
        elif hasattr(policy, "disable_adapter"):
            self._frozen = WithoutAdapter(policy)
            return
        elif any(hasattr(parameter, "ds_id") for parameter in policy.parameters()):
            raise InputError(
                "LeaderCallback: expected a policy that is whole on every process, got one that DeepSpeed's ZeRO-3 "
                "shards, of which no frozen copy can be made; name its folder, reference=..., train an adapter, or "
                "leave out what needs log-probabilities (KLPriced)"
            )
        else:
            frozen = copy.deepcopy(policy)
            frozen.__dict__.pop("forward", None)  # trl's own, of an earlier trainer, which would answer for the policy
        self._frozen = frozen.requires_grad_(False).eval()

    def log_probs(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Any],
        completion_ids: list[list[int]],
        args: Any,
    ) -> tuple[Tensor, Tensor]:
        """log p(completion | prompt) under policy and reference, nats: float64 [B] each.

        Args:
            policy: in training; its mode stays as it is.
            tokenizer: of the policy.
            prompts: texts, or conversations.
            completion_ids: unpadded.
            args: of the trainer: batch size, precision and the chat template's arguments.
        """
        asked = prompt_ids(tokenizer, prompts, getattr(args, "chat_template_kwargs", None))
        if not isinstance(self._frozen, WithoutAdapter):
            self._frozen.to(policy.device)
        training, found = policy.training, []
        precision = torch.bfloat16 if args.bf16 else torch.float16
        policy.eval()
        try:
            with torch.autocast(policy.device.type, precision, enabled=bool(args.bf16 or args.fp16)):
                for piece in batches(len(asked), args.per_device_train_batch_size):
                    encoded, ids = pad_left(asked[piece], tokenizer.pad_token_id, policy.device), completion_ids[piece]
                    found.append([completion_log_probs(model, encoded, ids) for model in (policy, self._frozen)])
        finally:
            policy.train(training)
        own, prior = (torch.cat(values) for values in zip(*found, strict=True))
        return own, prior
