"""Followers that are language models: trained by RLOO on trl, or tilted without any training."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.trainer_utils import set_seed

from align_cbrl.distributed import initialize, rank, world_size
from align_cbrl.errors import InputError, first_line
from align_cbrl.functional import tilt_weights
from align_cbrl.llm.completions import Completions, check_prompts, sample_completions
from align_cbrl.llm.leaders import LanguageLeader
from align_cbrl.llm.trl_rloo import CONTEXT, AfterEachStep, ObservedRLOOTrainer, boltzmann_config
from align_cbrl.problem import Follower, Leader, OnRollouts, check_temperature, step_seed
from align_cbrl.rollouts import Rollouts


class LanguageFollower(Follower):
    """A causal language model that answers prompts; contexts are rows of its prompt dataset.

    Args:
        model: hub id or folder of the reference policy, which is also where training starts.
        prompts: dataset with a "prompt" column; other columns reach rewards and judges.
        temperature: lambda > 0, the price of a nat of divergence from the reference, in units of reward.
        max_completion_length: in tokens; the cut completion is the action.

    Raises:
        InputError: a model that does not load, a tokenizer without an end-of-sequence token, a dataset without a
            prompt column, a temperature that is not positive.
    """

    temperature: float
    discount: float = 0.0  # one step: nothing follows a completion

    def __init__(
        self, model: str | Path, prompts: Dataset, temperature: float, *, max_completion_length: int = 64
    ) -> None:
        initialize()  # before anything of accelerate's, which would decide alone how many processes there are
        check_temperature("temperature", temperature)
        check_prompts(prompts, 1)
        self.model_path = str(model)
        self.prompts = prompts
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                self.model_path, padding_side="left"
            )
        except (OSError, ValueError) as error:
            raise InputError(
                f"model {self.model_path!r}: neither a hub id nor a folder that loads ({first_line(error)})"
            ) from error
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"model {self.model_path!r}: its tokenizer has no end-of-sequence token; set eos_token")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def sample_contexts(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` distinct rows of the prompts, uniformly. Raises InputError when there are fewer."""
        check_prompts(self.prompts, count)
        return torch.randperm(len(self.prompts), generator=generator)[:count]

    def _load(self) -> PreTrainedModel:
        # float32 whatever the checkpoint's type: a policy trained in lower precision would not settle
        return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)


class RLOOFollower(LanguageFollower):
    """A policy trained by trl's RLOO, whose fixed point is the Boltzmann response (trl's KL, in the reward, is exact).

    With `inside=True` the leader steps inside the trainer's own loop, every `interval` optimizer steps, on the
    completions just trained on: one train() call for the whole run. With `inside=False` every leader step waits for
    `interval` optimizer steps and sees fresh completions of freshly drawn prompts.

    Args:
        model, prompts, temperature, max_completion_length: as for `LanguageFollower`.
        prompts_per_step: distinct prompts in each training batch, over all processes: one process and several train on
            batches of the same size. Each gets an equal part of the completions, in which a group may be cut in two.
        group_size: completions per prompt, at least 2; 4 or more recommended.
        learning_rate: of the policy's AdamW, constant.
        interval: optimizer steps between leader steps.
        warmup: optimizer steps before the first leader step, to come near the first best response.
        inside: see above.
        seed: of sampling and prompt order in `train`; `follow` uses the seed it is given.
        settings: other fields of `trl.RLOOConfig`; those that bias the response are refused.

    Raises:
        InputError: see `LanguageFollower`; fewer prompts than a generation batch; group size 1; biased settings; a
            batch that the processes cannot share equally.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: Dataset,
        temperature: float,
        *,
        max_completion_length: int = 64,
        prompts_per_step: int = 8,
        group_size: int = 8,
        learning_rate: float = 1e-4,
        interval: int = 5,
        warmup: int = 0,
        inside: bool = True,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(model, prompts, temperature, max_completion_length=max_completion_length)
        if group_size < 2:
            raise InputError(f"group_size: expected at least 2 completions a prompt, got {group_size}")
        check_prompts(prompts, prompts_per_step)
        if prompts_per_step * group_size % world_size():
            raise InputError(
                f"prompts_per_step={prompts_per_step}, group_size={group_size}: expected a batch that {world_size()} "
                f"processes can share equally, got {prompts_per_step * group_size} completions"
            )
        self.prompts_per_step, self.group_size = prompts_per_step, group_size
        self.interval, self.warmup, self.inside, self.seed = interval, warmup, inside, seed
        folder = tempfile.mkdtemp(prefix="align_cbrl_rloo_")  # trl insists on one; nothing of value goes there
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._config = boltzmann_config(
            temperature,
            output_dir=folder,
            per_device_train_batch_size=prompts_per_step * group_size // world_size(),
            num_generations=group_size,
            max_completion_length=max_completion_length,
            learning_rate=learning_rate,
            seed=seed,
            **(settings or {}),
        )
        self._leader: LanguageLeader | None = None
        self._trainer: ObservedRLOOTrainer | None = None
        self._restored: dict[str, Any] | None = None
        self._steps = 0  # optimizer steps over the follower's life
        self._on_step: Callable[[int], bool] = lambda step: True

    @property
    def policy(self) -> PreTrainedModel:
        """The policy being trained."""
        return self._built().accelerator.unwrap_model(self._built().model)

    @property
    def prior(self) -> PreTrainedModel:
        """The frozen reference policy."""
        return self._built().accelerator.unwrap_model(self._built().ref_model)

    @property
    def completions_seen(self) -> int:
        """Completions the follower has been trained on."""
        return self._steps * self.prompts_per_step * self.group_size

    def train(self, leader: Leader, steps: int, on_step: Callable[[int], bool] | None = None) -> None:
        """Take `steps` optimizer steps towards the best response to `leader`.

        Args:
            leader: a `LanguageLeader`; its reward is read anew at every step.
            steps: optimizer steps.
            on_step: called after each with the number taken in this call; returns False to end it.
        """
        trainer = self._built()
        self._leader = _language_leader(leader)
        trainer.args.max_steps = steps
        # Each call gets its own prompt order: trl restarts its sampler from args.seed at every train().
        trainer.args.seed = trainer.args.data_seed = step_seed(self.seed, self._steps) % 2**31
        trainer.forget_buffer()

        def after_step(step: int) -> bool:
            self._steps += 1
            return True if on_step is None else on_step(step)

        self._on_step = after_step
        set_seed(trainer.args.seed + rank())  # ranks answer the same prompt differently
        trainer.train()

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """`interval` optimizer steps (`warmup` more the first time), on prompts of the whole dataset."""
        self.train(leader, self.interval + (self.warmup if self._steps == 0 else 0))
        return {"follower_steps": float(self._steps)}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Fresh completions of the present policy for these prompts."""
        return self.sample(contexts, group_size, generator).rollouts()

    def sample(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Completions:
        """As `rollout`, before it becomes rollouts."""
        return sample_completions(
            self.policy,
            self.prior,
            self.tokenizer,
            self.prompts,
            contexts.tolist(),
            group_size,
            self.max_completion_length,
            seed=int(torch.randint(2**31, (1,), generator=generator)),
        )

    def follow(
        self,
        leader: Leader,
        on_rollouts: OnRollouts,
        *,
        start: int,
        steps: int,
        contexts_per_step: int,
        group_size: int,
        seed: int,
    ) -> None:
        """See `Follower.follow`; with `inside`, one train() call whose callback hands out the newest batch.

        Raises:
            InputError: inside the loop, more contexts or another group size than the follower trains on.
        """
        self.seed = seed
        if not self.inside:
            super().follow(
                leader, on_rollouts, start=start, steps=steps,
                contexts_per_step=contexts_per_step, group_size=group_size, seed=seed,
            )  # fmt: skip
            return
        if contexts_per_step > self.prompts_per_step or group_size != self.group_size:
            raise InputError(
                f"contexts_per_step={contexts_per_step}, group_size={group_size}: inside the training loop the leader "
                f"sees the follower's own batch of {self.prompts_per_step} prompts x {self.group_size} completions; "
                "ask for no more prompts and the same group size, or set inside=False"
            )
        per_rank = self.prompts_per_step * self.group_size // world_size()
        seen = min(per_rank, contexts_per_step * group_size - rank() * per_rank)  # of this rank's completions
        if contexts_per_step * group_size <= (world_size() - 1) * per_rank:
            raise InputError(
                f"contexts_per_step={contexts_per_step}: expected enough prompts for each of {world_size()} processes, "
                f"of the {self.prompts_per_step} that the follower trains on; ask for {self.prompts_per_step}"
            )
        warmup = self.warmup if start == 0 else 0
        trainer = self._built()

        def on_step(step: int) -> bool:
            if step <= warmup or (step - warmup) % self.interval:
                return True
            assert trainer.observed is not None  # a step has been taken
            rollouts = trainer.observed.rollouts().select(slice(0, seen))
            return on_rollouts(rollouts, {"follower_steps": float(self._steps)})

        self.train(leader, warmup + (steps - start) * self.interval, on_step)

    def state_dict(self) -> dict[str, Any]:
        """Policy, its optimizer's moments, and the number of steps taken."""
        if self._trainer is None or self._trainer.optimizer is None:
            return {}
        weights = {n: p.detach() for n, p in self.policy.named_parameters() if p.requires_grad}
        return {"policy": weights, "optimizer": self._trainer.optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if not state:
            return
        trainer = self._built()
        parameters = dict(self.policy.named_parameters())
        with torch.no_grad():
            for name, value in state["policy"].items():
                parameters[name].copy_(value)
        trainer.create_optimizer()
        trainer.optimizer.load_state_dict(state["optimizer"])
        self._steps = state["steps"]

    def save_pretrained(self, path: str | Path) -> None:
        """Write the policy and its tokenizer to a folder that transformers loads."""
        self.policy.save_pretrained(path)
        self.tokenizer.save_pretrained(path)

    def _built(self) -> ObservedRLOOTrainer:
        if self._trainer is None:

            def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
                assert self._leader is not None  # train() sets it before trl asks
                for name in ("trainer_state", "log_extra", "log_metric", CONTEXT):
                    columns.pop(name, None)
                with torch.no_grad():
                    scores = self._leader.score(prompts, completions, **columns).double()
                if not torch.isfinite(scores).all():
                    i = int((~torch.isfinite(scores)).nonzero()[0])
                    raise InputError(f"leader's reward: got {scores[i].item()} for completion {i}: {completions[i]!r}")
                return scores.tolist()

            try:
                self._trainer = ObservedRLOOTrainer(
                    model=self.model_path,
                    reward_funcs=reward,
                    args=self._config,
                    train_dataset=self.prompts.add_column(CONTEXT, list(range(len(self.prompts)))),
                    processing_class=self.tokenizer,
                    callbacks=[AfterEachStep(lambda step: self._on_step(step))],
                )
                # With trl's own bar switched off, transformers would print a dictionary after every train().
                self._trainer.remove_callback(PrinterCallback)
            except OSError as error:
                raise InputError(
                    f"model {self.model_path!r}: neither a hub id nor a folder that loads ({first_line(error)})"
                ) from error
        return self._trainer


class TiltedFollower(LanguageFollower):
    """The best response without training: the reference's completions, reweighted by exp(r_x / lambda).

    Self-normalised importance sampling within each prompt's group: consistent as the group grows, and honest only
    while `effective_sample_size` is well above 1 / group size. It needs no gradient of the policy, so it answers what
    a leader's step is worth before anything is trained.

    Args:
        model, prompts, temperature, max_completion_length: as for `LanguageFollower`.
        batch_size: completions generated together.
    """

    def __init__(
        self,
        model: str | Path,
        prompts: Dataset,
        temperature: float,
        *,
        max_completion_length: int = 64,
        batch_size: int = 256,
    ) -> None:
        super().__init__(model, prompts, temperature, max_completion_length=max_completion_length)
        self.batch_size = batch_size
        self._leader: LanguageLeader | None = None
        self._policy: PreTrainedModel | None = None

    def respond(self, leader: Leader, contexts: Tensor) -> dict[str, float]:
        """Nothing to train: remembers whose reward to tilt by."""
        self._leader = _language_leader(leader)
        return {}

    def rollout(self, contexts: Tensor, group_size: int, generator: torch.Generator) -> Rollouts:
        """Completions of the reference with weights [B] that stand for the best response.

        Raises:
            InputError: group size 1, which cannot be tilted, or no leader yet.
        """
        if group_size < 2:
            raise InputError(f"group_size: expected at least 2 completions a prompt, got {group_size}")
        if self._leader is None:
            raise InputError("TiltedFollower.rollout: call respond(leader, contexts) first")
        if self._policy is None:
            self._policy = self._load().eval()
        sample = sample_completions(
            self._policy,
            None,
            self.tokenizer,
            self.prompts,
            contexts.tolist(),
            group_size,
            self.max_completion_length,
            seed=int(torch.randint(2**31, (1,), generator=generator)),
            batch_size=self.batch_size,
        )
        untilted = sample.rollouts()
        with torch.no_grad():
            log_ratio = self._leader.reward(untilted)[:, 0].double().cpu() / self.temperature
        weight = tilt_weights(log_ratio, sample.context)
        # log(pi* / prior) = r / lambda - log Z, with Z estimated from the group: W_i = exp(r_i / lambda) / Z
        tilted = sample.log_prior + log_ratio - (log_ratio - weight.clamp(min=math.ulp(0.0)).log())
        return Rollouts.bandit(
            contexts=untilted.contexts,
            steps=untilted.steps,
            log_policy=tilted,
            log_prior=sample.log_prior,
            weight=weight,
        )


def _language_leader(leader: Leader) -> LanguageLeader:
    if not isinstance(leader, LanguageLeader):
        raise InputError(
            f"leader: expected a LanguageLeader, which scores prompts and completions, got {type(leader).__name__}"
        )
    return leader
