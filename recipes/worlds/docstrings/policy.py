"""The base model: a small Llama that writes docstrings, trained from nothing on the data."""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from ...fine_tuning import fine_tune

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"

# The end of every prompt as one token: it keeps prompts short and guarantees that tokenising
# prompt + completion never merges across the boundary.
PROMPT_END = ':\n    """'


def train_tokenizer(dataset: Dataset, *, vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the prompts and completions of a dataset.

    Args:
        dataset: the string columns `prompt` and `completion`.
        vocab_size: entries of the vocabulary, special tokens included.

    Returns:
        A tokenizer that puts `<bos>` in front of a text, pads on the left (as generation needs)
        and has distinct `<bos>`, `<eos>` and `<pad>`.

    Raises:
        ValueError: when `vocab_size` cannot hold the 256 bytes and the special tokens.
    """
    if vocab_size < 260:
        raise ValueError(f"vocab_size must be at least 260 (bytes, special tokens), got {vocab_size}")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [prompt.removesuffix(PROMPT_END) for prompt in dataset["prompt"]]
    completions = list(dataset["completion"])
    # Twice the completions: a word that is written has more need of a token than one that is read.
    core.train_from_iterator([*prompts, *completions, *completions], trainer)
    core.add_tokens([AddedToken(PROMPT_END, normalized=False)])
    bos_id = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        # Otherwise decoding would move the space in front of "." and "'".
        clean_up_tokenization_spaces=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    hidden_size: int = 192,
    intermediate_size: int | None = None,
    layers: int = 2,
    heads: int = 4,
) -> LlamaForCausalLM:
    """Return an untrained Llama, drawn from torch's generator; of about a million parameters where nothing is said.

    Few wide layers rather than many narrow ones: at this size the time of a generated token is
    the overhead of a layer's Python, not its arithmetic.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or 3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=256,
        # trl's `disable_dropout` edits modules only and would leave this functional dropout on.
        attention_dropout=0.0,
        tie_word_embeddings=True,
        use_cache=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train_policy(
    dataset: Dataset,
    out_dir: str | Path,
    *,
    seed: int,
    epochs: float = 4.5,
    batch_size: int = 24,
    learning_rate: float = 1.5e-3,
    vocab_size: int = 2048,
    hidden_size: int = 192,
    layers: int = 2,
) -> Path:
    """Train tokenizer and model on prompt and completion, with the loss on completions only.

    Args:
        dataset: the string columns `prompt` and `completion`; others are ignored.
        out_dir: folder that receives the model and the tokenizer.
        seed: of the initial weights and of the order of the rows.
        epochs: passes over the dataset.
        batch_size: rows of a step.
        learning_rate: the peak; linear warm-up over a twentieth of the steps, cosine decay.
        vocab_size: entries of the tokenizer's vocabulary.
        hidden_size: width of the model.
        layers: depth of the model.

    Returns:
        `out_dir`, which `AutoModelForCausalLM` and `AutoTokenizer` can load.

    Raises:
        ValueError: when the columns are missing or the dataset is empty.
    """
    set_seed(seed)
    tokenizer = train_tokenizer(dataset, vocab_size=vocab_size)
    model = make_model(tokenizer, hidden_size=hidden_size, layers=layers)
    return fine_tune(
        model, tokenizer, dataset, out_dir, seed=seed, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate
    )
