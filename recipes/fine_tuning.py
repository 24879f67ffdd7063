"""Small policies and reward models for recipes, trained by trl's own trainers on data that is made or shipped here."""

from __future__ import annotations

from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from align_cbrl.runs.progress import Progress


def without_bars() -> None:
    """Switch off the libraries' bars: a hundred of a fraction of a second each would bury the run's own."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


class _Shown(TrainerCallback):
    """Shows how far a training is, in place of the libraries' own bars."""

    def __init__(self, steps: int, name: str) -> None:
        self._progress, self._figures = Progress(steps, name), {}  # type: ignore[var-annotated]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Called by transformers with the newest loss."""
        self._figures = {name: value for name, value in (logs or {}).items() if name == "loss"} or self._figures

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by transformers after each optimizer step."""
        self._progress.update(**self._figures)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by transformers."""
        self._progress.close()


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    out_dir: str | Path,
    *,
    seed: int,
    epochs: float,
    batch_size: int,
    learning_rate: float,
) -> Path:
    """Train a causal language model on prompt and completion, with the loss on completions only.

    Args:
        model: trained in place.
        tokenizer: of the model.
        dataset: the string columns `prompt` and `completion`; others are ignored.
        out_dir: folder that receives the model and the tokenizer.
        seed: of the order of the rows.
        epochs: passes over the dataset.
        batch_size: rows of a step.
        learning_rate: the peak; linear warm-up over a twentieth of the steps, cosine decay.

    Returns:
        `out_dir`, which `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Raises:
        ValueError: when the columns are missing or the dataset is empty.
    """
    missing = {"prompt", "completion"} - set(dataset.column_names)
    if missing or len(dataset) == 0:
        raise ValueError(
            f"fine_tune needs rows with prompt and completion; missing columns: {sorted(missing)}, rows: {len(dataset)}"
        )
    steps = max(1, round(epochs * len(dataset) / batch_size))
    args = SFTConfig(
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        warmup_steps=steps // 20,
        adam_beta2=0.95,
        # Half of a random batch is padding.
        train_sampling_strategy="group_by_length",
        max_length=128,
        completion_only_loss=True,
        **_common(out_dir, seed, learning_rate),
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        callbacks=[_Shown(steps, "policy")],
    )
    trainer.remove_callback(PrinterCallback)  # it prints a dictionary now and then
    trainer.train()
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return Path(out_dir)


def train_reward_model(
    base_path: str | Path,
    preferences: Dataset,
    out_dir: str | Path,
    *,
    seed: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    epochs: float = 1.0,
    max_length: int = 128,
) -> Path:
    """Train a reward model, initialised from a causal language model, on preferences.

    Args:
        base_path: folder of the language model and its tokenizer.
        preferences: the columns `prompt`, `chosen` and `rejected`.
        out_dir: folder that receives the reward model and the tokenizer.
        seed: of the new head and the order of the pairs.
        batch_size: pairs of a step.
        learning_rate: the peak; linear warm-up over a twentieth of the steps, cosine decay.
        epochs: passes over the pairs.
        max_length: tokens of prompt and answer; trl leaves longer pairs out.

    Returns:
        `out_dir`, which `AutoModelForSequenceClassification` and `AutoTokenizer` can load.

    Raises:
        OSError: when `base_path` holds no model.
    """
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    base = AutoModelForCausalLM.from_pretrained(base_path)
    set_seed(seed)
    config = AutoConfig.from_pretrained(base_path)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    model = AutoModelForSequenceClassification.from_config(config)
    # Not `from_pretrained`, which would warn that the head, rightly, is not in the checkpoint.
    model.base_model.load_state_dict(base.base_model.state_dict())
    steps = max(1, int(epochs * len(preferences)) // batch_size)
    args = RewardConfig(
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        warmup_steps=steps // 20,
        max_length=max_length,
        # Without it the mean of the scores is free to drift.
        center_rewards_coefficient=0.01,
        **_common(out_dir, seed, learning_rate),
    )
    trainer = RewardTrainer(
        model=model,
        args=args,
        train_dataset=preferences,
        processing_class=tokenizer,
        callbacks=[_Shown(steps, "reward model")],
    )
    trainer.remove_callback(PrinterCallback)  # it prints a dictionary now and then
    trainer.train()
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    return Path(out_dir)


def _common(out_dir: str | Path, seed: int, learning_rate: float) -> dict[str, object]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(out_dir),
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "seed": seed,
        "data_seed": seed,
        "bf16": False,
        "activation_checkpointing": False,
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 10,  # for the loss beside the bar
        "report_to": "none",
        "disable_tqdm": True,
    }
