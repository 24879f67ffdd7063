"""What every trl trainer used here has in common: observed batches, and steps that depend on their number alone.

Only the files of this folder touch trl's private methods. Written against trl 1.16.
What is relied upon: `_generate_and_score_completions` works on the unshuffled batch, in which the completions of a
prompt stand side by side; `_generate_single_turn` samples by `self.generation_config`; log-probabilities come from
`_get_per_token_logps_and_entropies`, of the policy first and of the reference second; `_metrics["train"]` holds a list
of numbers for each metric until they are logged; `_prepare_inputs` shuffles every
tensor of the batch alike before `_compute_loss`; the sampler yields one row a completion. tests/test_llm_followers.py
and tests/test_llm_resume.py fail if any of it changes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Sampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import set_seed
from trl.models.utils import disable_gradient_checkpointing

from align_cbrl.errors import InputError, first_line
from align_cbrl.estimators.sampler_evidence import SamplerEvidence
from align_cbrl.llm.followers.trl.settings import Fields
from align_cbrl.llm.sampling import (
    SHOWN_TOKENS,
    Completions,
    add_position_ids,
    completion_logits,
    end_tokens,
    generation_config,
    sampled_by,
    show_evidence,
    shown_rows,
)
from align_cbrl.llm.scoring import copied
from align_cbrl.problem import step_seed

# trl 1.16 reads an attribute by its old name at every start of training, which nobody here can mend; it goes with 1.17.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

CONTEXT = "context"
"""Name of the column that carries each prompt's row number through trl.

trl is given prompts and row numbers only. It has a use of its own for some names, such as image; the user's columns
are looked up by the row number instead.
"""

_NOT_TAKEN = ("num_tokens", "step_time")

TESTED = (Version("1.16"), Version("1.17"))
"""The versions of trl that this was tested with: from the first, up to but without the second."""


class ObservedTrainer(Trainer):
    """A mixin for trl's online trainers. It keeps the newest batch of completions, with their log-probabilities, for
    the leader to see, and makes prompts and random numbers of a step functions of the step's number.

    Attributes:
        observed: the newest batch.
        rows: the prompts' rows of an optimizer step, by its number.
        seed_of: the seed of an optimizer step, by its number.
        rate_of: the learning rate of an optimizer step, by its number in this train() call, as a part of the whole one.
        kl_price: lambda, asked for anew at every step.
        columns_of: the user's columns at rows of the prompts.
        first_step: optimizer steps before this train() call.
        evidence: against the sampler, of all batches so far.
    """

    observed: Completions | None = None
    rows: Callable[[int], Sequence[int]]
    seed_of: Callable[[int], int]
    rate_of: Callable[[int], float]
    kl_price: Callable[[], float]
    columns_of: Callable[[Sequence[int]], dict[str, list[Any]]]
    first_step: int = 0
    evidence: SamplerEvidence

    _log_probs_seen: list[Tensor]
    _kept: tuple[Tensor, Tensor] | None = None

    @property
    def reference(self) -> PreTrainedModel | None:
        """The frozen reference policy; None where it is the policy without its adapter."""
        raise NotImplementedError

    def begin(self, first_step: int, steps: int) -> None:
        """Prepare a train() call of `steps` optimizer steps that continues after `first_step` of them."""
        self.first_step = first_step
        self.args.max_steps = steps
        self._step = first_step * self.args.gradient_accumulation_steps  # trl counts forward passes
        self.forget_buffer()
        self._last_loaded_step = -1  # trl would skip vLLM's new weights where the last call ended at the same step

    def forget_buffer(self) -> None:
        """Drop completions that an earlier reward has scored."""
        self._buffered_inputs = None

    def take_metrics(self) -> dict[str, float]:
        """trl's own metrics of the newest optimizer step, under `trl/`; nothing where none was taken since.

        Without those of the one reward function, which are those of the reward, and without counts and times that
        begin anew in every train() call.
        """
        kept = self._metrics["train"]
        newest = {name: values[-1] for name, values in kept.items() if values}
        kept.clear()
        return {
            f"trl/{name}": float(value)
            for name, value in newest.items()
            if math.isfinite(value) and name not in _NOT_TAKEN and not name.startswith("rewards/")
        }

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """The rate as a function of the step, whatever the optimizer has been left with by an earlier train() call."""
        optimizer = self.optimizer if optimizer is None else optimizer
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.args.learning_rate
        self.lr_scheduler = LambdaLR(optimizer, self.rate_of)
        return self.lr_scheduler

    def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
        accumulation = self.args.gradient_accumulation_steps
        return _StepSampler(
            self.rows,
            passes=range(self.first_step * accumulation, (self.first_step + self.args.max_steps) * accumulation),
            passes_per_batch=accumulation * self.num_iterations,
            iterations=self.num_iterations,
            repeat=self.num_generations,
            length=self.args.generation_batch_size,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        seed = step_seed(self.seed_of(self.first_step + self.state.global_step), self.accelerator.process_index)
        set_seed(seed % 2**32)
        self._log_probs_seen, self._kept = [], None
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self._test_sampler(output)
        completions, token_ids = self._scored
        mask = output["completion_mask"].to(torch.float64)
        policy, prior = ((seen.double() * mask).sum(1).cpu() for seen in self._log_probs_seen[:2])  # [B, L] -> [B]
        context = [row[CONTEXT] for row in inputs]
        self.observed = Completions(
            context=torch.tensor(context),
            columns=self.columns_of(context),
            token_ids=token_ids,
            text=completions,
            log_policy=policy,
            log_prior=prior,
        )
        self._log_probs_seen = []
        output["place"] = torch.arange(len(inputs))  # shuffled with the rest, to find the kept log-probabilities by
        return output

    @torch.no_grad()
    def _test_sampler(self, batch: dict[str, Any]) -> None:
        """Whether what was sampled is the policy's, on a few completions, whose logits cost one small forward pass."""
        rows = shown_rows(*batch["completion_ids"].shape)
        prompt = {"input_ids": batch["prompt_ids"][rows], "attention_mask": batch["prompt_mask"][rows]}
        ids, mask = (batch[f"completion_{name}"][rows, :SHOWN_TOKENS] for name in ("ids", "mask"))
        with disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            logits = completion_logits(self.model, prompt, ids, mask)
        policy = self.accelerator.unwrap_model(self.model)
        show_evidence(self.evidence, logits, prompt, ids, mask, end_tokens(policy, self._tokenizer))

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        policy = self.accelerator.unwrap_model(self.model)
        self.generation_config = generation_config(policy, self._tokenizer, self.max_completion_length)
        with sampled_by(policy, self.generation_config):
            return super()._generate_single_turn(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            if self._kept is not None:
                (log_probs, entropies), self._kept = self._kept, None
                place = self._place.to(log_probs.device)
                return log_probs[place], entropies[place], None
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if not self._log_probs_seen and self._one_forward_is_enough():
            # The loss needs the policy's log-probabilities on the same batch, at the same parameters: keep this graph.
            with torch.enable_grad():
                log_probs, entropies, _ = super()._get_per_token_logps_and_entropies(
                    *args, **{**kwargs, "compute_entropy": True}
                )
            self._kept = (log_probs, entropies)
            result = (log_probs.detach(), None, None)
        else:
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs_seen.append(result[0].detach())
        return result

    def _one_forward_is_enough(self) -> bool:
        """Whether the batch is trained on once, whole, by this process, and its graph may stay in memory meanwhile."""
        args = self.args
        return (
            self.model.training
            and self.num_iterations == 1
            and args.gradient_accumulation_steps == args.steps_per_generation == 1
            and self.accelerator.num_processes == 1
            and not self.is_deepspeed_enabled
            and not self.is_fsdp_enabled
            and not args.gradient_checkpointing
            and not self.aux_loss_enabled
        )

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        self._place = inputs["place"]
        return super()._compute_loss(model, inputs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        self._scored = (copied(completions), copied(completion_ids_list))
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return rewards


class _StepSampler(Sampler[int]):
    """The rows that a train() call reads, `repeat` times each; see `RepeatSampler` in trl for the order."""

    def __init__(
        self,
        rows: Callable[[int], Sequence[int]],
        passes: range,
        passes_per_batch: int,
        iterations: int,
        repeat: int,
        length: int,
    ) -> None:
        self.rows, self.passes, self.passes_per_batch = rows, passes, passes_per_batch
        self.iterations, self.repeat, self.length = iterations, repeat, length

    def __iter__(self) -> Iterator[int]:
        for forward in self.passes:
            for row in self.rows(forward // self.passes_per_batch * self.iterations):
                yield from [row] * self.repeat

    def __len__(self) -> int:
        return len(self.passes) * self.length


class AfterEachStep(TrainerCallback):
    """Calls a function after every optimizer step; training ends when it returns False."""

    def __init__(self, function: Callable[[int], bool]) -> None:
        self.function = function

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Called by transformers."""
        if not self.function(state.global_step):
            control.should_training_stop = True
        return control


def prepare_observed(trainer: ObservedTrainer) -> None:
    """Finish a trainer that was just built: position ids, and train() calls without their fixed cost."""
    for model in (trainer.accelerator.unwrap_model(trainer.model), trainer.reference):
        if model is not None:
            add_position_ids(model)
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return

    def free_memory(*objects: Any) -> Any:
        # As accelerate's, without its walk through all of Python's objects: 0.2 s at every train() call.
        accelerator._schedulers, accelerator._optimizers, accelerator._models = [], [], []
        accelerator._dataloaders = []
        accelerator.step = 0
        return list(objects)

    accelerator.free_memory = free_memory


def whole_parameters(trainer: ObservedTrainer) -> dict[str, Tensor] | None:
    """The policy's parameters, gathered on rank 0 where processes hold parts; None where each process has all of them.

    Every process has to ask.

    Raises:
        InputError: DeepSpeed is not told to gather, or what was gathered is not whole.
    """
    accelerator = trainer.accelerator
    stage = accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else 0
    if not trainer.is_fsdp_enabled and stage != 3:
        return None
    try:
        gathered: dict[str, Tensor] = accelerator.get_state_dict(trainer.model)
    except ValueError as error:  # accelerate's words for a missing zero3_save_16bit_model
        raise InputError(f"save_pretrained: the policy's parts cannot be gathered: {first_line(error)}") from error
    if accelerator.is_main_process:
        for name, parameter in accelerator.unwrap_model(trainer.model).named_parameters():
            whole = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor in its place
            found = tuple(gathered[name].shape) if name in gathered else None
            if found != whole:
                raise InputError(
                    f"save_pretrained: expected {name} of shape {whole}, gathered {found}; nothing is written"
                )
    return gathered


def check_trl_version() -> None:
    """Raise InputError unless the trl that is installed was tested."""
    installed = importlib.metadata.version("trl")
    if not TESTED[0] <= Version(installed) < TESTED[1]:
        raise InputError(
            f"trl {installed} is installed; expected at least {TESTED[0]} and below {TESTED[1]}, whose private methods "
            f"the followers rely on: pip install 'trl>={TESTED[0]},<{TESTED[1]}'"
        )


def build_config(fields: Fields, settings: dict[str, Any]) -> Any:
    """A trl configuration in which every field that could move the fixed point has the value that does not.

    Raises:
        InputError: values that move it, an unknown field, values that trl refuses, or vLLM where it is not installed.
    """
    check_trl_version()
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    common: dict[str, Any] = {**fields.defaults(), **quiet, "max_grad_norm": 1.0}
    if not torch.cuda.is_available():  # defaults of trl that only pay on an accelerator
        common |= {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "dataloader_pin_memory": False}
    fields.check_fixed(settings)
    if settings.get("use_vllm") and importlib.util.find_spec("vllm") is None:
        raise InputError("use_vllm=True: vllm is not installed; pip install 'trl[vllm]' on a machine with a GPU")
    try:
        config = fields.config(**{**common, **settings})
    except (TypeError, ValueError) as error:
        raise InputError(f"{fields.name} settings: {error}; see trl.{fields.config.__name__} for the fields") from error
    if config.num_generations < 2:
        raise InputError(f"num_generations={config.num_generations}: the baseline needs at least 2")
    return config
